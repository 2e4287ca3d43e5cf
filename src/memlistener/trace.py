"""`TraceInstrument`: what a VM did, as a file that https://ui.perfetto.dev opens.

The format is Chrome's trace event format, as an array with an event a line:
each a JSON object with a name, a phase (``X`` a span, ``i`` an instant, ``M``
metadata), a track (``tid``) and a time in us, to the ns. A viewer takes spans
that lie in one another on one track for nested, in whatever order they come.

Events wait in a queue and are written in small batches by whoever finds enough
of them: a vCPU that is outside the guest, or trio's thread once a bracket is
over. In between it is kept short, since the vCPUs wait.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self, TextIO

import attrs

from memlistener.instrument import Instrument, Where

# So many events are written at once: 0.1 ms of work.
_BATCH = 32
# With so many, they are also written between the ioctls of a bracket.
_MOST = 4096
_PID = 1
_BRACKETS = 1  # the track of the brackets, and then the vCPUs'; viewers take 0 for an idle CPU

_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

Event = dict[str, Any]


@attrs.define
class _Track:
    """A vCPU's, with the access that may be served next."""

    tid: int
    access: str = ""
    addr: str = ""


class TraceInstrument(Instrument):
    """Writes a trace of one VM, until it is closed.

    Each vCPU has a track: spans ``guest``, with the exit that ended them, spans for
    the accesses that were served, instants for kicks and for exits without an access.
    Another one has the brackets: a span from the closing of the gate to its
    opening, in it the wait for the vCPUs, the ioctls, and the resume as an instant.

    ::

        with open("trace.json", "w") as file, TraceInstrument(file) as trace:
            async with kvm.open_vm(space, instruments=[trace]) as vm:
                ...

    Close it after the VM, so that it hears of the last exits. Until it is closed
    the array has no end, which viewers put up with. Where ``file`` cannot be
    written any more, the instrument is removed as one that raises, and `close`
    raises.

    Args:
        file: Where to; open for writing text. Stays open.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._events: deque[Event] = deque()
        self._writing = threading.Lock()
        self._closed = False
        self._tracks: dict[str, _Track] = {}
        self._making_track = threading.Lock()
        self._bracket: tuple[str, int] | None = None  # under way: why, and since when
        self._resumed_at = 0
        file.write("[\n" + _encode(_metadata("process_name", _BRACKETS, "memlistener")))
        self._add(_metadata("thread_name", _BRACKETS, "brackets"))
        self._add(_metadata("thread_sort_index", _BRACKETS, _BRACKETS))

    # ---- the bracket ----------------------------------------------------------------

    def begin(self, reason: str, at: int, waited: int) -> None:
        """A bracket, and the vCPUs' turn before it (rule B14)."""
        if waited:
            # Another bracket may have come and gone since it began to wait.
            turn = max(at - waited, self._resumed_at)
            self._add(_span("vCPUs have their turn", _BRACKETS, turn, at))
        self._bracket = reason, at

    def quiesced(self, at: int, waited: int) -> None:
        """The wait for the vCPUs."""
        if waited:
            self._add(_span("wait for the vCPUs", _BRACKETS, at - waited, at))

    def ioctl(self, name: str, what: object, began: int, ended: int, errno: int) -> None:
        """An ioctl, inside a bracket if there is one."""
        args = {"what": what}
        if errno:
            args["errno"] = os.strerror(errno)
        self._add(_span(name, _BRACKETS, began, ended, args))
        self._write_if(_BATCH if self._bracket is None else _MOST)

    def resumed(self, at: int) -> None:
        """The end of a bracket."""
        self._resumed_at = at
        self._end_bracket(at)
        self._add(_instant("resume", _BRACKETS, at))
        self._write_if(_BATCH)

    def _end_bracket(self, at: int) -> None:
        if self._bracket is not None:  # None: it was under way when this was added
            reason, began = self._bracket
            self._bracket = None
            self._add(_span(f"bracket: {reason}", _BRACKETS, began, at))

    # ---- vCPUs ----------------------------------------------------------------------

    def kicked(self, vcpu: str, at: int) -> None:
        """An instant on the vCPU's track."""
        self._add(_instant("kick", self._track(vcpu).tid, at))

    def exit(self, vcpu: str, reason: str, addr: int | None, entered: int, left: int) -> None:
        """The time inside the guest; an instant where no access is to be served."""
        track = self._track(vcpu)
        args = {"exit": reason}
        if addr is None:
            self._add(_instant(reason, track.tid, left))
        else:
            track.access, track.addr = reason, f"{addr:#x}"
            args["addr"] = track.addr
        self._add(_span("guest", track.tid, entered, left, args))
        self._write_if(_BATCH)

    def served(self, vcpu: str, where: Where, began: int, ended: int) -> None:
        """The access of the last exit."""
        track = self._track(vcpu)
        args = {"addr": track.addr, "served": "in trio" if where == "trio" else "on its thread"}
        self._add(_span(track.access or "access", track.tid, began, ended, args))
        self._write_if(_BATCH)

    def _track(self, vcpu: str) -> _Track:
        found = self._tracks.get(vcpu)
        if found is None:
            with self._making_track:
                found = self._tracks.get(vcpu)
                if found is None:
                    found = self._tracks[vcpu] = _Track(_BRACKETS + 1 + len(self._tracks))
                    self._add(_metadata("thread_name", found.tid, vcpu))
                    self._add(_metadata("thread_sort_index", found.tid, found.tid))
        return found

    # ---- the file -------------------------------------------------------------------

    def _add(self, event: Event) -> None:
        self._events.append(event)

    def _write_if(self, enough: int) -> None:
        """Write what there is, if it is enough and nobody else does.

        While a slow disk is waited for, the queue grows no further than to `_MOST`.
        """
        waiting = len(self._events)
        if waiting >= enough and self._writing.acquire(blocking=waiting >= _MOST):
            try:
                self._write()
            finally:
                self._writing.release()

    def _write(self) -> None:
        """Write what there is. With the lock held."""
        if self._closed:
            self._events.clear()
            return
        events = [self._events.popleft() for _ in range(len(self._events))]
        self._file.write("".join(f",\n{_encode(each)}" for each in events))

    def close(self) -> None:
        """Write the rest, and the end; hear nothing more. Idempotent.

        Raises:
            OSError: The file cannot be written.
        """
        with self._writing:
            if self._closed:
                return
            self._end_bracket(time.perf_counter_ns())  # one that never ends: memory is broken
            try:
                self._write()
                self._file.write("\n]\n")
                self._file.flush()
            finally:
                self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _span(name: str, tid: int, began: int, ended: int, args: dict[str, Any] | None = None) -> Event:
    found = {
        "name": name,
        "ph": "X",
        "pid": _PID,
        "tid": tid,
        "ts": began / 1000,
        "dur": (ended - began) / 1000,
    }
    if args:
        found["args"] = args
    return found


def _instant(name: str, tid: int, at: int) -> Event:
    return {"name": name, "ph": "i", "s": "t", "pid": _PID, "tid": tid, "ts": at / 1000}


def _metadata(what: str, tid: int, value: str | int) -> Event:
    key = "sort_index" if isinstance(value, int) else "name"
    return {"name": what, "ph": "M", "pid": _PID, "tid": tid, "args": {key: value}}
