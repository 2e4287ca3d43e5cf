"""A unit test of an async device: no CPU, and time that passes at once."""

import trio
import trio.testing

from memlistener import MemoryRegion, MemoryRegionOps, MemorySystem, MemTxAttrs


class SlowUart(MemoryRegionOps):
    """Takes a second for each byte."""

    def __init__(self) -> None:
        self.sent = bytearray()

    async def write(self, offset: int, value: int, size: int, attrs: MemTxAttrs) -> None:
        """Send a byte."""
        await trio.sleep(1)
        self.sent.append(value)


async def test_bytes_arrive_in_order() -> None:
    """Bytes that are written one after the other arrive one after the other."""
    uart = SlowUart()
    space = MemorySystem().create_address_space("I/O", MemoryRegion.io("uart", 1, uart))
    for byte in b"ok":
        await space.write(0, bytes([byte]))
    assert uart.sent == b"ok"
    assert await space.read(0, 1) == b"\xff"  # it has no read: refused, so all ones
    print("sent", bytes(uart.sent), "in", trio.current_time(), "seconds that nobody waited for")


if __name__ == "__main__":
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(test_bytes_arrive_in_order, clock=clock)
