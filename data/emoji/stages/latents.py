"""The code between pictures and latents, 64 px -> C x 8 x 8: linear, and known before any training.

Its C channels are the leading principal components of 8 x 8 patches, so the diffusion networks need not wait for a decoder.
Decoded linearly, 24 of them keep 26.6 dB.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data.base import load_pair
from data.disk import save_tensors
from stages.loop import make_world
from world import World

PATCH = 8


def code(args):
    """{basis, back (C, 3, 8, 8), mean (C,)}: z = conv2d(x, basis, stride 8) - mean has unit mean variance; back decodes.

    With --init it is that of its autoencoder, by least squares on pictures: it is linear, or nearly so.
    """
    path = Path(args.work) / "code.safetensors"
    if not path.exists():
        x = make_world(args, "pretrain+extra", World.P).sample(512 if args.init else 4096, torch.Generator().manual_seed(7)).images
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
        if args.init:
            pair = load_pair(args.init, "<v>", "dog", flags={"mixed_precision": "no"})
            with torch.no_grad():
                z = torch.cat([pair.encode(part) for part in x.split(64)]).permute(0, 2, 3, 1).reshape(len(patches), -1).double()
            into = torch.linalg.lstsq(F.pad(patches, (0, 1), value=1), z).solution
            basis, mean = into[:-1].T, -into[-1]
        else:
            centre = patches.mean(0)
            values, vectors = torch.linalg.eigh((patches - centre).T @ (patches - centre) / len(patches))
            values, vectors = values.flip(0)[:args.channels], vectors.flip(1)[:, :args.channels]
            scale = values ** -.25  # half-way to white: fine detail stays quieter than colour, so it is denoised last
            basis = (vectors * scale / (values * scale ** 2).mean().sqrt()).T
            mean = basis @ centre
        back = torch.linalg.lstsq(patches @ basis.T, patches).solution
        save_tensors(path, {"basis": basis.reshape(-1, 3, PATCH, PATCH).float(), "mean": mean.float(), "back": back.view(-1, 3, PATCH, PATCH).float()})
    return load_file(path)


def channels(args):
    """Width of the code that a stage works in."""
    if (Path(args.work) / "code.safetensors").exists():
        return len(code(args)["mean"])
    return json.loads((Path(args.init) / "teacher" / "vae" / "config.json").read_text())["latent_channels"] if args.init else args.channels


def to_latents(linear, x):
    """Images (B, 3, 64, 64) in [-1, 1] to diffusion latents (B, C, 8, 8)."""
    return F.conv2d(x, linear["basis"], stride=PATCH) - linear["mean"].view(1, -1, 1, 1)


def from_latents(linear, z):
    """The linear decoding: diffusion latents (B, C, 8, 8) to images (B, 3, 64, 64) in about [-1, 1]."""
    return F.conv_transpose2d(z + linear["mean"].to(z).view(1, -1, 1, 1), linear["back"].to(z), stride=PATCH)
