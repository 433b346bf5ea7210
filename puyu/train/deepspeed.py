"""A DeepSpeed config -> our settings, for those who have one: stages 1 to 3, precision, optimizer, schedule.

    mapped = read_ds_config(Path("ds_config.json"))       # .overrides: [("layout.params", "full"), ...], .notes

What changes numbers or memory and has no counterpart is refused by name; what only steers DeepSpeed's own machinery
(bucket sizes, overlap, logging) is told and left out. `"auto"` stands for what the command line or the defaults say.
Names: DeepSpeed's "Configuration JSON" and the integration of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puyu.errors import ConfigError
from puyu.files import read_object

_STAGES = {
    0: {"params": "replica", "grads": "replica", "states": "replica"},
    1: {"params": "replica", "grads": "replica", "states": "full"},
    2: {"params": "replica", "grads": "full", "states": "full"},
    3: {"params": "full", "grads": "full", "states": "full"},
}
_STEERING = {
    "zero_optimization": {
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
        "contiguous_gradients", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save", "round_robin_gradients", "load_from_fp32_weights",
        "ignore_unused_parameters", "memory_efficient_linear",
    },
    "": {
        "steps_per_print", "wall_clock_breakdown", "dump_state", "zero_allow_untested_optimizer", "comms_logger",
        "flops_profiler", "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
        "zero_force_ds_cpu_optimizer", "checkpoint",
    },
}  # fmt: skip
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")


@dataclass
class Mapped:
    """Settings as overrides, and what was left out, said."""

    overrides: list[tuple[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_ds_config(path: Path) -> Mapped:
    """Read and map a file; ConfigError names the first setting that has no counterpart."""
    values, mapped = read_object(path), Mapped()
    for name, value in values.items():
        if name in _STEERING[""]:
            mapped.notes.append(f"{name} has no meaning here")
        elif name in _SECTIONS:
            if value != "auto":
                _SECTIONS[name](value, mapped, path)
        else:
            raise _refused(path, name, "has no counterpart here")
    return mapped


def _refused(path: Path, name: str, why: str, remedy: str = "take it out, or set it otherwise") -> ConfigError:
    return ConfigError(f"{path}: {name} {why}", remedy=remedy)


def _section(name: str, value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refused(path, name, f"must be an object, not {value!r}")
    return value


def _zero(value: Any, mapped: Mapped, path: Path) -> None:
    section = _section("zero_optimization", value, path)
    stage = section.get("stage", 0)
    if stage not in _STAGES:
        raise _refused(path, "zero_optimization.stage", f"is {stage!r}, it can be 0, 1, 2 or 3")
    mapped.overrides += [(f"layout.{name}", extent) for name, extent in _STAGES[stage].items()]
    for name, setting in section.items():
        if name in _STEERING["zero_optimization"]:
            mapped.notes.append(f"zero_optimization.{name} has no meaning here")
        elif name.startswith("offload_") or name == "cpu_offload":
            if setting is False or (isinstance(setting, Mapping) and setting.get("device", "none") == "none"):
                continue
            remedy = (
                "use optim.kind=adamw8 (states of one byte), memory.offload=true (activations) or tune.method=qlora"
            )
            raise _refused(path, f"zero_optimization.{name}", "is not done: states stay on the device", remedy)
        elif name != "stage":
            raise _refused(path, f"zero_optimization.{name}", "has no counterpart here")


def _precision(word: str, dtype: str) -> Callable[[Any, Mapped, Path], None]:
    def read(value: Any, mapped: Mapped, path: Path) -> None:
        section = _section(word, value, path)
        if section.get("enabled") is True:
            mapped.overrides.append(("dtype", dtype))
        for name in sorted(section.keys() - {"enabled"}):
            mapped.notes.append(f"{word}.{name} has no meaning here: the loss scale finds itself")

    return read


def _optimizer(value: Any, mapped: Mapped, path: Path) -> None:
    section = _section("optimizer", value, path)
    kind, found = str(section.get("type", "AdamW")), _section("optimizer.params", section.get("params", {}), path)
    if kind.lower() not in ("adam", "adamw"):
        raise _refused(path, f"optimizer.type {kind}", "is not here", "AdamW, or leave it out and give optim.kind")
    if kind == "Adam" and found.get("adam_w_mode", True) is not True:
        raise _refused(path, "optimizer.params.adam_w_mode", "is false, decay is always decoupled here")
    names = {"lr": "lr", "eps": "eps", "weight_decay": "weight_decay"}
    for name, setting in found.items():
        if setting == "auto" or name in ("torch_adam", "adam_w_mode"):
            continue
        if name == "betas":
            mapped.overrides += [("optim.beta1", setting[0]), ("optim.beta2", setting[1])]
        elif name in names:
            mapped.overrides.append((f"optim.{names[name]}", setting))
        else:
            raise _refused(path, f"optimizer.params.{name}", "has no counterpart here")


def _scheduler(value: Any, mapped: Mapped, path: Path) -> None:
    section = _section("scheduler", value, path)
    kind, found = section.get("type"), _section("scheduler.params", section.get("params", {}), path)
    kinds: dict[Any, list[tuple[str, Any]]] = {
        "WarmupLR": [("optim.schedule", "constant")],
        "WarmupDecayLR": [("optim.schedule", "wsd"), ("optim.decay", 1.0), ("optim.floor", 0.0)],
        "WarmupCosineLR": [("optim.schedule", "cosine")],
    }
    if kind not in kinds:
        raise _refused(path, f"scheduler.type {kind}", "is not here", f"one of {', '.join(kinds)}, or leave it out")
    mapped.overrides += kinds[kind]
    names = {"warmup_max_lr": "lr", "warmup_num_steps": "warmup", "cos_min_ratio": "floor"}
    if "warmup_type" not in found:
        mapped.notes.append("scheduler.params.warmup_type is log by default there; here the warm-up is linear")
    for name, setting in found.items():
        if setting == "auto" or (name, setting) == ("warmup_type", "linear"):
            continue
        if name == "total_num_steps":
            mapped.notes.append("scheduler.params.total_num_steps: a schedule ends with the last step here")
        elif name in names:
            mapped.overrides.append((f"optim.{names[name]}", setting))
        elif not (name in ("warmup_min_lr", "warmup_min_ratio") and setting == 0):
            raise _refused(path, f"scheduler.params.{name}", f"is {setting!r}, which has no counterpart here")


def _batch(value: Any, mapped: Mapped, path: Path) -> None:
    remedy = "give batch_tokens, the tokens of a step over all processes, and leave both sizes out or at auto"
    raise _refused(path, " and ".join(_BATCH), "count rows; here a step is counted in tokens", remedy)


def _plain(field_name: str) -> Callable[[Any, Mapped, Path], None]:
    return lambda value, mapped, path: mapped.overrides.append((field_name, value))


def _activations(value: Any, mapped: Mapped, path: Path) -> None:
    section = _section("activation_checkpointing", value, path)
    mapped.overrides.append(("memory.checkpoint", "full"))
    if section.get("cpu_checkpointing"):
        mapped.overrides.append(("memory.offload", True))
    for name in section.keys() - {"cpu_checkpointing"}:
        mapped.notes.append(f"activation_checkpointing.{name} has no meaning here")


_SECTIONS: dict[str, Callable[[Any, Mapped, Path], None]] = {
    "zero_optimization": _zero,
    "bf16": _precision("bf16", "bfloat16"),
    "fp16": _precision("fp16", "float16"),
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "gradient_clipping": _plain("optim.clip"),
    "gradient_accumulation_steps": _plain("accumulate"),
    "activation_checkpointing": _activations,
    **dict.fromkeys(_BATCH, _batch),
}
