"""A small n-gram language model, trained in seconds from any texts, that scores megabytes a second.

    >>> model = train(["the cat sat. the cat ran."] * 4, NgramConfig(vocabulary_min=1))
    >>> scored = model.logprob(["the cat sat.", "tac eht tas."])
    >>> bool(scored.bits_per_byte[0] < scored.bits_per_byte[1])
    True

Units are words for languages with blanks, single characters for Chinese and Japanese, and every mark and line end by
itself; in lower case, a number as 0. One model serves a mixture of languages or, better, one language each. Units out
of the vocabulary are one class, spelled byte by byte, so that a text of any kind has a probability: over the vocabulary
the probabilities after any context sum to one. The end of a text is not predicted.

`cached` is the model of Kuhn and De Mori (1990): (1 - c) P(w|h) + c P(w | units and pairs of an earlier text), which is
how a model with a memory of two units can be asked whether one part of a document helps with another.

A model is one file: a line of magic, a JSON header (order, hash, counts, sources), arrays; loaded by mapping it. The
same texts give the same bytes in any order. It knows no thresholds (`puyu.data.perplexity`, `puyu.data.long`).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puyu.configure import Config
from puyu.data import ngram_train as counting
from puyu.data.ngram_native import MAX_ORDER, SYMBOLS, load, model_of, shift_of
from puyu.documents.characters import HAN, KANA, folded
from puyu.errors import ConfigError, InputError
from puyu.files import atomic_write

MAGIC = b"puyu-ngram 1\n"
HASH = "FNV-1a 64, splitmix64"
UNKNOWN = 1
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]

_UNIT = re.compile(rf"[{HAN}{KANA}]|[^\W{HAN}{KANA}]+|\s+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
_MASK = (1 << 64) - 1
_PRIME = 0x9E3779B97F4A7C15
_BATCH_CHARACTERS = 4_000_000


class NgramConfig(Config):
    """Size of an n-gram model."""

    order: int = 3
    """Units an n-gram has, at most; 2 to 5."""
    vocabulary: int = 65_000
    """Units with an id of their own, at most; ids of all units of an n-gram must fit in 63 bits."""
    vocabulary_min: int = 2
    """How often a unit must stand in the texts to have one."""
    ngram_min: tuple[int, ...] = (1, 2, 2, 2)
    """How often a 2-gram, 3-gram ... must stand there to be kept."""
    max_ngrams: int = 4_000_000
    """n-grams to keep of each order, at most: the smallest count rises until they fit."""
    memory_mb: int = 400
    """What training holds in memory, about; more goes to a temporary folder."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a model says of texts, a number for each."""

    bits: Floats
    """Information: minus log2 of the probability."""
    units: Floats
    bytes: Floats
    unknown: Floats
    """Units that the model does not know."""
    unknown_bits: Floats
    """Their part of `bits`."""

    @property
    def bits_per_unit(self) -> Floats:
        return self.bits / np.maximum(self.units, 1)

    @property
    def bits_per_byte(self) -> Floats:
        return self.bits / np.maximum(self.bytes, 1)

    @property
    def perplexity(self) -> Floats:
        """2 to the bits per unit (1024 bits at most, so that it stays a number)."""
        return np.exp2(np.minimum(self.bits_per_unit, 1023))


@dataclass(frozen=True, eq=False)
class NgramModel:
    """A model in memory, or mapped from its file."""

    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    @property
    def order(self) -> int:
        return int(self.header["order"])

    @property
    def bits(self) -> int:
        """Of an id in the key of an n-gram."""
        return int(self.header["bits"])

    @property
    def size(self) -> int:
        """Ids: the boundary (0), the class of unknown units (1), and the vocabulary."""
        return int(self.header["size"])

    @cached_property
    def native(self) -> Any:
        """The arrays as the library takes them."""
        return model_of(self.arrays, order=self.order, bits=self.bits)

    def logprob(self, texts: Sequence[str]) -> Scored:
        """Information of each text."""
        library = load()
        rows = library.score(self.native, texts) if library else np.array([_score(self, text) for text in texts])
        bits, units, unknown, unknown_bits = rows.reshape(-1, 4).T
        sizes = np.array([len(text.encode("utf-8")) for text in texts], dtype=np.float64)
        return Scored(bits, units, sizes, unknown, unknown_bits)

    def walk(self, text: str) -> Floats:
        """log2 of the probability of each unit after those before it."""
        library = load()
        return library.walk(self.native, text) if library else np.array([log for log, _ in _walk(self, text)])

    def cached(self, text: str, context: str, *, cache: float = 0.1, pairs: float = 0.5) -> Floats:
        """log2 of the probability of each unit of the text, given the units of another text before it."""
        before = unit_hashes([context])
        share = cache_share(unit_hashes([text]), before, pairs=pairs, ahead=before)
        return np.log2(mixture(np.exp2(self.walk(text)), share, cache=cache))

    def save(self, path: Path) -> None:
        """Write the file; nothing in it depends on the time or the machine."""
        places, at = {}, 0
        for name, array in self.arrays.items():
            places[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "at": at}
            at += -(-array.nbytes // 64) * 64
        header = json.dumps({**self.header, "arrays": places, "bytes": at}, ensure_ascii=False).encode("utf-8")
        head = MAGIC + len(header).to_bytes(8, "little") + header
        with atomic_write(path, "wb") as stream:
            stream.write(head + bytes(-len(head) % 64))
            for array in self.arrays.values():
                stream.write(array.tobytes() + bytes(-array.nbytes % 64))

    @staticmethod
    def load(path: Path) -> NgramModel:
        """Map a file; InputError when it is not one, or torn."""
        if not path.is_file():
            raise InputError(f"no such file: {path}", remedy="train it: puyu data train-ngram FILES --out MODEL")
        with open(path, "rb") as stream:
            head = stream.read(len(MAGIC) + 8)
            length = int.from_bytes(head[len(MAGIC) :], "little")
            if head[: len(MAGIC)] != MAGIC or length > path.stat().st_size:
                raise InputError(f"{path} is no n-gram model of this version", remedy="train it again")
            header = json.loads(stream.read(length))
        start = -(-(len(head) + length) // 64) * 64
        places = header.pop("arrays")
        if path.stat().st_size != start + header.pop("bytes"):
            raise InputError(f"{path} is torn: {path.stat().st_size} bytes", remedy="copy or train it again")
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        return NgramModel(header, {name: _mapped(whole, start, place) for name, place in places.items()})


def _mapped(whole: NDArray[np.uint8], start: int, place: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(place["dtype"])
    size = dtype.itemsize * int(np.prod(place["shape"], dtype=np.int64))
    begin = start + int(place["at"])
    return whole[begin : begin + size].view(dtype).reshape(place["shape"])


# ---- training


def train(
    texts: Iterable[str], config: NgramConfig | None = None, *, sources: Sequence[Mapping[str, Any]] = ()
) -> NgramModel:
    """A model of the texts, which are read twice (a list, or anything that can be iterated again).

    `sources` goes to the header. InputError when there is not one unit.
    """
    config = config or NgramConfig()
    assert iter(texts) is not texts, "texts are read twice; an iterator can be read once"
    _check(config)
    limit = max(config.memory_mb * 2**20 // (48 * config.order), 1)
    with tempfile.TemporaryDirectory(prefix="puyu-ngram-") as name:
        arrays = _vocabulary(texts, config, counting.Counts(Path(name), limit=config.order * limit))
        bits = int(arrays.pop("size")[0] - 1).bit_length()
        return _count(texts, config, arrays, _Plan(Path(name), limit, bits, sources))


@dataclass(frozen=True, slots=True)
class _Plan:
    folder: Path
    limit: int
    bits: int
    sources: Sequence[Mapping[str, Any]]


def _check(config: NgramConfig) -> None:
    if not 2 <= config.order <= MAX_ORDER:
        raise ConfigError(f"order: {config.order} is not in 2 .. {MAX_ORDER}")
    room = 2 ** (63 // config.order) - 2
    if not 0 < config.vocabulary <= room:
        remedy = f"at most {room} units fit with order {config.order}"
        raise ConfigError(f"vocabulary: {config.vocabulary} is too large or none", remedy=remedy)
    if len(config.ngram_min) < config.order - 1 or list(config.ngram_min) != sorted(config.ngram_min):
        raise ConfigError("ngram_min: one count for each order from 2 on, none smaller than the one before")


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """A few megabytes at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _vocabulary(texts: Iterable[str], config: NgramConfig, counts: counting.Counts) -> dict[str, NDArray[Any]]:
    for batch in batches(texts):
        counts.add(unit_hashes(batch))
    found = counting.most_frequent(counts, size=config.vocabulary, minimum=config.vocabulary_min)
    keys, ids = counting.table_of(found, (np.arange(2, len(found) + 2, dtype=np.uint32), 0))
    return {"unit_keys": keys, "unit_ids": ids, "size": np.array([len(found) + 2])}


def _count(texts: Iterable[str], config: NgramConfig, arrays: dict[str, NDArray[Any]], plan: _Plan) -> NgramModel:
    size = int((arrays["unit_ids"] > 0).sum()) + 2
    units, spellings = np.zeros(size, dtype=np.int64), np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
    orders = range(2, config.order + 1)
    counts = {n: counting.Counts(plan.folder, limit=plan.limit, shift=plan.bits) for n in orders}
    number = 0
    for batch in batches(texts):
        ids, ends, spelled = unit_ids(arrays, batch)
        units += np.bincount(ids, minlength=size)
        spellings += spelled
        number += len(batch)
        for n in orders:
            counts[n].add(counting.packed(ids, ends, n=n, bits=plan.bits))
    if not units.sum():
        raise InputError("there is no text to learn from")
    grams = _grams(counts, config, plan.bits)
    arrays |= {"unigrams": counting.unigrams_of(units), "spelling": counting.spelling_of(spellings)}
    header = {
        "order": config.order,
        "bits": plan.bits,
        "size": size,
        "hash": HASH,
        "texts": number,
        "units": int(units.sum()),
        "unknown": int(units[UNKNOWN]),
        "ngrams": {str(n): {"kept": len(g.keys), "seen": g.seen, "smallest": g.minimum} for n, g in grams.items()},
        "config": config.model_dump(mode="json", exclude={"memory_mb"}),
        "sources": list(plan.sources),
    }
    return NgramModel(header, arrays | _tables(grams, size))


def _grams(counts: Mapping[int, counting.Counts], config: NgramConfig, bits: int) -> dict[int, counting.Grams]:
    grams: dict[int, counting.Grams] = {}
    least = 1
    for n, found in counts.items():
        # never smaller than for shorter ones: whoever has an n-gram also has what it ends with
        least = max(least, config.ngram_min[n - 2])
        grams[n] = counting.grams_of(found, bits=bits, least=least, room=config.max_ngrams)
        least = grams[n].minimum
    return grams


def _tables(grams: Mapping[int, counting.Grams], size: int) -> dict[str, NDArray[Any]]:
    weights = np.ones(size, dtype=np.float32)
    weights[grams[2].contexts.astype(np.int64)] = grams[2].weights
    arrays: dict[str, NDArray[Any]] = {"weights": weights}
    for n, found in grams.items():
        none = np.empty(0, np.uint64), np.empty(0, np.float32)
        contexts, context_weights = (grams[n + 1].contexts, grams[n + 1].weights) if n + 1 in grams else none
        keys = np.union1d(found.keys, contexts)
        probabilities, after = np.zeros(len(keys), dtype=np.float32), np.ones(len(keys), dtype=np.float32)
        probabilities[np.searchsorted(keys, found.keys)] = found.probabilities
        after[np.searchsorted(keys, contexts)] = context_weights
        names = (f"keys_{n}", f"probabilities_{n}", f"weights_{n}")
        arrays |= dict(zip(names, counting.table_of(keys, (probabilities, 0), (after, 1)), strict=True))
    return arrays


# ---- units


def units(text: str) -> list[str]:
    """The units of a text, in lower case, numbers as 0: what the native side hashes without making them."""
    return [unit for _, unit in spans(text)]


def spans(text: str) -> Iterator[tuple[int, str]]:
    """(first character, unit) of each."""
    for match in _UNIT.finditer(folded(text)):
        part = match.group()
        if not part.isspace():
            yield match.start(), _NUMBER.sub("0", part)
        elif "\n" in part:
            yield match.start(), "\n"


@lru_cache(maxsize=1 << 16)
def _hash(unit: str) -> int:
    value = 0xCBF29CE484222325
    for byte in unit.encode("utf-8"):
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def unit_hashes(texts: Sequence[str]) -> Hashes:
    """Of all units, text by text."""
    library = load()
    if library is not None:
        return library.units(texts)[0]
    return np.array([_hash(unit) for text in texts for unit in units(text)], dtype=np.uint64)


def unit_ids(
    arrays: Mapping[str, NDArray[Any]], texts: Sequence[str]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """(ids of all units, their number up to the end of each text, [257, 257] bytes of unknown units after bytes)."""
    library = load()
    if library is not None:
        return library.ids(arrays, texts)
    ids: list[int] = []
    ends = []
    spellings = np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
    for text in texts:
        for unit in units(text):
            ids.append(_id(arrays, unit))
            if ids[-1] == UNKNOWN:
                np.add.at(spellings, _symbols(unit), 1)
        ends.append(len(ids))
    return np.array(ids, dtype=np.uint32), np.array(ends, dtype=np.int64), spellings


def _symbols(unit: str) -> tuple[list[int], list[int]]:
    """(what stands before, the byte or the end) of each step of its spelling."""
    path = [SYMBOLS - 1, *unit.encode("utf-8"), SYMBOLS - 1]
    return path[:-1], path[1:]


# ---- the slow twin of the native side


def _find(keys: Hashes, key: int) -> int:
    place = ((key * _PRIME) & _MASK) >> shift_of(keys)
    while int(keys[place]) != key:
        if keys[place] == counting.EMPTY:
            return -1
        place += 1
    return place


def _id(arrays: Mapping[str, NDArray[Any]], unit: str) -> int:
    place = _find(arrays["unit_keys"], _hash(unit))
    return UNKNOWN if place < 0 else int(arrays["unit_ids"][place])


def probability(model: NgramModel, history: Sequence[int], id: int) -> float:
    """P of an id after ids, the last one nearest; boundaries stand before the first."""
    p = float(model.arrays["unigrams"][id])
    context, key = 0, id
    past = [0] * model.order + list(history)
    for n in range(2, model.order + 1):
        context |= past[1 - n] << (model.bits * (n - 2))
        key |= past[1 - n] << (model.bits * (n - 1))
        keys, found = model.arrays[f"keys_{n}"], 0.0
        if (place := _find(keys, key)) >= 0:
            found = float(model.arrays[f"probabilities_{n}"][place])
        p = found + _weight(model, context, n - 1) * p
    return p


def _weight(model: NgramModel, context: int, length: int) -> float:
    """What is left for the shorter context."""
    if length == 1:
        return float(model.arrays["weights"][context])
    place = _find(model.arrays[f"keys_{length}"], context)
    return float(model.arrays[f"weights_{length}"][place]) if place >= 0 else 1.0


def _walk(model: NgramModel, text: str) -> Iterator[tuple[float, int]]:
    """(log2 of the probability, id) of each unit."""
    history: list[int] = []
    for unit in units(text):
        id = _id(model.arrays, unit)
        log = float(np.log2(probability(model, history[-model.order :], id)))
        if id == UNKNOWN:
            log += float(model.arrays["spelling"][_symbols(unit)].sum(dtype=np.float64))
        history.append(id)
        yield log, id


def _score(model: NgramModel, text: str) -> tuple[float, int, int, float]:
    rows = list(_walk(model, text))
    unknown = [-log for log, id in rows if id == UNKNOWN]
    return -sum(log for log, _ in rows), len(rows), len(unknown), sum(unknown)


# ---- the cache


def mixture(probabilities: Floats, share: Floats, *, cache: float) -> Floats:
    """(1 - cache) P + cache P(unit | earlier text)."""
    return (1 - cache) * probabilities + cache * share


def cache_share(units: Hashes, before: Hashes, *, pairs: float, ahead: Hashes) -> Floats:
    """P(unit | earlier text): how often it stands there, mixed with how often after the unit before it.

    `ahead` ends with the unit that stands before the first one, if there is one. Where the unit before has no pair in
    the earlier text, single units count alone, so that the shares of all units sum to one.
    """
    singles = occurrences(before, units) / max(len(before), 1)
    previous = np.concatenate([ahead[-1:], units[:-1]])
    known = len(units) - len(previous)  # 1 where the first unit has none before it
    left = np.concatenate([np.zeros(known), occurrences(before[:-1], previous)])
    both = np.concatenate([np.zeros(known), occurrences(_pairs(before), previous * np.uint64(_PRIME) + units[known:])])
    share = np.divide(both, left, out=np.zeros(len(units)), where=left > 0)
    return np.where(left > 0, singles + pairs * (share - singles), singles)


def _pairs(units: Hashes) -> Hashes:
    return units[:-1] * np.uint64(_PRIME) + units[1:]


def occurrences(of: Hashes, at: Hashes) -> Floats:
    """How often each of `at` stands in `of`."""
    ordered = np.sort(of)
    return (np.searchsorted(ordered, at, side="right") - np.searchsorted(ordered, at)).astype(np.float64)
