"""Kills tiny runs with SIGKILL at random instants, resumes them, and compares what they come to bit for bit with runs that
were left alone. Half of the kills are aimed at saves; about every fourth is a SIGTERM, which saves what is done
of a step.

    python scripts/torture.py --runs 200

Everything is imported once; each run is a fork. The process that forks runs no model itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from dmdtrain.miniature.clips import render, split_captions
from dmdtrain.train import commands, fit, interrupt, warmup  # noqa: F401 (what every fork needs)
from dmdtrain.train.checkpoint import check_checkpoint, list_checkpoints
from dmdtrain.train.interrupt import BY_MACHINE
from dmdtrain.train.validation import write_mp4

MACHINE = ("seconds", "memory_gib", "model_tflops", "model_flop_utilisation")  # metrics of how fast it went
LAST = 4
SIGTERM = "by SIGTERM"
BASE: dict[str, dict[str, object]] = {
    "model": {"base": "wan-tiny", "precision": "fp32", "text_encoder_precision": "fp32"},
    "student": {"rank": 4, "alpha": 4},
    "fake_score": {"rank": 4, "alpha": 4, "lr": 1e-3},
    "rollout": {"num_training_frames": 2},
    "data": {"resolution": "32x32", "max_sequence_length": 16},
    "optimizer": {"lr": 1e-3},
    "train": {"max_steps": LAST, "mixed_precision": "no", "gradient_checkpointing": False},
    "checkpoint": {"every": 1, "keep": 2},
    "validation": {
        "every": 2,
        "count": 1,
        "num_frames": 5,
        "resolution": "32x32",
        "prompts": ["a red circle moving right"],
    },
    "log": {"tensorboard": False},
}
CAUSAL = {
    "rollout": {"causal": True, "num_frame_per_block": 1},
    "warmup": {"kind": "ode_regression", "steps": 2, "num_samples": 2, "teacher_steps": 3},
}
CLIPS = {
    "dmd": {"real_data_loss_weight": 0.1},
    "student": {"rank": 64, "alpha": 64},  # from 4096 values on, bitsandbytes quantizes the moments
    "fake_score": {"rank": 64, "alpha": 64, "reuse_rollout": True},
    "rollout": {"causal": True, "num_frame_per_block": 1, "kv_cache": "host"},
    "data": {"caption_dropout": 0.3, "buckets": True},
    "optimizer": {"name": "paged_adamw8bit"},
    "train": {"gradient_accumulation": 2, "gradient_checkpointing": True, "checkpoints_on": "host"},
    "ema": {"keep_on": "host"},
}
KINDS: dict[str, dict[str, dict[str, object]]] = {
    "background": {},
    "foreground": {"checkpoint": {"background": False}},
    "warm-up": CAUSAL,
    "clips": CLIPS,
}


def write_config(root: Path, kind: str) -> Path:
    """The configuration of a kind of run, and in `root` what it is trained on."""
    prompts, clips = root / "prompts.txt", root / "clips"
    if not prompts.exists():
        prompts.write_text("a red circle moving right\na blue cross moving up\na green square moving down\n")
        captions, _ = split_captions()
        clips.mkdir()
        for number, video in enumerate(render(captions[:3], 5, torch.Generator().manual_seed(0))):
            write_mp4(clips / f"{number}.mp4", video, 16, min_edge=1)
            (clips / f"{number}.txt").write_text(str(captions[number]))
    changes = KINDS[kind]
    values = {group: BASE.get(group, {}) | changes.get(group, {}) for group in BASE | changes}
    values["data"] |= {"prompts": str(prompts)} | ({"videos": str(clips)} if "dmd" in changes else {})
    file = root / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run_fit(config: Path, output: Path, log: Path) -> None:
    """In a fork: `dmdtrain fit`."""
    interrupt.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    sys.argv = ["dmdtrain", "fit", str(config), "--output-dir", str(output)]
    from dmdtrain.cli import main

    main()


def start(config: Path, output: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(
        target=run_fit, args=(config, output, output.with_suffix(".log"))
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupt.SIGNALS)  # until the fork can answer
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)
    return process


def saving(output: Path) -> bool:
    return any(output.glob("*/.step-*.partial"))


def finish(config: Path, output: Path) -> None:
    process = start(config, output)
    process.join()
    if process.exitcode:
        sys.exit(f"a run ended with {process.exitcode}:\n{output.with_suffix('.log').read_text()}")


def kill_once(config: Path, output: Path, chance: random.Random, seconds: float) -> str | None:
    """Starts the run and kills it. Returns where it was hit; None where it was done before."""
    process = start(config, output)
    if chance.random() < 0.5:
        end = time.monotonic() + chance.uniform(0, seconds)
        while process.is_alive() and time.monotonic() < end:
            time.sleep(0.001)
    else:  # in the first save from some time on, which takes 10 ms or so
        start_looking = time.monotonic() + chance.uniform(0, seconds)
        while process.is_alive() and (time.monotonic() < start_looking or not saving(output)):
            time.sleep(0.0002)
        end = time.monotonic() + chance.uniform(0, 0.02)
        while time.monotonic() < end:
            pass
    if chance.random() < 0.25:
        process.terminate()
        process.join()
        if process.exitcode not in (0, BY_MACHINE):
            sys.exit(f"a SIGTERM ended a run with {process.exitcode}:\n{output.with_suffix('.log').read_text()}")
        return SIGTERM if process.exitcode == BY_MACHINE else None
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return None
    if saving(output):
        return "in a save"
    stage = "dmd" if (output / "metrics.jsonl").exists() else "warm-up" if (output / "warmup").exists() else "start"
    return {"dmd": "in a step, validation or between", "warm-up": "in the warm-up", "start": "before the first step"}[
        stage
    ]


def outcome(output: Path) -> dict[str, object]:
    """All that a run comes to: every file of its newest checkpoint, and its metrics but for what the machine decides."""
    newest = list_checkpoints(output / "checkpoints")[-1]
    check_checkpoint(newest)
    found: dict[str, object] = {"name": newest.name}
    for file in sorted(newest.iterdir()):
        if file.suffix == ".safetensors":
            found |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
        elif file.name not in ("manifest.json", "config.yaml"):  # the one has sums of the other, which names the folder
            found[file.name] = file.read_text()
    for log in sorted(output.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        plain = [{k: v for k, v in line.items() if not k.startswith(MACHINE)} for line in lines]
        found[str(log.relative_to(output))] = sorted(json.dumps(line, sort_keys=True) for line in plain)
    found["samples"] = sorted(str(f.relative_to(output)) for f in (output / "samples").rglob("*"))
    found["left over"] = sorted(str(f) for f in output.rglob(".*") if f.name != ".lock")
    return found


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
    def same(x: object, y: object) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="that SIGKILL hits at least once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder to keep; default: a temporary one")
    arguments = parser.parse_args()
    root = arguments.out or Path(tempfile.mkdtemp(prefix="torture-"))
    root.mkdir(parents=True, exist_ok=True)
    chance, hits, terms, started = random.Random(arguments.seed), Counter[str](), 0, time.monotonic()
    wanted, seconds, configs = {}, {}, {}
    for kind in KINDS:
        configs[kind] = write_config(root, kind)
        for attempt in (
            "first",
            "again",
        ):  # the second one is timed without encoding its prompts, and must equal the first
            output = root / f"{kind}-{attempt}"
            if attempt == "again":
                shutil.copytree(root / f"{kind}-first" / "cache" / "text", output / "cache" / "text")
            since = time.monotonic()
            finish(configs[kind], output)
            seconds[kind] = time.monotonic() - since
        wanted[kind] = outcome(root / f"{kind}-first")
        if different := differences(wanted[kind], outcome(root / f"{kind}-again")):
            sys.exit(f"{kind}: two runs without a kill differ: {different}")
        print(f"{kind}: a run of {seconds[kind]:.1f} s left alone", flush=True)
    begun = killed = 0
    while killed < arguments.runs:
        kind = list(KINDS)[begun % len(KINDS)]
        output, before = root / f"{kind}-{begun}", hits.total()
        begun += 1
        shutil.copytree(root / f"{kind}-first" / "cache" / "text", output / "cache" / "text")
        for _ in range(chance.randint(1, 4)):
            hit = kill_once(configs[kind], output, chance, seconds[kind])
            terms += hit == SIGTERM
            hits[f"{kind}: {hit}"] += hit not in (None, SIGTERM)
        finish(configs[kind], output)
        if different := differences(wanted[kind], outcome(output)):
            sys.exit(f"{output} differs from a run without a kill: {different[:5]} (--seed {arguments.seed})")
        killed += hits.total() > before
        shutil.rmtree(output)
        print(f"{hits.total()} kills and {terms} SIGTERMs, {killed} runs killed, all equal", flush=True)
    for where, count in sorted((+hits).items()):
        print(f"{count:5} {where}")
    seconds_in_all = time.monotonic() - started
    told = f"{hits.total()} kills and {terms} SIGTERMs, {killed} runs killed, in {seconds_in_all:.0f} s"
    print(f"{told}: all came to the same bits")
    if arguments.out is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
