"""keep_freed_pages: a large block that is freed and taken again costs no fresh pages."""

import json
import platform
import subprocess
import sys

import torch

from puyu.train.memory import keep_freed_pages

PROGRAM = """
import json, resource, sys, torch
from puyu.train.memory import keep_freed_pages
agreed = keep_freed_pages(torch.device("cpu")) if sys.argv[1] == "keep" else False
torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 23)
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
