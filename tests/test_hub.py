"""Model names -> folders, with a hub that lies in a folder: the network is never touched."""

import sys
import threading
import time
import types

import huggingface_hub
import pytest

from puyu.errors import DependencyError, InputError
from puyu.hub import resolve


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class Hub:
    """Stands for a client's `snapshot_download`: a copy of what a repository has, as far as the patterns allow."""

    FILES = ("config.json", "model.safetensors", "tokenizer.model", "pytorch_model.bin", "modeling.py")

    def __init__(self, root):
        self.root, self.calls, self.inside, self.most = root, [], 0, 0

    def __call__(self, name, *, allow_patterns, ignore_patterns, revision="main"):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.02)
        self.calls.append((name, revision))
        if name == "no/body":
            raise OSError("404: no such repository")
        folder = self.root / name.replace("/", "--") / revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.FILES:
            if any(file.endswith(pattern.lstrip("*")) for pattern in allow_patterns):
                (folder / file).write_text(name)
        assert "consolidated*" in ignore_patterns
        self.inside -= 1
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_folder_is_taken_as_it_is(hub, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name").is_dir() and resolve(tmp_path) == tmp_path
    assert hub.calls == []


def test_a_hub_id_is_fetched_without_code_and_pickles(hub):
    folder = resolve("internlm/internlm2-chat-7b")
    assert hub.calls == [("internlm/internlm2-chat-7b", "main")]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (resolve("internlm/internlm2-chat-7b", allow_pickle=True) / "pytorch_model.bin").is_file()


def test_a_revision_can_be_named(hub):
    assert resolve("owner/name@v1.0").name == "v1.0"


def test_modelscope_ids_go_to_its_client(hub, tmp_path, monkeypatch):
    client = types.ModuleType("modelscope")
    client.snapshot_download = Hub(tmp_path / "scope")
    monkeypatch.setitem(sys.modules, "modelscope", client)
    folder = resolve("ms:Shanghai_AI_Laboratory/internlm2_5-7b")
    assert folder.is_relative_to(tmp_path / "scope") and hub.calls == []
    assert client.snapshot_download.calls == [("Shanghai_AI_Laboratory/internlm2_5-7b", "main")]


@pytest.mark.parametrize(("name", "client"), [("ms:a/b", "modelscope"), ("a/b", "huggingface_hub")])
def test_a_missing_client_is_named(name, client, monkeypatch):
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(DependencyError, match=f"needs {client}") as caught:
        resolve(name)
    assert f"pip install {client}" in str(caught.value)


@pytest.mark.parametrize("path", ["runs/nano/final/x", "nowhere", "ms:", "a b/c", "../x/y", "../x", "./x"])
def test_what_is_neither_folder_nor_id(path, hub):
    with pytest.raises(InputError, match="no such model folder"):
        resolve(path)
    assert hub.calls == []


def test_a_download_that_fails_names_the_model(hub):
    with pytest.raises(InputError, match=r"no/body is no folder here and cannot be fetched: 404") as caught:
        resolve("no/body")
    assert "check the name and the network" in str(caught.value)


def test_one_download_at_a_time(hub):
    """Locks are of the open file, so threads stand for processes."""
    threads = [threading.Thread(target=resolve, args=("owner/name",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.calls) == 6 and hub.most == 1
