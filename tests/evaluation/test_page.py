"""The report: it says what the result says, needs nothing else, and survives what results may hold."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from charforgex.evaluation import charts, page, reading
from tests.evaluation import made_up

MEANS = {
    "base": {"identity": 0.3, "attributes": 0.93, "pairwise": 7.9, "memorisation": 0.21},
    "anna 200": {"identity": 0.55, "attributes": 0.9, "pairwise": 7.1, "memorisation": 0.3},
    "anna 400": {"identity": 0.81, "attributes": 0.86, "pairwise": 6.2, "memorisation": 0.35},
}
CONTESTANTS = [
    made_up.contestant("base", "base", scale=None),
    made_up.contestant("anna 200", step=200, run="runs/anna"),
    made_up.contestant("anna 400", step=400, run="runs/anna"),
]
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags with their attributes, text by tag, and whether every tag is closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder, result, shots, **options) -> Reader:
    return Reader(page.write_page(result, shots, folder / "report.html", **options).read_text(encoding="utf-8"))


@pytest.fixture
def whole(tmp_path):
    result, shots = made_up.evaluation(tmp_path, MEANS, CONTESTANTS, recommended="anna 400", pareto=["base", "anna 200", "anna 400"])
    return tmp_path, result, shots


def test_the_page_needs_nothing_else(whole):
    folder, result, shots = whole
    reader = written(folder, result, shots)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    sources = [image["src"] for image in reader.all("img")]
    assert len(sources) >= len(shots) and all(source.startswith("data:image/") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).load()
    links = [link["href"] for link in reader.all("a")]
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    for link in links:
        assert link[1:] in ids if link.startswith("#") else (folder / link).is_file(), link
    style = (folder / "report.html").read_text()
    assert "http" not in style.replace('http-equiv="Content-Security-Policy"', "") and "url(" not in style and "@import" not in style


def test_its_numbers_are_the_results(whole):
    folder, result, shots = whole
    text = written(folder, result, shots).text
    for metric in result["metrics"].values():
        for value in metric["values"].values():
            assert f"{reading.said(value)} {reading.between(value)}" in text
    assert "Use anna 400 It has the most of what counts." in text
    identity = result["metrics"]["identity"]["values"]["anna 400"]
    assert f"Is it the character? Yes Identity {reading.said(identity)}" in text
    heart = result["metrics"]["memorisation"]["values"]["anna 400"]
    assert f"Did it learn pictures by heart? Some Learnt by heart {reading.said(heart)}" in text
    assert "Identity by step" in text and "The character against variety" in text
    assert (
        "charforgex evaluate 'lora=[a b.safetensors]'" in text
        and "sha256" in text
        and "torch 2.13" in text
        and "embedder = charworld" in text
    )


def test_the_title_names_what_is_evaluated(whole):
    _, result, _ = whole
    assert page.title(result) == "Evaluation of anna"  # the run of both checkpoints
    for one in result["contestants"]:
        one["run"] = None
    assert page.title(result) == "Evaluation of anna 200 and anna 400"
    assert page.title({"contestants": result["contestants"][:1]}) == "Evaluation of the base model"
    assert page.title({"contestants": result["contestants"][1:] * 2}) == "Evaluation of 4 contestants"


def test_hostile_words_stay_words(tmp_path):
    evil = "<script>alert(1)</script>\u202e\"'>"
    result, shots = made_up.evaluation(tmp_path, {"base": MEANS["base"], evil: MEANS["anna 200"]}, prompts={evil: [evil]}, recommended=evil)
    for metric in result["metrics"].values():
        metric["card"] = dict.fromkeys(("title", "meaning", "range", "source", "lies"), evil) | {"better": metric["card"]["better"]}
        metric["values"]["base"] = {"why": evil}
        metric["values"][evil]["notes"] = [evil]
    shots[0]["file"] = "javascript:alert(1)"
    reader = written(tmp_path, result, shots)
    source = (tmp_path / "report.html").read_text()
    assert "script" not in {tag for tag, _ in reader.tags} and "\u202e" not in source
    assert source.count("&lt;script&gt;alert(1)") > 10
    assert not any(link["href"].startswith("javascript:") for link in reader.all("a"))


def test_what_is_lacking_is_said(tmp_path):
    """A failed metric, a single contestant, no floor, no interval, an unreadable picture."""
    means = {"anna": {"identity": 0.7, "attributes": 0.8}}
    result, shots = made_up.evaluation(tmp_path, means, [made_up.contestant("anna", "folder", scale=None)], {"": ["a girl"]}, seeds=(3, 4))
    assert result["comparison"] is None and result["metrics"]["identity"]["values"]["anna"]["low"] is None
    result["metrics"]["attributes"] |= {"floor": None, "ceiling": None}
    (tmp_path / shots[0]["file"]).write_bytes(b"no picture")
    reader = written(tmp_path, result, shots)
    assert "Answers are for anna" in reader.text and "there are no references" in reader.text
    assert (
        f"Does it obey? {reading.said(result['metrics']['attributes']['values']['anna'])}" in reader.text
        and "nothing measured to read it against" in reader.text
    )
    assert "cannot be read" in reader.text and "seed 3" in reader.text and "Comparisons" not in reader.text


def test_the_bytes_of_pictures_are_bounded(whole):
    folder, result, shots = whole
    reader = written(folder, result, shots, embedded_bytes=1000)
    assert sum(len(image["src"]) for image in reader.all("img")) < 2000
    assert "pictures are linked and not embedded" in reader.text


def test_the_worst_are_the_worst(whole):
    folder, result, shots = whole
    found = {case["title"]: case for case in page.worst(result, shots, page.Thumbnails(folder))}
    own = [shot for shot in shots if shot["contestant"] == "anna 400"]
    least, most = (pick(own, key=lambda shot: shot["scores"][name]) for pick, name in ((min, "identity"), (max, "memorisation")))
    assert found["Identity"]["pictures"][0]["picture"]["link"] == least["file"]
    assert (found["Identity"]["pictures"][0]["prompt"], found["Identity"]["pictures"][0]["seed"]) == (least["prompt"], least["seed"])
    assert found["Learnt by heart"]["pictures"][0]["score"] == reading.rounded(most["scores"]["memorisation"], None)
    shots = [shot | {"nearest": shots[0]["file"]} for shot in shots]
    beside = page.worst(result, shots, page.Thumbnails(folder))
    assert [case["title"] for case in beside if case["pictures"][0]["nearest"]] == ["Learnt by heart"]


def test_comparisons_are_told_of_the_chosen_first(whole):
    _, result, _ = whole
    told = page.paired(result["comparison"], {name: metric["card"] for name, metric in result["metrics"].items()}, "anna 400")
    assert [row["a"] for row in told["open"][:8]] == ["anna 400"] * 8
    (row,) = [row for row in told["open"] if row["metric"] == "identity" and row["b"] == "base"]
    (original,) = [
        row for row in result["comparison"]["rows"] if row["metric"] == "identity" and row["a"] == "base" and row["b"] == "anna 400"
    ]
    assert row["difference"]["estimate"] == -original["difference"]["estimate"] > 0.4
    assert row["difference"]["low"] == -original["difference"]["high"] and row["pictures_won"] == original["pictures_lost"] == 6


def test_too_few_prompts_for_so_many_tests_are_told():
    row = {"prompts": 11, "p": 0.001}
    told = page._too_many({"rows": [row], "tests": 141, "alpha": 0.05})
    assert "Ask 13 prompts" in told and 141 * 2**-12 < 0.05 < 141 * 2**-11
    assert page._too_many({"rows": [{"prompts": 13, "p": 1.0}], "tests": 141, "alpha": 0.05}) is None


@pytest.mark.parametrize(
    ("low", "high", "value", "text"),
    [
        (0.78, 0.84, 0.8123, "0.81"),
        (0.805, 0.829, 0.8123, "0.812"),  # half a width of 0.012: two digits of it count
        (95.0, 155.0, 123.4, "120"),
        (-0.00002, 0.00004, 1e-5, "0.00001"),
        (None, None, 0.81234, "0.812"),
        (1.0, 1.0, 1.0, "1"),
        (-0.4, -0.2, -0.31, "−0.31"),
    ],
)
def test_no_more_digits_than_the_interval_supports(low, high, value, text):
    assert reading.rounded(value, reading.decimals(low, high)) == text


def test_right_is_better_whatever_the_direction():
    metric = {"card": {"better": "lower"}, "floor": 1.0, "ceiling": 0.2, "values": {"a": {"estimate": 0.5, "low": 0.4, "high": 0.6}}}
    left, right = page.axis(metric)
    assert left > 1.0 and right < 0.2 and reading.share(0.5, 1.0, 0.2) == pytest.approx(0.625)
    assert page.axis(metric | {"floor": None, "ceiling": None})[0] > 0.6
    assert page.axis(metric | {"card": {"better": "higher"}, "floor": None, "ceiling": None})[0] < 0.4
    alike = [{"estimate": number, "low": None, "high": None} for number in (0.925, 0.92500001)]
    left, right = page.axis(metric | {"card": {"better": "higher"}, "floor": None, "ceiling": None}, alike)
    assert left == pytest.approx(0.8788, abs=1e-3) and right == pytest.approx(0.9713, abs=1e-3)  # alike numbers stand together


def test_every_prompt_has_its_turn_before_a_second_seed():
    rows = [("a", f"p{i}", seed) for i in range(3) for seed in (0, 1)] + [("b", "q", seed) for seed in (0, 1)]
    assert page._spread(rows, 4) == [("a", "p0", 0), ("a", "p1", 0), ("a", "p2", 0), ("b", "q", 0)]
    assert page._spread(rows, 2) == [("a", "p0", 0), ("b", "q", 0)]
    assert page._spread(rows, 100) == rows


def test_ticks_are_round_and_within():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.5, 1.0] and charts.ticks(0.0, 0.9) == [0.0, 0.2, 0.4, 0.6, 0.8]
    for low, high in ((0.013, 0.94), (-3.0, 1200.0), (5.0, 5.001)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high + 1e-9


def test_points_of_a_chart_lie_where_their_numbers_say():
    svg = str(charts.curves({"a": [charts.Point(0, 1.0), charts.Point(10, 2.0)]}, {"floor": 0.0}, "step", "chart"))
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', svg)]
    level = float(re.search(r'class="level"[^>]* y1="([\d.]+)"', svg).group(1))
    (x1, y1), (x2, y2) = dots
    assert x1 < x2 and level > y1 > y2 and level - y1 == pytest.approx(y1 - y2, abs=0.2)
