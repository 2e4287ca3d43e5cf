from __future__ import annotations

import pytest

from memlistener.rig.listing import listing


def test_bytes_are_what_stands_before_the_semicolon() -> None:
    """Comments, empty lines and spaces are for people."""
    assert listing("""
        89 df    ; 00 start: mov edi, ebx
        f4       ; be 00     hlt
    """) == bytes.fromhex("89dff4")


def test_what_is_no_byte_is_refused() -> None:
    """A slip of the pen does not become code."""
    with pytest.raises(ValueError, match="non-hexadecimal"):
        listing("8g ; oops")
