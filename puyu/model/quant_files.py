"""Quantized matrices as public checkpoints store them <-> plain codes. Pure functions on tensors; opens no file.

A module has I inputs, O outputs, G groups; words are int32.

| method | tensors |
| --- | --- |
| gptq | `qweight` [I * bits / 32, O], inputs packed; `qzeros` [G, O * bits / 32]; `scales` [G, O]; `g_idx` [I] |
| awq | `qweight` [I, O / 8], outputs packed in the order 0 2 4 6 1 3 5 7; `qzeros` [G, O / 8] likewise; `scales` |
| compressed-tensors, int-quantized | `weight` int8 [O, I]; `weight_scale` [O, G] |
| compressed-tensors, pack-quantized | `weight_packed` [O, I * bits / 32]; `weight_scale`; `weight_zero_point` |

GPTQ (AutoGPTQ's layout): the lowest bits hold the first number; format `gptq` stores every zero minus one, `gptq_v2`
stores it as it is. AWQ: the layout of its GEMM kernels. compressed-tensors: the layout of llm-compressor and vLLM.

    form = FileForm.from_config(config["quantization_config"])
    weight = form.read(take, "model.layers.0.self_attn.o_proj")
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puyu.errors import CheckpointError
from puyu.model.linear import QuantWeight, pack_int4, unpack_int4

Take = Callable[[str], Tensor]
"""The tensor of that name, or an error that names it."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_REMEDY = "open the full-precision checkpoint, and use `puyu quantize` to make it smaller"


@dataclass(frozen=True, slots=True)
class FileForm:
    """How a checkpoint's quantized modules are stored. `group` 0: one scale a row (-1 in files)."""

    method: str
    bits: int
    group: int = 0
    symmetric: bool = True
    minus_one: bool = True
    """GPTQ: zeros are stored minus one."""
    packed: bool = False
    """compressed-tensors: pack-quantized."""
    activations: bool = False
    """Inputs are rounded to int8, one scale a token."""

    @staticmethod
    def from_config(value: Mapping[str, Any]) -> FileForm:
        """Read a `quantization_config`; CheckpointError names a method or a format that is not read."""
        method = str(value.get("quant_method"))
        if method == "gptq":
            return _gptq_form(value)
        if method == "awq":
            return _awq_form(value)
        if method == "compressed-tensors":
            return _compressed_form(value)
        raise CheckpointError(
            f"quantization_config: quant_method {method!r} is not supported",
            remedy=f"supported: gptq, awq, compressed-tensors; {_REMEDY}",
        )

    def to_config(self, *, skipped: Collection[str] = ()) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint in this form; `skipped` modules keep full precision."""
        if self.method == "compressed-tensors":
            return _compressed_config(self, skipped)
        value: dict[str, Any] = {"quant_method": self.method, "bits": self.bits, "group_size": self.group or -1}
        if self.method == "awq":
            return {**value, "zero_point": True, "version": "gemm", "modules_to_not_convert": sorted(skipped) or None}
        value |= {"sym": self.symmetric, "desc_act": False, "damp_percent": 0.01, "lm_head": False}
        return {**value, "checkpoint_format": "gptq" if self.minus_one else "gptq_v2"}

    def is_stored(self, names: Collection[str], module: str) -> bool:
        """Whether that module is stored quantized."""
        return f"{module}.{self._marker}" in names

    @property
    def _marker(self) -> str:
        if self.method != "compressed-tensors":
            return "qweight"
        return "weight_packed" if self.packed else "weight_scale"

    def read(self, take: Take, module: str) -> QuantWeight:
        """The module's codes, zeros always given; CheckpointError where shapes do not belong together."""
        try:
            weight = _READERS[self.method](self, take, module)
        except RuntimeError as error:  # views and products of tensors that do not fit
            raise CheckpointError(f"{module}: its quantized tensors do not fit together: {error}") from error
        return replace(weight, activations=self.activations)

    def write(self, weight: QuantWeight, module: str) -> dict[str, Tensor]:
        """The tensors of a module by name."""
        assert weight.bits == self.bits and weight.perm is None, "another format"
        return {f"{module}.{name}": value for name, value in _WRITERS[self.method](self, weight).items()}

    def why_not(self, *, inputs: int, outputs: int) -> str | None:
        """What keeps a matrix of that shape from being stored so, in words; None when nothing does."""
        per_word = 32 // self.bits
        if inputs % (self.group or 1):
            return f"group {self.group} does not divide the {inputs} inputs"
        if (self.method == "gptq" or self.packed) and inputs % per_word:
            return f"{inputs} inputs are no multiple of {per_word}"
        if self.method != "compressed-tensors" and outputs % per_word:
            return f"{outputs} outputs are no multiple of {per_word}"
        return None


# --- configs -------------------------------------------------------------------------------------------------------


def _checked(value: Mapping[str, Any], key: str, allowed: Collection[Any], default: Any = None) -> Any:
    found = value.get(key, default)
    if found not in allowed:
        known = ", ".join(map(str, allowed))
        raise CheckpointError(
            f"quantization_config: {key} {found!r} is not supported", remedy=f"supported: {known}; {_REMEDY}"
        )
    return found


def _group(value: Mapping[str, Any], key: str = "group_size") -> int:
    found = value.get(key)
    if found is None or found == -1:
        return 0
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"quantization_config: {key} {found!r} must be -1 or a positive number")
    return found


def _gptq_form(value: Mapping[str, Any]) -> FileForm:
    bits = _checked(value, "bits", (4, 8))
    layout = _checked(value, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return FileForm("gptq", bits, _group(value), bool(value.get("sym", True)), minus_one=layout == "gptq")


def _awq_form(value: Mapping[str, Any]) -> FileForm:
    bits = _checked(value, "bits" if "bits" in value else "w_bit", (4,))
    _checked({"version": str(value.get("version", "gemm")).lower()}, "version", ("gemm",))
    group = _group(value, "group_size" if "group_size" in value else "q_group_size")
    return FileForm("awq", bits, group, not value.get("zero_point", True))


def _compressed_form(value: Mapping[str, Any]) -> FileForm:
    layout = _checked(value, "format", ("int-quantized", "pack-quantized"))
    groups = list((value.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise CheckpointError(f"quantization_config: {len(groups)} config_groups are not supported", remedy="only one")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    _checked(weights, "type", ("int",))
    _checked(weights, "strategy", ("channel", "group"))
    packed = layout == "pack-quantized"
    bits = _checked(weights, "num_bits", (4, 8) if packed else (8,))
    if inputs is not None:
        for key, only in (
            ("type", "int"),
            ("num_bits", 8),
            ("strategy", "token"),
            ("dynamic", True),
            ("symmetric", True),
        ):
            _checked(inputs, key, (only,))
    group = _group(weights) if weights["strategy"] == "group" else 0
    symmetric = bool(weights.get("symmetric", True))
    if inputs is not None and (bits != 8 or group or not symmetric):
        raise CheckpointError("quantization_config: int8 activations need symmetric int8 weights, one scale a row")
    return FileForm("compressed-tensors", bits, group, symmetric, packed=packed, activations=inputs is not None)


def _compressed_config(form: FileForm, skipped: Collection[str]) -> dict[str, Any]:
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "dynamic": False,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if form.activations else None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized" if form.packed else "int-quantized",
        "ignore": sorted(skipped),
        "config_groups": {"group_0": {**group, "output_activations": None}},
    }


# --- words of 32 bits ----------------------------------------------------------------------------------------------


def unpack_words(words: Tensor, *, bits: int, dim: int) -> Tensor:
    """int32 words -> the numbers in them (4 or 8 bits, unsigned), the lowest bits first along `dim`; uint8.

    Little-endian machines only: a word's bytes are taken as they lie.
    """
    numbers = words.movedim(dim, -1).contiguous().view(torch.uint8)
    if bits == 4:
        numbers = unpack_int4(numbers.flatten(0, -2)).view(*numbers.shape[:-1], -1)
    return numbers.movedim(-1, dim)


def pack_words(numbers: Tensor, *, bits: int, dim: int) -> Tensor:
    """The inverse of `unpack_words`: numbers 0 .. 2^bits - 1 -> int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=numbers.device)
    grouped = numbers.movedim(dim, -1).long().unflatten(-1, (-1, 32 // bits))
    words = (grouped << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def _unsigned(weight: QuantWeight) -> Tensor:
    """The numbers of a matrix as files have them, int32 [O, I]."""
    return weight.numbers.int() + (128 if weight.bits == 8 else 0)


def _zeros(weight: QuantWeight) -> Tensor:
    """Zeros as unsigned numbers, int32 [O, G]."""
    shift = 128 if weight.bits == 8 else 0
    if weight.zeros is None:
        return torch.full(weight.scales.shape, weight.form.middle + shift, dtype=torch.int32)
    return weight.zeros.int() + shift


# --- gptq ----------------------------------------------------------------------------------------------------------


def _read_gptq(form: FileForm, take: Take, module: str) -> QuantWeight:
    codes = _along_inputs(take(f"{module}.qweight").T, form.bits)
    zeros = unpack_words(take(f"{module}.qzeros"), bits=form.bits, dim=1).T.int() + int(form.minus_one)
    scales = take(f"{module}.scales").T.contiguous()
    perm = _order_of(take(f"{module}.g_idx").long(), scales.shape[1], module)
    zeros = zeros - 128 if form.bits == 8 else zeros
    weight = QuantWeight(codes, scales, zeros.short().contiguous(), perm, form.bits)
    if perm is not None:
        numbers = weight.numbers[:, perm].contiguous()
        weight = replace(weight, codes=pack_int4(numbers) if form.bits == 4 else numbers)
    return _checked_groups(module, weight, form)


def _along_inputs(words: Tensor, bits: int) -> Tensor:
    """int32 words of each row [O, I * bits / 32], the lowest bits first -> codes of QuantWeight, which has them so."""
    codes = words.contiguous().view(torch.uint8)
    return (codes ^ 128).view(torch.int8) if bits == 8 else codes


def _order_of(groups_I: Tensor, count: int, module: str) -> Tensor | None:
    """The order of inputs that makes groups contiguous; None where they are."""
    sizes = torch.bincount(groups_I, minlength=count)
    if len(sizes) != count or len(set(sizes.tolist())) != 1:
        raise CheckpointError(f"{module}.g_idx: groups of different sizes, or another number than scales: {count}")
    perm = groups_I.argsort(stable=True)
    return None if torch.equal(perm, torch.arange(len(perm))) else perm


def _checked_groups(module: str, weight: QuantWeight, form: FileForm) -> QuantWeight:
    outputs, inputs = weight.shape
    scales, zeros = weight.scales, weight.zeros
    groups = inputs // form.group if form.group else 1
    if scales.shape != (outputs, groups) or (zeros is not None and zeros.shape != scales.shape):
        found = f"codes {weight.shape}, scales {tuple(scales.shape)}"
        found += "" if zeros is None else f", zeros {tuple(zeros.shape)}"
        raise CheckpointError(f"{module}: {found} [outputs, ...] do not fit group_size {form.group or -1}")
    return weight


def _write_gptq(form: FileForm, weight: QuantWeight) -> dict[str, Tensor]:
    inputs = weight.shape[1]
    group = inputs // weight.scales.shape[1]
    zeros = _zeros(weight) - int(form.minus_one)
    assert int(zeros.min()) >= 0, "format gptq cannot hold a zero of 0"
    return {
        "qweight": pack_words(_unsigned(weight).T, bits=form.bits, dim=0),
        "qzeros": pack_words(zeros.T, bits=form.bits, dim=1),
        "scales": weight.scales.T.contiguous(),
        "g_idx": (torch.arange(inputs) // group).int(),
    }


# --- awq -----------------------------------------------------------------------------------------------------------


def _awq_unpack(words: Tensor) -> Tensor:
    """int32 [rows, O / 8] -> [rows, O] in the order of the outputs."""
    numbers = unpack_words(words, bits=4, dim=1).unflatten(1, (-1, 8))
    return numbers[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _awq_pack(numbers: Tensor) -> Tensor:
    return pack_words(numbers.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1), bits=4, dim=1)


def _read_awq(form: FileForm, take: Take, module: str) -> QuantWeight:
    codes = _awq_unpack(take(f"{module}.qweight")).T
    scales = take(f"{module}.scales").T.contiguous()
    zeros = torch.full(scales.shape, 8) if form.symmetric else _awq_unpack(take(f"{module}.qzeros")).T
    weight = QuantWeight.of(codes.contiguous(), scales, zeros.short().contiguous())
    return _checked_groups(module, weight, form)


def _write_awq(form: FileForm, weight: QuantWeight) -> dict[str, Tensor]:
    return {
        "qweight": _awq_pack(weight.numbers.int().T),
        "qzeros": _awq_pack(_zeros(weight).T),
        "scales": weight.scales.T.contiguous(),
    }


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _read_compressed(form: FileForm, take: Take, module: str) -> QuantWeight:
    scales = take(f"{module}.weight_scale")
    if form.packed:
        inputs = int(take(f"{module}.weight_shape")[1])
        words = take(f"{module}.weight_packed")
        codes = _along_inputs(words, form.bits)[:, : inputs * form.bits // 8].contiguous()
    else:
        codes = take(f"{module}.weight")
    zeros = torch.full(scales.shape, 8 if form.bits == 4 else 0)
    if not form.symmetric:
        zeros = _compressed_zeros(form, take(f"{module}.weight_zero_point"), outputs=codes.shape[0])
    weight = QuantWeight(codes.contiguous(), scales, zeros.short().contiguous(), bits=form.bits)
    return _checked_groups(module, weight, form)


def _compressed_zeros(form: FileForm, stored: Tensor, *, outputs: int) -> Tensor:
    """Zeros as QuantWeight has them: packed along the outputs, or signed numbers."""
    if form.packed:
        return unpack_words(stored, bits=form.bits, dim=0)[:outputs].short() - (128 if form.bits == 8 else 0)
    return stored.short()


def _write_compressed(form: FileForm, weight: QuantWeight) -> dict[str, Tensor]:
    assert weight.zeros is None and (form.packed or weight.bits == 8), "zero points are not written"
    scales = weight.scales.contiguous()
    if not form.packed:
        return {"weight": weight.codes.contiguous(), "weight_scale": scales}
    packed = pack_words(_unsigned(weight), bits=form.bits, dim=1)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}


_READERS = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed}
_WRITERS = {"gptq": _write_gptq, "awq": _write_awq, "compressed-tensors": _write_compressed}
