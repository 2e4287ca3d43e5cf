"""EventFd: signalled from anywhere, waited for in trio."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import trio
import trio.testing

from memlistener import EventFd
from memlistener.eventfd import descriptor, signal

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds are Linux's")


async def test_wait_takes_the_whole_count() -> None:
    """Signals add up until somebody waits, who gets them all; waiting is a checkpoint."""
    with EventFd(2) as eventfd:
        eventfd.signal()
        eventfd.signal(4)
        with trio.testing.assert_checkpoints():
            assert await eventfd.wait() == 7
        with trio.move_on_after(0) as scope:
            await eventfd.wait()
        assert scope.cancelled_caught


async def test_a_thread_wakes_who_waits() -> None:
    """A signal from another thread ends a wait that has begun."""
    with EventFd() as eventfd:
        counts = []

        async def wait() -> None:
            counts.append(await eventfd.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            thread = threading.Thread(target=eventfd.signal)
            thread.start()
        thread.join()
        assert counts == [1]


async def test_a_cancelled_wait_loses_nothing() -> None:
    """What was signalled is there for the next wait when one is cancelled."""
    with EventFd(3) as eventfd:
        with trio.CancelScope() as scope:
            scope.cancel()
            await eventfd.wait()
        assert scope.cancelled_caught
        assert await eventfd.wait() == 3


async def test_one_task_waits() -> None:
    """A second task is told so instead of taking the first one's count."""
    with EventFd() as eventfd:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eventfd.wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await eventfd.wait()
            nursery.cancel_scope.cancel()


async def test_closing_ends_a_wait() -> None:
    """Who waits is told, and who comes later is told."""
    eventfd = EventFd()
    fd = eventfd.fileno()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await eventfd.wait()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        eventfd.close()
    eventfd.close()
    assert eventfd.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(trio.ClosedResourceError):
        await eventfd.wait()
    with pytest.raises(ValueError, match="closed"):
        eventfd.signal()


def test_repr() -> None:
    """It says its descriptor, or that it is closed."""
    with EventFd() as eventfd:
        assert repr(eventfd) == f"<EventFd fd={eventfd.fileno():#x}>"
    assert repr(eventfd) == "<EventFd closed>"


def test_forgotten_ones_are_closed() -> None:
    """The descriptor goes with the object."""
    eventfd = EventFd()
    fd = eventfd.fileno()
    del eventfd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_not_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the error says so, and nothing else goes wrong."""
    monkeypatch.delattr(os, "eventfd")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotImplementedError, match="darwin"):
        EventFd()


def test_descriptors() -> None:
    """An int, or what fileno() says, which has to be one."""

    class Odd:
        def fileno(self) -> str:
            return "7"

    with EventFd() as eventfd:
        assert descriptor(eventfd) == descriptor(eventfd.fileno()) == eventfd.fileno()
    with pytest.raises(TypeError, match="returned '7'"):
        descriptor(Odd())


async def test_signal_is_the_kernels() -> None:
    """It adds 1, never blocks, and an eventfd at its end still wakes who waits."""
    with EventFd() as eventfd:
        signal(eventfd)
        signal(eventfd.fileno())
        assert await eventfd.wait() == 2
        eventfd.signal(2**64 - 2)
        signal(eventfd)
        assert await eventfd.wait() == 2**64 - 2
