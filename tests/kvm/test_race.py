"""The race itself, on the real kernel: what the bracket is for, and what happens without it."""

from __future__ import annotations

import pytest
import trio

from memlistener import MemoryRegion, MemoryRegionOps
from memlistener.kvm import KickPolicy, Vm
from memlistener.testing import Read, Write
from tests.kvm.rig import LONG_ENOUGH, Rig

pytestmark = pytest.mark.kvm

WINDOW = 0x1000000
SIGNATURE = 0x5EED5EED


class Hammer:
    """vCPUs that read and write the ends of a window, whose middle the host splits."""

    def __init__(self) -> None:
        self.rig = Rig(None)
        self.ram = MemoryRegion.ram("ram", 0x10000)
        for at in (0, 0xF000):
            self.ram.block.view[at : at + 4] = SIGNATURE.to_bytes(4, "little")
        self.device = MemoryRegion.io("device", 0x1000, MemoryRegionOps())
        self.device.set_enabled(False)
        self.rig.system.add_subregion(WINDOW, self.ram)
        self.rig.system.add_subregion_overlap(WINDOW + 0x8000, self.device, 1)

    async def run(self, vm: Vm, transactions: int, vcpu_count: int = 1) -> int:
        """Split and merge so many times while the guests run; accesses that found a hole."""
        vcpus = [
            await self.rig.boot(
                vm,
                Read(WINDOW, 4),
                Read(WINDOW + 0xF000, 4),
                Write(WINDOW + 0x10 * (number + 1), 4, number + 1),
                Read(WINDOW + 0x10 * (number + 1), 4),
                loop=True,
            )
            for number in range(vcpu_count)
        ]
        with trio.fail_after(LONG_ENOUGH):
            async with trio.open_nursery() as nursery:
                for vcpu in vcpus:
                    nursery.start_soon(vcpu.run)
                for vcpu in vcpus:
                    await self.rig.wait_rounds(vcpu)
                before = [self.rig.rounds(vcpu) for vcpu in vcpus]
                for _ in range(transactions):
                    async with self.rig.memory.transaction():
                        self.device.set_enabled(not self.device.enabled)
                    if vm.statistics().holes:
                        break
                for vcpu in vcpus:
                    await self.rig.wait_rounds(vcpu)
                assert all(
                    self.rig.rounds(vcpu) > rounds
                    for vcpu, rounds in zip(vcpus, before, strict=True)
                )
                nursery.cancel_scope.cancel()
        for number, vcpu in enumerate(vcpus):
            assert self.rig.results(vcpu) == [SIGNATURE, SIGNATURE, number + 1]
        return vm.statistics().holes


@pytest.mark.parametrize(
    ("policy", "transactions", "vcpu_count"),
    [
        (KickPolicy.EVERY_COMMIT, 500, 1),
        (KickPolicy.ON_OVERLAP, 500, 1),
        (KickPolicy.EVERY_COMMIT, 100, 2),
    ],
)
async def test_no_holes_under_the_bracket(
    policy: KickPolicy, transactions: int, vcpu_count: int
) -> None:
    """Transactions of three memslot ioctls under running guests: not one hole."""
    hammer = Hammer()
    async with hammer.rig.open(policy) as vm:
        before = vm.statistics()
        assert await hammer.run(vm, transactions, vcpu_count) == 0
        after = vm.statistics()
        assert after.brackets - before.brackets == transactions
        assert after.memslot_ioctls - before.memslot_ioctls == 3 * transactions
        assert {name for each in after.vcpus for name in each.exits} == set()


async def test_holes_without_the_bracket() -> None:
    """The same guests without a bracket do find holes: the test above can fail."""
    hammer = Hammer()
    async with hammer.rig.open(KickPolicy.NEVER) as vm:
        assert await hammer.run(vm, 50_000) > 0
        assert vm.statistics().gate.kicks <= 1  # the end's own
