"""Pretrain the embedded pair, its training encoders and its judges, stage by stage, on a CPU or a GPU.

    python data/emoji/pretrain.py clip             # image-text encoder; its text tower starts the base's text encoder
    python data/emoji/pretrain.py vae              # autoencoder
    python data/emoji/pretrain.py identity         # instance encoder of the training family
    python data/emoji/pretrain.py judge_clip       # the judges: other architecture, seed and data order
    python data/emoji/pretrain.py judge_identity
    python data/emoji/pretrain.py judge_names      # names the objects of a picture, one or two
    torchrun --nproc_per_node=2 data/emoji/pretrain.py teacher    # one thread a process; plain python works too
    python data/emoji/pretrain.py pairs --seed 0   # teacher samples to distil; any number of seeds, in parallel
    torchrun --nproc_per_node=2 data/emoji/pretrain.py student
    python data/emoji/pretrain.py export           # data/emoji/base in the diffusers layout
    python data/emoji/pretrain.py measure          # what the judges say of it

Each training stage goes on from its checkpoint in --work after a kill, and writes log.txt and preview.png beside it.
"""
import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from safetensors.torch import load_file

from data.images import grid, save_png
from data.disk import fill_marks, save_json, save_tensors
from data.run import read_checkpoint, restore, save_checkpoint
from measure import edge_energy, kid, name_neighbours, name_objects
from world import FREEDOM, World, article, hue_jitter, words

RECIPE = {  # --steps, --batch (per process) and --lr override; the pair of old rests in the log
    "clip": dict(steps=3000, batch=128, lr=2e-3), "identity": dict(steps=2000, batch=64, lr=2e-3),
    "judge_clip": dict(steps=4000, batch=128, lr=2e-3), "judge_identity": dict(steps=3000, batch=64, lr=2e-3), "judge_names": dict(steps=4000, batch=128, lr=2e-3),
    "vae": dict(steps=7000, batch=16, lr=2e-3), "teacher": dict(steps=80000, batch=64, lr=1e-3),
    "pairs": dict(steps=400, batch=64, lr=0.), "student": dict(steps=12000, batch=48, lr=3e-4),
    "export": {}, "measure": {}}
P = {"beside": .35, "size": .25}  # more neighbours and sizes than the world draws of itself: they are harder to learn


class Batches(torch.utils.data.Dataset):
    """Batch i of a stage, as `draw(i, generator)` makes it on the CPU. It depends on the seed, i and the process alone, so that a
    killed run goes on as if nothing had happened, and --workers may draw ahead."""
    def __init__(self, draw, seed, rank, processes):
        self.draw, self.first, self.every = draw, seed * 1_000_003 + rank, processes

    def __getitem__(self, i):
        return self.draw(i, torch.Generator().manual_seed(self.first + i * self.every))


def run(name, args, modules, optimizers, draw, step, preview):
    """Call `step(draw(i, generator)) -> {loss name: tensor}` args.steps times, or for args.minutes; log, preview, checkpoint and resume."""
    folder = Path(args.work) / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, before = 0, 0.
    if path.exists():
        meta, tensors = read_checkpoint(path)
        restore(tensors, meta["state"], modules | {f"optimizer.{k}": o for k, o in optimizers.items()})
        first, before = meta["step"], meta["seconds"]
    stop = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stop.append(1))
    log = open(folder / ("log.txt" if rank == 0 else f"log{rank}.txt"), "a", buffering=1)
    sums, start = {}, time.time()
    batches = iter(torch.utils.data.DataLoader(Batches(draw, args.seed, rank, processes), batch_size=None, sampler=range(first, args.steps),
                                               num_workers=args.workers, multiprocessing_context="fork" if args.workers else None,
                                               pin_memory=args.device == "cuda"))
    for i in tqdm(range(first, args.steps), initial=first, total=args.steps, desc=name, mininterval=5, disable=rank > 0):
        seconds, stopped = together(before + time.time() - start, len(stop))
        progress = max(i / args.steps, seconds / 60 / args.minutes if args.minutes else 0)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * trapezoid(i, progress, args.decay)
        losses = step(next(batches))
        for k, v in losses.items():
            sums.setdefault(k, []).append(v.detach())
        last = i + 1 == args.steps or progress >= 1
        if (i + 1) % args.log_every == 0 or last:
            means = {k: torch.stack(v).float().mean().item() for k, v in sums.items()}
            log.write(f"step {i + 1} " + " ".join(f"{k} {v:.4f}" for k, v in means.items()) + f" sec {seconds:.0f}\n")
            sums = {}
        if rank == 0 and ((i + 1) % args.save_every == 0 or last or stopped):
            save_checkpoint(path, modules | {f"optimizer.{k}": o for k, o in optimizers.items()}, {"step": i + 1, "seconds": seconds})
            save_png(grid([("", row) for row in preview().split(12)]), folder / "preview.png")
        if stopped:
            sys.exit(130)
        if last:
            break
    return folder


def together(*numbers):
    """The largest of each number over processes, so that all of them stop at one step."""
    if dist.is_initialized():
        shared = torch.tensor(numbers)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()
    return numbers


def saved(args, stage, name):
    """State of one module in a stage's checkpoint."""
    state = load_file(Path(args.work) / stage / "checkpoint.safetensors", device=args.device)
    return {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + "/")}


def shipped_encoder(args):
    """Weights of an encoder stage's modules as --init holds them."""
    from data.base import load_encoder
    family, _, name = args.stage.rpartition("_")
    encoder = load_encoder(Path(args.init) / ("judges" if family else "encoders") / name)
    weights = {"vision": encoder.vision.state_dict(), "image": {"weight": encoder.to_image}}
    if name == "clip":
        weights |= {"text": encoder.text.state_dict(), "caption": {"weight": encoder.to_text}}
    if hasattr(encoder, "nouns"):
        weights["nouns"] = {"weight": encoder.nouns[:, :-1], "bias": encoder.nouns[:, -1]}
    return weights


def shipped_teacher(args):
    """State of the teacher's UNet and text encoder as --init holds them."""
    from data.base import load_pair
    pair = load_pair(args.init, "<v>", "dog", flags={"mixed_precision": "no"})
    return pair.teacher.unet.state_dict(), {k: v[:pair.text.token_id] if v.ndim == 2 and len(v) == pair.text.token_id + 1 else v
                                            for k, v in pair.text.encoder.state_dict().items()}


def average_gradients(module):
    """Mean over processes, when started with torchrun (one thread each is faster than two threads in one process)."""
    if dist.is_initialized():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([x.flatten() for x in gradients])
        dist.all_reduce(flat)
        for x, y in zip(gradients, flat.div_(dist.get_world_size()).split([x.numel() for x in gradients])):
            x.copy_(y.view_as(x))


def make_world(args, splits="pretrain", p=P):
    """The world as --freedom and --cells have it."""
    return World(splits, p, args.freedom, args.cells)


def opened(world, args, i):
    """The world at step i of a curriculum: freedom rises from 0 to --freedom over --open_steps steps."""
    world.freedom = args.freedom * min(1, (i + 1) / max(1, args.open_steps))
    return world


def trapezoid(i, progress, decay, warmup=200):
    """Learning-rate factor at step i: linear warm-up, constant, linear decay over the last part of the progress from 0 to 1."""
    return max(0, min(1, (i + 1) / warmup, (1 - progress) / decay))


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer and encoders

def build_tokenizer(folder):
    """A CLIP byte-pair tokenizer in which every word of the world is one token; saved to and loaded from `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator([w + " " + w for w in words()] * 2, trainers.BpeTrainer(
            vocab_size=4096, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
        bpe.model.save(str(folder))
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        for token in [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]:
            vocab.setdefault(token, len(vocab))
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=24)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions, device="cpu"):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def build_text(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id))


WIDTHS = {"clip": 192, "identity": 144, "judge_clip": 192, "judge_identity": 192, "judge_names": 192}


def build_vision(stage):
    """Training encoders are ResNets, the judges a ConvNeXt and a RegNet: no shared architecture, seed or data order."""
    from transformers import ConvNextV2Config, ConvNextV2Model, RegNetConfig, RegNetModel, ResNetConfig, ResNetModel
    sizes = [48, 96, WIDTHS[stage]]
    if stage == "judge_identity":
        return RegNetModel(RegNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 2, 2], groups_width=48, layer_type="x", downsample_in_first_stage=True))
    if stage in ("judge_clip", "judge_names"):
        return ConvNextV2Model(ConvNextV2Config(hidden_sizes=sizes, depths=[2, 2, 2], num_stages=3))
    return ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 2, 2], layer_type="basic"))


def contrast(a, b, scale, false=None):
    """Symmetric InfoNCE of matching rows (B, d); scale is the log of the inverse temperature.

    false (B, d): one more row that a's own row must not be taken for. Returns the loss and how often the match is found.
    """
    a, b, temperature = F.normalize(a, dim=1), F.normalize(b, dim=1), scale.exp().clamp(max=100)
    logits, target = temperature * a @ b.T, torch.arange(len(a), device=a.device)
    wide = logits if false is None else torch.cat([logits, temperature * (a * F.normalize(false, dim=1)).sum(1, keepdim=True)], 1)
    return (F.cross_entropy(wide, target) + F.cross_entropy(logits.T, target)) / 2, (wide.argmax(1) == target).float().mean()


def falsified(world, batch, g):
    """The captions of a batch with one noun exchanged: the neighbour's, where there is one and a coin says so, else the subject's.

    In a batch of random captions the place and the subject alone find the match, and nobody ever looks at the neighbour.
    """
    out = []
    coins, nouns = torch.rand(len(batch.captions), generator=g), torch.randint(len(world.nouns) - 1, (len(batch.captions),), generator=g)
    for caption, noun, beside, coin, new in zip(batch.captions, *(v.tolist() for v in (batch.noun, batch.beside, coins, nouns))):
        old = beside if beside >= 0 and coin < .7 else noun
        new += new >= old  # any but the old one
        head, middle, tail = caption.partition(" next to ")
        one = lambda part: re.sub(rf"\b(an? )?{world.nouns[old]}\b", lambda m: article(world.nouns[new]) if m[1] else world.nouns[new], part, count=1)
        out.append(head + middle + one(tail) if beside >= 0 and old == beside else one(head) + middle + tail)
    return out


def spoil(images, linear, g):
    """Pictures (B, 3, 64, 64) in other light, half of them as a generator might draw them.

    Light: hue, saturation and value of each picture, as DINO does, so that an individual is its shape and marking more than its
    exact tone. Generator: from a code of CHANNELS x 8 x 8 with noise of up to half the code's size.
    """
    u = torch.rand(3, len(images), generator=g)
    images = hue_jitter((images + 1) / 2, (u[0] - .5) * .4, .6 + .8 * u[1], .7 + .6 * u[2]) * 2 - 1
    z = to_latents(linear, images)
    noisy = z + .5 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
    return torch.where((torch.rand(len(z), generator=g) < .5).view(-1, 1, 1, 1), from_latents(linear, noisy).clamp(-1, 1), images)


def train_encoder(args):
    """Stages clip, identity (training family) and judge_clip, judge_identity, judge_names (judges)."""
    judge, with_text = args.stage.startswith("judge"), not args.stage.endswith("identity")
    args.seed += {"clip": 10, "identity": 20, "judge_clip": 30, "judge_identity": 40, "judge_names": 50}[args.stage]
    torch.manual_seed(args.seed)
    world = make_world(args, "pretrain" if with_text else "pretrain+extra")
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    modules = {"vision": build_vision(args.stage), "image": nn.Linear(WIDTHS[args.stage], 128, bias=False)}
    if with_text:
        modules |= {"text": build_text(tokenizer), "caption": nn.Linear(128, 128, bias=False), "nouns": nn.Linear(WIDTHS[args.stage], len(world.nouns))}
    for name, weights in (shipped_encoder(args) if args.init else {}).items():
        modules[name].load_state_dict(weights)
    modules = {k: m.to(args.device) for k, m in modules.items()}
    scale = nn.Parameter(torch.tensor(2.6, device=args.device))
    parameters = [p for m in modules.values() for p in m.parameters()] + [scale]
    if args.only:
        for p in parameters:
            p.requires_grad_(False)
        parameters = list(modules[args.only].requires_grad_().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=.02, fused=True)

    def look(images):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 and args.stage not in ("judge_clip", "judge_names")):  # ConvNeXt is faster in fp32
            return modules["vision"](images.to(args.device)).last_hidden_state.float().mean((2, 3))

    def embed(images):
        return modules["image"](look(images))

    def draw(i, g):
        if not with_text:
            views = opened(world, args, i).individuals(args.batch, g, alike=judge).flatten(0, 1)
            return {"images": spoil(views, linear, g) if judge else views}
        batch = opened(world, args, i).sample(args.batch, g)
        shown = F.one_hot(batch.noun, len(world.nouns)) + torch.where(batch.beside[:, None] < 0, 0, F.one_hot(batch.beside.clamp(min=0), len(world.nouns)))
        return {"images": batch.images, "ids": tokenize(tokenizer, batch.captions + falsified(world, batch, g)), "shown": shown / shown.sum(1, keepdim=True)}

    def step(batch):
        features = look(batch["images"])
        if with_text:
            b, false = modules["caption"](modules["text"](batch["ids"].to(args.device)).pooler_output).chunk(2)
            loss, accuracy = contrast(modules["image"](features), b, scale, false)
            loss = loss + F.cross_entropy(modules["nouns"](features), batch["shown"].to(args.device))  # captions alone teach the neighbour last
        else:
            loss, accuracy = contrast(*modules["image"](features).chunk(2), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "accuracy": accuracy}

    fixed = world.sample(24, torch.Generator().manual_seed(1)) if with_text else None
    linear = code(args) if args.stage == "judge_identity" else None
    views = None if with_text else world.individuals(24, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def preview():
        """Each picture beside the one that its embedding finds: by its caption, or among second views."""
        if with_text:
            ids = tokenize(tokenizer, fixed.captions, args.device)
            found = (embed(fixed.images) @ F.normalize(modules["caption"](modules["text"](ids).pooler_output), dim=1).T).argmax(1)
            return torch.stack([fixed.images, fixed.images[found.cpu()]], 1).flatten(0, 1)
        found = (embed(views[0]) @ F.normalize(embed(views[1]), dim=1).T).argmax(1)
        return torch.stack([views[0], views[1][found.cpu()]], 1).flatten(0, 1)

    run(args.stage, args, modules | {"scale": {"scale": scale}}, {"adamw": optimizer}, draw, step, preview)


# ---------------------------------------------------------------------------------------------------------------
# Autoencoder: 64 px -> CHANNELS x 8 x 8. The code is linear and known before any training: the leading principal components
# of 8 x 8 patches, so the diffusion networks need not wait. Decoded linearly, 24 of them keep 26.6 dB. What is learned is a
# residual on top of that: first for exactness, then for realness, which brings back most of what the code left out.

CHANNELS, PATCH = 24, 8  # --channels overrides


def code(args):
    """{basis, back (CHANNELS, 3, 8, 8), mean (CHANNELS,)}: z = conv2d(x, basis, stride 8) - mean has unit mean variance; back decodes.

    With --init it is that of its autoencoder, by least squares on pictures: it is linear, or nearly so.
    """
    path = Path(args.work) / "code.safetensors"
    if not path.exists():
        x = make_world(args, "pretrain+extra", World.P).sample(512 if args.init else 4096, torch.Generator().manual_seed(7)).images
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
        if args.init:
            from data.base import load_pair
            pair = load_pair(args.init, "<v>", "dog", flags={"mixed_precision": "no"})
            with torch.no_grad():
                z = torch.cat([pair.encode(part) for part in x.split(64)]).permute(0, 2, 3, 1).reshape(len(patches), -1).double()
            into = torch.linalg.lstsq(F.pad(patches, (0, 1), value=1), z).solution
            basis, mean = into[:-1].T, -into[-1]
        else:
            centre = patches.mean(0)
            values, vectors = torch.linalg.eigh((patches - centre).T @ (patches - centre) / len(patches))
            values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
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
    """Images (B, 3, 64, 64) in [-1, 1] to diffusion latents (B, CHANNELS, 8, 8)."""
    return F.conv2d(x, linear["basis"], stride=PATCH) - linear["mean"].view(1, -1, 1, 1)


def from_latents(linear, z):
    """The linear decoding: diffusion latents (B, CHANNELS, 8, 8) to images (B, 3, 64, 64) in about [-1, 1]."""
    return F.conv_transpose2d(z + linear["mean"].to(z).view(1, -1, 1, 1), linear["back"].to(z), stride=PATCH)


def edges(x):
    """Horizontal and vertical differences of (B, C, H, W), flattened into one row per image."""
    return torch.cat([(x[..., 1:] - x[..., :-1]).flatten(1), (x[..., 1:, :] - x[..., :-1, :]).flatten(1)], 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return -10 * (F.mse_loss(a, b) / 4).log10()


def build_vae():
    from data.emoji.autoencoder import PatchAutoencoder
    return PatchAutoencoder(latent_channels=CHANNELS, patch=PATCH).to(memory_format=torch.channels_last)


def follow(ema, model, step, decay=.999):
    """One step of the exponential moving average of the parameters."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


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
    vae, ema = build_vae().to(args.device), build_vae().to(args.device).requires_grad_(False)
    world, linear = make_world(args, "pretrain+extra"), code(args)
    vae.set_code(**linear)
    ema.load_state_dict(vae.state_dict())
    critic = PixelCritic().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(.9, .99), weight_decay=1e-4, fused=True)
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
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
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

    run("vae", args, {"vae": vae, "ema": ema, "critic": critic}, {"vae": optimizer, "critic": critic_optimizer}, draw, step, preview)


# ---------------------------------------------------------------------------------------------------------------
# Teacher: v-prediction on Stable Diffusion's schedule.

def build_unet():
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(96, 144), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    unet.set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards on a CPU
    return unet


def alphas_cumprod():
    """(1000,) of Stable Diffusion's scaled-linear schedule."""
    return torch.cumprod(1 - torch.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2, 0)


def train_teacher(args):
    torch.manual_seed(args.seed)
    world, linear = make_world(args), code(args)
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    unet, text = build_unet(), build_text(tokenizer)
    if (Path(args.work) / "clip" / "checkpoint.safetensors").exists():
        text.load_state_dict(saved(args, "clip", "text"))
        print("text encoder starts from the clip stage")
    if args.init:
        for module, weights in zip((unet, text), shipped_teacher(args)):
            module.load_state_dict(weights)
    ema = nn.ModuleList([build_unet(), build_text(tokenizer)]).requires_grad_(False).to(args.device)
    both = nn.ModuleList([unet, text]).to(args.device)
    ema.load_state_dict(both.state_dict())
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, betas=(.9, .99), weight_decay=.01, fused=True)
    bar = alphas_cumprod().to(args.device)
    if args.compile:
        unet.compile()

    def draw(i, g):
        n, batch = args.batch * args.noises, opened(world, args, i).sample(args.batch, g)
        dropped, z = torch.rand(args.batch, generator=g) < .1, to_latents(linear, batch.images)
        ids = tokenize(tokenizer, ["" if d else c for c, d in zip(batch.captions, dropped.tolist())])
        t = torch.sigmoid(torch.randn(n, generator=g))
        t = torch.where(torch.rand(n, generator=g) < .3, torch.rand(n, generator=g), t).mul(1000).long().clamp(0, 999)
        t = torch.where(torch.rand(n, generator=g) < .06, 999, t)
        return z.repeat(args.noises, 1, 1, 1), ids.repeat(args.noises, 1), t, torch.randn(n, CHANNELS, 8, 8, generator=g), i

    def step(batch):
        z, ids, t, eps = (x.to(args.device) for x in batch[:4])
        a = bar[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - a ** 2).sqrt()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = unet(a * z + s * eps, t, text(ids).last_hidden_state).sample
        loss = (out.float() - (a * eps - s * z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(both)
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        follow(ema, both, batch[4], .999)
        return {"v": loss}

    fixed = world.sample(24, torch.Generator().manual_seed(5))
    ids, empty = tokenize(tokenizer, fixed.captions, args.device), tokenize(tokenizer, [""] * 24, args.device)
    noise = torch.randn(24, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        z = ddim(ema[0], noise, ema[1](ids).last_hidden_state, ema[1](empty).last_hidden_state, 16, args.guidance)
        return torch.stack([fixed.images, show(args, linear, z).cpu()], 1).flatten(0, 1)

    run("teacher", args, {"unet": unet, "text": text, "ema": ema}, {"adamw": optimizer}, draw, step, preview)


def ddim(unet, noise, text, empty, steps, guidance):
    """Deterministic DDIM from pure noise with classifier-free guidance; returns z (B, CHANNELS, 8, 8)."""
    bar, z = alphas_cumprod().to(noise), noise
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, then in zip(times[:-1], times[1:]):
        v = unet(torch.cat([z, z]), now, torch.cat([text, empty])).sample.float()
        v, v0 = v.chunk(2)
        v = v0 + guidance * (v - v0)
        a, s = bar[now].sqrt(), (1 - bar[now]).sqrt()
        x0, eps = a * z - s * v, s * z + a * v
        b = bar[then] if then > 0 else torch.ones_like(bar[0])
        z = b.sqrt() * x0 + (1 - b).sqrt() * eps
    return z


def show(args, linear, z):
    """Decode with the autoencoder if its stage has run, else linearly."""
    path = Path(args.work) / "vae" / "checkpoint.safetensors"
    if path.exists():
        vae = build_vae().to(args.device)
        vae.load_state_dict(saved(args, "vae", "ema"))
        return vae.decode(z).sample
    return from_latents(linear, z)


# ---------------------------------------------------------------------------------------------------------------
# Student: v-prediction like the teacher, from whose weights it starts, one step. (SD-Turbo predicts epsilon. From pure noise that
# asks for a copy of the input to one part in a hundred.) Regression on (noise, caption, teacher's sample) triples gives the layout, a
# small discriminator on latents of fresh real pictures gives the sharpness. A third of each batch practises the
# lower noise levels of 2- and 4-step sampling.

def load_teacher(args):
    """The teacher's averaged UNet and text encoder."""
    ema = nn.ModuleList([build_unet(), build_text(build_tokenizer(Path(args.work) / "tokenizer"))])
    ema.load_state_dict(saved(args, "teacher", "ema"))
    return ema.requires_grad_(False).eval().to(args.device)


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
            noise = torch.randn(args.batch, CHANNELS, 8, 8, generator=g).to(args.device)
            z = ddim(unet, noise, text(ids).last_hidden_state, empty, 12, args.guidance)
            for k, v in (("noise", noise.half()), ("z", z.half()), ("ids", ids.short())):
                rows[k].append(v)
    save_tensors(Path(args.work) / f"pairs_{args.seed}.safetensors", {k: torch.cat(v) for k, v in rows.items()})


class LatentCritic(nn.Module):
    """Realness of latents (B, CHANNELS, 8, 8) under a caption embedding (B, 128): one logit per 4 x 4 cell, (B, 1, 4, 4)."""
    def __init__(self, width=128):
        super().__init__()
        conv = nn.utils.parametrizations.spectral_norm
        self.body = nn.Sequential(
            conv(nn.Conv2d(CHANNELS, width, 3, padding=1)), nn.LeakyReLU(.2),
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
    unet, ema, critic = build_unet().to(args.device), build_unet().requires_grad_(False).to(args.device), LatentCritic().to(args.device)
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
        return (torch.randint(len(noise), (n,), generator=g), t, torch.randn(n, CHANNELS, 8, 8, generator=g),
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
    start = torch.randn(24, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(6)).to(args.device)

    @torch.no_grad()
    def preview():
        context, empty = (text(tokenize(tokenizer, c, args.device)).last_hidden_state for c in (fixed.captions, [""] * 24))
        t = torch.full((24,), 999, device=args.device)
        z = predict(ema, (1 - bar[999]).sqrt() * start, t, context)
        teacher = ddim(trunk, start, context, empty, 12, args.guidance)
        return torch.stack([show(args, linear, teacher), show(args, linear, z)], 1).flatten(0, 1)

    run("student", args, {"unet": unet, "ema": ema, "critic": critic}, {"unet": optimizer, "critic": critic_optimizer}, draw, step, preview)


# ---------------------------------------------------------------------------------------------------------------
# Export: data/emoji/base in the diffusers layout

def export(args):
    """Write what --work holds into base/: teacher/, student/ (parts they share are links into teacher/), encoders/, judges/.

    What has no checkpoint there stays as it is: a new decoder or judge alone needs no new pair.
    """
    work, base = Path(args.work), Path(args.base)
    ran = {stage for stage in STAGES if (work / stage / "checkpoint.safetensors").exists()}
    tokenizer, vae = build_tokenizer(work / "tokenizer"), build_vae()
    if "vae" in ran:
        vae.load_state_dict(saved(args, "vae", "ema"))
    else:
        vae = type(vae).from_pretrained(base / "teacher", subfolder="vae")
    if "student" in ran:
        export_pair(args, base, tokenizer, vae.half())
    elif "vae" in ran:
        shutil.rmtree(base / "teacher" / "vae")
        vae.half().save_pretrained(base / "teacher" / "vae")
        for index in (base / role / "model_index.json" for role in ("teacher", "student")):
            save_json(index, json.loads(index.read_text()) | {"vae": [type(vae).__module__, type(vae).__name__]})
    for stage in sorted(ran & set(WIDTHS)):
        export_encoder(args, base, stage, tokenizer)
    size = sum(f.stat().st_size for f in base.rglob("*") if f.is_file() and not f.parent.is_symlink())
    print(f"{base}: {size / 1e6:.1f} MB; written: {', '.join(sorted(ran - {'pairs'}))}")


def export_pair(args, base, tokenizer, vae):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
    teacher, text = load_teacher(args)
    student = build_unet()
    student.load_state_dict(saved(args, "student", "ema"))
    noise = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing",
             "steps_offset": 1}
    schedulers = {"teacher": DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True, **noise),
                  "student": EulerDiscreteScheduler(prediction_type="v_prediction", **noise)}
    for name, unet in (("teacher", teacher), ("student", student)):
        shutil.rmtree(base / name, ignore_errors=True)
        StableDiffusionPipeline(vae=vae, text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(),
                                scheduler=schedulers[name], safety_checker=None, feature_extractor=None,
                                requires_safety_checker=False).save_pretrained(base / name)
    config = base / "teacher" / "text_encoder" / "config.json"  # stored in fp16 like the rest, but to be loaded in fp32 like it
    save_json(config, json.loads(config.read_text()) | {"dtype": "float32"})
    for shared in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(base / "student" / shared)
        os.symlink(Path("..") / "teacher" / shared, base / "student" / shared)


def export_encoder(args, base, stage, tokenizer):
    family, _, name = stage.rpartition("_")
    folder = base / ("judges" if family else "encoders") / name
    vision = build_vision(stage)
    vision.load_state_dict(saved(args, stage, "vision"))
    vision.half().save_pretrained(folder)
    heads = {"image": saved(args, stage, "image")["weight"]}
    if name == "clip":
        encoder = build_text(tokenizer)
        encoder.load_state_dict(saved(args, stage, "text"))
        encoder.half().save_pretrained(folder / "text")
        heads |= {"text": saved(args, stage, "caption")["weight"], "logit_scale": saved(args, stage, "scale")["scale"].view(1)}
    if name == "names":
        nouns = saved(args, stage, "nouns")
        heads["nouns"] = torch.cat([nouns["weight"], nouns["bias"][:, None]], 1)
    save_tensors(folder / "heads.safetensors", heads)


# ---------------------------------------------------------------------------------------------------------------
# Measure: do the exported pair's pictures hold what was asked? The judges answer; training never sees them.

@torch.no_grad()
def measure(args):
    """Fill the table of README.md: args.samples prompts "a NOUN PLACE" and half as many "a NOUN next to a NOUN PLACE"; scores, a grid.

    object, both    the naming judge's first choice; for a pair that of each half, in the middle of a picture of its own
    place           the clip judge's first choice among all places, the noun given
    KID             of the identity judge's embeddings against twice as many fresh real pictures; edges: in units of theirs
    """
    from data.base import load_encoder, load_pair
    from world import PLACES
    base = Path(args.base)
    pair, judge, eye, namer = load_pair(base, "<v>", "dog"), *(load_encoder(base / "judges" / k) for k in ("clip", "identity", "names"))
    plain = dict.fromkeys(World.P, 0.0) | {"place": 1.0}
    alone, paired = (make_world(args, p=plain | {"beside": p}) for p in (0.0, 1.0))
    nouns, g = [article(w) for w in alone.nouns], torch.Generator().manual_seed(args.seed + 12345)
    real = {"one": alone.sample(args.samples, g, flat_share=0), "two": paired.sample(args.samples // 2, g, flat_share=0)}
    noise = {k: torch.randn(len(v.captions), *pair.latent_shape, generator=g) for k, v in real.items()}

    def embed(encoder, images):
        return torch.cat([encoder.embed(encoder.features(x)) for x in images.clamp(-1, 1).split(64)])

    def embed_text(captions):  # (n, m) captions -> (n, m, d)
        flat = [c for row in captions for c in row]
        rows = torch.cat([judge.embed_text(pair.text.tokenizer, flat[i:i + 256]) for i in range(0, len(flat), 256)])
        return rows.view(len(captions), -1, rows.shape[1])

    places = embed_text([[f"{nouns[a]} {p}" for p in PLACES] for a in real["one"].noun.tolist()])
    fresh = alone.sample(2 * args.samples, g, flat_share=0).images
    known, sharp = embed(eye, fresh), edge_energy(fresh)
    root = known.shape[1] ** .5

    def judged(images):
        left, right = name_neighbours(namer, images["two"])
        a, b = real["two"].noun, real["two"].beside
        row = {"object": name_objects(namer, images["one"]) == real["one"].noun,
               "place": torch.einsum("nd,nkd->nk", embed(judge, images["one"]), places).argmax(1) == real["one"].place,
               "both": (left == a) & (right == b) | (left == b) & (right == a)}
        row = {k: round(v.float().mean().item(), 3) for k, v in row.items()}
        return row | {"KID": round(kid(embed(eye, images["one"]) * root, known * root), 1),
                      "edges": round(edge_energy(images["one"]) / sharp, 3)}

    def draw(which, steps, guidance=1.0):
        start, out = time.perf_counter(), {}
        for kind, batch in real.items():
            parts = zip(noise[kind].split(32), (batch.captions[i:i + 32] for i in range(0, len(batch.captions), 32)))
            out[kind] = torch.cat([pair.decode(which.sample(z, pair.text(c), steps, pair.text([""]), guidance)) for z, c in parts])
        return out, 1000 * (time.perf_counter() - start) / sum(len(v) for v in out.values())

    through = {k: torch.cat([pair.decode(pair.encode(x)) for x in v.images.split(32)]) for k, v in real.items()}
    scores = {"real pictures": judged({k: v.images for k, v in real.items()}), "through the autoencoder": judged(through)}
    pictures = {}
    for name, which, steps, guidance in (("teacher", pair.teacher, 16, args.guidance), ("student", pair.student, 1, 1.0),
                                         ("student, 2 steps", pair.student, 2, 1.0), ("student, 4 steps", pair.student, 4, 1.0)):
        pictures[name], ms = draw(which, steps, guidance)
        scores[name] = judged(pictures[name]) | {"ms per image": round(ms, 1)}
    for name, row in scores.items():
        print(f"{name}: {row}", flush=True)
    save_json(base / "scores.json", {"prompts": args.samples, "seed": args.seed, "freedom": args.freedom, **scores})
    rows = [(name, pictures[name][kind][i:i + 10]) for kind, i in (("one", 0), ("one", 10), ("one", 20), ("two", 0)) for name in ("teacher", "student")]
    save_png(grid(rows), base.parent / "samples.png")
    print("\n".join(real["one"].captions[:30] + real["two"].captions[:10]))
    table = [f"| {args.samples} prompts, {args.samples // 2} of neighbours | object, of {len(nouns)} | place, of {len(PLACES)} | both neighbours | KID | edges | ms per image |", "|---" * 7 + "|"]
    for name, row in scores.items():
        table.append("| " + " | ".join([name, *(f"{row[k]:.3f}" for k in ("object", "place", "both")), f"{row['KID']:.0f}", f"{row['edges']:.2f}", f"{row.get('ms per image', '')}"]) + " |")
    fill_marks(base.parent / "README.md", "pair", "end pair", "\n".join(table) + "\n", "measure")


STAGES = {"vae": train_vae, "teacher": train_teacher, "pairs": make_pairs, "student": train_student,
          "export": export, "measure": measure} | dict.fromkeys(WIDTHS, train_encoder)

def main(argv=None):
    global CHANNELS
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--work", default=str(HERE / "work"), help="folder for checkpoints, logs and previews")
    p.add_argument("--base", default=str(HERE / "base"), help="folder that `export` writes and `measure` reads")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast where it helps")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the UNet of a stage: two minutes first, then a fifth faster")
    p.add_argument("--init", help="folder of a pair, such as base: go on from its weights and in its code")
    p.add_argument("--threads", type=int, default=1, help="per process")
    p.add_argument("--freedom", type=float, default=FREEDOM, help="of the world: 0 upright and in the middle, 1 free geometry and light")
    p.add_argument("--cells", action=argparse.BooleanOptionalAction, default=True, help="places and sizes at whole cells of the code in freedom, too")
    p.add_argument("--open_steps", type=int, default=0, help="steps over which freedom rises from 0 (0: from the first on)")
    p.add_argument("--steps", type=int, help="may be raised on resume")
    p.add_argument("--minutes", type=float, default=0, help="end after so long if that is earlier, with the learning rate decayed; 0: no limit")
    p.add_argument("--decay", type=float, default=.3, help="share of a run over which the learning rate falls to 0; more --minutes on resume raise it again")
    p.add_argument("--workers", type=int, default=0, help="processes that draw batches ahead, for a GPU: a core draws some 1,400 pictures a second")
    p.add_argument("--batch", type=int, help="per process")
    p.add_argument("--noises", type=int, default=1, help="noise levels at which the teacher sees each picture of a batch")
    p.add_argument("--lr", type=float)
    p.add_argument("--only", help="the one module of an encoder stage that learns, such as nouns; the others stay as --init has them")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance of the teacher's samples")
    p.add_argument("--channels", type=int, default=24, help="width of the latent code, if --init does not say it")
    p.add_argument("--sharpen", type=float, default=.2, help="share of the vae's steps after which it is asked for sharpness (1: never)")
    p.add_argument("--vae_noise", type=float, default=.6, help="noise on the codes that the decoder learns from, at most: at .25 it sharpens a student's errors, too")
    p.add_argument("--gan", type=float, default=.5, help="weight of realness against regression, by gradient norm at z")
    p.add_argument("--samples", type=int, default=500, help="prompts that `measure` draws")
    p.add_argument("--log_every", type=int, default=50)
    p.add_argument("--save_every", type=int, default=500)
    args = p.parse_args(argv)
    CHANNELS = channels(args)
    for key, value in RECIPE[args.stage].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    torch.set_num_threads(args.threads)
    if args.init and not (Path(args.work) / "tokenizer").exists():
        shutil.copytree(Path(args.init) / "teacher" / "tokenizer", Path(args.work) / "tokenizer")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
