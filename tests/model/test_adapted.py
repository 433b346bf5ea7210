"""Layers with a low-rank share: against peft on the same model, merged against running, exact to rounding."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from puyu.errors import CheckpointError
from puyu.model.adapted import AdapterForm, adapt, adapted_layers, merge, plain_state
from puyu.model.adapter_files import initials, load_adapter, save_adapter, shares_of
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ModelConfig
from puyu.model.families import Join, joins
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights, initial_value
from puyu.model.packed import PackedPlan

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12, "target_modules": ALL},
    "some": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 2, "lora_alpha": 6, "target_modules": ["k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 6, "target_modules": ALL, "use_dora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"down_proj": 1},
    },
    "modules": {"r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
IDS = [(7 * at) % 90 for at in range(11)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base") / request.param
    bias = request.param == "qwen2"
    model = CausalLM(ModelConfig(family=request.param, vocab_size=96, max_positions=64, qkv_bias=bias, **SHAPE))
    init_weights(model, seed=1, std=0.1)
    if bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("qkv.bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    save_model(model, folder)
    return folder


def their_model(base: Path, kind: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**KINDS[kind])
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.eval()


def theirs(model: Any) -> Tensor:
    return model(torch.tensor([IDS])).logits[0]


def ours(model: CausalLM) -> Tensor:
    tokens = torch.tensor(IDS)
    return model(tokens, torch.arange(len(IDS)), PackedPlan.build([0], len(IDS)))


def draw(seed: int = 0) -> Any:
    return lambda name, shape: initial_value(name, shape, seed=seed, std=0.1)


def train(model: CausalLM) -> None:
    """Shares that are no longer what they began as."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".shares." in name:
                noise = initial_value(name, tuple(parameter.shape), seed=9, std=0.05)
                parameter.mul_(1 + noise) if name.endswith("magnitude") else parameter.add_(noise)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_computes_the_same_and_has_the_same_gradients(base, kind, tmp_path):
    peft = their_model(base, kind)
    peft.save_pretrained(tmp_path)
    model = load_model(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(ours(model), theirs(peft), rtol=0, atol=2e-5)
    if kind in ("modules", "patterns"):
        return
    theirs(peft).square().sum().backward()
    ours(model).square().sum().backward()
    for name, share in shares_of(model).items():
        layer = peft.base_model.model.get_submodule(name)
        pairs = [(share.a, layer.lora_A.default.weight), (share.b, layer.lora_B.default.weight)]
        if share.magnitude is not None:
            pairs.append((share.magnitude, layer.lora_magnitude_vector.default.weight))
        for mine, other in pairs:
            assert mine.grad is not None and other.grad is not None
            assert float((mine.grad - other.grad.flatten().view_as(mine)).norm() / other.grad.norm()) < 1e-4, name


@pytest.mark.parametrize("kind", ["lora", "some", "rslora", "dora", "modules"])
def test_what_is_written_is_read_by_peft_and_again_here(base, kind, tmp_path):
    options = KINDS[kind]
    model = load_model(base)
    form = AdapterForm(
        rank=options["r"],
        alpha=options["lora_alpha"],
        rank_stable=options.get("use_rslora", False),
        magnitude=options.get("use_dora", False),
    )
    adapt(model, form, targets=lambda name: name.endswith(tuple(options["target_modules"])), value=draw())
    if kind == "modules":
        for module in (model.trunk.embedding, model.head):
            module.weight.requires_grad_(True)
            module.weight.data += 0.1
    train(model)
    save_adapter(model, tmp_path, form, base=str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(theirs(peft.eval()), ours(model), rtol=0, atol=2e-5)
    again = load_model(base)
    assert load_adapter(again, tmp_path) == form
    assert torch.equal(ours(again), ours(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(
        options["target_modules"]
    )


METHODS = {
    "lora": AdapterForm(rank=4, alpha=8),
    "rslora": AdapterForm(rank=4, alpha=8, rank_stable=True),
    "dora": AdapterForm(rank=4, alpha=8, magnitude=True),
    "pissa": AdapterForm(rank=4, alpha=4),
}


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_what_ran(base, method, kind):
    model = load_model(base)
    initial = "pissa" if method == "pissa" else "zero"
    adapt(model, METHODS[method], targets=lambda _: True, base=kind, initial=initial, value=draw())
    assert len(list(adapted_layers(model))) == 8
    train(model)
    with torch.no_grad():
        runs = ours(model)
        merge(model)
        assert not list(adapted_layers(model))
        difference = (ours(model) - runs).norm() / runs.norm()
    assert float(difference) < 1e-6


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_a_plain_state_is_a_copy_and_the_layers_stay_as_they_are(base, kind):
    model = load_model(base)
    adapt(model, METHODS["dora"], targets=lambda _: True, base=kind, value=draw())
    train(model)
    before, runs = dict(model.named_parameters()), ours(model).detach()
    gathered = {name: parameter.detach().clone() for name, parameter in before.items()}
    state = plain_state(model, gathered)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    plain = CausalLM(model.config)
    plain.load_state_dict(state)
    torch.testing.assert_close(ours(plain).detach(), runs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_begins_at_the_base(base, method):
    model = load_model(base)
    with torch.no_grad():
        before = ours(model)
    initial = "pissa" if method == "pissa" else "zero"
    adapt(model, METHODS[method], targets=lambda _: True, initial=initial, value=draw())
    with torch.no_grad():
        assert float((ours(model) - before).norm() / before.norm()) < 1e-6
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".shares." in name
    }


def test_pissa_takes_the_principal_part_and_is_written_as_plain_lora(base, tmp_path):
    model, plain = load_model(base), load_model(base)
    adapt(model, METHODS["pissa"], targets=lambda _: True, initial="pissa", value=draw())
    first = initials(model)
    weight = plain.get_submodule("trunk.layers.0.mlp.down").weight
    share = shares_of(model)["model.layers.0.mlp.down_proj"]
    left = torch.linalg.svdvals(weight - share.delta())
    torch.testing.assert_close(left[: len(left) - 4], torch.linalg.svdvals(weight)[4:], rtol=1e-4, atol=1e-4)
    train(model)
    save_adapter(model, tmp_path, METHODS["pissa"], base=str(base), first=first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(theirs(peft.eval()), ours(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_through_a_quantized_base_are_those_of_its_values(base, kind):
    quantized, dense = load_model(base), load_model(base)
    adapt(quantized, METHODS["lora"], targets=lambda _: True, base=kind, value=draw())
    for name, layer in list(adapted_layers(quantized)):
        dense.get_submodule(name).weight.data = layer.dense()
    adapt(dense, METHODS["lora"], targets=lambda _: True, value=draw())
    for model in (quantized, dense):
        train(model)
        ours(model).square().sum().backward()
    for name, share in shares_of(quantized).items():
        other = shares_of(dense)[name]
        torch.testing.assert_close(share.a.grad, other.a.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(share.b.grad, other.b.grad, rtol=1e-4, atol=1e-3)


def spans(join: Join) -> list[slice]:
    ends = list(itertools.accumulate(join.rows))
    return [slice(end - rows, end) for end, rows in zip(ends, join.rows, strict=True)]


def test_joined_rows_and_columns_are_the_same_arrangement():
    for config in (ModelConfig(family="llama", vocab_size=9, **SHAPE), ModelConfig(vocab_size=9, **SHAPE)):
        for join, _ in joins(config).values():
            parts = [torch.randn(rows, 3) for rows in join.rows]
            assert torch.equal(join.beside(parts), join([torch.block_diag(*parts)[rows] for rows in spans(join)]))
            if len(parts) > 1:
                assert torch.equal(join.beside([*parts[:-1], None]), join.beside(parts)[:, :-3])
            assert all(map(torch.equal, join.split(join(parts)), parts))
    assert joins(config)["trunk.layers.0.attention.qkv"][0] == Join((128,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"r": 4, "peft_type": "IA3"}, "peft_type 'IA3'"),
        (lambda row: row | {"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    ],
)
def test_what_is_not_supported_is_named(base, tmp_path, change, message):
    their_model(base, "lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load_model(base), tmp_path)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    their_model(base, "lora").save_pretrained(tmp_path)
    other = CausalLM(ModelConfig(family="llama", vocab_size=96, max_positions=64, **(SHAPE | {"hidden_size": 32})))
    with pytest.raises(CheckpointError, match="give an adapter of this very model|tensors fit no layer"):
        load_adapter(other, tmp_path)
