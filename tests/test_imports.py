"""Imports point one way: cli -> train -> export, pipeline -> models, rollout, data -> miniature, dmd -> flow, config."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dmdtrain"
# A part imports from layers below its own, and from itself.
LAYERS = [
    {"flow", "files", "packing", "prompt_library", "strict_yaml"},
    {"config"},
    {"dmd", "miniature", "reference"},
    {"models", "rollout", "data"},
    {"export", "pipeline", "simpletuner"},
    {"train"},
    {"cli"},
    {"__main__"},
]
LAYER = {part: height for height, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE) != Path("__init__.py"))
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes"}


def imported(source: str, module: str) -> set[str]:
    """Full names of everything that a module's source imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (parent, node.module) if part)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def parts(names: set[str]) -> set[str]:
    """The parts of dmdtrain among imported names: `dmdtrain.train.step.Draws` -> `train`."""
    return {[*name.split("."), ""][1] for name in names if name.split(".")[0] == "dmdtrain"}


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def imports_of(file: Path) -> tuple[str, set[str]]:
    """The part that a file belongs to, and what it imports."""
    path = file.relative_to(SOURCE).with_suffix("")
    return path.parts[0], imported(file.read_text(), ".".join(("dmdtrain", *path.parts)))


def against_the_arrows(part: str, names: set[str]) -> set[str]:
    return {other for other in parts(names) - {part} if LAYER.get(other, len(LAYERS)) >= LAYER[part]}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_follow_the_arrows(file):
    part, names = imports_of(file)
    assert part in LAYER, f"{part} is new: give it a layer here"
    assert not against_the_arrows(part, names), f"{part} reaches up"


@pytest.mark.parametrize(
    "part", ["models", "data", "miniature", "flow", "dmd", "rollout", "export", "pipeline", "config"]
)
def test_nothing_below_training_knows_of_it(part):
    files = [f for f in FILES if f.relative_to(SOURCE).with_suffix("").parts[0] == part]
    assert files
    for file in files:
        assert not parts(imports_of(file)[1]) & {"train", "cli", "__main__"}, file


@pytest.mark.parametrize(
    ("name", "ours"), [("flow", set()), ("dmd", {"flow"}), ("rollout", {"flow", "dmd"}), ("config", {"strict_yaml"})]
)
def test_what_pure_modules_import(name, ours):
    _, names = imports_of(SOURCE / f"{name}.py")
    assert parts(names) <= ours
    third_party = roots(names) - set(sys.stdlib_module_names) - {"dmdtrain"}
    assert third_party == ({"yaml", "pydantic"} if name == "config" else {"torch"})


def test_only_the_step_joins_maths_and_models():
    joining = set()
    for file in FILES:
        names = imports_of(file)[1]
        if any(n.startswith("dmdtrain.dmd") and n != "dmdtrain.dmd.guide" for n in names) and "models" in parts(names):
            joining.add(file.relative_to(SOURCE).as_posix())
    assert joining == {"train/step.py"}


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("rollout", "import dmdtrain.train.step", {"train"}),
        ("models", "from dmdtrain.train import ema", {"train"}),
        ("models", "def f():\n    from dmdtrain import cli", {"cli"}),
        ("models", "from ..train.step import Draws", {"train"}),
        ("models", "from .. import train", {"train"}),
        ("models", "from dmdtrain import rollout", {"rollout"}),
        ("flow", "from dmdtrain import dmd", {"dmd"}),
        (
            "export",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmdtrain.train.setup import Run",
            {"train"},
        ),
        ("flow", "from dmdtrain import something_new", {"something_new"}),
        ("models", "from dmdtrain.models.wan import WanFolder\nfrom .wan import find_folder\nimport torch", set()),
        ("train", "from dmdtrain import dmd\nfrom dmdtrain.models.roles import Roles", set()),
    ],
)
def test_the_check_sees_every_way_to_import(part, source, found):
    assert against_the_arrows(part, imported(source, f"dmdtrain.{part}.module")) == found


@pytest.mark.parametrize(
    "code",
    [
        "import dmdtrain.config, dmdtrain.cli",
        "from typer.testing import CliRunner; from dmdtrain.cli import app\n"
        "for command in ([], ['fit']):\n"
        "    result = CliRunner().invoke(app, [*command, '--help'])\n"
        "    assert result.exit_code == 0 and 'fit' in result.output, result.output",
    ],
    ids=["import", "help"],
)
def test_the_command_line_answers_without_torch(code):
    check = f"{code}\nimport sys\nheavy = sorted({HEAVY!r} & set(sys.modules))\nassert not heavy, heavy"
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
