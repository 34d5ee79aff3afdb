"""Integers of any size, seven bits a byte, the least first: as protocol buffers and HPACK write them."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """A number that is not negative."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
