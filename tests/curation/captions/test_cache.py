import os
import signal

import pytest
from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, get_captioner, model_digest, one_line
from charforgex.curation.captions.cache import GIVE_UP, Job, Store, caption_all
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import DataError, ModelError


class Shouter:
    """Says the name of the picture; keeps what it was asked. `trouble(names)` may raise."""

    reads = frozenset({"framing"})

    def __init__(self, name="shouter:1", trouble=lambda names: None):
        self.name, self.trouble, self.asked = name, trouble, []

    def caption(self, pictures, contexts):
        names = [context.name for context in contexts]
        self.asked.append(names)
        self.trouble(names)
        return [f"{name} {picture.width}".upper() for name, picture in zip(names, pictures, strict=True)]


def job(number, framing=None, open_=None):
    name = f"p{number}"
    return Job(f"{number:064x}", open_ or (lambda: Image.new("RGB", (number + 1, 1))), Context(name, framing=framing))


def run(captioner, jobs, folder, batch_size=4):
    reports, progress = [], []
    texts = list(caption_all(captioner, jobs, folder, batch_size, lambda *problem: reports.append(problem), progress.append))
    return texts, reports, progress


def refuse():
    raise AssertionError("a picture was opened whose caption is known")


def test_batches_in_order_and_nothing_asked_twice(tmp_path):
    first = Shouter()
    texts, reports, progress = run(first, (job(n) for n in range(10)), tmp_path)
    assert texts == [(f"{n:064x}", f"P{n} {n + 1}") for n in range(10)] and reports == []
    assert [len(names) for names in first.asked] == [4, 4, 2] and sum(progress) == 10

    second = Shouter()
    assert run(second, [job(n, open_=refuse) for n in range(10)], tmp_path)[0] == texts
    assert second.asked == []


def test_known_and_new_pictures_fill_one_batch_and_come_in_order(tmp_path):
    run(Shouter(), [job(n) for n in (1, 3, 5)], tmp_path)
    again = Shouter()
    texts, _, _ = run(again, [job(n) for n in range(8)], tmp_path)
    assert [key for key, _ in texts] == [f"{n:064x}" for n in range(8)]
    assert again.asked == [["p0", "p2", "p4", "p6"], ["p7"]]


def test_the_same_picture_twice_is_asked_for_once(tmp_path):
    captioner = Shouter()
    texts, _, _ = run(captioner, [job(1), job(2), job(1)], tmp_path)
    assert captioner.asked == [["p1", "p2"]] and texts[0] == texts[2]


def test_what_a_captioner_reads_of_the_context_is_part_of_the_key_and_nothing_else(tmp_path):
    run(Shouter(), [job(1)], tmp_path)
    again = Shouter()
    renamed = Job(job(1).key, refuse, Context("other", trigger="word"))
    assert run(again, [renamed], tmp_path)[0] == [(job(1).key, "P1 2")] and again.asked == []
    run(again, [job(1, framing="full")], tmp_path)
    assert again.asked == [["p1"]]


def test_captioners_do_not_share_what_they_said(tmp_path):
    run(Shouter("a:1"), [job(1)], tmp_path)
    other = Shouter("a/1")  # the same as a file's name
    run(other, [job(1)], tmp_path)
    assert other.asked == [["p1"]] and len(list(tmp_path.iterdir())) == 2


def test_a_kill_loses_the_batch_in_work_alone(tmp_path):
    def kill(names):
        if "p5" in names:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        run(Shouter(trouble=kill), [job(n) for n in range(10)], tmp_path, batch_size=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    again = Shouter()
    texts, _, _ = run(again, [job(n) for n in range(10)], tmp_path, batch_size=2)
    assert again.asked == [["p4", "p5"], ["p6", "p7"], ["p8", "p9"]]
    assert texts == run(Shouter(), [job(n) for n in range(10)], tmp_path / "whole")[0]


@pytest.mark.parametrize("left", [1, 20, 90, -1])
def test_a_torn_line_is_as_if_never_written(tmp_path, left):
    run(Shouter(), [job(n) for n in range(3)], tmp_path)
    [file] = tmp_path.iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:left])

    for expected in ([["p2"]], []):
        again = Shouter()
        assert [text for _, text in run(again, [job(n) for n in range(3)], tmp_path)[0]] == ["P0 1", "P1 2", "P2 3"]
        assert again.asked == expected


def test_two_processes_append_to_one_file(tmp_path):
    one, two = Store(tmp_path, "x"), Store(tmp_path, "x")
    one.add({"a": "1"})
    two.add({"b": "ünï\ncode"})
    one.add({"c": "3"})
    assert (one["c"], two["b"]) == ("3", "ünï\ncode")
    assert {key: Store(tmp_path, "x")[key] for key in "abc"} == {"a": "1", "b": "ünï\ncode", "c": "3"}


def test_a_picture_that_breaks_its_batch_costs_only_itself(tmp_path):
    def trouble(names):
        if "p5" in names:
            raise RuntimeError("cannot see it")

    captioner = Shouter(trouble=trouble)
    texts, reports, _ = run(captioner, [job(n) for n in range(8)], tmp_path)
    assert [text for _, text in texts] == [f"P{n} {n + 1}" for n in range(8) if n != 5]
    assert reports == [("p5", "no caption by shouter:1: RuntimeError: cannot see it")]
    assert captioner.asked[0] == ["p0", "p1", "p2", "p3"]


def test_a_picture_that_cannot_be_opened_is_reported(tmp_path):
    def broken():
        raise DataError("half of it is missing")

    captioner = Shouter()
    texts, reports, _ = run(captioner, [job(0), job(1, open_=broken)], tmp_path)
    assert len(texts) == 1 and captioner.asked == [["p0"]]
    assert reports == [("p1", "the picture cannot be opened: half of it is missing")]


def test_batches_shrink_for_good_when_memory_runs_out(tmp_path):
    def trouble(names):
        if len(names) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    captioner = Shouter(trouble=trouble)
    texts, reports, _ = run(captioner, [job(n) for n in range(16)], tmp_path, batch_size=8)
    assert len(texts) == 16 and reports == []
    assert [len(names) for names in captioner.asked] == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]


def test_failure_upon_failure_is_not_the_pictures_fault(tmp_path):
    def trouble(names):
        raise KeyError("pixel_values")

    reports = []
    with pytest.raises(ModelError, match=f"failed on {GIVE_UP} pictures in a row.*pixel_values"):
        list(caption_all(Shouter(trouble=trouble), map(job, range(50)), tmp_path, 4, lambda *problem: reports.append(problem)))
    assert len(reports) == GIVE_UP


def test_what_holds_for_all_pictures_stops_at_once(tmp_path):
    def trouble(names):
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        run(Shouter(trouble=trouble), [job(0)], tmp_path)


def test_the_captions_that_were_there_are_kept_as_they_are(tmp_path):
    captioner = get_captioner(CaptionSettings(backend="sidecar"))
    jobs = [
        Job("a" * 64, lambda: Image.new("RGB", (1, 1)), Context("a", captions=("One  thing.", "Another"))),
        Job("b" * 64, lambda: Image.new("RGB", (1, 1)), Context("b")),
    ]
    texts, reports, _ = run(captioner, jobs, tmp_path)
    assert texts == [("a" * 64, "One  thing.\nAnother")]
    assert [name for name, _ in reports] == ["b"]


def test_names_tell_models_and_prompts_apart(tmp_path):
    assert captioner_name("chat", "m", ["a", 1]) == captioner_name("chat", "m", ["a", 1]) != captioner_name("chat", "m", ["b", 1])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(200_000))
    before = model_digest(str(tmp_path))
    weights.write_bytes(bytes(199_999) + b"\1")
    assert len({before, model_digest(str(tmp_path)), model_digest(str(weights)), model_digest("owner/model")}) == 4


def test_an_answer_becomes_one_line_that_can_be_written():
    assert one_line(" a \n\n b\ud800c\t") == "a b?c"
