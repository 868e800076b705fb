"""Stages pairs, student and match: v-prediction like the teacher, from whose weights the student starts, one step.

SD-Turbo predicts epsilon. From pure noise that asks for a copy of the input to one part in a hundred.

`student` is regression on (noise, caption, teacher's sample) triples: the layout, in soft pictures. `match` makes them whole and sharp
by distribution matching (DMD; Yin et al. 2024, arXiv 2311.18828), with the triples as its anchor. Some of each batch practises the
lower noise levels of 2- and 4-step sampling.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data.disk import save_tensors
from stages.encoders import build_tokenizer, tokenize
from stages.latents import code
from stages.loop import descend, follow, make_world, run, saved
from stages.teacher import alphas_cumprod, build_unet, clean, error_of_v, load_teacher, muon_and_adamw, noised, sample
from stages.vae import show

FAKE_STEPS = 2  # of the network that learns what the student draws, for each of the student's


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


def one_step(unet, noise, context):
    """A student's picture of pure noise (B, C, 8, 8)."""
    t = torch.full((len(noise),), 999, device=noise.device)
    return clean(unet, (1 - alphas_cumprod()[999]).sqrt() * noise, t, context)


@torch.no_grad()
def away_from_teacher(z, t, eps, teacher, fake, context, empty, guidance):
    """(B, C, 8, 8): from what the guided teacher makes of z, noised to t, to what `fake` makes of it, in units of z's distance to the former.

    fake knows the student's pictures: its score less the teacher's is the gradient of the KL divergence of the two (DMD, eq. 7, 8).
    """
    z_t = noised(z, t, eps)
    prompted, free = clean(teacher, torch.cat([z_t, z_t]), t.repeat(2), torch.cat([context, empty.expand(len(z), -1, -1)])).chunk(2)
    real = free + guidance * (prompted - free)
    return (clean(fake, z_t, t, context) - real) / (z - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=.05)


def train_student(args):
    """Both stages; `match` goes on from the averaged weights of `student`."""
    torch.manual_seed(args.seed + 50)
    matching = args.stage == "match"
    trunk, text = load_teacher(args)
    world, linear = make_world(args), code(args)
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    unet, ema, fake = (build_unet(args).to(args.device) for _ in range(3))
    for network in (unet, ema):
        network.load_state_dict(saved(args, "student", "ema") if matching else trunk.state_dict())
    fake.load_state_dict(trunk.state_dict())
    ema.requires_grad_(False)
    optimizers, fake_optimizers = muon_and_adamw(unet, args.lr), muon_and_adamw(fake, args.lr)
    if args.compile:
        unet.compile()
    shards = [load_file(p, device=args.device) for p in sorted(Path(args.work).glob("pairs_*.safetensors"))]
    noise, target, captions = (torch.cat([s[k] for s in shards]) for k in ("noise", "z", "ids"))
    print(f"{len(noise)} pairs")
    with torch.no_grad():
        empty = text(tokenize(tokenizer, [""], args.device)).last_hidden_state

    def draw(i, g):
        n, several = args.batch, (1 + FAKE_STEPS, args.batch)
        t = torch.tensor([999, 749, 499, 249])[torch.multinomial(torch.tensor([.7, .12, .1, .08]), n, True, generator=g)]
        return (torch.randint(len(noise), (n,), generator=g), t, torch.randn(n, args.channels, 8, 8, generator=g),
                torch.randint(20, 980, several, generator=g), torch.randn(*several, args.channels, 8, 8, generator=g), i)

    def step(batch):
        row, t, fresh, levels, noises = (x.to(args.device) for x in batch[:5])
        eps, z0 = noise[row].float(), target[row].float()
        first = (t == 999).view(-1, 1, 1, 1)
        with torch.no_grad():
            context = text(captions[row].long()).last_hidden_state
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            z = clean(unet, noised(torch.where(first, 0, z0), t, torch.where(first, eps, fresh)), t, context)
            loss = F.smooth_l1_loss(z, z0, beta=.5, reduction="none")
            losses = {"regression": loss.mean()}
            if matching:
                gradient = away_from_teacher(z.detach(), levels[0], noises[0], trunk, fake, context, empty, args.guidance)
                loss = torch.where(first, args.anchor * loss + z * gradient, loss)
        descend(unet, loss.mean(), optimizers)
        follow(ema, unet, batch[5])
        for t, eps in zip(levels[1:], noises[1:]) if matching else ():
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                losses["fake"] = error_of_v(fake, z.detach(), t, eps, context)
            descend(fake, losses["fake"], fake_optimizers)
        return losses

    fixed = world.sample(24, torch.Generator().manual_seed(5))
    start = torch.randn(24, args.channels, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        context, blank = (text(tokenize(tokenizer, c, args.device)).last_hidden_state for c in (fixed.captions, [""] * 24))
        teacher = sample(trunk, start, context, blank, args.guidance)
        return torch.stack([show(args, linear, z) for z in (teacher, one_step(ema, start, context))], 1).flatten(0, 1)

    modules, fakes = {"unet": unet, "ema": ema}, {f"fake_{k}": o for k, o in fake_optimizers.items()}
    run(args.stage, args, modules | {"fake": fake} if matching else modules, optimizers | fakes if matching else optimizers, draw, step, preview)
