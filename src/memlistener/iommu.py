"""Telling those who keep a copy of an IOMMU's mappings what became of them.

The owner of an IOMMU region changes its page table, then awaits `notify_iommu`.
Whoever keeps a copy, as VFIO does in the host's own IOMMU, registers a notifier
for each section of the region that its address space shows, and begins with a
replay of what is mapped already:

    class Shadow(MemoryListener):
        def __init__(self):
            self.pages = {}  # address -> the page that is there
            self._notifiers = {}

        async def region_add(self, section):
            if section.region.kind is RegionKind.IOMMU:
                start = section.offset_within_region
                shift = section.offset_within_address_space - start

                def notify(event):
                    first = event.entry.iova + shift
                    if event.kind is IommuNotifierFlag.MAP:
                        self.pages[first] = event.entry
                    else:  # everything within it, which may be many pages
                        for addr in range(first, first + event.entry.addr_mask + 1, PAGE):
                            self.pages.pop(addr, None)

                notifier = IommuNotifier(notify, start, start + section.size)
                register_iommu_notifier(section.region, notifier)
                try:
                    await replay_iommu(section.region, notifier)
                except BaseException:
                    unregister_iommu_notifier(section.region, notifier)
                    raise
                self._notifiers[section] = notifier

        def region_del(self, section):
            notifier = self._notifiers.pop(section, None)
            if notifier is not None:
                unregister_iommu_notifier(section.region, notifier)
                ...  # and forget the pages within the section

Deliveries of one region, replays among them, take turns, in order of arrival.
So a copy ends up right where every change of the page table is followed by its
event: what a replay still tells of a page that is gone by then is taken back by
the event that waits behind it. A page may be told of twice.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator

import trio

from memlistener import dispatch
from memlistener.core.iommu import (
    Entries,
    Iommu,
    IommuAccess,
    IommuEvent,
    IommuNotifier,
    IommuNotifierFlag,
    IommuTlbEntry,
)
from memlistener.core.region import MemoryRegion
from memlistener.errors import RegionError, TransactionError

# How many pages of a replay are asked for before other tasks get their chance.
_STEPS = 1024


def register_iommu_notifier(region: MemoryRegion, notifier: IommuNotifier) -> None:
    """Hear of what is mapped and unmapped (``memory_region_register_iommu_notifier``).

    Follow it with `replay_iommu`, in this order.

    Raises:
        RegionError: ``region`` is no IOMMU region (of an alias, register with its
            target), or ``notifier`` reaches past its end.
        ListenerError: It is registered already.
        Exception: What the region's `IommuOps.notify_flag_changed` raises, in
            order to refuse.
    """
    _iommu_of(region, notifier).register(notifier)


def unregister_iommu_notifier(region: MemoryRegion, notifier: IommuNotifier) -> None:
    """Hear no more (``memory_region_unregister_iommu_notifier``).

    Takes effect at once, also on an event that others are just being told of.

    Raises:
        RegionError: ``region`` is no IOMMU region.
        ListenerError: ``notifier`` is not registered.
    """
    _iommu_of(region).unregister(notifier)


async def notify_iommu(region: MemoryRegion, event: IommuEvent) -> None:
    """Tell everybody concerned of an event (``memory_region_notify_iommu``).

    They hear it in the order in which they registered, cut to their ranges.
    Shielded from cancellation, and no checkpoint where nobody has to wait. One
    that raises does not keep it from the others; its exception comes out
    afterwards, those of several as an ``ExceptionGroup``.

    A notifier must not wait for a transaction, whose listeners may be waiting
    for their replay of the region.

    Raises:
        RegionError: ``region`` is no IOMMU region.
        TransactionError: Called by a notifier of the same region.
    """
    iommu = _iommu_of(region)
    if not iommu.notifiers:
        return
    errors: list[Exception] = []
    with trio.CancelScope(shield=True):
        turn = await _turn(region, iommu)
        try:
            for notifier, events in iommu.concerned(event):
                try:
                    for each in events:
                        if notifier in iommu.notifiers:
                            await _tell(notifier, each)
                except Exception as error:
                    errors.append(error)
        finally:
            turn.release()
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"notifiers of {region!r}", errors)


async def replay_iommu(region: MemoryRegion, notifier: IommuNotifier) -> None:
    """Tell one notifier of every page that is mapped (``memory_region_iommu_replay``).

    With `IommuOps.replay` if the region has that, else by asking for page after
    page. Does nothing where the notifier does not care for MAP. A cancelled
    replay has told a part.

    Raises:
        RegionError: ``region`` is no IOMMU region, ``notifier`` reaches past its
            end, or the pages are too many to be asked for.
        TransactionError: Called by a notifier of the same region.
    """
    iommu = _iommu_of(region, notifier)
    if IommuNotifierFlag.MAP not in notifier.flags:
        return
    turn = await _turn(region, iommu)
    try:
        replay = getattr(iommu.ops, "replay", None)
        found = None if replay is None else replay(notifier.start, notifier.end)
        if inspect.isawaitable(found):
            found = await found
        if found is None:
            iommu.check_steps(notifier)
            found = _step(region, iommu, notifier)
        async with contextlib.aclosing(_each(found)) as entries:
            async for entry in entries:
                for event in notifier.cropped(IommuEvent.map(entry)):
                    await _tell(notifier, event)
    finally:
        turn.release()


async def _each(entries: Entries) -> AsyncGenerator[IommuTlbEntry, None]:
    if isinstance(entries, AsyncGenerator):
        async with contextlib.aclosing(entries):
            async for entry in entries:
                yield entry
    else:
        for entry in entries:
            yield entry


async def _step(
    region: MemoryRegion, iommu: Iommu, notifier: IommuNotifier
) -> AsyncGenerator[IommuTlbEntry, None]:
    """What is mapped in the notifier's range, found out by asking for every page."""
    offset = notifier.start
    steps = 0
    while offset < notifier.end:
        entry = await dispatch.translate(region, offset, IommuAccess.NONE)
        if entry.perm:
            yield entry
        offset = iommu.step(entry)
        steps += 1
        if steps % _STEPS == 0:
            await trio.lowlevel.checkpoint()


async def _tell(notifier: IommuNotifier, event: IommuEvent) -> None:
    result = notifier.notify(event)
    if inspect.isawaitable(result):
        await result


async def _turn(region: MemoryRegion, iommu: Iommu) -> trio.Lock:
    """Wait for a region's earlier deliveries; release what is returned."""
    if iommu.turn is None:
        iommu.turn = trio.Lock()
    lock: trio.Lock = iommu.turn
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    except RuntimeError:
        raise TransactionError(
            f"{region!r} is being told about: one of its notifiers, in the same task, can "
            f"neither replay it nor notify others of it"
        ) from None
    return lock


def _iommu_of(region: MemoryRegion, notifier: IommuNotifier | None = None) -> Iommu:
    iommu = region._iommu
    if iommu is None:
        raise RegionError(f"{region!r} is no IOMMU region: it has nothing to notify of")
    if notifier is not None and notifier.end > region.size:
        raise RegionError(f"{notifier!r} reaches past the end of {region!r}")
    return iommu
