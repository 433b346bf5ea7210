"""train.6 and train.7: training tokens a second at InternLM2's vocabulary, against a plain loop and transformers.

    python bench/train_speed.py [--save] [--pairs 7] [--peer-python PATH]

42M parameters of InternLM2's shape (92,544 tokens of vocabulary, untied) learn the same rows on all sides: 4 rows of
1024 tokens a step, bf16 products with fp32 weights, fused AdamW, gradients clipped at 1. The peers take a row at a
time (`MICRO`), which is faster for them than all four. A sample is the speed over `SAMPLE_STEPS` steps, everything
included that the loops do. All start from one checkpoint, and their losses after the warm-up must agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import harness

WARM_STEPS, SAMPLE_STEPS = 3, 3
ROWS, LENGTH, MICRO = 4, 1024, 1
SHAPE = {"vocab_size": 92544, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 6}
SHAPE |= {"num_key_value_heads": 3, "intermediate_size": 768}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE, "max_position_embeddings": 2048}
CONFIG |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
CONFIG |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
RATE = 1e-3


def draw_rows(step: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH), generator=generator)


class Turns:
    """Called with the loss of each step: gives a sample each `SAMPLE_STEPS` steps, waits until it is told to go on."""

    def __init__(self, **versions: str) -> None:
        import worker

        self.worker, self.versions, self.done, self.began = worker, versions, 0, 0.0

    def step(self, loss: float) -> None:
        self.done += 1
        if self.done < WARM_STEPS or (self.done - WARM_STEPS) % SAMPLE_STEPS:
            return
        if self.done == WARM_STEPS:
            self.worker.ready(versions=self.versions, loss=loss)
        else:
            self.worker.answer(SAMPLE_STEPS * ROWS * LENGTH / (time.perf_counter() - self.began))
        if not self.worker.told():
            raise SystemExit(0)
        self.began = time.perf_counter()


class FixedRows:
    """A BatchSource of random rows (a fresh draw each step)."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Any:
        from puyu.data.packing import pack_documents

        self.drawn += 1
        return pack_documents([(row, None) for row in draw_rows(self.drawn).numpy()])

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.drawn = state["drawn"]


def ours(folder: Path) -> None:
    """The real Trainer, held between samples by its own callback."""
    import torch

    from puyu.model.checkpoint import load_model
    from puyu.train.objectives import lm_loss
    from puyu.train.optim import OptimConfig
    from puyu.train.stage import place
    from puyu.train.trainer import Trainer, TrainerConfig

    model = place(load_model(folder), dtype="bfloat16", device=torch.device("cpu"))
    turns = Turns(torch=torch.__version__)
    optim = OptimConfig(lr=RATE, schedule="constant", warmup=0)
    config = TrainerConfig(steps=100_000, optim=optim, checkpoint_every=0, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, lm_loss, FixedRows(), config, out=Path(out))
        trainer.on_step = lambda _, metrics: turns.step(metrics["loss"])
        trainer.fit()


def plain(folder: Path) -> None:
    """bench/peers/plain_loop.py."""
    sys.path.append(str(Path(__file__).parent / "peers"))
    import plain_loop
    import torch
    from safetensors.torch import load_file

    names = {"vocab_size": "vocab", "hidden_size": "hidden", "num_hidden_layers": "layers"}
    names |= {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "intermediate_size": "inner"}
    loop = plain_loop.PlainLoop(plain_loop.Shape(**{names[key]: value for key, value in SHAPE.items()}), lr=RATE)
    saved = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    loop.model.load_state_dict(dict(plain_names(saved)))
    turns = Turns(torch=torch.__version__)
    while True:
        turns.step(loop.step(draw_rows(turns.done + 1).split(MICRO)))


def plain_names(saved: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """LLaMA's tensors under the names of the plain loop."""
    import torch

    yield from (("embedding.weight", saved["model.embed_tokens.weight"]), ("norm.weight", saved["model.norm.weight"]))
    yield "head.weight", saved["lm_head.weight"]
    for index in range(SHAPE["num_hidden_layers"]):
        old, new = f"model.layers.{index}", f"blocks.{index}"
        part = {name: saved[f"{old}.self_attn.{name}_proj.weight"] for name in "qkvo"}
        mlp = {name: saved[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        yield f"{new}.qkv.weight", torch.cat([part["q"], part["k"], part["v"]])
        yield f"{new}.out.weight", part["o"]
        yield f"{new}.gate_up.weight", torch.cat([mlp["gate"], mlp["up"]])
        yield f"{new}.down.weight", mlp["down"]
        yield f"{new}.norm1.weight", saved[f"{old}.input_layernorm.weight"]
        yield f"{new}.norm2.weight", saved[f"{old}.post_attention_layernorm.weight"]


def transformers_side(folder: Path) -> None:
    """transformers.Trainer, in its own environment, with the settings that its documentation gives for speed."""
    import torch
    import transformers

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for step in range(1, 1_000_000):
                yield from ({"input_ids": row, "labels": row} for row in draw_rows(step))

    turns = Turns(**{"peer torch": torch.__version__, "transformers": transformers.__version__})

    class Told(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            turns.step(logs["loss"])

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            output_dir=out, max_steps=100_000, per_device_train_batch_size=MICRO, save_strategy="no", report_to=[],
            gradient_accumulation_steps=ROWS // MICRO, optim="adamw_torch_fused", adam_beta2=0.95, weight_decay=0.1,
            learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=True, use_cpu=True,
            logging_steps=1, disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[Told()]).train()


def compare(arguments: argparse.Namespace) -> None:
    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights

    peers = {"train.6": ("plain", Path(sys.executable))}
    peers["train.7"] = ("transformers", harness.peer_python("transformers", arguments.peer_python))
    run = harness.Run("train_speed", peer_flags="autocast bf16, sdpa, AdamW fused, rows of a step one at a time")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        model = CausalLM(ModelConfig.from_hf(CONFIG))
        init_weights(model, seed=0)
        save_model(model, Path(name))
        for bar, (side, python) in peers.items():
            us = harness.Worker([sys.executable, __file__, "--worker", "ours", name])
            them = harness.Worker([python, __file__, "--worker", side, name])
            rows.append(harness.Samples(bar, *harness.alternate(us, them, pairs=arguments.pairs), unit="tokens/s"))
            us.close()
            them.close()
            run.versions |= us.facts["versions"] | them.facts["versions"]
            run.notes |= {"loss": us.facts["loss"], f"loss of {side}": them.facts["loss"]}
            same = abs(us.facts["loss"] / them.facts["loss"] - 1) < 0.002
            assert same, f"the two sides do not learn the same: {run.notes}"
    run.finish(rows, save=arguments.save)


if __name__ == "__main__":
    sides = {"ours": ours, "plain": plain, "transformers": transformers_side}
    harness.comparison(__doc__ or "", sides, compare, pairs=7)
