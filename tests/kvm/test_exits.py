from __future__ import annotations

import pickle
import typing

import attrs
import pytest

from memlistener.kvm import exits
from memlistener.kvm.exits import FailEntry, Hlt, InternalError, Shutdown, Unsupported, VcpuExit

VALUES: list[VcpuExit] = [
    Hlt(),
    Shutdown(),
    InternalError(1, (1, 2), b"\x0f"),
    FailEntry(0x80000021, 3),
    exits.SystemEvent(2, (7,)),
    exits.Debug(),
    exits.Unknown(5),
    Unsupported(37),
]


def test_every_exit_is_in_the_union() -> None:
    """VcpuExit names each class of the module, and the list above has one of each."""
    union = set(typing.get_args(VcpuExit))
    classes = {each for each in vars(exits).values() if attrs.has(each)}
    assert union == classes == {type(each) for each in VALUES}


@pytest.mark.parametrize("value", VALUES)
def test_exits_are_values(value: VcpuExit) -> None:
    """Exits are frozen, hashable, comparable by content, and survive pickling."""
    copy = pickle.loads(pickle.dumps(value))
    assert copy == value
    assert hash(copy) == hash(value)
    assert [other for other in VALUES if other == value] == [value]
    for name in attrs.fields_dict(type(value)):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, name, None)


@pytest.mark.parametrize(
    ("suberror", "name"),
    [
        (1, "EMULATION"),
        (2, "SIMUL_EX"),
        (3, "DELIVERY_EV"),
        (4, "UNEXPECTED_EXIT_REASON"),
        (99, "suberror 99"),
    ],
)
def test_internal_error_names(suberror: int, name: str) -> None:
    """A suberror has the kernel's name, and an unknown one its number."""
    assert InternalError(suberror).name == name


def test_matching() -> None:
    """Exits are told apart with ``match``, by position or name."""
    match VALUES[3]:
        case FailEntry(reason, cpu=cpu):
            assert (reason, cpu) == (0x80000021, 3)
        case _:
            pytest.fail("no match")
