"""Real machines' memory maps (``tests/data``): reading them, and building their regions."""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from memlistener import FlatRange, MemoryRegion, RegionKind

Machine: TypeAlias = dict[str, Any]
Range: TypeAlias = tuple[int, int, int, int, bool, bool]

DATA = Path(__file__).parent / "data"
SEQUENCES = sorted(path.name.removesuffix(".json.xz") for path in DATA.glob("seq_*.json.xz"))


@functools.lru_cache(maxsize=2)
def load(name: str) -> Any:
    """One file of ``tests/data``."""
    return json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))


def cases() -> dict[str, Machine]:
    machines: dict[str, Machine] = load("cases")
    return machines


def sequence(name: str) -> list[Machine]:
    states: list[Machine] = load(name)
    return states


class Regions:
    """The regions of a machine by id, brought from state to state by mutators alone.

    Regions of size 0 show nothing and cannot be made; they are left out.
    """

    def __init__(self, machine: Machine) -> None:
        self.by_id: dict[int, MemoryRegion] = {}
        self.ids: dict[MemoryRegion, int] = {}
        self.become(machine)

    def __getitem__(self, number: int) -> MemoryRegion:
        return self.by_id[number]

    def become(self, machine: Machine) -> None:
        """Change the tree into the machine's; new regions are made, none is replaced."""
        wanted = {int(key): each for key, each in machine["regions"].items() if each["size"]}
        for number in wanted:
            self._make(number, wanted)
        for number, region in self.by_id.items():
            plan = wanted.get(number)
            order = [each for each in plan["order"] if each in wanted] if plan else []
            for child in region.subregions:
                if self.ids[child] not in order:
                    region.del_subregion(child)
        for number, plan in wanted.items():
            self._set(self.by_id[number], plan)
        for number, plan in wanted.items():
            order = [each for each in plan["order"] if each in wanted]
            self._arrange(self.by_id[number], order, wanted)

    def _make(self, number: int, wanted: dict[int, Any]) -> MemoryRegion:
        if number in self.by_id:
            return self.by_id[number]
        plan = wanted[number]
        name, size = plan["name"], plan["size"]
        makers: dict[str, Callable[[], MemoryRegion]] = {
            "container": lambda: MemoryRegion.container(name, size),
            "ram": lambda: MemoryRegion.ram(name, size),
            "ramd": lambda: MemoryRegion.ram(name, size),
            "rom": lambda: MemoryRegion.rom(name, size),
            "romd": lambda: MemoryRegion.rom_device(name, size, None),
            "i/o": lambda: MemoryRegion.io(name, size, None),
            "iommu": lambda: MemoryRegion.iommu(name, size, lambda *_: None),
            "alias": lambda: MemoryRegion.alias(
                name, self._make(plan["alias"], wanted), offset=plan["alias_offset"], size=size
            ),
        }
        region = self.by_id[number] = makers[plan["kind"]]()
        self.ids[region] = number
        if plan["addr"]:
            region.set_address(plan["addr"])
        return region

    def _set(self, region: MemoryRegion, plan: Any) -> None:
        if region.enabled != plan["enabled"]:
            region.set_enabled(plan["enabled"])
        if region.size != plan["size"]:
            region.set_size(plan["size"])
        if region.addr != plan["addr"]:
            region.set_address(plan["addr"])
        if region.alias_target is not None and region.alias_offset != plan["alias_offset"]:
            region.set_alias_offset(plan["alias_offset"])
        if region.readonly != plan["readonly"]:
            region.set_readonly(plan["readonly"])
        if region.nonvolatile != plan["nonvolatile"]:
            region.set_nonvolatile(plan["nonvolatile"])
        if region.romd_mode != plan.get("romd_mode", True):
            region.set_romd_mode(plan["romd_mode"])

    def _arrange(self, holder: MemoryRegion, order: list[int], wanted: dict[int, Any]) -> None:
        """Give ``holder`` these subregions, in this order; keep what stands right."""
        latest_last = order[::-1]
        there = [self.ids[each] for each in holder.subregions][::-1]
        same = 0
        while same < len(there) and there[same] == latest_last[same]:
            same += 1
        if any(holder.subregions) and same < len(there):
            for number in there[same:]:
                holder.del_subregion(self.by_id[number])
        for number in latest_last[same:]:
            plan = wanted[number]
            holder.add_subregion_overlap(plan["addr"], self.by_id[number], plan["priority"])

    def range(self, each: FlatRange) -> Range:
        """A range as the files describe it."""
        number = self.ids[each.region]
        return (each.start, each.size, number, each.offset, each.readonly, each.nonvolatile)


def range_of(recorded: Any) -> Range:
    return (
        recorded["start"],
        recorded["size"],
        recorded["region"],
        recorded["offset"],
        recorded["readonly"],
        recorded["nonvolatile"],
    )


def printed_kind(each: FlatRange) -> str:
    """What QEMU's ``info mtree -f`` calls a range."""
    kind = each.region.kind
    if kind in (RegionKind.RAM, RegionKind.ROM):
        return "rom" if each.readonly else "ram"
    if kind is RegionKind.ROM_DEVICE and each.romd_mode:
        return "romd"
    return "i/o"


def ranges_by_space(machine: Machine) -> list[list[Any]]:
    """The recorded ranges of each address space, in the order of the address spaces."""
    found: list[list[Any]] = [[] for _ in machine["address_spaces"]]
    for view in machine["flatviews"]:
        for space in view["space_ids"]:
            found[space] = view["ranges"]
    return found
