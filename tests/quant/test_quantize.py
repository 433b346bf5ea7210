"""The verb: a small model quantized, saved, loaded; close to the original; refused where it cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puyu.errors import CheckpointError, ConfigError
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_model, save_model, scalar_from_language
from puyu.model.config import ExpertShape
from puyu.model.linear import QuantLinear
from puyu.model.moe import Gate
from puyu.model.quant_files import FileForm
from puyu.quant.evaluate import compare
from puyu.quant.quantize import QuantizeConfig, check_layers, quantize_model, run
from puyu.quant.rtn import rtn
from puyu.quant.texts import Budget, sampled_documents
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import from_merges
from tests.model.reference import our_logits, small_model, tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    save_model(small_model(std=0.1), folder)
    (folder / "tokenizer.json").write_text('{"mine": true}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 96]}')
    return folder


def config(source: Path, bits: int, **changes: Any) -> QuantizeConfig:
    small = {"group": 32, "sequences": 8, "length": 64, "eval_tokens": 300, "device": "cpu"}
    return QuantizeConfig.model_validate({"model": source, "bits": bits, **small, **changes})


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


METHODS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4, "method": "rtn"},
    {"bits": 4, "method": "rtn", "symmetric": True},
    {"bits": 4, "method": "gptq"},
    {"bits": 8, "method": "gptq"},
    {"bits": 4, "method": "gptq", "act_order": False},
    {"bits": 4, "method": "awq"},
    {"bits": 8, "method": "smoothquant"},
]


@pytest.mark.parametrize("values", METHODS, ids=str)
@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_every_method_makes_a_checkpoint_that_stays_close(values: dict[str, Any], family: str, tmp_path: Path) -> None:
    save_model(small_model(std=0.1, family=family, qkv_bias=family == "qwen2"), tmp_path / "source")
    numbers = run(config(tmp_path / "source", **values, rest="float32"), out=tmp_path / "out")
    row = tokens(100)
    true, ours = our_logits(load_model(tmp_path / "source"), row), our_logits(load_model(tmp_path / "out"), row)
    assert 0.0005 < distance(ours, true) < (0.04 if values["bits"] == 8 else 0.35)
    assert numbers["unseen_layers"] == [] and numbers["kl"] < 0.03


def test_calibrated_methods_are_closer_than_rounding(tmp_path: Path) -> None:
    model = small_model(std=0.15)
    save_model(model, tmp_path / "source")
    found = {}
    for method in ("rtn", "gptq", "awq"):
        values = {"method": method, "rest": "float32", "eval_tokens": 3000, "sequences": 64, "length": 64}
        found[method] = run(config(tmp_path / "source", 4, **values), out=tmp_path / method)["kl"]
    assert found["gptq"] < found["rtn"] and found["awq"] < found["rtn"]


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_experts_are_quantized_and_those_that_no_token_reaches_are_named(method: str, tmp_path: Path) -> None:
    shape = ExpertShape(count=6, per_token=2, size=32)
    model = small_model(family="mixtral", experts=shape, std=0.1)
    with torch.no_grad():
        for block in model.trunk.layers:
            block.mlp.router.weight[2:].zero_()  # positive logits of the first two experts win over zeros
            block.mlp_norm.weight.abs_()
    before = copy.deepcopy(model)
    c = QuantizeConfig.model_validate({"model": "x", "bits": 4, "group": 32, "method": method})
    documents = [tokens(30, seed=s).tolist() for s in range(2)]
    _, unseen = quantize_model(model, c, documents)
    reached = set()
    for index, block in enumerate(model.trunk.layers):
        assert isinstance(block.mlp.router, Gate), "routers keep full precision"
        for number in range(6):
            name = f"layers.{index}.mlp.experts.{number}.down"
            layer = model.trunk.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            if name in unseen:
                original = before.trunk.get_submodule(name).weight.detach()
                assert torch.equal(layer.weight(torch.float32), rtn(original, c.form).dequantized())
            else:
                reached.add(number)
    assert reached and (method == "rtn") == (unseen == [])
    save_model(model, tmp_path, config=model.config.with_(quantization=c.file_form.to_config()), dtype=torch.float32)
    row = tokens(20)
    assert torch.equal(our_logits(load_model(tmp_path), row), our_logits(model, row))


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_layers_of_the_trunk_become_integers(tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    embedding = model.trunk.embedding.weight.clone()
    head = None if model.head is None else model.head.weight.clone()
    quantize_model(model, QuantizeConfig.model_validate({"model": "x"}), [])
    kinds = [type(child) for child in model.trunk.modules() if hasattr(child, "in_features")]
    assert kinds == [QuantLinear] * 8
    assert torch.equal(model.trunk.embedding.weight, embedding)
    assert (model.head is None) == tied
    assert head is None or (model.head is not None and torch.equal(model.head.weight, head))


def test_the_receipt(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Path] = []

    def measure(path: Path) -> dict[str, Any]:
        load_model(path)
        seen.append(path)
        return {"decode_tokens_per_s": 100.0 * len(seen)}

    out = source.parent / "out"
    numbers = run(config(source, 4, method="rtn"), out=out, measure=measure)
    assert seen == [source, out]
    assert numbers["before"]["decode_tokens_per_s"] == 100.0 and numbers["after"]["decode_tokens_per_s"] == 200.0
    assert (numbers["bits"], numbers["group"]) == (4, 32)
    assert numbers["size_before"] == (source / "model.safetensors").stat().st_size
    assert numbers["size_after"] == (out / "model.safetensors").stat().st_size < 0.35 * numbers["size_before"]
    error = numbers["weight_error"]
    assert 0 < error["mean"] < error["max"] and 0.03 < error["relative"] < 0.12
    assert json.loads(json.dumps(numbers)) == numbers
    printed = capsys.readouterr()
    for word in ("bytes", "perplexity", "decode tokens per s", "KL(before || after)", "same likeliest token"):
        assert word in printed.out + printed.err
    documents = sampled_documents(load_model(source), Budget(300, 64, 1))
    found = compare(load_model(source), load_model(out), documents)
    assert numbers["after"]["perplexity"] == pytest.approx(found.perplexities[1], abs=1e-4)
    assert numbers["kl"] == pytest.approx(found.numbers()["kl"]) and numbers["tokens"] == found.tokens


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
    assert (
        value["quantization_config"] | {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
        == value["quantization_config"]
    )
    assert json.loads((outs[0] / "generation_config.json").read_text()) == {"eos_token_id": [2, 96]}
    stored = load_file(outs[0] / "model.safetensors")
    assert stored["model.layers.0.attention.wqkv.qweight"].dtype == torch.int32
    assert stored["model.layers.0.attention.wqkv.scales"].dtype == torch.float16
    assert stored["output.weight"].dtype == torch.bfloat16


def test_what_cannot_be_quantized(source: Path) -> None:
    run(config(source, 8), out=source.parent / "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        run(config(source.parent / "int8", 4), out=source.parent / "x")
    save_model(scalar_from_language(source), source.parent / "reward")
    with pytest.raises(ConfigError, match="reward model"):
        run(config(source.parent / "reward", 8), out=source.parent / "x")
    with pytest.raises(
        ConfigError, match=r"layers\.0\.attention\.qkv: group 128 does not divide the 64 inputs\n.*group=64"
    ):
        run(config(source, 4, group=128), out=source.parent / "x")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        run(config(source.parent / "nowhere", 8), out=source.parent / "x")
    assert not (source.parent / "x").exists()


def test_weights_that_are_not_numbers_are_named() -> None:
    model = small_model()
    model.trunk.layers[1].mlp.down.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down\.weight holds NaN"):
        check_layers(model, FileForm("gptq", 8))


def test_a_checkpoint_whose_groups_do_not_divide_is_refused(source: Path) -> None:
    out = source.parent / "out"
    run(config(source, 4), out=out)
    value = json.loads((out / "config.json").read_text())
    value["quantization_config"]["group_size"] = 128
    (out / "config.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="do not fit group_size 128"):
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


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bits": 8, "method": "awq"}, "awq makes 4-bit"),
        ({"bits": 4, "method": "smoothquant"}, "smoothquant makes 8-bit"),
        ({"bits": 4, "method": "awq", "symmetric": True}, "stores zero points"),
    ],
)
def test_methods_that_do_not_go_together(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QuantizeConfig.model_validate({"model": "x", **values})


def test_shapes_that_the_files_cannot_hold(tmp_path: Path) -> None:
    save_model(small_model(head_dim=6, num_kv_heads=1, family="llama"), tmp_path / "source")
    with pytest.raises(ConfigError, match=r"qkv: 6 outputs are no multiple of 8.*\n.*bits=8"):
        run(config(tmp_path / "source", 4), out=tmp_path / "x")


def test_calibration_and_evaluation_texts(source: Path) -> None:
    from_merges([], chat_template=CHAT_TEMPLATE).save(source)
    model = small_model(std=0.1, vocab_size=300)
    save_model(model, source)
    path = source.parent / "texts.jsonl"
    path.write_text("".join(f'{{"text": "some words, number {i}"}}\n' for i in range(60)))
    numbers = run(config(source, 4, data=path, eval_data=path), out=source.parent / "out")
    assert numbers["evaluated_on"] == str(path) and numbers["method"] == "gptq" and 250 < numbers["tokens"] < 400
