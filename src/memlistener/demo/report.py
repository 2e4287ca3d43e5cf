"""What a run of the demo found: the record, its verdict, and both ways to print it."""

from __future__ import annotations

from typing import Any

import attrs
from rich.table import Table

from memlistener.rig.table import Row, as_table, count, microseconds, vcpus


@attrs.frozen
class WrongValue:
    """The first wrong value that a vCPU found.

    Attributes:
        vcpu: Its number.
        addr: The guest address.
        value: What it found there.
    """

    vcpu: int
    addr: int
    value: int

    def __str__(self) -> str:
        return f"vCPU {self.vcpu} found {self.value:#010x} at {self.addr:#x}"


@attrs.frozen(kw_only=True)
class Result:
    """What a run has done, so far or in all. Times are in seconds.

    Attributes:
        backend: ``kvm``, or ``fake`` for `FakeKvm`'s scripted vCPUs.
        cpu: The guest's processor mode.
        policy: When the vCPUs were held.
        changes: The kinds of change that were made in turn.
        seconds: From the first transaction to the end of the last.
        transactions: How many were committed.
        memslot_ioctls: How many KVM_SET_USER_MEMORY_REGION they took.
        brackets: How many of them held the vCPUs.
        kicks: How often a vCPU was turned out of the guest.
        holes: Accesses to memory that no slot covered.
        wrong_values: Values that the guest found wrong.
        first_wrong: The first of them, for each vCPU that found any.
        internal_errors: How often KVM gave up, finding no code to execute.
        other_exits: What else ended a run, and how often: nothing should.
        wait_median: How long a bracket waited for the vCPUs, half of all.
        wait_p99: The same for 99 of 100.
        wait_max: The same for the worst.
        held_median: How long a bracket kept the vCPUs out of the guest, half of all.
        held_max: The same for the worst.
        passes: How often each vCPU has worked through its table.
        interrupted: Whether somebody stopped it.
    """

    backend: str
    cpu: str
    policy: str
    changes: tuple[str, ...]
    seconds: float
    transactions: int
    memslot_ioctls: int
    brackets: int
    kicks: int
    holes: int
    wrong_values: int
    first_wrong: tuple[WrongValue, ...]
    internal_errors: int
    other_exits: dict[str, int]
    wait_median: float
    wait_p99: float
    wait_max: float
    held_median: float
    held_max: float
    passes: tuple[int, ...]
    interrupted: bool

    @property
    def torn(self) -> bool:
        """Whether the guest saw what it must not see."""
        return bool(self.holes or self.wrong_values or self.internal_errors or self.other_exits)

    @property
    def stuck(self) -> tuple[int, ...]:
        """The vCPUs that did not get through their table once, and so prove nothing."""
        return tuple(number for number, passes in enumerate(self.passes) if not passes)

    @property
    def exit_status(self) -> int:
        """0 if all is well, 1 if the guest saw a torn map or got nowhere, 130 if interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.torn or self.stuck else 0

    @property
    def heading(self) -> str:
        """What was run."""
        number = count(len(self.passes), "vCPU")
        if self.backend == "kvm":
            where = f"{number} on KVM in {self.cpu} mode"
        else:
            where = f"{number}, scripted, on a fake kernel"
        return f"{where}, policy {self.policy}: {', '.join(self.changes)}"

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        if self.torn:
            text = "The guest saw the map torn."
            if self.policy == "never":
                text += " Nothing held its vCPUs: this is what a bracket prevents."
            if self.holes and not self.wrong_values:
                text += " No value was wrong, since memlistener answered for the missing memslots."
        elif self.stuck:
            text = f"No verdict: {vcpus(self.stuck)} did not get through the table once."
        elif not self.transactions:
            text = "No verdict: there was no transaction."
        elif self.policy == "never":
            text = "Nothing held the vCPUs, and no access happened to fall between two ioctls."
        else:
            text = "The guest saw no change at all: every access found its memory and its value."
        return f"Interrupted. {text}" if self.interrupted else text

    def rate(self, count: int) -> float:
        """How many that is per second."""
        return count / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it for programs, with the rates and the exit status."""
        return {
            **attrs.asdict(self),
            "transactions_per_second": self.rate(self.transactions),
            "passes_per_second": [self.rate(passes) for passes in self.passes],
            "exit_status": self.exit_status,
        }

    def as_table(self) -> Table:
        """All of it for people."""
        return as_table(
            (self._work_rows(), self._failure_rows(), self._wait_rows(), self._guest_rows())
        )

    def _work_rows(self) -> list[Row]:
        each = self.memslot_ioctls / self.transactions if self.transactions else 0.0
        return [
            ("transactions", f"{self.transactions:,}", f"in {self.seconds:.2f} s", False),
            ("transaction rate", f"{self.rate(self.transactions):,.0f}", "per second", False),
            ("memslot ioctls", f"{self.memslot_ioctls:,}", f"{each:.2f} a transaction", False),
            ("brackets", f"{self.brackets:,}", "transactions that held the vCPUs", False),
            ("kicks", f"{self.kicks:,}", "vCPUs turned out of the guest", False),
        ]

    def _failure_rows(self) -> list[Row]:
        rows: list[Row] = [
            ("holes", f"{self.holes:,}", "accesses that found no memslot", self.holes > 0),
            ("wrong values", f"{self.wrong_values:,}", "", self.wrong_values > 0),
        ]
        rows += [("", "first", str(wrong), True) for wrong in self.first_wrong]
        rows.append(
            (
                "internal errors",
                f"{self.internal_errors:,}",
                "KVM found no code to execute" if self.internal_errors else "",
                self.internal_errors > 0,
            )
        )
        rows += [
            (f"exits: {reason}", f"{count:,}", "unexpected", True)
            for reason, count in sorted(self.other_exits.items())
        ]
        return rows

    def _wait_rows(self) -> list[Row]:
        if not self.brackets:
            return [("wait for the vCPUs", "-", "nobody waited", False)]
        return [
            ("wait for the vCPUs", microseconds(self.wait_median), "µs median", False),
            ("", microseconds(self.wait_p99), "µs 99th percentile", False),
            ("", microseconds(self.wait_max), "µs worst", False),
            ("vCPUs held", microseconds(self.held_median), "µs median", False),
            ("", microseconds(self.held_max), "µs worst", False),
        ]

    def _guest_rows(self) -> list[Row]:
        return [
            (
                f"passes of vCPU {number}",
                f"{passes:,}",
                f"{self.rate(passes):,.0f} per second",
                number in self.stuck,
            )
            for number, passes in enumerate(self.passes)
        ]
