"""The Diffusers pipeline of an exported student: the very sampler that trained it, block by block through a KV cache.

`dmdtrain export-pipeline` writes it, with the parts of dmdtrain that it needs, as one file into the exported folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import logging

from dmdtrain.models.causal import CausalView, KVCache, install, sampling_window
from dmdtrain.models.decode import StreamDecoder
from dmdtrain.rollout import BlockLayout, draw_noise, sample


class FewStepWanPipeline(WanPipeline):
    """A few-step Wan student. Its timesteps, blocks and default size are in model_index.json.

    Args:
        timesteps: denoising steps, in (0, 1000]. num_frame_per_block: latent frames of a temporal block; None: the student is
            bidirectional, one block of all frames. independent_first_frame, context_noise, local_attention_frames,
            sink_frames: as it was trained. num_training_frames: latent; longer videos roll on in a window of as many.
            max_sequence_length: text tokens. height, width, num_frames: defaults of a call.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any,
        transformer_2: Any = None,  # this and the next two are WanPipeline's, and unused
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        timesteps: list[float] | None = None,  # from_pretrained takes what has no default for a model
        num_frame_per_block: int | None = None,
        independent_first_frame: bool = False,
        context_noise: float = 0.0,
        num_training_frames: int | None = None,
        local_attention_frames: int | None = None,
        sink_frames: int = 0,
        max_sequence_length: int = 512,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
    ):
        if not timesteps:
            raise ValueError("timesteps: the student's denoising steps are needed")
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps
        )
        self.register_to_config(
            timesteps=timesteps,
            num_frame_per_block=num_frame_per_block,
            independent_first_frame=independent_first_frame,
            context_noise=context_noise,
            num_training_frames=num_training_frames,
            local_attention_frames=local_attention_frames,
            sink_frames=sink_frames,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            num_frames=num_frames,
        )
        self._holder = install(transformer) if num_frame_per_block else None

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        on_block: Callable[[torch.Tensor], None] | None = None,
    ) -> Any:
        """Videos of the prompts.

        Args:
            generator: one on the CPU for each prompt. on_block: given each block's frames [B, 3, t, H, W] in [-1, 1] as soon
                as they are decoded. output_type: "np", "pil", "pt" or "latent" (normalised latents [B, C, T, H, W]).
        """
        config = self.config
        steps = list(config.timesteps)
        if num_inference_steps not in (None, len(steps)) or guidance_scale not in (0, 1):
            raise ValueError(f"this student runs in {len(steps)} steps with guidance_scale 1")
        height, width, num_frames = height or config.height, width or config.width, num_frames or config.num_frames
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.check_inputs(prompts, None, height, width)
        multiple = self.vae_scale_factor_spatial * max(self.transformer.config.patch_size[1:])
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}; they are {height} and {width}")
        if generator is None:
            generator = [torch.Generator().manual_seed(torch.seed()) for _ in prompts]
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many generators, not {len(generators)}")
        device, dtype = self._execution_device, self.transformer.dtype
        for text in prompts:
            tokens = len(self.tokenizer(prompt_clean(text), verbose=False).input_ids)
            if tokens > config.max_sequence_length:
                logging.get_logger(__name__).warning(
                    f"{text[:60]!r} ...: {tokens} tokens, the first {config.max_sequence_length} are read"
                )
        context, _ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length, device=device
        )
        latent_frames = 1 + (num_frames - 1) // self.vae_scale_factor_temporal
        size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        layout, cache = BlockLayout.single(latent_frames), None
        if self._holder is not None:
            layout = BlockLayout.blocks(latent_frames, config.num_frame_per_block, config.independent_first_frame)
            window = sampling_window(config.local_attention_frames, config.num_training_frames, latent_frames)
            cache = KVCache(window, config.sink_frames, evict=True)

        def denoise(
            latents: torch.Tensor, timestep: torch.Tensor, *, frames: slice, write_cache: bool = False
        ) -> torch.Tensor:
            if self._holder is not None and cache is not None:
                self._holder.view = CausalView(cache, frames, write_cache)
            return self.transformer(latents.to(dtype), timestep, context.to(dtype), return_dict=False)[0]

        def noise(frames: slice) -> torch.Tensor:
            block = (1, self.transformer.config.in_channels, frames.stop - frames.start, *size)
            draws = len(steps) + (config.context_noise > 0)
            return torch.cat([draw_noise(draws, block, g) for g in generators], 1).to(device)

        decoder, parts = StreamDecoder(self.vae), []
        # What brings the codec to the device, of a pipeline with offloading: decoding block by block goes past it.
        offloaded = getattr(self.vae, "_hf_hook", None)
        with self.progress_bar(total=len(layout.sizes)) as progress:
            try:
                for block in sample(denoise, noise, steps, layout, context_timestep=config.context_noise):
                    if offloaded is not None:
                        offloaded.pre_forward(self.vae)
                    frames = block if output_type == "latent" else decoder(block)
                    if on_block is not None:
                        on_block(frames)
                    parts.append(frames.cpu())
                    progress.update()
            finally:
                if self._holder is not None:
                    self._holder.view = None  # and with it the cache
        video = torch.cat(parts, 2)
        if output_type != "latent":
            video = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)
