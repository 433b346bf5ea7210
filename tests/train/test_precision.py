"""Loss scaling, float8 and one-byte moments against plain arithmetic; growing batches; all of it in the Trainer."""

import json

import pytest
import torch

from puyu.errors import ConfigError
from puyu.model.linear import Linear
from puyu.train.adam8 import AdamW8, codebook, pack, unpack
from puyu.train.float8 import Scaled, multiply, use_float8
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.pretrain import BatchRamp, PretrainConfig
from puyu.train.pretrain import run as pretrain
from puyu.train.scaler import LossScaler
from puyu.train.stage import place
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

ADAM8 = OptimConfig(kind="adamw8", lr=3e-3)


def fit(out, steps=20, *, dtype="float32", prepare=None, whole=20, **settings):
    model = place(toys.model(hidden_size=32, intermediate_size=64), dtype=dtype, device=torch.device("cpu"))
    config = TrainerConfig(
        steps=whole, dtype=dtype, **({"optim": OptimConfig(lr=3e-3), "checkpoint_every": 0} | settings)
    )
    trainer = Trainer(model, lm_loss, toys.source(tokens_per_batch=200), config, out=out)
    if prepare:
        prepare(trainer)
    if steps < whole:
        trainer.on_step = toys.interrupt_at(steps)
        with pytest.raises(toys.Interrupted):
            trainer.fit()
    else:
        trainer.fit()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return trainer, rows


# float16 -------------------------------------------------------------------------------------------------------------


def test_the_scale_halves_after_two_overflows_and_doubles_after_enough_good_steps():
    scaler = LossScaler(scale=8.0, growth=3)
    assert scaler.overflowed() and scaler.scale == 8
    assert scaler.overflowed() and scaler.scale == 4  # hysteresis 2, then every one
    assert scaler.overflowed() and scaler.scale == 2
    for _ in range(3):
        scaler.succeeded()
    assert scaler.scale == 4
    copy = LossScaler()
    copy.load(json.loads(json.dumps(scaler.state())))
    assert copy.state() == scaler.state()
    assert scaler.overflowed() and scaler.overflowed() and scaler.overflowed()
    assert scaler.scale == 1 and not scaler.overflowed()


def test_float16_learns_like_float32_and_overflows_are_skipped_without_an_alarm(tmp_path):
    _, wanted = fit(tmp_path / "wide")
    trainer, found = fit(tmp_path / "half", dtype="float16")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=5e-3)

    def too_large(trainer):
        trainer.scaler.scale = 2.0**27

    trainer, found = fit(tmp_path / "large", dtype="float16", prepare=too_large)
    skipped = [row for row in found if "skipped" in row]
    assert skipped and all("overflow" in row["skipped"] for row in skipped)
    assert found[0]["skipped"] and found[-1]["loss"] < found[len(skipped)]["loss"]
    assert trainer.scaler.scale < 2.0**27 and not trainer.watch.skip
    health = tmp_path / "large" / "train_state" / "health.jsonl"
    assert not health.is_file() or not health.read_text()


# float8 --------------------------------------------------------------------------------------------------------------


def test_float8_products_are_those_of_the_rounded_numbers():
    draw = torch.Generator().manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(6, 24, generator=draw).requires_grad_()
    torch.nn.init.normal_(layer.weight, generator=draw)
    holder = torch.nn.Module()
    holder.trunk = torch.nn.Module()
    holder.trunk.layers = torch.nn.ModuleList([layer])
    use_float8(holder, emulated=True, device=torch.device("cpu"))
    y, grad = layer(x), torch.randn(6, 40, generator=draw)
    y.backward(grad)

    def rounded(value, dtype):
        scale = value.abs().max() / torch.finfo(dtype).max
        return (value / scale).to(dtype).float() * scale

    x8, w8 = (rounded(v.detach(), torch.float8_e4m3fn) for v in (x, layer.weight))
    g8 = rounded(grad, torch.float8_e5m2)
    for found, wanted in ((y, x8 @ w8.T), (x.grad, g8 @ w8), (layer.weight.grad, g8.T @ x8)):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-5)
    error = (y - x @ layer.weight.T).norm() / y.norm()
    assert 0.005 < error < 0.06  # three bits of mantissa


def test_float8_needs_its_hardware_and_trains_where_it_is_emulated(tmp_path):
    with pytest.raises(ConfigError, match="no products in float8"):
        use_float8(toys.model(), emulated=False, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="whole matrices"):
        fit(tmp_path / "cut", precision="float8-emulated", layout={"tensor": 2})
    _, wanted = fit(tmp_path / "wide")
    _, found = fit(tmp_path / "eight", precision="float8-emulated")
    assert found[0]["loss"] != wanted[0]["loss"]
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.03)


def test_the_hardware_product_is_given_columns():
    a, b = Scaled.of(torch.randn(16, 32), torch.float8_e4m3fn), Scaled.of(torch.randn(32, 16), torch.float8_e4m3fn)
    wanted = multiply(a, b, dtype=torch.float32, emulated=True)
    found = multiply(a, b, dtype=torch.float32, emulated=False)  # torch has a slow twin on CPUs
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


# one-byte moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values_of_the_book(signed):
    book = codebook(signed, torch.device("cpu"))
    assert len(book) == 256 == len(set(book.tolist())) and book.max() == 1
    values = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [0.0]])
    values = values if signed else values.abs()
    codes, scales = pack(values, signed=signed)
    assert codes.shape == values.shape and codes.dtype == torch.uint8 and scales.shape == (3, 3)
    found = unpack(codes, scales, signed=signed)
    for row, start in ((0, 0), (1, 256), (1, 512), (2, 0)):
        cut = values[row, start : start + 256]
        scale = cut.abs().max()
        nearest = (cut[:, None] - book * scale).abs().amin(1)
        slack = 0 if signed else float(book[1] * scale)  # a number above zero never becomes zero
        assert ((found[row, start : start + 256] - cut).abs() <= nearest + slack + 1e-7 * scale).all()
    if not signed:
        assert (found[:2] > 0).all() and not found[2].any()


def test_one_byte_moments_follow_adamw():
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 300, generator=draw)), torch.nn.Parameter(torch.zeros(7))]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    row = {"lr": 1e-2, "weight_decay": 0.1}
    ours = AdamW8([{"params": weights, **row}], betas=(0.9, 0.95), eps=1e-8)
    plain = torch.optim.AdamW(copies, betas=(0.9, 0.95), eps=1e-8, **row)
    starts = [weight.detach().clone() for weight in weights]
    for _ in range(12):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn(weight.shape, generator=draw) * torch.logspace(-3, 1, weight.shape[-1])
            copy.grad = weight.grad.clone()
        ours.step()
        plain.step()
    torch.testing.assert_close(weights[1], copies[1], rtol=1e-5, atol=1e-6)  # vectors keep fp32
    moved, wanted = weights[0].detach() - starts[0], copies[0].detach() - starts[0]
    assert (moved - wanted).norm() / wanted.norm() < 0.08  # gradients of a row span four decades
    state = ours.state[weights[0]]
    assert sum(value.nbytes for value in state.values()) < 2.1 * weights[0].numel()


def test_one_byte_moments_are_saved_and_loaded_exactly(tmp_path):
    _, wanted = fit(tmp_path / "whole", optim=ADAM8)
    fit(tmp_path / "cut", steps=11, optim=ADAM8, checkpoint_every=10, checkpoint_wait=True)
    _, found = fit(tmp_path / "cut", optim=ADAM8, checkpoint_every=10, checkpoint_wait=True)
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]
    _, exact = fit(tmp_path / "exact")
    assert found[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.02)


# growing batches -----------------------------------------------------------------------------------------------------


def test_batches_grow_and_every_token_of_the_stream_is_drawn_once(tmp_path):
    ramp = BatchRamp(start=64, increment=64, every=2)
    assert [ramp.tokens(step, most=160) for step in range(7)] == [64, 64, 128, 128, 160, 160, 160]
    toys.tokenizer(tmp_path / "tokenizer")
    config = PretrainConfig(
        data=toys.corpus(tmp_path / "data"), tokenizer=tmp_path / "tokenizer", model=toys.SHAPE, device="cpu",
        phases=[{"steps": 3, "seq_len": 32}, {"steps": 4, "seq_len": 64}], batch_tokens=256, dtype="float32", heldout=0,
    )  # fmt: skip
    seen = {}
    for name, changed in (("plain", {}), ("ramp", {"ramp": {"start": 64, "increment": 64, "every": 2}})):
        rows = []
        made = PretrainConfig.model_validate(config.model_dump() | changed)
        pretrain(made, out=tmp_path / name, on_step=lambda _, metrics, rows=rows: rows.append(metrics))
        seen[name] = rows
    assert [row["step_tokens"] for row in seen["ramp"]] == [64, 64, 128, 128, 192, 192, 256]
    assert [row["lr"] for row in seen["ramp"]] == [row["lr"] for row in seen["plain"]]
    bad = PretrainConfig.model_validate(config.model_dump() | {"ramp": {"start": 64, "increment": 40, "every": 2}})
    with pytest.raises(ConfigError, match="ramp: step 3 has a batch of 104"):
        pretrain(bad, out=tmp_path / "bad")
