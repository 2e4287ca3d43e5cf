"""IOMMU notifiers: who is told of a mapping, replay, and a VFIO-like listener on top."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from memlistener import (
    AddressSpace,
    IommuAccess,
    IommuEvent,
    IommuNotifier,
    IommuNotifierFlag,
    IommuOps,
    IommuTlbEntry,
    ListenerError,
    MemoryListener,
    MemoryRegion,
    MemoryRegionSection,
    MemorySystem,
    MemTxAttrs,
    RegionError,
    RegionKind,
    TransactionError,
    notify_iommu,
    register_iommu_notifier,
    replay_iommu,
    unregister_iommu_notifier,
)
from tests.trees import examples

MAP, UNMAP = IommuNotifierFlag.MAP, IommuNotifierFlag.UNMAP
READ, WRITE = IommuAccess.READ, IommuAccess.WRITE
PAGE = 0x1000


class Iommu(IommuOps):
    """A page table whose owner tells of every change."""

    def __init__(self, size: int = 1 << 40) -> None:
        self.memory = MemorySystem()
        self.ram = MemoryRegion.ram("ram", 1 << 40)
        self.space = self.memory.create_address_space("memory", self.ram)
        self.pages: dict[int, IommuTlbEntry] = {}
        self.region = MemoryRegion.iommu("iommu", size, self)

    def page(self, iova: int, addr: int, size: int = PAGE) -> IommuTlbEntry:
        return IommuTlbEntry(self.space, addr, size - 1, READ | WRITE, iova)

    def translate(self, addr: int, access: IommuAccess, attrs: MemTxAttrs) -> IommuTlbEntry | None:
        return next(
            (
                each
                for each in self.pages.values()
                if each.iova <= addr <= each.iova | each.addr_mask
            ),
            None,
        )

    def put(self, entry: IommuTlbEntry) -> IommuEvent:
        self.pages[entry.iova] = entry
        return IommuEvent.map(entry)

    async def map(self, iova: int, addr: int, size: int = PAGE) -> None:
        await notify_iommu(self.region, self.put(self.page(iova, addr, size)))

    async def unmap(self, iova: int, size: int = PAGE) -> None:
        for each in [each for each in self.pages if iova <= each < iova + size]:
            del self.pages[each]
        await notify_iommu(self.region, IommuEvent.unmap(iova, size - 1))


class ReplayingIommu(Iommu):
    """One that knows what is mapped."""

    def replay(self, start: int, end: int) -> Any:
        return list(self.pages.values())


@pytest.fixture
def iommu() -> Iommu:
    return Iommu()


def collect(start: int = 0, end: int = 1 << 20, flags: IommuNotifierFlag = MAP | UNMAP) -> Any:
    """A notifier, and the list of what it is told."""
    heard: list[IommuEvent] = []
    return IommuNotifier(heard.append, start, end, flags), heard


# ---- registering ----------------------------------------------------------------------


def test_register(iommu: Iommu) -> None:
    """Once; and what is not registered cannot be unregistered."""
    notifier, _ = collect()
    register_iommu_notifier(iommu.region, notifier)
    with pytest.raises(ListenerError, match="registered already"):
        register_iommu_notifier(iommu.region, notifier)
    unregister_iommu_notifier(iommu.region, notifier)
    with pytest.raises(ListenerError, match="is not registered"):
        unregister_iommu_notifier(iommu.region, notifier)


async def test_not_an_iommu(iommu: Iommu) -> None:
    """Also an alias of one: its target is where to register."""
    notifier, _ = collect()
    alias = MemoryRegion.alias("alias", iommu.region, offset=0, size=0x1000)
    for region in (iommu.ram, alias):
        with pytest.raises(RegionError, match="is no IOMMU region"):
            register_iommu_notifier(region, notifier)
        with pytest.raises(RegionError, match="is no IOMMU region"):
            unregister_iommu_notifier(region, notifier)
        with pytest.raises(RegionError, match="is no IOMMU region"):
            await replay_iommu(region, notifier)
        with pytest.raises(RegionError, match="is no IOMMU region"):
            await notify_iommu(region, IommuEvent.unmap(0, 0xFFF))


async def test_past_the_end(iommu: Iommu) -> None:
    """A range is within the region."""
    notifier, _ = collect(0, (1 << 40) + 1)
    with pytest.raises(RegionError, match="reaches past the end"):
        register_iommu_notifier(iommu.region, notifier)
    with pytest.raises(RegionError, match="reaches past the end"):
        await replay_iommu(iommu.region, notifier)


def test_refused_by_the_owner() -> None:
    """An IOMMU that cannot tell of mappings says so when somebody asks for them."""

    class Blind(Iommu):
        def notify_flag_changed(self, old: IommuNotifierFlag, new: IommuNotifierFlag) -> None:
            if MAP in new:
                raise NotImplementedError("caching-mode is off")

    iommu = Blind()
    notifier, _ = collect()
    with pytest.raises(NotImplementedError, match="caching-mode"):
        register_iommu_notifier(iommu.region, notifier)
    with pytest.raises(ListenerError):
        unregister_iommu_notifier(iommu.region, notifier)
    register_iommu_notifier(iommu.region, collect(flags=UNMAP)[0])


# ---- notifying ------------------------------------------------------------------------


async def test_notify(iommu: Iommu) -> None:
    """Kinds and ranges match; events are cut to the range; plain and async alike."""
    both, heard = collect(0, 0x2000)
    maps, heard_maps = collect(0x1000, 0x4000, MAP)
    heard_async: list[IommuEvent] = []

    async def slowly(event: IommuEvent) -> None:
        await trio.lowlevel.checkpoint()
        heard_async.append(event)

    for each in (both, maps, IommuNotifier(slowly, 0x3000, 0x4000, UNMAP)):
        register_iommu_notifier(iommu.region, each)
    await iommu.map(0, 0x10000, 0x2000)
    await iommu.map(0x8000, 0)
    await iommu.unmap(0, 0x4000)
    assert heard == [
        IommuEvent.map(iommu.page(0, 0x10000, 0x2000)),
        IommuEvent.unmap(0, 0x1FFF),
    ]
    assert heard_maps == [IommuEvent.map(iommu.page(0x1000, 0x11000))]
    assert heard_async == [IommuEvent.unmap(0x3000, 0xFFF)]


async def test_order(iommu: Iommu) -> None:
    """They hear of an event one after the other, as they registered."""
    heard: list[str] = []
    for name in "abc":
        notifier = IommuNotifier(lambda _, name=name: heard.append(name), 0, 0x1000)  # type: ignore[misc]
        register_iommu_notifier(iommu.region, notifier)
    await iommu.unmap(0)
    assert heard == ["a", "b", "c"]


async def test_unregistered_meanwhile(iommu: Iommu) -> None:
    """Who has left hears nothing more, even of an event under way."""
    last, heard = collect()
    register_iommu_notifier(
        iommu.region,
        IommuNotifier(lambda _: unregister_iommu_notifier(iommu.region, last), 0, 0x1000),
    )
    register_iommu_notifier(iommu.region, last)
    await iommu.unmap(0)
    assert heard == []


async def test_one_raises(iommu: Iommu) -> None:
    """The others are told all the same, and its exception comes out as it is."""

    def fail(_: object) -> None:
        raise ZeroDivisionError

    notifier, heard = collect()
    register_iommu_notifier(iommu.region, IommuNotifier(fail, 0, 0x1000))
    register_iommu_notifier(iommu.region, notifier)
    with pytest.raises(ZeroDivisionError):
        await iommu.unmap(0)
    assert heard == [IommuEvent.unmap(0, 0xFFF)]
    register_iommu_notifier(iommu.region, IommuNotifier(fail, 0, 0x1000))
    with pytest.raises(ExceptionGroup, match=r"notifiers of .*'iommu'") as info:
        await iommu.unmap(0)
    assert [type(each) for each in info.value.exceptions] == [ZeroDivisionError] * 2
    assert len(heard) == 2


async def test_shielded(iommu: Iommu) -> None:
    """A cancelled owner has still told everybody: a lost UNMAP would be a hole."""
    heard: list[IommuEvent] = []

    async def slowly(event: IommuEvent) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(event)

    register_iommu_notifier(iommu.region, IommuNotifier(slowly, 0, 0x1000))
    with trio.CancelScope() as scope:
        scope.cancel()
        await iommu.unmap(0)
    assert heard == [IommuEvent.unmap(0, 0xFFF)]


async def test_no_checkpoint(iommu: Iommu) -> None:
    """Plain notifiers cost no trip through the event loop, nobody none at all."""
    with trio.testing.assert_no_checkpoints():
        await iommu.unmap(0)
        register_iommu_notifier(iommu.region, collect()[0])
        await iommu.unmap(0)


async def test_from_inside_a_notifier(iommu: Iommu) -> None:
    """Told while telling: refused, since the turn would never come."""

    async def again(_: object) -> None:
        await iommu.unmap(0)

    async def replay(_: object) -> None:
        await replay_iommu(iommu.region, collect()[0])

    for notify in (again, replay):
        notifier = IommuNotifier(notify, 0, 0x1000)
        register_iommu_notifier(iommu.region, notifier)
        with pytest.raises(TransactionError, match="is being told about"):
            await iommu.unmap(0)
        unregister_iommu_notifier(iommu.region, notifier)
    await iommu.unmap(0)


# ---- replay ---------------------------------------------------------------------------


async def test_replay_page_by_page(iommu: Iommu) -> None:
    """Without a replay of its own every page is asked for, and a large one told once."""
    iommu.put(iommu.page(0x1000, 0x5000))
    iommu.put(iommu.page(0x4000, 0x8000, 0x4000))
    iommu.put(iommu.page(0x9000, 0x6000))
    notifier, heard = collect(0x800, 0x7000)
    await replay_iommu(iommu.region, notifier)
    assert heard == [
        IommuEvent.map(iommu.page(0x1000, 0x5000)),
        IommuEvent.map(iommu.page(0x4000, 0x8000, 0x2000)),
        IommuEvent.map(iommu.page(0x6000, 0xA000)),
    ]


async def test_replay_asks_without_a_fault() -> None:
    """As in QEMU, access is NONE, and one question a page, wherever the range starts."""
    asked: list[tuple[int, IommuAccess]] = []

    async def translate(addr: int, access: IommuAccess, attrs: MemTxAttrs) -> None:
        asked.append((addr, access))

    region = MemoryRegion.iommu("iommu", 0x10000, translate)
    await replay_iommu(region, collect(0x1800, 0x4000)[0])
    assert asked == [(addr, IommuAccess.NONE) for addr in (0x1800, 0x2000, 0x3000)]


async def test_a_long_replay_gives_way() -> None:
    """Other tasks run, and cancelling works, while a million pages are asked for."""
    region = MemoryRegion.iommu("iommu", 1 << 32, lambda *_: None)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay_iommu, region, collect(0, 1 << 32)[0])
            await trio.lowlevel.checkpoint()
            scope.cancel()
    assert scope.cancelled_caught


async def test_too_many_pages(iommu: Iommu) -> None:
    """A range of 2**28 pages needs a replay of the owner's."""
    notifier, _ = collect(0, 1 << 40)
    with pytest.raises(RegionError, match="give the region an IommuOps with replay"):
        await replay_iommu(iommu.region, notifier)
    knowing = ReplayingIommu()
    knowing.put(knowing.page(0xFF00000000, 0))
    notifier, heard = collect(0, 1 << 40)
    await replay_iommu(knowing.region, notifier)
    assert heard == [IommuEvent.map(knowing.page(0xFF00000000, 0))]


async def test_replay_without_map(iommu: Iommu) -> None:
    """Who does not want to hear of mappings is told of none, whatever the range."""
    notifier, heard = collect(0, 1 << 40, UNMAP)
    await replay_iommu(iommu.region, notifier)
    assert heard == []


async def test_replay_in_every_form() -> None:
    """The owner's may be a list, a generator, an async one, or something to await."""

    class Forms(ReplayingIommu):
        form = "list"

        def replay(self, start: int, end: int) -> Any:
            return getattr(self, self.form)()

        def list(self) -> Any:
            return list(self.pages.values())

        def generator(self) -> Iterator[IommuTlbEntry]:
            yield from self.pages.values()

        async def async_generator(self) -> AsyncGenerator[IommuTlbEntry, None]:
            for each in self.pages.values():
                await trio.lowlevel.checkpoint()
                yield each

        async def awaitable(self) -> Any:
            await trio.lowlevel.checkpoint()
            return self.list()

    iommu = Forms()
    expected = [iommu.put(iommu.page(iova, 0x5000)) for iova in (0x3000, 0x1000)]
    iommu.put(iommu.page(1 << 30, 0))
    for iommu.form in ("list", "generator", "async_generator", "awaitable"):
        notifier, heard = collect()
        await replay_iommu(iommu.region, notifier)
        assert heard == expected, iommu.form


async def test_a_failing_notifier_closes_the_replay() -> None:
    """The owner's async generator is finished, and the region free for the next."""
    closed: list[bool] = []

    class Careful(Iommu):
        async def replay(self, start: int, end: int) -> Any:  # type: ignore[override]
            async def pages() -> AsyncGenerator[IommuTlbEntry, None]:
                try:
                    yield self.page(0, 0)
                finally:
                    closed.append(True)

            return pages()

    def fail(_: object) -> None:
        raise ZeroDivisionError

    iommu = Careful()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await replay_iommu(iommu.region, IommuNotifier(fail, 0, 0x1000))
    assert closed == [True, True]


async def test_replay_and_notify_take_turns() -> None:
    """A page that goes while it is being replayed is told of, then taken back."""
    iommu = ReplayingIommu()
    iommu.put(iommu.page(0, 0x5000))
    heard: list[IommuNotifierFlag] = []
    go = trio.Event()

    async def notify(event: IommuEvent) -> None:
        await go.wait()
        heard.append(event.kind)

    notifier = IommuNotifier(notify, 0, 0x1000)
    register_iommu_notifier(iommu.region, notifier)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replay_iommu, iommu.region, notifier)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(iommu.unmap, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert heard == []
        go.set()
    assert heard == [MAP, UNMAP]


# ---- a listener on top ----------------------------------------------------------------


class Shadow(MemoryListener):
    """What VFIO does: a copy of the mappings, in the addresses of the device."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[AddressSpace, int]] = {}
        self._notifiers: dict[MemoryRegionSection, IommuNotifier] = {}

    async def region_add(self, section: MemoryRegionSection) -> None:
        if section.region.kind is not RegionKind.IOMMU:
            return
        start = section.offset_within_region
        notifier = IommuNotifier(self._notify_for(section), start, start + section.size)
        register_iommu_notifier(section.region, notifier)
        try:
            await replay_iommu(section.region, notifier)
        except BaseException:
            unregister_iommu_notifier(section.region, notifier)
            raise
        self._notifiers[section] = notifier

    def region_del(self, section: MemoryRegionSection) -> None:
        notifier = self._notifiers.pop(section, None)
        if notifier is not None:
            unregister_iommu_notifier(section.region, notifier)
            self._forget(section.offset_within_address_space, section.size)

    def _notify_for(self, section: MemoryRegionSection) -> Callable[[IommuEvent], None]:
        shift = section.offset_within_address_space - section.offset_within_region

        def notify(event: IommuEvent) -> None:
            entry = event.entry
            size = entry.addr_mask + 1
            if event.kind is UNMAP:
                self._forget(entry.iova + shift, size)
                return
            assert entry.target_address_space is not None
            for offset in range(0, size, PAGE):
                self.pages[entry.iova + shift + offset] = (
                    entry.target_address_space,  # type: ignore[assignment]
                    entry.translated_addr + offset,
                )

        return notify

    def _forget(self, start: int, size: int) -> None:
        for addr in range(start, start + size, PAGE):
            self.pages.pop(addr, None)


async def test_shadow() -> None:
    """region_add registers and replays, region_del unregisters; a hidden part is not heard of."""
    iommu = ReplayingIommu(0x10000)
    space = iommu.space
    root = MemoryRegion.container("bus", 1 << 32)
    root.add_subregion(0x100000, iommu.region)
    window = MemoryRegion.reservation("msi", 0x1000)
    device = iommu.memory.create_address_space("device", root)
    iommu.put(iommu.page(0x2000, 0x8000, 0x2000))
    shadow = Shadow()
    await iommu.memory.register(shadow, device)
    assert shadow.pages == {0x102000: (space, 0x8000), 0x103000: (space, 0x9000)}
    await iommu.map(0x4000, 0)
    await iommu.unmap(0x2000, 0x2000)
    assert shadow.pages == {0x104000: (space, 0)}

    async with iommu.memory.transaction():
        root.add_subregion_overlap(0x104000, window, 1)
    assert shadow.pages == {}
    await iommu.map(0x4000, 0)
    await iommu.map(0x5000, 0x1000)
    assert shadow.pages == {0x105000: (space, 0x1000)}
    async with iommu.memory.transaction():
        window.set_enabled(False)
    assert shadow.pages == {0x104000: (space, 0), 0x105000: (space, 0x1000)}

    await iommu.memory.unregister(shadow)
    assert shadow.pages == {}
    await iommu.map(0x6000, 0)
    assert shadow.pages == {}


async def test_shadow_of_a_failed_transaction() -> None:
    """T13: a replay that fails takes the transaction with it, and the copy is as before."""

    class Failing(ReplayingIommu):
        fails = False

        def replay(self, start: int, end: int) -> Any:
            if self.fails and start:
                raise ZeroDivisionError
            return super().replay(start, end)

    iommu = Failing(0x4000)
    iommu.put(iommu.page(0x1000, 0x5000))
    device = iommu.memory.create_address_space("device", iommu.region)
    shadow = Shadow()
    await iommu.memory.register(shadow, device)
    before = dict(shadow.pages)
    assert before == {0x1000: (iommu.space, 0x5000)}
    iommu.fails = True
    with pytest.raises(ZeroDivisionError):
        async with iommu.memory.transaction():
            iommu.region.add_subregion(0x2000, MemoryRegion.reservation("hole", 0x1000))
    assert shadow.pages == before
    await iommu.map(0x3000, 0x6000)
    assert shadow.pages == {**before, 0x3000: (iommu.space, 0x6000)}


@given(st.data())
@examples(dev=60, ci=300)
async def test_shadow_against_a_naive_page_table(data: st.DataObject) -> None:
    """Whatever is mapped, unmapped, hidden and shown: the copy is what can be seen of the table."""
    iommu = data.draw(st.sampled_from([Iommu, ReplayingIommu]))(0x10000)
    root = MemoryRegion.container("bus", 1 << 32)
    root.add_subregion(0x8000, iommu.region)
    covers = [MemoryRegion.reservation(f"cover{n}", 0x3000) for n in range(2)]
    for cover in covers:
        cover.set_enabled(False)
        root.add_subregion_overlap(0x8000, cover, 1)
    device = iommu.memory.create_address_space("device", root)
    shadow = Shadow()
    await iommu.memory.register(shadow, device)
    naive: dict[int, int] = {}  # page number -> address
    numbers = st.integers(0, 15)
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["map", "unmap", "cover"]))
        if what == "cover":
            cover = data.draw(st.sampled_from(covers))
            async with iommu.memory.transaction():
                cover.set_enabled(data.draw(st.booleans()))
                cover.set_address(data.draw(numbers) * PAGE)
        else:
            count = data.draw(st.sampled_from([1, 2, 4, 16]))
            first = data.draw(numbers) // count * count
            for n in range(first, first + count):
                naive.pop(n, None)
            # As an IOMMU does: a large page that is partly unmapped is first made of small ones.
            for each in list(iommu.pages.values()):
                if (
                    each.iova < (first + count) * PAGE
                    and each.iova + each.addr_mask >= first * PAGE
                ):
                    del iommu.pages[each.iova]
                    for low, high in ((0, first * PAGE), ((first + count) * PAGE, 1 << 64)):
                        for piece in each.cropped(low, high):
                            iommu.put(piece)
            await iommu.unmap(first * PAGE, count * PAGE)
            if what == "map":
                addr = data.draw(numbers) * count * PAGE
                await iommu.map(first * PAGE, addr, count * PAGE)
                naive.update((first + n, addr + n * PAGE) for n in range(count))
        expected = {
            0x8000 + n * PAGE: (iommu.space, addr)
            for n, addr in naive.items()
            if (found := device.view.lookup(0x8000 + n * PAGE)) and found.region is iommu.region
        }
        assert shadow.pages == expected
