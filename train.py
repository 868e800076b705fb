"""Teach a one-step text-to-image model a concept from 3-6 photos: EchoDistill (arXiv 2510.20512).

    python train.py --concept data/dog

A teacher and a one-step student train together around one text encoder (joint stage); then the student's samples are
echoed back to the teacher, and the student follows it (echo stage). README.md maps the paper to the code.
"""
import argparse
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import losses
from data.images import curves, fail, grid, load_photo, load_photos, load_prompts, make_folder, photo_paths, save_png
from kernels.dispatch import resolve
from kernels.guided_mse import guided_mse
from model import (BASES, RECIPES, Critic, check_memory, check_pair, checkpoints, compile_networks, find_base, load_encoders, load_pair,
                   load_tokenizer, merge_low_rank, moves, pick_device, read_checkpoint, read_config, restore, save_checkpoint, save_json,
                   save_memory, save_run, trainable_parameters)

MAY_CHANGE_ON_RESUME = {"output_dir", "device", "resume_from_checkpoint", "preview_steps", "checkpointing_steps", "checkpoints_total_limit"}
# which flags to lower when a loss or gradient is not finite
LIKELY = {"reconstruction": "--teacher_lr or --token_lr", "denoising": "--student_lr or --token_lr", "alignment": "--teacher_lr or --student_lr",
          "adversarial": "--critic_lr or --adversarial_weight", "echo": "--teacher_lr or --echo_weight", "critic": "--critic_lr",
          "teacher's gradient": "--teacher_lr", "student's gradient": "--teacher_lr or --student_lr", "token's gradient": "--token_lr",
          "critics' gradient": "--critic_lr"}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                epilog="flags without a default take it from the base's recipe (RECIPES in model.py)")
    yes_no = argparse.BooleanOptionalAction

    g = p.add_argument_group("concept and output")
    g.add_argument("--concept", required=True, help="folder of 3-6 photos of the subject")
    g.add_argument("--class_word", help="the subject's ordinary noun; default: the folder's name")
    g.add_argument("--token", default="<v>", help="the new word for the subject")
    g.add_argument("--output_dir", help="default: out/FOLDER NAME")

    g = p.add_argument_group("models")
    g.add_argument("--base", help=f"one of {', '.join(BASES)}, or a folder laid out like data/emoji/base; default: emoji, with --teacher or --student sd-turbo")
    g.add_argument("--teacher", help="folder or hub repository in place of the base's teacher")
    g.add_argument("--student", help="folder or hub repository in place of the base's student")
    g.add_argument("--paper_exact", action=yes_no, default=False, help="the released settings, and images unnormalised before encoders and SWD")
    g.add_argument("--resolution", type=int, help="pixels along one side; default: the student's own")
    g.add_argument("--carry", action=yes_no, default=None, help="every step of the teacher's weights in the joint stage moves the student's too (paper: no)")
    g.add_argument("--train_unet", choices=["kv", "attention", "all", "lora"], help="which UNet weights move (paper: kv)")
    g.add_argument("--lora_rank", type=int, default=8, help="of --train_unet lora, in every attention layer")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"],
                   help="autocast of the forward passes, default bf16 (paper: no); fp16 only with an epsilon teacher")
    g.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="of the alignment losses; auto: Triton on CUDA")

    g = p.add_argument_group("cost (off: as the paper)")
    g.add_argument("--tiny_vae", action=yes_no, default=False, help="decode for the image losses with the base's tiny autoencoder")
    g.add_argument("--dinov2_size", type=int, default=518, help="pixels that DINOv2 sees, a multiple of 14; 224 costs a sixth")
    g.add_argument("--gradient_checkpointing", action=yes_no, default=False, help="less memory, about a third more time")
    g.add_argument("--compile", action=yes_no, default=False, help="torch.compile and channels-last for both UNets and the decoder")

    g = p.add_argument_group("optimisation")
    g.add_argument("--max_train_steps", type=int, help="iterations of the joint stage")
    g.add_argument("--train_batch_size", type=int, help="images per iteration and model")
    g.add_argument("--teacher_lr", type=float, help="0 freezes the teacher")
    g.add_argument("--student_lr", type=float, help="0 freezes the student")
    g.add_argument("--kv_rate", type=float, help="learning rate of cross-attention keys and values, as a multiple of their UNet's (paper: 1)")
    g.add_argument("--token_lr", type=float, help="0 freezes the concept token at the class word")
    g.add_argument("--critic_lr", type=float, help="of the discriminators' heads")
    g.add_argument("--lr_decay", type=float, help="last share of each stage in which the learning rates fall to 0 (paper: 0); all of the student's part of the echo stage")
    g.add_argument("--weight_decay", type=float, default=1e-2, help="AdamW, not on the token; 0 switches it off")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients of each UNet and of the critics are clipped to this norm")
    g.add_argument("--seed", type=int, default=42, help="of everything; same seed, same bytes on a CPU")

    g = p.add_argument_group("losses (a weight of 0 switches a term off)")
    g.add_argument("--reconstruction_weight", type=float, default=1.0, help="teacher on the photos; 0 freezes teacher and token")
    g.add_argument("--adversarial_weight", type=float, help="student against the photos, per discriminator")
    g.add_argument("--scene_adversarial_weight", type=float, help="the same on scene prompts, which no photo shows")
    g.add_argument("--identity_weight", type=float, help="1 - cosine of image tokens, student against teacher")
    g.add_argument("--latent_weight", type=float, help="latent MSE, student against teacher")
    g.add_argument("--swd_weight", type=float, help="multi-scale sliced Wasserstein distance of the decoded images")
    g.add_argument("--swd_projections", type=int, help="random filters per call (paper: 128)")
    g.add_argument("--swd_positions", type=int, help="patches per level at most, about, default 16384; a 64-px image has 2916; 0: all (paper)")
    g.add_argument("--lpips_weight", type=float, default=0., help="perceptual distance of the decoded images in the identity encoder's features")
    g.add_argument("--guidance_scale", type=float, help="of the teacher, in the alignment target and in samples")
    g.add_argument("--target_noise", type=float, help="targets start at noise levels from this share of the schedule up (paper: 0)")
    g.add_argument("--weight_alignment", action=yes_no, default=None, help="weigh alignment by c(t') = alpha_bar(t') (paper: yes)")
    g.add_argument("--detach_prompt", action=yes_no, default=True, help="keep student losses away from the token")

    g = p.add_argument_group("baselines and ablations (defaults: the method)")
    g.add_argument("--denoising_weight", type=float, default=0.0,
                   help="student's own denoising loss on the photos, as Textual Inversion and Custom Diffusion train; moves the token too")
    g.add_argument("--sequential", action=yes_no, default=False, help="all iterations for the teacher alone, then as many for the student")
    g.add_argument("--share_text", action=yes_no, default=True, help="off: the student learns a token of its own by its own losses")

    g = p.add_argument_group("data")
    g.add_argument("--scene_prompts", type=float, help="share of the student's prompts that are scenes (paper: 0)")
    g.add_argument("--crop", choices=["centre", "pad"], default="centre", help="the centre square, or the whole photo on masked grey")
    g.add_argument("--flip", action=yes_no, default=None, help="mirror photos at random (paper: yes)")
    g.add_argument("--size_augmentation", action=yes_no, default=None, help="shrink or zoom photos, and say so in the prompt")

    g = p.add_argument_group("echo")
    g.add_argument("--echo_steps", type=int, help="iterations in which the teacher hears the echo, then as many in which the student follows; 0: no echo")
    g.add_argument("--echo_real_only", action=yes_no, default=False, help="control: as many iterations without the echo")
    g.add_argument("--echo_samples", type=int, help="one-step samples to choose from")
    g.add_argument("--echo_keep", type=float, help="share of them that is kept at most; at least one")
    g.add_argument("--echo_floor", type=float, help="share refused for disagreeing with its prompt, before identity ranks")
    g.add_argument("--echo_share", type=float, help="echoed images on top of each batch of photos, as a share of it; at least one")
    g.add_argument("--echo_weight", type=float, help="of the teacher's loss on the kept samples")
    g.add_argument("--echo_noise", type=float, help="teacher sees echoes at noise levels from this share of the schedule up")

    g = p.add_argument_group("logging and checkpoints")
    g.add_argument("--log_steps", type=int, default=10, help="iterations per point of the loss curves")
    g.add_argument("--preview_steps", type=int, default=100, help="iterations per preview grid; 0 draws only the last")
    g.add_argument("--checkpointing_steps", type=int, default=100, help="iterations per checkpoint")
    g.add_argument("--checkpoints_total_limit", type=int, default=2, help="newest checkpoints that are kept; 0 keeps all")
    g.add_argument("--resume_from_checkpoint", help='"latest" or a file of OUTPUT_DIR/checkpoints')

    return p


def parse_arguments(argv=None):
    """Flags with the base's recipe filled in; everything that the input alone tells is refused here."""
    args = parser().parse_args(argv)
    args.base = args.base or ("sd-turbo" if args.teacher or args.student else "emoji")
    recipe = RECIPES["paper" if args.paper_exact else find_base(args.base).recipe]
    if args.train_unet == "lora" and args.carry is None:
        args.carry = False  # low-rank factors of one network mean nothing in another
    for name, value in ({"mixed_precision": "bf16", "swd_positions": 16384} | recipe).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for path in photo_paths(args.concept):
        load_photo(path, 8)
    folder = Path(args.concept).resolve().name
    args.class_word = (folder.rstrip("0123456789").replace("_", " ") if args.class_word is None else args.class_word).strip()
    if not args.class_word:
        fail("--class_word is empty and the folder's name gives none; say what the subject is, such as --class_word dog")
    args.output_dir = args.output_dir or str(Path("out") / folder)
    try:
        resolve(args.kernels, pick_device(args.device)[0])
    except ValueError as e:
        fail(f"--kernels {args.kernels}: {e}")
    for name in ("max_train_steps", "train_batch_size", "echo_samples", "swd_projections", "log_steps", "checkpointing_steps",
                 "lora_rank"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("echo_steps", "preview_steps", "checkpoints_total_limit", "teacher_lr", "student_lr", "token_lr", "critic_lr", "adversarial_weight",
                 "scene_adversarial_weight", "identity_weight", "latent_weight", "swd_weight", "swd_positions", "lpips_weight", "weight_decay", "reconstruction_weight",
                 "guidance_scale", "kv_rate", "denoising_weight", "echo_weight"):
        if not 0 <= getattr(args, name) < float("inf"):
            fail(f"--{name} must be a number from 0 up, not {getattr(args, name)}")
    if not args.max_grad_norm > 0:
        fail(f"--max_grad_norm must be above 0, not {args.max_grad_norm}; inf switches clipping off")
    for name in ("scene_prompts", "lr_decay", "echo_keep", "echo_floor", "echo_share", "echo_noise", "target_noise"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name} is a share from 0 to 1, not {getattr(args, name)}")
    if args.carry and args.train_unet == "lora":
        fail("--carry moves plain weights; use --train_unet kv, attention or all, or --no-carry")
    if args.sequential and args.echo_steps:
        fail("--sequential is a baseline without an echo stage; add --echo_steps 0")
    if args.echo_real_only and not args.echo_steps:
        fail("--echo_real_only is the control of an echo stage, which --echo_steps 0 switches off; leave one of them out")
    if args.teacher_lr == args.student_lr == args.token_lr == 0:
        fail("--teacher_lr, --student_lr and --token_lr are all 0, so nothing would be learned; raise one of them")
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed must be from 0 to {2 ** 32 - 1}, not {args.seed}")
    if not args.token.strip() or any(c.isspace() for c in args.token):
        fail(f"--token {args.token!r} must be one word without spaces, such as <v>")
    if args.dinov2_size < 14 or args.dinov2_size % 14:
        fail(f"--dinov2_size must be a multiple of 14, such as 224 or 518, not {args.dinov2_size}")
    base = find_base(args.base, vars(args))
    check_pair(base)
    if args.tiny_vae and not base.tiny_vae:
        fail(f"--tiny_vae: the base {args.base} names no tiny autoencoder; leave the flag out")
    if args.mixed_precision == "fp16" and read_config(base.teacher, "scheduler", "scheduler_config.json").get("prediction_type") == "v_prediction":
        fail("--mixed_precision fp16 overflows in a v-prediction teacher (black images); use bf16 or no")
    if args.resolution is not None:
        step = 2 ** sum(len(read_config(source, part)["block_out_channels"]) - 1 for source, part in ((base.teacher, "vae"), (base.student, "unet")))
        if args.resolution < step or args.resolution % step:
            fail(f"--resolution must be a multiple of {step} for this pair, not {args.resolution}")
    tokenizer = load_tokenizer(base.teacher)
    if len(tokenizer.tokenize(args.token)) == 1:
        fail(f"--token {args.token} is a word that the base already knows; take a new one, such as <v>")
    if args.token in args.class_word:
        fail(f"--class_word {args.class_word} holds the token {args.token} itself; say the ordinary noun, such as dog")
    if len(tokenizer.tokenize(args.class_word)) > tokenizer.model_max_length // 2:
        fail(f"--class_word {args.class_word[:40]}... fills more than half of the {tokenizer.model_max_length} tokens that the model reads; shorten it")
    return args


def find_checkpoint(args):
    """(path, meta, tensors) to go on from; "latest" passes over a damaged file and says so, a damaged PATH is refused."""
    latest = args.resume_from_checkpoint == "latest"
    for path in checkpoints(args.output_dir)[::-1] if latest else [Path(args.resume_from_checkpoint)]:
        try:
            meta, tensors = read_checkpoint(path)
        except ValueError as error:
            if not latest:
                fail(f"--resume_from_checkpoint: {error}; name another one, or say latest")
            print(f"note: {error}; the one before is used")
            continue
        for k, v in vars(args).items():
            if k not in MAY_CHANGE_ON_RESUME and meta["flags"].get(k) != v:
                fail(f"--{k} is {v} but {path} was made with {meta['flags'].get(k)}; give the same flags to resume")
        return path, meta, tensors
    fail(f"--resume_from_checkpoint: there is no whole checkpoint in {Path(args.output_dir, 'checkpoints')}; leave the flag out to start anew")


class Photos:
    """The reference photos with their augmentation: flip, and Custom Diffusion's shrink-or-zoom with a mask."""

    SIZES = {"small": (.4, .6), "big": (1.2, 1.4)}  # factor of the photo's size, and the word the prompt then says

    def __init__(self, photos, masks, args):
        both = args.flip
        self.photos, self.masks = (torch.cat([x, x.flip(3)]) if both else x for x in (photos, masks))  # (N or 2 N, ...)
        self.count, self.args = len(photos), args

    def batch(self, n, g):
        """n augmented photos (n, 3, S, S), their masks (n, 1, S, S), a size word or "" each, and their numbers; g a CPU generator."""
        which = torch.randint(self.count, (n,), generator=g)
        if self.args.flip:
            which = which + self.count * (torch.rand(n, generator=g) < .5)
        x, mask, said = self.photos[which], self.masks[which], [""] * n
        if self.args.size_augmentation:
            size, x, mask = x.shape[-1], x.clone(), mask.clone()
            for i, (kind, u, left, top) in enumerate(zip(torch.randint(3, (n,), generator=g).tolist(),
                                                         *torch.rand(3, n, generator=g).tolist())):
                if kind == 0:
                    continue
                word, (low, high) = list(self.SIZES.items())[kind - 1]
                new = round(size * (low + (high - low) * u))
                photo = F.interpolate(x[i:i + 1], size=(new, new), mode="bilinear", antialias=True)[0]
                part = F.interpolate(mask[i:i + 1], size=(new, new))[0]
                a, b = (round(abs(size - new) * v) for v in (left, top))
                if new > size:
                    photo, part = (v[:, b:b + size, a:a + size] for v in (photo, part))
                if not part.any():
                    continue  # nothing of a padded panorama would be seen: leave it as it is
                said[i] = word
                if new > size:
                    x[i], mask[i] = photo, part
                else:
                    x[i], mask[i] = 0, 0  # grey around the shrunk photo, and no loss there
                    x[i, :, b:b + new, a:a + new], mask[i, :, b:b + new, a:a + new] = photo, part
        return x, mask, said, which


def main(argv=None):
    args = parse_arguments(argv)
    handlers = {s: signal.signal(s, lambda number, _: sys.exit(128 + number)) for s in (signal.SIGINT, signal.SIGTERM)}
    device, why = pick_device(args.device)
    impl, why_impl = resolve(args.kernels, device)
    resumed = find_checkpoint(args) if args.resume_from_checkpoint else None
    out = make_folder(args.output_dir, "--output_dir")
    name = f"{args.token} {args.class_word}"

    # -- models -------------------------------------------------------------------------------------------------
    check_memory(args.base, device, vars(args))
    pair = load_pair(args.base, args.token, args.class_word, device, vars(args))
    encoders = load_encoders(args.base, device, vars(args))
    prompts = load_prompts(find_base(args.base).prompts)
    photos, masks = (x.to(device) for x in load_photos(args.concept, pair.resolution, args.crop, masks=True))
    if args.gradient_checkpointing:
        save_memory(pair, encoders)
    if args.compile:
        compile_networks(pair.teacher.unet, pair.student.unet, (pair.tiny_vae or pair.vae).decoder)
    torch.manual_seed(args.seed)
    heads = {k: Critic(e.width).to(device) for k, e in encoders.items() if e.has_critic}
    moved = {k: trainable_parameters(d.unet, args.train_unet, args.lora_rank) for k, d in (("teacher", pair.teacher), ("student", pair.student))}
    for role, lr in (("teacher", args.teacher_lr), ("student", args.student_lr)):
        for p in moved[role].values():
            p.requires_grad_(lr > 0)
    before = {role: {k: v.detach().cpu().clone() for k, v in moved[role].items()} for role in moved}
    rows = {"row": pair.text.row}
    if not args.share_text:
        pair.unshare_text()
        rows["student_row"] = pair.student_text.row

    def groups(weights):  # keys and values of cross-attention, which read the token, may learn at another rate
        parts = ([v for k, v in weights.items() if moves(k, "kv") == inside] for inside in (True, False))
        return [{"params": part, "rate": rate} for part, rate in zip(parts, (args.kv_rate, 1.0)) if part]

    optimizers = {
        "teacher": torch.optim.AdamW(groups(moved["teacher"]), lr=args.teacher_lr, weight_decay=args.weight_decay, fused=True),
        "token": torch.optim.AdamW(rows.values(), lr=args.token_lr, weight_decay=0),
        "student": torch.optim.AdamW(groups(moved["student"]), lr=args.student_lr, weight_decay=args.weight_decay, fused=True),
        "critic": torch.optim.AdamW([p for h in heads.values() for p in h.parameters()], lr=args.critic_lr,
                                    weight_decay=args.weight_decay)}
    state = {"teacher": moved["teacher"], "student": moved["student"], "token": rows, **heads}
    joint, echoing, decay = args.max_train_steps, args.echo_steps, args.lr_decay
    stages = ([("teacher", joint, decay), ("student", joint, decay)] if args.sequential else
              [("both", joint, decay), ("teacher", echoing, decay), ("student", echoing, 1.)])  # no stage after it to smooth its last steps
    schedule = [(who, min(1, (length - i) / max(1, share * length))) for who, length, share in stages for i in range(length)]
    total = len(schedule)
    teaches = args.reconstruction_weight > 0 and args.teacher_lr + args.token_lr > 0
    aligns = args.identity_weight + args.latent_weight + args.swd_weight + args.lpips_weight > 0
    competes = args.adversarial_weight + args.scene_adversarial_weight > 0
    draws = (args.student_lr > 0 or not args.detach_prompt) and (aligns or competes)
    print(f"device {device} ({why}), {args.mixed_precision} autocast, base {args.base}: teacher {pair.teacher.prediction_type}, "
          f"student {pair.student.prediction_type}, {pair.resolution} px")
    print(f"alignment losses in {impl} ({why_impl})")
    print(f"concept {args.concept}: {len(photos)} photos of {name!r}; training {args.train_unet} = "
          f"{sum(p.numel() for p in moved['teacher'].values()):,} weights in each UNet and one token of {pair.text.row.numel()}")
    print(", then ".join(f"{length} iterations of {who}" for who, length, _ in stages if length) + f", batch {args.train_batch_size}")

    # -- resume -------------------------------------------------------------------------------------------------
    first, history, sums, echo = 0, [], {}, None
    if resumed:
        path, meta, tensors = resumed
        try:
            restore(tensors, state, optimizers)
        except ValueError as error:
            fail(f"--resume_from_checkpoint {path}: {error}; has --base changed since?")
        first, history = meta["step"], meta["history"]
        sums = {k: [torch.tensor(x, device=device) for x in v] for k, v in meta["sums"].items()}
        if "echo/images" in tensors:
            echo = {"images": tensors["echo/images"], "prompts": meta["echo_prompts"]}
        resumed = tensors = None
        print(f"resumed {path} at iteration {first}")
    else:  # nothing of an earlier run may be taken for a part of this one, nor its unfinished work be lost by a forgotten flag
        if checkpoints(out):
            shutil.rmtree(out / "checkpoints-before", ignore_errors=True)
            (out / "checkpoints").rename(out / "checkpoints-before")
            print(f"note: an unfinished run was here; to go on with it instead, add --resume_from_checkpoint "
                  f"{checkpoints(out, 'checkpoints-before')[-1]}")
        for part in ("checkpoints", "previews"):
            shutil.rmtree(out / part, ignore_errors=True)
        (out / "echo.png").unlink(missing_ok=True)

    def checkpoint(step):
        path = out / "checkpoints" / f"step-{step:06d}.safetensors"
        save_checkpoint(path, state | {"echo": {"images": echo["images"]} if echo else {}}, optimizers,
                        {"step": step, "history": history, "sums": {k: [x.item() for x in v] for k, v in sums.items()},
                         "echo_prompts": echo["prompts"] if echo else [], "flags": vars(args)})
        if args.checkpoints_total_limit:
            for old in [p for p in checkpoints(out) if p <= path][:-args.checkpoints_total_limit]:
                old.unlink()

    # -- helpers ------------------------------------------------------------------------------------------------
    scale = 1024 if args.mixed_precision == "fp16" else 1  # lifts small gradients above fp16's smallest number, 6e-8

    def autocast():
        return torch.autocast(device.type, torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16,
                              enabled=args.mixed_precision != "no")

    def clip(parameters, limit=args.max_grad_norm):
        """Take the scale out of the gradients and clip them to a norm; returns the norm they had."""
        parameters = [p for p in parameters if p.grad is not None]
        for p in parameters if scale != 1 else ():
            p.grad /= scale
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def stop_if_not_finite():
        """Every loss and gradient since the last call, in the order in which they came."""
        for number, row in watched:
            for what, value in row.items():
                if not value.isfinite():
                    found = checkpoints(out)
                    fail(f"{what} is {value.item()} at iteration {number}; lower {LIKELY[what]}"
                         + (" or try --mixed_precision no" if args.mixed_precision != "no" else "") + "; "
                         + (f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written yet"))
        watched.clear()

    def fill(template, word=""):
        return template.replace("{}", f"{word} {name}".strip())

    def upper(t, share):
        """Timesteps of the whole schedule moved into its noisier part, from `share` up."""
        return pair.teacher.last - ((pair.teacher.last - t) * (1 - share)).long()

    def choose(options, n, g):
        return [options[i] for i in torch.randint(len(options), (n,), generator=g).tolist()]

    with torch.no_grad():
        empty = pair.text([""])
    asked_from = prompts["templates"] + (prompts["sized"] if args.size_augmentation else [])  # sizes that photos show
    n, shape = args.train_batch_size, pair.latent_shape
    dataset = Photos(photos, masks, args)
    preview_prompts = [fill(p) for p in prompts["preview"]]
    preview_noise = torch.randn(len(preview_prompts), *shape, generator=torch.Generator().manual_seed(args.seed)).to(device)

    @torch.no_grad()
    def preview(path):
        context = pair.text(preview_prompts)
        rows = [("photos", photos[:len(preview_prompts)]),
                ("teacher", pair.decode(pair.teacher.sample(preview_noise, context, 16, empty, args.guidance_scale))),
                ("student", pair.decode(pair.student.sample(preview_noise, pair.student_text(preview_prompts), 1)))]
        save_png(grid(rows), path)

    @torch.no_grad()
    def latents(images):
        with autocast():
            return torch.cat([pair.encode(x.to(device)) for x in images.split(8)])

    @torch.no_grad()
    def study(images):
        """What the frozen networks say of photos: latents "z", and features for each critic."""
        z, seen = latents(images), []
        for x, part in zip(images.split(8), z.split(8)):
            with autocast():
                x = x if pair.tiny_vae is None else pair.decode(part, tiny=True)  # or critics could tell photos by their decoder
                seen.append({k: encoders[k].features(x) for k in heads})
        return {"z": z} | {k: torch.cat([row[k] for row in seen]) for k in heads}

    @torch.no_grad()
    def gather_echo():
        """The student draws what the photos' own prompts ask; the samples most like the photos, faithful and distinct, come back."""
        g, kinds = torch.Generator().manual_seed(args.seed + 1), prompts["templates"]
        number = torch.randint(len(kinds), (args.echo_samples,), generator=g)
        asked = [fill(kinds[i]) for i in number.tolist()]
        photo = {k: encoders[k].embed(encoders[k].features(photos)) for k in ("identity", "clip")}
        images, seen = [], {k: [] for k in photo}
        some = max(1, min(32, 2 ** 21 // pair.resolution ** 2))  # two million pixels at once; the rest waits in memory
        for part in (asked[i:i + some] for i in range(0, len(asked), some)):
            noise = torch.randn(len(part), *shape, generator=g).to(device)
            x = pair.decode(pair.student.one_step(noise, pair.student_text(part))).clamp(-1, 1)
            for k in seen:
                seen[k].append(encoders[k].embed(encoders[k].features(x)))
            images.append(x.cpu())
        images, seen = torch.cat(images), {k: torch.cat(v) for k, v in seen.items()}
        likeness = sum((seen[k] @ photo[k].T).mean(1) for k in photo) / len(photo)  # two encoders are harder to please than one
        said = encoders["clip"].embed_text(pair.text.tokenizer, [k.replace("{}", args.class_word) for k in kinds])[number.to(device)]

        def beside_its_prompt(score):  # prompts differ in how high and how widely they score; standardise within each
            same = F.one_hot(number, len(kinds)).float().to(score.device)
            same = same / same.sum(0).clamp(min=1).sqrt()  # same @ same.T averages over samples of one prompt
            score = score - same @ (same.T @ score)
            return score / (same @ (same.T @ score.square())).sqrt().clamp(min=1e-6)

        keep = losses.select_echo(beside_its_prompt(likeness), beside_its_prompt((seen["clip"] * said).sum(1)), seen["clip"],
                                  max(1, round(args.echo_keep * len(asked))), args.echo_floor)
        save_png(grid([(f"{likeness[keep[8 * i]]:.2f}", row) for i, row in enumerate(images[keep][:64].split(8))]), out / "echo.png")
        print(f"\necho: {len(keep)} of {len(asked)} samples kept, likeness {likeness.mean():.3f} -> {likeness[keep].mean():.3f}")
        return {"images": images[keep], "prompts": [asked[i] for i in keep.tolist()]}

    stop = []  # from here on, the first Ctrl-C asks for a checkpoint and the second ends the program at once
    for s in handlers:
        signal.signal(s, lambda number, _: sys.exit(128 + number) if stop else stop.append(128 + number))

    watched, won, first_pull = [], set(), {}  # losses and gradients not yet looked at; critics that have won; how they pulled at first
    pull, right = ({k: [] for k in heads} for _ in range(2))
    known = None if args.size_augmentation else study(dataset.photos)  # that makes new ones for ever
    z_echo = None
    # -- the loop -----------------------------------------------------------------------------------------------
    started, progress = time.time(), tqdm(range(first, total), initial=first, total=total, mininterval=1)
    for step in progress:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a step depends on nothing but the seed
        who, rate = schedule[step]
        for k, o in optimizers.items():
            for group in o.param_groups:
                group["lr"] = getattr(args, f"{k}_lr") * group.get("rate", 1.0) * rate
            o.zero_grad()
        hears = who == "teacher" and not args.sequential and not args.echo_real_only
        if hears and z_echo is None:
            echo = echo or gather_echo()
            z_echo = latents(echo["images"])

        # real images with template prompts; where the teacher hears the echo, samples with their own prompts come on top of them
        x, mask, said, which = dataset.batch(n, g)
        captions = [fill(t, w) for t, w in zip(choose(prompts["templates"], n, g), said)]
        t = torch.randint(pair.teacher.last + 1, (n,), generator=g)
        eps = torch.randn(n, *shape, generator=g).to(device)
        real = study(x) if known is None else {k: v[which] for k, v in known.items()}
        z, t_all, eps_all, z_all, captions_all = real["z"], t, eps, real["z"], captions
        if hears:
            own = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 500_009)  # so the control draws the same as this
            pick = torch.randint(len(z_echo), (max(1, round(args.echo_share * n)),), generator=own)
            t_echo = upper(torch.randint(pair.teacher.last + 1, pick.shape, generator=own), args.echo_noise)  # layout, not detail
            eps_echo = torch.randn(len(pick), *shape, generator=own).to(device)
            t_all, eps_all, z_all = torch.cat([t, t_echo]), torch.cat([eps, eps_echo]), torch.cat([z, z_echo[pick]])
            captions_all = captions + [echo["prompts"][i] for i in pick.tolist()]

        # ---- 1. teacher: reconstruct the images; moves its UNet and the token
        terms, norms = {}, {}
        t, t_all, mask_z = t.to(device), t_all.to(device), F.interpolate(mask, size=shape[1:], mode="area")
        if teaches and who != "student":
            with autocast():
                out_teacher = pair.teacher(pair.teacher.add_noise(z_all, eps_all, t_all), t_all, pair.text(captions_all))
            target = pair.teacher.target(z_all, eps_all, t_all)
            terms["reconstruction"] = losses.reconstruction(out_teacher[:n], target[:n], mask_z)
            loss = args.reconstruction_weight * terms["reconstruction"]
            if hears:
                terms["echo"] = losses.reconstruction(out_teacher[n:], target[n:])
                loss = loss + args.echo_weight * terms["echo"]
            (scale * loss).backward()
            norms["teacher's gradient"] = clip(moved["teacher"].values())
            # not in the echo stage: what the teacher learns from the student would push the student further the same way
            old = [p.detach().clone() for p in moved["teacher"].values()] if args.carry and step < args.max_train_steps else []
            optimizers["teacher"].step()
            with torch.no_grad():
                for theirs, new, was in zip(moved["student"].values(), moved["teacher"].values(), old):
                    theirs += new - was
        if args.denoising_weight and who != "teacher":  # baselines only: the one-step student under the ordinary diffusion loss
            with autocast():
                out_student = pair.student(pair.student.add_noise(z, eps, t), t, pair.student_text(captions))
            terms["denoising"] = losses.reconstruction(out_student, pair.student.target(z, eps, t), mask_z)
            (scale * args.denoising_weight * terms["denoising"]).backward()

        if draws and who != "teacher":
            # ---- 2. student: one step from pure noise
            in_scene = torch.rand(n, generator=g) < args.scene_prompts
            asked = [fill(s if yes else t) for s, t, yes in zip(choose(prompts["scenes"], n, g), choose(asked_from, n, g),
                                                                 in_scene.tolist())]
            context = pair.text(asked).detach()
            own_context = pair.student_text(asked) if not args.detach_prompt or not args.share_text else context
            with autocast():
                z_s = pair.student.one_step(eps, own_context)
                x_s = pair.decode(z_s, tiny=True)
                features_s = {k: encoders[k].features(x_s) for k in heads}

            # ---- 3. alignment target: the current teacher denoises the re-noised sample
            t = upper(torch.randint(pair.teacher.last + 1, (n,), generator=g), args.target_noise).to(device)
            c = losses.alignment_weight(pair.teacher.alphas_cumprod[t]) if args.weight_alignment else torch.ones(n, device=device)
            aligned = torch.zeros_like(c)
            if aligns:
                with torch.no_grad(), autocast():
                    z_t = pair.teacher.add_noise(z_s, eps, t)
                    guesses = pair.teacher.guided(z_t, t, context, empty)
                z_teacher, latent = guided_mse(*guesses, z_t, z_s, *pair.teacher.scales(t), torch.full_like(c, args.latent_weight),
                                               args.guidance_scale, pair.teacher.prediction_type, impl)
                with torch.no_grad(), autocast():
                    x_teacher = pair.decode(z_teacher, tiny=True)
                    features_teacher = encoders["identity"].features(x_teacher)

            # ---- 4. student's loss: held to the teacher everywhere, to the photos where they can judge
            realism = torch.where(in_scene, args.scene_adversarial_weight, args.adversarial_weight)
            comparable, realism = bool(realism.any()), realism.to(device)
            if args.identity_weight:
                tokens = [encoders["identity"].tokens(f) for f in (features_s["identity"], features_teacher)]  # (B, T, d)
                aligned = aligned + args.identity_weight * losses.identity_per_sample(*tokens)
            if args.latent_weight:
                aligned = aligned + latent  # carries its weight
            if args.swd_weight:
                filters = losses.random_projections(args.swd_projections, g).to(device)
                images = (2 * x - 1 if args.paper_exact else x for x in (x_s, x_teacher))  # the release took [-1, 1] for [0, 1]
                aligned = aligned + args.swd_weight * losses.sliced_wasserstein_per_sample(
                    *images, filters, positions=args.swd_positions, generator=g, impl=impl)
            if args.lpips_weight:
                with autocast():
                    layers_s = encoders["identity"].layers(x_s)
                    with torch.no_grad():
                        layers_teacher = encoders["identity"].layers(x_teacher)
                aligned = aligned + args.lpips_weight * losses.lpips_per_sample(layers_s, layers_teacher, impl)
            terms["alignment"] = (c * aligned).mean()
            if competes:
                terms["adversarial"] = sum((realism * losses.adversarial_per_sample(h(features_s[k]))).mean() for k, h in heads.items())
                for k, v in zip(heads, torch.autograd.grad(terms["adversarial"], list(features_s.values()), retain_graph=True)):
                    pull[k] += [v.norm()] * comparable
            (scale * (terms["alignment"] + terms.get("adversarial", 0))).backward()

        norms["student's gradient"] = clip(moved["student"].values())
        norms["token's gradient"] = clip(rows.values(), float("inf"))
        optimizers["student"].step()
        optimizers["token"].step()  # holds the teacher's gradient, and with --no-detach_prompt the student's too

        # ---- 5. critics: photos against the same student features
        if "adversarial" in terms:
            judged = (realism > 0).float()  # a scene that no photo shows would give the student away
            logits = {k: (h(real[k]), h(features_s[k].detach())) for k, h in heads.items()}
            terms["critic"] = sum(losses.critic(*v, judged) for v in logits.values()) / len(heads)
            for k, v in logits.items():
                right[k] += [losses.critic_accuracy(*v, judged)] * comparable
            optimizers["critic"].zero_grad()  # of what the student's loss left there
            (scale * terms["critic"]).backward()
            norms["critics' gradient"] = clip([p for h in heads.values() for p in h.parameters()])
            optimizers["critic"].step()
        # -----------------------------------------------------------------------------------------------------------

        for k, v in terms.items():
            sums.setdefault(k, []).append(v.detach())
        watched.append((step + 1, {k: v.detach() for k, v in (terms | norms).items()}))
        leave = list(stop)  # a signal that comes later waits for the next iteration
        log_now, save_now = (step + 1) % args.log_steps == 0 or step + 1 == total, (step + 1) % args.checkpointing_steps == 0 or leave
        if device.type == "cpu" or log_now or save_now:  # on a GPU, looking makes it wait
            stop_if_not_finite()
        if log_now:
            means = {k: torch.stack(v).mean().item() for k, v in sums.items()}
            history.append({"step": step + 1, **means})
            progress.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in means.items()))
            sums = {}
            for k in [k for k in heads if right[k] and k not in won]:
                strength = torch.stack(pull[k]).max().item()
                first_pull.setdefault(k, strength)
                if torch.stack(right[k]).min() == 1 and strength < .01 * first_pull[k]:
                    won.add(k)
                    print(f"\nnote: the {k} critic has won by iteration {step + 1}: it is always right and its pull on the student is "
                          f"{strength / first_pull[k]:.1g} of what it was; lower --critic_lr")
            pull, right = ({k: [] for k in heads} for _ in range(2))
        if args.preview_steps and (step + 1) % args.preview_steps == 0:
            preview(out / "previews" / f"{step + 1:05d}.png")
        if save_now:
            checkpoint(step + 1)
        if leave:
            again = shlex.join(sys.argv[1:] if argv is None else argv)
            again = re.sub(r" ?--resume_from_checkpoint[ =]('[^']*'|\S+)", "", again)
            print(f"\nstopped after iteration {step + 1}; go on with: python train.py {again} --resume_from_checkpoint latest")
            sys.exit(leave[0])

    # -- save ---------------------------------------------------------------------------------------------------
    if args.train_unet == "lora":
        before = {"teacher": merge_low_rank(pair.teacher.unet), "student": merge_low_rank(pair.student.unet)}
    save_json(out / "log.json", history)
    save_png(curves(history), out / "losses.png")
    preview(out / "preview.png")
    save_run(out, pair, before, {k: v for k, v in vars(args).items() if k != "resume_from_checkpoint"}, preview_prompts[:4])
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the finished run is complete without them
    print(f"{(time.time() - started) / 60:.1f} minutes; the result is in {out}: preview.png, losses.png, student and teacher weights")
    print(f'sample it: python sample.py --run {shlex.quote(str(out))} --prompt "a {name} on the beach"')
    for sig, handler in handlers.items():
        signal.signal(sig, handler)


if __name__ == "__main__":
    main()
