"""The commands. No logic here; heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmdtrain.train import interrupt

if TYPE_CHECKING:
    from rich.console import Console

    from dmdtrain.config import Config

app = typer.Typer(
    name="dmdtrain",
    help="Distils Wan text-to-video into a student that needs 3 steps instead of 50 (distribution matching distillation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Ckpt = Annotated[Path, typer.Option("--ckpt", help="A checkpoint folder, such as output/run/checkpoints/step-000200.")]
Weights = Annotated[str, typer.Option(help="ema (the average) or raw; default: ema where the checkpoint has one.")]
INPUT_ERROR, STOPPED, UNWRITABLE = 2, 1, 74
# Errors of a disk or a mount, none of a program. Full, quota, limit, read-only, no permission, broken, gone.
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
    # Names that are taken by something else, too long or in a circle; what a file system does not know.
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake of the user's ends in one line and exit code 2, never in a traceback."""
    with interrupt.listening():
        try:
            with _told():
                yield
        except typer.Exit as end:
            interrupt.decide(end.exit_code)
            raise
        interrupt.decide(0)


@contextmanager
def _told() -> Iterator[None]:
    from dmdtrain.config import ConfigError

    _quiet()
    try:
        yield
    except ConfigError as error:
        raise _end(INPUT_ERROR, " ".join(str(error).splitlines())) from None
    except (MemoryError, RuntimeError, OSError) as error:
        from dmdtrain.train.memory import out_of_memory, ran_out

        if ran_out(error):
            raise _end(STOPPED, out_of_memory(error)) from None
        if not isinstance(error, OSError) or error.errno not in DISK:
            raise
        what = f"{error.filename or 'a file'} can not be read or written: {error.strerror}"
        raise _end(UNWRITABLE, what) from None
    except EOFError as error:  # of which Typer would say "Aborted." and no more
        raise RuntimeError("a file ends early; of an import: delete that package's __pycache__") from error
    except KeyboardInterrupt as stop:
        by = stop.asked if isinstance(stop, interrupt.Interrupted) else interrupt.SIGNALS[0]
        raise _end(interrupt.exit_code(by), interrupt.TEXT) from None


def _end(code: int, text: str) -> typer.Exit:
    """The end of a command, told in one line."""
    interrupt.decide(code)
    typer.echo(f"dmdtrain: {text}", err=True)
    return typer.Exit(code)


def _quiet() -> None:
    """Silences chatter of libraries that says nothing about the user's run. Before they are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it sets its logger's level as it is imported
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    for name in ("bitsandbytes", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(file: Path, overrides: list[str]) -> Config:
    """The checked configuration. Its models are looked for at once: what is heavy takes long to import."""
    from dmdtrain.config import load
    from dmdtrain.models.wan import locate

    config = load(file, overrides)
    locate(config.model.base, "model.base")
    if config.model.teacher is not None:
        locate(config.model.teacher, "model.teacher")
    return config


def _console() -> Console:
    from rich.console import Console

    return Console(file=_Output(), markup=False)  # type: ignore[arg-type]


class _Output:
    """Standard output. Lines that a full disk or a closed pipe does not take are lost, characters that a terminal does not know
    are replaced; the command goes on."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except UnicodeEncodeError:
            return sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()


@app.command()
def fit(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/wan_tiny.yaml.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as train.max_steps=100.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest checkpoint of this run; never; or one by its folder, name or step.")
    ] = "auto",
    max_steps: Annotated[int | None, typer.Option(help="The same as --set train.max_steps=N.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="The same as --set output_dir=DIR.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print everything, load no model.")] = False,
) -> None:
    """Train a student.

    Exit codes: 0 done; 1 training can not go on (not finite, out of memory); 2 a mistake in the call, the configuration or a
    file; 74 too many checkpoints could not be saved; 75 stopped by SIGTERM, SIGUSR1 or SIGHUP and 130 by Ctrl-C, after the
    micro-batch in hand, with all that is done saved. The same command goes on.
    """
    with _one_line_errors():
        from dmdtrain.strict_yaml import inline

        overrides = list(set_ or [])
        overrides += [] if max_steps is None else [f"train.max_steps={max_steps}"]
        overrides += [] if output_dir is None else [f"output_dir={inline(output_dir)}"]
        checked = _load(config, overrides)

        from dmdtrain.train.fit import fit as run_fit
        from dmdtrain.train.saver import SavesFailed, TrainingStopped

        try:
            run_fit(checked, resume, _console(), dry_run=dry_run)
        except TrainingStopped as error:
            raise _end(UNWRITABLE if isinstance(error, SavesFailed) else STOPPED, str(error)) from None


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in fit.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file of the cache again; damaged ones are made again.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete from the cache what this configuration does not need.")
    ] = False,
) -> None:
    """Encode ahead what a run needs: its prompts' text, its clips' latents. The same command goes on where it stopped."""
    with _one_line_errors():
        checked = _load(config, list(set_ or []))

        from dmdtrain.train.prepare import prepare as run_prepare

        run_prepare(checked, verify=verify, prune=prune, console=_console())


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    vram: Annotated[float | None, typer.Option(min=1, help="GiB of the GPU.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Its name, such as 4090, l40s, a100-80, h100: memory and speed.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in fit.")] = None,
) -> None:
    """Say what a run needs, from shapes alone: bytes by item, peak by phase, time, and whether it fits. Exit code 1: no."""
    with _one_line_errors():
        from dmdtrain.config import load

        checked = load(config, list(set_ or []))

        from dmdtrain.train.plan import plan as run_plan

        if not run_plan(checked, vram, gpu, _console()):
            raise typer.Exit(STOPPED)


@app.command()
def synthesize(
    config: Annotated[Path, typer.Argument(help="The run's YAML file: teacher, guidance, sizes, denoising steps.")],
    out: Annotated[Path, typer.Option(help="Folder; one that this command made before is gone on with.")],
    prompts: Annotated[Path | None, typer.Option(help="A file as data.prompts, which is the default.")] = None,
    what: Annotated[
        str, typer.Option(help="trajectories (for both kinds of warm-up), latents or videos.")
    ] = "trajectories",
    count: Annotated[int | None, typer.Option(min=1, help="Samples; default: one a prompt.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the teacher.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Sample number i starts from seed + i.")] = 0,
    every_state: Annotated[
        bool, typer.Option("--every-state", help="Keep all states of a trajectory, not the student's alone.")
    ] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in fit.")] = None,
) -> None:
    """Make videos, latents or trajectories with the teacher, for the warm-up of a causal student."""
    with _one_line_errors():
        from dmdtrain.strict_yaml import inline

        overrides = list(set_ or []) + ([] if prompts is None else [f"data.prompts={inline(str(prompts))}"])
        checked = _load(config, overrides)

        from dmdtrain.train.synthesize import synthesize as run_synthesize

        run_synthesize(
            checked,
            out=out,
            what=what,
            count=count,
            steps=steps,
            seed=seed,
            every_state=every_state,
            console=_console(),
        )


@app.command()
def validate(
    ckpt: Ckpt,
    prompts: Annotated[
        Path | None, typer.Option(help="A file as data.prompts; default: the run's validation prompts.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Timesteps, such as 1000,757,522; default: the trained ones.")
    ] = None,
    compare_teacher: Annotated[bool, typer.Option("--compare-teacher", help="Render the teacher beside it.")] = False,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Steps of the teacher.")] = 50,
    count: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Prompt number i starts from seed + i.")] = None,
    frames: Annotated[int | None, typer.Option(help="Video frames, 1 + 4k; default: the run's.")] = None,
    weights: Weights = "",
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/validate/step-N.")] = None,
) -> None:
    """Render fixed prompts from fixed seeds: videos, a contact sheet, scores."""
    with _one_line_errors():
        from dmdtrain.train.commands import validate as run_validate

        run_validate(
            ckpt=ckpt,
            prompts=prompts,
            steps=steps,
            compare_teacher=compare_teacher,
            teacher_steps=teacher_steps,
            count=count,
            seed=seed,
            frames=frames,
            weights=weights,
            out=out,
            console=_console(),
        )


@app.command()
def generate(
    ckpt: Ckpt,
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[Path, typer.Option(help="The .mp4 to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 42,
    frames: Annotated[int | None, typer.Option(help="Video frames, 1 + 4k; default: as in validation.")] = None,
    weights: Weights = "",
) -> None:
    """Make one video from a checkpoint."""
    with _one_line_errors():
        from dmdtrain.train.commands import generate as run_generate

        run_generate(ckpt=ckpt, prompt=prompt, out=out, seed=seed, frames=frames, weights=weights, console=_console())


@app.command("export-lora")
def export_lora(
    ckpt: Ckpt,
    out: Annotated[Path, typer.Option(help="The .safetensors to write; a scheduler folder is put beside it.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="original (or comfyui, the same): Wan's own names, read by ComfyUI, DiffSynth-Studio, LightX2V, Wan2GP, SGLang, "
            "FastVideo and Diffusers. diffusers: its names, read by Diffusers alone.",
        ),
    ] = "original",
    weights: Weights = "",
) -> None:
    """Write the student's LoRA and the scheduler that samples it in the stock WanPipeline; say how ComfyUI samples it."""
    with _one_line_errors():
        from dmdtrain.train.commands import export_lora as run_export

        run_export(ckpt=ckpt, out=out, file_format=file_format, weights=weights, console=_console())


@app.command("export-pipeline")
def export_pipeline(
    ckpt: Ckpt,
    out: Annotated[Path, typer.Option(help="The Diffusers folder to write.")],
    weights: Weights = "",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 or bf16, of the merged transformer; default: bf16, or fp32 where the run's is."),
    ] = None,
) -> None:
    """Write a whole Diffusers folder that makes videos without dmdtrain."""
    with _one_line_errors():
        from dmdtrain.train.commands import export_pipeline as run_export

        run_export(ckpt=ckpt, out=out, weights=weights, precision=precision, console=_console())


@app.command("import-config")
def import_config(
    config: Annotated[Path, typer.Argument(help="SimpleTuner's config.json of a DMD run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The YAML to write; it must not exist.")] = Path("run.yaml"),
    data: Annotated[
        Path | None, typer.Option(help="Its multidatabackend.json; default: what the configuration names.")
    ] = None,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="A student of one block, without the settings of blocks.")
    ] = False,
) -> None:
    """Translate a configuration of SimpleTuner, key by key. Exit code 1: some were refused."""
    with _one_line_errors():
        from dmdtrain.simpletuner.importer import import_config as run_import

        text, complete = run_import(config, data, out, causal=not bidirectional)
        typer.echo(f"{text}wrote {out}; next: dmdtrain fit {out} --dry-run")
        if not complete:
            raise typer.Exit(STOPPED)


config_app = typer.Typer(
    help="Look at a configuration: what it resolves to, its schema, its reference.", no_args_is_help=True
)
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as in fit.")] = None,
) -> None:
    """Print every value of a configuration and where it is from: file, --set, default, or derived from others."""
    with _one_line_errors():
        from dmdtrain.config import build, read
        from dmdtrain.reference import show

        overrides = list(set_ or [])
        values, origins = read(config, overrides)
        typer.echo(show(build(values, str(config), overrides), origins), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, with which editors complete and check it."""
    from dmdtrain.reference import schema_text

    typer.echo(schema_text(), nl=False)


@config_app.command("docs")
def config_docs() -> None:
    """Print the reference page of all keys in Markdown."""
    from dmdtrain.reference import page

    typer.echo(page(), nl=False)


def main() -> None:
    interrupt.listen()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None where the caller closed it)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        app()
    except BrokenPipeError:
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(UNWRITABLE)  # of what Typer writes itself, such as --help
    finally:
        _drain()


def _drain() -> None:
    """Writes out what standard output still holds. Python would do so as it exits, and turn a failure into exit code 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            typer.echo(f"dmdtrain: the last lines of the output are lost: {error.strerror}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
