"""K6, T6, T9: ioeventfds and coalesced ranges on the bus of both kernels."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    BrokenMemoryError,
    EventFd,
    KvmError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemorySystem,
    MemTxAttrs,
)
from memlistener.kvm import Hlt, KickPolicy, backend, open_vm
from memlistener.testing import FakeKvm, Instruction, Out, Write
from tests.kvm.rig import LONG_ENOUGH, Rig

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds are Linux's")

DEVICE = 0x10000000
PORT = 0x100


class Device(MemoryRegionOps):
    """Notes what it is written."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.seen.append((offset, size, value))
        return None


@pytest.fixture
def bells() -> Iterator[list[EventFd]]:
    """Four eventfds."""
    found = [EventFd() for _ in range(4)]
    yield found
    for each in found:
        each.close()


def count(eventfd: EventFd) -> int:
    """How often it was signalled since the last time."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(eventfd.fileno())
    return 0


def wire(rig: Rig, region: MemoryRegion, *, pio: bool) -> int:
    """Put a region where the guest sees it: its address, or port."""
    if pio:
        rig.ports.add_subregion(PORT, region)
        return PORT
    rig.system.add_subregion(DEVICE, region)
    return DEVICE


def store(base: int, offset: int, size: int, value: int) -> Instruction:
    """What writes there."""
    if base == PORT:
        return Out(base + offset, size, value=value)
    return Write(base + offset, size, value)


class FailsOnce(MemoryListener):
    """Its next commit raises, when all others have done their work."""

    priority = 100

    def __init__(self) -> None:
        self.armed = False

    def commit(self) -> None:
        if self.armed:
            self.armed = False
            raise ZeroDivisionError


# ---- guests ------------------------------------------------------------------------------


@pytest.mark.parametrize("pio", [False, True], ids=["mmio", "pio"])
async def test_k6_a_write_signals_without_an_exit(
    rig: Rig, bells: list[EventFd], pio: bool
) -> None:
    """K6: with and without a value, and of any width; what is not for one goes to the ops."""
    ops = Device()
    region = MemoryRegion.io("device", 0x40, ops)
    base = wire(rig, region, pio=pio)
    region.add_eventfd(0, 2, bells[0])
    region.add_eventfd(4, 4, bells[1], data=0x12345678)
    region.add_eventfd(8, 0, bells[2])
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm,
            store(base, 0, 2, 1),
            store(base, 0, 2, 2),
            store(base, 0, 4, 3),
            store(base, 4, 4, 0x12345678),
            store(base, 4, 4, 0x78563412),
            store(base, 4, 2, 0x5678),
            store(base, 8, 1, 5),
            store(base, 8, 4, 6),
        )
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells] == [2, 1, 2, 0]
        assert ops.seen == [(0, 4, 3), (4, 4, 0x78563412), (4, 2, 0x5678)]
        assert vcpu.statistics().exits == {"Io" if pio else "Mmio": 3, "Hlt": 1}


async def test_k6_a_value_of_a_big_endian_device(rig: Rig, bells: list[EventFd]) -> None:
    """K6: the value to match is the one that ops would see, in their byte order."""
    ops = Device()
    ops.endianness = "big"
    region = MemoryRegion.io("device", 0x40, ops)
    region.add_eventfd(0, 4, bells[0], data=0x11223344)
    wire(rig, region, pio=False)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 0x11223344), Write(DEVICE, 4, 0x44332211))
        assert await vcpu.run() == Hlt()
        assert count(bells[0]) == 1
        assert ops.seen == [(0, 4, 0x44332211)]


async def test_k6_awaited_in_trio_while_the_guest_runs(rig: Rig, bells: list[EventFd]) -> None:
    """K6: a task is woken by a guest that never stops for it."""
    region = MemoryRegion.io("device", 0x40, None)
    region.add_eventfd(0, 4, bells[0])
    wire(rig, region, pio=False)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            with trio.fail_after(LONG_ENOUGH):
                for _ in range(5):
                    assert await bells[0].wait() >= 1
            nursery.cancel_scope.cancel()
        assert vcpu.statistics().exits == {}


@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])
async def test_t9_an_eventfd_follows_its_region(
    rig: Rig, bells: list[EventFd], policy: KickPolicy
) -> None:
    """T9: moved, disabled, removed and put back while the guest writes to both places."""
    region = MemoryRegion.io("device", 0x40, Device())
    region.add_eventfd(0, 4, bells[0], data=1)
    region.add_eventfd(0, 4, bells[1], data=2)
    wire(rig, region, pio=False)

    async def signalled() -> tuple[bool, bool]:
        await rig.wait_rounds(vcpu, 2)
        for each in bells:
            count(each)
        await rig.wait_rounds(vcpu, 2)
        return count(bells[0]) > 0, count(bells[1]) > 0

    async with rig.open(policy) as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1), Write(DEVICE + 0x1000, 4, 2), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            assert await signalled() == (True, False)
            async with rig.memory.transaction():
                region.set_address(DEVICE + 0x1000)
            assert await signalled() == (False, True)
            async with rig.memory.transaction():
                region.set_enabled(False)
            assert await signalled() == (False, False)
            async with rig.memory.transaction():
                region.set_enabled(True)
            assert await signalled() == (False, True)
            async with rig.memory.transaction():
                rig.system.del_subregion(region)
            assert await signalled() == (False, False)
            async with rig.memory.transaction():
                rig.system.add_subregion(DEVICE, region)
            assert await signalled() == (True, False)
            async with rig.memory.transaction():
                region.del_eventfd(0, 4, bells[0], data=1)
                region.add_eventfd(0, 4, bells[1], data=1)
            assert await signalled() == (False, True)
            nursery.cancel_scope.cancel()


async def test_t9_one_that_clashes_with_one_that_goes(rig: Rig, bells: list[EventFd]) -> None:
    """T9: its order puts the one for any value first; the kernel has never both, and no exit."""
    region = MemoryRegion.io("device", 0x40, Device())
    region.add_eventfd(0, 4, bells[0], data=5)
    region.add_eventfd(0, 4, bells[0], data=6)
    wire(rig, region, pio=False)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 5))
        async with rig.memory.transaction():
            region.del_eventfd(0, 4, bells[0], data=5)
            region.del_eventfd(0, 4, bells[0], data=6)
            region.add_eventfd(0, 4, bells[1])
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:2]] == [0, 1]
        async with rig.memory.transaction():
            region.del_eventfd(0, 4, bells[1])
            region.add_eventfd(0, 4, bells[2], data=5)
        rig.load(vcpu, Write(DEVICE, 4, 5))
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:3]] == [0, 0, 1]
        assert vcpu.statistics().exits == {"Hlt": 2}


async def test_t9_one_in_place_of_another_regions(rig: Rig, bells: list[EventFd]) -> None:
    """T9, T13: two devices change places, and change back when the transaction fails."""
    old, new = (MemoryRegion.io(name, 0x40, Device()) for name in ("old", "new"))
    old.add_eventfd(0, 4, bells[0], data=5)
    new.add_eventfd(0, 4, bells[1])
    wire(rig, old, pio=False)

    async def swap() -> None:
        async with rig.memory.transaction():
            rig.system.del_subregion(old)
            rig.system.add_subregion(DEVICE, new)

    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 5))
        last = FailsOnce()
        await rig.memory.register(last, rig.space)
        last.armed = True
        with pytest.raises(ZeroDivisionError):
            await swap()
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:2]] == [1, 0]
        await swap()
        rig.load(vcpu, Write(DEVICE, 4, 5))
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:2]] == [0, 1]
        assert vcpu.statistics().exits == {"Hlt": 2}


async def test_t9_the_same_one_on_two_devices(rig: Rig, bells: list[EventFd]) -> None:
    """T9: one shows in place of the other and nobody hears of it; then it goes all the same."""
    one, other = (MemoryRegion.io(name, 0x40, Device()) for name in ("one", "other"))
    one.add_eventfd(0, 4, bells[0])
    other.add_eventfd(0, 4, bells[0])
    wire(rig, one, pio=False)
    rig.system.add_subregion_overlap(DEVICE, other, -1)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 5))
        async with rig.memory.transaction():
            rig.system.del_subregion(one)
        assert await vcpu.run() == Hlt()
        assert (count(bells[0]), vcpu.statistics().exits) == (1, {"Hlt": 1})
        async with rig.memory.transaction():
            rig.system.del_subregion(other)
        rig.load(vcpu, Write(DEVICE, 4, 5))
        assert await vcpu.run() == Hlt()
        assert (count(bells[0]), vcpu.statistics().exits) == (0, {"Mmio": 1, "Hlt": 2})


async def test_k6_two_machines_on_one_address_space(rig: Rig, bells: list[EventFd]) -> None:
    """K6: each VM has the ioeventfd on its own bus; one that closes leaves the other's."""
    region = MemoryRegion.io("device", 0x40, Device())
    wire(rig, region, pio=False)
    async with rig.open() as one:
        first = await rig.boot(one, Write(DEVICE, 4, 1))
        async with rig.memory.transaction():
            region.add_eventfd(0, 4, bells[0])
        async with rig.open() as two:
            second = await rig.boot(two, Write(DEVICE, 4, 1))
            assert await second.run() == Hlt()
            assert second.statistics().exits == {"Hlt": 1}
            assert count(bells[0]) == 1
        assert await first.run() == Hlt()
        assert first.statistics().exits == {"Hlt": 1}
        assert count(bells[0]) == 1


async def test_k6_the_owner_may_close_first(rig: Rig) -> None:
    """K6: what is taken back is found though its descriptor is closed, and the number reused."""
    region = MemoryRegion.io("device", 0x40, Device())
    wire(rig, region, pio=False)
    eventfd = EventFd()
    region.add_eventfd(0, 4, eventfd)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1))
        eventfd.close()
        with EventFd() as other:
            async with rig.memory.transaction():
                region.del_eventfd(0, 4, eventfd)
                region.add_eventfd(0, 4, other)
            assert await vcpu.run() == Hlt()
            assert count(other) == 1


# ---- refusals, and T13 -------------------------------------------------------------------


async def _refused(rig: Rig, what: str, **eventfd: Any) -> KvmError:
    region = MemoryRegion.io("device", 0x40, Device())
    wire(rig, region, pio=False)
    async with rig.open():

        async def add() -> None:
            async with rig.memory.transaction():
                region.add_eventfd(**eventfd)

        with pytest.raises(KvmError, match=what) as caught:
            await add()
        assert region.eventfds == ()
        assert rig.memory.broken is None
    return caught.value


async def test_t13_what_is_no_eventfd(rig: Rig) -> None:
    """T13: the kernel takes eventfds only; the error names the section, the ioctl, the mend."""
    ends = os.pipe()
    try:
        error = await _refused(
            rig,
            r"KVM_IOEVENTFD: ioeventfd \d+ at <.*\[0x10000000, 0x10000004\).*>: .*an eventfd",
            offset=0,
            size=4,
            eventfd=ends[0],
        )
        assert error.errno == errno.EINVAL
    finally:
        for each in ends:
            os.close(each)


async def test_t13_no_open_descriptor(rig: Rig) -> None:
    """T13: neither a number that is not open nor a closed object."""
    error = await _refused(rig, "no open file descriptor", offset=0, size=4, eventfd=1 << 20)
    assert error.errno == errno.EBADF
    closed = EventFd()
    closed.close()
    rig = Rig(rig.fake)
    await _refused(rig, "<EventFd closed> at .*is closed", offset=0, size=4, eventfd=closed)


async def test_t13_what_no_kernel_can(rig: Rig, bells: list[EventFd]) -> None:
    """T13: a value without a width is refused, and what to do is said."""
    error = await _refused(
        rig, "one width only; give it a size", offset=0, size=0, eventfd=bells[0], data=1
    )
    assert error.errno == errno.EINVAL


async def test_t13_two_for_one_write(rig: Rig, bells: list[EventFd]) -> None:
    """T13: two of a region that one write could signal; the error names both."""
    region = MemoryRegion.io("device", 0x40, Device())
    region.add_eventfd(0, 4, bells[0], data=5)
    wire(rig, region, pio=False)
    async with rig.open() as vm:

        async def add() -> None:
            async with rig.memory.transaction():
                region.add_eventfd(0, 4, bells[1])

        with pytest.raises(KvmError, match=r"EventFd.*\[0x.*EventFd.*, value 0x5: one write"):
            await add()
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 5), Write(DEVICE, 4, 6))
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:2]] == [1, 0]
        assert vcpu.statistics().exits == {"Mmio": 1, "Hlt": 1}


@pytest.mark.parametrize(
    ("cap", "exits"),
    [(backend.CAP_IOEVENTFD, 2), (backend.CAP_IOEVENTFD_NO_LENGTH, 1)],
)
async def test_k6_what_a_kernel_lacks_exits(bells: list[EventFd], cap: int, exits: int) -> None:
    """K6: on a kernel without, the guest stops for the write and the eventfd is signalled."""
    rig = Rig(FakeKvm(capabilities={cap: 0}))
    region = MemoryRegion.io("device", 0x40, Device())
    region.add_eventfd(0, 4, bells[0])
    region.add_eventfd(8, 0, bells[1])
    wire(rig, region, pio=False)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 1), Write(DEVICE + 8, 4, 1))
        assert await vcpu.run() == Hlt()
        assert [count(each) for each in bells[:2]] == [1, 1]
        assert vcpu.statistics().exits == {"Mmio": exits, "Hlt": 1}
        async with rig.memory.transaction():
            region.del_eventfd(0, 4, bells[0])
            region.del_eventfd(8, 0, bells[1])


@pytest.mark.parametrize("cap", [backend.CAP_COALESCED_MMIO, backend.CAP_COALESCED_PIO])
async def test_k6_coalescing_that_a_kernel_lacks(cap: int) -> None:
    """K6: without it, each write exits."""
    pio = cap == backend.CAP_COALESCED_PIO
    rig = Rig(FakeKvm(capabilities={cap: 0}))
    ops = Device()
    region = MemoryRegion.io("device", 0x40, ops)
    region.add_coalescing(0, 0x40)
    base = wire(rig, region, pio=pio)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, store(base, 0, 4, 1))
        assert await vcpu.run() == Hlt()
        assert vcpu.statistics().exits == {"Io" if pio else "Mmio": 1, "Hlt": 1}
        async with rig.memory.transaction():
            region.clear_coalescing()
    assert ops.seen == [(0, 4, 1)]


async def test_closing_lets_go_of_everything(rig: Rig, bells: list[EventFd]) -> None:
    """The VM's descriptors of eventfds go with it, and it hears of no transaction any more."""
    region = MemoryRegion.io("device", 0x40, Device())
    region.add_eventfd(0, 4, bells[0])
    region.add_coalescing(8, 8)
    wire(rig, region, pio=False)
    async with rig.open():
        pass
    before = len(os.listdir("/proc/self/fd"))
    async with rig.open() as vm:
        await vm.create_vcpu()
        inside = len(os.listdir("/proc/self/fd"))
        assert inside > before
        async with rig.memory.transaction():
            region.add_eventfd(0x20, 4, bells[1])
        async with rig.memory.transaction():
            region.del_eventfd(0x20, 4, bells[1])
        assert len(os.listdir("/proc/self/fd")) == inside
    assert len(os.listdir("/proc/self/fd")) == before
    assert rig.space.listeners == ()
    async with rig.memory.transaction():
        region.del_eventfd(0, 4, bells[0])
        region.clear_coalescing()


# ---- random sequences, with failures -------------------------------------------------------


@attrs.frozen
class Step:
    """One change of one of three devices."""

    what: str
    device: int
    number: int
    size: int
    data: int | None


steps = st.builds(
    Step,
    st.sampled_from(["eventfd", "eventfd", "unfd", "move", "enable", "coalesce", "clear"]),
    st.integers(0, 2),
    st.integers(0, 3),
    st.sampled_from([0, 2, 4, 4]),
    st.sampled_from([None, 1, 2]),
)
transactions = st.lists(
    st.tuples(
        st.lists(steps, min_size=1, max_size=6),
        st.none()
        | st.tuples(
            st.sampled_from(
                [
                    "KVM_IOEVENTFD",
                    "KVM_IOEVENTFD",
                    "KVM_REGISTER_COALESCED_MMIO",
                    "KVM_UNREGISTER_COALESCED_MMIO",
                ]
            ),
            st.integers(1, 4),
        ),
    ),
    max_size=8,
)


class Bus:
    """Three devices that may cover each other, and what the bus is to look like."""

    def __init__(self) -> None:
        self.memory = MemorySystem()
        self.root = MemoryRegion.container("root", 1 << 32)
        self.regions = [MemoryRegion.io(f"device {n}", 0x100, Device()) for n in range(3)]
        for number, each in enumerate(self.regions):
            self.root.add_subregion_overlap(number * 0x80, each, number)
        self.space = self.memory.create_address_space("memory", self.root)
        self.eventfds = [EventFd() for _ in range(4)]

    def apply(self, step: Step) -> None:
        region = self.regions[step.device]
        offset = step.number * 0x20
        match step.what:
            case "eventfd":
                data = step.data if step.size else None
                key = (offset, step.size, data is not None, data or 0)
                if key not in {each.order() for each in region.eventfds}:
                    region.add_eventfd(offset, step.size, self.eventfds[step.number], data=data)
            case "unfd" if region.eventfds:
                fd = region.eventfds[step.number % len(region.eventfds)]
                region.del_eventfd(fd.addr, fd.size, fd.eventfd, data=fd.data)
            case "move":
                region.set_address(step.number * 0x60)
            case "enable":
                region.set_enabled(not region.enabled)
            case "coalesce":
                region.add_coalescing(offset, min(0x10 << step.size, 0x100 - offset))
            case "clear":
                region.clear_coalescing()

    def clash(self) -> bool:
        """Whether some write would be for two of what shows."""
        shown = list(self.wanted())
        return any(
            one is not other and one[0] == other[0] and _ambiguous(one[1:], other[1:])
            for one in shown
            for other in shown
        )

    def wanted(self) -> set[tuple[int, int, int | None]]:
        """The ioeventfds that show."""
        found = set()
        for each in self.space.view:
            for fd in each.region.eventfds:
                addr = fd.addr - each.offset + each.start
                if addr < each.end and addr + max(fd.size, 1) > each.start:
                    found.add((addr, fd.size, fd.data))
        return found

    def zones(self) -> set[tuple[int, int]]:
        """The coalesced ranges that show."""
        found = set()
        for each in self.space.view:
            for offset, size in each.region.coalesced:
                low = max(offset - each.offset + each.start, each.start)
                high = min(offset - each.offset + each.start + size, each.end)
                if low < high:
                    found.add((low, high - low))
        return found

    def close(self) -> None:
        for each in self.eventfds:
            each.close()


def _ambiguous(one: tuple[int, int | None], other: tuple[int, int | None]) -> bool:
    if 0 in (one[0], other[0]):
        return True
    return one[0] == other[0] and (None in (one[1], other[1]) or one[1] == other[1])


@given(transactions)
def test_k6_t13_the_bus_follows_the_view(plan: list[tuple[list[Step], Any]]) -> None:
    """K6, T13: after each transaction the kernel has what shows; after a failure, what showed."""
    bus = Bus()

    async def main() -> None:
        fake = FakeKvm()
        async with open_vm(bus.space, backend=fake):
            vm = fake.vms[0]

            def there() -> tuple[set[tuple[int, int, int | None]], set[tuple[int, int]]]:
                return (
                    {(each.addr, each.size, each.datamatch) for each in vm.ioeventfds},
                    {(each.addr, each.size) for each in vm.coalesced_zones},
                )

            async def transact(changes: list[Step]) -> None:
                async with bus.memory.transaction():
                    for each in changes:
                        bus.apply(each)

            for changes, failure in plan:
                before = there()
                if failure is not None and not fake.pending_failures():
                    fake.fail(failure[0], nth=failure[1], errno=errno.ENOMEM)
                pending = fake.pending_failures()
                refusal = 0
                try:
                    await transact(changes)
                except KvmError as error:
                    refusal = error.errno or -1
                except BrokenMemoryError:
                    # A clash, and the failure came while it was being undone.
                    assert fake.pending_failures() < pending
                    return
                failed = fake.pending_failures() < pending
                if refusal:
                    assert refusal == (errno.ENOMEM if failed else errno.EEXIST)
                    assert bus.memory.broken is None
                    assert there() == before
                else:
                    assert not failed
                    assert not bus.clash()
                    assert there() == (bus.wanted(), bus.zones())

    try:
        trio.run(main)
    finally:
        bus.close()
