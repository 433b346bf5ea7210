"""WanJuan's records: what is read, what is refused, and that writing gives them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.documents.document import Document, normalize
from puyu.documents.interleaved import (
    UNLINKED,
    Image,
    document_record,
    images_of,
    url_hash,
    write_interleaved,
)
from puyu.documents.readers import ReadReport, SourceConfig, read
from puyu.files import BadRecord, read_jsonl

URL = "http://digitalpaper.stdaily.com/http_www.kjrb.com/kjrb/images/2021-01/21/02/1007771_wangjj_1611154300505_b.jpg"
HASH = "019cca88f37ae5ffe59ad48ad5c392fe64e489f08e841b6ea50c79c18f5c6ec3"
"""The published example of WanJuan 1.0 (CC BY 4.0): the hash is of the address."""


def entry(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "sha256": url_hash(url), "caption": "", "width": "400", "height": "266", **more}


def read_records(folder: Path, *records: Any, **options: Any) -> tuple[list[Document], list[BadRecord], ReadReport]:
    path = folder / "part.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    bad: list[BadRecord] = []
    report = ReadReport()
    source = SourceConfig(name="wanjuan", path=str(path), kind="wanjuan", **options)
    return list(read(source, bad.append, report=report)), bad, report


def test_the_hash_is_of_the_address():
    assert url_hash(URL) == HASH


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("![](a.jpg)", [Image("a.jpg")]),
        ('x ![a cat](https://a.org/c_(1).jpg "title")', [Image("https://a.org/c_(1).jpg", "a cat")]),
        ("![a](a.png)![b](b.png)", [Image("a.png", "a"), Image("b.png", "b")]),
        (r"![\[1\] a](b.jpg)", [Image("b.jpg", "[1] a")]),
        ("![a](<b c.jpg>)", [Image("b c.jpg", "a")]),
        ("[no picture](a.jpg) ![open](a b) ! [x](y) ![never", []),
    ],
)  # fmt: skip
def test_links_to_pictures(text, found):
    assert images_of(text) == found


@given(st.text(max_size=30), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_link_gives_its_picture_back(caption, name):
    image = Image("https://a.org/" + "".join(name.split()), " ".join(caption.split()))
    (found,) = images_of(f"before {image.link()} after")
    assert found.caption == image.caption
    assert Image(found.url).link() == Image(image.url).link()


def test_half_a_character_anywhere_in_a_record_is_refused(tmp_path):
    half = json.loads('"\\ud800"')
    records = [
        {"id": half, "content": "One."},
        {"id": "a", "content": f"One.{half}"},
        {"id": "b", "img_list": [entry(URL, caption=half)], "content": "One."},
        {"id": "c", "video_list": [{"url": f"https://a.org/{half}"}], "content": "One."},
        {"id": "d", "img_list": [entry(URL, note={"more": [half]})], "content": "One."},
        {"id": "e", "content": "Fine.", "unread": half},
    ]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    bad: list[BadRecord] = []
    source = SourceConfig(name="wanjuan", path=str(path), kind="wanjuan")
    assert [document.text for document in read(source, bad.append)] == ["Fine."]
    assert [(b.line, b.reason.partition(":")[0]) for b in bad] == [(n, "encoding") for n in range(1, 6)]


def test_three_kinds_of_records(tmp_path):
    text = {"id": "t", "content": "One.\n\n![](nowhere.jpg)"}
    pictures = {"id": "i", "img_list": [entry(URL)], "content": f"![]({URL})\nTwo."}
    video = {"id": "v", "video_list": [{"url": "https://a.org/v.mp4", "caption": "A film", "duration": 61.5}]}
    documents, bad, report = read_records(tmp_path, text, pictures, {**video, "content": "Three."})
    assert not bad and not report.records_not_selected
    assert [document.text for document in documents] == ["One.\n\n![](nowhere.jpg)", f"![]({URL})\nTwo.", "Three."]
    assert documents[0].metadata == {"record": "t"}
    assert documents[1].metadata == {"record": "i", "images": [entry(URL)]}
    assert documents[2].metadata == {"record": "v", "videos": video["video_list"]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"img_list": [entry(URL, sha256="0")], "content": ""}, "image: sha256 is not that of the url: img_list[0]"),
        ({"img_list": [], "content": "![](a.jpg) b"}, "image: a link without an entry in img_list: a.jpg"),
        ({"img_list": "a.jpg", "content": "b"}, "record: img_list is not a list"),
        ({"img_list": ["a.jpg"], "content": "b"}, "record: not an object: img_list[0]"),
        ({"img_list": [{"caption": "b"}], "content": "b"}, "record: no url: img_list[0]"),
        ({"img_list": [{"url": "a", "caption": 1}], "content": "b"}, "record: caption is not a text: img_list[0]"),
        ({"video_list": [{"url": "a", "width": [1]}], "content": "b"}, "record: width is not a size: video_list[0]"),
        ({"id": "x", "text": "b"}, "record: no text in field 'content'"),
        ([1], "record: not an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record_is_said(tmp_path, record, reason):
    documents, bad, _ = read_records(tmp_path, {"id": "a", "content": "fine"}, record, {"id": "c", "content": "too"})
    assert [document.text for document in documents] == ["fine", "too"]
    assert [(row.line, row.reason) for row in bad] == [(2, reason)]


def test_an_entry_that_no_link_names_is_kept_and_counted(tmp_path):
    record = {"id": "a", "img_list": [entry("b.jpg"), entry("c.jpg")], "content": "![](c.jpg) d"}
    (document,), bad, report = read_records(tmp_path, record)
    assert not bad and report.records_not_selected == {UNLINKED: 1}
    assert document_record(document) == record


def test_a_long_text_deals_its_pictures_to_its_parts(tmp_path):
    paragraphs = [f"{'a word ' * 10}![]({number}.jpg)" for number in range(6)]
    entries = [entry(f"{number}.jpg") for number in range(6)] + [entry("none.jpg")]
    record = {"id": "r", "img_list": entries, "content": "\n\n".join(paragraphs)}
    documents, _, _ = read_records(tmp_path, record, max_characters=200)
    assert [[image["url"] for image in document.metadata["images"]] for document in documents] == [
        ["0.jpg", "1.jpg", "none.jpg"],
        ["2.jpg", "3.jpg"],
        ["4.jpg", "5.jpg"],
    ]
    assert [document_record(document)["id"] for document in documents] == ["r-0", "r-1", "r-2"]


def test_a_cut_never_goes_through_a_link(tmp_path):
    url = "a" * 300
    record = {"id": "r", "img_list": [entry(url)], "content": f"![]({url})"}
    (document,), bad, _ = read_records(tmp_path, record, max_characters=100)
    assert document.text == record["content"] and not bad


def test_what_a_stage_has_broken_is_not_written(tmp_path):
    good = Document("1", f"![]({URL})", "s", "web", "", {"images": [entry(URL)]})
    broken = Document("2", "![](http://[IP]/a.jpg)", "s", "web", "", {"images": [entry("http://8.8.8.8/a.jpg")]})
    bad: list[BadRecord] = []
    assert write_interleaved(tmp_path / "out.jsonl", [good, broken], quarantine=bad.append) == 1
    assert [row.reason for row in bad] == ["image: a link without an entry in img_list: http://[IP]/a.jpg (2)"]
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["1"]


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="![]()\\"), max_size=40)
NAMES = st.text("abcxyz0189-_.~%浦语()", min_size=1, max_size=20).map(
    lambda name: Image(f"https://a.org/{name}").link()
)
SIZES = st.one_of(st.none(), st.integers(0, 9000), st.integers(0, 9000).map(str))


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    links = draw(st.lists(NAMES, max_size=4))
    words = draw(st.lists(WORDS, min_size=1, max_size=5))
    text = normalize("\n\n".join(words[at % len(words)] + (links[at] if at < len(links) else "") for at in range(6)))
    record: dict[str, Any] = {"id": draw(st.text("abcXYZ019", min_size=1))}
    if links or draw(st.booleans()):
        urls = dict.fromkeys(image.url for image in images_of("\n".join(links)))
        record["img_list"] = [entry(url, caption=draw(WORDS), width=draw(SIZES)) for url in urls]
    if draw(st.booleans()):
        record["video_list"] = [{"url": "v.mp4", "duration": draw(st.integers(1, 99))}]
    return {**record, "content": text}


@settings(max_examples=60, deadline=None)
@given(st.lists(records(), max_size=4))
def test_records_survive_reading_and_writing(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("wanjuan")
    documents, bad, _ = read_records(folder, *made)
    assert not bad
    assert write_interleaved(folder / "again.jsonl.gz", documents, quarantine=bad.append) == len(made)
    assert list(read_jsonl(folder / "again.jsonl.gz")) == made
