from __future__ import annotations

import struct

import pytest

from memlistener import MemoryRegion, MemorySystem, kvm
from memlistener.mirror import guest
from memlistener.mirror.guest import CPUS, Geometry
from memlistener.mirror.layout import RamMap
from memlistener.mirror.scenario import MAX_RAM

GEOMETRIES = [Geometry(ram << 20) for ram in (1, 2, 64, MAX_RAM)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: f"{geometry.size >> 20}MiB")
def test_window_shows_ram_wherever_that_is_moved(geometry: Geometry) -> None:
    """From its first page to its last, and beside what does not move."""
    moving = geometry.moving * guest.PAGE
    assert geometry.slide > 0
    for slide in (0, geometry.slide * guest.PAGE):
        base = guest.WINDOW - slide
        assert guest.FIXED_SIZE <= base <= guest.WINDOW
        assert geometry.window_end <= base + moving
    assert geometry.pages == geometry.moving + guest.FIXED_SIZE // guest.PAGE
    assert geometry.map_size >= geometry.window_end


def test_program_contains_the_constants() -> None:
    """The listing is written by hand: it uses the page size of this module."""
    assert guest.PROGRAM.count(struct.pack("<I", guest.PAGE)) == 1
    assert guest.CODE + len(guest.PROGRAM) <= guest.MAILBOXES


def test_what_does_not_move_does_not_overlap() -> None:
    """Mailboxes, registers and page tables each have their place, for the largest guest too."""
    assert guest.mailbox_address(guest.MAX_VCPUS - 1) + guest.WORD <= guest.REGISTERS
    assert guest.REGISTERS + guest.PAGE <= guest.PAGE_TABLES
    tables = kvm.x86.page_tables_size(GEOMETRIES[-1].map_size)
    assert guest.PAGE_TABLES + tables <= guest.FIXED_SIZE
    assert guest.WORD * guest.MAX_VCPUS <= guest.DMA


def test_passes_are_read_by_number() -> None:
    """Each vCPU's are where its program counts them."""
    memory = bytearray(guest.FIXED_SIZE)
    struct.pack_into("<I", memory, guest.mailbox_address(3), 7)
    assert guest.passes(memoryview(memory), 3) == 7
    assert guest.passes(memoryview(memory), 2) == 0


def test_no_page_is_like_another() -> None:
    """Nor empty: one that was never copied, or to the wrong place, differs from the file."""
    memory = bytearray(1 << 20)
    guest.load(memoryview(memory))
    pages = {bytes(memory[at : at + guest.PAGE]) for at in range(0, len(memory), guest.PAGE)}
    assert len(pages) == len(memory) // guest.PAGE
    assert memory[guest.CODE : guest.CODE + len(guest.PROGRAM)] == guest.PROGRAM
    assert guest.DMA + 8 <= guest.LABEL <= guest.PAGE - guest.WORD


@pytest.mark.kvm
@pytest.mark.parametrize("cpu", CPUS)
async def test_program_increments_a_word_in_each_page(cpu: str) -> None:
    """After a pass each page of the window has one, and no page beyond it."""
    geometry = Geometry(1 << 20)
    system = MemoryRegion.container("system", 1 << 32)
    ram = MemoryRegion.ram("ram", geometry.size)
    halt_after_a_pass = guest.PROGRAM[:-2] + b"\xf4"
    ram.block.view[guest.CODE : guest.CODE + len(halt_after_a_pass)] = halt_after_a_pass
    RamMap(system, ram, geometry)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    async with kvm.open_vm(space) as vm:
        await vm.create_vcpu()
        vcpu = await vm.create_vcpu()  # number 1, which has the second word
        guest.start(vcpu, cpu, geometry)
        assert isinstance(await vcpu.run(), kvm.Hlt)
    view = ram.block.view
    assert guest.passes(view, 1) == 1
    words = [
        view[page : page + 8].tobytes()
        for page in range(guest.FIXED_SIZE, geometry.size, guest.PAGE)
    ]
    once = struct.pack("<2I", 0, 1)
    assert words == [once] * geometry.window + [bytes(8)] * geometry.slide
