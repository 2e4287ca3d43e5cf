"""B15: the kernel's kick, by itself over a kernel that waits when it is told to, and in a VM."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio

from memlistener import MemoryRegion, MemoryRegionOps
from memlistener.bracket import Gate
from memlistener.errors import KvmError
from memlistener.kvm import kick
from memlistener.kvm.kick import KickIoctls
from memlistener.testing import Deaf, FakeKvm, Instruction, Read, Spin
from tests.kvm.rig import LONG_ENOUGH, SLOT_IOCTL, Rig, until

KICK = "KVM_KICK_ALL_RUNNING_VCPUS"
RESUME = "KVM_RESUME_ALL_KICKED_VCPUS"
WINDOW = 0x20000000


def kick_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "kick ioctls"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for each in kick_threads():
        each.join(LONG_ENOUGH)
    assert kick_threads() == []


# ---- alone -------------------------------------------------------------------------------------


class Kernel:
    """The two ioctls, each of whose steps a test can put off.

    Attributes:
        calls: What was asked for, in order.
    """

    def __init__(self) -> None:
        self._flag = False
        self._closed = False
        self.calls: list[str] = []
        self.errors: dict[str, list[int]] = {"kick": [], "resume": []}
        self.may_flag, self.flagged, self.may_return = (threading.Event() for _ in range(3))
        self.may_flag.set()
        self.may_return.set()
        self.on_resume: Callable[[], object] = lambda: None
        self.changed = threading.Condition()

    def flag(self) -> bool:
        """Whether KVM_RUN would return EINTR now."""
        return self._flag

    def closed(self) -> bool:
        """Whether the handle is closed now."""
        return self._closed

    def kick_all_running_vcpus(self) -> None:
        self._ask("kick")
        assert self.may_flag.wait(LONG_ENOUGH)
        self._flag = True
        self.flagged.set()
        self._fail("kick")
        assert self.may_return.wait(LONG_ENOUGH)

    def resume_all_kicked_vcpus(self) -> None:
        self._ask("resume")
        self._fail("resume")
        self._flag = False
        self.on_resume()

    def close(self) -> None:
        self._closed = True

    def wait_for(self, *calls: str) -> None:
        """Wait until exactly these calls were made, in this order."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.calls) >= len(calls), LONG_ENOUGH)
        assert self.calls == list(calls)

    def _ask(self, name: str) -> None:
        assert not self._closed
        with self.changed:
            self.calls.append(name)
            self.changed.notify_all()

    def _fail(self, name: str) -> None:
        if self.errors[name]:
            raise KvmError(self.errors[name].pop(0), f"{name} fails")


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
async def ioctls(kernel: Kernel) -> AsyncIterator[KickIoctls]:
    """The kick of a kernel that has one; its thread is gone afterwards."""
    made = KickIoctls.probe(kernel)  # type: ignore[arg-type]
    assert made is not None
    kernel.wait_for("resume")
    kernel.calls.clear()
    yield made
    kernel.may_flag.set()
    kernel.may_return.set()
    await made.aclose()


def finish(ioctls: KickIoctls) -> None:
    """Wait until the thread has come back from its kick and done what follows."""
    pause = threading.Event()
    while ioctls._asked:
        assert not pause.wait(0.001)


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EINVAL, errno.EPERM])
def test_b15_a_kernel_without(kernel: Kernel, number: int) -> None:
    """B15: where the resume is refused there is no kick, no thread, and no other ioctl."""
    kernel.errors["resume"] = [number]
    assert KickIoctls.probe(kernel) is None  # type: ignore[arg-type]
    assert kernel.calls == ["resume"]
    assert kick_threads() == []
    assert not kernel.closed()  # it is still the caller's


async def test_b15_probing_kicks_nobody(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15: to find out costs a resume, so vCPUs can run and no other VM is waited for."""
    assert kernel.calls == []
    assert not kernel.flag()
    assert len(kick_threads()) == 1


async def test_b15_kick_and_resume(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15: each bracket is a kick and a resume, and in between KVM_RUN is kept out."""
    for _ in range(3):
        ioctls.kick()
        kernel.wait_for("kick")
        finish(ioctls)
        assert kernel.flag()
        ioctls.resume()
        assert not kernel.flag()
        assert kernel.calls == ["kick", "resume"]
        kernel.calls.clear()


async def test_b15_the_resume_does_not_wait_for_the_kick(
    kernel: Kernel, ioctls: KickIoctls
) -> None:
    """B15: the kick waits for a stranger; the resume is made all the same, and once more after."""
    kernel.may_return.clear()
    ioctls.kick()
    assert kernel.flagged.wait(LONG_ENOUGH)
    ioctls.resume()
    assert not kernel.flag()
    kernel.wait_for("kick", "resume")
    kernel.may_return.set()
    kernel.wait_for("kick", "resume", "resume")


async def test_b15_a_kick_that_is_not_wanted_any_more(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15, case 1: a bracket that is over before the thread begins costs no ioctl."""

    def another_bracket() -> None:  # while the thread is busy with the first one's end
        kernel.on_resume = lambda: None
        ioctls.kick()
        ioctls.resume()
        looked.set()

    looked = threading.Event()
    kernel.may_return.clear()
    ioctls.kick()
    assert kernel.flagged.wait(LONG_ENOUGH)
    ioctls.resume()
    kernel.on_resume = another_bracket
    kernel.may_return.set()
    assert looked.wait(LONG_ENOUGH)
    finish(ioctls)
    assert kernel.calls == ["kick", "resume", "resume"]
    assert not kernel.flag()


async def test_b15_a_late_flag_and_the_kick_returns(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15, case 2: the flag is set after the resume; the thread resumes when the kick returns."""
    kernel.may_flag.clear()
    ioctls.kick()
    kernel.wait_for("kick")
    ioctls.resume()
    kernel.may_flag.set()
    kernel.wait_for("kick", "resume", "resume")
    finish(ioctls)
    assert not kernel.flag()


async def test_b15_a_late_flag_and_the_kick_waits(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15, case 3: the flag is set after the resume and the kick waits: a stray vCPU resumes."""
    kernel.may_flag.clear()
    kernel.may_return.clear()
    ioctls.kick()
    kernel.wait_for("kick")
    ioctls.resume()
    kernel.may_flag.set()
    assert kernel.flagged.wait(LONG_ENOUGH)
    assert kernel.flag()  # vCPUs would get EINTR for ever
    ioctls.stray()
    assert not kernel.flag()
    kernel.wait_for("kick", "resume", "resume")
    kernel.may_return.set()
    kernel.wait_for("kick", "resume", "resume", "resume")


async def test_b15_a_stray_vcpu_otherwise(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15: a vCPU that was kicked out by something else costs no ioctl, nor inside a bracket."""
    ioctls.stray()
    assert kernel.calls == []
    ioctls.kick()
    kernel.wait_for("kick")
    finish(ioctls)
    ioctls.stray()
    assert kernel.flag()
    assert kernel.calls == ["kick"]
    ioctls.resume()
    ioctls.stray()
    assert kernel.calls == ["kick", "resume"]


async def test_b15_an_old_kick_is_under_way(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B15: a bracket that finds an old kick waiting asks for no other; its end resumes."""
    kernel.may_flag.clear()
    ioctls.kick()
    kernel.wait_for("kick")
    ioctls.resume()
    ioctls.kick()
    kernel.may_flag.set()
    finish(ioctls)
    assert kernel.flag()  # set late, in the second bracket, which does not mind
    ioctls.resume()
    assert not kernel.flag()
    assert kernel.calls.count("kick") == 1


async def test_b4_nested_holds_kick_once(kernel: Kernel, ioctls: KickIoctls) -> None:
    """B4, B15: a second kick within a bracket is none, and only a kick is resumed from."""
    ioctls.resume()
    ioctls.kick()
    kernel.wait_for("kick")
    finish(ioctls)
    ioctls.kick()
    finish(ioctls)
    ioctls.resume()
    ioctls.resume()
    finish(ioctls)
    assert kernel.calls == ["kick", "resume"]


@pytest.mark.parametrize("numbers", [[errno.ENOMEM], [errno.EINTR] * 10, [errno.ENOTTY]])
async def test_b15_a_kick_that_fails(
    kernel: Kernel, ioctls: KickIoctls, numbers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """B15: a kick that fails is resumed from, said once, and the last one."""
    kernel.errors["kick"] = numbers.copy()
    made = len(numbers)
    ioctls.kick()
    kernel.wait_for(*["kick"] * made)
    finish(ioctls)
    ioctls.resume()
    assert not kernel.flag()  # which it may have set all the same
    for _ in range(3):
        ioctls.kick()
        ioctls.resume()
    await ioctls.aclose()
    assert kernel.calls == [*["kick"] * made, "resume"]
    (record,) = caplog.records
    assert record.name == "memlistener.kvm.kick"
    assert record.levelno == logging.WARNING
    assert f"{KICK} failed: [Errno {numbers[0]}]" in record.getMessage()
    assert "by signals alone" in record.getMessage()


async def test_b15_interrupted_once(
    kernel: Kernel, ioctls: KickIoctls, caplog: pytest.LogCaptureFixture
) -> None:
    """B15: a kick that is interrupted is made again, and nothing is said."""
    kernel.errors["kick"] = [errno.EINTR] * 3
    for expected in (["kick"] * 4, ["kick"]):
        kernel.calls.clear()
        ioctls.kick()
        kernel.wait_for(*expected)
        finish(ioctls)
        ioctls.resume()
    assert caplog.records == []


async def test_b15_a_resume_that_fails(
    kernel: Kernel, ioctls: KickIoctls, caplog: pytest.LogCaptureFixture
) -> None:
    """B15: a resume that fails is said, and made again for the first vCPU that suffers."""
    ioctls.kick()
    kernel.wait_for("kick")
    finish(ioctls)
    kernel.errors["resume"] = [errno.ENOMEM]
    ioctls.resume()
    assert kernel.flag()
    ioctls.stray()
    assert not kernel.flag()
    (record,) = caplog.records
    assert f"{RESUME} failed" in record.getMessage()


async def test_b13_a_kick_that_waits_for_a_stranger_is_the_last(
    kernel: Kernel,
    ioctls: KickIoctls,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B13: a kick that comes back long after its bracket is said, and there is no other."""
    monkeypatch.setattr(kick, "_TOO_LATE", -1.0)
    kernel.may_return.clear()
    ioctls.kick()
    assert kernel.flagged.wait(LONG_ENOUGH)
    ioctls.resume()
    kernel.may_return.set()
    kernel.wait_for("kick", "resume", "resume")
    await until(lambda: bool(caplog.records))
    ioctls.kick()
    ioctls.resume()
    assert kernel.calls == ["kick", "resume", "resume"]
    (record,) = caplog.records
    assert "other virtual machines" in record.getMessage()


async def test_closing(kernel: Kernel, ioctls: KickIoctls) -> None:
    """Closing ends the thread, and the handle with it; again, it does nothing."""
    await ioctls.aclose()
    assert kernel.closed()
    assert kick_threads() == []
    await ioctls.aclose()


async def test_closing_while_a_kick_waits(
    kernel: Kernel, ioctls: KickIoctls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not wait for a stranger, and the handle stays open until the ioctl is over."""
    monkeypatch.setattr(kick, "_LINGER", 0.001)
    kernel.may_return.clear()
    ioctls.kick()
    assert kernel.flagged.wait(LONG_ENOUGH)
    await ioctls.aclose()
    assert not kernel.closed()
    (thread,) = kick_threads()
    kernel.may_return.set()
    thread.join(LONG_ENOUGH)
    assert kernel.closed()
    assert kernel.calls == ["kick"]  # nothing is asked of a VM without vCPUs


# ---- in a VM -----------------------------------------------------------------------------------


def add_device(rig: Rig) -> MemoryRegion:
    """RAM at WINDOW, and a device that can be put over its middle."""
    device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
    device.set_enabled(False)
    rig.system.add_subregion(WINDOW, MemoryRegion.ram("window", 0x8000))
    rig.system.add_subregion_overlap(WINDOW + 0x4000, device, 1)
    return device


async def toggle(rig: Rig, region: MemoryRegion) -> None:
    async with rig.memory.transaction():
        region.set_enabled(not region.enabled)


def made(fake: FakeKvm, name: str, *, vm: int = 0) -> int:
    """How many such ioctls have ended."""
    return sum(each.name == name and each.vm == vm for each in fake.log)


async def test_b15_mainline() -> None:
    """B15: a kernel that answers ENOTTY is asked once for each VM, and nobody else is."""
    fake = FakeKvm()
    rig = Rig(fake)
    device = add_device(rig)
    async with rig.open() as vm:
        assert kick_threads() == []
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            for _ in range(5):
                await toggle(rig, device)
            nursery.cancel_scope.cancel()
    assert (made(fake, KICK), made(fake, RESUME)) == (0, 1)


async def test_b15_one_eintr_for_each_bracket() -> None:
    """B15: with the kick and the gate every vCPU gets one EINTR a bracket; nobody spins."""
    fake = FakeKvm(kick_ioctls=True)
    rig = Rig(fake)
    async with rig.open() as vm:
        vcpus = [await rig.boot(vm, Spin()) for _ in range(3)]
        fakes = [rig.fake_vcpu(each) for each in vcpus]
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)
            for number in range(1, 11):
                await rig.wait_inside(vm, 3)
                async with vm.paused():
                    async with vm.paused():  # B4: which kicks nobody
                        assert vm.statistics().gate.vcpus_inside == 0
                    # Held until the kernel says so too: then nothing here is a race.
                    await until(lambda number=number: made(fake, KICK) == number)  # type: ignore[misc]
                assert made(fake, RESUME) == 1 + number
            await rig.wait_inside(vm, 3)
            assert [each.statistics().eintrs for each in fakes] == [10] * 3
            assert [each.statistics().spins for each in fakes] == [0] * 3
            assert [each.statistics().runs for each in fakes] == [11] * 3
            nursery.cancel_scope.cancel()


async def test_b15_the_order_of_things() -> None:
    """B1, B15: gate, kick, ioctls, resume, and only then KVM_RUN: as the kernel sees it."""
    fake = FakeKvm(kick_ioctls=True)
    rig = Rig(fake)
    device = add_device(rig)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            for number in range(1, 6):
                async with vm.paused():
                    await until(lambda number=number: made(fake, KICK) == number)  # type: ignore[misc]
                    await toggle(rig, device)
                await rig.wait_inside(vm)
                await trio.to_thread.run_sync(rig.fake_vcpu(vcpu).wait_inside)
            nursery.cancel_scope.cancel()
    names = [each for each in fake.log if each.name in (KICK, RESUME, SLOT_IOCTL, "KVM_RUN")]
    names.sort(key=lambda each: each.ended)
    order = [each.name for each in names][3:]  # without the probe and the first map
    bracket = ["KVM_RUN", KICK, *[SLOT_IOCTL] * 3, RESUME]
    assert order[: 6 * 5] == bracket * 5


@pytest.mark.parametrize("instruction", [Spin(), Read(WINDOW, 4)], ids=["spin", "loop"])
async def test_b13_the_kick_waits_for_a_stranger(
    instruction: Instruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B13, B15: while the kick waits for another VM, brackets end, vCPUs run, and so does trio."""
    monkeypatch.setattr(kick, "_LINGER", 0.001)
    fake = FakeKvm(kick_ioctls=True, kick_waits_for_other_vms=True)
    rig, stranger = Rig(fake), Rig(fake)
    device = add_device(rig)
    leave = threading.Event()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await trio.lowlevel.checkpoint()

    async with stranger.open() as other, rig.open() as vm:
        foreign = await stranger.boot(other, Deaf(leave))
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        spinning = await rig.boot(vm, instruction, loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(foreign.run)
            await trio.to_thread.run_sync(stranger.fake_vcpu(foreign).wait_inside)
            nursery.start_soon(vcpu.run)
            nursery.start_soon(spinning.run)
            nursery.start_soon(tick)
            try:
                with trio.fail_after(LONG_ENOUGH):
                    for _ in range(20):
                        await rig.wait_inside(vm, 2)
                        ticked = ticks
                        await toggle(rig, device)
                        await rig.wait_rounds(vcpu, 2)
                        assert ticks > ticked
                    assert vm.statistics().holes == 0
                    # The one kick that was asked for waits to this moment.
                    assert made(fake, KICK, vm=1) == 0
                    assert len(kick_threads()) == 2
                    # One entry may have met the kernel's flag, and not all those after it.
                    assert rig.fake_vcpu(spinning).statistics().spins <= 1
                    leave.set()
                    async with vm.paused():
                        await until(lambda: made(fake, KICK, vm=1) >= 1)
                    await rig.wait_rounds(vcpu, 2)
            finally:
                leave.set()
            nursery.cancel_scope.cancel()


async def test_b15_late_flags_in_a_vm() -> None:
    """B15: kicks that set the flag when their bracket is over cost an EINTR, and nobody spins."""
    fake = FakeKvm(kick_ioctls=True, kick_waits_for_other_vms=True)
    rig, stranger = Rig(fake), Rig(fake)
    device = add_device(rig)
    leave, go = threading.Event(), threading.Event()
    entered = threading.Event()
    async with stranger.open() as other, rig.open() as vm:
        ioctl = fake.vms[1].kick_all_running_vcpus

        def late() -> None:
            entered.set()
            assert go.wait(LONG_ENOUGH)
            ioctl()

        fake.vms[1].kick_all_running_vcpus = late  # type: ignore[method-assign]
        foreign = await stranger.boot(other, Deaf(leave))
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        mine = rig.fake_vcpu(vcpu)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(foreign.run)
            await trio.to_thread.run_sync(stranger.fake_vcpu(foreign).wait_inside)
            nursery.start_soon(vcpu.run)
            try:
                with trio.fail_after(LONG_ENOUGH):
                    await rig.wait_rounds(vcpu)
                    async with vm.paused():
                        await until(entered.is_set)
                    await rig.wait_rounds(vcpu)
                    before = mine.statistics()
                    go.set()  # the flag comes now, and the kick waits for the stranger
                    await until(lambda: mine.statistics().eintrs > before.eintrs)
                    await rig.wait_rounds(vcpu, 10)
                    assert mine.statistics().eintrs == before.eintrs + 1
                    assert mine.statistics().spins == before.spins
                    assert made(fake, KICK, vm=1) == 0
                    await toggle(rig, device)
                    await rig.wait_rounds(vcpu, 10)
                    leave.set()
                    async with vm.paused():
                        await until(lambda: made(fake, KICK, vm=1) >= 1)
                    await rig.wait_rounds(vcpu, 10)
            finally:
                go.set()
                leave.set()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINTR, errno.ENOTTY])
async def test_b15_brackets_go_on_when_the_kick_fails(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """B15: a bracket whose kick fails is one of the other kind, and so are those after it."""
    fake = FakeKvm(kick_ioctls=True)
    rig = Rig(fake)
    device = add_device(rig)
    for nth in range(1, 1 + (kick._TRIES if number == errno.EINTR else 1)):
        fake.fail(KICK, nth=nth, errno=number)
    async with rig.open() as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            with trio.fail_after(LONG_ENOUGH):
                async with vm.paused():
                    await until(lambda: bool(caplog.records))
                    assert vm.statistics().gate.vcpus_inside == 0
                for _ in range(5):
                    await toggle(rig, device)
                    await rig.wait_rounds(vcpu)
            nursery.cancel_scope.cancel()
        assert vm.statistics().holes == 0
    assert {each.errno for each in fake.log if each.name == KICK} == {number}
    assert [each.name for each in caplog.records] == ["memlistener.kvm.kick"]
    assert fake.pending_failures() == 0


async def test_closed_while_the_kick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM whose kick waits for a stranger is closed at once; its descriptor, afterwards."""
    monkeypatch.setattr(kick, "_LINGER", 0.001)
    fake = FakeKvm(kick_ioctls=True, kick_waits_for_other_vms=True)
    rig, stranger = Rig(fake), Rig(fake)
    leave = threading.Event()
    closed: list[str] = []
    async with stranger.open() as other:
        foreign = await stranger.boot(other, Deaf(leave))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(foreign.run)
            await trio.to_thread.run_sync(stranger.fake_vcpu(foreign).wait_inside)
            try:
                with trio.fail_after(LONG_ENOUGH):
                    async with rig.open() as vm:
                        fake.vms[1].close = lambda: closed.append("vm")  # type: ignore[method-assign]
                        vcpu = await rig.boot(vm, Spin())
                        async with trio.open_nursery() as inner:
                            inner.start_soon(vcpu.run)
                            await rig.wait_inside(vm)
                            async with vm.paused():
                                await until(lambda: fake.vms[1]._state.kicked)
                            inner.cancel_scope.cancel()
                assert closed == []
            finally:
                leave.set()
            await until(lambda: closed == ["vm"])
            nursery.cancel_scope.cancel()
    assert not [each for each in fake.log if each.errno == errno.EBADF]


async def test_no_thread_for_the_kick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host gives no thread, the VM is not opened and its handle is closed."""
    fake = FakeKvm(kick_ioctls=True)
    rig = Rig(fake)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            async with rig.open():
                pass
    with pytest.raises(KvmError):
        fake.vms[0].create_vcpu(0)
    assert rig.space.listeners == ()


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# ---- what the gate tells it --------------------------------------------------------------------


class Told:
    """An `Assist` that notes what it is told, and whether the gate was held then."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, bool]] = []
        self.gate: Gate

    def kick(self) -> None:
        self.notes.append(("kick", self.gate.held))

    def resume(self) -> None:
        self.notes.append(("resume", self.gate.held))

    def stray(self) -> None:
        self.notes.append(("stray", self.gate.held))


async def test_the_gate_tells() -> None:
    """B1, B15: the kick after the gate is closed, the resume before it opens, strays outside."""
    told = Told()
    gate = told.gate = Gate(assist=told)
    mine = gate.add("a", lambda: gate.leave(mine, returning=True), lambda: None)
    async with gate.holding():
        assert told.notes == []  # nobody is inside
    assert told.notes == [("resume", True)]
    told.notes.clear()
    assert gate.enter(mine)
    async with gate.holding(), gate.holding():
        assert told.notes == [("kick", True)]
    assert told.notes == [("kick", True), ("resume", True)]
    told.notes.clear()
    assert gate.enter(mine)
    gate.leave(mine)
    assert told.notes == []
    assert gate.enter(mine)
    gate.leave(mine, returning=True)
    assert told.notes == [("stray", False)]
    assert gate.enter(mine)
    gate.hold_nowait()
    assert told.notes[1:] == [("kick", True)]
    gate.release()
    gate.remove(mine)


async def test_b9_a_cancelled_hold_resumes() -> None:
    """B9, B15: a hold that is cancelled while it waits takes its kick back too."""
    told = Told()
    gate = told.gate = Gate(assist=told)
    mine = gate.add("late", lambda: None, lambda: None)
    assert gate.enter(mine)
    with trio.move_on_after(0.01):
        await gate.hold()
    assert told.notes == [("kick", True), ("resume", True)]
    gate.leave(mine)
    gate.remove(mine)
