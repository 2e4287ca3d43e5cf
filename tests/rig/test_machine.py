from __future__ import annotations

import time

import pytest
import trio

from memlistener import MemoryRegion, MemorySystem, kvm
from memlistener.rig.machine import Machine, RealMachine, ScriptedMachine
from memlistener.testing import GuestScript, Halt, Write

HLT = bytes.fromhex("f4")


def script(vcpu_id: int) -> GuestScript:
    yield Write(0x100 + vcpu_id, 1, 7 + vcpu_id)
    yield Halt()


def enter(vcpu: kvm.Vcpu) -> None:
    kvm.x86.real_mode(vcpu, entry=0x1000)


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(RealMachine(enter), marks=pytest.mark.kvm, id="real"),
        pytest.param(ScriptedMachine(script), id="scripted"),
    ],
)
async def test_vcpus_start_where_they_are_put(machine: Machine) -> None:
    """Started again, each runs its program from the beginning."""
    system = MemoryRegion.ram("ram", 0x10000)
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    space.load(0x1000, HLT)
    with trio.fail_after(60):
        async with kvm.open_vm(space, backend=machine.backend) as vm:
            for _ in range(2):
                vcpu = await vm.create_vcpu()
                for _ in range(2):
                    machine.start(vcpu)
                    assert isinstance(await vcpu.run(), kvm.Hlt)
    if isinstance(machine, ScriptedMachine):
        assert await space.read(0x100, 2) == b"\x07\x08"


async def test_a_vcpu_gets_to_run_between_two_ioctls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake kernel takes its time over a memslot, with the GIL given away."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    memory = MemorySystem()
    space = memory.create_address_space("memory", MemoryRegion.ram("ram", 0x10000))
    async with kvm.open_vm(space, backend=ScriptedMachine(script).backend) as vm:
        assert vm.statistics().memslot_ioctls == len(naps) == 1
    assert naps[0] > 0
