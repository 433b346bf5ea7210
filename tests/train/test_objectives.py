"""Losses against torch's own cross-entropy, one-by-one documents, and the anchors of the focal ranking loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from puyu.data.packing import Pair, pack_documents, pack_pairs
from puyu.model.attention import PackedPlan
from puyu.model.heads import ScalarModel
from puyu.model.init import init_weights
from puyu.train import objectives
from puyu.train.native import load
from puyu.train.objectives import (
    barrier,
    focal_ranking,
    hidden_states,
    lm_loss,
    noisy,
    pair_losses,
    ranking_loss,
    token_losses,
)
from tests.train import toys


def naive_loss(model, batch):
    """Full logits, torch's cross-entropy, weights, sum."""
    plan = PackedPlan.build(batch.starts_S, batch.num_tokens)
    logits = model(batch.tokens_T, batch.positions_T, plan)
    return (F.cross_entropy(logits, batch.targets_T, reduction="none") * batch.weights_T).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_lm_loss_and_gradients_equal_full_logits(monkeypatch, tied, chunk_bytes):
    monkeypatch.setattr(objectives, "CPU_CHUNK_BYTES", chunk_bytes)
    batch = pack_documents(toys.documents(20))
    ours, plain = (toys.model(tie_embeddings=tied) for _ in range(2))
    output = lm_loss(ours, batch)
    (output.loss_sum * 3).backward()
    expected = naive_loss(plain, batch)
    (expected * 3).backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert output.weight_sum.item() == batch.weights_T.sum().item()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_fractional_weights_scale_each_token():
    batch = pack_documents(toys.documents(5))
    weights = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0)) * batch.weights_T
    batch = type(batch)(batch.tokens_T, batch.positions_T, batch.targets_T, weights, batch.starts_S)
    model = toys.model()
    assert lm_loss(model, batch).loss_sum.item() == pytest.approx(naive_loss(model, batch).item(), rel=1e-12)


def test_packed_equals_one_by_one():
    docs = toys.documents(15)
    model = toys.model(dtype=torch.float32)
    packed = lm_loss(model, pack_documents(docs))
    singles = [lm_loss(model, pack_documents([doc])) for doc in docs]
    assert packed.loss_sum.item() == pytest.approx(sum(s.loss_sum.item() for s in singles), rel=1e-6)
    assert packed.weight_sum.item() == sum(s.weight_sum.item() for s in singles)


def test_extreme_logits_neither_overflow_nor_underflow():
    hidden = torch.tensor([[1000.0], [-1000.0], [0.0]])
    head, targets, weights = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([1, 1, 2]), torch.ones(3)
    total, losses = objectives.chunked_cross_entropy(hidden.requires_grad_(), head, targets, weights)
    expected = F.cross_entropy(hidden.detach() @ head.T, targets, reduction="none")
    assert losses.tolist() == pytest.approx(expected.tolist()) and losses[0].item() == 2000
    total.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", [True, False])
def test_the_softmax_step_is_that_of_float64(monkeypatch, dtype, native):
    if native and load() is None:
        pytest.skip("the native loss was not built")
    if not native:
        monkeypatch.setattr(objectives, "softmax_step", lambda *_, **__: None)
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3001, generator=draw) * 9).to(dtype)
    logits[2, :5] = torch.tensor([-torch.inf, -3e38, -200.0, 80.0, 0.0])
    logits[3, 7] = torch.nan
    targets, weights = torch.randint(3001, (7,), generator=draw), torch.rand(7, generator=draw)
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none") * weights
    wanted.sum().backward()
    for learns in (False, True):
        found, grad = objectives._softmax_step(logits, targets, weights, learns=learns)
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    bound = {"rtol": 4e-3, "atol": 1e-9} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-9}
    good = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(grad[good].double(), exact.grad[good], **bound)


def test_logits_exist_only_where_something_is_learned(monkeypatch):
    seen = []
    original = objectives._softmax_step

    def spy(logits_CV, *rest, **named):
        seen.append(len(logits_CV))
        return original(logits_CV, *rest, **named)

    monkeypatch.setattr(objectives, "_softmax_step", spy)
    batch = pack_documents([(range(10), [False] * 7 + [True] * 3), (range(5), None)])
    lm_loss(toys.model(), batch)
    assert sum(seen) == 3 + 4


def test_a_batch_without_weight_has_zero_loss_and_zero_gradients():
    model = toys.model()
    output = lm_loss(model, pack_documents([]))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and output.weight_sum.item() == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_token_losses_are_the_parts_of_the_sum():
    model, batch = toys.model(), pack_documents(toys.documents(6))
    parts = token_losses(model, batch)
    assert parts.shape == (batch.num_tokens,) and not parts.requires_grad
    assert parts.sum().item() == pytest.approx(lm_loss(model, batch).loss_sum.item(), rel=1e-12)


def test_anchor_at_zero_scores():
    zero = torch.zeros(3)
    expected = math.log(2) - 0.02 * 2 * math.log(5)
    assert pair_losses(zero, zero).tolist() == pytest.approx([expected] * 3, abs=1e-6)
    assert expected == pytest.approx(0.6288, abs=5e-5)


@pytest.mark.parametrize(("gamma", "margin"), [(2.0, 2.99), (0.0, 5.69)])
def test_anchor_of_the_best_margin_of_a_separable_pair(gamma, margin):
    score = torch.linspace(0, 4.8, 48001, dtype=torch.float64)
    best = score[pair_losses(score, -score, gamma=gamma).argmin()].item()
    assert 2 * best == pytest.approx(margin, abs=0.01)


def test_focal_weight_is_one_where_the_order_is_wrong_and_fades_where_it_is_right():
    margin = torch.tensor([-3.0, -0.1, 0.0, 2.0, 6.0], dtype=torch.float64)
    p = torch.sigmoid(margin)
    expected = [-((1 - 2 * max(0.0, q - 0.5)) ** 2) * math.log(q) for q in p.tolist()]
    assert focal_ranking(margin, gamma=2.0).tolist() == pytest.approx(expected, rel=1e-12)
    assert focal_ranking(margin[:3], gamma=2.0).tolist() == pytest.approx((-p[:3].log()).tolist())


def test_barrier_gradient_inside_and_its_c1_continuation_outside():
    x = torch.tensor([-4.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    barrier(x).sum().backward()
    torch.testing.assert_close(x.grad, (2 * x / (25 - x**2)).detach())
    edge, slope = 4.9, 2 * 4.9 / (25 - 4.9**2)
    around = torch.tensor([edge - 1e-7, edge + 1e-7, 7.0, -9.0], dtype=torch.float64, requires_grad=True)
    value = barrier(around)
    value.sum().backward()
    assert value[0].item() == pytest.approx(value[1].item(), abs=1e-5)
    assert around.grad.tolist() == pytest.approx([slope, slope, slope, -slope], rel=1e-4)
    assert value[2].item() - value[1].item() == pytest.approx(slope * (7 - edge), rel=1e-4)


def scalar_model():
    model = ScalarModel(toys.model().config)
    init_weights(model, seed=0, std=0.1)
    return model.double()


def test_a_new_reward_model_starts_at_the_anchor_and_learns():
    model = scalar_model()
    batch = pack_pairs([Pair([1, 2, 49], [1, 3, 4, 49]), Pair([5, 49], [6, 49])])
    first = ranking_loss()(model, batch)
    assert first.loss_sum.item() / 2 == pytest.approx(0.6288, abs=5e-5)
    assert first.weight_sum.item() == 2 and first.metrics["accuracy"].item() == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        ranking_loss()(model, batch).loss_sum.backward()
        optimizer.step()
    assert ranking_loss()(model, batch).metrics["accuracy"].item() == 2


def test_ranking_scores_do_not_depend_on_neighbors():
    model = scalar_model()
    torch.nn.init.normal_(model.head.weight)
    pairs = [Pair([1, 2, 49], [1, 3, 4, 49]), Pair([5, 49], [6, 49])]
    both = ranking_loss()(model, pack_pairs(pairs)).loss_sum.item()
    assert both == pytest.approx(sum(ranking_loss()(model, pack_pairs([p])).loss_sum.item() for p in pairs), rel=1e-10)


def test_a_margin_is_what_the_scores_must_be_apart():
    zero, two = torch.zeros(1), torch.full((1,), 2.0)
    plain = {"gamma": 0.0, "penalty": 0.0}
    assert pair_losses(two, zero, margin_S=2.0, **plain).item() == pytest.approx(math.log(2))
    assert pair_losses(two, zero, **plain).item() == pytest.approx(math.log(1 + math.exp(-2)))
    model = scalar_model()
    torch.nn.init.normal_(model.head.weight)
    ways = [ranking_loss()(model, pack_pairs([Pair([1, 2, 49], [3, 49], margin=m)])) for m in (0.0, 1.5)]
    apart = ways[0].metrics["margin"]
    assert torch.equal(apart, ways[1].metrics["margin"]), "scores are reported as they are"
    rest = [way.loss_sum - focal_ranking(apart - m, gamma=2.0) for way, m in zip(ways, (0.0, 1.5), strict=True)]
    torch.testing.assert_close(rest[0], rest[1])


def test_a_rank_without_pairs_still_has_a_graph():
    model = scalar_model()
    output = ranking_loss()(model, pack_pairs([]))
    output.loss_sum.backward()
    assert output.weight_sum.item() == 0 and set(output.metrics) == {"accuracy", "margin"}
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_noise_is_that_of_neftune_on_each_document_and_in_training_only():
    """The embedding's output as a block sees it: uniform in +-alpha / sqrt(L D), anew in each pass."""
    model, docs, seen = toys.model(), [list(range(4)), list(range(25))], []
    batch = pack_documents([(doc, None) for doc in docs])
    plain = model.trunk.embedding(batch.tokens_T)
    model.trunk.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[:29]))
    objective = noisy(lm_loss, 5.0)
    torch.manual_seed(0)
    loss = objective(model, batch).loss_sum
    loss.backward()
    objective(model, batch)
    noise = [one - plain.detach() for one in seen]
    for cut, length in ((slice(0, 4), 4), (slice(4, 29), 25)):
        bound = 5.0 / math.sqrt(length * 16)
        assert 0.9 * bound < noise[0][cut].abs().max() <= bound
    assert not torch.equal(*noise) and abs(float(noise[0].mean())) < 0.1
    with torch.no_grad():
        quiet = objective(model, batch).loss_sum
    model.eval()
    assert quiet == lm_loss(model, batch).loss_sum == objective(model, batch).loss_sum != loss
    assert not model.trunk.embedding._forward_hooks
    assert torch.isfinite(hidden_states(model, batch)).all()
