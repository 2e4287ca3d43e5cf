"""The smallest machine: one vCPU and RAM from address 0 on, straight over the handles."""

from __future__ import annotations

import ctypes
import mmap
import threading
from types import TracebackType
from typing import Self

from memlistener.kvm.backend import CAP_DIRTY_LOG_RING_ACQ_REL
from memlistener.kvm.fds import Kvm

RAM_SIZE = 0x10000
LONG_ENOUGH = 60.0


class Machine:
    """A VM with one vCPU, and ``RAM_SIZE`` bytes of RAM in slot 0 unless told otherwise."""

    def __init__(self, *, slot: bool = True, ring_size: int = 0) -> None:
        self.ram = mmap.mmap(-1, RAM_SIZE)
        # Held, as the kernel does not: it must stay mapped as long as the VM may touch it.
        self._pin: ctypes.c_char | None = ctypes.c_char.from_buffer(self.ram)
        self.host = ctypes.addressof(self._pin)
        self.kvm = Kvm.open()
        self.vm = self.kvm.create_vm()
        if ring_size:
            self.vm.enable_cap(CAP_DIRTY_LOG_RING_ACQ_REL, ring_size)
        self.vcpu = self.vm.create_vcpu(0)
        if slot:
            self.vm.set_user_memory_region(0, 0, 0, RAM_SIZE, self.host)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()
        self._pin = None
        self.ram.close()

    def write(self, addr: int, data: bytes) -> None:
        """Write guest memory."""
        self.ram[addr : addr + len(data)] = data

    def run(self) -> int:
        """Run until an exit; EINTR if there is none for too long."""
        watchdog = threading.Timer(LONG_ENOUGH, self.vcpu.kick)
        watchdog.start()
        try:
            return self.vcpu.run()
        finally:
            watchdog.cancel()
            watchdog.join()
