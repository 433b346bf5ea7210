"""Adapters in peft's files, `adapter_config.json` and `adapter_model.safetensors`: written from the shares of a model
in training, read into such shares. What an engine does with the same files is in `lora.py`.

    save_adapter(model, Path("runs/poet"), form, base="internlm/internlm2-1_8b")
    load_adapter(model, Path("runs/poet"))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from puyu.errors import CheckpointError
from puyu.files import disk_errors, read_object, write_json
from puyu.hub import base_of
from puyu.model.adapted import AdapterForm, BaseKind, LowRank, adapt, adapted_layers, merge
from puyu.model.checkpoint import POSITIONS, TUNING, copy_side_files, load_model, read_config, save_model
from puyu.model.config import ModelConfig
from puyu.model.expert_adapters import take_apart
from puyu.model.families import joins, name_pairs
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.lora import PREFIX, WEIGHTS, read_settings, read_tensors, scale_of

CONFIG = "adapter_config.json"
INITIAL = "initial.safetensors"
"""PiSSA on a quantized base: the shares that it lost before it was quantized."""
Initials = Mapping[str, tuple[Tensor, Tensor]]
"""PiSSA: the first A and B of each matrix, by its name in the family."""


def shares_of(model: CausalLM | ScalarModel) -> dict[str, LowRank]:
    """The shares of a model by the names of their matrices in the family."""
    names = {ours: theirs for ours, (_, theirs) in joins(model.config).items()}
    return {
        names[ours][number]: share
        for ours, layer in adapted_layers(model)
        for number in range(len(layer.join.rows))
        if (share := layer.share(number)) is not None
    }


def initials(model: CausalLM | ScalarModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of all A and B as they are now."""
    return {name: (s.a.detach().clone(), s.b.detach().clone()) for name, s in shares_of(model).items()}


def save_adapter(
    model: CausalLM | ScalarModel,
    folder: Path,
    form: AdapterForm,
    *,
    base: str,
    kind: BaseKind = "dense",
    state: Mapping[str, Tensor] | None = None,
    first: Initials | None = None,
) -> None:
    """Write what was trained: the shares, and whole modules (embedding, head) that train with them.

    `state`: the parameters as a layout has gathered them. `first`: the shares that the base has lost at the beginning
    (PiSSA). On a dense base what is written is then the difference, twice the rank, for the base as it was; on a
    quantized one, which the difference would not fit, they are written beside the adapter. `kind` of the base, and the
    model's positions where they were stretched, stand in `tuning.json`.
    """
    apart = first is not None and kind != "dense"
    minus = None if apart else first
    values = dict(model.named_parameters()) if state is None else state
    tensors: dict[str, Tensor] = {}
    names = {id(share): name for name, share in shares_of(model).items()}
    for prefix, module in model.named_modules():
        if isinstance(module, LowRank):
            tensors |= _stored(names[id(module)], module, _values(values, prefix), minus)
    modules = _whole_modules(model, values)
    tensors |= {f"{PREFIX}{name}.weight": tensor for name, tensor in modules.items()}
    ranks = {name: tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in names.values()}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / f"{WEIGHTS}.tmp")
        (folder / f"{WEIGHTS}.tmp").rename(folder / WEIGHTS)
        if apart and first is not None:
            pairs = {f"{name}.{word}": pair[at] for name, pair in first.items() for at, word in enumerate("AB")}
            save_file({name: tensor.contiguous() for name, tensor in pairs.items()}, folder / INITIAL)
    write_json(folder / TUNING, {"base": kind, **_positions(model.config, Path(base))})
    write_json(folder / CONFIG, _settings(model, form, base=base, ranks=ranks, modules=modules))


def _positions(config: ModelConfig, base: Path) -> dict[str, Any]:
    """The positions of a model that has been made longer than its base."""
    found, before = ({name: getattr(one, name) for name in POSITIONS} for one in (config, read_config(base)))
    return {} if found == before else {"positions": found}


def _values(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: values[f"{prefix}.{name}"] for name in ("a", "b", "magnitude") if f"{prefix}.{name}" in values}


def _stored(name: str, share: LowRank, values: Mapping[str, Tensor], minus: Initials | None) -> dict[str, Tensor]:
    a, b = values["a"], values["b"]
    if minus is not None:
        first_a, first_b = minus[name]
        a, b = torch.cat([a, first_a.to(a)]), torch.cat([b, -first_b.to(b)], dim=1)
    found = {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    if share.magnitude is not None:
        found[f"{PREFIX}{name}.lora_magnitude_vector"] = values["magnitude"]
    return found


def _whole_modules(model: CausalLM | ScalarModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names in the family -> weights of embedding and head where they train."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    row = model.config.row
    head = row.reward_head if isinstance(model, ScalarModel) else row.head
    found = {"trunk.embedding.weight": row.embedding, "head.weight": head}
    return {theirs: values[ours] for ours, theirs in found.items() if ours in trained}


def _settings(
    model: CausalLM | ScalarModel,
    form: AdapterForm,
    *,
    base: str,
    ranks: Mapping[str, int],
    modules: Mapping[str, Tensor],
) -> dict[str, Any]:
    rank = max(ranks.values())
    # peft makes one pair of an expert's gate and up, with twice the rank and alpha: only the plain scale stays the same
    stable = form.rank_stable and not any(".experts." in name for name in ranks)
    alpha = form.scale * (rank**0.5 if stable else rank)
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": form.dropout,
        "modules_to_save": sorted(name.rpartition(".")[2] for name in modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _leaves(model, ranks),
        "task_type": "SEQ_CLS" if isinstance(model, ScalarModel) else "CAUSAL_LM",
        "use_dora": form.magnitude,
        "use_rslora": stable,
    }


def _leaves(model: CausalLM | ScalarModel, ranks: Mapping[str, int]) -> list[str]:
    """Last parts of the targets' names, where they fit exactly the targets; else the full names."""
    leaves = {name.rpartition(".")[2] for name in ranks}
    every = [name for _, theirs in name_pairs(model.config, head=None) for name in theirs]
    same = {name for name in every if name.rpartition(".")[2] in leaves} == set(ranks)
    return sorted(leaves if same else ranks)


def load_adapter(model: CausalLM | ScalarModel, folder: Path, *, base: BaseKind = "dense") -> AdapterForm:
    """Give the model the shares of a peft directory, in place, on a base of that kind; CheckpointError names what does
    not fit. Embedding and head that the adapter has trained take the place of the model's."""
    settings, stored = read_settings(folder, training=True), read_tensors(folder)
    scales = take_apart(stored, settings, model.config)
    suffix = ".lora_A.weight"
    names = {key[len(PREFIX) : -len(suffix)] for key in stored if key.endswith(suffix)}
    form = _form(settings)
    _load_modules(model, stored, folder)
    pairs = {name: (_taken(stored, name, "lora_A.weight"), _taken(stored, name, "lora_B.weight")) for name in names}
    found = adapt(
        model,
        replace(form, rank=1),
        targets=names.__contains__,
        base=base,
        value=lambda _, shape: torch.zeros(shape),
    )
    unfit = [PREFIX + name for name in names.difference(found)] + [
        key for key in stored if not key.endswith("lora_magnitude_vector")
    ]
    if unfit:
        raise CheckpointError(f"{folder}: {len(unfit)} tensors fit no layer of the model: {sorted(unfit)[:3]}")
    for name, share in shares_of(model).items():
        scale = scales[name] if name in scales else scale_of(settings, name, pairs[name])
        _fill(share, *pairs[name], scale=scale, where=f"{folder}: {name}")
        if share.magnitude is not None:
            share.magnitude.data = _taken(stored, name, "lora_magnitude_vector").float().flatten()
    return form


def _form(settings: Mapping[str, Any]) -> AdapterForm:
    return AdapterForm(
        rank=int(settings.get("r", 8)),
        alpha=float(settings.get("lora_alpha", 8)),
        dropout=float(settings.get("lora_dropout", 0.0)),
        rank_stable=bool(settings.get("use_rslora")),
        magnitude=bool(settings.get("use_dora")),
    )


def _taken(stored: dict[str, Tensor], name: str, suffix: str) -> Tensor:
    key = f"{PREFIX}{name}.{suffix}"
    if key not in stored:
        raise CheckpointError(f"the adapter has no {key}", remedy="copy the adapter again")
    return stored.pop(key)


def _load_modules(model: CausalLM | ScalarModel, stored: dict[str, Tensor], folder: Path) -> None:
    row = model.config.row
    head = row.reward_head if isinstance(model, ScalarModel) else row.head
    for module, theirs in ((model.trunk.embedding, row.embedding), (model.head, head)):
        tensor = stored.pop(f"{PREFIX}{theirs}.weight", None)
        if tensor is None or module is None:
            continue
        if tensor.shape != module.weight.shape:
            shapes = f"{tuple(tensor.shape)} stored, {tuple(module.weight.shape)} in the model"
            raise CheckpointError(f"{folder}: {theirs} has another shape: {shapes}")
        module.weight = nn.Parameter(tensor.to(module.weight.dtype))


def _fill(share: LowRank, a: Tensor, b: Tensor, *, scale: float, where: str) -> None:
    if a.shape[1] != share.a.shape[1] or b.shape[0] != share.b.shape[0] or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{where} has A {tuple(a.shape)} and B {tuple(b.shape)}, the model {share.a.shape[1]} inputs and "
            f"{share.b.shape[0]} outputs",
            remedy="give an adapter of this very model",
        )
    share.scale, share.a.data, share.b.data = scale, a.float(), b.float()


@torch.no_grad()
def merge_adapter(model: CausalLM, folder: Path) -> None:
    """Merge an adapter into its base, in place: into the base that it was trained on, so a quantized one is quantized
    again first, and what comes out are its values with the adapter's, dense."""
    kind: BaseKind = read_object(folder / TUNING).get("base", "dense") if (folder / TUNING).is_file() else "dense"
    if (folder / INITIAL).is_file():
        first = load_file(folder / INITIAL)
        load_adapter(model, folder)
        for name, share in shares_of(model).items():
            share.a.data, share.b.data = first[f"{name}.A"], -first[f"{name}.B"]
        merge(model)
    load_adapter(model, folder, base=kind)
    merge(model)


def write_merged(folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int | None = None) -> int:
    """Write an adapter and its base as one checkpoint; returns the number of parameters. `dtype`: as the base has it
    when None. Products are summed in fp32 and rounded once."""
    base = base_of(folder)
    if base == folder:
        raise CheckpointError(f"{folder} is no adapter", remedy=f"give a directory with {CONFIG}")
    model = load_model(folder)
    kind = getattr(torch, dtype) if dtype else _stored_dtype(base)
    save_model(model, out, dtype=kind, config=model.config.with_(quantization=None), max_shard_bytes=max_shard_bytes)
    copy_side_files(base, out)
    copy_side_files(folder, out)
    return sum(parameter.numel() for parameter in model.parameters())


def _stored_dtype(base: Path) -> torch.dtype:
    name = read_object(base_of(base) / "config.json").get("torch_dtype", "float32")
    found = getattr(torch, str(name), torch.float32)
    assert isinstance(found, torch.dtype)
    return found
