"""What a run of the mirror found: the record, its verdict, and both ways to print it."""

from __future__ import annotations

from typing import Any

import attrs
from rich.table import Table

from memlistener.mirror.guest import PAGE
from memlistener.mirror.precopy import Comparison
from memlistener.rig.table import Row, as_table, count, microseconds, vcpus


@attrs.frozen(kw_only=True)
class Result:
    """What a run has done, so far or in all. Times are in seconds.

    Attributes:
        backend: ``kvm``, or ``fake`` for `FakeKvm`'s scripted vCPUs.
        cpu: The guest's processor mode.
        policy: When the vCPUs were held.
        dirty_log: How the dirty pages were learnt of.
        seed: Of the changes.
        pages: How many pages of RAM there are.
        seconds: From the first transaction to the end of the last.
        transactions: How many were committed.
        memslot_ioctls: How many KVM_SET_USER_MEMORY_REGION they took.
        brackets: How many of them held the vCPUs.
        held_median: How long a bracket kept the vCPUs out of the guest, half of all.
        held_max: The same for the worst.
        rounds: How often the dirty pages were copied, the last time with the guest stopped.
        dirty_median: How many pages a round copied, half of all, to within 3 %; as for
            the next two, without the first round, which copies all.
        dirty_max: The most.
        dirty_last: In the last round.
        copied: Pages copied in all.
        final_stop: How long the guest was stopped for the last round; 0 before.
        ring_overflows: How often a vCPU noticed too late that its dirty ring was full,
            so that all pages counted as written.
        holes: Accesses to memory that no slot covered.
        passes: How often each vCPU has written to all of its memory.
        host_writes: How often a device of the host wrote to it.
        exits: What ended a vCPU's run, and how often: nothing should.
        comparison: The file and the RAM, when all was over.
        interrupted: Whether somebody stopped it.
    """

    backend: str
    cpu: str
    policy: str
    dirty_log: str
    seed: int
    pages: int
    seconds: float
    transactions: int
    memslot_ioctls: int
    brackets: int
    held_median: float
    held_max: float
    rounds: int
    dirty_median: int
    dirty_max: int
    dirty_last: int
    copied: int
    final_stop: float
    ring_overflows: int
    holes: int
    passes: tuple[int, ...]
    host_writes: int
    exits: dict[str, int]
    comparison: Comparison | None
    interrupted: bool

    @property
    def differing(self) -> int:
        """How many pages differ."""
        return self.comparison.differing if self.comparison is not None else 0

    @property
    def stuck(self) -> tuple[int, ...]:
        """The vCPUs that did not write to all of their memory once, and so prove nothing."""
        return tuple(number for number, passes in enumerate(self.passes) if not passes)

    @property
    def failed(self) -> bool:
        """Whether a page was lost, or nothing was shown."""
        return bool(self.differing or self.exits or self.stuck or self.comparison is None)

    @property
    def exit_status(self) -> int:
        """0 if no page differs, 1 if one does or the guest got nowhere, 130 if interrupted."""
        return 130 if self.interrupted else int(self.failed)

    @property
    def heading(self) -> str:
        """What was run."""
        number = count(len(self.passes), "vCPU")
        if self.backend == "kvm":
            where = f"{number} on KVM in {self.cpu} mode"
        else:
            where = f"{number}, scripted, on a fake kernel"
        ram = f"{self.pages * PAGE >> 20} MiB"
        return f"{where}, {ram}, policy {self.policy}, log {self.dirty_log}"

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        text = self._outcome()
        return f"Interrupted. {text}" if self.interrupted else text

    def _outcome(self) -> str:
        if self.comparison is None:
            return "No verdict: the file was not compared."
        if self.differing:
            first = "; ".join(map(str, self.comparison.first))
            more = "; ..." if self.differing > len(self.comparison.first) else "."
            text = f"{self.differing:,} of {count(self.pages, 'page')} differ: {first}{more}"
            if self.policy == "never":
                text += (
                    " Nothing held the vCPUs: what they wrote after a log was fetched, and "
                    "before its slot was deleted, is in no log."
                )
            return text
        same = f"0 of {count(self.pages, 'page')} differ"
        if self.exits:
            return f"{same}, but a vCPU's run ended: {', '.join(sorted(self.exits))}."
        if self.stuck:
            return f"{same}, but {vcpus(self.stuck)} did not write to all of the memory once."
        if self.policy == "never":
            return f"{same}: nothing held the vCPUs, and no write happened to get lost."
        return f"{same}."

    def rate(self, number: int) -> float:
        """How many that is per second."""
        return number / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it for programs, with the rates and the exit status."""
        return {
            **attrs.asdict(self),
            "differing": self.differing,
            "transactions_per_second": self.rate(self.transactions),
            "passes_per_second": [self.rate(passes) for passes in self.passes],
            "exit_status": self.exit_status,
        }

    def as_table(self) -> Table:
        """All of it for people."""
        return as_table((self._copy_rows(), self._work_rows(), self._guest_rows(), self._end()))

    def _copy_rows(self) -> list[Row]:
        copied = f"{self.copied * PAGE / 2**20:,.0f} MiB"
        return [
            ("rounds", f"{self.rounds:,}", f"in {self.seconds:.2f} s", False),
            ("dirty pages a round", f"{self.dirty_median:,}", "median", False),
            ("", f"{self.dirty_max:,}", "worst", False),
            ("", f"{self.dirty_last:,}", "last, with the guest stopped", False),
            ("pages copied", f"{self.copied:,}", copied, False),
            *(
                [("ring overflows", f"{self.ring_overflows:,}", "then all counts as dirty", False)]
                if self.ring_overflows
                else []
            ),
        ]

    def _work_rows(self) -> list[Row]:
        each = self.memslot_ioctls / self.transactions if self.transactions else 0.0
        rate = f"{self.rate(self.transactions):,.0f} per second"
        return [
            ("transactions", f"{self.transactions:,}", rate, False),
            ("memslot ioctls", f"{self.memslot_ioctls:,}", f"{each:.2f} a transaction", False),
            ("brackets", f"{self.brackets:,}", "transactions that held the vCPUs", False),
            *(
                [
                    ("vCPUs held", microseconds(self.held_median), "µs median", False),
                    ("", microseconds(self.held_max), "µs worst", False),
                ]
                if self.brackets
                else []
            ),
            ("final stop", microseconds(self.final_stop), "µs", False),
        ]

    def _guest_rows(self) -> list[Row]:
        return [
            *(
                (
                    f"passes of vCPU {number}",
                    f"{passes:,}",
                    f"{self.rate(passes):,.1f} per second",
                    number in self.stuck,
                )
                for number, passes in enumerate(self.passes)
            ),
            ("host writes", f"{self.host_writes:,}", "by a device, with DMA", False),
            ("holes", f"{self.holes:,}", "accesses that found no memslot", self.holes > 0),
            *(
                (f"exits: {reason}", f"{number:,}", "unexpected", True)
                for reason, number in sorted(self.exits.items())
            ),
        ]

    def _end(self) -> list[Row]:
        of = f"of {count(self.pages, 'page')}"
        return [("pages that differ", f"{self.differing:,}", of, self.differing > 0)]
