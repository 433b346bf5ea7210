"""Any `tokenizer.json`: the kinds that published models have, against transformers on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puyu.tokenizer.tokenizer import StreamDecoder
from puyu.tokenizer.tokenizer import Tokenizer as Ours

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234 times; it isn't tired.",
    "我是浦语，一个小小的模型。敏捷的棕色狐狸跳过懒狗。人工智能",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 22))\n",
    "naïve café — Ελλάδα, Россия 🎉",
] * 5
TEXTS = [*CORPUS[:4], "", " ", "  two  spaces ", "a\n\n\nb", "𠮷 👩‍🔬 unseen: ქართული", "x<|im_end|>y</s>z", "12345678"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
# tiktoken's cut for Llama 3 and Qwen
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": SPECIAL, "show_progress": False}


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, **BYTES)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiktoken() -> Tokenizer:
    """As Llama 3 and Qwen 2: NFC, tiktoken's cut, whole words before merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CUT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, **BYTES)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama2() -> Tokenizer:
    """Byte fallback, `Prepend` and `Replace` as normalizers, no pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(CORPUS, trainer)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(value))  # bytes are no special tokens


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[gpt2, tiktoken, llama2, unigram], ids=lambda make: make.__name__)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ours, PreTrainedTokenizerFast]:
    make: Callable[[], Tokenizer] = request.param
    folder: Path = tmp_path_factory.mktemp(make.__name__)
    backend = make()
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return Ours.load(folder), AutoTokenizer.from_pretrained(folder)


def test_ids_and_text_equal_transformers(both: tuple[Ours, PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    assert ours.vocab_size == len(theirs) and (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in [*TEXTS, "a<think>b"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_text_is_data(both: tuple[Ours, PreTrainedTokenizerFast]) -> None:
    ours, _ = both
    for text in ("x</s>y", "<|im_end|>", "<s>"):
        assert not ours.special_ids & set(ours.encode(text)) - {ours.token_id("<unk>")}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stream_gives_the_text(both: tuple[Ours, PreTrainedTokenizerFast], data: st.DataObject) -> None:
    ours, _ = both
    ids = data.draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=20)).map(ours.encode))
    for skip in (False, True):
        stream = StreamDecoder(ours, skip_special=skip)
        assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == ours.decode(ids, skip_special=skip)
