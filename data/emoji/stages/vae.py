"""Stage vae: a residual on top of the linear decoding, first for exactness, then for realness, which brings back most of what the code left out."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.emoji.autoencoder import PatchAutoencoder
from measure import edge_energy
from stages.encoders import build_vision
from stages.latents import PATCH, code, from_latents, to_latents
from stages.loop import descend, follow, make_world, opened, run, saved


def build_vae(args):
    return PatchAutoencoder(latent_channels=args.channels, patch=PATCH).to(memory_format=torch.channels_last)


def show(args, linear, z):
    """Decode with the autoencoder if its stage has run, else linearly."""
    path = Path(args.work) / "vae" / "checkpoint.safetensors"
    if path.exists():
        vae = build_vae(args).to(args.device)
        vae.load_state_dict(saved(args, "vae", "ema"))
        return vae.decode(z).sample
    return from_latents(linear, z)


def edges(x):
    """Horizontal and vertical differences of (B, C, H, W), flattened into one row per image."""
    return torch.cat([(x[..., 1:] - x[..., :-1]).flatten(1), (x[..., 1:, :] - x[..., :-1, :]).flatten(1)], 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return -10 * (F.mse_loss(a, b) / 4).log10()


class PixelCritic(nn.Module):
    """Realness of images (B, 3, 64, 64): one logit per 4 x 4 pixels, (B, 1, 16, 16).

    Without spectral norm: bounded slopes cannot tell pictures apart that differ by 35 dB, and a blind critic is noise.
    """
    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(12, width, 3, padding=1), nn.LeakyReLU(.2), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(.2), nn.Conv2d(2 * width, 1, 1))

    def forward(self, x):
        return self.body(F.pixel_unshuffle(x, 2))


def train_vae(args):
    """Residual of the decoder: exact in the first --sharpen of the steps, then also perceptually close and real to a critic.

    It reads noisy codes, as the diffusion networks will give them: a student's differ from its teacher's by .3 of a leading
    component's deviation and .9 of the last one's. Features are those of the clip stage, if it has run.
    """
    torch.manual_seed(args.seed)
    vae, ema = build_vae(args).to(args.device), build_vae(args).to(args.device).requires_grad_(False)
    world, linear = make_world(args, "pretrain+extra"), code(args)
    vae.set_code(**linear)
    ema.load_state_dict(vae.state_dict())
    critic = PixelCritic().to(args.device, memory_format=torch.channels_last)
    optimizers = {"vae": torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(.9, .99), weight_decay=1e-4, fused=True)}
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.lr / 2, betas=(.5, .99), fused=True)
    fixed = world.sample(256, torch.Generator().manual_seed(1)).images
    vision = None
    if (Path(args.work) / "clip" / "checkpoint.safetensors").exists():
        vision = build_vision("clip").eval().requires_grad_(False).to(args.device)
        vision.load_state_dict(saved(args, "clip", "vision"))

    def perceived(x):  # unit feature vectors at each place of each stage
        return [F.normalize(h, dim=1) for h in vision(x, output_hidden_states=True).hidden_states]

    def draw(i, g):
        x = opened(world, args, i).sample(args.batch, g).images
        z = to_latents(linear, x)
        return x, z + args.vae_noise * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g), i

    def step(batch):
        x, z, i = batch[0].to(args.device, memory_format=torch.channels_last), batch[1].to(args.device), batch[2]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = vae.decode(z).sample.float()
        losses = {"l1": F.l1_loss(out, x), "edge": F.l1_loss(edges(out), edges(x)), "psnr": psnr(out, x)}
        loss = losses["l1"] + losses["edge"]
        ramp = min(1, max(0, i / args.steps - args.sharpen) / .05)
        if ramp > 0:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                if vision is not None:
                    losses["seen"] = sum((a.float() - b.float()).square().sum(1).mean() for a, b in zip(perceived(out), perceived(x)))
                    loss = loss + .1 * ramp * losses["seen"]
                realness = critic(out).float().mean()
            g_l, g_r = (torch.autograd.grad(v, out, retain_graph=True)[0].norm() for v in (loss, realness))
            loss = loss - ramp * args.gan * (g_l / g_r.clamp(min=1e-8)) * realness
        descend(vae, loss, optimizers)
        follow(ema, vae, i, .998)
        if ramp > 0:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                on_real, on_fake = critic(x).float(), critic(out.detach()).float()
            losses["critic"] = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
            critic_optimizer.zero_grad()
            losses["critic"].backward()
            critic_optimizer.step()
        return losses

    @torch.no_grad()
    def preview():
        z = to_latents(linear, fixed).to(args.device)
        rows = {"linear": ema.linear(z).cpu(), "learned": torch.cat([ema.decode(c).sample for c in z.split(64)]).cpu()}
        print(" ".join(f"{k}: {psnr(v, fixed):.2f} dB, edges {edge_energy(v) / edge_energy(fixed):.3f} of real" for k, v in rows.items()), flush=True)
        return torch.stack([fixed[:32], *(v[:32] for v in rows.values())], 1).flatten(0, 1)

    run("vae", args, {"vae": vae, "ema": ema, "critic": critic}, optimizers | {"critic": critic_optimizer}, draw, step, preview)
