"""Stages pairs and student: v-prediction like the teacher, from whose weights it starts, one step.

SD-Turbo predicts epsilon. From pure noise that asks for a copy of the input to one part in a hundred. Regression on (noise, caption,
teacher's sample) triples gives the layout, a small discriminator on latents of fresh real pictures gives the sharpness. A third of each
batch practises the lower noise levels of 2- and 4-step sampling.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from data.disk import save_tensors
from stages.encoders import build_tokenizer, tokenize
from stages.latents import code, to_latents
from stages.loop import average_gradients, follow, make_world, run
from stages.teacher import alphas_cumprod, build_unet, load_teacher, sample
from stages.vae import show


def make_pairs(args):
    """Sample the teacher: `steps` batches of (noise, caption, z0) into pairs_SEED.safetensors."""
    unet, text = load_teacher(args)
    if args.compile:
        unet.compile()
    world, tokenizer = make_world(args), build_tokenizer(Path(args.work) / "tokenizer")
    g = torch.Generator().manual_seed(900 + args.seed)
    rows = {"noise": [], "z": [], "ids": []}
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        empty = text(tokenize(tokenizer, [""] * args.batch, args.device)).last_hidden_state
        for _ in tqdm(range(args.steps), desc="pairs", mininterval=5):
            ids = tokenize(tokenizer, world.sample(args.batch, g).captions, args.device)
            noise = torch.randn(args.batch, args.channels, 8, 8, generator=g).to(args.device)
            z = sample(unet, noise, text(ids).last_hidden_state, empty, args.guidance)
            for k, v in (("noise", noise.half()), ("z", z.half()), ("ids", ids.short())):
                rows[k].append(v)
    save_tensors(Path(args.work) / f"pairs_{args.seed}.safetensors", {k: torch.cat(v) for k, v in rows.items()})


class LatentCritic(nn.Module):
    """Realness of latents (B, C, 8, 8) under a caption embedding (B, 128): one logit per 4 x 4 cell, (B, 1, 4, 4)."""
    def __init__(self, channels, width=128):
        super().__init__()
        conv = nn.utils.parametrizations.spectral_norm
        self.body = nn.Sequential(
            conv(nn.Conv2d(channels, width, 3, padding=1)), nn.LeakyReLU(.2),
            conv(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(.2),
            conv(nn.Conv2d(width, width, 4, stride=2, padding=1)), nn.LeakyReLU(.2),
            conv(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(.2))
        self.real, self.caption = nn.Conv2d(width, 1, 1), nn.Linear(128, width)

    def forward(self, z, caption):
        h = self.body(z)
        return self.real(h) + (h * self.caption(caption)[:, :, None, None]).mean(1, keepdim=True)


def train_student(args):
    torch.manual_seed(args.seed + 50)
    trunk, text = load_teacher(args)
    world, linear = make_world(args), code(args)
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    unet, ema, critic = build_unet(args).to(args.device), build_unet(args).requires_grad_(False).to(args.device), LatentCritic(args.channels).to(args.device)
    unet.load_state_dict(trunk.state_dict())
    ema.load_state_dict(trunk.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(.5, .99), weight_decay=.01, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=4e-4, betas=(.5, .99), fused=True)
    if args.compile:
        unet.compile()
    shards = [load_file(p, device=args.device) for p in sorted(Path(args.work).glob("pairs_*.safetensors"))]
    noise, target, captions = (torch.cat([s[k] for s in shards]) for k in ("noise", "z", "ids"))
    print(f"{len(noise)} pairs")
    bar = alphas_cumprod().to(args.device)

    def predict(unet, z_t, t, context):
        a = bar[t].sqrt().view(-1, 1, 1, 1)
        return a * z_t - (1 - a ** 2).sqrt() * unet(z_t, t, context).sample.float()

    def draw(i, g):
        n, batch = args.batch, world.sample(args.batch, g)
        t = torch.tensor([999, 749, 499, 249])[torch.multinomial(torch.tensor([.7, .12, .1, .08]), n, True, generator=g)]
        return (torch.randint(len(noise), (n,), generator=g), t, torch.randn(n, args.channels, 8, 8, generator=g),
                to_latents(linear, batch.images), tokenize(tokenizer, batch.captions), i)

    def step(batch):
        row, t, fresh, real, real_ids = (x.to(args.device) for x in batch[:5])
        eps, z0 = noise[row].float(), target[row].float()
        a = bar[t].sqrt().view(-1, 1, 1, 1)
        first = (t == 999).view(-1, 1, 1, 1)
        z_t = torch.where(first, 0, a * z0) + (1 - a ** 2).sqrt() * torch.where(first, eps, fresh)
        with torch.no_grad():
            encoded, real_caption = text(captions[row].long()), text(real_ids).pooler_output
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            z = predict(unet, z_t, t, encoded.last_hidden_state)
        # student
        regression = F.smooth_l1_loss(z, z0, beta=.5)
        realness = -critic(z, encoded.pooler_output).mean()
        g_r, g_d = (torch.autograd.grad(l, z, retain_graph=True)[0].norm() for l in (regression, realness))
        weight = (args.gan * g_r / g_d.clamp(min=1e-8)) * min(1, batch[5] / 500)
        optimizer.zero_grad()
        (regression + weight * realness).backward()
        average_gradients(unet)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        follow(ema, unet, batch[5])
        # critic
        on_real, on_fake = critic(real, real_caption), critic(z.detach(), encoded.pooler_output)
        on_wrong = critic(real, real_caption.roll(1, 0))
        loss_d = F.relu(1 - on_real).mean() + .75 * F.relu(1 + on_fake).mean() + .25 * F.relu(1 + on_wrong).mean()
        critic_optimizer.zero_grad()
        loss_d.backward()
        average_gradients(critic)
        critic_optimizer.step()
        return {"regression": regression, "realness": -realness, "critic": loss_d}

    fixed = world.sample(24, torch.Generator().manual_seed(5))
    start = torch.randn(24, args.channels, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        context, empty = (text(tokenize(tokenizer, c, args.device)).last_hidden_state for c in (fixed.captions, [""] * 24))
        t = torch.full((24,), 999, device=args.device)
        z = predict(ema, (1 - bar[999]).sqrt() * start, t, context)
        teacher = sample(trunk, start, context, empty, args.guidance)
        return torch.stack([show(args, linear, teacher), show(args, linear, z)], 1).flatten(0, 1)

    run("student", args, {"unet": unet, "ema": ema, "critic": critic}, {"unet": optimizer, "critic": critic_optimizer}, draw, step, preview)
