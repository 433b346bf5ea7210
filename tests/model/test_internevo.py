"""InternEvo's folders against shards that are cut row by row from their definition, written by torch.save."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puyu.errors import CheckpointError, ConfigError, InputError
from puyu.model.checkpoint import load_model, read_config
from puyu.model.internevo import is_internevo, mlp_shape, read_internevo, stages, to_halves, to_pairs
from tests.model.forms import (
    differing,
    done,
    model_folder,
    naive_first_shards,
    naive_shards,
    naive_stages,
    paired,
    random_model,
    stored,
    turned,
    write_shards,
)
from tests.model.reference import our_logits

SHAPE = {"num_heads": 8, "num_kv_heads": 4, "hidden_size": 32, "num_layers": 5}
FIRST = {"family": "internlm", "qkv_bias": True, "out_bias": True, "num_layers": 4}
LAYOUTS = list(itertools.product((1, 2, 4), (1, 2, 3), (False, True), (False, True)))


def values(config: Any, **changes: Any) -> dict[str, Any]:
    """What training writes into model_config.pt: the arguments of its model, of which some are about training."""
    sizes = {"num_layers": config.num_layers, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    heads = {"num_attention_heads": config.num_heads, "num_kv_attention_heads": config.num_kv_heads}
    rest = {"num_chunks": 1, "checkpoint": 0.2, "dtype": torch.bfloat16, "mlp_ratio": 1.25, "norm_type": "rmsnorm"}
    return {**sizes, **heads, **rest, "layer_norm_epsilon": 1e-5, "adapt_hf": True, **changes}


@pytest.mark.parametrize(("tp", "pp", "interleaved", "split_vocab"), LAYOUTS)
def test_shards_are_cut_as_they_are_defined(
    tp: int, pp: int, interleaved: bool, split_vocab: bool, tmp_path: Path
) -> None:
    native = model_folder(tmp_path / "native", dtype=torch.bfloat16, **SHAPE)
    how = {"interleaved": interleaved, "split_vocab": split_vocab}
    config = read_config(native)
    expected = naive_shards(stored(native), config, tp=tp, pp=pp, **how)
    ours = turned(native, tmp_path / "ours", "internevo", tp=tp, pp=pp, **how)
    assert not differing(stored(ours), expected)
    said = values(config, adapt_hf=not interleaved, max_position_embeddings=64)
    theirs = write_shards(tmp_path / "theirs", expected, said)
    back = turned(theirs, tmp_path / "back", "internlm2")
    assert not differing(stored(back), stored(native))
    assert read_config(back).with_(extra={}) == config.with_(extra={})


@pytest.mark.parametrize(("tp", "pp"), itertools.product((1, 2, 4), (1, 3)))
def test_the_first_internlm_has_a_form_of_its_own(tp: int, pp: int, tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", **FIRST)
    expected = naive_first_shards(stored(native), read_config(native), tp=tp, pp=pp)
    assert not differing(stored(turned(native, tmp_path / "ours", "internevo", tp=tp, pp=pp)), expected)
    theirs = write_shards(tmp_path / "theirs", expected, values(read_config(native)))
    back = turned(theirs, tmp_path / "back", "internlm", max_positions=64)
    assert not differing(stored(back), stored(native))
    assert torch.equal(our_logits(load_model(back), TOKENS), our_logits(load_model(native), TOKENS))


TOKENS = torch.arange(20)


@given(num_layers=st.integers(1, 40), pp=st.integers(1, 12))
def test_stages_hold_all_layers_the_later_ones_more(num_layers: int, pp: int) -> None:
    if pp <= num_layers:
        assert [list(range(*stage)) for stage in stages(num_layers, pp)] == naive_stages(num_layers, pp)


@given(hidden=st.integers(1, 9000), intermediate=st.integers(1, 30000))
def test_internevo_computes_the_same_intermediate_size(hidden: int, intermediate: int) -> None:
    ratio, multiple = mlp_shape(hidden, intermediate)
    assert multiple * math.ceil(int(hidden * ratio) / multiple) == intermediate


def test_published_sizes_have_their_published_ratios() -> None:
    assert mlp_shape(4096, 14336) == (3.5, 256) and mlp_shape(2048, 8192) == (4.0, 256)
    assert mlp_shape(4096, 11008) == (2.6875, 256)


def test_pairs_and_halves_give_the_same_attention() -> None:
    """The order of rows goes with the order of the rotation: scores of both are those of complex numbers."""
    config = random_model(**SHAPE).config
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_kv_heads * (config.queries_per_kv + 2) * config.head_dim, 7)
    halves = torch.randn(shape, generator=generator, dtype=torch.float64)
    pairs = to_pairs(halves, config)
    assert torch.equal(to_halves(pairs, config), halves)
    x, angles = torch.randn(7, generator=generator, dtype=torch.float64), torch.tensor([1.0, 0.3])
    group = config.queries_per_kv + 2
    for kv in range(config.num_kv_heads):
        a = (halves @ x).reshape(config.num_kv_heads, group, 4)[kv]
        b = (pairs @ x).reshape(config.num_kv_heads, group, 4)[kv]
        assert torch.equal(a[-1], b[-1])  # values stay
        for query in range(group - 2):
            first = score(torch.complex(a[query, :2], a[query, 2:]), torch.complex(a[-2, :2], a[-2, 2:]), angles)
            second = score(torch.complex(b[query, ::2], b[query, 1::2]), torch.complex(b[-2, ::2], b[-2, 1::2]), angles)
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert paired([0, 1, 2, 3]) == [0, 2, 1, 3]


def score(query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A query at position 5 with a key at position 2."""
    turn = torch.polar(torch.ones(2, dtype=torch.float64), angles.double())
    return (query * turn**5 * (key * turn**2).conj()).real.sum()


def test_old_folders_name_their_order_or_are_told(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", **SHAPE)
    config = read_config(native)
    shards = naive_shards(stored(native), config, tp=2, pp=1, interleaved=True)
    said = values(config)
    del said["adapt_hf"]
    silent = write_shards(tmp_path / "silent", shards, said, prefix="")
    with pytest.raises(CheckpointError, match="neither qk_interleaved nor adapt_hf"):
        done(silent, tmp_path / "out", "internlm2", max_positions=64)
    with pytest.raises(CheckpointError, match="--max-positions"):
        done(silent, tmp_path / "out", "internlm2", interleaved=True)
    told = turned(silent, tmp_path / "told", "internlm2", interleaved=True, max_positions=64)
    assert not differing(stored(told), stored(native))
    newer = write_shards(tmp_path / "newer", shards, {**said, "qk_interleaved": True, "max_position_embeddings": 64})
    assert not differing(stored(turned(newer, tmp_path / "same", "internlm2")), stored(native))
    # the order stays from shards to shards, until another one is asked for
    kept = turned(newer, tmp_path / "kept", "internevo", tp=2)
    assert not differing(stored(kept), shards)
    other = turned(newer, tmp_path / "other", "internevo", tp=2, interleaved=False)
    assert not differing(stored(other), naive_shards(stored(native), config, tp=2, pp=1))


def test_a_normalized_head_is_kept_between_shards_and_normalized_elsewhere(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", **SHAPE)
    said = values(read_config(native), norm_head=True, max_position_embeddings=64)
    shards = write_shards(tmp_path / "shards", naive_shards(stored(native), read_config(native), tp=2, pp=2), said)
    again = turned(shards, tmp_path / "again", "internevo", tp=4)
    assert torch.load(again / "model_config.pt", weights_only=True)["norm_head"] is True
    result = done(again, tmp_path / "back", "internlm2")
    assert "normalized" in result.notes[0]
    expected = stored(native)
    expected["output.weight"] = torch.nn.functional.normalize(expected["output.weight"], dim=-1)
    assert not differing(stored(result.folder), expected)


def test_the_config_of_training_may_be_internevos_own_kind_of_dict(tmp_path: Path, monkeypatch: Any) -> None:
    native = model_folder(tmp_path / "native", **SHAPE)
    module = types.ModuleType("internlm.core.context.config")

    class Config(dict[str, Any]):
        pass

    Config.__module__, Config.__qualname__ = module.__name__, "Config"
    module.Config = Config  # type: ignore[attr-defined]
    for name in ("internlm", "internlm.core", "internlm.core.context"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    said = Config(values(read_config(native), max_position_embeddings=64, moe=Config(top_k=2)))
    shards = write_shards(tmp_path / "shards", naive_shards(stored(native), read_config(native), tp=1, pp=1), said)
    for name in list(sys.modules):
        if name.startswith("internlm"):
            monkeypatch.delitem(sys.modules, name)
    assert not differing(stored(turned(shards, tmp_path / "back", "internlm2")), stored(native))


def test_our_own_config_is_what_the_builders_take(tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", rope_theta=1e6, **SHAPE)
    shards = turned(native, tmp_path / "shards", "internevo", tp=2)
    said = torch.load(shards / "model_config.pt", weights_only=True)
    assert said["num_kv_attention_heads"] == 4 and said["rope_base"] == 1e6 and said["no_bias"] is True
    assert said["adapt_hf"] is True and said["embed_split_hidden"] is True and said["dtype"] == "torch.float32"
    assert is_internevo(shards) and not is_internevo(native)


# --- what is wrong with a folder -----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return turned(model_folder(tmp_path / "native", **SHAPE), tmp_path / "shards", "internevo", tp=2, pp=2)


def rewrite(path: Path, **changes: Any) -> None:
    """Change values of a pickled dict (None drops one); names have `.` written as `__`."""
    state = torch.load(path, weights_only=True)
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    torch.save(OrderedDict(state), path)


def test_pickles_are_not_read_unasked(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not read unasked[\s\S]*--allow-pickle"):
        done(shards, tmp_path / "out", "internlm2", allow_pickle=False)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


def test_a_pickle_that_would_run_code_is_refused(shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    kept = (shards / "model_config.pt").read_bytes()
    torch.save({"num_layers": Evil()}, shards / "model_config.pt")
    with pytest.raises(CheckpointError, match=r"model_config\.pt is truncated or holds more than plain values"):
        read_internevo(shards)
    (shards / "model_config.pt").write_bytes(kept)
    (shards / "model_tp0_pp0.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        read_internevo(shards)
    assert not (tmp_path / "evil-was-here").exists()


def test_missing_and_torn_files_are_named(shards: Path) -> None:
    path = shards / "model_tp1_pp0.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model_tp1_pp0\.pt"):
        read_internevo(shards)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no model_tp1_pp0\.pt[\s\S]*2 x 2 files"):
        read_internevo(shards)
    (shards / "model_config.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no model_config\.pt"):
        read_internevo(shards)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_tp1_pp0.pt", {"layers__0__ffn_norm__weight": None}, r"model_tp1_pp0\.pt: tensor 'layers\.0\.ffn_norm"),
        ("model_tp0_pp0.pt", {"layers__0__more": torch.zeros(2)}, r"tp0_pp0\.pt: layers\.0\.more"),
        ("model_tp1_pp1.pt", {"output__weight": torch.zeros(5, 32)}, "head.weight has the wrong shape"),
        (
            "model_tp1_pp1.pt",
            {"output__weight": torch.zeros(12, 32).half()},
            "head.weight is stored as float16, float32",
        ),
        ("model_tp1_pp0.pt", {"layers__0__attention__wo__weight": torch.zeros(3, 4)}, "do not fit each other"),
        ("model_tp0_pp1.pt", {"layers__7__ffn_norm__weight": torch.zeros(2)}, r"stages have \[2, 8\] layers"),
        ("model_config.pt", {"num_chunks": 2}, "num_chunks=2"),
        ("model_config.pt", {"num_experts": 8}, "num_experts=8"),
        ("model_config.pt", {"hidden_size": None}, "hidden_size"),
        ("model_config.pt", {"rope_base": 5e4}, r"rope_theta 50000\.0 by model_config\.pt .* 10000\.0 by config\.json"),
    ],
)
def test_what_does_not_fit_is_named(file: str, changes: dict[str, Any], said: str, shards: Path) -> None:
    rewrite(shards / file, **changes)
    with pytest.raises(CheckpointError, match=said):
        read_internevo(shards)


def test_norms_of_two_runs_are_noticed(shards: Path, tmp_path: Path) -> None:
    rewrite(shards / "model_tp1_pp0.pt", layers__0__ffn_norm__weight=torch.ones(32))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp_norm\.weight is not the same on all tensor ranks"):
        done(shards, tmp_path / "out", "internlm2")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["model_wp0_pp0.pt", "model_tp0_pp0_dp1.pt", "model_moe_layer0_expert1_tp0.pt"])
def test_other_kinds_of_shards_are_refused(name: str, shards: Path) -> None:
    torch.save({}, shards / name)
    with pytest.raises(CheckpointError, match=name):
        read_internevo(shards)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tp": 3}, "--tp 3 does not divide num_key_value_heads 4"),
        ({"tp": 8}, "--tp 8 does not divide num_key_value_heads 4"),
        ({"pp": 6}, "--pp 6: the model has 5 layers"),
        ({"tp": 0}, "Input should be greater than or equal to 1"),
    ],
)
def test_layouts_that_cannot_be(how: dict[str, int], said: str, tmp_path: Path) -> None:
    native = model_folder(tmp_path / "native", **SHAPE)
    with pytest.raises((ConfigError, ValueError), match=said):
        done(native, tmp_path / "out", "internevo", **how)
    with pytest.raises(ConfigError, match="first InternLM has no such order"):
        done(model_folder(tmp_path / "first", **FIRST), tmp_path / "out", "internevo", interleaved=True)


def test_a_folder_of_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, InputError), match="no config.json"):
        done(tmp_path, tmp_path / "out", "internlm2")
