"""Checkpoints: whole or not there, damaged or not, and which of them a run goes on from."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import done, run_cli
from rich.console import Console

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError, build
from dmdtrain.files import sync
from dmdtrain.train import checkpoint as checkpoints
from dmdtrain.train import saver
from dmdtrain.train.alarms import ADVICE
from dmdtrain.train.checkpoint import (
    check_checkpoint,
    join_state,
    list_checkpoints,
    read_json,
    read_tensors,
    split_state,
    step_folder,
    write_checkpoint,
)
from dmdtrain.train.fit import fit
from dmdtrain.train.log import Live, MetricsLog
from dmdtrain.train.resume import check_output, locked, pick_checkpoint
from dmdtrain.train.saver import SavesFailed

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "student": {
            "a.lora_A.weight": torch.randn(3, 5, generator=generator),
            "b": torch.randn(7, generator=generator),
        },
        "random": {"draws": generator.get_state(), "order": torch.tensor([], dtype=torch.int64)},
    }


def write(root: Path, step: int, keep: int = 3, **texts: str) -> Path:
    state = json.dumps({"step": step})
    return write_checkpoint(root, step, contents(step), {"state.json": state} | texts, keep)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(root: Path) -> list[str]:
    return [f.name for f in list_checkpoints(root)]


def refusal(check, *args) -> str:
    """The one line with which something is refused."""
    with pytest.raises(ConfigError) as caught:
        check(*args)
    (line,) = str(caught.value).splitlines()
    return line


# ---------------------------------------------------------------------------------------------------- writing


def test_what_is_written_is_read(tmp_path):
    # Views, transposed and expanded tensors and parameters are stored as what they look like.
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "student": {
            "transposed": whole.T,
            "expanded": torch.ones(1, 3).expand(2, 3),
            "parameter": torch.nn.Parameter(torch.tensor([1.5, -2.5], dtype=torch.bfloat16)),
            "scalar": torch.tensor(3),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "empty": torch.empty(0, dtype=torch.int64),
        }
    }
    folder = write_checkpoint(tmp_path / "checkpoints", 12, tensors, {"state.json": '{"ä": 1}'}, 3)
    assert folder == tmp_path / "checkpoints" / "step-000012"
    read = read_tensors(folder, "student")
    assert read.keys() == tensors["student"].keys()
    for key, value in tensors["student"].items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value.detach()), key
    assert read_json(folder, "state.json") == {"ä": 1}
    manifest = check_checkpoint(folder)
    assert (manifest["format"], manifest["step"]) == (1, 12)
    assert set(manifest["sha256"]) == {"student.safetensors", "state.json"}


def test_the_checksums_are_sha256(tmp_path):
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    assert checkpoints.sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_the_newest_stay(tmp_path):
    for step in (2, 4, 999_998, 1_000_000):
        assert write(tmp_path, step, keep=2).is_dir()
        assert names(tmp_path)[-1] == step_folder(tmp_path, step).name
    assert names(tmp_path) == ["step-999998", "step-1000000"]  # by number, not by name
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-1000000", "step-999998"]
    write(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def test_what_was_just_written_stays(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, keep=3)
    assert write(tmp_path, 3, keep=2).is_dir()


def test_a_checkpoint_marked_by_its_user_stays_and_is_not_counted(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "step-000002" / "KEEP").touch()
    for step in (4, 6, 8):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000006", "step-000008"]
    check_checkpoint(tmp_path / "step-000002")
    write(tmp_path, 2, keep=1)  # written again, it is still marked
    assert names(tmp_path) == ["step-000002"]
    write(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000010"]


def test_a_mark_that_comes_while_a_step_is_replaced_stays(tmp_path, monkeypatch):
    folder = write(tmp_path, 2)
    sync = checkpoints._sync

    def marked(path: Path) -> None:
        (folder / "KEEP").touch()
        sync(path)

    monkeypatch.setattr(checkpoints, "_sync", marked)
    (folder / "state.json").write_text("other")
    write(tmp_path, 2)
    monkeypatch.undo()
    check_checkpoint(folder)
    write(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_sizes_are_in_the_manifest(tmp_path):
    folder = write(tmp_path, 2)
    assert read_json(folder, "state.json") == {"step": 2}
    manifest = check_checkpoint(folder)
    assert manifest["bytes"] == {name: (folder / name).stat().st_size for name in manifest["sha256"]}


def test_a_step_that_comes_by_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 4, note="old")
    folder = write(tmp_path, 4, other="new")
    check_checkpoint(folder)
    assert not (folder / "note").exists() and (folder / "other").read_text() == "new"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000002", "step-000004"]


FAILURES = ["save_file", "_sync", "sha256"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch, where, call, again):
    """The disk is full at the first or second file of step 4, which is new or written for the second time."""
    write(tmp_path, 2)
    if again:
        write(tmp_path, 4)
    before = {folder.name: listing(folder) for folder in list_checkpoints(tmp_path)}
    work, calls = getattr(checkpoints, where), 0

    def fail(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return work(*args, **kwargs)

    monkeypatch.setattr(checkpoints, where, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 4, note="new")
    monkeypatch.undo()
    assert {folder.name: listing(folder) for folder in list_checkpoints(tmp_path)} == before
    for folder in list_checkpoints(tmp_path):
        check_checkpoint(folder)
    # The next attempt is not disturbed by what was left.
    folder = write(tmp_path, 4, note="new")
    check_checkpoint(folder)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000002", "step-000004"]
    assert torch.equal(read_tensors(folder, "student")["b"], contents(4)["student"]["b"])


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Runs `work` until its rename of that number, from 1."""
    rename, renamed = Path.rename, 0

    def kill(self: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += 1
        if renamed == number:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KeyboardInterrupt):
        work()
    monkeypatch.undo()


def test_a_new_checkpoint_appears_at_its_rename(tmp_path, monkeypatch):
    write(tmp_path, 2)
    killed_at_rename(1, monkeypatch, lambda: write(tmp_path, 4, keep=1))
    assert names(tmp_path) == ["step-000002"]  # which stays until the new one is there
    write(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-000004"]


@pytest.mark.parametrize(
    "number",
    [1, 2],
)
def test_a_kill_while_a_step_is_replaced_leaves_one_of_both(tmp_path, monkeypatch, number):
    write(tmp_path, 4)
    killed_at_rename(number, monkeypatch, lambda: write(tmp_path, 4))
    assert names(tmp_path) == ["step-000004"]
    check_checkpoint(tmp_path / "step-000004")


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    synced: list[str] = []
    sync = checkpoints._sync

    def watch(path: Path) -> None:
        synced.append(path.name)
        if path != tmp_path:
            assert names(tmp_path) == []
        sync(path)

    monkeypatch.setattr(checkpoints, "_sync", watch)
    write(tmp_path, 4)
    assert sorted(synced[:-2]) == ["manifest.json", "random.safetensors", "state.json", "student.safetensors"]
    assert synced[-2:] == [".step-000004.partial", tmp_path.name]


def test_half_folders_are_not_listed(tmp_path):
    write(tmp_path, 4)
    shutil.copytree(tmp_path / "step-000004", tmp_path / ".step-000006.partial")
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000008")
    (tmp_path / "step-000008" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000004-kept")
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-12")
    (tmp_path / "step-000010").write_text("a file")
    assert names(tmp_path) == ["step-000004"]
    assert list_checkpoints(tmp_path / "none") == []
    # And what is not listed is not counted either.
    write(tmp_path, 9, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000009"]
    assert (tmp_path / "step-000004-kept" / "manifest.json").exists()


# ---------------------------------------------------------------------------------------------------- checking


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "checkpoints", 4)


@pytest.mark.parametrize("name", ["student.safetensors", "random.safetensors", "state.json"])
def test_a_flipped_bit_is_found_anywhere(folder, name):
    good = (folder / name).read_bytes()
    for position in (0, len(good) // 2, len(good) - 1):
        (folder / name).write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        line = refusal(check_checkpoint, folder, "--ckpt")
        assert line == f"--ckpt: {folder}: {name} is damaged (its checksum differs)"
    for content in (good[:-1], good + b"\0", b""):
        (folder / name).write_bytes(content)
        assert name in refusal(check_checkpoint, folder)
    (folder / name).unlink()
    assert refusal(check_checkpoint, folder) == f"checkpoint: {folder}: {name} is missing"
    (folder / name).write_bytes(good)
    check_checkpoint(folder)


def test_folders_that_are_no_checkpoint(folder, tmp_path):
    assert refusal(check_checkpoint, tmp_path / "none", "--resume") == f"--resume: {tmp_path / 'none'}: no such folder"
    assert "no such folder" in refusal(check_checkpoint, folder / "state.json")
    assert refusal(check_checkpoint, tmp_path) == f"checkpoint: {tmp_path}: not a checkpoint (manifest.json is missing)"
    manifest = folder / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good[: len(good) // 2])
    assert refusal(check_checkpoint, folder) == f"checkpoint: {folder}: manifest.json is broken"
    manifest.write_text(good.replace('"format": 1', '"format": 2'))
    newer = f"checkpoint: {folder}: format 2 is newer than this dmdtrain reads; valid is 1"
    assert refusal(check_checkpoint, folder) == newer


def test_sizes_are_compared_before_anything_is_read(folder, monkeypatch):
    (folder / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:-1])
    monkeypatch.setattr(checkpoints, "sha256", pytest.fail)
    line = refusal(check_checkpoint, folder)
    assert line == f"checkpoint: {folder}: student.safetensors is damaged (its size differs)"


def test_what_can_not_be_read_now_is_not_damaged(run, settings_of_a_run):
    """A real EIO: that is what reading /proc/self/mem from its start gives. Nothing is renamed, no older one is used."""
    newest = run / "checkpoints" / "step-000004"
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["bytes"]["student.safetensors"] = 0
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "student.safetensors").unlink()
    (newest / "student.safetensors").symlink_to("/proc/self/mem")
    says = f"{newest / 'student.safetensors'} can not be read: Input/output error"
    assert refusal(find_resume, build(settings_of_a_run), "auto") == f"checkpoint: {says}"
    assert refusal(find_resume, build(settings_of_a_run), str(newest)) == f"--resume: {says}"


def test_a_newer_format_is_not_damage(run, settings_of_a_run):
    newest = run / "checkpoints" / "step-000004" / "manifest.json"
    newest.write_text(newest.read_text().replace('"format": 1', '"format": 7'))
    line = refusal(find_resume, build(settings_of_a_run), "auto")
    assert line.endswith("step-000004: format 7 is newer than this dmdtrain reads; valid is 1")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_can_not_sync_folders(tmp_path, monkeypatch, number):
    """Some of FUSE and of networks."""
    real, folders = os.fsync, []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folders.append(os.readlink(f"/proc/self/fd/{handle}"))
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    check_checkpoint(write(tmp_path / "run" / "checkpoints", 4))
    assert {str(tmp_path), str(tmp_path / "run")} <= set(folders)  # the new names, too
    folders.clear()
    with locked(tmp_path / "a" / "b", Console(quiet=True)):
        assert folders == [str(tmp_path / "a"), str(tmp_path)]
    folders.clear()
    monkeypatch.setattr(os, "fsync", lambda handle: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


# ---------------------------------------------------------------------------------------------------- nested states


def round_trip(state: object, folder: Path) -> object:
    """Through a checkpoint's files."""
    tensors, tree = split_state(state)
    written = write_checkpoint(folder, 1, {"state": tensors}, {"state.json": json.dumps(tree)}, 1)
    return join_state(read_tensors(written, "state"), read_json(written, "state.json"))


def identical(a: object, b: object) -> bool:
    """Equal, in the same types, tensors to the bit and dicts in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(k) is type(m) for k, m in zip(a, b, strict=True))
            and all(identical(a[key], b[key]) for key in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


STATES = {
    "tuples and lists": {"betas": (0.9, 0.999), "empty": (), "nested": [(1, 2.5), [], [True, (None,)]]},
    "numbers": {"int": 3, "big": 2**62, "float": 0.1 + 0.2, "tiny": 5e-324, "whole": 1.0, "minus": -0.0},
    "odd numbers": {"inf": math.inf, "minus": -math.inf, "nan": math.nan},
    "truth": {"yes": True, "no": False, "none": None, "zero": 0, "one": 1, "text": "true", "odd": 'ä"\n'},
    "int keys": {0: {"step": torch.tensor(5.0)}, 7: {"step": torch.tensor(6.0)}, 1: {}, "deep": {2: {3: (4, {5: 6})}}},
    "tensors": {
        "state": {0: {"m": torch.randn(2, 3), "q": torch.arange(9, dtype=torch.uint8), "k": torch.randn(4).bfloat16()}},
        "list": [torch.tensor(1), (torch.tensor(2.5, dtype=torch.float64), torch.zeros(0))],
    },
    "names of its own": {"tensor": "a", "dict": {"value": [1]}, "list": {"tuple": (2,)}, "value": {"tensor": 3}},
    "nothing": {},
    "a tensor": torch.tensor([1.0, 2.0]),
    "a number": 4,
}


@pytest.mark.parametrize("case", STATES)
def test_states_come_back_as_they_were(case, tmp_path):
    state = STATES[case]
    before = copy.deepcopy(state)
    assert identical(round_trip(state, tmp_path), before)
    assert identical(state, before)


def test_identical_can_tell():
    for a, b in (((1,), [1]), (1, True), (1, 1.0), ({1: 2}, {"1": 2}), (torch.zeros(1), torch.zeros(1).double())):
        assert not identical(a, b)


def test_tensors_that_share_their_memory(tmp_path):
    book = torch.randn(256)
    state = {0: {"book": book}, 1: {"book": book}}
    assert identical(round_trip(state, tmp_path), state)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_goes_on_from_its_files(kind, tmp_path):
    def make() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
        options = {"adamw": dict(betas=(0.8, 0.9), amsgrad=True), "sgd": dict(momentum=0.9, nesterov=True)}[kind]
        return parameters, {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](parameters, lr=0.1, **options)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            for p in parameters:
                p.grad = p.detach().cos()
            optimizer.step()

    parameters, optimizer = make()
    step(parameters, optimizer, 2)
    again, restored = make()
    restored.load_state_dict(round_trip(optimizer.state_dict(), tmp_path))
    for p, q in zip(again, parameters, strict=True):
        p.data.copy_(q.data)
    step(parameters, optimizer, 3)
    step(again, restored, 3)
    assert all(torch.equal(p, q) for p, q in zip(again, parameters, strict=True))
    assert identical(restored.state_dict(), optimizer.state_dict())


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def settings_of_a_run(settings) -> dict:
    """No model is loaded for the question where a run goes on."""
    settings["schedule"] = {"name": "constant"}
    return settings


def changed(settings: dict, **changes: object) -> Config:
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        *groups, last = key.split(".")
        values = settings
        for group in groups:
            values = values.setdefault(group, {})
        values[last] = value
    return build(settings)


@pytest.fixture
def run(settings_of_a_run) -> Path:
    """A run of two checkpoints, as `fit` leaves it."""
    config = build(settings_of_a_run)
    output = Path(config.output_dir)
    for step in (2, 4):
        write(output / "checkpoints", step, **{"config.yaml": configuration.dump(config)})
    (output / "config.yaml").write_text(configuration.dump(config))
    return output


def find_resume(config, resume: str) -> Path | None:
    """What `fit` goes on from."""
    check_output(config, resume)
    return pick_checkpoint(config, resume)[0]


def test_resume_without_a_run(settings_of_a_run, tmp_path):
    config = build(settings_of_a_run)
    for resume in ("auto", "never"):
        assert find_resume(config, resume) is None
    assert not Path(config.output_dir).exists()  # asking makes nothing
    Path(config.output_dir).mkdir()
    for resume in ("auto", "never"):
        assert find_resume(config, resume) is None
    (Path(config.output_dir) / "cache").mkdir()  # encoded prompts of a run that never came to be
    for resume in ("auto", "never"):
        assert find_resume(config, resume) is None
    (Path(config.output_dir) / "config.yaml").write_text(configuration.dump(config))  # killed before its first save
    assert find_resume(config, "auto") is None


def test_resume_auto_takes_the_newest_whole_one(run, settings_of_a_run):
    config = build(settings_of_a_run)
    root = run / "checkpoints"
    assert find_resume(config, "auto") == root / "step-000004"
    write(root, 10, keep=9, **{"config.yaml": configuration.dump(config)})
    assert find_resume(config, "auto") == root / "step-000010"
    shutil.copytree(root / "step-000004", root / ".step-000012.partial")
    shutil.copytree(root / "step-000004", root / "step-000014")
    (root / "step-000014" / "manifest.json").unlink()
    shutil.copytree(root / "step-000004", root / "step-000016")  # by hand
    assert find_resume(config, "auto") == root / "step-000010"
    # Damaged ones are passed over, and told of, as long as an undamaged one is left.
    (root / "step-000010" / "state.json").write_text("{}")
    assert find_resume(config, "auto") == root / "step-000004"
    found, damaged = checkpoints.newest_good(run)
    assert (found, damaged) == (
        root / "step-000004",
        {
            root / "step-000016": "it is of step 4",
            root / "step-000014": "not a checkpoint (manifest.json is missing)",
            root / "step-000010": "state.json is damaged (its size differs)",
        },
    )
    for step in (2, 4):
        (root / f"step-{step:06d}" / "state.json").write_text("{}")
    line = refusal(find_resume, config, "auto")
    assert line.startswith(f"--resume: {root / 'step-000016'}: it is of step 4; no undamaged")


def test_resume_never_refuses_a_run(run, settings_of_a_run, tmp_path):
    line = refusal(find_resume, build(settings_of_a_run), "never")
    assert line == (f"output_dir: {run} already holds a run; choose another with --output-dir, or --resume auto")
    assert find_resume(changed(settings_of_a_run, output_dir=str(tmp_path / "new")), "never") is None


def test_resume_from_a_folder(run, settings_of_a_run, tmp_path):
    config, older = build(settings_of_a_run), run / "checkpoints" / "step-000002"
    assert find_resume(config, str(older)) == older
    # A new run can start from it; a third run's folder can not take it.
    elsewhere = changed(settings_of_a_run, output_dir=str(tmp_path / "new"))
    assert find_resume(elsewhere, str(older)) == older
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text(configuration.dump(elsewhere))
    line = refusal(find_resume, elsewhere, str(older))
    assert line == f"output_dir: {tmp_path / 'new'} belongs to another run; choose another with --output-dir"
    # By another way of writing it, it is still the run's own.
    assert find_resume(config, str(run / "checkpoints" / ".." / "checkpoints" / "step-000002")) is not None
    (tmp_path / "link").symlink_to(run)
    assert find_resume(config, str(tmp_path / "link" / "checkpoints" / "step-000002")) is not None


def test_resume_from_a_folder_into_a_foreign_one(run, settings_of_a_run, tmp_path):
    foreign = tmp_path / "holidays"
    foreign.mkdir()
    (foreign / "photo.jpg").write_text("x")
    config = changed(settings_of_a_run, output_dir=str(foreign))
    assert str(foreign) in refusal(find_resume, config, str(run / "checkpoints" / "step-000002"))


@pytest.mark.parametrize("what", ["missing", "the run", "its folder of checkpoints", "half", "damaged", "a file"])
def test_resume_from_what_is_no_checkpoint(run, settings_of_a_run, what):
    older = run / "checkpoints" / "step-000002"
    folder, says = {
        "missing": (run / "checkpoints" / "step-000003", "no such folder"),
        "the run": (run, "not a checkpoint (manifest.json is missing)"),
        "its folder of checkpoints": (run / "checkpoints", "not a checkpoint (manifest.json is missing)"),
        "half": (older, "not a checkpoint (manifest.json is missing)"),
        "damaged": (older, "student.safetensors is missing"),
        "a file": (run / "config.yaml", "no such folder"),
    }[what]
    if what == "half":
        (older / "manifest.json").unlink()
    if what == "damaged":
        (older / "student.safetensors").unlink()
    assert refusal(find_resume, build(settings_of_a_run), str(folder)) == f"--resume: {folder}: {says}"


@pytest.mark.parametrize("resume", ["auto", "folder"])
def test_another_configuration_is_refused_by_its_key(run, settings_of_a_run, resume):
    ckpt = run / "checkpoints" / "step-000002"
    resume = "auto" if resume == "auto" else str(ckpt)
    what = {
        "auto": f"output_dir: {run} belongs to another run",
        str(ckpt): f"--resume: {ckpt} is a checkpoint of another configuration",
    }[resume]
    for changes, says in (
        ({"optimizer.lr": 2e-3}, "optimizer.lr: 0.001 -> 0.002"),
        ({"train.seed": 5}, "train.seed: 0 -> 5"),
        ({"student.kind": "full"}, "student.kind: 'lora' -> 'full'"),
        ({"optimizer.lr": 2e-3, "train.seed": 5}, "optimizer.lr: 0.001 -> 0.002 and 1 more"),
        ({"ema.decay": 0.6, "dmd.timestep_shift": 2.0, "data.caption_dropout": 0.1}, " and 2 more"),
    ):
        line, _, hint = refusal(find_resume, changed(settings_of_a_run, **changes), resume).partition("; ")
        assert line.startswith(what + ": ") and line.endswith(says), line
        alone = changes.keys() <= {"optimizer.lr", "ema.decay", "dmd.timestep_shift", "data.caption_dropout"}
        assert hint == f"a branch may change it: {configuration.BRANCH_OFF}" * alone


def test_what_may_change_when_a_run_goes_on(run, settings_of_a_run):
    changes = {
        "train.max_steps": 9,
        "train.max_bad_steps": 3,
        "checkpoint.every": 1,
        "checkpoint.keep": 7,
        "validation.every": 0,
        "validation.prompts": ["a dog"],
        "validation.num_frames": 9,
        "log.every": 5,
        "log.tensorboard": False,
        "ema.validate_with": "both",
        "model.attention": "_native_cudnn",
    }
    newest = run / "checkpoints" / "step-000004"
    for key, value in changes.items():
        assert find_resume(changed(settings_of_a_run, **{key: value}), "auto") == newest, key
    for resume in ("auto", str(newest)):
        assert find_resume(changed(settings_of_a_run, **changes), resume) == newest
    moved = run.rename(run.with_name("moved"))
    config = changed(settings_of_a_run, output_dir=str(moved))
    assert find_resume(config, "auto") == moved / "checkpoints" / "step-000004"


@pytest.mark.parametrize("schedule", ["linear", "cosine_with_min_lr"])
def test_a_decaying_schedule_fixes_the_length(settings_of_a_run, tmp_path, schedule):
    settings = settings_of_a_run | {"schedule": {"name": schedule}, "output_dir": str(tmp_path / "decaying")}
    config = build(settings)  # 4 steps, an update at every 2nd
    output = tmp_path / "decaying"
    newest = write(output / "checkpoints", 4, **{"config.yaml": configuration.dump(config)})
    (output / "config.yaml").write_text(configuration.dump(config))
    for resume in ("auto", str(newest)):
        line = refusal(find_resume, changed(settings, **{"train.max_steps": 6}), resume)
        assert ": train.max_steps: 4 -> 6 (the schedule depends on it); a branch may change it: dmdtrain fit " in line
        # One more step is no more student updates.
        assert find_resume(changed(settings, **{"train.max_steps": 5}), resume) == newest
    # Nor may the schedule change.
    assert "schedule.name" in refusal(find_resume, changed(settings, **{"schedule.name": "constant"}), "auto")


def test_folders_of_others_are_left_alone(settings_of_a_run, tmp_path):
    foreign = tmp_path / "holidays"
    (foreign / "cache").mkdir(parents=True)
    (foreign / "photo.jpg").write_text("x")
    for resume in ("auto", "never"):
        line = refusal(find_resume, changed(settings_of_a_run, output_dir=str(foreign)), resume)
        assert line == f"output_dir: {foreign} is not empty and holds no run of dmdtrain; choose another"
        line = refusal(find_resume, changed(settings_of_a_run, output_dir=str(foreign / "photo.jpg")), resume)
        assert line == f"output_dir: {foreign / 'photo.jpg'} is not a folder"
    assert sorted(f.name for f in foreign.iterdir()) == ["cache", "photo.jpg"]


@pytest.mark.parametrize("text", [None, "", "half"])
def test_a_configuration_that_is_lost_is_found_in_the_checkpoints(run, settings_of_a_run, text):
    config, file = build(settings_of_a_run), run / "config.yaml"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2] if text == "half" else text or "")
    if text is None:
        file.unlink()
    assert find_resume(config, "auto") == run / "checkpoints" / "step-000004"
    assert "belongs to another run: optimizer.lr: " in refusal(
        find_resume, changed(settings_of_a_run, **{"optimizer.lr": 1.0}), "auto"
    )
    for step in (2, 4):
        (run / "checkpoints" / f"step-{step:06d}" / "state.json").unlink()
    line = refusal(find_resume, config, "auto")
    assert line.startswith(f"output_dir: {file}") and "no undamaged checkpoint is left; choose another" in line


def test_caches_within_output_dir_are_no_strangers(settings_of_a_run, tmp_path):
    inside = {"data.cache_dir": str(tmp_path / "run" / "embeddings"), "model.precision": "int8"}
    inside |= {"model.quantized_cache": str(tmp_path / "run" / "models" / "int8")}
    for name in ("embeddings/text", "models/int8"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("slurm-1.out", "fit.log"):
        (tmp_path / "run" / name).write_text("step 1")
    for resume in ("auto", "never"):
        assert find_resume(changed(settings_of_a_run, **inside), resume) is None
    (tmp_path / "run" / "embeddings").rename(tmp_path / "run" / "text")
    assert find_resume(changed(settings_of_a_run, **inside | {"data.cache_dir": str(tmp_path / "run")}), "auto") is None
    line = refusal(find_resume, build(settings_of_a_run), "auto")
    assert line == f"output_dir: {tmp_path / 'run'} is not empty and holds no run of dmdtrain; choose another"


# ---------------------------------------------------------------------------------------------------- metrics


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def log_steps(output: Path, first: int, last: int) -> None:
    log = MetricsLog(output, first, tensorboard=False)
    for step in range(first + 1, last + 1):
        log.write(step, {"critic_loss": step / 10, "attempt": first})
    log.close()


def test_metrics_of_which_nothing_is_dropped_are_not_written_again(tmp_path):
    log_steps(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").stat()
    log_steps(tmp_path, 5, 5)
    assert (tmp_path / "metrics.jsonl").stat() == before


def test_metrics_after_the_step_are_dropped(tmp_path):
    log_steps(tmp_path, 0, 5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]
    log_steps(tmp_path, 3, 6)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["attempt"] for line in lines_of(tmp_path)] == [0, 0, 0, 3, 3, 3]
    log_steps(tmp_path, 0, 1)  # started anew
    assert lines_of(tmp_path) == [{"step": 1, "critic_loss": 0.1, "attempt": 0}]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "cut",
    [
        '{"step": 4, "critic_lo',
        '{"step": 3',
        '{"step": 3}'[:-1] + ', "x": 1.',
        "\x00" * 20,
        '{"critic_loss": 1.0}',
        "[4]",
        "4",
        '"step"',
        "null",
    ],
)
def test_a_line_that_a_kill_cut_short_goes(tmp_path, cut):
    log_steps(tmp_path, 0, 3)
    good = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(good + cut)  # without an end of line
    log_steps(tmp_path, 3, 4)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text().startswith(good)


def test_lines_are_on_disk_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write(1, {"critic_loss": 0.5})
    assert lines_of(tmp_path) == [{"step": 1, "critic_loss": 0.5}]
    log.close()


@pytest.mark.parametrize("broken", ["tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"])
def test_a_tracker_that_does_not_work_is_told_once_and_stops_nothing(tmp_path, monkeypatch, broken):
    monkeypatch.setitem(sys.modules, broken, None)  # what an installation that is damaged is like
    printed = io.StringIO()
    log = MetricsLog(tmp_path, 0, tensorboard=True, console=Console(file=printed, width=500))
    for step in (1, 2):
        log.write(step, {"critic_loss": 0.5})
        log.videos(step, "validation", [b"GIF"], (8, 8))
    log.close()
    assert lines_of(tmp_path) == [{"step": 1, "critic_loss": 0.5}, {"step": 2, "critic_loss": 0.5}]
    (line,) = printed.getvalue().splitlines()
    assert line.startswith("tensorboard can not be written (ModuleNotFoundError: import of ") and "goes on" in line


def test_progress_within_a_step_and_after_it(monkeypatch):
    clock = itertools.count(0, 11)  # seconds; what is not a terminal gets a line after ten
    monkeypatch.setattr("dmdtrain.train.log.time.monotonic", lambda: next(clock))
    printed = io.StringIO()
    with Live(3, 0, Console(file=printed, width=500), unit="video") as live:
        live.within("step 1/2")
        live.step(1, "")
        live.within("step 1/2")
        live.step(3, "")
    first, second, third, last = printed.getvalue().splitlines()
    assert first.split() == ["video", "0/3", "step", "1/2"]
    assert second.startswith("video 1/3  22.00 s/video  0:00:44 left"), second
    assert third.startswith("video 1/3  step 1/2 22.00 s/video  0:00:44 left"), third
    assert last.startswith("video 3/3  ") and last.endswith("0:00:00 left"), last


# ---------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def small(settings) -> Config:
    settings["validation"]["every"] = 0
    settings["log"] = {"tensorboard": False}
    settings["train"]["batch_size"] = 1
    return build(settings)


def test_a_run_survives_a_full_disk_and_a_kill(small, monkeypatch):
    output = Path(small.output_dir)
    save, saves = checkpoints.save_file, 0

    def fail(*args, **kwargs):
        nonlocal saves
        saves += 1
        if saves >= 9:  # six files a checkpoint: in the middle of step 4
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", fail)
    once = small.model_copy(update={"checkpoint": small.checkpoint.model_copy(update={"max_failed_saves": 1})})
    with pytest.raises(SavesFailed, match=r"step 4: 1 saves in a row failed \(No space left on device\)"):
        fit(once, "auto", Console(quiet=True))
    monkeypatch.undo()
    root = output / "checkpoints"
    assert [f.name for f in root.iterdir()] == ["step-000002"]
    check_checkpoint(root / "step-000002")
    assert [line["step"] for line in lines_of(output)] == [1, 2, 3, 4]
    # Killed while it wrote a line, too.
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "crit')
    # A half-written step that this run does not come by again goes too.
    for leftover in (".step-000003.partial", ".step-000001.removed"):
        shutil.copytree(root / "step-000002", root / leftover)
    fit(small, "auto", Console(quiet=True))
    assert sorted(f.name for f in root.iterdir()) == ["step-000002", "step-000004"]
    assert [line["step"] for line in lines_of(output)] == [1, 2, 3, 4]
    check_checkpoint(root / "step-000004")


def test_a_checkpoint_holds_no_pickle_and_says_what_it_is(small, tmp_path):
    before = {f.name for f in tmp_path.iterdir()}
    fit(small, "auto", Console(quiet=True))
    # Nothing is written outside the run's folder.
    assert {f.name for f in tmp_path.iterdir()} - before == {"run"}
    inside = {f.name for f in Path(small.output_dir).iterdir()}
    assert inside == {".lock", "cache", "checkpoints", "config.yaml", "metrics.jsonl"}
    folder = Path(small.output_dir) / "checkpoints" / "step-000004"
    files = {f.name for f in folder.iterdir()}
    assert files == {
        *("student.safetensors", "fake_score.safetensors", "ema.safetensors", "random.safetensors"),
        *("optimizer_student.safetensors", "optimizer_fake_score.safetensors"),
        *("optimizer_student.json", "optimizer_fake_score.json", "state.json", "sampling.json", "manifest.json"),
        "config.yaml",
    }
    for file in folder.iterdir():
        head = file.read_bytes()[:16]
        assert not head.startswith((b"PK", b"\x80")), file.name  # zip, as torch.save writes, and pickle itself
        if file.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + length])
        elif file.suffix == ".json":
            json.loads(file.read_text())
    assert configuration.load(folder / "config.yaml") == small
    assert yaml.safe_load((folder / "config.yaml").read_text())["student"]["rank"] == 4
    sampling = read_json(folder, "sampling.json")
    assert sampling["timesteps"] == [1000.0, 757.0, 522.0] and sampling["sigmas"] == [1.0, 0.757, 0.522]
    state = read_json(folder, "state.json")
    assert state.pop("alarms").keys() == {"running", "counts", "active"}
    assert state == {
        "stage": "dmd",
        "step": 4,
        "student_updates": 2,
        "bad_steps": 0,
        "bad_in_a_row": {"student": 0, "fake_score": 0},
    }
    assert set(check_checkpoint(folder)["sha256"]) == files - {"manifest.json"}


# ---------------------------------------------------------------------------------------------------- branches


def fitted(config: Config, resume: str = "auto") -> str:
    """What `fit` says."""
    printed = Console(file=io.StringIO(), width=1000)
    fit(config, resume, printed)
    return printed.file.getvalue()  # type: ignore[attr-defined]


def altered(config: Config, **changes: object) -> Config:
    return configuration.changed(config, {key.replace("__", "."): value for key, value in changes.items()})


def test_a_branch_goes_on_with_other_settings(small, tmp_path):
    fitted(small)
    old, before = Path(small.output_dir), listing(Path(small.output_dir))
    ckpt, new = old / "checkpoints" / "step-000002", tmp_path / "branch"
    branch = altered(
        small, optimizer__lr=5e-4, fake_score__lr=2e-4, dmd__real_score_guidance_scale=2.0, output_dir=str(new)
    )
    said = fitted(branch, str(ckpt))
    assert f"branch          of {ckpt}\n" in said and f"resumed from {ckpt}, step 2" in said
    assert [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("changed ")] == [
        "fake_score.lr: 0.001 -> 0.0002",
        "dmd.real_score_guidance_scale: 3.0 -> 2.0",
        "optimizer.lr: 0.001 -> 0.0005",
    ]
    assert listing(old) == before
    assert configuration.load_own(new / "config.yaml") == branch
    assert names(new / "checkpoints") == ["step-000002", "step-000004"]
    for role, rate in (("student", 5e-4), ("fake_score", 2e-4)):
        tree = read_json(new / "checkpoints" / "step-000004", f"optimizer_{role}.json")
        assert (
            join_state(read_tensors(new / "checkpoints" / "step-000004", f"optimizer_{role}"), tree)["param_groups"][0][
                "lr"
            ]
            == rate
        )
    # The same command goes on, and so does auto, also where the branch was killed before it had saved anything.
    for resume in (str(ckpt), "auto"):
        assert "nothing to do: the run is at step 4, and train.max_steps is 4" in fitted(branch, resume)
        shutil.rmtree(new / "checkpoints")
        assert f"resumed from {ckpt}, step 2" in fitted(branch, resume)
    ckpt.rename(ckpt.with_name("away"))  # it is not needed any more
    assert "nothing to do" in fitted(branch, str(ckpt))
    ckpt.with_name("away").rename(ckpt)
    # What its tensors are may not change.
    for key, value in (("student.rank", 8), ("optimizer.betas", (0.5, 0.9)), ("ema.enabled", False)):
        wrong = {"ema.validate_with": "raw"} | {key: value, "output_dir": str(tmp_path / "wrong")}
        assert f"another configuration: {key}: " in refusal(fitted, configuration.changed(small, wrong), str(ckpt))


def test_a_branch_without_changes_comes_to_the_same_bits(small, tmp_path):
    fitted(small)
    first = Path(small.output_dir) / "checkpoints"
    said = fitted(altered(small, output_dir=str(tmp_path / "branch")), str(first / "step-000002"))
    assert "branch  " not in said
    second = tmp_path / "branch" / "checkpoints"
    for step in ("step-000002", "step-000004"):
        for file in (first / step).glob("*.safetensors"):
            assert file.read_bytes() == (second / step / file.name).read_bytes(), (step, file.name)
        assert (first / step / "state.json").read_text() == (second / step / "state.json").read_text()


def test_what_every_advice_names_a_branch_may_change():
    keys = {key for text in ADVICE.values() for key in re.findall(r"[a-z_]+\.[a-z_]+", text)}
    assert len(keys) == 4 and keys <= set(configuration.BRANCHABLE)


def test_going_back_to_a_copy_sets_aside_what_came_after(small):
    fitted(small)
    output, root = Path(small.output_dir), Path(small.output_dir) / "checkpoints"
    last = listing(root / "step-000004")
    shutil.copytree(root / "step-000002", root / "best")
    (output / "samples" / "step-000004").mkdir(parents=True)
    fitted(small, str(root / "step-000004"))  # it is the newest: nothing is set aside
    assert sorted(f.name for f in root.iterdir()) == ["best", "step-000002", "step-000004"]
    said = fitted(altered(small, train__max_steps=3), "best")
    aside = [line.split(",")[0] for line in said.splitlines() if line.startswith("set aside: ")]
    assert [Path(line).name for line in aside] == [
        *("replaced-1-step-000002", "replaced-1-step-000004", "replaced-1-metrics.jsonl", "replaced-1-step-000004")
    ]
    assert [json.loads(line)["step"] for line in (output / "replaced-1-metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    assert names(root) == ["step-000002", "step-000003"]
    assert f"resumed from {root / 'step-000003'}" in fitted(small)
    again = listing(root / "step-000004")
    assert {k: v for k, v in again.items() if "safetensors" in k} == {
        k: v for k, v in last.items() if "safetensors" in k
    }


def test_names_of_checkpoints(small, tmp_path):
    fitted(small)
    root = Path(small.output_dir) / "checkpoints"
    for resume in ("4", "step-000004"):
        assert f"resumed from {root / 'step-000004'}" in fitted(small, resume)
    for resume in ("latest", "Auto", "3", "/step-x"):
        assert "valid are auto, never and a checkpoint" in refusal(fitted, small, resume)
    (tmp_path / "none").write_text("")
    assert "valid are auto, never" in refusal(fitted, small, str(tmp_path / "none" / "x"))


@pytest.mark.parametrize("name", ["checkpoints", "warmup", "metrics.jsonl"])
def test_names_that_are_taken_by_something_else(small, name):
    fitted(altered(small, train__max_steps=2))
    place = Path(small.output_dir) / name
    if name == "metrics.jsonl":
        place.unlink()
        place.mkdir()
        says = "is not a file"
    else:
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("")
        says = "is not a folder"
    assert refusal(fitted, small) == f"output_dir: {place} {says}"


def test_what_is_told_of_a_run_that_diverges_can_be_followed(settings, tmp_path, monkeypatch):
    def on_a_slow_disk(*arguments):
        time.sleep(2)  # the next step diverges meanwhile
        return write_checkpoint(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", on_a_slow_disk)
    file = tmp_path / "run.yaml"
    settings["optimizer"]["lr"] = settings["fake_score"]["lr"] = 1e30
    settings["checkpoint"]["every"] = settings["train"]["max_bad_steps"] = 1
    file.write_text(yaml.safe_dump(settings))
    stopped = run_cli("fit", file)
    assert stopped.exit_code == 1
    (line,) = stopped.stderr.splitlines()
    command = line.partition("dmdtrain fit CONFIG ")[2].replace("NEW_FOLDER", str(tmp_path / "branch")).split()
    told = done("fit", file, *command, "--dry-run")
    assert "changed fake_score.lr: 1e+30 -> 5e+29 changed optimizer.lr: 1e+30 -> 5e+29" in told
    assert f"branch of {tmp_path / 'run' / 'checkpoints' / 'step-00000'}" in told
