"""Copying memory to a file while it is written, and comparing the two."""

from __future__ import annotations

import os
from collections.abc import Iterable

import attrs
import trio

from memlistener import DirtyClient, MemorySystem, RamBlock
from memlistener.mirror.guest import PAGE

# What is taken at a time. With manual protection a page that was taken is protected
# from then on: what is copied last should not be so from the start.
_TAKE = 16 << 20
_CHUNK = 1 << 20  # what is read or written at a time
_SHOWN = 3  # pages that differ are named up to so many


@attrs.frozen
class Difference:
    """A page that is not the same.

    Attributes:
        offset: Of its first byte that differs, in the RAM and in the file.
        ram: That byte in the RAM.
        file: And in the file.
    """

    offset: int
    ram: int
    file: int

    def __str__(self) -> str:
        return f"at {self.offset:#x} the RAM has {self.ram:#04x} and the file {self.file:#04x}"


@attrs.frozen
class Comparison:
    """How the file compares with the RAM.

    Attributes:
        differing: How many pages are not the same.
        first: The first few of them.
    """

    differing: int
    first: tuple[Difference, ...]


class Mirror:
    """A file that follows a block of memory. Dirty logging has to be on.

    Args:
        memory: What logs.
        block: What is copied.
        fd: The file, open for reading and writing.
        name: What to call the file.
    """

    def __init__(self, memory: MemorySystem, block: RamBlock, fd: int, name: str) -> None:
        self._memory = memory
        self._block = block
        self._fd = fd
        self._name = name
        os.ftruncate(fd, block.size)
        # There is nothing in it yet: the first round copies all.
        block.mark_dirty(0, block.size, 1 << DirtyClient.MIGRATION)

    async def round(self) -> int:
        """Copy the pages that were written since they were copied last.

        Returns:
            How many.

        Raises:
            OSError: The file cannot be written.
        """
        await self._memory.dirty_log_sync()
        block, pages = self._block, 0
        for offset in range(0, block.size, _TAKE):
            # Who takes a page is the only one to know that it is to be copied.
            with trio.CancelScope(shield=True):
                taken = block.take_dirty(
                    DirtyClient.MIGRATION, offset, min(_TAKE, block.size - offset)
                )
                if taken:
                    await trio.to_thread.run_sync(self._write, taken)
            pages += taken.pages
        return pages

    async def compare(self) -> Comparison:
        """Compare every byte. Nobody must be writing."""
        return await trio.to_thread.run_sync(self._compare)

    def _write(self, ranges: Iterable[tuple[int, int]]) -> None:
        memory = self._block.view
        try:
            for offset, size in ranges:
                end = offset + size
                while offset < end:
                    part = memory[offset : min(end, offset + _CHUNK)]
                    offset += os.pwrite(self._fd, part, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from error

    def _compare(self) -> Comparison:
        differing = 0
        first: list[Difference] = []
        memory = self._block.view
        for offset in range(0, self._block.size, _CHUNK):
            ram = memory[offset : offset + _CHUNK].tobytes()
            file = os.pread(self._fd, _CHUNK, offset)
            if ram == file:
                continue
            for page in range(0, len(ram), PAGE):
                if ram[page : page + PAGE] != file[page : page + PAGE]:
                    differing += 1
                    if len(first) < _SHOWN:
                        at = next(at for at in range(page, len(ram)) if ram[at] != file[at])
                        first.append(Difference(offset + at, ram[at], file[at]))
        return Comparison(differing, tuple(first))
