"""Every layout against one process, in float64: losses, weights and moments, then on in another layout."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from puyu.dist import current_world
from puyu.errors import ConfigError, TrainingError
from puyu.files import read_json, write_json
from puyu.model.config import ExpertShape
from puyu.model.layers import RMSNorm
from puyu.model.linear import Linear
from puyu.model.packed import PackedPlan
from puyu.train.layouts import LayoutConfig, make_layout, place
from puyu.train.layouts.certify import DENSE, REPLICA, Case, advance, batches, make_model, spawn, start
from puyu.train.layouts.comm import Lane
from puyu.train.layouts.ring import RingPlan
from puyu.train.layouts.shares import Dim
from puyu.train.layouts.tensor import slice_model
from puyu.train.objectives import lm_loss, ranking_loss
from puyu.train.optim import OptimConfig
from puyu.train.pieces import Piece, gather_whole
from tests.train import toys

TIED = DENSE.with_(tie_embeddings=True, vocab_size=67)
FIRST = DENSE.with_(family="internlm", vocab_size=65, num_kv_heads=8, qkv_bias=True, out_bias=True)
BIASED = DENSE.with_(family="qwen3", qkv_bias=True, out_bias=True, mlp_bias=True)
WINDOWS = DENSE.with_(family="mistral", windows=(6, 0), num_kv_heads=2)
SPARSE = DENSE.with_(
    family="qwen2_moe",
    qkv_bias=True,
    experts=ExpertShape(count=4, per_token=2, size=24, shared_size=16, normalize=False, dense_layers=(1,)),
)
ZERO = REPLICA | {"states": "full"}
TWOS = {"params": "partial", "grads": "partial", "states": "partial", "shard_size": 2}
RING = {"sequence": 2, "attention": "ring"}

CASES = (
    Case("tied, states in rows", 4, ZERO | {"grads": "full"}, TIED, 2),
    Case("tied, sharded in twos, states in fours", 4, TWOS | {"states": "full"}, TIED, 2),
    Case("tied, gradients in twos, states in fours", 4, ZERO | {"grads": "partial", "shard_size": 2}, TIED),
    Case("tied, tensor, all sharded", 4, {"tensor": 2}, TIED, 2),
    Case("tied, pipeline, tensor", 4, {"pipeline": 2, "tensor": 2}, TIED, 2),
    Case("first, tensor", 4, {"tensor": 4} | REPLICA, FIRST),
    Case("first, all sharded", 4, {"grads": "replica"}, FIRST, 2),
    Case("biased, tensor", 4, {"tensor": 2} | ZERO, BIASED),
    Case("windows, two key heads on four", 4, {"sequence": 4}, WINDOWS),
    Case("windows, tensor, ring", 4, RING | {"tensor": 2} | ZERO, WINDOWS),
    Case("sparse, experts, all sharded", 4, {"expert": 2}, SPARSE, 2),
    Case("sparse, experts, sequence, states in rows", 4, {"expert": 2, "sequence": 2} | ZERO, SPARSE),
    Case("sparse, experts on all, tensor", 4, {"expert": 2, "tensor": 2}, SPARSE),
)
"""Each is followed by one of the same model, where there is one: that one goes on from its state."""
FIRST_STEPS, ALL_STEPS = 2, 4


def run(cases, folder):
    """Each case's first steps; then on from the state of the case before it, where that is of the same model."""
    for number, case in enumerate(cases):
        layout = start(case, torch.float64)
        rows = advance(case, layout, range(FIRST_STEPS))
        held = [*layout.pieces(), *layout.moments()]
        assert_covered(held)
        state = gather_whole(held)
        if state:
            save_file(state, folder / f"{case.name}.safetensors")
        if dist.is_initialized():
            dist.barrier()
        before = cases[number - 1] if number and cases[number - 1].shape == case.shape else case
        saved = load_file(folder / f"{before.name}.safetensors")
        again = start(case, torch.float64)
        again.forward(batches(case, again, 0))  # whole weights that are left over must not outlive the loading
        with torch.no_grad():
            for piece in (*again.pieces(), *again.moments()):
                piece.tensor.zero_()
            for piece in (*again.pieces(), *again.moments()):
                piece.tensor.copy_(saved[piece.name][piece.window])
        rows += advance(case, again, range(FIRST_STEPS, ALL_STEPS))
        if state:
            write_json(folder / f"{case.name}.json", rows)


def assert_covered(held):
    """Owned rectangles cover each tensor exactly once."""
    rows = [(p.name, p.shape, p.window) for p in held if p.owner]
    everyone = [None] * dist.get_world_size() if dist.is_initialized() else [rows]
    if dist.is_initialized():
        dist.all_gather_object(everyone, rows)
    counts = {}
    for name, shape, window in (row for rows in everyone for row in rows):
        counts.setdefault(name, torch.zeros(shape, dtype=torch.int))[window] += 1
    assert counts and all(bool((count == 1).all()) for count in counts.values())
    assert len(counts) == 4 * sum("/" not in name for name in counts)  # weight, step and two moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four processes found, and in `one` what one process finds for the same models."""
    folder = tmp_path_factory.mktemp("layouts")
    spawn(4, run, CASES, folder, seconds=300)
    (folder / "one").mkdir()
    run([Case(str(i), 1, shape=case.shape) for i, case in enumerate(CASES)], folder / "one")
    return folder


def test_losses_norms_weights_and_moments_are_those_of_one_process(folder):
    for number, case in enumerate(CASES):
        rows, wanted = (
            torch.tensor(read_json(path), dtype=torch.float64)
            for path in (folder / f"{case.name}.json", folder / "one" / f"{number}.json")
        )
        torch.testing.assert_close(rows, wanted, rtol=1e-11, atol=1e-10, msg=case.name)
        state, whole = (
            load_file(folder / f"{case.name}.safetensors"),
            load_file(folder / "one" / f"{number}.safetensors"),
        )
        assert sorted(state) == sorted(whole), case.name
        for name, tensor in whole.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-10, msg=f"{case.name}: {name}")


def test_steps_change_something(folder):
    for number in range(len(CASES)):
        losses = [loss for loss, *_ in read_json(folder / "one" / f"{number}.json")]
        assert len(losses) == ALL_STEPS and len(set(losses)) == ALL_STEPS


def test_a_process_that_fails_is_told_and_stops_the_others():
    with pytest.raises(TrainingError, match="processes ended with"):
        spawn(2, fail_on_one, seconds=60)


def fail_on_one():
    if dist.get_rank() == 1:
        raise SystemExit(3)
    dist.barrier()


def test_objectives_and_optimizers_that_do_not_fit_are_refused_by_name():
    from puyu.dist import World
    from puyu.train.layouts.mesh import Mesh

    mesh = Mesh(LayoutConfig(tensor=2), World(0, 2))
    with pytest.raises(ConfigError, match="layout.tensor works with the .* loss only, not with ranking_loss"):
        place.cut(toys.model(), mesh, ranking_loss())
    with pytest.raises(ConfigError, match="muon needs whole matrices, layout.tensor"):
        place.check_optimizer(mesh, OptimConfig(kind="muon"))
    with pytest.raises(ConfigError, match="layout.states=full divides their rows"):
        place.check_optimizer(Mesh(LayoutConfig(**ZERO), World(0, 2)), OptimConfig(kind="muon"))


def test_collectives_on_their_way_are_few_and_keep_their_order():
    lane, told = Lane(most=2), []

    class Work:
        def __init__(self, name):
            self.name = name

        def wait(self):
            told.append(f"waited {self.name}")

    def routine(name, levels):
        for level in range(levels):
            told.append(f"begun {name}{level}")
            yield Work(f"{name}{level}")
        told.append(f"ended {name}")

    for name, levels in (("a", 2), ("b", 1), ("c", 0), ("d", 1)):
        lane.begin(routine(name, levels))
    assert told == ["begun a0", "begun b0", "ended c", "begun d0", "waited a0", "begun a1", "waited b0", "ended b"]
    lane.finish()
    assert told[8:] == ["waited d0", "ended d", "waited a1", "ended a"]


def test_weights_travel_narrow_only_where_every_module_casts_them():
    block = toys.model(dtype=torch.float32).trunk.layers[0]
    assert place._precision(block, torch.bfloat16).param_dtype == torch.bfloat16
    assert place._precision(block, None).param_dtype is place._precision(block, torch.float32).param_dtype is None
    block.mlp.down.forward = block.mlp.down.forward  # as float8 puts its own there
    assert place._precision(block, torch.bfloat16).param_dtype is None


def test_one_process_needs_no_group():
    layout = make_layout(LayoutConfig(), toys.model(), lm_loss, device=torch.device("cpu"))
    assert (layout.reader.size, layout.counts, layout.mesh.views) == (1, True, ())


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_the_ring_of_one_is_packed_attention(window, dtype, limit):
    """More tokens than a tile has, documents that begin anywhere; values and gradients."""
    starts, count = (0, 3, 700, 701, 1290), 1400
    generator = torch.Generator().manual_seed(0)
    shapes = ((count, 4, 8), (count, 2, 8), (count, 2, 8))
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64).to(dtype)
    ring, packed = RingPlan.build(starts, count, rank=0, group=None), PackedPlan.build(starts, count)
    found, wanted = (plan.attend(*inputs, 0, window=window) for plan in (ring, packed))
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in (found, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=4 * limit)


@pytest.mark.parametrize("sliced", [False, True])
def test_no_copy_of_a_matrix_waits_for_the_backward_pass(sliced):
    """bf16 products of fp32 masters: what autograd keeps, and gradients against those of a cast that it keeps."""
    model, batch, kept = toys.model(dtype=torch.float32, qkv_bias=True, out_bias=True), toys.source().next_batch(), []
    model.set_compute_dtype(torch.bfloat16)
    if sliced:  # the modules of tensor parallelism, with one process
        slice_model(model, Dim())

    def keep(tensor):
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = lm_loss(model, batch).loss_sum
    loss.backward()
    shapes = {module.weight.shape for module in model.trunk.layers.modules() if isinstance(module, Linear)}
    assert len(shapes) == 4 and {(shape, torch.float32) for shape in shapes} <= set(kept)  # the masters
    turned = {torch.Size(reversed(shape)) for shape in shapes}
    assert not {(shape, torch.bfloat16) for shape in shapes | turned} & set(kept)
    layer, x = model.trunk.layers[0].attention.out, torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    x, grads = x.bfloat16().requires_grad_(), []
    for y in (layer(x), F.linear(x, layer.weight.to(x.dtype)) + layer.bias.to(x.dtype)):
        grads.append(torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias)))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_muon_on_shards_and_products_in_bf16(tmp_path):
    spawn(2, others, tmp_path / "two", seconds=60)
    others(tmp_path / "one")
    two, one = (load_file(tmp_path / name) for name in ("two", "one"))
    for name, tensor in one.items():
        limit = 0 if name.startswith("narrow") else 1e-4
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=limit, msg=name)
    two, one = (read_json(tmp_path / f"{name}.json") for name in ("two", "one"))
    for losses in two:
        assert losses == pytest.approx(one[0], rel=2e-3)


def others(path):
    """Three steps with Muon, whose Newton-Schulz runs in bf16: a last bit of a gradient may show; two steps in bf16."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    case = Case("muon", world)
    layout = make_layout(LayoutConfig(), make_model(case, torch.float64), lm_loss, device=torch.device("cpu"))
    layout.make_optimizer(OptimConfig(kind="muon", lr=1e-3, muon_lr=0.01))
    advance(case, layout, range(3))
    state, losses = gather_whole([*layout.pieces(), *layout.moments()]) | frozen(world), []
    # the shared expert has the shape of the others, but it is sharded, and they are whole
    case = Case("experts", world, {"expert": world}, SPARSE.with_(experts=replace(SPARSE.experts, shared_size=24)))
    layout = make_layout(LayoutConfig(**case.layout), make_model(case, torch.float64), lm_loss, device=layout.device)
    layout.make_optimizer(OptimConfig(kind="muon", lr=1e-3, muon_lr=0.01))
    advance(case, layout, range(2))
    state |= {f"experts: {name}": tensor for name, tensor in gather_whole(layout.pieces()).items()}
    for config in ({"tensor": world}, {"sequence": world}, RING if world > 1 else {}, {}):
        layout = start(Case("bf16", world, config), torch.float32)
        layout.model.set_compute_dtype(torch.bfloat16)
        losses.append([loss for loss, *_ in advance(case, layout, range(2))])
    state |= narrow(world)
    if world > 1:
        assert_sums_begin_within_the_backward_pass()
    if state:
        save_file(state, path)
        write_json(path.with_suffix(".json"), losses)


def assert_sums_begin_within_the_backward_pass():
    """Collectives on their way when the backward pass of each of two micro-batches has ended, for each parameter."""
    for config, wanted in ((REPLICA, [0, 1]), (ZERO, [0, 1]), (ZERO | {"grads": "full"}, [1, 2])):
        case, found = Case("early", 2, config, accumulate=2), []
        layout = start(case, torch.float64)
        layout.lane, part, settle = Lane(most=1000), layout.part, layout.settle

        def count(layout=layout, found=found):
            found.append(len(layout.lane._going))

        layout.part = lambda batch, part=part, count=count: (count(), part(batch))[1]  # before each micro-batch
        layout.settle = lambda settle=settle, count=count: (count(), settle())[1]  # and after the last
        layout.backward(batches(case, layout, 0))
        assert found.pop(0) == 0
        assert found == [count * len(layout.shares) for count in wanted], (found, config)


def narrow(world):
    """Three steps in bf16 of sharded fp32 weights, which travel in bf16: losses and weights."""
    found = {}
    for name, shape in (("dense", DENSE), ("sparse", SPARSE)):
        case = Case("narrow", world, {}, shape, accumulate=2 // world)
        model, seen = make_model(case, torch.float32), set()
        model.set_compute_dtype(torch.bfloat16)
        layout = make_layout(LayoutConfig(), model, lm_loss, device=torch.device("cpu"))
        layout.make_optimizer(OptimConfig(lr=1e-3))
        for module in (model.trunk.layers[1].attention.qkv, model.trunk.norm):
            module.register_forward_hook(lambda module, *_, seen=seen: seen.add((type(module), module.weight.dtype)))
        rows = torch.tensor([losses[:1] for losses in advance(case, layout, range(3))])
        assert seen == {(Linear, torch.bfloat16 if world > 1 else torch.float32), (RMSNorm, torch.float32)}
        whole = gather_whole([*layout.pieces(), Piece("rows", rows.shape, (0, 0), rows, current_world().is_main)])
        found |= {f"narrow {name}: {key}": tensor for key, tensor in whole.items()}
    return found


def frozen(world):
    """Two steps of a model whose biases, embedding and first layer do not train: losses and weights of each layout."""
    found, shape = {}, FIRST.with_(num_layers=4)
    line = {"pipeline": world, "schedule": "interleaved"} if world > 1 else {}
    for number, config in enumerate(({"tensor": world}, ZERO | {"grads": "full"}, {}, line)):
        case = Case("frozen", world, config, shape, accumulate=2)
        model = make_model(case, torch.float64)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in ("bias", "embedding", "layers.0.")))
        layout = make_layout(LayoutConfig(**config), model, lm_loss, device=torch.device("cpu"))
        layout.make_optimizer(OptimConfig(lr=1e-3))
        rows = torch.tensor(advance(case, layout, range(2)))
        whole = gather_whole([*layout.pieces(), Piece("rows", rows.shape, (0, 0), rows, current_world().is_main)])
        found |= {f"frozen {number}: {name}": tensor for name, tensor in whole.items()}
    if world > 1:
        model = make_model(Case("frozen", world), torch.float64)
        model.trunk.requires_grad_(False)
        layout = make_layout(LayoutConfig(pipeline=world), model, lm_loss, device=torch.device("cpu"))
        with pytest.raises(ConfigError, match="rank 0 has nothing to train"):
            layout.make_optimizer(OptimConfig())
    return found
