"""Between the kernel's structs, as cffi shows them, and plain Python values."""

from __future__ import annotations

import struct
from typing import Any

from memlistener.kvm.bindings import Bindings
from memlistener.kvm.exits import (
    Debug,
    FailEntry,
    Hlt,
    InternalError,
    Shutdown,
    SystemEvent,
    Unknown,
    Unsupported,
    VcpuExit,
)


def terminal_exit(b: Bindings, run: Any) -> VcpuExit:
    """The exit in a ``struct kvm_run``, when it is neither MMIO nor PIO.

    Args:
        b: The bindings that ``run`` belongs to.
        run: A cffi ``struct kvm_run *``.
    """
    lib = b.lib
    match run.exit_reason:
        case lib.KVM_EXIT_HLT:
            return Hlt()
        case lib.KVM_EXIT_SHUTDOWN:
            return Shutdown()
        case lib.KVM_EXIT_INTERNAL_ERROR:
            return _internal_error(lib, run.internal)
        case lib.KVM_EXIT_FAIL_ENTRY:
            return FailEntry(lib.ml_fail_entry_reason(run), lib.ml_fail_entry_cpu(run))
        case lib.KVM_EXIT_SYSTEM_EVENT:
            data = b.ffi.new("uint64_t[16]")
            count = lib.ml_system_event_data(run, data)
            return SystemEvent(lib.ml_system_event_type(run), tuple(data[0:count]))
        case lib.KVM_EXIT_DEBUG:
            return Debug()
        case lib.KVM_EXIT_UNKNOWN:
            return Unknown(run.hw.hardware_exit_reason)
        case reason:
            return Unsupported(reason)


def _internal_error(lib: Any, internal: Any) -> InternalError:
    data = tuple(internal.data[0 : min(internal.ndata, len(internal.data))])
    instruction = b""
    # struct emulation_failure lies over data: flags, then a byte of size and 15 of code.
    if (
        internal.suberror == lib.KVM_INTERNAL_ERROR_EMULATION
        and len(data) >= 3
        and data[0] & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    ):
        size, code = struct.unpack("=B15s", struct.pack("=2Q", *data[1:3]))
        instruction = code[:size]
    return InternalError(internal.suberror, data, instruction)


def struct_to_dict(cdata: Any, ctype: Any) -> dict[str, Any]:
    """A struct's fields by name: integers, tuples of them, and dicts for structs within.

    Args:
        cdata: The struct, or a pointer to it.
        ctype: cffi's type of the struct.
    """
    values: dict[str, Any] = {}
    for name, field in _fields(ctype):
        value = getattr(cdata, name)
        if field.type.kind == "struct":
            value = struct_to_dict(value, field.type)
        elif field.type.kind == "array":
            value = tuple(value)
        values[name] = value
    return values


def dict_to_struct(cdata: Any, ctype: Any, values: dict[str, Any], where: str) -> None:
    """The inverse of `struct_to_dict`; every field must be given.

    Args:
        cdata: The struct to fill, or a pointer to it.
        ctype: cffi's type of the struct.
        values: The fields by name.
        where: What to call the struct in errors.

    Raises:
        ValueError: A field is missing, unknown, or does not fit.
        TypeError: A value is of the wrong type.
    """
    fields = _fields(ctype)
    wrong = values.keys() ^ {name for name, _ in fields}
    if wrong:
        told = (f"{'unknown' if name in values else 'missing'} {name}" for name in sorted(wrong))
        raise ValueError(f"{where}: {', '.join(told)}")
    for name, field in fields:
        value = values[name]
        if field.type.kind == "struct":
            dict_to_struct(getattr(cdata, name), field.type, value, f"{where}.{name}")
            continue
        try:
            setattr(cdata, name, value)
        except OverflowError:
            shown = hex(value) if isinstance(value, int) else repr(value)
            raise ValueError(f"{where}.{name} = {shown} does not fit {field.type.cname}") from None


def _fields(ctype: Any) -> list[tuple[str, Any]]:
    return [(name, field) for name, field in ctype.fields if name != "padding"]
