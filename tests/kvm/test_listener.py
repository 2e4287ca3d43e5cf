"""`KvmMemoryListener` on FakeKvm: what becomes a memslot, and what becomes of failures."""

from __future__ import annotations

import errno
import gc
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    RamBlock,
)
from memlistener.bracket import Gate
from memlistener.core.kinds import RegionKind
from memlistener.errors import BrokenMemoryError, MemslotError, RamInUseError
from memlistener.kvm import KickPolicy, KvmMemoryListener
from memlistener.kvm.backend import CAP_NR_MEMSLOTS, CAP_READONLY_MEM
from memlistener.testing import FakeKvm, Ioctl
from tests.kvm.rig import PAGE, SLOT_IOCTL

Pages = dict[int, tuple[int, bool]]


def pages_of_view(space: AddressSpace) -> Pages:
    """What each guest page should be mapped to: (host address, read-only), page by page."""
    found: Pages = {}
    for each in space.view:
        region = each.region
        if region.kind is RegionKind.ROM_DEVICE:
            if not region.romd_mode:
                continue
        elif region.kind not in (RegionKind.RAM, RegionKind.ROM):
            continue
        readonly = each.readonly or region.kind is not RegionKind.RAM
        for at in range(-(-each.start // PAGE) * PAGE, each.end - PAGE + 1, PAGE):
            host = region.block.host_address + each.offset + at - each.start
            if host % PAGE == 0:
                found[at] = (host, readonly)
    return found


class Board:
    """An address space on a `FakeVm`, without a `Vm` around it."""

    def __init__(self, *, fake: FakeKvm | None = None, **options: Any) -> None:
        self.fake = FakeKvm() if fake is None else fake
        self.vm = self.fake.create_vm()
        self.gate = Gate()
        self.listener = KvmMemoryListener(self.vm, self.gate, **options)
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("system", 1 << 40)

    async def attach(self) -> None:
        """Create the address space, with what was added to `root` by now, and register."""
        self.space = self.memory.create_address_space("memory", self.root)
        await self.memory.register(self.listener, self.space)
        self.check()

    def check(self) -> None:
        """The kernel, the listener and the view agree, and nobody is held."""
        kernel = {
            at: (slot.userspace_addr + at - slot.guest_phys_addr, slot.readonly)
            for slot in self.vm.memslots
            for at in range(slot.guest_phys_addr, slot.end, PAGE)
        }
        assert kernel == pages_of_view(self.space)
        assert [
            (s.slot, s.flags, s.guest_phys_addr, s.memory_size, s.userspace_addr)
            for s in self.listener.memslots
        ] == [
            (s.slot, s.flags, s.guest_phys_addr, s.memory_size, s.userspace_addr)
            for s in self.vm.memslots
        ]
        assert not self.gate.held

    @property
    def ioctls(self) -> list[Ioctl]:
        """The memslot ioctls so far."""
        return [each for each in self.vm.ioctls if each.name == SLOT_IOCTL]


def slots(board: Board) -> list[tuple[int, int, bool]]:
    """(address, size, read-only) of each slot."""
    return [(s.guest_phys_addr, s.memory_size, s.readonly) for s in board.vm.memslots]


# ---- K1 to K3: what becomes a slot ------------------------------------------------------------


async def test_k1_kinds() -> None:
    """K1: RAM and ROM have slots; I/O, reservations and IOMMUs have none."""
    board = Board()
    for number, region in enumerate(
        (
            MemoryRegion.ram("ram", 0x2000),
            MemoryRegion.rom("rom", 0x2000),
            MemoryRegion.io("io", 0x2000, MemoryRegionOps()),
            MemoryRegion.reservation("reserved", 0x2000),
            MemoryRegion.rom_device("flash", 0x2000, MemoryRegionOps()),
        )
    ):
        board.root.add_subregion(0x10000 * number, region)
    await board.attach()
    assert slots(board) == [
        (0x0, 0x2000, False),
        (0x10000, 0x2000, True),
        (0x40000, 0x2000, True),
    ]


async def test_k1_readonly_alias() -> None:
    """K1: RAM is read-only where it is seen through a read-only alias, and nowhere else."""
    board = Board()
    ram = MemoryRegion.ram("ram", 0x4000)
    window = MemoryRegion.alias("pam", ram, offset=0x1000, size=0x2000)
    board.root.add_subregion(0, ram)
    board.root.add_subregion(0x10000, window)
    await board.attach()
    async with board.memory.transaction():
        window.set_readonly(True)
    board.check()
    assert slots(board) == [(0x0, 0x4000, False), (0x10000, 0x2000, True)]
    async with board.memory.transaction():
        window.set_readonly(False)
    board.check()
    assert slots(board) == [(0x0, 0x4000, False), (0x10000, 0x2000, False)]


async def test_k1_rom_device_mode() -> None:
    """K1: a ROM device has a slot in ROMD mode, and none out of it, as often as it changes."""
    board = Board()
    flash = MemoryRegion.rom_device("flash", 0x2000, MemoryRegionOps())
    board.root.add_subregion(0x1000, flash)
    await board.attach()
    for mode in (False, True, False, True):
        async with board.memory.transaction():
            flash.set_romd_mode(mode)
        board.check()
        assert slots(board) == ([(0x1000, 0x2000, True)] if mode else [])


async def test_k1_kernel_without_readonly_memory() -> None:
    """K1: where the kernel does not offer KVM_MEM_READONLY, ROM has no slot: it exits."""
    board = Board(fake=FakeKvm(capabilities={CAP_READONLY_MEM: 0}))
    board.root.add_subregion(0, MemoryRegion.ram("ram", 0x1000))
    board.root.add_subregion(0x1000, MemoryRegion.rom("rom", 0x1000))
    board.space = board.memory.create_address_space("memory", board.root)
    await board.memory.register(board.listener, board.space)
    assert slots(board) == [(0x0, 0x1000, False)]


async def test_k2_page_aligned_inwards() -> None:
    """K2: a section is cut to whole pages, and one with none has no slot."""
    board = Board()
    block = MemoryRegion.ram("block", 0x10000)
    for addr, offset, size in (
        (0x800, 0x800, 0x2000),
        (0x10800, 0x800, 0x400),
        (0x20000, 0x10, 0x4000),
    ):
        alias = MemoryRegion.alias(f"{addr:x}", block, offset=offset, size=size)
        board.root.add_subregion(addr, alias)
    await board.attach()
    assert slots(board) == [(0x1000, 0x1000, False)]


async def test_k2_crooked_host_memory() -> None:
    """K2: RAM whose host memory does not start on a page is refused with the mend."""
    board = Board()
    block = RamBlock.anonymous(0x4000)
    crooked = RamBlock.from_buffer(block.view[0x10:0x2010])
    board.root.add_subregion(0, MemoryRegion.ram("crooked", 0x2000, block=crooked))
    board.space = board.memory.create_address_space("memory", board.root)
    with pytest.raises(MemslotError, match="does not start on a page"):
        await board.memory.register(board.listener, board.space)
    assert board.space.listeners == ()
    assert not board.gate.held
    assert board.ioctls == []


async def test_k3_split() -> None:
    """K3: a section longer than the largest slot is several slots."""
    board = Board(max_slot=0x3000)
    ram = MemoryRegion.ram("ram", 0x8000)
    board.root.add_subregion(0x1000, ram)
    await board.attach()
    assert [each[:2] for each in slots(board)] == [
        (0x1000, 0x3000),
        (0x4000, 0x3000),
        (0x7000, 0x2000),
    ]
    async with board.memory.transaction():
        ram.set_address(0x100000)
    board.check()


async def test_k3_running_out() -> None:
    """K3: too many sections are reported before any ioctl, and the transaction is undone."""
    board = Board(fake=FakeKvm(capabilities={CAP_NR_MEMSLOTS: 3}))
    ram = MemoryRegion.ram("ram", 0x10000)
    board.root.add_subregion(0, ram)
    await board.attach()
    before = len(board.ioctls)

    async def three_holes() -> None:
        async with board.memory.transaction():
            for number in range(3):
                hole = MemoryRegion.io("hole", 0x1000, MemoryRegionOps())
                board.root.add_subregion_overlap(0x2000 * (number + 1), hole, 1)

    with pytest.raises(MemslotError, match=r"4 memslots are needed and the kernel has 3") as caught:
        await three_holes()
    assert caught.value.errno == errno.ENOSPC
    assert len(board.ioctls) == before
    assert board.root.subregions == (ram,)
    board.check()
    async with board.memory.transaction():
        hole = MemoryRegion.io("hole", 0x1000, MemoryRegionOps())
        board.root.add_subregion_overlap(0x2000, hole, 1)
    board.check()


# ---- K4: how many ioctls ------------------------------------------------------------------------


async def test_k4_counts() -> None:
    """K4: nothing for what comes back, one for a move, and deletes before adds."""
    board = Board()
    ram = MemoryRegion.ram("ram", 0x10000)
    window = MemoryRegion.alias("window", ram, offset=0, size=0x2000)
    board.root.add_subregion(0, ram)
    board.root.add_subregion(0x100000, window)
    await board.attach()
    start = len(board.ioctls)

    async def cost() -> int:
        board.check()
        return len(board.ioctls) - start

    async with board.memory.transaction():
        board.root.del_subregion(ram)
        board.root.add_subregion(0, ram)
    assert await cost() == 0
    async with board.memory.transaction():
        ram.set_nonvolatile(True)  # deleted and added for listeners, the same to the kernel
    assert await cost() == 0
    async with board.memory.transaction():
        window.set_address(0x200000)
    assert await cost() == 1
    hole = MemoryRegion.io("hole", 0x1000, MemoryRegionOps())
    async with board.memory.transaction():
        board.root.add_subregion_overlap(0x4000, hole, 1)
    assert await cost() == 4
    sizes = [each.args["memory_size"] for each in board.ioctls[-3:]]
    assert sizes == [0, 0x4000, 0xB000]


async def test_k4_swap() -> None:
    """K4: two windows that change places are a delete, a move and a create."""
    board = Board()
    ram = MemoryRegion.ram("ram", 0x10000)
    windows = [MemoryRegion.alias(f"w{n}", ram, offset=0x2000 * n, size=0x1000) for n in range(2)]
    for number, window in enumerate(windows):
        board.root.add_subregion(0x1000 * number, window)
    await board.attach()
    before = len(board.ioctls)
    async with board.memory.transaction():
        windows[0].set_address(0x100000)
        windows[1].set_address(0)
        windows[0].set_address(0x1000)
    board.check()
    assert len(board.ioctls) - before == 3


async def test_move_refused() -> None:
    """K4: a kernel that does not move slots (EINVAL) gets a delete and a create, then and later."""
    board = Board()
    ram = MemoryRegion.ram("ram", 0x1000)
    board.root.add_subregion(0, ram)
    await board.attach()
    for addr, errnos in ((0x10000, [errno.EINVAL, 0, 0]), (0x20000, [0, 0])):
        before = len(board.ioctls)
        if errnos[0]:
            board.fake.fail(SLOT_IOCTL, errno=errno.EINVAL)
        async with board.memory.transaction():
            ram.set_address(addr)
        board.check()
        assert [each.errno for each in board.ioctls[before:]] == errnos


# ---- failures (T13) ------------------------------------------------------------------------------


class Change:
    """A transaction that costs two deletes, a move and three creates."""

    ops = ("DELETE", "DELETE", "MOVE", "CREATE", "CREATE", "CREATE")

    def __init__(self, **options: Any) -> None:
        self.board = Board(**options)
        root = self.board.root
        self.ram = MemoryRegion.ram("ram", 0x10000)
        self.window = MemoryRegion.alias("window", self.ram, offset=0, size=0x2000)
        self.pam = MemoryRegion.alias("pam", self.ram, offset=0x4000, size=0x1000)
        root.add_subregion(0, self.ram)
        root.add_subregion(0x100000, self.window)
        root.add_subregion(0x200000, self.pam)

    async def make(self) -> None:
        """The transaction."""
        async with self.board.memory.transaction():
            hole = MemoryRegion.io("hole", 0x1000, MemoryRegionOps())
            self.board.root.add_subregion_overlap(0x4000, hole, 1)
            self.window.set_address(0x300000)
            self.pam.set_readonly(True)


async def test_the_change_is_what_it_says() -> None:
    """The transaction that the following tests let fail makes these ioctls."""
    change = Change()
    await change.board.attach()
    before = len(change.board.ioctls)
    await change.make()
    change.board.check()
    assert len(change.board.ioctls) - before == len(Change.ops)


@pytest.mark.parametrize("policy", KickPolicy)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EINVAL, errno.EEXIST])
@pytest.mark.parametrize("position", range(1, len(Change.ops) + 1))
async def test_t13_ioctl_fails(position: int, number: int, policy: KickPolicy) -> None:
    """T13: whichever ioctl fails, slots, view and tree are as before, and vCPUs go on."""
    change = Change(policy=policy)
    board = change.board
    await board.attach()
    view, kernel = board.space.view, board.vm.memslots
    board.fake.fail(SLOT_IOCTL, nth=position, errno=number)
    if Change.ops[position - 1] == "MOVE" and number == errno.EINVAL:
        await change.make()  # a delete and a create instead
    else:
        with pytest.raises(MemslotError) as caught:
            await change.make()
        assert caught.value.errno == number
        assert board.space.view == view
        assert {s.guest_phys_addr for s in board.vm.memslots} == {s.guest_phys_addr for s in kernel}
        assert change.window.addr == 0x100000
        assert not change.pam.readonly
        assert board.memory.broken is None
    board.check()
    assert board.fake.pending_failures() == 0
    if change.window.addr == 0x100000:
        await change.make()  # and now it works
        board.check()


async def test_error_text() -> None:
    """The error names the ioctl, the op, the slot, the section, and how full the table is."""
    change = Change()
    await change.board.attach()
    change.board.fake.fail(SLOT_IOCTL, nth=4, errno=errno.ENOMEM)
    with pytest.raises(MemslotError) as caught:
        await change.make()
    text = str(caught.value)
    for part in (
        SLOT_IOCTL,
        "CREATE",
        "slot 0",
        "[0x0, 0x4000)",
        "'ram'",
        "Cannot allocate memory",
    ):
        assert part in text
    assert "of 32764 slots are in use" in text
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_foreign_slot_is_in_the_way() -> None:
    """EEXIST from a slot that somebody else made is reported, and nothing has changed."""
    board = Board()
    await board.attach()
    ram = MemoryRegion.ram("ram", 0x2000)
    memory = RamBlock.anonymous(0x1000)
    board.vm.set_user_memory_region(77, 0, 0x1000, 0x1000, memory.host_address)
    with pytest.raises(MemslotError, match=r"CREATE slot 0 \[0x0, 0x2000\) 'ram'") as caught:
        async with board.memory.transaction():
            board.root.add_subregion(0, ram)
    assert caught.value.errno == errno.EEXIST
    assert [each.slot for each in board.vm.memslots] == [77]
    assert len(board.space.view) == 0
    assert not board.gate.held


@pytest.mark.parametrize("policy", KickPolicy)
@pytest.mark.parametrize("position", range(2, len(Change.ops) + 1))
async def test_t13_undoing_fails(position: int, policy: KickPolicy) -> None:
    """T13: when undoing fails too, the memory system is broken, and vCPUs stay stopped."""
    change = Change(policy=policy)
    board = change.board
    await board.attach()
    board.memory.when_broken(lambda _: board.gate.hold_nowait())  # as open_vm does
    for nth in (position, position + 1):
        board.fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
    with pytest.raises(BrokenMemoryError):
        await change.make()
    assert board.memory.broken is not None
    assert board.gate.held
    with pytest.raises(BrokenMemoryError):
        await change.make()


class Picky(MemoryListener):
    """Hears commits after the accelerator, and refuses when told to."""

    priority = 100
    refuse = False

    def commit(self) -> None:
        if self.refuse:
            self.refuse = False
            raise LookupError("refused")


async def test_t13_another_listener_fails() -> None:
    """T13: when a later listener refuses, the slots that were changed are changed back."""
    change = Change()
    picky = Picky()
    await change.board.attach()
    await change.board.memory.register(picky, change.board.space)
    before = len(change.board.ioctls)
    picky.refuse = True
    with pytest.raises(LookupError, match="refused"):
        await change.make()
    change.board.check()
    assert not change.pam.readonly
    assert len(change.board.ioctls) - before == 12
    await change.make()
    change.board.check()


async def test_registration_fails() -> None:
    """A map that the kernel refuses leaves no slot and no listener behind."""
    change = Change()
    board = change.board
    for nth in (1, 2, 3):
        board.space = board.memory.create_address_space(f"memory {nth}", board.root)
        board.fake.fail(SLOT_IOCTL, nth=nth, errno=errno.ENOMEM)
        with pytest.raises(MemslotError):
            await board.memory.register(board.listener, board.space)
        assert board.vm.memslots == ()
        assert board.space.listeners == ()
        assert not board.gate.held
    await board.attach()


async def test_t15_slots_pin_their_memory() -> None:
    """T15: memory cannot be unmapped while a slot is on it, and can when the slot is gone."""
    board = Board()
    block = RamBlock.anonymous(0x4000)
    ram = MemoryRegion.ram("ram", 0x4000, block=block)
    board.root.add_subregion(0, ram)
    await board.attach()
    with pytest.raises(RamInUseError):
        block.close()
    async with board.memory.transaction():
        board.root.del_subregion(ram)
    del ram
    gc.collect()  # the region has a hold of its own
    block.close()


async def test_t15_a_failed_add_pins_nothing() -> None:
    """T15: memory whose slot was refused is not pinned."""
    board = Board()
    await board.attach()
    block = RamBlock.anonymous(0x4000)
    ram = MemoryRegion.ram("ram", 0x4000, block=block)
    board.fake.fail(SLOT_IOCTL)
    with pytest.raises(MemslotError):
        async with board.memory.transaction():
            board.root.add_subregion(0, ram)
    del ram
    gc.collect()  # the region has a hold of its own
    block.close()


async def test_unregister_takes_the_slots_away() -> None:
    """Unregistering deletes every slot and lets the memory go."""
    change = Change()
    await change.board.attach()
    await change.board.memory.unregister(change.board.listener)
    assert change.board.vm.memslots == ()
    assert not change.board.gate.held
    listener, block = change.board.listener, change.ram.block
    del change
    gc.collect()  # the region has a hold of its own
    block.close()
    assert listener is not None  # it was here all the time, without a hold on the memory


# ---- any sequence of changes, any failures -----------------------------------------------------

_STEPS = st.one_of(
    st.tuples(st.just("toggle"), st.integers(0, 2)),
    st.tuples(st.just("move"), st.integers(0, 2), st.integers(0, 0x13).map(lambda n: n * 0x800)),
    st.tuples(st.just("readonly"), st.integers(0, 2)),
    st.tuples(st.just("offset"), st.integers(0, 2), st.integers(0, 7).map(lambda n: n * 0x800)),
)
_TRANSACTIONS = st.lists(
    st.tuples(st.lists(_STEPS, min_size=1, max_size=4), st.none() | st.integers(1, 8)), max_size=8
)


@given(_TRANSACTIONS, st.sampled_from(KickPolicy), st.integers(1, 4))
def test_kernel_equals_view(
    transactions: list[tuple[list[Any], int | None]], policy: KickPolicy, max_pages: int
) -> None:
    """K1 to K4, T13: after any transactions, some failing anywhere, slots equal the view."""

    async def main() -> None:
        board = Board(policy=policy, max_slot=max_pages * PAGE)
        ram = MemoryRegion.ram("ram", 0x8000)
        windows = [MemoryRegion.alias(f"w{n}", ram, offset=0, size=0x2800) for n in range(3)]
        covers = [MemoryRegion.io(f"io{n}", 0x1000, MemoryRegionOps()) for n in range(3)]
        board.root.add_subregion(0, ram)
        for number, (window, cover) in enumerate(zip(windows, covers, strict=True)):
            board.root.add_subregion_overlap(0x10000 * number, window, number - 1)
            board.root.add_subregion_overlap(0x2000 * number, cover, 5)
        await board.attach()
        for steps, position in transactions:
            if position is not None:
                board.fake.fail(SLOT_IOCTL, nth=position, errno=errno.ENOMEM)
            try:
                async with board.memory.transaction():
                    for what, which, *value in steps:
                        if what == "toggle":
                            covers[which].set_enabled(not covers[which].enabled)
                        elif what == "move":
                            windows[which].set_address(*value)
                        elif what == "offset":
                            windows[which].set_alias_offset(*value)
                        else:
                            windows[which].set_readonly(not windows[which].readonly)
            except MemslotError:
                assert position is not None
            board.check()
            # One that did not come up must not hit the next transaction's undo.
            board.fake._recorder._failures.clear()

    trio.run(main)
