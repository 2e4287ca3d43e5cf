"""B12: no page that a guest writes is missed, whatever becomes of its slot meanwhile."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    DirtyClient,
    KvmError,
    KvmUnavailableError,
    MemoryRegion,
    RamBlock,
)
from memlistener.kvm import DirtyLogMethod, KickPolicy, Vcpu
from memlistener.kvm import backend as kernel
from memlistener.testing import FakeKvm, Halt, Write
from tests.kvm.rig import PAGE, SLOT_IOCTL, Rig

VGA, CODE, MIGRATION = DirtyClient
BASE = 0x200000
PAGES = 16

by_method = pytest.mark.parametrize("method", DirtyLogMethod, ids=lambda each: each.value)


@pytest.fixture
def ram(rig: Rig) -> MemoryRegion:
    """Sixteen pages that a test moves about."""
    ram = MemoryRegion.ram("ram", PAGES * PAGE)
    rig.system.add_subregion(BASE, ram)
    return ram


async def write(rig: Rig, vcpu: Vcpu, *addresses: int) -> None:
    """Have the guest write a byte at each address."""
    rig.load(vcpu, *(Write(addr, 1, 0x5A) for addr in addresses), Halt())
    await vcpu.run()


async def written(rig: Rig, block: RamBlock, client: DirtyClient = MIGRATION) -> list[int]:
    """Fetch and take: the numbers of the pages."""
    await rig.memory.dirty_log_sync()
    return taken(block, client)


def taken(block: RamBlock, client: DirtyClient = MIGRATION) -> list[int]:
    """Take without fetching: the numbers of the pages."""
    return [
        page
        for offset, size in block.take_dirty(client)
        for page in range(offset // PAGE, (offset + size) // PAGE)
    ]


@by_method
async def test_b12_pages_are_fetched_and_taken(
    rig: Rig, ram: MemoryRegion, method: DirtyLogMethod
) -> None:
    """B12: what was written since the last time, once; and again when written again."""
    async with rig.open(dirty_log=method) as vm:
        vcpu = await vm.create_vcpu()
        await write(rig, vcpu, BASE)  # before anybody asked
        await rig.memory.dirty_log_start()
        assert all(each.flags & kernel.MEM_LOG_DIRTY_PAGES for each in vm.memslots)
        await write(rig, vcpu, BASE + 2 * PAGE, BASE + 9 * PAGE)
        assert await written(rig, ram.block) == [2, 9]
        assert await written(rig, ram.block) == []
        await write(rig, vcpu, BASE + 9 * PAGE)
        assert await written(rig, ram.block) == [9]
        await write(rig, vcpu, BASE + 4 * PAGE)
        await rig.memory.dirty_log_stop()
        assert not any(each.flags & kernel.MEM_LOG_DIRTY_PAGES for each in vm.memslots)
        assert taken(ram.block) == [4]
        await write(rig, vcpu, BASE + 5 * PAGE)
        assert taken(ram.block) == []


@by_method
async def test_b12_clients_take_their_own(
    rig: Rig, ram: MemoryRegion, method: DirtyLogMethod
) -> None:
    """B12: who began to log later gets what was written later; who left, what was before."""
    async with rig.open(dirty_log=method) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, BASE)
        async with rig.memory.transaction():
            ram.set_log(True, VGA)
        await write(rig, vcpu, BASE + PAGE)
        async with rig.memory.transaction():
            ram.set_log(True, CODE)
            ram.set_log(False, VGA)
        await write(rig, vcpu, BASE + 2 * PAGE)
        await rig.memory.dirty_log_sync()
        assert taken(ram.block, VGA) == [1]
        assert taken(ram.block, CODE) == [2]
        assert taken(ram.block, MIGRATION) == [0, 1, 2]


@attrs.frozen
class Change:
    """Something that becomes of a slot that logs."""

    name: str
    apply: Callable[[MemoryRegion, MemoryRegion], object]  # (system, ram)

    def __str__(self) -> str:
        return self.name


def _split(system: MemoryRegion, ram: MemoryRegion) -> None:
    device = MemoryRegion.io("device", PAGE, None)
    system.add_subregion_overlap(BASE + 3 * PAGE, device, 1)


CHANGES = [
    Change("delete", lambda system, ram: system.del_subregion(ram)),
    Change("disable", lambda system, ram: ram.set_enabled(False)),
    Change("move", lambda system, ram: ram.set_address(BASE + 0x100000)),
    Change("slide", lambda system, ram: ram.set_address(BASE + PAGE)),
    Change("shrink", lambda system, ram: ram.set_size(5 * PAGE)),
    Change("split", _split),
    Change("make read-only", lambda system, ram: ram.set_readonly(True)),
    Change("log for another", lambda system, ram: ram.set_log(True, VGA)),
]


@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])
@pytest.mark.parametrize("change", CHANGES, ids=str)
@by_method
async def test_b12_what_becomes_of_the_slot(
    rig: Rig, ram: MemoryRegion, method: DirtyLogMethod, change: Change, policy: KickPolicy
) -> None:
    """B12: fetched before the ioctl that would lose it, onto the memory it belongs to."""
    async with rig.open(policy, dirty_log=method) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, BASE + PAGE, BASE + 4 * PAGE)
        before = len(rig.fake.log) if rig.fake else 0
        async with rig.memory.transaction():
            change.apply(rig.system, ram)
        if rig.fake is not None:  # in the bracket
            assert all(not each.inside for each in rig.fake.log[before:])
        assert taken(ram.block) == [1, 4]
        # And from now on at its new place.
        for each in vm.memslots:
            if each.mapping.name == "ram" and not each.flags & kernel.MEM_READONLY:
                await write(rig, vcpu, each.guest_phys_addr)
                offset = each.userspace_addr - ram.block.host_address
                assert offset // PAGE in await written(rig, ram.block)


@by_method
async def test_b12_while_the_guest_writes(
    rig: Rig, ram: MemoryRegion, method: DirtyLogMethod
) -> None:
    """B12: a copy made of what was taken ends equal to the memory, under churn."""
    rig.system.del_subregion(ram)  # room to slide in: each page of the guest's is always there
    slide, pages = 4, PAGES - 4
    ram.set_unmergeable(True)
    rig.system.add_subregion(BASE, ram)
    upper = MemoryRegion.alias("upper", ram, offset=0, size=PAGE)
    rig.system.add_subregion_overlap(BASE, upper, 1)
    first = BASE + slide * PAGE
    copy = bytearray(PAGES * PAGE)
    chance = random.Random(2)

    def copy_dirty() -> None:
        for offset, size in ram.block.take_dirty(MIGRATION):
            copy[offset : offset + size] = ram.block.view[offset : offset + size]

    async with rig.open(dirty_log=method) as vm, trio.open_nursery() as nursery:
        for number in range(2):
            stores = [
                Write(first + page * PAGE + 8 * number, 4, value)
                for value in (chance.randrange(1 << 32),)
                for page in range(pages)
            ]
            vcpu = await rig.boot(vm, *stores, *map(_other, stores), loop=True)
            nursery.start_soon(vcpu.run)
        await rig.memory.dirty_log_start()
        copy[:] = ram.block.view
        for _ in range(60):
            at = chance.randrange(slide + 1)
            cut = chance.randrange(1, PAGES)
            async with rig.memory.transaction():
                ram.set_address(BASE + at * PAGE)
                upper.set_address(BASE + (at + cut) * PAGE)
                upper.set_size((PAGES - cut) * PAGE)
                upper.set_alias_offset(cut * PAGE)
            if chance.random() < 0.5:
                await rig.memory.dirty_log_sync()
                copy_dirty()
            await rig.space.write(first, bytes([at]) * 16)  # a device does, too
        async with vm.paused():
            await rig.memory.dirty_log_sync()
            copy_dirty()
            differ = [
                page
                for page in range(PAGES)
                if copy[page * PAGE : (page + 1) * PAGE]
                != ram.block.view[page * PAGE : (page + 1) * PAGE]
            ]
            holes = vm.statistics().holes
        nursery.cancel_scope.cancel()
    assert differ == []
    assert holes == 0


def _other(store: Write) -> Write:
    return attrs.evolve(store, value=store.value ^ 0xFFFF)


@by_method
async def test_b12_when_the_vm_closes(rig: Rig, ram: MemoryRegion, method: DirtyLogMethod) -> None:
    """B12: what guests wrote last is there when the VM is not any more."""
    async with rig.open(dirty_log=method) as vm:
        one, two = await vm.create_vcpu(), await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, one, BASE)
        await write(rig, two, BASE + PAGE)
        await two.aclose()
    assert taken(ram.block) == [0, 1]


async def test_b12_logging_before_there_is_a_vm(rig: Rig, ram: MemoryRegion) -> None:
    """T8, B12: a VM that is opened while writes are logged logs them from the start."""
    ram.set_log(True, VGA)
    assert rig.space.view is not None
    await rig.memory.dirty_log_start()
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await write(rig, vcpu, BASE)
        assert await written(rig, ram.block, VGA) == [0]
        assert taken(ram.block, MIGRATION) == [0]


async def test_b12_new_memory_logs_from_the_start(rig: Rig) -> None:
    """T6, B12: of a range that is added with logging on, no log_start speaks."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        ram = MemoryRegion.ram("new", PAGE)
        async with rig.memory.transaction():
            rig.system.add_subregion(BASE, ram)
        await write(rig, vcpu, BASE)
        assert await written(rig, ram.block) == [0]


async def test_only_what_is_asked_for(rig: Rig, ram: MemoryRegion) -> None:
    """Dirty logging: the sync of one region fetches its slots, and no others."""
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        rig.low.block.take_dirty(MIGRATION)
        await write(rig, vcpu, BASE)
        await rig.memory.dirty_log_sync(rig.low)
        assert taken(ram.block) == []
        await rig.memory.dirty_log_sync(ram)
        assert taken(ram.block) == [0]


async def test_manual_protection(rig: Rig, ram: MemoryRegion) -> None:
    """KVM_CLEAR_DIRTY_LOG: pages are protected when they are taken, and only those."""
    async with rig.open(dirty_log=DirtyLogMethod.MANUAL_PROTECT) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, *(BASE + page * PAGE for page in range(PAGES)))
        await rig.memory.dirty_log_sync()
        assert ram.block.take_dirty(MIGRATION, 3 * PAGE, 2 * PAGE) == [(3 * PAGE, 2 * PAGE)]
        if rig.fake is not None:
            asked = [each for each in rig.fake.log if each.name == "KVM_CLEAR_DIRTY_LOG"]
            assert [each.args["bitmap"] for each in asked] == [(3 << 3).to_bytes(8, "little")]
        await write(rig, vcpu, BASE + 3 * PAGE)
        assert await written(rig, ram.block) == [page for page in range(PAGES) if page != 4]
        # A client that did not take them yet still has its bits; they need no clearing again.
        await write(rig, vcpu, BASE + 4 * PAGE)
        await rig.memory.dirty_log_sync()
        await rig.memory.dirty_log_clear(ram, 0, PAGES * PAGE)
        await write(rig, vcpu, BASE + 6 * PAGE)
        assert await written(rig, ram.block) == [4, 6]


async def test_manual_protection_is_not_everywhere() -> None:
    """Where the kernel does not offer it, KVM_GET_DIRTY_LOG protects."""
    fake = FakeKvm(capabilities={kernel.CAP_MANUAL_DIRTY_LOG_PROTECT2: 0})
    rig = Rig(fake)
    async with rig.open(dirty_log=DirtyLogMethod.MANUAL_PROTECT) as vm:
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, 0x9000)
        assert 9 in await written(rig, rig.low.block)
    assert not [each for each in fake.log if each.name == "KVM_CLEAR_DIRTY_LOG"]


class TestRing:
    """The dirty ring."""

    async def test_b12_full(self, rig: Rig) -> None:
        """B12: a vCPU whose ring is full goes on when it has been emptied."""
        pages = 5000
        ram = MemoryRegion.ram("ram", pages * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            for first in range(0, pages, 200):  # so many fit into a page of code
                await write(
                    rig, vcpu, *(BASE * 4 + page * PAGE for page in range(first, first + 200))
                )
            assert vcpu.statistics().exits["DirtyRingFull"] > 1
            assert set(await written(rig, ram.block)) == set(range(pages))

    async def test_b12_overflow(self) -> None:
        """B12: of a ring that is noticed to be full too late, no page is lost; it works again."""
        pages = 3000
        ram = MemoryRegion.ram("ram", pages * PAGE)
        rig = Rig(FakeKvm(dirty_rings_overflow=True, log_limit=0))
        rig.system.add_subregion(BASE * 4, ram)
        async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            for count in (900, 1024, 1025, 3000, 1980, 2047, 2048, 5, 963, 959):
                wrote = range(pages)[:count]
                for _ in range(3):
                    await write(rig, vcpu, *(BASE * 4 + page * PAGE for page in wrote))
                    found = await written(rig, ram.block)
                    assert set(found) >= set(wrote)
            for _ in range(20):  # it finds its place again
                await write(rig, vcpu, BASE * 4)
                if await written(rig, ram.block) == [0]:
                    break
            else:
                pytest.fail("pages that were not written are taken for ever")
            await write(rig, vcpu, BASE * 4 + PAGE, BASE * 4 + 2 * PAGE)
            assert await written(rig, ram.block) == [1, 2]
            assert vm.statistics().dirty_ring_overflows > 3

    async def test_b12_overflow_while_the_guest_writes(self, rig: Rig) -> None:
        """B12: whatever this kernel does, a small ring ends in an equal copy."""
        pages = 2500
        ram = MemoryRegion.ram("ram", pages * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        copy = bytearray(pages * PAGE)
        async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            copy[:] = ram.block.view
            for number in range(6):
                for first in range(0, pages, 250):  # so many fit into the guest's code
                    stores = [
                        Write(BASE * 4 + page * PAGE, 1, number + 1)
                        for page in range(first, first + 250)
                    ]
                    rig.load(vcpu, *stores, Halt())
                    await vcpu.run()
                if number % 2:
                    await rig.memory.dirty_log_sync()
                    for offset, size in ram.block.take_dirty(MIGRATION):
                        copy[offset : offset + size] = ram.block.view[offset : offset + size]
        for offset, size in ram.block.take_dirty(MIGRATION):
            copy[offset : offset + size] = ram.block.view[offset : offset + size]
        assert copy == ram.block.view

    @pytest.mark.parametrize("entries", [3, 1000, 1 << 20])
    async def test_sizes_that_there_are_not(self, rig: Rig, entries: int) -> None:
        """The error says which there are."""
        with pytest.raises(KvmUnavailableError, match=r"power of two from 1,024 to 65,536"):
            async with rig.open(dirty_log=DirtyLogMethod.RING, dirty_ring_entries=entries):
                pass

    async def test_kernels_without(self) -> None:
        """The error says which kernels have it, and what else there is."""
        absent = {kernel.CAP_DIRTY_LOG_RING: 0, kernel.CAP_DIRTY_LOG_RING_ACQ_REL: 0}
        rig = Rig(FakeKvm(capabilities=absent))
        with pytest.raises(KvmUnavailableError, match="no dirty ring: use Linux"):
            async with rig.open(dirty_log=DirtyLogMethod.RING):
                pass

    async def test_older_kernels(self) -> None:
        """KVM_CAP_DIRTY_LOG_RING will do."""
        rig = Rig(FakeKvm(capabilities={kernel.CAP_DIRTY_LOG_RING_ACQ_REL: 0}))
        async with rig.open(dirty_log=DirtyLogMethod.RING) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, 0x9000)
            assert 9 in await written(rig, rig.low.block)


class TestFailure:
    """T13: the kernel says no."""

    async def test_fetching_in_a_commit(self) -> None:
        """T13, B12: the transaction is taken back, and no bit is lost."""
        fake = FakeKvm()
        rig = Rig(fake)
        ram = MemoryRegion.ram("ram", PAGES * PAGE)
        rig.system.add_subregion(BASE, ram)
        async with rig.open(dirty_log=DirtyLogMethod.BITMAP) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE + PAGE)
            before = vm.memslots
            fake.fail("KVM_GET_DIRTY_LOG", errno=errno.ENOMEM)
            with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG: slot \d+ .*'ram' logged: "):
                async with rig.memory.transaction():
                    ram.set_address(BASE + PAGE)
            assert (vm.memslots, rig.memory.broken) == (before, None)
            await write(rig, vcpu, BASE + 2 * PAGE)
            assert await written(rig, ram.block) == [1, 2]

    async def test_clearing(self) -> None:
        """The error leaves take_dirty, and the bits are there the next time."""
        fake = FakeKvm()
        rig = Rig(fake)
        async with rig.open() as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, 0x9000)
            await rig.memory.dirty_log_sync()
            fake.fail("KVM_CLEAR_DIRTY_LOG", errno=errno.ENOMEM)
            with pytest.raises(KvmError, match=r"KVM_CLEAR_DIRTY_LOG: slot 0 .*'low' logged: "):
                rig.low.block.take_dirty(MIGRATION)
            assert 9 in taken(rig.low.block)
            await write(rig, vcpu, 0x9000)
            assert 9 in await written(rig, rig.low.block)

    @pytest.mark.parametrize("nth", range(1, 5))
    async def test_b12_at_every_ioctl(self, nth: int) -> None:
        """T13, B12: slots come back logging, and all that was written is known."""
        fake = FakeKvm()
        rig = Rig(fake)
        ram = MemoryRegion.ram("ram", PAGES * PAGE)
        ram.set_unmergeable(True)
        window = MemoryRegion.alias("window", ram, offset=0, size=4 * PAGE)
        window.set_unmergeable(True)
        rig.system.add_subregion(BASE, ram)
        rig.system.add_subregion_overlap(BASE, window, 1)
        async with rig.open() as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE, BASE + 8 * PAGE)
            before = vm.memslots
            fake.fail("KVM_SET_USER_MEMORY_REGION", nth=nth)
            with pytest.raises(KvmError):  # noqa: PT012
                async with rig.memory.transaction():
                    window.set_size(6 * PAGE)
                    ram.set_address(BASE + 0x100000)
                    window.set_address(BASE + 0x100000)
            assert fake.pending_failures() == 0
            assert set(vm.memslots) == set(before) or {each.mapping for each in vm.memslots} == {
                each.mapping for each in before
            }
            await write(rig, vcpu, BASE + PAGE, BASE + 9 * PAGE)
            assert await written(rig, ram.block) == [0, 1, 8, 9]


class Model:
    """What a guest wrote, for whom, page by page of the memory: sets, and nothing clever."""

    def __init__(self) -> None:
        self.start: int | None = BASE
        self.size = PAGES
        self.mask = 0
        self.everything = False
        self.pages: dict[DirtyClient, set[int]] = {each: set() for each in DirtyClient}

    def write(self, page_of_guest: int) -> None:
        """A guest wrote a page by its address."""
        if self.start is None:
            return
        page = page_of_guest - self.start // PAGE
        if 0 <= page < self.size:
            for client in DirtyClient:
                if self.mask >> client & 1 or (self.everything and client is MIGRATION):
                    self.pages[client].add(page)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, PAGES + 4), min_size=1, max_size=4)),
        st.tuples(st.just("move"), st.integers(0, 4)),
        st.tuples(st.just("resize"), st.integers(1, PAGES)),
        st.tuples(st.just("enable"), st.booleans()),
        st.tuples(st.just("cut"), st.integers(0, PAGES - 1)),
        st.tuples(st.just("log"), st.tuples(st.sampled_from(DirtyClient), st.booleans())),
        st.tuples(st.just("everything"), st.booleans()),
        st.tuples(st.just("take"), st.sampled_from(DirtyClient)),
        st.tuples(st.just("fail"), st.integers(1, 4)),
    ),
    max_size=30,
)


@given(actions, st.sampled_from(DirtyLogMethod), st.sampled_from(list(KickPolicy)))
def test_b12_every_page_is_taken_once(
    steps: list[tuple[str, Any]], method: DirtyLogMethod, policy: KickPolicy
) -> None:
    """B12: whatever happens between writes, and whatever fails, each client gets what is its."""
    trio.run(_play, steps, method, policy)


async def _play(steps: list[tuple[str, Any]], method: DirtyLogMethod, policy: KickPolicy) -> None:
    fake = FakeKvm(log_limit=0)
    rig = Rig(fake)
    ram = MemoryRegion.ram("ram", PAGES * PAGE)
    cut = MemoryRegion.alias("cut", ram, offset=0, size=PAGE)
    cut.set_unmergeable(True)
    rig.system.add_subregion(BASE, ram)
    rig.system.add_subregion_overlap(BASE, cut, 1)
    model = Model()
    async with rig.open(policy, dirty_log=method) as vm:
        vcpu = await vm.create_vcpu()
        nth = 0
        for what, how in [*steps, *(("take", client) for client in DirtyClient)]:
            if what == "write":
                await write(rig, vcpu, *(BASE + page * PAGE for page in how))
                for page in how:
                    model.write(BASE // PAGE + page)
            elif what == "take":
                found = await written(rig, ram.block, how)
                assert set(found) == model.pages[how]
                assert len(found) == len(set(found))
                model.pages[how].clear()
            elif what == "fail":
                nth = how  # ioctl of the next change
            else:
                if nth:
                    fake.fail(SLOT_IOCTL, nth=nth)
                with contextlib.suppress(KvmError):
                    await _change(rig, ram, cut, model, what, how)
                while fake.pending_failures():  # it had fewer
                    with contextlib.suppress(KvmError):
                        fake.vms[0].set_user_memory_region(0, 0, 1, 0, 0)
                nth = 0
        assert rig.memory.broken is None


async def _change(
    rig: Rig, ram: MemoryRegion, cut: MemoryRegion, model: Model, what: str, how: Any
) -> None:
    if what == "everything":
        if how != model.everything:
            await (rig.memory.dirty_log_start() if how else rig.memory.dirty_log_stop())
            model.everything = how
        return
    state = (model.start, model.size, model.mask)
    try:
        async with rig.memory.transaction():
            if what == "move":
                ram.set_address(BASE + how * PAGE)
                cut.set_address(BASE + how * PAGE + cut.alias_offset)
            elif what == "resize":
                ram.set_size(how * PAGE)
            elif what == "enable":
                ram.set_enabled(how)
                cut.set_enabled(how)
            elif what == "cut":
                cut.set_alias_offset(how * PAGE)
                cut.set_address(ram.addr + how * PAGE)
            elif what == "log":
                ram.set_log(how[1], how[0])
    except KvmError:
        model.start, model.size, model.mask = state
        raise
    model.start = ram.addr if ram.enabled else None
    model.size = ram.size // PAGE
    model.mask = ram.dirty_log_mask
