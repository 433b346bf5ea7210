"""Continued pretraining: weights, shape and rotary base come from a checkpoint."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from puyu.configure import build
from puyu.errors import CheckpointError, ConfigError
from puyu.model.checkpoint import load_model, read_config, save_model, stored_values
from puyu.model.heads import CausalLM
from puyu.train import pretrain
from tests.train import toys


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tokenizer = toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data", 80)
    model = toys.model(vocab_size=tokenizer.vocab_size, dtype=torch.float32, rope_theta=50_000.0, max_positions=32)
    save_model(model, root / "base")
    tokenizer.save(root / "base")
    return root


def config(root, phases, **more):
    base = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "base": str(root / "base")}
    fast = {"batch_tokens": 128, "dtype": "float32", "device": "cpu", "optim": {"lr": 0.0}}
    return build(pretrain.PretrainConfig, {**base, **fast, "phases": phases, **more})


def test_it_begins_with_the_weights_of_the_base_and_keeps_its_rotary_base(inputs, tmp_path):
    pretrain.run(config(inputs, [{"steps": 2, "seq_len": 64}]), out=tmp_path)
    before, after = load_model(inputs / "base"), load_model(tmp_path)
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b), name  # at rate 0 nothing moves
    found = read_config(tmp_path)
    assert (found.rope_theta, found.max_positions) == (50_000.0, 64)


def test_a_phase_may_raise_the_rotary_base(inputs, tmp_path):
    phases = [{"steps": 1, "seq_len": 32}, {"steps": 1, "seq_len": 64, "rope_theta": 1e6}]
    pretrain.run(config(inputs, phases), out=tmp_path)
    assert read_config(tmp_path).rope_theta == 1e6


@pytest.mark.parametrize("shape", [{}, {"family": "llama"}, {"family": "llama", "tie_embeddings": True}])
def test_values_that_are_read_one_by_one_are_those_of_the_model(tmp_path, shape):
    save_model(toys.model(dtype=torch.float32, **shape), tmp_path)
    whole = load_model(tmp_path)
    with torch.device("meta"):
        empty = CausalLM(whole.config)
    value = stored_values(empty, tmp_path)
    for name, wanted in whole.named_parameters():
        assert torch.equal(value(name, tuple(wanted.shape)), wanted), name
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    for change, words in (
        ({name: tensors[name][:-1].clone()}, f"{name} has the wrong shape"),
        ({"extra.weight": torch.ones(2)}, "1 tensors are not part of"),
        ({name: None}, f"'{name}' is missing"),
    ):
        kept = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=re.escape(words)):
            stored_values(empty, tmp_path)


def test_what_does_not_fit_is_refused(inputs, tmp_path):
    phases = [{"steps": 1, "seq_len": 32}]
    with pytest.raises(ConfigError, match="both given"):
        pretrain.run(config(inputs, phases, model=toys.SHAPE), out=tmp_path)
    other = tmp_path / "other"
    save_model(toys.model(vocab_size=50, dtype=torch.float32), other)
    with pytest.raises(CheckpointError, match="the model has 50"):
        pretrain.run(config(inputs, phases, base=str(other)), out=tmp_path)
    values = json.loads((inputs / "base" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="quantized"):
        pretrain.run(config(inputs, phases, base=str(other)), out=tmp_path)
