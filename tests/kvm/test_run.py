"""What a vCPU's exits turn into: accesses dispatched, the others as values.

Most bodies run on both kernels; see `tests.kvm.rig`.
"""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
import trio
import trio.testing

from memlistener import MemoryRegion, MemoryRegionOps, MemTxAttrs, MemTxResult, dispatch
from memlistener.errors import KvmError, UnassignedAccessError
from memlistener.kvm import FailEntry, Hlt, InternalError, Shutdown, SystemEvent, open_vm, x86
from memlistener.testing import Exit, FakeKvm, Fetch, In, Instruction, Out, Read, Write
from tests.kvm.rig import LONG_ENOUGH, Rig

DEVICE = 0x10000000
VALUE = 0x8877665544332211
PORT = 0x100
SIZES = (1, 2, 4, 8)


def low(value: int, size: int) -> int:
    """The low bytes of a value."""
    return value & (1 << 8 * size) - 1


class Plain(MemoryRegionOps):
    """Answers reads with the low bytes of VALUE, and notes every access."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> Any:
        self.seen.append(("read", offset, size))
        self.threads.add(threading.get_ident())
        return low(VALUE, size)

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        self.seen.append(("write", offset, size, value))
        self.threads.add(threading.get_ident())
        return None


class ThreadSafe(Plain):
    """The same on the vCPU's thread."""

    thread_safe = True


class Async(Plain):
    """The same after going through trio."""

    async def read(self, offset: int, size: int, attrs: MemTxAttrs) -> Any:
        await trio.lowlevel.checkpoint()
        return super().read(offset, size, attrs)

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> Any:
        await trio.lowlevel.checkpoint()
        return super().write(offset, value, size, attrs)


@pytest.fixture(params=[Plain, Async, ThreadSafe])
def ops(request: pytest.FixtureRequest) -> Plain:
    made: Plain = request.param()
    return made


# ---- dispatch ---------------------------------------------------------------------------------


async def test_mmio(rig: Rig, ops: Plain) -> None:
    """MMIO of every size reaches the ops, where they want to run, and the answer the guest."""
    rig.system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, ops))
    accesses: list[Instruction] = []
    for size in SIZES:
        accesses += [Read(DEVICE + 8 * size, size), Write(DEVICE + 0x800, size, low(VALUE, size))]
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *accesses)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        statistics = vm.statistics()
    expected: list[tuple[Any, ...]] = []
    for size in SIZES:
        expected += [("read", 8 * size, size), ("write", 0x800, size, low(VALUE, size))]
    assert ops.seen == expected
    assert rig.results(vcpu) == [low(VALUE, size) for size in SIZES]
    on_trio = ops.threads == {threading.get_ident()}
    assert on_trio != ops.thread_safe
    assert statistics.vcpus[0].exits == {"Mmio": 8, "Hlt": 1}
    assert statistics.vcpus[0].served_on_thread == (8 if ops.thread_safe else 0)
    assert (statistics.unassigned, statistics.holes) == (0, 0)


async def test_pio(rig: Rig, ops: Plain) -> None:
    """PIO of every size reaches the ops, and the answer the guest."""
    rig.ports.add_subregion(PORT, MemoryRegion.io("dev", 0x10, ops))
    accesses: list[Instruction] = []
    for size in (1, 2, 4):
        accesses += [In(PORT + size, size), Out(PORT + 8, size, value=low(VALUE, size))]
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *accesses)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    expected: list[tuple[Any, ...]] = []
    for size in (1, 2, 4):
        expected += [("read", size, size), ("write", 8, size, low(VALUE, size))]
    assert ops.seen == expected
    assert rig.results(vcpu) == [low(VALUE, size) for size in (1, 2, 4)]
    assert (ops.threads == {threading.get_ident()}) != ops.thread_safe


@pytest.mark.parametrize("size", [1, 2, 4])
async def test_string_pio(rig: Rig, ops: Plain, size: int) -> None:
    """REP INS and REP OUTS are as many accesses of the port as they count, in order."""
    rig.ports.add_subregion(PORT, MemoryRegion.io("dev", 0x10, ops))
    data = int.from_bytes(bytes(range(5 * size)), "little")
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, In(PORT, size, 7), Out(PORT, size, count=5, value=data))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    words = [
        int.from_bytes(bytes(range(at, at + size)), "little") for at in range(0, 5 * size, size)
    ]
    assert ops.seen == [
        *[("read", 0, size)] * 7,
        *[("write", 0, size, word) for word in words],
    ]
    answer = low(VALUE, size).to_bytes(size, "little") * 7
    assert rig.results(vcpu) == [int.from_bytes(answer, "little")]


async def test_k5_unassigned(rig: Rig) -> None:
    """K5: reads of nothing give all ones, writes vanish, and each is counted."""
    accesses: list[Instruction] = [Read(DEVICE, size) for size in SIZES]
    accesses += [Write(DEVICE, size, 0) for size in SIZES]
    accesses += [In(PORT, 4), Out(PORT, 4, value=0)]
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *accesses)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        assert vm.statistics().unassigned == 10
        assert vm.statistics().vcpus[0].holes == 0
    assert rig.space.unassigned_accesses == 8
    assert rig.io.unassigned_accesses == 2
    assert rig.results(vcpu) == [low(-1, size) for size in (*SIZES, 4)]


@pytest.mark.parametrize("access", [Read(DEVICE, 4), Write(DEVICE, 4, 1), In(PORT, 1)])
async def test_k5_unassigned_raises(access: Instruction) -> None:
    """K5: an unassigned access can be made an error, which leaves run()."""
    rig = Rig(FakeKvm(), unassigned_raises=True)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, access)
        with pytest.raises(UnassignedAccessError, match="nothing is there"):
            await vcpu.run()
        assert not vcpu.running


async def test_no_io_space() -> None:
    """A VM without an address space for I/O reads all ones from every port."""
    rig = Rig(FakeKvm())
    async with open_vm(rig.space, backend=rig.fake) as vm:
        vcpu = await rig.boot(vm, In(PORT, 2, 3), Out(PORT, 1, value=0))
        assert await vcpu.run() == Hlt()
    assert rig.results(vcpu) == [(1 << 48) - 1]


@pytest.mark.parametrize(("offset", "slots"), [(0x800, 1), (0x400, 0)], ids=["cut", "crooked"])
async def test_k2_sub_page_ram(rig: Rig, offset: int, slots: int) -> None:
    """K2: RAM that is not whole pages, here or in the host, is served by exits, and right."""
    block = MemoryRegion.ram("block", 0x4000)
    window = MemoryRegion.alias("window", block, offset=offset, size=0x1800)
    seen = block.block.view[offset : offset + 0x1800]
    seen[0x400:0x408] = bytes(range(8))
    seen[0x1404:0x1408] = b"tail"
    rig.system.add_subregion(DEVICE + 0x800, window)  # half a page, and a whole one
    async with rig.open() as vm:
        vcpu = await rig.boot(
            vm,
            Read(DEVICE + 0xC00, 8),
            Write(DEVICE + 0xC10, 2, 0xBEEF),
            Read(DEVICE + 0xC10, 2),
            Read(DEVICE + 0x1C04, 4),
            Write(DEVICE + 0x1FF0, 4, 0x12345678),
        )
        assert [each.guest_phys_addr for each in vm.memslots] == [0, DEVICE + 0x1000][: 1 + slots]
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        assert vm.statistics().vcpus[0].exits == {"Mmio": 3 if slots else 5, "Hlt": 1}
        assert vm.statistics().unassigned == vm.statistics().holes == 0
    assert rig.results(vcpu) == [0x0706050403020100, 0xBEEF, int.from_bytes(b"tail", "little")]
    assert seen[0x410:0x412] == b"\xef\xbe"
    assert seen[0x17F0:0x17F4] == b"\x78\x56\x34\x12"


async def test_access_across_two_regions(rig: Rig, ops: Plain) -> None:
    """An access that crosses from RAM into a device on one page is made in both parts."""
    half = MemoryRegion.ram("half", 0x800)
    half.block.view[0x7FC:0x800] = b"\x01\x02\x03\x04"
    rig.system.add_subregion(DEVICE, half)
    rig.system.add_subregion(DEVICE + 0x800, MemoryRegion.io("dev", 0x800, ops))
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE + 0x7FC, 8))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
    assert ops.seen == [("read", 0, 4)]
    assert rig.results(vcpu) == [low(VALUE, 4) << 32 | 0x04030201]


async def test_k1_rom_write_vanishes(rig: Rig) -> None:
    """K1: a guest reads ROM through its slot; its write exits and changes nothing."""
    rom = MemoryRegion.rom("bios", 0x1000, data=b"\x11\x22\x33\x44")
    rig.system.add_subregion(DEVICE, rom)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Write(DEVICE, 4, 0xFFFFFFFF), Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
        assert vm.statistics().vcpus[0].exits == {"Mmio": 1, "Hlt": 1}
        assert vm.statistics().holes == 0
    assert rig.results(vcpu) == [0x44332211]


async def test_k1_rom_device(rig: Rig, ops: Plain) -> None:
    """K1: in ROMD mode reads come from memory and writes go to the ops; out of it, both do."""
    flash = MemoryRegion.rom_device("flash", 0x1000, ops, data=b"\x01\x02\x03\x04")
    rig.system.add_subregion(DEVICE, flash)
    program = (Read(DEVICE, 4), Write(DEVICE + 8, 1, 0x90), Read(DEVICE, 4))
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, *program)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Hlt()
            assert rig.results(vcpu) == [0x04030201] * 2
            assert ops.seen == [("write", 8, 1, 0x90)]
            async with rig.memory.transaction():
                flash.set_romd_mode(False)
            assert len(vm.memslots) == 1
            rig.load(vcpu, *program)
            assert await vcpu.run() == Hlt()
            assert rig.results(vcpu) == [low(VALUE, 4)] * 2
            assert ops.seen[1:] == [("read", 0, 4), ("write", 8, 1, 0x90), ("read", 0, 4)]
        assert vm.statistics().holes == 0


class Refusing(MemoryRegionOps):
    """Refuses everything."""

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> MemTxResult:
        return MemTxResult.ERROR

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> MemTxResult:
        return MemTxResult.ERROR


async def test_refusal_is_data(rig: Rig) -> None:
    """A device that refuses does not stop the guest, which reads all ones."""
    rig.system.add_subregion(DEVICE, MemoryRegion.io("dev", 0x1000, Refusing()))
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4), Write(DEVICE, 4, 0))
        assert await vcpu.run() == Hlt()
        assert vm.statistics().unassigned == 0
    assert rig.results(vcpu) == [0xFFFFFFFF]


# ---- other exits ---------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_real_shutdown() -> None:
    """A triple fault is a Shutdown."""
    rig = Rig(None)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        vcpu.write_guest_memory(0x1000, b"\x0f\x0b")  # ud2, and no IDT
        x86.protected_mode(vcpu, 0x1000)
        with trio.fail_after(LONG_ENOUGH):
            assert await vcpu.run() == Shutdown()


@pytest.mark.kvm
async def test_real_internal_error() -> None:
    """Code fetched from where no memory is cannot be emulated: KVM says what it can."""
    rig = Rig(None)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        x86.protected_mode(vcpu, DEVICE)
        with trio.fail_after(LONG_ENOUGH):
            reason = await vcpu.run()
        assert isinstance(reason, InternalError)
        assert reason.name == "EMULATION"
        assert vm.statistics().vcpus[0].exits == {"InternalError": 1}


async def test_fake_internal_error() -> None:
    """The same on the fake; when memory has come, the next run goes on."""
    rig = Rig(FakeKvm())
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        rig.fake_vcpu(vcpu).load([Fetch(DEVICE, 4)])
        assert await vcpu.run() == InternalError(1)
        async with rig.memory.transaction():
            rig.system.add_subregion(DEVICE, MemoryRegion.ram("code", 0x1000))
        assert await vcpu.run() == Hlt()


@pytest.mark.parametrize(
    "value", [FailEntry(0x80000021, 1), Shutdown(), SystemEvent(2, (1, 2)), InternalError(3, (7,))]
)
async def test_exits_are_values(value: Any) -> None:
    """What ends a run is returned with the detail that the kernel gave, and counted."""
    rig = Rig(FakeKvm())
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        rig.fake_vcpu(vcpu).load([Exit(value)])
        assert await vcpu.run() == value
        assert await vcpu.run() == Hlt()
        assert vm.statistics().vcpus[0].exits == {type(value).__name__: 1, "Hlt": 1}


async def test_kvm_run_fails() -> None:
    """An error of KVM_RUN itself raises, with the vCPU's name; the vCPU can be run again."""
    fake = FakeKvm()
    rig = Rig(fake)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        fake.fail("KVM_RUN", errno=errno.EFAULT)
        with pytest.raises(KvmError, match="KVM_RUN of vcpu 0") as caught:
            await vcpu.run()
        assert caught.value.errno == errno.EFAULT
        assert await vcpu.run() == Hlt()


async def test_kvm_run_interrupted() -> None:
    """EINTR only means: again."""
    fake = FakeKvm()
    rig = Rig(fake)
    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        fake.fail("KVM_RUN", errno=errno.EINTR)
        assert await vcpu.run() == Hlt()
        assert vm.statistics().vcpus[0].kicked == 1


async def test_script_assertion_comes_out() -> None:
    """What a guest's script raises comes out of run()."""
    rig = Rig(FakeKvm())

    def script() -> Any:
        assert (yield Read(0x2000, 1)) == 1, "the guest is not content"

    async with rig.open() as vm:
        vcpu = await vm.create_vcpu()
        rig.fake_vcpu(vcpu).load(script())
        with pytest.raises(AssertionError, match="not content"):
            await vcpu.run()


async def test_map_changes_between_choice_and_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An access is served where the view in which it was looked up says, though another comes."""
    safe, slow = ThreadSafe(), Async()
    rig = Rig(FakeKvm())
    first = MemoryRegion.io("first", 0x1000, safe)
    second = MemoryRegion.io("second", 0x1000, slow)
    rig.system.add_subregion_overlap(DEVICE, first, 2)
    rig.system.add_subregion_overlap(DEVICE, second, 1)
    chosen, changed = threading.Event(), threading.Event()
    on_thread = dispatch.on_thread

    def choose(*args: Any) -> bool:
        answer = on_thread(*args)
        chosen.set()
        assert changed.wait(LONG_ENOUGH)
        return answer

    monkeypatch.setattr(dispatch, "on_thread", choose)
    monkeypatch.setattr(dispatch, "read_here", lambda *args: None)  # which would be quicker
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(DEVICE, 4))
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await trio.to_thread.run_sync(chosen.wait, LONG_ENOUGH)
                async with rig.memory.transaction():
                    first.set_enabled(False)
                changed.set()
    assert rig.results(vcpu) == [low(VALUE, 4)]
    assert threading.get_ident() not in safe.threads
    assert slow.threads <= {threading.get_ident()}
