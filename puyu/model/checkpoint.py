"""A checkpoint is a directory in Hugging Face layout: config.json, safetensors (sharded or not), tokenizer files.

    model = load_model(Path("runs/nano/sft"))
    save_model(model, Path("out"))

Every tensor is accounted for: a missing, extra, misshapen or truncated one is an error that names it.
Pickle weights are read only when asked for (`weights.py`). Knows no tokenizer: `copy_side_files` carries those files
along unread.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from puyu.errors import CheckpointError
from puyu.files import read_object, write_json
from puyu.hub import base_of
from puyu.model.config import ModelConfig
from puyu.model.families import fuse_qkv, name_pairs, split_qkv
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.linear import QuantLinear
from puyu.model.quant_files import FileForm
from puyu.model.quant_modules import fill_quantized, quantized_tensors
from puyu.model.weights import Stored, open_weights, save_weights

TUNING = "tuning.json"
"""Beside an adapter: on what kind of base it was trained, and with which positions."""
POSITIONS = ("max_positions", "rope_theta", "rope_scaling")
"""Fields of a model's config."""
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)

M = TypeVar("M", CausalLM, ScalarModel)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint directory, or of the base of an adapter's."""
    if not folder.is_dir():
        raise CheckpointError(f"no such checkpoint directory: {folder}", remedy="check the path")
    if (base := base_of(folder)) != folder:
        return read_config(base).with_(**trained_positions(folder))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json", remedy="it is not a checkpoint directory")
    config = ModelConfig.from_hf(read_object(folder / "config.json"), where=str(folder / "config.json"))
    return config.with_(stop_ids=_stop_ids(config, folder / "generation_config.json"))


def trained_positions(folder: Path) -> dict[str, Any]:
    """The fields of the positions that an adapter was trained with, where it says them: it may have stretched them."""
    path = folder / TUNING
    found = read_object(path).get("positions") if path.is_file() else None
    return {name: found[name] for name in POSITIONS} if isinstance(found, Mapping) else {}


def _stop_ids(config: ModelConfig, path: Path) -> tuple[int, ...]:
    """All end ids of config.json and generation_config.json, when they are more than the model's own."""
    ends = read_object(path).get("eos_token_id") if path.is_file() else None
    more = ends if isinstance(ends, list) else [ends]
    found = dict.fromkeys(id for id in (config.eos_id, *config.stop_ids, *more) if id is not None)
    return tuple(found) if len(found) > 1 else ()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
    context: int | None = None,
) -> CausalLM:
    """Load a language model, quantized or not, for contexts of `context` tokens when the trained length is shorter.

    An adapter's directory is its base with the adapter merged.
    """
    config = read_config(folder)
    if (base := base_of(folder)) != folder:
        from puyu.model.adapter_files import merge_adapter  # which makes its layers of what this module loads

        model = load_model(base, allow_pickle=allow_pickle)
        merge_adapter(model, folder)
        model.set_shape(model.config.with_(**trained_positions(folder)))
        model = model.to(dtype)
    else:
        head = None if config.tie_embeddings else config.row.head
        model = _filled(CausalLM, config, folder, head=head, dtype=dtype, allow_pickle=allow_pickle)
    if context is not None:
        model.set_context(context)
    return model.to(device)


def load_scalar_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ScalarModel:
    """Load a reward or value model."""
    config = read_config(folder)
    return _filled(ScalarModel, config, folder, head=config.row.reward_head, dtype=dtype).to(device)


def is_scalar_checkpoint(folder: Path) -> bool:
    """Whether the directory holds a reward model (by its architecture)."""
    names = read_object(base_of(folder) / "config.json").get("architectures") or [""]
    return names[0] == read_config(folder).row.reward_architecture


def scalar_from_language(folder: Path, *, dtype: torch.dtype = torch.float32) -> ScalarModel:
    """A scalar model on the trunk of a language model; its head is zero."""
    language = load_model(folder, dtype=dtype)
    model = ScalarModel(language.config)
    model.trunk.load_state_dict(language.trunk.state_dict())
    return model.to(dtype)


def _filled(
    kind: type[M],
    config: ModelConfig,
    folder: Path,
    *,
    head: str | None,
    dtype: torch.dtype,
    allow_pickle: bool = False,
) -> M:
    with torch.device("meta"):
        model = kind(config)
    with open_weights(folder, allow_pickle=allow_pickle) as stored:
        if config.quantization:
            form, pairs = FileForm.from_config(config.quantization), list(name_pairs(config, head=head))
            fill_quantized(model, form, pairs=pairs, take=stored.take, names=frozenset(stored.unused))
        state = _our_state(model, stored, head=head, dtype=dtype, folder=folder)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _our_state(
    model: nn.Module, stored: Stored, *, head: str | None, dtype: torch.dtype, folder: Path
) -> dict[str, Tensor]:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    config: ModelConfig = model.trunk.config  # type: ignore[union-attr, assignment]
    codes = _codes(model)
    state: dict[str, Tensor] = {key: tensor for key, tensor in model.state_dict().items() if key in codes}
    expected = {key: shape for key, shape in expected.items() if key not in codes}
    for ours, theirs in name_pairs(config, head=head):
        for suffix in (key[len(ours) + 1 :] for key in expected if key.startswith(ours + ".")):
            parts = [stored.take(f"{name}.{suffix}") for name in theirs]
            tensor = _joined(ours, parts, config)
            key = f"{ours}.{suffix}"
            if tensor.shape != expected[key]:
                shapes = f"{tuple(tensor.shape)} stored, {tuple(expected[key])} by config.json"
                raise CheckpointError(f"{folder}: tensor {theirs[0]}.{suffix} has the wrong shape: {shapes}")
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            # one that stands in the file alone is copied, since the file may change under its pages
            state[key] = tensor.to(kind, copy=len(parts) == 1).contiguous()
    _check_left(stored, config)
    return state


def _joined(ours: str, parts: list[Tensor], config: ModelConfig) -> Tensor:
    """One tensor of ours from those of the checkpoint."""
    if ours.endswith(".qkv"):
        return fuse_qkv(parts, num_kv_heads=config.num_kv_heads)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def stored_values(model: CausalLM, folder: Path) -> Callable[[str, tuple[int, ...]], Tensor]:
    """The values of a model on the meta device by name of parameter, from a checkpoint that is not quantized.

    Each is mapped when it is asked for, and read where it is looked at (one that the checkpoint holds in parts is read
    whole). CheckpointError, at once, where tensors are missing, left over, or of another shape.
    """
    config, theirs = model.config, {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with open_weights(folder) as stored:
        for ours, names in name_pairs(config, head=_head_name(model)):
            for key in (key for key in shapes if key.startswith(ours + ".")):
                theirs[key] = ours, [f"{name}.{key[len(ours) + 1 :]}" for name in names]
        for key, (_, parts) in theirs.items():
            found = [stored.shape(part) for part in parts]
            if (sum(shape[0] for shape in found), *found[0][1:]) != tuple(shapes[key]):
                shape = f"{[tuple(shape) for shape in found]} stored, {tuple(shapes[key])} by config.json"
                raise CheckpointError(f"{folder}: tensor {parts[0]} has the wrong shape: {shape}")
        _check_left(stored, config)

    def value(name: str, _: tuple[int, ...]) -> Tensor:
        ours, names = theirs[name]
        with open_weights(folder) as stored:
            return _joined(ours, [stored.take(part) for part in names], config)

    return value


def _check_left(stored: Stored, config: ModelConfig) -> None:
    left = sorted(name for name in stored.unused if not ignorable(name))
    if left:
        raise CheckpointError(
            f"{stored.folder}: {len(left)} tensors are not part of a {config.family} model: {left[:3]}"
        )


def _codes(model: nn.Module) -> set[str]:
    """Names of the tensors of quantized layers, which `quant_modules` reads and writes; their biases are not among
    them."""
    layers = [(name, child) for name, child in model.named_modules() if isinstance(child, QuantLinear)]
    return {f"{name}.{key}" for name, layer in layers for key in layer.state_dict() if key != "bias"}


def ignorable(name: str) -> bool:
    """Old exports store rotary tables; tied models may store the head a second time."""
    return name.endswith("rotary_emb.inv_freq") or name in ("lm_head.weight", "output.weight")


def their_state(model: CausalLM | ScalarModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's tensors under the names of its family (`state`: a full state dict gathered by the caller);
    integer codes are left out, their packing is the business of `save_model`."""
    config = model.config
    state = model.state_dict() if state is None else state
    codes = _codes(model)
    result: dict[str, Tensor] = {}
    for ours, theirs in name_pairs(config, head=_head_name(model)):
        for key in [key for key in state if key.startswith(ours + ".") and key not in codes]:
            suffix = key[len(ours) + 1 :]
            for name, part in zip(theirs, _split(ours, state[key], len(theirs), config), strict=True):
                result[f"{name}.{suffix}"] = part.detach().cpu().contiguous().clone()
    return result


def _head_name(model: CausalLM | ScalarModel) -> str | None:
    if isinstance(model, ScalarModel):
        return model.config.row.reward_head
    return None if model.head is None else model.config.row.head


def _split(ours: str, tensor: Tensor, num_parts: int, config: ModelConfig) -> list[Tensor]:
    if ours.endswith(".qkv"):
        sizes = {"num_kv_heads": config.num_kv_heads, "queries_per_kv": config.queries_per_kv}
        return split_qkv(tensor, num_parts=num_parts, **sizes)
    return list(tensor.chunk(num_parts))


def save_model(
    model: CausalLM | ScalarModel,
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors (each by rename).

    `dtype` casts floating tensors; `extra` adds keys to config.json (a reward token id, for example); more than
    `max_shard_bytes` of weights become several files with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config or model.config
    tensors = their_state(model, state)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if config.quantization:
        form, pairs = FileForm.from_config(config.quantization), list(name_pairs(config, head=_head_name(model)))
        tensors |= quantized_tensors(
            model, form, pairs=pairs, split=lambda ours, rows, n: _split(ours, rows, n, config)
        )
    save_weights(folder, tensors, max_shard_bytes=max_shard_bytes)
    scalar = isinstance(model, ScalarModel)
    write_config(folder, config, dtype=tensors[f"{config.row.norm}.weight"].dtype, scalar=scalar, extra=extra)


def write_config(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    scalar: bool = False,
    extra: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """config.json, and for a language model generation_config.json (`generation`: what else it says)."""
    value = config.to_hf(architecture=config.row.reward_architecture if scalar else None)
    value["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**value, **(extra or {})})
    if not scalar:
        ids = {"bos_token_id": config.bos_id, "eos_token_id": value["eos_token_id"], "pad_token_id": config.pad_id}
        write_json(folder / "generation_config.json", {**(generation or {}), **ids})


def copy_side_files(source: Path, folder: Path) -> None:
    """Carry the tokenizer's files from one checkpoint directory to another."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
