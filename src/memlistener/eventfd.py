"""`EventFd`: a Linux eventfd that a trio task waits for; and signalling any eventfd.

What a region's `add_eventfd` takes is a file descriptor or anything with
``fileno()``, so a file descriptor from elsewhere (a vhost back end's, say) will
do as well. On KVM the kernel signals it, without an exit of the vCPU; for an
access that ends in user space, `dispatch` does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType
from typing import Any, Self

import trio

_ONE = (1).to_bytes(8, sys.byteorder)


class EventFd:
    """A counter in the kernel: signalling adds to it, waiting takes all of it.

    ::

        with EventFd() as doorbell:
            async with memory.transaction():
                device.add_eventfd(0x50, 4, doorbell)
            while True:
                await doorbell.wait()
                ...  # see what there is to do

    It is non-blocking. It belongs to nobody but you: take it off its regions
    before you close it.

    Args:
        count: What it starts with.

    Raises:
        NotImplementedError: Not on Linux.
    """

    __slots__ = ("__weakref__", "_fd", "_waiting")

    _fd: int

    def __init__(self, count: int = 0) -> None:
        self._fd = -1
        self._waiting = False
        if not hasattr(os, "eventfd"):
            raise NotImplementedError(f"eventfds are Linux's, and this is {sys.platform}")
        self._fd = os.eventfd(count, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The file descriptor.

        Raises:
            ValueError: It is closed.
        """
        if self._fd < 0:
            raise ValueError("the EventFd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def signal(self, count: int = 1) -> None:
        """Add to the counter. From any thread; never blocks.

        Raises:
            BlockingIOError: The counter, of 64 bits, is at its end.
            ValueError: It is closed.
        """
        os.eventfd_write(self.fileno(), count)

    @trio.lowlevel.enable_ki_protection
    async def wait(self) -> int:
        """Wait until it has been signalled; return how often, and start from 0 again.

        A checkpoint. By one task at a time.

        Raises:
            trio.ClosedResourceError: It is closed, or was meanwhile.
            trio.BusyResourceError: Another task waits.
        """
        if self._waiting:
            raise trio.BusyResourceError("another task waits for this EventFd")
        self._waiting = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            waited = False
            while True:
                if self._fd < 0:
                    raise trio.ClosedResourceError("the EventFd is closed")
                try:
                    count = os.eventfd_read(self._fd)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._fd)
                    waited = True
                    continue
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return count
        finally:
            self._waiting = False

    def close(self) -> None:
        """Close the descriptor; who waits gets `trio.ClosedResourceError`. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._waiting:
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"<EventFd {'closed' if self._fd < 0 else f'fd={self._fd:#x}'}>"


def descriptor(eventfd: Any) -> int:
    """The file descriptor that ``eventfd`` is or has.

    Raises:
        Exception: Whatever its ``fileno()`` raises.
        TypeError: That returns no int.
    """
    if isinstance(eventfd, int):
        return eventfd
    fd = eventfd.fileno()
    if not isinstance(fd, int):
        raise TypeError(f"fileno() of {eventfd!r} returned {fd!r}, which is no file descriptor")
    return fd


def signal(eventfd: Any) -> None:
    """Add 1 to any eventfd, as the kernel would. From any thread.

    Raises:
        OSError: It is not open.
    """
    with contextlib.suppress(BlockingIOError):  # at its end: who waits is woken all the same
        os.write(descriptor(eventfd), _ONE)
