"""GAE, PPO's losses and the reward moments against plain-Python twins."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puyu.align.advantages import gae
from puyu.align.objectives import answer_logprobs, policy_loss, value_loss
from puyu.align.rewards import Moments
from puyu.data.packing import pack_documents
from tests.engine.conftest import tiny_model

numbers = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def answers(draw):
    return draw(st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), min_size=1, max_size=4))


@given(answers(), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_definition(rows, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, nothing behind the end of an answer."""
    expected = []
    for row in rows:
        values = [value for _, value in row] + [0.0]
        deltas = [reward + gamma * values[t + 1] - values[t] for t, (reward, _) in enumerate(row)]
        expected += [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(row))) for t in range(len(row))]
    flat = [pair for row in rows for pair in row]
    rewards, values = (torch.tensor([pair[i] for pair in flat]) for i in (0, 1))
    found = gae(rewards, values, [len(row) for row in rows], gamma=gamma, lam=lam)
    assert torch.allclose(found.advantages_A, torch.tensor(expected), atol=1e-4)
    assert torch.allclose(found.returns_A, found.advantages_A + values)


def test_gae_refuses_lengths_that_do_not_cover_the_tokens():
    with pytest.raises(AssertionError):
        gae(torch.zeros(3), torch.zeros(3), [2], gamma=1, lam=1)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8))
def test_policy_loss_equals_the_definition(rows):
    new, old, advantage = (torch.tensor([row[i] for row in rows]) for i in range(3))
    loss, clipped = policy_loss(new, old, advantage, clip=0.2)
    expected, count = 0.0, 0
    for n, o, a in rows:
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.2)
        expected -= min(ratio * a, bounded * a)
        count += bounded * a < ratio * a - 1e-5
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert abs(clipped.item() - count) <= sum(abs(a) < 1e-4 for _, _, a in rows)


def test_first_update_is_the_policy_gradient():
    """At ratio 1 the gradient is -A times the gradient of the log-probability."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -2.0])
    policy_loss(logprobs, logprobs.detach(), advantages, clip=0.2)[0].backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_value_loss():
    assert value_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 2.5


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5))
def test_moments_of_batches_equal_those_of_all_values(batches):
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    values = [value for batch in batches for value in batch]
    assert moments.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert moments.std == pytest.approx(statistics.pstdev(values), abs=1e-6)


def test_answer_logprobs_cover_the_answers_only():
    model = tiny_model()
    documents = [([5, 6, 7, 8], [False, False, True, True]), ([9, 10, 11], [False, True, True])]
    batch = pack_documents(documents)
    logprobs, entropy = answer_logprobs(model, batch)
    expected = []
    for ids, loss in documents:
        one = pack_documents([(ids, None)])
        from puyu.model.attention import PackedPlan

        logits = model(one.tokens_T, one.positions_T, PackedPlan.build([0], len(ids)))
        log = torch.log_softmax(logits, -1)
        expected += [log[i - 1, ids[i]].item() for i in range(len(ids)) if loss[i]]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
    assert entropy.shape == logprobs.shape and bool((entropy > 0).all())
