"""Between videos and normalised latents, as `WanPipeline` does it; decoding also block by block."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


def _statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the codec's raw latents, [1, C, 1, 1, 1]."""
    mean, std = (torch.tensor(getattr(vae.config, name), device=device) for name in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


class StreamDecoder:
    """Decodes videos block by block, with what the codec remembers of earlier frames in its own causal feature cache: all
    blocks together give what one `decode` gives, in memory that does not grow with the video."""

    def __init__(self, vae: Any):
        self.vae = vae
        self._features: list[Any] | None = None

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, C, t, H, W] -> [B, 3, 4 t, H', W'] (the first block: 1 + 4 (t - 1)) in [-1, 1], float32."""
        vae = self.vae
        mean, std = _statistics(vae, latents.device)
        hidden = vae.post_quant_conv((latents.float() * std + mean).to(vae.dtype))
        frames = []
        for frame in hidden.split(1, dim=2):
            first = self._features is None
            if self._features is None:
                vae.clear_cache()
                self._features = vae._feat_map
                vae.clear_cache()  # leaves the list that was taken to this video alone
            frames.append(vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=first))
        video = torch.cat(frames, 2)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1, 1).float()


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    """Videos of normalised latents: [B, C, T, H, W] -> [B, 3, 1 + 4 (T - 1), H', W'] in [-1, 1], float32.

    tiled: tile by tile, one video at a time, as the codec's own `tiled_decode` does it.
    """
    if not tiled:
        return StreamDecoder(vae)(latents)
    mean, std = _statistics(vae, latents.device)
    raw = (latents.float() * std + mean).to(vae.dtype)
    return torch.cat([vae.tiled_decode(video, return_dict=False)[0].float() for video in raw.split(1)])


@torch.no_grad()
def encode_videos(vae: Any, videos: torch.Tensor) -> torch.Tensor:
    """Normalised latents of videos, the mode of the codec's posterior: [B, 3, 1 + 4k, H, W] in [-1, 1] -> [B, C, 1 + k, ...]."""
    mean, std = _statistics(vae, videos.device)
    return (vae.encode(videos.float()).latent_dist.mode() - mean) / std
