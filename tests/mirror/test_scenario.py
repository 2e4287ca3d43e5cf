from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from memlistener import RamBlock, kvm
from memlistener.kvm import DirtyLogMethod, KickPolicy
from memlistener.mirror import scenario
from memlistener.mirror.guest import CPUS
from memlistener.mirror.report import Result
from memlistener.mirror.scenario import Options
from memlistener.rig import machine
from memlistener.testing import Ioctl
from memlistener.testing.guest_script import GuestProgram

LONG_ENOUGH = 60.0
ATTEMPTS = 20

BACKENDS = pytest.mark.parametrize(
    "fake", [pytest.param(False, marks=pytest.mark.kvm, id="kvm"), pytest.param(True, id="fake")]
)
METHODS = pytest.mark.parametrize("method", DirtyLogMethod)
BRACKETS = pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.ON_OVERLAP])


async def run(options: Options, stop: trio.Event | None = None) -> Result:
    before = threading.active_count()
    with trio.fail_after(LONG_ENOUGH):
        result = await scenario.run(options, stop=stop)
    # trio keeps idle worker threads; a vCPU's does not outlive its run.
    assert not [each for each in threading.enumerate() if "vcpu" in each.name.lower()]
    assert threading.active_count() <= before + 2
    return result


@BACKENDS
@METHODS
@BRACKETS
async def test_no_page_is_missed(fake: bool, method: DirtyLogMethod, policy: KickPolicy) -> None:
    """B12: guests, their device and a device of the host write, and each page gets there."""
    result = await run(
        Options(seconds=None, transactions=60, ram=2, dirty_log=method, policy=policy, fake=fake)
    )
    assert result.verdict == "0 of 512 pages differ."
    assert result.exit_status == 0
    assert result.transactions == 60
    assert result.memslot_ioctls > 60
    assert result.brackets >= (60 if policy is KickPolicy.EVERY_COMMIT else 1)
    assert result.holes == 0
    assert result.rounds >= 2
    assert result.copied > 512
    assert result.host_writes > 0


@pytest.mark.kvm
@METHODS
async def test_without_brackets_pages_are_lost(method: DirtyLogMethod) -> None:
    """B12: the loss is real, and the comparison finds it."""
    for _ in range(ATTEMPTS):
        result = await run(
            Options(
                seconds=None,
                transactions=30,
                ram=16,
                dirty_log=method,
                policy=KickPolicy.NEVER,
            )
        )
        if result.differing:
            break
    assert result.differing > 0
    assert result.comparison is not None
    assert result.comparison.first
    assert result.exit_status == 1
    assert result.brackets == 0


class SteppingMachine(machine.ScriptedMachine):
    """Whose guest writes a few pages after each fetch of a bitmap, if it is inside."""

    def __init__(self, script: GuestProgram) -> None:
        super().__init__(script)
        self.backend.on_ioctl = self.after

    def start(self, vcpu: kvm.Vcpu) -> None:
        super().start(vcpu)
        self.backend.vms[0].vcpus[vcpu.id].stepping = True

    def after(self, ioctl: Ioctl) -> None:
        vm = self.backend.vms[0]
        if ioctl.name == "KVM_GET_DIRTY_LOG" and vm.inside:
            vm.vcpus[0].step(6)


@pytest.mark.parametrize("method", [DirtyLogMethod.BITMAP, DirtyLogMethod.MANUAL_PROTECT])
@pytest.mark.parametrize("policy", [KickPolicy.EVERY_COMMIT, KickPolicy.NEVER])
async def test_between_fetch_and_delete(
    method: DirtyLogMethod, policy: KickPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B12: what a guest writes there is lost, if it is inside; in a bracket it is not."""
    monkeypatch.setattr(scenario, "ScriptedMachine", SteppingMachine)
    monkeypatch.setattr(scenario, "_PATIENCE", 0.0)  # this guest gets nowhere
    result = await run(
        Options(
            seconds=None,
            transactions=30,
            ram=1,
            vcpus=1,
            dirty_log=method,
            policy=policy,
            fake=True,
        )
    )
    assert result.transactions == 30
    assert (result.differing > 0) is (policy is KickPolicy.NEVER)


@pytest.mark.parametrize("forgetful", [True, False])
async def test_a_write_that_is_not_marked_is_found(
    forgetful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B12: a comparison that never complains would prove nothing; one lost page is found."""
    before = RamBlock.merge_dirty

    def merge(block: RamBlock, offset: int, bitmap: bytes | bytearray, clients: int) -> None:
        """As before, without the bit of the last page with one."""
        bits = int.from_bytes(bitmap, "little")
        last = 1 << (bits.bit_length() - 1) if bits and forgetful else 0
        before(block, offset, (bits & ~last).to_bytes(len(bitmap), "little"), clients)

    monkeypatch.setattr(RamBlock, "merge_dirty", merge)
    result = await run(Options(seconds=None, transactions=20, ram=1, fake=True))
    assert (result.differing > 0) is forgetful
    assert result.exit_status == int(forgetful)


@pytest.mark.kvm
@pytest.mark.parametrize("cpu", CPUS)
async def test_processor_modes(cpu: str) -> None:
    """The guest runs in each of them."""
    result = await run(Options(seconds=None, transactions=60, ram=2, cpu=cpu))
    assert result.exit_status == 0, result.verdict


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 4])
async def test_vcpu_counts(vcpus: int) -> None:
    """Each vCPU writes to all of its memory, however many there are."""
    result = await run(Options(seconds=None, transactions=60, ram=2, vcpus=vcpus))
    assert result.exit_status == 0, result.verdict
    assert len(result.passes) == vcpus
    assert all(result.passes)


async def test_output_is_the_ram(tmp_path: Path) -> None:
    """The file that was asked for stays, with all of the memory in it; an old one is replaced."""
    output = tmp_path / "ram.img"
    output.write_bytes(b"old" * 1_000_000)
    result = await run(Options(seconds=None, transactions=5, ram=1, output=output, fake=True))
    assert result.exit_status == 0
    data = output.read_bytes()
    assert len(data) == 1 << 20
    passes = [int.from_bytes(data[at : at + 4], "little") for at in (0x2000, 0x2040)]
    assert tuple(passes) == result.passes


async def test_temporary_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody asks for a file there is none afterwards."""
    seen: list[list[Path]] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with trio.fail_after(LONG_ENOUGH):
        await scenario.run(
            Options(seconds=None, transactions=5, ram=1, fake=True),
            lambda _: seen.append(list(tmp_path.iterdir())),
        )
    assert len(seen[0]) == 1
    assert list(tmp_path.iterdir()) == []


async def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """The error has the file's name."""
    missing = tmp_path / "nowhere" / "ram.img"
    with pytest.raises(OSError, match="nowhere") as caught:
        await run(Options(seconds=None, transactions=5, ram=1, output=missing, fake=True))
    assert caught.value.filename == str(missing)


async def test_time_limit() -> None:
    """It ends when its time is up, with a comparison."""
    result = await run(Options(seconds=0.3, ram=1, fake=True))
    assert result.transactions > 0
    assert not result.interrupted
    assert result.comparison is not None


async def test_stopping_early() -> None:
    """Setting the event ends it in good order: the rest is copied and compared."""
    stop = trio.Event()
    stop.set()
    result = await run(Options(seconds=None, ram=1, fake=True), stop)
    assert result.interrupted
    assert result.exit_status == 130
    assert result.comparison is not None
    assert result.differing == 0


async def test_same_seed_same_changes() -> None:
    """So many transactions with one seed are so many ioctls, whatever the timing."""
    ioctls = [
        (
            await run(Options(seconds=None, transactions=30, ram=1, seed=seed, fake=True))
        ).memslot_ioctls
        for seed in (5, 5, 6)
    ]
    assert ioctls[0] == ioctls[1] != ioctls[2]


@pytest.mark.parametrize("bad", [{"ram": 0}, {"vcpus": 0}, {"vcpus": 65}, {"cpu": "real"}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    """Before anything is run."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        Options(**bad)  # type: ignore[arg-type]
