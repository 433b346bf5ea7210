"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations move into the weights.

Channel i is divided by s_i = max|x_i|^alpha / max|w_i|^(1 - alpha) where a norm comes before the layer, so that int8
with one scale a token holds what is left.

    smooth(block, seen, alpha=0.5)         # the block computes the same as before
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from puyu.model.transformer import Block
from puyu.quant.calibrate import Seen
from puyu.quant.folding import fold, pairs_of

AFTER_NORMS = ("attention.qkv", "mlp.gate_up")


@torch.no_grad()
def smooth(block: Block, seen: Mapping[str, Seen], *, alpha: float) -> None:
    """Fold the scales of layers behind norms."""
    for pair in pairs_of(block):
        if pair.name in AFTER_NORMS and seen[pair.name].tokens:
            fold(pair, smoothing(pair.layer.weight.detach(), seen[pair.name].largest_I, alpha=alpha))


def smoothing(weight_OI: Tensor, largest_I: Tensor, *, alpha: float) -> Tensor:
    """s [I], fp64; 1 where a channel is never used."""
    x_I, w_I = largest_I.double(), weight_OI.abs().amax(dim=0).double()
    used = (x_I > 0) & (w_I > 0)
    s_I = torch.where(used, x_I, 1.0) ** alpha / torch.where(used, w_I, 1.0) ** (1 - alpha)
    return s_I.clamp(min=1e-5)
