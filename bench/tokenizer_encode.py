"""data.14: texts to ids, `Tokenizer.encode_batch` against the Python API of Hugging Face `tokenizers`, equal ids.

    python bench/tokenizer_encode.py [--save] [--pairs 9] [--peer-python PATH]

Half English, half Chinese by bytes: every second document of the samples, in a vocabulary of 32,768 tokens learned from
the others. A sample is MB of text a second, from a list of str to lists of int, on all cores on both sides. The peer is
`encode_batch_fast(texts)` and `.ids`. tiktoken with the same ranks runs beside it, for information only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness

VOCAB, SIZE = 32_768, 4_000_000

Ids = list[list[int]]


def loop(encode: Callable[[list[str]], Ids], folder: Path, **versions: str) -> None:
    """Warm up, say what came out, then measure when told."""
    import worker

    texts: list[str] = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    size = sum(len(text.encode("utf-8")) for text in texts)
    encode(texts)
    digest = digest_of(encode(texts))
    worker.ready(versions=versions, digest=digest, bytes=size)
    while worker.told():
        began = time.perf_counter()
        encode(texts)
        worker.answer(size / 1e6 / (time.perf_counter() - began))


def digest_of(ids: Ids) -> str:
    import hashlib

    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()


def ours(folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import puyu
    from puyu.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    loop(tokenizer.encode_batch, folder, puyu=puyu.__version__)


def peer(folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> Ids:
        return [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    loop(encode, folder, tokenizers=tokenizers.__version__)


def bare(folder: Path) -> None:
    """tiktoken with our ranks."""
    import base64

    import tiktoken

    note = json.loads((folder / "ranks.json").read_text(encoding="utf-8"))
    lines = [line.split() for line in (folder / "ranks").read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding("ours", pat_str=note["pattern"], mergeable_ranks=ranks, special_tokens={})
    threads = os.cpu_count() or 1
    loop(
        lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads), folder, tiktoken=tiktoken.__version__
    )


def save_inputs(folder: Path) -> None:
    """A tokenizer, its ranks, and the texts."""
    import tokenizer_texts

    from puyu.files import write_jsonl
    from puyu.tokenizer.ranks import to_ranks, write_ranks
    from puyu.tokenizer.tokenizer import Tokenizer
    from puyu.tokenizer.train import TokenizerConfig, run

    learned: list[dict[str, Any]] = []
    shown: list[str] = []
    for language in ("en", "zh"):
        texts, size = tokenizer_texts.sample_texts(language), 0
        learned += [{"text": text, "language": language} for text in texts[::2]]
        for text in texts[1::2]:
            if size < SIZE // 2:
                shown.append(text)
                size += len(text.encode("utf-8"))
    write_jsonl(folder / "learn.jsonl", learned)
    run(TokenizerConfig(data=folder / "learn.jsonl", vocab_size=VOCAB, max_bytes=1 << 30), out=folder)
    write_ranks(to_ranks(Tokenizer.load(folder)), folder / "ranks")
    (folder / "texts.json").write_text(json.dumps(shown, ensure_ascii=False), encoding="utf-8")


def compare(arguments: argparse.Namespace) -> None:
    run = harness.Run("tokenizer_encode", peer_flags="encode_batch_fast(add_special_tokens=False), all cores")
    with tempfile.TemporaryDirectory() as name:
        save_inputs(Path(name))
        us = harness.Worker([sys.executable, __file__, "--worker", "ours", name])
        them = harness.Worker([arguments.peer_python or sys.executable, __file__, "--worker", "peer", name])
        if us.facts["digest"] != them.facts["digest"]:
            raise SystemExit("the ids differ")
        found = harness.alternate(us, them, pairs=arguments.pairs)
        us.close()
        them.close()
        third = harness.Worker([harness.peer_python("tiktoken"), __file__, "--worker", "bare", name])
        rates = [third.measure() for _ in range(arguments.pairs)]
        third.close()
    run.versions = us.facts["versions"] | them.facts["versions"] | third.facts["versions"]
    run.notes = {
        "text_bytes": us.facts["bytes"],
        "tiktoken_mb_s": sorted(rates)[len(rates) // 2],
        "tiktoken_ids_equal": third.facts["digest"] == us.facts["digest"],
    }
    run.finish([harness.Samples("data.14", *found, unit="MB/s")], save=arguments.save)


if __name__ == "__main__":
    harness.comparison(__doc__ or "", {"ours": ours, "peer": peer, "bare": bare}, compare, pairs=9)
