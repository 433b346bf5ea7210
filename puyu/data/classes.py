"""Quality classes: a domain cut by a score of the data stage into sources that are weighted and repeated by themselves.

    classes: {web: {score: text_quality, at_least: {high: 0.8, fair: 0.5}}}
    epochs: {web: 1, web/fair: 2, web/high: 4}

makes of `web` the sources `web/high`, `web/fair` and, for all other documents, `web`. Weights and epochs of a domain
hold for its classes too, unless they are named. How often good data may be repeated: Muennighoff et al. 2023 (up to
four epochs are about as good as new data). Knows no files and computes no score.

    >>> QualityClasses(score="text_quality", at_least={"high": 0.8}).source("web", {"text_quality": 0.9})
    'web/high'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from puyu.configure import Config
from puyu.errors import ConfigError


class QualityClasses(Config):
    """Classes of one domain, by one of its scores."""

    score: str
    """Name of the score in kept.jsonl, such as `text_quality` or `quality`."""
    at_least: dict[str, float]
    """Class -> smallest score; a document belongs to the class with the highest bound that it reaches."""

    @model_validator(mode="after")
    def _sound(self) -> QualityClasses:
        if not self.at_least or any(not name or "/" in name for name in self.at_least):
            raise ValueError("at_least: one class or more is needed, with a name without '/'")
        if len(set(self.at_least.values())) < len(self.at_least):
            raise ValueError("at_least: two classes have the same bound")
        return self

    def source(self, domain: str, scores: Any) -> str:
        """Name of the source that a document with these scores belongs to; without the score it is the domain's."""
        value = self.value(scores)
        reached = [(bound, name) for name, bound in self.at_least.items() if value is not None and value >= bound]
        return f"{domain}/{max(reached)[1]}" if reached else domain

    def value(self, scores: Any) -> float | None:
        """The score, where it is a number."""
        found = scores.get(self.score) if isinstance(scores, Mapping) else None
        return float(found) if isinstance(found, int | float) else None

    def sources(self, domain: str) -> list[str]:
        """Names of the classes' sources, without the domain's own."""
        return [f"{domain}/{name}" for name in self.at_least]


Classes = Mapping[str, QualityClasses]


def epochs_by_source(epochs: Mapping[str, float], classes: Classes, *, sources: Mapping[str, Any]) -> dict[str, float]:
    """Epochs of each source: its own, or its domain's. ConfigError for a name that is neither."""
    for name in epochs:
        if name not in sources and name not in classes:
            raise ConfigError(
                f"epochs names the unknown source {name!r}", remedy=f"the data has: {', '.join(sorted(sources))}"
            )
    domain = {part: name for name, rule in classes.items() for part in rule.sources(name)}
    found = {name: epochs.get(name, epochs.get(domain.get(name, ""))) for name in sources}
    return {name: count for name, count in found.items() if count is not None}


def weights_by_source(
    weights: Mapping[str, float], classes: Classes, *, sizes: Mapping[str, float]
) -> dict[str, float]:
    """Weights of each source; that of a domain is shared among its classes by size, if none of them is named."""
    found = {}
    for name, weight in weights.items():
        parts = classes[name].sources(name) if name in classes else []
        if not parts or any(part in weights for part in parts):
            found[name] = weight
            continue
        present = {part: sizes[part] for part in (name, *parts) if part in sizes}
        found |= {part: weight * size / sum(present.values()) for part, size in present.items()}
    return found
