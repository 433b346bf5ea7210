"""keep_freed_pages: blocks taken from what was freed before cost no fresh pages."""

import json
import platform
import subprocess
import sys

import torch

from puyu.train.memory import keep_freed_pages

PROGRAM = """
import ctypes, json, resource, sys, torch
from puyu.train.memory import keep_freed_pages
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
agreed = keep_freed_pages(torch.device("cpu")) if sys.argv[1] == "keep" else False
def use():
    block = libc.malloc(1 << 26)
    ctypes.memset(block, 1, 1 << 26)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(json.dumps([agreed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(word):
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_pages_are_kept_where_the_allocator_can():
    agreed, kept = faults("keep")
    assert agreed == (platform.libc_ver()[0] == "glibc")
    if agreed:
        assert kept < faults("plain")[1] / 10
    assert keep_freed_pages(torch.device("meta")) is False
