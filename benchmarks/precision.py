"""Error of each precision of the frozen base, on the trained miniature: the teacher's flow against float32.

    python benchmarks/precision.py --out benchmarks/precision.json

Relative error |flow - flow32| / |flow32| of conditional passes on the teacher's own videos, noised to the timestep, of captions
that it was not trained on; the mean over videos. Likewise of the text encoder's embeddings of these captions. Everything but
fp32 runs as in training, under bf16 autocast. On a CPU bitsandbytes' LLM.int8 dequantizes in training mode only; here, without
gradient, its activations are int8 as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging as stdlib_logging
import platform
import tempfile
from pathlib import Path

import torch
from diffusers.utils import logging

from dmdtrain.config import load
from dmdtrain.models.causal import AsItIs, CausalView, KVCache
from dmdtrain.models.encode import TextCache
from dmdtrain.models.offload import HostTensor
from dmdtrain.models.quantize import Int8Tensor, multiply_in_int8
from dmdtrain.models.roles import Roles
from dmdtrain.models.wan import find_folder, load_transformer
from dmdtrain.train import setup
from dmdtrain.train.render import Renderer

ROOT = Path(__file__).parents[1]
TIMESTEPS = (999.0, 757.0, 522.0, 200.0)
CASES = {  # name -> (precision, int8 products)
    "bf16": ("bf16", False),
    "int8": ("int8", False),
    "int8, int8_matmul": ("int8", True),
    "int8-llm": ("int8-llm", False),
    "nf4": ("nf4", False),
}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error, size = ((x.float().flatten(1).norm(dim=1)) for x in (found - wanted, wanted))
    return float((error / size).mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    stdlib_logging.getLogger("bitsandbytes").setLevel("ERROR")
    torch.set_flush_denormal(True)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = setup.resolve(load(ROOT / "configs" / "wan_tiny.yaml", [f"output_dir={folder}/run"]))
        prompts = run.validation_prompts[: args.videos]
        text = setup.text_cache(run, cpu)
        renderer = Renderer(run, setup.build_roles(run, cpu, trained=()), text)
        x0 = renderer.teacher(prompts, 0, run.latent_shape, 20, 3.0)
        context = text.get(prompts)
        embeddings = {}
        for precision in ("fp32", "bf16", "int8", "int8-llm", "nf4"):
            cache = TextCache(run.base, Path(folder) / precision, text.length, precision, cpu)
            cache.prepare(prompts)
            embeddings[precision] = cache.get(prompts)
        embedding_errors = {name: round(relative(e, embeddings["fp32"]), 5) for name, e in embeddings.items()}
        del embedding_errors["fp32"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    base = find_folder("wan-tiny", "model.base")

    def flows(model: torch.nn.Module, bf16: bool) -> list[torch.Tensor]:
        roles = Roles(model, trained={})
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return [
                roles.flow("teacher", (1 - t / 1000) * x0 + t / 1000 * noise, torch.full((len(x0),), t), context)
                for t in TIMESTEPS
            ]

    exact = flows(load_transformer(base, "fp32"), False)
    table = {}
    for name, (precision, products) in CASES.items():
        model = load_transformer(base, precision)
        if products:
            multiply_in_int8(model)
        found = flows(model, True)
        table[name] = {f"{t:g}": round(relative(a, b), 5) for t, a, b in zip(TIMESTEPS, found, exact, strict=True)}

    def last_block(store) -> torch.Tensor:
        """Flow of the last of the video's blocks, of a frame each, on clean earlier ones in the cache."""
        roles = Roles(load_transformer(base, "fp32"), trained={"student": None}, causal=True)
        cache, frames = KVCache(store=store), x0.shape[2]
        for frame in range(frames):
            seen = slice(frame, frame + 1)
            last = frame + 1 == frames
            x = 0.5 * (x0 + noise)[:, :, seen] if last else x0[:, :, seen]
            t = torch.full((len(x0),), 500.0 * last)
            out = roles.flow("student", x, t, context, CausalView(cache, seen, write=not last))
        return out

    whole = last_block(AsItIs)
    caches = {"int8": Int8Tensor.of, "host": HostTensor}
    record = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "videos": len(prompts),
        "relative_error_of_the_flow": table,
        "relative_error_of_an_embedding": embedding_errors,
        "relative_error_of_a_block_on_a_kept_cache": {
            k: round(relative(last_block(v), whole), 5) for k, v in caches.items()
        },
    }
    text_out = json.dumps(record, indent=1)
    print(text_out)
    if args.out is not None:
        args.out.write_text(text_out + "\n")


if __name__ == "__main__":
    main()
