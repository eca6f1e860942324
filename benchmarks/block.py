"""A checkpointed block that goes through the sequence piece by piece against Diffusers' own: time and peak memory.

    python benchmarks/block.py --size 1.3b --tokens 16384 --out benchmarks/block.json

Forward and backward of one block with a LoRA adapter, and a timestep for the video or for each frame, in turn in one process:
`stock` is WanTransformerBlock under torch.utils.checkpoint, `split` is what runs here. Peaks are of live storages, above the
weights and the inputs. The gradients of both must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from dmd_step import SIZES
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmdtrain.models.block import BlockCheckpoints, split_blocks
from dmdtrain.train.accounting import LiveBytes
from dmdtrain.train.setup import device_of_this_machine

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
FRAMES = 16


def block_of(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    shape = SIZES[size]
    torch.manual_seed(0)
    model = nn.Module()
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    block = WanTransformerBlock(
        width, shape["ffn_dim"], shape["num_attention_heads"], shape["qk_norm"], shape["cross_attn_norm"], shape["eps"]
    )
    model.blocks = nn.ModuleList([block.to(device, dtype).requires_grad_(False)])
    rank = min(128, width // 4)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False), model)
    return model


def pass_of(call: Callable[..., torch.Tensor], inputs: list[Any], probe: torch.Tensor) -> None:
    hidden, *rest = inputs
    hidden.grad = None
    call(hidden, *rest).backward(probe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = device_of_this_machine()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SIZES[args.size]
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    new = partial(torch.randn, device=device, dtype=dtype)
    angles = torch.randn(1, args.tokens, 1, shape["attention_head_dim"] // 2, device=device).repeat_interleave(2, -1)
    context, probe = new(1, 512, width), new(1, args.tokens, width)
    rows = []
    for per_frame in (False, True):
        hidden = new(1, args.tokens, width).requires_grad_()
        temb = new(1, FRAMES, 6, width) if per_frame else new(1, 6, width)
        of_tokens = temb.repeat_interleave(args.tokens // FRAMES, 1) if per_frame else temb
        stock, split = block_of(args.size, device, dtype), block_of(args.size, device, dtype)
        split_blocks(split)
        checkpoints = BlockCheckpoints(on_host=False)
        calls = {
            "stock": (partial(checkpoint, stock.blocks[0], use_reentrant=False), of_tokens),
            "split": (partial(checkpoints, split.blocks[0], torch.enable_grad), temb),
        }
        row: dict[str, Any] = {"timesteps": FRAMES if per_frame else 1}
        times: dict[str, list[float]] = {name: [] for name in calls}
        gradients = []
        for name, (call, given) in calls.items():
            with LiveBytes() as live:
                pass_of(call, [hidden, context, given, (angles.cos(), angles.sin())], probe)
            row[f"peak_gib_{name}"] = round(live.peak / 2**30, 4)
            gradients.append(hidden.grad)
        error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
        assert error < (1e-4 if dtype == torch.float32 else 0.03), error
        for _ in range(args.repeats):
            for name, (call, given) in calls.items():
                started = time.perf_counter()
                pass_of(call, [hidden, context, given, (angles.cos(), angles.sin())], probe)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
        row |= {f"seconds_{name}": round(statistics.median(found), 4) for name, found in times.items()}
        ratios = [b / a for a, b in zip(times["stock"], times["split"], strict=True)]
        row["seconds_split_over_stock"] = round(statistics.median(ratios), 4)
        rows.append(row | {"difference_of_the_gradient": float(f"{error:.2g}")})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": args.size,
        "tokens": args.tokens,
        "rows": rows,
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
