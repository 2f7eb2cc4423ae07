"""Who may import whom, read from the imports; and what is light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "charforgex"
BASICS = {"types", "errors", "config", "binding", "overrides", "runs", "draws", "quiet", "pages", "videos", "filming", "gifs"}
INTERFACES = {"curation.manifest", "families.base"}  # what a package may know of another without depending on all of it
# package -> packages, or single modules, that it may import besides the basics and itself
ALLOWED = {
    "lora": set(),
    "families": {"lora"},
    "onnx_nets": set(),
    "embedders": {"charworld", "onnx_nets"},
    "curation": {"charworld", "embedders", "onnx_nets"},
    "charworld": set(),
    "data": {"curation.manifest", "families.base", "charworld"},
    "backends": {"curation.manifest", "lora"},
    "training": {"backends", "data", "families", "lora", "evaluation", "embedders", "generation", "curation", "charworld", "toolbox"},
    "generation": {"families", "lora"},
    "toolbox": {"families", "lora", "evaluation"},
    "merging": {"families", "lora", "toolbox"},
    "evaluation": {"generation", "families", "lora", "curation", "charworld", "embedders"},
    "sweeping": {"training", "evaluation"},
    "cloud": {"cli"},  # the command's functions it names as texts, too
}
HEAVY = ("torch", "lightning", "diffusers", "transformers", "peft")
LIGHT = ["charforgex", *(f"charforgex.{name}" for name in ("cli", "config", "binding", "overrides", "runs", "errors", "draws"))]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, without the `charforgex.`; `from charforgex.a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("charforgex.") for name in names if name.startswith("charforgex.")}
    return found


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if package == "cli":
        allowed = BASICS  # it names the run functions as texts and imports them when they are called
    elif package in BASICS or package == "__init__":
        allowed = BASICS | ({"cli"} if package == "__init__" else set())
    else:
        assert package in ALLOWED, f"{package} is new: say in this test, and in docs/architecture.md, what it may import"
        allowed = BASICS | {package} | ALLOWED[package]
        if path.name == "run.py":
            allowed |= {"cli"}  # `python -m charforgex.<package>.run` is a command, too
    wrong = {module for module in imported(path) if not any(within(module, one) for one in allowed)}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}; allowed are {', '.join(sorted(allowed))}"


def test_lightning_is_for_training_alone():
    users = {path.relative_to(PACKAGE).parts[0] for path in modules() if any("lightning" in name for name in roots(path))}
    assert users <= {"training", "data"}


def roots(path: Path) -> set[str]:
    """First parts of all that a file imports anywhere."""
    tree = ast.walk(ast.parse(path.read_text()))
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def entry_modules():
    runs = [f"charforgex.{path.parent.name}.run" for path in sorted(PACKAGE.glob("*/run.py"))]
    return [*LIGHT, *runs]


@pytest.mark.parametrize("module", entry_modules())
def test_entry_points_import_nothing_heavy(module):
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"{module} imports {done.stdout.strip()} at module level"
