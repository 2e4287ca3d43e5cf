"""memlistener: QEMU's memory API as an async library.

Where things are, lowest first; imports only ever point downwards:

=====================  =========================================================
errors                 every exception, and when you get which
core                   pure and synchronous: regions, views, events, access rules
ram                    RamBlock: host memory
listener, dispatch     who hears of changes; an access -> a region's ops
eventfd                EventFd: what a write may signal instead
bracket                the gate that holds vCPUs while memory changes
instrument, trace      who watches brackets and exits; what they show in Perfetto
memory                 MemorySystem and transactions; its parts: address_space,
                       pending (what a transaction gathered), delivery (telling
                       listeners, and taking it back), dirty_log
iommu, ram_discard     notifiers of IOMMU regions; RAM that comes and goes
vcpu                   a vCPU as a trio task and a thread of its own
kvm, testing           KVM under it all; FakeKvm and helpers for your own tests
rig                    what commands that run a guest share
demo, mirror           two such: guests under transactions; a copy of one's RAM
cli                    the ``memlistener`` command: demo, mirror, mtree
=====================  =========================================================

Importing this package loads neither cffi nor the KVM extension; ``from
memlistener import kvm`` is what does, and only when a VM is opened.
"""

from memlistener.address_space import AddressSpace
from memlistener.core.dirty import DirtyClient, DirtyRanges
from memlistener.core.flatview import FlatRange, FlatView
from memlistener.core.iommu import (
    IommuAccess,
    IommuEvent,
    IommuNotifier,
    IommuNotifierFlag,
    IommuOps,
    IommuTlbEntry,
)
from memlistener.core.kinds import RegionKind
from memlistener.core.ops import AccessConstraints, MemoryRegionOps, MemTxAttrs, MemTxResult
from memlistener.core.region import MemoryRegion
from memlistener.errors import (
    BrokenMemoryError,
    KvmError,
    KvmUnavailableError,
    ListenerError,
    MemlistenerError,
    MemslotError,
    RamInUseError,
    RegionError,
    RegionTypeError,
    TransactionError,
    UnassignedAccessError,
    VcpuBusyError,
)
from memlistener.eventfd import EventFd
from memlistener.instrument import Instrument
from memlistener.iommu import (
    notify_iommu,
    register_iommu_notifier,
    replay_iommu,
    unregister_iommu_notifier,
)
from memlistener.listener import ListenerPriority, MemoryListener, MemoryRegionSection
from memlistener.memory import MemorySystem
from memlistener.ram import RamBlock
from memlistener.ram_discard import RamDiscardListener, RamDiscardManager

__version__ = "0.1.0"

__all__ = [
    "AccessConstraints",
    "AddressSpace",
    "BrokenMemoryError",
    "DirtyClient",
    "DirtyRanges",
    "EventFd",
    "FlatRange",
    "FlatView",
    "Instrument",
    "IommuAccess",
    "IommuEvent",
    "IommuNotifier",
    "IommuNotifierFlag",
    "IommuOps",
    "IommuTlbEntry",
    "KvmError",
    "KvmUnavailableError",
    "ListenerError",
    "ListenerPriority",
    "MemTxAttrs",
    "MemTxResult",
    "MemlistenerError",
    "MemoryListener",
    "MemoryRegion",
    "MemoryRegionOps",
    "MemoryRegionSection",
    "MemorySystem",
    "MemslotError",
    "RamBlock",
    "RamDiscardListener",
    "RamDiscardManager",
    "RamInUseError",
    "RegionError",
    "RegionKind",
    "RegionTypeError",
    "TransactionError",
    "UnassignedAccessError",
    "VcpuBusyError",
    "notify_iommu",
    "register_iommu_notifier",
    "replay_iommu",
    "unregister_iommu_notifier",
]
