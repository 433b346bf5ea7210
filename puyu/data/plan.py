"""What the data stage is asked to do: its config, and the stages that follow from it.

    >>> config = DataConfig(sources=[{"name": "notes", "path": "notes/*.txt"}])
    >>> [stage.name for stage in map_stages(config, config.sources[0])]
    ['language', 'rules']

It runs nothing: `puyu.data.clean` does.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

from puyu.configure import Config, dump
from puyu.data import pii
from puyu.data.contamination import ContaminationConfig, ContaminationFilter
from puyu.data.dedup import DedupConfig
from puyu.data.filters import LanguageFilter, Policies, RuleFilter
from puyu.data.long import LongConfig, LongFilter
from puyu.data.perplexity import PerplexityConfig, PerplexityFilter
from puyu.data.presets import PresetConfig, PresetFilter
from puyu.data.safety import DomainFilter, SafetyConfig, WordFilter
from puyu.data.scorers import ScorerConfig, ScorerFilter
from puyu.data.value import ValueConfig, ValueScorer
from puyu.documents.readers import SourceConfig, input_files
from puyu.documents.runners import Engine
from puyu.documents.stages import MapStage
from puyu.errors import ConfigError
from puyu.files import hash_file


class DataConfig(Config):
    """The data stage: which files, which rules."""

    sources: list[SourceConfig]
    """Where the documents are."""
    languages: tuple[str, ...] = ("en", "zh")
    """Languages to keep (ISO 639); empty: all. Sources that declare a language are not asked."""
    safety: SafetyConfig | None = None
    """Block lists of domains and words; null: none."""
    policies: Policies = Policies()
    """Thresholds of the rules, per language."""
    presets: PresetConfig | None = None
    """Published rule sets, by name, asked before `policies`: a list of names, or `use` and what is changed in them."""
    scorers: list[ScorerConfig] = []
    """Linear scorers (`puyu data train-scorer`): toxicity, pornography, advertisement, fluency, or one's own."""
    perplexity: PerplexityConfig | None = None
    """Perplexity under n-gram models (`puyu data train-ngram`)."""
    value: ValueConfig | None = None
    """Columns of text quality, information quality and density."""
    long: LongConfig | None = None
    """The long-context subset: length, statistics, splices. Give its sources a large `max_characters`."""
    contamination: ContaminationConfig | None = None
    """Documents that hold items of evaluation sets."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates."""
    mask: tuple[pii.Kind, ...] = pii.KINDS
    """Personal data to replace by placeholders: email, id_number, card, phone, ip."""
    engine: Engine = "local"
    """Where the work runs: local (processes of this machine), daft, or ray (Daft on a Ray cluster, whose nodes share
    the files). The result is the same."""
    workers: int = 0
    """Processes; 0: one per core for large inputs, none for small ones."""

    def inputs(self) -> list[tuple[str, Path]]:
        """Every file that is read, under the name of its source."""
        files = [(f"sources.{source.name}", path) for source in self.sources for path in input_files(source)]
        files += _model_files(self)
        return files + [("dedup.against", folder / "index") for folder in self.dedup.against]


def check(config: DataConfig) -> None:
    """ConfigError where the parts of a config do not fit together."""
    if not config.sources:
        raise ConfigError("sources: at least one source is needed")
    twice = [name for name, count in Counter(source.name for source in config.sources).items() if count > 1]
    if twice:
        raise ConfigError(f"sources: two sources are named {twice[0]!r}", remedy="give each source its own name")


def map_stages(config: DataConfig, source: SourceConfig) -> tuple[MapStage, ...]:
    """What each document of a source goes through, in order: what is cheap and drops most comes first."""
    stages: list[MapStage] = []
    if config.safety is not None and config.safety.domains:
        stages.append(DomainFilter(config.safety.domains))
    stages.append(LanguageFilter(config.languages))
    presets, enforce = config.presets, source.rules
    if presets is not None:
        stages.append(PresetFilter(presets, enforce=source.rules))
        enforce = enforce and not presets.alone
    stages.append(RuleFilter(config.policies, enforce=enforce))
    if config.safety is not None and (config.safety.words or config.safety.more_words):
        stages.append(WordFilter(config.safety))
    if config.contamination is not None:
        stages.append(ContaminationFilter(config.contamination))
    stages += [ScorerFilter(scorer, enforce=source.rules) for scorer in config.scorers]
    if config.perplexity is not None:
        stages.append(PerplexityFilter(config.perplexity, enforce=source.rules))
    if config.value is not None:
        stages.append(ValueScorer(config.value))
    if config.long is not None:
        stages.append(LongFilter(config.long, enforce=source.rules))
    return tuple(stages)


def stage_names(config: DataConfig) -> tuple[str, ...]:
    """The stages of the funnel, in order."""
    maps = [stage.name for source in config.sources[:1] for stage in map_stages(config, source)]
    return (*maps, "identical", *(stage.name for stage in config.dedup.keyed()))


def row_key(config: DataConfig, source: SourceConfig) -> list[object]:
    """Everything but the files of the source that its rows depend on."""
    keys: list[object] = [stage.name for stage in config.dedup.keyed()]
    keys.append(None if config.dedup.substrings is None else config.dedup.substrings.units)
    near = None if config.dedup.near is None else dump(config.dedup.near)
    asked = dump(config)
    parts = {name: asked[name] for name in ("languages", "policies", "presets", *_MODELS)}
    files = [[name, hash_file(path)] for name, path in _model_files(config)]
    return [dump(source), parts, files, keys, near]


_MODELS = ("safety", "scorers", "perplexity", "value", "long", "contamination")


def _model_files(config: DataConfig) -> list[tuple[str, Path]]:
    """Lists and models that stages read."""
    return [(name, path) for name, path in Config.inputs(config) if name.partition(".")[0] in _MODELS]


@lru_cache(maxsize=4)
def config_of(text: str) -> DataConfig:
    """A config from its JSON; kept, so that a process builds it once."""
    return DataConfig.model_validate_json(text)
