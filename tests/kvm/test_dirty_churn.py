"""B12 at random: two VMs on two spaces over one block, and every dirty ioctl may fail."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Callable, Iterator
from random import Random

import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    BrokenMemoryError,
    DirtyClient,
    FlatRange,
    KvmError,
    MemoryRegion,
    MemorySystem,
)
from memlistener.kvm import DirtyLogMethod, KickPolicy, Vcpu, open_vm
from memlistener.testing import FakeKvm, Halt, Write
from tests.kvm.rig import PAGE

PAGES = 12
REACH = 80  # pages of guest addresses that are written to
IOCTLS = (
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_GET_DIRTY_LOG",
    "KVM_CLEAR_DIRTY_LOG",
    "KVM_RESET_DIRTY_RINGS",
)
POLICIES = (KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP)


class Computer:
    """One of the two: an address space, and now and then a VM."""

    def __init__(self, space: AddressSpace, chance: Random) -> None:
        self.space = space
        self.fake = FakeKvm(log_limit=0, dirty_rings_overflow=chance.random() < 0.3)
        self._chance = chance
        self._stack = contextlib.AsyncExitStack()
        self._vcpu: Vcpu | None = None

    async def toggle(self) -> None:
        """Switch it on, or off."""
        if self._vcpu is not None:
            self._vcpu = None
            await self._stack.aclose()
            return
        vm = await self._stack.enter_async_context(
            open_vm(
                self.space,
                backend=self.fake,
                dirty_log=self._chance.choice(list(DirtyLogMethod)),
                policy=self._chance.choice(POLICIES),
                dirty_ring_entries=1024,
            )
        )
        self._vcpu = await vm.create_vcpu()

    async def close(self) -> None:
        """Switch it off for good."""
        self._vcpu = None
        await self._stack.aclose()

    async def write(self, page: int) -> FlatRange | None:
        """The guest writes a page, or where there is none a device; where that went."""
        each = self.space.view.lookup(page * PAGE)
        if self._vcpu is None:
            await self.space.write(page * PAGE, b"\7")
        else:
            self.fake.vms[-1].vcpus[-1].load([Write(page * PAGE, 1, 7), Halt()])
            await self._vcpu.run()
        return None if each is None or each.readonly else each


class World:
    """Two regions on one block, three windows onto them, a space, and one that shows a part."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.memory = MemorySystem()
        self.ram = MemoryRegion.ram("ram", PAGES * PAGE)
        self.block = self.ram.block
        self.twin = MemoryRegion.ram("twin", PAGES * PAGE, block=self.block)
        self.windows = [
            MemoryRegion.alias(f"window {number}", target, offset=0, size=4 * PAGE)
            for number, target in enumerate((self.ram, self.twin, self.ram))
        ]
        root = MemoryRegion.container("root", 1 << 32)
        root.add_subregion(0, self.ram)
        root.add_subregion(60 * PAGE, self.twin)
        for number, each in enumerate(self.windows):
            root.add_subregion_overlap((20 + 8 * number) * PAGE, each, 1)
        self.part = MemoryRegion.alias(
            "part", root, offset=chance.choice((0, 2 * PAGE)), size=90 * PAGE
        )
        other = MemoryRegion.container("other", 1 << 32)
        other.add_subregion(0, self.part)
        self.computers = [
            Computer(self.memory.create_address_space(each.name, each), chance)
            for each in (root, other)
        ]
        self.wrote: dict[DirtyClient, set[int]] = {each: set() for each in DirtyClient}
        self.exact = True  # nothing has failed so far, and no ring has overflown
        self._everything = False

    async def step(self) -> None:
        """Something happens."""
        chance = self.chance
        match chance.choice("wwwwwwtttscccccclaffoor"):
            case "w":
                each = await chance.choice(self.computers).write(page := chance.randrange(REACH))
                if each is not None:
                    for client in DirtyClient:
                        if each.dirty_log_mask >> client & 1:
                            offset = each.offset + page * PAGE - each.start
                            self.wrote[client].add(offset // PAGE)
            case "t":
                first = chance.randrange(PAGES)
                await self.take(first, chance.randrange(first, PAGES) + 1)
            case "s":
                await self.memory.dirty_log_sync(chance.choice((None, self.ram, self.twin)))
            case "c":
                async with self.memory.transaction():
                    for _ in range(chance.randrange(1, 4)):
                        self._change()
                    if chance.random() < 0.1:
                        raise KvmError(errno.EIO, "the body fails")
            case "l":
                async with self.memory.transaction():
                    self._log()
            case "a":
                await (
                    self.memory.dirty_log_stop()
                    if self._everything
                    else self.memory.dirty_log_start()
                )
                self._everything = not self._everything
            case "f":
                self.exact = False
                chance.choice(self.computers).fake.fail(
                    chance.choice(IOCTLS), nth=chance.choice((1, 1, 2, 3)), errno=errno.ENOMEM
                )
            case "o":
                await chance.choice(self.computers).toggle()
            case "r":
                await self.memory.dirty_log_clear(self.ram, chance.randrange(PAGES) * PAGE, PAGE)

    def _change(self) -> None:
        chance = self.chance
        each = chance.choice((*self.windows, self.ram, self.twin, self.part))
        match chance.choice("aAoserul"):
            case "a":
                each.set_address(chance.randrange(4 if each is self.part else 70) * PAGE)
            case "A":
                each.set_address(each.addr + PAGE)
            case "o" if each in self.windows:
                each.set_alias_offset(chance.randrange(8) * PAGE)
            case "s":
                each.set_size(chance.randrange(1, 1 + (80 if each is self.part else PAGES)) * PAGE)
            case "e":
                each.set_enabled(chance.random() < 0.7)
            case "r" if each in self.windows:
                each.set_readonly(chance.random() < 0.3)
            case "u":
                each.set_unmergeable(chance.random() < 0.5)
            case "l":
                self._log()

    def _log(self) -> None:
        client = self.chance.choice((DirtyClient.VGA, DirtyClient.CODE))
        self.chance.choice((self.ram, self.twin)).set_log(self.chance.random() < 0.6, client)

    async def take(self, first: int = 0, end: int = PAGES) -> None:
        """Each client takes a range: it has all that was written there, and no more."""
        await self.memory.dirty_log_sync()
        for client in DirtyClient:
            found = set(self._taken(client, first, end))
            wrote = {page for page in self.wrote[client] if first <= page < end}
            assert found >= wrote
            assert found == wrote or not self.exact
            self.wrote[client] -= found

    def _taken(self, client: DirtyClient, first: int, end: int) -> Iterator[int]:
        for offset, size in self.block.take_dirty(client, first * PAGE, (end - first) * PAGE):
            yield from range(offset // PAGE, (offset + size) // PAGE)

    def stop_failing(self) -> None:
        """What was to fail and has not yet does not."""
        for each in self.computers:
            vm = each.fake.create_vm()
            asked: list[Callable[[], object]] = [
                functools.partial(vm.set_user_memory_region, 0, 0, 1, 0, 0),
                functools.partial(vm.get_dirty_log, 0, 1),
                functools.partial(vm.clear_dirty_log, 0, 0, 0, b""),
                vm.reset_dirty_rings,
            ]
            while each.fake.pending_failures():
                for ask in asked:  # and none of it is answered
                    with contextlib.suppress(KvmError):
                        ask()


@given(st.randoms(use_true_random=False))
def test_b12_two_vms_and_one_block(chance: Random) -> None:
    """B12: whatever happens, each client gets what was written while it logged."""
    trio.run(_play, chance)


async def _play(chance: Random) -> None:
    world = World(chance)
    async with contextlib.AsyncExitStack() as stack:
        for each in world.computers:
            stack.push_async_callback(each.close)
            await each.toggle()
        for _ in range(chance.choice((10, 40, 80))):
            try:
                await world.step()
            except BrokenMemoryError:
                world.stop_failing()
                return  # a second failure while the first was undone
            except KvmError:
                pass
            except ExceptionGroup as group:  # of a VM whose vCPUs were closed
                if group.split(KvmError)[1] is not None:
                    raise
        world.stop_failing()
        await world.take()
        for _ in range(3):  # rings find their places again
            world.wrote = {each: set() for each in DirtyClient}
            await world.take()
        world.exact = True
        await world.take()
