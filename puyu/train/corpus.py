"""kept.jsonl -> one TokenShard per domain for training, and one per language held out by content hash.

Each document is `<s>` text `</s>`. Written once under a key of the data and the tokenizer; later runs open it.
Whether a document is held out depends on its own text, so more data does not move it across; a language without
such a document gives its smallest hash.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from msgspec import MsgspecError, Struct
from msgspec.json import Decoder

from puyu.data.shards import ShardWriter, TokenShard
from puyu.errors import InputError
from puyu.files import (
    clear_folder,
    decode_json,
    hash_bytes,
    hash_file,
    hash_json,
    read_json,
    read_jsonl_lines,
    write_json,
)
from puyu.log import Progress
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.parallel import current_world

_BATCH_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """Open shards. `heldout_bytes` counts the UTF-8 bytes behind each held-out shard."""

    train: Mapping[str, TokenShard]
    heldout: Mapping[str, TokenShard]
    heldout_bytes: Mapping[str, int]


def open_corpus(data: Path, tokenizer: Tokenizer, folder: Path, *, heldout: float) -> Corpus:
    """Tokenize into `folder`, unless that is done already; rank 0 writes, the others wait for its index."""
    path = data / "kept.jsonl" if data.is_dir() else data
    if not path.is_file():
        raise InputError(
            f"no such file: {path}", remedy="give the folder of the data stage, or a JSONL file with 'text'"
        )
    key = hash_json([hash_file(path), tokenizer.fingerprint, heldout])
    if current_world().is_main and _index(folder, key) is None:
        _write(path, tokenizer, folder, heldout=heldout, key=key)
    while (index := _index(folder, key)) is None:  # not a barrier: tokenizing may outlast its timeout
        time.sleep(0.2)

    def opened(kind: str) -> dict[str, TokenShard]:
        return {name: TokenShard.open(folder / _name(kind, name)) for name in index[kind]}

    return Corpus(opened("train"), opened("heldout"), index["heldout"])


def _index(folder: Path, key: str) -> dict[str, Any] | None:
    if not (folder / "index.json").is_file():
        return None
    index: dict[str, Any] = read_json(folder / "index.json")
    return index if index.get("key") == key else None


def _name(kind: str, name: str) -> str:
    return f"{kind}-{quote(name, safe='')}"


def _write(path: Path, tokenizer: Tokenizer, folder: Path, *, heldout: float, key: str) -> None:
    clear_folder(folder)
    chosen, total = choose_heldout(path, heldout)
    byte_counts: Counter[str] = Counter()
    bar = Progress("tokenize", total, unit="B")
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for rows in _batches(path):
            encoded = tokenizer.encode_batch([row["text"] for row in rows])
            for row, ids in zip(rows, encoded, strict=True):
                size = len(row["text"].encode())
                place = ("train", row["domain"])
                if _hash(row["text"]) in chosen:
                    place = ("heldout", row["language"])
                    byte_counts[row["language"]] += size
                if place not in writers:
                    shard = ShardWriter(
                        folder / _name(*place), tokenizer_hash=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
                    )
                    writers[place] = stack.enter_context(shard)
                writers[place].append(framed(ids, tokenizer))
                bar.update(work=size)
    bar.close()
    domains = sorted(name for kind, name in writers if kind == "train")
    write_json(folder / "index.json", {"key": key, "train": domains, "heldout": dict(sorted(byte_counts.items()))})


def framed(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """A document as the model sees it: `<s>` ids `</s>`, as far as the tokenizer has them."""
    ends = ([tokenizer.bos_id], [tokenizer.eos_id])
    before, after = ([id for id in end if id is not None] for end in ends)
    return [*before, *ids, *after]


class _Row(Struct):
    text: Any = None
    domain: Any = None
    language: Any = None


_ROWS = Decoder(_Row)


def _decoded(line: bytes) -> Any:
    """A row without what nobody asks for, such as its scores; whatever else a line holds as it is."""
    try:
        return _ROWS.decode(line)
    except MsgspecError:
        return decode_json(line)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """`text`, `domain` and `language` of each row; errors name file and line."""
    for number, row in read_jsonl_lines(path, decode=_decoded):
        if not isinstance(row, _Row) or not isinstance(row.text, str) or not row.text:
            raise InputError(f"{path}, line {number}: a document needs the field 'text' with some text")
        yield {"text": row.text, "domain": str(row.domain or "default"), "language": str(row.language or "und")}


def _batches(path: Path) -> Iterator[list[dict[str, str]]]:
    """Rows in groups of a few megabytes: enough for all cores of the tokenizer."""
    rows, size = [], 0
    for row in read_rows(path):
        rows.append(row)
        size += len(row["text"])
        if size >= _BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _hash(text: str) -> int:
    return int(hash_bytes(text.encode("utf-8", "surrogatepass"))[:15], 16)


def choose_heldout(path: Path, share: float) -> tuple[set[int], int]:
    """Hashes of the texts to hold out, and the number of rows. No domain is emptied; share 0 holds out nothing."""
    seen: dict[str, list[tuple[int, str]]] = {}
    total, left = 0, Counter[str]()
    for row in read_rows(path):
        seen.setdefault(row["language"], []).append((_hash(row["text"]), row["domain"]))
        left[row["domain"]] += 1
        total += 1
    if not total:
        raise InputError(f"{path} holds no document", remedy="loosen the filters of the data stage")
    chosen: set[int] = set()
    for rows in seen.values():
        for rank, (value, domain) in enumerate(sorted(rows)):
            wanted = value < share * 16**15 or (rank == 0 and share > 0)
            if wanted and left[domain] > 1:
                chosen.add(value)
                left[domain] -= 1
    return chosen, total
