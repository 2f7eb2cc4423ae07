"""Composition: what is known, missing or wrong is told before anything heavy is imported, whatever is typed."""

import pytest
from omegaconf import OmegaConf

from charforgex.config import compose, conf_folder
from charforgex.errors import ConfigError
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
        (["hydra.run.dirr=x"], "hydra.run.dirr is unknown"),
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


# ---- bad configs in number: every key and group of a tree, spoilt in every way ----


NO_SETTINGS = ["=", "=3", "a b", "steps", "-x", "{a:1}", "[a]=1", "a=(", "a='b", "a=${", "a=${b", "@=1", "a=b=", "%", "\\"]


def spoilt(folder, name, whole):
    """Override lists, each with one fault, made from all the keys and groups that `<name>.yaml` composes to."""
    from charforgex.config import Search, dotted, group_choices

    cfg = OmegaConf.to_container(compose(name, whole, folder), resolve=False)
    keys = [key for key, value in dotted(cfg) if not isinstance(value, dict)]
    groups = [group for group, options in group_choices(Search(name, folder or conf_folder()).loader(), name).items() if options]
    for key in keys:
        yield [f"{key}x=1"]  # a letter too many
        yield [f"+{key[:-1]}=1"]  # one too few, forced in
        yield [f"{key}.deeper=1"]
        yield [f"{key}=[1"]
    for key in {key.rpartition(".")[0] for key in keys} - {""}:
        yield [f"++{key}.quite_unknown=1"]
        yield [f"{key}=5"] if key not in groups else [f"{key}=no_such_choice"]
        yield [f"~{key}"]
    for group in groups:
        yield [f"{group}=no_such_choice"]
        yield [f"{group}s=csv"]
        yield [f"{group}=5"]
    yield from (
        [text] for text in ["=", "=3", "a b", "steps", "-x", "{a:1}", "[a]=1", "a=(", "a='b", "a=${", "a=${b", "@=1", "a=b=", "%", "\\"]
    )


def assert_all_refused(folder, name, whole, at_least, check=lambda cfg: None):
    faults = list(spoilt(folder, name, whole))
    assert len(faults) >= at_least
    for fault in faults:
        with pytest.raises(ConfigError) as caught:
            check(compose(name, [*whole, *fault], folder))
            pytest.fail(f"{fault} was accepted")
        message = str(caught.value)
        key = fault[0].strip("+~").partition("=")[0]
        assert key in message and len(message) < 2000 and "Traceback" not in message, (fault, message)


def test_two_hundred_bad_configs_of_a_small_tree(folder):
    assert_all_refused(folder, "train", small_conf.WHOLE, at_least=60)
