"""What the tests of FakeKvm share."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable

from memlistener.errors import KvmError
from memlistener.kvm.backend import VcpuHandle
from memlistener.testing.fake_kvm import FakeVm
from memlistener.testing.fake_vcpu import FakeVcpu
from memlistener.testing.guest_script import (
    Instruction,
)

PAGE = 0x1000
SLOT_IOCTL = "KVM_SET_USER_MEMORY_REGION"
TIMEOUT = 10.0


class HostMemory:
    """Anonymous memory with its address, as slots want it."""

    def __init__(self, size: int) -> None:
        self.bytes = mmap.mmap(-1, size)
        self._pin = ctypes.c_char.from_buffer(self.bytes)
        self.address = ctypes.addressof(self._pin)

    def close(self) -> None:
        del self._pin
        self.bytes.close()


class Runner(threading.Thread):
    """One call of run() in a thread of its own, bounded in time."""

    def __init__(self, vcpu: VcpuHandle) -> None:
        super().__init__(daemon=True)
        self._run = vcpu.run
        self.result: int | None = None
        self.start()

    def run(self) -> None:
        self.result = self._run()

    def wait(self) -> int | None:
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.result


def vcpu_with(vm: FakeVm, *script: Instruction) -> FakeVcpu:
    vcpu = vm.create_vcpu(len(vm.vcpus))
    vcpu.load(script)
    return vcpu


def errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except KvmError as error:
        return error.errno or -1
    return 0
