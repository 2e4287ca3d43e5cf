"""Dirty bits: fetching, merging and taking those of a guest of 64 GiB.

The kernel's part is left out where the guest would have to write gigabytes for a
sample: a handle in its place returns a bitmap with pages spread at random, as
KVM_GET_DIRTY_LOG would, and everything above it is real. What is measured is a
whole round of one client: fetch the bitmap, merge it into the block's, take it
as ranges. Beside it a copy of as many bytes, which is the least that any of the
three could be.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

from benchmarks.measure import Benchmarks, Figure, Settings, Skipped, figure, in_turns
from memlistener import DirtyClient, RamBlock, kvm
from memlistener.core.dirty import DIRTY_PAGE_SIZE
from memlistener.kvm import bindings
from memlistener.kvm.backend import MEM_LOG_DIRTY_PAGES
from memlistener.kvm.dirty_bitmap import DirtyBitmapLog
from memlistener.kvm.dirty_log import Logged
from memlistener.kvm.slots import Mapping, Memslot

_GIB = 1 << 30
_SHARES = (0.0, 0.0001, 0.01, 1.0)


class _Kernel:
    """A VM's handle, as far as a dirty log needs one."""

    def __init__(self, bitmap: bytes) -> None:
        self.bitmap = bitmap

    def get_dirty_log(self, slot: int, pages: int) -> bytearray:
        """The bitmap; the kernel would have copied it."""
        return bytearray(self.bitmap)


def _bitmap(pages: int, share: float) -> bytes:
    if share == 1:
        return b"\xff" * (pages // 8)
    chance = random.Random(1)
    bits = bytearray(pages // 8)
    for page in chance.sample(range(pages), int(pages * share)):
        bits[page >> 3] |= 1 << (page & 7)
    return bytes(bits)


def harvest(settings: Settings) -> list[Figure]:
    """A round of one client, at several shares of dirty pages."""
    with_c = bindings.missing() is None  # and from here on it is in use
    size = (1 if settings.quick else 64) * _GIB
    pages = size // DIRTY_PAGE_SIZE
    block = RamBlock.anonymous(size)
    slot = Memslot(0, Mapping(0, size, block.host_address, MEM_LOG_DIRTY_PAGES, "ram"))
    logged = Logged(slot, block, 0, 1 << DirtyClient.MIGRATION)
    nowhere = bytearray(pages // 8)
    figures = []
    for share in _SHARES:
        handle: Any = _Kernel(_bitmap(pages, share))
        log = DirtyBitmapLog(handle, manual=False)

        def copy(handle: _Kernel = handle) -> None:
            nowhere[:] = handle.bitmap

        def whole_round(log: DirtyBitmapLog = log) -> None:
            log.fetch([logged])
            block.take_dirty(DirtyClient.MIGRATION)

        def with_its_ranges(log: DirtyBitmapLog = log) -> None:
            log.fetch([logged])
            for _ in block.take_dirty(DirtyClient.MIGRATION):
                pass

        taken = in_turns(
            {"memcpy": copy, "round": whole_round, "ranges": with_its_ranges},
            settings.samples(100 if share != 0.01 else 50),
        )
        name = f"{100 * share:g} % dirty"
        for what, which in (
            ("memcpy of the bitmap", "memcpy"),
            ("fetch, merge, take", "round"),
            ("the same, and go through the ranges", "ranges"),
        ):
            speeds = [pages / 8 / each for each in taken[which]]  # bytes a nanosecond
            figures.append(
                Figure(
                    what=f"{what}, {name}",
                    n=pages,
                    unit="GB/s",
                    median=_median(speeds),
                    note="" if with_c else "without the C extension",
                )
            )
    return figures


def fetch(settings: Settings) -> list[Figure]:
    """What the kernel takes for KVM_GET_DIRTY_LOG of a slot in which nothing was written."""
    available = kvm.available()
    if not available:
        raise Skipped(str(available))
    from memlistener.kvm.fds import Kvm

    size = (1 if settings.quick else 64) * _GIB
    pages = size // DIRTY_PAGE_SIZE
    block = RamBlock.anonymous(size)
    pin = block.view  # the slot's, as long as the VM is there
    with Kvm.open() as device, contextlib.closing(device.create_vm()) as vm:
        try:
            vm.set_user_memory_region(0, MEM_LOG_DIRTY_PAGES, 0, size, block.host_address)
        except OSError as error:
            raise Skipped(f"a slot of {size // _GIB} GiB: {error}") from error
        samples = []
        for _ in range(settings.samples(50)):
            began = time.perf_counter_ns()
            vm.get_dirty_log(0, pages)
            samples.append(float(time.perf_counter_ns() - began))
    del pin
    return [figure("KVM_GET_DIRTY_LOG, nothing dirty", samples, n=pages)]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


BENCHMARKS: Benchmarks = {"harvest": harvest, "fetch": fetch}
