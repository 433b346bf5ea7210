"""New weights into a running model, in place; and weights that are put down while nobody asks.

Everything is checked before anything is changed, and every parameter stays the object that it is: whoever shares the
model sees the new values. Knows no requests: the caller stops the steps and forgets what was cached.

    update_weights(model, {"model.norm.weight": tensor})
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from puyu.errors import CheckpointError
from puyu.model.families import fuse_qkv, name_pairs
from puyu.model.heads import CausalLM, ScalarModel

Model = CausalLM | ScalarModel


@torch.no_grad()
def update_weights(model: Model, state: Mapping[str, Tensor]) -> None:
    """Copy tensors, by our names or by the checkpoint's; those that are not given stay as they are."""
    own = dict(model.state_dict())
    new = state if all(name in own for name in state) else our_names(model, state)
    for name, tensor in new.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} given, {tuple(own[name].shape)} in the model"
            raise CheckpointError(f"tensor {name!r} has the wrong shape: {shapes}", remedy="nothing was changed")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, the model's is {own[name].dtype}")
    _forget_packed(model)
    own = dict(model.state_dict())
    for name, tensor in new.items():
        own[name].copy_(tensor)


def our_names(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors fused into ours; CheckpointError for a name that is unknown or a part that is missing."""
    config, own = model.config, set(model.state_dict())
    head = config.row.reward_head if isinstance(model, ScalarModel) else config.row.head
    tied = isinstance(model, CausalLM) and model.head is None
    new, unused = {}, set(state)
    for ours, theirs in name_pairs(config, head=None if tied else head):
        for key in (key for key in own if key.startswith(ours + ".")):
            names = [name + key[len(ours) :] for name in theirs]
            given = [state[name] for name in names if name in state]
            if not given:
                continue
            if len(given) < len(names):
                missing = next(name for name in names if name not in state)
                raise CheckpointError(f"tensor {missing!r} is missing", remedy="give all parts of a fused layer")
            unused.difference_update(names)
            new[key] = _fused(ours, given, num_kv_heads=config.num_kv_heads)
    if tied:
        unused.discard(f"{head}.weight")
    if unused:
        raise CheckpointError(f"{len(unused)} tensors are not the model's: {sorted(unused)[:3]}")
    return new


def _fused(ours: str, parts: list[Tensor], *, num_kv_heads: int) -> Tensor:
    try:
        return fuse_qkv(parts, num_kv_heads=num_kv_heads) if ours.endswith(".qkv") else torch.cat(parts)
    except RuntimeError as error:
        shapes = [tuple(part.shape) for part in parts]
        raise CheckpointError(f"the parts of {ours!r} do not fit each other: {shapes}") from error


def drop_weights(model: Model) -> None:
    """Give the memory of all weights back."""
    _forget_packed(model)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.new_empty(0)


def refill_weights(model: Model, loaded: Model) -> None:
    """Take the tensors of an equal model after `drop_weights`; that one is not to be used any more."""
    fresh = loaded.state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = fresh[name].to(tensor.dtype)
    _forget_packed(model)


def _forget_packed(model: Model) -> None:
    """Layers that keep a packed copy of their weights drop it when they are loaded, even with nothing; those that lent
    their codes take them back."""
    model.load_state_dict({}, strict=False)
