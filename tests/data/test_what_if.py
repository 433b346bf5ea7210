"""Other thresholds over the score columns say what the data stage would say: against runs of the stage itself."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.chain.explore import write_page
from puyu.configure import build, dump, load_yaml
from puyu.data.clean import DataConfig, run
from puyu.data.explore import explore
from puyu.data.filters import ChinesePolicy, CodePolicy, Policies, WordPolicy, bounds, judge, judge_columns
from puyu.data.scores import amounts, exact, open_scores
from puyu.data.stats import stats
from puyu.data.what_if import PASSES, judges_of, lines_of, moved, policy_text, recorded, rejudge, what_if
from puyu.data.why import why
from puyu.errors import ConfigError, InputError
from puyu.files import read_object
from tests.conftest import puyu
from tests.data.looked import make, rows_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("looked"))


def verdicts(folder, **overrides):
    table = open_scores(folder)
    stage, rule = table.labels("stage", "rule")
    judges = judges_of(table, moved(table, overrides=overrides.items()))
    return table, judges, stage, recorded(judges, stage, rule)


def test_unchanged_thresholds_change_nothing(data):
    found = what_if(data, open_scores(data).policies)
    assert found.total.before == found.total.after and found.total.gained.documents == found.total.lost.documents == 0
    assert all(was == now for _, was, now in found.by_rule) and not found.thresholds
    dropped = [row for row in rows_of(data, "dropped") if row["stage"] == "rules"]
    assert sum(was.documents for _, was, _ in found.by_rule) == len(dropped) > 10


def test_the_columns_alone_give_the_recorded_decisions(data):
    """Not by keeping what was recorded: every document is judged anew from its float32 scores."""
    table, judges, stage, old = verdicts(data)
    judged = table.reached_rules(stage) & ~table.curated()
    seen = 0
    for number, policy in enumerate(judges.old):
        rows = np.flatnonzero(judged & (judges.of == number))
        columns = {score: table.score(score)[rows] for _, score, _, _ in bounds(policy)}
        assert judge_columns(columns, policy, size=len(rows)).tolist() == old[rows].tolist()
        seen += len(rows)
    assert seen > 100 and (old[judged] == PASSES).any() and (old[judged] != PASSES).any()


MOVES = [
    ["words.chars_min=100", "words.words_min=20"],
    ["words.chars_min=1200", "zh.chars_min=null", "zh.han_min=10"],
    ["words.words_min=null", "words.digits_max=0.05", "code.chars_min=200", "zh.sentence_marks_min=0.2"],
    ["words.mean_word_max=4.5"],
    ["domains={web: {words: {chars_min: 1200}, zh: {chars_min: 10}}}", "words.words_min=20"],
]


@pytest.mark.parametrize("moves", MOVES)
def test_it_says_what_a_run_with_these_thresholds_says(data, tmp_path, moves):
    pairs = [(key, yaml.safe_load(value)) for key, _, value in (move.partition("=") for move in moves)]
    table, judges, stage, old = verdicts(data, **dict(pairs))
    policies = moved(table, overrides=pairs)
    new = rejudge(judges, table, judged=table.reached_rules(stage) & ~table.curated(), old=old)
    config = build(DataConfig, read_object(data / "ledger.json")["config"])
    run(config.model_copy(update={"policies": policies}), out=tmp_path / "data")
    truth, _, _, fresh = verdicts(tmp_path / "data")
    rows = range(table.size)
    assert truth.ids(list(rows)) == table.ids(list(rows)) and fresh.tolist() == new.tolist()
    found = what_if(data, policies, samples=1000)
    assert found.total.gained.documents + found.total.lost.documents > 0
    assert len(found.gained) == found.total.gained.documents and len(found.lost) == found.total.lost.documents
    assert found.total.after.documents == int(np.count_nonzero(truth.reached_rules(stage) & (fresh == PASSES)))


def test_groups_add_up_and_the_curated_stay(data):
    found = what_if(data, moved(open_scores(data), overrides=[("words.chars_min", 10_000_000)]))
    for groups in (found.by_domain, found.by_language):
        for side in ("reached", "before", "after", "gained", "lost"):
            amounts = [getattr(group, side) for group in groups]
            total = getattr(found.total, side)
            assert sum(a.documents for a in amounts) == total.documents
            assert sum(a.characters for a in amounts) == total.characters
    english = next(group for group in found.by_language if group.name == "en")
    assert english.after.documents == 5, "the curated ones"
    assert "fr" not in [group.name for group in found.by_language], "it left before the rules"
    copies = [row for row in rows_of(data, "dropped") if row["stage"] not in ("language", "rules")]
    assert found.lost_copies == len([row for row in copies if row["language"] == "en" and row["source"] != "gold"]) > 0
    text = "\n".join(lines_of(found))
    assert "Duplicates are not decided again" in text and "words.chars_min: 200 -> 10000000" in text


SCORES = {
    policy: sorted({score for _, score, _, _ in bounds(policy())}) for policy in (WordPolicy, ChinesePolicy, CodePolicy)
}


@settings(max_examples=25)
@given(data=st.data(), policy=st.sampled_from([WordPolicy, ChinesePolicy, CodePolicy]))
def test_judging_columns_is_judging_documents(data, policy):
    """Values on and beside the thresholds, through float32 and back."""
    limits = {score: threshold for _, score, _, threshold in bounds(policy())}
    steps = {score: 1.0 if limit >= 1024 else 1e-4 for score, limit in limits.items()}
    near = {
        score: st.sampled_from([0.0, limit, limit + steps[score], max(limit - steps[score], 0.0), limit * 2, limit / 2])
        for score, limit in limits.items()
    }
    rows = [
        {score: round(data.draw(near[score]) * 1e4) / 1e4 for score in SCORES[policy]}
        for _ in range(data.draw(st.integers(0, 5)))
    ]
    stored = {score: np.array([row[score] for row in rows], dtype=np.float32) for score in SCORES[policy]}
    broken = judge_columns({score: exact(column) for score, column in stored.items()}, policy(), size=len(rows))
    fields = list(policy.model_fields)
    expected = [judge(row, policy()) for row in rows]
    assert [fields[at] if at >= 0 else None for at in broken] == [drop.rule if drop else None for drop in expected]


@given(st.lists(st.integers(0, 10_240_000)))
def test_scores_below_1024_come_back_exactly(parts):
    values = np.array(parts, dtype=np.float64) / 1e4
    assert (exact(values.astype(np.float32)) == values).all()


@given(st.lists(st.integers(0, 2**24)))
def test_counts_come_back_exactly(counts):
    values = np.array(counts, dtype=np.float64)
    assert (exact(values.astype(np.float32)) == values).all()


def test_amounts_are_counted_by_group():
    codes, sizes = np.array([0, 1, 1, 2]), np.array([5, 7, 1, 2])
    found = amounts(codes, sizes, groups=4, mask=np.array([True, True, True, False]))
    assert [(a.documents, a.characters) for a in found] == [(1, 5), (2, 8), (0, 0), (0, 0)]


def test_a_policy_file_reads_as_the_data_stage_reads_it(data, tmp_path):
    text = policy_text(Policies())
    (tmp_path / "all.yaml").write_text(text)
    assert build(Policies, load_yaml(tmp_path / "all.yaml")) == Policies()
    for rule, info in WordPolicy.model_fields.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {rule}: "))
        assert line.endswith(f"# {info.description}")
    (tmp_path / "mine.yaml").write_text("zh: {chars_min: 100}\nwords: {mean_word_max: null}\n")
    mine = moved(open_scores(data), policy=tmp_path / "mine.yaml", overrides=[("zh.han_min", 5)])
    assert mine == build(Policies, {"zh": {"chars_min": 100, "han_min": 5}, "words": {"mean_word_max": None}})
    assert dump(build(Policies, load_yaml(tmp_path / "mine.yaml")).zh)["chars_min"] == 100
    off = build(Policies, {"words": {"mean_word_max": None}})
    (tmp_path / "off.yaml").write_text(policy_text(off))
    assert build(Policies, load_yaml(tmp_path / "off.yaml")) == off
    own = build(Policies, {"domains": {"a: b": {"zh": {"han_min": 3}}, "web": {"words": {"chars_min": None}}}})
    (tmp_path / "own.yaml").write_text(policy_text(own))
    assert build(Policies, load_yaml(tmp_path / "own.yaml")) == own


def test_a_domain_with_thresholds_of_its_own_is_looked_at_apart(data, tmp_path):
    config = build(DataConfig, read_object(data / "ledger.json")["config"])
    own = build(Policies, {"domains": {"web": {"words": {"chars_min": 1200}}}})
    run(config.model_copy(update={"policies": own}), out=tmp_path / "data")
    dropped = [row for row in rows_of(tmp_path / "data", "dropped") if row["rule"] == "chars_min"]
    assert {row["threshold"] for row in dropped if row["domain"] == "web" and row["language"] == "en"} == {1200}
    groups = {row.language: row for row in stats(tmp_path / "data").scores if row.score == "chars"}
    assert groups["en in web"].minimum == 1200
    drawn = {h.language: h for h in explore(tmp_path / "data").histograms if h.score == "chars"}
    assert drawn["en in web"].minimum == 1200
    assert "en in web" in write_page(tmp_path / "data", tmp_path / "page.html").read_text(encoding="utf-8")
    kept = next(row for row in rows_of(tmp_path / "data", "kept") if row["domain"] == "web" and row["language"] == "en")
    assert "threshold 1200" in why(tmp_path / "data", kept["id"])
    table = open_scores(tmp_path / "data")
    found = what_if(tmp_path / "data", moved(table, overrides=[("domains.web.words.chars_min", 200)]))
    assert found.thresholds == (("domains.web.words.chars_min", 1200, 200),)
    assert found.total.gained.documents > 0 and found.total.lost.documents == 0


def test_wrong_input_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'chars_min'"):
        moved(open_scores(data), overrides=[("words.char_min", 3)])
    with pytest.raises(InputError, match=r"no ledger\.json"):
        open_scores(tmp_path)
    (tmp_path / "ledger.json").write_text('{"stages": ["rules"]}')
    with pytest.raises(InputError, match="earlier version"):
        open_scores(tmp_path)
    (tmp_path / "ledger.json").write_bytes((data / "ledger.json").read_bytes())
    (tmp_path / "scores.parquet").write_bytes((data / "scores.parquet").read_bytes()[:-40])
    with pytest.raises(InputError, match="no Parquet file"):
        open_scores(tmp_path)
    (tmp_path / "mine.yaml").write_text("words: {chars_min: many}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: words\.chars_min"):
        moved(open_scores(data), policy=tmp_path / "mine.yaml")


def test_the_commands(data, tmp_path):
    shown = puyu("data", "policy", "--show").stdout
    assert "chars_min: 200" in shown and "(Gopher)" in shown
    (tmp_path / "p.yaml").write_text(puyu("data", "policy", "--show", data).stdout)
    same = puyu("data", "what-if", data, "--policy", tmp_path / "p.yaml").stdout
    assert "no threshold is moved" in same
    asked = puyu("data", "what-if", data, "--set", "words.chars_min=100", "--samples", "2").stdout
    assert "words.chars_min: 200 -> 100" in asked and "newly kept: " in asked
    failed = puyu("data", "what-if", data, "--set", "words.chars_mni=100", check=False)
    assert failed.returncode == 2 and "did you mean 'chars_min'" in failed.stderr
