"""What a step took: time by span, tokens a second, memory, and the share of the device's peak (MFU).

MFU = tokens/s x (6N + 12LdT) / peak. N: matrix parameters that a token meets, the output head included, an embedding
that is only looked up not; L layers of attention width d over rows of T tokens (Chowdhery et al. 2022, PaLM, appendix
B). `mfu_causal` counts the half of the attention that a causal mask leaves. Recomputed activations are not counted.
The peak is that of dense bf16 products (puyu/device.py). Only steps that train one model on batches that are there
have it: the rows of PPO, whose steps sample answers and ask other models, have tokens a second of the whole step and no
MFU. Knows no loss and no file.

    meter = Meter(model, device); meter.enter(4096)
    with meter.span("data"): ...
    row = meter.row(tokens)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from puyu.device import peak_flops
from puyu.dist import current_world
from puyu.log import say
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM, ScalarModel
from puyu.train.parallel import agree


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic of training on one token: parameters in products (N), and for each layer the window of its attention
    (0: the whole row), of width d."""

    parameters: int
    windows: tuple[int, ...]
    width: int

    def flops(self, seq_len: int, *, causal: bool = False) -> float:
        """Floating-point operations of forward and backward per token, in rows of `seq_len` tokens."""
        seen = sum(min(window or seq_len, seq_len) for window in self.windows)
        return 6 * self.parameters + (6 if causal else 12) * self.width * seen


def work_of(config: ModelConfig, *, outputs: int) -> Work:
    """The work of a model whose head has `outputs` rows (the vocabulary, or 1)."""
    size, shape = config.hidden_size, config.experts
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # query, output; key, value
    dense = size * heads * config.head_dim + 3 * size * config.intermediate_size
    total = dense * config.num_layers + size * outputs
    if shape is not None:
        sparse = config.num_layers - len(shape.dense_layers)
        units = 3 * (shape.per_token * shape.size + shape.shared_size - config.intermediate_size)
        total += sparse * size * (units + shape.count + bool(shape.shared_size))
    windows = config.windows or (0,) * config.num_layers
    return Work(total, windows, config.num_heads * config.head_dim)


class Meter:
    """Collects the spans of a step. `work`, `seq_len` and `peak` (of all processes together) give the MFU."""

    def __init__(self, model: nn.Module, device: torch.device, *, peak_tflops: float = 0.0) -> None:
        self.model, self.device, self.world = model, device, current_world()
        self._tflops = peak_tflops
        self.work: Work | None = None
        self.seq_len = 0
        self.peak = 0.0
        self.on_span: Callable[[str], None] | None = None
        """Told of each span when it begins."""
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._began = time.perf_counter()

    def enter(self, seq_len: int) -> None:
        """Rows have this many tokens from here on; a new number is said, with the formula. Every process calls it."""
        model = self.model
        if seq_len == self.seq_len or not isinstance(model, CausalLM | ScalarModel):
            return
        outputs = model.config.vocab_size if isinstance(model, CausalLM) else 1
        self.work, self.seq_len = work_of(model.config, outputs=outputs), seq_len
        dtype = model.trunk.compute_dtype or next(model.parameters()).dtype
        flops, source = (self._tflops * 1e12, "peak_tflops") if self._tflops else peak_flops(self.device, dtype)
        self.peak = agree([flops], self.device)[0]
        if self.world.is_main:
            say(f"  {self.formula(source)}")

    def enter_whole(self, lengths: Sequence[int]) -> None:
        """Sequences of these lengths see themselves only: T is what a token's attention may see, on average."""
        self.enter(round(sum(n * n for n in lengths) / sum(lengths)))

    def begin(self) -> Callable[[str], AbstractContextManager[None]]:
        """A step begins; returns `span`."""
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self.span

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what stands inside; on a GPU by events, so that nothing waits."""
        if self.on_span:
            self.on_span(name)
        before = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, before, self._mark()))

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> dict[str, float]:
        """Seconds by `time/NAME` since this was last asked; a GPU is waited for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for name, before, after in self._spans:
            found[f"time/{name}"] = found.get(f"time/{name}", 0.0) + _between(before, after)
        self._spans.clear()
        return {name: round(seconds, 6) for name, seconds in found.items()}

    def row(self, tokens: int) -> dict[str, float]:
        """The numbers of the step that began last, over `tokens` tokens of all processes."""
        spans = self.spans()
        seconds = time.perf_counter() - self._began
        return {**self.rates(tokens, seconds), "memory_gib": round(memory_bytes(self.device) / 2**30, 3), **spans}

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens a second, and MFU where the work is known."""
        rate = tokens / seconds
        found = {"seconds": round(seconds, 6), "tokens_per_s": round(rate, 1)}
        found["tokens_per_s_process"] = round(rate / self.world.size, 1)
        if self.work and self.peak:
            found["mfu"] = round(rate * self.work.flops(self.seq_len) / self.peak, 5)
            found["mfu_causal"] = round(rate * self.work.flops(self.seq_len, causal=True) / self.peak, 5)
        return found

    def formula(self, source: str) -> str:
        """What the MFU is made of, for the beginning of a run; `source` says where the peak is from."""
        assert self.work is not None
        whole, half = (_scaled(self.work.flops(self.seq_len, causal=causal)) for causal in (False, True))
        layers, width = len(self.work.windows), self.work.width
        return (
            f"MFU = tokens/s x (6N + 12LdT) / peak, N {self.work.parameters:,} (products, output head included), "
            f"L {layers}, d {width}, T {self.seq_len}: {whole}FLOP/token ({half}FLOP causal); "
            f"peak {_scaled(self.peak)}FLOP/s ({source})"
        )


def _scaled(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value / 1e3:.4g} k"


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float) and isinstance(after, float)
        return after - before
    return before.elapsed_time(after) / 1e3


def memory_bytes(device: torch.device) -> int:
    """Of this process: the most that tensors took on a GPU since the step began, or resident memory (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0
