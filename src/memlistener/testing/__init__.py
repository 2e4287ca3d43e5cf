"""For your own tests: a kernel to play with, a listener that records, strategies.

``memlistener.testing.strategies`` and ``memlistener.testing.mutations`` need
Hypothesis and are imported by themselves; ``memlistener.testing.pytest_plugin``
is found by pytest.
"""

from memlistener.testing.assertions import assert_flatview, assert_trace
from memlistener.testing.fake_bus import FakeIoEventFd, FakeZone
from memlistener.testing.fake_ioctls import Ioctl
from memlistener.testing.fake_kvm import FakeKvm, FakeVm
from memlistener.testing.fake_memslots import FakeMemslot
from memlistener.testing.fake_vcpu import FakeVcpu, FakeVcpuStatistics
from memlistener.testing.guest_script import (
    Deaf,
    Exit,
    Fetch,
    GuestProgram,
    GuestScript,
    Halt,
    In,
    Instruction,
    LoseSignals,
    Out,
    Read,
    Spin,
    Write,
)
from memlistener.testing.recording import Heard, RecordingListener

__all__ = [
    "Deaf",
    "Exit",
    "FakeIoEventFd",
    "FakeKvm",
    "FakeMemslot",
    "FakeVcpu",
    "FakeVcpuStatistics",
    "FakeVm",
    "FakeZone",
    "Fetch",
    "GuestProgram",
    "GuestScript",
    "Halt",
    "Heard",
    "In",
    "Instruction",
    "Ioctl",
    "LoseSignals",
    "Out",
    "Read",
    "RecordingListener",
    "Spin",
    "Write",
    "assert_flatview",
    "assert_trace",
]
