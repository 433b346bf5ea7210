"""Round to nearest: codes for one weight matrix. No calibration data, no model, no files.

codes = rtn(weight_OI, QuantFormat(4, 64, symmetric=False))
error = (codes.dequantized() - weight_OI).norm()
"""

from __future__ import annotations

from torch import Tensor

from puyu.model.linear import QuantFormat, QuantWeight
from puyu.quant.grid import best_grid, grouped


def rtn(weight_OI: Tensor, form: QuantFormat) -> QuantWeight:
    """Codes of a finite weight in the given format."""
    w_OGg = grouped(weight_OI.float(), form)
    grid = best_grid(w_OGg, form)
    return grid.weight(grid.codes(w_OGg), form)
