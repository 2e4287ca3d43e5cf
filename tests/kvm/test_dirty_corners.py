"""B12 where things meet: two changes in one transaction, failures, odd memory, other threads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import random
import threading

import pytest
import trio

from memlistener import DirtyClient, KvmError, MemoryRegion, RamBlock
from memlistener.kvm import DirtyLogMethod, KickPolicy, KvmMemoryListener, Vcpu
from memlistener.kvm import backend as kernel
from memlistener.kvm.slots import Memslot
from memlistener.testing import FakeKvm, Halt, Ioctl, Write
from tests.kvm.dirty import (
    BASE,
    MIGRATION,
    PAGES,
    VGA,
    by_method,
    taken,
    write,
    written,
)
from tests.kvm.rig import LONG_ENOUGH, PAGE, Rig

RING = DirtyLogMethod.RING


def rig_with_ram(fake: FakeKvm) -> tuple[Rig, MemoryRegion]:
    """A machine, and sixteen pages of RAM at `BASE`."""
    rig = Rig(fake)
    ram = MemoryRegion.ram("ram", PAGES * PAGE)
    rig.system.add_subregion(BASE, ram)
    return rig, ram


class TestTwoChangesAtOnce:
    """B12: one transaction does more than one thing to a slot."""

    @by_method
    async def test_moved_and_logged_for_others(self, rig: Rig, method: DirtyLogMethod) -> None:
        """A slot that moves logs for those who log it at its new place."""
        ram = MemoryRegion.ram("ram", PAGES * PAGE)
        rig.system.add_subregion(BASE, ram)
        async with rig.open(dirty_log=method) as vm:
            vcpu = await vm.create_vcpu()
            async with rig.memory.transaction():
                ram.set_log(True, VGA)
            await write(rig, vcpu, BASE)
            async with rig.memory.transaction():
                ram.set_log(False, VGA)
                ram.set_log(True, DirtyClient.CODE)
                ram.set_address(BASE + PAGES * PAGE)
            await write(rig, vcpu, BASE + (PAGES + 3) * PAGE)
            await rig.memory.dirty_log_sync()
        assert taken(ram.block, VGA) == [0]
        assert taken(ram.block, DirtyClient.CODE) == [3]

    @by_method
    @pytest.mark.parametrize("moves", [False, True])
    async def test_the_same_memory_in_another_block(
        self, rig: Rig, method: DirtyLogMethod, moves: bool
    ) -> None:
        """Two blocks on one buffer: the slot stays, its pages are the new block's."""
        buffer = mmap.mmap(-1, PAGES * PAGE)
        one, two = (RamBlock.from_buffer(buffer, name=name) for name in ("one", "two"))
        old = MemoryRegion.ram("old", PAGES * PAGE, block=one)
        new = MemoryRegion.ram("new", PAGES * PAGE, block=two)
        rig.system.add_subregion(BASE, old)
        async with rig.open(dirty_log=method) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE)
            place = BASE + (PAGES * PAGE if moves else 0)
            async with rig.memory.transaction():
                rig.system.del_subregion(old)
                rig.system.add_subregion(place, new)
            await write(rig, vcpu, place + PAGE)
            assert await written(rig, two) == [1]
            assert taken(one) == [0]


class TestOddMemory:
    """B12: blocks that do not begin or end with a page of the host."""

    @by_method
    @pytest.mark.parametrize("odd", [0, 0x10, PAGE - 0x10])
    async def test_block_that_begins_within_a_page(
        self, rig: Rig, method: DirtyLogMethod, odd: int
    ) -> None:
        """A page of the guest's is on two of the block's: both were written, then neither."""
        buffer = mmap.mmap(-1, 10 * PAGE)
        part = (ctypes.c_ubyte * (8 * PAGE + 0x800)).from_buffer(buffer, odd)
        block = RamBlock.from_buffer(part)
        ram = MemoryRegion.ram("ram", block.size, block=block)
        skip = -odd % PAGE  # then it is on a page for guest and host
        rig.system.add_subregion(
            BASE, MemoryRegion.alias("window", ram, offset=skip, size=7 * PAGE)
        )
        async with rig.open(dirty_log=method) as vm:
            vcpu = await vm.create_vcpu()
            assert any(each.guest_phys_addr == BASE for each in vm.memslots)
            await rig.memory.dirty_log_start()
            both = {(skip + 2 * PAGE) // PAGE, (skip + 3 * PAGE - 1) // PAGE}
            for _ in range(2):
                await write(rig, vcpu, BASE + 2 * PAGE)
                assert block.dirty_pages(MIGRATION) == 0
                await rig.memory.dirty_log_sync()
                assert set(taken(block)) == both
                assert await written(rig, block) == []
            await write(rig, vcpu, BASE + 2 * PAGE)
            await rig.memory.dirty_log_sync()
            for page in sorted(both):  # a few bytes at a time
                assert block.take_dirty(MIGRATION, page * PAGE + PAGE - 8, 8).pages == 1
            assert await written(rig, block) == []


class TestFailures:
    """B12, T13: the kernel says no, and nothing is lost for it."""

    async def test_entries_are_not_taken_back(self) -> None:
        """A page whose entry could not be given back is not protected: it is told of again."""
        fake = FakeKvm()
        rig, ram = rig_with_ram(fake)
        async with rig.open(dirty_log=RING) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE)
            fake.fail("KVM_RESET_DIRTY_RINGS", errno=errno.ENOMEM)
            with pytest.raises(KvmError):
                await rig.memory.dirty_log_sync()
            assert taken(ram.block) == [0]
            await write(rig, vcpu, BASE)  # of which the kernel says nothing
            assert await written(rig, ram.block) == [0]
            assert await written(rig, ram.block) == []
            await write(rig, vcpu, BASE)
            assert await written(rig, ram.block) == [0]
            assert vm.statistics().dirty_ring_overflows == 0

    async def test_closing_a_vcpu(self) -> None:
        """What the ring of a closed vCPU had is known, and the others' go on."""
        fake = FakeKvm()
        rig, ram = rig_with_ram(fake)
        async with rig.open(dirty_log=RING) as vm:
            one, two = await vm.create_vcpu(), await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, one, BASE)
            await write(rig, two, BASE + PAGE)
            fake.fail("KVM_RESET_DIRTY_RINGS", errno=errno.ENOMEM)
            with pytest.raises(KvmError):
                await one.aclose()
            assert taken(ram.block) == [0, 1]
            await write(rig, two, BASE, BASE + PAGE)
            assert await written(rig, ram.block) == [0, 1]
            await write(rig, two, BASE + PAGE)
            assert await written(rig, ram.block) == [1]
            assert vm.statistics().dirty_ring_overflows == 0

    @pytest.mark.parametrize("method", [DirtyLogMethod.BITMAP, DirtyLogMethod.MANUAL_PROTECT])
    async def test_closing_the_vm(self, method: DirtyLogMethod) -> None:
        """A slot whose bits cannot be had at the end counts as written; the others are fetched."""
        fake = FakeKvm()
        rig, ram = rig_with_ram(fake)
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG: slot 0 .*'low'"):  # noqa: PT012
            async with rig.open(dirty_log=method) as vm:
                vcpu = await vm.create_vcpu()
                await rig.memory.dirty_log_start()
                await write(rig, vcpu, BASE + PAGE)
                fake.fail("KVM_GET_DIRTY_LOG", errno=errno.ENOMEM)
        assert taken(ram.block) == [1]
        assert rig.low.block.dirty_pages(MIGRATION) == rig.low.size // PAGE

    @pytest.mark.parametrize("nth", range(5))
    async def test_overflow_is_found_while_clients_change(self, nth: int) -> None:
        """Who stops to log has the pages of an overflow, too; whatever fails, nobody loses any."""
        pages = 1500
        fake = FakeKvm(dirty_rings_overflow=True, log_limit=0)
        rig = Rig(fake)
        ram = MemoryRegion.ram("ram", pages * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        async with rig.open(dirty_log=RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            async with rig.memory.transaction():
                ram.set_log(True, VGA)
            await write(rig, vcpu, *(BASE * 4 + page * PAGE for page in range(pages)))
            if nth:
                fake.fail("KVM_SET_USER_MEMORY_REGION", nth=nth)
            with contextlib.suppress(KvmError):
                async with rig.memory.transaction():
                    ram.set_log(False, VGA)
                    ram.set_log(True, DirtyClient.CODE)
            if ram.dirty_log_mask >> VGA & 1:
                await rig.memory.dirty_log_sync()
            assert rig.memory.broken is None
            assert taken(ram.block, VGA) == list(range(pages))
            await rig.memory.dirty_log_sync()
            for client in DirtyClient:
                ram.block.take_dirty(client)
            await write(rig, vcpu, BASE * 4 + PAGE)
            await rig.memory.dirty_log_sync()
            client = VGA if ram.dirty_log_mask >> VGA & 1 else DirtyClient.CODE
            assert 1 in taken(ram.block, client)

    async def test_b9_nobody_runs_where_a_log_stays_off(self) -> None:
        """T13, B12: the log of a slot goes off, and neither comes back nor can be brought back."""
        fake = FakeKvm(dirty_rings_overflow=True, log_limit=0)
        rig = Rig(fake)
        ram = MemoryRegion.ram("ram", 1500 * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        async with rig.open(dirty_log=RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, *(BASE * 4 + page * PAGE for page in range(1500)))
            ram.block.take_dirty(MIGRATION)
            for nth in (2, 3):
                fake.fail("KVM_SET_USER_MEMORY_REGION", nth=nth)
            with pytest.raises(KvmError):
                await rig.memory.dirty_log_sync()
            assert ram.block.dirty_pages(MIGRATION) == 1500
            with trio.move_on_after(0.05) as scope:
                await write(rig, vcpu, BASE * 4)
            assert scope.cancelled_caught


@pytest.mark.parametrize("seed", range(4))
async def test_b12_rings_that_overflow_again_and_again(seed: int) -> None:
    """B12: wherever in an overflown ring entries lie, one sync finds them all; and it ends."""
    chance = random.Random(seed)
    pages = 4000
    ram = MemoryRegion.ram("ram", pages * PAGE)
    rig = Rig(FakeKvm(dirty_rings_overflow=True, log_limit=0))
    rig.system.add_subregion(BASE * 4, ram)
    async with rig.open(dirty_log=RING, dirty_ring_entries=1024) as vm:
        vcpus = [await vm.create_vcpu() for _ in range(2)]
        await rig.memory.dirty_log_start()
        for _ in range(20):
            wrote: set[int] = set()
            for _ in range(chance.randrange(1, 4)):
                first = chance.randrange(pages)
                count = chance.choice([1, 60, 900, 960, 1000, 1024, 1030, 1500, 2047, 3000])
                some = range(first, min(pages, first + count))
                await write(rig, chance.choice(vcpus), *(BASE * 4 + page * PAGE for page in some))
                wrote.update(some)
            assert wrote - set(await written(rig, ram.block)) == set()
        for _ in range(30):
            for number, vcpu in enumerate(vcpus):
                await write(rig, vcpu, BASE * 4 + number * PAGE)
            if await written(rig, ram.block) == [0, 1]:
                break
        else:
            pytest.fail("pages that were not written are taken for ever")


class TestThreads:
    """B12: clients take on threads of their own."""

    @by_method
    async def test_copied_by_a_thread(self, rig: Rig, method: DirtyLogMethod) -> None:
        """What another thread took and copied, under churn and while guests write, is equal."""
        ram = MemoryRegion.ram("ram", PAGES * PAGE)
        ram.set_unmergeable(True)
        window = MemoryRegion.alias("window", ram, offset=0, size=PAGE)
        rig.system.add_subregion(BASE, ram)
        rig.system.add_subregion_overlap(BASE, window, 1)
        copy = bytearray(PAGES * PAGE)
        chance = random.Random(3)
        over = threading.Event()

        def follow() -> None:
            first = 0
            while not over.is_set():
                first = (first + 5) % PAGES
                for part in ((first * PAGE, PAGE), (0, None)):
                    for offset, size in ram.block.take_dirty(MIGRATION, *part):
                        copy[offset : offset + size] = ram.block.view[offset : offset + size]

        async with rig.open(dirty_log=method) as vm, trio.open_nursery() as nursery:
            stores = [
                Write(BASE + page * PAGE, 4, value)
                for value in (0x55555555, 0x12345678, 0xAAAAAAAA)
                for page in range(PAGES)
            ]
            vcpu = await rig.boot(vm, *stores, loop=True)
            nursery.start_soon(vcpu.run)
            await rig.memory.dirty_log_start()
            copy[:] = ram.block.view
            async with trio.open_nursery() as copying:
                copying.start_soon(trio.to_thread.run_sync, follow)
                for _ in range(60):
                    await rig.memory.dirty_log_sync()
                    cut = chance.randrange(1, PAGES)
                    async with rig.memory.transaction():
                        window.set_address(BASE + cut * PAGE)
                        window.set_alias_offset(cut * PAGE)
                        window.set_unmergeable(chance.random() < 0.5)
                over.set()
            async with vm.paused():
                await rig.memory.dirty_log_sync()
                for offset, size in ram.block.take_dirty(MIGRATION):
                    copy[offset : offset + size] = ram.block.view[offset : offset + size]
                assert copy == ram.block.view
            nursery.cancel_scope.cancel()

    async def test_a_bit_comes_when_the_page_is_protected(self) -> None:
        """Who could take a page of a ring before that would miss the next write to it."""
        fake = FakeKvm()
        rig, ram = rig_with_ram(fake)
        seen: list[int] = []

        def look(ioctl: Ioctl) -> None:
            if ioctl.name == "KVM_RESET_DIRTY_RINGS":
                seen.append(ram.block.dirty_pages(MIGRATION))

        async with rig.open(dirty_log=RING) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE)
            fake.on_ioctl = look
            assert await written(rig, ram.block) == [0]
        assert seen[0] == 0


async def test_clearing_looks_at_no_other_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """log_clear of one of many ranges does not go through all slots."""
    fake = FakeKvm()
    rig = Rig(fake)
    for number in range(300):
        rig.system.add_subregion(BASE + 2 * number * PAGE, MemoryRegion.ram("small", PAGE))
    ram = MemoryRegion.ram("ram", PAGE)
    rig.system.add_subregion(BASE + 600 * PAGE, ram)
    looked: list[Memslot] = []

    def look(slot: Memslot) -> int:
        looked.append(slot)
        return slot.mapping.guest_phys_addr

    async with rig.open() as vm:
        assert len(vm.memslots) == 302
        vcpu = await vm.create_vcpu()
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, BASE + 600 * PAGE)
        await rig.memory.dirty_log_sync()
        monkeypatch.setattr(Memslot, "guest_phys_addr", property(look))
        await rig.memory.dirty_log_clear(ram, 0, PAGE)
        monkeypatch.undo()
    assert [each for each in fake.log if each.name == "KVM_CLEAR_DIRTY_LOG"] != []
    assert len(looked) < 5


class TestFullRing:
    """B12: a vCPU is out because its ring is full, and then something else happens to it."""

    PAGES = 1500

    async def _fill(self, rig: Rig, ram: MemoryRegion, vcpu: Vcpu) -> None:
        """Write all pages; the first attempt to empty the ring fails."""
        assert rig.fake is not None
        addresses = [ram.addr + page * PAGE for page in range(self.PAGES)]
        rig.load(vcpu, *(Write(addr, 1, 0x5A) for addr in addresses), Halt())
        rig.fake.fail("KVM_RESET_DIRTY_RINGS", errno=errno.ENOMEM)
        with pytest.raises(KvmError, match="KVM_RESET_DIRTY_RINGS"):
            await vcpu.run()

    @pytest.mark.parametrize("then", ["run", "close", "pause", "commit", "set"])
    async def test_b12_emptying_fails_and_then(self, then: str) -> None:
        """The pages are known, the vCPU goes on, and what it writes is, too."""
        rig = Rig(FakeKvm(log_limit=0))
        ram = MemoryRegion.ram("ram", self.PAGES * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        async with rig.open(dirty_log=RING, dirty_ring_entries=1024) as vm:
            vcpu, other = await vm.create_vcpu(), await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await self._fill(rig, ram, vcpu)
            early = taken(ram.block)  # of which no write would be seen now
            assert early
            match then:
                case "close":
                    await vcpu.aclose()
                    vcpu = other
                case "pause":
                    async with vm.paused():
                        await rig.memory.dirty_log_sync()
                        assert set(early) <= set(taken(ram.block))
                case "commit":
                    async with rig.memory.transaction():
                        ram.set_log(True, VGA)
                case "set":
                    vcpu.regs.rip = 0x1000
            if then != "close":
                await vcpu.run()
                assert set(early) | set(await written(rig, ram.block)) == set(range(self.PAGES))
            await rig.memory.dirty_log_sync()
            ram.block.take_dirty(MIGRATION)
            await write(rig, vcpu, *(ram.addr + page * PAGE for page in range(self.PAGES)))
            assert await written(rig, ram.block) == list(range(self.PAGES))
            assert vm.statistics().dirty_ring_overflows == 0

    async def test_b12_another_task_commits(self, rig: Rig) -> None:
        """Rings fill again and again while slots move; a copy ends equal, and nobody waits."""
        pages = 1200
        ram = MemoryRegion.ram("ram", pages * PAGE)
        rig.system.add_subregion(BASE * 4, ram)
        copy = bytearray(ram.size)
        async with rig.open(dirty_log=RING, dirty_ring_entries=1024) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            copy[:] = ram.block.view

            async def commit() -> None:
                while True:
                    for unmergeable in (True, False):
                        async with rig.memory.transaction():
                            ram.set_unmergeable(unmergeable)
                    await rig.memory.dirty_log_sync()
                    for offset, size in ram.block.take_dirty(MIGRATION):
                        copy[offset : offset + size] = ram.block.view[offset : offset + size]
                    await trio.sleep(0.002)

            with trio.fail_after(LONG_ENOUGH):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(commit)
                    for number in range(3):
                        for first in range(0, pages, 200):  # so many fit into a page of code
                            some = range(first, first + 200)
                            rig.load(
                                vcpu,
                                *(Write(BASE * 4 + page * PAGE, 1, number + 1) for page in some),
                                Halt(),
                            )
                            await vcpu.run()
                    nursery.cancel_scope.cancel()
        for offset, size in ram.block.take_dirty(MIGRATION):
            copy[offset : offset + size] = ram.block.view[offset : offset + size]
        assert copy == ram.block.view


@by_method
async def test_t8_registered_anew(method: DirtyLogMethod) -> None:
    """T8: a listener that missed the end of memory-wide logging logs no memory of later."""
    rig, ram = rig_with_ram(FakeKvm())
    async with rig.open(dirty_log=method) as vm:
        vcpu = await vm.create_vcpu()
        listener = next(each for each in rig.space.listeners if isinstance(each, KvmMemoryListener))
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, BASE)
        await rig.memory.unregister(listener)
        assert taken(ram.block) == [0]
        await rig.memory.dirty_log_stop()
        await rig.memory.register(listener, rig.space)
        assert not any(each.flags & kernel.MEM_LOG_DIRTY_PAGES for each in vm.memslots)
        await rig.memory.dirty_log_start()
        await write(rig, vcpu, BASE + PAGE)
        assert await written(rig, ram.block) == [1]


async def test_the_vm_closes_while_a_commit_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """B12: closing fetches; the commit that waited for vCPUs then asks nothing of what is gone."""
    rig, ram = rig_with_ram(FakeKvm())
    waiting, closed = trio.Event(), trio.Event()

    async def hold(listener: KvmMemoryListener) -> None:
        waiting.set()
        await closed.wait()

    async def change() -> None:
        async with rig.memory.transaction():
            ram.set_address(BASE + 1000 * PAGE)

    async with trio.open_nursery() as nursery:
        async with rig.open(KickPolicy.ON_OVERLAP, dirty_log=DirtyLogMethod.BITMAP) as vm:
            vcpu = await vm.create_vcpu()
            await rig.memory.dirty_log_start()
            await write(rig, vcpu, BASE + PAGE)
            monkeypatch.setattr(KvmMemoryListener, "_hold", hold)
            nursery.start_soon(change)
            await waiting.wait()
        closed.set()
    assert ram.addr == BASE + 1000 * PAGE
    assert rig.memory.broken is None
    assert taken(ram.block) == [1]
