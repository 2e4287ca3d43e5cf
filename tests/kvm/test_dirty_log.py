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
    MemoryRegion,
)
from memlistener.kvm import DirtyLogMethod, KickPolicy
from memlistener.kvm import backend as kernel
from memlistener.testing import FakeKvm, Write
from tests.kvm.dirty import (
    BASE,
    CODE,
    MIGRATION,
    PAGES,
    VGA,
    by_method,
    sixteen_pages,
    taken,
    write,
    written,
)
from tests.kvm.rig import PAGE, SLOT_IOCTL, Rig


@pytest.fixture
def ram(rig: Rig) -> MemoryRegion:
    """Sixteen pages that a test moves about."""
    return sixteen_pages(rig)


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
