"""The VAE's convolutions on single frames: the same weights as two-dimensional convolutions."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d


class FrameConv(QwenImageCausalConv3d):
    """A causal 3-D convolution for one frame, where all but the last slice in time of its kernel meet padding."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """``[b, c, 1, h, w]`` to ``[b, c', 1, h', w']``; no frames came before."""
        if x.shape[2] != 1 or cache_x is not None:
            raise ValueError(f"this VAE was flattened for single frames, and was given {tuple(x.shape)}")
        pad = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], pad).unsqueeze(2)


def for_single_frames(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Change a VAE, in place, to take one frame at a time: the same outputs at a fraction of the work.

    Its parameters stay those of the stock class, so that what is saved loads anywhere.
    """
    for module in vae.modules():
        if type(module) is QwenImageCausalConv3d:
            module.__class__ = FrameConv
    return vae
