"""Blocked dense attention against SDPA, values and gradients, in exact arithmetic and in bf16."""

import pytest
import torch
from torch.nn import functional as F

from puyu.model import dense


def reference(q, k, v):
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(repeat, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (3, 1)])
def test_equals_sdpa_with_gradients(length, heads, kv):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, n, 8) for n in (heads, kv, kv)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weight = torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64)
    results = []
    for attend in (dense.dense_causal, reference):
        output = attend(*inputs)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_bf16_is_as_close_to_exact_as_sdpa():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 200, n, 16, generator=generator) for n in (4, 2, 2)]
    wanted = reference(*exact)
    rough = [x.bfloat16() for x in exact]
    ours = (dense.dense_causal(*rough).float() - wanted).abs().mean()
    theirs = (reference(*rough).float() - wanted).abs().mean()
    assert ours < 1.5 * theirs


def test_it_is_chosen_only_for_bf16_training_on_a_cpu():
    row = torch.zeros(1, 8, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    assert dense.suits(row)
    assert not dense.suits(row.float()) and not dense.suits(row.detach())
    assert not dense.suits(torch.zeros(1, dense.LONGEST + 1, 1, 1, dtype=torch.bfloat16, requires_grad=True))
    with torch.no_grad():
        assert not dense.suits(row)
