"""Several pages of Prometheus text as one: the same names, each sample with a label that says where it is from.

    >>> print(merge({"0": "# TYPE a counter\\na 1\\n", "1": "# TYPE a counter\\na 2\\n"}), end="")
    # TYPE a counter
    a{replica="0"} 1
    a{replica="1"} 2

A name's samples stand together under one TYPE line, as the format demands. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping


def merge(pages: Mapping[str, str]) -> str:
    """One page out of `pages` (replica -> text)."""
    families: dict[str, list[str]] = {}
    heading = ""
    for replica, page in pages.items():
        for line in page.splitlines():
            if line.startswith("# TYPE"):
                heading = line
            elif line and not line.startswith("#"):
                families.setdefault(heading, []).append(labeled(line, replica))
    return "".join("\n".join([heading, *rows]) + "\n" for heading, rows in families.items())


def labeled(sample: str, replica: str) -> str:
    """The sample with one more label."""
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace:
        inside, _, value = rest.rpartition("}")
        return f"{name}{{{inside},{label}}}{value}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
