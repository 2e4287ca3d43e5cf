"""Machine code as it stands in a source file: bytes, and what they mean."""

from __future__ import annotations


def listing(text: str) -> bytes:
    """The bytes of a listing: hexadecimal up to the ``;`` of each line."""
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in text.splitlines())
