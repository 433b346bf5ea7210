"""`puyu pretrain CONFIG --dry-run`: every number that follows from a config, with how; nothing is trained or written.

Works without data and tokenizer where the config says `model.vocab_size`; what is missing is said.

    for line in dry_run(config, job, DEVICES["h100"], processes=8): print(line)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

from puyu.data.classes import weights_by_source
from puyu.errors import InputError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.corpus import KeptRows
from puyu.train.meter import work_of
from puyu.train.planning.job import Job
from puyu.train.planning.search import search
from puyu.train.planning.speed import Device
from puyu.train.pretrain import Phase, PretrainConfig

DAY = 86_400
_SAMPLE = 200
"""Documents whose tokens are counted, to guess those of the others."""


def dry_run(config: PretrainConfig, job: Job, device: Device, *, processes: int) -> Iterator[str]:
    """The lines; `job` is that of the first phase."""
    counts = job.kinds
    total, tables = counts.total(), counts["embedding"] + counts["head"]
    yield f"parameters      {total:,} = " + " + ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"non-embedding   {total - tables:,} = without embedding and head"
    yield f"saved state     {12 * total / 1e9:.1f} GB = 12 B x parameters (weights and two moments, fp32)"
    yield f"checkpoint      {4 * total / 1e9:.1f} GB = 4 B x parameters"
    yield from _data(config)
    tokens, flops, days, name = 0, 0.0, 0.0, f"on {processes} x {device.name}"
    for number, phase in enumerate(config.phases, 1):
        yield f"\nphase {number}"
        yield from _phase(config, phase)
        batch = config.batch_of(phase)
        each = work_of(job.model, outputs=job.model.vocab_size).flops(phase.seq_len)
        work = each * phase.steps * batch
        yield f"FLOPs           {work:.4g} = tokens x {each / 1e9:.4g} G (6N + 12LdT, T {phase.seq_len:,})"
        found = search(replace(job, row=phase.seq_len, batch_tokens=batch), device, processes=processes, enough=1)
        if found.best:
            best = found.best[0]
            lasts = phase.steps * best.seconds.total / DAY
            days += lasts
            yield f"{name:<15} {lasts:.1f} days, {best.peak.total / 1e9:.1f} GB each: {best.words}"
        else:
            yield f"{name:<15} does not fit (`puyu plan` says why)"
        tokens, flops = tokens + phase.steps * batch, flops + work
    steps = sum(phase.steps for phase in config.phases)
    yield f"\nin all          {steps:,} steps, {tokens:,} tokens, {flops:.4g} FLOPs, {days:.1f} days"
    yield from _schedules(config)


def _phase(config: PretrainConfig, phase: Phase) -> Iterator[str]:
    batch = config.batch_of(phase)
    rows, rest = divmod(batch, phase.seq_len * config.accumulate)
    yield f"tokens          {phase.steps * batch:,} = {phase.steps:,} steps x {batch:,}"
    fits = "" if not rest and rows else ": batch_tokens is NOT a multiple of seq_len x accumulate"
    yield f"a step          {rows:,} rows x {phase.seq_len:,} tokens x {config.accumulate} micro-batches{fits}"
    yield f"rotary base     {phase.rope_theta:,.0f}"


def _schedules(config: PretrainConfig) -> Iterator[str]:
    for first, steps, optim in config.schedules():
        warmup = round(optim.warmup * steps) if optim.warmup < 1 else round(optim.warmup)
        begin = first + min(warmup, steps - 1)
        top = f"{warmup:,} steps up to {config.rate(begin):.4g}"
        yield f"learning rate   from step {first + 1:,}: {top}, {optim.schedule}"
    done = 0
    for number, phase in enumerate(config.phases, 1):
        last = done + phase.steps
        rates = config.rate(done), config.rate(last - 1)
        yield f"  phase {number}       {rates[0]:.4g} at step {done + 1:,}, {rates[1]:.4g} at step {last:,}"
        done = last


def _data(config: PretrainConfig) -> Iterator[str]:
    """What is there of data and tokenizer, and how often each source will be seen."""
    path = config.data / "kept.jsonl" if config.data.is_dir() else config.data
    missing = [str(place) for place in (path, config.tokenizer) if not place.exists()]
    if missing:
        yield f"missing         {', '.join(missing)}: epochs of the sources are not known"
        return
    try:
        sizes = _sizes(config)
    except InputError as error:
        yield f"missing         {error.message}"
        return
    seen = Counter[str]()
    for phase in config.phases:
        weights: Mapping[str, float] = sizes
        if phase.weights:
            weights = weights_by_source(phase.weights, config.classes, sizes=sizes)
        share = phase.steps * config.batch_of(phase) / sum(weights.values())
        seen.update({name: share * weight for name, weight in weights.items()})
    for name, size in sizes.items():
        yield f"source {name:<8} about {size:,.0f} tokens, seen {seen[name] / size:.2f} times"


def _sizes(config: PretrainConfig) -> dict[str, float]:
    """Tokens of each source, guessed from its bytes and the first documents."""
    rows = KeptRows(config.data / "kept.jsonl" if config.data.is_dir() else config.data, config.classes)
    tokenizer = Tokenizer.load(config.tokenizer)
    texts = [row.text for row in islice(rows, _SAMPLE)]
    ratio = sum(map(len, tokenizer.encode_arrays(texts))) / max(sum(len(text.encode()) for text in texts), 1)
    sizes = Counter[str]()
    for row in rows:
        sizes[row.source] += len(row.text.encode())
    return {name: size * ratio for name, size in sorted(sizes.items())}
