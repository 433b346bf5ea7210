"""`tokenizer.model` alone: ids of the sentencepiece library itself, on models trained here."""

from __future__ import annotations

import io
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from puyu.errors import InputError
from puyu.tokenizer.sentencepiece import Kind, read_model, to_tokenizer_json
from puyu.tokenizer.tokenizer import StreamDecoder, Tokenizer

WORDS = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog and then answers questions about large models")
CHINESE = "人工智能是研究开发用于模拟延伸和扩展人的智能的理论方法技术及应用系统的一门新的技术科学我是浦语一个小模型"
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "LLaMA's": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700, **PLAIN},
    "no prefix": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700, **PLAIN, "add_dummy_prefix": False},
    "whole digits, no bytes": {"model_type": "bpe", "vocab_size": 450, "split_digits": True, **PLAIN},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 700,
        **PLAIN,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<sep>", "[x]", "<|a|>", "<sep>2"],
    },
    "BPE, nmt_nfkc": {"model_type": "bpe", "vocab_size": 450},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 560, **PLAIN},
    "unigram with symbols": {
        "model_type": "unigram",
        "byte_fallback": True,
        "vocab_size": 560,
        **PLAIN,
        "user_defined_symbols": ["<sep>", "[x]", "<|a|>"],
    },
}


def sentences(count: int, seed: int) -> list[str]:
    """English and Chinese that share words, digits and punctuation."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        english = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 10)))
        start = rng.randrange(len(CHINESE) - 12)
        chinese = CHINESE[start : start + rng.randrange(2, 12)]
        number = f" {rng.randrange(2000)}{rng.choice('.,!? ')}"
        found.append(rng.choice([english + number, chinese + "。", f"{english}: {chinese}{number}"]))
    return found


@cache
def trained(kind: str) -> bytes:
    out = io.BytesIO()
    text = sentences(400, seed=1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, minloglevel=2, num_threads=1, hard_vocab_limit=False,
        **KINDS[kind],
    )  # fmt: skip
    return out.getvalue()


@cache
def both(kind: str) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    data = trained(kind)
    return sentencepiece.SentencePieceProcessor(model_proto=data), Tokenizer(to_tokenizer_json(data, CONFIG), CONFIG)


HARD = [
    *("", " ", "  ", "a", " a", "a ", "  two  spaces   ", "\n", "a\n\nb", "\tx\t", "a\r\nb", "fox\u00a0fox"),
    *("🎉", "👩‍🔬 tests", "é", "naïve café", "Россия", "𠮷野家", "１２３ ＡＢＣ", "…—“x”", "\x00\x7f", "ﬁne"),
    *("<s>", "</s>x", "a<unk>b", "<0x0A>", "x<0xE4>", "<s></s>", "▁", "a▁b", "#" * 40, "=" * 7, "the" * 9),
    *("a<sep>b", "<sep>", "<sep>2[x]", " [x] fox <|a|>", "<sep", "sep>", "<sep><sep> <sep>"),
]


def comparable(kind: str, text: str) -> bool:
    """Not: joined emoji under a character map, which `tokenizers` maps whole; and control pieces that are spelled out,
    which are cut apart for safety, so that two unknown characters in a row are not one."""
    if kind in ("BPE, nmt_nfkc", "unigram") and "\u200d" in text:
        return False
    return kind != "unigram" or not re.search("</?s>|<unk>", text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_sentencepiece(kind: str) -> None:
    theirs, ours = both(kind)
    hard = [text for text in HARD if comparable(kind, text)]
    for text in [*sentences(300, seed=2), *hard]:
        assert ours.encode(text) == theirs.encode(text), repr(text)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("kind", ["LLaMA's", "no prefix", "symbols", "unigram with bytes"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_the_same_ids_and_comes_back(kind: str, text: str) -> None:
    theirs, ours = both(kind)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text.replace("▁", " ")  # SentencePiece's own loss
    stream = StreamDecoder(ours)
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_made_of_known_characters_has_the_same_ids(kind: str) -> None:
    """Many merges in unusual orders: letters of the training text at random."""
    rng, (theirs, ours) = random.Random(5), both(kind)
    for _ in range(300):
        text = "".join(rng.choices("thequickbrownfoxaannssll  。人工智能技术12,.", k=rng.randrange(1, 30)))
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_pieces_that_overlap_themselves_merge_in_the_same_order() -> None:
    """a, aa, aaa, runs of spaces: a piece has several cuts of one score."""
    rng, out = random.Random(6), io.BytesIO()
    parts = ["a", "aa", "aaa", "ab", "b", "=", "==", "  ", "    "]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(rng.choices(parts, k=20)) for _ in range(200)]), model_writer=out,
        minloglevel=2, num_threads=1, hard_vocab_limit=False, allow_whitespace_only_pieces=True,
        **{**KINDS["LLaMA's"], "vocab_size": 380},
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ours = Tokenizer(to_tokenizer_json(out.getvalue(), CONFIG), CONFIG)
    for _ in range(500):
        text = "".join(rng.choices("aab== ", k=rng.randrange(1, 40)))
        assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_control_piece_stays_text(kind: str) -> None:
    theirs, ours = both(kind)
    controls = {id for id in range(theirs.vocab_size()) if theirs.is_control(id) or theirs.is_unknown(id)}
    for text in ("<s>", "</s>", "x</s>", "<sep></s><sep>", " <s> "):
        assert not controls & set(ours.encode(text)) - {theirs.unk_id()}
    if theirs.bos_id() >= 0:
        assert ours.encode("<s>", special=True) == [theirs.bos_id()]


def save_internlm2_style(folder: Path) -> dict[int, str]:
    """A folder like InternLM2's: `tokenizer.model`, and free pieces that the config gives new names."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400, seed=1)), model_writer=out, minloglevel=2, num_threads=1,
        user_defined_symbols=["[FREE_0]", "[FREE_1]", "[FREE_2]"], **KINDS["LLaMA's"],
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    first = next(id for id, piece in enumerate(read_model(out.getvalue()).pieces) if piece.text == "[FREE_0]")
    size = len(read_model(out.getvalue()).pieces)
    names = {first: "<|im_start|>", first + 1: "<|im_end|>", first + 2: "<|plugin|>", size: "<|new|>"}
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", **{str(id): name for id, name in names.items()}}
    decoder = {id: {"content": name, "special": True, "normalized": False} for id, name in added.items()}
    config = {**CONFIG, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return names


def test_internlm2s_markers_have_the_ids_that_its_config_names(tmp_path: Path) -> None:
    names = save_internlm2_style(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for id, name in names.items():
        assert tokenizer.token_id(name) == id and tokenizer.special_tokens[name] == id
        assert tokenizer.encode(f"fox{name}", special=True)[-1] == id
        assert id not in tokenizer.encode(f"fox{name}")
    assert tokenizer.im_end_id in tokenizer.stop_ids and tokenizer.token_id("[FREE_0]") is None
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in sentences(50, seed=3):
        assert tokenizer.encode(text) == theirs.encode(text)
    tokenizer.save(tmp_path / "again")  # from now on there is a tokenizer.json
    assert Tokenizer.load(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_a_marker_splits_text_as_in_the_published_fast_tokenizer(tmp_path: Path) -> None:
    """Each stretch between markers has its own dummy prefix."""
    names = save_internlm2_style(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    (start, _), (end, _) = list(names.items())[:2]
    ids = tokenizer.encode("<|im_start|>fox<|im_end|>dog", special=True)
    assert ids == [start, *tokenizer.encode("fox"), end, *tokenizer.encode("dog")]


def test_transformers_gives_the_same_ids_for_llama_2(tmp_path: Path) -> None:
    """Its own conversion of the same file, and its reading of the file that we write."""
    (tmp_path / "tokenizer.model").write_bytes(trained("LLaMA's"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "tokenizer_class": "LlamaTokenizer"}))
    ours = Tokenizer.load(tmp_path)
    theirs = LlamaTokenizer.from_pretrained(tmp_path, legacy=True)
    ours.save(tmp_path / "ours")
    path = tmp_path / "ours" / "tokenizer_config.json"
    path.write_text(json.dumps({**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"}))
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in [*sentences(100, seed=4), "🎉"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), repr(text)
        assert again.encode(text) == [1, *ours.encode(text)]


def test_end_ids_of_generation_config_count(tmp_path: Path) -> None:
    save_internlm2_style(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 600, 7]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.stop_ids == (2, tokenizer.im_end_id, 600, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(tmp_path).stop_ids == (2, tokenizer.im_end_id, 9)


@pytest.mark.parametrize("keep", [1, 100, 0.5, 0.999])
def test_a_torn_file_is_named(keep: float, tmp_path: Path) -> None:
    data = trained("LLaMA's")
    (tmp_path / "tokenizer.model").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(InputError, match=r"tokenizer\.model: (this is no SentencePiece model|only BPE)"):
        Tokenizer.load(tmp_path)


def test_an_added_token_with_an_impossible_id_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained("LLaMA's"))
    config = {**CONFIG, "added_tokens_decoder": {"99999": {"content": "<|far|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'<\|far\|>' cannot have the id 99999"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["char", "word"])
def test_other_algorithms_are_refused(kind: str) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(50, seed=1)), model_writer=out, minloglevel=2, model_type=kind,
        vocab_size=60, hard_vocab_limit=False, **({"use_all_vocab": True} if kind == "word" else {}),
    )  # fmt: skip
    with pytest.raises(InputError, match="only BPE and Unigram"):
        to_tokenizer_json(out.getvalue(), CONFIG)


def test_the_parser_reads_what_the_library_says() -> None:
    for kind in KINDS:
        theirs, model = both(kind)[0], read_model(trained(kind))
        assert [piece.text for piece in model.pieces] == [theirs.id_to_piece(id) for id in range(len(model.pieces))]
        assert [piece.score for piece in model.pieces] == [theirs.get_score(id) for id in range(len(model.pieces))]
        assert [piece.kind is Kind.BYTE for piece in model.pieces] == [
            theirs.is_byte(id) for id in range(len(model.pieces))
        ]
