"""KVM under an address space: memslots, brackets, vCPUs.

Importing this package works everywhere; the compiled extension is loaded when a
VM is opened on /dev/kvm, and `available` says whether that can work. With
``backend=FakeKvm(...)`` none of it is needed.

================  ==============================================================
backend           the seam: three protocols that a kernel has to fulfil
bindings, fds     the real one: the extension, and handles over its descriptors
slots             pure planning of memslot ioctls
listener, policy  region_add and region_del -> ioctls in a bracket, and when
dirty_log         a slot whose writes are logged; two ways to fetch them, in
                  dirty_bitmap and dirty_ring; bitmaps: the extension's help
kick              the kernel's own kick, where there is one
io_listener       ioeventfds and coalesced ranges -> ioctls
coalesced         the writes of coalesced ranges, served before any exit
run, exits        KVM_RUN, the dispatch of its exits, and the exits as values
vcpu              a vCPU as its users see it
registers, x86    registers by name; real, protected and long mode
vm                open_vm, which puts it all together
================  ==============================================================
"""

from memlistener.kvm import x86
from memlistener.kvm.dirty_log import DirtyLogMethod
from memlistener.kvm.exits import (
    Debug,
    FailEntry,
    Hlt,
    InternalError,
    Shutdown,
    SystemEvent,
    Unknown,
    Unsupported,
    VcpuExit,
)
from memlistener.kvm.io_listener import KvmIoListener
from memlistener.kvm.listener import KvmMemoryListener
from memlistener.kvm.policy import KickPolicy
from memlistener.kvm.slots import Mapping, Memslot
from memlistener.kvm.vcpu import Vcpu, VcpuStatistics
from memlistener.kvm.vm import Availability, Vm, VmStatistics, available, open_vm

__all__ = [
    "Availability",
    "Debug",
    "DirtyLogMethod",
    "FailEntry",
    "Hlt",
    "InternalError",
    "KickPolicy",
    "KvmIoListener",
    "KvmMemoryListener",
    "Mapping",
    "Memslot",
    "Shutdown",
    "SystemEvent",
    "Unknown",
    "Unsupported",
    "Vcpu",
    "VcpuExit",
    "VcpuStatistics",
    "Vm",
    "VmStatistics",
    "available",
    "open_vm",
    "x86",
]
