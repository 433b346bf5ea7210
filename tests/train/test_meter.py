"""Numbers of a step against exact arithmetic and naive computations."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from puyu.data.mix import Mixture
from puyu.data.packing import PretrainSource
from puyu.device import table_peak
from puyu.model.attention import PackedPlan
from puyu.model.config import ExpertShape, ModelConfig
from puyu.train.meter import Meter, work_of
from puyu.train.objectives import lm_loss, means
from puyu.train.optim import PARTS, part_of
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shape(hidden, layers, heads, kv_heads, inner):
    sizes = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "intermediate_size": inner}
    return ModelConfig(vocab_size=92544, hidden_size=hidden, **sizes)


@pytest.mark.parametrize(
    ("config", "giga", "causal"),
    [(shape(2048, 24, 16, 8, 8192), 12.61, 11.41), (shape(4096, 32, 32, 8, 14336), 50.6, 47.4)],
)
def test_flops_of_internlm2_are_the_published_shapes(config, giga, causal):
    work = work_of(config, outputs=config.vocab_size)
    assert work.flops(4096) / 1e9 == pytest.approx(giga, rel=1e-3)
    assert work.flops(4096, causal=True) / 1e9 == pytest.approx(causal, rel=1e-3)


def test_n_counts_the_matrices_that_a_token_meets():
    model = toys.model(tie_embeddings=True)
    assert work_of(model.config, outputs=50).parameters == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    untied = toys.model()
    embedding = untied.trunk.embedding.weight.numel()
    total = sum(p.numel() for p in untied.parameters() if p.ndim == 2)
    assert work_of(untied.config, outputs=50).parameters == total - embedding
    experts = ExpertShape(count=4, per_token=2, size=8, shared_size=24, dense_layers=(1,))
    sparse = toys.model(family="qwen2_moe", experts=experts)
    met = {name: p.numel() for name, p in sparse.named_parameters() if p.ndim == 2 and "embedding" not in name}
    idle = sum(count for name, count in met.items() if ".experts.2." in name or ".experts.3." in name)
    assert work_of(sparse.config, outputs=50).parameters == sum(met.values()) - idle


def test_a_sliding_window_bounds_the_attention():
    config = ModelConfig(vocab_size=10, family="mistral", windows=(0, 64), **toys.SHAPE)
    work = work_of(config, outputs=10)
    assert work.flops(256) - 6 * work.parameters == 12 * 16 * (256 + 64)
    assert work.flops(32) - 6 * work.parameters == 12 * 16 * (32 + 32)


def test_mfu_by_exact_arithmetic(capsys):
    meter = Meter(toys.model(), torch.device("cpu"), peak_tflops=0.5)
    meter.enter(64)
    parameters = 2 * (16 * 48 + 3 * 16 * 32) + 16 * 50
    found = meter.rates(1000, 0.25)
    assert (found["seconds"], found["tokens_per_s"], found["tokens_per_s_process"]) == (0.25, 4000.0, 4000.0)
    assert meter.work.flops(64) == 6 * parameters + 12 * 2 * 16 * 64
    meter.peak = 1e9
    found = meter.rates(1000, 0.25)
    assert found["mfu"] == round(4000 * (6 * parameters + 12 * 2 * 16 * 64) / 1e9, 5)
    assert found["mfu_causal"] == round(4000 * (6 * parameters + 6 * 2 * 16 * 64) / 1e9, 5)
    said = capsys.readouterr().err
    assert f"N {parameters:,} (products, output head included), L 2, d 16, T 64" in said
    assert "peak 500 GFLOP/s (peak_tflops)" in said
    meter.enter(64)
    assert capsys.readouterr().err == ""  # only what is new is said


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peaks_are_dense(name, tera):
    assert table_peak(name) == tera * 1e12


def test_an_unknown_device_has_no_row():
    assert table_peak("NVIDIA H1000") is None and table_peak("Quadro A1000") is None


def test_the_spans_of_a_step_are_named_and_fit_into_it(tmp_path):
    config = TrainerConfig(steps=3, checkpoint_every=2)
    Trainer(toys.model(), lm_loss, toys.source(), config, out=tmp_path).fit()
    spans = ("time/data", "time/backward", "time/reduce", "time/update")
    for row in rows(tmp_path):
        assert sum(row[name] for name in spans) <= row["seconds"] and row["memory_gib"] > 0
    assert ["time/save" in row for row in rows(tmp_path)] == [False, False, True]  # of what came before the row


class Shard:
    """Documents in memory."""

    def __init__(self, docs):
        self.docs, self.num_docs = docs, len(docs)
        self.num_tokens = sum(len(ids) for ids, _ in docs)
        self.longest = max(len(ids) for ids, _ in docs)

    def length(self, index):
        return len(self.docs[index][0])

    def doc(self, index):
        import numpy as np

        ids, loss = self.docs[index]
        return np.array(ids), np.array(loss)


def sourced():
    """Two sources in one stream; documents of `b` hold only high ids, so that a token betrays its source."""
    low = [([i % 25 for i in ids], loss) for ids, loss in toys.documents(20)]
    high = [([25 + i % 25 for i in ids], loss) for ids, loss in toys.documents(20, seed=1)]
    shards = {"b": Shard(high), "a": Shard(low), "none": Shard(low)}
    return PretrainSource(shards, Mixture(shards, {"a": 3, "b": 1}, seed=0), seq_len=32, rows=3)


def test_losses_by_source_equal_a_naive_computation(tmp_path):
    config = TrainerConfig(steps=4, accumulate=2)
    trainer = Trainer(toys.model(), lm_loss, sourced(), config, out=tmp_path)
    twin, found = sourced(), []

    def naive(step):
        sums = {"a": [0.0, 0.0], "b": [0.0, 0.0]}
        for batch in (twin.next_batch(), twin.next_batch()):
            plan = PackedPlan.build(batch.starts_S, batch.num_tokens)
            with torch.no_grad():
                logits = trainer.model(batch.tokens_T, batch.positions_T, plan)
                each = F.cross_entropy(logits, batch.targets_T, reduction="none")
            for token, loss, weight in zip(batch.tokens_T, each, batch.weights_T, strict=True):
                total = sums["a" if token < 25 else "b"]
                total[0] += float(loss * weight)
                total[1] += float(weight)
        found.append(sums)

    trainer.before_step = naive
    trainer.fit()
    for row, sums in zip(rows(tmp_path), found, strict=True):
        assert not any(name.startswith("weight") or name.endswith("none") for name in row)
        for name, (loss, weight) in sums.items():
            assert row[f"loss/{name}"] == pytest.approx(loss / weight, abs=1e-12)
        total = sum(loss for loss, _ in sums.values()) / sum(weight for _, weight in sums.values())
        assert row["loss"] == pytest.approx(total, abs=1e-12)


def test_means_divide_by_their_own_weight():
    sums = {"loss": 6.0, "weight": 3.0, "loss/a": 4.0, "weight/a": 2.0, "loss/b": 0.0, "weight/b": 0.0, "acc/c": 1.5}
    assert means(sums) == {"loss": 2.0, "loss/a": 2.0, "acc/c": 0.5}


def test_norms_by_part_are_those_of_the_averaged_gradient(tmp_path):
    seen = {}

    def objective(model, batch):
        output = lm_loss(model, batch)
        grads = torch.autograd.grad(output.loss_sum / output.weight_sum, list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            seen.setdefault(part_of(name), []).append(grad.flatten())
        return lm_loss(model, batch)

    config = TrainerConfig(steps=1, group_norms_every=1)
    Trainer(toys.model(), objective, toys.source(), config, out=tmp_path).fit()
    (row,) = rows(tmp_path)
    assert set(seen) == {"embedding", "blocks", "norms", "head"} < set(PARTS)
    for part, grads in seen.items():
        assert row[f"grad_norm/{part}"] == pytest.approx(float(torch.cat(grads).norm()), rel=1e-9)
    parts = [value for name, value in row.items() if name.startswith("grad_norm/")]
    assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-9)
