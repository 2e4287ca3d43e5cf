"""The engine: what a commit, a render, a look-up and a range cost.

Commits are whole transactions in trio, ``async with`` to ``async with``, with
one listener that implements region_add and region_del and only counts in them.

Everything is measured in processor time. All of it happens on one thread, which
waits for nothing: on an idle machine that is the time by the clock, and on a busy
one the clock would mostly measure the others. Reading it adds some 0.6 us to each.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping

import trio

from benchmarks import maps
from benchmarks.measure import Benchmarks, Figure, Settings, figure, ratio
from memlistener import FlatView, MemoryListener, MemoryRegion, MemoryRegionSection, MemorySystem

COMMIT_BAR = 40.0  # us, for one changed region, whatever the map
_BLOCK = 50  # commits of one kind in a row, before it is the next one's turn


class Listener(MemoryListener):
    """Implements the two hooks, and counts."""

    def __init__(self) -> None:
        self.heard = 0

    def region_add(self, section: MemoryRegionSection) -> None:
        """Count it."""
        self.heard += 1

    def region_del(self, section: MemoryRegionSection) -> None:
        """Count it."""
        self.heard += 1


class Machine:
    """A memory system with address spaces over some roots, and a listener on each."""

    def __init__(self, *roots: MemoryRegion) -> None:
        self.memory = MemorySystem()
        self.spaces = [
            self.memory.create_address_space(f"space {number}", root)
            for number, root in enumerate(roots)
        ]
        self.listener = Listener()

    async def listen(self) -> None:
        """Register the listener."""
        for space in self.spaces:
            await self.memory.register(self.listener, space)

    async def commit(self, change: Callable[[], object]) -> int:
        """One transaction, in nanoseconds."""
        memory = self.memory
        began = time.thread_time_ns()
        async with memory.transaction():
            change()
        return time.thread_time_ns() - began


def commits(
    todo: Mapping[str, tuple[Machine, maps.Change, maps.Change]], samples: int
) -> dict[str, list[float]]:
    """Time transactions of several kinds, in turns; nanoseconds by name."""
    taken: dict[str, list[float]] = {name: [] for name in todo}

    async def main() -> None:
        for machine in {id(each[0]): each[0] for each in todo.values()}.values():
            await machine.listen()
        for warm in (True, *[False] * -(-samples // _BLOCK)):
            for name, (machine, there, back) in todo.items():
                for index in range(min(_BLOCK, samples) // 2 * 2):
                    took = await machine.commit(back if index % 2 else there)
                    if not warm:
                        taken[name].append(took)

    trio.run(main)
    return taken


# ---- commits ---------------------------------------------------------------------


def flat(settings: Settings) -> list[Figure]:
    """One region of a flat map of n."""
    sizes = settings.sizes(100, 1_000, 10_000, 100_000)
    todo = {}
    for n in sizes:
        each = maps.flat(n)
        machine = Machine(each.root)
        for what, (there, back) in each.changes().items():
            todo[f"{what}, {n}"] = (machine, there, back)
    taken = commits(todo, settings.samples(2_000))
    found = []
    for what in ("toggle", "move", "resize"):
        for n in sizes:
            found.append(
                figure(f"commit, flat map: {what}", taken[f"{what}, {n}"], n=n, bar=COMMIT_BAR)
            )
        if len(sizes) > 1:
            found.append(
                ratio(
                    f"commit, flat map: {what}, largest to smallest",
                    taken[f"{what}, {sizes[-1]}"],
                    taken[f"{what}, {sizes[0]}"],
                    n=sizes[-1],
                    bar=1.5,
                )
            )
    return found


def tree(settings: Settings) -> list[Figure]:
    """One region of a tree of 300 containers."""
    shapes = {"PC of 300 containers": maps.pc(300), "chain 300 deep": maps.chain(300)}
    todo = {}
    for shape, each in shapes.items():
        machine = Machine(each.root)
        for what, (there, back) in each.changes().items():
            todo[f"commit, {shape}: {what}"] = (machine, there, back)
    taken = commits(todo, settings.samples(2_000))
    found = [figure(name, samples, n=300, bar=COMMIT_BAR) for name, samples in taken.items()]
    # A window beside the way up changes too, so that the way has to be found anew.
    each = maps.pc(300)
    window, region = each.root.subregions[0], each.region

    def both(enabled: bool) -> None:
        window.set_enabled(enabled)
        region.set_enabled(enabled)

    name = "commit, PC of 300 containers: toggle, and a window beside the way"
    changes = (Machine(each.root), lambda: both(False), lambda: both(True))
    samples = commits({name: changes}, settings.samples(2_000))[name]
    return [*found, figure(name, samples, n=300, note="two changes in two containers")]


def spaces(settings: Settings) -> list[Figure]:
    """A change under aliases in 64 address spaces."""
    count = 4 if settings.quick else 64
    todo: dict[str, tuple[Machine, maps.Change, maps.Change]] = {}

    def add(name: str, machine: Machine, region: MemoryRegion) -> None:
        todo[name] = (
            machine,
            lambda: region.set_enabled(False),
            lambda: region.set_enabled(True),
        )

    def shared(number: int, target: MemoryRegion) -> MemoryRegion:
        return MemoryRegion.alias(f"all {number}", target, offset=0, size=target.size)

    def partial(number: int, target: MemoryRegion) -> MemoryRegion:
        # Each at another address, so that no two views are the same.
        root = MemoryRegion.container(f"root {number}", 1 << 64)
        window = MemoryRegion.alias(f"part {number}", target, offset=0, size=900 * maps.STEP)
        root.add_subregion(number * maps.PAGE, window)
        return root

    for what, root_of in (("shared", shared), ("partial", partial)):
        alone = maps.flat(1_000)
        add(f"{what}, alone", Machine(root_of(0, alone.root)), alone.region)
        many = maps.flat(1_000)
        machine = Machine(*[root_of(number, many.root) for number in range(count)])
        add(f"{what}, all", machine, many.region)
        if what == "partial":  # a region behind the end of every window
            add("unseen", machine, next(iter(many.root.subregions)))
            # One in a tree that none of them has.
            other = maps.flat(1_000)
            add("elsewhere", machine, other.region)
            todo["nothing"] = (machine, _nothing, _nothing)
    taken = commits(todo, settings.samples(500))
    base = statistics.median(taken["partial, alone"]) / 1e3
    found = []
    for what, text in (("shared", "whole-target aliases"), ("partial", "partial aliases")):
        found += [
            figure(f"commit, 1 address space: {text}", taken[f"{what}, alone"], n=1),
            figure(f"commit, {count} address spaces: {text}", taken[f"{what}, all"], n=count),
            ratio(
                f"commit, {count} address spaces to 1: {text}",
                taken[f"{what}, all"],
                taken[f"{what}, alone"],
                n=count,
                bar=count,
            ),
        ]
    return [
        *found,
        figure(f"commit, {count} address spaces: seen by none", taken["unseen"], n=count, bar=base),
        figure(f"commit, {count} address spaces: in a tree of none", taken["elsewhere"], n=count),
        figure(f"commit, {count} address spaces: empty transaction", taken["nothing"], n=count),
    ]


def _nothing() -> None:
    pass


# ---- views -----------------------------------------------------------------------


def render(settings: Settings) -> list[Figure]:
    """A full render of n leaves."""
    sizes = settings.sizes(1_000, 10_000, 100_000)
    roots = {n: maps.flat(n).root for n in sizes}
    taken: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(settings.samples(20)):
        for n, root in roots.items():
            for _ in range(max(sizes[-1] // n // 10, 1)):
                began = time.thread_time_ns()
                FlatView.render(root)
                taken[n].append(time.thread_time_ns() - began)
    bars = {1_000: 1.5}
    found = [figure("full render", taken[n], n=n, unit="ms", bar=bars.get(n)) for n in sizes]
    if len(sizes) > 1:
        found.append(
            ratio(
                "full render, 100,000 to 10,000",
                taken[sizes[-1]],
                taken[sizes[-2]],
                n=sizes[-1],
                bar=12,
            )
        )
    return found


def lookup(settings: Settings) -> list[Figure]:
    """Look-ups at random addresses, and what a large view takes to build."""
    large = 10_000 if settings.quick else 1_000_000
    views = {1_000: FlatView.render(maps.flat(1_000).root)}
    began = time.thread_time_ns()
    root = maps.flat(large).root
    planted = time.thread_time_ns() - began
    began = time.thread_time_ns()
    views[large] = FlatView.render(root)
    built = time.thread_time_ns() - began
    rng = random.Random(1)
    addresses = {n: [rng.randrange(n * maps.STEP) for _ in range(20_000)] for n in views}
    taken: dict[int, list[float]] = {n: [] for n in views}
    for _ in range(settings.samples(200)):
        for n, view in views.items():
            find = view.lookup
            some = addresses[n]
            began = time.thread_time_ns()
            for addr in some:
                find(addr)
            taken[n].append((time.thread_time_ns() - began) / len(some))
    note = "at random addresses, the loop around it included"
    return [
        figure("lookup", taken[1_000], n=1_000, bar=0.6, note=note),
        figure("lookup", taken[large], n=large, bar=1.2, note=note),
        figure("build the tree of regions", [planted], n=large, unit="s"),
        figure("build the view", [built], n=large, unit="s", bar=10),
    ]


def memory(settings: Settings) -> list[Figure]:
    """Bytes per range of a view, the regions left out."""
    n = settings.sizes(100_000, 1_000)[0]
    root = maps.flat(n).root
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        view = FlatView.render(root)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return [
        Figure(
            what="memory of a view, per range",
            n=n,
            unit="B",
            median=(after - before) / len(view),
            bar=300,
        )
    ]


BENCHMARKS: Benchmarks = {
    "flat": flat,
    "tree": tree,
    "spaces": spaces,
    "render": render,
    "lookup": lookup,
    "memory": memory,
}
