"""The windows that the demo changes under its guest, one kind of change each.

A window is a stretch of guest memory with a region tree behind it and two
states; `Window.change` goes from one to the other, inside a transaction that
the caller has opened. Whichever state it is in, each address that the guest
uses shows the word that belongs there (`guest.word`): that is what makes every
access checkable while the map changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs
from memlistener.demo.guest import PAGE, WORD, Cpu, Work, words

_STRIDE = 0x200  # from one word that is checked to the next: eight a page
_OWN = 0x100  # offset in a page of the vCPUs' own words, clear of those checked
_TOUCH = 0x200  # offset in a page of a word that is checked and stored


class Window(ABC):
    """Guest memory that changes between two states.

    Args:
        system: Where it is mapped; must not be live yet.
        cpu: Whose code it may have to hold.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    work: ClassVar[tuple[Work, ...]]

    def __init__(self, system: MemoryRegion, cpu: Cpu) -> None:
        self.system = system
        self.changed = False
        self.build(cpu)

    @abstractmethod
    def build(self, cpu: Cpu) -> None:
        """Make the regions and map the first state."""

    @abstractmethod
    def apply(self, changed: bool) -> None:
        """Go to the other state: ``changed``, or back to the first."""

    def change(self) -> None:
        """Go to the other state. Inside a transaction."""
        self.apply(not self.changed)
        self.changed = not self.changed


class Split(Window):
    """One window of two pages, or two of one page each."""

    name = "split"
    summary = "split a RAM window in two and merge it again"
    base: ClassVar = 0x4000
    work = (
        Work(first=base, end=base + PAGE, stride=_STRIDE, own=base + _OWN),
        Work(first=base + PAGE, end=base + 2 * PAGE, stride=_STRIDE, own=base + PAGE + _OWN),
    )

    def build(self, cpu: Cpu) -> None:
        """Make the two halves as well, unmapped for now."""
        ram = _ram("split.ram", (self.base, self.base + PAGE))
        self.whole = MemoryRegion.alias("split.whole", ram, offset=0, size=2 * PAGE)
        self.low = MemoryRegion.alias("split.low", ram, offset=0, size=PAGE)
        self.high = MemoryRegion.alias("split.high", ram, offset=PAGE, size=PAGE)
        # They continue each other, so they would be merged into one range.
        self.low.set_unmergeable(True)
        self.high.set_unmergeable(True)
        self.system.add_subregion(self.base, self.whole)

    def apply(self, changed: bool) -> None:
        """Replace the whole by its halves, or the halves by the whole."""
        if changed:
            self.system.del_subregion(self.whole)
            self.system.add_subregion(self.base, self.low)
            self.system.add_subregion(self.base + PAGE, self.high)
        else:
            self.system.del_subregion(self.low)
            self.system.del_subregion(self.high)
            self.system.add_subregion(self.base, self.whole)


class Move(Window):
    """A window of two pages that slides by one, and the page that it always covers.

    That page is the window's second before the move and its first after it, so
    both hold the same words, and a guest may use it at any time.
    """

    name = "move"
    summary = "move a RAM window to and fro"
    base: ClassVar = 0x6000
    work = (
        Work(
            first=base + PAGE,
            end=base + 2 * PAGE,
            stride=_STRIDE,
            touch=base + PAGE + _TOUCH,
        ),
    )

    def build(self, cpu: Cpu) -> None:
        """Map the window at its first place."""
        covered = self.base + PAGE
        self.window = _ram(f"{self.name}.ram", (covered, covered))
        for page in (0, PAGE):
            for each in self.work:
                if each.routine:
                    code = cpu.routine(each.routine)
                    at = page + each.routine - covered
                    self.window.block.view[at : at + len(code)] = code
        self.system.add_subregion(self.base, self.window)

    def apply(self, changed: bool) -> None:
        """Slide."""
        self.window.set_address(self.base + PAGE if changed else self.base)


class Device(Window):
    """Three pages of RAM, with or without a device over the one in the middle.

    The device answers with what is in the memory that it hides, and stores there.
    """

    name = "device"
    summary = "put a device over the middle of RAM and take it away"
    base: ClassVar = 0x9000
    # An access to the device is an exit, so the guest makes few of them.
    work = (
        Work(first=base, end=base + PAGE, stride=_STRIDE, own=base + _OWN),
        Work(first=base + PAGE, end=base + 2 * PAGE, stride=4 * _STRIDE, own=base + PAGE + _OWN),
        Work(
            first=base + 2 * PAGE,
            end=base + 3 * PAGE,
            stride=_STRIDE,
            own=base + 2 * PAGE + _OWN,
        ),
    )

    def build(self, cpu: Cpu) -> None:
        """Map the RAM."""
        ram = _ram("device.ram", (self.base, self.base + PAGE, self.base + 2 * PAGE))
        self.device = MemoryRegion.io("device.io", PAGE, _Mirror(ram.block.view[PAGE : 2 * PAGE]))
        self.system.add_subregion(self.base, ram)

    def apply(self, changed: bool) -> None:
        """Map the device over the RAM, or unmap it."""
        if changed:
            self.system.add_subregion_overlap(self.base + PAGE, self.device, 1)
        else:
            self.system.del_subregion(self.device)


class _Mirror(MemoryRegionOps):
    """A device whose registers are somebody's memory."""

    thread_safe = True  # each access is one copy, and no two vCPUs store to one word

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        self._memory[offset : offset + size] = value.to_bytes(size, "little")


class Rom(Window):
    """A page of ROM, or of RAM.

    The guest stores what is there already: gone or not, it does no harm.
    """

    name = "rom"
    summary = "flip a ROM's read-only flag"
    base: ClassVar = 0xC000
    work = (Work(first=base, end=base + PAGE, stride=_STRIDE, touch=base + _TOUCH),)

    def build(self, cpu: Cpu) -> None:
        """Map it as ROM."""
        self.rom = MemoryRegion.rom("rom", PAGE, data=words(self.base))
        self.system.add_subregion(self.base, self.rom)

    def apply(self, changed: bool) -> None:
        """Flip the flag."""
        self.rom.set_readonly(not changed)


class Code(Move):
    """As `Move`, and what the guest uses in it is code."""

    name = "code"
    summary = "move a RAM window that the guest executes code in"
    base: ClassVar = 0xD000
    work = (
        Work(
            first=base + PAGE,
            end=base + PAGE + WORD,
            stride=WORD,
            routine=base + PAGE + 0x20,
        ),
    )


KINDS: dict[str, type[Window]] = {kind.name: kind for kind in (Split, Move, Device, Rom, Code)}


def _ram(name: str, pages: Sequence[int]) -> MemoryRegion:
    """RAM whose pages hold the words of these guest addresses, and 0 in the vCPUs' own."""
    ram = MemoryRegion.ram(name, PAGE * len(pages))
    contents = bytearray().join(words(addr) for addr in pages)
    for page in range(0, len(contents), PAGE):
        contents[page + _OWN : page + _STRIDE] = bytes(_STRIDE - _OWN)
    ram.block.view[:] = contents
    return ram
