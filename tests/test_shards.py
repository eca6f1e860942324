"""Files of rows: what is written is read, whatever dies in between, and what is damaged is found."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdtrain.config import ConfigError
from dmdtrain.files import FolderLock
from dmdtrain.models.shards import Shards


def some_rows(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random rows [n, 6] whose values and lengths follow from their names."""
    rows = {}
    for name in names:
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        rows[name] = torch.randn(1 + seed % 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return rows


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "text"


def opened(folder: Path, compress: bool = False) -> Shards:
    shards = Shards(folder, "data.cache_dir", compress)
    shards.refresh()
    return shards


def filled(folder: Path, *files: str, compress: bool = False) -> Shards:
    """Shards with a file for each word; its letters are the names of its rows."""
    shards = opened(folder, compress)
    shards.open_for_writing()
    for names in files:
        write(shards, names)
    return shards


def write(shards: Shards, names: str) -> None:
    shards.write(some_rows(*names), {f"also {name}": name for name in names}, {names[0]: len(names)})


def holds(shards: Shards, names: str) -> None:
    """The shards hold exactly these rows, with their bits, and find each by its alias."""
    assert set(shards.rows) == set(names)
    for name, row in some_rows(*names).items():
        assert torch.equal(shards.read(name), row)
        assert shards.aliases[f"also {name}"] == name


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_the_bit(folder, compress, dtype):
    rows = some_rows("a", "b", "c", dtype=dtype)
    rows["c"][0, :3] = torch.tensor([float("inf"), -0.0, 1e-40]).to(dtype)
    shards = opened(folder, compress)
    shards.open_for_writing()
    file = shards.write(rows, {"x": "a"}, {"b": 7})
    for reader in (shards, opened(folder)):
        for name, row in rows.items():
            read = reader.read(name)
            assert read.dtype == dtype and read.shape == row.shape
            assert torch.equal(read.view(torch.uint8), row.view(torch.uint8))
        assert reader.aliases == {"x": "a"}
        assert [reader.rows[name].note for name in "abc"] == [None, 7, None]
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(load_file(file)) == {"a", "b", "c"}  # any reader of safetensors opens it
    with pytest.raises(KeyError):
        shards.read("d")


def test_compression_saves_space_and_both_kinds_are_read(folder, tmp_path):
    rows = {name: row.repeat(200, 1).bfloat16() for name, row in some_rows("a", "b").items()}
    for compress in (True, False):
        shards = opened(tmp_path / str(compress), compress)
        shards.open_for_writing()
        shards.write(rows, {}, {})
    small, large = (opened(tmp_path / str(compress)).size()[1] for compress in (True, False))
    assert small < 0.9 * large
    filled(folder, "ab", compress=True)
    filled(folder, "cd")
    holds(opened(folder), "abcd")


def test_what_others_write_is_found(folder):
    one, other = filled(folder, "ab"), opened(folder)
    one.write(some_rows("c"), {"also c": "c"}, {})
    assert "c" not in other.rows
    other.refresh()
    holds(other, "abc")


def test_the_same_rows_make_the_same_file(folder):
    """So that two processes at the same work write it once."""
    filled(folder, "ab")
    filled(folder, "ab")
    assert len(files(folder)) == 1
    holds(opened(folder), "ab")


def test_a_file_that_went_while_it_is_read(folder):
    """Its rows come from another file that has them too, or the error names it."""
    reader = filled(folder, "ab")
    filled(folder, "bc")
    reader.rows["b"].file.unlink()
    assert torch.equal(reader.read("b"), some_rows("b")["b"])
    last = reader.rows["b"].file
    last.unlink()
    with pytest.raises(ConfigError) as caught:
        reader.read("b")
    assert str(caught.value) == f"data.cache_dir: {last} has gone; the same command makes it again"


def test_foreign_files_are_left_alone(folder):
    folder.mkdir(parents=True)
    for name in ("model.safetensors", ".note.partial", f"{'a' * 63}.safetensors"):
        (folder / name).write_bytes(b"mine")
    shards = filled(folder, "ab")
    assert next(shards.verify())[1] is None and shards.prune([], 2)[0] == 2
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        [".lock", "model.safetensors", ".note.partial", f"{'a' * 63}.safetensors"]
    )


# ---------------------------------------------------------------------------------------------------- kills


def killed_at(folder: Path, function: str, before: bool) -> None:
    """Writes rows c and d in a process that is killed at its first call of an `os` function in `Shards.write`."""
    child = os.fork()
    if child == 0:
        module, name = (Path, "rename") if function == "rename" else (os, function)
        original = getattr(module, name)

        def die(*args):
            if not before:
                original(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        shards = opened(folder)
        shards.open_for_writing()
        setattr(module, name, die)
        write(shards, "cd")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_kill_leaves_whole_files_alone(folder, function, before):
    filled(folder, "ab")
    killed_at(folder, function, before)
    there = "abcd" if (function, before) == ("rename", False) else "ab"
    shards = opened(folder)
    holds(shards, there)
    assert not shards.damaged
    assert len(list(folder.glob(".*.partial"))) == (0 if there == "abcd" else 1)
    del shards
    holds(filled(folder, "cd"), "abcd")
    assert not list(folder.glob(".*.partial")) and len(files(folder)) == 2


def test_the_leftover_of_a_living_process_stays(folder):
    """Whoever is in the middle of writing holds the lock."""
    writer = filled(folder, "ab")
    leftover = folder / f".{'0' * 32}.partial"
    leftover.write_bytes(b"half")
    filled(folder, "cd")
    assert leftover.exists()
    del writer
    filled(folder, "ef")
    assert not leftover.exists()


# ---------------------------------------------------------------------------------------------------- damage


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size - 1), "it is cut off"),
    "cut in its header": (lambda file: os.truncate(file, 60), "it is cut off"),
    "empty": (lambda file: os.truncate(file, 0), "it is cut off"),
    "header": (lambda file: flip(file, 8), "its header is broken"),
    "zeros": (lambda file: file.write_bytes(b"\0" * file.stat().st_size), "its header is broken"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_shows_at_once(folder, damage):
    """Rows of such a file are missing without being asked for."""
    filled(folder, "ab", "cd")
    (bad,) = [file for file in files(folder) if "a" in load_file(file)]
    edit, says = DAMAGES[damage]
    edit(bad)
    shards = opened(folder)
    holds(shards, "cd")
    assert shards.damaged == {bad: says}
    assert dict(shards.verify())[bad] == says
    assert not bad.exists() and not shards.damaged
    holds(filled(folder, "ab"), "abcd")


def test_damage_that_only_a_checksum_shows(folder):
    filled(folder, "ab", "cd")
    (bad,) = [file for file in files(folder) if "a" in load_file(file)]
    flip(bad, -1)
    shards = opened(folder)
    assert set(shards.rows) == set("abcd") and not shards.damaged
    found = dict(shards.verify())
    assert sorted(found) == sorted([*files(folder), bad]) and found[bad] == "its checksum differs"
    assert [problem for file, problem in found.items() if file != bad] == [None]
    holds(shards, "cd")


def test_damage_that_shows_when_it_is_read(folder):
    """A compressed row knows its own checksum."""
    shards = filled(folder, "ab", compress=True)
    flip(files(folder)[0], -1)
    with pytest.raises(ConfigError, match=r"data.cache_dir: .* is damaged: .*dmdtrain prepare CONFIG --verify"):
        [shards.read(name) for name in "ab"]


def test_a_rewritten_file_replaces_the_damaged_one(folder):
    filled(folder, "ab")
    os.truncate(files(folder)[0], 60)
    shards = opened(folder)
    shards.open_for_writing()
    write(shards, "ab")
    holds(shards, "ab")
    assert not shards.damaged and len(files(folder)) == 1


# ---------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("written", "keep", "deleted", "left"),
    [
        (["ab", "cd"], "abcd", 0, 2),
        (["ab", "cd"], "ab", 2, 1),
        (["ab", "cd"], "ac", 2, 1),  # both are written again, as one
        (["abc", "def"], "abdf", 2, 2),
        (["ab", "cd"], "", 4, 0),
        (["ab", "bc"], "abc", 1, 2),  # a row that is there twice
        (["b", "ab"], "ab", 1, 2),
        (["ab", "b", "bc"], "abc", 2, None),
        (["ab"], "abxy", 0, 1),  # what is not there can not be kept
    ],
)
def test_pruning_keeps_what_is_needed(folder, written, keep, deleted, left, compress):
    shards = filled(folder, *written, compress=compress)
    before = shards.size()[1]
    rows, freed = shards.prune(set(keep), 2)
    assert rows == deleted
    kept = "".join(sorted(set(keep) & set("".join(written))))
    for reader in (shards, opened(folder)):
        holds(reader, kept)
        assert not [*filter(lambda found: found[1], reader.verify())]
    assert freed == before - shards.size()[1] == before - sum(file.stat().st_size for file in files(folder))
    assert left is None or len(files(folder)) == left
    assert [shards.rows[name].note for name in kept if name == written[0][0]] in ([], [len(written[0])])


def test_pruning_waits_for_those_who_use_the_folder(folder):
    user, shards = filled(folder, "ab"), opened(folder)
    with pytest.raises(ConfigError, match="is in use by another process; prune when it has ended"):
        shards.prune([], 2)
    holds(user, "ab")
    del user
    assert shards.prune("a", 2)[0] == 1
    filled(folder, "cd")
    holds(opened(folder), "acd")


def test_pruning_is_refused_where_nobody_can_know_who_uses_the_folder(folder, monkeypatch):
    """As on file systems without locks; whoever writes goes on, and leaves what may be another's."""
    shards = filled(folder, "ab")
    leftover = folder / f".{'0' * 32}.partial"
    leftover.write_bytes(b"half")
    del shards

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr("dmdtrain.files.fcntl.flock", no_locks)
        shards = filled(folder, "cd")
        with pytest.raises(ConfigError) as caught:
            shards.prune([], 2)
        assert str(caught.value) == (
            f"data.cache_dir: {folder} can not be locked (No locks available), so others may be using it; prune where it can"
        )
        holds(opened(folder), "abcd")
        assert leftover.exists()
    del shards
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"can not be locked \(Is a directory\)"):
        opened(folder).prune([], 2)
    (folder / ".lock").rmdir()
    assert opened(folder).prune("a", 2)[0] == 3


def test_a_lock_that_is_refused_is_still_held_in_common(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take() and second.take()
    assert not first.take(alone=True) and not second.take(alone=True)  # the other has it in common, whoever was refused
    assert not FolderLock(tmp_path).take(alone=True)
    del second
    assert first.take(alone=True) and first.take(alone=True)
    assert not FolderLock(tmp_path).take(alone=True)
    first.take()
    assert FolderLock(tmp_path).take() and not FolderLock(tmp_path).take(alone=True)
    del first
    assert FolderLock(tmp_path).take(alone=True)


# ---------------------------------------------------------------------------------------------------- folders


def test_folders_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*/file/text can not be made: Not a directory"):
        opened(tmp_path / "file" / "text").open_for_writing()


def test_a_full_disk_is_told_and_leaves_no_leftover(folder, monkeypatch):
    shards = filled(folder, "ab")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmdtrain.models.shards.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:  # exit code 74: no mistake of a user's
        shards.write(some_rows("c"), {}, {})
    assert caught.value.filename == str(folder)
    assert not list(folder.glob(".*.partial")) and len(files(folder)) == 1
