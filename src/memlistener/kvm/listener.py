"""`KvmMemoryListener`: an address space's changes -> memslots, in a bracket.

region_add and region_del queue; commit plans the ioctls and makes them. The
vCPUs are held from begin to commit (or as `KickPolicy` says), so that none of
them is in the guest while a slot that it uses is deleted and added again.

When an ioctl fails, the ones before it are taken back and the error leaves
commit *with the vCPUs still held*: the memory system now sends begin, the
inverse of the events, and commit, and only that commit lets the vCPUs go, onto
the map as it was. When even taking back fails, every further commit raises, and
they are never let go.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable

from memlistener.address_space import AddressSpace
from memlistener.bracket import Gate
from memlistener.core.kinds import RegionKind
from memlistener.errors import KvmError, MemslotError
from memlistener.histogram import Histogram
from memlistener.kvm import backend as kernel
from memlistener.kvm.policy import KickPolicy
from memlistener.kvm.slots import (
    MAX_SLOT_BYTES,
    PAGE_SIZE,
    Mapping,
    Memslot,
    SlotOp,
    SlotTable,
    pieces,
    tears,
)
from memlistener.listener import ListenerPriority, MemoryListener, MemoryRegionSection


class KvmMemoryListener(MemoryListener):
    """Keeps a VM's memslots equal to the RAM and ROM of an address space.

    Args:
        vm: The VM's handle.
        gate: The gate that its vCPUs pass.
        policy: When to hold them.
        limit: How many slots the kernel has; None to ask it.
        max_slot: Most bytes in one slot.
    """

    priority = ListenerPriority.ACCEL

    def __init__(
        self,
        vm: kernel.VmHandle,
        gate: Gate,
        policy: KickPolicy = KickPolicy.EVERY_COMMIT,
        *,
        limit: int | None = None,
        max_slot: int = MAX_SLOT_BYTES,
    ) -> None:
        self._vm = vm
        self._gate = gate
        self._policy = policy
        self._max_slot = max_slot
        if limit is None:
            limit = vm.check_extension(kernel.CAP_NR_MEMSLOTS) or 32  # KVM's old default
        self._table = SlotTable(limit)
        self.readonly_memory = bool(vm.check_extension(kernel.CAP_READONLY_MEM))
        # Section start -> its mappings: a ROM device's section has none in one
        # mode and some in the other, and region_del does not say which it was.
        self._mapped: dict[int, list[Mapping]] = {}
        self._removed: dict[Mapping, None] = {}
        self._added: dict[Mapping, None] = {}
        # Slots pin the memory behind them, until the kernel has let go of it.
        self._pins: dict[Mapping, memoryview] = {}
        self._holding = False
        self._closing = False
        self._torn: BaseException | None = None
        self._moves = True
        self.brackets = 0
        self.ioctls = 0
        self.stopped = Histogram()  # from the hold to the release, in ns
        self._stopped_at = 0

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """The slots that the kernel has, by guest address."""
        return self._table.slots

    # ---- hooks --------------------------------------------------------------------

    async def begin(self) -> None:
        """Hold the vCPUs, if every commit is to be a bracket."""
        if not self._closing and self._policy is KickPolicy.EVERY_COMMIT:
            await self._hold()

    def region_add(self, section: MemoryRegionSection) -> Awaitable[None] | None:
        """Queue the section's mappings; hold the vCPUs first, if it overlaps what goes.

        The hold cannot wait for commit: by then the new view is published, and
        exits from the old memslots would be served from it.
        """
        if self._closing:
            return None
        if section.region.dirty_log_mask:  # which no log_start would say (rule T6)
            raise _unsupported(f"dirty logging of {section!r}")
        if self._policy is KickPolicy.ON_OVERLAP and not self._holding and self._replaces(section):
            return self._hold_then_add(section)
        self._add(section)
        return None

    async def _hold_then_add(self, section: MemoryRegionSection) -> None:
        await self._hold()
        self._add(section)

    def _replaces(self, section: MemoryRegionSection) -> bool:
        start, end = section.offset_within_address_space, section.end
        return any(each.guest_phys_addr < end and start < each.end for each in self._removed)

    def _add(self, section: MemoryRegionSection) -> None:
        mappings = self._mappings(section)
        self._mapped[section.offset_within_address_space] = [each for each, _ in mappings]
        for each, memory in mappings:
            self._pins[each] = memory
            if each in self._removed:
                del self._removed[each]
            else:
                self._added[each] = None

    def region_del(self, section: MemoryRegionSection) -> None:
        """Queue the removal of the section's mappings."""
        if self._closing:
            return
        for each in self._mapped.pop(section.offset_within_address_space):
            if each in self._added:  # of a commit that failed and is being undone
                del self._added[each]
                del self._pins[each]
            else:
                self._removed[each] = None

    async def commit(self) -> None:
        """Make the ioctls, and let the vCPUs go."""
        if self._closing:
            self.release()
            return
        if self._torn is not None:
            raise MemslotError(
                errno.EIO, "the memslots are neither as before nor as they should be"
            ) from self._torn
        ops = self._table.plan(self._removed, self._added)
        if self._policy is KickPolicy.ON_OVERLAP and tears(ops):  # by a split move
            await self._hold()
        self._make(ops)
        for each in self._removed:
            del self._pins[each]
        self._removed.clear()
        self._added.clear()
        self.release()

    # ---- what this backend cannot do yet: refused, so that nothing is lost in silence -----

    def log_global_start(self) -> None:
        """Refused: the kernel is not asked for dirty bits yet."""
        raise _unsupported("dirty logging")

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Refused, as `log_global_start`."""
        raise _unsupported(f"dirty logging of {section!r}")

    def release(self) -> None:
        """Let the vCPUs go, if they are held."""
        if self._holding:
            self._holding = False
            self.stopped.add(time.perf_counter_ns() - self._stopped_at)
            self._gate.release()

    async def _hold(self) -> None:
        if not self._holding:  # after a failed commit they still are
            await self._gate.hold()
            self._stopped_at = time.perf_counter_ns()
            self._holding = True
            self.brackets += 1

    def detach(self, space: AddressSpace) -> None:
        """The VM closes: hear nothing any more. The slots go with its descriptor."""
        self._closing = True
        space.memory.forget(self, space)
        self._pins.clear()

    # ---- sections -> mappings -----------------------------------------------------------

    def _mappings(self, section: MemoryRegionSection) -> list[tuple[Mapping, memoryview]]:
        """What the kernel is to be told of a section (rules K1 to K3), and its memory."""
        region = section.region
        kind = region.kind
        if kind is RegionKind.ROM_DEVICE:
            if not region.romd_mode:
                return []
            readonly = True  # writes have to exit: they are for the device
        elif kind in (RegionKind.RAM, RegionKind.ROM):
            readonly = section.readonly
        else:
            return []
        if readonly and not self.readonly_memory:
            return []  # every access exits, and is right
        start = section.offset_within_address_space
        parts = pieces(start, section.size, self._max_slot)
        if not parts:
            return []
        memory: memoryview = region.block.view
        base = region.block.host_address + section.offset_within_region - start
        if base % PAGE_SIZE:
            if region.block.host_address % PAGE_SIZE:
                raise MemslotError(
                    errno.EINVAL,
                    f"{section!r}: its host memory at {region.block.host_address:#x} does not "
                    f"start on a page: use an mmap, or RamBlock.anonymous()",
                )
            return []  # an alias with a crooked offset: served by exits
        flags = kernel.MEM_READONLY if readonly else 0
        return [(Mapping(at, size, base + at, flags, region.name), memory) for at, size in parts]

    # ---- ioctls ---------------------------------------------------------------------------

    def _make(self, ops: list[SlotOp]) -> None:
        """Make the ioctls of a plan, all or none."""
        done: list[SlotOp] = []
        try:
            for op in ops:
                self._make_one(op, done)
        except BaseException:
            try:
                for op in reversed(done):
                    self._ioctl(op.inverse)
            except BaseException as error:
                self._torn = error
                raise
            raise

    def _make_one(self, op: SlotOp, done: list[SlotOp]) -> None:
        if op.kind == "MOVE":
            # Not every kernel moves slots (not with shadow paging and write
            # tracking, for one); a delete and a create always do.
            if self._moves:
                try:
                    self._ioctl(op)
                except MemslotError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._moves = False
                else:
                    done.append(op)
                    return
            self._make_one(SlotOp(op.old, None), done)
            op = SlotOp(None, op.new)
        self._ioctl(op)
        done.append(op)

    def _ioctl(self, op: SlotOp) -> None:
        try:
            self._vm.set_user_memory_region(*op.arguments())
        except OSError as error:
            raise self._explained(op, error) from error
        finally:
            self.ioctls += 1
        self._table.apply(op)

    def _explained(self, op: SlotOp, error: OSError) -> MemslotError:
        number = error.errno or errno.EIO
        text = f"KVM_SET_USER_MEMORY_REGION: {op}: {os.strerror(number)}"
        if op.new is not None:
            others = [
                str(each)
                for each in self._table.overlapping(op.new.mapping)
                if each.slot != op.slot
            ]
            if others:
                text += f"; it overlaps {', '.join(others)}"
        text += f"; {len(self._table)} of {self._table.limit} slots are in use"
        return MemslotError(number, text)


def _unsupported(what: str) -> KvmError:
    return KvmError(errno.ENOTSUP, f"{what} is not supported on KVM yet")
