"""A plain model on many processes: layouts are applied from outside, and the loss is that of one process.

layout = make_layout(LayoutConfig(tensor=2), model, lm_loss, device=device)
"""

from __future__ import annotations

import torch
from torch import nn

from puyu.train.layouts.base import Blank, Layout
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.pipeline import PipelineLayout
from puyu.train.objectives import Objective

__all__ = ["Blank", "Layout", "LayoutConfig", "make_layout"]


def make_layout(config: LayoutConfig, model: nn.Module, objective: Objective, *, device: torch.device) -> Layout:
    """Spread the model, in place."""
    kind = Layout if config.pipeline == 1 else PipelineLayout
    return kind(config, model, objective, device=device)
