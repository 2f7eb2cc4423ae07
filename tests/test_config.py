"""Composition: what is known, missing or wrong is told before anything heavy is imported, whatever is typed."""

import pytest
from omegaconf import OmegaConf

from charforgex.config import Search, compose, conf_folder, dotted, group_choices
from charforgex.errors import ConfigError
from charforgex.training.run import Settings, check
from tests import small_conf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_conf.write(tmp_path_factory.mktemp("small"))


def test_overrides_groups_and_presets_compose(folder):
    cfg = compose("train", ["experiment=flux", "data.folder=x", "lora.rank=5", "+tags.who=red", "data.buckets.step=32"], folder)
    assert OmegaConf.to_container(cfg, resolve=True) == {
        "run_dir": None,
        "seed": 0,
        "steps": 7,
        "data": {"folder": "x", "resolution": 512, "buckets": {"step": 32, "smallest": 512}},
        "tags": {"who": "red"},
        "family": {"name": "flux", "source": "base", "recipe": {"resolution": 512}},
        "lora": {"rank": 5, "alpha": 32.0, "dropout": 0.0},
        "logger": {"kind": "csv"},
    }


def test_all_missing_values_are_listed_with_what_fills_them(folder):
    with pytest.raises(ConfigError, match=r"no value yet; add to the command: data.folder=\.\.\. family.source=\.\.\.$"):
        compose("train", [], folder)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.foldr=x"], "data.foldr is unknown; did you mean data.folder?"),
        (["+lora.rnk=8"], "lora.rnk is unknown; did you mean lora.rank?"),
        (["++lora.rnk=8"], "lora.rnk is unknown; did you mean lora.rank?"),
        (["rank=8"], "rank is unknown; did you mean lora.rank?"),
        (["famly=flux"], "famly is unknown; did you mean family?"),
        (["family=fluxx"], "family=fluxx is not among the choices: flux, sdxl; did you mean flux?"),
        (["family="], "family= is not among the choices: flux, sdxl"),
        (["family=[flux,sdx]"], "family=sdx is not among the choices"),
        (["+family=flux"], r"family is chosen twice; write family=\.\.\. once, without \+"),
        (["~family"], r"family is needed and cannot be removed with ~family; choose a value: family=\.\.\."),
        (["lora=null"], "lora=null is not among the choices: large, standard"),
        (["lora=5"], "lora=5 is not among the choices: large, standard"),
        (["~steps"], "steps is needed and cannot be removed"),
        (["data=3", "family=flux"], "data is a group of settings and takes no value of its own; set one of data.folder, data.resolution"),
        (["data.buckets=null", "family=flux", "data.folder=x"], "data.buckets is a group of settings"),
        (["steps.a=3"], "steps.a is unknown"),
        (["a==b"], r"a==b cannot be read \(extraneous input '='\); settings are written name=value"),
        (["lora.rank=[8"], r"lora.rank=\[8 cannot be read"),
        (["steps"], "steps cannot be read"),
        (["steps=1,2"], r"steps=1,2 may mean three things: a list is steps=\[1,2\]"),
        (["steps=range(3)"], "requires --multirun"),
        (["data.folder=${nope}", "family=flux"], "data.folder cannot be resolved: Interpolation key 'nope' not found"),
        (["data.folder=${nope:1}", "family=flux"], "data.folder cannot be resolved: Unsupported interpolation type nope"),
        (["data.folder=${data.folder}", "family=flux"], "cannot be resolved"),
        (["experiment=wrong", "data.folder=x"], r"lora.rnk is unknown; did you mean lora.rank\?\nstpes is unknown; did you mean steps\?"),
        (["experiment=broken"], "a yaml file cannot be read: .*broken.yaml"),
        (["experiment=gone"], "fluxx"),
        (["hydra.run.dirr=x"], "hydra.run.dirr is unknown here"),
        (["hydra/launcher=slurmm"], "slurmm"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(folder, overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose("train", overrides, folder)


def test_all_wrong_overrides_are_told_at_once(folder):
    with pytest.raises(ConfigError) as caught:
        compose("train", ["data.foldr=x", "stps=3", "lora=huge", "steps=[1", "+lora.rnk=2"], folder)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["steps=[1", "lora=huge", "data.foldr", "stps", "lora.rnk"]


def test_an_unknown_entry_point_is_a_config_error(folder):
    with pytest.raises(ConfigError, match="Cannot find primary config 'trian'"):
        compose("trian", [], folder)


# ---- bad configs in number: every key and group of the real trees, spoilt in every way ----

NO_SETTINGS = ["=", "=3", "a b", "steps", "-x", "{a:1}", "[a]=1", "a=(", "a='b", "a=${", "a=${b", "@=1", "a=b=", "%", "\\"]
LETTERS = ["{}x=1", "+{}q=1", "{}.deeper=1", "{}=[1", "++{}zz=1", "{}:1", "~{}"]
WRONG_TYPES = {bool: ["maybe", "2"], int: ["many", "[1,1]"], float: ["much", "nan", "{a:1}"], str: ["[[1]]", "{a:1}"], list: ["3"]}
OUT_OF_RANGE = {
    "lora": "rank=0 rank=-4 rank=1.5 alpha=0",
    "optimizer": "lr=0 lr=-1e-4 lr=inf weight_decay=-0.1 warmup=-1 warmup=0.5 schedule=cosin name=adamx grad_clip=-1",
    "trainer": "steps=0 steps=-5 steps=1.5 accumulate=0 accelerator=tpu ema=1.0 ema=-0.1 checkpoint_every=0 keep=0 threads=-1",
    "evaluation": "every=0 seeds=0 times=0 times=2.5 prompts=[]",
    "sampling": "steps=0 guidance=-1 batch_size=0",
}


def keys_and_groups(name):
    """All settings with their values and all groups with their choices, of a real tree."""
    cfg = OmegaConf.to_container(compose(name), resolve=True)
    own = ".captions.turns."  # names of one's own, which may all be taken away
    keys = {key: value for key, value in dotted(cfg) if not isinstance(value, dict) and own not in key}
    return keys, {group: options for group, options in group_choices(Search(name, conf_folder()).loader(), name).items() if options}


def assert_refused(name, faults, check=lambda cfg: None):
    for fault in faults:
        with pytest.raises(ConfigError) as caught:
            check(compose(name, [fault]))
            pytest.fail(f"{fault} was accepted")
        message, key = str(caught.value), fault.strip("+~").partition("=")[0]
        assert key in message and len(message) < 2000 and "Traceback" not in message, (fault, message)


@pytest.mark.parametrize("name", ["train", "generate"])
def test_bad_names_and_syntax_are_refused(name):
    """Each setting's name, spoilt in one of seven ways; each group's name and choice; what is no setting at all."""
    keys, groups = keys_and_groups(name)
    faults = [LETTERS[index % len(LETTERS)].format(key) for index, key in enumerate(keys)]
    faults += [f"{group}=no_such_choice" for group in groups if group not in keys] + [f"{group}q={groups[group][0]}" for group in groups]
    assert_refused(name, faults + NO_SETTINGS)
    assert len(faults) > 30


def test_bad_types_and_values_are_refused():
    """Each setting that the training's schema knows, with each value of a wrong type, and values out of range."""
    keys, _ = keys_and_groups("train")
    known = [key for key in keys if key.partition(".")[0] in Settings.__annotations__]
    faults = [f"{key}={wrong}" for key in known for wrong in WRONG_TYPES.get(type(keys[key]), [])]
    faults.remove("trainer.gradient_checkpointing=2")  # true, false, or how many blocks
    faults += [f"{group}.{setting}" for group, settings in OUT_OF_RANGE.items() for setting in settings.split()]
    assert_refused("train", faults, check)
    assert len(faults) > 90


def test_a_group_that_is_placed_elsewhere_is_named_as_it_is_chosen():
    with pytest.raises(ConfigError, match=r"adapter is unknown here; it is chosen by adapter@lora=\.\.\."):
        compose("train", ["adapter=default"])


def test_generate_takes_a_lora_by_its_path():
    """`lora` is a setting of generate.py: no config group of that name may get in its way."""
    assert compose("generate", ["lora=runs/a-b/lora.safetensors", "prompt=x"]).lora == "runs/a-b/lora.safetensors"


def test_a_running_command_may_compose_another_s_config():
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert compose("train", ["seed=3"]).seed == 3
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()
