"""The native encoder gives the ids of `tokenizers`, for any text and any list of merges, in linear time."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from puyu.tokenizer import bpe
from puyu.tokenizer.encode import FastEncoder
from puyu.tokenizer.library import load
from puyu.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import CORPUS
from tests.tokenizer.kinds import CL100K, GPT2, HARD, PATTERNS, QWEN2, backend, changed

Merges = list[tuple[bytes, bytes]]
MERGES = bpe.learn_merges(bpe.count_pieces([*CORPUS, *HARD[:-6]] * 2), num_tokens=700)
MADE = {
    "ours": backend(MERGES, PATTERNS["ours"]),
    "gpt2": backend(MERGES, GPT2),
    "cl100k": backend(MERGES, CL100K, whole_words=True),
    "qwen2": backend(MERGES, QWEN2, nfc=True, plain_added=["<think>", "<tool_call>"]),
    "o200k": backend(MERGES, PATTERNS["o200k"]),
    "a cut with gaps": backend(MERGES, r"\p{N}{2}|[aeiou]+"),
}
ANY = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("aab 's'LL \n\r\t12我是你好é-=/\u0301\u3099ſ<think>"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    assert load() is not None, "run: python -m puyu.tokenizer.library"


def ids_of(made: Backend, text: str) -> list[int]:
    """What `tokenizers` gives when special tokens in a text are text."""
    made.encode_special_tokens = True
    return list(made.encode(text, add_special_tokens=False).ids)


def fast(made: Backend) -> FastEncoder:
    found = FastEncoder.build(made.to_str())
    assert found is not None
    return found


FAST = {name: Tokenizer(made.to_str(), {}) for name, made in MADE.items()}


def test_these_kinds_are_encoded_natively() -> None:
    assert all(tokenizer._fast is not None for tokenizer in FAST.values())


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=200)
@given(text=ANY)
def test_ids_equal_tokenizers(kind: str, text: str) -> None:
    assert FAST[kind].encode(text) == ids_of(MADE[kind], text)


@pytest.mark.parametrize("kind", MADE)
def test_hard_texts(kind: str) -> None:
    texts = [*HARD, *CORPUS, "<think>x</think>", "".join(HARD)]
    assert FAST[kind].encode_batch(texts) == [ids_of(MADE[kind], text) for text in texts]
    assert [ids.tolist() for ids in FAST[kind].encode_arrays(texts)] == FAST[kind].encode_batch(texts)


@pytest.mark.parametrize("kind", ["ours", "cl100k", "qwen2", "o200k"])
def test_every_code_point_is_cut_alike(kind: str) -> None:
    """Letters, a digit and a blank before and behind each character, of whatever version of Unicode."""
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000][:: 9 if kind == "ours" else 31]
    text = "".join(f"{chr(p)}a{chr(p)}1 {chr(p)}" for p in points)
    for start in range(0, len(text), 1 << 19):
        part = text[start : start + (1 << 19)]
        assert FAST[kind].encode(part) == ids_of(MADE[kind], part)


def merge_lists() -> st.SearchStrategy[Merges]:
    """Any merges whose parts are tokens, in any order: not only such as training gives."""

    def build(choices: Sequence[tuple[int, int]], order: random.Random) -> Merges:
        tokens = [b"a", b"b", b" ", *(bytes([byte]) for byte in "我是é".encode())]
        merges: Merges = []
        for left, right in choices:
            pair = (tokens[left % len(tokens)], tokens[right % len(tokens)])
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
        merges = list(dict.fromkeys(merges))
        if order.random() < 0.5:
            order.shuffle(merges)
        return merges

    choice = st.tuples(st.integers(0, 200), st.integers(0, 200))
    return st.builds(build, st.lists(choice, min_size=1, max_size=25), st.randoms())


@settings(max_examples=300)
@given(merge_lists(), st.lists(st.text("ab 我是é們", max_size=40), min_size=1, max_size=4))
def test_any_list_of_merges(merges: Merges, texts: list[str]) -> None:
    made = backend(merges, r"[^\n]+|\n")
    assert fast(made).encode(texts) == [ids_of(made, text) for text in texts]


@settings(max_examples=30)
@given(merge_lists(), st.integers(200, 700), st.randoms())
def test_long_pieces(merges: Merges, size: int, rng: random.Random) -> None:
    made = backend(merges, r"[^\n]+|\n")
    text = "".join(rng.choice("ab 我是é") for _ in range(size))
    assert fast(made).encode([text]) == [ids_of(made, text)]


@pytest.mark.parametrize("unit", ["a", " ", "我", "ab", "\n", "\u0301", "🎉", "1", "=", "a1 "])
@pytest.mark.parametrize("kind", ["ours", "gpt2", "cl100k", "o200k"])
def test_a_million_of_anything(kind: str, unit: str) -> None:
    """Sizes at which work that grows with the square would not end."""
    count = 1_000_000 // len(unit)
    ids = FAST[kind].encode(unit * count)
    assert FAST[kind].decode(ids) == unit * count


def test_text_without_borders() -> None:
    rng = random.Random(0)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(200_000))
    for text in (chinese, "".join(rng.choice("abcd") for _ in range(500_000)), " \t" * 250_000 + "x"):
        for kind in ("ours", "o200k"):
            assert FAST[kind].decode(FAST[kind].encode(text)) == text


def test_control_tokens_never_come_from_text() -> None:
    tokenizer = FAST["qwen2"]
    text = "a<|im_end|>b<s>"
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    marked = tokenizer.encode(text, special=True)
    assert [id for id in marked if id in tokenizer.special_ids] == [tokenizer.im_end_id, tokenizer.token_id("<s>")]
    assert tokenizer.token_id("<think>") in tokenizer.encode("x<think>y")  # not special: found in any text


def test_a_batch_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", *CORPUS, *HARD] * 200
    many = FAST["ours"].encode_batch(texts)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert FAST["ours"].encode_batch(texts) == many == [FAST["ours"].encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(FAST["ours"].encode_batch, [texts] * 4)) == [many] * 4
    assert FAST["ours"].encode_batch([]) == []


def test_a_pickled_tokenizer_is_the_same() -> None:
    again = pickle.loads(pickle.dumps(FAST["cl100k"]))
    assert again.encode(CORPUS[0]) == FAST["cl100k"].encode(CORPUS[0])
    assert again.fingerprint == FAST["cl100k"].fingerprint


def test_a_lone_surrogate_is_the_error_it_was() -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        FAST["ours"].encode("a\ud800")


def test_without_the_library_tokenizers_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puyu.tokenizer.encode.load", lambda: None)
    slow = Tokenizer(MADE["ours"].to_str(), {})
    texts = [*HARD, *CORPUS]
    assert slow.encode_batch(texts) == FAST["ours"].encode_batch(texts)
    assert [ids.tolist() for ids in slow.encode_arrays(texts)] == slow.encode_batch(texts)


def test_what_would_give_other_ids_is_left_to_tokenizers() -> None:
    made = MADE["ours"]
    assert FastEncoder.build(changed(made, dropout=0.1)) is None
    assert FastEncoder.build(changed(made, byte_fallback=True)) is None
    assert FastEncoder.build(changed(made, continuing_subword_prefix="##")) is None
    content = json.loads(made.to_str())
    for key, value in (
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    ):
        assert FastEncoder.build(json.dumps(content | {key: value})) is None
    parts = content["pre_tokenizer"]["pretokenizers"]
    for split in (
        parts[0] | {"behavior": "Removed"},
        parts[0] | {"invert": True},
        parts[0] | {"pattern": {"String": " "}},
    ):
        steps = {"type": "Sequence", "pretokenizers": [split, parts[1]]}
        assert FastEncoder.build(json.dumps(content | {"pre_tokenizer": steps})) is None
    del content["model"]["vocab"]["Ġ"]
    assert FastEncoder.build(json.dumps(content)) is None
