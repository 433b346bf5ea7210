"""The sides of the engine's comparisons, as worker processes: ours, llama.cpp, transformers, a stream of memory.

    python bench/cpu_sides.py SIDE TASK PATH

A task is one of `decode` (128 tokens of one sequence after a prompt of 64), `prefill` (a prompt of 512), `batch`
(16 sequences at once, 64 new tokens each after prompts of 64), `serve` (the same with the prompts). Samples are tokens
a second of the part in question: decoding without its prompts, the prompt until its first token, all new tokens over
the whole time. Each side is set
as its own documentation recommends for speed and runs on as many threads as there are cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_shape
import harness
import worker

DECODE, AFTER, PREFILL, SEQUENCES, EACH = 128, 64, 512, 16, 64


def serve(measure: Callable[[], float], **facts: Any) -> None:
    """Warm up, then answer while told to."""
    measure()
    worker.ready(**facts)
    while worker.told():
        worker.answer(measure())


# --- ours ---


def ours(task: str, path: Path) -> None:
    import torch

    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM
    from puyu.engine.request import Request
    from puyu.types import SamplingParams

    torch.set_num_threads(harness.cores())
    config = EngineConfig(prefix_cache=False, cache_tokens=8192)
    engine = LLM(path, device="cpu", dtype="bfloat16", config=config).driver.engine
    numbers = iter(range(10**9))

    def add(prompt: list[int], count: int) -> Any:
        return engine.add(Request(str(next(numbers)), tuple(prompt), count, SamplingParams(max_tokens=count)))

    def decode() -> float:
        running = add(cpu_shape.prompt(AFTER), DECODE + 1)
        while not running.num_generated:
            engine.step()
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        return DECODE / (time.perf_counter() - began)

    def prefill() -> float:
        add(cpu_shape.prompt(PREFILL), 1)
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        return PREFILL / (time.perf_counter() - began)

    def batch(*, prompts: bool = False) -> float:
        began = time.perf_counter()
        runs = [add(cpu_shape.prompt(AFTER, start=index), EACH) for index in range(SEQUENCES)]
        while not all(running.num_generated for running in runs):
            engine.step()
        done = sum(running.num_generated for running in runs)
        if not prompts:
            began, done = time.perf_counter(), SEQUENCES * EACH - done
        else:
            done = SEQUENCES * EACH
        while engine.has_work:
            engine.step()
        return done / (time.perf_counter() - began)

    first = add(cpu_shape.prompt(AFTER), 16)
    while engine.has_work:
        engine.step()
    tasks = {"decode": decode, "prefill": prefill, "batch": batch, "serve": lambda: batch(prompts=True)}
    serve(tasks[task], versions={"torch": torch.__version__}, ids=list(first.generated))


# --- llama.cpp, through the low-level calls of llama-cpp-python ---


def llama(task: str, path: Path) -> None:
    import llama_cpp as lib
    import numpy as np

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 4096, 2048, 512
    params.n_seq_max, params.kv_unified = SEQUENCES, True
    params.n_threads = params.n_threads_batch = harness.cores()
    context = lib.llama_init_from_model(model, params)
    memory = lib.llama_get_memory(context)
    room = lib.llama_batch_init(2048, 0, SEQUENCES)
    vocab = cpu_shape.shape_of(path).vocab

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wants logits) of one call."""
        room.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            room.token[at], room.pos[at], room.n_seq_id[at] = token, position, 1
            room.seq_id[at][0], room.logits[at] = sequence, wanted
        if lib.llama_decode(context, room) != 0:
            raise SystemExit("llama_decode failed")

    def best(at: int) -> int:
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, at), shape=(vocab,))
        return int(logits.argmax())

    def prompt_rows(count: int, *, sequence: int = 0) -> list[tuple[int, int, int, bool]]:
        ids = cpu_shape.prompt(count, start=sequence)
        return [(token, at, sequence, at == count - 1) for at, token in enumerate(ids)]

    def generate(count: int) -> tuple[list[int], float]:
        lib.llama_memory_clear(memory, False)
        run(prompt_rows(AFTER))
        ids = [best(-1)]
        began = time.perf_counter()
        for at in range(AFTER, AFTER + count):
            run([(ids[-1], at, 0, True)])
            ids.append(best(-1))
        return ids, count / (time.perf_counter() - began)

    def prefill() -> float:
        lib.llama_memory_clear(memory, False)
        began = time.perf_counter()
        run(prompt_rows(PREFILL))
        best(-1)
        return PREFILL / (time.perf_counter() - began)

    def batch() -> float:
        lib.llama_memory_clear(memory, False)
        run([row for sequence in range(SEQUENCES) for row in prompt_rows(AFTER, sequence=sequence)])
        last = [best((sequence + 1) * AFTER - 1) for sequence in range(SEQUENCES)]
        began = time.perf_counter()
        for at in range(AFTER, AFTER + EACH - 1):
            run([(token, at, sequence, True) for sequence, token in enumerate(last)])
            last = [best(sequence) for sequence in range(SEQUENCES)]
        return SEQUENCES * (EACH - 1) / (time.perf_counter() - began)

    measure = {"decode": lambda: generate(DECODE)[1], "prefill": prefill, "batch": batch}[task]
    serve(measure, versions={"llama-cpp-python": lib.__version__}, ids=generate(15)[0])


# --- transformers ---


def transformers(task: str, path: Path) -> None:
    import torch
    import transformers as lib

    torch.set_num_threads(harness.cores())
    model = lib.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        """Tokens a second of what follows the first new token."""
        cache = lib.DynamicCache(config=model.config)
        ids = [int(model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())]
        began = time.perf_counter()
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
        return ids, count / max(time.perf_counter() - began, 1e-9)

    def prefill() -> float:
        began = time.perf_counter()
        generate(cpu_shape.prompt(PREFILL), 0)
        return PREFILL / (time.perf_counter() - began)

    def batch() -> float:
        prompts = [cpu_shape.prompt(AFTER, start=index) for index in range(SEQUENCES)]
        settings = lib.GenerationConfig(max_new_tokens=EACH, do_sample=False, eos_token_id=-1, pad_token_id=2)
        began = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
        taken = time.perf_counter() - began
        assert len(outputs) == SEQUENCES and all(len(o.generated_tokens) == EACH for o in outputs.values())
        return SEQUENCES * EACH / taken

    measure = {"decode": lambda: generate(cpu_shape.prompt(AFTER), DECODE)[1], "prefill": prefill, "serve": batch}
    versions = {"peer torch": torch.__version__, "transformers": lib.__version__}
    serve(measure[task], versions=versions, ids=generate(cpu_shape.prompt(AFTER), 15)[0])


# --- memory ---


def stream(task: str, path: Path) -> None:
    """Tokens a second if reading as many bytes as the packed weights of `path` were all there is to do."""
    import torch

    size = cpu_shape.shape_of(path).packed_bytes(path.name)
    torch.set_num_threads(harness.cores())
    block = torch.ones(size // 8, dtype=torch.int64)

    def read() -> float:
        times = []
        for _ in range(DECODE // 4):
            began = time.perf_counter()
            block.sum()
            times.append(time.perf_counter() - began)
        return len(times) / sum(times)

    serve(read, versions={}, ids=[], bytes=size)


SIDES = {"ours": ours, "llama": llama, "transformers": transformers, "stream": stream}

if __name__ == "__main__":
    SIDES[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
