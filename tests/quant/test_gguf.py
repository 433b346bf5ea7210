"""GGUF files: blocks bit for bit as the gguf package makes them; files read back, computed as llama.cpp does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from puyu.errors import ConfigError
from puyu.files import read_json, write_json
from puyu.model.checkpoint import load_model, save_model, scalar_from_language
from puyu.quant.gguf import export_gguf
from puyu.quant.gguf_blocks import TYPE_IDS, GGUFType, encode, encoded_bytes
from puyu.quant.gguf_tokens import tokenizer_metadata
from puyu.quant.quantize import QuantizeConfig, run
from puyu.tokenizer.bpe import count_pieces, learn_merges
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import from_merges
from tests.conftest import ROOT
from tests.model.reference import our_logits, small_model, tokens

gguf = pytest.importorskip("gguf")
VOCAB = 300


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["f16", "bf16", "q8_0", "q4_0"]), st.integers(0, 2**31), st.floats(1e-6, 1e3))
def test_blocks_are_those_of_the_gguf_package(kind: GGUFType, seed: int, size: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((4, 64)) * size).astype(np.float32)
    x[0, :32] = 0.0
    x[1] = np.round(x[1] / size) * size  # many equal numbers and halves
    x[2, :32] = np.linspace(-127, 127, 32) / 2
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(TYPE_IDS[kind]))
    ours = encode(x, kind)
    assert np.array_equal(ours, theirs.view(np.uint8).reshape(-1))
    assert len(ours) == encoded_bytes(x.size, kind)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A small model whose tokenizer has all bytes and some merges."""
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"1", b"2"), (b"a", b"n")]
    tokenizer = from_merges(merges, chat_template=CHAT_TEMPLATE)
    model = small_model(**{"vocab_size": VOCAB, "std": 0.1, **changes})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def llama_cpp(reader: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """The forward pass as llama.cpp computes it from a file: split projections, and for `llama` neighboring pairs."""
    arch = field(reader, "general.architecture")
    get = lambda key: field(reader, f"{arch}.{key}")  # noqa: E731
    w = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).view(*reversed(t.shape.tolist()))
        for t in reader.tensors
    }
    heads, kv, size = get("attention.head_count"), get("attention.head_count_kv"), get("attention.key_length")
    eps = get("attention.layer_norm_rms_epsilon")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[name], eps)

    count = len(tokens_T)
    angles = torch.arange(count)[:, None] * get("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = (x[..., 0::2], x[..., 1::2]) if arch == "llama" else x.chunk(2, dim=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        return torch.stack(pair, dim=-1).flatten(-2) if arch == "llama" else torch.cat(pair, dim=-1)

    x = w["token_embd.weight"][tokens_T]
    for index in range(get("block_count")):
        p = f"blk.{index}."
        h = norm(x, p + "attn_norm.weight")
        q, k, v = (
            (h @ w[f"{p}attn_{n}.weight"].T + w.get(f"{p}attn_{n}.bias", torch.zeros(1))).view(count, -1, size)
            for n in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (y.repeat_interleave(heads // kv, dim=1) for y in (k, v))
        o = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (q, k, v)), is_causal=True)
        o = o.transpose(0, 1).flatten(1) @ w[p + "attn_output.weight"].T
        x = x + o + w.get(p + "attn_output.bias", torch.zeros(1))
        h = norm(x, p + "ffn_norm.weight")
        gate, up = (h @ w[f"{p}ffn_{n}.weight"].T + w.get(f"{p}ffn_{n}.bias", torch.zeros(1)) for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "ffn_down.weight"].T
        x = x + w.get(p + "ffn_down.bias", torch.zeros(1))
    return norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T


SHAPES: list[dict[str, Any]] = [
    {"family": "internlm2"},
    {"family": "internlm2", "tie_embeddings": True, "num_kv_heads": 4},
    {"family": "llama", "num_kv_heads": 1, "rope_theta": 50_000.0},
    {"family": "internlm", "num_kv_heads": 4, "qkv_bias": True, "out_bias": True},
    {"family": "qwen2", "qkv_bias": True},
    {"family": "llama", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_file_computes_what_the_model_computes(shape: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", **shape)
    export_gguf(folder, tmp_path / "m.gguf", kind="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    row = tokens(30)
    expected = our_logits(load_model(folder), row)
    torch.testing.assert_close(llama_cpp(reader, row), expected, rtol=0, atol=1e-4)
    assert field(reader, "general.architecture") == ("qwen2" if shape["family"] == "qwen2" else "llama")


@pytest.mark.parametrize(("kind", "farthest"), [("f16", 0.002), ("bf16", 0.02), ("q8_0", 0.02), ("q4_0", 0.3)])
def test_types_and_sizes(kind: GGUFType, farthest: float, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    done = export_gguf(folder, tmp_path / "m.gguf", kind=kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == kind
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "f32"
    assert types["token_embd.weight"] == types["output.weight"] == ("q8_0" if kind == "q4_0" else kind)
    assert (done.size, done.tensors) == ((tmp_path / "m.gguf").stat().st_size, len(reader.tensors))
    row = tokens(30)
    expected = our_logits(load_model(folder), row)
    assert 0 < (llama_cpp(reader, row) - expected).norm() / expected.norm() < farthest


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", intermediate_size=80)
    export_gguf(folder, tmp_path / "m.gguf", kind="q4_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"


def test_quantized_checkpoints_are_exported_as_they_compute(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    values = {"model": folder, "bits": 4, "group": 32, "method": "rtn", "rest": "float32", "eval_tokens": 50}
    run(QuantizeConfig.model_validate(values), out=tmp_path / "int4")
    export_gguf(tmp_path / "int4", tmp_path / "m.gguf", kind="f32")
    row = tokens(120)
    found = llama_cpp(gguf.GGUFReader(tmp_path / "m.gguf"), row)
    torch.testing.assert_close(found, our_logits(load_model(tmp_path / "int4"), row), rtol=0, atol=1e-3)


def test_the_tokenizer_is_all_there(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    export_gguf(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    value = read_json(folder / "tokenizer.json")
    found = field(reader, "tokenizer.ggml.tokens")
    assert len(found) == VOCAB
    for token, id in value["model"]["vocab"].items():
        assert found[id] == token
    for added in value["added_tokens"]:
        assert found[added["id"]] == added["content"]
        assert field(reader, "tokenizer.ggml.token_type")[added["id"]] == (2 if added["content"] == "<unk>" else 3)
    assert found[-1] == f"[PAD{VOCAB - 1}]" and field(reader, "tokenizer.ggml.token_type")[-1] == 5
    assert [merge.split(" ") for merge in field(reader, "tokenizer.ggml.merges")] == value["model"]["merges"]
    assert field(reader, "tokenizer.ggml.model") == "gpt2" and field(reader, "tokenizer.ggml.pre") == "dbrx"
    assert field(reader, "tokenizer.ggml.bos_token_id") == 1 and field(reader, "tokenizer.ggml.eos_token_id") == 2
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.chat_template") == CHAT_TEMPLATE


LLAMA_CPP_DBRX = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What llama.cpp cuts with under the name `dbrx`."""


def test_llama_cpp_cuts_our_texts_into_the_same_tokens(tmp_path: Path) -> None:
    """With llama.cpp's expression in the place of ours, the tokens of real pages stay the same."""
    names = ("README.md", "README.zh.md", "puyu/quant/gguf.py")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    texts.append("  two  spaces\n\n\n\tTab's don't (paren) 12345 x=1;\r\n  end  ")
    merges = learn_merges(count_pieces(texts), num_tokens=1500)
    from_merges(merges, chat_template=CHAT_TEMPLATE).save(tmp_path)
    ours, other = (HFTokenizer.from_file(str(tmp_path / "tokenizer.json")) for _ in range(2))
    cut = pre_tokenizers.Split(Regex(LLAMA_CPP_DBRX), "isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    for text in texts:
        assert other.encode(text, add_special_tokens=False).ids == ours.encode(text, add_special_tokens=False).ids


def test_sentencepiece_models_get_scores(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7, "ab": 8}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["▁", "a"]], "byte_fallback": True}
    value = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "model": {**model, "unk_token": "<unk>", "fuse_unk": True},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    write_json(folder / "tokenizer.json", value)
    found = tokenizer_metadata(folder, vocab_size=10)
    assert found["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in found
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["▁a"] > scores["a"] == scores["b"]
    assert found["tokenizer.ggml.token_type"] == [2, 1, 1, 6, 1, 1, 1, 1, 1, 5]
    assert found["tokenizer.ggml.add_space_prefix"] is True


def test_a_folder_with_tokenizer_model_alone(tmp_path: Path) -> None:
    """InternLM2's own: the pieces of the SentencePiece file are the tokens of the GGUF file."""
    import sentencepiece

    stream = io.BytesIO()
    texts = ["the quick brown fox jumps over the lazy dog", "我是浦语，一个小模型"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=320, model_type="bpe", byte_fallback=True
    )
    folder = checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    found = tokenizer_metadata(folder, vocab_size=330)
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    assert found["tokenizer.ggml.tokens"][:320] == [processor.id_to_piece(id) for id in range(320)]
    assert found["tokenizer.ggml.model"] == "llama"


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    save_model(scalar_from_language(folder), tmp_path / "reward")
    with pytest.raises(ConfigError, match="reward model"):
        export_gguf(tmp_path / "reward", tmp_path / "x.gguf")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    save_model(small_model(family="llama", rope_scaling=yarn), tmp_path / "yarn")
    with pytest.raises(ConfigError, match="rope_scaling 'yarn' cannot be exported"):
        export_gguf(tmp_path / "yarn", tmp_path / "x.gguf")
    value = read_json(folder / "tokenizer.json")
    value["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    write_json(folder / "tokenizer.json", value)
    with pytest.raises(ConfigError, match=r"(?s)no name that is known here.*--pre NAME"):
        export_gguf(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    export_gguf(folder, tmp_path / "x.gguf", pre="gpt-2")
    assert field(gguf.GGUFReader(tmp_path / "x.gguf"), "tokenizer.ggml.pre") == "gpt-2"
