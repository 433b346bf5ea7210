"""Files: what a kill, a full disk or a torn line may and may not do."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.errors import InputError, ResourceError
from puyu.files import BadRecord, atomic_write, hash_json, hash_path, read_json, read_jsonl, write_json, write_jsonl


def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write("new")
        raise RuntimeError("boom")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from puyu.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as s:\n"
        "    s.write('new' * 100000); s.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"


def test_disk_full_names_file_and_remedy(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk full while writing .*x.json") as caught:
        write_json(tmp_path / "x.json", {})
    assert "remedy: free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device_is_reported():
    from pathlib import Path

    from puyu.files import disk_errors

    with pytest.raises(ResourceError, match="disk full"), disk_errors(Path("/dev/full")), open("/dev/full", "w") as f:
        f.write("x" * 100000)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_round_trip_and_equal_bytes(tmp_path, suffix):
    rows = [{"text": "浦语 \u2028 line"}, {"n": 1.5}, []]
    for name in ("a", "b"):
        assert write_jsonl(tmp_path / (name + suffix), rows) == 3
    assert list(read_jsonl(tmp_path / ("a" + suffix))) == rows
    assert (tmp_path / ("a" + suffix)).read_bytes() == (tmp_path / ("b" + suffix)).read_bytes()


def test_torn_lines_go_to_quarantine_with_place_and_reading_goes_on(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n\n{"a": 2}\n{"a": 3')
    bad: list[BadRecord] = []
    assert list(read_jsonl(path, quarantine=bad.append)) == [{"a": 1}, {"a": 2}]
    assert [(record.line, record.offset) for record in bad] == [(2, 9), (3, 16), (6, 29)]


def test_torn_line_without_quarantine_is_an_error_with_file_and_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(InputError, match=r"x.jsonl, line 2 \(byte 9\)"):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_truncated_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"x.json is not valid JSON"):
        read_json(tmp_path / "x.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_hash_does_not_depend_on_the_order_of_keys(value):
    def turned(node):
        if isinstance(node, dict):
            return {key: turned(node[key]) for key in reversed(node)}
        return [turned(item) for item in node] if isinstance(node, list) else node

    assert hash_json(value) == hash_json(turned(value)) == hash_json(json.loads(json.dumps(value)))


def test_hash_of_a_folder_covers_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = hash_path(tmp_path)
    (tmp_path / "a").write_text("2")
    second = hash_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, hash_path(tmp_path)}) == 3


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_archives_are_noticed(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    write_jsonl(path, [{"n": hash_json(i)} for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="x.jsonl.* is a damaged archive after line"):
        list(read_jsonl(path))
    bad: list[BadRecord] = []
    assert 0 < len(list(read_jsonl(path, quarantine=bad.append))) < 5000 and "archive" in bad[-1].reason


def test_several_zst_frames_are_read_as_one(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.zst", [1, 2])
    write_jsonl(tmp_path / "b.jsonl.zst", [3])
    both = (tmp_path / "a.jsonl.zst").read_bytes() + (tmp_path / "b.jsonl.zst").read_bytes()
    (tmp_path / "c.jsonl.zst").write_bytes(both)
    assert list(read_jsonl(tmp_path / "c.jsonl.zst")) == [1, 2, 3]
