"""The words that captions use for people: lists for `rules.py`, which removes what they name, and `ensemble.py`, which compares it.

Phrases are written as people, BLIP-2, Florence-2, chatty models and taggers write them. All patterns are for lower case text or IGNORECASE.
"""

from __future__ import annotations

import re
from functools import cache


@cache
def any_of(words: str) -> str:
    """An alternation of the words of a text, longest first; `_` stands for a blank or hyphen inside one."""
    listed = sorted(set(words.split()), key=lambda word: (-len(word), word))
    return "(?:" + "|".join(re.escape(word).replace("_", "[ -]") for word in listed) + ")"


HUES = (
    "black brown blonde blond red ginger auburn chestnut raven white silver gray grey blue pink green purple violet orange yellow golden "
    "gold teal turquoise cyan magenta lavender beige tan cream maroon navy crimson scarlet platinum strawberry hazel amber copper indigo"
)
COLOUR = (
    rf"(?:(?:dark|light|bright|deep|pale|dirty|jet|vivid|soft|ash|neon|multi)[ -])?{any_of(HUES + ' multicolored multicoloured colorful')}"
)
ADJECTIVE = rf"(?:{COLOUR}|" + any_of(
    "very rather slightly long short medium shoulder-length waist-length chin-length medium-length mid-length straight wavy curly "
    "curled frizzy messy tousled sleek shiny thick thin fine spiky flowing voluminous braided shaggy neat big large small tiny round "
    "square oval almond-shaped almond piercing striking expressive bright dark light pale fair tanned tan olive smooth flawless "
    "beautiful pretty full bushy trimmed well-trimmed neatly_trimmed thin-rimmed black-rimmed gold-rimmed thick-rimmed wire-rimmed "
    "rimless rimmed framed reading dark-rimmed knitted knit woolen straw baseball cowboy top wide-brimmed brimmed backwards facial "
    "visible faint prominent deep two-tone gradient natural loose soft glossy silky lush unkempt medium-sized stylish stubbly long-sleeved"
) + ")"  # fmt: skip
# what may stand before a noun as the beginning of its phrase
OWNER = r"(?:the|this|that|a|an|her|his|their|its|some|one|another|both|(?:the|this|a|an)\s+\w+(?:\s\w+)?'s)"
# no part of a noun phrase: verbs, prepositions, and the words for people
STOP = any_of(
    "with and or but of in on at by to from for into onto over under near behind beside against between without wearing wears wear has "
    "have having had is are was were be being been who which that while as she he they it her his their its the a an this there "
    "woman women man men girl girls boy boys lady guy person people character figure female male child kid model subject someone 1girl "
    "1boy looking not no closed shut half-closed open narrowed wide widened teary tearful crossed sleepy raised furrowed wine champagne "
    "beer drinking shot martini ice snow mushroom"
)
PEOPLE = {
    "woman": "woman women girl lady female 1girl",
    "man": "man men boy guy male gentleman 1boy",
}
ANYONE = "person character figure someone individual subject child kid model human"

BODY = any_of(
    "head face nose forehead cheek cheeks chin eye eyes shoulder shoulders back waist neck ear ears lip lips brow arm arms hand hands"
)
_END = r"(?!\s+(?:and|with|wearing|while|as|who|standing|sitting|smiling|looking|posing|in front|against)\b)"
_ON = any_of("on over across above under below beneath near around past down between along to")
_ON_BODY = rf"\s+{_ON}\s+(?:{OWNER}\s+)?(?:\w+\s+)?{BODY}(?:\s+and\s+{BODY})?"
_HAIR_STYLE = any_of(
    "bun buns ponytail ponytails pigtails braid braids bob updo mohawk twintails dreadlocks curls waves bangs highlights streaks "
    "tips ends style knot"
)
_HAIR_DONE = any_of(
    "tied pulled styled swept parted braided gathered cut arranged worn slicked cropped cascading falling framing flowing blowing hanging "
    "draped reaching covering combed pinned put done"
)  # fmt: skip
HAIR_THINGS = any_of(
    "ornament ornaments ribbon ribbons bow bows band bands clip clips pin pins tie ties flower flowers accessory "
    "accessories tubes scrunchie dryer salon net"
)
# kind -> (heads of noun phrases, what may follow them as part of the phrase)
NOUNS = {
    "beard": (
        r"(?:facial\s+hair|beard|moustache|mustache|goatee|stubble|sideburns|whiskers|five o'clock shadow)",
        rf"(?:{_ON_BODY})",
    ),
    "marks": (
        r"(?:freckles|scars?|moles?|birthmarks?|beauty\s+marks?|tattoos?|dimples)",
        rf"(?:{_ON_BODY}|\s+(?:running|across|covering)\b(?:{_END}[^,.;])*)",
    ),
    "glasses": (
        r"(?:pair\s+of\s+(?:[\w-]+\s+){0,3}?)?(?:eyeglasses|sunglasses|glasses|spectacles|eyewear|goggles|monocle)(?!\s+of\b)",
        rf"(?:{_ON_BODY}|\s+with\s+(?:{OWNER}\s+)?(?:[\w-]+\s+){{0,3}}(?:frames?|rims?|lenses))",
    ),
    "hat": (
        r"(?:hat|cap|beanie|crown|tiara|beret|fedora|headband|headscarf|helmet|bonnet|sombrero|turban|headwear"
        r"|(?:cat|animal|bunny|fox|dog)\s+ears)",
        rf"(?:{_ON_BODY}|\s+with\s+(?:{OWNER}\s+)(?:[\w-]+\s+){{0,3}}(?:brim|feather|ribbon|pom-?pom|band|logo))",
    ),
    "skin": (r"(?:skin\s+tone|skin|complexion)", r"(?:\s+that\s+(?:is|glows|looks)\b(?:" + _END + r"[^,.;])*)"),
    "eyes": (
        r"(?:eye\s+colou?r|eyes|eyelashes|eyebrows|heterochromia)"
        r"(?!\s+(?:are\s+)?(?:closed|shut|open|wide|half|squinting|rolled)\b)",  # expressions, not colours
        rf"(?:\s+that\s+are\b(?:{_END}[^,.;])*)",
    ),
    "hair": (
        rf"(?:hair(?!\s+{HAIR_THINGS}\b)|hairstyle|haircut|hairdo|bangs|ponytails?|pigtails?|braids?|twintails|twin\s+tails|dreadlocks"
        r"|dreads|locks|curls|afro|mohawk|tresses|updo|ahoge|bob|buns?)",
        rf"(?:\s+(?:in|into|with)\s+(?:{OWNER}\s+)?(?:[\w-]+\s+){{0,3}}{_HAIR_STYLE}|\s+(?:up|down)\b"
        r"|\s+that\s+(?:is|falls|flows|hangs|reaches|cascades|frames|goes)\b"
        rf"(?:{_END}(?!\s+(?:is|has|wears|looks|stands|sits)\b)[^,.;])*"
        rf"|,?\s+{_HAIR_DONE}\b(?:{_END}[^,.;])*|{_ON_BODY})",
    ),
}  # fmt: skip
# kind -> adjectives that say it of a person: "a blonde woman"
ADJECTIVES = {
    "hair": r"(?:blonde|blond|brunette|redheaded|red-headed|bald|balding|[\w-]+[ -]haired|long-haired|short-haired)",
    "eyes": r"(?:(?!wide|teary|bleary|starry|one|dewy)\w+[ -]eyed)",
    "skin": r"(?:[\w-]+[ -]skinned|pale|tanned)",
    "glasses": r"(?:bespectacled)",
    "beard": r"(?:bearded|mustached|moustached|mustachioed|clean-shaven|unshaven)",
    "marks": r"(?:freckled|freckle-faced|scarred|tattooed)",
    "hat": r"(?:hatted)",
    "age": r"(?:young|younger|old|older|elderly|middle-aged|teenage|adult|mature|youthful)",
}
KINDS = tuple(ADJECTIVES)
