"""Teacher, student and fake score: adapters on one shared frozen base, or separate models; switching between them.

A role is (module, adapter or None). Every role of a module runs through the same weights; what differs is which adapter
its LoRA layers apply. The switch sets just that: `requires_grad` is fixed once and never touched again, and a gradient
checkpoint carries the role of its forward, so that the recompute inside `backward` runs as the role that made it, whichever
is active by then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dmdtrain.models.attention import norm_queries_and_keys
from dmdtrain.models.block import BlockCheckpoints, compile_blocks, split_blocks
from dmdtrain.models.causal import CausalView, View, install

RoleName = Literal["teacher", "student", "fake_score"]


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter: output scaled by alpha / rank; `targets` are ends of module names."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Role:
    module: nn.Module
    adapter: str | None


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in module.modules() if isinstance(m, BaseTunerLayer)]


def _activate(layers: list[BaseTunerLayer], adapter: str | None) -> None:
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


class Roles:
    """The roles over their modules.

    Args:
        base: the student's base. Frozen; a role that is trained whole gets its own copy.
        teacher: another teacher, or None for the base itself.
        trained: "student" and, in training, "fake_score": an adapter on `base`, or None for a full copy in `full_dtype`.
        adapter_dtype: of LoRA weights. causal: the student's passes may be given a view.
        gradient_checkpointing: a block's input is all that a pass with gradient keeps of it. checkpoints_on_host: in host
            memory. checkpoint_replay: also in passes of one temporal block through a cache.
        autocast: passes run under autocast, which casts what a LoRA layer sees; without, PEFT does, and its float32 copies
            of activations are kept for backward.
        compile_backend: of torch.compile, for the transformers' blocks; None: they are not compiled.
        init_lora_weights: False makes LoRA B random instead of zero (for tests).
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        teacher: nn.Module | None = None,
        trained: dict[str, AdapterSpec | None],
        full_dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype = torch.float32,
        causal: bool = False,
        gradient_checkpointing: bool = False,
        checkpoints_on_host: bool = False,
        checkpoint_replay: bool = True,
        autocast: bool = False,
        compile_backend: str | None = None,
        init_lora_weights: bool = True,
    ):
        for model in (base, *([] if teacher is None else [teacher])):
            norm_queries_and_keys(model)
            split_blocks(model)
        # Copies first: they are copies of the bare base, without adapters.
        copies = {name: cast_weights(copy.deepcopy(base), full_dtype) for name, spec in trained.items() if spec is None}
        base.requires_grad_(False)
        self.roles: dict[str, Role] = {
            "teacher": Role(base if teacher is None else teacher.requires_grad_(False), None)
        }
        for name, spec in trained.items():
            if spec is None:
                self.roles[name] = Role(copies[name], None)
            else:
                add_adapter(base, name, spec, adapter_dtype, init_lora_weights)
                self.roles[name] = Role(base, name)
        # PEFT leaves only the newest adapter trainable. From here on nothing touches requires_grad.
        for name in trained:
            for parameter in self.parameters(name):
                parameter.requires_grad_(True)
        self._layers = {id(role.module): _tuner_layers(role.module) for role in self.roles.values()}
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.cast_input_dtype_enabled = not autocast
        self._active: dict[int, str | None] = {}
        student = self.roles["student"].module if causal else None
        self._holders = {id(student): install(student)} if causal else {}
        self._checkpoint_replay = checkpoint_replay
        for module in {id(role.module): role.module for role in self.roles.values()}.values():
            self._switch(module, None, None)
            module.eval()
            module.condition_embedder.register_forward_hook(self._for_the_head)  # type: ignore[union-attr, operator]
            if compile_backend is not None:
                compile_blocks(module, compile_backend)
            if gradient_checkpointing:
                module.enable_gradient_checkpointing(self._checkpoint_of(module, checkpoints_on_host))  # type: ignore[operator]

    def _for_the_head(self, _module: nn.Module, _inputs: Any, embedded: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """What the time embedder gives for each frame, for each token, as the output head wants it; the blocks do not."""
        temb, *rest = embedded
        return (temb.repeat_interleave(self._frame_tokens, 1) if temb.ndim == 3 else temb), *rest

    def _switch(self, module: nn.Module, adapter: str | None, view: View | None) -> None:
        if self._active.get(id(module), "") != adapter:
            _activate(self._layers[id(module)], adapter)
            self._active[id(module)] = adapter
        if id(module) in self._holders:
            self._holders[id(module)].view = view

    def _state(self, module: nn.Module) -> tuple[str | None, View | None]:
        holder = self._holders.get(id(module))
        return self._active[id(module)], holder.view if holder is not None else None

    @contextmanager
    def active(self, module: nn.Module, adapter: str | None, view: View | None = None) -> Iterator[None]:
        """Inside, `module` applies `adapter` (None: none at all) and sees `view`; afterwards as before."""
        before = self._state(module)
        self._switch(module, adapter, view)
        try:
            yield
        finally:
            self._switch(module, *before)

    def _checkpoint_of(self, module: nn.Module, on_host: bool) -> Any:
        """A checkpoint function that re-enters the role and the view of the forward. Both are captured: CUDA runs backward on
        another thread."""
        checkpoints = BlockCheckpoints(on_host)

        def checkpointed(block: Any, *args: Any) -> Any:
            adapter, view = self._state(module)
            if not self._checkpoint_replay and isinstance(view, CausalView):
                return block(*args)
            return checkpoints(block, partial(self.active, module, adapter, view), *args)

        return checkpointed

    def flow(
        self,
        name: RoleName,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        view: View | None = None,
    ) -> torch.Tensor:
        """Flow of a role. latents: [B, C, T, H, W], timestep: [B] or [B, T] in [0, 1000], context: [B, L, D] -> as latents."""
        role = self.roles[name]
        dtype = role.module.patch_embedding.weight.dtype  # type: ignore[union-attr]
        _, patch_height, patch_width = role.module.config.patch_size  # type: ignore[union-attr]
        self._frame_tokens = (latents.shape[3] // patch_height) * (latents.shape[4] // patch_width)
        with self.active(role.module, role.adapter, view):
            return role.module(latents.to(dtype), timestep, context.to(dtype), return_dict=False)[0]

    def named_parameters(self, name: RoleName | str) -> dict[str, nn.Parameter]:
        """What a role trains, by names that do not depend on which other roles share the module."""
        role = self.roles[name]
        if role.adapter is None:
            return dict(role.module.named_parameters()) if name != "teacher" else {}
        marker = f".{role.adapter}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in role.module.named_parameters()
            if marker in key and ".lora_" in key
        }

    def parameters(self, name: RoleName | str) -> list[nn.Parameter]:
        return list(self.named_parameters(name).values())

    @contextmanager
    def weights(self, name: RoleName, values: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Inside, the role's trained weights are `values` (None: unchanged); afterwards its own again, to the bit."""
        own = self.named_parameters(name)
        kept = {} if values is None else {key: p.detach().clone() for key, p in own.items()}
        try:
            if values is not None:
                load_parameters(own, values)
            yield
        finally:
            load_parameters(own, kept)


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Copies `values` into the parameters of the same names."""
    for key, value in values.items():
        parameters[key].copy_(value)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts weights in place, except those that Wan keeps in float32 (norms, modulation, time embedder)."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or [])
    for name, parameter in module.named_parameters():
        if dtype == torch.float32 or not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


def check_targets(module: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError where a target is the end of no linear layer's name."""
    layers = [key for key, layer in module.named_modules() if isinstance(layer, (nn.Linear, BaseTunerLayer))]
    for target in targets:
        if not any(key == target or key.endswith(f".{target}") for key in layers):
            raise ValueError(f"{target} is the end of no linear layer's name")


def add_adapter(
    module: nn.Module, name: str, spec: AdapterSpec, dtype: torch.dtype, init_lora_weights: bool = True
) -> None:
    """A LoRA adapter on the matching linear layers.

    Raises:
        ValueError: a target is the end of no linear layer's name.
    """
    check_targets(module, spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=list(spec.targets),
        init_lora_weights=init_lora_weights,
    )
    inject_adapter_in_model(config, module, adapter_name=name)
    for key, parameter in module.named_parameters():
        if f".{name}." in key and ".lora_" in key:
            parameter.data = parameter.data.to(dtype)
