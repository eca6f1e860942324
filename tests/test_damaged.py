"""Checkpoints that are damaged or hostile: every command that reads one says so in one line and writes nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, run_cli
from safetensors.torch import load_file, save_file

from dmdtrain.config import ConfigError
from dmdtrain.train.checkpoint import load_optimizer, split_state, write_checkpoint
from dmdtrain.train.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = "step-000002"
FILES = (
    *(
        "config.yaml",
        "sampling.json",
        "state.json",
        "optimizer_student.json",
        "optimizer_fake_score.json",
        "manifest.json",
    ),
    *("student.safetensors", "fake_score.safetensors", "ema.safetensors", "random.safetensors"),
    *("optimizer_student.safetensors", "optimizer_fake_score.safetensors"),
)
READERS = ("validate", "generate", "export-lora", "export-pipeline")
ALL = ("fit", "auto", *READERS)


@pytest.fixture(scope="module")
def trained(wan_folder, tmp_path_factory) -> Path:
    """A run of two steps, with room for a third."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("a red cat\na dog\na cat on grass\n")
    settings = {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 2, "alpha": 4},
        "fake_score": {"rank": 2, "alpha": 2},
        "rollout": {"num_training_frames": 2},
        "data": {"prompts": str(folder / "prompts.txt"), "resolution": "32x32", "max_sequence_length": 8},
        "train": {"max_steps": 2, "mixed_precision": "no", "gradient_checkpointing": False},
        "validation": {"every": 0, "prompts": ["a cat"], "num_frames": 1, "resolution": "32x32"},
        "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done("fit", folder / "run.yaml")
    return folder


@pytest.fixture
def damage(trained, tmp_path) -> Callable[[Callable[[Path], object]], Path]:
    """A copy of the run after an edit of its checkpoint; returns the checkpoint."""

    def make(edit: Callable[[Path], object]) -> Path:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(trained / "run", run)
        edit(run / "checkpoints" / STEP)
        return run / "checkpoints" / STEP

    return make


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def invoke(command: str, ckpt: Path, trained: Path, out: Path):
    fit = ("fit", trained / "run.yaml", "--output-dir", ckpt.parents[1], "--max-steps", 3)
    args = {
        "fit": (*fit, "--resume", ckpt),
        "auto": fit,
        "validate": ("validate", "--ckpt", ckpt, "--out", out),
        "generate": ("generate", "--ckpt", ckpt, "a cat", "--out", out / "a.mp4"),
        "export-lora": ("export-lora", "--ckpt", ckpt, "--out", out / "a.safetensors"),
        "export-pipeline": ("export-pipeline", "--ckpt", ckpt, "--out", out / "pipeline"),
    }
    return run_cli(*args[command])


def all_refuse(ckpt: Path, trained: Path, tmp_path: Path, commands=ALL, says: str = "") -> None:
    """Exit code 2, one line that names the folder, and not a file changed."""
    before = listing(tmp_path)
    for command in commands:
        result = invoke(command, ckpt, trained, tmp_path / "out")
        assert result.exit_code == 2, (command, result.exit_code, result.output, result.exception)
        (line,) = result.stderr.splitlines()
        assert line.startswith("dmdtrain: ") and len(line) < 700 and STEP in line, (command, line)
        assert says in line and "Traceback" not in result.output, (command, line)
        assert listing(tmp_path) == before, command


def signed(ckpt: Path) -> None:
    """The manifest vouches for what is there now."""
    manifest = json.loads((ckpt / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((ckpt / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    manifest["bytes"] = {name: (ckpt / name).stat().st_size for name in manifest["sha256"]}
    (ckpt / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------------------------------------------- by accident


def truncate(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def zeros(file: Path, chance: random.Random) -> None:
    """A block that never reached the disk."""
    content, start = bytearray(file.read_bytes()), chance.randrange(file.stat().st_size)
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content if content != file.read_bytes() else content + b"\0")


def swap(file: Path, chance: random.Random) -> None:
    other = file.with_name(chance.choice([name for name in FILES if name != file.name]))
    file.write_bytes(other.read_bytes())


def grow(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randrange(1, 99)))


def folder_instead(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


ACCIDENTS = {
    "truncate": truncate,
    "flip": flip,
    "zeros": zeros,
    "swap": swap,
    "folder": folder_instead,
    "grow": grow,
    "delete": lambda file, _: file.unlink(),
    "noise": lambda file, c: file.write_bytes(c.randbytes(300)),
}


@pytest.mark.parametrize("name", FILES)
def test_accidents(name, damage, trained, tmp_path):
    for number, (kind, edit) in enumerate(ACCIDENTS.items()):
        if name == "manifest.json" and kind in ("flip", "grow", "swap", "zeros"):
            continue  # below
        chance = random.Random(f"{name} {kind}")
        ckpt = damage(lambda ckpt, edit=edit, chance=chance: edit(ckpt / name, chance))
        some = (ALL[number % 6], ALL[(number + 3) % 6])
        all_refuse(ckpt, trained, tmp_path, some, says=name)


@pytest.mark.parametrize("seed", range(30))
def test_a_manifest_with_a_flipped_bit(seed, damage, trained, tmp_path):
    """What flips in a name, a checksum or the syntax is found; in a size or in white space it does no harm."""
    ckpt = damage(lambda ckpt: flip(ckpt / "manifest.json", random.Random(seed)))
    before = listing(tmp_path)
    result = invoke("export-lora", ckpt, trained, tmp_path / "out")
    assert result.exit_code in (0, 2) and not (result.exception and not isinstance(result.exception, SystemExit))
    if result.exit_code == 2:
        assert len(result.stderr.splitlines()) == 1 and listing(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- manifests


def edited(**changes: object) -> Callable[[dict], dict]:
    return lambda manifest: manifest | changes


def named(name: str) -> Callable[[dict], dict]:
    """A file of that name with the checksum that it has."""

    def edit(manifest: dict) -> dict:
        digest = (
            hashlib.sha256(Path("/etc/hostname").read_bytes()).hexdigest() if Path("/etc/hostname").exists() else "0"
        )
        return manifest | {"sha256": manifest["sha256"] | {name: digest}}

    return edit


MANIFESTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer": (edited(format=2), "format 2 is newer than this dmdtrain reads; valid is 1"),
    "much newer": (edited(format=10**30), "is newer than this dmdtrain reads; valid is 1"),
    "a word": (edited(format="one"), "manifest.json is broken"),
    "a list": (edited(format=[1]), "manifest.json is broken"),
    "null": (edited(format=None), "manifest.json is broken"),
    "true": (edited(format=True), "manifest.json is broken"),
    "zero": (edited(format=0), "manifest.json is broken"),
    "no format": (lambda m: {k: v for k, v in m.items() if k != "format"}, "manifest.json is broken"),
    "sizes of a list": (edited(bytes=[1]), "manifest.json is broken"),
    "no sums": (lambda m: {k: v for k, v in m.items() if k != "sha256"}, "manifest.json is broken"),
    "sums of a list": (edited(sha256=["student.safetensors"]), "manifest.json is broken"),
    "sums of nothing": (edited(sha256={}), "manifest.json is broken"),
    "sums that are numbers": (edited(sha256={"student.safetensors": 5}), "manifest.json is broken"),
    "sums that are null": (edited(sha256={"student.safetensors": None}), "manifest.json is broken"),
    "sums that are wrong": (edited(sha256={"student.safetensors": "0" * 64}), "student.safetensors is damaged"),
    "only its own": (named("manifest.json"), "which is no file of a checkpoint"),
    **{
        f"path {name!r}": (named(name), "which is no file of a checkpoint")
        for name in (
            "../../x",
            "/etc/hostname",
            "a/../../b",
            "",
            ".",
            "..",
            "x\0y",
            "a b/c",
            "~/x",
            "..\\x",
            "-x",
            ".lock",
            "\n",
        )
    },
    "a list itself": (lambda m: [m], "manifest.json is broken"),
    "a number": (lambda m: 5, "manifest.json is broken"),
    "null itself": (lambda m: None, "manifest.json is broken"),
    "a word itself": (lambda m: "manifest", "manifest.json is broken"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_none(case, damage, trained, tmp_path):
    change, says = MANIFESTS[case]

    def edit(ckpt: Path) -> None:
        file = ckpt / "manifest.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    all_refuse(damage(edit), trained, tmp_path, says=says)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04N.", b"[" * 100_000, b'{"format": 1', b"\xff\xfe{}", b"NaN"])
def test_manifests_that_are_no_json(content, damage, trained, tmp_path):
    ckpt = damage(lambda ckpt: (ckpt / "manifest.json").write_bytes(content))
    all_refuse(ckpt, trained, tmp_path, ("auto", "generate", "export-lora"), says="manifest.json is broken")


# ---------------------------------------------------------------------------------------------------- with right checksums


def on_tensors(*stems: str) -> Callable[[Callable[[dict], dict]], Callable[[Path], None]]:
    def wrap(change: Callable[[dict], dict]) -> Callable[[Path], None]:
        def edit(ckpt: Path) -> None:
            for stem in stems:
                file = ckpt / f"{stem}.safetensors"
                save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
            signed(ckpt)

        return edit

    return wrap


def first(tensors: dict) -> str:
    return sorted(tensors)[0]


def with_value(value: float) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        tensors[sorted(tensors)[-1]].view(-1)[-1] = value
        return tensors

    return change


WEIGHTS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "wrong rank": (lambda t: {k: torch.cat([v, v], 0 if "lora_A" in k else 1) for k, v in t.items()}, ""),
    "one more dimension": (lambda t: t | {first(t): t[first(t)][None]}, first.__name__ and ""),
    "one row that would be broadcast": (lambda t: t | {first(t): t[first(t)][:1]}, ""),
    "a scalar": (lambda t: t | {first(t): torch.tensor(1.0)}, ""),
    "empty": (lambda t: t | {first(t): torch.zeros(0)}, ""),
    "whole numbers": (lambda t: {k: v.long() for k, v in t.items()}, ""),
    "truth": (lambda t: {k: v > 0 for k, v in t.items()}, ""),
    "nan": (with_value(math.nan), "not finite"),
    "infinity": (with_value(-math.inf), "not finite"),
    "one is missing": (lambda t: {k: v for k, v in t.items() if k != first(t)}, ""),
    "one is too many": (lambda t: t | {"blocks.9.attn1.to_q.lora_A.weight": torch.zeros(2, 24)}, ""),
    "another model": (lambda t: {f"other.{k}": v for k, v in t.items()}, ""),
    "other names": (lambda t: {k.replace("lora_", "lokr_"): v for k, v in t.items()}, ""),
    "nothing": (lambda t: {}, ""),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_this_students(case, damage, trained, tmp_path):
    change, says = WEIGHTS[case]
    ckpt = damage(on_tensors("student", "ema")(change))
    # The names and sizes of a model are known where one is loaded.
    blind = case in ("another model", "one is too many", "one is missing")
    commands = [c for c in ALL if not (blind and c == "export-lora")]
    if case == "one is too many":
        commands.append("export-lora")  # an A without its B
    all_refuse(ckpt, trained, tmp_path, commands, says=says)
    all_refuse(damage(on_tensors("fake_score")(change)), trained, tmp_path, ["auto"], says="fake_score.safetensors")


def as_pickle(file: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (Path.touch, (file.with_name("harm"),))

    file.write_bytes(pickle.dumps(Harm()))


def as_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def header(**tensors: dict) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        text = json.dumps(tensors).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))

    return write


CONTENTS: dict[str, Callable[[Path], object]] = {
    "pickle": as_pickle,
    "zip": as_zip,
    "empty": lambda f: f.write_bytes(b""),
    "text": lambda f: f.write_text("hello"),
    "a huge header": lambda f: f.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
    "no header": lambda f: f.write_bytes(bytes(8)),
    "beyond the end": header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
    "before the start": header(a={"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}),
    "overlapping": header(
        a={"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        b={"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
    ),
    "an odd type": header(a={"dtype": "OBJECT", "shape": [8], "data_offsets": [0, 64]}),
    "a size that does not match": header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 64]}),
    "a shape of words": header(a={"dtype": "F32", "shape": ["four"], "data_offsets": [0, 64]}),
}


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("stem", ["student", "random", "optimizer_student"])
def test_files_that_are_no_safetensors(case, stem, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        for name in {stem, "ema"} if stem == "student" else {stem}:
            CONTENTS[case](ckpt / f"{name}.safetensors")
        signed(ckpt)

    commands = ("fit", "generate", "export-lora") if stem == "student" else ("auto",)
    all_refuse(damage(edit), trained, tmp_path, commands, says=".safetensors does not hold what it should")


def test_files_that_the_manifest_does_not_vouch_for_are_not_read(damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        file = ckpt / "manifest.json"
        manifest = json.loads(file.read_text())
        for name in ("student.safetensors", "ema.safetensors"):
            manifest["sha256"].pop(name)
        file.write_text(json.dumps(manifest))

    all_refuse(damage(edit), trained, tmp_path, says="student.safetensors is not in its manifest.json")


STATES: dict[str, object] = {
    **{f"step {value!r}": {"step": value} for value in ("2", -1, 2.0, None, [2], True, 10**30, 3)},
    **{
        f"bad_in_a_row {v!r}": {"bad_in_a_row": v}
        for v in (0, "0", None, {}, {"student": 0}, {"student": -1, "fake_score": 0})
    },
    **{f"stage {value!r}": {"stage": value} for value in ("sft", "warmup", 3, None, ["dmd"])},
    **{f"alarms {value!r}": {"alarms": value} for value in (3, [], {}, {"running": [], "counts": {}, "active": []})},
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_are_none(case, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        state = json.loads((ckpt / "state.json").read_text()) | STATES[case]  # type: ignore[operator]
        (ckpt / "state.json").write_text(json.dumps(state))
        signed(ckpt)

    all_refuse(damage(edit), trained, tmp_path, ["auto"])


@pytest.mark.parametrize("name", ["state.json", "sampling.json", "optimizer_student.json", "config.yaml"])
@pytest.mark.parametrize(
    "text", ["", "[]", "5", '"x"', "null", "{", "[" * 5000, '{"tensor": {}}', "\x00", "? ? ?", "a: *b"]
)
def test_texts_that_are_something_else(name, text, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        (ckpt / name).write_text(text)
        signed(ckpt)

    commands = {"sampling.json": ["export-lora"], "config.yaml": [*ALL]}.get(name, ["auto"])
    if name == "config.yaml" and text in ("", "null"):  # a configuration of defaults, which is another run's
        commands = ["fit", "auto"]
    all_refuse(damage(edit), trained, tmp_path, commands)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rank: 2", "rank: 3"),
        ("rank: 2", "rank: two"),
        ("kind: lora", "kind: dora"),
        ("seed: 0", "sead: 0"),
        ("lr: ", "lr: -"),
    ],
)
def test_a_configuration_that_was_changed(old, new, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        file = ckpt / "config.yaml"
        file.write_text(file.read_text().replace(old, new))
        signed(ckpt)

    all_refuse(damage(edit), trained, tmp_path)


@pytest.mark.parametrize("value", [None, [], "1000", [1000, "x"], [5000], [500, 700], {}, [True], [math.nan], [3] * 9])
def test_timesteps_that_are_none(value, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        sampling = json.loads((ckpt / "sampling.json").read_text()) | {"timesteps": value}
        (ckpt / "sampling.json").write_text(json.dumps(sampling))
        signed(ckpt)

    all_refuse(damage(edit), trained, tmp_path, ["export-lora"], says="sampling.json does not hold what it should")


RANDOM: dict[str, Callable[[dict], dict]] = {
    "no generator": lambda t: {k: v for k, v in t.items() if k != "draws"},
    "a short generator": lambda t: t | {"draws": t["draws"][:100]},
    "a generator of floats": lambda t: t | {"draws": t["draws"].float()},
    "a random generator": lambda t: t | {"draws": torch.full_like(t["draws"], 255)},
    "no order": lambda t: {k: v for k, v in t.items() if k != "prompts.order"},
    "an order beyond the prompts": lambda t: t | {"prompts.order": torch.tensor([0, 7])},
    "an order before the prompts": lambda t: t | {"prompts.order": torch.tensor([-1])},
    "an order of floats": lambda t: t | {"prompts.order": torch.tensor([0.5])},
    "an order of rows": lambda t: t | {"prompts.order": torch.zeros(1, 1, dtype=torch.int64)},
    "another count": lambda t: t | {"prompts.count": torch.tensor(4)},
    "several counts": lambda t: t | {"prompts.count": torch.tensor([3, 3])},
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_states_that_are_none(case, damage, trained, tmp_path):
    ckpt = damage(on_tensors("random")(RANDOM[case]))
    before = listing(tmp_path)
    result = invoke("auto", ckpt, trained, tmp_path / "out")
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1 and listing(tmp_path) == before


def mutated(tree: object, chance: random.Random) -> object:
    """One node of a JSON tree becomes something else."""
    nodes: list[tuple[dict | list, object]] = []

    def walk(node: object) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            walk(node[key])  # type: ignore[index]

    walk(tree)
    parent, key = chance.choice(nodes)
    if chance.random() < 0.2:
        del parent[key]  # type: ignore[arg-type]
    else:
        values = [
            None,
            -1,
            10**30,
            1.5,
            "x",
            [],
            {},
            True,
            [[]],
            {"tensor": "none"},
            {"value": [3]},
            {"dict": []},
            math.nan,
        ]
        parent[key] = chance.choice(values)  # type: ignore[index]
    return tree


@pytest.mark.parametrize("seed", range(40))
def test_optimizer_states_that_were_mutated(seed, damage, trained, tmp_path):
    """What is found is one line, before anything is written; what passes is a number, and the next step runs."""

    def edit(ckpt: Path) -> None:
        file = ckpt / "optimizer_student.json"
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), random.Random(seed))))
        signed(ckpt)

    ckpt = damage(edit)
    before = listing(tmp_path)
    result = invoke("auto", ckpt, trained, tmp_path / "out")
    assert result.exit_code in (0, 1, 2) and (not result.exception or isinstance(result.exception, SystemExit)), result
    if result.exit_code:
        assert len(result.stderr.splitlines()) == 1, result.stderr
    if result.exit_code == 2:
        assert listing(tmp_path) == before


MOMENTS: dict[str, Callable[[dict], dict]] = {
    "one row": lambda t: t | {k: v[:1] for k, v in t.items() if v.ndim > 1},
    "flat": lambda t: t | {k: v.flatten() for k, v in t.items() if v.ndim > 1},
    "scalars": lambda t: {k: torch.tensor(1.0) for k in t},
    "nan": with_value(math.nan),
    "missing": lambda t: {k: v for k, v in t.items() if k != first(t)},
    "whole numbers": lambda t: {k: v.long() for k, v in t.items()},
    "negative squares": lambda t: {k: -1 - v if "exp_avg_sq" in k else v for k, v in t.items()},
    "negative steps": lambda t: {k: -v if k.endswith("step") else v for k, v in t.items()},
}


@pytest.mark.parametrize("case", MOMENTS)
def test_moments_of_another_size(case, damage, trained, tmp_path):
    all_refuse(damage(on_tensors("optimizer_fake_score")(MOMENTS[case])), trained, tmp_path, ["auto"])


@pytest.mark.parametrize(("number", "value"), [("betas", 5.0), ("eps", 1e3), ("weight_decay", -7.0)])
def test_numbers_of_an_optimizer_that_are_not_the_configurations(number, value, damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        file = ckpt / "optimizer_student.json"
        text = file.read_text()
        tree = json.loads(text)
        group = next(value for key, value in tree["dict"] if key == "param_groups")["list"][0]
        entry = next(pair for pair in group["dict"] if pair[0] == number)
        entry[1] = {"value": value} if number != "betas" else {"tuple": [{"value": value}, {"value": 0.999}]}
        file.write_text(json.dumps(tree))
        signed(ckpt)

    all_refuse(damage(edit), trained, tmp_path, ["auto"], says=f"{number} is ")


def test_a_moment_that_every_parameter_lacks(damage, trained, tmp_path):
    def edit(ckpt: Path) -> None:
        file = ckpt / "optimizer_student.json"
        tree = json.loads(file.read_text())
        states = dict(tree["dict"])["state"]["dict"]
        for _, values in states:
            values["dict"] = [[key, value] for key, value in values["dict"] if key != "exp_avg_sq"]
        file.write_text(json.dumps(tree))
        signed(ckpt)

    wanted = "a parameter's moments are step, exp_avg; this optimizer's are step, exp_avg, exp_avg_sq"
    all_refuse(damage(edit), trained, tmp_path, ["auto"], says=wanted)


KINDS = ("adamw", "adamw_bf16", "adamw8bit, small", "adamw8bit", "paged_adamw8bit")


def stepped(kind: str) -> torch.optim.Optimizer:
    """After one step; from 4096 values on, bitsandbytes quantizes."""
    dtype = torch.bfloat16 if kind == "adamw_bf16" else torch.float32
    p = torch.nn.Parameter(torch.ones(10 if "small" in kind else 5000, dtype=dtype))
    optimizer = build_optimizer(kind.split(",")[0], [p], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def place_of(name: str, state: dict) -> dict:
    """Where the first parameter's state has a number: bitsandbytes nests some."""
    values = state["state"][0]
    return values if name in values else next(value for value in values.values() if isinstance(value, dict))


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_an_optimizer_of_another_device_goes_on_with_the_kernels_of_this_one(kind, tmp_path):
    """A GPU has Triton's, which know no tensor of a CPU."""
    kernels, elsewhere = {"adamw": ("fused", None), "adamw_bf16": ("triton", True)}[kind]
    made = stepped(kind)
    state = made.state_dict()
    state["param_groups"][0][kernels] = elsewhere
    tensors, tree = split_state(state)
    folder = write_checkpoint(tmp_path, 1, {"optimizer_a": tensors}, {"optimizer_a.json": json.dumps(tree)}, 1)
    loaded = stepped(kind)
    load_optimizer("a", loaded, folder)
    assert loaded.param_groups[0][kernels] is loaded.defaults[kernels] is not elsewhere
    for optimizer in (made, loaded):
        optimizer.param_groups[0][kernels] = loaded.defaults[kernels]
        optimizer.step()
    assert torch.equal(*(optimizer.state[p]["exp_avg"] for optimizer in (made, loaded) for p in optimizer.state))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_an_optimizer_that_are_missing_or_of_another_kind(kind, tmp_path):
    """Each is refused; the state as it was is not."""

    def load(name: str, *values: object) -> None:
        state = copy.deepcopy(stepped(kind).state_dict())
        place = place_of(name, state)
        place.pop(name)
        if values:
            (place[name],) = values
        tensors, tree = split_state(state)
        texts = {"optimizer_a.json": json.dumps(tree)}
        load_optimizer("a", stepped(kind), write_checkpoint(tmp_path, 1, {"optimizer_a": tensors}, texts, 1))

    state = stepped(kind).state_dict()
    nested = [value for value in state["state"][0].values() if isinstance(value, dict)]
    numbers = {k: v for part in (state["state"][0], *nested) for k, v in part.items() if not isinstance(v, dict)}
    assert len(numbers) >= 3 and ("qmap1" in numbers) == (kind in ("adamw8bit", "paged_adamw8bit"))
    for name, value in numbers.items():
        load(name, value)
        others: list[object] = [None, "x", 1.5, True, [1], torch.zeros(2, 2), torch.tensor([7, 7])]
        if isinstance(value, torch.Tensor):
            others += [3, value.to(torch.int64)] + [value.float()] * (value.dtype == torch.uint8)
        else:
            others.append(torch.tensor(1.0))
        for values in ((), *((other,) for other in others)):
            with pytest.raises(ConfigError, match=r"optimizer_a.json does not hold what it should"):
                load(name, *values)
