"""Memory of training: which activations are kept, recomputed or moved to the host, and per-block compilation.

Applied from outside to the blocks of a plain model, before it is spread over processes; the losses stay the same.

    spare(model, MemoryConfig(checkpoint="selective"))

Full: a block keeps its input only and is computed twice (Chen et al. 2016, arXiv 1604.06174). Selective: outputs of
products and of attention are kept, what is cheap is computed again (Korthikanti et al. 2022, arXiv 2205.05198).

On a CPU, glibc gives large blocks back to the system at once, so that each step pays for fresh, zeroed pages again;
`keep_freed_pages` asks it not to. Linux with glibc only; elsewhere it does nothing.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puyu.configure import Config

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_aten = torch.ops.aten
_KEPT = {
    *(_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default),
    *(_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default),
    *(_aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default),
}
"""Operations whose outputs the selective way keeps. Scores of attention are not among them: they grow with T x T."""


class MemoryConfig(Config):
    """What a run saves on, in exchange for time."""

    checkpoint: Literal["none", "selective", "full"] = "none"
    """Which activations are computed again in the backward pass: none, the cheap ones, or all of a block."""
    every: int = Field(default=1, ge=1)
    """Only in every n-th block."""
    offload: bool = False
    """Keep saved activations in the host's memory."""
    compile: bool = False
    """Compile each block with torch.compile."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.every > 1 and self.checkpoint == "none":
            raise ValueError(f"every={self.every} has no use without checkpoint: set checkpoint to selective or full")
        return self


def spare(model: nn.Module, config: MemoryConfig) -> None:
    """Have the blocks of the model's trunk run as the config says, in place. Names of parameters stay as they are."""
    if config == MemoryConfig():
        return
    trunk = model.trunk
    assert isinstance(trunk, nn.Module) and isinstance(trunk.layers, nn.ModuleList)
    for index, block in enumerate(trunk.layers):
        if config.checkpoint != "none" and index % config.every == 0:
            block.forward = partial(_recomputed, block.forward, _contexts(config.checkpoint), _draws(block))  # type: ignore[method-assign]
        if config.offload:
            block.forward = partial(_offloaded, block.forward)  # type: ignore[method-assign]
        if config.compile:
            block.compile()


Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def _contexts(kind: str) -> Contexts:
    if kind == "full":
        return lambda: (nullcontext(), nullcontext())
    return partial(create_selective_checkpoint_contexts, _policy)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(block: nn.Module) -> bool:
    """Whether random numbers are drawn inside a block (by an adapter's dropout): the same ones must come again."""
    return any(isinstance(module, nn.Dropout) for module in block.modules())


def _recomputed(forward: Callable[..., Tensor], contexts: Contexts, draws: bool, x_TD: Tensor, *rest: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x_TD, *rest)
    found: Tensor = checkpoint(forward, x_TD, *rest, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)  # type: ignore[no-untyped-call]
    return found


def _offloaded(forward: Callable[..., Tensor], x_TD: Tensor, *rest: Any) -> Tensor:
    """Only what has a row for each token goes to the host: weights are needed by the next step anyway."""
    tokens = len(x_TD)

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.ndim < 2 or len(tensor) != tokens or isinstance(tensor, nn.Parameter):
            return tensor.device, tensor
        return tensor.device, to_host(tensor)

    with saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True)):
        return forward(x_TD, *rest)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory of the host; on a CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return room.copy_(tensor, non_blocking=True)


def keep_freed_pages(device: torch.device) -> bool:
    """Ask the allocator to hold on to freed memory while this process lives; returns whether it agreed."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    asked = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(name, value) == 1 for name, value in asked)
