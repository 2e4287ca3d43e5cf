"""Live views of a vCPU's registers: ``vcpu.regs`` and ``vcpu.sregs``.

Every read asks the kernel and every write goes through to it, so that nothing
here can be out of date; to write several at once use ``update``, which is one
KVM_SET ioctl. The vCPU must not be running.

The names are those of ``struct kvm_regs``, ``kvm_sregs``, ``kvm_segment`` and
``kvm_dtable``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class RegisterAccess(Protocol):
    """What has registers: a `VcpuHandle`, or a vCPU made of one."""

    def get_regs(self) -> dict[str, int]:
        """``KVM_GET_REGS``."""
        ...

    def set_regs(self, regs: dict[str, int]) -> None:
        """``KVM_SET_REGS``."""
        ...

    def get_sregs(self) -> dict[str, Any]:
        """``KVM_GET_SREGS``."""
        ...

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        """``KVM_SET_SREGS``."""
        ...


# Widths in bits where they are not 64. KVM stores some of these in a whole byte, and quietly
# drops what does not fit the processor's own field.
_SEGMENT_BITS = {
    "limit": 32,
    "selector": 16,
    "type": 4,
    "dpl": 2,
    **dict.fromkeys(("present", "db", "s", "l", "g", "avl", "unusable"), 1),
}
_TABLE_BITS = {"limit": 16}
_NO_BITS: dict[str, int] = {}


class Regs:
    """The general registers (``struct kvm_regs``), ``rip`` and ``rflags``.

    >>> vcpu.regs.rip = 0x1000  # doctest: +SKIP
    >>> vcpu.regs.update(rax=1, rbx=2)  # doctest: +SKIP
    """

    __slots__ = ("_vcpu",)

    _vcpu: RegisterAccess

    def __init__(self, vcpu: RegisterAccess) -> None:
        object.__setattr__(self, "_vcpu", vcpu)

    def snapshot(self) -> dict[str, int]:
        """All registers, by name, in one ``KVM_GET_REGS``."""
        return self._vcpu.get_regs()

    def update(self, **registers: int) -> None:
        """Write several registers in one ``KVM_SET_REGS``.

        Raises:
            AttributeError: There is no such register; nothing is written.
            TypeError: A value is no integer.
            ValueError: A value is not in [0, 2**64).
        """
        values = self._vcpu.get_regs()
        _merge(values, registers, _NO_BITS, "register")
        self._vcpu.set_regs(values)

    def __getattr__(self, name: str) -> int:
        _refuse_private(name)
        values = self._vcpu.get_regs()
        _check_name(name, values, "register")
        return values[name]

    def __setattr__(self, name: str, value: int) -> None:
        _refuse_private(name)
        self.update(**{name: value})

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._vcpu.get_regs()]

    def __repr__(self) -> str:
        # No values: reading them is an ioctl, which waits while the vCPU runs.
        return f"<Regs of {self._vcpu!r}>"


class SregsPart:
    """A segment register or a descriptor table register within `Sregs`.

    Attributes are those of ``struct kvm_segment`` (base, limit, selector, type,
    present, dpl, db, s, l, g, avl, unusable) or ``kvm_dtable`` (base, limit).
    """

    __slots__ = ("_name", "_vcpu")

    _name: str
    _vcpu: RegisterAccess

    def __init__(self, vcpu: RegisterAccess, name: str) -> None:
        object.__setattr__(self, "_vcpu", vcpu)
        object.__setattr__(self, "_name", name)

    def snapshot(self) -> dict[str, int]:
        """All fields, by name."""
        part: dict[str, int] = self._vcpu.get_sregs()[self._name]
        return part

    def update(self, **fields: int) -> None:
        """Write several fields in one ``KVM_SET_SREGS``; raises as `Sregs.update` does."""
        Sregs(self._vcpu).update(**{self._name: fields})

    def __getattr__(self, name: str) -> int:
        _refuse_private(name)
        values = self.snapshot()
        _check_name(name, values, f"field of {self._name}")
        return values[name]

    def __setattr__(self, name: str, value: int) -> None:
        _refuse_private(name)
        self.update(**{name: value})

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self.snapshot()]

    def __repr__(self) -> str:
        return f"<Sregs.{self._name} of {self._vcpu!r}>"


class Sregs:
    """The system registers (``struct kvm_sregs``): segments, tables, control registers.

    >>> vcpu.sregs.cr0 |= 1  # doctest: +SKIP
    >>> vcpu.sregs.cs.base = 0  # doctest: +SKIP
    >>> vcpu.sregs.update(cr0=0x11, cs={"base": 0, "selector": 8})  # doctest: +SKIP
    """

    __slots__ = ("_vcpu",)

    _vcpu: RegisterAccess

    def __init__(self, vcpu: RegisterAccess) -> None:
        object.__setattr__(self, "_vcpu", vcpu)

    def snapshot(self) -> dict[str, Any]:
        """All of them, segments and tables as nested dicts, in one ``KVM_GET_SREGS``."""
        return self._vcpu.get_sregs()

    def update(self, **registers: Any) -> None:
        """Write several in one ``KVM_SET_SREGS``.

        A segment or a table takes a mapping of the fields to change (which may
        be another one's ``snapshot()``); ``interrupt_bitmap`` four integers.

        Raises:
            AttributeError: There is no such register or field; nothing is written.
            TypeError: A value is of the wrong type.
            ValueError: A value does not fit its field.
            KvmError: EINVAL when the processor could not be in such a state.
        """
        values = self._vcpu.get_sregs()
        for name, value in registers.items():
            _check_name(name, values, "system register")
            old = values[name]
            if isinstance(old, Mapping):
                if not isinstance(value, Mapping):
                    raise TypeError(f"{name} takes a mapping of its fields, not {value!r}")
                bits = _SEGMENT_BITS if "selector" in old else _TABLE_BITS
                part = dict(old)
                _merge(part, value, bits, f"field of {name}")
                values[name] = part
            elif isinstance(old, int):
                values[name] = _checked(name, value, 64)
            else:
                words = tuple(value)
                if len(words) != len(old):
                    raise ValueError(f"{name} takes {len(old)} integers, not {len(words)}")
                values[name] = tuple(_checked(name, word, 64) for word in words)
        self._vcpu.set_sregs(values)

    def __getattr__(self, name: str) -> Any:
        _refuse_private(name)
        values = self._vcpu.get_sregs()
        _check_name(name, values, "system register")
        value = values[name]
        return SregsPart(self._vcpu, name) if isinstance(value, Mapping) else value

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        self.update(**{name: value})

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._vcpu.get_sregs()]

    def __repr__(self) -> str:
        return f"<Sregs of {self._vcpu!r}>"


def _merge(
    values: dict[str, int], changes: Mapping[str, int], bits: Mapping[str, int], what: str
) -> None:
    for name, value in changes.items():
        _check_name(name, values, what)
        values[name] = _checked(name, value, bits.get(name, 64))


def _checked(name: str, value: object, bits: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} takes an integer, not {value!r}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} = {value:#x} is not in [0, {1 << bits:#x})")
    return value


def _check_name(name: str, values: Mapping[str, object], what: str) -> None:
    if name not in values:
        near = difflib.get_close_matches(name, values, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"no {what} is called {name!r}{hint}")


def _refuse_private(name: str) -> None:
    # Copying, pickling and inspecting look for many names, none of which is worth an ioctl.
    if name.startswith("_"):
        raise AttributeError(name)
