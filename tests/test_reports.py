"""Reports of real tiny runs: a webhook, the hub and wandb get what they should, and whatever they do, training is the same."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket

import huggingface_hub
import psutil
import pytest
import torch
import yaml
from conftest import done, refused, run_cli
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from dmdtrain import config as configuration
from dmdtrain.train import hub, reports
from dmdtrain.train.log import MetricsLog
from dmdtrain.train.setup import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE = ("seconds", "memory_gib", "model_tflops", "model_flop_utilisation")


@pytest.fixture
def write(settings, tmp_path) -> Callable[..., Path]:
    """Writes the configuration of a run in tmp_path / name, with {"group.key": value} applied."""

    def config_file(name: str = "run", **changes: object) -> Path:
        values = json.loads(json.dumps(settings)) | {"output_dir": str(tmp_path / name)}
        values["log"] = {"tensorboard": False}
        for key, value in changes.items():
            group, _, last = key.partition(".")
            values.setdefault(group, {})[last] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return config_file


def numbers(run: Path) -> list[dict]:
    """The metrics of a run without what differs from one machine's hour to the next."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(MACHINE)} for row in rows]


@pytest.fixture(scope="module")
def known() -> dict[tuple[int, ...], list[dict]]:
    return {}


@pytest.fixture
def alone(write, known, tmp_path) -> Callable[..., list[dict]]:
    """The numbers of a run without reports that ended at these steps; the same in every test."""

    def run(*ends: int) -> list[dict]:
        if ends not in known:
            for end in ends:
                done("fit", write("alone"), "--max-steps", end)
            known[ends] = numbers(tmp_path / "alone")
        return known[ends]

    return run


class Server:
    """A web server in a thread. answer(handler, body) answers a request that was read."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler, bytes], None]):
        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(handler: BaseHTTPRequestHandler, code: int, content: object = None) -> None:
    body = b"" if content is None else json.dumps(content).encode()
    handler.send_response(code)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def serve():
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def closed_port() -> int:
    with socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ------------------------------------------------------------------------------------------------ webhook


@pytest.fixture
def hook(serve):
    """A webhook that keeps what it gets: (path, headers, JSON)."""
    got: list[tuple[str, dict, dict]] = []

    def answer(handler, body):
        got.append((handler.path, dict(handler.headers), json.loads(body)))
        reply(handler, 200)

    server = serve(answer)
    server.got = got
    return server


def events(hook) -> list[tuple[str, str, int]]:
    return [(event["event"], event["stage"], event["step"]) for _, _, event in hook.got]


def test_a_webhook_gets_every_event(write, hook, tmp_path):
    address = f"http://user:pass%20word@{hook.address}/hook/1?key=secret"
    file = write(**{"log.webhook": address, "alarms.window": 10, "alarms.gradient_jump": 1e-9})
    said = done("fit", file)
    assert "secret" not in said and "pass" not in said
    found = events(hook)
    assert found[0] == ("started", "dmd", 0) and found[-1] == ("done", "dmd", 4)
    assert [event for event in found if event[0] == "validation"] == [("validation", "dmd", 4)]
    saved = [event["text"] for _, _, event in hook.got if event["event"] == "checkpoint"]
    assert saved == ["saved step-000002", "saved step-000004"]
    alarms = [event["text"] for _, _, event in hook.got if event["event"] == "alarm"]
    assert alarms and all(text.startswith("alarm at step ") and text in said for text in alarms)
    path, headers, last = hook.got[-1]
    assert path == "/hook/1?key=secret"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"user:pass word"
    assert headers["Content-Type"] == "application/json" and last["run"] == "run"
    row = numbers(tmp_path / "run")[-1]
    assert {"step": last["step"]} | last["numbers"] == row and "validation_ema_saturation" in row
    before = len(hook.got)
    assert "resumed from" in done("fit", file, "--max-steps", 6)
    assert events(hook)[before] == ("started", "dmd", 4) and events(hook)[-1] == ("done", "dmd", 6)


def test_a_webhook_hears_of_both_stages(write, hook):
    changes = {"rollout.causal": True, "rollout.num_training_frames": 4, "rollout.num_frame_per_block": 2}
    changes |= {"warmup.kind": "teacher_forcing", "warmup.steps": 2, "warmup.num_samples": 2}
    changes |= {"warmup.teacher_steps": 2, "validation.every": 0, "checkpoint.every": 4, "log.webhook": "http://"}
    file = write(**changes | {"log.webhook": f"http://{hook.address}"})
    done("fit", file)
    assert [event for event in events(hook) if event[0] != "alarm"] == [
        ("started", "warm-up", 0),
        ("checkpoint", "warm-up", 2),
        ("started", "dmd", 0),
        ("checkpoint", "dmd", 4),
        ("done", "dmd", 4),
    ]
    assert "warmup_loss" in next(event["numbers"] for _, _, event in hook.got if event["event"] == "checkpoint")


def test_a_webhook_hears_of_the_end_of_a_run_that_fails(write, hook):
    file = write(**{"log.webhook": f"http://{hook.address}", "optimizer.lr": 1e30, "train.max_bad_steps": 1})
    result = run_cli("fit", file)
    assert result.exit_code == 1, result.output
    assert hook.got[-1][2]["event"] == "stopped" and "was not finite 1 times in a row" in hook.got[-1][2]["text"]


@pytest.mark.parametrize("server", ["hangs", "refuses", "fails"])
def test_a_webhook_that_does_not_answer_changes_nothing(
    write, alone, serve, closed_port, tmp_path, monkeypatch, server
):
    let_go = threading.Event()

    def answer(handler, body):
        if server == "hangs":
            let_go.wait(900)
        reply(handler, 500)

    monkeypatch.setattr(reports, "TIMEOUT", 1.0)
    host = f"127.0.0.1:{closed_port}" if server == "refuses" else serve(answer).address
    started = time.monotonic()
    said = done("fit", write(**{"log.webhook": f"http://{host}/secret?key=secret"}))
    took = time.monotonic() - started
    let_go.set()
    assert numbers(tmp_path / "run") == alone(4)
    reason = {"hangs": "TimeoutError", "refuses": "Connection refused", "fails": "HTTP 500"}
    what = "refused it" if server == "fails" else "can not be reached"
    told = f"webhook at http://{host} {what} ({reason[server]}); training goes on"
    assert said.count("webhook at") == said.count(told) == 1, said
    assert "secret" not in said and took < 600


@pytest.mark.parametrize(("kind", "field"), [("Discord", "content"), ("Slack", "text")])
def test_a_webhook_of_a_chat_takes_every_event(write, serve, tmp_path, kind, field):
    """The server answers as theirs do: 400 where the field that is shown is missing, empty or too long."""
    shown, refused_ = [], []

    def answer(handler, body):
        said = json.loads(body).get(field)
        right = isinstance(said, str) and 0 < len(said) <= 2000
        (shown if right else refused_).append(said)
        reply(handler, 200 if right else 400)

    file = write(**{"log.webhook": f"http://{serve(answer).address}/api/webhooks/1", "validation.every": 0})
    assert "webhook at" not in done("fit", file)
    named = "run: " if kind == "Discord" else ""
    wanted = ["started at step 0 of 4", "saved step-000002", "saved step-000004", "done: 4 steps"]
    assert (refused_, shown) == ([], [f"{named}{text}" for text in wanted])


def test_a_long_event_is_cut_for_a_chat_alone(hook):
    log = reports.Reports()
    log._name, log.webhook = "run", reports.Webhook(f"http://{hook.address}", print)
    log.close("stopped", "x" * 9000, 1)
    (event,) = [event for _, _, event in hook.got]
    assert len(event["text"]) == 9000 and event["content"] == f"run: {'x' * 1995}"


@pytest.mark.parametrize("code", [302, 400, 404, 500])
def test_a_webhook_that_answers_is_not_told_to_be_out_of_reach(serve, code):
    told: list[str] = []
    server = serve(lambda handler, body: reply(handler, code))
    reports.Webhook(f"http://{server.address}/secret", told.append).close({})
    assert told == [f"webhook at http://{server.address} refused it (HTTP {code}); training goes on"]


def test_a_webhook_is_told_of_again_after_it_worked_and_never_follows(serve):
    codes, asked, told = [500, 500, 200, 302], [], []

    def answer(handler, body):
        asked.append(handler.path)
        handler.send_response(codes[len(asked) - 1])
        handler.send_header("Location", "/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    webhook = reports.Webhook(f"http://{serve(answer).address}/here", told.append)
    for count in range(1, 4):
        webhook.send({})
        until(lambda count=count: len(asked) == count)
    until(lambda: not webhook._failing)
    webhook.close({})
    assert asked == ["/here"] * 4
    assert [text.partition("(")[2].partition(")")[0] for text in told] == ["HTTP 500", "HTTP 302"]


def test_what_a_slow_webhook_can_not_take_is_dropped_and_the_last_event_is_tried(serve, monkeypatch):
    got, let_go = [], threading.Event()

    def answer(handler, body):
        got.append(json.loads(body)["step"])
        let_go.wait(900)
        reply(handler, 200)

    monkeypatch.setattr(reports, "WAITING", 4)
    webhook = reports.Webhook(f"http://{serve(answer).address}", print)
    webhook.send({"step": 0})
    until(lambda: got)
    for step in range(1, 100):
        webhook.send({"step": step})
    let_go.set()
    webhook.close({"step": 100})
    assert got[:2] == [0, 2] and got[-1] == 100 and len(got) <= 6


# ------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def hub_server(serve, monkeypatch):
    """The few endpoints of the hub that an upload calls, over files in memory. commits: (message, {path: content})."""
    created, commits, objects = [], [], {}

    def answer(handler, body):
        path, address = handler.path.partition("?")[0], f"http://{handler.headers['Host']}"
        if not path.startswith("/put/"):
            assert handler.headers["Authorization"] == "Bearer hf_test"
        if path == "/api/repos/create":
            created.append(json.loads(body))
            reply(handler, 200 if len(created) == 1 else 409, {"url": f"{address}/me/student"})
        elif path == "/api/validate-yaml":
            reply(handler, 200, {"errors": [], "warnings": []})
        elif path == "/api/models/me/student/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [(file, "lfs" if file.endswith(".safetensors") else "regular") for file in files]
            found = [{"path": file, "uploadMode": mode, "shouldIgnore": False} for file, mode in modes]
            reply(handler, 200, {"files": found})
        elif path == "/me/student.git/info/lfs/objects/batch":
            there = json.loads(body)["objects"]
            found = [each | {"actions": {"upload": {"href": f"{address}/put/{each['oid']}"}}} for each in there]
            reply(handler, 200, {"transfer": "basic", "objects": found})
        elif path.startswith("/put/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/put/")
            objects[path.removeprefix("/put/")] = body
            reply(handler, 200)
        elif path == "/api/models/me/student/commit/main":
            rows = [json.loads(line) for line in body.splitlines()]
            files = {}
            for row in rows[1:]:
                value = row["value"]
                content = objects[value["oid"]] if row["key"] == "lfsFile" else base64.b64decode(value["content"])
                files[value["path"]] = content
            commits.append((rows[0]["value"]["summary"], files))
            reply(handler, 200, {"commitUrl": f"{address}/me/student/commit/0", "commitOid": "0", "pullRequestUrl": ""})
        else:
            reply(handler, 404)

    server = serve(answer)
    server.created, server.commits = created, commits
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.address}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return server


def metadata(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_the_student_is_pushed(write, hub_server, tmp_path):
    webhook = "http://127.0.0.1:9/secret"
    said = done("fit", write(**{"hub.model_id": "me/student", "log.webhook": webhook}))
    assert "hub: pushing step-000004 to me/student" in said and "hub: pushed step-000004 to me/student" in said
    assert [created["visibility"] for created in hub_server.created] == ["private"]
    ((message, files),) = hub_server.commits
    assert message == "dmdtrain: step-000004"
    ckpt = tmp_path / "run" / "checkpoints" / "step-000004"
    done("export-lora", "--ckpt", ckpt, "--out", tmp_path / "mine.safetensors")
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(files.pop("pytorch_lora_weights.safetensors"))
    wanted, found = load_file(tmp_path / "mine.safetensors"), load_file(pushed)
    assert wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert metadata(pushed) == metadata(tmp_path / "mine.safetensors")
    scheduler = (tmp_path / "mine_scheduler" / "scheduler_config.json").read_bytes()
    assert files.pop("scheduler/scheduler_config.json") == scheduler
    assert files.pop("sampling.json") == (ckpt / "sampling.json").read_bytes()
    config = yaml.safe_load(files.pop("config.yaml"))
    assert config["log"]["webhook"] is None
    assert config == yaml.safe_load((ckpt / "config.yaml").read_text()) | {"log": config["log"]}
    card = files.pop("README.md").decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "diffusers" and "base_model" not in head and files == {}
    assert "3-step student of wan-random (LoRA of rank 4)" in card and "1000, 757, 522" in card
    assert 'pipe.load_lora_weights("me/student")' in card and "num_inference_steps=3" in card
    assert (
        "height={1}, width={0}, num_frames={2}, ".format(
            *config["validation"]["resolution"].split("x"), config["validation"]["num_frames"]
        )
        in card
    )
    assert "with any other number the scheduler walks timesteps that were never trained" in card and "0.34" in card
    assert "In ComfyUI: sampler lcm, CFG 1, sigmas 1.0, 0.757, 0.522, 0.0.\n" in card
    assert all(key.startswith("diffusion_model.blocks.") for key in found)
    assert str(tmp_path) not in card and not (tmp_path / "run" / "hub").exists()


def test_checkpoints_are_pushed_and_a_second_run_pushes_the_last_again(write, alone, hub_server, tmp_path):
    file = write(**{"hub.model_id": "me/student", "hub.push_checkpoints": True, "hub.private": False})
    done("fit", file)
    assert [message for message, _ in hub_server.commits] == ["dmdtrain: step-000002", "dmdtrain: step-000004"]
    assert hub_server.created[0]["visibility"] == "public"
    lora = [files["pytorch_lora_weights.safetensors"] for _, files in hub_server.commits]
    assert lora[0] != lora[1]
    assert numbers(tmp_path / "run") == alone(4)
    assert "nothing to do" in done("fit", file)
    assert [message for message, _ in hub_server.commits][2:] == ["dmdtrain: step-000004"]


def test_a_hub_that_can_not_be_reached_changes_nothing(write, alone, closed_port, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    said = done("fit", write(**{"hub.model_id": "me/student", "hub.push_checkpoints": True}))
    folder = tmp_path / "run" / "hub" / "step-000004"
    command = f"hf upload me/student {folder} . --private"
    assert f"push it later with: {command}" in said and "Connection refused" in said
    assert "hub: step-000002 could not be pushed (" in said and said.count("push it later") == 1
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    assert numbers(tmp_path / "run") == alone(4)


def fit_with_a_hub(file: Path, server: Server) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_ENDPOINT": f"http://{server.address}", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-u", "-m", "dmdtrain", "fit", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_of_an_upload_that_fails_after_the_last_step_only_the_last_checkpoint_is_kept(write, serve, tmp_path):
    let_go = threading.Event()

    def answer(handler, body):
        let_go.wait(900)
        reply(handler, 403)

    fit = fit_with_a_hub(write(**{"hub.model_id": "me/student", "hub.push_checkpoints": True}), serve(answer))
    try:
        for line in fit.stdout:
            if "waiting for the upload to end" in line:
                let_go.set()
                break
        said, _ = fit.communicate(timeout=600)
    finally:
        fit.kill()
        let_go.set()
    first, _, last = (line for line in said.splitlines() if line.startswith("hub: "))
    assert first.startswith("hub: step-000002 could not be pushed (") and first.endswith("; step-000004 is next")
    assert last.startswith("hub: step-000004 could not be pushed (")
    assert str(tmp_path / "run" / "hub" / "step-000004") in last
    assert [path.name for path in (tmp_path / "run" / "hub").iterdir()] == ["step-000004"]


def test_an_upload_that_hangs_is_ended_by_a_signal(write, serve, tmp_path):
    asked, let_go = threading.Event(), threading.Event()

    def answer(handler, body):
        asked.set()
        let_go.wait(900)

    fit = fit_with_a_hub(write(**{"hub.model_id": "me/student"}), serve(answer))
    try:
        assert asked.wait(600)
        fit.send_signal(signal.SIGTERM)
        said, _ = fit.communicate(timeout=600)
    finally:
        fit.kill()
        let_go.set()
    assert fit.returncode == 75
    assert "step-000004 could not be pushed (the run was stopped); push it later with: hf upload me/student" in said


def test_without_a_token_or_a_name_nothing_is_loaded(write, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    file = write(**{"hub.model_id": "me/student"})
    refused("fit", file, says=["hub.model_id: me/student: no token", "hf auth login", "HF_TOKEN"])
    refused("fit", write(**{"hub.model_id": "me/--student"}), says="hub.model_id: ")
    assert not (tmp_path / "run").exists()


def test_a_whole_student_is_pushed_as_export_pipeline_writes_it(write, tmp_path):
    changes = {"student.kind": "full", "model.precision": "bf16", "train.mixed_precision": "bf16"}
    changes |= {"validation.every": 0, "train.max_steps": 2, "ema.enabled": False, "ema.validate_with": "raw"}
    file = write(**changes)
    done("fit", file)
    ckpt = tmp_path / "run" / "checkpoints" / "step-000002"
    done("export-pipeline", "--ckpt", ckpt, "--out", tmp_path / "pipeline")
    folder = tmp_path / "upload"
    hub.write_upload(resolve(configuration.load(file)), ckpt, folder, "me/student")
    assert {path.name for path in folder.iterdir()} == {"transformer", "config.yaml", "sampling.json", "README.md"}
    name = "diffusion_pytorch_model.safetensors"
    found, wanted = load_file(folder / "transformer" / name), load_file(tmp_path / "pipeline" / "transformer" / name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert 'WanTransformer3DModel.from_pretrained("me/student"' in (folder / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ wandb


@pytest.fixture
def wandb():
    """The package, which keeps the environment of its first use until it is torn down."""
    package = pytest.importorskip("wandb")
    yield package
    with suppress(ConnectionError):  # of one that was killed
        package.teardown()


def wandb_rows(run: Path) -> list[list[dict]]:
    """What each of a run's wandb files holds of its history."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    files = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        store, rows = DataStore(), []
        store.open_for_scan(str(file))
        while data := store.scan_data():
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        files.append(rows)
    return files


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_there(write, wandb, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    file = write(**{"log.wandb": "distilled", "log.webhook": "http://127.0.0.1:9/secret"})
    said = done("fit", file, "--max-steps", 2)
    name = (run / "wandb_run.txt").read_text().strip()
    assert f"wandb: {run / 'wandb'}" in said and len(name) == 8
    time.sleep(1.1)  # its folders are named by the second
    done("fit", file)
    assert (run / "wandb_run.txt").read_text().strip() == name
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders)
    files = wandb_rows(run)
    assert [[row["step"] for row in rows if "critic_loss" in row] for rows in files] == [[1, 2], [3, 4]]
    logged = {(row["step"], row["critic_loss"]) for rows in files for row in rows if "critic_loss" in row}
    assert logged == {(row["step"], row["critic_loss"]) for row in numbers(run) if "critic_loss" in row}
    for name in ("validation_ema/0", "validation_ema/1"):
        rows = [row for rows in files for row in rows if any(key.startswith(name) for key in row)]
        assert [row["step"] for row in rows] == [2, 4]
    assert len(list(run.glob("wandb/offline-run-*/files/media/videos/validation_ema/*.gif"))) == 4
    assert not any(b"secret" in path.read_bytes() for path in run.glob("wandb/**/*") if path.is_file())
    assert numbers(run) == alone(2, 4)


@pytest.mark.parametrize("broken", ["id", "server"])
def test_a_broken_wandb_stops_nothing(write, wandb, alone, closed_port, tmp_path, monkeypatch, broken):
    if broken == "id":
        monkeypatch.setenv("WANDB_MODE", "offline")
        done("fit", write(), "--max-steps", 2)
        (tmp_path / "run" / "wandb_run.txt").mkdir()
    else:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(reports, "WANDB_START", 2.0)
    said = done("fit", write(**{"log.wandb": "distilled"}))
    assert said.count("training goes on") == said.count("wandb can not be started (") == 1, said
    assert numbers(tmp_path / "run") == (alone(2, 4) if broken == "id" else alone(4))


def test_wandb_may_die_at_any_time(write, wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = resolve(configuration.load(write(**{"log.wandb": "distilled"})))
    run.output_dir.mkdir()
    console = Console(file=io.StringIO(), width=500)
    report = reports.Reports(run, console)
    report.enter(0)
    log = MetricsLog(run.output_dir, 0, False, console, report)
    log.write(1, {"loss": 1.0})
    core = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
    for child in core:
        child.kill()
    psutil.wait_procs(core)
    for step in range(2, 5):
        log.write(step, {"loss": 1.0})
        log.videos(step, "video", [b"GIF89a"], (32, 32))
    log.close()
    report.close("done", "done", 0)
    assert core and [row["step"] for row in numbers(run.output_dir)] == [1, 2, 3, 4]
    said = console.file.getvalue()
    assert said.count("wandb can not be written (") == 1, said


def test_without_its_package_wandb_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    says = ["log.wandb: distilled: the package is missing", "pip install 'dmdtrain[wandb]'"]
    refused("fit", write(**{"log.wandb": "distilled"}), says=says)
    assert not (tmp_path / "run").exists()
