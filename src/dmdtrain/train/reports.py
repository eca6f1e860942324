"""What a run reports outside its folder: to Weights & Biases, to a webhook, to the hub. None of it stops or slows training."""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from rich.console import Console

from dmdtrain.config import Config, ConfigError
from dmdtrain.files import write_text
from dmdtrain.train.checkpoint import CHECKPOINTS, list_checkpoints, step_folder
from dmdtrain.train.hub import Hub, check_hub
from dmdtrain.train.setup import Run

CONTENT = 2000  # letters that Discord takes
TIMEOUT = 5.0  # seconds that a webhook may take to answer
WAITING = 64  # events for it; further ones are lost
WANDB_START, WANDB_END = 30.0, 15.0  # seconds that its servers may take; what is not sent stays in the run's folder
WANDB_ID = "wandb_run.txt"


def check_reports(config: Config) -> None:
    """ConfigError where a report is asked for that this machine can not make: without its package, without a token."""
    if config.log.wandb is not None:
        found = find_spec("wandb")
        if found is None or found.origin is None:  # a folder of runs called wandb looks like a package
            raise ConfigError(f"log.wandb: {config.log.wandb}: the package is missing; pip install 'dmdtrain[wandb]'")
    if config.hub.model_id is not None:
        check_hub(config.hub.model_id)


class _NoRedirect(HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive as a GET without its content."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Webhook:
    """POSTs events from a thread. What is told of it names the host alone: the rest of an address may be a secret."""

    def __init__(self, url: str, tell: Callable[[str], None]):
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.host = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")
        self._url = self.host + parts._replace(scheme="", netloc="", fragment="").geturl()
        self._headers = {"Content-Type": "application/json", "User-Agent": "dmdtrain"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self._tell, self._failing = tell, False
        self._opener = build_opener(_NoRedirect)
        self._queue: Queue[bytes | None] = Queue(WAITING)
        self._thread = Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def send(self, event: dict[str, Any]) -> None:
        with suppress(Full):
            self._queue.put_nowait(json.dumps(event).encode())

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                with self._opener.open(Request(self._url, body, self._headers), timeout=TIMEOUT):
                    self._failing = False
            except Exception as error:
                if not self._failing:
                    what = "refused it" if isinstance(error, HTTPError) else "can not be reached"
                    self._tell(f"webhook at {self.host} {what} ({_reason(error)}); training goes on")
                self._failing = True

    def close(self, last: dict[str, Any]) -> None:
        """Sends what waits, or, where it fails anyway, the last event alone; waits for two answers at most."""
        with suppress(Empty):
            while self._failing or self._queue.full():
                self._queue.get_nowait()
        self.send(last)
        with suppress(Full):
            self._queue.put(None, timeout=TIMEOUT)
        self._thread.join(2 * TIMEOUT)


def _reason(error: Exception) -> str:
    """Without the address."""
    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    cause = error.reason if isinstance(error, URLError) else error
    return (getattr(cause, "strerror", None) if isinstance(cause, OSError) else None) or type(cause).__name__


class Wandb:
    """The run at Weights & Biases. Its own thread and process send; the id in the run's folder lets a resumed run go on."""

    def __init__(self, config: Config, output: Path):
        self._config, self._output = config, output
        self._run: Any = None

    def open(self) -> str:
        """Where it can be seen. Raises whatever wandb raises."""
        import wandb

        values = self._config.model_dump(mode="json")
        del values["log"]["webhook"]  # it may hold a secret
        file = self._output / WANDB_ID
        name = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        if not name:
            name = secrets.token_hex(4)
            write_text(file, f"{name}\n")
        run = wandb.init(
            project=self._config.log.wandb,
            dir=self._output,
            id=name,
            resume="allow",
            name=self._output.resolve().name,
            config=values,
            settings=wandb.Settings(console="off", quiet=True, init_timeout=WANDB_START, finish_timeout=WANDB_END),
        )
        # Its own counter only ever rises, a resumed run's steps do not.
        run.define_metric("*", step_metric="step")
        run.define_metric("warm-up/*", step_metric="warm-up/step")
        self._run = run
        return (None if run.offline else run.url) or run.dir

    def log(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(values)

    def video(self, gif: bytes) -> Any:
        import wandb

        return wandb.Video(io.BytesIO(gif), format="gif")

    def close(self, code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=code)


class Reports:
    """All reports of a run. `MetricsLog` hands it the numbers; without a run it does nothing."""

    def __init__(self, run: Run | None = None, console: Console | None = None):
        self._console = console
        self._name, self._stage, self._step, self._saved = "", "", 0, 0
        self._numbers: dict[str, float] = {}
        self._opened = False
        self.webhook: Webhook | None = None
        self.wandb: Wandb | None = None
        self.hub: Hub | None = None
        if run is not None and console is not None:
            config, self._name = run.config, run.output_dir.resolve().name
            self.webhook = Webhook(config.log.webhook, self._tell) if config.log.webhook is not None else None
            self.wandb = Wandb(config, run.output_dir) if config.log.wandb is not None else None
            self.hub = Hub(run, console) if config.hub.model_id is not None else None

    def _tell(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, soft_wrap=True, highlight=False)

    def enter(self, step: int, unit: str = "step") -> None:
        """A stage begins, or goes on from a step. unit: `step` or `warm-up step`."""
        self._stage = unit.rpartition(" ")[0]
        self._step = self._saved = step
        self._numbers = {}
        if self.wandb is not None and not self._opened:
            self._opened = True
            with self._guarded("wandb can not be started"):
                self._tell(f"wandb: {self.wandb.open()}")

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tell(f"{what} ({' '.join(f'{type(error).__name__}: {error}'.split())}); training goes on")

    @property
    def _prefix(self) -> str:
        return f"{self._stage}/" if self._stage else ""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A logged step's numbers; raises whatever wandb raises."""
        self._step, self._numbers = step, values
        if self.wandb is not None:
            self.wandb.log({f"{self._prefix}{key}": value for key, value in ({"step": step} | values).items()})

    def images(self, step: int, name: str, gifs: list[bytes]) -> None:
        """Animated GIFs of a validation; raises whatever wandb raises."""
        if self.wandb is not None:
            videos = {f"{name}/{i}": self.wandb.video(gif) for i, gif in enumerate(gifs)}
            self.wandb.log({f"{self._prefix}step": step} | videos)

    def _event(self, event: str, text: str) -> dict[str, Any]:
        """What a webhook gets. Slack shows `text`; Discord shows `content`, and refuses what has none."""
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in self._numbers.items()}
        where = {"run": self._name, "stage": self._stage or "dmd", "step": self._step}
        said = {"text": text, "content": f"{self._name}: {text}"[:CONTENT]}
        return {"event": event} | where | said | {"numbers": numbers}

    def event(self, event: str, text: str, step: int | None = None) -> None:
        """started, checkpoint, validation or alarm."""
        self._step = self._step if step is None else step
        if self.webhook is not None:
            self.webhook.send(self._event(event, text))

    def saved(self, root: Path, step: int) -> None:
        """Tells of a checkpoint once, and pushes it where each is to be."""
        if step == self._saved:
            return
        self._saved = step
        self.event("checkpoint", f"saved {step_folder(root, step).name}")
        if self.hub is not None and self.hub.settings.push_checkpoints and not self._stage:
            with self._guarded("hub: no upload could be started"):
                self.hub.push(step_folder(root, step))

    def close(self, event: str, text: str, code: int) -> None:
        if self.wandb is not None:
            with self._guarded("wandb could not be closed"):
                self.wandb.close(code)
        if self.webhook is not None:
            self.webhook.close(self._event(event, text))


@contextmanager
def reporting(run: Run, console: Console) -> Iterator[Reports]:
    """A run's reports, to its last: done, with the student on the hub, or stopped."""
    reports = Reports(run, console)
    try:
        yield reports
        if reports.hub is not None:
            reports.hub.finish(next(reversed(list_checkpoints(run.output_dir / CHECKPOINTS)), None))
    except BaseException as error:
        if reports.hub is not None:
            reports.hub.stop()
        reports.close("stopped", f"stopped: {' '.join(str(error).split()) or type(error).__name__}", 1)
        raise
    reports.close("done", f"done: {run.config.train.max_steps} steps", 0)
