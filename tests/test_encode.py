"""Text embeddings and decoding against WanPipeline; what validation writes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import done, run_cli
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from dmdtrain.config import ConfigError
from dmdtrain.data.decode import read_clip
from dmdtrain.miniature import clips
from dmdtrain.models.decode import decode_latents
from dmdtrain.models.encode import TextCache, encoder_digest
from dmdtrain.models.wan import WanFolder, find_folder, load_scheduler, load_vae
from dmdtrain.train import setup
from dmdtrain.train.validation import contact_sheet, gif_bytes, score, to_frames, write_mp4, write_samples

LENGTH = 12
CPU = torch.device("cpu")
PROMPTS = [
    "a red cat runs",
    "a red dog",
    "",
    "  a   red\n\tcat  ",  # cleaned to "a red cat"
    "a cat &amp;amp; a dog",  # escaped twice
    "a cat &lt;runs&gt; on grass",
    "a &quot;blue&quot; dog \u201csleeps\u201d \ufb01n \u00e2\u20ac\u201d",  # a ligature and a broken dash for ftfy
    "an unknown word",
    "a cat " * 40,  # truncated
    "a cat runs on grass on grass on grass",
]


@pytest.fixture
def folder(wan_folder) -> WanFolder:
    return find_folder(str(wan_folder), "model.base")


@pytest.fixture(scope="module")
def pipeline(wan_folder) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cache(folder: WanFolder, path, length: int = LENGTH, precision: str = "fp32") -> TextCache:
    return TextCache(folder, path, length, precision, CPU)


# ---------------------------------------------------------------------------------------------------- text


@torch.no_grad()
@pytest.mark.parametrize("length", [8, LENGTH, 64])
def test_embeddings_are_the_pipelines(folder, pipeline, tmp_path, length):
    text = cache(folder, tmp_path, length)
    text.prepare(PROMPTS)
    ours = text.get(PROMPTS)
    theirs, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=length)
    assert ours.shape == theirs.shape == (len(PROMPTS), length, 16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert len({row.numpy().tobytes() for row in ours}) == len(PROMPTS)  # no two are the same


@torch.no_grad()
def test_embeddings_of_an_encoder_in_bf16(folder, wan_folder, tmp_path):
    pipeline = WanPipeline.from_pretrained(wan_folder, vae=None, transformer=None, torch_dtype=torch.bfloat16)
    text = cache(folder, tmp_path, precision="bf16")
    text.prepare(PROMPTS)
    theirs, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(text.get(PROMPTS), theirs.float())


def test_cleaning_and_truncation(folder, tmp_path):
    text = cache(folder, tmp_path)
    text.prepare(PROMPTS)
    text.prepare(["a red cat", "a cat & a dog"])
    assert torch.equal(text.get([PROMPTS[3]]), text.get(["a red cat"]))
    assert torch.equal(text.get([PROMPTS[4]]), text.get(["a cat & a dog"]))
    rows = {prompt: text.get([prompt])[0] for prompt in PROMPTS}

    def tokens(prompt: str) -> int:
        return int((rows[prompt].abs().sum(-1) > 0).sum())

    assert tokens("a red cat runs") == 5  # with the end token
    assert tokens("") == 1
    assert tokens("a cat " * 40) == LENGTH
    assert (rows["a red dog"][4:] == 0).all() and (rows["a red dog"][:4] != 0).any(-1).all()


def test_order_batches_and_repeats_do_not_matter(folder, tmp_path):
    text = cache(folder, tmp_path / "one")
    text.prepare(PROMPTS)
    other = cache(folder, tmp_path / "two")
    other.prepare([*PROMPTS[::-1], *PROMPTS], batch_size=3)
    assert other.rows(PROMPTS) == text.rows(PROMPTS)
    assert set(other.shards.rows) == set(text.shards.rows) == set(text.rows(PROMPTS))
    order = [4, 1, 1, 9, 0]
    torch.testing.assert_close(other.get([PROMPTS[i] for i in order]), text.get(PROMPTS)[order], rtol=1e-5, atol=1e-6)


def test_rows_are_kept_to_the_true_length_and_reused(wan_folder, tmp_path, monkeypatch):
    """What is cached comes without the encoder; what is not asks for it."""
    copied = tmp_path / "model"
    shutil.copytree(wan_folder, copied)
    folder = find_folder(str(copied), "model.base")
    text = cache(folder, tmp_path / "cache")
    text.prepare(PROMPTS)
    wanted = text.get(PROMPTS)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    stored = load_file(file)
    assert set(stored) == set(text.rows(PROMPTS)) and len(stored) == len(PROMPTS)
    lengths = sorted(len(row) for row in stored.values())
    assert lengths[0] == 1 and lengths[-1] == LENGTH and lengths[4] < LENGTH
    time = file.stat().st_mtime_ns

    class Asked(Exception):
        pass

    def ask(*_):
        raise Asked

    monkeypatch.setattr("dmdtrain.models.encode.load_text_encoder", ask)
    again = cache(folder, tmp_path / "cache")
    again.prepare(PROMPTS[::-1])
    assert torch.equal(again.get(PROMPTS), wanted)
    assert file.stat().st_mtime_ns == time and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    with pytest.raises(Asked):
        again.prepare(["a new prompt"])
    for other in (
        cache(folder, tmp_path / "cache", LENGTH + 1),
        cache(folder, tmp_path / "cache", LENGTH, "bf16"),
    ):
        with pytest.raises(Asked):
            other.prepare(PROMPTS[:1])


def test_broken_weights_are_told(wan_folder, tmp_path):
    shutil.copytree(wan_folder, tmp_path / "model")
    folder = find_folder(str(tmp_path / "model"), "model.base")
    (tmp_path / "model" / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ConfigError, match="text_encoder holds broken weights"):
        cache(folder, tmp_path / "cache").prepare(PROMPTS)


def test_embeddings_that_are_not_finite_are_refused(wan_folder, tmp_path):
    """Kept, they would spoil every step."""
    shutil.copytree(wan_folder, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"][3] = 3e38  # finite, unlike what it makes
    save_file(weights, file, metadata={"format": "pt"})
    text = cache(find_folder(str(tmp_path / "model"), "model.base"), tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"model\.text_encoder_precision: fp32: the embedding of 'a red dog' is not fin"
    ):
        text.prepare(["a red dog"])
    assert text.missing(["a red dog"]) and not list((tmp_path / "cache").glob("*.safetensors"))


def test_little_is_held_in_memory(folder, tmp_path, monkeypatch):
    """A row is 6 tokens of 64 bytes at most; 1000 bytes hold two of them."""
    monkeypatch.setattr("dmdtrain.models.encode.RECENT_BYTES", 1000)
    monkeypatch.setattr("dmdtrain.models.encode.SHARD_PROMPTS", 16)
    prompts = [f"a {x} {y} runs on" for x in ("red", "blue", "cat", "dog", "a") for y in ("red", "cat", "dog", "grass")]
    text = cache(folder, tmp_path)
    text.prepare(prompts)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    alone = {prompt: cache(folder, tmp_path).get([prompt]) for prompt in prompts}
    for chosen in (prompts, prompts[::-1], prompts[:3] * 2):
        assert torch.equal(text.get(chosen), torch.cat([alone[prompt] for prompt in chosen]))
        held = sum(row.nbytes for row in text._recent.values())
        assert held == text._recent_bytes <= 1000 and len(text._recent) == 2


def test_an_encoder_is_known_by_its_content(wan_folder, tmp_path):
    """Not by where it lies, when it was written or which version saved it."""
    moved = tmp_path / "moved"
    shutil.copytree(wan_folder, moved)
    config = moved / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"transformers_version": "4.0", "_name_or_path": "x"}))
    digest = encoder_digest(find_folder(str(wan_folder), "model.base"))
    assert encoder_digest(find_folder(str(moved), "model.base")) == digest

    def edited(name: str, edit) -> str:
        file = moved / name
        before = file.read_bytes()
        file.write_bytes(edit(before))
        found = encoder_digest(find_folder(str(moved), "model.base"))
        file.write_bytes(before)
        return found

    flip = lambda data: data[:-1] + bytes([data[-1] ^ 1])  # noqa: E731
    others = [
        edited("text_encoder/model.safetensors", flip),
        edited(
            "text_encoder/config.json",
            lambda data: data.replace(
                b'"relative_attention_max_distance": 128', b'"relative_attention_max_distance": 64'
            ),
        ),
        edited("tokenizer/tokenizer.json", lambda data: data.replace(b"grass", b"sand ")),
    ]
    assert len({digest, *others}) == 4
    assert encoder_digest(find_folder(str(moved), "model.base")) == digest


def test_a_model_of_the_hub_is_known_before_its_weights_are_here(wan_folder, tmp_path):
    folder = dataclasses.replace(find_folder(str(wan_folder), "model.base"), hub=True, path=tmp_path / "0a1b2c")
    assert encoder_digest(folder) == "0a1b2c"


def test_prompts_that_were_not_prepared_are_no_zeros(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"^data.cache_dir: \S+ has no embedding of 'a cat'"):
        cache(folder, tmp_path).get(["a cat"])


# ---------------------------------------------------------------------------------------------------- video


def test_decoding_is_the_pipelines(folder, pipeline):
    """The pipeline is handed the latents after its only step, and decodes them."""
    latents = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        ["a cat", "a dog"],
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=8,
        callback_on_step_end=lambda pipe, step, timestep, values: {"latents": latents},
        output_type="pt",
    ).frames  # [B, T, 3, H, W] in [0, 1]
    ours = decode_latents(load_vae(folder), latents)
    assert ours.shape == (2, 3, 9, 32, 48) and ours.dtype == torch.float32
    torch.testing.assert_close(ours / 2 + 0.5, theirs.permute(0, 2, 1, 3, 4), rtol=0, atol=1e-5)
    assert ours.std() > 0.01
    assert not torch.allclose(ours, decode_latents(load_vae(folder), latents * 0.5), atol=1e-3)


def test_the_folders_scheduler_with_another_shift(folder):
    assert load_scheduler(folder).config.shift == folder.flow_shift == 3.0
    scheduler = load_scheduler(folder, 8.0)
    scheduler.set_timesteps(2)
    assert scheduler.config.shift == 8.0
    # The scheduler's smallest sigma, 1/1000, is shifted twice: when it is built and when it is asked for steps.
    assert scheduler.timesteps[0] == 1000


def test_flow_shift_of_the_released_scheduler(folder, tmp_path, wan_folder):
    """Wan's own folders name it flow_shift."""
    shutil.copytree(wan_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "scheduler")
    released = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    released.save_pretrained(tmp_path / "model" / "scheduler")
    folder = find_folder(str(tmp_path / "model"), "model.base")
    assert folder.flow_shift == 5.0
    assert isinstance(load_scheduler(folder, 8.0), UniPCMultistepScheduler)
    assert load_scheduler(folder, 8.0).config.flow_shift == 8.0
    assert load_scheduler(folder).config.flow_shift == 5.0


def gradient_video(frames: int, height: int, width: int) -> torch.Tensor:
    """[3, T, H, W]: red rises from left to right, green from top to bottom, blue with time."""
    video = torch.empty(3, frames, height, width)
    video[0] = torch.linspace(-1, 1, width)
    video[1] = torch.linspace(-1, 1, height)[:, None]
    video[2] = torch.linspace(-1, 1, frames)[:, None, None]
    return video


def test_frames_keep_values_and_enlarge_small_videos():
    video = gradient_video(5, 32, 48)
    frames = to_frames(video)
    assert frames.shape == (5, 128, 192, 3) and frames.dtype == np.uint8
    assert frames[0, 0, 0].tolist() == [0, 0, 0] and frames[-1, -1, -1].tolist() == [255, 255, 255]
    assert (frames[:, :4, :4] == frames[:, :1, :1]).all()  # whole factor: a pixel becomes 4 x 4
    assert to_frames(video, min_edge=33).shape == (5, 64, 96, 3)
    assert to_frames(gradient_video(1, 128, 160)).shape == (1, 128, 160, 3)
    middle = to_frames(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 128, 5).contiguous(), min_edge=5)
    assert middle[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("size", "stored"), [((32, 48), (128, 192)), ((144, 160), (144, 160))])
def test_mp4_files_can_be_played(tmp_path, size, stored):
    video = gradient_video(9, *size)
    write_mp4(tmp_path / "a.mp4", video, 12)
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.name == "h264" and stream.average_rate == 12
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == (9, *stored, 3)
    assert np.abs(frames.astype(float) - to_frames(video)).mean() < 4  # colours and order survive


PATCHES = ((192, 48, 32), (32, 176, 64), (48, 80, 224), (128, 128, 128))


@pytest.mark.parametrize(
    "size", [(480, 832), (832, 480), (720, 1280), (1280, 704), (704, 1280), (32, 32), (32, 608), (336, 176)]
)
def test_colours_of_mp4_files_survive_at_every_size(tmp_path, size):
    """Read by ourselves, and by PyAV, which goes by what the file says: a player's guess is not asked for."""
    rows, columns = (torch.arange(edge) * 2 // edge for edge in size)
    video = torch.tensor(PATCHES).view(2, 2, 3)[rows][:, columns].permute(2, 0, 1)[:, None] / 127.5 - 1
    write_mp4(tmp_path / "a.mp4", video.expand(-1, 5, -1, -1), 16, min_edge=1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
    assert {(f.colorspace, f.color_range, f.color_primaries, f.color_trc) for f in frames} == {(1, 1, 1, 1)}  # BT.709
    ours = (read_clip(tmp_path / "a.mp4", 5, *size).permute(1, 2, 3, 0) + 1) * 127.5
    for found in (np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), ours.numpy()):
        middles = found[:, size[0] // 4 :: size[0] // 2, size[1] // 4 :: size[1] // 2].reshape(5, 4, 3)
        assert np.abs(middles - np.array(PATCHES, float)).max() <= 2.01


@pytest.mark.parametrize("edited", [False, True])
def test_colours_of_mp4_files_of_before_are_those_that_were_written(tmp_path, edited):
    """They were BT.601 and did not say so. What FFmpeg's own command wrote, which leaves its name, is BT.709 from 720 lines."""
    rows, columns = (torch.arange(edge) * 2 // edge for edge in (720, 64))
    picture = torch.tensor(PATCHES).view(2, 2, 3)[rows][:, columns].to(torch.uint8).numpy()
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = 720, 64, "yuv420p"
        if edited:
            stream.metadata["encoder"] = "Lavc libx264"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    found = (read_clip(tmp_path / "a.mp4", 5, 720, 64).permute(1, 2, 3, 0) + 1) * 127.5
    away = (found[:, 180::360, 16::32].reshape(5, 4, 3) - torch.tensor(PATCHES)).abs().amax()
    assert away > 8 if edited else away <= 2.01, away


def test_gifs_hold_every_frame():
    with Image.open(io.BytesIO(gif_bytes(gradient_video(7, 32, 32), 8))) as gif:
        assert (gif.n_frames, gif.size) == (7, (128, 128))
        assert gif.info["duration"] == pytest.approx(125, abs=5)


def test_contact_sheet_shows_prompts_by_models():
    def flat(*colour: float) -> torch.Tensor:
        return torch.tensor(colour).view(3, 1, 1, 1).expand(3, 9, 32, 48)

    red, green, blue = (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0)
    columns = {
        "teacher": torch.stack([flat(*red), flat(*green)]),
        "student": torch.stack([flat(*blue), gradient_video(9, 32, 48)]),
    }
    sheet = contact_sheet(columns, ["one", "two"], num_shown=3)
    height, width, gap, line, between = 64, 96, 8, 16, 2
    strip = 3 * (width + between) - between
    assert sheet.size == (gap + 2 * (strip + gap), line + 2 * (line + height + gap))

    def pixel(column: int, row: int, shown: int, x: int = width // 2, y: int = height // 2) -> tuple:
        left = gap + column * (strip + gap) + shown * (width + between)
        return sheet.getpixel((left + x, line + row * (line + height + gap) + line + y))

    for shown in range(3):
        assert pixel(0, 0, shown) == (255, 0, 0)
        assert pixel(0, 1, shown) == (0, 255, 0)
        assert pixel(1, 0, shown) == (0, 0, 255)
    # First, middle and last frame; upright.
    assert [pixel(1, 1, shown)[2] for shown in range(3)] == [0, 128, 255]
    assert pixel(1, 1, 0, x=1, y=1)[:2] == (0, 0) and pixel(1, 1, 0, x=width - 1, y=1)[:2] == (255, 0)


def test_score_is_for_the_miniatures_captions_alone():
    captions = [clips.ALL_CAPTIONS[i] for i in (0, 77, 200)]
    prompts = [str(c) for c in captions]
    videos = clips.render(captions, 21, torch.Generator().manual_seed(0))
    assert score(videos, prompts) == dict.fromkeys(("colour", "shape", "motion", "background", "all"), 1.0)
    assert score(videos, prompts[::-1])["all"] < 0.5
    assert score(videos, [*prompts[:2], "a cat"]) is None
    assert score(videos.repeat_interleave(2, -1), prompts) is None
    assert score(videos[:, :, :1], prompts) is None


def test_samples_are_written_with_their_facts(tmp_path):
    captions = [clips.ALL_CAPTIONS[i] for i in (5, 130)]
    prompts = [str(c) for c in captions]
    videos = clips.render(captions, 9, torch.Generator().manual_seed(0))
    columns = {"student": videos, "teacher 3 steps": videos * 0}
    results = write_samples(tmp_path / "out", columns, prompts, {"seed": 4, "é": "ü"}, 8)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "000_student.mp4",
        "000_teacher_3_steps.mp4",
        "001_student.mp4",
        "001_teacher_3_steps.mp4",
        "contact_sheet.png",
        "results.json",
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == results
    assert results["seed"] == 4 and results["é"] == "ü" and results["prompts"] == prompts
    assert results["scores"]["student"]["all"] == 1 and results["scores"]["teacher 3 steps"]["all"] == 0
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 2 * 5 * 64
    foreign = write_samples(tmp_path / "other", {"student": videos}, ["a cat", "a dog"], {}, 8)
    assert foreign["scores"] == {}


# ---------------------------------------------------------------------------------------------------- what is cut


LONG, NEGATIVE = "a red cat runs on grass " * 3, "a blue dog sleeps " * 4  # 19 and 17 tokens with the end token
CUT = {LONG: 19, NEGATIVE: 17}


def told_of_cut(said: str) -> dict[str, int]:
    """What a command said is cut, once each: the prompt's beginning and its tokens."""
    found = re.findall(r"  '([^']*)' \.\.\.: (\d+) tokens, the first 8 are read\n", said)
    assert len(found) == len(dict(found)) and said.count("warning: ") == bool(found)
    return {beginning: int(tokens) for beginning, tokens in found}


@pytest.fixture
def says_what_is_cut(settings, tmp_path):
    """Runs a command of a run of two steps whose prompts are given; what it says of what is cut."""
    settings["train"]["max_steps"] = 2
    settings["rollout"] |= {"causal": True, "num_frame_per_block": 1}
    settings["warmup"] = {"kind": "teacher_forcing", "steps": 1, "num_samples": 2, "teacher_steps": 2}
    settings["validation"] |= {"every": 0}
    ckpt = tmp_path / "run" / "checkpoints" / "step-000002"

    def run(command: str, prompt: str, negative: str) -> dict[str, int]:
        file, texts = tmp_path / "run.yaml", tmp_path / "texts.txt"
        texts.write_text(f"a cat\n{prompt}\n")
        settings["data"] |= {"prompts": str(texts), "negative_prompt": negative}
        settings["validation"] |= {"negative_prompt": negative}
        file.write_text(yaml.safe_dump(settings))
        if command in ("validate", "generate") and not ckpt.exists():
            done("fit", file)
        one = {
            "validate": ["--ckpt", ckpt, "--prompts", texts, "--out", tmp_path / f"videos {len(prompt)}"],
            "generate": ["--ckpt", ckpt, prompt, "--out", tmp_path / f"{len(prompt)}.mp4"],
            "synthesize": [file, "--out", tmp_path / f"made {len(prompt)}", "--steps", 2, "--what", "latents"],
        }
        result = run_cli(command, *one.get(command, [file]))
        assert result.exit_code == 0, result.output
        return told_of_cut(result.output)

    return run


@pytest.mark.parametrize("command", ["fit", "prepare", "synthesize", "validate", "generate"])
def test_every_command_names_the_prompts_that_it_cuts(command, says_what_is_cut):
    """Also where they are in the cache already, and once where a warm-up's videos are of them too."""
    wanted = {prompt[:60]: tokens for prompt, tokens in CUT.items()}
    assert says_what_is_cut(command, LONG, NEGATIVE) == wanted
    if command == "prepare":
        assert says_what_is_cut("prepare", LONG, NEGATIVE) == wanted
        assert says_what_is_cut("fit", LONG, NEGATIVE) == wanted


@pytest.mark.parametrize("command", ["prepare", "validate", "generate"])
def test_prompts_of_the_whole_length_are_not_cut(command, says_what_is_cut):
    assert says_what_is_cut(command, "a red cat runs on grass a", "a " * 7) == {}


def test_of_many_prompts_that_are_cut_some_are_named(says_what_is_cut, monkeypatch):
    monkeypatch.setattr(setup, "MOST_TOLD", 1)
    assert says_what_is_cut("prepare", LONG, NEGATIVE) == {LONG[:60]: 19}
