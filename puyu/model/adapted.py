"""Linear layers with a low-rank share that trains on a base that does not: LoRA (Hu et al. 2021, arXiv 2106.09685),
rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), on a dense, an int8 or an NF4 base (QLoRA, 2305.14314).

    adapt(model, AdapterForm(rank=16, alpha=32.0), targets=lambda name: name.endswith("q_proj"), value=draw)

A fused matrix (queries, keys, values; gate and up) has one share for each of the matrices that its family stores, so
that adapters are those of peft, matrix for matrix. T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puyu.model.families import Join, joins
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.linear import Linear, QuantLinear, QuantWeight, quantize_tokens
from puyu.model.nf4 import NF4

Initial = Literal["zero", "pissa"]
BaseKind = Literal["dense", "int8", "nf4"]


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """What all shares of an adapter have in common."""

    rank: int = 16
    alpha: float = 32.0
    """The share counts alpha / rank times, or alpha / sqrt(rank) times with `rank_stable`."""
    dropout: float = 0.0
    """Of the share's inputs, while training."""
    rank_stable: bool = False
    """rsLoRA."""
    magnitude: bool = False
    """DoRA: the length of each row of the sum is a parameter of its own."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stable else self.rank)


class LowRank(nn.Module):
    """scale * B A x for the rows of one stored matrix: `a` [R, I], `b` [O, R], and for DoRA `magnitude` [O]."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float, magnitude: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.magnitude = nn.Parameter(torch.ones(outputs)) if magnitude else None

    def with_values(self, values: Mapping[str, Tensor], prefix: str, device: torch.device) -> LowRank:
        """Another one of the same form, with these values."""
        with torch.device("meta"):
            sizes = self.a.shape[1], len(self.b)
            made = LowRank(*sizes, rank=len(self.a), scale=self.scale, magnitude=self.magnitude is not None)
        state = {name: values[f"{prefix}.{name}"].to(device) for name, _ in self.named_parameters()}
        made.load_state_dict(state, assign=True)
        return made

    def delta(self) -> Tensor:
        """scale * B A, [O, I], in fp32 or wider."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return (self.b.to(wide) @ self.a.to(wide)) * self.scale


class NF4Linear(nn.Module):
    """A frozen linear layer on NF4 codes; the matrix in the inputs' dtype lives for one product at a time."""

    def __init__(self, weight: NF4, *, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        for name in NF4.__slots__:
            self.register_buffer(name, getattr(weight, name))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def matrix(self) -> NF4:
        return NF4(self.codes, self.scale_codes, self.scales, self.offset)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.matrix().dequantized, self.bias)


def frozen_product(x: Tensor, dense: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
    """x W^T + b, where `dense` makes W [O, I] in a dtype: once for the product and once for its gradient."""
    found: Tensor = _FrozenProduct.apply(x, dense)  # type: ignore[no-untyped-call]
    return found if bias is None else found + bias.to(found.dtype)


class _FrozenProduct(torch.autograd.Function):
    """F.linear with a matrix that has no gradient and is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense = dense
        return F.linear(x, dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ ctx.dense(grad.dtype) if ctx.needs_input_grad[0] else None), None


class _FrozenInteger(nn.Module):
    """A frozen layer on integer codes in training: their dense product, in both directions."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.quantized = base
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.quantized.bias

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.quantized.weight, self.bias)


Frozen = Linear | NF4Linear | _FrozenInteger


class AdaptedLinear(nn.Module):
    """base(x) plus the shares of the stored matrices that have one, by their number among all of them; without any, a
    base that is quantized."""

    def __init__(self, base: Frozen, join: Join, shares: dict[int, LowRank], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.join = base, join
        self.in_features, self.out_features = base.in_features, base.out_features
        self.shares = nn.ModuleDict({str(number): share for number, share in sorted(shares.items())})
        self.dropout = nn.Dropout(dropout) if dropout else None

    def share(self, number: int) -> LowRank | None:
        """That of a stored matrix."""
        return self.shares[str(number)] if str(number) in self.shares else None  # type: ignore[return-value]  # noqa: SIM401

    def _all(self) -> list[LowRank | None]:
        return [self.share(number) for number in range(len(self.join.rows))]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.shares:
            return y
        low = self._low(x if self.dropout is None else self.dropout(x))
        if not any(share is not None and share.magnitude is not None for share in self._all()):
            return self._added(y, low)
        bias = None if self.base.bias is None else self.base.bias.to(y.dtype)
        y = self._added(y if bias is None else y - bias, low) * self._lengths().to(y.dtype)
        return y if bias is None else y + bias

    def _low(self, x: Tensor) -> Tensor:
        """A x of all shares, one product, [..., R of all]."""
        stacked = [share.a for share in self._all() if share is not None]
        return F.linear(x, (stacked[0] if len(stacked) == 1 else torch.cat(tuple(stacked))).to(x.dtype))

    def _added(self, y: Tensor, low: Tensor) -> Tensor:
        """y + scale * B (A x), one product for all shares: each B in columns of its own, zeros beside it."""
        b = self.join.beside([None if s is None else (s.b * s.scale).to(low.dtype) for s in self._all()])
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.T).view_as(y)

    def _lengths(self) -> Tensor:
        """DoRA: what each row is multiplied by, [O]; the lengths of the sum count as constants, as in the paper."""
        with torch.no_grad():
            lengths = [part.norm(dim=1) for part in self._sums(self.dense(), self._all())]
        factors = [
            torch.ones_like(length) if share is None or share.magnitude is None else share.magnitude / length
            for share, length in zip(self._all(), lengths, strict=True)
        ]
        return self.join(factors)

    def dense(self) -> Tensor:
        """The base's matrix [O, I], in fp32 or wider."""
        if isinstance(self.base, Linear):
            return _wide(self.base.weight.detach())
        if isinstance(self.base, NF4Linear):
            return self.base.matrix().dequantized()
        return self.base.quantized.weight(torch.float32)

    def _sums(self, base: Tensor, shares: Sequence[LowRank | None]) -> list[Tensor]:
        """Base plus share of each stored matrix."""
        parts = self.join.split(base)
        return [part if s is None else part + s.delta() for part, s in zip(parts, shares, strict=True)]

    @torch.no_grad()
    def merged(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """One matrix [O, I] that computes the same, in fp32 or wider (`values`: of the parameters, by their names here,
        as somebody has gathered them, in place of the layer's own)."""
        shares, base = self._all(), self.dense()
        if values is not None:
            base = _wide(values["base.weight"]) if isinstance(self.base, Linear) else base
            shares = [s and s.with_values(values, f"shares.{at}", base.device) for at, s in enumerate(shares)]
        found = []
        for part, share in zip(self._sums(base, shares), shares, strict=True):
            if share is not None and share.magnitude is not None:
                part = part * (share.magnitude / part.norm(dim=1))[:, None]
            found.append(part)
        return self.join(found)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


Targets = Callable[[str], bool]
"""Whether a stored matrix, by its name in the family, gets a share."""


def adapt(
    model: CausalLM | ScalarModel,
    form: AdapterForm,
    *,
    targets: Targets,
    base: BaseKind = "dense",
    initial: Initial = "zero",
    value: Callable[[str, tuple[int, ...]], Tensor],
) -> list[str]:
    """Freeze the model and give shares to the layers that have a target; returns the names of the target matrices.
    Experts are layers like others; those without a target change only where the base is quantized.

    `value(name, shape)` draws a new A (`init.lora_value`); B begins at zero.
    """
    model.requires_grad_(False)
    found: list[str] = []
    for ours, (join, theirs) in joins(model.config).items():
        layer = model.get_submodule(ours)
        assert isinstance(layer, Linear | QuantLinear)
        shares = {}
        for number in (number for number, name in enumerate(theirs) if targets(name)):
            found.append(theirs[number])
            shares[number] = LowRank(
                layer.in_features, join.rows[number], rank=form.rank, scale=form.scale, magnitude=form.magnitude
            )
            shares[number].a.data = value(f"{theirs[number]}.lora_A", tuple(shares[number].a.shape))
        if not shares and base == "dense" and isinstance(layer, Linear):
            continue  # nothing changes
        if initial == "pissa" and shares:
            assert isinstance(layer, Linear)
            layer = _principal(layer, join, shares)
        adapted = AdaptedLinear(freeze(layer, base), join, shares, dropout=form.dropout)
        if form.magnitude and shares:
            _measure(adapted)
        parent, _, leaf = ours.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted)
    return found


@torch.no_grad()
def _measure(adapted: AdaptedLinear) -> None:
    """DoRA begins with the lengths that the rows have."""
    for number, part in enumerate(adapted.join.split(adapted.dense())):
        share = adapted.share(number)
        if share is not None and share.magnitude is not None:
            share.magnitude.data = part.norm(dim=1)


@torch.no_grad()
def _principal(layer: Linear, join: Join, shares: dict[int, LowRank]) -> Linear:
    """PiSSA: the shares are the principal parts of the matrices, the base is what is left of them."""
    parts = join.split(_wide(layer.weight.detach()))
    for number, share in shares.items():
        rank = len(share.a)
        u, s, v = torch.linalg.svd(parts[number], full_matrices=False)
        roots = (s[:rank] / share.scale).sqrt()
        share.a.data, share.b.data = (roots[:, None] * v[:rank]).contiguous(), (u[:, :rank] * roots).contiguous()
        parts[number] = parts[number] - share.delta()
    rest = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    rest.weight, rest.bias = nn.Parameter(join(parts).to(layer.weight.dtype), requires_grad=False), layer.bias
    return rest


@torch.no_grad()
def freeze(layer: Linear | QuantLinear, base: BaseKind) -> Frozen:
    """The layer as a base that does not train."""
    if isinstance(layer, QuantLinear):
        return _FrozenInteger(layer)
    bias = None if layer.bias is None else layer.bias.detach()
    if base == "nf4":
        return NF4Linear(NF4.of(layer.weight.detach()), bias=bias)
    if base == "int8":
        codes, scales = quantize_tokens(layer.weight.detach())
        return _FrozenInteger(QuantLinear.of(QuantWeight.of(codes, scales, bits=8), bias=bias))
    return layer.requires_grad_(False)


def adapted_layers(model: nn.Module) -> Iterable[tuple[str, AdaptedLinear]]:
    """Those of a model, by name."""
    return ((name, child) for name, child in model.named_modules() if isinstance(child, AdaptedLinear))


@torch.no_grad()
def plain_state(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of the plain model that computes the same (`values`: all parameters as somebody has gathered
    them); matrices of adapted layers are merged, in fp32 or wider."""
    values = dict(model.named_parameters()) if values is None else values
    found, state = dict(adapted_layers(model)), {}
    for name, layer in found.items():
        own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
        state[f"{name}.weight"] = layer.merged(own)
        state |= {
            f"{name}.bias": value for key, value in own.items() if key.startswith("base.") and key.endswith("bias")
        }
    inside = tuple(f"{name}." for name in found)
    for name, child in model.named_modules():
        if isinstance(child, QuantLinear) and not name.startswith(inside):
            state[f"{name}.weight"] = child.weight(torch.float32)
    return {name: value.detach() for name, value in values.items() if not name.startswith(inside)} | state


@torch.no_grad()
def merge(model: CausalLM | ScalarModel) -> None:
    """Make every adapted layer a plain one that computes the same, in place; matrices in fp32 or wider."""
    for name, layer in list(adapted_layers(model)):
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.base.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
