"""The stage: same bytes again, report that adds up, errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puyu.configure import build
from puyu.errors import ConfigError, InputError
from puyu.files import hash_path, write_jsonl
from puyu.tokenizer.extend import Extension
from puyu.tokenizer.measure import compression, fertility
from puyu.tokenizer.ranks import to_ranks
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from puyu.tokenizer.train import TokenizerConfig, run


@pytest.fixture
def data(tmp_path: Path, corpus: list[str]) -> Path:
    kinds = [
        ("web", "en"),
        ("web", "en"),
        ("web", "zh"),
        ("code", "code"),
        ("code", "code"),
        ("web", ""),
        ("web", "en"),
    ]
    rows = [
        {"id": str(n), "domain": kinds[n % 7][0], "language": kinds[n % 7][1], "text": text}
        for n, text in enumerate(corpus)
    ]
    write_jsonl(tmp_path / "data" / "kept.jsonl", rows)
    return tmp_path / "data"


def test_same_config_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(data=data, vocab_size=400)
    numbers = [run(config, out=tmp_path / name) for name in ("one", "two")]
    assert hash_path(tmp_path / "one") == hash_path(tmp_path / "two")
    assert {k: v for k, v in numbers[0].items() if k != "seconds"} == {
        k: v for k, v in numbers[1].items() if k != "seconds"
    }
    assert numbers[0]["vocab_size"] == 400 == Tokenizer.load(tmp_path / "one").vocab_size
    report = json.loads((tmp_path / "one" / "report.json").read_text(encoding="utf-8"))
    assert set(report["compression"]) == {"code", "en", "other", "zh"}


def test_words_of_chats_get_tokens(data: Path, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "zyzzyva", "arguments": "{}"}}
    chat = {"messages": [{"role": "user", "content": "quokka"}, {"role": "assistant", "tool_calls": [call]}]}
    write_jsonl(tmp_path / "chat.jsonl.gz", [chat] * 50)
    run(TokenizerConfig(data=data, extra_texts=[tmp_path / "chat.jsonl.gz"], vocab_size=600), out=tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode("quokka")) == len(tokenizer.encode("zyzzyva")) == 1


def test_every_short_number_is_one_token_when_asked_for(data: Path, tmp_path: Path) -> None:
    run(TokenizerConfig(data=data, vocab_size=1500, numbers=True), out=tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    short = [f"{n:0{length}d}" for length in (1, 2, 3) for n in range(10**length)]
    assert len(short) == 1110 and all(len(tokenizer.encode(number)) == 1 for number in short)
    assert [tokenizer.token_bytes(id) for id in tokenizer.encode("386277*4")] == [b"386", b"277", b"*", b"4"]
    with pytest.raises(ConfigError, match="numbers: true needs a vocab_size of at least"):
        run(TokenizerConfig(data=data, vocab_size=1300, numbers=True), out=tmp_path / "small")


def test_a_draw_stays_below_the_limit(data: Path, tmp_path: Path, corpus: list[str]) -> None:
    numbers = run(TokenizerConfig(data=data, vocab_size=300, max_bytes=300), out=tmp_path / "out")
    assert 0 < numbers["train_bytes"] <= 300 < sum(len(text.encode("utf-8")) for text in corpus)


def test_documents_in_another_order_give_the_same_tokenizer(data: Path, tmp_path: Path) -> None:
    run(TokenizerConfig(data=data, vocab_size=400), out=tmp_path / "one")
    lines = (data / "kept.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "kept.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    run(TokenizerConfig(data=data, vocab_size=400), out=tmp_path / "two")
    names = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert names[0] == names[1]


def test_a_vocabulary_is_extended_the_way_of_internlm2(data: Path, tmp_path: Path, corpus: list[str]) -> None:
    """The first ranks of one, new tokens from Chinese alone, spare ones, and padding that says what it is."""
    run(TokenizerConfig(data=data, languages=["en"], vocab_size=380), out=tmp_path / "base")
    base = Tokenizer.load(tmp_path / "base")
    extend = Extension(base=tmp_path / "base", keep=330)
    config = TokenizerConfig(
        data=data, languages=["zh"], extend=extend, vocab_size=400, spare=5, pad_to_multiple=64, min_count=1
    )
    run(config, out=tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == 448 == report["vocab_size"] and tokenizer.vocab_size % 64 == 0
    assert (report["kept_ranks"], report["spare"], report["merges"]) == (330, 5 + 48, 400 - 266 - 5)
    assert set(report["compression"]) == {"zh"}
    kept = [base.token_bytes(3 + n) for n in range(330)]
    assert [tokenizer.token_bytes(3 + n) for n in range(330)] == kept
    assert len(set(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))) == tokenizer.vocab_size
    new = [tokenizer.token_bytes(3 + n) for n in range(330, 256 + report["merges"])]
    assert any("我".encode() in token for token in new)
    zh = "我是浦语，一个小小的演示模型。"
    assert len(tokenizer.encode(zh)) < len(base.encode(zh))
    names = [f"[UNUSED_TOKEN_{n}]" for n in range(53)]
    assert [tokenizer.token_id(name) for name in names] == list(range(448 - 7 - 53, 448 - 7))
    assert not tokenizer.special_ids & set(tokenizer.encode("[UNUSED_TOKEN_0]"))
    for text in corpus:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert to_ranks(tokenizer).pattern == to_ranks(base).pattern  # every rank is reached


def test_a_vocabulary_too_small_for_what_is_kept(data: Path, tmp_path: Path) -> None:
    run(TokenizerConfig(data=data, vocab_size=380), out=tmp_path / "base")
    extend = Extension(base=tmp_path / "base", keep=330)
    with pytest.raises(ConfigError, match="vocab_size 330 is too small"):
        run(TokenizerConfig(data=data, extend=extend, vocab_size=330), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="numbers: true cannot come after kept ranks"):
        run(TokenizerConfig(data=data, extend=extend, vocab_size=1500, numbers=True), out=tmp_path / "out")


def test_fertility_compares_tokenizers_by_language(tokenizer: Tokenizer) -> None:
    bytes_only = from_merges([], chat_template="")
    report = fertility(
        {"a": bytes_only, "b": tokenizer}, {"en": ["the answer, the answer"], "zh": ["我是"], "no": [""]}
    )
    assert set(report) == {"en", "zh"}
    row = report["zh"]["a"]
    assert (row["tokens"], row["words"], row["tokens_per_word"]) == (6, 2, 3.0)
    assert (row["torn_share"], row["unknown_share"], row["against_first"]) == (1.0, 0.0, 1.0)
    assert report["en"]["a"] == {
        "texts": 1,
        "bytes": 22,
        "tokens": 22,
        "bytes_per_token": 1.0,
        "chars_per_token": 1.0,
        "words": 4,
        "tokens_per_word": 5.5,
        "torn_share": 0.0,
        "unknown_share": 0.0,
        "against_first": 1.0,
    }
    tokens = len(tokenizer.encode("the answer, the answer"))
    assert report["en"]["b"]["against_first"] == round(tokens / 22, 3) < 0.5


def test_compression_counts_bytes_and_tokens(tokenizer: Tokenizer) -> None:
    rows = compression(tokenizer, {"zh": ["我是浦语"], "en": ["zq7"], "none": []})
    assert set(rows) == {"en", "zh"}
    assert rows["en"] == {"texts": 1, "bytes": 3, "tokens": 3, "bytes_per_token": 1.0, "chars_per_token": 1.0}
    assert rows["zh"]["bytes"] == 12
    assert rows["zh"]["tokens"] == len(tokenizer.encode("我是浦语"))


def test_a_group_that_has_no_tokens_has_no_rates() -> None:
    """A normalizer may leave nothing of blanks."""
    content = json.loads(from_merges([], chat_template="").json_text)
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    strips = Tokenizer(json.dumps(content), {})
    row = compression(strips, {"en": ["  "]})["en"]
    assert row == {"texts": 1, "bytes": 2, "tokens": 0, "bytes_per_token": 0.0, "chars_per_token": 0.0}
    row = fertility({"a": strips}, {"en": ["  "]})["en"]["a"]
    assert (row["tokens"], row["torn_share"], row["unknown_share"], row["against_first"]) == (0, 0.0, 0.0, 0.0)


def test_texts_are_encoded_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = tokenizer.encode_batch, []
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: seen.extend(texts) or encode(texts))
    fertility({"a": tokenizer}, {"en": ["one", "two"]})
    assert seen == ["one", "two"]


def test_a_learned_token_that_spells_a_special_one_is_named(data: Path, tmp_path: Path) -> None:
    run(TokenizerConfig(data=data, vocab_size=300), out=tmp_path / "base")
    write_jsonl(data / "kept.jsonl", [{"text": "<s> old <s> price "}] * 50)
    extend = Extension(base=tmp_path / "base", keep=256, pattern=r"\S+|\s+")
    with pytest.raises(InputError, match="spell special tokens: '<s>'") as caught:
        run(TokenizerConfig(data=data, vocab_size=290, extend=extend), out=tmp_path / "out")
    assert "with a pattern that cuts them" in str(caught.value)


def test_bad_input_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn from"):
        run(TokenizerConfig(), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"no such file: .*kept\.jsonl"):
        run(TokenizerConfig(data=tmp_path), out=tmp_path / "out")
    write_jsonl(data / "kept.jsonl", [{"text": "fine"}, {"txt": "not fine"}])
    with pytest.raises(InputError, match=r"kept\.jsonl, line 2: the field 'text'"):
        run(TokenizerConfig(data=data), out=tmp_path / "out")
    (data / "kept.jsonl").write_text('{"text": "fine"}\n{"text": "no\\udc00pe"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"kept\.jsonl, line 2: half a surrogate pair at character 2"):
        run(TokenizerConfig(data=data), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="longest_piece"):
        build(TokenizerConfig, {"longest_piece": 1 << 25})
    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        build(TokenizerConfig, {"vocab_sise": 300})


def test_a_line_that_is_no_chat_is_named(data: Path, tmp_path: Path) -> None:
    for bad in ({"question": "?"}, {"messages": [{"role": "boss", "content": "x"}]}, {"messages": ["x"]}):
        write_jsonl(tmp_path / "chat.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, bad])
        with pytest.raises(InputError, match=r"chat\.jsonl, line 2 is not a chat"):
            run(TokenizerConfig(data=data, extra_texts=[tmp_path / "chat.jsonl"], vocab_size=300), out=tmp_path / "out")
