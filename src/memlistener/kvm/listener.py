"""`KvmMemoryListener`: an address space's changes -> memslots, in a bracket.

region_add and region_del queue; commit plans the ioctls and makes them. The
vCPUs are held from begin to commit (or as `KickPolicy` says), so that none of
them is in the guest while a slot that it uses is deleted and added again.

When an ioctl fails, the ones before it are taken back and the error leaves
commit *with the vCPUs still held*: the memory system now sends begin, the
inverse of the events, and commit, and only that commit lets the vCPUs go, onto
the map as it was. When even taking back fails, every further commit raises, and
they are never let go.

A slot logs writes while some client logs the range that it shows. Before a slot
that logs is deleted or moved, or stops to log, or logs for others, its dirty bits
are fetched onto the `RamBlock` behind it, inside the bracket (rule B12): no vCPU
writes between the fetch and the ioctl that loses the bits.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Iterable

import attrs
import trio

from memlistener.address_space import AddressSpace
from memlistener.bracket import Gate
from memlistener.core.dirty import DIRTY_PAGE_SIZE
from memlistener.core.kinds import RegionKind
from memlistener.errors import KvmError, MemslotError
from memlistener.histogram import Histogram
from memlistener.kvm import backend as kernel
from memlistener.kvm.dirty_bitmap import DirtyBitmapLog
from memlistener.kvm.dirty_log import DirtyLog, DirtyLogsOf, Logged
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
from memlistener.ram import RamBlock


@attrs.frozen
class _Backing:
    """The host memory behind a mapping: pinned for as long as there is this."""

    memory: memoryview
    block: RamBlock
    offset: int  # of the mapping's first byte


class KvmMemoryListener(MemoryListener):
    """Keeps a VM's memslots equal to the RAM and ROM of an address space.

    Args:
        vm: The VM's handle.
        gate: The gate that its vCPUs pass.
        policy: When to hold them.
        dirty_log: How dirty bits are fetched; None for KVM_GET_DIRTY_LOG.
        as_id: KVM's address space: 0, or 1 for what a vCPU sees in system
            management mode (KVM_CAP_MULTI_ADDRESS_SPACE).
        limit: How many slots the kernel has; None to ask it.
        max_slot: Most bytes in one slot.
        name: The address space's, for instruments.
    """

    priority = ListenerPriority.ACCEL

    def __init__(
        self,
        vm: kernel.VmHandle,
        gate: Gate,
        policy: KickPolicy = KickPolicy.EVERY_COMMIT,
        *,
        dirty_log: DirtyLog | None = None,
        as_id: int = 0,
        limit: int | None = None,
        max_slot: int = MAX_SLOT_BYTES,
        name: str = "memory",
    ) -> None:
        self._name = name
        self._vm = vm
        self._gate = gate
        self._policy = policy
        self._max_slot = max_slot
        if limit is None:
            limit = vm.check_extension(kernel.CAP_NR_MEMSLOTS) or 32  # KVM's old default
        self._table = SlotTable(limit, as_id)
        self.dirty_log = dirty_log or DirtyBitmapLog(vm, manual=False)
        self.dirty_log.when_overflowed(self._log_anew)
        self._clients: dict[Mapping, int] = {}  # who is to log which mapping
        self._reassigned: dict[Mapping, None] = {}  # that stay, and log for others
        self._logged: dict[int, Logged] = {}  # slot -> its log, as the kernel has it
        self.readonly_memory = bool(vm.check_extension(kernel.CAP_READONLY_MEM))
        # Section start -> its mappings: a ROM device's section has none in one
        # mode and some in the other, and region_del does not say which it was.
        self._mapped: dict[int, list[Mapping]] = {}
        self._removed: dict[Mapping, None] = {}
        self._added: dict[Mapping, None] = {}
        # Slots pin the memory behind them, until the kernel has let go of it.
        self._pins: dict[Mapping, _Backing] = {}
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
        # Which no log_start would say of a range that is new (rule T6). Nor is
        # log_global_stop said to who is not registered then (T8), so it is asked.
        memory = section.address_space.memory
        clients = section.region.dirty_log_mask | memory._dirty_log.clients
        mappings = self._mappings(section, clients)
        self._mapped[section.offset_within_address_space] = [each for each, _ in mappings]
        for each, backing in mappings:
            self._add_mapping(each, backing, clients)

    def _add_mapping(self, each: Mapping, backing: _Backing, clients: int) -> None:
        self._pins[each] = backing
        if each.flags & kernel.MEM_LOG_DIRTY_PAGES:
            self._clients[each] = clients
        if each in self._removed:
            del self._removed[each]
            self._reassigned[each] = None
        else:
            self._added[each] = None

    def region_del(self, section: MemoryRegionSection) -> None:
        """Queue the removal of the section's mappings."""
        if self._closing:
            return
        for each in self._mapped.pop(section.offset_within_address_space):
            self._remove_mapping(each)

    def _remove_mapping(self, each: Mapping) -> None:
        if each in self._added:  # of a commit that failed and is being undone
            del self._added[each]
            del self._pins[each]
            self._clients.pop(each, None)
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
        ending = self._ending(ops)
        if self._policy is KickPolicy.ON_OVERLAP and (ending or tears(ops)):
            await self._hold()
        if ending and not self._is_closing():
            self._fetch(ending)
            if self.dirty_log.overflowed:
                await self._hold()  # the policy may be to do without
                if not self._is_closing():
                    self.dirty_log.recover()
        if self._is_closing():  # the VM has, while we waited for its vCPUs
            self.release()
            return
        for logged in ending:
            # Under manual protection, what nobody has taken would be reported again:
            # to clients to come, too.
            self.dirty_log.clear(logged, 0, logged.pages)
        self._make(ops)
        for logged in self._reassigned_logs():
            if self._is_others(logged):
                self._follow(SlotOp(logged.memslot, logged.memslot))
        for each in self._removed:
            del self._pins[each]
            self._clients.pop(each, None)
        self._removed.clear()
        self._added.clear()
        self._reassigned.clear()
        self.release()

    def _is_closing(self) -> bool:
        """Asked again after an await."""
        return self._closing

    def _fetch(self, ending: list[Logged]) -> None:
        tell = self._gate.instruments.ioctl
        began = 0 if tell is None else time.perf_counter_ns()
        number = 0
        try:
            self.dirty_log.fetch(ending)
        except KvmError as error:
            number = error.errno or errno.EIO
            raise
        finally:
            if tell is not None:
                what = DirtyLogsOf(tuple(each.memslot for each in ending))
                tell(self.dirty_log.ioctl, what, began, time.perf_counter_ns(), number)

    @trio.lowlevel.enable_ki_protection
    async def empty_rings(self, full: kernel.VcpuHandle | None = None) -> None:
        """Fetch what is in the dirty rings.

        Args:
            full: The vCPU whose ring is full; None where nobody's has to be.

        Raises:
            KvmError: The kernel refuses.
        """
        if full is not None:
            self.dirty_log.full(full)
            if not self.dirty_log.overflowed:
                return
        # What vCPUs have not put there yet, they do when they come out.
        async with self._gate.holding("dirty log"):
            self.dirty_log.fetch(())
            if self.dirty_log.overflowed:
                self.dirty_log.recover()

    def _log_anew(self) -> None:
        """Turn the log of each slot that has one off and on: all its pages are protected."""
        for logged in tuple(self._logged.values()):
            slot = logged.memslot
            off = SlotOp(slot, Memslot(slot.slot, attrs.evolve(slot.mapping, flags=0)))
            try:
                self._make([off, off.inverse])
            except BaseException:
                if self._torn is not None:  # no transaction need notice: see that nobody runs
                    self._gate.hold_nowait("broken")
                raise
            finally:
                # In the middle of a commit it is not yet for those who are to log it.
                again = self._logged.get(slot.slot)
                if again is not None:
                    again.block, again.offset = logged.block, logged.offset
                    again.clients = logged.clients

    def _ending(self, ops: Iterable[SlotOp]) -> list[Logged]:
        """The logs whose bits would be lost, or become somebody else's (rule B12)."""
        found = {
            op.slot: self._logged[op.slot]
            for op in ops
            if op.slot in self._logged and not (op.kind == "FLAGS_ONLY" and _logs(op.new))
        }
        for each in self._reassigned_logs():
            if self._is_others(each):
                found[each.memslot.slot] = each
        return list(found.values())

    def _is_others(self, logged: Logged) -> bool:
        """Whether the slot is to log for other clients, or is other memory at the same place."""
        backing = self._pins[logged.memslot.mapping]
        return (logged.block, logged.offset, logged.clients) != (
            backing.block,
            backing.offset,
            self._clients[logged.memslot.mapping],
        )

    def _reassigned_logs(self) -> list[Logged]:
        return [each for mapping in self._reassigned for each in self._logged_at(mapping)]

    def _logged_at(self, mapping: Mapping) -> list[Logged]:
        """The log of the slot that is this mapping, if it is one and has one."""
        slot = self._table.at(mapping.guest_phys_addr)
        if slot is None or slot.mapping != mapping or slot.slot not in self._logged:
            return []
        return [self._logged[slot.slot]]

    # ---- dirty logging ----------------------------------------------------------------

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Queue that the section's mappings log, for the clients in ``new``."""
        self._set_clients(section, new)

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Queue that they log for the clients in ``new`` only, or not at all."""
        self._set_clients(section, new)

    def _set_clients(self, section: MemoryRegionSection, clients: int) -> None:
        if self._closing:
            return
        start = section.offset_within_address_space
        mappings = self._mapped.get(start, [])
        for number, old in enumerate(mappings):
            if old.flags & kernel.MEM_READONLY:
                continue  # the guest cannot write it
            new = attrs.evolve(old, flags=kernel.MEM_LOG_DIRTY_PAGES if clients else 0)
            if new == old:
                if clients:
                    self._clients[old] = clients
                    self._reassigned[old] = None
            else:
                mappings[number] = new
                backing = self._pins[old]
                self._remove_mapping(old)
                self._add_mapping(new, backing, clients)

    def log_clear(self, section: MemoryRegionSection) -> None:
        """The section's bits were taken: a write to its pages counts again."""
        start, end = section.offset_within_address_space, section.end
        whole = section.address_space.view.lookup(start)  # of which the section may be a part
        for mapping in () if whole is None else self._mapped.get(whole.start, ()):
            base = mapping.guest_phys_addr
            low, high = max(start - base, 0), min(end - base, mapping.memory_size)
            for each in self._logged_at(mapping) if low < high else ():
                self.dirty_log.clear(each, low // DIRTY_PAGE_SIZE, -(-high // DIRTY_PAGE_SIZE))

    def release(self) -> None:
        """Let the vCPUs go, if they are held."""
        if self._holding:
            self._holding = False
            self.stopped.add(time.perf_counter_ns() - self._stopped_at)
            self._gate.release()

    async def _hold(self) -> None:
        if not self._holding:  # after a failed commit they still are
            await self._gate.hold(self._name)
            if self._closing:  # meanwhile: nobody might tell us of an end
                self._gate.release()
                return
            self._stopped_at = time.perf_counter_ns()
            self._holding = True
            self.brackets += 1

    def detach(self, space: AddressSpace) -> None:
        """The VM closes: hear nothing any more. The slots go with its descriptor.

        What its guests wrote last is brought home first. Nobody can ask for it again, so
        a slot whose bits cannot be had counts as written, all of it. A bracket that another
        task's commit has begun ends here, since the end of that commit may not be told us.

        Raises:
            KvmError: The kernel does not give the dirty bits.
        """
        self._closing = True
        space.memory.forget(self, space)
        self.release()
        failed: list[OSError] = []
        for each in self._logged.values():
            try:
                self.dirty_log.fetch([each])
            except OSError as error:
                each.mark_all()
                failed.append(error)
        self._logged.clear()
        self._pins.clear()
        if failed:
            raise failed[0]

    # ---- sections -> mappings -----------------------------------------------------------

    def _mappings(
        self, section: MemoryRegionSection, clients: int
    ) -> list[tuple[Mapping, _Backing]]:
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
        block = region.block
        memory: memoryview = block.view
        base = block.host_address + section.offset_within_region - start
        if base % PAGE_SIZE:
            if block.host_address % PAGE_SIZE:
                raise MemslotError(
                    errno.EINVAL,
                    f"{section!r}: its host memory at {block.host_address:#x} does not "
                    f"start on a page: use an mmap, or RamBlock.anonymous()",
                )
            return []  # an alias with a crooked offset: served by exits
        logging = kernel.MEM_LOG_DIRTY_PAGES if clients else 0
        flags = kernel.MEM_READONLY if readonly else logging  # what no guest writes needs no log
        return [
            (
                Mapping(at, size, base + at, flags, region.name),
                _Backing(memory, block, base + at - block.host_address),
            )
            for at, size in parts
        ]

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
        tell = self._gate.instruments.ioctl
        began = 0 if tell is None else time.perf_counter_ns()
        number = 0
        try:
            self._vm.set_user_memory_region(*op.arguments())
        except OSError as error:
            number = error.errno or errno.EIO
            raise self._explained(op, error) from error
        finally:
            self.ioctls += 1
            if tell is not None:
                tell("KVM_SET_USER_MEMORY_REGION", op, began, time.perf_counter_ns(), number)
        self._table.apply(op)
        self._follow(op)

    def _follow(self, op: SlotOp) -> None:
        """The kernel has changed a slot: its log began, ended, moved or is somebody else's."""
        logged = self._logged.pop(op.slot, None)
        if logged is not None:
            self.dirty_log.removed(logged)
        if op.new is not None and _logs(op.new):
            backing = self._pins[op.new.mapping]
            clients = self._clients[op.new.mapping]
            logged = Logged(op.new, backing.block, backing.offset, clients)
            self._logged[op.slot] = logged
            self.dirty_log.added(logged)

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


class KvmRingMemoryListener(KvmMemoryListener):
    """The same with dirty rings, which know nothing of sections: all are emptied at once."""

    async def log_sync_global(self) -> None:
        """Empty the rings."""
        await self.empty_rings()


class KvmBitmapMemoryListener(KvmMemoryListener):
    """The same with a bitmap for each slot."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        """Fetch the bitmaps of the section's slots."""
        mappings = self._mapped.get(section.offset_within_address_space, ())
        self.dirty_log.fetch(each for one in mappings for each in self._logged_at(one))


def _logs(slot: Memslot | None) -> bool:
    return slot is not None and bool(slot.flags & kernel.MEM_LOG_DIRTY_PAGES)
