from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlistener.kvm.registers import Regs, Sregs
from tests.kvm.machine import Machine

SEGMENT = {
    **dict.fromkeys(("base", "limit", "selector", "type", "present", "dpl", "db"), 0),
    **dict.fromkeys(("s", "l", "g", "avl", "unusable"), 0),
}


class FakeVcpu:
    """Keeps registers as the kernel does, and counts the ioctls."""

    def __init__(self) -> None:
        self.values: dict[str, int] = dict.fromkeys(("rax", "rbx", "rsp", "rip", "rflags"), 0)
        self.system: dict[str, Any] = {
            "cs": dict(SEGMENT),
            "ds": dict(SEGMENT),
            "gdt": {"base": 0, "limit": 0},
            "cr0": 0x10,
            "efer": 0,
            "interrupt_bitmap": (0, 0, 0, 0),
        }
        self.calls: list[str] = []

    def __repr__(self) -> str:
        return "<FakeVcpu>"

    def get_regs(self) -> dict[str, int]:
        self.calls.append("get_regs")
        return dict(self.values)

    def set_regs(self, regs: dict[str, int]) -> None:
        self.calls.append("set_regs")
        assert regs.keys() == self.values.keys()
        self.values = dict(regs)

    def get_sregs(self) -> dict[str, Any]:
        self.calls.append("get_sregs")
        return copy.deepcopy(self.system)

    def set_sregs(self, sregs: dict[str, Any]) -> None:
        self.calls.append("set_sregs")
        assert sregs.keys() == self.system.keys()
        self.system = copy.deepcopy(sregs)


@pytest.fixture
def vcpu() -> FakeVcpu:
    return FakeVcpu()


def test_reads_are_live(vcpu: FakeVcpu) -> None:
    """Every read asks the vCPU again."""
    regs = Regs(vcpu)
    assert regs.rip == 0
    vcpu.values["rip"] = 0x1000
    assert regs.rip == 0x1000
    assert vcpu.calls == ["get_regs", "get_regs"]


def test_writes_go_through(vcpu: FakeVcpu) -> None:
    """A write reads the rest, and writes it all back."""
    vcpu.values["rbx"] = 7
    Regs(vcpu).rip = 0x1000
    assert vcpu.values["rip"] == 0x1000
    assert vcpu.values["rbx"] == 7
    assert vcpu.calls == ["get_regs", "set_regs"]


def test_update_is_one_ioctl(vcpu: FakeVcpu) -> None:
    """However many registers are updated, they are set once."""
    regs = Regs(vcpu)
    regs.update(rax=1, rbx=2, rip=3)
    assert vcpu.calls == ["get_regs", "set_regs"]
    assert regs.snapshot() == {"rax": 1, "rbx": 2, "rsp": 0, "rip": 3, "rflags": 0}


def test_arithmetic_on_a_register(vcpu: FakeVcpu) -> None:
    """An augmented assignment reads and writes."""
    regs, sregs = Regs(vcpu), Sregs(vcpu)
    regs.rsp += 8
    sregs.cr0 |= 1
    assert vcpu.values["rsp"] == 8
    assert vcpu.system["cr0"] == 0x11


@pytest.mark.parametrize("name", ["rpi", "RIP", "eip"])
def test_unknown_register(vcpu: FakeVcpu, name: str) -> None:
    """An unknown register is an AttributeError, and nothing is written."""
    regs = Regs(vcpu)
    with pytest.raises(AttributeError, match=f"no register is called '{name}'"):
        getattr(regs, name)
    with pytest.raises(AttributeError, match=name):
        setattr(regs, name, 1)
    with pytest.raises(AttributeError, match=name):
        regs.update(rax=1, **{name: 1})
    assert vcpu.values["rax"] == 0
    assert "set_regs" not in vcpu.calls


def test_near_match(vcpu: FakeVcpu) -> None:
    """A misspelt name is answered with the near one."""
    with pytest.raises(AttributeError, match=r"did you mean rflags\?"):
        _ = Regs(vcpu).rflag
    with pytest.raises(AttributeError, match=r"did you mean selector\?"):
        Sregs(vcpu).cs.slector = 1
    with pytest.raises(AttributeError, match=r"did you mean efer\?"):
        _ = Sregs(vcpu).eferr


@pytest.mark.parametrize("value", [-1, 1 << 64, -(1 << 64)])
def test_out_of_range(vcpu: FakeVcpu, value: int) -> None:
    """A value that is not 64 bits is refused, and shown in hex."""
    with pytest.raises(ValueError, match=f"rax = {value:#x} is not in \\[0, 0x10000000000000000"):
        Regs(vcpu).rax = value
    with pytest.raises(ValueError, match=f"cr0 = {value:#x}"):
        Sregs(vcpu).cr0 = value
    assert vcpu.values["rax"] == 0


@pytest.mark.parametrize("value", ["1", 1.0, None, True, b"\x01"])
def test_wrong_type(vcpu: FakeVcpu, value: Any) -> None:
    """What is no integer is refused, a bool too."""
    with pytest.raises(TypeError, match="rax takes an integer"):
        Regs(vcpu).rax = value
    with pytest.raises(TypeError, match="base takes an integer"):
        Sregs(vcpu).cs.base = value
    assert "set_regs" not in vcpu.calls
    assert "set_sregs" not in vcpu.calls


def test_segments_are_nested(vcpu: FakeVcpu) -> None:
    """A segment's fields are read and written through, each on its own."""
    sregs = Sregs(vcpu)
    sregs.cs.base = 0xF0000
    sregs.gdt.limit = 0x17
    assert sregs.cs.base == 0xF0000
    assert sregs.ds.base == 0
    assert vcpu.system["gdt"] == {"base": 0, "limit": 0x17}
    sregs.cs.update(selector=8, l=1)
    assert sregs.cs.snapshot() == {**SEGMENT, "base": 0xF0000, "selector": 8, "l": 1}


def test_a_segment_can_be_copied(vcpu: FakeVcpu) -> None:
    """A segment takes another one's snapshot."""
    sregs = Sregs(vcpu)
    sregs.cs.update(base=0x1000, limit=0xFFFF)
    sregs.ds = sregs.cs.snapshot()
    assert vcpu.system["ds"] == vcpu.system["cs"]


def test_sregs_update_is_one_ioctl(vcpu: FakeVcpu) -> None:
    """Control registers and parts of segments are set together, or not at all."""
    sregs = Sregs(vcpu)
    sregs.update(cr0=0x11, cs={"selector": 8}, interrupt_bitmap=[1, 2, 3, 4])
    assert vcpu.calls == ["get_sregs", "set_sregs"]
    assert vcpu.system["cs"] == {**SEGMENT, "selector": 8}
    assert sregs.interrupt_bitmap == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="selector = 0x10000"):
        sregs.update(cr0=0, cs={"selector": 0x10000})
    assert vcpu.system["cr0"] == 0x11


@pytest.mark.parametrize(
    ("field", "first_bad"),
    [("limit", 1 << 32), ("selector", 1 << 16), ("type", 16), ("dpl", 4), ("present", 2)],
)
def test_segment_fields_have_widths(vcpu: FakeVcpu, field: str, first_bad: int) -> None:
    """A segment's fields take what the processor's own do."""
    cs = Sregs(vcpu).cs
    setattr(cs, field, first_bad - 1)
    with pytest.raises(ValueError, match=f"{field} = {first_bad:#x} is not in"):
        setattr(cs, field, first_bad)


def test_table_limits_have_16_bits(vcpu: FakeVcpu) -> None:
    """A descriptor table's limit is narrower than a segment's."""
    gdt = Sregs(vcpu).gdt
    gdt.limit = 0xFFFF
    with pytest.raises(ValueError, match="limit = 0x10000"):
        gdt.limit = 0x10000


def test_wrong_shapes(vcpu: FakeVcpu) -> None:
    """A number for a segment, or too few words, is refused."""
    with pytest.raises(TypeError, match="cs takes a mapping"):
        Sregs(vcpu).cs = 1
    with pytest.raises(ValueError, match="interrupt_bitmap takes 4 integers, not 2"):
        Sregs(vcpu).interrupt_bitmap = (0, 0)


def test_looking_asks_nothing(vcpu: FakeVcpu) -> None:
    """repr, hasattr of private names and copying do not reach for the vCPU."""
    regs, sregs = Regs(vcpu), Sregs(vcpu)
    assert repr(regs) == "<Regs of <FakeVcpu>>"
    assert repr(sregs) == "<Sregs of <FakeVcpu>>"
    assert not hasattr(regs, "__array__")
    with pytest.raises(AttributeError):
        regs._rip = 1
    assert vcpu.calls == []
    assert repr(sregs.cs) == "<Sregs.cs of <FakeVcpu>>"


def test_dir_has_the_registers(vcpu: FakeVcpu) -> None:
    """Completion offers the registers beside the methods."""
    assert {"rip", "update", "snapshot"} <= set(dir(Regs(vcpu)))
    assert {"cs", "efer", "update"} <= set(dir(Sregs(vcpu)))
    assert {"base", "selector"} <= set(dir(Sregs(vcpu).cs))


@given(st.dictionaries(st.sampled_from(["rax", "rbx", "rip"]), st.integers(0, (1 << 64) - 1)))
def test_update_is_what_snapshot_shows(changes: dict[str, int]) -> None:
    """After an update the snapshot is the one before, with the changes."""
    regs = Regs(FakeVcpu())
    before = regs.snapshot()
    regs.update(**changes)
    assert regs.snapshot() == before | changes


@pytest.mark.kvm
def test_on_a_real_vcpu(machine: Machine) -> None:
    """The views work over a real vCPU's descriptor."""
    regs, sregs = Regs(machine.vcpu), Sregs(machine.vcpu)
    regs.update(rax=0x1234, rip=0x1000)
    assert (regs.rax, regs.rip) == (0x1234, 0x1000)
    assert len(regs.snapshot()) == 18
    sregs.cs.update(base=0, selector=0)
    assert (sregs.cs.base, sregs.cs.limit) == (0, 0xFFFF)
    sregs.gdt.limit = 0x17
    assert sregs.snapshot()["gdt"]["limit"] == 0x17
    with pytest.raises(AttributeError, match="did you mean"):
        _ = regs.rpi
