"""The kernel that makes the values of NF4 codes against torch's own, bit for bit, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from puyu.model import nf4, nf4_triton
from puyu.model.nf4 import NF4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bf16 instead of rounding
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (40, 1024), (65, 2112)])
def test_values_are_those_of_torch(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[0], 1) ** 4
    made = NF4.of(weight)
    ours = nf4_triton.nf4_values(made.codes, made.block_scales(), torch.tensor(nf4.TABLE), dtype)
    monkeypatch.setattr(nf4, "nf4_values", lambda *_, **__: None)
    theirs = made.dequantized(dtype)
    assert ours.shape == theirs.shape and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
