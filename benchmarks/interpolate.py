"""How near frames between frames come to the truth: python benchmarks/interpolate.py [--quick] [--weights flownet.safetensors]

Three worlds are drawn at times 0, 1/4, 1/2, 3/4 and 1, so that what lies between is known: characters of charworld that move, turn and
grow; textured discs that cover and uncover a moving background (up to 24 pixels a frame); and ovals out of photographs over other
photographs (those that scikit-image carries), which move, turn and grow too (up to 32 pixels, of 256). One thread, CPU seconds for each
megapixel made. The last line is one JSON object: ratios are ours divided by theirs, smaller is better; `error` is the mean squared error.

error_vs_linear, error_vs_plain_dis, error_vs_minterpolate    `charforgex interpolate by=dis`  against  blending, against OpenCV's DIS flow
                     of one direction and one warp, and against FFmpeg's minterpolate (mi_mode=mci) in PyAV
time_vs_plain_dis, time_vs_minterpolate                       the same of their time
network_error_vs_dis, network_time_vs_dis                     --weights: `by=rife` with those  against  `by=dis`

values.cuts: of pairs of frames of different scenes of a world, the share that is seen as a cut; and of pairs of neighbouring frames, the
share that is taken for one by mistake. --quick: six scenes of each world, smaller.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are loaded

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

Scene = Callable[[float], np.ndarray]
TIMES = (0.25, 0.5, 0.75)
FIELDS = {"dx": 0.06, "dy": 0.04, "scale": 0.08, "tilt": 8.0, "yaw": 0.3}  # of a frame, at most


def characters(count: int, size: int) -> list[Scene]:
    from charforgex.charworld import world
    from charforgex.charworld.drawing import render

    draw, found = random.Random("characters"), []
    for _ in range(count):
        who, shown = world.draw_identity(draw), world.draw_context(draw)
        speed = {name: draw.uniform(-most, most) for name, most in FIELDS.items()}

        def scene(moment: float, who=who, shown=shown, speed=speed) -> np.ndarray:
            return render(who, replace(shown, **{name: getattr(shown, name) + step * moment for name, step in speed.items()}), size)

        found.append(scene)
    return found


def texture(draw: np.random.Generator, size: int) -> np.ndarray:
    parts = [cv2.resize(draw.random((n, n, 3), np.float32), (size, size), interpolation=cv2.INTER_CUBIC) / n for n in (6, 24, 80)]
    total = sum(parts)
    return (total - total.min()) / (total.max() - total.min()) * 255


def discs(count: int, size: int) -> list[Scene]:
    draw, found = np.random.default_rng(7), []
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    y, x = np.mgrid[:size, :size]
    for _ in range(count):
        behind, front = texture(draw, 2 * size), texture(draw, 2 * size)
        slow, fast, centre = draw.uniform(-4, 4, 2), draw.uniform(-24, 24, 2), draw.uniform(0.35, 0.65, 2) * size
        radius = draw.uniform(0.1, 0.25) * size

        def scene(moment: float, behind=behind, front=front, slow=slow, fast=fast, centre=centre, radius=radius) -> np.ndarray:
            layers = []
            for picture, speed in ((behind, slow), (front, fast)):
                shift = size / 2 - speed * moment
                layers.append(cv2.warpAffine(picture, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), (size, size), flags=flags))
            away = np.hypot(x - centre[0] - fast[0] * moment, y - centre[1] - fast[1] * moment)
            mask = np.clip(radius - away + 0.5, 0, 1)[..., None]
            return (layers[0] * (1 - mask) + layers[1] * mask).round().astype(np.uint8)

        found.append(scene)
    return found


def photographs(count: int, size: int) -> list[Scene]:
    from skimage import data

    from charforgex.charworld.moving import Layer, Layers

    draw, found = np.random.default_rng(5), []
    pictures = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]

    def moving(picture: np.ndarray, alpha: np.ndarray, larger: float, fastest: float, edge: int) -> Layer:
        towards, speed = draw.uniform(0, 2 * np.pi), draw.uniform(0, fastest)
        change = np.array([speed * np.cos(towards), speed * np.sin(towards), draw.uniform(-0.1, 0.1), draw.uniform(-0.06, 0.06)])
        start = np.array([size / 2, size / 2, 0, np.log(larger * size / min(picture.shape[:2]))])
        return Layer(np.dstack([picture * (alpha[..., None] > 0), alpha]), start - change / 2, change, edge)

    for number in range(count):
        behind, front = pictures[number % 4], pictures[(number + 1 + number // 4 % 3) % 4]
        whole, oval = (np.zeros(picture.shape[:2], np.uint8) for picture in (behind, front))
        cv2.ellipse(oval, (front.shape[1] // 2, front.shape[0] // 2), (front.shape[1] // 4, front.shape[0] // 3), 30, 0, 360, 255, -1)
        layers = (
            moving(behind, whole + 255, 1.1, size / 24, cv2.BORDER_REFLECT_101),
            moving(front, oval, 0.7, size / 8, cv2.BORDER_CONSTANT),
        )
        found.append(Layers(layers, size).frame)
    return found


# ---- methods: a scene and times to frames, and the CPU seconds that they took ----


def of_pairs(method) -> Callable[[Scene, tuple[float, ...]], tuple[list[np.ndarray], float]]:
    def run(scene: Scene, times: tuple[float, ...]) -> tuple[list[np.ndarray], float]:
        first, second = scene(0), scene(1)
        began = time.process_time()
        return method(first, second, times), time.process_time() - began

    return run


def plain_dis(first: np.ndarray, second: np.ndarray, times: tuple[float, ...]) -> list[np.ndarray]:
    """As tutorials do it: one flow, and both frames along it."""
    grey = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (first, second)]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in first.shape[1::-1])), -1)
    made = []
    for share in times:
        one = cv2.remap(first, grid - share * flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        two = cv2.remap(second, grid + (1 - share) * flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        made.append(cv2.addWeighted(one, 1 - share, two, share, 0))
    return made


def minterpolate(scene: Scene, times: tuple[float, ...]) -> tuple[list[np.ndarray], float]:
    """FFmpeg's, which wants frames before and after: it gets four more. Time is of all that it makes, for each frame made."""
    import av

    moments = range(-2, 4)
    frames = [scene(moment) for moment in moments]
    height, width = frames[0].shape[:2]
    began = time.process_time()
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv444p"), time_base=Fraction(1, 4))
    chosen = graph.add("minterpolate", "fps=4:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=none")
    sink = graph.add("buffersink")
    source.link_to(chosen)
    chosen.link_to(sink)
    graph.configure()
    found: dict[float, np.ndarray] = {}
    spent = 0

    def pull() -> None:
        nonlocal spent
        while True:
            try:
                frame = sink.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            spent += 1
            found[float(frame.pts * frame.time_base) + moments[0]] = frame.to_ndarray(format="rgb24")

    for place, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = 4 * place, Fraction(1, 4)
        source.push(frame)
        pull()
    source.push(None)
    pull()
    seconds = time.process_time() - began
    return [found[share] for share in times], seconds * len(times) / spent


def cuts(scenes: list[Scene]) -> dict[str, float]:
    """With the threshold that holds where none is said."""
    from charforgex.generation.between import small, strange
    from charforgex.generation.interpolate import SCENE as limit

    seen = [[small(scene(moment)) for moment in (0, 1)] for scene in scenes]
    different = [strange(one[1], two[0]) > limit for one, two in zip(seen, seen[1:] + seen[:1], strict=True)]
    same = [strange(*pair) > limit for pair in seen]
    return {"found": statistics.mean(different), "false": statistics.mean(same)}


def measured(methods: dict, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Of each method, over all scenes and times: mean squared error, PSNR and SSIM (means over frames), and seconds a megapixel."""
    from skimage.metrics import structural_similarity

    table: dict[str, dict[str, list[float]]] = {name: {"error": [], "psnr": [], "ssim": [], "seconds": []} for name in methods}
    for scene in scenes:
        truths = [scene(share) for share in TIMES]
        for name, method in methods.items():  # in turn, so that a slow moment of the machine is everybody's
            made, seconds = method(scene, TIMES)
            for frame, truth in zip(made, truths, strict=True):
                error = float(((frame.astype(np.float64) - truth) ** 2).mean())
                table[name]["error"].append(error)
                table[name]["psnr"].append(10 * np.log10(255**2 / max(error, 1e-9)))
                table[name]["ssim"].append(float(structural_similarity(frame, truth, channel_axis=2)))
            table[name]["seconds"].append(seconds / (len(TIMES) * truths[0].shape[0] * truths[0].shape[1] / 1e6))
    return {
        name: {key: float((statistics.median if key == "seconds" else statistics.mean)(values)) for key, values in found.items()}
        for name, found in table.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--weights", type=Path, help="flownet of RIFE 4.6 or 4.13 to 4.25, or what pretrain.stage=flow wrote, as .safetensors"
    )
    options = parser.parse_args()
    cv2.setNumThreads(1)
    from charforgex.generation.between import by_network, dis, linear
    from charforgex.runs import versions

    methods = {"dis": of_pairs(dis), "linear": of_pairs(linear), "plain_dis": of_pairs(plain_dis)}
    skipped = {}
    try:
        minterpolate(lambda moment: np.zeros((64, 64, 3), np.uint8), TIMES)
        methods["minterpolate"] = minterpolate
    except Exception as error:  # PyAV is not there, or its FFmpeg lacks the filter
        skipped["minterpolate"] = f"{type(error).__name__}: {error}"
    if options.weights:
        import torch

        from charforgex.generation.ifnet import load

        torch.set_num_threads(1)
        methods["network"] = of_pairs(by_network(load(options.weights), 1, None))
    else:
        skipped["network"] = "no --weights"
    count, size = (6, 128) if options.quick else (24, 256)
    worlds = {"characters": characters(count, size), "discs": discs(count, size), "photographs": photographs(count, size)}
    dis(worlds["discs"][0](0), worlds["discs"][0](1), TIMES)  # warm
    values = {world: measured(methods, scenes) for world, scenes in worlds.items()}
    ratios = {}
    for world, found in values.items():
        for name, told in found.items():
            said = f"PSNR {told['psnr']:6.2f}   SSIM {told['ssim']:.4f}   error {told['error']:8.2f}   {told['seconds']:6.3f} s/MP"
            print(f"{world:<11} {name:<13} {said}")
        for other in ("linear", "plain_dis", "minterpolate"):
            if other in found:
                ratios[f"error_vs_{other}.{world}"] = found["dis"]["error"] / found[other]["error"]
                if other != "linear":
                    ratios[f"time_vs_{other}.{world}"] = found["dis"]["seconds"] / found[other]["seconds"]
        if "network" in found:
            ratios |= {
                f"network_{of}_vs_dis.{world}": found["network"][key] / found["dis"][key]
                for of, key in (("error", "error"), ("time", "seconds"))
            }
    values["cuts"] = {world: cuts(scenes) for world, scenes in worlds.items()}
    for name, ratio in ratios.items():
        print(f"{name:<32} {ratio:8.4f}")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    told = {"benchmark": "interpolate", "ratios": ratios, "values": values, "machine": machine, "versions": versions(), "skipped": skipped}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
