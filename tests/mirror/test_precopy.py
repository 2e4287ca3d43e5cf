from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from memlistener import DirtyClient, MemorySystem, RamBlock
from memlistener.mirror import precopy
from memlistener.mirror.guest import PAGE
from memlistener.mirror.precopy import Comparison, Difference, Mirror

PAGES = 600  # more than is compared at a time
MEMORY = MemorySystem()  # in which nobody logs: blocks are marked by hand


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "ram.img", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def block() -> RamBlock:
    block = RamBlock.anonymous(PAGES * PAGE)
    for page in range(PAGES):
        block.view[page * PAGE] = page % 255 + 1
    return block


def write(block: RamBlock, offset: int, value: int) -> None:
    block.view[offset] = value
    block.mark_dirty(offset, 1, 1 << DirtyClient.MIGRATION)


async def test_first_round_copies_all(file: int, block: RamBlock) -> None:
    """The file was empty; now it is the memory."""
    mirror = Mirror(MEMORY, block, file, "ram.img")
    assert await mirror.round() == PAGES
    assert os.pread(file, block.size, 0) == block.view.tobytes()
    assert await mirror.compare() == Comparison(0, ())


async def test_next_rounds_copy_what_is_dirty(file: int, block: RamBlock) -> None:
    """And nothing else: what was written and not marked is what the comparison finds."""
    mirror = Mirror(MEMORY, block, file, "ram.img")
    await mirror.round()
    assert await mirror.round() == 0
    write(block, 3 * PAGE + 7, 0xAA)
    write(block, 599 * PAGE, 0xBB)
    block.view[400 * PAGE + 9] = 0xCC
    assert await mirror.round() == 2
    assert await mirror.compare() == Comparison(1, (Difference(400 * PAGE + 9, 0xCC, 0),))


async def test_comparison_counts_all_and_names_a_few(file: int, block: RamBlock) -> None:
    """Each differing page once, with its first byte that differs, in ascending order."""
    mirror = Mirror(MEMORY, block, file, "ram.img")
    await mirror.round()
    for page in (1, 2, 300, 599):
        block.view[page * PAGE + 0x10 : page * PAGE + 0x12] = b"\xee\xee"
    found = await mirror.compare()
    assert found.differing == 4
    assert [each.offset for each in found.first] == [page * PAGE + 0x10 for page in (1, 2, 300)]
    assert str(found.first[0]) == "at 0x1010 the RAM has 0xee and the file 0x00"


async def test_parts_are_taken_one_after_the_other(
    file: int, block: RamBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each when it is about to be copied; an end that is no multiple of them is copied too."""
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(precopy, "_TAKE", 256 * PAGE)
    block.when_taken(lambda offset, size: taken.append((offset // PAGE, size // PAGE)))
    mirror = Mirror(MEMORY, block, file, "ram.img")
    assert await mirror.round() == PAGES
    assert taken == [(0, 256), (256, 256), (512, 88)]
    assert (await mirror.compare()).differing == 0


async def test_a_cancelled_round_loses_nothing(file: int, block: RamBlock) -> None:
    """What was taken is in the file, whenever the cancellation came."""
    mirror = Mirror(MEMORY, block, file, "ram.img")
    with trio.CancelScope() as scope:
        block.when_taken(lambda offset, size: scope.cancel())
        await mirror.round()
    assert scope.cancel_called
    await mirror.round()
    assert (await mirror.compare()).differing == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
async def test_a_full_disk_is_named(block: RamBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's name is in the error, as if it could not have been opened."""
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: None)
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        mirror = Mirror(MEMORY, block, fd, "ram.img")
        with pytest.raises(OSError, match=r"No space left on device: 'ram\.img'"):
            await mirror.round()
    finally:
        os.close(fd)
