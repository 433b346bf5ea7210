"""How far two schedules may move a logit in the default mode, and so when greedy answers may differ.

Sums are taken in another order when a prompt is cut into other chunks, a batch has other rows, a guess is checked, or a
preempted request is computed again; activations that are rounded to int8 or bf16 on the way may then fall to the other
side. Only rounding differs, so a token can differ only where the two likeliest are closer than this. `deterministic`
knows no difference.

    close = (best - second) / largest <= margin_bound(model)     # logits of one row; the largest by absolute value
"""

from __future__ import annotations

import torch

from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.linear import QuantLinear

_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 0.015, torch.bfloat16: 0.1}
_ROUNDED = 0.02
"""With activations, keys or values in integers: a number may fall to the other side of half a step."""


def margin_bound(model: CausalLM | ScalarModel, *, codes: bool = False) -> float:
    """A share of the row's largest logit: twice what tests/engine/test_bounds.py sees with large random weights.

    `codes`: keys and values are cached as integers.
    """
    dtype = model.trunk.compute_dtype or model.trunk.embedding.weight.dtype
    rounded = codes or any(isinstance(module, QuantLinear) for module in model.modules())
    return max(_BOUNDS[dtype], _ROUNDED if rounded else 0.0)
