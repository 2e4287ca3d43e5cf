"""A long run of the demo's guests under transactions: what must not grow, and who must not starve.

Not run unless asked for, ``--only soak``: it takes minutes. The demo counts holes
and wrong values, and ten times a second says how far each vCPU is.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import attrs
import trio

from benchmarks.measure import Benchmarks, Figure, Settings, Skipped
from memlistener import kvm
from memlistener.demo import scenario
from memlistener.demo.report import Result
from memlistener.demo.windows import KINDS

_TRANSACTIONS = 100_000
_VCPUS = 4


@attrs.frozen
class _Sample:
    at: float
    descriptors: int
    threads: int
    resident: int  # bytes
    passes: tuple[int, ...]


def _sample(passes: tuple[int, ...]) -> _Sample:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return _Sample(
        time.monotonic(),
        len(os.listdir("/proc/self/fd")),
        int(status["Threads"]),
        int(status["VmRSS"].split()[0]) << 10,
        passes,
    )


def demo(settings: Settings) -> list[Figure]:
    """100,000 transactions with four vCPUs."""
    available = kvm.available()
    if not available:
        raise Skipped(str(available))
    samples: list[_Sample] = []

    def watch(result: Result) -> None:
        if not samples or time.monotonic() - samples[-1].at >= 1:
            samples.append(_sample(result.passes))

    options = scenario.Options(
        seconds=None,
        transactions=1_000 if settings.quick else _TRANSACTIONS,
        vcpus=_VCPUS,
        changes=tuple(KINDS),
        policy=kvm.KickPolicy.EVERY_COMMIT,
        cpu="protected",
        fake=False,
    )
    result = trio.run(scenario.run, options, watch)
    # The first samples are of a process that is still growing up.
    settled = samples[len(samples) // 20 :]
    least = [
        min(now - before for before, now in zip(one.passes, two.passes, strict=True))
        for one, two in itertools.pairwise(settled)
    ]
    n = result.transactions
    return [
        Figure(what="transactions", unit="/s", n=n, median=n / result.seconds),
        Figure(what="holes, wrong values, internal errors", unit="", n=n, median=_torn(result)),
        Figure(
            what="passes of the slowest vCPU in the slowest second",
            unit="",
            n=n,
            median=min(least, default=0),
            note="a pass is 130 checks; 0 would be a vCPU that got nowhere for a second",
        ),
        *(
            Figure(
                what=f"growth of {what}",
                unit=unit,
                n=n,
                median=max(getattr(settled[-1], name) - getattr(settled[0], name), 0) / scale,
                bar=bar,
                note=f"{what}: {getattr(settled[0], name) / scale:,.0f} at first",
            )
            for what, name, unit, scale, bar in (
                ("descriptors", "descriptors", "", 1, 0),
                ("threads", "threads", "", 1, 0),
                ("resident memory", "resident", "MiB", 1 << 20, 1),
            )
        ),
    ]


def _torn(result: Result) -> int:
    return result.holes + result.wrong_values + result.internal_errors


BENCHMARKS: Benchmarks = {"demo": demo}
