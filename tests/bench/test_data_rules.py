"""What the bench of the rules says of two lists of decisions, and that it knows every reason under our name."""

import json
import sys

import pytest

from bench import corpus, harness
from puyu.data.presets import PresetConfig


@pytest.fixture
def bench(monkeypatch):
    for name, module in (("harness", harness), ("corpus", corpus)):  # benches are run from their folder
        monkeypatch.setitem(sys.modules, name, module)
    from bench import data_rules

    return data_rules


def test_every_reason_of_the_peer_is_a_rule_of_ours(bench):
    config = PresetConfig.model_validate(list(bench.ORDER))
    rules = {rule for _, preset in config.presets() for rule in type(preset).model_fields}
    assert set(bench.REASONS.values()) <= rules
    assert bench.ours_called("gopher_repetition.empty") == "gopher_repetition.chars_min"
    assert bench.ours_called("fineweb_datatrove.list_ratio") == "fineweb_datatrove.line_breaks_max"
    assert bench.ours_called("") == ""


def test_decisions_reasons_and_texts_are_counted_apart(bench, tmp_path):
    ours = {"c4-paper": [["a", ""], ["", "c4_paper.sentences_min"], ["b", ""], ["", "c4_paper.lorem_ipsum_max"]]}
    peer = {"c4-paper": [["a", ""], ["", "c4_paper.curly_bracket"], ["c", ""], ["d", ""]]}
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    (tmp_path / "peer.json").write_text(json.dumps(peer))
    row = bench.agreement(tmp_path, 2)["c4-paper"]
    assert (row["decisions, both"], row["reasons, both"], row["texts, both"]) == (75, 50, 50)
    assert (row["decisions, corpus"], row["reasons, corpus"], row["decisions, odd pages"]) == (100, 50, 50)


def test_both_sides_read_one_task(bench, tmp_path):
    task, texts = bench.read_task(bench.save_inputs(tmp_path, 1, 3))
    assert len(texts) == task["timed"] + 3 and list(task["sets"]) == [*bench.ORDER, bench.ALL]
