"""AdamW of bf16 weights whose weight decay is not rounded away."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optimi
import torch

# Relative decay that is applied at once. bf16 has 8 bits, and so has the compensation of a weight, which lies up to 2^-9 of the
# weight: less than this would be lost in the compensation as it is in the weight.
GRAIN = 2.0**-14


class KahanAdamW(optimi.AdamW):
    """optimi's AdamW, with the decay fed to the Kahan compensation.

    optimi multiplies the weight by 1 - lr * weight_decay; bf16 rounds that to 1 below 2^-9, so that usual rates never decay.
    Here what some steps add up to, `GRAIN` or more, is put into the compensation of a weight, which carries it over.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None, param: torch.Tensor | None = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            self._decay(group)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure, param)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _decay(self, group: dict[str, Any]) -> None:
        """At every Nth step the decay of N steps at this step's rate: nothing but the step's number needs to be kept."""
        usual = self.defaults["lr"] * group["weight_decay"]
        if usual == 0:
            return
        steps = math.ceil(GRAIN / usual)
        if (int(group.get("step", 0)) + 1) % steps:
            return
        decayed = [p for p in group["params"] if p.grad is not None]
        # A weight has no compensation before its first step, nor one that is wider than bf16 at all.
        kept = [self.state[p].get("kahan_comp", p) if p.dtype == torch.bfloat16 else p for p in decayed]
        torch._foreach_add_(kept, decayed, alpha=-steps * group["lr"] * group["weight_decay"])
