"""Freed memory goes back to the operating system, in a process of its own: this one's heap is in many hands."""

import subprocess
import sys

import pytest

# Many small blocks, too small to be mapped one by one, with one at the end that keeps the heap from shrinking.
BURST = """
import ctypes
from serving.memory import CHANGED_BYTES, Memory, resident_bytes
memory = Memory()
memory.give_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def burst(size):
    blocks = [libc.malloc(4096) for _ in range(size // 4096)]
    for block in blocks:
        ctypes.memset(block, 1, 4096)
    last = libc.malloc(4096)
    for block in blocks:
        libc.free(block)
before = resident_bytes()
burst(CHANGED_BYTES // 4)
small = resident_bytes()
memory.give_back()
print(small - before, resident_bytes() - before)
burst(CHANGED_BYTES * 2)
large = resident_bytes()
memory.give_back()
print(large - before, resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_a_burst_s_memory_is_given_back_where_it_is_large():
    ended = subprocess.run([sys.executable, "-c", BURST], capture_output=True, text=True, check=True)
    (small, kept), (large, left) = [map(int, line.split()) for line in ended.stdout.splitlines()]
    changed = 32 * 2**20
    assert small > changed // 8
    assert kept == small
    assert large > changed
    assert left < changed // 4
