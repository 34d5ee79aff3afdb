"""Memory goes back to the operating system, in a process of its own: this one's heap is in many hands."""

import subprocess
import sys

import pytest

from serving.memory import unchanged_of_libraries

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
    # Python's own, for what is asked and printed between, apart.
    assert abs(kept - small) < 256 * 1024
    assert large > changed
    assert left < changed // 4


LIBRARIES = """
import numpy as np
import tensorflow as tf
from serving.memory import Memory, resident_bytes
values = np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)
answer = lambda: tf.nn.softmax(tf.linalg.matmul(values, tf.sin(values))).numpy()
first, before = answer(), resident_bytes()
Memory().give_back_libraries()
after = resident_bytes()
assert (answer() == first).all()
# What has not run before is there, too.
found, wanted = tf.linalg.svd(values, compute_uv=False).numpy(), np.linalg.svd(values, compute_uv=False)
assert abs(found - wanted).max() < 1e-3
print(before, after, resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the mappings are Linux's")
def test_what_tensorflow_s_import_read_is_given_back_and_what_is_needed_comes_again():
    ended = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True)
    before, after, later = map(int, ended.stdout.split())
    assert after < before - 100 * 2**20
    assert later < before - 100 * 2**20


def mapping(start: int, permissions: str, file: str, anonymous_kb: int) -> str:
    return (
        f"{start:012x}-{start + 0x3000:012x} {permissions} 00001000 103:02 4711                    {file}\n"
        f"Size:                 12 kB\nRss:                  12 kB\nAnonymous:        {anonymous_kb:6} kB\n"
    )


def test_only_pages_that_are_as_in_the_file_are_given_back():
    mappings = [
        mapping(0x1000, "r-xp", "/lib/libm.so.6", 0),
        mapping(0x4000, "r--p", "/lib/libm.so.6", 4),
        mapping(0x8000, "rw-p", "/lib/libm.so.6", 0),
        mapping(0xC000, "rw-p", "", 12),
        mapping(0x10000, "r--p", "", 0),
        mapping(0x14000, "r--s", "/home/models/some.data", 0),
        mapping(0x18000, "r--p", "/opt/a b/_some.cpython-311-x86_64-linux-gnu.so", 0),
        mapping(0x1C000, "r-xp", "[vdso]", 0),
    ]
    assert list(unchanged_of_libraries("".join(mappings))) == [(0x1000, 0x3000), (0x18000, 0x3000)]
