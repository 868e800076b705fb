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
from stages.teacher import STEPS, build_unet, denoiser, error_of_v, load_teacher, muon_and_adamw
from stages.vae import show

FAKE_STEPS = 2  # of the network that learns what the student draws, for each of the student's


def make_pairs(args):
    """Sample the teacher: `steps` batches of (noise, caption, z0) into pairs_SEED.safetensors."""
    unet, text = load_teacher(args)
    teacher = denoiser(unet)
    if args.compile:
        unet.compile()
    world, tokenizer = make_world(args), build_tokenizer(Path(args.work) / "tokenizer")
    g = torch.Generator().manual_seed(900 + args.seed)
    rows = {"noise": [], "z": [], "ids": []}
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        empty = text(tokenize(tokenizer, [""], args.device)).last_hidden_state
        for _ in tqdm(range(args.steps), desc="pairs", mininterval=5):
            ids = tokenize(tokenizer, world.sample(args.batch, g).captions, args.device)
            noise = torch.randn(args.batch, args.channels, 8, 8, generator=g).to(args.device)
            z = teacher.sample(noise, text(ids).last_hidden_state, STEPS, empty, args.guidance)
            for k, v in (("noise", noise.half()), ("z", z.half()), ("ids", ids.short())):
                rows[k].append(v)
    save_tensors(Path(args.work) / f"pairs_{args.seed}.safetensors", {k: torch.cat(v) for k, v in rows.items()})


@torch.no_grad()
def away_from_teacher(z, t, eps, teacher, fake, context, empty, guidance):
    """(B, C, 8, 8): from what the guided teacher makes of z, noised to t, to what `fake` makes of it, in units of z's distance to the former.

    fake knows the student's pictures: its score less the teacher's is the gradient of the KL divergence of the two (DMD, eq. 7, 8).
    """
    z_t = teacher.add_noise(z, eps, t)
    real = teacher.denoise(z_t, t, context, empty, guidance)
    return (fake.x0(z_t, t, context) - real) / (z - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=.05)


def train_student(args):
    """Both stages; `match` goes on from the averaged weights of `student`."""
    torch.manual_seed(args.seed + 50)
    matching = args.stage == "match"
    unet, text = load_teacher(args)
    teacher = denoiser(unet)
    world, linear = make_world(args), code(args)
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    student, ema = (denoiser(build_unet(args).to(args.device)) for _ in range(2))
    start = saved(args, "student", "ema") if matching else unet.state_dict()
    for network in (student, ema):
        network.unet.load_state_dict(start)
    ema.requires_grad_(False)
    optimizers = muon_and_adamw(student.unet, args.lr)
    modules, handled = {"unet": student.unet, "ema": ema.unet}, optimizers
    if matching:
        fake = denoiser(build_unet(args).to(args.device))
        fake.unet.load_state_dict(unet.state_dict())
        fake_optimizers = muon_and_adamw(fake.unet, args.lr)
        modules, handled = modules | {"fake": fake.unet}, optimizers | {f"fake_{k}": o for k, o in fake_optimizers.items()}
    if args.compile:
        student.unet.compile()
    shards = [load_file(p, device=args.device) for p in sorted(Path(args.work).glob("pairs_*.safetensors"))]
    noise, target, captions = (torch.cat([s[k] for s in shards]) for k in ("noise", "z", "ids"))
    print(f"{len(noise)} pairs")
    with torch.no_grad():
        empty = text(tokenize(tokenizer, [""], args.device)).last_hidden_state

    def draw(i, g):
        n, several = args.batch, (1 + FAKE_STEPS if matching else 0, args.batch)
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
            z = student.x0(student.add_noise(torch.where(first, 0, z0), torch.where(first, eps, fresh), t), t, context)
            loss = F.smooth_l1_loss(z, z0, beta=.5, reduction="none")
            losses = {"regression": loss.mean()}
            if matching:
                gradient = away_from_teacher(z.detach(), levels[0], noises[0], teacher, fake, context, empty, args.guidance)
                loss = torch.where(first, args.anchor * loss + z * gradient, loss)
        descend(student, loss.mean(), optimizers)
        follow(ema, student, batch[5])
        for t, eps in zip(levels[1:], noises[1:]):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                losses["fake"] = error_of_v(fake, z.detach(), t, eps, context)
            descend(fake, losses["fake"], fake_optimizers)
        return losses

    fixed = world.sample(24, torch.Generator().manual_seed(5))
    fixed_noise = torch.randn(24, args.channels, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        context = text(tokenize(tokenizer, fixed.captions, args.device)).last_hidden_state
        drawn = teacher.sample(fixed_noise, context, STEPS, empty, args.guidance), ema.one_step(fixed_noise, context)
        return torch.stack([show(args, linear, z) for z in drawn], 1).flatten(0, 1)

    run(args.stage, args, modules, handled, draw, step, preview)
