"""The wheel holds all that a user needs to start from any folder, and the files around it are true."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def files_below(folder):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("charforgex-*.whl")
    return path


def test_the_wheel_holds_code_conf_sweeps_and_the_embedded_models(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"charforgex/{name}" for name in files_below("conf") | files_below("sweeps")}
    wanted |= {name.removeprefix("src/") for name in files_below("src")}
    assert wanted <= names, sorted(wanted - names)
    assert any(name.startswith("charforgex/charworld/assets/") and name.endswith(".safetensors") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"charforgex", "hydra_plugins"}


@pytest.mark.parametrize("command", ["train", "generate"])
def test_the_wheel_alone_finds_its_settings_from_any_folder(wheel, tmp_path, command):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    program = "import sys, charforgex.cli; print(charforgex.cli.__file__, file=sys.stderr); charforgex.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, command, "no_such_setting=1"],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    where, answer = done.stderr.splitlines()
    assert where == str(tmp_path / "site" / "charforgex" / "cli.py")
    assert done.returncode == 2 and answer.startswith("ConfigError: no_such_setting is unknown")


def test_all_that_the_package_imports_is_a_dependency():
    """Third-party imports anywhere in the package are core dependencies or named in an extra."""
    from tests.test_imports import modules, roots

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(one for group in project["optional-dependencies"].values() for one in group)]
    spelled = {"hydra-core": "hydra", "pillow": "PIL", "huggingface_hub": "huggingface_hub", "opencv-python-headless": "cv2"}
    known = {spelled.get(name, name) for name in (one.split("[")[0].split(">")[0].split("<")[0].strip() for one in needed)}
    # What comes with a dependency that is useless without it: OmegaConf's yaml, transformers' tokenizers, the hub's HTTP client,
    # Jinja's markupsafe, Optuna's databases
    known |= {"yaml", "tokenizers", "httpx2", "markupsafe", "sqlalchemy"}
    used = {name for path in modules() for name in roots(path)} - set(sys.stdlib_module_names) - {"charforgex"}
    assert used <= known, f"not among the dependencies: {sorted(used - known)}"


def test_version_and_scripts_agree():
    from importlib import metadata

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.version("charforgex") == project["version"]
    assert {entry.value for entry in metadata.entry_points(name="charforgex", group="console_scripts")} == set(project["scripts"].values())


def test_ci_runs_the_readmes_commands():
    commands = [line.strip().split("  ")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    pip install")]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [command.replace(" && pytest", "") for command in commands] == ["pip install . && python train.py", 'pip install ".[test]"']
    assert commands[0] in script and any(line.startswith(commands[1]) for line in script)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_hooks_and_licence_are_whole():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000


def test_the_readmes_links_lead_somewhere():
    import re

    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), f"README.md points at {target}, which is not there"
