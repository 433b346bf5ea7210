"""Kernels run in Triton's interpreter, which must be chosen before Triton and the kernels are first imported.

The choice is made while this folder is collected and taken back at once, so that the other tests of the same process
run as on any machine; inside this folder's tests it counts again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    import puyu.engine.kernels.attention
    import puyu.engine.kernels.fp8
    import puyu.engine.kernels.matmul
    import puyu.engine.kernels.norm
    import puyu.engine.kernels.rope
    import puyu.engine.kernels.sampling  # noqa: F401


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
