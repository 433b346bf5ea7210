"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels with large activations get finer steps.

Input channel i of a layer is multiplied by s_i = mean|x_i|^alpha and the activation divided by it beforehand
(`folding.py`); alpha is the one of a grid with the least error of the layer's outputs. Then each group's range is
clipped where that lowers the same error. Both errors come from the Gram matrix of the inputs:
|dW X|^2 = trace(dW H dW^T), within a group for the clipping.

    awq_scales(block, seen, form)          # the block computes the same as before
    codes = awq(layer.weight, seen.gram_II, form)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from puyu.model.linear import QuantFormat, QuantWeight
from puyu.model.transformer import Block
from puyu.quant.calibrate import Seen
from puyu.quant.folding import Pair, fold, pairs_of
from puyu.quant.grid import Grid, best_grid, full_grid, grouped

ALPHAS = tuple(step / 20 for step in range(20))
SMALLEST_CLIP = 0.5


@torch.no_grad()
def awq_scales(block: Block, seen: Mapping[str, Seen], form: QuantFormat) -> dict[str, Seen]:
    """Fold the best scales into the block; returns what its layers see afterwards."""
    after = dict(seen)
    for pair in pairs_of(block):
        if seen[pair.name].tokens:
            scales_I = best_scales(pair, seen[pair.name], form)
            fold(pair, scales_I)
            after[pair.name] = seen[pair.name].divided(scales_I)
    return after


def best_scales(pair: Pair, seen: Seen, form: QuantFormat) -> Tensor:
    """s [I] in fp64 with the least error of the outputs; all ones is among the candidates."""
    weight_OI = pair.layer.weight.detach().double()
    mean_I = pair.free(seen.mean_I).clamp(min=1e-4)
    candidates = [_normalized(mean_I**alpha) for alpha in ALPHAS]
    errors = [output_error(_rounded(weight_OI * s_I, form) / s_I - weight_OI, seen.gram_II) for s_I in candidates]
    return candidates[int(torch.stack(errors).argmin())]


def output_error(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """|dW X|^2, summed over outputs and tokens."""
    return ((difference_OI @ gram_II) * difference_OI).sum()


def awq(weight_OI: Tensor, gram_II: Tensor, form: QuantFormat) -> QuantWeight:
    """Codes with ranges clipped for the least error of each group's part of the outputs."""
    w_OGg = grouped(weight_OI.double(), form)
    gram_Ggg = _blocks(gram_II, w_OGg.shape[-1])

    def loss(difference_OGg: Tensor) -> Tensor:
        return (torch.einsum("ogi,gij->ogj", difference_OGg, gram_Ggg) * difference_OGg).sum(dim=-1)

    grid = best_grid(w_OGg, form, loss, smallest=SMALLEST_CLIP)
    return grid.weight(grid.codes(w_OGg), form)


def _blocks(gram_II: Tensor, size: int) -> Tensor:
    """The diagonal blocks of H, [G, g, g]."""
    count = len(gram_II) // size
    return gram_II.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _normalized(s_I: Tensor) -> Tensor:
    """Largest times smallest becomes 1, so that weights keep their size."""
    return s_I / (s_I.max() * s_I.min()).sqrt()


def _rounded(weight_OI: Tensor, form: QuantFormat) -> Tensor:
    w_OGg = grouped(weight_OI, form)
    grid: Grid = full_grid(w_OGg, form)
    return grid.values(grid.codes(w_OGg)).flatten(1)
