"""Does every file get the right class? Writes the table of docs/curation.md.

    python benchmarks/curation_classes.py                2,520 files and an archive each, of nine held-out characters (about 20 minutes)
    python benchmarks/curation_classes.py --quick        a file or two of each kind: a look, nothing written

The files are made by `charforgex.data.mess`, which knows what it did to each; curation sees the folder alone, and its default settings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/curation.md"
BEGIN, END = "<!-- classes: written by benchmarks/curation_classes.py -->", "<!-- /classes -->"
SIZE = 320  # pixels of the pictures
CHARACTERS = 9
LOSSLESS = ("copied", "mirrored")  # nothing tells such a copy from what it was made of, so that either may be the one that is kept
# files of each kind for each character
FULL = {
    "kept": 40, "photo_like": 20, "animated": 3, "see_through": 3, "couple": 10, "copied": 6, "recompressed": 10, "resized": 6,
    "turned": 10, "mirrored": 6, "trimmed": 10, "brightened": 6, "blurred": 13, "shaken": 7, "dark": 8, "bright": 8, "noisy": 13,
    "compressed": 8, "saved_again": 5, "framed": 7, "lettered": 10, "small": 8, "landscape": 13, "stranger": 20, "crowd": 10,
    "truncated": 8, "empty": 2, "garbage": 5, "document": 3, "bomb": 2,
}  # fmt: skip


def run(folder: Path, number: int, counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """(what was done, class expected, class found) of every file of one character's folder."""
    from omegaconf import OmegaConf

    from charforgex.config import compose
    from charforgex.curation.report import read
    from charforgex.curation.run import curate
    from charforgex.data.mess import order, write_archive, write_mess

    expected = write_mess(folder / "raw", number, counts, SIZE, captions=False)
    expected |= write_archive(folder / "raw/pack.zip", number, 5, SIZE)
    places = order(number, counts)
    kinds = [kind for kind, _ in places]
    cfg = compose("curate", [f"data.root={folder / 'raw'}", f"runs_dir={folder / 'runs'}"])
    result = curate(OmegaConf.create(cfg))
    found = {row["name"]: row for row in read(result["out"])["pictures"]}
    assert found.keys() == expected.keys(), f"every file is told once: {sorted(found.keys() ^ expected.keys())[:5]}"
    named = {tuple(places[int(name[:4])]): name for name in expected if name[:4].isdigit()}
    for (kind, index), name in named.items():
        original = named["kept", index] if kind in LOSSLESS else name
        if found[name]["kind"] == "kept" and found[original]["kind"] == "duplicate":
            expected[name], expected[original] = "kept", "duplicate"
    rows = []
    for name, wanted in expected.items():
        row, done = found[name], "archive" if name.startswith("pack.zip") else kinds[int(name[:4])]
        if row["kind"] != wanted:
            print(f"  {done:<14} {wanted:<15} {row['kind']:<15} {name}: {row['reason']}")
        rows.append((done, wanted, row["kind"]))
    return rows


def table(rows: list[tuple[str, str, str]]) -> str:
    expected, found = Counter(e for _, e, _ in rows), Counter(f for _, _, f in rows)
    right = Counter(e for _, e, f in rows if e == f)
    lines = [
        f"{len(rows):,} files, {sum(right.values()) / len(rows):.1%} in the right class. Of a picture and its identical or mirrored copy "
        "either may be the one that is kept.",
        "",
        "| class | files | precision | recall | taken for |",
        "|---|---|---|---|---|",
    ]
    for kind in expected:
        wrong = Counter(f for _, e, f in rows if e == kind and f != kind)
        precision = f"{right[kind] / found[kind]:.3f}" if found[kind] else "-"
        taken = ", ".join(f"{other} {count}" for other, count in wrong.most_common(3))
        lines.append(f"| {kind} | {expected[kind]} | {precision} | {right[kind] / expected[kind]:.3f} | {taken} |")
    for kind in found.keys() - expected.keys():
        lines.append(f"| {kind} | 0 | 0.000 | - | |")
    done = sorted({kind for kind, _, _ in rows})
    by_kind = {kind: [e == f for k, e, f in rows if k == kind] for kind in done}
    lines += ["", "By what was done to the picture, share in the right class: "]
    lines[-1] += ", ".join(f"{kind.replace('_', ' ')} {sum(hits) / len(hits):.2f}" for kind, hits in by_kind.items()) + "."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    rows: list[tuple[str, str, str]] = []
    counts = {kind: 6 if kind == "kept" else 1 for kind in FULL} if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 if options.quick else CHARACTERS):
            rows += run(Path(folder, str(number)), number, counts)
    text = table(rows)
    print(text)
    if not options.quick:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL), encoding="utf-8")
    right = sum(expected == found for _, expected, found in rows)
    print(json.dumps({"benchmark": "curation_classes", "values": {"files": len(rows), "right": right / len(rows)}}))


if __name__ == "__main__":
    main()
