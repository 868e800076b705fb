"""Stage teacher: v-prediction on Stable Diffusion's schedule."""
from pathlib import Path

import torch
from torch import nn

from data.base import load_pair
from model import Denoiser
from stages.encoders import build_text, build_tokenizer, tokenize
from stages.latents import code, to_latents
from stages.loop import descend, follow, make_world, opened, run, saved
from stages.vae import show


STEPS = 8  # of the teacher's samples
SCHEDULE = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear"}


def build_unet(args):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=args.channels, out_channels=args.channels, block_out_channels=(96, 144), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    unet.set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards on a CPU
    return unet


def denoiser(unet):
    """A UNet with Stable Diffusion's schedule, sampled by DPM-Solver++ (2M; Lu et al. 2022, arXiv 2211.01095)."""
    from diffusers import DPMSolverMultistepScheduler
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing", **SCHEDULE)
    return Denoiser(unet, scheduler).to(next(unet.parameters()).device)


def error_of_v(network, z, t, eps, context):
    """Mean squared error of a Denoiser's v at z (B, C, 8, 8) noised to t (B,)."""
    return (network(network.add_noise(z, eps, t), t, context) - network.target(z, eps, t)).square().mean()


def shipped_teacher(args):
    """State of the teacher's UNet and text encoder as --init holds them."""
    pair = load_pair(args.init, "<v>", "dog", flags={"mixed_precision": "no"})
    return pair.teacher.unet.state_dict(), {k: v[:pair.text.token_id] if v.ndim == 2 and len(v) == pair.text.token_id + 1 else v
                                            for k, v in pair.text.encoder.state_dict().items()}


def load_teacher(args):
    """The teacher's averaged UNet and text encoder."""
    ema = nn.ModuleList([build_unet(args), build_text(build_tokenizer(Path(args.work) / "tokenizer"))])
    ema.load_state_dict(saved(args, "teacher", "ema"))
    return ema.requires_grad_(False).eval().to(args.device)


class Muon(torch.optim.Muon):
    """For contiguous weights of any shape, as matrices (out, rest); steps of AdamW's size (Liu et al. 2025, arXiv 2502.16982)."""
    def __init__(self, weights, lr):
        self.weights = weights
        super().__init__([nn.Parameter(w.detach().view(len(w), -1)) for w in weights], lr=lr, weight_decay=.01, adjust_lr_fn="match_rms_adamw")

    def step(self):
        for matrix, w in zip(self.param_groups[0]["params"], self.weights):
            matrix.grad = w.grad.flatten(1)
        super().step()


def muon_and_adamw(module, lr):
    """Optimizers of a module: Muon for all that multiplies, AdamW for embeddings, norms and biases."""
    matrix = {k: w.ndim > 1 and "embed" not in k for k, w in module.named_parameters()}
    most, rest = ([w for k, w in module.named_parameters() if matrix[k] == m] for m in (True, False))
    return {"muon": Muon(most, lr), "adamw": torch.optim.AdamW(rest, lr=lr, betas=(.9, .99), weight_decay=.01, fused=True)}


def train_teacher(args):
    torch.manual_seed(args.seed)
    world, linear = make_world(args), code(args)
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    unet, text = build_unet(args), build_text(tokenizer)
    if (Path(args.work) / "clip" / "checkpoint.safetensors").exists():
        text.load_state_dict(saved(args, "clip", "text"))
        print("text encoder starts from the clip stage")
    if args.init:
        for module, weights in zip((unet, text), shipped_teacher(args)):
            module.load_state_dict(weights)
    ema = nn.ModuleList([build_unet(args), build_text(tokenizer)]).requires_grad_(False).to(args.device)
    both = nn.ModuleList([unet, text]).to(args.device)
    ema.load_state_dict(both.state_dict())
    optimizers = muon_and_adamw(both, args.lr)
    model, averaged = denoiser(unet), denoiser(ema[0])
    if args.compile:
        unet.compile()

    def draw(i, g):
        n, batch = args.batch * args.noises, opened(world, args, i).sample(args.batch, g)
        dropped, z = torch.rand(args.batch, generator=g) < .1, to_latents(linear, batch.images)
        ids = tokenize(tokenizer, ["" if d else c for c, d in zip(batch.captions, dropped.tolist())])
        t = torch.sigmoid(torch.randn(n, generator=g))
        t = torch.where(torch.rand(n, generator=g) < .3, torch.rand(n, generator=g), t).mul(1000).long().clamp(0, 999)
        t = torch.where(torch.rand(n, generator=g) < .06, 999, t)
        return z.repeat(args.noises, 1, 1, 1), ids, t, torch.randn(n, args.channels, 8, 8, generator=g), i

    def step(batch):
        z, ids, t, eps = (x.to(args.device) for x in batch[:4])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = error_of_v(model, z, t, eps, text(ids).last_hidden_state.repeat(args.noises, 1, 1))
        descend(both, loss, optimizers)
        follow(ema, both, batch[4], .999)
        return {"v": loss}

    fixed = world.sample(24, torch.Generator().manual_seed(5))
    ids, empty = (tokenize(tokenizer, captions, args.device) for captions in (fixed.captions, [""]))
    noise = torch.randn(24, args.channels, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        z = averaged.sample(noise, ema[1](ids).last_hidden_state, STEPS, ema[1](empty).last_hidden_state, args.guidance)
        return torch.stack([fixed.images, show(args, linear, z).cpu()], 1).flatten(0, 1)

    run("teacher", args, {"unet": unet, "text": text, "ema": ema}, optimizers, draw, step, preview)
