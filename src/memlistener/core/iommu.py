"""IOMMU regions: what a translation is, and who is told when one changes.

An IOMMU region shows another address space through pages that its owner maps
and unmaps at any time. The view knows nothing of that: to it the region is one
range. Whoever makes an access asks ``translate`` page by page
(`memlistener.dispatch`); whoever keeps a copy of the mappings, as VFIO and vhost
do, registers an `IommuNotifier` (`memlistener.iommu`).

Here is what needs no waiting: the records, their invariants, who is concerned by
an event, and how a page is cut to what somebody asked for.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs

from memlistener.core.kinds import LIMIT
from memlistener.core.ops import MemTxAttrs
from memlistener.errors import ListenerError, RegionError, RegionTypeError

if TYPE_CHECKING:
    from memlistener.core.flatview import FlatView

# Without a `IommuOps.replay` each page is asked for: 4 GiB in pages of 4 KiB, a second's work.
MAX_REPLAY_STEPS = 1 << 20


class IommuAccess(enum.Flag):
    """What an access wants, or a mapping allows (QEMU's ``IOMMUAccessFlags``)."""

    NONE = 0
    READ = 1
    WRITE = 2


class IommuNotifierFlag(enum.Flag):
    """What became of a page, or what somebody wants to know (``IOMMUNotifierFlag``)."""

    UNMAP = 1
    MAP = 2


class Target(Protocol):
    """What a translation leads to; `memlistener.AddressSpace` is one."""

    @property
    def view(self) -> FlatView:
        """What is there now."""
        ...


def _is_mask(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    if not isinstance(value, int):
        raise RegionTypeError(f"{attribute.name} is an int, not {value!r}")
    if not 0 <= value < LIMIT or value & (value + 1):
        raise RegionError(f"{attribute.name} is a page size - 1, such as 0xfff, not {value:#x}")


def _is_address(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    if not isinstance(value, int):
        raise RegionTypeError(f"{attribute.name} is an int, not {value!r}")
    if not 0 <= value < LIMIT:
        raise RegionError(f"{attribute.name} is {value:#x}: it must be from 0 to 2**64 - 1")


def _to_access(value: IommuAccess | int) -> IommuAccess:
    try:
        return IommuAccess(value)
    except ValueError:
        raise RegionTypeError(f"perm is an IommuAccess, not {value!r}") from None


@attrs.frozen
class IommuTlbEntry:
    """The translation of one page (QEMU's ``IOMMUTLBEntry``).

    Attributes:
        target_address_space: Where the page is; None only where ``perm`` is NONE.
        translated_addr: Its address there. The bits below the page size do not
            count in what a translate function returns.
        addr_mask: Its size in bytes, a power of two, less 1.
        perm: What it allows; NONE: not mapped.
        iova: The offset of its first byte in the IOMMU region. A translate
            function may leave it out.

    Raises:
        RegionError: A value is none of these.
    """

    target_address_space: Target | None
    translated_addr: int = attrs.field(validator=_is_address, repr=hex)
    addr_mask: int = attrs.field(validator=_is_mask, repr=hex)
    perm: IommuAccess = attrs.field(converter=_to_access)
    iova: int = attrs.field(default=0, validator=_is_address, repr=hex)

    def __attrs_post_init__(self) -> None:
        if self.perm and self.target_address_space is None:
            raise RegionTypeError(
                f"a page that allows {self.perm} has a target_address_space: {self!r}"
            )

    @classmethod
    def unmapped(cls, iova: int, addr_mask: int) -> IommuTlbEntry:
        """The page at ``iova`` is not there."""
        return cls(None, 0, addr_mask, IommuAccess.NONE, iova)

    def at(self, offset: int) -> int:
        """The address of the region's ``offset``, which is within the page, in the target."""
        return (self.translated_addr & ~self.addr_mask) | (offset & self.addr_mask)

    def left(self, offset: int) -> int:
        """How many bytes of the page there are from the region's ``offset`` on."""
        return self.addr_mask + 1 - (offset & self.addr_mask)

    def cropped(self, start: int, end: int) -> Iterator[IommuTlbEntry]:
        """The part that is within [start, end) of the region: pages again, ascending.

        Both ``iova`` and ``translated_addr`` have to be multiples of the page
        size; those of the pieces are multiples of theirs. (QEMU crops to one
        piece, whose ``addr_mask`` then is no mask.)
        """
        first = max(self.iova, start)
        last = min(self.iova + self.addr_mask + 1, end)
        if last - first == self.addr_mask + 1:
            yield self
            return
        while first < last:
            size = 1 << ((last - first).bit_length() - 1)
            if first:
                size = min(size, first & -first)
            addr = self.translated_addr + first - self.iova if self.perm else 0
            yield attrs.evolve(self, iova=first, translated_addr=addr, addr_mask=size - 1)
            first += size


@attrs.frozen
class IommuEvent:
    """A page was mapped or unmapped (QEMU's ``IOMMUTLBEvent``).

    Attributes:
        kind: `IommuNotifierFlag.MAP` or `IommuNotifierFlag.UNMAP`.
        entry: The page, with ``iova``; of an unmapped one ``perm`` is NONE.

    Raises:
        RegionError: ``kind`` and ``perm`` do not go together, or an address is
            not a multiple of the page size.
    """

    kind: IommuNotifierFlag
    entry: IommuTlbEntry

    def __attrs_post_init__(self) -> None:
        entry = self.entry
        if self.kind not in (IommuNotifierFlag.MAP, IommuNotifierFlag.UNMAP):
            raise RegionError(f"an event is either MAP or UNMAP, not {self.kind!r}")
        if bool(entry.perm) is not (self.kind is IommuNotifierFlag.MAP):
            raise RegionError(
                f"a mapped page allows something and an unmapped one nothing: {self!r}"
            )
        if (entry.iova | entry.translated_addr) & entry.addr_mask:
            raise RegionError(
                f"iova and translated_addr are multiples of the page size, "
                f"{entry.addr_mask + 1:#x}: {entry!r}"
            )

    @classmethod
    def map(cls, entry: IommuTlbEntry) -> IommuEvent:
        """``entry`` was mapped."""
        return cls(IommuNotifierFlag.MAP, entry)

    @classmethod
    def unmap(cls, iova: int, addr_mask: int) -> IommuEvent:
        """The page at ``iova``, or all pages that are within it, were unmapped."""
        return cls(IommuNotifierFlag.UNMAP, IommuTlbEntry.unmapped(iova, addr_mask))


@attrs.frozen(eq=False)
class IommuNotifier:
    """Somebody who wants to know what is mapped in a range (``IOMMUNotifier``).

    Attributes:
        notify: Called with an `IommuEvent` that is within the range; plain or
            ``async def``.
        start: First offset in the IOMMU region.
        end: One past the last (QEMU's is the last itself).
        flags: Of which kinds of event to hear.

    Raises:
        RegionError: The range is empty, or there is no flag.
    """

    notify: Callable[[IommuEvent], object]
    start: int = attrs.field(repr=hex)
    end: int = attrs.field(repr=hex)
    flags: IommuNotifierFlag = IommuNotifierFlag.MAP | IommuNotifierFlag.UNMAP

    def __attrs_post_init__(self) -> None:
        if not callable(self.notify):
            raise RegionTypeError(f"notify is called with an IommuEvent: {self.notify!r} cannot be")
        if not 0 <= self.start < self.end <= LIMIT:
            raise RegionError(f"[{self.start:#x}, {self.end:#x}) is no range of offsets")
        if not self.flags:
            raise RegionError(f"{self!r} would hear nothing: its flags are MAP, UNMAP or both")

    def cropped(self, event: IommuEvent) -> Iterator[IommuEvent]:
        """What of ``event`` concerns this notifier: events within its range, ascending."""
        if event.kind in self.flags:
            for entry in event.entry.cropped(self.start, self.end):
                yield event if entry is event.entry else IommuEvent(event.kind, entry)


# A function may return the tuple of the entry's first four, or None: not mapped.
Translation: TypeAlias = IommuTlbEntry | tuple[Target | None, int, int, IommuAccess] | None
Translate: TypeAlias = Callable[
    [int, IommuAccess, MemTxAttrs], Translation | Awaitable[Translation]
]


class Translates(Protocol):
    """An object with a ``translate``, such as an `IommuOps`."""

    def translate(
        self, addr: int, access: IommuAccess, attrs: MemTxAttrs, /
    ) -> Translation | Awaitable[Translation]:
        """See `IommuOps.translate`."""
        ...


Entries: TypeAlias = Iterable[IommuTlbEntry] | AsyncGenerator[IommuTlbEntry, None]


class IommuOps:
    """Base class for what is behind an IOMMU region (``IOMMUMemoryRegionClass``).

    Subclass it, or use any object with ``translate`` and what you need of the
    rest. Where there is nothing but a translation, a function is enough.

    Attributes:
        min_page_size: The smallest page in bytes, a power of two. A translation
            that finds nothing speaks for one page of this size.
    """

    min_page_size: int = 4096

    def translate(
        self, addr: int, access: IommuAccess, attrs: MemTxAttrs
    ) -> Translation | Awaitable[Translation]:
        """The page that ``addr``, an offset in the region, is on. Plain or ``async def``.

        Args:
            addr: Offset in the region, in bytes.
            access: READ or WRITE; NONE to learn what there is, without a fault.
            attrs: Who makes the access.

        Returns:
            The entry; its ``perm`` may lack ``access``, which refuses. None where
            nothing is mapped.
        """
        return None

    def replay(self, start: int, end: int) -> Entries | None:
        """The mapped pages that reach into [start, end): a list, or a generator of any kind.

        The page table may change while a notifier waits: a list, made at once,
        is right then too, since the event of the change comes afterwards.

        Returns:
            Entries with their ``iova``; None to have every page asked for.
        """
        return None

    def notify_flag_changed(self, old: IommuNotifierFlag, new: IommuNotifierFlag) -> None:
        """Of which events anybody hears has changed; raise to refuse a new notifier.

        An owner that learns of its mappings only by being asked, and so cannot
        tell anybody of a MAP, refuses here. Plain.
        """


class Iommu:
    """What an IOMMU region has that others do not.

    Attributes:
        ops: What its owner gave for it, a function wrapped.
        translate: The translation itself.
        notifiers: In the order in which they registered.
        turn: A lock of whoever delivers events, which keeps it here.
    """

    __slots__ = ("notifiers", "ops", "translate", "turn")

    def __init__(self, name: str, given: object) -> None:
        """Of the region ``name``, for errors."""
        self.ops = given if hasattr(given, "translate") else None
        found = getattr(given, "translate", given)
        if not callable(found):
            raise RegionTypeError(
                f"{name!r}: {given!r} is neither a translate function nor has one"
            )
        if inspect.iscoroutinefunction(getattr(given, "notify_flag_changed", None)):
            raise RegionTypeError(f"{name!r}: notify_flag_changed of {given!r} has to be plain")
        self.translate: Translate = found
        self.notifiers: tuple[IommuNotifier, ...] = ()
        self.turn: Any = None

    @property
    def min_page_size(self) -> int:
        """The smallest page in bytes."""
        size: object = getattr(self.ops, "min_page_size", IommuOps.min_page_size)
        if not isinstance(size, int) or size <= 0 or size & (size - 1):
            raise RegionError(f"min_page_size of {self.ops!r} is a power of two, not {size!r}")
        return size

    def entry(self, offset: int, found: object) -> IommuTlbEntry:
        """What a translation of ``offset`` returned, in the form that it ought to have.

        Raises:
            RegionTypeError: It is nothing of the kind.
        """
        if isinstance(found, tuple) and len(found) == 4:
            found = IommuTlbEntry(*found)
        if isinstance(found, IommuTlbEntry) and found.perm:
            iova = offset & ~found.addr_mask
            addr = found.at(iova)
            if iova == found.iova and addr == found.translated_addr:
                return found
            return attrs.evolve(found, iova=iova, translated_addr=addr)
        smallest = self.min_page_size - 1
        if isinstance(found, IommuTlbEntry):
            # QEMU's own models answer with the widest of masks where there is nothing.
            smallest = min(smallest, found.addr_mask)
        elif found is not None:
            raise RegionTypeError(
                f"translate of {offset:#x} returned {found!r}: it returns an IommuTlbEntry, or None"
            )
        return IommuTlbEntry.unmapped(offset & ~smallest, smallest)

    def register(self, notifier: IommuNotifier) -> None:
        """Add ``notifier``; what `notify_flag_changed` raises comes out, with nothing changed.

        Raises:
            ListenerError: It is here already.
        """
        if notifier in self.notifiers:
            raise ListenerError(f"{notifier!r} is registered already")
        self._set((*self.notifiers, notifier))

    def unregister(self, notifier: IommuNotifier) -> None:
        """Remove ``notifier``.

        Raises:
            ListenerError: It is not here.
        """
        if notifier not in self.notifiers:
            raise ListenerError(f"{notifier!r} is not registered")
        self._set(tuple(each for each in self.notifiers if each is not notifier))

    def _set(self, notifiers: tuple[IommuNotifier, ...]) -> None:
        before, self.notifiers = self.notifiers, notifiers
        old, new = _flags(before), _flags(notifiers)
        changed = getattr(self.ops, "notify_flag_changed", None)
        if old != new and changed is not None:
            try:
                changed(old, new)
            except BaseException:
                self.notifiers = before
                raise

    def concerned(self, event: IommuEvent) -> list[tuple[IommuNotifier, list[IommuEvent]]]:
        """Who is to hear what of ``event``."""
        found = [(each, list(each.cropped(event))) for each in self.notifiers]
        return [(each, events) for each, events in found if events]

    def check_steps(self, notifier: IommuNotifier) -> None:
        """Raise `RegionError` where asking for every page of a range would take forever."""
        steps = (notifier.end - notifier.start) // self.min_page_size
        if steps > MAX_REPLAY_STEPS:
            raise RegionError(
                f"to replay [{notifier.start:#x}, {notifier.end:#x}) {steps:#x} pages of "
                f"{self.min_page_size:#x} bytes would be asked for, more than "
                f"{MAX_REPLAY_STEPS:#x}: give the region an IommuOps with replay()"
            )

    def step(self, entry: IommuTlbEntry) -> int:
        """The offset at which to go on after ``entry``, when every page is asked for.

        Raises:
            RegionError: The entry is smaller than pages are said to be.
        """
        if entry.addr_mask + 1 < self.min_page_size and entry.perm:
            raise RegionError(f"min_page_size is {self.min_page_size:#x}, but there is {entry!r}")
        return entry.iova + max(entry.addr_mask + 1, self.min_page_size)


def _flags(notifiers: Iterable[IommuNotifier]) -> IommuNotifierFlag:
    flags = IommuNotifierFlag(0)
    for each in notifiers:
        flags |= each.flags
    return flags
