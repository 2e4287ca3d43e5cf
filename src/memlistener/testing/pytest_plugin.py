"""Fixtures for tests of machines; pytest finds them when memlistener is installed.

======================  ========================================================
``memory_system``       a `MemorySystem`
``record``              ``await record(space)``: a `RecordingListener`, registered,
                        with what registering told it forgotten
``fake_kvm``            ``fake_kvm(script=...)``: a `FakeKvm`, closed after the test
``assert_flatview``     compare a view with a literal
``assert_trace``        compare what a listener heard with a literal
======================  ========================================================

pytest imports this module in every session where memlistener is installed, and with
it most of memlistener (not what needs Hypothesis or the KVM extension): about a third
of a second. ``-p no:memlistener`` does without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memlistener import AddressSpace, MemorySystem
    from memlistener.testing import FakeKvm, RecordingListener


@pytest.fixture
def memory_system() -> MemorySystem:
    """A `MemorySystem` of the test's own."""
    from memlistener import MemorySystem

    return MemorySystem()


@pytest.fixture
def record() -> Callable[[AddressSpace], Awaitable[RecordingListener]]:
    """Register a `RecordingListener` that starts with an empty record."""
    from memlistener.testing import RecordingListener

    async def register(space: AddressSpace, **options: Any) -> RecordingListener:
        listener = RecordingListener(**options)
        await space.memory.register(listener, space)
        listener.clear()
        return listener

    return register


@pytest.fixture
def fake_kvm() -> Iterator[Callable[..., FakeKvm]]:
    """Make a `FakeKvm`; it is closed when the test is over."""
    from memlistener.testing import FakeKvm

    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> FakeKvm:
            return stack.enter_context(contextlib.closing(FakeKvm(**options)))

        yield make


@pytest.fixture
def assert_flatview() -> Callable[[Any, str], None]:
    """`memlistener.testing.assert_flatview`."""
    from memlistener.testing import assert_flatview

    return assert_flatview


@pytest.fixture
def assert_trace() -> Callable[[Any, str], None]:
    """`memlistener.testing.assert_trace`."""
    from memlistener.testing import assert_trace

    return assert_trace
