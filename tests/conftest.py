"""Real tiny Wan models: small random ones in a Diffusers folder, made once a session."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from dmdtrain.cli import app
from dmdtrain.train.interrupt import SIGNALS

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
for number in SIGNALS:  # a shell ignores Ctrl-C for what it starts with &
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)


def tiny_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    """A random Wan transformer whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**(TRANSFORMER | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.5)
    return model.eval()


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """Tests are of the CPU, but for those with the mark `gpu`."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of commands that a test starts


@pytest.fixture
def one_thread():
    """Models of a few thousand weights: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory) -> Path:
    """A complete Wan folder with random weights: 4 latent channels, 8 x 8 x 4 compression, 16-d text."""
    torch.manual_seed(7)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog", "runs", "sleeps", "on", "grass"]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    folder = tmp_path_factory.mktemp("models") / "wan-random"
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def broken_folder(wan_folder, tmp_path) -> Callable[..., Path]:
    """A copy of the model folder after an edit."""

    def make(edit: Callable[[Path], object]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(wan_folder, folder)
        edit(folder)
        return folder

    return make


@pytest.fixture
def settings(wan_folder, tmp_path) -> dict:
    """The configuration of a run of seconds on the random folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat runs\na blue dog sleeps\na cat on grass\na dog\n\na dog\n")
    return {
        "model": {"base": str(wan_folder), "precision": "fp32", "text_encoder_precision": "fp32"},
        "student": {"rank": 4, "alpha": 8},
        "fake_score": {"rank": 4, "alpha": 4, "lr": 1e-3},
        "dmd": {"generator_update_interval": 2},
        "rollout": {"num_training_frames": 3},
        "data": {"prompts": str(prompts), "resolution": "32x48", "max_sequence_length": 8},
        "optimizer": {"lr": 1e-3},
        "train": {
            "max_steps": 4,
            "batch_size": 2,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "ema": {"decay": 0.5},
        "checkpoint": {"every": 2, "keep": 2},
        "validation": {
            "every": 4,
            "count": 2,
            "prompts": ["a red dog", "a blue cat sleeps"],
            "num_frames": 5,
            "resolution": "32x32",
        },
        "output_dir": str(tmp_path / "run"),
    }


def run_cli(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def done(*args: object) -> str:
    """What a command that must succeed printed, on one line."""
    result = run_cli(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def refused(*args: object, says: str | list[str]) -> None:
    """The command ends in exit code 2 and one line that holds all of `says`."""
    result = run_cli(*args)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("dmdtrain: ")
    for part in [says] if isinstance(says, str) else says:
        assert part in line, (part, line)
