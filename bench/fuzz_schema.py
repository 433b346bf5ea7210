"""Requests that schemathesis makes from a server's own /openapi.json: data that fits it, and data that does not.

schemathesis (MIT; https://github.com/schemathesis/schemathesis) only makes the data; serve_harness.py sends it by its
own client, mixed with everything else. The same seed and count give the same requests.

    schema_requests(openapi, count=100, seed=0)     [("POST", "/v1/completions", b"{...}"), ...]
"""

from __future__ import annotations

import json
import random
import urllib.parse
import warnings
from collections.abc import Mapping
from typing import Any

SLOW = ("/v1/reward", "/v1/chat/completions", "/tokenize")
"""Routes whose data takes schemathesis long to make."""


def schema_requests(openapi: Mapping[str, Any], *, count: int, seed: int) -> list[tuple[str, str, bytes]]:
    """About `count` requests over all operations, half of them meant to be wrong; method, target, body."""
    import schemathesis
    from schemathesis import GenerationMode

    operations = [found.ok() for found in schemathesis.openapi.from_dict(dict(openapi)).get_all_operations()]
    each = max(count // (2 * len(operations)), 2)
    made: list[tuple[str, str, bytes]] = []
    for operation in operations:
        share = max(each // 4, 2) if operation.path in SLOW else each
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            made += [_request(case) for case in _generate(operation.as_strategy(generation_mode=mode), share, seed)]
    chat = [item for item in made if item[1] in SLOW]
    return made + chat * 3  # what is slow to make is sent more often, with other headers and other neighbors


def _generate(strategy: Any, count: int, seed: int) -> list[Any]:
    """So many examples; none where the operation has nothing that could be wrong."""
    import hypothesis
    from hypothesis.errors import Unsatisfiable

    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        database=None,
        max_examples=count,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(case: Any) -> None:
        found.append(case)

    random_state = random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect()
    except Unsatisfiable:
        pass
    finally:
        random.setstate(random_state)
    return found


def _request(case: Any) -> tuple[str, str, bytes]:
    path = case.path
    for name, value in (case.path_parameters or {}).items():
        path = path.replace(f"{{{name}}}", _quoted(str(value)))
    if case.query:
        path += "?" + urllib.parse.urlencode(dict(case.query), doseq=True, errors="replace")
    return case.method, path, _bytes(case.body)


def _quoted(value: str) -> str:
    """Percent signs that schemathesis has written stay."""
    return urllib.parse.quote(value, safe="%", errors="replace")


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    try:
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except TypeError:  # no body at all
        return b""
