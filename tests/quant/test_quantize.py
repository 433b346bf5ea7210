"""The verb: a small model quantized, saved, loaded; close to the original; refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puyu.errors import CheckpointError, ConfigError
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_model, save_model, scalar_from_language
from puyu.model.families import FAMILIES
from puyu.model.heads import CausalLM
from puyu.model.linear import QuantFormat, QuantLinear
from puyu.quant.quantize import QuantizeConfig, quantize_model, run
from tests.model.reference import our_logits, small_model, tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_model(small_model(std=0.1), folder)
    (folder / "tokenizer.json").write_text('{"mine": true}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 96]}')
    return folder


def config(source: Path, bits: int, **changes: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"model": source, "bits": bits, "group": 32, **changes})


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize(("bits", "closest", "farthest"), [(8, 0.0005, 0.03), (4, 0.01, 0.25)])
def test_logits_stay_close_through_save_and_load(source: Path, bits: int, closest: float, farthest: float) -> None:
    out = source.parent / "out"
    run(config(source, bits, rest="float32"), out=out)
    row = tokens(40)
    true, ours = our_logits(load_model(source), row), our_logits(load_model(out), row)
    assert closest < distance(ours, true) < farthest


@pytest.mark.parametrize("bits", [8, 4])
def test_few_and_many_tokens_agree(source: Path, bits: int) -> None:
    """Twenty tokens take the integer kernel; the same twenty among two hundred take the dense path."""
    run(config(source, bits), out=source.parent / "out")
    model = load_model(source.parent / "out")
    row = tokens(40)
    few = our_logits(model, row[:20])
    many = our_logits(model, torch.cat((row[:20], tokens(180, seed=9))), (0, 20))[:20]
    assert 0 < distance(few, many) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_round_trips(family: str, bits: int, tmp_path: Path) -> None:
    biased = {"qkv_bias": True} if family == "qwen2" else {}
    model = small_model(family=family, **biased)
    form = QuantFormat(bits, 32 if bits == 4 else 0)
    quantize_model(model, form)
    save_model(model, tmp_path, config=model.config.with_(quantization=form.to_config()))
    again = load_model(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(our_logits(again, tokens(8)), our_logits(model, tokens(8)))


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_layers_of_the_trunk_become_integers(tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    embedding = model.trunk.embedding.weight.clone()
    head = None if model.head is None else model.head.weight.clone()
    quantize_model(model, QuantFormat(8))
    kinds = [type(child) for child in model.trunk.modules() if hasattr(child, "in_features")]
    assert kinds == [QuantLinear] * 8
    assert torch.equal(model.trunk.embedding.weight, embedding)
    assert (model.head is None) == tied
    assert head is None or (model.head is not None and torch.equal(model.head.weight, head))


def test_the_receipt(source: Path) -> None:
    seen: list[Path] = []

    def measure(path: Path) -> dict[str, Any]:
        load_model(path)
        seen.append(path)
        return {"perplexity": float(len(seen))}

    out = source.parent / "out"
    numbers = run(config(source, 4), out=out, measure=measure)
    assert seen == [source, out]
    assert (numbers["before"], numbers["after"]) == ({"perplexity": 1.0}, {"perplexity": 2.0})
    assert (numbers["bits"], numbers["group"]) == (4, 32)
    assert numbers["size_before"] == (source / "model.safetensors").stat().st_size
    assert numbers["size_after"] == (out / "model.safetensors").stat().st_size < 0.3 * numbers["size_before"]
    error = numbers["weight_error"]
    assert 0 < error["mean"] < error["max"] and 0.03 < error["relative"] < 0.12
    assert json.loads(json.dumps(numbers)) == numbers
    assert "before" not in run(config(source, 8), out=source.parent / "other")


def test_weight_errors_are_those_of_the_files(source: Path) -> None:
    out = source.parent / "out"
    numbers = run(config(source, 8), out=out)
    model, original = load_model(out), load_model(source)
    total, count, largest = 0.0, 0, 0.0
    for name, layer in model.trunk.named_modules():
        if isinstance(layer, QuantLinear):
            difference = (layer.weight(torch.float64) - original.trunk.get_parameter(f"{name}.weight").double()).abs()
            total, count = total + difference.sum().item(), count + difference.numel()
            largest = max(largest, difference.max().item())
    assert numbers["weight_error"]["max"] == pytest.approx(largest, rel=1e-4)
    assert numbers["weight_error"]["mean"] == pytest.approx(total / count, rel=1e-4)


def test_the_directory_is_complete_and_deterministic(source: Path) -> None:
    outs = [source.parent / name for name in ("a", "b")]
    outs[1].mkdir()
    (outs[1] / "model.safetensors").write_bytes(b"torn by a kill")
    for out in outs:
        run(config(source, 4), out=out)
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in names)
    value = json.loads((outs[0] / "config.json").read_text())
    assert value["quantization_config"] == {"quant_method": "puyu", "bits": 4, "group": 32}
    assert json.loads((outs[0] / "generation_config.json").read_text()) == {"eos_token_id": [2, 96]}
    stored = load_file(outs[0] / "model.safetensors")
    assert stored["model.layers.0.attention.wqkv.codes"].dtype == torch.uint8
    assert stored["model.layers.0.attention.wqkv.scales"].dtype == torch.bfloat16
    assert stored["output.weight"].dtype == torch.bfloat16


def test_what_cannot_be_quantized(source: Path) -> None:
    run(config(source, 8), out=source.parent / "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        run(config(source.parent / "int8", 4), out=source.parent / "x")
    save_model(scalar_from_language(source), source.parent / "reward")
    with pytest.raises(ConfigError, match="reward model"):
        run(config(source.parent / "reward", 8), out=source.parent / "x")
    with pytest.raises(ConfigError, match=r"group 128 does not divide the 64 inputs of layers\.0.*\n.*group=64"):
        run(config(source, 4, group=128), out=source.parent / "x")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        run(config(source.parent / "nowhere", 8), out=source.parent / "x")
    assert not (source.parent / "x").exists()


def test_weights_that_are_not_numbers_are_named() -> None:
    model: CausalLM = small_model()
    model.trunk.layers[1].mlp.down.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down\.weight holds NaN"):
        quantize_model(model, QuantFormat(8))


def test_a_checkpoint_whose_groups_do_not_divide_is_refused(source: Path) -> None:
    out = source.parent / "out"
    run(config(source, 4), out=out)
    value = json.loads((out / "config.json").read_text())
    value["quantization_config"]["group"] = 128
    (out / "config.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="64 inputs, groups of 128"):
        load_model(out)


def test_bf16_inference(source: Path) -> None:
    out = source.parent / "out"
    run(config(source, 4), out=out)
    wide, narrow = load_model(out), load_model(out, dtype=torch.bfloat16)
    row = tokens(30)
    plan = PackedPlan.build((0,), 30)
    with torch.no_grad():
        logits = narrow(row, torch.arange(30), plan)
    assert logits.dtype == torch.bfloat16
    assert distance(logits, our_logits(wide, row)) < 0.03
