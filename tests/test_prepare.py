"""`dmdtrain prepare` on a real tiny text encoder: what it says, what it keeps, and kills at any moment."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from clip_files import write_clip
from conftest import done, refused, run_cli

from dmdtrain.config import build
from dmdtrain.prompt_library import LIBRARY
from dmdtrain.train.setup import resolve, size_text, text_cache

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a red cat runs", "a blue dog sleeps", "a cat on grass", "a dog", "a red dog", "a blue cat sleeps", ""]


@pytest.fixture
def make(settings, tmp_path):
    """A configuration file of the settings with {"group.key": value} applied."""

    def write(changes: dict | None = None, name: str = "run.yaml") -> Path:
        values = copy.deepcopy(settings)
        for key, value in (changes or {}).items():
            *groups, last = key.split(".")
            branch = values
            for group in groups:
                branch = branch.setdefault(group, {})
            branch[last] = value
        (tmp_path / name).write_text(yaml.safe_dump(values))
        return tmp_path / name

    return write


def cached(file: Path) -> dict[str, torch.Tensor]:
    """Every row of a configuration's cache."""
    shards = text_cache(resolve(build(yaml.safe_load(file.read_text()))), torch.device("cpu")).shards
    shards.refresh()
    assert not shards.damaged
    return {name: shards.read(name) for name in shards.rows}


def texts_there(file: Path, texts: list[str]) -> list[str]:
    text = text_cache(resolve(build(yaml.safe_load(file.read_text()))), torch.device("cpu"))
    return [prompt for prompt in texts if not text.missing([prompt])]


def test_everything_a_run_needs_is_encoded_once(make, tmp_path):
    file = make({"validation.negative_prompt": "a red red dog", "validation.guidance_scale": 2.0})
    said = done("prepare", file)
    assert (
        "text 4 training prompts, 2 validation prompts, 2 negative prompts; 1 duplicate and 1 blank left out of 6"
    ) in said
    assert "embeddings 8 needed, 0 were there, 8 added" in said
    assert f"cache {tmp_path / 'run' / 'cache' / 'text'}: 8 embeddings in 1 files, " in said
    assert "warning" not in said
    assert texts_there(file, [*TEXTS, "a red red dog"]) == [*TEXTS, "a red red dog"]
    said = done("prepare", file)
    assert "embeddings 8 needed, 8 were there, 0 added" in said and "to encode" not in said
    done("fit", file, "--set", "validation.every=0", "--max-steps", 2)  # the folder is still free for its run


def test_a_run_reads_what_was_prepared(make, tmp_path, monkeypatch):
    changes = {"data.cache_dir": str(tmp_path / "shared"), "data.cache_compress": True, "validation.every": 0}
    file = make(changes)
    done("prepare", file)
    assert [f.name for f in tmp_path.glob("shared/*")] == ["text"] and not (tmp_path / "run").exists()

    def never(*_):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr("dmdtrain.models.encode.load_text_encoder", never)
    done("fit", file, "--max-steps", 2)
    assert not (tmp_path / "run" / "cache").exists()
    other = make(changes | {"output_dir": str(tmp_path / "other"), "optimizer.lr": 1e-4}, "other.yaml")
    done("fit", other, "--max-steps", 2)  # a second run of the same cache


def test_compressed_and_plain_caches_hold_the_same(make, tmp_path):
    plain = make({"data.cache_dir": str(tmp_path / "plain")}, "plain.yaml")
    small = make({"data.cache_dir": str(tmp_path / "small"), "data.cache_compress": True}, "small.yaml")
    done("prepare", plain)
    done("prepare", small)
    a, b = cached(plain), cached(small)
    assert a.keys() == b.keys() and len(a) == 7
    assert all(torch.equal(a[name], b[name]) for name in a)
    (one,), (other,) = tmp_path.glob("plain/text/*.safetensors"), tmp_path.glob("small/text/*.safetensors")
    assert one.read_bytes() != other.read_bytes()


def test_prompts_that_are_cut_are_counted(make, tmp_path):
    (tmp_path / "long.txt").write_text(
        "a cat\n" + "a cat on grass runs " * 4 + "\n" + "a dog " * 5000 + "\na b c d e f g\n"
    )
    file = make({"data.prompts": str(tmp_path / "long.txt")})
    said = "warning: 2 prompts are longer than data.max_sequence_length (8 tokens; the longest has 10,001): the rest"
    assert said in done("prepare", file)
    assert said in done("prepare", file)  # also when nothing is encoded
    assert "warning" not in done("prepare", file, "--set", f"data.prompts={make()}".replace("run.yaml", "prompts.txt"))


def test_damaged_files_are_named_and_made_again(make, tmp_path):
    file = make()
    done("prepare", file)
    wanted = cached(file)
    (shard,) = (tmp_path / "run" / "cache" / "text").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "7 were there, 0 added" in done("prepare", file)  # only its checksum shows it
    said = done("prepare", file, "--verify")
    assert f"damaged {shard}: its checksum differs; deleted" in said and "verified 1 files" in said
    assert "7 needed, 0 were there, 7 added" in said
    again = cached(file)
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)
    said = done("prepare", file, "--verify")
    assert "checksum" not in said and "verified 1 files" in said
    shard.write_bytes(whole[:-1])  # this shows by itself
    assert "7 needed, 0 were there, 7 added" in done("prepare", file)


def test_pruning_leaves_what_the_configuration_needs(make, tmp_path):
    file = make()
    done("prepare", file)
    wanted = cached(file)
    (tmp_path / "more.txt").write_text("a red red cat\na dog\n")
    done("prepare", file, "--set", f"data.prompts={tmp_path / 'more.txt'}")
    done("prepare", file, "--set", "data.max_sequence_length=9")
    assert len(cached(file)) == 15
    said = done("prepare", file, "--prune")
    assert "pruned 8 embeddings that this configuration does not need, " in said and "0 B" not in said
    left = cached(file)
    assert left.keys() == wanted.keys() and all(torch.equal(left[name], wanted[name]) for name in wanted)
    assert "pruned 0 embeddings" in done("prepare", file, "--prune")
    assert "7 were there, 0 added" in done("prepare", file)


def test_pruning_is_refused_while_a_run_uses_the_cache(make, tmp_path):
    file = make()
    done("prepare", file)
    text = text_cache(resolve(build(yaml.safe_load(file.read_text()))), torch.device("cpu"))
    assert text.get(["a dog"]).shape == (1, 8, 16)
    refused("prepare", file, "--prune", says=["data.cache_dir: ", "is in use by another process"])
    assert "verified 1 files" in done("prepare", file, "--verify")


def test_captions_of_the_warm_up_are_prepared(make, tmp_path):
    causal = {"rollout.causal": True, "warmup.kind": "teacher_forcing", "validation.num_frames": 9}
    for count, (name, caption) in enumerate((("a", "a blue blue dog\n"), ("b", " a  dog"), ("c", "\n")), 9):
        write_clip(tmp_path / "clips" / "below" / f"{name}.mp4", count, caption=caption)
    file = make(causal | {"warmup.data": str(tmp_path / "clips")})
    said = done("prepare", file)
    assert (
        "1 negative prompts, 2 clips' captions; 1 duplicate" in said
        and "1 left out, listed in" in said
        and "embeddings 8 needed" in said
    )
    assert texts_there(file, ["a blue blue dog"]) == ["a blue blue dog"]
    synthesized = make(causal | {"warmup.steps": 1}, "made.yaml")
    done("synthesize", synthesized, "--out", tmp_path / "latents", "--what", "latents", "--count", 3, "--steps", 1)
    file = make(causal | {"warmup.data": str(tmp_path / "latents")})
    assert "3 warm-up captions" in done("prepare", file)


def test_mistakes(make, tmp_path):
    refused("prepare", tmp_path / "none.yaml", says="none.yaml: no such file")
    refused("prepare", make({"data.prompts": "/no/where.csv"}), says="data.prompts: /no/where.csv: no such file")
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file")
    refused("prepare", make({"data.cache_dir": cache}), says=["data.cache_dir: ", "can not be made: Not a directory"])
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        refused("prepare", make({"output_dir": str(place)}), says=["output_dir: ", f"{cache} is not a folder"])
    (tmp_path / "p.csv").write_text("a,b\nx,y\n")
    file = make({"data.prompts": str(tmp_path / "p.csv")})
    refused("prepare", file, says="It has a, b; name it in data.prompt_column")
    assert "1 training prompts" in done("prepare", file, "--set", "data.prompt_column=b")
    assert "validation prompts" in run_cli("fit", file, "--dry-run", "--set", "data.prompt_column=a").output.replace(
        "for validation", "validation prompts"
    )


def test_only_a_folder_that_a_run_could_have_is_prepared(make, tmp_path):
    """Clips that can not be used are listed in output_dir."""
    write_clip(tmp_path / "clips" / "short.mp4", 2)
    write_clip(tmp_path / "clips" / "good.mp4", 9)
    clips = {"data.videos": str(tmp_path / "clips"), "dmd.real_data_loss_weight": 0.5}
    clips |= {"data.cache_dir": str(tmp_path / "shared")}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("data_report.jsonl", "mine.txt"):
        (foreign / name).write_text("mine")
    refused(
        "prepare", make(clips | {"output_dir": str(foreign)}), says=f"output_dir: {foreign} is not empty and holds no"
    )
    assert {f.name: f.read_text() for f in foreign.iterdir()} == {"data_report.jsonl": "mine", "mine.txt": "mine"}
    (tmp_path / "file").write_text("mine")
    refused("prepare", make(clips | {"output_dir": str(tmp_path / "file")}), says=["output_dir: ", "is not a folder"])
    assert not (tmp_path / "shared").exists()
    assert "1 left out, listed in" in done("prepare", make(clips))
    done("fit", make(clips), "--set", "validation.every=0", "--max-steps", 2)
    other = ("--set", "optimizer.lr=0.5")
    refused("prepare", make(clips), *other, says="belongs to another run: optimizer.lr")


def test_the_column_holds_for_every_table_of_prompts(make, tmp_path):
    (tmp_path / "p.csv").write_text("text,long\nx,a cat\n")
    (tmp_path / "v.json").write_text(json.dumps({"first": "a dog", "second": "a red dog"}))
    (tmp_path / "v.tsv").write_text("long\ttext\na red cat\tx\n")
    changes = {"data.prompts": str(tmp_path / "p.csv"), "data.prompt_column": "long"}
    for name, prompts in (("v.json", ["a dog", "a red dog"]), ("v.tsv", ["a red cat"])):
        run = resolve(build(yaml.safe_load(make(changes | {"validation.prompts": str(tmp_path / name)}).read_text())))
        assert run.prompts == ["a cat"] and run.validation_prompts == prompts
    refused(
        *("fit", make(changes | {"data.prompt_column": "none", "validation.prompts": ["a"]}), "--dry-run"),
        says="there is no column 'none'; it has text, long",
    )


@pytest.mark.parametrize(("base", "wanted"), [(None, "library"), ("wan-tiny", "wan-tiny")])
def test_validation_has_prompts_of_its_own(make, base, wanted):
    changes = {"validation.count": 100} | ({"model.base": base} if base else {})

    def prompts(source):
        values = yaml.safe_load(make(changes | {"validation.prompts": source}).read_text())
        return resolve(build(values)).validation_prompts

    assert prompts(None) == prompts(wanted) != prompts({"library": "wan-tiny", "wan-tiny": "library"}[wanted])
    assert prompts("library") == list(LIBRARY)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_as_text(size, text):
    assert size_text(size) == text


# ---------------------------------------------------------------------------------------------------- kills

# Processes are forked from one that has its imports behind it: ten starts of seconds each would be a slow test.
PRELUDE = """
import os, random, shutil, signal, sys, time
import torch
from pathlib import Path
from rich.console import Console
from safetensors import safe_open
from dmdtrain.config import load
from dmdtrain.models import encode
from dmdtrain.train.prepare import prepare

torch.set_num_threads(1)
encode.SHARD_PROMPTS = 16

def start(file):
    child = os.fork()
    if child == 0:
        prepare(load(file), verify=False, prune=False, console=Console(quiet=True))
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
KILLS = """
started = time.monotonic()
assert end(start(sys.argv[1])) == 0
seconds = time.monotonic() - started
draws, killed = random.Random(0), 0
for _ in range(100):
    child = start(sys.argv[2])
    time.sleep(draws.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    if end(child) == -signal.SIGKILL:
        killed += 1
        if killed == 10:
            break
    else:  # it was done before, so the first start took longer than others do, or little was left to do
        seconds /= 2
        shutil.rmtree(Path(sys.argv[2]).parent / "killed" / "cache")
assert killed == 10, killed
assert end(start(sys.argv[2])) == 0
"""
TOGETHER = """
children = [start(sys.argv[3]) for _ in range(3)]
assert [end(child) for child in children] == [0, 0, 0]
shards = list((Path(sys.argv[3]).parent / "shared" / "cache" / "text").glob("*.safetensors"))
rows = sum(len(safe_open(shard, "pt").keys()) for shard in shards)
assert rows < 2 * 1203, rows  # of 3 x 1203, if none had left to another what it did
"""


def in_process(code: str, *args: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", PRELUDE + code, *(str(arg) for arg in args)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def many(make, tmp_path):
    """A configuration of 1200 prompts, with a cache of its own under each name."""
    words = ["a", "red", "blue", "cat", "dog", "runs", "sleeps", "on", "grass"]
    prompts = [" ".join(words[(i // 9**k) % 9] for k in range(4)) for i in range(1200)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def named(name: str) -> Path:
        return make({"data.prompts": str(tmp_path / "many.jsonl"), "output_dir": str(tmp_path / name)}, f"{name}.yaml")

    return named


def assert_same_rows(one: Path, other: Path) -> None:
    rows, others = cached(one), cached(other)
    assert rows.keys() == others.keys() and len(rows) == 1203
    assert all(torch.equal(rows[name], others[name]) for name in rows)
    assert "deleted" not in done("prepare", other, "--verify")


def test_ten_kills_at_random_moments_and_three_processes_at_once(many, tmp_path):
    """Either way the cache ends with what one process makes that is left alone."""
    in_process(KILLS + TOGETHER, many("whole"), many("killed"), many("shared"))
    for name in ("killed", "shared"):
        assert_same_rows(many("whole"), many(name))
    assert not list((tmp_path / "shared").rglob("*.partial"))
