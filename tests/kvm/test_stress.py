"""Everything at once: see `tests.kvm.stress`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from memlistener.testing import FakeKvm
from tests.kvm.rig import Rig
from tests.kvm.stress import Stress

# More of them: MEMLISTENER_STRESS=1000 pytest tests/kvm/test_stress.py
SEEDS = range(int(os.environ.get("MEMLISTENER_STRESS", "4")))

seeds = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(params=["fake", "kicking", pytest.param("real", marks=pytest.mark.kvm)])
def rig(request: pytest.FixtureRequest) -> Rig:
    """On the fake kernel, on one that has the kick ioctls, and on the real one."""
    kind = request.param
    return Rig(None if kind == "real" else FakeKvm(kick_ioctls=kind == "kicking", log_limit=100))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() <= threads


@seeds
async def test_everything_at_once(rig: Rig, seed: int) -> None:
    """B4, B6, B9, B10, B14, B15, T13, K6: nothing is lost, and nobody waits for himself."""
    stress = Stress(rig, seed, 150)
    await stress.play()
    assert sum(map(len, stress.served.values())) > 20


@seeds
async def test_closed_in_the_middle_of_it(rig: Rig, seed: int) -> None:
    """B9, B10, K6: a VM closes at any moment; whoever waits for it hears of it."""
    await Stress(rig, seed, 150).play_and_close()
