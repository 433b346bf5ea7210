"""`puyu plan`: counts against real models, memory against real steps, legal layouts against a naive twin, rows for the
shapes of InternLM."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from bench import plan_worker
from puyu.cli import plan_train
from puyu.cli.main import main
from puyu.model.config import ExpertShape, ModelConfig
from puyu.model.heads import CausalLM
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.schedules import plan as order
from puyu.train.layouts.schedules import timeline
from puyu.train.memory import MemoryConfig
from puyu.train.meter import work_of
from puyu.train.planning import calibrate
from puyu.train.planning.explain import refusals
from puyu.train.planning.job import Job, parameters
from puyu.train.planning.live import LiveBytes
from puyu.train.planning.memory import peak_of
from puyu.train.planning.search import LEVELS, layouts, search, shapes, usable
from puyu.train.planning.speed import DEVICES, Device, Passes, Rates, bubble_share, seconds_of
from tests.conftest import ROOT

TINY = {"vocab_size": 256, "hidden_size": 64, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2}
TINY |= {"intermediate_size": 176}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "num_kv_heads": 1},
        {"family": "internlm", "qkv_bias": True, "out_bias": True, "num_kv_heads": 4},
        {"family": "qwen3", "head_dim": 32},
        {"family": "mixtral", "experts": ExpertShape(count=4, per_token=2, size=48)},
        {
            "family": "qwen2_moe",
            "qkv_bias": True,
            "experts": ExpertShape(count=4, per_token=2, size=48, shared_size=80),
        },
    ],
)
def test_parameters_by_kind_are_those_of_the_model(changes):
    config = ModelConfig(**(TINY | changes))
    with torch.device("meta"):
        model = CausalLM(config)
    assert parameters(config).total() == sum(parameter.numel() for parameter in model.parameters())
    job = Job(config, 64, 64)
    whole = job.block(1) * 6 + parameters(config)["embedding"] + parameters(config)["head"] + 64  # the last norm
    assert whole == job.kinds.total() == job.held(1) + 64


def test_live_bytes_follow_storages():
    kept = torch.zeros(100)
    with LiveBytes([kept]) as live:
        assert live.now() == 400
        view = kept[10:]
        other = view + 1  # 360 more
        other.untyped_storage().resize_(0)
        del view
        big = torch.ones(1000)
        del big
        stretch = live.mark()
    assert (stretch.peak, stretch.stays) == (4000, 0) and stretch.work.products == 0
    with LiveBytes() as live:
        a = torch.ones(8, 16) @ torch.ones(16, 4)
        assert live.mark().work.products == 2 * 8 * 16 * 4 and a.shape == (8, 4)


CASES = [
    {"model": TINY, "rows": 2, "row": 128, "dtype": "float32", "settings": {}},
    {"model": TINY, "rows": 2, "row": 64, "dtype": "bfloat16", "settings": {"accumulate": 3}},
    {
        "model": TINY | {"vocab_size": 9000, "tie_embeddings": True},
        "rows": 1,
        "row": 96,
        "dtype": "float32",
        "settings": {},
    },
    {"model": TINY | {"num_layers": 1}, "rows": 4, "row": 64, "dtype": "float64", "settings": {}},
    {
        "model": TINY,
        "rows": 4,
        "row": 128,
        "dtype": "float32",
        "settings": {"memory": {"checkpoint": "full", "every": 2}, "accumulate": 2},
    },
    {
        "model": TINY,
        "rows": 4,
        "row": 128,
        "dtype": "float32",
        "settings": {"memory": {"checkpoint": "selective"}, "optim": {"kind": "muon"}},
    },
    {
        "model": TINY | {"family": "mixtral", "experts": ExpertShape(count=4, per_token=2, size=88)},
        "rows": 2,
        "row": 128,
        "dtype": "float32",
        "settings": {"optim": {"kind": "adamw8"}},
    },
]


@pytest.mark.parametrize("case", CASES)
def test_peak_of_live_bytes_is_the_measured_one(case, tmp_path):
    job, accumulate, checkpoint = plan_worker.job_of(case)
    said = peak_of(job, LayoutConfig(), accumulate=accumulate, checkpoint=checkpoint)
    found = plan_worker.measured(case, tmp_path, count=True)["peak"]
    assert said.total == pytest.approx(found, rel=0.03)
    assert sum(said.kinds.values()) == said.total


def naive_layouts(processes: int, heads: int, kv_heads: int, layers: int) -> set[tuple]:
    """Sizes and extents by the rules as a person would say them."""
    found = set()
    depth = {"replica": 0, "partial": 1, "full": 2}
    for tensor, sequence, pipeline in product(range(1, processes + 1), repeat=3):
        if processes % (tensor * sequence * pipeline) or kv_heads % tensor or pipeline > layers:
            continue
        peers = processes // (tensor * pipeline)
        for attention, schedule in product(("ulysses", "ring"), ("gpipe", "1f1b", "interleaved", "zero-bubble")):
            heads_fit = heads % (tensor * sequence) == 0 and (
                kv_heads // tensor % sequence == 0 or sequence % (kv_heads // tensor) == 0
            )
            if (sequence == 1 and attention == "ring") or (sequence > 1 and attention == "ulysses" and not heads_fit):
                continue
            if (pipeline == 1 and schedule != "1f1b") or (schedule == "interleaved" and 2 * pipeline > layers):
                continue
            for params, grads, states in product(depth, repeat=3):
                kinds = {params, grads, states}
                if peers == 1 and kinds != {"full"}:
                    continue  # all the same
                if "partial" in kinds and (peers < 4 or peers % 2):
                    continue
                if depth[params] > depth[states] or depth[grads] > depth[states]:
                    continue
                if params != "replica" and grads not in ("replica", params):
                    continue
                if schedule == "zero-bubble" and params != "replica" and peers > 1:
                    continue
                found.add((tensor, sequence, pipeline, attention, schedule, params, grads, states))
    return found


@pytest.mark.parametrize(("processes", "heads", "kv_heads", "layers"), [(8, 8, 2, 6), (4, 4, 4, 1), (6, 6, 3, 3)])
def test_legal_layouts_are_those_of_a_naive_twin(processes, heads, kv_heads, layers):
    sizes = {"vocab_size": 720, "hidden_size": 48, "intermediate_size": 720, "head_dim": 8}
    model = ModelConfig(num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, **sizes)
    refused = Counter()
    found = [
        (x.tensor, x.sequence, x.pipeline, x.attention, x.schedule, x.params, x.grads, x.states)
        for x in layouts(processes, Job(model, 64, 64), refused)
    ]
    assert len(found) == len(set(found)) and set(found) == naive_layouts(processes, heads, kv_heads, layers)
    assert refused.total() > 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_idle_share_is_that_of_the_schedule(schedule):
    layout = LayoutConfig(pipeline=4, schedule=schedule)
    spans = timeline(order(schedule, 4, 16, layout.virtual if schedule == "interleaved" else 1)).values()
    busy = sum(end - start for start, end in spans) / 4
    assert bubble_share(layout, 16) == pytest.approx(max(end for _, end in spans) / busy - 1, rel=1e-9)


def published(name: str) -> ModelConfig:
    shapes = {"1.8b": (2048, 24, 16, 8, 8192), "7b": (4096, 32, 32, 8, 14336), "20b": (6144, 48, 48, 8, 16384)}
    hidden, layers, heads, kv_heads, inner = shapes[name]
    return ModelConfig(
        vocab_size=92544, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        intermediate_size=inner,
    )  # fmt: skip


def test_rows_of_the_published_shapes():
    job = Job(published("7b"), 4096, 4194304)
    found = search(job, DEVICES["h100"], processes=8)
    best = found.best[0]
    assert best.peak.total < 80e9 and found.refused["memory: more than there is"]
    assert [row.seconds.total for row in found.best] == sorted(row.seconds.total for row in found.best)
    # 6 N + 12 L d T of 4,194,304 tokens on 8 x 989 TFLOP/s are 26.8 s: a step takes between 1.5 and 4 times that
    assert 1.5 < best.seconds.total / 26.8 < 4
    # weights, gradients and moments alone: 16 B x 7.74 B / 8
    assert best.peak.total > 15.4e9
    one = peak_of(Job(published("1.8b"), 4096, 4096), LayoutConfig(), accumulate=1)
    assert 16 * 1.889e9 < one.total < 80e9  # a single card holds it
    many = peak_of(Job(published("20b"), 4096, 64 * 4096), LayoutConfig(), processes=64)
    few = peak_of(Job(published("20b"), 4096, 16 * 4096), LayoutConfig(), processes=16)
    assert few.total - many.total == pytest.approx(16 * 19.86e9 * (1 / 16 - 1 / 64), rel=0.4)
    slow = seconds_of(job, LayoutConfig(), DEVICES["a100"], processes=8, accumulate=128).total
    assert slow > 2 * seconds_of(job, LayoutConfig(), DEVICES["h100"], processes=8, accumulate=128).total


@pytest.mark.parametrize(
    ("name", "gpus", "states"),
    [("internlm2_7b", 8, 15.4e9), ("internlm2_20b", 64, 5e9), ("internlm_104b", 1024, 1.6e9)],
)
def test_the_recipes_have_a_layout_that_fits(name, gpus, states):
    path = ROOT / "recipes" / f"{name}.yaml"
    given = plan_train._plan_options().parse_args([str(path), "--gpus", str(gpus)])
    job = plan_train.job_of(plan_train.read_config(path), given)
    found = search(job, DEVICES["h100"], processes=gpus, enough=1)
    pick, flops = found.best[0], work_of(job.model, outputs=job.model.vocab_size).flops(job.row)
    assert states < pick.peak.total < usable(80e9, DEVICES["h100"])
    assert sum(pick.peak.kinds.values()) == pick.peak.total
    ideal = job.batch_tokens * flops / (gpus * 989e12)
    assert 1.5 < pick.seconds.total / ideal < 4  # between 25 % and 67 % of the card's peak
    assert pick.layout.tensor <= 8 and (pick.checkpoint == "none") == ("memory.checkpoint" not in pick.words)
    assert gpus < 1024 or pick.checkpoint != "none"
    lines = list(refusals(found.refused))
    assert len(lines) <= 4 and all(line.startswith("refused ") for line in lines)
    assert sum(int(line.split()[1]) for line in lines) == found.refused.total()


def test_levels_of_recomputed_activations_save_memory_and_cost_time():
    job = Job(published("7b"), 4096, 4 * 4096)
    how = {"processes": 4, "accumulate": 1}
    none, selective, full = (peak_of(job, LayoutConfig(), **how, checkpoint=level).total for level in LEVELS)
    assert none > selective + 10e9 > full + 15e9
    times = [seconds_of(job, LayoutConfig(), DEVICES["h100"], **how, checkpoint=level).total for level in LEVELS]
    assert times == sorted(times) and times[2] < 1.4 * times[0]
    hosted = replace(job, memory=MemoryConfig(offload=True))
    assert peak_of(hosted, LayoutConfig(), **how).total < none - 20e9
    assert seconds_of(hosted, LayoutConfig(), DEVICES["h100"], **how).total > times[0]


def test_a_measured_step_is_the_sum_of_its_calls():
    """Passes of 1 s a block, collectives of 1 s and 1 s a megabyte: what each layout is made of, by hand."""
    job = Job(ModelConfig(**TINY), 64, 128, torch.float32, cpu=True)
    talk = {what: [(0.0, 1.0), (1e6, 2.0)] for what in ("gather", "scatter", "sum", "exchange", "send")}
    passes = Passes(1.0, (2.0, 3.0), (0.0, 0.0), (4.0, 4.0))
    rates = Rates(dict.fromkeys(((1, 64), (1, 128), (2, 128)), passes), talk, update=0.0, copy=1e30, size=2)
    device = Device("cpu", *(0.0,) * 8, capacity=1e9, group=1 << 20, rates=rates)

    def step(**layout):
        return seconds_of(job, LayoutConfig(**layout), device, processes=2, accumulate=1)

    whole, table = 4 * job.held(1) / 1e6, 4 * 256 * 64 / 1e6  # megabytes
    replica = {"params": "replica", "grads": "replica"}
    assert step().products == 6 * 3 + 4
    assert step().communication == pytest.approx(7 + 7 + 7 + 3 * whole - 2 * table)
    assert step(**replica, states="replica").communication == pytest.approx(6 * 7 + whole)
    assert step(**replica).communication == pytest.approx(2 * 6 * 7 + 2 * whole)
    hidden = 128 * 64 * 4 / 1e6
    assert step(tensor=2).communication == pytest.approx(2 * (4 * 6 + 2) * (1 + hidden))
    assert rates.seconds("sum", 5e5) == 1.5 and rates.seconds("sum", 3e6) == 4.0


def test_a_cpu_is_measured_by_all_processes():
    job = Job(ModelConfig(**TINY), 64, 128, torch.float32, cpu=True)
    device = calibrate.cpu(job, sizes := shapes(job, 2), processes=2, capacity=1e9)
    rates = device.rates
    assert rates.size == 2 and set(rates.passes) == sizes == {(1, 64), (1, 32), (2, 128), (2, 64)}
    assert all(
        part.forward > 0 and min(*part.backward, *part.embedding, *part.head) > 0 for part in rates.passes.values()
    )
    assert all(seconds > 0 for points in rates.talk.values() for _, seconds in points) and 0 < rates.alone <= 1
    assert rates.seconds("sum", 1 << 25) > rates.seconds("sum", 1 << 12)
    assert {row.layout.tensor for row in search(job, device, processes=2, enough=1000).best} == {1, 2}


def test_the_command(capsys):
    recipe = str(ROOT / "recipes" / "internlm2_7b.yaml")
    assert main(["plan", recipe, "--gpus", "2", "--device", "h200", "--json", "--set", "batch_tokens=131072"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["pick"] == value["best"][0] and value["pick"]["memory"]["peak"] < 141e9
    assert sum(v for k, v in value["pick"]["seconds"].items() if k != "step") == pytest.approx(
        value["pick"]["seconds"]["step"]
    )
    assert main(["plan", recipe, "--gpus", "1", "--memory", "40", "--set", "batch_tokens=8192"]) == 1
    assert "nothing fits\nthe least is" in capsys.readouterr().out
    assert main(["plan", recipe, "--gpus", "2", "--phase", "9"]) != 0
    assert "has 3 phases" in capsys.readouterr().err
    small = ["--set", "batch_tokens=8192", "--set", "model.num_layers=4", "--set", "model.hidden_size=512"]
    assert main(["plan", recipe, "--gpus", "2", "--explain", *small]) == 0
    text = capsys.readouterr().out
    assert "a block keeps" in text and "refused" in text and "pick:" in text
