"""Public layouts against naive unpackers, the compressed-tensors package, and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from puyu.errors import CheckpointError
from puyu.model.checkpoint import load_model, save_model
from puyu.model.linear import QuantFormat, QuantLinear, QuantWeight
from puyu.model.quant_files import FileForm, pack_words, unpack_words
from puyu.model.quant_modules import replace_module
from puyu.quant.calibrate import linears
from puyu.quant.rtn import rtn
from tests.model.reference import our_logits, reference, reference_logits, saved, small_model, tokens
from tests.model.test_linear import random_codes

Stored = dict[str, Tensor]


def taker(tensors: Stored) -> Callable[[str], Tensor]:
    return lambda name: tensors[name]


def word(tensor: Tensor, *place: int) -> int:
    """A stored word as an unsigned number."""
    return int(tensor[place]) % 2**32


def naive_gptq(stored: Stored, bits: int, minus_one: bool, row: int, column: int) -> float:
    """Output `row`, input `column` of a GPTQ module, one number at a time."""
    per_word, mask = 32 // bits, 2**bits - 1
    code = word(stored["m.qweight"], column // per_word, row) >> bits * (column % per_word) & mask
    group = int(stored["m.g_idx"][column])
    zero = word(stored["m.qzeros"], group, row // per_word) >> bits * (row % per_word) & mask
    return (code - zero - minus_one) * stored["m.scales"][group, row].item()


def naive_awq(stored: Stored, row: int, column: int) -> float:
    place = [0, 4, 1, 5, 2, 6, 3, 7][row % 8]  # where output row % 8 stands in its word
    group = column * stored["m.scales"].shape[0] // stored["m.qweight"].shape[0]
    code = word(stored["m.qweight"], column, row // 8) >> 4 * place & 15
    zero = word(stored["m.qzeros"], group, row // 8) >> 4 * place & 15
    return (code - zero) * stored["m.scales"][group, row].item()


def safe(weight: QuantWeight) -> QuantWeight:
    """Zeros that every layout can store."""
    if weight.zeros is None:
        return weight
    low = 1 if weight.bits == 4 else -127
    return QuantWeight(weight.codes, weight.scales, weight.zeros.clamp(min=low), bits=weight.bits)


FORMS = [
    FileForm("gptq", 4, 32, False),
    FileForm("gptq", 4, 0, True),
    FileForm("gptq", 4, 64, False, minus_one=False),
    FileForm("gptq", 8, 0, True),
    FileForm("gptq", 8, 32, False),
    FileForm("awq", 4, 32, False),
    FileForm("awq", 4, 0, False),
]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
@pytest.mark.parametrize("form", FORMS)
def test_written_words_are_what_the_description_says(form: FileForm, rows: int, columns: int, seed: int) -> None:
    shape = (8 * rows, 64 * columns)
    weight = safe(random_codes(*shape, QuantFormat(form.bits, form.group, form.symmetric), seed))
    stored = form.write(weight, "m")
    true = weight.dequantized(torch.float64)
    for row in range(0, shape[0], 3):
        for column in range(0, shape[1], 7):
            naive = naive_awq(stored, row, column) if form.method == "awq" else None
            naive = naive if naive is not None else naive_gptq(stored, form.bits, form.minus_one, row, column)
            assert naive == true[row, column].item()
    again = form.read(taker(stored), "m").simplified()
    assert again.form == weight.form
    assert torch.equal(again.dequantized(torch.float64), true) and again.scales.dtype == weight.scales.dtype


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**31))
def test_files_of_other_tools_with_act_order(bits: int, minus_one: bool, seed: int) -> None:
    """Random words, as nobody here would write them: any zero, groups of inputs in any order."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, groups = 64, 16, 4
    words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=generator).int()  # noqa: E731
    stored = {
        "m.qweight": words(inputs * bits // 32, outputs),
        "m.qzeros": words(groups, outputs * bits // 32),
        "m.scales": torch.rand(groups, outputs, generator=generator).half(),
        "m.g_idx": (torch.randperm(inputs, generator=generator) % groups).int(),
    }
    weight = FileForm("gptq", bits, inputs // groups, False, minus_one=minus_one).read(taker(stored), "m").simplified()
    assert weight.perm is not None
    layer = QuantLinear.of(weight)
    found = layer.weight(torch.float64)
    for row in range(outputs):
        for column in range(inputs):
            assert found[row, column].item() == naive_gptq(stored, bits, minus_one, row, column)
    x = torch.randn(120, inputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ found.T)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([0, 1]), st.integers(0, 2**31))
def test_words(bits: int, dim: int, seed: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3, 5), generator=torch.Generator().manual_seed(seed)).int()
    numbers = unpack_words(words, bits=bits, dim=dim)
    assert int(numbers.min()) >= 0 and int(numbers.max()) < 2**bits
    assert torch.equal(pack_words(numbers, bits=bits, dim=dim), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_compressed_tensors_against_their_package(bits: int, symmetric: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    form = QuantFormat(bits, 32, symmetric)
    weight = random_codes(24, 64, form)
    shift = 2 ** (bits - 1) if bits == 4 else 0  # their codes are signed
    signed = (weight.numbers.short() - shift).to(torch.int8)
    stored = {
        "m.weight_packed": helpers.pack_to_int32(signed, bits),
        "m.weight_scale": weight.scales,
        "m.weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        zeros = (weight.zeros - shift).to(torch.int8)
        stored["m.weight_zero_point"] = helpers.pack_to_int32(zeros, bits, packed_dim=0)
    found = FileForm("compressed-tensors", bits, 32, symmetric, packed=True).read(taker(stored), "m").simplified()
    assert torch.equal(found.dequantized(), weight.dequantized())


# --- whole checkpoints ---------------------------------------------------------------------------------------------


def quantized(model: Any, form: FileForm) -> Any:
    for index, block in enumerate(model.trunk.layers):
        for name, layer in linears(block).items():
            codes = rtn(layer.weight.detach(), QuantFormat(form.bits, form.group, form.symmetric, form.activations))
            replace_module(model, f"trunk.layers.{index}.{name}", QuantLinear.of(codes, bias=layer.bias))
    return model


PACKED = FileForm("compressed-tensors", 4, 32, packed=True)
W8A8 = FileForm("compressed-tensors", 8, activations=True)
CHECKPOINTS = [PACKED, FORMS[0], FORMS[3], FORMS[5], FileForm("compressed-tensors", 8), W8A8]


@pytest.mark.parametrize("form", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("family", ["internlm2", "llama", "qwen2"])
def test_every_family_round_trips(family: str, form: FileForm, tmp_path: Path) -> None:
    biased = {"qkv_bias": True} if family == "qwen2" else {}
    model = quantized(small_model(family=family, **biased), form)
    save_model(model, tmp_path, dtype=torch.float32, config=model.config.with_(quantization=form.to_config()))
    again = load_model(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(our_logits(again, tokens(8)), our_logits(model, tokens(8)))
    narrow = load_model(tmp_path, dtype=torch.bfloat16)
    assert narrow.trunk.layers[0].mlp.down.scales.dtype == torch.float16, "scales are kept as stored"  # type: ignore[union-attr]
    assert FileForm.from_config(json.loads((tmp_path / "config.json").read_text())["quantization_config"]) == form


@pytest.mark.parametrize("form", [PACKED, FileForm("compressed-tensors", 8, packed=True), W8A8])
def test_transformers_reads_our_checkpoints(form: FileForm, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = quantized(load_model(saved(reference("llama"), tmp_path / "source")), form)
    value = form.to_config(skipped=["lm_head"])
    save_model(model, tmp_path, dtype=torch.float32, config=model.config.with_(quantization=value))
    ours, theirs = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    row = tokens(120)
    found = reference_logits(theirs, row)  # the first call turns the codes into weights
    down = ours.trunk.layers[0].mlp.down
    assert isinstance(down, QuantLinear) and down.form.activations == form.activations
    torch.testing.assert_close(
        theirs.model.layers[0].mlp.down_proj.weight, down.weight(torch.float32), rtol=0, atol=1e-6
    )
    if not form.activations:  # int8 activations have one more code there, so their rounding differs
        torch.testing.assert_close(our_logits(ours, row), found, rtol=0, atol=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPTQ checkpoint of the llama family."""
    form = FORMS[0]
    model = quantized(small_model(family="llama"), form)
    save_model(model, tmp_path, dtype=torch.float32, config=model.config.with_(quantization=form.to_config()))
    return tmp_path


def change(folder: Path, edit: Callable[[Stored], None]) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")


def test_layers_may_stay_in_full_precision_and_the_head_may_be_quantized(folder: Path) -> None:
    model = load_model(folder)
    row = tokens(100)
    down = model.trunk.layers[1].mlp.down
    assert isinstance(down, QuantLinear) and model.head is not None
    head = FORMS[0].write(rtn(model.head.weight.detach()[:96], QuantFormat(4, 32, False)), "lm_head")

    def edit(stored: Stored) -> None:
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            del stored[f"model.layers.1.mlp.down_proj.{name}"]
        stored["model.layers.1.mlp.down_proj.weight"] = down.weight(torch.float32)
        del stored["lm_head.weight"]
        stored |= head
        stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][:96]

    change(folder, edit)
    value = json.loads((folder / "config.json").read_text()) | {"vocab_size": 96}
    (folder / "config.json").write_text(json.dumps(value))
    mixed = load_model(folder)
    assert isinstance(mixed.head, QuantLinear)
    row = row.clamp(max=95)
    hidden = [m.trunk(row, torch.arange(100), plan(100)) for m in (model, mixed)]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=1e-4)


def plan(count: int) -> Any:
    from puyu.model.packed import PackedPlan

    return PackedPlan.build((0,), count)


def test_equal_act_orders_are_fused_and_different_ones_are_named(folder: Path) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def reorder(stored: Stored, module: str, perm: Tensor) -> None:
        codes = unpack_words(stored[f"{module}.qweight"], bits=4, dim=0)[perm]
        stored[f"{module}.qweight"] = pack_words(codes, bits=4, dim=0)
        stored[f"{module}.g_idx"] = stored[f"{module}.g_idx"][perm]

    before = load_model(folder).trunk.layers[0].attention.qkv.weight(torch.float64)  # type: ignore[union-attr, operator]
    change(folder, lambda stored: [reorder(stored, name, order) for name in names] and None)
    after = load_model(folder).trunk.layers[0].attention.qkv  # type: ignore[union-attr]
    assert isinstance(after, QuantLinear) and after.form.permuted
    assert torch.equal(after.weight(torch.float64), before[:, order])
    change(folder, lambda stored: reorder(stored, names[1], order.flip(0)))
    with pytest.raises(CheckpointError, match=r"k_proj.*groups of different inputs.*\n.*desc_act"):
        load_model(folder)


def test_biases_of_zeros_are_ignored_others_are_not(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.bias"
    change(folder, lambda stored: stored.update({name: torch.zeros(64)}))
    load_model(folder)
    change(folder, lambda stored: stored.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match="down_proj.bias' is not zero"):
        load_model(folder)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda s: s.pop("model.layers.0.self_attn.k_proj.scales"), "k_proj.scales' is missing"),
        (lambda s: s.pop("model.layers.0.self_attn.k_proj.qweight"), "quantized only in part"),
        (
            lambda s: s.update({"model.layers.0.mlp.down_proj.scales": torch.ones(2, 64)}),
            "do not fit|different sizes|scales: 2",
        ),
        (lambda s: s.update({"model.layers.0.mlp.down_proj.g_idx": torch.zeros(96).int()}), "different sizes"),
        (lambda s: s.update({"model.layers.0.mlp.down_proj.qzeros": torch.zeros(3, 4).int()}), "do not fit"),
        (lambda s: s.update({"stray.qweight": torch.zeros(3).int()}), "stray.qweight"),
    ],
)
def test_damaged_files_are_named(folder: Path, edit: Callable[[Stored], None], match: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=match):
        load_model(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
STATIC = {"type": "int", "num_bits": 8, "strategy": "tensor", "dynamic": False}
CT = {"quant_method": "compressed-tensors", "format": "int-quantized"}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes' is not supported\n.*gptq, awq"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({**GPTQ, "bits": 3}, "bits 3"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "group_size": 0}, "group_size 0"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({**CT, "format": "float-quantized"}, "'float-quantized'"),
        ({**CT, "config_groups": {}}, "0 config_groups"),
        ({**CT, "config_groups": {"a": {"weights": {**WEIGHTS, "type": "float"}}}}, "type 'float'"),
        ({**CT, "config_groups": {"a": {"weights": WEIGHTS, "input_activations": STATIC}}}, "strategy 'tensor'"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(value: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        FileForm.from_config(value)


def test_shapes_that_a_layout_cannot_hold() -> None:
    assert FORMS[0].why_not(inputs=64, outputs=64) is None
    assert "32 does not divide the 48" in str(FORMS[0].why_not(inputs=48, outputs=64))
    assert "12 outputs are no multiple of 8" in str(FORMS[0].why_not(inputs=64, outputs=12))
    assert "6 inputs are no multiple of 4" in str(FORMS[3].why_not(inputs=6, outputs=8))
    assert FileForm("compressed-tensors", 8).why_not(inputs=7, outputs=3) is None
