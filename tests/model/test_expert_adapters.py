"""Adapters of a mixture's experts: against peft on the same model, in both of its formats; quantized bases."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from puyu.errors import CheckpointError
from puyu.model.adapted import AdapterForm, NF4Linear, adapt, adapted_layers, merge, plain_state
from puyu.model.adapter_files import load_adapter, save_adapter, shares_of
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ExpertShape, ModelConfig
from puyu.model.families import inputs_of, joins
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.linear import QuantLinear, QuantWeight, quantize_tokens
from puyu.model.lora import AdapterBank
from tests.model.test_adapted import draw, ours, theirs, train

FAMILIES = {
    "mixtral": ExpertShape(count=4, per_token=2, size=128),
    "qwen2_moe": ExpertShape(count=4, per_token=2, size=128, shared_size=192, normalize=False),
    "qwen3_moe": ExpertShape(count=3, per_token=2, size=64, dense_layers=(0,)),
}
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
OWN = {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 3}}
FORMS = {
    "lora": AdapterForm(rank=4, alpha=12),
    "rslora": AdapterForm(rank=4, alpha=8, rank_stable=True),
    "dora": AdapterForm(rank=4, alpha=8, magnitude=True),
    "pissa": AdapterForm(rank=4, alpha=4),
}


def config_of(family: str) -> ModelConfig:
    return ModelConfig(family=family, vocab_size=96, max_positions=64, experts=FAMILIES[family], **SHAPE)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base") / request.param
    model = CausalLM(config_of(request.param))
    init_weights(model, seed=1, std=0.1)
    save_model(model, folder)
    return folder


def their_base(base: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def adapted(base: Path, method: str, kind: str = "dense") -> CausalLM:
    model = load_model(base)
    initial = "pissa" if method == "pissa" else "zero"
    adapt(model, FORMS[method], targets=lambda _: True, base=kind, initial=initial, value=draw())
    train(model)
    return model


def test_all_linear_layers_have_a_share_of_their_shape_and_the_routers_have_none(base):
    model = adapted(base, "lora")
    assert {name for name, _ in adapted_layers(model)} == set(joins(model.config))
    assert any(".experts." in name for name, _ in adapted_layers(model))
    for name, (_, names) in joins(model.config).items():
        shares = [shares_of(model)[one] for one in names]
        assert all(share.a.shape[1] == inputs_of(name, model.config) for share in shares)
    assert not any("router" in name or "shared_gate" in name for name, _ in adapted_layers(model))


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_what_is_written_is_read_again_and_by_peft(base, tmp_path, method):
    """peft stacks the experts' pairs as it reads them; it takes a dense MLP's for those of experts, and knows nothing
    of Qwen2-MoE."""
    model = load_model(base)
    adapt(model, FORMS[method], targets=lambda name: ".mlp." not in name or ".experts." in name, value=draw())
    train(model)
    save_adapter(model, tmp_path, FORMS[method], base=str(base))
    again = load_model(base)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(ours(again), ours(model), rtol=0, atol=2e-6)
    if model.config.family == "qwen2_moe":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(their_base(base), tmp_path)
    torch.testing.assert_close(theirs(peft.eval()), ours(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("wanted", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("pattern", [{}, OWN])
def test_what_peft_writes_for_stacked_experts_is_read(base, tmp_path, wanted, pattern):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **pattern}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            their_base(base), LoraConfig(**options, target_parameters=[f"mlp.experts.{name}" for name in wanted])
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.eval().save_pretrained(tmp_path)
    model = load_model(base)
    load_adapter(model, tmp_path)
    assert any(".experts." in name for name, _ in adapted_layers(model))
    torch.testing.assert_close(ours(model), theirs(peft), rtol=0, atol=2e-5)
    places = [parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(places)) == len(places)  # gate and up have begun from one A, and train apart
    with pytest.raises(CheckpointError, match=r"target_parameters is not supported[\s\S]*puyu merge"):
        AdapterBank(load_model(base)).load("poet", tmp_path)


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("method", FORMS)
def test_merged_is_what_ran(base, method, kind):
    model = adapted(base, method, kind)
    with torch.no_grad():
        runs = ours(model)
        merge(model)
        assert not list(adapted_layers(model))
        assert float((ours(model) - runs).norm() / runs.norm()) < 1e-6


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base_is_quantized_where_nothing_trains_too(base, kind):
    model, plain = load_model(base), CausalLM(load_model(base).config)
    adapt(model, FORMS["lora"], targets=lambda name: name.endswith("v_proj"), base=kind, value=draw())
    train(model)
    layers = dict(adapted_layers(model))
    assert set(layers) == set(joins(model.config))
    assert all(isinstance(layer.base, NF4Linear) == (kind == "nf4") for layer in layers.values())
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}
    runs = ours(model).detach()
    plain.load_state_dict(plain_state(model))
    torch.testing.assert_close(ours(plain).detach(), runs, rtol=1e-5, atol=1e-5)


def test_layers_of_a_quantized_checkpoint_that_do_not_train_pass_gradients_on(base):
    """Their kernels know none: what lies below them would not learn."""
    quantized, dense = load_model(base), load_model(base)
    for name in joins(quantized.config):
        layer = quantized.get_submodule(name)
        codes, scales = quantize_tokens(layer.weight.detach())
        made = QuantLinear.of(QuantWeight.of(codes, scales, bits=8), bias=layer.bias)
        dense.get_submodule(name).weight.data = made.weight(torch.float32)
        parent, _, leaf = name.rpartition(".")
        setattr(quantized.get_submodule(parent), leaf, made)
    for model in (quantized, dense):
        adapt(model, FORMS["lora"], targets=lambda name: name.endswith("q_proj"), value=draw())
        train(model)
        ours(model).square().sum().backward()
    for name, share in shares_of(quantized).items():
        assert share.a.grad is not None and float(share.a.grad.norm()) > 0
        torch.testing.assert_close(share.a.grad, shares_of(dense)[name].a.grad, rtol=1e-4, atol=1e-3)


def test_an_adapter_of_experts_does_not_run_beside_others(base, tmp_path):
    save_adapter(adapted(base, "lora"), tmp_path, FORMS["lora"], base=str(base))
    with pytest.raises(CheckpointError, match=r"experts cannot run beside other adapters[\s\S]*puyu merge"):
        AdapterBank(load_model(base)).load("poet", tmp_path)


def test_the_expert_that_all_tokens_get_runs_beside_others(tmp_path):
    model = CausalLM(config_of("qwen2_moe"))
    init_weights(model, seed=1, std=0.1)
    save_model(model, tmp_path / "base")
    made = load_model(tmp_path / "base")
    adapt(made, FORMS["lora"], targets=lambda name: ".shared_expert." in name, value=draw())
    train(made)
    save_adapter(made, tmp_path / "poet", FORMS["lora"], base=str(tmp_path / "base"))
    assert json.loads((tmp_path / "poet" / "adapter_config.json").read_text())["target_modules"]
    bank = AdapterBank(model)
    bank.load("poet", tmp_path / "poet")
    with torch.no_grad(), bank.using([("poet", 11)]):
        torch.testing.assert_close(ours(model), ours(made), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sizes", [(5, 64, 5, 64), (12, 64, 12, 64), (12, 64, 8, 256), (12, 64, 12, 256)])
def test_a_stack_that_does_not_fit_is_named(base, tmp_path, sizes):
    model = adapted(base, "lora")
    save_adapter(model, tmp_path, FORMS["lora"], base=str(base))
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    prefix = "base_model.model.model.layers.7.mlp.experts."
    rows, inputs, columns, outputs = sizes
    stored |= {f"{prefix}lora_A.weight": torch.ones(rows, inputs)}
    stored |= {f"{prefix}lora_B.weight": torch.ones(outputs, columns)}
    save_file(stored, path)
    with pytest.raises(CheckpointError, match="fit no layer"):
        load_adapter(load_model(base), tmp_path)
