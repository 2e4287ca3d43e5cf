"""`TraceInstrument`: the file, event by event; of whole machines: tests/kvm/test_instrument.py."""

from __future__ import annotations

import errno
import io
import itertools
import json
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from memlistener.instrument import Instruments
from memlistener.trace import TraceInstrument
from tests.chrome_trace import Span, Trace, assert_nested, torn

LONG_ENOUGH = 60.0
SLOT_IOCTL = "KVM_SET_USER_MEMORY_REGION"


@pytest.fixture
def file() -> io.StringIO:
    return io.StringIO()


def span(name: str, began: int, ended: int, **args: str) -> Span:
    """As it is in a file, of times in ns."""
    return Span(name, Decimal(began) / 1000, Decimal(ended) / 1000, args)


def test_an_empty_trace(file: io.StringIO) -> None:
    """Valid, with a name and a track."""
    TraceInstrument(file).close()
    events = json.loads(file.getvalue())
    assert {each["ph"] for each in events} == {"M"}
    assert {each["pid"] for each in events} == {1}
    assert Trace(file.getvalue()).spans == {"brackets": []}


def test_a_bracket(file: io.StringIO) -> None:
    """The turn before it; in it the wait, the ioctls, the resume; the kick on the vCPU's track."""
    with TraceInstrument(file) as trace:
        trace.begin("memory", 5_000, 1_500)
        trace.kicked("vcpu 0", 5_200)
        trace.exit("vcpu 0", "kicked", None, 1_001, 7_002)
        trace.quiesced(8_000, 2_900)
        trace.ioctl(SLOT_IOCTL, "slot 3 'ram'", 8_100, 9_200, 0)
        trace.ioctl(SLOT_IOCTL, "slot 4 'rom'", 9_300, 9_400, errno.ENOSPC)
        trace.resumed(10_000)
    found = Trace(file.getvalue())
    found.check()
    assert sorted(found.spans["brackets"], key=lambda each: each.began) == [
        span("vCPUs have their turn", 3_500, 5_000),
        span("bracket: memory", 5_000, 10_000),
        span("wait for the vCPUs", 5_100, 8_000),
        span(SLOT_IOCTL, 8_100, 9_200, what="slot 3 'ram'"),
        span(SLOT_IOCTL, 9_300, 9_400, what="slot 4 'rom'", errno="No space left on device"),
    ]
    assert found.instants["brackets"] == [("resume", Decimal(10))]
    assert found.spans["vcpu 0"] == [span("guest", 1_001, 7_002, exit="kicked")]
    assert found.instants["vcpu 0"] == [("kick", Decimal("5.2")), ("kicked", Decimal("7.002"))]
    ((bracket),) = found.brackets()
    assert bracket.quiet == span("quiet", 8_000, 10_000)
    assert len(bracket.ioctls) == 2


def test_exits_and_what_served_them(file: io.StringIO) -> None:
    """Time inside and time being served, on the track of the vCPU."""
    with TraceInstrument(file) as trace:
        trace.exit("vcpu 1", "Mmio", 0xFE000000, 1_000, 2_000)
        trace.served("vcpu 1", "thread", 2_100, 3_000)
        trace.exit("vcpu 0", "Io", 0x3F8, 1_500, 2_500)
        trace.served("vcpu 0", "trio", 2_600, 9_000)
        trace.exit("vcpu 1", "Hlt", None, 3_100, 4_000)
    found = Trace(file.getvalue())
    found.check()
    assert found.spans["vcpu 0"] == [
        span("guest", 1_500, 2_500, exit="Io", addr="0x3f8"),
        span("Io", 2_600, 9_000, addr="0x3f8", served="in trio"),
    ]
    assert found.spans["vcpu 1"] == [
        span("guest", 1_000, 2_000, exit="Mmio", addr="0xfe000000"),
        span("Mmio", 2_100, 3_000, addr="0xfe000000", served="on its thread"),
        span("guest", 3_100, 4_000, exit="Hlt"),
    ]
    assert found.instants["vcpu 1"] == [("Hlt", Decimal(4))]


def test_times_are_exact_to_the_nanosecond(file: io.StringIO) -> None:
    """After a hundred days of uptime, too."""
    began = 100 * 86_400 * 10**9 + 1
    with TraceInstrument(file) as trace:
        trace.exit("vcpu 0", "kicked", None, began, began + 1)
    assert Trace(file.getvalue()).of("vcpu 0", "guest") == [
        span("guest", began, began + 1, exit="kicked")
    ]


def test_a_turn_does_not_reach_into_the_bracket_before(file: io.StringIO) -> None:
    """A hold may have begun to wait before another bracket came and went."""
    with TraceInstrument(file) as trace:
        trace.begin("first", 2_000, 0)
        trace.resumed(3_000)
        trace.begin("second", 4_000, 3_500)
        trace.resumed(5_000)
    found = Trace(file.getvalue())
    found.check()
    assert found.of("brackets", "vCPUs have their turn") == [
        span("vCPUs have their turn", 3_000, 4_000)
    ]


def test_added_in_the_middle_of_a_bracket(file: io.StringIO) -> None:
    """What it did not see begin it does not invent."""
    with TraceInstrument(file) as trace:
        trace.ioctl(SLOT_IOCTL, "slot 0", 1_000, 2_000, 0)
        trace.resumed(3_000)
        trace.served("vcpu 0", "trio", 3_000, 4_000)
    found = Trace(file.getvalue())
    assert found.brackets() == []
    assert [each.name for each in found.spans["brackets"]] == [SLOT_IOCTL]
    assert [each.name for each in found.spans["vcpu 0"]] == ["access"]


def test_a_bracket_that_never_ends(file: io.StringIO) -> None:
    """Where memory broke, it is in the trace up to its closing."""
    with TraceInstrument(file) as trace:
        trace.begin("broken", 1_000, 0)
    ((bracket),) = Trace(file.getvalue()).brackets()
    assert bracket.span.name == "bracket: broken"
    assert bracket.span.ended > bracket.span.began


def test_valid_when_the_run_raises(file: io.StringIO) -> None:
    """KeyboardInterrupt included: the `with` ends the array, and the error goes on."""

    def run() -> None:
        with TraceInstrument(file) as trace:
            trace.kicked("vcpu 0", 1_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert Trace(file.getvalue()).instants["vcpu 0"] == [("kick", Decimal(1))]


def test_nothing_after_the_end(file: io.StringIO) -> None:
    """Closing twice, and what is heard later, change nothing; nor is it kept."""
    trace = TraceInstrument(file)
    trace.close()
    written = file.getvalue()
    for at in range(1_000):
        trace.exit("vcpu 0", "kicked", None, at, at + 1)
    trace.close()
    assert file.getvalue() == written
    assert len(trace._events) < 100


def test_memory_is_bounded() -> None:
    """Of 100,000 events a few dozen wait at a time; of those under a closed gate some thousand."""

    class Sink(io.StringIO):
        written = 0

        def write(self, text: str) -> int:
            self.written += len(text)
            return len(text)

    sink = Sink()
    with TraceInstrument(sink) as trace:
        for at in range(50_000):
            trace.exit("vcpu 0", "Mmio", 0x1000, at, at + 1)
            trace.served("vcpu 0", "thread", at, at + 1)
            assert len(trace._events) < 64
        trace.begin("memory", 50_000, 0)
        for at in range(20_000):
            trace.ioctl(SLOT_IOCTL, "slot 3", at, at + 1, 0)
            assert len(trace._events) < 5_000
        before = sink.written
        trace.resumed(80_000)
        assert not trace._events
        assert sink.written > before
    assert sink.written > 5_000_000


def test_nothing_is_written_while_the_gate_is_closed(file: io.StringIO) -> None:
    """The vCPUs would wait for it; the resume makes up for it."""
    with TraceInstrument(file) as trace:
        trace.begin("memory", 1_000, 0)
        before = file.getvalue()
        for at in range(100):
            trace.kicked("vcpu 0", at)
            trace.ioctl(SLOT_IOCTL, "slot 3", at, at + 1, 0)
        assert file.getvalue() == before
        trace.resumed(2_000)
        assert len(file.getvalue()) > len(before)


def test_threads_lose_nothing(file: io.StringIO) -> None:
    """Eight threads at once: every event is in the file, once, and each thread has its track."""
    each, threads = 2_000, 8
    with TraceInstrument(file) as trace:
        start = threading.Barrier(threads)

        def vcpu(number: int) -> None:
            start.wait(LONG_ENOUGH)
            for at in range(each):
                trace.exit(f"vcpu {number}", "kicked", None, at, at + 1)

        running = [threading.Thread(target=vcpu, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(LONG_ENOUGH)
            assert not thread.is_alive()
    found = Trace(file.getvalue())
    assert sorted(found.vcpus) == [f"vcpu {number}" for number in range(threads)]
    for name in found.vcpus:
        assert [s.began * 1000 for s in found.of(name, "guest")] == list(range(each))
        assert len(found.spans[name]) == each


def test_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    """The instrument is removed, with a log; closing says what happened."""

    class Full(io.StringIO):
        room = 1

        def write(self, text: str) -> int:
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    trace = TraceInstrument(Full())
    instruments = Instruments()
    instruments.add(trace)
    told: Iterator[int] = iter(itertools.count())
    while instruments.exit is not None:
        instruments.exit("vcpu 0", "kicked", None, 1_000, 2_000)
        assert next(told) < 1_000
    assert "TraceInstrument" in caplog.text
    assert "No space left on device" in caplog.text
    with pytest.raises(OSError, match="No space"):
        trace.close()
    trace.close()  # the file is what it is


# ---- the checks themselves -----------------------------------------------------------------------


def test_the_checks_see_what_is_wrong(file: io.StringIO) -> None:
    """Spans that cross, and a guest that runs in a bracket, do not go unnoticed."""
    with pytest.raises(AssertionError):
        assert_nested([span("a", 0, 2_000), span("b", 1_000, 3_000)])
    assert_nested([span("a", 0, 2_000), span("b", 1_000, 2_000), span("c", 2_000, 3_000)])
    with TraceInstrument(file) as trace:
        trace.begin("memory", 1_000, 0)
        trace.quiesced(2_000, 500)
        trace.resumed(4_000)
        trace.exit("vcpu 0", "kicked", None, 0, 2_000)
        trace.exit("vcpu 1", "kicked", None, 3_999, 5_000)
    found = Trace(file.getvalue())
    quiet = [each.quiet for each in found.brackets()]
    assert [(name, guest.began) for name, guest, _ in torn(found, quiet)] == [
        ("vcpu 1", Decimal("3.999"))
    ]


def test_a_file_of_the_user_s_stays_open(tmp_path: Path) -> None:
    """As the documentation has it."""
    path = tmp_path / "trace.json"
    with path.open("w", encoding="utf-8") as file:
        with TraceInstrument(file) as trace:
            trace.kicked("vcpu 0", 1_000)
        assert not file.closed
    assert Trace(path.read_text(encoding="utf-8")).vcpus == ["vcpu 0"]
