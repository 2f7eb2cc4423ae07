"""Which files there are, and which belong together."""

import pytest

from charforgex.curation.folders import caption_lines, leads_out, refusal_by_name, sort_names, walk
from charforgex.errors import DataError


def test_a_walk_is_in_the_order_of_names(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.png", "b.png", "Z.txt", ".git/x", "b/.hidden", "out/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x.png").mkdir()
    found = list(walk(tmp_path, {str(tmp_path / "out")}))
    assert [name for name, _ in found] == ["Z.txt", "a.png", "b/10.png", "b/2.png", "b.png", "x.png"]
    assert [why.kind for _, why in found if why] == ["unsupported"]


@pytest.mark.parametrize(
    ("name", "outside"),
    [("a.png", False), ("a/b.png", False), ("a..b/c", False), ("12:30.png", False), ("", True), ("/a", True), ("../a", True),
     ("a/../../b", True), ("C:a", True), ("c:/a", True), ("a\\b", True), ("a\0b", True), ("a/..", True)],
)  # fmt: skip
def test_what_leads_out(name, outside):
    assert leads_out(name) == outside


def test_what_belongs_together():
    found = sort_names(["a.txt", "a.png", "a.jpg", "a.caption", "a.MASK.PNG", "b/a.png", "b/c.txt", "x.mp4", "README"])
    assert found.pictures == ["a.png", "a.jpg", "b/a.png"] and found.others == ["x.mp4", "README"]
    assert found.captions("a.jpg") == ["a.txt", "a.caption"] and found.mask("a.png") == "a.MASK.PNG"
    assert found.captions("b/a.png") == [] and found.mask("b/a.png") is None
    assert found.owners() == {"a.txt": "a.png", "a.caption": "a.png", "a.MASK.PNG": "a.png"} and found.lonely() == ["b/c.txt"]


def test_caption_lines():
    assert caption_lines("\ufeff a  b \r\n\r\n\0\nc\n".encode()) == ["a b", "c"]
    with pytest.raises(DataError, match="byte 1"):
        caption_lines(b"a\xe9")


def test_refusals_say_what_to_do():
    assert "pack it as zip" in refusal_by_name("a/b.RAR").reason and "save it as PNG" in refusal_by_name("x.cr2").reason
