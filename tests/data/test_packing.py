"""Packing: nothing lost, nothing invented, and the same global stream for every world size."""

import itertools
import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data.mix import Mixture
from puyu.data.packing import (
    ConversationSource,
    Pair,
    PreferenceSource,
    PretrainSource,
    grouped,
    pack_documents,
    pack_pairs,
    with_reward_token,
)
from puyu.data.shards import TokenShard, write_shard
from puyu.errors import CheckpointError, ConfigError, InputError

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=10)


@given(sizes=st.lists(st.integers(1, 30), max_size=20), most=st.integers(1, 40))
def test_groups_are_full_and_leave_nothing_out(sizes, most):
    groups = list(grouped(sizes, lambda size: size, most=most))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= most or len(group) == 1 for group in groups)
    assert all(sum(group) + after[0] > most for group, after in pairwise(groups))


@given(lengths=lengths, data=st.data())
@settings(max_examples=60, deadline=None)
def test_pack_documents_against_plain_python(lengths, data):
    docs = []
    for number, length in enumerate(lengths):
        loss = data.draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
        docs.append(([100 * number + i for i in range(length)], loss))
    batch = pack_documents(docs)
    tokens, positions, targets, weights, starts = [], [], [], [], []
    for ids, loss in docs:
        starts.append(len(tokens))
        tokens += ids
        positions += range(len(ids))
        targets += [*ids[1:], 0]
        weights += [*(loss[1:] if loss else [True] * (len(ids) - 1)), False]
    assert batch.tokens_T.tolist() == tokens
    assert batch.positions_T.tolist() == positions
    assert batch.starts_S == tuple(starts)
    assert batch.ends_S == (*starts[1:], len(tokens))
    assert batch.weights_T.tolist() == [float(w) for w in weights]
    assert [t for t, w in zip(batch.targets_T.tolist(), weights, strict=True) if w] == [
        t for t, w in zip(targets, weights, strict=True) if w
    ]
    assert batch.weights_T.dtype == torch.float32 and batch.tokens_T.dtype == torch.int64


def test_no_document_gives_a_batch_without_weight():
    batch = pack_documents([])
    assert batch.num_tokens == 1 and batch.weights_T.sum() == 0 and batch.starts_S == (0,)


@pytest.fixture
def shards(tmp_path):
    """Two sources whose every token id is unique, so that a ledger can tell what was seen."""
    result, first = {}, 0
    for name, count in (("code", 23), ("web", 37)):
        docs = []
        for i in range(count):
            length = 2 + (i * 13) % 41
            docs.append((range(first, first + length), None))
            first += length
        write_shard(tmp_path / name, docs, tokenizer_hash="t", vocab_size=60_000)
        result[name] = TokenShard.open(tmp_path / name)
    return result


def source_of(shards, *, seq_len=16, rows=4, seed=5):
    weights = {name: shard.num_tokens for name, shard in shards.items()}
    return PretrainSource(shards, Mixture(shards, weights, seed=seed), seq_len=seq_len, rows=rows)


def documents(shards):
    return [shard.doc(i)[0].tolist() for shard in shards.values() for i in range(shard.num_docs)]


def test_every_token_is_seen_once_and_every_successor_predicted_once(shards):
    source = source_of(shards)
    total = sum(shard.num_tokens for shard in shards.values())
    seen, predicted = Counter(), Counter()
    while min(cursor["epoch"] for cursor in source.mixture.state()["cursors"].values()) < 1:
        batch = source.next_batch()
        assert batch.num_tokens == 4 * 16
        seen.update(batch.tokens_T.tolist())
        keep = batch.weights_T > 0
        predicted.update(zip(batch.tokens_T[keep].tolist(), batch.targets_T[keep].tolist(), strict=True))
    # Both sources have been drawn whole at least once; only the open remainder may be missing.
    rest = [id for name, doc, begin in source.state()["waiting"] for id in shards[name].doc(doc)[0][begin:].tolist()]
    assert set(range(total)) - set(seen) <= set(rest)
    pairs = {(a, b) for ids in documents(shards) for a, b in pairwise(ids)}
    assert set(predicted) <= pairs
    assert pairs - set(predicted) <= set(pairwise(rest))
    ends = {ids[-1] for ids in documents(shards)}
    assert all(predicted[pair] == seen[pair[0]] for pair in predicted)
    assert not ends & {a for a, _ in predicted}


def test_positions_restart_with_each_document_and_row(shards):
    batch = source_of(shards).next_batch()
    starts = set(batch.starts_S)
    assert {0, 16, 32, 48} <= starts
    for index, position in enumerate(batch.positions_T.tolist()):
        assert (position == 0) == (index in starts)
        assert position == 0 or position == batch.positions_T[index - 1] + 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_rows_of_the_global_batch(shards, world):
    single = source_of(shards)
    ranks = [source_of(shards) for _ in range(world)]
    for _ in range(6):
        rows = single.next_batch().tokens_T.reshape(4, 16)
        for rank, source in enumerate(ranks):
            batch = source.next_batch(rank=rank, world=world)
            expected = rows[rank::world].flatten()
            if len(expected):
                assert torch.equal(batch.tokens_T, expected)
            else:
                assert batch.weights_T.sum() == 0
        assert all(source.state() == single.state() for source in ranks)


@given(before=st.integers(0, 12), world=st.sampled_from([1, 2, 4]), seq_len=st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_resume_is_exact_for_any_world(tmp_path_factory, before, world, seq_len):
    folder = tmp_path_factory.mktemp("s")
    write_shard(folder / "a", [(range(i * 60, i * 60 + 1 + i * 7 % 60), None) for i in range(9)], **_WORDS)
    shards = {"a": TokenShard.open(folder / "a")}
    source = source_of(shards, seq_len=seq_len)
    for _ in range(before):
        source.next_batch(rank=0, world=world)
    state = json.loads(json.dumps(source.state()))
    expected = source.next_batch().tokens_T.tolist()
    other = source_of(shards, seq_len=seq_len)
    other.load(state)
    assert other.next_batch().tokens_T.tolist() == expected


_WORDS = {"tokenizer_hash": "t", "vocab_size": 1000}


def test_the_row_length_may_change_between_rows_without_loss(shards):
    source, seen = source_of(shards), Counter()
    for seq_len, rows in ((16, 4), (50, 1), (7, 3)):
        source.set_shape(seq_len=seq_len, rows=rows)
        for _ in range(3):
            seen.update(source.next_batch().tokens_T.tolist())
    assert seen.total() == 3 * (64 + 50 + 21) and max(seen.values()) == 1
    with pytest.raises(ConfigError):
        source.set_shape(seq_len=1, rows=1)


def test_a_loss_mask_follows_its_document_across_a_cut(tmp_path):
    loss = [False, True, True, False, True, False]
    write_shard(tmp_path / "m", [(range(10, 16), loss)], **_WORDS)
    source = source_of({"m": TokenShard.open(tmp_path / "m")}, seq_len=3, rows=2)
    batch = source.next_batch()
    assert batch.targets_T.tolist()[:5] == [11, 12, 13, 14, 15]
    assert batch.weights_T.tolist() == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("packing", ["hard", "soft", "document"])
def test_two_epochs_are_batches_of_every_token_and_target_twice(shards, packing):
    mixture = Mixture(shards, {"web": 1, "code": 1}, seed=3, epochs={"web": 2, "code": 2})
    source = PretrainSource(shards, mixture, seq_len=16, rows=4, packing=packing)
    ranks = [PretrainSource(shards, mixture, seq_len=16, rows=4, packing=packing) for _ in range(2)]
    seen, predicted = Counter(), Counter()
    with pytest.raises(ConfigError, match="used up"):
        for step in itertools.count():
            state, batch = json.loads(json.dumps(source.state())), source.next_batch()
            seen.update(batch.tokens_T.tolist())
            keep = batch.weights_T > 0
            predicted.update(zip(batch.tokens_T[keep].tolist(), batch.targets_T[keep].tolist(), strict=True))
            if step % 5 == 0:  # two processes that go on here have the same tokens between them
                after, parts = source.state(), Counter()
                for rank, other in enumerate(ranks):
                    other.load(state)
                    half = other.next_batch(rank=rank, world=2)
                    parts.update(half.tokens_T.tolist() if len(batch.starts_S) > 1 or rank == 0 else [])
                    assert other.state() == after
                assert parts == Counter(batch.tokens_T.tolist())
                source.load(after)
    assert seen == {id: 2 for ids in documents(shards) for id in ids}
    assert predicted == {pair: 2 for ids in documents(shards) for pair in pairwise(ids)}
    assert source.fill == pytest.approx({"hard": 1.0, "soft": 0.99, "document": 0.75}[packing], abs=0.03)


@given(lengths=st.lists(st.integers(2, 50), min_size=3, max_size=30), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_conversations_are_whole_within_budget_and_once_an_epoch(lengths, seed):
    docs = [([1000 * i + j for j in range(n)], None) for i, n in enumerate(lengths)]
    source = ConversationSource(docs, tokens_per_batch=60, seed=seed)
    assert source.dropped["too_long"] == 0
    seen = Counter()
    for _ in range(source.steps_for(2)):
        batch = source.next_batch()
        assert 0 < batch.num_tokens <= 60
        for start, end in zip(batch.starts_S, batch.ends_S, strict=True):
            ids = batch.tokens_T[start:end].tolist()
            assert docs[ids[0] // 1000][0] == ids
            seen[ids[0] // 1000] += 1
        if seen.total() <= len(docs):
            assert max(seen.values()) == 1
    assert min(seen[i] for i in range(len(docs))) >= 2


def test_conversations_resume_and_split_by_rank():
    docs = [([i] * (3 + i % 9), None) for i in range(40)]
    source, pair = (ConversationSource(docs, tokens_per_batch=50, seed=1) for _ in range(2))
    for _ in range(9):
        source.next_batch()
    state = json.loads(json.dumps(source.state()))
    whole = source.next_batch()
    pieces = []
    for rank in range(2):
        pair.load(state)
        pieces.append(pair.next_batch(rank=rank, world=2))
    firsts = [whole.tokens_T[s].item() for s in whole.starts_S]
    assert [pieces[0].tokens_T[s].item() for s in pieces[0].starts_S] == firsts[::2]
    assert [pieces[1].tokens_T[s].item() for s in pieces[1].starts_S] == firsts[1::2]
    with pytest.raises(CheckpointError, match="40 documents"):
        ConversationSource(docs[:9], tokens_per_batch=50, seed=1).load(state)


def test_what_cannot_be_used_is_counted():
    docs = [([1] * 20, None), ([1] * 9, [False] * 9), ([1] * 9, [True] + [False] * 8), ([1] * 5, None)]
    source = ConversationSource(docs, tokens_per_batch=100, max_tokens=12, seed=0)
    assert source.dropped == {"too_long": 1, "nothing_to_learn": 2} and len(source.items) == 1
    with pytest.raises(InputError, match="nothing to train on"):
        ConversationSource(docs[:1], tokens_per_batch=8, seed=0)


def test_pairs_stand_side_by_side_with_their_reward_tokens():
    pairs = [Pair([1, 2, 99], [1, 3, 4, 99], 0), Pair([5, 99], [6, 7, 99], 2)]
    batch = pack_pairs(pairs)
    assert batch.tokens_T[batch.extras["last_S"]].tolist() == [99] * 4
    assert batch.extras["pair_S"].tolist() == [0, 0, 1, 1]
    assert batch.extras["domain_S"].tolist() == [0, 0, 2, 2]
    assert batch.starts_S == (0, 3, 7, 9)
    assert len(pack_pairs([]).extras["last_S"]) == 0


def test_the_reward_token_survives_truncation():
    assert with_reward_token([1, 2, 3], 9, max_length=4) == [1, 2, 3, 9]
    assert with_reward_token(range(100), 9, max_length=4) == [0, 1, 2, 9]


def test_preferences_are_never_torn_apart():
    pairs = [Pair([i] * (2 + i % 5) + [99], [i] * (3 + i % 7) + [99]) for i in range(30)] + [Pair([1] * 50, [1] * 50)]
    source = PreferenceSource(pairs, tokens_per_batch=40, seed=0)
    assert source.dropped == {"too_long": 1}
    seen = Counter()
    while seen.total() < 30:
        batch = source.next_batch()
        assert batch.num_tokens <= 40
        firsts = batch.tokens_T[list(batch.starts_S)].tolist()
        assert firsts[::2] == firsts[1::2]
        seen.update(firsts[::2])
    assert set(seen) == set(range(30))
