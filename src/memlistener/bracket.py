"""The gate: hold all vCPUs outside the guest while something changes.

A `Gate` knows nothing of KVM. It knows vCPU threads, each of which is at any
moment in one of three places:

- *inside*: between `Gate.enter` and `Gate.leave`, executing guest code;
- *at the gate*: blocked in `Gate.enter` because the gate is held;
- *elsewhere*: in a device handler, waiting for one, or idle. That counts as
  stopped (rule B6), since it cannot touch guest memory before it comes to the
  gate. So a device handler may itself hold the gate.

A bracket is `Gate.hold` ... `Gate.release`:

1. B14: wait until each vCPU that the last bracket stopped has been inside again.
   Without this, transactions in a tight loop would starve the guest: a hold that
   follows a release at once finds the threads still on their way to the gate.
   Where there are more threads than CPUs, a vCPU may have to wait for a CPU; it
   is waited for only when it has missed its turn a few times (`PATIENCE`), since
   each bracket would otherwise last for as many scheduler slices as there are vCPUs.
2. B1: count the hold. From here on nobody gets in.
3. B3: kick all that are inside, then wait for all. The wait is for the slowest,
   not for the sum.
4. B2, B8: whoever does not come out is kicked again, and after a deadline named
   in a warning, again and again. The bracket neither gives up nor goes on.

Where something can kick all vCPUs at once (rule B15), it is an `Assist`: told
after the gate is closed and all have been kicked, and before the gate opens. It
is never waited for, since who is inside is counted here.

A `Gate.pause` is a hold in which nothing changes: for those who want to look.
Brackets keep vCPUs outside while memory changes under them, so that what reads
it has to wait (rule B5). A pause waits for the brackets of others, then until each
vCPU's thread is at the gate or idle, and has every vCPU finish the instruction
whose access was served. It does not wait for a handler that a task awaits: that
may be the very one who pauses, or be waiting for him.

How the waiting is done. A vCPU comes out within microseconds, while going
through trio's event loop and back costs some fifty. So the trio thread blocks
on a lock for a moment (`_BLOCK`; the GIL is released, and no vCPU needs the trio
thread in order to come out, B7), and only then gives way to other tasks.

The thread side is plain threading under one mutex that is never held while
anybody waits. Kicking happens outside it: a kick may come late, when its vCPU
has left already. That is harmless, because `enter` clears a stale kick, and
cannot hit the next run, because nobody enters before the hold is over.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import attrs
import trio

from memlistener.histogram import Histogram
from memlistener.instrument import Instruments

_log = logging.getLogger("memlistener.bracket")

# How long the trio thread may block before it waits in trio's way. A vCPU in
# guest code is out in 5 to 50 us; one that is not after this is in trouble, or
# its thread has to wait for a CPU.
_BLOCK = 0.0005
# How often a vCPU that does not come out is kicked again, in seconds.
_KICK_AGAIN = 0.01
# When it is named in a warning for the first time; doubled each time.
DEADLINE = 1.0
# How long a vCPU that was let in stays in at least (rule B14), in ns: so short
# that only transactions in a tight loop notice, long enough for the guest to move.
MIN_RUN = 50_000
# How long a hold looks on, in ns, while stopped vCPUs find their way back in. On
# a CPU of its own a thread needs about 50 us. Looking on is a busy wait, because
# to block is to give up the CPU: to a vCPU that then keeps it for a whole slice.
_LOOK_ON = 150_000
# How long, in seconds, somebody who looks at a vCPU in a pause waits for a thread that
# was sent to the gate just now. It needs microseconds, unless CPUs are short.
_ARRIVE = 0.2
# How many brackets in a row a vCPU may be found waiting for a CPU.
PATIENCE = 4


class Assist(Protocol):
    """Kicks all vCPUs at once, beside the kick that each has. Never waits or raises."""

    def kick(self) -> None:
        """The gate is closed, and whoever is inside was kicked."""
        ...

    def resume(self) -> None:
        """The gate is about to open."""
        ...

    def stray(self) -> None:
        """A vCPU was kicked out with the gate open. Called on its thread."""
        ...


class Pass:
    """What one vCPU shows at the gate: its state, and how to get it out.

    Attributes:
        name: For people.
        inside: Whether it may be executing guest code.
        kicks: How often it was kicked.
        working: Whether its thread has the word: is inside, at the gate or on its
            way. Kept by who owns the thread, with `Gate.depart` and `Gate.rest`.
    """

    __slots__ = (
        "_clear_kick",
        "_describe",
        "_finish",
        "_instruments",
        "_kick",
        "_kicked_since",
        "_missed",
        "_owed",
        "_parked",
        "_parking",
        "_stopping",
        "_tries",
        "entered_at",
        "inside",
        "kicks",
        "name",
        "working",
    )

    def __init__(
        self,
        name: str,
        kick: Callable[[], None],
        clear_kick: Callable[[], None],
        describe: Callable[[], str],
        finish: Callable[[], None],
        instruments: Instruments,
    ) -> None:
        """Use `Gate.add`."""
        self.name = name
        self.inside = False
        self.working = False
        self.kicks = 0
        self.entered_at = 0
        self._kick = kick
        self._clear_kick = clear_kick
        self._describe = describe
        self._instruments = instruments
        self._finish = finish
        self._kicked_since = 0
        self._tries = 0
        self._stopping = False
        self._owed = False
        self._missed = 0
        self._parked = False
        self._parking = threading.Lock()
        self._parking.acquire()

    def kick(self) -> None:
        """Ask it to come out. Never blocks, cannot be lost, may come late."""
        self.kicks += 1
        if self._kicked_since != self.entered_at:  # counted here, so that entering costs nothing
            self._kicked_since, self._tries = self.entered_at, 0
        self._tries += 1
        tell = self._instruments.kicked
        if tell is None:
            self._kick()
            return
        at = time.perf_counter_ns()
        self._kick()
        tell(self.name, at)

    def describe(self) -> str:
        """The name, and what it is doing as far as is known."""
        if self.inside:
            entered_at = self.entered_at
            tries = self._tries if self._kicked_since == entered_at else 0
            seconds = (time.perf_counter_ns() - entered_at) / 1e9
            return (
                f"{self.name} ({self._describe()}; inside for {seconds:.3f} s, "
                f"kicked {tries} time{'' if tries == 1 else 's'})"
            )
        return f"{self.name} ({'on its way back in' if self._owed else 'in a device handler'})"


class _Waiter:
    """One task that waits until something is so, first blocked, then in trio."""

    __slots__ = ("done", "event", "lock", "token")

    def __init__(self) -> None:
        self.done = False
        self.event: trio.Event | None = None
        self.token: trio.lowlevel.TrioToken | None = None
        self.lock = threading.Lock()
        self.lock.acquire()

    def wake(self) -> None:
        """Called once, with the gate's mutex held, from any thread."""
        self.done = True
        self.lock.release()
        if self.event is not None and self.token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self.token.run_sync_soon(self.event.set)


@attrs.frozen
class GateStatistics:
    """What the gate has done so far. Times are in seconds.

    Attributes:
        holds: How often the gate was closed.
        kicks: How often a vCPU was kicked.
        late: How often a vCPU was named in a warning for not coming out.
        wait_median: From the first kick until all were out: half took no longer.
        wait_p99: 99 % took no longer.
        wait_max: The longest.
        turn_median: Before the kick, until stopped vCPUs had had their turn
            (rule B14), where there were any: half took no longer.
        turn_max: The longest.
        vcpus: How many vCPUs there are.
        vcpus_inside: How many are inside now.
    """

    holds: int
    kicks: int
    late: int
    wait_median: float
    wait_p99: float
    wait_max: float
    turn_median: float
    turn_max: float
    vcpus: int
    vcpus_inside: int


class Gate:
    """Keeps a set of vCPUs out of guest code while it is held.

    Args:
        deadline: Seconds after which a vCPU that does not come out is named in
            a warning on the logger ``memlistener.bracket``.
        patience: How many brackets in a row may find a stopped vCPU still on its
            way back in, before one waits for it. 0: every bracket waits for all.
        min_run: Nanoseconds that a vCPU is left inside at least.
        assist: What kicks all vCPUs at once, if anything does.

    Attributes:
        instruments: Who watches it, and what happens around it.
    """

    def __init__(
        self,
        *,
        deadline: float = DEADLINE,
        patience: int = PATIENCE,
        min_run: int = MIN_RUN,
        assist: Assist | None = None,
    ) -> None:
        self.instruments = Instruments()
        self._mutex = threading.Lock()
        self._deadline = deadline
        self._patience = patience
        self._min_run = min_run
        self._assist = assist
        self._holds = 0
        self._changes = 0  # how many of the holds are in force, and no pauses
        self._pauses = 0  # how many of them are pauses that have begun
        self._changed: trio.Event | None = None  # set when there are no changes any more
        self._torn = False
        self._passes: dict[Pass, None] = {}
        self._inside = 0
        self._parked: list[Pass] = []
        self._owed = 0
        self._waiters_out: list[_Waiter] = []
        self._waiters_owed: list[_Waiter] = []
        self._kicked_at = 0  # in this bracket, the first; 0: nobody was inside
        self._quiesced = False  # instruments know that nobody is inside
        self._waiters_still: list[_Waiter] = []
        self._waits = Histogram()
        self._turns = Histogram()
        self._hold_count = 0
        self._kick_count = 0
        self._late_count = 0

    @property
    def held(self) -> bool:
        """Whether vCPUs are kept out."""
        return self._holds > 0

    @property
    def changing(self) -> bool:
        """Whether somebody holds it who may be changing what guests see (rule B5).

        Not yet while vCPUs are still being waited for: nothing is changed then.
        """
        return self._changes > 0

    @property
    def torn(self) -> bool:
        """Whether it is held for good, as far as anybody knows: see `hold_nowait`."""
        return self._torn

    @property
    def quiet(self) -> bool:
        """Whether it is paused and nobody changes anything: a time to look at vCPUs."""
        return self._pauses > 0 and not self._changes

    def statistics(self) -> GateStatistics:
        """What the gate has done so far."""
        with self._mutex:
            kicks = self._kick_count + sum(each.kicks for each in self._passes)
            return GateStatistics(
                holds=self._hold_count,
                kicks=kicks,
                late=self._late_count,
                wait_median=self._waits.quantile(0.5) / 1e9,
                wait_p99=self._waits.quantile(0.99) / 1e9,
                wait_max=self._waits.maximum / 1e9,
                turn_median=self._turns.quantile(0.5) / 1e9,
                turn_max=self._turns.maximum / 1e9,
                vcpus=len(self._passes),
                vcpus_inside=self._inside,
            )

    # ---- vCPUs come and go (B10) ----------------------------------------------

    def add(
        self,
        name: str,
        kick: Callable[[], None],
        clear_kick: Callable[[], None],
        describe: Callable[[], str] = lambda: "in guest code",
        finish: Callable[[], None] = lambda: None,
    ) -> Pass:
        """A new vCPU. While the gate is held it will wait at it.

        Args:
            name: For people.
            kick: Makes a thread that is inside leave, soon. Called from any
                thread, at any time; must not block.
            clear_kick: Forgets a kick that came too late. Called on the vCPU's
                thread, just before it goes inside.
            describe: Says what the vCPU is doing, for the warning of rule B8.
            finish: Completes what its last exit began, so that its registers are
                those of after the instruction. Called in a `pause`, on trio's
                thread, with the vCPU's own one at the gate or idle.
        """
        each = Pass(name, kick, clear_kick, describe, finish, self.instruments)
        with self._mutex:
            self._passes[each] = None
        return each

    def remove(self, each: Pass) -> None:
        """The vCPU is gone; it must be outside."""
        with self._mutex:
            assert not each.inside, f"{each.name} is removed while it is inside"
            if self._passes.pop(each, 0) is None:
                self._kick_count += each.kicks
            self._forgive(each)
            each.working = False
            self._wake_if_still()

    # ---- the vCPU's thread --------------------------------------------------------

    def enter(self, each: Pass) -> bool:
        """Go inside, after waiting while the gate is held.

        Returns:
            False where the vCPU was told to `stop` instead.
        """
        while True:
            with self._mutex:
                if each._stopping:
                    self._forgive(each)
                    return False
                if not self._holds:
                    self._forgive(each)
                    each._clear_kick()
                    each.inside = True
                    self._inside += 1
                    each.entered_at = time.perf_counter_ns()
                    return True
                each._parked = True
                self._parked.append(each)
                self._wake_if_still()
            each._parking.acquire()

    def leave(self, each: Pass, *, returning: bool = False) -> None:
        """Out of guest code.

        Args:
            each: The vCPU's pass.
            returning: Whether it comes straight back to the gate, having been
                kicked out for no reason of its own: then the next bracket has
                to let it in first (rule B14).
        """
        stray = False
        with self._mutex:
            each.inside = False
            self._inside -= 1
            if returning and not each._stopping:
                self._owe(each)
                stray = not self._holds
            if not self._inside and self._waiters_out:
                for waiter in self._waiters_out:
                    waiter.wake()
                self._waiters_out.clear()
        if stray and self._assist is not None:
            self._assist.stray()

    def _owe(self, each: Pass) -> None:
        """``each`` was stopped and wants back in. With the mutex held."""
        if not each._owed:
            each._owed = True
            each._missed = 0
            self._owed += 1

    def _forgive(self, each: Pass) -> None:
        """``each`` has been let in, or does not want to be. With the mutex held."""
        if each._owed:
            each._owed = False
            self._owed -= 1
            if not self._owed and self._waiters_owed:
                for waiter in self._waiters_owed:
                    waiter.wake()
                self._waiters_owed.clear()

    # ---- stopping one vCPU ------------------------------------------------------------

    def stop(self, each: Pass) -> None:
        """Make `enter` return False, and get the vCPU out if it is inside.

        To be followed by `kick_again` until its thread says that it has stopped.
        """
        with self._mutex:
            each._stopping = True
            self._forgive(each)
            if each._parked:
                each._parked = False
                self._parked.remove(each)
                each._parking.release()
            inside = each.inside
        if inside:
            each.kick()

    def allow(self, each: Pass) -> None:
        """Take back `stop`."""
        with self._mutex:
            each._stopping = False

    async def kick_again(
        self, who: Callable[[], Iterable[Pass]], event: trio.Event, *, what: str = "leave the guest"
    ) -> None:
        """Wait for ``event``, kicking those of ``who()`` who are inside (rules B2, B8).

        A thread of its own does the kicking, in real time: trio's clock may be a
        test's, and its loop may be kept busy by somebody else.
        """
        over = threading.Event()
        kicker = threading.Thread(
            target=self._kick_until, args=(over, who, what), name="kick again", daemon=True
        )
        kicker.start()
        try:
            await event.wait()
        finally:
            over.set()
            kicker.join()

    def _kick_until(
        self, over: threading.Event, who: Callable[[], Iterable[Pass]], what: str
    ) -> None:
        began = time.monotonic()
        patience = self._deadline
        while not over.wait(_KICK_AGAIN):
            missing = list(who())
            for each in missing:
                if each.inside:
                    each.kick()
            waited = time.monotonic() - began
            if missing and waited >= patience:
                patience *= 2
                with self._mutex:
                    self._late_count += len(missing)
                _log.warning(
                    "after %.1f s still waiting for %s to %s",
                    waited,
                    ", ".join(each.describe() for each in missing),
                    what,
                )

    # ---- the bracket ------------------------------------------------------------------

    def holding(self, reason: str = "hold") -> Holding:
        """`hold` and `release` as an async context manager."""
        return Holding(self, reason)

    @trio.lowlevel.enable_ki_protection
    async def hold(self, reason: str = "hold") -> None:
        """Close the gate and wait until every vCPU is outside.

        Holds are counted (rule B4): each needs its own `release`. Where the
        caller is cancelled while waiting, its hold is taken back.

        Args:
            reason: For instruments.
        """
        waited = await self._let_run() if self._owed else 0
        with self._mutex:
            self._close()
            self._hold_count += self._holds == 1
            inside = self._all_inside()
        self._tell_begin(reason, waited)
        if not inside:
            self._changes += 1
            self._tell_quiesced()
            return
        began = time.perf_counter_ns()
        self._kicked_at = self._kicked_at or began
        try:
            for each in inside:
                each.kick()
            if self._assist is not None:
                self._assist.kick()
            waiter = _Waiter()
            with self._mutex:
                if self._inside:
                    self._waiters_out.append(waiter)
                else:
                    waiter.done = True
            if not waiter.done and not waiter.lock.acquire(timeout=_BLOCK):
                await self._wait_in_trio(waiter, self._waiters_out, self._all_inside)
        except BaseException:
            self._open()
            raise
        self._changes += 1
        self._waits.add(time.perf_counter_ns() - began)
        self._tell_quiesced()

    @trio.lowlevel.enable_ki_protection
    def hold_nowait(self, reason: str = "hold") -> None:
        """Close the gate and kick those inside, without waiting until they are out."""
        with self._mutex:
            self._close()
            inside = self._all_inside()
        self._changes += 1
        self._tell_begin(reason, 0)
        if inside:
            self._kicked_at = self._kicked_at or time.perf_counter_ns()
        for each in inside:
            each.kick()
        if inside and self._assist is not None:
            self._assist.kick()
        self._torn = True  # for all we know: nobody is to wait until this hold is over
        self._unchanging()

    def _unchanging(self) -> None:
        """Pauses are to wait no longer."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _close(self) -> None:
        """One hold more. With the mutex held."""
        self._holds += 1
        # Whoever waits for vCPUs to go in would wait for this hold to be over, and
        # it may be the other way round.
        for waiter in self._waiters_owed:
            waiter.wake()
        self._waiters_owed.clear()

    def _tell_begin(self, reason: str, waited: int) -> None:
        if self._holds == 1:  # holds and releases are trio's thread's: it is this one
            self._kicked_at = 0
            self._quiesced = False
            tell = self.instruments.begin
            if tell is not None:
                tell(reason, time.perf_counter_ns(), waited)

    def _tell_quiesced(self) -> None:
        if not self._quiesced:  # two holds may have waited for it
            self._quiesced = True
            tell = self.instruments.quiesced
            if tell is not None:
                at = time.perf_counter_ns()
                tell(at, at - self._kicked_at if self._kicked_at else 0)

    @trio.lowlevel.enable_ki_protection
    def release(self) -> None:
        """Take back one hold; the last one lets the vCPUs back in."""
        assert self._changes, "release() without hold()"
        self._changes -= 1
        if not self._changes:
            self._torn = False
            self._unchanging()
        self._open()

    def _open(self) -> None:
        """One hold less."""
        if self._holds == 1 and self._assist is not None:
            self._assist.resume()
        tell = self.instruments.resumed
        with self._mutex:
            at = 0 if tell is None else time.perf_counter_ns()  # nobody is inside yet
            self._holds -= 1
            if self._holds:
                return
            parked = self._parked
            self._parked = []
            for each in parked:
                each._parked = False
                self._owe(each)
            for each in parked:
                each._parking.release()
        if tell is not None:
            tell(at)

    # ---- pauses ---------------------------------------------------------------------------

    def pausing(self, *, wait: bool = True) -> Pausing:
        """`pause` and `unpause` as an async context manager."""
        return Pausing(self, wait)

    @trio.lowlevel.enable_ki_protection
    async def pause(self, *, wait: bool = True) -> None:
        """A hold in which nothing changes; each vCPU is after an instruction.

        Args:
            wait: Whether to wait until no bracket is in force. Where the caller is
                part of one, it would wait for itself; instructions are then left
                unfinished until somebody looks.
        """
        await self.hold("paused")
        self._changes -= 1
        try:
            # Meanwhile another task may begin a bracket, or send a vCPU to the gate.
            while (roaming := self._roaming()) or (self.changing and wait and not self._torn):
                if roaming:
                    await self._gather()
                else:
                    if self._changed is None:
                        self._changed = trio.Event()
                    await self._changed.wait()
        except BaseException:
            self._open()
            raise
        self._pauses += 1
        if self.quiet:
            for each in tuple(self._passes):
                each._finish()

    @trio.lowlevel.enable_ki_protection
    def unpause(self) -> None:
        """Take back one `pause`."""
        assert self._pauses, "unpause() without pause()"
        self._pauses -= 1
        self._open()

    @staticmethod
    def arrives(each: Pass) -> bool:
        """In a pause: whether the vCPU's thread is at the gate, or gets there in a moment."""
        deadline = time.monotonic() + _ARRIVE
        while not each._parked:
            if each._stopping or time.monotonic() > deadline:
                return False
            time.sleep(0)
        return True

    @staticmethod
    def depart(each: Pass) -> None:
        """The vCPU's thread is given the word, and will come to the gate."""
        each.working = True

    def rest(self, each: Pass) -> None:
        """The vCPU's thread is idle. Called on trio's thread, as all that waits for it is."""
        each.working = False
        if self._waiters_still:
            with self._mutex:
                self._wake_if_still()

    async def _gather(self) -> None:
        """In a hold: wait until each thread is at the gate, or idle."""
        waiter = _Waiter()
        with self._mutex:
            if not self._roaming():
                return
            self._waiters_still.append(waiter)
        if not waiter.lock.acquire(timeout=_BLOCK):
            what = "come to the gate"
            await self._wait_in_trio(waiter, self._waiters_still, self._roaming, what)

    def _roaming(self) -> list[Pass]:
        return [each for each in tuple(self._passes) if each.working and not each._parked]

    def _wake_if_still(self) -> None:
        """With the mutex held."""
        if self._waiters_still and not self._roaming():
            for waiter in self._waiters_still:
                waiter.wake()
            self._waiters_still.clear()

    # ---- waiting --------------------------------------------------------------------------

    def _all_inside(self) -> list[Pass]:
        return [each for each in tuple(self._passes) if each.inside] if self._inside else []

    async def _let_run(self) -> int:
        """Rule B14: whom the last bracket stopped goes in before the next one.

        Returns:
            How long that took, in ns.
        """
        if self._holds:  # inside another hold nobody can go in
            return 0
        began = now = time.perf_counter_ns()
        while self._owed and now - began < _LOOK_ON:
            time.sleep(0)  # gives the GIL away, and keeps the CPU
            now = time.perf_counter_ns()
        if self._owed:
            await self._wait_for_those_who_missed()
        with self._mutex:
            last = max((each.entered_at for each in self._passes if each.inside), default=0)
        while time.perf_counter_ns() - last < self._min_run:
            time.sleep(0)
        waited = time.perf_counter_ns() - began
        self._turns.add(waited)
        return waited

    async def _wait_for_those_who_missed(self) -> None:
        """Wait until all have been inside, if one of them has missed too many turns."""
        waiter = _Waiter()
        with self._mutex:
            owed = [each for each in self._passes if each._owed]
            if self._holds:  # meanwhile: nobody can go in
                return
            if not any(each._missed >= self._patience for each in owed):
                for each in owed:
                    each._missed += 1
                return
            self._waiters_owed.append(waiter)
        if not waiter.lock.acquire(timeout=_BLOCK):
            await self._wait_in_trio(waiter, self._waiters_owed, self._all_owed, "have its turn")

    def _all_owed(self) -> list[Pass]:
        return [each for each in tuple(self._passes) if each._owed]

    async def _wait_in_trio(
        self,
        waiter: _Waiter,
        queue: list[_Waiter],
        who: Callable[[], Iterable[Pass]],
        what: str = "leave the guest",
    ) -> None:
        event = trio.Event()
        with self._mutex:
            if waiter.done:
                return
            waiter.event = event
            waiter.token = trio.lowlevel.current_trio_token()
        try:
            await self.kick_again(who, event, what=what)
        finally:
            with self._mutex, contextlib.suppress(ValueError):
                queue.remove(waiter)


class Holding:
    """``async with gate.holding():`` no vCPU is inside."""

    __slots__ = ("_gate", "_reason")

    def __init__(self, gate: Gate, reason: str) -> None:
        """Use `Gate.holding`."""
        self._gate = gate
        self._reason = reason

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> None:
        await self._gate.hold(self._reason)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(self, *_: object) -> None:
        self._gate.release()


class Pausing:
    """``async with gate.pausing():`` no vCPU is inside or in the middle of an instruction."""

    __slots__ = ("_gate", "_wait")

    def __init__(self, gate: Gate, wait: bool) -> None:
        """Use `Gate.pausing`."""
        self._gate = gate
        self._wait = wait

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> None:
        await self._gate.pause(wait=self._wait)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(self, *_: object) -> None:
        self._gate.unpause()
