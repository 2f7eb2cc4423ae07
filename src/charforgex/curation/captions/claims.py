"""What captions claim: each caption's answers to the same questions (hair colour, eyes, glasses, clothes, place, ...), and where.

A claim that says no ("no glasses", "clean-shaven") has the value `none`; one that hesitates ("appears to", "possibly") counts half.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from charforgex.curation.captions.rules import absorbed, as_tags, noun_phrase
from charforgex.curation.captions.words import HUES, KINDS, NOUNS, PEOPLE, any_of

NONE = "none"
HESITATION = re.compile(r"\b(?:appears?|seems?|possibly|perhaps|maybe|might|may|probably|likely|looks like)\b[^,.;]*$", re.IGNORECASE)
SAME = {
    "blond": "blonde", "grey": "gray", "golden": "blonde", "ginger": "red", "auburn": "red", "violet": "purple", "mustache": "moustache",
    "silver": "gray", "raven": "black", "chestnut": "brown", "tanned": "tan", "fair": "pale", "light": "pale", "shirtless": NONE,
}  # fmt: skip


@dataclass(frozen=True)
class Aspect:
    """A question about a picture. `rivals` are answers to weigh a single claim against, `phrase` is how a sentence says one.

    `noun` is the kind of `words.NOUNS` in whose phrases the answer stands; otherwise `patterns` find the answers in the text.
    """

    name: str
    phrase: str
    rivals: tuple[str, ...]
    noun: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()  # (pattern, value), the value empty for the words themselves
    contradicts: bool = True  # two different answers exclude each other


COLOURS = r"\b(?P<value>" + any_of(HUES) + r")\b"
BASIC = ("black", "brown", "blonde", "red", "white", "gray", "blue", "pink", "green", "purple")
CLOTHES = "t-shirt shirt hoodie suit overalls sweater jacket coat dress blouse blazer cardigan vest raincoat uniform kimono gown top"
PLACES = {
    "at the beach": "beach|seaside|shore", "in a forest": "forest|woods", "in a city at night": "city|streets?",
    "in the snowy mountains": "mountains?", "in the desert": "desert|dunes", "in outer space": "space|galaxy",
    "at sunset": "sunset|dusk", "underwater": "underwater", "in a park": "park", "indoors": "indoors|room",
}  # fmt: skip
PLACE = (
    r"(?:\b(?:at|in|on|by|near) (?:an? |the )?(?:(?:snowy|dark|quiet|busy|sandy|sunny|outer|lush|green|city) )?)?\b(?:{})\b(?: at night)?"
)
EXPRESSIONS = {
    "laughing": "laugh(?:ing|s)", "smiling": r"(?:with )?(?:an? )(?:\w+ )?smile|smil(?:ing|es|e)|grin(?:ning)?",
    "looking sad": "(?:looking )?sad|crying|frowning", "looking surprised": "(?:looking )?(?:surprised|shocked)",
    "looking angry": "(?:looking )?angry|scowling", "winking": "wink(?:ing|s)?|one eye closed",
    "with closed eyes": r"closed eyes|eyes (?:are )?closed|asleep|sleeping",
    "with a neutral face": "neutral (?:face|expression)|expressionless",
}  # fmt: skip
FRAMES = {
    "close-up": "close-?up|close up|headshot", "portrait": "portrait", "half-length picture": "upper body|half-length|waist up",
    "full-length picture": "full[- ]body|full[- ]length",
}  # fmt: skip
LENGTHS = {"short": "short", "long": "long|waist-length", "shoulder-length": "shoulder-length|medium", "bald": "bald|shaved"}
STYLES = {
    "curly": r"curl\w*|wav\w+|frizzy", "spiky": "spiky|spikes", "mohawk": "mohawk", "bob": "bob", "bun": "buns?|updo",
    "pigtails": "pigtails?|twintails", "ponytail": "ponytails?", "braided": r"braid\w*", "straight": "straight",
}  # fmt: skip


def _table(words: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((rf"\b(?:{pattern})\b", value) for value, pattern in words.items())


ASPECTS = (
    Aspect("kind", "", ("woman", "man"), patterns=tuple((rf"\b{any_of(words)}\b", kind) for kind, words in PEOPLE.items())),
    Aspect("hair_colour", "{} hair", BASIC, "hair", ((COLOURS, ""),)),
    Aspect("hair_length", "{} hair", ("long", "short", "bald"), "hair", _table(LENGTHS)),
    Aspect("hair_style", "{} hair", ("curly", "spiky", "mohawk", "bob", "bun", "pigtails", "straight"), "hair", _table(STYLES)),
    Aspect("eyes", "{} eyes", ("brown", "blue", "green", "purple"), "eyes", ((COLOURS, ""), (r"\bdark\b", "brown"))),
    Aspect("skin", "{} skin", ("pale", "tan", "brown", "dark", "green", "blue"), "skin", (
        (COLOURS, ""), (r"\b(?P<value>pale|fair|light|dark|tanned)\b", ""),
    )),
    Aspect("glasses", "{}", ("sunglasses", "round glasses", "square glasses", NONE), "glasses", (
        (r"sunglasses", "sunglasses"), (r"\bround\b", "round glasses"), (r"\bsquare\b", "square glasses"),
        (r"glasses|spectacles|eyewear", "glasses"),
    )),
    Aspect("beard", "a {}", ("moustache", "full beard", NONE), "beard", (
        (r"mou?stache", "moustache"), (r"full beard", "full beard"), (r"beard|facial hair|goatee|stubble", "beard"),
    )),
    Aspect("hat", "a {}", ("cap", "beanie", "top hat", "crown", NONE), "hat", (
        (r"top hat", "top hat"), (r"\bcap\b", "cap"), (r"beanie", "beanie"), (r"crown|tiara", "crown"),
        (r"(?:cat|animal) ears", "cat ears"),
        (r"\bhat\b|beret|fedora|bonnet", "hat"),
    )),
    Aspect("expression", "{}", tuple(EXPRESSIONS), patterns=_table(EXPRESSIONS)),
    Aspect("garment", "{}", ("t-shirt", "hoodie", "suit", "shirt", "overalls"), patterns=(
        (rf"\b(?P<value>{any_of(CLOTHES)})\b", ""),
    )),
    Aspect("garment_colour", "{}", ("red", "orange", "yellow", "green", "blue", "purple", "white", "black"), patterns=(
        (rf"\b(?P<value>{any_of(HUES)})\s+(?:[\w-]+\s+)?{any_of(CLOTHES)}\b", ""),
    )),
    Aspect("place", "{}", tuple(PLACES), patterns=(
        (rf"\b(?P<value>{any_of(HUES)} background)\b", ""), *((PLACE.format(words), place) for place, words in PLACES.items()),
    )),
    Aspect("framing", "", tuple(FRAMES), patterns=_table(FRAMES)),
    Aspect("marks", "{}", ("freckles", "a scar", NONE), "marks", (
        (r"freckle\w*", "freckles"), (r"scars?", "a scar"), (r"tattoos?", "a tattoo"),
    ), contradicts=False),
)  # fmt: skip
BY_NAME = {aspect.name: aspect for aspect in ASPECTS}
ADJECTIVES = {
    "hair_colour": rf"\b(?P<value>{any_of(HUES)})(?:-haired|\s+(?:woman|man|girl|boy)\b)",
    "eyes": rf"\b(?P<value>{any_of(HUES)})-eyed",
}
NOT = r"\b(?:with no|no|without|(?:(?:she|he) is )?not wearing)\s+(?:an?\s+)?(?:\w+\s+)?"
DENIALS = {
    "glasses": rf"{NOT}(?:eye)?glasses",
    "hat": rf"{NOT}(?:hat|cap)",
    "beard": rf"\bclean-shaven|{NOT}(?:beard|facial hair)",
    "marks": rf"{NOT}(?:scars|freckles)",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """`span` is where the words stand in the caption, `confidence` 1, or 0.5 where the caption hesitates."""

    aspect: str
    value: str
    span: tuple[int, int]
    confidence: float = 1.0


def claims(text: str) -> list[Claim]:
    """One claim per aspect at most, the first in the text, in the order of `ASPECTS`."""
    found = []
    for aspect in ASPECTS:
        denial = re.search(DENIALS[aspect.name], text, re.IGNORECASE) if aspect.name in DENIALS else None
        if denial:
            found.append(Claim(aspect.name, NONE, denial.span()))
        elif hit := _first(aspect, text):
            value, span = hit
            hesitates = HESITATION.search(re.split(r"[.;]", text[: span[0]])[-1])
            found.append(Claim(aspect.name, value, span, 0.5 if hesitates else 1.0))
    return found


def _first(aspect: Aspect, text: str) -> tuple[str, tuple[int, int]] | None:
    places = [(0, text)]
    if aspect.noun:
        places = [(match.start(), match[0]) for match in re.finditer(noun_phrase(aspect.noun), text, re.IGNORECASE)]
        if aspect.name == "hair_length":
            places += [(match.start(), match[0]) for match in re.finditer(r"\bbald\b", text, re.IGNORECASE)]
    for start, words in places:
        for pattern, value in aspect.patterns:
            match = re.search(pattern, words, re.IGNORECASE)
            if match:
                group = "value" if "value" in match.re.groupindex else 0
                return value or plain_value(match[group]), (start + match.start(group), start + match.end(group))
    match = re.search(ADJECTIVES[aspect.name], text, re.IGNORECASE) if aspect.name in ADJECTIVES else None
    return (plain_value(match["value"]), match.span("value")) if match else None


def plain_value(words: str) -> str:
    words = words.lower()
    return SAME.get(words, words)


def agrees(said: str, value: str) -> bool:
    """Whether saying one supports the other: they are the same, or one is less exact ("glasses" for "round glasses")."""
    return said == value or value.endswith(f" {said}") or said.endswith(f" {value}")


def remainder(text: str) -> list[str]:
    """What a caption says besides the aspects: its other clauses, as short phrases in lower case."""
    bare = absorbed(text, KINDS)
    known = [pattern for aspect in ASPECTS if not aspect.noun for pattern, _ in aspect.patterns]
    known += [rf"\b{any_of(HUES)}\b", *(noun_phrase(kind) for kind in NOUNS)]
    tags = []
    for tag in as_tags(bare).split(", "):
        tag = re.sub(rf"^.*\b{any_of(' '.join(PEOPLE.values()))}\b\s*", "", tag, flags=re.IGNORECASE)
        rest = tag.lower()
        for pattern in known:
            rest = re.sub(pattern, " ", rest, flags=re.IGNORECASE)
        words = [word for word in re.findall(r"[\w-]+", rest) if word not in LITTLE]
        if len(words) >= 1 and rest.strip() == tag.lower().strip():
            tags.append(tag.lower())
    return tags


LITTLE = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at with and or is are has have wearing she he they her his their it its this that there very over face looking "
        "solo 1girl 1boy possibly perhaps maybe might may probably likely appears seems to be",
    )
)
