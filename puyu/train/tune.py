"""Which weights of a model train, and in what form: all, some layers, or adapters on a frozen base.

    tuning = Tuning.of(model, TuneConfig(method="qlora"), seed=0)     # changes the model, before it is placed
    ... train ...
    tuning.save(trainer, out, tokenizer.save)

Full and freeze leave a checkpoint; the others leave an adapter in peft's files. LoRA+ (Hayou et al. 2024, arXiv
2402.12354) is LoRA with a higher rate for B.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from puyu.configure import Config
from puyu.dist import barrier
from puyu.errors import ConfigError
from puyu.model.adapted import AdapterForm, BaseKind, adapt, merge
from puyu.model.adapter_files import Initials, initials, load_adapter, save_adapter
from puyu.model.families import joins
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import lora_value
from puyu.model.linear import Linear, QuantLinear
from puyu.model.nf4 import BLOCK
from puyu.train.stage import save as save_checkpoint
from puyu.train.trainer import Trainer, TrainerConfig

Method = Literal["full", "freeze", "lora", "rslora", "dora", "pissa", "lora+", "qlora"]
_LAYER = re.compile(r"trunk\.layers\.(\d+)\.")


class TuneConfig(Config):
    """What trains."""

    method: Method = "full"
    """full: all weights. freeze: some layers (`layers`) and what `also` names. lora, rslora, dora, pissa, lora+:
    adapters. qlora: LoRA on an NF4 base."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = 0.0
    """The adapter's share counts alpha / rank times (rslora: alpha / sqrt(rank)); 0: twice the rank, pissa the rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of the adapters' inputs."""
    targets: list[str] = ["all"]
    """Matrices with an adapter: all, attention, mlp, or the ends of their names in the checkpoint (q_proj, w2)."""
    also: list[Literal["embedding", "head", "norms"]] = []
    """What trains whole beside the adapters or layers."""
    layers: int = 2
    """freeze: how many layers train, the last ones; negative: the first ones."""
    ratio: float = Field(default=16.0, gt=0.0)
    """lora+: the rate of B in rates of A."""
    base: Literal["auto", "dense", "int8", "nf4"] = "auto"
    """How the frozen matrices are kept; auto: nf4 for qlora, else as they are."""
    adapters: list[Path] = []
    """Adapters (peft's directories) that are merged into the base first, in this order."""
    start: Path | None = None
    """An adapter that goes on training, in its own form."""

    @property
    def form(self) -> AdapterForm:
        """Of the adapters."""
        alpha = self.alpha or float(self.rank if self.method == "pissa" else 2 * self.rank)
        stable, magnitude = self.method == "rslora", self.method == "dora"
        return AdapterForm(self.rank, alpha, dropout=self.dropout, rank_stable=stable, magnitude=magnitude)

    @property
    def base_kind(self) -> BaseKind:
        if self.base != "auto":
            return self.base
        return "nf4" if self.method == "qlora" else "dense"

    @property
    def adapts(self) -> bool:
        """Whether adapters train."""
        return self.method not in ("full", "freeze")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What trains of one model, and how it is saved."""

    config: TuneConfig
    form: AdapterForm
    base: str
    trained: int
    """Parameters that train."""
    first: Initials | None = None
    """PiSSA: the shares that the base has lost."""

    @staticmethod
    def of(model: CausalLM | ScalarModel, config: TuneConfig, *, seed: int, base: Path | None) -> Tuning:
        """Freeze and adapt the model, in place. ConfigError names a setting that does not fit it."""
        if config.start is not None and not config.adapts:
            raise ConfigError(f"tune.start: method {config.method} trains no adapter", remedy="set tune.method=lora")
        for folder in config.adapters:
            load_adapter(model, folder)
            merge(model)
        form, first = config.form, None
        if config.method == "freeze":
            _freeze(model, config)
        elif config.start is not None:
            form = load_adapter(model, config.start, base=config.base_kind)
        elif config.adapts:
            first = _adapt(model, config, seed=seed)
        if config.method != "full":
            _also(model, config)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Tuning(config, form, str(base or ""), trained, first)

    def rates(self, settings: TrainerConfig) -> TrainerConfig:
        """The run's settings with the rates that the method asks for."""
        if self.config.method != "lora+":
            return settings
        optim = settings.optim.model_copy(update={"scale": {**settings.optim.scale, "*.b": self.config.ratio}})
        return settings.model_copy(update={"optim": optim})

    def save(self, trainer: Trainer, out: Path, *parts: Callable[[Path], None]) -> None:
        """Write the checkpoint, or the adapter, and what belongs to it; every rank must call it."""
        if not self.config.adapts:
            save_checkpoint(trainer, out, *parts)
            return
        weights, model = trainer.full_weights(), trainer.model
        assert isinstance(model, CausalLM | ScalarModel)
        if trainer.world.is_main:
            self.write(model, out, state=weights)
            for part in parts:
                part(out)
        barrier()

    def write(self, model: CausalLM | ScalarModel, out: Path, *, state: dict[str, torch.Tensor] | None = None) -> None:
        """The adapter's files."""
        kind = self.config.base_kind
        save_adapter(model, out, self.form, base=self.base, kind=kind, state=state, first=self.first)
        generation = Path(self.base) / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, out / generation.name)


def _freeze(model: CausalLM | ScalarModel, config: TuneConfig) -> None:
    count = model.config.num_layers
    if not 0 < abs(config.layers) <= count:
        raise ConfigError(f"tune.layers={config.layers}: the model has {count} layers", remedy=f"give 1 to {count}")
    numbers = range(count - config.layers, count) if config.layers > 0 else range(-config.layers)
    for name, parameter in model.named_parameters():
        found = _LAYER.match(name)
        parameter.requires_grad_(found is not None and int(found[1]) in numbers)
    if isinstance(model, ScalarModel):
        model.head.requires_grad_(True)


def _adapt(model: CausalLM | ScalarModel, config: TuneConfig, *, seed: int) -> Initials | None:
    odd = {layer.in_features for name, layer in _layers(model) if layer.in_features % BLOCK}
    if config.base_kind == "nf4" and odd:
        raise ConfigError(
            f"NF4 has blocks of {BLOCK} inputs, the model has matrices of {min(odd)}", remedy="set tune.base=int8"
        )
    if config.method == "pissa" and any(isinstance(child, QuantLinear) for child in model.modules()):
        raise ConfigError("tune.method=pissa needs whole weights, the base is quantized", remedy="use lora or dora")
    found = adapt(
        model,
        config.form,
        targets=_targets(model, config.targets),
        base=config.base_kind,
        initial="pissa" if config.method == "pissa" else "zero",
        value=lambda name, shape: lora_value(name, shape, seed=seed),
    )
    if not found:
        names = sorted({name.rpartition(".")[2] for _, theirs in joins(model.config).values() for name in theirs})
        raise ConfigError(
            f"tune.targets={config.targets} fits no matrix of the model",
            remedy=f"give all, attention, mlp, or some of {', '.join(names)}",
        )
    return initials(model) if config.method == "pissa" else None


def _layers(model: CausalLM | ScalarModel) -> Iterable[tuple[str, Linear]]:
    found = ((name, model.get_submodule(name)) for name in joins(model.config))
    return ((name, layer) for name, layer in found if isinstance(layer, Linear))


def _targets(model: CausalLM | ScalarModel, wanted: Iterable[str]) -> Callable[[str], bool]:
    """Whether a matrix, by its name in the family, is wanted."""
    rooms: dict[str, set[str]] = {"all": set(), "attention": set(), "mlp": set()}
    for ours, (_, theirs) in joins(model.config).items():
        rooms["all"].update(theirs)
        rooms["mlp" if ".mlp." in ours else "attention"].update(theirs)
    chosen = set().union(*(rooms.get(word, set()) for word in wanted))
    ends = tuple(f".{word}" for word in wanted if word not in rooms)
    return lambda name: name in chosen or name.endswith(ends)


def _also(model: CausalLM | ScalarModel, config: TuneConfig) -> None:
    wanted = set(config.also) | ({"head"} if isinstance(model, ScalarModel) else set())
    if "head" in wanted and model.head is None:
        raise ConfigError("tune.also=head: the model's head is its embedding", remedy="name embedding")
    if "norms" in wanted and config.adapts:
        raise ConfigError("tune.also=norms: an adapter's files have no place for them", remedy="use method freeze")
    for name, parameter in model.named_parameters():
        part = "norms" if "norm" in name else name.split(".")[-2]
        if part in wanted:
            parameter.requires_grad_(True)
