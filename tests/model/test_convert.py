"""Checkpoints in other forms: the way back gives the same bits, for every pair of forms and many shapes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from puyu.errors import CheckpointError, ConfigError
from puyu.lineage import ancestors
from puyu.model.checkpoint import load_model, read_config, save_model, scalar_from_language
from puyu.model.convert import FORMS, expressed, obstacles
from puyu.model.streams import _Writer
from tests.model.forms import differing, done, equal_bits, model_folder, random_model, stored, turned
from tests.model.reference import our_logits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from((1, 2, 4)),
        "pp": st.integers(1, 3),
        "interleaved": st.booleans(),
        "split_vocab": st.booleans(),
    }
)


def tokens(count: int, vocab: int = 24) -> torch.Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(3))


@st.composite
def shapes(draw: Any) -> dict[str, Any]:
    """Small models of which every tensor divides by 4, with layers that need not divide by stages."""
    kv_heads, group = draw(st.sampled_from((4, 8))), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((2, 4, 6)))
    return {
        "num_heads": kv_heads * group,
        "num_kv_heads": kv_heads,
        "hidden_size": kv_heads * group * head_dim,
        "num_layers": draw(st.integers(3, 5)),
        "vocab_size": 4 * draw(st.integers(2, 6)),
        "intermediate_size": 4 * draw(st.integers(3, 9)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=12)
@given(shape=shapes(), layout=LAYOUTS, other=LAYOUTS)
def test_through_all_forms_and_back(shape: dict[str, Any], layout: dict[str, Any], other: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = first = model_folder(root / "first", **shape)
        steps: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("internevo", layout), ("llama", {})]
        steps += [("internevo", other), ("internevo", layout), ("internlm2", {})]
        for number, (to, how) in enumerate(steps):
            folder = turned(folder, root / str(number), to, **how)
        assert not differing(stored(first), stored(folder))
        assert read_config(folder).with_(extra={}) == read_config(first).with_(extra={})
        # the same shards by another way
        assert not differing(stored(root / "1"), stored(root / "4"))
        assert not differing(stored(root / "0"), stored(root / "2"))


@pytest.mark.parametrize("b", FORMS)
@pytest.mark.parametrize("a", FORMS)
def test_every_pair_there_and_back(a: str, b: str, tmp_path: Path) -> None:
    """With the first InternLM on one side, InternEvo's form is its own, and there are biases."""
    first = {"family": "internlm", "qkv_bias": True, "out_bias": True} if "internlm" in (a, b) else {}
    native = model_folder(tmp_path / "native", dtype=torch.bfloat16, **first)
    source = turned(native, tmp_path / "a", a, tp=2, pp=2)
    there = turned(source, tmp_path / "b", b, tp=4, pp=3)
    back = turned(there, tmp_path / "back", a, tp=2, pp=2)
    assert not differing(stored(source), stored(back))
    assert read_config(source).with_(extra={}) == read_config(back).with_(extra={})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["internlm2", "internlm", "llama"])
def test_biases_and_tied_embeddings_pass_between_hugging_face_forms(
    form: str, biased: bool, tied: bool, tmp_path: Path
) -> None:
    native = model_folder(tmp_path / "native", qkv_bias=biased, out_bias=biased, tie_embeddings=tied)
    there = turned(native, tmp_path / "there", form)
    assert torch.equal(our_logits(load_model(there), tokens(20)), our_logits(load_model(native), tokens(20)))
    assert not differing(stored(native), stored(turned(there, tmp_path / "back", "internlm2")))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_internlm2_as_llama_has_the_logits_of_transformers(kv_heads: int, tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", num_kv_heads=kv_heads, rope_theta=1e6)
    theirs = LlamaForCausalLM.from_pretrained(turned(native, tmp_path / "llama", "llama")).eval()
    row = tokens(60)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(row[None]).logits[0], our_logits(load_model(native), row), rtol=1e-5, atol=1e-5
        )
    for name, tensor in theirs.state_dict().items():
        assert equal_bits(tensor, stored(tmp_path / "llama")[name]), name


def test_a_llama_of_transformers_becomes_internlm2_and_comes_back(tmp_path: Path) -> None:
    from tests.model.reference import reference, reference_logits, saved

    theirs = reference("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5})
    source = saved(theirs, tmp_path / "llama")
    there = turned(source, tmp_path / "internlm2", "internlm2")
    row = tokens(40, 97)
    torch.testing.assert_close(our_logits(load_model(there), row), reference_logits(theirs, row), rtol=1e-4, atol=1e-4)
    value = json.loads((there / "config.json").read_text())
    assert value["rope_scaling"]["factor"] == 2.0 and value["rope_theta"] == 5e5 and value["bias"] is False
    back = turned(there, tmp_path / "back", "llama", max_shard_bytes=40_000)
    assert len(list(back.glob("model-*.safetensors"))) > 2
    assert not differing(stored(source), stored(back))
    again = LlamaForCausalLM.from_pretrained(back).eval()
    assert torch.equal(reference_logits(again, row), reference_logits(theirs, row))


def test_not_a_number_and_signed_zeros_keep_their_bits(tmp_path: Path) -> None:
    model = random_model()
    weight = model.trunk.layers[0].attention.qkv.weight.data
    weight.view(torch.int32)[0, :4] = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001, -0x3FFFFF])
    save_model(model, tmp_path / "native")
    shards = turned(tmp_path / "native", tmp_path / "shards", "internevo", tp=4, pp=3, interleaved=True)
    back = turned(shards, tmp_path / "back", "internlm2")
    assert not differing(stored(tmp_path / "native"), stored(back))


def test_mixed_precisions_stay_as_they_are(tmp_path: Path) -> None:
    model = random_model(hidden_size=20, num_heads=5, num_kv_heads=5).bfloat16()
    model.trunk.norm.float()
    model.trunk.layers[1].mlp_norm.float()
    save_model(model, tmp_path / "native")
    folder = turned(tmp_path / "native", tmp_path / "llama", "llama")
    assert load_model(folder)  # safetensors takes no tensor that is not aligned
    shards = turned(folder, tmp_path / "shards", "internevo", pp=2)
    assert not differing(stored(tmp_path / "native"), stored(turned(shards, tmp_path / "back", "internlm2")))


# --- what is beside the weights ------------------------------------------------------------------------------------


def test_tokenizer_and_ends_go_along(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native")
    (native / "tokenizer.json").write_text("{}")
    (native / "chat_template.jinja").write_text("{{ messages }}")
    (native / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9], "temperature": 0.5}))
    shards = turned(native, tmp_path / "shards", "internevo")
    back = turned(shards, tmp_path / "back", "llama")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (native / name).read_bytes()
    value = json.loads((back / "generation_config.json").read_text())
    assert value["eos_token_id"] == [2, 9] and value["temperature"] == 0.5
    assert read_config(back).stop_ids == (2, 9)
    (shards / "tokenizer.json").unlink()
    other = turned(shards, tmp_path / "other", "llama", tokenizer=native)
    assert (other / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="no tokenizer's files"):
        done(shards, tmp_path / "more", "llama", tokenizer=tmp_path)


def test_what_made_a_folder_can_be_traced(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native")
    there = turned(turned(native, tmp_path / "shards", "internevo", tp=2), tmp_path / "there", "llama")
    node = ancestors(there)
    assert [name for name, _ in node.parents] == ["source"] and node.lineage.config["to"] == "llama"
    (_, shards), *_ = node.parents
    assert shards.lineage.config["tp"] == 2 and shards.parents[0][1].path == native.resolve()


def test_code_of_another_family_is_not_named(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", extra={"auto_map": {"AutoModel": "x.Y"}, "use_cache": True})
    value = json.loads((turned(native, tmp_path / "llama", "llama") / "config.json").read_text())
    assert value["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in value and value["use_cache"]
    first = turned(tmp_path / "llama", tmp_path / "first", "internlm")
    assert json.loads((first / "config.json").read_text())["rotary"] == {"base": 10000.0, "type": "origin"}


def test_dynamic_positions_are_said_in_each_form(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", rope_scaling={"type": "dynamic", "factor": 2.5}, rope_theta=1e6)
    for form in FORMS:
        folder = turned(native, tmp_path / form, form)
        config = read_config(folder)
        assert (config.scaling.kind, config.scaling.factor, config.rope_theta) == ("dynamic", 2.5, 1e6)
    value = json.loads((tmp_path / "internlm" / "config.json").read_text())["rotary"]
    assert value == {"scaling_factor": 2.5, "base": 1e6, "type": "dynamic"}


# --- refusals ------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("to", "changes", "said"),
    [
        ("internlm2", {"family": "llama", "rope_scaling": YARN}, "yarn rope_scaling"),
        ("internlm", {"rope_scaling": LINEAR}, "linear rope_scaling"),
        ("internevo", {"rope_scaling": LINEAR}, "linear rope_scaling"),
        ("internevo", {"qkv_bias": True, "out_bias": True}, "biases in attention"),
        ("internevo", {"tie_embeddings": True}, "tied embeddings"),
        ("llama", {"family": "qwen2", "qkv_bias": True}, "biases in queries, keys and values alone"),
        ("internlm2", {"family": "llama", "mlp_bias": True}, "biases in the MLP"),
        ("internlm", {"num_kv_heads": 2}, "2 key/value heads for 4 query heads"),
        ("internlm2", {"family": "llama", "head_dim": 16}, "4 heads of 16 in 32 hidden units"),
        ("llama", {"family": "qwen3"}, "norms of queries and keys"),
        ("llama", {"family": "mistral", "windows": (8, 8, 8)}, "sliding windows"),
    ],
)
def test_what_a_form_cannot_say_is_named(to: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", **changes)
    with pytest.raises(CheckpointError, match=f"{to} checkpoint cannot express {said}"):
        done(native, tmp_path / "out", to)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_experts_quantized_and_reward_models_are_refused(tmp_path: Path) -> None:
    from puyu.model.config import ExpertShape
    from tests.model.reference import small_config

    experts = small_config(family="mixtral", experts=ExpertShape(count=4, per_token=2, size=32))
    assert list(obstacles(experts, "llama")) == ["experts"]
    assert "quantized weights" in obstacles(small_config(quantization={"quant_method": "gptq"}), "llama")
    with pytest.raises(CheckpointError, match="no form here"):
        expressed(experts, "llama")
    save_model(scalar_from_language(model_folder(tmp_path / "lm")), tmp_path / "rm")
    with pytest.raises(CheckpointError, match="reward model"):
        done(tmp_path / "rm", tmp_path / "out", "llama")


def test_tied_embeddings_can_be_written_twice(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", tie_embeddings=True)
    with pytest.raises(CheckpointError, match="--untie"):
        done(native, tmp_path / "shards", "internevo")
    back = turned(turned(native, tmp_path / "shards", "internevo", untie=True, tp=2), tmp_path / "back", "internlm2")
    assert equal_bits(stored(back)["output.weight"], stored(native)["model.tok_embeddings.weight"])
    assert torch.equal(our_logits(load_model(back), tokens(20)), our_logits(load_model(native), tokens(20)))


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native")
    with pytest.raises(ConfigError, match="there already"):
        done(native, native, "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("what a kill left")
    folder = turned(native, tmp_path / "out", "llama")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "lineage.json", "model.safetensors",
    ]  # fmt: skip


def test_a_tensor_too_many_or_of_another_shape_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    native = model_folder(tmp_path / "native")
    tensors = stored(native)
    save_file({**tensors, "model.layers.7.extra": torch.zeros(2)}, native / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.layers.7.extra"):
        done(native, tmp_path / "out", "llama")
    save_file({**tensors, "output.weight": torch.zeros(5, 32)}, native / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head.weight has the wrong shape: \(5, 32\) stored, \(24, 32\)"):
        done(native, tmp_path / "out", "llama")
    save_file({**tensors, "output.weight": torch.zeros(24, 32, dtype=torch.int8)}, native / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head.weight is stored as int8"):
        done(native, tmp_path / "out", "llama")


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "how"), [("llama", {}), ("internevo", {"tp": 2, "interleaved": True})])
def test_memory_holds_one_tensor_at_a_time(to: str, how: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """48 MB of weights pass through in pieces of half a megabyte."""
    shape = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "intermediate_size": 512, "num_layers": 18}
    native = model_folder(tmp_path / "native", vocab_size=256, **shape)
    seen: list[int] = []
    add = _Writer.add

    def counted(self: Any, tensor: torch.Tensor) -> None:
        seen.append(anonymous_bytes())
        add(self, tensor)

    monkeypatch.setattr(_Writer, "add", counted)
    done(native, tmp_path / "out", to, **how)
    assert max(seen) - seen[0] < 12 << 20, (min(seen), max(seen))


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
