"""Kernels run in Triton's interpreter, which must be chosen before Triton and the kernels are first imported.

The choice is made while this folder is collected and taken back at once, so that the other tests of the same process
run as on any machine; inside this folder's tests it counts again. Without Triton (there is none for macOS) the folder
holds no tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

HAS_TRITON = find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    if HAS_TRITON:
        assert "triton" not in sys.modules, "a module that was collected before imports Triton, which may take seconds"
        import puyu.engine.gpu
        import puyu.engine.kernels.sampling
        import puyu.model.nf4_triton  # noqa: F401


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
