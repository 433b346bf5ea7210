"""InternEvo's checkpoint folders: `model_tp{t}_pp{p}.pt` for each tensor and pipeline rank, and `model_config.pt`.

    source = read_internevo(folder)
    write_internevo(out, config, units, Layout(tp=2, pp=3))

Two forms are known: InternLM2's (`layers.0.attention.wqkv`; the names of the public folders without `model.`) and the
first InternLM's (`blocks.0.mixer.Wqkv`; each rank has its queries, then its keys, then its values). Every rank has
whole kv groups, rows of w1 and w3, columns of wo and w2, rows of the head, columns of the embedding (or rows of it);
norms stand in each, biases of row-parallel products in the first only. A stage counts its layers from 0; where layers
do not divide evenly the later stages have one more. With `adapt_hf=False` or `qk_interleaved=True` rows of queries and
keys stand as even and odd pairs, elsewhere as two halves.

Knows neither optimizer states nor experts, weight parallelism (isp), FSDP or interleaved stages; each is refused by
name. Sources: InternEvo (arXiv 2401.09149) and its `convert2hf_internlm2.py`, `revert_internlm2.py`.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puyu.errors import CheckpointError, ConfigError
from puyu.files import disk_errors
from puyu.model.checkpoint import read_config
from puyu.model.config import ModelConfig
from puyu.model.families import FAMILIES, Family
from puyu.model.streams import PickleWriter
from puyu.model.units import Slot, Source, Unit, checked, shape_of, slots, tensor_names
from puyu.model.weights import PickleFile

CONFIG = "model_config.pt"
_FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
_FOREIGN = re.compile(r"model_(?:moe_\w+|wp\d+_pp\d+|tp\d+_pp\d+_(?:dp|zo)\d+)\.pt")
_LAYER = re.compile(r"(layers|blocks)\.(\d+)\.")
_WORDS = ".word_embeddings.weight"

NAMES: dict[str, Family] = {
    "internlm2": replace(
        FAMILIES["internlm2"], embedding="tok_embeddings", norm="norm", head="output", layer="layers.{}."
    ),
    "internlm": replace(
        FAMILIES["internlm"],
        embedding="embedding",
        norm="norm",
        head="head",
        attention_norm="norm1",
        qkv=("mixer.Wqkv",),
        out="mixer.out_proj",
        mlp_norm="norm2",
        gate_up=("mlp.w1", "mlp.w2"),
        down="mlp.w3",
        layer="blocks.{}.",
    ),
}
"""InternEvo's names of each form's tensors."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder is cut: tensor ranks, pipeline ranks, the order of rotated rows, the side the embedding is cut."""

    tp: int = 1
    pp: int = 1
    interleaved: bool = False
    split_vocab: bool = False


def is_internevo(folder: Path) -> bool:
    """Whether a folder holds InternEvo's files."""
    return (folder / CONFIG).is_file() or any(_FILE.fullmatch(path.name) for path in folder.glob("model_*.pt"))


# --- cutting and joining -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cutter:
    """One tensor of the package's layout <-> its pieces of all tensor ranks; None where a rank has none."""

    config: ModelConfig
    layout: Layout

    def cut(self, slot: Slot, tensor: Tensor) -> list[Tensor | None]:
        count, axis = self.layout.tp, self.axis(slot)
        if slot.name == "qkv":
            return list(self._rank_rows(self._paired(tensor, to_pairs)))
        if axis is not None:
            return list(tensor.chunk(count, axis))
        one_only = slot.suffix == "bias"
        return [tensor if rank == 0 or not one_only else None for rank in range(count)]

    def join(self, slot: Slot, pieces: Sequence[Tensor]) -> Tensor:
        """CheckpointError when ranks differ in what they should have alike."""
        if slot.name == "qkv":
            return self._paired(self._group_rows(pieces), to_halves)
        axis = self.axis(slot)
        if axis is not None:
            return torch.cat(list(pieces), axis) if len(pieces) > 1 else pieces[0]
        if any(not same_bytes(pieces[0], piece) for piece in pieces[1:]):
            raise CheckpointError(f"{slot} is not the same on all tensor ranks", remedy="the files are of several runs")
        return pieces[0]

    def axis(self, slot: Slot) -> int | None:
        """The side that is cut; None: not cut."""
        if slot.name == "embedding":
            return 0 if self.layout.split_vocab else 1
        if slot.name in ("out", "down"):
            return 1 if slot.suffix == "weight" else None
        return 0 if slot.name in ("qkv", "gate", "up", "head") else None

    @property
    def _by_kind(self) -> bool:
        """The first InternLM: a rank has its queries, then its keys, then its values."""
        return self.config.family == "internlm"

    def _rank_rows(self, fused: Tensor) -> Iterator[Tensor]:
        for piece in fused.chunk(self.layout.tp):
            yield self._swapped(piece, (-1, 3)) if self._by_kind else piece

    def _group_rows(self, pieces: Sequence[Tensor]) -> Tensor:
        whole = [self._swapped(piece, (3, -1)) if self._by_kind else piece for piece in pieces]
        return torch.cat(whole) if len(whole) > 1 else whole[0]

    def _swapped(self, rows: Tensor, outer: tuple[int, int]) -> Tensor:
        """(heads, 3, head_dim) <-> (3, heads, head_dim)."""
        return rows.unflatten(0, (*outer, self.config.head_dim)).transpose(0, 1).flatten(0, 2)

    def _paired(self, fused: Tensor, turn: Callable[[Tensor, ModelConfig], Tensor]) -> Tensor:
        return turn(fused, self.config) if self.layout.interleaved else fused


def to_halves(fused: Tensor, config: ModelConfig) -> Tensor:
    """Rows of queries and keys, in even and odd pairs, as two halves: evens, then odds."""
    turned, values = _rotated_rows(fused, config)
    return torch.cat((turned.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3), values), 1).flatten(0, 2)


def to_pairs(fused: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `to_halves`."""
    turned, values = _rotated_rows(fused, config)
    return torch.cat((turned.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3), values), 1).flatten(0, 2)


def _rotated_rows(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """(queries and keys, values) as [kv heads, heads of a group, head_dim, ...]."""
    grouped = fused.unflatten(0, (config.num_kv_heads, config.queries_per_kv + 2, config.head_dim))
    return grouped[:, :-1], grouped[:, -1:]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits (not-a-numbers too)."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.is_meta or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def stages(num_layers: int, pp: int) -> list[tuple[int, int]]:
    """InternEvo's partition: first and last layer (exclusive) of each pipeline rank."""
    small, more = divmod(num_layers, pp)
    ends = [0]
    for rank in range(pp):
        ends.append(ends[-1] + small + (rank >= pp - more))
    return list(pairwise(ends))


# --- writing -------------------------------------------------------------------------------------------------------


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """ConfigError names what cannot be cut so often."""
    if layout.interleaved and config.family == "internlm":
        raise ConfigError("--interleaved: the first InternLM has no such order", remedy="leave the flag out")
    if not 1 <= layout.pp <= config.num_layers:
        raise ConfigError(f"--pp {layout.pp}: the model has {config.num_layers} layers", remedy="fewer stages")
    name, size = ("vocab_size", config.vocab_size) if layout.split_vocab else ("hidden_size", config.hidden_size)
    sizes = {"num_key_value_heads": config.num_kv_heads, "intermediate_size": config.intermediate_size, name: size}
    for name, size in {**sizes, "vocab_size": config.vocab_size}.items():
        if layout.tp < 1 or size % layout.tp:
            raise ConfigError(f"--tp {layout.tp} does not divide {name} {size}", remedy="another --tp")


def write_internevo(
    folder: Path, config: ModelConfig, units: Sequence[Unit], *, layout: Layout, norm_head: bool = False
) -> int:
    """Write all shards, then model_config.pt; returns how many tensors stand in them."""
    check_layout(config, layout)
    cutter, count = Cutter(config, layout), 0
    for rank, (start, end) in enumerate(stages(config.num_layers, layout.pp)):
        first, last = start == 0, end == config.num_layers
        kept = [unit for unit in units if _stands_in(unit.slot, range(start, end), first=first, last=last)]
        paths = [folder / f"model_tp{number}_pp{rank}.pt" for number in range(layout.tp)]
        count += _write_stage(paths, kept, cutter, start)
    path = folder / CONFIG
    with disk_errors(path):
        torch.save(config_values(config, layout, dtype=units[0].dtype, norm_head=norm_head), path)
    return count


def _stands_in(slot: Slot, layers: range, *, first: bool, last: bool) -> bool:
    if slot.layer is None:
        return first if slot.name == "embedding" else last
    return slot.layer in layers


def _write_stage(paths: Sequence[Path], units: Sequence[Unit], cutter: Cutter, start: int) -> int:
    outlines: list[dict[str, Tensor]] = [{} for _ in paths]
    for unit in units:
        name = _name_of(unit.slot, cutter, start)
        for rank, piece in enumerate(cutter.cut(unit.slot, unit.outline())):
            if piece is not None:
                outlines[rank][name] = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
    with ExitStack() as stack:
        files = [stack.enter_context(PickleWriter(*pair)) for pair in zip(paths, outlines, strict=True)]
        for unit in units:
            for file, piece in zip(files, cutter.cut(unit.slot, unit.load()), strict=True):
                if piece is not None:
                    file.add(piece)
    return sum(map(len, outlines))


def _name_of(slot: Slot, cutter: Cutter, start: int) -> str:
    row = NAMES[cutter.config.family]
    if slot.name == "embedding" and cutter.layout.split_vocab:
        return row.embedding + _WORDS
    return tensor_names(row, slot, None if slot.layer is None else slot.layer - start)[0]


def config_values(config: ModelConfig, layout: Layout, *, dtype: torch.dtype, norm_head: bool) -> dict[str, Any]:
    """What model_config.pt says: keyword arguments of InternEvo's model builders."""
    ratio, multiple = mlp_shape(config.hidden_size, config.intermediate_size)
    scaling = config.scaling
    return {
        "num_chunks": 1,
        "dtype": str(dtype),
        "embed_split_hidden": not layout.split_vocab,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_heads,
        "num_kv_attention_heads": config.num_kv_heads,
        "mlp_ratio": ratio,
        "multiple_of": multiple,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": config.norm_eps,
        "no_bias": not config.qkv_bias,
        "norm_head": norm_head,
        "adapt_hf": not layout.interleaved,
        "qk_interleaved": layout.interleaved,
        "rope_base": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        # InternEvo's own dynamic NTK has no factor; another one stands in config.json, beside
        "use_dynamic_ntk_rope": scaling is not None and scaling.kind == "dynamic" and scaling.factor == 1.0,
    }


def mlp_shape(hidden: int, intermediate: int) -> tuple[float, int]:
    """(mlp_ratio, multiple_of) from which InternEvo computes this intermediate size."""
    multiple, ratio = math.gcd(intermediate, 256), intermediate / hidden
    while -(-int(hidden * ratio) // multiple) * multiple < intermediate:
        ratio = math.nextafter(ratio, math.inf)
    return ratio, multiple


# --- reading -------------------------------------------------------------------------------------------------------


class _Shard:
    """One file: tensors by their names without `model.`; remembers which were not taken."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, PickleFile(path)
        keys = filter(lambda key: not key.endswith("inv_freq"), self._file.keys())
        self._keys = {key.removeprefix("model."): key for key in keys}
        self.unused = set(self._keys)

    def get(self, name: str) -> Tensor | None:
        self.unused.discard(name)
        return self._file.get_tensor(self._keys[name]) if name in self._keys else None

    @property
    def num_layers(self) -> int:
        found = [int(match[2]) for name in self._keys if (match := _LAYER.match(name))]
        return max(found, default=-1) + 1


def read_internevo(folder: Path, *, max_positions: int | None = None, interleaved: bool | None = None) -> Source:
    """A folder's tensors, mapped. `max_positions` and `interleaved` are for folders that do not say them.

    CheckpointError names what is missing, torn, left over, of another kind, or not known here. The files are pickles:
    the caller has asked whether to trust them; torch's restricted reader builds tensors and plain values only.
    """
    values, grid = _read_values(folder / CONFIG), _open_grid(folder)
    _refuse(values, folder)
    family = "internlm" if any(name.startswith("blocks.") for name in grid[0][0].unused) else "internlm2"
    config = _config(folder, values, grid, family=family, max_positions=max_positions)
    if sum(stage[0].num_layers for stage in grid) != config.num_layers:
        found = [stage[0].num_layers for stage in grid]
        raise CheckpointError(f"{folder}: its stages have {found} layers, {CONFIG} says {config.num_layers}")
    pairs = _interleaved(values, folder, family, interleaved)
    units = tuple(_units(grid, config, folder, pairs))
    left = sorted({f"{shard.path.name}: {name}" for stage in grid for shard in stage for name in shard.unused})
    if left:
        raise CheckpointError(f"{folder}: {len(left)} tensors are not part of a {config.family} model: {left[:3]}")
    return Source(config, units, interleaved=pairs, norm_head=bool(values.get("norm_head")))


def _open_grid(folder: Path) -> list[list[_Shard]]:
    """Files by pipeline rank and tensor rank."""
    names = sorted(path.name for path in folder.glob("model_*.pt"))
    foreign = [name for name in names if _FOREIGN.fullmatch(name)]
    if foreign:
        what = "experts, weight parallelism (isp) and FSDP are not read here"
        raise CheckpointError(f"{folder} has {foreign[0]}: {what}", remedy="save it with tensor parallelism alone")
    ranks = [(int(match[1]), int(match[2])) for name in names if (match := _FILE.fullmatch(name))]
    if not ranks:
        raise CheckpointError(f"{folder} has no model_tp0_pp0.pt", remedy="it is not an InternEvo checkpoint")
    tp, pp = (max(column) + 1 for column in zip(*ranks, strict=True))
    paths = [[folder / f"model_tp{t}_pp{p}.pt" for t in range(tp)] for p in range(pp)]
    for path in (path for stage in paths for path in stage if not path.is_file()):
        raise CheckpointError(f"{folder} has no {path.name}", remedy=f"copy it again: {tp} x {pp} files belong to it")
    return [[_Shard(path) for path in stage] for stage in paths]


def _read_values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}", remedy="copy it from the run's folder")
    # training writes InternEvo's own subclass of dict; a plain dict stands in for it
    known = [(dict, f"{package}.core.context.config.Config") for package in ("internlm", "internevo")]
    try:
        with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or holds more than plain values: {error}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} must hold a dict, not {type(values).__name__}")
    return dict(values)


def _refuse(values: Mapping[str, Any], folder: Path) -> None:
    wanted = {"num_chunks": 1, "norm_type": "rmsnorm", "use_swiglu": True, "is_reward": False, "num_experts": 1}
    wanted |= {"apply_post_layer_norm": False, "enable_qk_norm": False}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise CheckpointError(f"{folder}: {key}={values[key]!r} in {CONFIG} is not supported")


def _interleaved(values: Mapping[str, Any], folder: Path, family: str, given: bool | None) -> bool:
    if family == "internlm":
        return False  # its rotation always works on halves
    if "qk_interleaved" in values:
        return bool(values["qk_interleaved"])
    if "adapt_hf" in values:
        return not values["adapt_hf"]
    if given is None:
        remedy = "say --interleaved or --no-interleaved, as the training config had it (adapt_hf=False is interleaved)"
        raise CheckpointError(f"{folder}: {CONFIG} has neither qk_interleaved nor adapt_hf", remedy=remedy)
    return given


def _config(
    folder: Path, values: Mapping[str, Any], grid: list[list[_Shard]], *, family: str, max_positions: int | None
) -> ModelConfig:
    """From model_config.pt and the shapes; what training does not know comes from a config.json beside."""
    down = grid[0][0].get(tensor_names(NAMES[family], Slot(0, "down"), 0)[0])
    if down is None:
        found = sorted(grid[0][0].unused)[:3]
        raise CheckpointError(
            f"{grid[0][0].path} has tensors of no known form: {found}", remedy="InternLM or InternLM2"
        )
    try:
        fields: dict[str, Any] = {
            "vocab_size": int(values["vocab_size"]),
            "hidden_size": int(values["hidden_size"]),
            "num_layers": int(values["num_layers"]),
            "num_heads": int(values["num_attention_heads"]),
            "num_kv_heads": int(values.get("num_kv_attention_heads") or values["num_attention_heads"]),
            "intermediate_size": down.shape[1] * len(grid[0]),
            "norm_eps": float(values.get("layer_norm_epsilon", 1e-5)),
            "rope_theta": float(values.get("rope_base", 10_000)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error!r}", remedy="it must say the sizes of the model") from error
    if (folder / "config.json").is_file():
        return _agreed(read_config(folder), fields, family, folder)
    positions = values.get("max_position_embeddings") or max_positions
    if not positions:
        raise CheckpointError(f"{folder} does not say the longest context", remedy="give --max-positions")
    biased = grid[0][0].get(tensor_names(NAMES[family], Slot(0, "qkv", "bias"), 0)[0]) is not None
    scaling = {"type": "dynamic", "factor": 1.0} if values.get("use_dynamic_ntk_rope") else None
    more: dict[str, Any] = {"max_positions": int(positions), "rope_scaling": scaling}
    return ModelConfig(family=family, qkv_bias=biased, out_bias=biased, **fields, **more)


def _agreed(config: ModelConfig, fields: Mapping[str, Any], family: str, folder: Path) -> ModelConfig:
    for name, value in {**fields, "family": family}.items():
        if getattr(config, name) != value:
            said = f"{name} {value!r} by {CONFIG} and the shards, {getattr(config, name)!r} by config.json"
            raise CheckpointError(f"{folder}: {said}", remedy="mend config.json, or take it away")
    return config


def _units(grid: list[list[_Shard]], config: ModelConfig, folder: Path, interleaved: bool) -> Iterator[Unit]:
    homes = [(stage, layer) for stage in grid for layer in range(stage[0].num_layers)]
    row, tp = NAMES[config.family], len(grid[0])
    for slot in slots(config):
        outside = grid[0] if slot.name == "embedding" else grid[-1]
        stage, layer = homes[slot.layer] if slot.layer is not None else (outside, 0)
        names = [tensor_names(row, slot, layer)[0]] + ([row.embedding + _WORDS] if slot.name == "embedding" else [])
        pieces = [piece for shard in stage if (piece := _first(shard, names)) is not None]
        alone = slot.suffix == "bias" and slot.name in ("out", "down")  # of a row-parallel product: on the first rank
        if len(pieces) != tp and not (alone and pieces):
            missing = next(shard for shard in stage if _first(shard, names) is None)
            raise CheckpointError(f"{missing.path}: tensor {names[0]!r} is missing", remedy="copy the checkpoint again")
        layout = Layout(tp=tp, interleaved=interleaved, split_vocab=pieces[0].shape[0] != shape_of(config, slot)[0])
        yield checked(Unit(slot, tuple(pieces), partial(Cutter(config, layout).join, slot)), config, str(folder))


def _first(shard: _Shard, names: Sequence[str]) -> Tensor | None:
    return next((tensor for name in names if (tensor := shard.get(name)) is not None), None)
