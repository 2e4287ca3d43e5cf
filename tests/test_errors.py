"""The hierarchy of errors."""

from __future__ import annotations

import inspect

import pytest

import memlistener
from memlistener import errors

EVERY = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
BUILT_IN = {
    errors.RegionError: ValueError,
    errors.RegionTypeError: TypeError,
    errors.TransactionError: RuntimeError,
    errors.ListenerError: ValueError,
    errors.UnassignedAccessError: LookupError,
    errors.BrokenMemoryError: RuntimeError,
    errors.RamInUseError: BufferError,
    errors.VcpuBusyError: RuntimeError,
    errors.KvmUnavailableError: OSError,
    errors.KvmError: OSError,
}


@pytest.mark.parametrize("error", EVERY)
def test_one_base(error: type[Exception]) -> None:
    """Catching MemlistenerError catches all, each is public and explained."""
    assert issubclass(error, errors.MemlistenerError)
    assert getattr(memlistener, error.__name__) is error
    assert error.__name__ in memlistener.__all__
    assert f"``{error.__name__}``" in (errors.__doc__ or "")
    assert error.__doc__


@pytest.mark.parametrize(("error", "built_in"), BUILT_IN.items())
def test_built_in_bases(error: type[Exception], built_in: type[Exception]) -> None:
    """Each is also what Python would raise, for those who know nothing of us."""
    assert issubclass(error, built_in)


def test_kvm_errors_carry_their_errno() -> None:
    """As any OSError does."""
    error = errors.MemslotError(22, "no")
    assert isinstance(error, errors.KvmError)
    assert error.errno == 22


def test_unavailable_is_not_a_refusal() -> None:
    """No KVM at all, and a KVM that says no, can be told apart."""
    assert not issubclass(errors.KvmUnavailableError, errors.KvmError)
    assert not issubclass(errors.KvmError, errors.KvmUnavailableError)
