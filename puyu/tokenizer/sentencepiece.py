"""A SentencePiece `tokenizer.model` -> `tokenizer.json`, for checkpoints that ship nothing else (InternLM, InternLM2).

Reads the few protobuf fields that matter by itself and builds BPE or Unigram with byte fallback, dummy prefix,
whitespace rules and character map as the model has them; ids equal those of the `sentencepiece` library (tested).
Names in tokenizer_config.json's `added_tokens_decoder` replace those of the model: InternLM2 gives its chat markers to
pieces that were kept free. Source: Kudo & Richardson 2018 (arXiv 1808.06226), sentencepiece_model.proto.

    text = to_tokenizer_json(Path("tokenizer.model").read_bytes(), config)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from struct import unpack
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from puyu.errors import InputError

SPACE = "▁"


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


UNIGRAM, BPE = 1, 2


@dataclass(slots=True)
class Piece:
    text: str = ""
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(slots=True)
class Model:
    """The fields of a ModelProto that decide about ids, with the defaults of the format."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    space_is_suffix: bool = False
    character_map: bytes = b""
    dummy_prefix: bool = True
    trims_spaces: bool = True
    escapes_spaces: bool = True


def to_tokenizer_json(data: bytes, config: Mapping[str, Any]) -> str:
    """The same tokenizer in Hugging Face's format; InputError for a file that is torn or of another algorithm."""
    model = read_model(data)
    _rename(model, config)
    backend = tokenizers.Tokenizer(_bpe(model) if model.algorithm == BPE else _unigram(model))
    backend.normalizer = normalizers.Sequence(_normalizers(model))
    splits = _splits(model)
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.dummy_prefix else steps)
    _add_tokens(backend, model, config)
    _begin_with_bos(backend, config)
    return backend.to_str(pretty=True)


def read_model(data: bytes) -> Model:
    """Parse a serialized ModelProto."""
    model = Model()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                _read_trainer(model, value)
            elif number == 3:
                _read_normalizer(model, value)
    except (IndexError, ValueError, TypeError) as error:
        raise InputError(f"this is no SentencePiece model: {error}", remedy="copy tokenizer.model again") from error
    if model.algorithm not in (UNIGRAM, BPE) or model.space_is_suffix or not model.escapes_spaces or not model.pieces:
        remedy = "use a folder that has a tokenizer.json"
        raise InputError("only BPE and Unigram models with spaces as prefixes are supported", remedy=remedy)
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: integers, fixed words as bytes, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = {1: (8, at), 5: (4, at)}.get(wire) or _varint(data, at)
        if wire not in (1, 2, 5) or at + size > len(data):
            raise ValueError(f"a field that cannot be read at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _piece(data: bytes) -> Piece:
    piece = Piece()
    for number, value in _fields(data):
        if number == 1:
            piece.text = value.decode("utf-8")
        elif number == 2:
            piece.score = unpack("<f", value)[0]
        elif number == 3:
            piece.kind = Kind(value)
    return piece


def _read_trainer(model: Model, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.algorithm = value
        elif number == 24:
            model.space_is_suffix = bool(value)
        elif number == 35:
            model.byte_fallback = bool(value)


def _read_normalizer(model: Model, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.character_map = value
        elif number == 3:
            model.dummy_prefix = bool(value)
        elif number == 4:
            model.trims_spaces = bool(value)
        elif number == 5:
            model.escapes_spaces = bool(value)


def _rename(model: Model, config: Mapping[str, Any]) -> None:
    """Give pieces the names that tokenizer_config.json has for their ids; such a piece is no text any more."""
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if int(key) < len(model.pieces) and model.pieces[int(key)].text != token["content"]:
            model.pieces[int(key)] = Piece(token["content"], 0.0, Kind.CONTROL)


def _texts(model: Model, *kinds: Kind) -> list[str]:
    return [piece.text for piece in model.pieces if piece.kind in kinds]


def _unknown(model: Model) -> int | None:
    return next((id for id, piece in enumerate(model.pieces) if piece.kind is Kind.UNKNOWN), None)


def _bpe(model: Model) -> models.BPE:
    """Every way to put a piece together from two others is a merge; better scores go first."""
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind in (Kind.NORMAL, Kind.UNUSED)}
    order = sorted((text for text in normal if len(text) > 1), key=lambda text: -normal[text])
    merges = [
        (text[:cut], text[cut:])
        for text in order
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown = _unknown(model)
    return models.BPE(
        {piece.text: id for id, piece in enumerate(model.pieces)},
        merges,
        unk_token=None if unknown is None else model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(_texts(model, Kind.USER_DEFINED)),  # a symbol is a word of its own, see `_splits`
    )


def _unigram(model: Model) -> models.Unigram:
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=_unknown(model), byte_fallback=model.byte_fallback)


def _normalizers(model: Model) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.trims_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _splits(model: Model) -> list[pre_tokenizers.PreTokenizer]:
    """Cut text around user-defined symbols. And where every word of the vocabulary is found in text, cut off the first
    character of what spells a control piece or a byte: text is data. (Only there may ids differ from SentencePiece's: a
    piece that reaches across that cut is not found.)"""
    symbols = _texts(model, Kind.USER_DEFINED)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if symbols:
        steps.append(pre_tokenizers.Split(Regex(_any_of(symbols)), "isolated"))
    if symbols or model.algorithm == UNIGRAM:
        reserved = [t for t in _texts(model, Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE, Kind.UNUSED) if len(t) > 1]
        steps += [cut_apart(reserved)] if reserved else []
    return steps


def cut_apart(names: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts off the first character of these names, so that no model finds one of them whole in a text."""
    heads = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names]
    return pre_tokenizers.Split(Regex("|".join(heads)), "isolated")


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _add_tokens(backend: tokenizers.Tokenizer, model: Model, config: Mapping[str, Any]) -> None:
    special = [AddedToken(text, special=True, normalized=False) for text in _texts(model, Kind.UNKNOWN, Kind.CONTROL)]
    backend.add_special_tokens(special)
    listed = config.get("added_tokens_decoder") or {}
    for id, token in sorted((int(key), token) for key, token in listed.items()):
        flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        added = AddedToken(token["content"], special=bool(token.get("special", False)), **flags)
        backend.add_tokens([added])
        if backend.token_to_id(token["content"]) != id:
            remedy = "copy tokenizer.model and tokenizer_config.json again"
            raise InputError(f"added token {token['content']!r} cannot have the id {id}", remedy=remedy)


def _begin_with_bos(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """For other readers of the file; this package places its markers itself."""
    bos = config.get("bos_token")
    name = bos.get("content") if isinstance(bos, Mapping) else bos
    id = backend.token_to_id(name) if isinstance(name, str) else None
    if id is not None and config.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, id)]
        )
