"""docs/figures/commit_cost.svg: what one change costs, against the size of the map.

``python -m benchmarks --plot docs/figures/commit_cost.svg``. Needs the extra
``bench`` (matplotlib).
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import alternatives, engine, maps
from benchmarks.measure import Settings, in_turns

Curve: TypeAlias = Mapping[int, float]

# Microseconds by number of regions: QEMU 10.0, one I/O region toggled in a flat
# map, one counting listener, median per commit, on the same class of machine.
QEMU: Curve = {10: 22, 100: 39, 300: 88, 1_000: 441, 3_000: 3_057}
QEMU_LIMIT = 4_096  # sections, beyond which it aborts

_SIZES = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_OURS = "memlistener: what changed is rendered"
_FULL = "the same engine, everything rendered (view only, no transaction)"
_QEMU = "QEMU 10.0 (published)"


def measure(settings: Settings) -> dict[str, Curve]:
    """Median cost in microseconds by size, for each curve."""
    sizes = settings.sizes(*_SIZES)
    todo = {}
    for n in sizes:
        each = maps.flat(n)
        todo[str(n)] = (engine.Machine(each.root), *each.changes()["toggle"])
    taken = engine.commits(todo, settings.samples(1_000))
    full = {}
    for n in sizes:
        count = settings.samples(max(100_000 // n, 5))
        samples = in_turns({"": alternatives.Toggled(n).by_render}, count)[""]
        full[n] = statistics.median(samples) / 1e3
    return {
        _OURS: {n: statistics.median(taken[str(n)]) / 1e3 for n in sizes},
        _FULL: full,
        _QEMU: QEMU,
    }


def draw(curves: Mapping[str, Curve], path: str) -> None:
    """Draw the curves, both axes logarithmic, as an SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Not imported by name: it is an extra, and need not be there for the types.
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    # Text stays text, and two drawings of the same figures are the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "commit_cost"})
    styles = {
        _OURS: {"color": "#0b6e4f", "marker": "o", "linewidth": 2.5},
        _FULL: {"color": "#c05621", "marker": "s", "linewidth": 1.5},
        _QEMU: {"color": "#4a5568", "marker": "^", "linewidth": 1.5},
    }
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=name, markersize=5, **styles[name])
    axes.axvline(QEMU_LIMIT, color="#4a5568", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 10), high)
    axes.text(QEMU_LIMIT * 1.08, 11.5, "QEMU aborts beyond\n4,096 sections", fontsize=8)
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel("I/O regions in a flat map")
    axes.set_ylabel("median per commit, microseconds")
    axes.set_title("One region shown or hidden, one listener", fontsize=11)
    axes.grid(visible=True, which="major", color="#e2e8f0")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
