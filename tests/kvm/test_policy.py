"""Rule B16: when a commit holds the vCPUs, and what a vCPU sees where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from memlistener import MemoryRegion, MemoryRegionOps
from memlistener.kvm import KickPolicy
from memlistener.testing import FakeKvm, Ioctl, Read, Spin
from tests.kvm.rig import LONG_ENOUGH, SLOT_IOCTL, Rig, until

WINDOW = 0x1000000


class Parts:
    """What the transactions of this file change."""

    def __init__(self, rig: Rig) -> None:
        self.ram = MemoryRegion.ram("ram", 0x10000)
        self.hole = MemoryRegion.io("hole", 0x1000, MemoryRegionOps())
        self.hole.set_enabled(False)
        self.device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
        self.device.set_enabled(False)
        self.other = MemoryRegion.ram("other", 0x1000)
        self.other.set_enabled(False)
        rig.system.add_subregion(WINDOW, self.ram)
        rig.system.add_subregion_overlap(WINDOW + 0x4000, self.hole, 1)
        rig.system.add_subregion(2 * WINDOW, self.device)
        rig.system.add_subregion(3 * WINDOW, self.other)


CHANGES: dict[str, tuple[Callable[[Parts], None], bool]] = {
    "split": (lambda parts: parts.hole.set_enabled(True), True),
    "shrink": (lambda parts: parts.ram.set_size(0x8000), True),
    "readonly": (lambda parts: parts.ram.set_readonly(True), True),
    "move by a page": (lambda parts: parts.ram.set_address(WINDOW + 0x1000), True),
    "move elsewhere": (lambda parts: parts.ram.set_address(5 * WINDOW), False),
    "add": (lambda parts: parts.other.set_enabled(True), False),
    "remove": (lambda parts: parts.ram.set_enabled(False), False),
    "a device": (lambda parts: parts.device.set_enabled(True), False),
}


@pytest.mark.parametrize("policy", KickPolicy)
@pytest.mark.parametrize("name", CHANGES)
async def test_b16_brackets(name: str, policy: KickPolicy) -> None:
    """B16: EVERY_COMMIT always holds, ON_OVERLAP where a vCPU could miss memory, NEVER never."""
    change, tears = CHANGES[name]
    rig = Rig(FakeKvm())
    parts = Parts(rig)
    wanted = {
        KickPolicy.EVERY_COMMIT: 1,
        KickPolicy.ON_OVERLAP: int(tears),
        KickPolicy.NEVER: 0,
    }[policy]
    async with rig.open(policy) as vm:
        vcpu = await rig.boot(vm, Spin())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            before = vm.statistics()
            async with rig.memory.transaction():
                change(parts)
            after = vm.statistics()
            assert after.brackets - before.brackets == wanted
            assert after.gate.holds - before.gate.holds == wanted
            assert (after.gate.kicks > before.gate.kicks) == bool(wanted)
            nursery.cancel_scope.cancel()
    assert rig.fake is not None
    ioctls = [each for each in rig.fake.vms[0].ioctls if each.name == SLOT_IOCTL]
    if wanted:
        assert all(each.inside == frozenset() for each in ioctls)
    elif name != "a device":
        assert ioctls[-1].inside == {0}


@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])
async def test_b16_transaction_without_effect(policy: KickPolicy) -> None:
    """B16: a transaction that changes no view holds nobody."""
    rig = Rig(FakeKvm())
    parts = Parts(rig)
    async with rig.open(policy) as vm:
        before = vm.statistics().gate.holds
        async with rig.memory.transaction():
            parts.hole.set_enabled(True)
            parts.hole.set_enabled(False)
        assert vm.statistics().gate.holds == before


@pytest.mark.parametrize("policy", KickPolicy)
async def test_b16_a_step_between_delete_and_create(policy: KickPolicy) -> None:
    """B16: a vCPU that may take a step between two ioctls falls into a hole under NEVER only."""
    fake = FakeKvm()
    rig = Rig(fake)
    parts = Parts(rig)
    async with rig.open(policy) as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        mine = rig.fake_vcpu(vcpu)
        mine.stepping = True
        stepped: list[Ioctl] = []

        def step(ioctl: Ioctl) -> None:
            if ioctl.name == SLOT_IOCTL and mine.statistics().inside:
                stepped.append(ioctl)
                mine.step()
                # The exit is served outside; then it is inside again, at its next step.
                mine.wait_for(lambda statistics: statistics.inside and statistics.blocked)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(vcpu.run)
            await rig.wait_inside(vm)
            fake.on_ioctl = step
            async with rig.memory.transaction():
                parts.hole.set_enabled(True)
            fake.on_ioctl = None
            nursery.cancel_scope.cancel()
        holes = vm.statistics().holes
    if policy is KickPolicy.NEVER:
        assert len(stepped) == 3
        assert holes == 1
    else:
        assert stepped == []
        assert holes == 0


async def test_b16_never_still_reaches_the_map() -> None:
    """B16: under NEVER a running vCPU sees the new map too, without having been kicked."""
    rig = Rig(FakeKvm())
    parts = Parts(rig)
    parts.ram.block.view[0:4] = b"\x01\x00\x00\x00"
    async with rig.open(KickPolicy.NEVER) as vm:
        vcpu = await rig.boot(vm, Read(WINDOW, 4), loop=True)
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vcpu.run)
                await rig.wait_rounds(vcpu)
                assert rig.results(vcpu) == [1]
                async with rig.memory.transaction():
                    parts.ram.set_enabled(False)
                await until(lambda: rig.results(vcpu) == [0xFFFFFFFF])
                assert vm.statistics().gate.kicks == 0
                nursery.cancel_scope.cancel()
