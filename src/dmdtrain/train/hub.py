"""Upload of a checkpoint's student to the Hugging Face hub. A thread writes the files, a process of its own sends them.

Run as a module it is that process: it takes no time of the steps', and can be ended at any moment.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from dmdtrain import config as configuration
from dmdtrain.config import Config, ConfigError
from dmdtrain.files import atomic_folder

if TYPE_CHECKING:
    from rich.console import Console

    from dmdtrain.train.setup import Run

FOLDER = "hub"  # in a run's; what is being sent, or could not be
LORA, SCHEDULER = "pytorch_lora_weights.safetensors", "scheduler"  # where Diffusers looks for them
MAX_REASON = 300  # letters


def check_hub(repo: str) -> None:
    """ConfigError unless it is a name that the hub takes and there is a token; asks no server."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"hub.model_id: {_one_line(error)}") from None
    if get_token() is None:
        raise ConfigError(
            f"hub.model_id: {repo}: no token to upload with; log in with `hf auth login`, or set HF_TOKEN"
        )


class Hub:
    """The uploads of a run, one at a time. A failure is a line on the console."""

    def __init__(self, run: Run, console: Console):
        self.run, self.settings, self.console = run, run.config.hub, console
        self.pushed: Path | None = None
        self._trying: Path | None = None
        self._idle = Event()  # a signal that breaks off Thread.join leaves a thread that says it has ended
        self._idle.set()
        self._process: subprocess.Popen[str] | None = None
        self._next: str | None = "training goes on"  # what follows a failure; None: nothing
        self._stopped = False

    @property
    def repo(self) -> str:
        assert self.settings.model_id is not None
        return self.settings.model_id

    def push(self, ckpt: Path) -> None:
        """Starts, unless one is in flight."""
        if self._idle.is_set():
            thread = Thread(target=self._push, args=(ckpt,), name="hub", daemon=True)
            self._trying = ckpt
            self._idle.clear()
            try:
                thread.start()
            except RuntimeError:  # no more threads can be had
                self._idle.set()
                raise

    def finish(self, ckpt: Path | None) -> None:
        """Waits for what is in flight, then sends the last checkpoint where it is not there yet, and waits for that."""
        self._next = None if ckpt in (None, self._trying) else f"{ckpt.name} is next"
        if not self._idle.is_set():
            self._say("waiting for the upload to end; Ctrl-C ends it now")
            self._idle.wait()
            if self._trying == ckpt:
                return
        self._next = None
        if ckpt is not None and ckpt != self.pushed:
            self._say(f"pushing {ckpt.name} to {self.repo}; Ctrl-C ends it")
            self.push(ckpt)
            self._idle.wait()

    def stop(self) -> None:
        """Ends what is in flight; sent again, it goes on from there."""
        self._stopped, self._next = True, None
        if not self._idle.is_set():
            if self._process is not None:
                self._process.kill()
            self._idle.wait(10)

    def _say(self, text: str) -> None:
        self.console.print(f"hub: {text}", soft_wrap=True, highlight=False)

    def _push(self, ckpt: Path) -> None:
        try:
            self._export_and_send(ckpt)
        finally:
            self._idle.set()

    def _export_and_send(self, ckpt: Path) -> None:
        parent = self.run.output_dir / FOLDER
        folder = parent / ckpt.name
        try:
            shutil.rmtree(parent, ignore_errors=True)
            write_upload(self.run, ckpt, folder, self.repo)
        except Exception as error:
            later = f"; later: dmdtrain export-lora --ckpt {ckpt}" if self.run.config.student.kind == "lora" else ""
            self._failed(ckpt, _one_line(error), later)
            return
        failed = self._send(folder, ckpt.name)
        if failed is None:
            self.pushed = ckpt
            self._say(f"pushed {ckpt.name} to {self.repo}")
            shutil.rmtree(parent, ignore_errors=True)
        else:
            private = " --private" if self.settings.private else ""
            command = f"hf upload {self.repo} {shlex.quote(str(folder))} .{private}"
            self._failed(ckpt, failed, f"; push it later with: {command}")

    def _failed(self, ckpt: Path, reason: str, later: str) -> None:
        self._say(f"{ckpt.name} could not be pushed ({reason}){f'; {self._next}' if self._next else later}")

    def _send(self, folder: Path, name: str) -> str | None:
        """Why it failed, or None."""
        values = {"repo_id": self.repo, "private": self.settings.private, "message": f"dmdtrain: {name}"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dmdtrain.train.hub", str(folder.resolve()), json.dumps(values)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is answered here
            )
        except OSError as error:
            return error.strerror or str(error)
        if self._stopped:
            self._process.kill()
        _, said = self._process.communicate()
        if self._process.returncode == 0:
            return None
        return "the run was stopped" if self._stopped else (said.strip().splitlines() or ["it was killed"])[-1]


def write_upload(run: Run, ckpt: Path, folder: Path, repo: str) -> None:
    """What the repository gets, in a new folder. It changes no state that other threads use.

    Raises:
        ConfigError, OSError: the checkpoint is damaged or gone, or the folder can not be written.
    """
    from rich.console import Console

    from dmdtrain.train.checkpoint import config_of, file_of
    from dmdtrain.train.commands import export_lora

    config = config_of(ckpt)
    with atomic_folder(folder) as partial:
        if config.student.kind == "lora":
            said = Console(file=io.StringIO())
            export_lora(ckpt=ckpt, out=partial / LORA, file_format="original", weights="", console=said)
            made = partial / f"{Path(LORA).stem}_scheduler"
            if made.exists():
                made.rename(partial / SCHEDULER)
        else:
            _write_transformer(run, ckpt, config, partial / "transformer")
        public = configuration.changed(config, {"log.webhook": None})  # it may hold a secret
        (partial / "config.yaml").write_text(configuration.dump(public), encoding="utf-8")
        sampling = file_of(ckpt, "sampling.json").read_text(encoding="utf-8")
        (partial / "sampling.json").write_text(sampling, encoding="utf-8")
        card = model_card(repo, json.loads(sampling), config, run.video_size, stock=(partial / SCHEDULER).exists())
        (partial / "README.md").write_text(card, encoding="utf-8")


def _write_transformer(run: Run, ckpt: Path, config: Config, folder: Path) -> None:
    """A student that was trained whole, as export-pipeline writes it. Its tensors come from the checkpoint alone: no model is
    built, which would set PyTorch's default data type under the steps."""
    import torch
    from diffusers import WanTransformer3DModel
    from huggingface_hub import save_torch_state_dict

    from dmdtrain.train.checkpoint import has_file
    from dmdtrain.train.setup import student_weights

    values = student_weights(ckpt, "ema" if has_file(ckpt, "ema.safetensors") else "raw")
    exact = WanTransformer3DModel._keep_in_fp32_modules or []
    for name, value in values.items():
        whole = config.model.precision == "fp32" or any(part in name.split(".") for part in exact)
        values[name] = value.to(torch.float32 if whole else torch.bfloat16).contiguous()
    folder.mkdir()
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(values, folder, filename_pattern=pattern, max_shard_size="10GB")
    text = json.dumps(run.base.transformer, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def model_card(repo: str, sampling: dict[str, Any], config: Config, video_size: dict[str, int], *, stock: bool) -> str:
    """README.md: what it is, its steps and guidance, and how it is loaded and called.

    Args:
        video_size: of the call's video. stock: there is a scheduler for WanPipeline.
    """
    from dmdtrain.export import comfyui_sampling, only_these_steps

    base, steps = sampling["base_model"], sampling["timesteps"]
    is_hub_id = (
        "/" in base and not base.startswith(("/", ".", "~")) and base.count("/") == 1 and not Path(base).exists()
    )
    lora = config.student.kind == "lora"
    head = ["library_name: diffusers", "pipeline_tag: text-to-video"]
    head += [f"base_model: {base}"] if is_hub_id else []
    head += ["tags:", "- dmd", "- distillation", *(["- lora"] if lora else [])]
    listed = ", ".join(f"{t:g}" for t in steps)
    kind = f"LoRA of rank {config.student.rank}" if lora else "whole transformer"
    causal = "causal " if sampling["causal"] else ""
    named = base if is_hub_id else Path(base).name
    text = f"""# {repo.rpartition("/")[2]}

A {len(steps)}-step {causal}student of {named} ({kind}), distilled with dmdtrain by distribution matching.
Timesteps {listed}; no guidance (guidance_scale {sampling["guidance_scale"]:g}).
`sampling.json` has all that sampling needs, `config.yaml` the run's configuration.
"""
    if stock:
        size = ", ".join(f"{key}={value}" for key, value in video_size.items())
        text += f"""
```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

pipe = WanPipeline.from_pretrained("{named}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo}")
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("{repo}", subfolder="{SCHEDULER}")
video = pipe("a prompt", {size}, num_inference_steps={len(steps)}, guidance_scale=1.0).frames[0]
```

{only_these_steps(len(steps))}
"""
    elif not lora:
        text += f"""
```python
import torch
from diffusers import WanTransformer3DModel

transformer = WanTransformer3DModel.from_pretrained("{repo}", subfolder="transformer", torch_dtype=torch.bfloat16)
```
"""
    if not stock:
        text += f"""
It is sampled at exactly these timesteps{" block by block" if causal else ""}: each predicts x0, which fresh noise takes
to the next. `dmdtrain export-pipeline` writes a folder whose pipeline does so.
"""
    if lora:
        text += f"\nIn ComfyUI: {comfyui_sampling(sampling)}.\n"
    return "---\n" + "\n".join(head) + "\n---\n\n" + text


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


def main(folder: str, text: str) -> None:
    """Sends a folder; one line on stderr and exit code 1 where that fails."""
    from huggingface_hub import HfApi

    values = json.loads(text)
    repo = values["repo_id"]
    try:
        api = HfApi(library_name="dmdtrain")
        api.create_repo(repo, private=values["private"], exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=values["message"])
    except Exception as error:
        print(_one_line(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
