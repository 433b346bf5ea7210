"""Files written tensor by tensor are what the libraries write and read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puyu.errors import ResourceError
from puyu.model.streams import ALIGNMENT, PickleWriter, SafetensorsWriter
from tests.model.forms import differing

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensors() -> dict[str, torch.Tensor]:
    """Odd sizes, so that nothing is aligned by chance."""
    generator = torch.Generator().manual_seed(0)
    return {f"a.{i}.weight": torch.randn(3, 5 + i, generator=generator).to(kind) for i, kind in enumerate(DTYPES)} | {
        "norm": torch.randn(7, generator=generator).bfloat16(),
        "传": torch.randn(1, generator=generator).bfloat16(),
    }


def write(kind: type[PickleWriter] | type[SafetensorsWriter], path: Path) -> None:
    outlines = {name: tensor.to("meta") for name, tensor in tensors().items()}
    with kind(path, outlines) as file:
        for tensor in tensors().values():
            file.add(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)


def test_safetensors_are_read_back(tmp_path: Path) -> None:
    write(SafetensorsWriter, tmp_path / "a.safetensors")
    write(SafetensorsWriter, tmp_path / "b.safetensors")
    assert not differing(load_file(tmp_path / "a.safetensors"), tensors())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_the_archive(mapped: bool, tmp_path: Path) -> None:
    write(PickleWriter, tmp_path / "model_tp0_pp0.pt")
    found = torch.load(tmp_path / "model_tp0_pp0.pt", weights_only=True, mmap=mapped)
    assert list(found) == list(tensors()) and not differing(found, tensors())


def test_the_archive_is_whole_and_aligned_as_that_of_torch(tmp_path: Path) -> None:
    write(PickleWriter, tmp_path / "x.pt")
    (tmp_path / "theirs").mkdir()
    torch.save(tensors(), tmp_path / "theirs" / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as ours, zipfile.ZipFile(tmp_path / "theirs" / "x.pt") as theirs:
        assert ours.testzip() is None
        names = {name for name in theirs.namelist() if not name.endswith("serialization_id")}
        assert set(ours.namelist()) == names
        for name in names - {"x/data.pkl"}:
            assert ours.read(name) == theirs.read(name), name
        data = (tmp_path / "x.pt").read_bytes()
        for info in ours.infolist():
            start = (
                info.header_offset
                + 30
                + sum(
                    int.from_bytes(data[info.header_offset + at : info.header_offset + at + 2], "little")
                    for at in (26, 28)
                )
            )
            assert start % ALIGNMENT == 0 and data[start : start + info.file_size] == ours.read(info)


@pytest.mark.parametrize("kind", [PickleWriter, SafetensorsWriter])
def test_what_was_not_announced_or_is_left_out_is_a_defect(
    kind: type[PickleWriter] | type[SafetensorsWriter], tmp_path: Path
) -> None:
    outlines = {"a": torch.empty(2, device="meta")}
    with pytest.raises(AssertionError, match="not what was announced"), kind(tmp_path / "x", outlines) as file:
        file.add(torch.zeros(3))
    with pytest.raises(AssertionError, match="1 tensors were not written"), kind(tmp_path / "x", outlines):
        pass


@pytest.mark.parametrize("kind", [PickleWriter, SafetensorsWriter])
def test_a_full_disk_is_named(kind: type[PickleWriter] | type[SafetensorsWriter]) -> None:
    outlines = {"a": torch.empty(1 << 20, device="meta")}
    with pytest.raises(ResourceError, match="disk full"), kind(Path("/dev/full"), outlines) as file:
        file.add(torch.zeros(1 << 20))
