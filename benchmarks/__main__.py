"""``python -m benchmarks``: measure, and print the figures beside their bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import alternatives, dirty, engine, kvm, plot, report, soak
from benchmarks.measure import Benchmarks, Figure, Settings, Skipped

GROUPS: dict[str, Benchmarks] = {
    "engine": engine.BENCHMARKS,
    "alternatives": alternatives.BENCHMARKS,
    "kvm": kvm.BENCHMARKS,
    "dirty": dirty.BENCHMARKS,
    "soak": soak.BENCHMARKS,
}


# Not without being asked for.
_LONG = ("soak",)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        help=f"a group ({', '.join(GROUPS)}) or one of its benchmarks, as engine.flat; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="see that it runs; no figures")
    parser.add_argument("--plot", metavar="FILE", help="measure and draw cost against n")
    options = parser.parse_args(arguments)
    settings = Settings(quick=options.quick)
    if options.plot:
        plot.draw(plot.measure(settings), options.plot)
        return 0
    chosen = options.only or [group for group in GROUPS if group not in _LONG]
    known = {f"{group}.{name}" for group, names in GROUPS.items() for name in names} | set(GROUPS)
    unknown = [each for each in chosen if each not in known]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {sorted(known)}")
    print("  ".join(f"{key} {value}" for key, value in report.machine().items()), flush=True)
    measured: dict[str, list[Figure]] = {}
    for group, benchmarks in GROUPS.items():
        for name, benchmark in benchmarks.items():
            if group in chosen or f"{group}.{name}" in chosen:
                full = f"{group}.{name}"
                try:
                    measured[full] = benchmark(settings)
                except Skipped as reason:
                    print(f"{full}: skipped: {reason}\n", flush=True)
                    continue
                report.print_group(full, measured[full])
    if options.json:
        report.write_json(options.json, measured)
    missed = [each for figures in measured.values() for each in figures if each.passed is False]
    if missed and not settings.quick:
        print(f"{len(missed)} of the bars are missed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
