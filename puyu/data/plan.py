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
from puyu.data.dedup import DedupConfig
from puyu.data.filters import LanguageFilter, Policies, RuleFilter
from puyu.data.presets import PresetConfig, PresetFilter
from puyu.documents.readers import SourceConfig, input_files
from puyu.documents.stages import MapStage
from puyu.errors import ConfigError


class DataConfig(Config):
    """The data stage: which files, which rules."""

    sources: list[SourceConfig]
    """Where the documents are."""
    languages: tuple[str, ...] = ("en", "zh")
    """Languages to keep (ISO 639); empty: all. Sources that declare a language are not asked."""
    policies: Policies = Policies()
    """Thresholds of the rules, per language."""
    presets: PresetConfig | None = None
    """Published rule sets, by name, asked before `policies`: a list of names, or `use` and what is changed in them."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates."""
    mask: tuple[pii.Kind, ...] = pii.KINDS
    """Personal data to replace by placeholders: email, id_number, card, phone, ip."""
    workers: int = 0
    """Processes; 0: one per core for large inputs, none for small ones."""

    def inputs(self) -> list[tuple[str, Path]]:
        """Every file that is read, under the name of its source."""
        files = [(f"sources.{source.name}", path) for source in self.sources for path in input_files(source)]
        return files + [("dedup.against", folder / "index") for folder in self.dedup.against]


def check(config: DataConfig) -> None:
    """ConfigError where the parts of a config do not fit together."""
    if not config.sources:
        raise ConfigError("sources: at least one source is needed")
    twice = [name for name, count in Counter(source.name for source in config.sources).items() if count > 1]
    if twice:
        raise ConfigError(f"sources: two sources are named {twice[0]!r}", remedy="give each source its own name")


def map_stages(config: DataConfig, source: SourceConfig) -> tuple[MapStage, ...]:
    """What each document of a source goes through, in order."""
    presets, language = config.presets, LanguageFilter(config.languages)
    if presets is None:
        return language, RuleFilter(config.policies, enforce=source.rules)
    rules = RuleFilter(config.policies, enforce=source.rules and not presets.alone)
    return language, PresetFilter(presets, enforce=source.rules), rules


def stage_names(config: DataConfig) -> tuple[str, ...]:
    """The stages of the funnel, in order."""
    maps = [stage.name for source in config.sources[:1] for stage in map_stages(config, source)]
    return (*maps, "identical", *(stage.name for stage in config.dedup.stages()))


def row_key(config: DataConfig, source: SourceConfig) -> list[object]:
    """Everything but the files that the rows of a source depend on."""
    keys = [stage.name for stage in config.dedup.stages()]
    near = None if config.dedup.near is None else dump(config.dedup.near)
    presets = None if config.presets is None else dump(config.presets)
    return [dump(source), list(config.languages), dump(config.policies), presets, keys, near]


@lru_cache(maxsize=4)
def config_of(text: str) -> DataConfig:
    """A config from its JSON; kept, so that a process builds it once."""
    return DataConfig.model_validate_json(text)
