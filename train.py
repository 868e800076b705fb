"""Teach a one-step text-to-image model a concept from 3-6 photos: EchoDistill (arXiv 2510.20512).

    python train.py --concept data/dog

A teacher and a one-step student train together around one text encoder (joint stage); then the student's samples are
echoed back to the teacher, and the student follows it (echo stage). README.md maps the paper to the code.
"""
import shlex
import time
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import losses
from data.base import (announce_download, check_base, check_memory, find_base, load_encoders, load_pair, pick_device,
                       pick_precision, read_recipe)
from data.disk import fail, refuse_foreign_bytes
from data.images import (Photos, from_bytes, grid, load_photo, load_photos, load_prompts, photo_paths, refuse_overlap, save_png,
                         save_strip, to_bytes)
from data.many import share
from data.progress import Progress, announce
from data.recipe import KEYS, LENGTH, RUN, check, make_parser
from data.run import Run, save_run
from kernels.dispatch import resolve
from model import Critic, View, compile_networks, hold_first_token, merge_low_rank, moves, precision, save_memory, trainable_parameters


# ---------------------------------------------------------------------------------------------------------------
# Flags

def parse_arguments(argv=None):
    """Flags with the recipe filled in; everything that the input alone tells is refused here."""
    base, recipe = read_recipe(argv)
    args = make_parser(recipe, __doc__).parse_args(argv)
    args.base = base
    for path in photo_paths(args.concept):
        load_photo(path, 8)
    folder = Path(args.concept).resolve().name
    args.class_word = (folder.rstrip("0123456789").replace("_", " ") if args.class_word is None else args.class_word).strip()
    if not args.class_word:
        fail("--class_word is empty and the folder's name gives none; say what the subject is, such as --class_word dog")
    args.output_dir = args.output_dir or str(Path("out") / folder)
    refuse_foreign_bytes(args)
    refuse_overlap(args.output_dir, args.concept)
    try:
        resolve(args.kernels, pick_device(args.device)[0])
    except ValueError as e:
        fail(f"--kernels {args.kernels}: {e}")
    if args.mixed_precision == "auto":
        args.mixed_precision, _ = pick_precision(pick_device(args.device)[0])
    for key in KEYS | RUN:
        check(key, getattr(args, key), f"--{key}")
    refuse_contradictions(args)
    if args.dinov2_size % 14:
        fail(f"--dinov2_size must be a multiple of 14, such as 224 or 518, not {args.dinov2_size}")
    check_base(args)
    return args


def refuse_contradictions(args):
    if args.carry and args.train_unet == "lora":
        fail("--carry moves plain weights; use --train_unet kv, attention or all, or --no-carry")
    if args.sequential and args.echo_steps:
        fail("--sequential is a baseline without an echo stage; add --echo_steps 0")
    if args.echo_steps * args.echo_rounds > LENGTH:
        fail(f"--echo_steps times --echo_rounds is more than {LENGTH}; take fewer")
    if args.echo_real_only and not args.echo_steps:
        fail("--echo_real_only is the control of an echo stage, which --echo_steps 0 switches off; leave one of them out")
    if args.prior_weight and not args.denoising_weight:
        fail("--prior_weight is a part of the student's own denoising loss, which --denoising_weight 0 switches off; raise that, too")
    if args.report_to == "tensorboard" and not find_spec("tensorboard"):
        fail("--report_to tensorboard needs a package that is not installed; pip install tensorboard")
    if args.teacher_lr == args.student_lr == args.token_lr == 0:
        fail("--teacher_lr, --student_lr and --token_lr are all 0, so nothing would be learned; raise one of them")
    active = active_losses(args)
    if not (active["teaches"] or active["draws"] or args.denoising_weight and args.student_lr + args.token_lr):
        fail("every --..._weight is 0 or belongs to a network whose learning rate is 0, so nothing would be learned; raise one, such as --reconstruction_weight")


def active_losses(args):
    """Which parts of an iteration teach anybody anything: the teacher's loss, the alignment, the adversarial loss, the student's step."""
    aligns = any(getattr(args, f"{k}_weight") for k in losses.ALIGNMENT)
    competes = args.adversarial_weight + args.scene_adversarial_weight > 0
    moves = args.student_lr > 0 or not args.detach_prompt or not args.share_text
    return {"teaches": args.reconstruction_weight > 0 and args.teacher_lr + args.token_lr > 0, "aligns": aligns, "competes": competes,
            "draws": moves and (aligns or competes)}


# ---------------------------------------------------------------------------------------------------------------
# Set-up: who trains when, and all that an iteration needs

# "both", "teacher" or "student"; "joint" or "echo"; share of the learning rate; which echo, from 1
Turn = namedtuple("Turn", "who stage rate round", defaults=[0])


def plan(args):
    """[Turn] of every iteration. Each stage lets its rates fall at the end; the last one falls all the way, for none follows."""
    joint, echo, decay = args.max_train_steps, args.echo_steps, args.lr_decay
    rounds = [(who, "echo", echo, share, r + 1) for r in range(args.echo_rounds) for who, share in (("teacher", decay), ("student", 1.))]
    stages = ([("teacher", "joint", joint, decay, 0), ("student", "joint", joint, decay, 0)] if args.sequential else
              [("both", "joint", joint, decay, 0), *rounds])
    return [Turn(who, stage, min(1, (length - i) / max(1, share * length)), r)
            for who, stage, length, share, r in stages for i in range(length)]


class Echo:
    """The student's samples that the teacher hears: images (N, 3, H, W) uint8, their prompts, latents, and features {critic:
    (N, width)}; empty until gathered, anew in each round."""

    def __init__(self):
        self.images, self.prompts, self.round, self.z, self.features = None, [], 0, None, {}

    def state_dict(self):
        return {} if self.images is None else {"images": self.images, "prompts": self.prompts, "round": self.round}

    def load_state_dict(self, state):
        self.images, self.prompts, self.round = state.get("images"), state.get("prompts", []), state.get("round", 0)


def build(args, device, **loading):
    """Networks, photos, optimizers and settings of a run, in one namespace; loading: see `load_pair`."""
    base = find_base(args.base, vars(args))
    pair = load_pair(args.base, args.token, args.class_word, device, vars(args), **loading)
    encoders = load_encoders(args.base, device, vars(args), **loading)
    photos, masks = load_photos(args.concept, pair.resolution, args.crop, masks=True)
    if args.gradient_checkpointing:
        save_memory(pair, encoders)
    if args.compile:
        compile_networks(pair.teacher.unet, pair.student.unet, (pair.tiny_vae or pair.vae).decoder)
    torch.manual_seed(args.seed)
    heads = {k: Critic(e.width).to(device) for k, e in encoders.items() if e.has_critic}
    moved = {k: trainable_parameters(d.unet, args.train_unet, args.lora_rank) for k, d in (("teacher", pair.teacher), ("student", pair.student))}
    for network in (pair.teacher.unet, pair.student.unet) if args.detach_first_token else ():
        hold_first_token(network)
    for role, lr in (("teacher", args.teacher_lr), ("student", args.student_lr)):
        for p in moved[role].values():
            p.requires_grad_(lr > 0)
    rows = {"row": pair.text.row}
    if not args.share_text:
        pair.unshare_text()
        rows["student_row"] = pair.student_text.row
    with torch.no_grad():
        empty = pair.text([""])
    m = SimpleNamespace(
        device=device, pair=pair, encoders=encoders, heads=heads, moved=moved, rows=rows, empty=empty, echo=Echo(),
        name=f"{args.token} {args.class_word}", prompts=load_prompts(base.prompts, args.validation_prompt), world=base.prompts,
        impl=args.kernels, autocast=precision(device, args.mixed_precision),
        photos=Photos(photos, masks, args.flip, args.size_augmentation, args.published_sizes),
        scale=1024 if args.mixed_precision == "fp16" else 1, **active_losses(args))  # scale: lifts small gradients above fp16's smallest number, 6e-8
    m.critics_look = list(heads) if args.critic_views else []  # at windows of the photos, not at the photos of a batch
    m.known = None if args.size_augmentation else study(m, m.photos.photos, [k for k in heads if k not in m.critics_look])
    m.views = study_windows(m, args) if m.critics_look else None
    m.prior = draw_class(m, args) if args.prior_weight else None
    m.optimizers = make_optimizers(m, args)
    m.state = {"teacher": moved["teacher"], "student": moved["student"], "token": rows, "echo": m.echo, **heads,
               **{f"optimizer.{k}": o for k, o in m.optimizers.items()}}
    m.preview = [fill(m, p) for p in m.prompts["preview"]]
    m.preview_noise = torch.randn(len(m.preview), *pair.latent_shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    return m


def make_optimizers(m, args):
    """AdamW for each role; keys and values of cross-attention, which read the token, may learn at another rate."""
    def groups(weights):
        parts = ([v for k, v in weights.items() if moves(k, "kv") == inside] for inside in (True, False))
        return [{"params": part, "rate": rate} for part, rate in zip(parts, (args.kv_rate, 1.0)) if part]

    def adamw(parameters, lr, decay):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=m.device.type != "meta")

    return {"teacher": adamw(groups(m.moved["teacher"]), args.teacher_lr, args.weight_decay),
            "token": adamw(m.rows.values(), args.token_lr, 0),
            "student": adamw(groups(m.moved["student"]), args.student_lr, args.weight_decay),
            "critic": adamw([p for h in m.heads.values() for p in h.parameters()], args.critic_lr, args.weight_decay)}


@torch.no_grad()
def study(m, images, critics):
    """What the frozen networks say of images (N, 3, H, W): latents "z", their "spread", and features for each of `critics`."""
    parts = []
    for x in images.to(m.device).split(min(8, m.pair.at_once)):
        with m.autocast():
            z, spread = m.pair.encode(x, spread=True)
        # with a tiny decoder photos go through it too, or critics could tell them by their decoder
        view = View(z, m.pair, m.encoders, m.autocast, None if m.pair.tiny_vae else x)
        parts.append({"z": z, "spread": spread} | {k: view.features(k) for k in critics})
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def study_windows(m, args):
    """{critic: features (photos, critic_views, width)} of random windows of each photo: more than a head can learn by heart."""
    g = torch.Generator().manual_seed(args.seed + 2)
    parts = [study(m, m.photos.zooms(i, args.critic_views, g), m.heads) for i in range(len(m.photos.photos))]
    return {k: torch.stack([part[k] for part in parts]) for k in m.heads}


@torch.no_grad()
def draw_class(m, args):
    """Latents "z" (N, C, h, w) and prompts of what the untouched student draws of the class, four of each template and scene."""
    prompts = [t.replace("{}", args.class_word) for t in m.prompts["templates"] + m.prompts["scenes"]] * 4
    noise = torch.randn(len(prompts), *m.pair.latent_shape, generator=torch.Generator().manual_seed(args.seed + 3)).to(m.device)
    parts = [m.pair.student.one_step(noise[i:i + 4], m.pair.text(prompts[i:i + 4])) for i in range(0, len(prompts), 4)]
    return SimpleNamespace(z=torch.cat(parts), prompts=prompts)


# ---------------------------------------------------------------------------------------------------------------
# Small things that an iteration is made of

def fill(m, template, word=""):
    return template.replace("{}", f"{word} {m.name}".strip())


def choose(options, n, g):
    return [options[i] for i in torch.randint(len(options), (n,), generator=g).tolist()]


def timesteps(m, n, g, share=0.):
    """(n,) timesteps, uniform over the noisier part of the schedule from `share` up."""
    last = m.pair.teacher.last
    return (last - ((last - torch.randint(last + 1, (n,), generator=g)) * (1 - share)).long()).to(m.device)


def apart(args, step, number):
    """A generator beside the step's own, so that what it draws leaves photos and noise as they are without it."""
    return torch.Generator().manual_seed(args.seed * 1_000_003 + step + number * 500_009)


def real_batch(m, args, n, g, step):
    """n photos: latents z (n, C, h, w), mask (n, 1, h, w), prompts, and the features that each critic sees."""
    x, mask, said, which = m.photos.batch(n, g)
    prompts = [fill(m, t, w) for t, w in zip(choose(m.prompts["templates"], n, g), said)]
    known = study(m, x, [k for k in m.heads if k not in m.critics_look]) if m.known is None else {k: v[which] for k, v in m.known.items()}
    if m.critics_look:
        pick = torch.randint(args.critic_views, (n,), generator=apart(args, step, 2))
        known |= {k: v[which, pick] for k, v in m.views.items()}
    z = known["z"] + known["spread"] * torch.randn(n, *m.pair.latent_shape, generator=g).to(m.device) if args.sample_latents else known["z"]
    mask = F.interpolate(mask, size=m.pair.latent_shape[1:], mode="area").to(m.device)
    if args.mask_erosion:
        mask = -F.max_pool2d(-mask, 2 * args.mask_erosion + 1, 1, args.mask_erosion)  # the picture's own border narrows nothing
    return SimpleNamespace(z=z, mask=mask, prompts=prompts, features=known)


def with_echo(m, args, photos, step):
    """(photos' latents, noise, timesteps and prompts with echoes behind them or in place of the last of them, photos left)."""
    n, g = len(photos[0]), apart(args, step, 1)
    pick = torch.randint(len(m.echo.prompts), (max(1, round(args.echo_share * n)),), generator=g)
    t = timesteps(m, len(pick), g, args.echo_noise)
    eps = torch.randn(len(pick), *m.pair.latent_shape, generator=g).to(m.device)
    left = n - len(pick) if args.echo_replaces else n
    echoes = m.echo.z[pick], eps, t, [m.echo.prompts[i] for i in pick.tolist()]
    return [a[:left] + b if isinstance(a, list) else torch.cat([a[:left], b]) for a, b in zip(photos, echoes)], left


def passed_off_as_real(m, args, features, step):
    """The photos' features {critic: (n, width)} with those of echoes in place of the last of them."""
    n = len(next(iter(features.values())))
    pick = torch.randint(len(m.echo.prompts), (max(1, round(args.echo_share * n)),), generator=apart(args, step, 3))
    return {k: torch.cat([features[k][:n - len(pick)], m.echo.features[k][pick]]) for k in m.heads}


def student_prompts(m, args, n, g, photos):
    """n prompts, and which of them (n,) are scenes that no photo shows; photos: prompts of the batch."""
    scene = torch.rand(n, generator=g) < args.scene_prompts
    templates = m.prompts["templates"] + (m.prompts["sized"] if args.size_augmentation else [])  # sizes that photos show
    scenes = choose(m.prompts["scenes"], n, g)
    plain = photos if args.own_prompts else choose(templates, n, g)
    return [fill(m, s if yes else t) for s, t, yes in zip(scenes, plain, scene.tolist())], scene


def set_rates(m, args, turn):
    for k, o in m.optimizers.items():
        for group in o.param_groups:
            group["lr"] = getattr(args, f"{k}_lr") * group.get("rate", 1.0) * turn.rate
        o.zero_grad()


def clip(parameters, limit, scale):
    """Take the scale out of the gradients and clip them to a norm; returns the norm they had."""
    parameters = [p for p in parameters if p.grad is not None]
    for p in parameters if scale != 1 else ():
        p.grad /= scale
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


def step_teacher(m, carries):
    """Step the teacher; if it carries, the student's weights move by as much."""
    old = [p.detach().clone() for p in m.moved["teacher"].values()] if carries else []
    m.optimizers["teacher"].step()
    with torch.no_grad():
        for theirs, new, was in zip(m.moved["student"].values(), m.moved["teacher"].values(), old):
            theirs += new - was


# ---------------------------------------------------------------------------------------------------------------
# The method

def iteration(m, args, turn, step):
    """One iteration (README, "Paper to code"); returns losses, gradient norms and the critics' duel as `Progress.after` wants them."""
    pair, heads, n = m.pair, m.heads, args.train_batch_size
    terms, norms, duel = {}, {}, {}
    set_rates(m, args, turn)
    g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a step depends on nothing but the seed
    photos = real_batch(m, args, n, g, step)
    echoes = turn.stage == "echo" and not args.echo_real_only
    t = timesteps(m, n, g)
    eps = torch.randn(n, *pair.latent_shape, generator=g).to(m.device)  # used three times

    # ---- 1. teacher: reconstruct photos, and echoes beside or instead of them; moves its UNet and the token
    if m.teaches and turn.who != "student":
        seen, left = (photos.z, eps, t, photos.prompts), n
        if echoes:
            seen, left = with_echo(m, args, seen, step)
        z, noise, level, prompts = seen
        with m.autocast():
            out = pair.teacher(pair.teacher.add_noise(z, noise, level), level, pair.text(prompts))
        target = pair.teacher.target(z, noise, level)
        real, echoed = (left / n, 1 - left / n) if left < n else (1, 1)  # of a batch that both share, each counts by its number
        loss = 0
        if left:
            terms["reconstruction"] = losses.reconstruction(out[:left], target[:left], photos.mask[:left])
            loss = args.reconstruction_weight * real * terms["reconstruction"]
        if echoes:
            terms["echo"] = losses.reconstruction(out[left:], target[left:])  # all of it: only a padded photo has a mask
            loss = loss + args.echo_weight * echoed * terms["echo"]
        (m.scale * loss).backward()
        norms["teacher's gradient"] = clip(m.moved["teacher"].values(), args.max_grad_norm, m.scale)
        # not in the echo stage: what the teacher learns from the student would push the student further the same way
        step_teacher(m, args.carry and turn.stage == "joint")
    if args.denoising_weight and turn.who != "teacher":  # baselines only: the one-step student under the ordinary diffusion loss
        terms["denoising"] = denoising_loss(m, photos.z, eps, t, photos.prompts, photos.mask)
        (m.scale * args.denoising_weight * terms["denoising"]).backward()
        if m.prior:
            pick = torch.randint(len(m.prior.prompts), (n,), generator=apart(args, step, 4))
            terms["prior"] = denoising_loss(m, m.prior.z[pick], eps, t, [m.prior.prompts[i] for i in pick.tolist()])
            (m.scale * args.denoising_weight * args.prior_weight * terms["prior"]).backward()

    if m.draws and turn.who != "teacher":
        # ---- 2. student: one step from pure noise
        prompts, scene = student_prompts(m, args, n, g, photos.prompts)
        with torch.no_grad():
            context = pair.text(prompts)
        own_context = context if args.detach_prompt and args.share_text else pair.student_text(prompts)
        student = View(pair.student.one_step(eps, own_context), pair, m.encoders, m.autocast)  # the step itself in fp32

        # ---- 3. target: the current teacher denoises the re-noised sample, without gradient
        c, target = alignment_target(m, args, student.z, eps, context, g)

        # ---- 4. student's loss: held to the teacher everywhere, to the photos where they can judge
        realism = torch.where(scene, args.scene_adversarial_weight, args.adversarial_weight)
        comparable, realism = bool(realism.any()), realism.to(m.device)
        adversarial, pull = adversarial_loss(heads, student, realism) if m.competes else (None, {})
        terms["alignment"] = (c * losses.alignment(student, target, args, g, m.impl)).mean()
        if m.competes:
            terms["adversarial"] = adversarial
        (m.scale * (terms["alignment"] + terms.get("adversarial", 0))).backward()

    norms["student's gradient"] = clip(m.moved["student"].values(), args.max_grad_norm, m.scale)
    norms["token's gradient"] = clip(m.rows.values(), float("inf"), m.scale)
    m.optimizers["student"].step()
    m.optimizers["token"].step()  # holds the teacher's gradient, and with --no-detach_prompt the student's too

    # ---- 5. critics: photos, and echoes that pass for photos, against the same student features
    if "adversarial" in terms:
        real = passed_off_as_real(m, args, photos.features, step) if echoes and args.echo_is_real else photos.features
        judged = (realism > 0).float()  # a scene that no photo shows would give the student away
        logits = {k: (h(real[k]), h(student.features(k).detach())) for k, h in heads.items()}
        terms["critic"] = sum(losses.critic(*v, judged) for v in logits.values()) / len(heads)
        m.optimizers["critic"].zero_grad()  # of what the student's loss left there
        (m.scale * terms["critic"]).backward()
        norms["critics' gradient"] = clip([p for h in heads.values() for p in h.parameters()],
                                           args.max_grad_norm if args.clip_critics else float("inf"), m.scale)
        m.optimizers["critic"].step()
        duel = {k: (pull[k], losses.critic_accuracy(*v, judged)) for k, v in logits.items()} if comparable else {}
    return terms, norms, duel


def denoising_loss(m, z, eps, t, prompts, mask=None):
    """The ordinary diffusion loss of the one-step student on latents z, as the baselines train it."""
    student = m.pair.student
    with m.autocast():
        out = student(student.add_noise(z, eps, t), t, m.pair.student_text(prompts))
    return losses.reconstruction(out, student.target(z, eps, t), mask)


@torch.no_grad()
def alignment_target(m, args, z_s, eps, context, g):
    """c(t') (B,) and the teacher's view of the student's latents z_s, re-noised to a random t' (Sauer et al. 2023)."""
    teacher = m.pair.teacher
    t = timesteps(m, len(z_s), g, args.target_noise)
    c = losses.alignment_weight(teacher.alphas_cumprod[t]) if args.weight_alignment else torch.ones(len(z_s), device=m.device)
    if not m.aligns:
        return c, None
    with m.autocast():
        z = teacher.denoise(teacher.add_noise(z_s, eps, t), t, context, m.empty, args.guidance_scale)
    return c, View(z, m.pair, m.encoders, m.autocast)


def adversarial_loss(heads, student, realism):
    """The critics' verdict on the student, each image weighed by realism (B,); and how strongly each critic pulls on its features."""
    features = {k: student.features(k) for k in heads}
    loss = sum((realism * losses.adversarial_per_sample(h(features[k]))).mean() for k, h in heads.items())
    pull = torch.autograd.grad(loss, list(features.values()), retain_graph=True)
    return loss, {k: v.norm() for k, v in zip(heads, pull)}


@torch.no_grad()
def gather_echo(m, args, path, turn):
    """The student draws what the photos' own prompts ask; samples most like the photos, faithful and distinct, are kept.

    Writes a sheet of them to `path`; each row begins with its first one's likeness to the photos.
    """
    pair, encoders, eyes = m.pair, m.encoders, ("identity", "clip")  # two encoders are harder to please than one
    g, templates = torch.Generator().manual_seed(args.seed + 1 + (turn.round - 1) * 500_009), m.prompts["templates"]
    m.echo.round = turn.round
    number = torch.randint(len(templates), (args.echo_samples,), generator=g)
    prompts = [fill(m, templates[i]) for i in number.tolist()]
    photos = m.photos.photos[:m.photos.count].to(m.device)
    photo = {k: encoders[k].embed(encoders[k].features(photos)) for k in eyes}
    images, seen = [], {k: [] for k in eyes}
    some = max(1, min(32, 2 ** 21 // pair.resolution ** 2))  # two million pixels at once; the rest waits in memory
    for part in (prompts[i:i + some] for i in range(0, len(prompts), some)):
        noise = torch.randn(len(part), *pair.latent_shape, generator=g).to(m.device)
        pixels = to_bytes(pair.decode(pair.student.one_step(noise, pair.student_text(part))))  # what a picture file would hold
        x = from_bytes(pixels)
        for k in eyes:
            seen[k].append(encoders[k].embed(encoders[k].features(x)))
        images.append(pixels.cpu())
    images, seen, number = torch.cat(images), {k: torch.cat(v) for k, v in seen.items()}, number.to(m.device)
    asked = encoders["clip"].embed_text(pair.text.tokenizer, [t.replace("{}", args.class_word) for t in templates])[number]
    likeness, identity, fidelity = losses.score_echo(seen, photo, asked, number)
    keep = losses.select_echo(identity, fidelity, seen["clip"], max(1, round(args.echo_keep * len(prompts))), args.echo_floor)
    save_png(grid([(f"{likeness[keep[8 * i]]:.2f}", row) for i, row in enumerate(from_bytes(images[keep][:64]).split(8))]), path)
    print(f"\necho: {len(keep)} of {len(prompts)} samples kept, likeness {likeness.mean():.3f} -> {likeness[keep].mean():.3f}")
    m.echo.images, m.echo.prompts = images[keep], [prompts[i] for i in keep.tolist()]


@torch.no_grad()
def listen(m, args, turn, out):
    """Have this round's echo ready: gather it unless a checkpoint brought it, and study it; `out` is the run's folder."""
    if m.echo.z is not None and m.echo.round == turn.round or turn.who == "student" and not args.echo_is_real:
        return
    if m.echo.round != turn.round:
        gather_echo(m, args, out / ("echo.png" if turn.round == 1 else f"echo-{turn.round}.png"), turn)
    m.echo.features = study(m, from_bytes(m.echo.images), m.heads if args.echo_is_real else [])
    m.echo.z = m.echo.features["z"]


@torch.no_grad()
def preview(m, args, path):
    """A grid of photos and of what teacher and student draw for the preview prompts."""
    pair, context = m.pair, m.pair.text(m.preview)
    rows = [("photos", m.photos.photos[:min(m.photos.count, len(m.preview))]),
            ("teacher", pair.decode(pair.teacher.sample(m.preview_noise, context, 16, m.empty, args.guidance_scale))),
            ("student", pair.decode(pair.student.sample(m.preview_noise, pair.student_text(m.preview), 1)))]
    save_png(grid(rows), path)


# ---------------------------------------------------------------------------------------------------------------

def train(argv=None):
    """One run."""
    args = parse_arguments(argv)
    with Run(args, argv) as run:
        learn(args, run)


def learn(args, run):
    device, why = pick_device(args.device)
    check_memory(args.base, device, vars(args))
    announce_download(args.base, vars(args))
    m, turns = build(args, device), plan(args)
    before = {role: {k: v.detach().cpu().clone() for k, v in weights.items()} for role, weights in m.moved.items()}
    announce(m, args, why, turns)
    progress = Progress(run.out, args, device, len(turns))
    run.restore(m.state | {"progress": progress})

    started = time.time()
    for step in run.steps(len(turns), progress.bar):
        turn = turns[step]
        if turn.stage == "echo" and not args.echo_real_only:
            listen(m, args, turn, run.out)
        progress.after(step, *iteration(m, args, turn, step))
        if args.preview_steps and (step + 1) % args.preview_steps == 0:
            preview(m, args, run.out / "previews" / f"{step + 1:05d}.png")

    if args.train_unet == "lora":
        before = {"teacher": merge_low_rank(m.pair.teacher.unet), "student": merge_low_rank(m.pair.student.unet)}
    progress.finish()
    preview(m, args, run.out / "preview.png")
    save_strip(m.photos.photos[:min(8, m.photos.count)], run.out / "photos.png")
    save_run(run.out, m.pair, before, {k: v for k, v in vars(args).items() if k != "resume_from_checkpoint"}, m.preview[:4])
    print(f"{(time.time() - started) / 60:.1f} minutes; the result is in {run.out}: preview.png, losses.png, student and teacher weights")
    print(f'sample it: python sample.py --run {shlex.quote(str(run.out))} --prompt "a {m.name} on the beach"')
    print("or draw while you type: python sample.py --live")
    run.finish()


def main(argv=None):
    """One run; or, with several concepts, those that fall to this process, one after the other. One that is refused does not stop the rest."""
    failed = []
    for concept, own in share(argv):
        try:
            train(own)
        except SystemExit as stop:
            if concept is not None and stop.code != 2:
                print("the same command as before goes on with all that is left")
            if concept is None or stop.code != 2:
                raise
            failed.append(concept)
    if failed:
        fail(f"not trained: {', '.join(failed)}; the sentences above say why")


if __name__ == "__main__":
    main()
