"""TokenShard: what is written is read, and nothing torn or foreign is read at all."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data.shards import ShardWriter, TokenShard, write_shard
from puyu.errors import InputError

WORDS = {"tokenizer_hash": "abc", "vocab_size": 300}


def _document(length):
    ids = st.lists(st.integers(0, 299), min_size=length, max_size=length)
    loss = st.none() | st.lists(st.booleans(), min_size=length, max_size=length)
    return st.tuples(ids, loss)


documents = st.lists(st.integers(1, 40).flatmap(_document), min_size=0, max_size=12)


@given(docs=documents)
@settings(max_examples=40, deadline=None)
def test_round_trip(docs, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("shard") / "a.b"
    info = write_shard(prefix, docs, **WORDS)
    shard = TokenShard.open(prefix, tokenizer_hash="abc")
    assert (shard.num_docs, shard.num_tokens) == (len(docs), sum(len(ids) for ids, _ in docs))
    assert info == shard.info
    masked = any(loss is not None for _, loss in docs)
    for i, (ids, loss) in enumerate(docs):
        got_ids, got_loss = shard.doc(i)
        assert got_ids.tolist() == ids and shard.length(i) == len(ids)
        expected = loss if loss is not None else [True] * len(ids)
        assert got_loss.tolist() == expected if masked else got_loss is None


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(tmp_path, vocab, dtype):
    write_shard(tmp_path / "s", [([vocab - 1, 0], None)], tokenizer_hash="x", vocab_size=vocab)
    shard = TokenShard.open(tmp_path / "s")
    assert shard.tokens_T.dtype == np.dtype(dtype)
    assert shard.doc(0)[0].tolist() == [vocab - 1, 0]


@pytest.mark.parametrize("part", ["tokens", "ends", "loss"])
@pytest.mark.parametrize("change", ["truncated", "longer", "gone"])
def test_a_damaged_part_is_named(tmp_path, part, change):
    write_shard(tmp_path / "s", [([1, 2, 3] * 9, [True, False, True] * 9)], **WORDS)
    path = tmp_path / f"s.{part}"
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(data[:-1] if change == "truncated" else data + b"x")
    with pytest.raises(InputError, match=f"s.{part}"):
        TokenShard.open(tmp_path / "s")


def test_the_tokenizer_is_named_when_it_is_another(tmp_path):
    write_shard(tmp_path / "s", [([1], None)], **WORDS)
    with pytest.raises(InputError, match=r"tokenizer abc.*tokenizer in use is def"):
        TokenShard.open(tmp_path / "s", tokenizer_hash="def")


def test_a_missing_or_foreign_header_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such token shard"):
        TokenShard.open(tmp_path / "s")
    (tmp_path / "s.json").write_text(json.dumps({"some": "thing"}))
    with pytest.raises(InputError, match="not the header"):
        TokenShard.open(tmp_path / "s")


def test_a_failed_write_leaves_no_shard(tmp_path):
    write_shard(tmp_path / "s", [([1, 2], None)], **WORDS)
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "s", **WORDS) as writer:
        writer.append([1, 2, 3])
        raise ZeroDivisionError
    with pytest.raises(InputError):
        TokenShard.open(tmp_path / "s")
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("ids", [[], [300], [-1]])
def test_documents_that_cannot_be_stored_are_refused(tmp_path, ids):
    with pytest.raises(InputError, match="document 0"):
        write_shard(tmp_path / "s", [(ids, None)], **WORDS)
