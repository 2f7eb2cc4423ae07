"""Where faces are drawn, and what the detector's maps say of them."""

import random

import numpy as np
import torch

from charforgex.charworld import crowds, drawing, world
from charforgex.charworld.detector import Detector, decode, loss, target_of


def draw(seed):
    rng = random.Random(seed)
    return world.draw_identity(rng), world.draw_context(rng)


def test_a_cut_out_over_its_scenery_is_the_picture():
    for seed in range(4):
        identity, context = draw(seed)
        canvas = drawing.Canvas(96)
        drawing.scenery(canvas, context)
        figure = drawing.cut_out(identity, context, 96).astype(float)
        alpha = figure[..., 3:] / 255
        composed = figure[..., :3] * alpha + canvas.finish() * (1 - alpha)
        difference = np.abs(composed - drawing.render(identity, context, 96))
        assert difference.mean() < 0.1 and np.quantile(difference, 0.99) < 2, "but where outlines of both meet in a pixel"


def test_eyes_are_where_it_is_said():
    found = 0
    for seed in range(30):
        identity, context = draw(seed)
        if identity.glasses != "sunglasses" and context.expression in ("neutral", "surprised", "sad"):
            (left, top, right, bottom), points = drawing.face_of(identity, context, 256)
            pixels = drawing.render(identity, context, 256).astype(float)
            for x, y in points[:2]:
                assert left < x < right and top < y < bottom
                assert (pixels[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 6].mean(-1) < 70).any(), "a pupil"
                found += 1
    assert found > 10


def test_a_composed_picture_shows_the_people_asked_for():
    cast = crowds.Cast(6, 3)
    for people in range(4):
        for number in range(5):
            crowd = crowds.compose(cast, random.Random(f"{people}/{number}"), people)
            assert crowd.picture.shape == (crowds.SIZE, crowds.SIZE, 3) and len(crowd.boxes) <= people
            for box, points in zip(crowd.boxes, crowd.landmarks, strict=True):
                assert (points >= box[:2]).all() and (points <= box[2:]).all() and points[0, 0] < points[1, 0]
    assert np.array_equal(crowds.compose(cast, random.Random(1)).picture, crowds.compose(cast, random.Random(1)).picture)


def test_the_target_read_as_a_map_gives_the_faces_back():
    boxes = torch.tensor([[20.0, 30.0, 60.0, 66.0], [90.0, 80.0, 104.0, 92.0]])
    points = torch.stack([box[:2] + torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * (box[2:] - box[:2]) for box in boxes])
    target = target_of(boxes, points, torch.tensor([False, False]), 128)
    perfect = torch.cat([torch.logit(target[:1], eps=1e-4), target[1:15]])
    found = decode(perfect, 0.9, 10)
    order = found.boxes[:, 0].argsort()
    assert torch.allclose(found.boxes[order], boxes, atol=1e-3) and torch.allclose(found.landmarks[order], points, atol=1e-3)
    assert loss(perfect[None], target[None]).item() < 0.1 < 1 < loss(torch.zeros(1, 15, 32, 32), target[None]).item()


def test_a_face_too_far_outside_counts_neither_way():
    boxes, points = torch.tensor([[-20.0, 30.0, 12.0, 60.0]]), torch.zeros(1, 5, 2)
    target = target_of(boxes, points, torch.tensor([True]), 128)
    said = torch.full((1, 15, 32, 32), -9.0)
    without = loss(said, target[None])
    said[0, 0, 10, 1] = 9.0
    assert target[0].max() == 0 and torch.allclose(loss(said, target[None]), without)
    said[0, 0, 10, 20] = 9.0
    assert loss(said, target[None]) > without + 1


def test_a_place_is_judged_by_what_is_around_it_alone():
    """So that a picture may be of any size, and what pads it changes nothing far off."""
    torch.manual_seed(0)
    network, pixels = Detector().eval(), torch.rand(1, 3, 256, 384) * 2 - 1
    with torch.no_grad():
        whole, part = network(pixels), network(pixels[..., :256])
    assert torch.allclose(whole[..., :20], part[..., :20], atol=1e-4)
    assert sum(p.numel() for p in network.parameters()) < 400_000
