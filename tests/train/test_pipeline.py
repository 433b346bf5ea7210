"""Pipelines on 2 and 4 processes against one process: losses, norms, weights, saved states, evaluation, pretraining."""

import itertools
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from puyu.configure import build
from puyu.data.packing import pack_documents
from puyu.dist import world
from puyu.errors import ConfigError
from puyu.files import read_json
from puyu.model.config import ExpertShape
from puyu.train import pretrain, state
from puyu.train.layouts import LayoutConfig, make_layout
from puyu.train.layouts.shares import Dim
from puyu.train.layouts.stages import LateWeights, add_products, costs, cut
from puyu.train.layouts.tensor import slice_model
from puyu.train.objectives import lm_loss, ranking_loss
from puyu.train.optim import OptimConfig
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

SHAPE = {"num_layers": 8, "hidden_size": 8, "intermediate_size": 16}
OPTIM = OptimConfig(lr=0.01, warmup=2, clip=0.5)
REPLICA = {"params": "replica", "grads": "replica"}
CASES = {
    2: {
        "gpipe": {"pipeline": 2, "schedule": "gpipe"},
        "1f1b-tied": {"pipeline": 2},
        "interleaved-tied": {"pipeline": 2, "schedule": "interleaved", "virtual": 3},
        "zero-bubble": {"pipeline": 2, "schedule": "zero-bubble"},
        "resumed-tied": {"pipeline": 2},
    },
    4: {
        "gpipe-tied": {"pipeline": 4, "schedule": "gpipe"},
        "1f1b": {"pipeline": 4},
        "interleaved": {"pipeline": 4, "schedule": "interleaved"},
        "zero-bubble-tied": {"pipeline": 4, "schedule": "zero-bubble"},
        "data-sharded-tied": {"pipeline": 2},
        "data-interleaved": {"pipeline": 2, "schedule": "interleaved", "grads": "replica"},
        "data-zero1-tied": {"pipeline": 2, "schedule": "zero-bubble", **REPLICA},
        "data-zero2": {"pipeline": 2, "schedule": "zero-bubble", "params": "replica"},
        "tensor-tied": {"pipeline": 2, "tensor": 2, "schedule": "interleaved"},
        "tensor-zero-bubble": {"pipeline": 2, "tensor": 2, "schedule": "zero-bubble"},
        "ring-tied": {"pipeline": 2, "sequence": 2, "attention": "ring"},
        "sparse": {"pipeline": 2, "expert": 2},
        "sparse-zero-bubble": {"pipeline": 2, "expert": 2, "schedule": "zero-bubble", **REPLICA},
    },
}
EXPERTS = {"family": "mixtral", "experts": ExpertShape(count=4, per_token=2, size=8)}
DTYPES = [torch.float64, torch.bfloat16]
SHAPES = ("free", "tied", "sparse")


def shape_of(name: str) -> str:
    return next((shape for shape in SHAPES if shape in name), "free")


def trained(out: Path, shape: str, **layout) -> dict:
    """Two steps of four micro-batches of unequal documents, saved, and an evaluation."""
    model = toys.model(tie_embeddings=shape == "tied", **SHAPE, **(EXPERTS if shape == "sparse" else {}))
    whole = sum(parameter.numel() for parameter in model.parameters())
    config = TrainerConfig(steps=2, optim=OPTIM, accumulate=4, layout=LayoutConfig(**layout), checkpoint_every=1)
    trainer = Trainer(model, lm_loss, toys.source(tokens_per_batch=50), config, out=out)
    rows = []
    trainer.on_step = lambda done, metrics: rows.append([metrics["loss"], metrics["grad_norm"], metrics["tokens"]])
    trainer.fit()
    reader, docs = trainer.reader, [toys.documents(5, seed=seed) for seed in range(3)]
    sums = trainer.evaluate(pack_documents(group[reader.rank :: reader.size]) for group in docs)
    share = sum(parameter.numel() for parameter in model.parameters()) / whole
    return {"rows": rows, "sums": sums, "share": share, "weights": trainer.full_weights()}


def pretrained(root: Path, out: Path, **layout) -> dict:
    config = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE, "heldout": 0.1}
    config |= {"phases": [{"steps": 2, "seq_len": 64}, {"steps": 2, "seq_len": 128, "rope_theta": 5e4}]}
    config |= {"batch_tokens": 256, "accumulate": 2, "dtype": "float64", "device": "cpu", "layout": layout}
    return pretrain.run(build(pretrain.PretrainConfig, config), out=out)


def work(rank: int, size: int, port: int, root: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with world(torch.device("cpu")):
        trained_by(rank, size, root)


def trained_by(rank: int, size: int, root: str) -> None:
    for name, layout in CASES[size].items():
        if "resumed" in name and rank == 0:  # after the step that one process has saved
            step = Path(state.FOLDER) / "step-00000001"
            shutil.copytree(Path(root) / f"one-{shape_of(name)}" / step, Path(root) / name / step)
        dist.barrier()
        found = trained(Path(root) / name, shape_of(name), **layout)
        torch.save(found, Path(root) / f"{name}-{rank}.pt")
    if size == 2:
        pretrained(Path(root), Path(root) / "pretrain", pipeline=2)
        with pytest.raises(ConfigError, match=r"layout\.pipeline=2: only a language model's own loss(.|\n)*pipeline=1"):
            make_layout(LayoutConfig(pipeline=2), toys.model(), ranking_loss(), device=torch.device("cpu"))
        layout = make_layout(LayoutConfig(pipeline=2), toys.model(), lm_loss, device=torch.device("cpu"))
        layout.make_optimizer(OPTIM)
        layout.backward([toys.source().next_batch()])
        assert not layout.bad_gradient()
        if rank == 1:
            layout.shares[-1].update.grad.fill_(torch.nan)
        assert layout.bad_gradient() == "head.weight"  # on both processes
        model = toys.model(dtype=torch.float32)
        model.set_compute_dtype(torch.bfloat16)
        layouts, out = {"pipeline": 2, "schedule": "interleaved", "virtual": 1}, Path(root) / "whole"
        trainer = Trainer(
            model, lm_loss, toys.source(), TrainerConfig(steps=1, layout=LayoutConfig(pipeline=2)), out=out
        )
        weights = trainer.full_weights()
        with trainer.whole_model() as copy:  # no wider than it computes
            assert (copy is None) == bool(rank)
            for name, value in copy.state_dict().items() if copy else ():
                assert value.dtype == torch.bfloat16 and torch.equal(value, weights[name].bfloat16())
        with pytest.raises(ConfigError, match=r"accumulate 1 is not a multiple of layout.pipeline 2"):
            Trainer(
                toys.model(), lm_loss, toys.source(), TrainerConfig(steps=1, layout=LayoutConfig(**layouts)), out=out
            )
        many = LayoutConfig(pipeline=2, schedule="interleaved", virtual=2)
        with pytest.raises(ConfigError, match=r"pipeline=2 makes 4 chunks of 2 layers(.|\n)*virtual"):
            make_layout(many, toys.model(), lm_loss, device=torch.device("cpu"))
    else:
        with pytest.raises(ConfigError, match=r"zero-bubble with sharded weights(.|\n)*params=replica"):
            zero = LayoutConfig(pipeline=2, schedule="zero-bubble")
            make_layout(zero, toys.model(), lm_loss, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Inputs, what one process makes of them, and what 2 and 4 make."""
    root = tmp_path_factory.mktemp("pipeline")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    pretrained(root, root / "alone")
    for shape in SHAPES:
        torch.save(trained(root / f"one-{shape}", shape), root / f"one-{shape}.pt")
    for size in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, args=(size, port, str(root)), nprocs=size)
    return root


@pytest.fixture(scope="module")
def alone(root):
    return {shape: (torch.load(root / f"one-{shape}.pt"), root / f"one-{shape}") for shape in SHAPES}


def close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_equals_one_process(root, alone, size, name):
    one, folder = alone[shape_of(name)]
    found = [torch.load(root / f"{name}-{rank}.pt") for rank in range(size)]
    for result in found:
        assert result["sums"] == pytest.approx(one["sums"], abs=1e-10)
        wanted = one["rows"][1:] if "resumed" in name else one["rows"]
        for row, of_one in zip(result["rows"], wanted, strict=True):
            assert row == pytest.approx(of_one, abs=1e-10)
    close(found[0]["weights"], one["weights"])
    assert not found[1]["weights"]
    close(*(dict(state.State(state.saved(out)[0]).tensors()) for out in (root / name, folder)))
    if not {"tensor", "expert"} & CASES[size][name].keys():  # weights of other stages are not held
        copies = size // CASES[size][name]["pipeline"]
        shared = 50 * 8 / sum(value.numel() for value in one["weights"].values()) if "tied" in name else 0
        assert sum(result["share"] for result in found) == pytest.approx(copies * (1 + shared))


def test_pretraining_in_two_stages_gives_the_losses_of_one_process(root):
    assert toys.losses(root / "pretrain") == pytest.approx(toys.losses(root / "alone"), abs=1e-10)
    close(*(load_file(root / name / "model.safetensors") for name in ("pretrain", "alone")))
    found, one = (read_json(root / name / "train_state" / "result.json")["numbers"] for name in ("pretrain", "alone"))
    for language, row in one["heldout"].items():
        assert found["heldout"][language] == pytest.approx(row, abs=1e-10)
    assert found["parameters"] == one["parameters"]


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True])
def test_late_gradients_of_weights_are_bitwise_those_of_one_pass(compute, sliced):
    master = torch.float64 if compute == torch.float64 else torch.float32
    batch = toys.source().next_batch()
    plain, late = (toys.model(dtype=master, qkv_bias=True, out_bias=True) for _ in range(2))
    left, lists = LateWeights(), []
    for model in (plain, late):
        model.set_compute_dtype(compute)
        if sliced:  # the modules of tensor parallelism, with one process
            slice_model(model, Dim())
    with left.installed(late):
        for _ in range(2):
            lm_loss(plain, batch).loss_sum.backward()
            lm_loss(late, batch).loss_sum.backward()
            lists.append(left.take())
    waiting = [name for name, parameter in late.named_parameters() if parameter.grad is None]
    assert len(waiting) == 8 and all("norm" not in name for name in waiting)
    for products in lists:
        add_products(products)
    for one, two in zip(plain.parameters(), late.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert "forward" not in vars(late.trunk.layers[0].mlp.down)


def test_tensor_peers_cut_alike():
    """163 words in two slices, 82 rows and 81; a block costs what 82 rows do, so the fewer would move the cut."""
    cuts = []
    for rank in range(2):
        model = toys.model(vocab_size=163, num_layers=4, intermediate_size=36, qkv_bias=True, out_bias=True)
        slice_model(model, Dim(rank, 2))
        cuts.append(cut(costs(model, slices=2), parts=2))
    assert cuts[0] == cuts[1]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_cuts_are_the_most_even(parts):
    costs = [3.0, 1.0, 1.0, 4.0, 1.0, 5.0]

    def largest(bounds):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *bounds, len(costs))))

    ranges = cut(costs, parts=parts)
    assert [layer for part in ranges for layer in part] == list(range(len(costs))) and len(ranges) == parts
    best = min(largest(bounds) for bounds in itertools.combinations(range(1, len(costs)), parts - 1))
    assert largest([part.start for part in ranges[1:]]) == best
