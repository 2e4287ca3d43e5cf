"""The names that others build on: they can be imported, and used as the documents say."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import memlistener
from memlistener import (
    AccessConstraints,
    AddressSpace,
    DirtyClient,
    FlatRange,
    FlatView,
    ListenerPriority,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemoryRegionSection,
    MemorySystem,
    MemTxAttrs,
    MemTxResult,
    RamBlock,
    kvm,
)
from memlistener.testing import FakeKvm, RecordingListener

# With an __init__ that lists what is public; the modules below are reached through them.
PACKAGES = ["memlistener", "memlistener.kvm", "memlistener.testing"]


class Uart(MemoryRegionOps):
    def __init__(self) -> None:
        self.sent = bytearray()

    def read(self, offset: int, size: int, attrs: MemTxAttrs) -> int:
        return 0x60

    def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        self.sent.append(value)


class MyListener(MemoryListener):
    priority = ListenerPriority.ACCEL

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.done: list[list[str]] = []

    async def begin(self) -> None:
        self.queue = []

    def region_add(self, section: MemoryRegionSection) -> None:
        self.queue.append(f"+{section.region.name}")

    def region_del(self, section: MemoryRegionSection) -> None:
        self.queue.append(f"-{section.region.name}")

    async def commit(self) -> None:
        self.done.append(self.queue)


async def test_the_first_example() -> None:
    """A tree, a view of it, a listener, a transaction, and accesses."""
    system = MemoryRegion.container("system", 1 << 64)
    ram = MemoryRegion.ram("ram", 128 << 20)
    window = MemoryRegion.alias("window", ram, offset=0x4000, size=0x1000)
    uart_ops = Uart()
    uart = MemoryRegion.io("uart", 8, uart_ops)
    assert list(FlatView.render(system)) == []

    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    listener = MyListener()
    await memory.register(listener, space)
    async with memory.transaction():
        system.add_subregion(0, ram)
        system.add_subregion_overlap(0xA0000, window, 1)
        system.add_subregion(0xFE000000, uart)
    assert listener.done == [[], ["+ram"] * 3 + ["+uart"]]
    assert space.view == FlatView.render(system)
    assert [(each.start, each.size, each.region, each.offset) for each in space.view] == [
        (0, 0xA0000, ram, 0),
        (0xA0000, 0x1000, ram, 0x4000),
        (0xA1000, (128 << 20) - 0xA1000, ram, 0xA1000),
        (0xFE000000, 8, uart, 0),
    ]
    found = space.view.lookup(0xA0010)
    assert isinstance(found, FlatRange)
    assert (found.region, found.offset) == (ram, 0x4000)
    await space.write(0xA0000, b"seen twice")
    assert await space.read(0x4000, 10) == b"seen twice"
    assert bytes(space.map(0x4005, 5)) == b"twice"
    assert await space.write(0xFE000000, b"!") is MemTxResult.OK
    assert uart_ops.sent == b"!"
    await memory.unregister(listener)
    assert listener.done[-1] == ["-ram"] * 3 + ["-uart"]


def test_every_constructor_and_attribute() -> None:
    """As design.md lists them; read-only, all of them."""
    ops = Uart()
    block = RamBlock.anonymous(0x1000)
    ram = MemoryRegion.ram("ram", 0x1000, block=block)
    regions = [
        MemoryRegion.container("container", 0x1000),
        ram,
        MemoryRegion.rom("rom", 0x1000, data=b"x"),
        MemoryRegion.rom_device("flash", 0x1000, ops, data=b"x"),
        MemoryRegion.io("io", 0x1000, ops),
        MemoryRegion.alias("alias", ram, offset=0x10, size=0x100),
        MemoryRegion.reservation("reservation", 0x1000),
        MemoryRegion.iommu("iommu", 0x1000, lambda addr, access, attrs: None),
    ]
    names = (
        *("name", "size", "addr", "container", "priority", "enabled", "readonly"),
        *("nonvolatile", "unmergeable", "romd_mode", "alias_target", "alias_offset"),
        *("subregions", "block"),
    )
    for region in regions:
        for name in names:
            value = getattr(region, name)
            with pytest.raises(AttributeError):
                setattr(region, name, value)
    assert ram.block is block
    assert regions[5].alias_target is ram
    assert regions[5].alias_offset == 0x10
    assert [each.readonly for each in regions] == [each.name == "rom" for each in regions]


def test_attributes_of_ranges_and_sections() -> None:
    """As design.md lists them."""
    root = MemoryRegion.container("root", 0x1000)
    rom = MemoryRegion.rom("rom", 0x800)
    root.add_subregion(0x100, rom)
    space = MemorySystem().create_address_space("memory", root)
    [each] = space.view
    assert (each.start, each.size, each.end, each.region, each.offset) == (
        *(0x100, 0x800, 0x900),
        rom,
        0,
    )
    assert (each.readonly, each.romd_mode, each.nonvolatile, each.unmergeable) == (
        *(True, True),
        *(False, False),
    )
    assert each.dirty_log_mask == 0
    section = MemoryRegionSection.of(space, each)
    assert (section.region, section.address_space) == (rom, space)
    assert (section.offset_within_region, section.offset_within_address_space) == (0, 0x100)
    assert (section.size, section.readonly) == (0x800, True)
    assert (section.nonvolatile, section.unmergeable) == (False, False)


def test_small_values() -> None:
    """The records and enumerations have what is documented of them."""
    assert AccessConstraints(min_access_size=4, max_access_size=4).unaligned is False
    assert {each.name for each in DirtyClient} == {"VGA", "CODE", "MIGRATION"}
    assert isinstance(MemTxAttrs(), MemTxAttrs)
    assert not MemTxResult.OK
    assert [each.name for each in ListenerPriority] == ["MIN", "ACCEL", "DEV_BACKEND"]
    assert inspect.isclass(AddressSpace)


async def test_the_kvm_example() -> None:
    """A VM over an address space, on the fake kernel; the guest halts."""
    system = MemoryRegion.container("system", 1 << 64)
    system.add_subregion(0, MemoryRegion.ram("ram", 0x10000))
    memory = MemorySystem()
    space = memory.create_address_space("memory", system)
    async with kvm.open_vm(
        space, io=None, policy=kvm.KickPolicy.EVERY_COMMIT, backend=FakeKvm()
    ) as vm:
        vcpu = await vm.create_vcpu()
        kvm.x86.real_mode(vcpu, entry=0x1000)
        assert vcpu.regs.rip == 0x1000
        reason = await vcpu.run()
        assert isinstance(reason, kvm.Hlt)
        async with vm.paused():
            pass
        assert len(vm.memslots) == 1
        assert vm.statistics().brackets >= 1
    assert callable(kvm.x86.protected_mode)
    assert callable(kvm.x86.long_mode)
    assert {each.name for each in kvm.KickPolicy} == {"EVERY_COMMIT", "ON_OVERLAP", "NEVER"}
    assert isinstance(bool(kvm.available()), bool)


def test_importing_the_package_loads_no_extension() -> None:
    """``import memlistener`` works where neither cffi nor the extension can be built."""
    program = (
        "import sys; sys.modules['cffi'] = sys.modules['_cffi_backend'] = None; "
        "import memlistener; "
        "print([name for name in sys.modules if name.endswith('._kvm')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


# ---- the lists of names, and the documentation of what they name -----------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_what_is_there(package: str) -> None:
    """__all__ has every public name, each once, in order, and none that is missing."""
    module = importlib.import_module(package)
    listed = module.__all__
    assert listed == sorted(listed)
    assert len(set(listed)) == len(listed)
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", package).startswith("memlistener")
    }
    assert defined
    assert defined <= set(listed)
    assert [name for name in listed if not hasattr(module, name)] == []


def test_version() -> None:
    """The version that the package says is a version."""
    numbers = memlistener.__version__.split(".")
    assert len(numbers) == 3
    assert all(each.isdigit() for each in numbers)


def _modules() -> Iterator[ModuleType]:
    yield memlistener
    for found in pkgutil.walk_packages(memlistener.__path__, "memlistener."):
        last = found.name.rpartition(".")[2]
        # Private, a script, or in need of what need not be installed.
        if last.startswith("_") or last == "cli" or found.name.startswith("memlistener.demo"):
            continue
        yield importlib.import_module(found.name)


def _public(owner: object, where: str) -> Iterator[tuple[str, object]]:
    """What ``owner`` defines that is public: (its dotted name, the object)."""
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__ == where:
            yield f"{where}.{value.__qualname__}", value


def test_everything_public_is_documented() -> None:
    """Modules, classes, functions, methods and properties have docstrings."""
    missing = []
    seen = 0
    for module in _modules():
        if not module.__doc__:
            missing.append(module.__name__)
        for name, value in _public(module, module.__name__):
            members = list(_public(value, module.__name__)) if inspect.isclass(value) else []
            for each, thing in [(name, value), *members]:
                seen += 1
                if not (getattr(thing, "__doc__", None) or "").strip():
                    missing.append(each)
    assert missing == []
    assert seen > 300


def test_a_recording_listener_is_a_listener() -> None:
    """The helpers of memlistener.testing are made of public names."""
    assert isinstance(RecordingListener(), MemoryListener)
