"""What pretrain, sft and reward share: placing a model, checking that tokenizer and model fit, finishing a run.

A finished run leaves `train_state/result.json` with its numbers, and its saved states are removed: the same call
again returns the numbers at once. Another config or other inputs in the same folder are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from puyu.configure import Config, dump
from puyu.device import pick_device, pick_dtype
from puyu.dist import barrier, current_world
from puyu.errors import CheckpointError, InputError
from puyu.files import BadRecord, clear_folder, hash_json, read_json, write_json
from puyu.lineage import input_of, without_paths
from puyu.log import logger
from puyu.model.adapted import adapted_layers, plain_state
from puyu.model.checkpoint import load_model, save_model
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.linear import Linear
from puyu.model.rope import RopeKind
from puyu.model.transformer import HostEmbedding
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.health import Heartbeat, Journal
from puyu.train.layouts.base import first_of
from puyu.train.parallel import joined
from puyu.train.settings import FREE, RunSettings
from puyu.train.state import FOLDER
from puyu.train.trainer import Trainer, TrainerConfig

_RESULT = "result.json"
_PADDING = 1024
"""Models may have this many rows beyond the tokenizer (vocabularies are padded to round numbers)."""

M = TypeVar("M", CausalLM, ScalarModel)


def listed(value: Any) -> Any:
    """One file where a list of them is asked for: `--data FILE`."""
    return [value] if isinstance(value, str | Path | Mapping) else value


@contextmanager
def begun(config: TrainingConfig, out: Path, *, name: str) -> Iterator[tuple[torch.device, Heartbeat]]:
    """Join the other processes, under a watchdog from here to the end of the stage."""
    device, folder = pick_device(config.device), out / FOLDER
    with joined(device) as world, Heartbeat(folder, world, config.health, Journal(folder, name=name)) as heart:
        heart.at("reading data")
        yield device, heart


class TrainingConfig(RunSettings):
    """The fields that every training stage has."""

    free = FREE

    device: str = "auto"
    """auto, cpu or cuda."""

    def trainer(self, steps: int, *, name: str, identity: str) -> TrainerConfig:
        """What the Trainer reads of it."""
        shared = {field: getattr(self, field) for field in RunSettings.model_fields}
        return TrainerConfig(steps=steps, name=name, identity=identity, **shared)


def identity_of(config: Config) -> str:
    """A hash of the config and the content of its inputs, without the fields that change nothing."""
    keys = {str(path): input_of(name, path).key for name, path in config.inputs() if path.exists()}
    values = {name: value for name, value in dump(config).items() if name not in FREE}
    return hash_json(without_paths(values, keys))


def finished(out: Path, identity: str) -> dict[str, Any] | None:
    """The numbers of a run that has finished here, or None. Every process must call it: the first looks, for all."""
    text = first_of(_result(out / FOLDER / _RESULT) if current_world().is_main else "")
    if not text:
        return None
    value = json.loads(text)
    numbers: dict[str, Any] = value["numbers"]
    if value["identity"] != identity:
        raise CheckpointError(
            f"{out} holds a finished run with another config or other inputs",
            remedy="choose another --out, or empty it",
        )
    return numbers


def _result(path: Path) -> str:
    """The record as text; empty where there is none, or a torn one: then the run is made again."""
    try:
        value = read_json(path) if path.is_file() else {}
        return json.dumps({name: value[name] for name in ("identity", "numbers")})
    except (InputError, KeyError, TypeError):
        return ""


def finish(out: Path, identity: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Record the numbers, then drop the saved states; returns the numbers."""
    if current_world().is_main:
        write_json(out / FOLDER / _RESULT, {"identity": identity, "numbers": numbers})
        for folder in (out / FOLDER).glob("step-*"):
            clear_folder(folder)
    return numbers


def save(trainer: Trainer, out: Path, *parts: Callable[[Path], None], extra: dict[str, Any] | None = None) -> None:
    """Write the checkpoint, adapters merged, and what belongs to it (tokenizer, rubrics); every rank must call it."""
    weights = trainer.full_weights()
    assert isinstance(trainer.model, CausalLM | ScalarModel)
    if trainer.world.is_main:
        if any(adapted_layers(trainer.model)):
            weights = plain_state(trainer.model, weights)
        save_model(trainer.model, out, state=weights, dtype=torch.float32, extra=extra)
        for part in parts:
            part(out)
    barrier()


def place(model: M, *, dtype: str, device: torch.device) -> M:
    """Move a model to its device; master weights fp32 (fp64 when computing in fp64), activations in `dtype`.

    What does not train lies in `dtype`, which it is cast to wherever it is used. Beside a quantized base on a GPU the
    embedding stays with the host, unless it trains or is the head, too.
    """
    compute = pick_dtype(dtype, device)
    master = torch.float64 if compute == torch.float64 else torch.float32
    if device.type == "cuda" and current_world().size == 1 and _leaves_embedding(model):
        model.trunk.embedding = HostEmbedding(model.trunk.embedding.weight)  # type: ignore[assignment]
    model = model.to(device=device).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master if parameter.requires_grad else compute)
    model.set_compute_dtype(compute)
    return model


def _leaves_embedding(model: CausalLM | ScalarModel) -> bool:
    """Whether memory matters more than a look-up on the host, and only look-ups are needed."""
    quantized = any(not isinstance(layer.base, Linear) for _, layer in adapted_layers(model))
    return quantized and model.head is not None and not model.trunk.embedding.weight.requires_grad


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, folder: Path) -> None:
    """CheckpointError, with both sizes, when the tokenizer is not the model's."""
    if not tokenizer.vocab_size <= vocab_size < tokenizer.vocab_size + _PADDING:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, the model has {vocab_size}",
            remedy="use the tokenizer that the model was trained with",
        )


def opened(folder: Path, *, context: int = 0, rope: RopeKind = "none") -> tuple[Tokenizer, CausalLM]:
    """The tokenizer and the language model of a checkpoint or an adapter, which fit each other; for contexts of
    `context` tokens where that is longer than its own."""
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder=folder)
    model.set_shape(model.config.longer(context, rope))
    return tokenizer, model


def tell_torn(records: Sequence[BadRecord]) -> None:
    """Name the lines that were left out."""
    for record in records:
        logger.warning("torn record left out: %s, line %d (byte %d)", record.path, record.line, record.offset)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters (of the whole model, also when it is sharded)."""
    return sum(parameter.numel() for parameter in model.parameters())
