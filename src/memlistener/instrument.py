"""`Instrument`: somebody who watches brackets, ioctls and exits, and changes nothing.

Modelled on `trio.abc.Instrument`: override the hooks that you need. Which those
are is found out once, when the instrument is added, and a hook that nobody
overrides costs those who would call it one attribute that is None.

`Instruments` are the watchers of one VM. They hang on its `memlistener.bracket.Gate`,
which everything that has something to tell passes anyway.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

_log = logging.getLogger("memlistener.instrument")

Where: TypeAlias = Literal["thread", "trio"]
"""Who served an access, the vCPU's own thread or the task in ``vcpu.run()``."""


class Instrument:
    """Base class of what watches a VM: all hooks, none of which does anything.

    Times are those of `time.perf_counter_ns`, in ns, and all of one clock: they
    order what different threads did. vCPUs are named as in errors and warnings:
    ``"vcpu 0"``. Arguments are values; nothing that a hook does with them has
    consequences.

    A bracket is `begin`, `quiesced`, `resumed`, on trio's thread. They tell of the
    gate: holds nest, and only the outermost is a bracket. `quiesced` is missing
    where the task was cancelled while it waited.

    `exit` is called on the vCPU's thread, after it has left the gate, `served`
    there or on trio's thread, `kicked` on any. Those of one vCPU come one after
    the other, those of different ones at the same time. Hooks are plain
    functions, and quick: between `begin` and `resumed` the vCPUs wait for them.

    An instrument that raises is removed, and the error is logged with its
    traceback on the logger ``memlistener.instrument``. The VM goes on.
    """

    def begin(self, reason: str, at: int, waited: int) -> None:
        """The gate was closed: no vCPU enters the guest from now on.

        Args:
            reason: The address space whose map changes, ``"paused"`` for `Vm.paused
                <memlistener.kvm.Vm.paused>`, ``"dirty log"`` for the emptying of dirty
                rings, or ``"broken"`` for memory that broke.
            at: When.
            waited: How long before that, so that vCPUs had their turn (rule B14).
        """

    def kicked(self, vcpu: str, at: int) -> None:
        """A vCPU was told to leave the guest: for a bracket, or since its run was cancelled."""

    def quiesced(self, at: int, waited: int) -> None:
        """All vCPUs are outside the guest.

        Args:
            at: When.
            waited: How long that took from the first kick; 0 where none was inside.
        """

    def ioctl(self, name: str, what: object, began: int, ended: int, errno: int) -> None:
        """An ioctl that changes the VM's memory was made, or one that fetches dirty bits first.

        Args:
            name: ``"KVM_SET_USER_MEMORY_REGION"``; ``"KVM_GET_DIRTY_LOG"`` or
                ``"KVM_RESET_DIRTY_RINGS"`` where slots that log are about to change.
            what: A frozen value; its ``str()`` says which slot, where, and of which region.
            began: When it was made.
            ended: When it returned.
            errno: 0, or why it failed.
        """

    def resumed(self, at: int) -> None:
        """The gate was opened."""

    def exit(self, vcpu: str, reason: str, addr: int | None, entered: int, left: int) -> None:
        """A vCPU left the guest.

        Args:
            vcpu: Which.
            reason: ``"Mmio"``, ``"Io"``, the name of what ends the run (``"Hlt"``), that
                of an errno (``"EFAULT"``), or ``"kicked"`` where it had none of its own.
            addr: Of an access, its guest address or port.
            entered: When it had entered the guest.
            left: When it was outside, and had not said so to the gate yet.
        """

    def served(self, vcpu: str, where: Where, began: int, ended: int) -> None:
        """The access that the last `exit` of ``vcpu`` was for has been served.

        Not called where the device raised or the task was cancelled: the access is
        then served by the next run.
        """


_HOOKS = tuple(name for name, member in vars(Instrument).items() if inspect.isfunction(member))

Tell: TypeAlias = Callable[..., None]


class Instruments:
    """The instruments of one VM: for each hook None, or what tells all that override it.

    Call them as ``if (tell := instruments.kicked) is not None: tell(...)``. They
    never raise. On trio's thread they are to be called under KI protection: else
    the user's Ctrl-C would be taken for an instrument's error.
    """

    __slots__ = (
        "_all",
        "_mutex",
        "begin",
        "exit",
        "ioctl",
        "kicked",
        "quiesced",
        "resumed",
        "served",
    )

    begin: Tell | None
    kicked: Tell | None
    quiesced: Tell | None
    ioctl: Tell | None
    resumed: Tell | None
    exit: Tell | None
    served: Tell | None

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # an instrument may fail on any thread
        # By identity: those made with attrs or as dataclasses have no hash.
        self._all: dict[int, tuple[Instrument, dict[str, Tell]]] = {}
        self._find()

    def add(self, instrument: Instrument) -> None:
        """Tell it, too. Nothing happens where it is told already.

        Raises:
            TypeError: It is no `Instrument`, or has a hook that is ``async``.
        """
        overridden = _overridden(instrument)
        with self._mutex:
            self._all.setdefault(id(instrument), (instrument, overridden))
            self._find()

    def remove(self, instrument: Instrument) -> None:
        """Tell it nothing more; what is being told on another thread still comes.

        Raises:
            KeyError: It is not there.
        """
        with self._mutex:
            if id(instrument) not in self._all:
                raise KeyError(
                    f"{instrument!r} is no instrument of this VM: it was not added, or has been "
                    f"removed since, by you or because it raised"
                )
            del self._all[id(instrument)]
            self._find()

    def _find(self) -> None:
        """Find out again who overrides what."""
        for name in _HOOKS:
            calls = tuple((i, hooks[name]) for i, hooks in self._all.values() if name in hooks)
            setattr(self, name, self._teller(name, calls) if calls else None)

    def _teller(self, name: str, calls: tuple[tuple[Instrument, Tell], ...]) -> Tell:
        def tell(*args: object) -> None:
            for instrument, call in calls:
                try:
                    call(*args)
                except BaseException as error:
                    self._failed(instrument, name, error)

        return tell

    def _failed(self, instrument: Instrument, name: str, error: BaseException) -> None:
        with self._mutex:
            self._all.pop(id(instrument), None)  # another thread may have been quicker
            self._find()
        _log.error("%r raised in %s() and is removed", instrument, name, exc_info=error)


def _overridden(instrument: Any) -> dict[str, Tell]:
    """The hooks that ``instrument`` overrides, by name."""
    if not isinstance(instrument, Instrument):
        raise TypeError(f"an instrument is a memlistener.Instrument, not {instrument!r}")
    found = {}
    for name in _HOOKS:
        call = getattr(instrument, name)
        if getattr(call, "__func__", call) is not getattr(Instrument, name):
            if inspect.iscoroutinefunction(call):
                raise TypeError(
                    f"{name}() of {instrument!r} is async: nobody would await it, since it is "
                    f"called on threads; make it a plain function"
                )
            found[name] = call
    return found
