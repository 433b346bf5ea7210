"""spine.5: greedy decoding of one sequence, our `LLM` against transformers' `generate`, same weights and dtype.

    python bench/spine_decode.py [--save] [--pairs 9] [--peer-python PATH]

A sample is new tokens a second over one request of 128 new tokens after a prompt of 64, prefill included. Ours also
turns the ids into text; the peer only makes ids. Prefix caching is off, or the repeated prompt would cost nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import harness
import nano_shape

PROMPT, NEW = 64, 128
TEXT = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"[: PROMPT - 1]


def ours(folder: Path) -> None:
    """The worker of our side: the offline facade, as a user calls it."""
    import torch
    import worker

    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM
    from puyu.types import GenerateRequest, SamplingParams

    llm = LLM(folder, device="cpu", dtype="bfloat16", config=EngineConfig(prefix_cache=False))
    request = GenerateRequest(TEXT, SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
    assert len(llm.prompt_ids(request)) == PROMPT

    def generate() -> list[int]:
        ids = list(llm.generate_all([request])[0].token_ids)
        assert len(ids) == NEW
        return ids

    generate()
    worker.ready(versions={"torch": torch.__version__}, ids=generate(), prompt=llm.prompt_ids(request))
    while worker.told():
        began = time.perf_counter()
        generate()
        worker.answer(NEW / (time.perf_counter() - began))


def peer(folder: Path) -> None:
    """The worker of the peer, in its own environment."""
    import json

    import torch
    import transformers
    import worker

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval()
    prompt = torch.tensor([json.loads((folder / "prompt.json").read_text())])
    mask = torch.ones_like(prompt)
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "attention_mask": mask}

    @torch.inference_mode()
    def generate() -> list[int]:
        ids: list[int] = model.generate(prompt, **settings)[0, PROMPT:].tolist()
        assert len(ids) == NEW
        return ids

    generate()
    versions = {"peer torch": torch.__version__, "transformers": transformers.__version__}
    worker.ready(versions=versions, ids=generate())
    while worker.told():
        began = time.perf_counter()
        generate()
        worker.answer(NEW / (time.perf_counter() - began))


def save_inputs(folder: Path) -> None:
    """The checkpoint, a tokenizer that keeps the prompt's letters apart, and the prompt's ids."""
    import itertools
    import json

    from puyu.tokenizer.template import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    nano_shape.save_checkpoint(folder)
    small = from_merges([], chat_template=CHAT_TEMPLATE).vocab_size
    pairs = ((bytes([a]), bytes([b])) for a in range(128, 256) for b in range(128, 256))
    tokenizer = from_merges(list(itertools.islice(pairs, nano_shape.VOCAB - small)), chat_template=CHAT_TEMPLATE)
    tokenizer.save(folder)
    (folder / "prompt.json").write_text(json.dumps([tokenizer.bos_id, *tokenizer.encode(TEXT)]))


def compare(arguments: argparse.Namespace) -> None:
    python = harness.peer_python("transformers", arguments.peer_python)
    run = harness.Run("spine_decode", peer_flags="bf16, sdpa, generate(do_sample=False), dynamic cache, inference mode")
    with tempfile.TemporaryDirectory() as name:
        save_inputs(Path(name))
        us = harness.Worker([sys.executable, __file__, "--worker", "ours", name])
        them = harness.Worker([python, __file__, "--worker", "peer", name])
        found = harness.alternate(us, them, pairs=arguments.pairs)
        us.close()
        them.close()
    run.versions = us.facts["versions"] | them.facts["versions"]
    run.notes = {"equal_leading_ids": leading(us.facts["ids"], them.facts["ids"])}
    run.finish([harness.Samples("spine.5", *found, unit="tokens/s")], save=arguments.save)


def leading(ours: list[int], peer: list[int]) -> int:
    """How many greedy ids agree before the first difference (bf16 rounds in another order on each side)."""
    pairs = zip(ours, peer, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(ours))


if __name__ == "__main__":
    harness.comparison(__doc__ or "", {"ours": ours, "peer": peer}, compare, pairs=9)
