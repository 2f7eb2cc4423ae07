"""Rules for captions of one character: the trigger word in its place, and unsaid what the trigger is to mean.

A LoRA learns as the trigger what its captions do not explain: whoever writes "long black hair" in each of them teaches the words, not the
character. `apply` is deterministic and idempotent, and takes any caption: sentences, several of them, or tags.

Phrases are found by their words and replaced by marks (private-use characters); then marks are taken out together with what governs them
("with", "wearing", "She has ..."), and a mark whose place in the sentence is not understood gets its words back, which the notes say.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from charforgex.binding import Range
from charforgex.curation.captions.words import ADJECTIVE, ADJECTIVES, ANYONE, KINDS, NOUNS, OWNER, PEOPLE, STOP, any_of
from charforgex.errors import ConfigError

Kind = Literal["hair", "eyes", "skin", "glasses", "beard", "marks", "hat", "age"]
WINDOW = 77  # tokens that CLIP's text encoders read, their two marks included
PASSES = 8  # of the rules over a text; each shortens it or leaves it as it is


@dataclass(frozen=True)
class CaptionRules:
    trigger: str | None = None
    class_word: str | None = None
    place: Literal["class", "start"] = "class"
    absorb: tuple[Kind, ...] = ()
    form: Literal["keep", "tags", "sentence"] = "keep"
    max_words: Annotated[int, Range(at_least=4)] | None = None

    def __post_init__(self):
        if self.trigger is not None and not self.trigger.strip():
            raise ConfigError('The trigger "" names nothing; leave it null, or choose a word that means nothing, such as zatoki.')
        if self.class_word is not None and not self.class_word.strip():
            raise ConfigError('The class word "" names nothing; leave it null, or say what the character is, such as woman.')

    @property
    def phrase(self) -> str | None:
        """The trigger and its class, as captions shall say them: `zatoki woman`."""
        if self.trigger is None or self.class_word is None or self.trigger.split()[-1] == self.class_word:
            return self.trigger
        return f"{self.trigger} {self.class_word}"


def apply(text: str, rules: CaptionRules, tokenizer: Callable[[str], Any] | None = None) -> tuple[str, tuple[str, ...]]:
    """The caption as the rules want it, and what a person should know: attributes left in, words cut off, what CLIP does not read.

    `tokenizer` is one of CLIP's of transformers; without it tokens are estimated, and the note says so.
    """
    text, cut = plain(text), []
    for _ in range(PASSES):
        before = text
        text = without_openings(text)
        text = without_repeats(text)
        if rules.absorb:
            text = absorbed(text, rules.absorb, rules.class_word)
        if rules.form != "keep":
            text = as_tags(text) if rules.form == "tags" else as_sentence(text, rules.class_word)
        if rules.trigger is not None:
            text = placed(text, rules)
        if rules.max_words is not None:
            text, lost = shortened(text, rules.max_words)
            cut += [lost] if lost else []
        text = plain(text)
        if text == before:
            break
    notes = [f'cut to {rules.max_words} words: "{lost}" is left out' for lost in cut]
    notes += [f'still says "{phrase}": its place in the sentence is not understood' for phrase in remaining(text, rules.absorb)]
    return text, (*notes, *truncation(text, tokenizer))


# ---------------------------------------------------------------- plain text
SPELLINGS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": ", ", "…": "...", "\u00ad": None})


def plain(text: str) -> str:
    """NFC, straight quotes, one line, single blanks, no control, invisible or private characters, no blank before punctuation."""
    text = unicodedata.normalize("NFC", text).translate(SPELLINGS)
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Cn"))
    if _is_tagged(text):
        text = re.sub(r"(?<=\w)_(?=\w)", " ", text)
    return tidy(text)


def tidy(text: str) -> str:
    """Blanks and punctuation as they stand in print; nothing at the ends that joins nothing."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?](?!\d))", r"\1", text)
    text = re.sub(r"(?:,\s*)+(?=[,.;:!?])|(?<=[.;:!?])\s*,", "", text)
    text = re.sub(r",(?=[^\s\d])|(?<!\d),(?=\d)", ", ", text)
    text = re.sub(r"(?<!\.)\.\.(?!\.)", ".", text)
    text = re.sub(r"^[\s,;:.!?]+|[\s,;:]+$", "", text)
    return text.strip()


# ---------------------------------------------------------------- openings and repeats
PICTURE = r"(?:image|picture|photo|photograph|illustration|drawing|painting|artwork|scene|frame)"
OPENINGS = re.compile(
    r"^(?:"
    r"(?:sure|certainly|of course|okay|absolutely)\b[^.:!,]*[.:!,]\s*"
    r"|(?:here(?:'s| is)) (?:a|the|your) [^.:]*?(?:description|caption)[^.:]*[:.]\s*"
    r"|(?:the )?(?:caption|description|answer|assistant|tags)\s*:\s*"
    rf"|(?:in (?:this|the) {PICTURE},?\s*)?(?:we|you|i|one) (?:can )?(?:see|observe|notice)(?: that)?(?: there (?:is|are))?\s+"
    rf"|in (?:this|the) {PICTURE},?\s*(?:there (?:is|are)\s+)?"
    rf"|(?:this|that|it)(?: {PICTURE})? (?:is|appears to be|seems to be|shows) (?:a|an|the) (?:[\w-]+\s){{0,2}}?{PICTURE}"
    r" (?:of|showing|featuring|depicting|with)\s+"
    rf"|(?:this|the)(?: [\w-]+){{0,2}}? {PICTURE}"
    r" (?:is of|is|shows|depicts|features|contains|captures|displays|portrays|presents|illustrates|showcases)(?: us)?\s+"
    rf"|(?:an?|the) (?:image|picture) (?:of|showing|featuring|depicting)\s+"
    r"|there (?:is|are)\s+"
    r"|(?=arafed\b|araffe)"
    r")",
    re.IGNORECASE,
)
ARAFED = re.compile(r"\b(?:(an?) )?araff?ed? (?=(\w))", re.IGNORECASE)  # what BLIP says where it has no word


def without_openings(text: str) -> str:
    """Without "The image shows", "This is a photo of" and the like; "a portrait of" and "a photo of" say something and stay."""

    def article(match: re.Match) -> str:
        return f"{'an' if match[2].lower() in 'aeiou' else 'a'} "

    text = ARAFED.sub(article, text)
    first, *others = sentences(_opened(text)) or [""]
    opened = ((_opened(sentence), sentence) for sentence in others)
    return " ".join([first, *(short if short == long else short[0].upper() + short[1:] for short, long in opened)])


def _opened(sentence: str) -> str:
    match = OPENINGS.match(sentence)
    while match and match.end() and sentence[match.end() :].strip():
        sentence = sentence[match.end() :].lstrip()
        match = OPENINGS.match(sentence)
    return sentence


STUTTER = re.compile(r"\b(\w+(?:[ ,]+\w+){0,5}?)(?:(?:,? and|,)? \1\b)+", re.IGNORECASE)


def without_repeats(text: str) -> str:
    """Words said again at once, sentences said before, and tags that are there already."""
    text = STUTTER.sub(r"\1", text)
    kept = _unique(sentences(text))
    if len(kept) == 1 and _is_tagged(text):
        return ", ".join(_unique(_parts(text)))
    return " ".join(kept)


def _unique(parts: list[str]) -> list[str]:
    seen: dict[str, str] = {}
    for part in parts:
        seen.setdefault(re.sub(r"\W+", " ", part).strip().lower(), part)
    return list(seen.values())


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+(?=\S)", text) if part.strip()]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<!\d),|,(?!\d)", text) if part.strip()]


def _is_tagged(text: str) -> bool:
    """Whether this is a list of tags: several short parts, and no verbs or joints of a sentence."""
    parts = _parts(text)
    joints = re.search(r"\b(?:is|are|has|with|wearing|who|of an?|in an?|the)\b|[.!?]\s+\S", text)
    return len(parts) >= 3 and sum(len(re.split(r"[\s_]+", part)) for part in parts) <= 2.6 * len(parts) and not joints


# ---------------------------------------------------------------- attributes that the trigger absorbs
BLOCK = 0x300  # marks of each kind
MARK = "[\ue000-\uf7ff]"
WORN = "[" + "".join(f"{chr(0xE000 + n * BLOCK)}-{chr(0xE000 + n * BLOCK + BLOCK - 1)}" for n in map(KINDS.index, ("glasses", "hat"))) + "]"
NOT_VERBS = (
    r"(?!(?:clothing|earrings?|rings?|king|string|morning|evening|ceiling|wing|building|painting|lighting|matching|flowing|glowing|"
    r"sparkling|striking|charming|shining|piercing)\b)"
)
BEGINS = (
    rf"(?:{NOT_VERBS}\w+ing\b|(?:in|at|on|against|under|underwater|near|by|with|while|as|who|which|that|outdoors|indoors|seen|"
    r"surrounded|dressed|posed|seated|behind|beside|from|inside|outside|next|over|to|toward|towards|for)\b)"
)
VERBS = r"(?:is|are|was|has|have|wears|looks|stands|sits|smiles|appears|seems|holds|poses|gazes|faces|walks|leans|stares)\b"
HOLDS = r"(?:with|wearing|having|sporting|featuring|including)"
STATES = r"(?:has|have|had|wears|sports|features)"
SUBJECT = r"(?:she|he|they|it|(?:the|this|that)\s+(?:\w+\s+)?(?:" + any_of(" ".join(PEOPLE.values()) + " " + ANYONE) + r"))"
FREE = rf"(?:{ADJECTIVE}|(?!{STOP}\b)(?!{NOT_VERBS}\w+ing\b)[\w'-]+)"
SAYS = r"(?:is|are|was|were|falls?|flows?|looks?|hangs?|frames?|cascades?|reaches|appears?|seems?|blows?)"
COMPLEMENT = (
    r"(?:(?!,\s+(?:and\s+)?(?:she|he|they|the|her|his|with|standing|sitting|smiling|looking)\b"
    r"|\s+and\s+(?:she|he|they|the|her|his|is\s+wearing)\b|,?\s+(?:wearing|while|wears)\b)[^.;!?])*"
)
ITEM = r"[^,.;!?\ue000-\uf8ff]+"
RELATIVE = r"(?:who|that)\s+(?:has|have|is|are)\s+(?:wearing\s+)?"
ANOTHER = rf"(?:{SUBJECT}|(?:the|an?|her|his|their)\s+(?:[\w-]+\s+)?\w+)\s+{VERBS}"  # the beginning of a clause about something else


class _Marked:
    """A text whose attribute phrases are marks, and what they stand for."""

    def __init__(self, text: str):
        self.text, self.meant, self.count = text, {NOTHING: ""}, [0] * len(KINDS)

    def mark(self, kind: int, words: str) -> str:
        if self.count[kind] == BLOCK:  # a text of hundreds of phrases: the rest stay words
            return words
        char = chr(0xE000 + kind * BLOCK + self.count[kind])
        self.count[kind] += 1
        self.meant[char] = words
        return char

    def sub(self, pattern: str, kind: int | None = None) -> None:
        """Every match becomes a mark, of that kind or of the first mark inside it."""

        def replace(match: re.Match) -> str:
            inner = re.search(MARK, match[0])
            return self.mark((ord(inner[0]) - 0xE000) // BLOCK if kind is None else kind, match[0])

        self.text = re.sub(pattern, replace, self.text, flags=re.IGNORECASE)

    def restored(self) -> str:
        text = self.text
        while found := re.search(MARK, text):
            text = text.replace(found[0], self.meant[found[0]])
        return text


def noun_phrase(kind: str) -> str:
    """A pattern for the phrases of a kind: "her long, black hair tied in a bun", "a pair of round glasses"."""
    head, tail = NOUNS[kind]
    joint = r"(?:,?\s+and\s+|,\s*|\s+|-)"
    some = "+" if kind == "eyes" else "*"  # eyes alone are no attribute
    listed = rf"(?<![\w'-])(?:{OWNER}\s+)?(?:{ADJECTIVE}{joint}){some}{head}\b(?:{tail})*"
    governed = "|".join(rf"(?<=\b{word} )" for word in ("with", "has", "have", "having", "wearing", "and"))
    anchor = rf"(?:(?<![\w'-]){OWNER}\s+|{governed}|(?<=, )|(?<![^.!?] )(?<!\S))"
    free = rf"{anchor}(?:{FREE}\s+){{1,4}}?{head}\b(?:{tail})*"
    return f"(?:{free}|{listed})"


def _mark_phrases(marked: _Marked, kinds: tuple[str, ...]) -> None:
    for kind in (*NOUNS, "age"):
        if kind not in kinds:
            continue
        number = KINDS.index(kind)
        if kind == "hair":
            marked.sub(rf"(?:\b{OWNER}\s+)?(?:\w+ly\s+)?(?:bald|shaved|shaven)\s+head", number)
        if kind == "eyes":
            marked.sub(rf"\b{OWNER}\s+eyes\s+(?:are|were)\s+(?:a\s+)?(?:{ADJECTIVE}[,\s]*(?:and\s+)?)+(?=[.;!?]|$|,|\s+and)", number)
        if kind in NOUNS:
            marked.sub(noun_phrase(kind), number)
            marked.sub(rf"(?:^|(?<=[.!?;] )){MARK}\s+{SAYS}\b{COMPLEMENT}")
            owned = "".join(char for char, words in marked.meant.items() if re.match(r"(?:her|his|their|the)\b", words, re.IGNORECASE))
            if owned:
                marked.sub(rf"(?:(?<=, )|(?<=, and )|(?<= and ))[{owned}]\s+{SAYS}\b{COMPLEMENT}")
        marked.sub(rf"(?<=, ){ADJECTIVES[kind]}(?=\s*(?:,|$))|^{ADJECTIVES[kind]}(?=\s*,)", number)


def _without_adjectives(text: str, kinds: tuple[str, ...], class_word: str | None) -> str:
    """ "a blonde woman" and "a young, bearded man" without those words; "a blonde in red" becomes the class."""
    people = any_of(" ".join(PEOPLE.values()) + f" {ANYONE} {_joined(class_word)}")
    listed = "|".join(ADJECTIVES[kind] for kind in KINDS if kind in kinds)
    if "age" in kinds:
        text = re.sub(DECADE, "", text, flags=re.IGNORECASE)
    goes_on = rf"(?=\s*(?:[.;!?]|$|(?:,\s*)?(?:and\s+)?(?:{BEGINS}|{VERBS})))"
    text = re.sub(rf"\b({SUBJECT}\s+)(?:is|are)\s+(?:\w+ly\s+)?(?:{listed}){goes_on}", rf"\1has {NOTHING}", text, flags=re.IGNORECASE)
    text = re.sub(rf"(\b{OWNER}\s+[\w-]+)(?:,|\s+and|,\s+and)\s+(?:{listed})(?=\s+{people}\b)", r"\1", text, flags=re.IGNORECASE)
    ahead = rf"(?=(?:(?!{STOP}\b)[\w-]+,?\s+(?:and\s+)?){{0,3}}{people}\b)"
    before = None
    while before != text:
        before = text
        text = re.sub(
            rf"(?:\b(?P<article>an?)\s+)?\b(?:{listed})(?:\s*,|\s+and)?\s+{ahead}(?P<next>\w)", _with_article, text, flags=re.IGNORECASE
        )
    if "hair" in kinds and class_word:
        follows = r"(?=\s+(?:in|with|wearing|is|has|who|standing|sitting|smiling|looking|posing)\b|\s*[,.]|$)"
        a = "an" if class_word[0].lower() in "aeiou" else "a"
        text = re.sub(rf"\b(?:an?)\s+(?:blonde|blond|brunette|redhead){follows}", f"{a} {class_word}", text, flags=re.IGNORECASE)
    return text


DECADE = (
    r",?\s*\b(?:probably |likely )?in (?:her|his|their) (?:early |mid |late |mid-)?"
    r"(?:\d0s|teens|twenties|thirties|forties|fifties|sixties|seventies|eighties)\b"
)
NOTHING = "\uf7ff"  # a mark that stands for no words: "is bald" becomes "has" nothing


def _joined(word: str | None) -> str:
    return (word or "").replace(" ", "_")


def _with_article(match: re.Match) -> str:
    if not match["article"]:
        return match["next"]
    article = "an" if match["next"].lower() in "aeiou" else "a"
    return f"{article.capitalize() if match['article'][0] == 'A' else article} {match['next']}"


def _repaired(marked: _Marked) -> None:
    """Takes out the marks whose place is understood, with what governs them, until nothing changes."""
    marked.sub(rf"{MARK}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s+or\s+|\s+){MARK})+")
    rules = (
        # whole sentences of which nothing is left
        (rf"(^|(?<=[.!?;] )){SUBJECT}\s+(?:also\s+)?(?:(?:is|are)\s+(?:also\s+)?wearing|{STATES})\s+{MARK}\s*(?:[.;!?]|$)\s*", ""),
        (rf"(^|(?<=[.!?;] )){MARK}\s*(?:[.;!?]\s*|$)", ""),
        (rf",?\s*\b(?:who|that|which)\s+(?:{STATES}|(?:is|are)\s+wearing)\s+{MARK}\s*,?\s+(?={VERBS})", " "),
        (rf"(^|,\s*|(?<=[.!?;] )){SUBJECT}\s+{STATES}\s+{MARK}\s*,?\s+and\s+(?={ANOTHER})", r"\1"),
        # lists of which one or two are left: "with M, a scarf and boots", "with a scarf, M, and boots", "with a scarf, boots, and M"
        (rf"\b({HOLDS}|{STATES})\s+{MARK}\s*,\s+(?!{BEGINS}|{VERBS})([^,.;!?]+?),?(?=\s+and\s)", r"\1 \2"),
        (rf"\b({HOLDS}|{STATES})\s+{MARK}\s*,\s+(?=(?!{BEGINS}|{VERBS})[^,.;!?]+,\s+(?!{BEGINS}|{VERBS})[^,.;!?]+?,?\s+and\s)", r"\1 "),
        (rf"\b((?:{HOLDS}|{STATES})\s{ITEM}),\s*{MARK}\s*,?\s+and\b", r"\1 and"),
        (rf"\b((?:{HOLDS}|{STATES})\s{ITEM}),\s+(?!{BEGINS}|{VERBS})({ITEM}?),?\s+and\s+{MARK}(?=\s*[,.;!?]|$)", r"\1 and \2"),
        # "She has M and is smiling", "She has M, smiling", "She has M and a red scarf"
        (rf"\b{STATES}\s+(?:{MARK})\s*(?:,\s*and|,|and)\s+(?={VERBS})", ""),
        (rf"\b(?P<verb>{STATES})\s+{MARK}\s*(?:,\s*and\s+|,\s*|and\s+|\s+)(?={BEGINS})", "is "),
        (rf"\b({STATES})\s+{MARK}\s*(?:,\s*and|,|and)\s+(?!{BEGINS}|{ANOTHER})(?=\S)", r"\1 "),
        (rf",?(?:\s+(?:who|that|which))?\s+{STATES}\s+{MARK}(?=\s*(?:[.;!?]|$))", ""),
        # "is wearing M, smiling", "is wearing M and smiling"
        (rf"\b(is|are)\s+wearing\s+{MARK}\s*(?:,\s*and|,|and)?\s+(?={BEGINS})", r"\1 "),
        # "wearing M and a scarf", "with M, a scarf and boots"
        (rf"\b({HOLDS}|in)\s+{WORN}\s*(?:,\s*and|and)\s+(?!{BEGINS}|{VERBS})(?=\S)", r"\1 "),
        (rf"\b({HOLDS})\s+{MARK}\s*(?:,\s*and|and)\s+(?!{BEGINS}|{VERBS})(?=\S)", r"\1 "),
        (rf"\b({HOLDS})\s+{MARK}\s*,\s*(?=(?:an?|her|his|their)\s)", r"\1 "),
        # "with M and smiling", "wearing M, in a park", "who has M", "with M."
        (rf"\s*,?\s*\b(?:and\s+)?{HOLDS}\s+{MARK}\s*(?:,\s*and|and)\s+(?={BEGINS}|{VERBS})", " "),
        (rf"(?:\s*,)?\s*\b(?:and\s+|or\s+)?(?:{RELATIVE}|{HOLDS}\s+){MARK}(?=\s*[,.;!?]|$|\s+(?:{BEGINS}|{VERBS}))", ""),
        (rf"\s+in\s+{WORN}(?=\s*[,.;!?]|$|\s+(?:{BEGINS}|{VERBS}))", ""),
        # the end of a list, a part of its own, the beginning
        (rf",?\s+(?:and|or|&|plus|as well as|along with)\s+(?:{HOLDS}\s+|{STATES}\s+)?{MARK}(?=\s*[,.;!?]|$|\s+(?:{BEGINS}|and\b))", ""),
        (rf",\s*{MARK}(?=\s*(?:[,.;!?]|$)|\s+{BEGINS})", ""),
        (rf"(?<=,)\s*{MARK}\s+and(?=\s)", ""),
        (rf"(^|(?<=[.!?;] )){MARK}\s*(?:,\s*and\b|,|\s+and\b)", ""),
    )  # fmt: skip
    before = None
    while before != marked.text:
        before = marked.text
        for pattern, replacement in rules:
            marked.text = re.sub(pattern, replacement, marked.text, flags=re.IGNORECASE)
        marked.text = re.sub(r"\s+", " ", marked.text)


def absorbed(text: str, kinds: tuple[str, ...], class_word: str | None = None) -> str:
    """The caption without the attributes of those `KINDS`. What cannot be taken out of its sentence stays."""
    began_large = text[:1].isupper()
    text = _without_adjectives(text, kinds, class_word)
    marked = _Marked(text)
    _mark_phrases(marked, kinds)
    _repaired(marked)
    out = tidy(marked.restored())
    out = re.sub(r"(?<=[.!?] )([a-z])", lambda match: match[1].upper(), out) if out != text else out
    return out[:1].upper() + out[1:] if began_large and out != text else out


def remaining(text: str, kinds: tuple[str, ...]) -> list[str]:
    """The phrases of those kinds that the caption still has."""
    marked = _Marked(text)
    _mark_phrases(marked, kinds)
    found = re.findall(MARK, marked.text)
    marked.text = "\n".join(found)
    return marked.restored().split("\n") if found else []


# ---------------------------------------------------------------- the trigger
PLACEHOLDER = "{trigger}"


def placed(text: str, rules: CaptionRules) -> str:
    """With the trigger, and its class after it: in the place of the class word, or before all."""
    phrase, trigger = rules.phrase, rules.trigger
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, phrase)
    if _word(phrase, text):
        return text
    if _word(trigger, text):  # it stands there without its class
        return re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", lambda _: phrase, text, count=1)
    if rules.place == "class" and (found := _subject(text, rules.class_word)):
        said = phrase if rules.class_word else f"{trigger} {found['noun']}"
        return text[: found.start()] + said + text[found.end() :]
    if re.match(r"(?:An?|The)\s", text):
        text = text[0].lower() + text[1:]
    return f"{phrase}, {text}" if text else phrase


def _word(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _subject(text: str, class_word: str | None) -> re.Match | None:
    """The first mention of the one whom the caption is about, with its article where nothing stands between."""
    same = PEOPLE.get((class_word or "").lower(), "")
    human = class_word is None or bool(same) or class_word.lower() in ("girl", "boy", "person", "character", "lady", "guy")
    same = same or next((words for words in PEOPLE.values() if class_word and class_word.lower() in words.split()), "")
    singular = " ".join(word for word in f"{_joined(class_word)} {same}".split() if word not in ("women", "men"))
    anybody = " ".join(w for w in " ".join(PEOPLE.values()).split() if w not in ("women", "men")) if class_word is None else ""
    for nouns in (singular, anybody, ANYONE if human else ""):
        if nouns.strip():
            found = re.search(rf"(?:\b(?:an?|the|this|one)\s+)?(?<![\w'-])(?P<noun>{any_of(nouns)})(?![\w-])", text, re.IGNORECASE)
            if found:
                return found
    return re.match(r"(?P<noun>she|he)\b", text, re.IGNORECASE) if class_word and human else None


# ---------------------------------------------------------------- form and length
COUNTS = re.compile(r"^(?:\d\+?(?:girl|boy|other)s?|solo|solo focus)$", re.IGNORECASE)


def as_tags(text: str) -> str:
    """A sentence's clauses as tags: split at its joints, without articles and full stops."""
    if _is_tagged(text):
        return text
    pieces = re.split(r"\s*[,.;!?]+(?:\s+|$)|\s+with\s+|\s+and\s+(?=an?\s)|\s+(?=wearing\s)|\s+(?:who|that)\s+(?:is|has)\s+", text)
    tags = [
        re.sub(r"^(?:and\s+|(?:she|he|they)\s+(?:is|has|are|have)\s+|(?:an?|the)\s+)+", "", piece.strip(), flags=re.IGNORECASE)
        for piece in pieces
    ]
    return ", ".join(_unique([tag for tag in tags if tag]))


def as_sentence(text: str, class_word: str | None) -> str:
    """Tags as one sentence: "1girl, solo, long hair, smile" is "a woman with long hair, smile". A sentence stays as it is."""
    if not _is_tagged(text):
        return text
    parts = _parts(text)
    count = next((part for part in parts if re.match(r"^1(?:girl|boy)$", part, re.IGNORECASE)), None)
    rest = [part for part in parts if not COUNTS.match(part)]
    if count:
        word = class_word or {"girl": "woman", "boy": "man"}[count[1:].lower()]
        rest = [f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}", *rest]
    had = [part for part in rest[1:] if re.fullmatch("|".join(noun_phrase(kind) for kind in NOUNS), part, re.IGNORECASE)]
    if not had:
        return ", ".join(rest) if count else text
    listed = had[0] if len(had) == 1 else f"{', '.join(had[:-1])} and {had[-1]}"
    return ", ".join([f"{rest[0]} with {listed}", *(part for part in rest[1:] if part not in had)])


def shortened(text: str, most: int) -> tuple[str, str]:
    """At most that many words, cut where a clause ends if one does in the second half, and what was cut off."""
    words = text.split(" ")
    if len(words) <= most:
        return text, ""
    kept = " ".join(words[:most])
    ends = [match.start() for match in re.finditer(r"[,.;!?](?=\s|$)", kept)]
    if ends and ends[-1] >= len(kept) // 2:
        kept = kept[: ends[-1] + (kept[ends[-1]] in ".!?")]
    return tidy(kept), tidy(text[len(kept) :])


def truncation(text: str, tokenizer: Callable[[str], Any] | None = None) -> tuple[str, ...]:
    """A warning, if the caption is longer than what CLIP's text encoders read."""
    if tokenizer is not None:
        count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        said = f"{count} tokens"
    else:  # English captions have 1.1 tokens a word in CLIP's vocabulary, and one for each punctuation mark; rare names have more
        count = round(sum(1 + max(0, len(word) - 6) / 6 for word in re.findall(r"\w+", text)) + len(re.findall(r"[^\w\s]", text))) + 2
        said = f"about {count} tokens (estimated: no tokenizer was given)"
    return (f"{said}, and CLIP reads {WINDOW}: its end has no effect there",) if count > WINDOW else ()
