"""Checkpoint folders of one form -> another: InternLM2, InternLM and LLaMA of Hugging Face, InternEvo's shards.

    done = convert(ConvertConfig(source=folder, out=out, to="internevo", tp=2, pp=3))

Only rows and columns move, no number changes, so that back and forth gives the same bits. (One exception, and it is
said: with `norm_head` InternEvo normalizes the head's rows at every use, other forms get them normalized, as from
InternEvo's own converter.) What a form cannot express is an error that names it, before anything is written. Tensors
pass one by one: memory holds one and its pieces. `out` appears by rename when all of it is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from puyu.configure import Config
from puyu.errors import CheckpointError, ConfigError
from puyu.files import clear_folder, disk_errors, hash_json, read_object
from puyu.lineage import Lineage, code_version, input_of, machine, now, write_lineage
from puyu.model.checkpoint import (
    SIDE_FILES,
    copy_side_files,
    ignorable,
    is_scalar_checkpoint,
    read_config,
    write_config,
)
from puyu.model.config import ModelConfig
from puyu.model.families import fuse_qkv, split_qkv
from puyu.model.internevo import CONFIG, Layout, check_layout, is_internevo, read_internevo, write_internevo
from puyu.model.rope import KINDS
from puyu.model.streams import SafetensorsWriter
from puyu.model.units import Join, Slot, Source, Unit, checked, slots, tensor_names
from puyu.model.weights import Stored, open_weights, shard_names, shards_of, write_index

GENERATION = "generation_config.json"
VERSION = 1
"""Raised when the same order would give other files."""


class ConvertConfig(Config):
    source: Path
    """Folder of the model to read."""
    out: Path
    """Folder to write; must not be there yet, or be empty."""
    to: Literal["internlm2", "internlm", "llama", "internevo"]
    """The form to write."""
    tp: int = Field(1, ge=1)
    """InternEvo: tensor ranks."""
    pp: int = Field(1, ge=1)
    """InternEvo: pipeline ranks."""
    interleaved: bool | None = None
    """InternEvo: queries and keys in even and odd pairs (adapt_hf=False); left out: as the source has them."""
    split_vocab: bool = False
    """InternEvo: cut the embedding by tokens, not by hidden units (embed_split_hidden=False)."""
    allow_pickle: bool = False
    """Read pickles (InternEvo's files, pytorch_model.bin)."""
    untie: bool = False
    """Write a tied embedding a second time, as the head."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files, where the source has none."""
    max_positions: int | None = Field(None, ge=1)
    """Longest context, where an InternEvo folder does not say it."""
    max_shard_bytes: int = Field(5 << 30, ge=1)
    """Largest .safetensors file."""


@dataclass(frozen=True)
class Form:
    """What one form can say."""

    positions: tuple[str, ...]
    """Kinds of rope_scaling."""
    biases: bool = True
    mlp_biases: bool = False
    groups: bool = True
    """Fewer key and value heads than query heads."""
    head_dim: bool = False
    """Heads of another size than hidden_size / num_heads."""
    tied: bool = True


FORMS: dict[str, Form] = {
    "internlm2": Form(positions=("linear", "dynamic")),
    "internlm": Form(positions=("dynamic",), groups=False),
    "llama": Form(positions=KINDS, mlp_biases=True, head_dim=True),
    "internevo": Form(positions=("dynamic",), biases=False, tied=False),
}
_CODE_KEYS = ("auto_map", "attn_implementation", "rotary", "pretraining_tp")
"""Keys of config.json that belong to one family's code."""


@dataclass(frozen=True)
class Done:
    """What was written."""

    folder: Path
    files: int
    tensors: int
    size: int
    """Bytes of all files with weights."""
    notes: tuple[str, ...] = ()


def convert(order: ConvertConfig) -> Done:
    """Read, check, write; `order.out` is complete when this returns, and not there when it raises."""
    if order.out.is_file() or (order.out.is_dir() and any(order.out.iterdir())):
        raise ConfigError(f"{order.out} is there already", remedy="choose another folder, or remove it")
    if order.tokenizer is not None and not any((order.tokenizer / name).is_file() for name in SIDE_FILES):
        raise ConfigError(f"--tokenizer {order.tokenizer} has no tokenizer's files", remedy="give their folder")
    with open_source(order) as source:
        config = expressed(source.config, order.to)
        layout = _layout(order, source)
        if order.to == "internevo":
            check_layout(config, layout)
        with _appearing(order.out) as folder:
            how = layout if order.to == "internevo" else order.max_shard_bytes
            count, notes = _write(folder, config, source, how)
            _write_beside(folder, config, source, order)
            weights = [path for path in folder.glob("model*") if path.suffix in (".pt", ".safetensors")]
            sizes = [path.stat().st_size for path in weights if path.name != CONFIG]
            numbers = {"files": len(sizes), "tensors": count, "bytes": sum(sizes), "notes": list(notes)}
            write_lineage(folder, _lineage(order, numbers))
    return Done(order.out, len(sizes), count, sum(sizes), notes)


def _lineage(order: ConvertConfig, numbers: dict[str, Any]) -> Lineage:
    made_from = (input_of("source", order.source),)
    values = order.model_dump(mode="json", exclude={"out", "source", "tokenizer"})
    key = hash_json(["convert", VERSION, values, made_from[0].key])
    about: dict[str, Any] = {"finished": now(), "code": code_version(), "machine": machine()}
    return Lineage("convert", key, VERSION, values, made_from, numbers, **about)


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well; what a kill left of one is removed."""
    folder = out.absolute().with_name(f".{out.absolute().name}.partial")
    with disk_errors(folder):
        clear_folder(folder)
        folder.mkdir(parents=True)
    try:
        yield folder
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
    finally:
        clear_folder(folder)


def _layout(order: ConvertConfig, source: Source) -> Layout:
    interleaved = source.interleaved if order.interleaved is None else order.interleaved
    return Layout(order.tp, order.pp, interleaved, order.split_vocab)


def _write(folder: Path, config: ModelConfig, source: Source, how: Layout | int) -> tuple[int, tuple[str, ...]]:
    """Weights; returns how many tensors, and what else is to be said."""
    if isinstance(how, Layout):
        count = write_internevo(folder, config, source.units, layout=how, norm_head=source.norm_head)
        return count, ()
    if not source.norm_head:
        return write_folder(folder, config, source.units, max_shard_bytes=how), ()
    units = [unit.then(partial(F.normalize, dim=-1)) if unit.slot.name == "head" else unit for unit in source.units]
    note = "norm_head: the rows of the head were normalized; the way back gives the normalized ones"
    return write_folder(folder, config, units, max_shard_bytes=how), (note,)


def _write_beside(folder: Path, config: ModelConfig, source: Source, order: ConvertConfig) -> None:
    """config.json, generation_config.json and the tokenizer. They go with InternEvo's files, too, for the way back."""
    path = order.source / GENERATION
    generation = read_object(path) if path.is_file() else None
    norm = next(unit for unit in source.units if unit.slot.name == "norm")
    write_config(folder, config, dtype=norm.dtype, generation=generation)
    copy_side_files(order.tokenizer or order.source, folder)


# --- what can be said ----------------------------------------------------------------------------------------------


def obstacles(config: ModelConfig, to: str) -> Iterator[str]:
    """What of this model the form cannot express."""
    form = FORMS[to]
    if config.quantization:
        yield "quantized weights"
    if config.experts is not None:
        yield "experts"
    if config.row.qk_norm is not None:
        yield "norms of queries and keys"
    if any(config.windows):
        yield "sliding windows"
    first = config.family == "internlm" and to == "internevo"  # the first InternLM has biases there, too
    biases = (config.qkv_bias, config.out_bias)
    if any(biases) and not (form.biases or first):
        yield "biases in attention"
    elif biases[0] != biases[1]:
        yield f"biases in {'queries, keys and values' if biases[0] else 'the output of attention'} alone"
    if config.mlp_bias and not form.mlp_biases:
        yield "biases in the MLP"
    if config.num_kv_heads != config.num_heads and not form.groups:
        yield f"{config.num_kv_heads} key/value heads for {config.num_heads} query heads"
    if config.head_dim * config.num_heads != config.hidden_size and not form.head_dim:
        yield f"{config.num_heads} heads of {config.head_dim} in {config.hidden_size} hidden units"
    if config.tie_embeddings and not form.tied:
        yield "tied embeddings"
    if config.scaling is not None and config.scaling.kind not in form.positions:
        yield f"{config.scaling.kind} rope_scaling"


def expressed(config: ModelConfig, to: str) -> ModelConfig:
    """The same model as the form says it; CheckpointError names all that it cannot."""
    found = list(obstacles(config, to))
    if found:
        others = [name for name in FORMS if not any(obstacles(config, name))]
        others += ["the same with --untie"] if found == ["tied embeddings"] else []
        remedy = f"it can be written as: {', '.join(others)}" if others else "no form here can express it"
        raise CheckpointError(f"a {to} checkpoint cannot express {'; '.join(found)}", remedy=remedy)
    family = to if to != "internevo" else "internlm" if config.family == "internlm" else "internlm2"
    if family == config.family:
        return config
    extra: dict[str, Any] = {key: item for key, item in config.extra.items() if key not in _CODE_KEYS}
    if family == "internlm":
        extra["rotary"] = {"scaling_factor": config.scaling.factor} if config.scaling else {}
    return config.with_(family=family, extra=extra, windows=())


# --- Hugging Face folders ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_source(order: ConvertConfig) -> Iterator[Source]:
    """The model of a folder of any form."""
    folder = order.source
    if is_internevo(folder):
        if not order.allow_pickle:
            remedy = "--allow-pickle, if you trust its source (torch's restricted reader is used)"
            raise CheckpointError(f"{folder} is made of pickles, which are not read unasked", remedy=remedy)
        yield read_internevo(folder, max_positions=order.max_positions, interleaved=order.interleaved)
        return
    config = read_config(folder)
    untied = config.with_(tie_embeddings=config.tie_embeddings and not order.untie)
    if is_scalar_checkpoint(folder):
        raise CheckpointError(
            f"{folder} is a reward model", remedy="language models are converted, scalar ones are not"
        )
    expressed(untied, order.to)  # before its tensors, which may be none of a plain decoder
    with open_weights(folder, allow_pickle=order.allow_pickle) as stored:
        units = list(folder_units(config, stored))
        if untied != config:
            units.append(replace(units[0], slot=Slot(None, "head")))
        yield Source(untied, tuple(units))


def folder_units(config: ModelConfig, stored: Stored) -> Iterator[Unit]:
    """The tensors of an open folder; CheckpointError names what is missing, misshapen or left over."""
    where = str(stored.folder)
    for slot in slots(config):
        parts = tuple(stored.take(name) for name in tensor_names(config.row, slot))
        join: Join = partial(fuse_qkv, num_kv_heads=config.num_kv_heads) if slot.name == "qkv" else _only
        yield checked(Unit(slot, parts, join), config, where)
    left = sorted(name for name in stored.unused if not ignorable(name))
    if left:
        raise CheckpointError(f"{where}: {len(left)} tensors are not part of a {config.family} model: {left[:3]}")


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def write_folder(folder: Path, config: ModelConfig, units: Sequence[Unit], *, max_shard_bytes: int) -> int:
    """Write .safetensors files in the names of `config`'s family; returns how many tensors stand in them."""
    units = sorted(units, key=lambda unit: -unit.dtype.itemsize)  # wider numbers first, see SafetensorsWriter
    outlines: dict[str, Tensor] = {}
    for unit in units:
        for name, part in _pieces(unit.slot, unit.outline(), config):
            outlines[name] = torch.empty(part.shape, dtype=part.dtype, device="meta")
    tensors = ((name, part) for unit in units for name, part in _pieces(unit.slot, unit.load(), config))
    shards = shards_of(outlines, max_shard_bytes)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        with SafetensorsWriter(folder / name, shard) as file:
            for _ in shard:
                file.add(next(tensors)[1])
    if len(shards) > 1:
        write_index(folder, shards)
    return len(outlines)


def _pieces(slot: Slot, tensor: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    names = tensor_names(config.row, slot)
    parts = [tensor]
    if slot.name == "qkv":
        sizes = {"num_kv_heads": config.num_kv_heads, "queries_per_kv": config.queries_per_kv}
        parts = split_qkv(tensor, num_parts=len(names), **sizes)
    return list(zip(names, parts, strict=True))
