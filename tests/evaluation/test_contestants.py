"""Who is evaluated: files, stacks, runs, folders of runs and of pictures, and what each is called."""

import shutil
from pathlib import Path

import pytest

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.evaluation.contestants import find
from charforgex.evaluation.settings import Settings
from charforgex.lora.checkpoints import folder_name
from charforgex.lora.formats import read, read_header
from tests.evaluation.made_runs import FAMILY, write_run

DOUBLE = "lora.rslora=true"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs side by side; the second's files are LoKr."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "anna", DOUBLE)
    write_run(folder / "bea", "lora.kind=lokr", "lora.alpha=2", seed=1)
    return folder


def found(**settings):
    contestants, notes = find(Settings(**settings))
    return {one.name: one for one in contestants}, notes


def test_a_run_is_its_checkpoints(runs, tmp_path):
    """Each with its moving average, in the strength that the run's settings say; the best is the file that the run saved."""
    for name in ("anna", "bea"):
        run = runs / name
        contestants, notes = found(lora=str(run), cache_dir=tmp_path)
        assert list(contestants) == ["base", "step 2", "step 4, best"] and not notes
        best = contestants["step 4, best"]
        assert (best.kind, best.step, best.training.folder) == ("checkpoint", 4, run)
        config = FAMILY.tiny().denoiser.config
        own, saved = (read(path, FAMILY, config) for path in (best.loras[0], run / f"{name}.safetensors"))
        assert own.layers.keys() == saved.layers.keys() and len(own) > 10
        assert all(own.layers[path].equals(saved.layers[path]) for path in own.layers)
        other = read(contestants["step 2"].loras[0], FAMILY, config)
        assert not any(other.layers[path].equals(saved.layers[path]) for path in own.layers)
        headers = [read_header(path)[0] for path in (best.loras[0], run / f"{name}.safetensors")]
        assert len({(h["charforgex.base"], h["charforgex.trigger"], h["charforgex.adapter_sha256"]) for h in headers}) == 1
        before = best.loras[0].stat().st_mtime_ns
        assert found(lora=str(run), cache_dir=tmp_path)[0]["step 4, best"].loras[0].stat().st_mtime_ns == before


def test_names_are_short_and_nobody_shares_one(runs, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(runs / "anna" / "anna.safetensors", tmp_path / folder / "lora.safetensors")
    (tmp_path / "pictures" / "anna").mkdir(parents=True)
    files = [str(tmp_path / folder / "lora.safetensors") for folder in ("one", "two")]
    anna = str(runs / "anna" / "anna.safetensors")
    contestants, _ = found(lora=[*files, anna, [anna, files[0]]], pictures=str(tmp_path / "pictures" / "anna"), cache_dir=tmp_path)
    assert list(contestants) == ["base", "one lora", "two lora", "anna", "anna+lora", "anna-2"]
    assert contestants["anna"].training.folder == runs / "anna" and contestants["one lora"].training is None
    assert contestants["anna+lora"].loras == (Path(anna), Path(files[0]))
    assert len({one.slug for one in contestants.values()}) == 6

    contestants, _ = found(lora=anna, scales=[0.5, 1, 0.5], with_base=False, cache_dir=tmp_path)
    assert {name: one.scale for name, one in contestants.items()} == {"anna x0.5": 0.5, "anna x1": 1.0}
    both = [str(runs / "anna"), str(runs / "bea")]
    assert list(found(lora=both, cache_dir=tmp_path)[0]) == [
        "base", "anna step 2", "anna step 4, best", "bea step 2", "bea step 4, best",
    ]  # fmt: skip


def test_a_folder_of_runs_is_their_loras(runs, tmp_path):
    contestants, _ = found(lora=str(runs), cache_dir=tmp_path)
    assert {name: one.loras for name, one in contestants.items()} == {
        "base": (), "anna": (runs / "anna" / "anna.safetensors",), "bea": (runs / "bea" / "bea.safetensors",),
    }  # fmt: skip


def test_the_base_alone_and_pictures_alone(tmp_path):
    assert list(found(cache_dir=tmp_path)[0]) == ["base"]
    (tmp_path / "mine").mkdir()
    contestants, _ = found(pictures=[str(tmp_path / "mine")], cache_dir=tmp_path)
    assert [(one.name, one.kind) for one in contestants.values()] == [("mine", "folder")]


def test_damaged_checkpoints_are_left_out_and_told(runs, tmp_path):
    run = tmp_path / "anna"
    shutil.copytree(runs / "anna", run)
    tensors = run / "checkpoints" / folder_name(2) / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    contestants, notes = found(lora=str(run), cache_dir=tmp_path / "cache")
    assert list(contestants) == ["base", "step 4, best"]
    assert len(notes) == 1 and folder_name(2) in notes[0] and "damaged" in notes[0]
    for path in (run / "checkpoints").glob("*"):
        (path / "manifest.json").unlink()
    contestants, notes = found(lora=str(run), cache_dir=tmp_path / "cache")
    assert contestants["anna"].kind == "lora" and len(notes) == 2
    (run / "anna.safetensors").unlink()
    with pytest.raises(ConfigError, match="without a whole checkpoint and without a LoRA"):
        found(lora=str(run), cache_dir=tmp_path / "cache")


def test_checkpoints_of_pissa_are_no_adapters(runs, tmp_path):
    run = tmp_path / "anna"
    shutil.copytree(runs / "anna", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("init: zero", "init: pissa"))
    contestants, notes = found(lora=str(run), cache_dir=tmp_path / "cache")
    assert list(contestants) == ["base", "anna"] and "pissa" in notes[0]


def test_what_is_none(runs, tmp_path):
    with pytest.raises(LoraError, match=r"nowhere.safetensors is not there"):
        found(lora=str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"neither a run with a LoRA nor a folder of such runs\. It is a sweep's own folder"):
        found(lora=str(tmp_path / "sweep"))
    with pytest.raises(ConfigError, match="is not a folder"):
        found(pictures=str(tmp_path / "nowhere"))
    run = tmp_path / "anna"
    shutil.copytree(runs / "anna", run)
    with (run / "config.yaml").open("a") as file:
        file.write("pretrain: {stage: vae}\n")
    with pytest.raises(ConfigError, match="trains base models and has no LoRA"):
        found(lora=str(run), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scales": []}, "empty list"),
        ({"scales": [0.5]}, "no effect without a LoRA"),
        ({"lora": ["a", []]}, "names no LoRA"),
        ({"with_base": False}, "leaves nothing to evaluate"),
        ({"overwrite": True}, "no effect without out"),
        ({"objective": []}, "names no number"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**settings)


def test_the_yaml_and_the_signature_agree():
    shown = set(compose("evaluate", ["metric=[identity]", "family=sdxl"])) - {"metrics"}
    assert shown == set(Settings.__dataclass_fields__)
