"""Loading, saving, round trips, streaming, and the same ids in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from puyu.errors import InputError
from puyu.tokenizer.tokenizer import TRAILING_SPECIALS, StreamDecoder, Tokenizer

ANY_TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("the answer 12我是<|im_end|>👩‍🔬")), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_special_text_is_plain_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>\n</s><|im_start|>"
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, special=True)
    assert [id for id in ids if id in tokenizer.special_ids] == [tokenizer.im_end_id, 2, tokenizer.im_start_id]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == "a\n"


def test_special_ids_stand_where_internlm2_has_them(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    assert [tokenizer.token_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert [tokenizer.token_id(name) for name in TRAILING_SPECIALS] == list(range(size - 7, size))
    assert tokenizer.im_start_id == size - 1
    assert tokenizer.stop_ids == (2, size - 2)


def test_save_and_load_change_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == tokenizer.chat_template
    first = (tmp_path / "tokenizer.json").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path, corpus: list[str]) -> None:
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*corpus, "  two  spaces \n\n\t!", "a<|im_end|>b"]:
        ids = tokenizer.encode(text, special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [1, *ids]
        assert theirs.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_stream_equals_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30),
            ANY_TEXT.map(tokenizer.encode),
        )
    )
    for skip in (False, True):
        stream = StreamDecoder(tokenizer, skip_special=skip)
        pieces = [stream.push(id) for id in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


def test_stream_never_splits_a_character(tokenizer: Tokenizer) -> None:
    text = "𠮷 is rare; 👩‍🔬 too"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # 𠮷 takes several tokens


def test_stream_of_a_tokenizer_with_byte_fallback() -> None:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hi", "你"]
    backend = Backend(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    other = Tokenizer(backend.to_str(), {})
    ids = [258, 259, *(1 + byte for byte in "🎉".encode()), 257, 258, 1 + 0xE4]
    stream = StreamDecoder(other)
    pieces = [stream.push(id) for id in ids]
    assert pieces == ["hi", "你", "", "", "", "🎉", " ", " hi", ""]
    assert "".join(pieces) + stream.flush() == other.decode(ids)
    assert b"".join(map(other.token_bytes, ids[:2])) == " hi你".encode()


def test_a_vocabulary_with_gaps(tokenizer: Tokenizer) -> None:
    """The size is where ids end; an id without a token, which a model may choose, is no text."""
    backend = Backend(models.BPE({"a": 0, "b": 1, "c": 7}, []))
    backend.decoder = decoders.ByteLevel()
    gaps = Tokenizer(backend.to_str(), {})
    assert gaps.vocab_size == 8
    assert gaps.token_bytes(7) == b"c" and gaps.token_bytes(5) == b""
    assert "".join(map(StreamDecoder(gaps).push, (0, 5, 7))) == gaps.decode([0, 5, 7]) == "ac"
    with pytest.raises(InputError, match="not in the vocabulary of 8"):
        gaps.token_bytes(8)


def test_missing_and_torn_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json or tokenizer\.model in .*\n  remedy: "):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json is torn"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


def test_the_template_may_stand_in_its_own_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "{{ messages }}"


def test_an_unknown_id_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not in the vocabulary"):
        tokenizer.token_bytes(tokenizer.vocab_size)
