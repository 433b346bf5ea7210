"""tiktoken's files: both ways with equal ids, and errors for what they cannot hold."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.configure import build
from puyu.errors import ConfigError, InputError
from puyu.tokenizer import bpe, ranks
from puyu.tokenizer.extend import Extension, read_base
from puyu.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.kinds import CL100K, HARD, backend, changed

Merges = list[tuple[bytes, bytes]]
BYTES = {bytes([byte]): byte for byte in range(256)}


def as_ranks(merges: Merges) -> ranks.Ranks:
    return BYTES | {left + right: rank for rank, (left, right) in enumerate(merges, 256)}


def test_tiktoken_semantics_give_the_ids_of_the_imported_tokenizer(merges: Merges, corpus: list[str]) -> None:
    """Against tiktoken's rule itself: the pair whose bytes have the lowest rank is merged first."""
    table = as_ranks(merges)
    tokenizer = ranks.from_ranks(table, pattern=CL100K, special={"<|endoftext|>": 5000})
    splitter = bpe.pre_tokenizer(CL100K)
    for text in [*corpus, *HARD[:-6]]:
        pieces = [piece.encode() for piece, _ in splitter.pre_tokenize_str(text)]
        expected = [table[part] for piece in pieces for part in ranks.merged(piece, table, below=1 << 30)]
        assert tokenizer.encode(text) == expected, text
    assert tokenizer.token_id("<|endoftext|>") == 5000 and tokenizer.vocab_size == 5001


def test_a_file_and_back(tokenizer: Tokenizer, tmp_path: Path, corpus: list[str]) -> None:
    path = tmp_path / "own.tiktoken"
    ranks.write_ranks(ranks.to_ranks(tokenizer), path)
    pattern, special = ranks.read_note(path)
    assert pattern == bpe.PATTERN and special == tokenizer.special_tokens
    again = ranks.from_ranks(ranks.read_ranks(path), pattern=pattern, special=special)
    assert again.vocab_size == tokenizer.vocab_size
    for text in [*corpus, "<s>x<|im_end|>"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    first = path.read_bytes()
    ranks.write_ranks(ranks.to_ranks(again), path)
    assert path.read_bytes() == first


@settings(max_examples=60)
@given(st.lists(st.text("ab我 ", max_size=20), min_size=1, max_size=4))
def test_merges_are_recovered(texts: list[str]) -> None:
    merges = bpe.learn_merges(bpe.count_pieces(texts), num_tokens=280)
    assert ranks.recover_merges(as_ranks(merges)) == merges


def test_ranks_that_no_merge_reaches_are_named() -> None:
    with pytest.raises(InputError, match=r"rank 256, b'abc': no merge of two tokens reaches it"):
        ranks.recover_merges(BYTES | {b"abc": 256})
    with pytest.raises(InputError, match=r"rank 257, b'abcd' and 1 more: no merge"):
        ranks.recover_merges(BYTES | {b"ab": 256, b"abcd": 257, b"cd": 258, b"xyz": 259})
    with pytest.raises(InputError, match="keep at least the 256"):
        ranks.first_ranks(BYTES, 100)


def test_files_that_are_torn_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    good = [base64.b64encode(token) + b" %d" % rank for token, rank in BYTES.items()]
    for lines, problem in (
        ([*good, b"YWI="], "line 257 is not `base64 rank`"),
        ([*good, b"*** 300"], "line 257 is not `base64 rank`"),
        ([*good, good[0]], "named twice"),
        ([*good, b"YWI= 7"], "gives one rank to several"),
        (good[:-1], "no token for the byte 0xff"),
        ([*good, b"YWI= -1"], "a rank below 0"),
    ):
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(InputError, match=problem):
            ranks.read_ranks(path)
    with pytest.raises(InputError, match="cannot be read"):
        ranks.read_ranks(tmp_path / "none")


def test_what_ranks_cannot_say_is_refused(merges: Merges) -> None:
    made = backend(merges, CL100K)
    with pytest.raises(InputError, match="normalizer"):
        ranks.to_ranks(Tokenizer(backend(merges, CL100K, nfc=True).to_str(), {}))
    with pytest.raises(InputError, match="'<think>' is found in any text"):
        ranks.to_ranks(Tokenizer(backend(merges, CL100K, plain_added=["<think>"]).to_str(), {}))
    with pytest.raises(InputError, match="no byte-level BPE"):
        ranks.to_ranks(Tokenizer(changed(made, byte_fallback=True), {}))
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    extra = changed(made, vocab=vocab | {"qzqz": 9999})
    with pytest.raises(InputError, match="b'qzqz' is made by no merge"):
        ranks.to_ranks(Tokenizer(extra, {}))
    first, second = (bpe.to_chars(left + right) for left, right in merges[:2])
    swapped = changed(made, vocab=vocab | {first: vocab[second], second: vocab[first]})
    with pytest.raises(InputError, match="has the lower id"):
        ranks.to_ranks(Tokenizer(swapped, {}))
    with pytest.raises(InputError, match=r"taken: \[97\]"):
        ranks.from_ranks(BYTES, pattern=CL100K, special={"<x>": 97})
    spells = BYTES | {b"<s": 256, b"<s>": 257}
    with pytest.raises(InputError, match="words that spell special tokens: '<s>'"):
        ranks.from_ranks(spells, pattern=r"\S+|\s+", special={"<s>": 300})
    with pytest.raises(InputError, match=r"the pattern '\(' cannot be read"):
        ranks.from_ranks(BYTES, pattern="(")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_list_of_merges_gives_equal_ids_or_is_refused(data: st.DataObject) -> None:
    """Merges in any order, also of one token from several pairs, and twice."""
    parts, merges = [b"a", b"b", b"c"], []
    for _ in range(data.draw(st.integers(1, 7))):
        merges.append((data.draw(st.sampled_from(parts)), data.draw(st.sampled_from(parts))))
        parts.append(b"".join(merges[-1]))
    for token in data.draw(st.lists(st.sampled_from(parts[3:]), max_size=4)):
        cut = data.draw(st.integers(1, len(token) - 1))
        if token[:cut] in parts and token[cut:] in parts:
            merges.append((token[:cut], token[cut:]))
    tokenizer = Tokenizer(backend(merges, r"[^\n]+|\n").to_str(), {})
    try:
        table = ranks.to_ranks(tokenizer).ranks
    except InputError:
        return
    for text in data.draw(st.lists(st.text("abc", max_size=12), min_size=5, max_size=20)):
        expected = [table[part] for part in ranks.merged(text.encode(), table, below=1 << 30)]
        assert tokenizer.encode(text) == expected, text


def test_a_token_that_is_made_late_and_in_two_ways_is_refused() -> None:
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"x", b"a"), (b"a", b"bc")]
    with pytest.raises(InputError, match="b'abc' is merged after b'xa' but has the lower id"):
        ranks.to_ranks(Tokenizer(backend(merges, r"[^\n]+|\n").to_str(), {}))


def test_the_base_of_an_extension(merges: Merges, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "folder")
    base = read_base(Extension(base=tmp_path / "folder", keep=300))
    assert base.pattern == bpe.PATTERN and base.merges == merges[:44] and base.kept == 300
    path = tmp_path / "x.tiktoken"
    ranks.write_ranks(ranks.RanksExport(as_ranks(merges), CL100K, {}), path)
    assert read_base(Extension(base=path, keep=300)).pattern == CL100K
    ranks.note_of(path).unlink()
    with pytest.raises(ConfigError, match="does not say where text is cut"):
        read_base(Extension(base=path, keep=300))
    assert read_base(Extension(base=path, keep=256, pattern="gpt2")).merges == []
    with pytest.raises(InputError, match=r"cannot keep 9999 of \d+ ranks"):
        read_base(Extension(base=path, keep=9999, pattern="gpt2"))
    with pytest.raises(InputError, match=r"the pattern '\[a-' cannot be read: .*Oniguruma") as caught:
        read_base(Extension(base=path, keep=256, pattern="[a-"))
    assert "give a regular expression" in str(caught.value)
    with pytest.raises(ConfigError, match="keep"):
        build(Extension, {"base": str(path), "keep": 10})


def test_special_names_on_the_command_line() -> None:
    assert ranks.parse_special(["<a=b>=12", "<c>=3"]) == {"<a=b>": 12, "<c>": 3}
    for item in ("<a>", "<a>=²", "=1"):
        with pytest.raises(InputError, match="is not NAME=ID"):
            ranks.parse_special([item])
