"""What becomes of every picture, and why: exactly one class for each finding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from charforgex.curation import duplicates, people, quality
from charforgex.curation.items import CLASSES, Verdict
from charforgex.curation.manifest import some
from charforgex.curation.settings import CurationSettings
from charforgex.curation.shards import Findings
from charforgex.quiet import quiet

FACES = 0.5  # share of pictures that must have a face for it to be asked of the others
MOST = 0.5  # share of the pictures with a face that must show one person for the others to be somebody else
ALONE = ("too_small", "exposure")  # classes of pictures that show too little to be held against others
LIKER = 0.1  # by how much more of a cosine a copy shows the character much better


@dataclass
class Decided:
    """What became of every finding: its verdict by index (those without one are kept), whose face it is, and groups of one picture."""

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    faces: dict[int, int] = field(default_factory=dict)  # of the character, by index
    groups: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def open(self, indices: Sequence[int]) -> list[int]:
        return [index for index in indices if index not in self.verdicts]


def decide(findings: Findings, settings: CurationSettings, character: people.Character | None) -> Decided:
    """Exactly one class for each finding. Of nearly the same pictures the best stays, before anything else is held against it."""
    decided = Decided()
    everyone = range(len(findings))
    poor: dict[int, Verdict] = {}
    for index in everyone:
        finding = findings[index]
        if finding.verdict is not None:
            decided.verdicts[index] = finding.verdict
        elif verdict := quality.judge(finding.scores, finding.width, finding.height, settings.quality):
            poor[index] = verdict
            if verdict.kind in ALONE:
                decided.verdicts[index] = verdict
    left = decided.open(everyone)
    chosen = findings.only(left)
    vectors = vectors_of(findings, left) if settings.duplicates.similarity is not None else None
    groups = duplicates.clusters(chosen, settings.duplicates, lambda place: findings.thumbnail(left[place]), vectors)
    for group in groups:
        decided.groups.append([left[member] for member in group.members])
        for member, reason in group.others.items():
            decided.verdicts[left[member]] = Verdict("duplicate", reason)
    decided.verdicts |= {index: verdict for index, verdict in poor.items() if index not in decided.verdicts}
    left = decided.open(everyone)
    wanted = settings.people
    with_face = sum(bool(findings[index].faces) for index in left)
    if wanted.require_face and with_face < FACES * len(left):
        wanted = replace(wanted, require_face=False)
        decided.notes.append(
            f"A face was found in {with_face} of {len(left)} pictures only, so none is asked for; curation.faces.detector has others."
        )
    if character is None and wanted.same_person and (known := most_frequent(findings, left, wanted.threshold)) is not None:
        character, share = known
        if share < MOST:
            character, wanted = None, replace(wanted, same_person=False)
            decided.notes.append(
                f"As far as the embedder {settings.embedder} can tell, the most frequent face is in {share:.0%} of the pictures that have "
                "one: too few to set the others aside. Name curation.people.references, or a curation.embedder that knows such faces."
            )
    if character is not None:
        exchange(decided, findings, character, wanted.threshold, poor)
        left = decided.open(everyone)
    chosen = findings.only(left)
    found = people.decide(chosen, lambda place: findings.face_vectors(left[place]), wanted, settings.crops, character)
    for index, decision in zip(left, found, strict=True):
        if decision.verdict is not None:
            decided.verdicts[index] = decision.verdict
        elif decision.face is not None:
            decided.faces[index] = decision.face
    return decided


def exchange(
    decided: Decided, findings: Findings, character: people.Character, threshold: float, poor: Mapping[int, Verdict]
) -> None:  # fmt: skip
    """Of copies one of which shows the character much better, as one that does not stand on its head, that one stays."""

    def likeness_of(index: int) -> float:
        return float((findings.face_vectors(index) @ character.vector).max()) if findings[index].faces else -1.0

    def area(index: int) -> int:
        return findings[index].width * findings[index].height

    for group in decided.groups:
        kept = group[0]
        if kept in decided.verdicts:
            continue
        likeness = {index: likeness_of(index) for index in group}
        least = area(kept) if likeness[kept] >= threshold else 0  # less of a picture is no better for a higher cosine
        fit = [index for index in group if index not in poor and area(index) >= least]
        top = max((likeness[index] for index in fit), default=-1.0)
        fit = [index for index in fit if likeness[index] >= max(threshold, top - LIKER)]
        if fit and kept not in fit:
            best = duplicates.best(fit, findings)
            del decided.verdicts[best]
            said = (
                f"nearly the same as {findings[best].name}, which has a cosine of {likeness[best]:.2f} to the character; "
                f"this has {likeness[kept]:.2f}"
            )
            decided.verdicts[kept] = Verdict("duplicate", said)
            group[:] = [best, *(index for index in group if index != best)]


def most_frequent(findings: Findings, indices: Sequence[int], threshold: float) -> tuple[people.Character, float] | None:
    """Whoever is in most pictures, and the share of the pictures with a face that show them. None where there is no face."""
    with_face = [index for index in indices if findings[index].faces]
    if not with_face:
        return None
    sample = with_face[:: math.ceil(len(with_face) / people.SAMPLE)]
    found = people.most_frequent(np.concatenate([findings.face_vectors(index) for index in sample]), threshold)
    shown = sum(float((findings.face_vectors(index) @ found.vector).max()) >= threshold for index in with_face)
    return found, shown / len(with_face)


def vectors_of(findings: Findings, indices: Sequence[int]) -> np.ndarray | None:
    vectors = [findings.vector(index) for index in indices]
    return None if not vectors or any(vector is None for vector in vectors) else np.stack(vectors)


def counts(findings: Findings, decided: Decided) -> dict[str, int]:
    """Files of each class, in the order of `CLASSES`."""
    found = Counter(verdict.kind for verdict in decided.verdicts.values())
    found["kept"] = len(findings) - len(decided.verdicts)
    return {kind: found[kind] for kind in CLASSES if found[kind]}


def nothing_kept(root: str, decided: Decided, out: Path) -> str:
    found = Counter(verdict.kind for verdict in decided.verdicts.values())
    told = some([f"{count} {kind.replace('_', ' ')}" for kind, count in found.most_common()])
    return f"data.root={root}: no picture is kept ({told}). {out / 'report.html'} says why for each; curation=... has the limits."


def character(settings: CurationSettings) -> people.Character | None:
    """Who is wanted, by the pictures that the user names; None without any."""
    if settings.people.references is None:
        return None
    from charforgex.curation.faces import get_detector
    from charforgex.embedders import get_embedder

    with quiet("transformers"):
        return people.from_references(settings.people.references, get_detector(settings.faces), get_embedder(settings.embedder))
