"""train.8: the loss over 92,544 tokens of vocabulary in chunks, against full logits: memory, value, gradients, time.

    python bench/train_loss.py [--save] [--pairs 7] [--rows 2048]

fp32, forward and backward of a head of width 256. The peak is that of torch's allocator above what is there before
(hidden states, head, targets), gradients included. `F.linear_cross_entropy`, where torch has it, stands beside.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

VOCAB, WIDTH = 92544, 256
SEED = 0


def chunked(hidden: Any, weight: Any, targets: Any) -> Any:
    import torch

    from puyu.train.objectives import chunked_cross_entropy

    loss_sum, _ = chunked_cross_entropy(hidden, weight, targets, torch.ones(len(targets)))
    return loss_sum / len(targets)


def naive(hidden: Any, weight: Any, targets: Any) -> Any:
    from torch.nn import functional as F

    return F.cross_entropy(F.linear(hidden, weight), targets)


def torchs(hidden: Any, weight: Any, targets: Any) -> Any:
    import torch
    from torch.nn import functional as F

    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {"chunked": chunked, "naive": naive, "torch": torchs}


def given(rows: int) -> tuple[Any, Any, Any]:
    """Hidden states and head, such that the loss is near 11, and targets."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 0.02).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (rows,), generator=generator)


def learn(way: str, tensors: tuple[Any, Any, Any]) -> tuple[float, Any, Any]:
    """Loss and both gradients."""
    hidden, weight, targets = tensors
    loss = WAYS[way](hidden, weight, targets)
    loss.backward()
    found = float(loss.detach()), hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    return found


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator held at once during a call, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def side(way: str) -> Callable[[Path], None]:
    """A worker; the path is the number of rows."""

    def work(rows: Path) -> None:
        import torch
        import worker

        from puyu.train.memory import keep_freed_pages

        keep_freed_pages(torch.device("cpu"))  # for all sides
        tensors = given(int(str(rows)))
        peak = peak_bytes(lambda: learn(way, tensors))
        learn(way, tensors)
        worker.ready(versions={"torch": torch.__version__}, peak=peak)
        while worker.told():
            began = time.perf_counter()
            learn(way, tensors)
            worker.answer(time.perf_counter() - began)

    return work


def differences(rows: int, way: str) -> dict[str, float]:
    """Relative difference from full logits: of the loss, and of the gradients' norms of difference."""
    tensors = given(rows)
    (loss, *grads), (right, *wanted) = learn(way, tensors), learn("naive", tensors)
    found = {"loss": abs(loss / right - 1)}
    for name, grad, other in zip(("hidden", "head"), grads, wanted, strict=True):
        found[name] = float((grad - other).norm() / other.norm())
    return found


def compare(arguments: argparse.Namespace) -> None:
    from torch.nn import functional as F

    run = harness.Run("train_loss", peer_flags="F.linear, F.cross_entropy over full logits, fp32")
    ways = ["chunked", "naive", *(["torch"] if "linear_cross_entropy" in dir(F) else [])]
    workers = {way: harness.Worker([sys.executable, __file__, "--worker", way, str(arguments.rows)]) for way in ways}
    times = harness.alternate(workers["chunked"], workers["naive"], pairs=arguments.pairs)
    run.versions = workers["naive"].facts["versions"]
    peaks = {way: worker.facts["peak"] for way, worker in workers.items()}
    run.notes = {"rows": arguments.rows, "peak_bytes": peaks}
    if "torch" in workers:
        run.notes["F.linear_cross_entropy"] = {
            "s": workers["torch"].measure(),
            "differences": differences(arguments.rows, "torch"),
        }
    for made in workers.values():
        made.close()
    found = differences(arguments.rows, "chunked")
    run.notes["differences"] = found
    counted = [[float(peaks[way])] * harness.MIN_PAIRS for way in ("chunked", "naive")]  # a count: the same each time
    rows = [harness.Samples("train.8", *counted, unit="bytes"), harness.Samples("train.8b", [max(found.values())])]
    run.counted("train_loss_memory").finish(rows, save=arguments.save)
    run.finish([harness.Samples("train.8c", *times, unit="s")], save=arguments.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="samples of each side")
    parser.add_argument("--rows", type=int, default=2048, help="tokens of the batch")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side(arguments.worker[0])(Path(arguments.worker[1]))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
