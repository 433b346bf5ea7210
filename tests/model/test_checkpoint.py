"""Checkpoint directories: what is saved comes back bit for bit, and what is broken is named."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import puyu.model.weights as weights
from puyu.errors import CheckpointError, ConfigError, InputError, PuyuError, ResourceError
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import (
    copy_side_files,
    is_scalar_checkpoint,
    load_model,
    load_scalar_model,
    read_config,
    save_model,
    scalar_from_language,
)
from puyu.model.families import FAMILIES
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights
from puyu.model.weights import INDEX, PICKLE
from tests.model.reference import our_logits, reference_logits, small_config, small_model, tokens

BIASES = {"qwen2": {"qkv_bias": True}, "internlm": {"qkv_bias": True, "out_bias": True}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_save_and_load_is_bit_exact(family: str, tied: bool, tmp_path: Path) -> None:
    model = small_model(family=family, tie_embeddings=tied, rope_theta=5e5, **BIASES.get(family, {}))
    for parameter in model.parameters():
        parameter.data.add_(0.01)  # biases and norms too must come from the file
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config.with_(extra={}) == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(our_logits(again, tokens(20)), our_logits(model, tokens(20)))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(small_model(), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_our_llama(tied: bool, tmp_path: Path) -> None:
    model = small_model(family="llama", rope_theta=5e5, tie_embeddings=tied)
    save_model(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        reference_logits(theirs, tokens(40)), our_logits(model, tokens(40)), rtol=1e-4, atol=1e-4
    )


def test_bf16_export_and_keys_that_are_not_ours(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path, dtype=torch.bfloat16, extra={"reward_token_id": 5})
    value = json.loads((tmp_path / "config.json").read_text())
    assert (value["torch_dtype"], value["reward_token_id"]) == ("bfloat16", 5)
    again = load_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.trunk.embedding.weight, model.trunk.embedding.weight.bfloat16())
    save_model(again, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["reward_token_id"] == 5


def test_sharded_checkpoints_are_read(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(our_logits(load_model(tmp_path), tokens(20)), our_logits(model, tokens(20)))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load_model(tmp_path)


def test_scalar_models_start_from_a_language_model(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "lm")
    model = scalar_from_language(tmp_path / "lm")
    row, positions = tokens(10), torch.arange(10)
    plan = PackedPlan.build((0,), 10)
    with torch.no_grad():
        assert not model(row, positions, plan).any()
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "rm")
    assert is_scalar_checkpoint(tmp_path / "rm") and not is_scalar_checkpoint(tmp_path / "lm")
    again = load_scalar_model(tmp_path / "rm")
    with torch.no_grad():
        assert torch.equal(again(row, positions, plan), model(row, positions, plan))
    with pytest.raises(CheckpointError, match=r"v_head\.weight.*missing"):
        load_scalar_model(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=r"output\.weight.*missing"):
        load_model(tmp_path / "rm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a checkpoint (None drops one); names have `.` written as `__`."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, model__layers__1__attention__wqkv__weight=None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.attention\.wqkv\.weight.*missing"):
        load_model(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    rewrite(folder, model__layers__9__attention__wo__weight=torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.attention\.wo\.weight"):
        load_model(folder)


def test_rotary_tables_of_old_exports_are_no_extra(folder: Path) -> None:
    rewrite(folder, model__layers__0__attention__rotary_emb__inv_freq=torch.zeros(8))
    load_model(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(65))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(65,\) stored, \(64,\)"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated") as caught:
        load_model(folder)
    assert "copy it again" in str(caught.value)


def as_pickle(folder: Path, *, shards: int = 1, **options: object) -> None:
    """The same weights as torch wrote them before safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)] if shards > 1 else [PICKLE]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: tensors[name] for name in part}, folder / file, **options)
    if shards > 1:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"_use_new_zipfile_serialization": False}])
def test_pickle_weights_are_read_only_when_asked_for(folder: Path, options: dict[str, object]) -> None:
    expected = our_logits(load_model(folder), tokens(20))
    as_pickle(folder, **options)
    with pytest.raises(CheckpointError, match="pickle weights are not read unasked") as caught:
        load_model(folder)
    assert "allow_pickle=True" in str(caught.value)
    assert torch.equal(our_logits(load_model(folder, allow_pickle=True), tokens(20)), expected)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [{"x": Evil()}, [1, 2], {"x": "text"}, b"PK\x03\x04 torn", b""])
def test_a_pickle_that_is_more_than_tensors_is_refused(
    content: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    as_pickle(folder)
    if isinstance(content, bytes):
        (folder / PICKLE).write_bytes(content)
    else:
        torch.save(content, folder / PICKLE)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (is truncated or not a plain|holds more than)"):
        load_model(folder, allow_pickle=True)
    assert not (folder / "pwned").exists()


def test_safetensors_go_before_pickles(folder: Path) -> None:
    torch.save({"x": torch.zeros(1)}, folder / PICKLE)
    load_model(folder, allow_pickle=True)


@pytest.mark.parametrize("limit", [1, 20_000, 70_000])
def test_shards_stay_below_the_limit_and_come_back(folder: Path, limit: int) -> None:
    model = load_model(folder)
    save_model(model, folder / "out", max_shard_bytes=limit)
    files = sorted((folder / "out").glob("*.safetensors"))
    index = json.loads((folder / "out" / INDEX).read_text())
    assert [path.name for path in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    sizes = 0
    for path in files:
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
        sizes += size
    assert index["metadata"]["total_size"] == sizes
    again = load_model(folder / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_what_was_written_before_does_not_stay(folder: Path) -> None:
    """From one file to shards, to other shards, and back: never a file of an earlier writing."""
    old = folder / "a"
    for seed, limit in ((0, None), (1, 70_000), (2, 20_000), (3, 70_000), (4, None)):
        model = small_model(seed)
        save_model(model, old, max_shard_bytes=limit)
        assert torch.equal(our_logits(load_model(old), tokens(9)), our_logits(model, tokens(9)))
        listed = {*json.loads((old / INDEX).read_text())["weight_map"].values()} if limit else {"model.safetensors"}
        assert {path.name for path in old.glob("*.safetensors")} == listed
        assert (old / INDEX).exists() is (limit is not None)


def test_an_index_may_not_point_elsewhere(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        load_model(folder)


def test_a_shard_limit_below_one_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        save_model(small_model(), folder, max_shard_bytes=0)


def test_all_end_ids_are_kept(folder: Path) -> None:
    for name, ends in (("config.json", [2, 7]), ("generation_config.json", [7, 9])):
        value = json.loads((folder / name).read_text()) | {"eos_token_id": ends}
        (folder / name).write_text(json.dumps(value))
    model = load_model(folder)
    assert (model.config.eos_id, model.config.stop_ids) == (2, (2, 7, 9))
    save_model(model, folder / "out")
    assert read_config(folder / "out") == model.config
    assert json.loads((folder / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]


def test_what_is_not_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint directory: .*nowhere"):
        load_model(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_type": "gpt2"}, CheckpointError, r"config\.json: model_type 'gpt2' is not supported\n.*internlm2"),
        ({"hidden_size": None}, CheckpointError, "missing key 'hidden_size'"),
        ({"hidden_act": "gelu"}, CheckpointError, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, ConfigError, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, CheckpointError, "rope_scaling type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, r"rope_scaling\.factor must be a number above 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, CheckpointError, r"low_freq_factor must be"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, CheckpointError, "differ from layer to layer"),
        ({"partial_rotary_factor": 0.5}, CheckpointError, "partial_rotary_factor is not supported"),
        ({"model_type": "deepseek_v2"}, CheckpointError, "'deepseek_v2' is not supported: multi-head latent"),
        ({"model_type": "deepseek_v3"}, CheckpointError, "'deepseek_v3' is not supported: multi-head latent"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, CheckpointError, "not part of a internlm2 model"),
        ({"layer_types": ["full_attention"]}, CheckpointError, "2 entries, each full_attention or sliding"),
        ({"quantization_config": {"quant_method": "fp8"}}, CheckpointError, "'fp8' is not supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, CheckpointError, "bits 3"),
        ({"vocab_size": 98}, CheckpointError, r"tok_embeddings.*\(97, 64\) stored, \(98, 64\)"),
        ({"hidden_size": "64"}, CheckpointError, "hidden_size must be a number of at least 1, got '64'"),
        ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers must be a number of at least 1"),
        ({"eos_token_id": []}, CheckpointError, "eos_token_id must be a token id or a list"),
        ({"bos_token_id": "1"}, CheckpointError, "bos_token_id must be a token id"),
        ({"rope_scaling": "linear"}, CheckpointError, "rope_scaling must be an object, got 'linear'"),
        ({"rms_norm_eps": "1e-5"}, CheckpointError, "rms_norm_eps must be a number"),
        ({"num_hidden_layers": 1}, CheckpointError, "tensors are not part of a internlm2 model"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, change: dict[str, object], error: type, match: str) -> None:
    value = json.loads((folder / "config.json").read_text()) | change
    kept = {key: item for key, item in value.items() if item is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(error, match=match):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_holds_no_object_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("[1, 2]")
    with pytest.raises(PuyuError, match=f"{name}.*must hold a JSON object, not list"):
        load_model(folder)


def test_a_torn_config_is_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        load_model(folder)


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None}])
def test_old_configs_without_kv_heads_have_one_per_query(folder: Path, absent: dict[str, None]) -> None:
    value = json.loads((folder / "config.json").read_text())
    del value["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(value | absent))
    assert read_config(folder).num_kv_heads == 4


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a real 64 KiB file system; where mounting is not allowed, the writer's own error is raised."""
    mount = tmp_path / "full"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        yield mount
        subprocess.run(["umount", str(mount)], check=True)
        return

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", refuse)
    yield mount


def test_a_full_disk_is_named_and_leaves_nothing_behind(full_disk: Path) -> None:
    with pytest.raises(ResourceError, match=r"disk full while writing .*model\.safetensors") as caught:
        save_model(small_model(), full_disk / "out")
    assert "free some space" in str(caught.value)
    assert list((full_disk / "out").iterdir()) == []


def test_an_overwrite_that_fails_keeps_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def torn(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", torn)
    with pytest.raises(ResourceError):
        save_model(small_model(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_side_files_are_carried_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    copy_side_files(tmp_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


def test_scalar_models_round_trip_by_class(tmp_path: Path) -> None:
    model = ScalarModel(small_config(family="llama"))
    init_weights(model, seed=0)
    save_model(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    assert not isinstance(load_scalar_model(tmp_path), CausalLM)
