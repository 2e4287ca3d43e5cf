"""IOMMU records: what they may be, how pages are cut, and who hears of what."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    FlatView,
    IommuAccess,
    IommuEvent,
    IommuNotifier,
    IommuNotifierFlag,
    IommuOps,
    IommuTlbEntry,
    ListenerError,
    MemoryRegion,
    RegionError,
    RegionTypeError,
)
from memlistener.core.iommu import MAX_REPLAY_STEPS, Iommu
from tests.trees import examples

MAP, UNMAP = IommuNotifierFlag.MAP, IommuNotifierFlag.UNMAP
NONE, READ, WRITE = IommuAccess.NONE, IommuAccess.READ, IommuAccess.WRITE
TOP = 1 << 64


class Space:
    """A target with nothing in it."""

    view = FlatView()


SPACE = Space()


def page(
    iova: int, addr: int, mask: int = 0xFFF, perm: IommuAccess = READ | WRITE
) -> IommuTlbEntry:
    return IommuTlbEntry(SPACE, addr, mask, perm, iova)


def ignore(event: IommuEvent) -> None:
    """A notifier that does not care."""


class TestIommuTlbEntry:
    @pytest.mark.parametrize("value", [page(0, 0), IommuEvent.map(page(0, 0))])
    def test_frozen(self, value: Any) -> None:
        """Entries and events can be kept and shared."""
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            value.perm = NONE

    @pytest.mark.parametrize("mask", [-1, 2, 0x1000, 0xFF0, TOP])
    def test_bad_masks(self, mask: int) -> None:
        """A mask is a page size less 1."""
        with pytest.raises(RegionError, match="addr_mask is a page size - 1, such as 0xfff, not"):
            page(0, 0, mask)

    @pytest.mark.parametrize("addr", [-1, TOP])
    def test_bad_addresses(self, addr: int) -> None:
        """Addresses have 64 bits."""
        with pytest.raises(RegionError, match="translated_addr is"):
            page(0, addr)
        with pytest.raises(RegionError, match="iova is"):
            page(addr, 0)

    @pytest.mark.parametrize("values", [("0", 0xFFF, READ), (0, None, READ), (0, 0xFFF, "r")])
    def test_bad_types(self, values: tuple[Any, Any, Any]) -> None:
        """What is no int, or no access, is told so."""
        with pytest.raises(RegionTypeError, match="is an"):
            IommuTlbEntry(SPACE, *values)

    def test_permission_without_a_target(self) -> None:
        """What may be read is somewhere."""
        with pytest.raises(RegionTypeError, match="has a target_address_space"):
            IommuTlbEntry(None, 0, 0xFFF, READ)

    def test_hex(self) -> None:
        """Addresses in a repr are hex."""
        assert "translated_addr=0x5000, addr_mask=0xfff" in repr(page(0x1000, 0x5000))

    def test_at_and_left(self) -> None:
        """The low bits come from the offset, as in QEMU, and not from translated_addr."""
        assert page(0, 0x5ABC).at(0x1234) == 0x5234
        assert page(0, 0x5ABC).left(0x1234) == 0xDCC
        everything = page(0, 0x1000, TOP - 1)
        assert everything.at(0x5678) == 0x5678
        assert everything.left(0) == TOP

    def test_cropped(self) -> None:
        """The part of a page within a range is made of pages, each aligned to its size."""
        entry = page(0x4000, 0x10000, 0x3FFF)
        assert list(entry.cropped(0, TOP)) == [entry]
        assert list(entry.cropped(0x5000, 0x8000)) == [
            page(0x5000, 0x11000, 0xFFF),
            page(0x6000, 0x12000, 0x1FFF),
        ]
        assert list(entry.cropped(0x8000, TOP)) == []
        assert list(entry.cropped(0, 0x4000)) == []
        assert list(page(0, 0, TOP - 1).cropped(0, 0x1800)) == [
            page(0, 0, 0xFFF),
            page(0x1000, 0x1000, 0x7FF),
        ]

    @given(st.data())
    @examples(dev=100, ci=600)
    def test_cropped_property(self, data: st.DataObject) -> None:
        """The pieces cover exactly the overlap, in order, aligned, and lead where the page does."""
        size = 1 << data.draw(st.integers(0, 12))
        iova, addr = (data.draw(st.integers(0, 8)) * size for _ in range(2))
        start = data.draw(st.integers(0, 9 * size))
        end = data.draw(st.integers(start, 10 * size))
        entry = page(iova, addr, size - 1)
        at = max(start, iova)
        for piece in entry.cropped(start, end):
            assert piece.iova == at
            assert piece.iova & piece.addr_mask == piece.translated_addr & piece.addr_mask == 0
            assert piece.translated_addr == entry.at(at)
            assert piece.perm is entry.perm
            at += piece.addr_mask + 1
        assert at == max(start, iova, min(end, iova + size))


class TestIommuEvent:
    def test_unmap(self) -> None:
        """What is unmapped allows nothing and is nowhere."""
        event = IommuEvent.unmap(0x2000, 0x1FFF)
        assert event == IommuEvent(UNMAP, IommuTlbEntry(None, 0, 0x1FFF, NONE, 0x2000))

    @pytest.mark.parametrize("kind", [MAP | UNMAP, IommuNotifierFlag(0), "map"])
    def test_bad_kinds(self, kind: Any) -> None:
        """An event is one thing."""
        with pytest.raises(RegionError, match="either MAP or UNMAP"):
            IommuEvent(kind, page(0, 0))

    def test_kind_and_permission(self) -> None:
        """QEMU asserts the one; the other would map nothing."""
        with pytest.raises(RegionError, match="an unmapped one nothing"):
            IommuEvent(UNMAP, page(0, 0))
        with pytest.raises(RegionError, match="a mapped page allows something"):
            IommuEvent(MAP, IommuTlbEntry.unmapped(0, 0xFFF))

    @pytest.mark.parametrize("entry", [page(0x1800, 0), page(0, 0x800)])
    def test_unaligned(self, entry: IommuTlbEntry) -> None:
        """An event is about whole pages."""
        with pytest.raises(RegionError, match=r"multiples of the page size, 0x1000"):
            IommuEvent.map(entry)


class TestIommuNotifier:
    @pytest.mark.parametrize(("start", "end"), [(0, 0), (2, 1), (-1, 1), (0, TOP + 1)])
    def test_bad_ranges(self, start: int, end: int) -> None:
        """A notifier's range is half-open and not empty."""
        with pytest.raises(RegionError, match="is no range of offsets"):
            IommuNotifier(ignore, start, end)

    def test_no_flags(self) -> None:
        """One that would hear nothing is a mistake."""
        with pytest.raises(RegionError, match="would hear nothing"):
            IommuNotifier(ignore, 0, 1, IommuNotifierFlag(0))

    def test_not_callable(self) -> None:
        """The range does not come first."""
        with pytest.raises(RegionTypeError, match="cannot be"):
            IommuNotifier(0, 0, 1)  # type: ignore[arg-type]

    def test_cropped(self) -> None:
        """Events of other kinds and other ranges are none of its business."""
        notifier = IommuNotifier(ignore, 0x1000, 0x2000, UNMAP)
        inside = IommuEvent.unmap(0x1000, 0xFFF)
        assert list(notifier.cropped(inside)) == [inside]
        assert list(notifier.cropped(IommuEvent.unmap(0, 0xFFFF))) == [inside]
        assert list(notifier.cropped(IommuEvent.unmap(0, 0xFFF))) == []
        assert list(notifier.cropped(IommuEvent.map(page(0x1000, 0)))) == []


class Flags(IommuOps):
    """Records what notify_flag_changed hears, and refuses MAP on demand."""

    def __init__(self) -> None:
        self.heard: list[tuple[IommuNotifierFlag, IommuNotifierFlag]] = []
        self.refuses = IommuNotifierFlag(0)

    def notify_flag_changed(self, old: IommuNotifierFlag, new: IommuNotifierFlag) -> None:
        if new & self.refuses:
            raise RuntimeError(f"no {new}")
        self.heard.append((old, new))


class TestIommu:
    def test_a_function(self) -> None:
        """A function is all that an IOMMU region needs."""

        def translate(*_: object) -> None: ...

        region = MemoryRegion.iommu("iommu", 0x1000, translate)
        assert region.translate is translate
        assert Iommu("iommu", translate).min_page_size == 4096

    def test_an_object(self) -> None:
        """Any object with a translate will do."""

        class Mine:
            min_page_size = 0x10000

            def translate(self, addr: int, *_: object) -> IommuTlbEntry:
                return page(0, addr)

        region = MemoryRegion.iommu("iommu", 0x1000, Mine())
        assert region.translate is not None
        assert Iommu("iommu", Mine()).min_page_size == 0x10000

    def test_the_base_class(self) -> None:
        """What is not overridden maps nothing, replays page by page and allows everything."""
        ops = IommuOps()
        assert ops.translate(0, READ, None) is None  # type: ignore[arg-type]
        assert ops.replay(0, 1) is None
        ops.notify_flag_changed(IommuNotifierFlag(0), MAP)

    @pytest.mark.parametrize("given", [None, 5, object()])
    def test_no_translation(self, given: Any) -> None:
        """What cannot translate is refused at once."""
        with pytest.raises(RegionTypeError, match=r"'iommu': .* is neither a translate function"):
            MemoryRegion.iommu("iommu", 0x1000, given)

    def test_async_notify_flag_changed(self) -> None:
        """Registering is plain, so this has to be."""

        class Wrong(IommuOps):
            async def notify_flag_changed(  # type: ignore[override]
                self, old: IommuNotifierFlag, new: IommuNotifierFlag
            ) -> None: ...

        with pytest.raises(RegionTypeError, match="has to be plain"):
            MemoryRegion.iommu("iommu", 0x1000, Wrong())

    @pytest.mark.parametrize("size", [0, -1, 3, "4096"])
    def test_bad_page_sizes(self, size: Any) -> None:
        """The smallest page is a power of two."""
        ops = IommuOps()
        ops.min_page_size = size
        with pytest.raises(RegionError, match="is a power of two, not"):
            _ = Iommu("iommu", ops).min_page_size

    def test_entry(self) -> None:
        """What a translation returns is brought into one form, aligned to its page."""
        iommu = Iommu("iommu", lambda *_: None)
        assert iommu.entry(0x1234, page(0, 0x5ABC)) == page(0x1000, 0x5000)
        assert iommu.entry(0x1234, (SPACE, 0x5ABC, 0xFFF, READ)) == page(0x1000, 0x5000, perm=READ)
        assert iommu.entry(0x1234, (SPACE, 0x5000, 0xFF, 3)) == page(0x1200, 0x5000, 0xFF)
        assert iommu.entry(0x1234, None) == IommuTlbEntry.unmapped(0x1000, 0xFFF)
        ready = page(0x1000, 0x5000)
        assert iommu.entry(0x1234, ready) is ready

    def test_an_unmapped_page_is_small(self) -> None:
        """QEMU's models answer "nothing" with the widest mask: it speaks for one page."""
        iommu = Iommu("iommu", lambda *_: None)
        assert iommu.entry(0x1234, IommuTlbEntry.unmapped(0, TOP - 1)).addr_mask == 0xFFF
        assert iommu.entry(0x1234, IommuTlbEntry.unmapped(0, 0xF)) == IommuTlbEntry.unmapped(
            0x1230, 0xF
        )

    @pytest.mark.parametrize("found", [5, (1, 2), "page"])
    def test_a_translation_that_is_none(self, found: object) -> None:
        """The error says where, and what came back."""
        with pytest.raises(RegionTypeError, match="translate of 0x1234 returned"):
            Iommu("iommu", lambda *_: None).entry(0x1234, found)

    def test_register(self) -> None:
        """In order, once each; unregistering what is not there is an error."""
        iommu = Iommu("iommu", lambda *_: None)
        one, two = (IommuNotifier(ignore, 0, 0x1000) for _ in range(2))
        iommu.register(one)
        iommu.register(two)
        assert list(iommu.notifiers) == [one, two]
        with pytest.raises(ListenerError, match="is registered already"):
            iommu.register(one)
        iommu.unregister(one)
        assert list(iommu.notifiers) == [two]
        with pytest.raises(ListenerError, match="is not registered"):
            iommu.unregister(one)

    def test_flags_changed(self) -> None:
        """The owner hears when the union of all flags changes, and only then."""
        ops = Flags()
        iommu = Iommu("iommu", ops)
        unmap, both, again = (
            IommuNotifier(ignore, 0, 1, flags) for flags in (UNMAP, MAP | UNMAP, MAP)
        )
        for each in (unmap, both, again):
            iommu.register(each)
        for each in (both, again, unmap):
            iommu.unregister(each)
        nothing = IommuNotifierFlag(0)
        assert ops.heard == [
            (nothing, UNMAP),
            (UNMAP, MAP | UNMAP),
            (MAP | UNMAP, UNMAP),
            (UNMAP, nothing),
        ]

    def test_flags_refused(self) -> None:
        """An owner that refuses leaves everything as it was."""
        ops = Flags()
        ops.refuses = MAP
        iommu = Iommu("iommu", ops)
        unmap, both = (IommuNotifier(ignore, 0, 1, flags) for flags in (UNMAP, MAP | UNMAP))
        iommu.register(unmap)
        with pytest.raises(RuntimeError, match="no IommuNotifierFlag"):
            iommu.register(both)
        assert iommu.notifiers == (unmap,)
        assert ops.heard == [(IommuNotifierFlag(0), UNMAP)]

    def test_concerned(self) -> None:
        """In the order of registration, each with its own part."""
        iommu = Iommu("iommu", lambda *_: None)
        low, high, other = (
            IommuNotifier(ignore, start, start + 0x1000) for start in (0, 0x1000, 0x2000)
        )
        for each in (high, other, low):
            iommu.register(each)
        assert iommu.concerned(IommuEvent.unmap(0, 0x1FFF)) == [
            (high, [IommuEvent.unmap(0x1000, 0xFFF)]),
            (low, [IommuEvent.unmap(0, 0xFFF)]),
        ]

    def test_check_steps(self) -> None:
        """2**52 pages are not walked silently."""
        iommu = Iommu("iommu", lambda *_: None)
        iommu.check_steps(IommuNotifier(ignore, 0, MAX_REPLAY_STEPS * 0x1000))
        with pytest.raises(RegionError, match=r"0x10000000000000 pages of 0x1000 bytes .*replay"):
            iommu.check_steps(IommuNotifier(ignore, 0, TOP))

    def test_step(self) -> None:
        """On to the next page; a page smaller than the smallest would be missed."""
        iommu = Iommu("iommu", lambda *_: None)
        assert iommu.step(page(0x1000, 0)) == 0x2000
        assert iommu.step(page(0x200000, 0, 0x1FFFFF)) == 0x400000
        assert iommu.step(IommuTlbEntry.unmapped(0x1000, 0xFF)) == 0x2000
        with pytest.raises(RegionError, match="min_page_size is 0x1000, but there is"):
            iommu.step(page(0x1000, 0, 0xFF))
