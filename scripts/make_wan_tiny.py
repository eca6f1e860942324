"""Builds and trains wan-tiny, the miniature of Wan 2.1 that ships in `src/dmdtrain/assets/wan-tiny`.

    python scripts/make_wan_tiny.py --work build/wan-tiny                # everything, less than an hour on 2 cores
    python scripts/make_wan_tiny.py --work build/wan-tiny --stage codec  # stop after a stage

Three stages, each seeded and restartable (its state is saved every minute, a restart goes on from there):

codec    An `AutoencoderKLWan` for the clips of `dmdtrain.miniature.clips`. It is trained as an image codec whose frames
         meet only in the temporal resampling layers: every 3x3x3 convolution uses its last temporal tap alone, the past
         ones stay zero. That makes training several times cheaper (2-D convolutions over all frames at once) and decoding as
         good at 81 frames as at the 13 that it was trained on. Gate: 97 % of reconstructions must be scored right.
teacher  A `WanTransformer3DModel` with flow matching on the normalised latents, 10 % caption dropout, weights averaged.
publish  Writes the Diffusers folder and `training_record.json`; scores teacher and codec.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dmdtrain.flow import add_noise, shift_sigma
from dmdtrain.miniature.clips import ALL_CAPTIONS, Caption, render
from dmdtrain.miniature.scorer import accuracy

CODEC = dict(
    base_dim=24,
    z_dim=16,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    patch_size=2,
    in_channels=12,
    out_channels=12,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)
TEXT = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
TEXT_LENGTH = 16  # tokens; one batch in eight is padded to the pipeline's default of 512 instead
TEACHER = dict(
    patch_size=(1, 1, 1),
    num_attention_heads=4,
    attention_head_dim=32,
    text_dim=TEXT["d_model"],
    freq_dim=128,
    ffn_dim=512,
    num_layers=6,
)
TEACHER_LR, TEACHER_SHIFT, CAPTION_DROPOUT, EMA_DECAY, GUIDANCE = 2e-3, 3.0, 0.1, 0.999, 3.0
SHORT_CLIPS, LONG_CLIPS = 24_000, 6_000
# Latent frames, source, batch, text length of the batches, drawn at random: about the same number of tokens in each.
SHAPES_CYCLE = (
    [(6, "short", 64, TEXT_LENGTH)] * 4 + [(21, "long", 18, TEXT_LENGTH)] * 2 + [(12, "long", 32, TEXT_LENGTH)]
)
SHAPES_CYCLE += [(6, "short", 64, 512)]
CODEC_FRAMES, CODEC_BATCH, CODEC_LR, CODEC_KL = 13, 16, 2.5e-3, 1e-5
# The first steps see single frames: videos from the start stall on the flat background.
CODEC_IMAGE_STEPS, CODEC_IMAGE_BATCH = 1200, 64
OBJECT_WEIGHT = 10  # extra loss weight of saturated pixels: the object covers a tenth of the picture


# ---------------------------------------------------------------------------------------------------- codec, in parallel
# `AutoencoderKLWan` codes chunk by chunk through feature caches. With the past taps at zero the same numbers come from all
# frames at once; `check_codec` compares the two. Frames are folded into the batch: [B*T, C, H, W].


def _conv(layer, x):
    return F.conv2d(x, layer.weight[:, :, -1], layer.bias, padding=layer.kernel_size[-1] // 2)


def _norm(layer, x):
    length = torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-12)  # F.normalize with a cheaper backward
    return x * length * (layer.scale * layer.gamma.view(1, -1, 1, 1))


def _resnet(layer, x):
    skip = _conv(layer.conv_shortcut, x) if isinstance(layer.conv_shortcut, WanCausalConv3d) else x
    x = _conv(layer.conv1, F.silu(_norm(layer.norm1, x)))
    return skip + _conv(layer.conv2, F.silu(_norm(layer.norm2, x)))


def _mid(block, x):
    x = _resnet(block.resnets[0], x)
    x = block.attentions[0](x.unsqueeze(2)).squeeze(2)
    return _resnet(block.resnets[1], x)


def _unfold(x, batch):
    return x.unflatten(0, (batch, -1)).transpose(1, 2)  # [B, C, T, H, W]


def _fold(x):
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def encode_parallel(vae, videos):
    """Posterior of `videos` [B, 3, T, H, W]; equals `vae.encode` while past taps are zero."""
    batch, enc = len(videos), vae.encoder
    x = _conv(enc.conv_in, _fold(patchify(videos, vae.config.patch_size)))
    for layer in enc.down_blocks:
        if hasattr(layer, "resample"):
            x = layer.resample(x)
            if len(x) > batch:
                x = _unfold(x, batch)
                x = _fold(torch.cat([x[:, :, :1], layer.time_conv(x)], 2))
        else:
            x = _resnet(layer, x)
    x = _conv(enc.conv_out, F.silu(_norm(enc.norm_out, _mid(enc.mid_block, x))))
    return DiagonalGaussianDistribution(_unfold(_conv(vae.quant_conv, x), batch))


def decode_parallel(vae, latents):
    """Unclamped videos; clamped they equal `vae.decode` while past taps are zero (its clamp would kill gradients)."""
    batch, dec = len(latents), vae.decoder
    x = _mid(dec.mid_block, _conv(dec.conv_in, _conv(vae.post_quant_conv, _fold(latents))))
    for block in dec.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        if block.upsamplers is not None:
            up = block.upsamplers[0]
            if len(x) > batch:
                x = _unfold(x, batch)
                later = up.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T-1, H, W]
                later = later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
                x = _fold(torch.cat([x[:, :, :1], later], 2))
            x = up.resample(x)
    x = _conv(dec.conv_out, F.silu(_norm(dec.norm_out, x)))
    return unpatchify(_unfold(x, batch), vae.config.patch_size)


def new_codec(seed: int) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CODEC)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, :-1] = 0
                module.weight[:, :, -1] *= math.sqrt(3)  # a third of the fan-in is left
        vae.quant_conv.bias[CODEC["z_dim"] :] = -6  # log-variance: start with little noise on the latents
    return vae


@torch.no_grad()
def check_codec(vae, videos) -> float:
    """Largest difference between the parallel codec and the stock, chunk by chunk one."""
    latents = vae.encode(videos).latent_dist.mode()
    parallel = encode_parallel(vae, videos).mode()
    decoded = vae.decode(latents).sample - decode_parallel(vae, latents).clamp(-1, 1)
    return max(float((latents - parallel).abs().max()), float(decoded.abs().max()))


def draw_captions(n: int, generator: torch.Generator) -> list[Caption]:
    return [ALL_CAPTIONS[i] for i in torch.randint(len(ALL_CAPTIONS), (n,), generator=generator).tolist()]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class ConvolutionMuon:
    """Muon (Jordan et al., 2024) for convolutions, each flattened to a matrix [out, in * kernel]; PyTorch's takes matrices
    only. On this codec it reaches in 100 steps what AdamW reaches in 500. Of causal kernels the last tap alone is updated.
    """

    def __init__(self, weights: list[torch.Tensor], momentum: float = 0.9):
        self.weights, self.momentum = weights, momentum
        self.buffers = [torch.zeros_like(w) for w in weights]

    @staticmethod
    def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix."""
        x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x.T if tall else x).float()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            if weight.grad is None:
                continue
            buffer.lerp_(weight.grad, 1 - self.momentum)
            update, target = weight.grad.lerp(buffer, self.momentum), weight
            if weight.shape[2:] == (3, 3, 3):
                update, target = update[:, :, -1], weight[:, :, -1]
            matrix = self.orthogonalise(update.flatten(1))
            target -= (lr * 0.2 * max(matrix.shape) ** 0.5 * matrix).view_as(target)  # the size of an Adam update

    def state_dict(self) -> dict:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        self.buffers = state["buffers"]


class Progress:
    """Prints and records a line at times; saves the state of a stage so that it can go on after a stop."""

    def __init__(self, folder: Path, name: str):
        self.file, self.name = folder / f"{name}.pt", name
        self.log: list[dict] = []
        self.seconds, self._mark, self._saved = 0.0, time.time(), time.time()

    def resume(self, **parts) -> int:
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        for key, part in parts.items():
            part.set_state(state[key]) if isinstance(part, torch.Generator) else part.load_state_dict(state[key])
        self.log, self.seconds = state["log"], state["seconds"]
        print(f"{self.name}: goes on from step {state['step']}", flush=True)
        return state["step"]

    def save(self, step: int, force: bool = False, **parts) -> None:
        if not force and time.time() - self._saved < 60:
            return
        self.tick()
        states = {k: p.get_state() if isinstance(p, torch.Generator) else p.state_dict() for k, p in parts.items()}
        torch.save(states | {"step": step, "log": self.log, "seconds": self.seconds}, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").rename(self.file)
        self._saved = time.time()

    def tick(self) -> None:
        now = time.time()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def line(self, **values) -> None:
        self.tick()
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        self.log.append(values | {"seconds": round(self.seconds)})
        print(f"{self.name}:", json.dumps(self.log[-1]), flush=True)


def train_codec(work: Path, steps: int, seed: int) -> AutoencoderKLWan:
    vae = new_codec(seed)
    kernels = [m.weight for m in vae.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    chosen = {id(p) for p in kernels}
    muon = ConvolutionMuon(kernels)
    adamw = torch.optim.AdamW([p for p in vae.parameters() if id(p) not in chosen], lr=CODEC_LR, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(work, "codec")
    parts = dict(vae=vae, muon=muon, adamw=adamw, generator=generator)
    first = progress.resume(**parts)
    encode, decode = (torch.compile(f, dynamic=False) for f in (encode_parallel, decode_parallel))
    for step in range(first, steps):
        lr = adamw.param_groups[0]["lr"] = learning_rate(step, steps, CODEC_LR)
        frames, batch = (1, CODEC_IMAGE_BATCH) if step < CODEC_IMAGE_STEPS else (CODEC_FRAMES, CODEC_BATCH)
        videos = render(draw_captions(batch, generator), frames, generator)
        weight = 1 + OBJECT_WEIGHT * (videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)) / 2
        posterior = encode(vae, videos)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = decode(vae, posterior.mean + posterior.std * noise) - videos
        loss = (weight * (error.abs() + 2 * error.square())).mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        (loss + CODEC_KL * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"codec: gradient norm {norm} at step {step}")
        adamw.step()
        muon.step(lr)
        vae.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            psnr = -10 * math.log10(float(error.detach().square().mean()) / 4)
            progress.line(step=step + 1, loss=loss.item(), kl=kl.item(), psnr=psnr)
        if step % 500 == 499 or step == steps - 1:
            progress.line(step=step + 1, **score_codec(vae, seed=seed + 1))
        progress.save(step + 1, force=step == steps - 1, **parts)
    return vae


@torch.no_grad()
def score_codec(vae, seed: int, n: int = 96, num_frames: int = 21) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    captions = draw_captions(n, generator)
    videos = render(captions, num_frames, generator)
    rebuilt = decode_parallel(vae, encode_parallel(vae, videos).mode()).clamp(-1, 1)
    psnr = -10 * math.log10(float((rebuilt - videos).square().mean()) / 4)
    return {"score_psnr": psnr} | {f"score_{k}": v for k, v in accuracy(rebuilt, captions).items()}


# ------------------------------------------------------------------------------------------------------------- the text


def new_text(seed: int):
    """A word-level tokenizer for the captions and a frozen random UMT5 encoder, which separates them well enough."""
    words = sorted({word for caption in ALL_CAPTIONS for word in str(caption).split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = Lowercase(), Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(vocabulary), **TEXT)
    return tokenizer, UMT5EncoderModel(config).eval().requires_grad_(False)


@torch.no_grad()
def embed(tokenizer, text_encoder, prompts: list[str], length: int) -> torch.Tensor:
    """[N, length, text_dim], zeros past each prompt's end, as `WanPipeline` makes them."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    hidden = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------- the teacher


@torch.no_grad()
def make_latents(vae, work: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Raw latents of rendered clips, cached in `work`: "short" and "long" ones with their caption numbers."""
    file = work / "latents.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(seed + 2)
    data = {}
    for name, count, num_frames, chunk in (("short", SHORT_CLIPS, 21, 96), ("long", LONG_CLIPS, 81, 24)):
        latents, numbers = [], []
        for _ in range(count // chunk):
            index = torch.randint(len(ALL_CAPTIONS), (chunk,), generator=generator)
            videos = render([ALL_CAPTIONS[i] for i in index.tolist()], num_frames, generator)
            latents.append(encode_parallel(vae, videos).mode().half())
            numbers.append(index)
        data[name] = {"latents": torch.cat(latents), "captions": torch.cat(numbers)}
        print(f"latents: {name} {tuple(data[name]['latents'].shape)}", flush=True)
    torch.save(data, file)
    return data


def latent_statistics(data) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel, each [C, 1, 1, 1]."""
    sample = data["long"]["latents"][:512].float()
    return sample.mean((0, 2, 3, 4))[:, None, None, None], sample.std((0, 2, 3, 4))[:, None, None, None]


def plain_attention(query, key, value, **_):
    """softmax(q k / sqrt(d)) v. On CPUs the backward of the fused kernel is 3 to 6 times slower in bf16 at these sizes."""
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value


def train_teacher(work: Path, vae, steps: int, seed: int):
    data = make_latents(vae, work, seed)
    mean, std = latent_statistics(data)
    tokenizer, text_encoder = new_text(seed)
    prompts = [str(c) for c in ALL_CAPTIONS] + [""]
    contexts = {length: embed(tokenizer, text_encoder, prompts, length) for length in (TEXT_LENGTH, 512)}
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**TEACHER, in_channels=CODEC["z_dim"], out_channels=CODEC["z_dim"])
    torch.nn.init.zeros_(model.proj_out.weight)
    average = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=TEACHER_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=TEACHER_LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(work, "teacher")
    parts = dict(model=model, average=average, muon=muon, adamw=adamw, generator=generator)
    first = progress.resume(**parts)
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, plain_attention
    compiled = torch.compile(model, dynamic=False)

    def pick(high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    running = None
    for step in range(first, steps):
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = learning_rate(step, steps, TEACHER_LR)
        frames, source, batch, length = SHAPES_CYCLE[int(pick(len(SHAPES_CYCLE), 1))]
        rows = pick(len(data[source]["latents"]), batch)
        x0 = (data[source]["latents"][rows, :, :frames].float() - mean) / std
        caption = data[source]["captions"][rows]
        caption = torch.where(torch.rand(batch, generator=generator) < CAPTION_DROPOUT, len(ALL_CAPTIONS), caption)
        sigma = shift_sigma(torch.rand(batch, generator=generator), TEACHER_SHIFT)
        noise = torch.randn(x0.shape, generator=generator)
        noisy = add_noise(x0, noise, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            flow = compiled(noisy, sigma * 1000, contexts[length][caption], return_dict=False)[0]
        loss = (flow.float() - (noise - x0)).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"teacher: gradient norm {norm} at step {step}")
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 200 == 199:
            progress.line(step=step + 1, loss=running)
        if step % 1000 == 999 or step == steps - 1:
            scores = score_teacher(average, vae, contexts[TEXT_LENGTH], mean, std, seed=seed + 3)
            progress.line(step=step + 1, **{f"score_{k}": v for k, v in scores.items()})
        progress.save(step + 1, force=step == steps - 1, **parts)
    F.scaled_dot_product_attention = fused  # the text encoder's attention needs its mask
    return average, tokenizer, text_encoder, mean, std


@torch.no_grad()
def score_teacher(
    model,
    vae,
    contexts,
    mean,
    std,
    seed: int,
    n: int = 96,
    frames: int = 6,
    steps: int = 30,
    guidance: float = GUIDANCE,
) -> dict[str, float]:
    """Accuracy of `n` videos of random captions, sampled by Euler steps on the shifted grid with guidance."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(len(ALL_CAPTIONS), (n,), generator=generator)
    x = torch.randn(n, CODEC["z_dim"], frames, 4, 4, generator=generator)
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1), TEACHER_SHIFT)
    both = torch.cat([contexts[number], contexts[-1:].expand(n, -1, -1)])
    for now, then in itertools.pairwise(sigmas.tolist()):
        timestep = torch.full((2 * n,), now * 1000)
        cond, uncond = model(x.repeat(2, 1, 1, 1, 1), timestep, both, return_dict=False)[0].chunk(2)
        flow = uncond + guidance * (cond - uncond) if guidance != 1 else cond
        x = x + (then - now) * flow
    videos = decode_parallel(vae, x * std + mean).clamp(-1, 1)
    return accuracy(videos, [ALL_CAPTIONS[i] for i in number.tolist()])


# ----------------------------------------------------------------------------------------------------------- publishing


def publish(work: Path, out: Path, vae, average, tokenizer, text_encoder, mean, std, seed: int) -> None:
    """The Diffusers folder with its training record. The stock `WanPipeline` loads it."""
    vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=TEACHER_SHIFT)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=average
    )
    contexts = embed(tokenizer, text_encoder, [str(c) for c in ALL_CAPTIONS] + [""], TEXT_LENGTH)
    scores = {}
    for frames in (6, 12, 21):
        for steps, guidance in ((40, GUIDANCE), (3, GUIDANCE), (3, 1.0)):
            key = f"latent_frames={frames} steps={steps} guidance={guidance}"
            scores[key] = score_teacher(
                average, vae, contexts, mean, std, seed + 5, n=96, frames=frames, steps=steps, guidance=guidance
            )
            print(key, scores[key], flush=True)
    record = {
        "seed": seed,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "codec": {"config": CODEC, "log": torch.load(work / "codec.pt", weights_only=True)["log"]},
        "teacher": {"config": TEACHER, "log": torch.load(work / "teacher.pt", weights_only=True)["log"]},
        "codec_score": score_codec(vae, seed + 4, n=240),
        "codec_score_81_frames": score_codec(vae, seed + 4, n=48, num_frames=81),
        "teacher_score": scores,
    }
    pipeline.save_pretrained(out)
    vae.half().save_pretrained(out / "vae")  # the codec in half precision: 20 MB is the limit for the folder
    vae.float()
    (out / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}: {sum(f.stat().st_size for f in out.rglob('*')) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/wan-tiny"), help="states and caches")
    parser.add_argument("--out", type=Path, default=Path("src/dmdtrain/assets/wan-tiny"))
    parser.add_argument("--stage", choices=["all", "codec", "teacher"], default="all", help="stop after this stage")
    parser.add_argument("--codec-steps", type=int, default=3200)
    parser.add_argument("--teacher-steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)

    vae = train_codec(args.work, args.codec_steps, args.seed).requires_grad_(False)
    difference = check_codec(vae, render(ALL_CAPTIONS[:2], 21, torch.Generator().manual_seed(args.seed)))
    right = score_codec(vae, args.seed + 1, n=240)["score_all"]
    print(f"codec: parallel against stock {difference:.1e}, {right:.1%} of reconstructions right", flush=True)
    if difference > 1e-3 or right < 0.97:
        raise SystemExit("codec: below its gate (97 % of reconstructions right); train it longer with --codec-steps")
    if args.stage == "codec":
        return
    teacher = train_teacher(args.work, vae, args.teacher_steps, args.seed)
    if args.stage == "all":
        publish(args.work, args.out, vae, *teacher, args.seed)


if __name__ == "__main__":
    main()
