"""Memory and work of the parts of a model, counted on its own code: two micro-batches pass through three blocks of fake
tensors, whatever the sizes. Embedding, one block and the head (with its loss) are told apart by hooks; a plan puts them
together for any depth. Parameters are not counted, new gradients are.

    like = Compute(torch.bfloat16)
    trunks = trace_trunks(config, row=4096, like=like)
    head = trace_head(config, 4096, like)
    trace_model(config, trunks, head, tokens=4096, row=4096, like=like).block.forward.stays
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from puyu.model.attention import PackedPlan
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear
from puyu.model.moe import ExpertMLP
from puyu.train import objectives
from puyu.train.float8 import float8_forward
from puyu.train.memory import MemoryConfig, spare
from puyu.train.planning.live import LiveBytes, Stretch

Checkpoint = Literal["none", "selective", "full"]
"""What is computed again in the backward pass."""

LONG = 2048
"""Rows from here on run through a flash kernel everywhere, and all grows in a line with the tokens."""


class Compute(NamedTuple):
    """How: the dtype of activations, whether on a CPU (whose loss works in smaller pieces) or a GPU, and on what is
    saved (see puyu/train/memory.py); `offload` sends activations to a host's memory, which a CPU's are in already."""

    dtype: torch.dtype
    cpu: bool = False
    checkpoint: Checkpoint = "none"
    offload: bool = False
    float8: bool = False


class Part(NamedTuple):
    """One part: forward; backward when it makes gradients; backward when it adds to those of a micro-batch before."""

    forward: Stretch
    first: Stretch
    later: Stretch


class Trace(NamedTuple):
    """The parts of a model, and what the forward pass of a norm keeps."""

    embedding: Part
    block: Part
    head: Part
    norm: int


Trunk = tuple[Part, Part, int]
"""Embedding, block, and what a norm keeps."""


def trace_model(
    config: ModelConfig, trunks: tuple[Trunk, ...], head: Part, *, tokens: int, row: int, like: Compute
) -> Trace:
    """Count one process's micro-batch of `tokens` tokens in documents of `row`.

    `tokens` may be a part of a long row, and is then a part of the work on it: on the line through one row and two,
    `trunks`, which may be counted once (`trace_trunks`) for all numbers of tokens; `head` is `trace_head`'s.
    """
    if row < LONG:
        with _default(like.dtype):
            embedding, block, norm = _trace_trunk(config, tokens, min(row, tokens), like)
            return Trace(embedding, block, head, norm)
    (low, high), share = trunks, tokens / row - 1
    return Trace(_between(low[0], high[0], share), _between(low[1], high[1], share), head, low[2] * tokens // row)


def trace_trunks(config: ModelConfig, *, row: int, like: Compute) -> tuple[Trunk, ...]:
    """The trunk at one row and at two, where rows are long."""
    if row < LONG:
        return ()
    with _default(like.dtype):
        return tuple(_trace_trunk(config, times * row, row, like) for times in (1, 2))


def trace_head(config: ModelConfig, tokens: int, like: Compute) -> Part:
    """Norm, head and loss of a micro-batch of `tokens` tokens."""
    with _default(like.dtype):
        return _trace_head(config, tokens, like.dtype, "cpu" if like.cpu else "meta")


def between(low: tuple[Trunk, ...], high: tuple[Trunk, ...], *, share: float) -> tuple[Trunk, ...]:
    """On the line through both: 0 is the first, 1 the second."""
    pairs = zip(low, high, strict=True)
    return tuple(
        (_between(a, x, share), _between(b, y, share), round(c + (z - c) * share)) for (a, b, c), (x, y, z) in pairs
    )


def _between(low: Part, high: Part, share: float) -> Part:
    return Part(*(a.towards(b, share) for a, b in zip(low, high, strict=True)))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Master weights are made in fp32, or in fp64 where that is the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _trace_trunk(config: ModelConfig, tokens: int, row: int, like: Compute) -> Trunk:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # tensors that say they are a CPU's: its attention keeps what a GPU's flash kernel does
        model = CausalLM(config.with_(num_layers=3, windows=()))
        model.set_compute_dtype(like.dtype)
        _equip(model, like)
        return _count_trunk(model, tokens, row)


def _equip(model: CausalLM, like: Compute) -> None:
    """As the Trainer does, but with even loads of the experts, which here are one; in the order in which it does."""
    for moe in (module for module in model.modules() if isinstance(module, ExpertMLP)):
        moe.forward = partial(_even, moe)  # type: ignore[method-assign]
    linear = (layer for layer in model.trunk.layers.modules() if type(layer) is Linear)
    for layer in linear if like.float8 else ():
        layer.forward = partial(float8_forward, layer, False)  # type: ignore[method-assign]
    spare(model, MemoryConfig(checkpoint=like.checkpoint))
    for block in model.trunk.layers if like.offload and not like.cpu else ():
        block.forward = partial(_hosted, block.forward)  # type: ignore[method-assign]


def _even(moe: ExpertMLP, x_TD: Tensor) -> Tensor:
    """What `ExpertMLP.forward` does, all rows through one expert: fake tensors cannot be counted by expert."""
    weights_Tk, chosen_Tk = moe.route(x_TD)
    order = chosen_Tk.flatten().argsort(stable=True)
    sorted_PD = torch.cat([moe.experts[0](x_TD[order // moe.per_token])])
    given_TkD = sorted_PD[order.argsort()].unflatten(0, chosen_Tk.shape)
    y_TD = (given_TkD * weights_Tk[..., None]).sum(dim=1).to(x_TD.dtype)
    if moe.shared is None or moe.shared_gate is None:
        return y_TD
    return y_TD + torch.sigmoid(moe.shared_gate(x_TD)) * moe.shared(x_TD)


def _hosted(forward: Callable[..., Tensor], x_TD: Tensor, *rest: Any) -> Tensor:
    """What goes to the host's memory is no tensor here until it comes back."""
    tokens = len(x_TD)

    def pack(tensor: Tensor) -> Any:
        stays = tensor.ndim < 2 or len(tensor) != tokens or isinstance(tensor, nn.Parameter)
        return tensor if stays else (tensor.shape, tensor.dtype)

    with saved_tensors_hooks(pack, lambda x: x if isinstance(x, Tensor) else torch.empty(x[0], dtype=x[1])):
        return forward(x_TD, *rest)


def _count_trunk(model: CausalLM, tokens: int, row: int) -> Trunk:
    live = LiveBytes(model.parameters())
    found: dict[str, list[Stretch]] = {}

    def mark(name: str) -> None:
        found.setdefault(name, []).append(live.mark())

    for index, block in enumerate(model.trunk.layers):
        block.register_forward_pre_hook(partial(_entered, mark, index))
        block.register_forward_hook(partial(_left, mark, index))
    ids, plan = torch.zeros(tokens, dtype=torch.long), PackedPlan.build(range(0, tokens, row), tokens)
    with live:
        for _ in range(2):
            mark("between")
            hidden_TD = model.trunk(ids, ids, plan)
            mark("norm")
            grad_TD = torch.empty_like(hidden_TD)
            mark("gradient")
            hidden_TD.backward(grad_TD)
            del hidden_TD, grad_TD
            mark("backward -1")
    first, middle = (Part(found[f"forward {i}"][0], *found[f"backward {i}"]) for i in (-1, 1))
    # What a block keeps is what its backward pass gives back: its input may be alive at one mark and not at the other.
    return first, middle._replace(forward=middle.forward._replace(stays=-middle.later.stays)), found["norm"][0].stays


def _entered(mark: Callable[[str], None], index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if index == 0:  # what enters the others is what left the one before
        mark("forward -1")
        inputs[0].register_hook(lambda _: mark("backward 0"))


def _left(mark: Callable[[str], None], index: int, _: nn.Module, inputs: object, output: Tensor) -> None:
    mark(f"forward {index}")
    output.register_hook(lambda _: mark(f"backward {index + 1}"))


def _trace_head(config: ModelConfig, tokens: int, dtype: torch.dtype, device: str) -> Part:
    """Norm and loss: on a CPU a few tokens for real, because its loss is native code."""
    if device == "cpu" and tokens > 2 * objectives.CHUNK_ROWS:
        low, high = (_trace_head(config, times * objectives.CHUNK_ROWS, dtype, device) for times in (1, 2))
        return _between(low, high, tokens / objectives.CHUNK_ROWS - 1)
    found = []
    with torch.device(device):
        model = CausalLM(config.with_(num_layers=1, windows=()))
        ids, weights = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.float32)
        live = LiveBytes([*model.parameters(), ids, weights])
        for _ in range(2):
            with live:
                x_TD = torch.zeros(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
                live.mark()
                hidden_TD = model.trunk.norm(x_TD)
                loss, _ = objectives.chunked_cross_entropy(hidden_TD, objectives.head_weight(model), ids, weights)
                del hidden_TD
                found.append(live.mark())
                loss.backward()
                del loss, _
                found.append(live.mark())
                del x_TD
    return Part(found[0], found[1], found[3])
