"""The embedded pair's autoencoder: a linear code of 8 x 8 patches, read by its inverse and a learned residual.

    import data.emoji.autoencoder  # before StableDiffusionPipeline.from_pretrained, which imports no module of its own accord
    vae = PatchAutoencoder.from_pretrained("data/emoji/base/teacher", subfolder="vae")
    z = vae.encode(x).latents     # images (B, 3, H, W) in [-1, 1] -> (B, C, H / 8, W / 8)
    x = vae.decode(z).sample      # and back

Why not AutoencoderTiny or AutoencoderKL: both double the size by repeating pixels before a convolution, so that a code which
is constant over an area decodes to a constant colour there. Both must learn for hours what a matrix of 192 x C numbers knows; here nothing that the code holds can get lost.
"""
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class Block(nn.Module):
    """h + two convolutions of it; (B, width, h, w) both ways."""
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, h):
        return h + self.second(F.leaky_relu(self.first(F.leaky_relu(h, .2)), .2))


class Residual(nn.Module):
    """What a linear decoding (B, 3, H, W) lacks, added to it; nothing at first."""
    def __init__(self, width):
        super().__init__()
        self.inward = nn.Conv2d(12, width, 3, padding=1)                     # 2 x 2 pixels as channels: (B, 12, 32, 32)
        self.early, self.late = Block(width), Block(width)
        self.down, self.up = nn.Conv2d(4 * width, 2 * width, 1), nn.Conv2d(2 * width, 4 * width, 1)
        self.deep = nn.Sequential(Block(2 * width), Block(2 * width))        # (B, 96, 16, 16)
        self.outward = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x):
        h = self.early(self.inward(F.pixel_unshuffle(x, 2)))
        h = h + F.pixel_shuffle(self.up(self.deep(self.down(F.pixel_unshuffle(h, 2)))), 2)
        return x + F.pixel_shuffle(self.outward(self.late(h)), 2)


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """z = basis of every patch - mean, and x = decoder(linear inverse).

    block_out_channels tells diffusers' pipelines the factor of 8 between pixels and latents, and nothing else.
    """

    @register_to_config
    def __init__(self, latent_channels=64, patch=8, width=48, scaling_factor=1.0, block_out_channels=(0, 0, 0, 0)):
        super().__init__()
        self.register_buffer("basis", torch.zeros(latent_channels, 3, patch, patch))  # the code of a patch
        self.register_buffer("back", torch.zeros(latent_channels, 3, patch, patch))   # its pseudo-inverse
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.decoder = Residual(width)

    def set_code(self, basis, mean, back=None):
        """Take the code z = conv2d(x, basis, stride) - mean, read by conv_transpose2d(z + mean, back); basis, back (C, 3, 8, 8), mean (C,).

        Without back it is the pseudo-inverse, which is the best one for principal components.
        """
        self.basis.copy_(basis)
        self.mean.copy_(mean)
        self.back.copy_(torch.linalg.pinv(basis.flatten(1)).T.view_as(basis) if back is None else back)

    def encode(self, x, return_dict=True):
        z = F.conv2d(x, self.basis, stride=self.config.patch) - self.mean.view(1, -1, 1, 1)
        return AutoencoderTinyOutput(latents=z) if return_dict else (z,)

    def linear(self, z):
        """The part of decoding that needs no learning: (B, C, h, w) -> (B, 3, 8 h, 8 w)."""
        return F.conv_transpose2d(z + self.mean.view(1, -1, 1, 1), self.back, stride=self.config.patch)

    def decode(self, z, return_dict=True, generator=None):
        x = self.decoder(self.linear(z))
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, x):
        return self.decode(self.encode(x).latents)
