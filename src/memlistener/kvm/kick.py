"""`KickIoctls`: the kernel's own kick-all and resume-all, where a kernel has them (rule B15).

A series for Linux adds KVM_KICK_ALL_RUNNING_VCPUS and KVM_RESUME_ALL_KICKED_VCPUS;
the mainline kernel answers ENOTTY, and then there is nothing here: no object, no
thread, no ioctl but the one that asked. From kick to resume KVM_RUN returns EINTR
at once, and the kick returns when no vCPU is inside KVM_RUN.

The gate does without: it keeps vCPUs out and kicks each of them by a signal, and
its own count says when they are out. So the kernel's kick runs beside it and
nobody waits for it. That matters, because the kernel waits for the vCPUs of
*every* VM of the host: a bracket would last for as long as a stranger stays in its
guest (rule B13). The kick is therefore made on a thread of its own, one for each
VM, and what is hard is the other end:

    The resume must not be lost. A kick that sets the kernel's flag when its
    bracket is over leaves vCPUs that get EINTR for ever.

The resume waits for nobody, so it is made on trio's thread before the gate opens.
That is enough where the kick has set the flag by then, though it may still be
waiting. The rest are kicks that come late, in three cases:

1. The thread has not begun. It looks, under the mutex, whether a bracket still
   wants the kick, and makes none otherwise.
2. The thread has looked, and the kernel sets the flag after the resume. If the
   kick then returns, the thread sees that its bracket is over and resumes again.
3. The same, and the kick goes on waiting, for a stranger, perhaps for hours. Now a
   vCPU comes out with EINTR though the gate is open. The gate tells (`stray`), and
   the vCPU's own thread makes the resume before it goes in again: the kernel sets
   its flag once a kick, so it costs each vCPU one EINTR, and nobody spins.

A resume too many is harmless. In the worst case it clears the flag of the next
bracket's kick, and the vCPUs come out by their signals and stay at the gate. That is
why nothing here is done to be exact where it only has to be safe: a bracket that
begins while an old kick is still under way asks for no other, for instance.

A kick that outlives its bracket by far is the last one: what it waits for is not
ours, and while it waits that kernel lets no KVM_RUN of the host begin. One that
fails is the last one too. Both are reported, once, and brackets go on as on any
other kernel.

A VM may be closed while its kick is waiting. Its descriptor must stay open until
the ioctl has returned, so it is the thread that closes it, as the last thing that
it does.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import Self

import trio

from memlistener.kvm import backend as kernel

_log = logging.getLogger("memlistener.kvm.kick")

# How often a kick is made that returns EINTR.
_TRIES = 10
# By how many seconds a kick may outlive its bracket, and there be another one.
_TOO_LATE = 1.0
# How many seconds closing waits for a kick. Without strangers it ends at once, since
# all vCPUs are closed by then.
_LINGER = 0.2


class KickIoctls:
    """The two ioctls of one VM, as a `memlistener.bracket.Assist`.

    Args:
        vm: The VM's handle. It belongs to this object from here on, which closes it.
    """

    def __init__(self, vm: kernel.VmHandle) -> None:
        """Use `probe`."""
        self._vm = vm
        self._mutex = threading.Lock()
        self._go = threading.Semaphore(0)
        self._wanted = False  # a bracket is in force
        self._asked = False  # the thread has the word, or is at it
        self._kicking = False  # it is in the ioctl
        self._flagged = False  # the kernel's flag may be set
        self._usable = True
        self._closing = False
        self._ended_at = 0.0  # the last bracket
        self._thread = threading.Thread(target=self._main, name="kick ioctls", daemon=True)
        self._thread.start()

    @classmethod
    def probe(cls, vm: kernel.VmHandle) -> Self | None:
        """The kick of a VM that has no vCPUs yet; None where the kernel has none.

        Asked for is the resume, which leaves vCPUs as they should be and never
        waits. A kick might wait for a stranger already now; a kernel that has
        the one ioctl has the other, or says so when it is first made.
        """
        try:
            vm.resume_all_kicked_vcpus()
        except OSError:  # ENOTTY; or a filter of system calls, which comes to the same
            return None
        return cls(vm)

    # ---- what the gate calls; none of it waits or raises ---------------------------------

    def kick(self) -> None:
        """The gate is closed: ask for the kernel's kick, unless one is under way."""
        with self._mutex:
            if self._wanted or not self._usable:
                return
            self._wanted = True
            if self._asked:
                return
            self._asked = True
        self._go.release()

    def resume(self) -> None:
        """The gate is about to open."""
        with self._mutex:
            if not self._wanted or self._closing:
                return
            self._wanted = False
            self._ended_at = time.monotonic()
            if not self._take_flag():
                return
        self._resume()

    def stray(self) -> None:
        """A vCPU was kicked out though the gate is open: a kick came late."""
        with self._mutex:
            if self._wanted or self._closing or not self._take_flag():
                return
        self._resume()

    def _take_flag(self) -> bool:
        """Whether there is something to resume from. With the mutex held."""
        flagged = self._flagged
        self._flagged = self._kicking  # which may yet set the kernel's flag
        return flagged

    def _resume(self) -> None:
        try:
            self._vm.resume_all_kicked_vcpus()
        except Exception as error:
            with self._mutex:
                self._flagged = True  # the next stray vCPU tries again
            self._give_up("KVM_RESUME_ALL_KICKED_VCPUS failed: %s", error)

    def _give_up(self, text: str, *args: object) -> None:
        """No more kicks; said once."""
        with self._mutex:
            usable, self._usable = self._usable, False
        if usable:
            _log.warning(f"{text}; vCPUs are kicked by signals alone from here on", *args)

    # ---- the end -------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End the thread, and with it the VM's handle. All vCPUs are closed by now.

        A kick that waits for other VMs is not waited for: its thread closes the
        handle when the kernel lets it go.
        """
        with self._mutex:
            self._closing = True
            asked = self._asked
        self._go.release()
        if not asked:
            self._thread.join()
            return
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(
                self._thread.join, _LINGER, limiter=trio.CapacityLimiter(1)
            )

    # ---- the thread ----------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._wait():
                error = self._kick()
                if self._ended() and error is not None:
                    self._give_up("KVM_KICK_ALL_RUNNING_VCPUS failed: %s", error)
        finally:
            self._vm.close()

    def _wait(self) -> bool:
        """Wait for the word of a bracket that is still in force; False at the end."""
        while True:
            self._go.acquire()
            with self._mutex:
                if self._closing:
                    return False
                self._asked = self._kicking = self._wanted
                if self._wanted:
                    self._flagged = True
                    return True

    def _ended(self) -> bool:
        """The ioctl has returned; False at the end."""
        with self._mutex:
            self._kicking = self._asked = False
            if self._closing:
                return False
            late = not self._wanted and self._take_flag()
            behind = time.monotonic() - self._ended_at
        if late:
            self._resume()
            if behind > _TOO_LATE:
                self._give_up(
                    "KVM_KICK_ALL_RUNNING_VCPUS came back %.1f s after its bracket: it waits for "
                    "the vCPUs of other virtual machines",
                    behind,
                )
        return True

    def _kick(self) -> Exception | None:
        """The ioctl: None, or how it failed."""
        for left in reversed(range(_TRIES)):
            try:
                self._vm.kick_all_running_vcpus()
            except OSError as error:
                if error.errno != errno.EINTR or not left:
                    return error
            except Exception as error:
                return error
            else:
                break
        return None
