"""Blocks taken from what was freed before cost no fresh pages; spared activations change no bit of a gradient."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from puyu.data.packing import pack_documents
from puyu.train import memory
from puyu.train.memory import MemoryConfig, keep_freed_pages, spare
from puyu.train.objectives import hidden_states, lm_loss
from tests.train import toys

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


def gradients(config, *, dtype=torch.float32):
    model = toys.model(dtype=torch.float32)
    model.set_compute_dtype(dtype)
    spare(model, config)
    output = lm_loss(model, pack_documents(toys.documents(12)))
    output.loss_sum.backward()
    return output.loss_sum.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint": "full"},
        {"checkpoint": "selective"},
        {"checkpoint": "full", "every": 2, "offload": True},
        {"offload": True},
    ],
)
def test_activations_that_are_spared_change_nothing(settings, dtype):
    wanted, found = gradients(MemoryConfig(), dtype=dtype), gradients(MemoryConfig(**settings), dtype=dtype)
    assert found[0] == wanted[0] and found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], grad) for name, grad in wanted[1].items())


def test_every_without_checkpoint_is_refused():
    with pytest.raises(ValidationError, match="every=2 has no use without checkpoint: set checkpoint to"):
        MemoryConfig(every=2)


def test_what_is_kept_and_what_goes_to_the_host(monkeypatch):
    sizes = {}
    for name, settings in (("none", {}), ("selective", {"checkpoint": "selective"}), ("full", {"checkpoint": "full"})):
        model, batch = toys.model(dtype=torch.float32), pack_documents(toys.documents(30))
        spare(model, MemoryConfig(**settings))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            hidden = hidden_states(model, batch)  # and its graph
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes[name] = sum(event.nbytes() for event in events)
        del hidden
    assert sizes["full"] < 0.5 * sizes["selective"] < 0.45 * sizes["none"]
    moved = []
    monkeypatch.setattr(memory, "to_host", lambda tensor: moved.append(tensor.numel()) or tensor)
    gradients(MemoryConfig(offload=True))
    assert len(moved) > 10
    del moved[:]
    gradients(MemoryConfig(offload=True, checkpoint="full"))
    assert len(moved) == 2  # the inputs of two blocks


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # said inside the tracer
def test_blocks_are_compiled_one_by_one(monkeypatch):
    compiled = []

    def traced_only(module, **_):  # a real back end takes a minute of a processor's time
        compiled.append(type(module).__name__)
        return eager(module, backend="eager")

    eager = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    wanted, found = gradients(MemoryConfig()), gradients(MemoryConfig(compile=True, checkpoint="full"))
    assert compiled == ["Block", "Block"]
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)
