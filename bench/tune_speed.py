"""tune.7, 8, 9 and 11: fine-tuning speed and memory against trl with peft (and bitsandbytes), on the same documents.

    python bench/tune_speed.py [--save] [--pairs 5] [--only tune.7] [--peer-python PATH]

LoRA of rank 16 on all matrices of a 42M model with InternLM2's vocabulary; documents of log-normal length (median 180
tokens, at most 1024), the last two thirds learned, bf16, AdamW, clipped at 1. Ours packs 4,096 tokens a step. trl in
its default mode takes 8 padded rows a step and recomputes activations; in its packed mode it takes 4 rows of 1024 and
does not. What counts is useful tokens a second: padding is not. tune.9 is the peak of the whole process in
the same packed mode. tune.11 has 4-bit bases of a model with a smaller vocabulary, whose matrices weigh more: NF4 with
double quantization, bitsandbytes' on the other side.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import harness

WARM_STEPS, SAMPLE_STEPS = 2, 1
TOKENS, LONGEST, DOCUMENTS, RATE, RANK = 4096, 1024, 4000, 1e-4, 16
WIDE = {"vocab_size": 92544, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 6}
WIDE |= {"num_key_value_heads": 3, "intermediate_size": 768}
DEEP = {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8}
DEEP |= {"num_key_value_heads": 4, "intermediate_size": 1408}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
COMMON |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def documents(vocab: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids and what is learned."""
    rng = random.Random(0)
    for _ in range(DOCUMENTS):
        length = min(LONGEST, max(16, round(rng.lognormvariate(5.2, 0.8))))
        yield [rng.randrange(3, vocab) for _ in range(length)], [at >= length // 3 for at in range(length)]


class Turns:
    """Told of each step's loss and useful tokens: a sample each `SAMPLE_STEPS` steps, of speed or of peak memory."""

    def __init__(self, *, memory: bool, **versions: str) -> None:
        import worker

        self.worker, self.memory, self.versions = worker, memory, versions
        self.done, self.tokens, self.began = 0, 0, 0.0

    def step(self, loss: float, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        if self.done < WARM_STEPS or (self.done - WARM_STEPS) % SAMPLE_STEPS:
            return
        if self.done == WARM_STEPS:
            self.worker.ready(versions=self.versions, loss=loss)
        elif self.memory:
            self.worker.answer(peak())
        else:
            self.worker.answer(self.tokens / (time.perf_counter() - self.began))
        if not self.worker.told():
            raise SystemExit(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.tokens, self.began = 0, time.perf_counter()


def peak() -> float:
    """Bytes of this process at its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def ours(folder: Path, *, method: str = "lora", memory: bool = False) -> None:
    """The real Trainer, as `puyu sft` sets it up."""
    import torch

    from puyu.data.packing import ConversationSource
    from puyu.model.checkpoint import load_model
    from puyu.train.objectives import lm_loss
    from puyu.train.optim import OptimConfig
    from puyu.train.stage import place
    from puyu.train.trainer import Trainer, TrainerConfig
    from puyu.train.tune import TuneConfig, Tuning

    loaded = load_model(folder)
    docs = list(documents(loaded.config.vocab_size))
    tune = TuneConfig.model_validate({"method": method, "rank": RANK})
    Tuning.of(loaded, tune, seed=0, base=folder)
    model = place(loaded, dtype="bfloat16", device=torch.device("cpu"))
    turns = Turns(memory=memory, torch=torch.__version__)
    optim = OptimConfig(lr=RATE, schedule="constant", warmup=0, weight_decay=0.0)
    config = TrainerConfig(steps=100_000, optim=optim, checkpoint_every=0, dtype="bfloat16")
    source = ConversationSource(docs, tokens_per_batch=TOKENS, seed=0)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, lm_loss, source, config, out=Path(out))
        trainer.on_step = lambda _, metrics: turns.step(metrics["loss"], int(metrics["step_tokens"]))
        trainer.fit()


def peers(folder: Path, *, packed: bool, four_bits: bool = False, memory: bool = False) -> None:
    """trl's SFTTrainer with a LoRA config of peft."""
    import bitsandbytes
    import datasets
    import peft
    import torch
    import transformers
    import trl

    config = json.loads((folder / "config.json").read_text())
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantized if four_bits else None
    )
    rows = [
        {"input_ids": ids, "labels": [i if learned else -100 for i, learned in zip(ids, mask, strict=True)]}
        for ids, mask in documents(config["vocab_size"])
    ]
    versions = {"peer torch": torch.__version__, "trl": trl.__version__, "peft": peft.__version__}
    versions |= {"transformers": transformers.__version__, "bitsandbytes": bitsandbytes.__version__}
    turns, counts = Turns(memory=memory, **versions), [0]

    class Told(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            turns.step(logs["loss"], counts[state.global_step])

    with tempfile.TemporaryDirectory() as out:
        mode: dict[str, Any] = {}
        if packed:
            mode = {"packing": True, "per_device_train_batch_size": TOKENS // LONGEST, "gradient_checkpointing": False}
        arguments = trl.SFTConfig(
            output_dir=out, max_steps=100_000, max_length=LONGEST, save_strategy="no", report_to=[], logging_steps=1,
            learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
            use_cpu=True, bf16=True, disable_tqdm=True, **mode,
        )  # fmt: skip
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), peft_config=lora, callbacks=[Told()],
            processing_class=_words(config),
        )  # fmt: skip
        collate = trainer.data_collator

        def counting(features: list[dict[str, Any]]) -> Any:
            counts.append(sum(len(row["input_ids"]) for row in features))
            return collate(features)

        trainer.data_collator = counting
        trainer.train()


def _words(config: Mapping[str, Any]) -> Any:
    """A tokenizer that trl asks for; the documents are ids already."""
    import tokenizers
    import transformers

    names = {1: "<s>", 2: "</s>"}
    vocabulary = {names.get(at, f"w{at}"): at for at in range(config["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="w0"
    )


SIDES = {
    "lora": ours,
    "lora memory": lambda folder: ours(folder, memory=True),
    "qlora": lambda folder: ours(folder, method="qlora"),
    "default": lambda folder: peers(folder, packed=False),
    "packed": lambda folder: peers(folder, packed=True),
    "packed memory": lambda folder: peers(folder, packed=True, memory=True),
    "four bits": lambda folder: peers(folder, packed=True, four_bits=True),
}
BARS = {
    "tune.7": ("lora", "default", WIDE, "tokens/s"),
    "tune.8": ("lora", "packed", WIDE, "tokens/s"),
    "tune.9": ("lora memory", "packed memory", WIDE, "bytes"),
    "tune.11": ("qlora", "four bits", DEEP, "tokens/s"),
}


def compare(arguments: Any) -> None:
    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights

    python = harness.peer_python("tune", arguments.peer_python)
    flags = "SFTTrainer of trl: bf16, fused AdamW; packed: 4 x 1024, no recomputation; default: 8 rows, recomputation"
    for bar, (own, theirs, shape, unit) in BARS.items():
        if arguments.only not in ("", bar):
            continue
        name = f"tune_speed_{bar.replace('.', '_')}"
        # a peak in bytes is counted, not timed: the machine's speed does not move it
        run = harness.Run(name, peer_flags=flags, before={}) if unit == "bytes" else harness.Run(name, peer_flags=flags)
        with tempfile.TemporaryDirectory() as folder:
            model = CausalLM(ModelConfig.from_hf({**COMMON, **shape}))
            init_weights(model, seed=0)
            save_model(model, Path(folder))
            us = harness.Worker([sys.executable, __file__, "--worker", own, folder])
            them = harness.Worker([python, __file__, "--worker", theirs, folder])
            samples = harness.alternate(us, them, pairs=arguments.pairs)
            us.close()
            them.close()
        run.versions |= us.facts["versions"] | them.facts["versions"]
        run.notes |= {"loss": us.facts["loss"], "loss of the peer": them.facts["loss"]}
        same = abs(us.facts["loss"] / them.facts["loss"] - 1) < 0.02
        assert same, f"the two sides do not learn the same: {run.notes}"
        run.finish([harness.Samples(bar, *samples, unit=unit)], save=arguments.save)


if __name__ == "__main__":
    harness.comparison(__doc__ or "", SIDES, compare, pairs=5, only=tuple(BARS))
