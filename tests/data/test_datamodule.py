"""Batches from a folder: true values, nothing stale, nothing encoded twice, and the same whoever asks."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.curation.manifest import from_folder, read_picture
from charforgex.data.datamodule import CharacterData, to_pixels
from charforgex.errors import ConfigError, DataError
from charforgex.families.sdxl import Sdxl
from tests.data.conftest import BASE, GEOMETRY, WEIGHTS, Counting, draw, flat


def by_hash(data, sha):
    return next(record for record in (*data.train, *data.val) if record.sha256 == sha)


# ---- what a batch holds ----


def test_a_batch_holds_what_the_encoders_give(prepared, folder):
    data, _ = prepared(batch_size=2, caption_dropout=0)
    for step in range(6):
        batch = data.batch(step)
        for place, sha in enumerate(batch.keys):
            record = by_hash(data, sha)
            image = read_picture(folder / record.path)
            height, width = (int(side) for side in batch.crop.target_B2[place])
            # 96 x 96 -> 64 x 64 whole; 120 x 72 (w x h) -> 48 x 80 whole: both keep their ratio
            image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
            mean, std = Sdxl().encode_pixels(BASE, to_pixels(image))
            assert torch.equal(batch.mean_BChw[place], mean[0]) and torch.equal(batch.std_BChw[place], std[0])
            text = Sdxl().encode_text(BASE, [record.captions[0]])
            assert torch.equal(batch.text.tokens_BLD[place], text.tokens_BLD[0])
            assert torch.equal(batch.text.pooled_BD[place], text.pooled_BD[0])
            assert batch.crop.original_B2[place].tolist() == [record.height, record.width]
            assert batch.crop.top_left_B2[place].tolist() == [0, 0]
        assert batch.mask_B1hw is None and batch.crop.original_B2.dtype == torch.float32


def test_pixels_span_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    assert to_pixels(image).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_crops_and_flips_are_true(tmp_path, prepared):
    for number in range(3):
        draw(tmp_path / "tall" / f"{number}.png", number, (53, 80))
    data, _ = prepared(source=tmp_path / "tall", flip=True, default_caption="zkx", val_count=0, batch_size=4)
    seen = set()
    for step in range(8):
        batch = data.batch(step)
        for place, sha in enumerate(batch.keys):
            top, left = batch.crop.top_left_B2[place].tolist()
            image = read_picture(tmp_path / "tall" / by_hash(data, sha).path).crop((2, 0, 50, 80))
            if left == 3:  # mirrored: 53 - 2 - 48
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert top == 0 and left in (2, 3)
            assert torch.equal(batch.mean_BChw[place], Sdxl().encode_pixels(BASE, to_pixels(image))[0][0])
            seen.add(left)
    assert seen == {2, 3}


def test_masks_become_weights(folder, prepared):
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :48] = 255
    for number in range(14):
        if number != 3:
            Image.fromarray(mask if number < 9 else np.full((72, 120), 51, np.uint8)).save(folder / f"{number:02}.mask.png")
    data, _ = prepared(subject_weight=3.0, batch_size=2)
    names = set()
    for step in range(20):
        batch = data.batch(step)
        assert batch.mask_B1hw.shape == (2, 1, *batch.mean_BChw.shape[2:])
        for place, sha in enumerate(batch.keys):
            name, weights = by_hash(data, sha).path, batch.mask_B1hw[place, 0]
            names.add(name)
            if name == "03.png":
                assert (weights == 1).all()
            elif name < "09":
                assert (weights[:, :4] == 3).all() and (weights[:, 4:] == 1).all()
            else:
                assert weights.flatten().tolist() == pytest.approx([1.4] * weights.numel())  # 1 + 2 * 51 / 255
    assert "03.png" in names and any(name >= "09" for name in names)


def test_masks_without_a_weight_are_noted_and_a_weight_without_masks_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="no picture has a mask"):
        CharacterData(folder, tmp_path / "c", 64, subject_weight=2.0)
    Image.new("L", (96, 96)).save(folder / "00.mask.png")
    Image.new("L", (96, 96)).save(folder / "01.mask.png")
    assert any("no effect" in note for note in CharacterData(folder, tmp_path / "c", 64).notes)


def test_captions_are_varied_dropped_and_all_used(folder, prepared):
    for path in folder.glob("*.txt"):
        path.write_text("zkx, a, b, c\nzkx, a sentence")
    data, family = prepared(batch_size=4, caption_dropout=0.25, shuffle_tags=True, keep_tokens=1, caption_variants=3)
    prompts = data.final_prompts(400)
    assert len(prompts) == 400 and 60 < prompts.count("") < 140
    within = [set(prompts[start : start + 4]) for start in range(0, 400, 4)]
    assert sum("" in texts and len(texts) > 1 for texts in within) > 30  # drawn for each picture, not for each batch
    kept = set(prompts) - {""}
    assert kept == set(data.texts[data.train[0].sha256]) and len(kept) == 4  # 3 orders of one, 1 of the other
    assert all(prompt.startswith("zkx, ") for prompt in kept)
    assert sorted(family.texts) == sorted(kept | {""})  # equal captions are encoded once
    assert torch.equal(data.text("").tokens_BLD, Sdxl().encode_text(BASE, [""]).tokens_BLD)
    batch, drawn = data.batch(3), data._draw(3)
    for place, one in enumerate(drawn):
        assert torch.equal(batch.text.tokens_BLD[place], data.text(one.text).tokens_BLD[0])


def test_prompts_of_previews_are_encoded_too(prepared):
    data, family = prepared(prompts=["zkx on the moon"])
    assert "zkx on the moon" in family.texts
    assert torch.equal(data.text("zkx on the moon").pooled_BD, Sdxl().encode_text(BASE, ["zkx on the moon"]).pooled_BD)


# ---- the same whoever asks ----

SETTINGS = {"batch_size": 3, "shuffle_tags": True, "keep_tokens": 1, "flip": True, "caption_dropout": 0.2, "resolution": [64, 96]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_any_number_of_workers_and_any_first_step(prepared, workers):
    data, _ = prepared(**SETTINGS)
    wanted = [flat(data.batch(step)) for step in range(24)]
    assert len({str(batch) for batch in wanted}) > 20
    other, family = prepared(num_workers=workers, **SETTINGS)
    assert family.loaded == []
    assert [flat(batch) for batch in other.train_dataloader(range(24))] == wanted
    assert [flat(batch) for batch in other.train_dataloader(range(17, 24))] == wanted[17:]


def test_a_share_of_the_batches_is_those_of_one_process(prepared):
    data, _ = prepared(**SETTINGS)
    assert [flat(batch) for batch in data.train_dataloader([3, 5])] == [flat(data.batch(3)), flat(data.batch(5))]


def test_another_seed_is_another_order_and_renaming_is_not(folder, prepared):
    keys = [prepared(seed=seed)[0].batch(step).keys for seed in (1, 2) for step in range(12)]
    assert keys[:12] != keys[12:]
    for path in list(folder.iterdir()):
        path.rename(path.with_name("0" + str(99 - int(path.stem)) + path.suffix))
    data, family = prepared(seed=1)
    assert [data.batch(step).keys for step in range(12)] == keys[:12] and family.loaded == []


def test_every_picture_equally_often(prepared):
    data, _ = prepared(batch_size=2)
    counts = {}
    for step in range(12):  # 12 pictures to train on: after 12 batches of 2 each was there twice
        for key in data.batch(step).keys:
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == len(data.train) == 12 and set(counts.values()) == {2}
    assert data.epoch_batches() == 6


def test_repeats_weigh_a_subfolder(folder, prepared, tmp_path):
    draw(folder / "close" / "x.png", 50)
    (folder / "close" / "x.txt").write_text("zkx")
    data, _ = prepared(repeats={"close": 3}, val_count=0)
    keys = [data.batch(step).keys[0] for step in range(17)]
    x = next(record.sha256 for record in data.train if record.path == "close/x.png")
    assert keys.count(x) == 3 and len(set(keys)) == 15
    with pytest.raises(ConfigError, match=r"repeats\.clsoe.*there are: close"):
        CharacterData(folder, tmp_path / "c", 64, repeats={"clsoe": 2}, val_count=0)
    with pytest.raises(ConfigError, match="at least 1"):
        CharacterData(folder, tmp_path / "c", 64, repeats={"close": 0}, val_count=0)


# ---- nothing stale, nothing twice ----


def test_a_second_start_loads_no_encoder(prepared):
    first, family = prepared(**SETTINGS)
    assert family.loaded == ["vae", "text"]
    second, family = prepared(**SETTINGS)
    assert family.loaded == [] and family.pictures == 0 and family.texts == []
    assert [flat(second.batch(step)) for step in range(5)] == [flat(first.batch(step)) for step in range(5)]


def test_a_changed_picture_is_encoded_again_and_nothing_else(folder, prepared):
    prepared(val_count=0)
    draw(folder / "03.png", 333)
    data, family = prepared(val_count=0)
    assert family.loaded == ["vae"] and family.pictures == 1
    changed = next(record for record in data.train if record.path == "03.png")
    batch = next(batch for batch in map(data.batch, range(14)) if changed.sha256 in batch.keys)
    image = read_picture(folder / "03.png").resize((64, 64), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert torch.equal(batch.mean_BChw[0], Sdxl().encode_pixels(BASE, to_pixels(image))[0][0])


def test_a_changed_caption_is_encoded_again_and_nothing_else(folder, prepared):
    prepared()
    (folder / "03.txt").write_text("zkx, new words")
    _, family = prepared()
    assert family.loaded == ["text"] and family.texts == ["zkx, new words"]


def test_a_new_picture_is_all_that_is_encoded(folder, prepared):
    prepared()
    draw(folder / "new.png", 99)
    (folder / "new.txt").write_text("zkx, fresh")
    _, family = prepared()
    assert family.pictures == 1 and family.texts == ["zkx, fresh"]


@pytest.mark.parametrize(
    ("change", "loaded"),
    [
        ({"weights": WEIGHTS | {"vae": "other"}}, ["vae"]),
        ({"weights": WEIGHTS | {"text": "other"}}, ["text"]),
        ({"dtype": "bfloat16"}, ["vae", "text"]),
        ({"resolution": 96}, ["vae"]),
        ({"background": (0, 0, 0)}, ["vae"]),
        ({"seed": 4, "batch_size": 5}, []),
    ],
)
def test_what_makes_entries_anew(prepared, change, loaded):
    prepared()
    _, family = prepared(**change)
    assert family.loaded == loaded


def test_damaged_and_lost_entries_are_made_again_bit_for_bit(prepared, tmp_path):
    data, _ = prepared(**SETTINGS)
    wanted = [flat(data.batch(step)) for step in range(10)]
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    for number, path in enumerate(files):
        if number % 3 == 0:
            path.unlink()
        elif number % 3 == 1:
            path.write_bytes(path.read_bytes()[:-9])
    data, family = prepared(**SETTINGS)
    assert 0 < family.pictures + len(family.texts) < len(files)
    assert [flat(data.batch(step)) for step in range(10)] == wanted


def test_a_picture_that_changes_under_way_is_not_filed_under_its_old_hash(folder, prepared, tmp_path):
    data = CharacterData(folder, tmp_path / "cache", 64, trigger="zkx")
    draw(folder / f"{data.train[0].path}", 1234)
    with pytest.raises(DataError, match=r"was changed after it was read"):
        data.prepare(Counting(), Counting().load_parts, weights=WEIGHTS, progress=False, **GEOMETRY)


def test_a_manifest_that_lies_about_a_size(folder, prepared, tmp_path):
    from_folder(folder).write(folder / "m.jsonl")
    items = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    items[0]["width"] = 100
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, items)))
    with pytest.raises(DataError, match="96 x 96 pixels, but the manifest says 100 x 96"):
        prepared(source=folder / "m.jsonl")


def test_a_manifest_and_its_folder_give_the_same_batches(folder, prepared):
    from_folder(folder).write(folder / "m.jsonl")
    data, _ = prepared(**SETTINGS)
    other, family = prepared(source=folder / "m.jsonl", **SETTINGS)
    assert family.loaded == [] and other.dataset_hash == data.dataset_hash
    assert [flat(other.batch(step)) for step in range(5)] == [flat(data.batch(step)) for step in range(5)]


# ---- held-out pictures and reports ----


def test_validation_is_fixed_and_apart_from_training(folder, prepared):
    data, _ = prepared(batch_size=2, val_count=4, caption_dropout=0.9, flip=True, resolution=[64, 96])
    other, _ = prepared(batch_size=2, val_count=4, seed=99, resolution=[64, 96])
    batches = data.validation()
    assert [flat(batch) for batch in batches] == [flat(batch) for batch in other.validation()]
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(record.sha256 for record in data.val) and len(keys) == 4
    assert not set(keys) & {key for step in range(40) for key in data.batch(step).keys}
    for batch in batches:
        for place, key in enumerate(batch.keys):
            text = Sdxl().encode_text(BASE, [by_hash(data, key).captions[0]])
            assert torch.equal(batch.text.tokens_BLD[place], text.tokens_BLD[0])
            assert batch.crop.target_B2[place].prod() > 64 * 64  # at the largest resolution alone
    assert [path.name for path in data.paths("val")] == sorted(record.path for record in data.val)
    assert [image.size for image in data.references()] == [read_picture(path).size for path in data.paths("val")]
    assert len(data.paths("train")) == 10


def test_no_held_out_pictures(prepared):
    data, _ = prepared(val_count=0)
    assert data.validation() == [] and data.references() == []


def test_tags_and_hash(folder, prepared):
    data, _ = prepared(val_count=0)
    assert list(data.tag_frequency().items())[:3] == [("at the sea", 14), ("red hat", 14), ("zkx", 14)]
    before = data.dataset_hash
    (folder / "00.txt").write_text("zkx")
    assert prepared(val_count=0)[0].dataset_hash != before


# ---- preflight ----


def test_preflight(folder, tmp_path):
    def make(**settings):
        return CharacterData(folder, tmp_path / "c", **({"resolution": 64} | settings))

    with pytest.raises(DataError, match='"abc" is absent from 14 captions'):
        make(trigger="abc")
    assert all(text.startswith("abc, zkx") for texts in make(trigger="abc", add_trigger=True).texts.values() for text in texts)
    (folder / "05.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 14 pictures have no caption: 05\.png"):
        make()
    (folder / "05.png").write_bytes(b"broken")
    assert [problem.path for problem in make().problems] == ["05.png"]
    with pytest.raises(ConfigError, match=r"keep_tokens has no effect without data\.shuffle_tags"):
        make(keep_tokens=1)
    with pytest.raises(ConfigError, match="caption_variants has no effect"):
        make(caption_variants=2)
    with pytest.raises(ConfigError, match="tag_separator"):
        make(tag_separator=" ")
    with pytest.raises(ConfigError, match="names no resolution"):
        make(resolution=[])
    with pytest.raises(ConfigError, match="background"):
        make(background=(0, 0, 256))
    assert not (tmp_path / "c").exists()


def test_too_few(tmp_path):
    draw(tmp_path / "in" / "a.png", 0)
    with pytest.raises(DataError, match="1 usable picture to train on; at least 2"):
        CharacterData(tmp_path / "in", tmp_path / "c", 64)
    draw(tmp_path / "in" / "b.png", 1)
    assert CharacterData(tmp_path / "in", tmp_path / "c", 64, default_caption="x").notes == [
        "only 2 pictures to train on; 20 to 30 are good"]  # fmt: skip


def test_too_small_or_off_the_grid(prepared):
    with pytest.raises(DataError, match=r"too small for data\.resolution=\[256\].*upscale=true"):
        prepared(resolution=256)
    data, _ = prepared(resolution=256, upscale=True)
    assert data.batch(0).mean_BChw.shape[-1] >= 24
    with pytest.raises(ConfigError, match="72 is not a multiple of 16"):
        prepared(resolution=72)


def test_a_full_disk_stops_before_it_is_full(prepared, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"data cache needs .* 0 MiB are free"):
        prepared()
