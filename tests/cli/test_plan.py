"""`puyu plan --serve` and `puyu bench engine`: numbers that are those of the real tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from puyu.cli import bench, plan
from puyu.errors import CheckpointError, InputError
from puyu.model.checkpoint import save_model
from puyu.model.config import ExpertShape, ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.linear import QuantFormat
from puyu.model.paged import KVCache
from puyu.model.quant_modules import make_quantized
from puyu.tokenizer.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.engine.conftest import tiny_model, tokenizer

__all__ = ["tokenizer"]  # a fixture, shared with the engine's tests

SHAPES: list[dict[str, Any]] = [
    {"family": "internlm2"},
    {"family": "llama", "tie_embeddings": True, "num_kv_heads": 1},
    {"family": "internlm", "qkv_bias": True, "out_bias": True, "num_kv_heads": 4},
    {"family": "qwen2", "qkv_bias": True, "head_dim": 32},
    {"family": "qwen3", "head_dim": 32},
    {"family": "mixtral", "experts": ExpertShape(count=4, per_token=2, size=64)},
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_bytes_are_those_of_the_model(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(**(fields | {"intermediate_size": 128, "max_positions": 128} | changes))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    shape = plan.shape_of(str(tmp_path))
    with torch.device("meta"):
        model = CausalLM(config)
        assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
        if dtype != "bf16":
            make_quantized(model, QuantFormat(8) if dtype == "int8" else QuantFormat(4, 32, symmetric=False))
    tensors = model.bfloat16().state_dict().values()
    assert shape.weight_bytes(dtype, group=32) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert 16 * shape.kv_bytes(name) == KVCache.block_bytes(config, block_size=16, dtype=kind)


def test_published_shapes_have_their_published_sizes() -> None:
    sizes = {name: plan.shape_of(name).num_parameters / 1e9 for name in plan.SHAPES}
    published = {"internlm-7b": 7.3, "internlm-20b": 20.1, "internlm2-1.8b": 1.89, "internlm2-7b": 7.74}
    for name, billions in (published | {"internlm2-20b": 19.86}).items():
        assert sizes[name] == pytest.approx(billions, rel=0.01)


def test_the_plan_without_torch(tmp_path: Path) -> None:
    words = ["plan", "--serve", "internlm2-7b", "--dtype", "int4", "--context", "32768", "--streams", "4"]
    code = f"import sys; sys.modules['torch'] = None; from puyu.cli.main import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for part in ("7.738 B parameters", "5.07 GiB in int4", "128.00 KiB a token", "4.00 GiB for 32768", "16.00 GiB"):
        assert part in done.stdout
    assert "fit" in done.stdout


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "memories", lambda: iter([("card", 12 * 2**30), ("phone", 2**30)]))
    assert plan.main(["--serve", "internlm2-7b", "--dtype", "int4", "--context", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "card        12.00 GiB: fits; room for 6 streams of 8192 tokens" in shown
    assert "phone       1.00 GiB: does not fit; not even the weights do" in shown
    assert plan.main(["--serve", "internlm2-7b", "--context", "99999"]) == 0
    assert "more than the model was made for" in capsys.readouterr().out


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="published shapes"):
        plan.shape_of("gpt-9")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 5}')
    with pytest.raises(CheckpointError, match="hidden_size"):
        plan.shape_of(str(tmp_path))
    with pytest.raises(CheckpointError, match="groups of 48"):
        plan.shape_of("internlm2-7b").weight_bytes("int4", group=48)


def test_bench_prints_a_table(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_model(2, vocab_size=tokenizer.vocab_size), tmp_path)
    tokenizer.save(tmp_path)
    assert bench.main(["engine", "--model", str(tmp_path), "--tokens", "6", "--runs", "1", "--device", "cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["streams", "prompt", "tokens/s"]
    assert [line[:2] for line in lines[1:]] == [["prefill", "1"], ["decode", "1"], ["decode", "4"], ["decode", "16"]]
    assert all(float(line[3]) > 0 for line in lines[1:])
