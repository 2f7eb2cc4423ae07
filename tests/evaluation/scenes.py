"""Galleries of drawn characters, small and the same every time."""

import random
from dataclasses import replace
from functools import cache

from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metric import Case

SIZE = 64


@cache
def picture(number, index, size=SIZE):
    """Picture `index` of held-out character `number`, and a caption that calls it mivo."""
    identity, context = held_out_character(number), world.draw_context(random.Random(f"scene {number} {index}"))
    return Image.fromarray(drawing.render(identity, context, size)), world.caption(identity, context, name="mivo")[0]


def shots(number, indices, size=SIZE, **more):
    found = []
    for index in indices:
        drawn, caption = picture(number, index, size)
        found.append(Shot(drawn, caption, seed=index, key=f"{number} {index} {size}", **more))
    return found


def gallery(number, count=6, start=0, **more):
    return Gallery(f"character {number}", shots(number, range(start, start + count), **more))


def strangers(count=20, **more):
    """A picture of each of `count` other characters, without captions."""
    return Gallery("strangers", [replace(shots(number, [0], **more)[0], prompt="") for number in range(50, 50 + count)])


def case(**more):
    """The case of character 1."""
    return Case(**{"references": gallery(1, 6, 100), "others": strangers(), **more})


def turned(one, key=lambda i: (7 * i) % 11):
    """The same shots in another order, and the order."""
    order = sorted(range(len(one)), key=key)
    return Gallery(one.name, [one.shots[i] for i in order]), order


def edited(one, change):
    """The shots with `change` done to their pictures."""
    return Gallery(one.name, [replace(shot, picture=change(shot.open()), key="") for shot in one.shots])
