"""Recipes: every setting of the method as a key of a TOML file, and as a flag --key of train.py.

A base's data/NAME/recipe.toml sets all keys. A file given by --recipe sets some of them, and a flag overrides both. A file may
start from another with `extends = "FILE"`, relative to itself. [base] says where the models are, [recipe] holds the keys below;
a file without tables holds keys only.
"""
import argparse
import difflib
import errno
import math
import os
import tomllib
from pathlib import Path

from data.disk import fail

DATA = Path(__file__).resolve().parent
BASES = ("emoji", "sd-turbo", "hyper-sd15")
SHARE, ANY = (0, 1), (0, math.inf)
# highest of what is counted: far above any use, and low enough that nothing hangs or asks for memory that no machine has
LENGTH, EVERY = 10 ** 6, 10 ** 9

OF_BASE = {"folder", "prompts", "teacher", "student", "student_lora", "tiny_vae", "encoders", "licences"}  # keys of [base]

# flag of a run: (type or choices, (lowest, highest), default, what it is)
RUN = {
    "concept": (str, None, None, "folder of 3-6 photos of the subject (needed); several are trained one after the other"),
    "class_word": (str, None, None, "the subject's ordinary noun; default: the folder's name"),
    "token": (str, None, "<v>", "the new word for the subject"),
    "output_dir": (str, None, None, "default: out/FOLDER NAME"),
    "base": (str, None, None, "emoji, sd-turbo (Stable Diffusion 2.1: CreativeML Open RAIL++-M licence; SD-Turbo: Stability AI Community "
                              "License), hyper-sd15, or a folder laid out like data/emoji/base; default: emoji, "
                              "with --teacher or --student sd-turbo"),
    "teacher": (str, None, None, "folder or hub repository in place of the base's teacher"),
    "student": (str, None, None, "folder or hub repository in place of the base's student"),
    "recipe": (str, None, None, "TOML file of settings on top of the base's own, such as data/sd-turbo/paper.toml"),
    "resolution": (int, (8, 4096), None, "pixels along one side; default: the student's own"),
    "device": (str, None, "auto", "auto, cpu, cuda or mps"),
    "kernels": (("auto", "triton", "torch"), None, "auto", "of the alignment losses; auto: Triton on CUDA, where it is faster"),
    "tiny_vae": (bool, None, False, "decode for the image losses with the base's tiny autoencoder: cheaper"),
    "dinov2_size": (int, (14, 4200), 518, "pixels that DINOv2 sees, a multiple of 14; 224 costs a sixth"),
    "gradient_checkpointing": (bool, None, False, "less memory, about a third more time"),
    "compile": (bool, None, False, "torch.compile and channels-last for both UNets and the decoder"),
    "seed": (int, (0, 2 ** 32 - 1), 42, "of everything; same seed, same bytes on a CPU"),
    "log_steps": (int, (1, EVERY), 10, "iterations per point of the loss curves"),
    "preview_steps": (int, (0, EVERY), 100, "iterations per preview grid; 0 draws only the last"),
    "validation_prompt": (list, None, None, 'prompts that previews show too, such as "a <v> dog on a table"'),
    "report_to": (("none", "tensorboard"), None, "none", "write losses and previews to OUTPUT_DIR/tensorboard, too"),
    "checkpointing_steps": (int, (1, EVERY), 100, "iterations per checkpoint"),
    "checkpoints_total_limit": (int, (0, EVERY), 2, "newest checkpoints that are kept; 0 keeps all"),
    "resume_from_checkpoint": (str, None, None, '"latest" or a file of OUTPUT_DIR/checkpoints'),
    "allow_other_bits": (bool, None, False, "resume although processor, threads or versions differ: last bits will, too"),
}

# key of a recipe: (type or choices, (lowest, highest), what it is); a weight of 0 switches its term off
KEYS = {
    "max_train_steps": (int, (1, LENGTH), "iterations of the joint stage"),
    "train_batch_size": (int, (1, 4096), "images per iteration and model"),
    "train_unet": (("kv", "attention", "all", "lora"), None, "which UNet weights move"),
    "lora_rank": (int, (1, 4096), 'of train_unet "lora", in every attention layer'),
    "start_word": (str, None, "word whose row the token starts as; empty: the class word"),
    "detach_first_token": (bool, None, "no gradient through keys and values of the first token, which begins every prompt"),
    "carry": (bool, None, "every step of the teacher's weights in the joint stage moves the student's too"),
    "teacher_lr": (float, ANY, "0 freezes the teacher"),
    "student_lr": (float, ANY, "0: no step of its own (carry still moves it)"),
    "token_lr": (float, ANY, "0 freezes the concept token at the class word"),
    "kv_rate": (float, ANY, "learning rate of cross-attention keys and values, as a multiple of their UNet's"),
    "critic_lr": (float, ANY, "of the discriminators' heads"),
    "lr_decay": (float, SHARE, "last share of each stage in which rates fall to 0; all of the student's part of the echo stage"),
    "weight_decay": (float, ANY, "AdamW, not on the token"),
    "max_grad_norm": (float, None, "gradients of each UNet and of the critics are clipped to this norm; inf: never"),
    "clip_critics": (bool, None, "clip the critics' gradients too"),
    "mixed_precision": (("auto", "no", "bf16", "fp16"), None, "autocast of the forward passes, the student's one step apart; "
                        "auto: bf16 where the hardware has it; fp16 only with an epsilon teacher"),
    "reconstruction_weight": (float, ANY, "teacher on the photos; 0 freezes teacher and token"),
    "adversarial_weight": (float, ANY, "student against the photos, per discriminator"),
    "scene_adversarial_weight": (float, ANY, "the same on scene prompts, which no photo shows"),
    "identity_weight": (float, ANY, "1 - cosine of image tokens, student against teacher"),
    "latent_weight": (float, ANY, "latent MSE, student against teacher"),
    "swd_weight": (float, ANY, "multi-scale sliced Wasserstein distance of the decoded images, on L to 1; 10 is the paper's strength"),
    "swd_projections": (int, (1, 4096), "random filters per call"),
    "swd_positions": (int, (0, EVERY), "patches per level at most, about; 0: all"),
    "lpips_weight": (float, ANY, "perceptual distance of the decoded images in the identity encoder's features"),
    "guidance_scale": (float, ANY, "of the teacher, in the alignment target and in samples"),
    "target_noise": (float, SHARE, "targets start at noise levels from this share of the schedule up"),
    "weight_alignment": (bool, None, "weigh alignment by c(t') = alpha_bar(t')"),
    "detach_prompt": (bool, None, "keep student losses away from the token"),
    "raw_images": (bool, None, "images in [-1, 1] go into encoders and the Wasserstein term as they are, as the release did"),
    "denoising_weight": (float, ANY, "student's own denoising loss on the photos, as baselines train; moves the token too"),
    "prior_weight": (float, ANY, "in that loss, of what the untouched student draws of the class (DreamBooth's prior preservation)"),
    "sequential": (bool, None, "all iterations for the teacher alone, then as many for the student"),
    "share_text": (bool, None, "off: the student learns a token of its own by its own losses"),
    "scene_prompts": (float, SHARE, "share of the student's prompts that are scenes"),
    "own_prompts": (bool, None, "in place of templates the student draws what its batch of photos is called, size words included"),
    "crop": (("centre", "pad", "squash"), None, "the centre square, the whole photo on masked grey, or squashed to a square"),
    "flip": (bool, None, "mirror photos at random"),
    "size_augmentation": (bool, None, "shrink or zoom photos, and say so in the prompt"),
    "published_sizes": (bool, None, "of size_augmentation: two thirds shrunk to a third or more, one third zoomed, with Custom Diffusion's words"),
    "mask_erosion": (int, (0, 4096), "latent pixels by which the mask of a photo on grey is narrowed on each side"),
    "sample_latents": (bool, None, "draw the photos' latents from the encoder's distribution instead of its mean"),
    "critic_views": (int, (0, 4096), "random zooms into each photo that critics take for real; 0: the photo as it is in the batch"),
    "echo_steps": (int, (0, LENGTH), "iterations in which the teacher hears the echo, then as many in which the student follows; 0: none"),
    "echo_rounds": (int, (1, 1000), "times that this is done, each with an echo gathered anew"),
    "echo_replaces": (bool, None, "echoed images replace photos in the teacher's batch instead of joining them"),
    "echo_is_real": (bool, None, "echoed images replace photos as real before the critics, while the student follows"),
    "echo_real_only": (bool, None, "control: as many iterations without the echo"),
    "echo_samples": (int, (1, 100_000), "one-step samples to choose from"),
    "echo_keep": (float, SHARE, "share of them that is kept at most; at least one"),
    "echo_floor": (float, SHARE, "share refused for disagreeing with its prompt, before identity ranks"),
    "echo_share": (float, SHARE, "echoed images with each batch of photos, as a share of it; at least one"),
    "echo_weight": (float, (-1, math.inf), "of the teacher's loss on the kept samples; below 0 it learns away from them"),
    "echo_noise": (float, SHARE, "teacher sees echoes at noise levels from this share of the schedule up"),
}


# flags of sample.py: (lowest, highest)
DRAWING = {"num_images": (1, 10_000), "rank": (1, 4096), "seed": RUN["seed"][1], "guidance_scale": ANY}


def read_toml(path, above=()):
    """A TOML file merged over the one that it extends: {"base": {...}, "recipe": {...}}; keys known, values typed.

    above: the files that led here.
    """
    try:
        path = Path(path)
        if os.path.exists(path) and not path.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"--recipe {path} cannot be read ({getattr(error, 'strerror', None) or error}); give a TOML file such as data/sd-turbo/paper.toml")
    parent = content.pop("extends", None)
    if parent is not None and not isinstance(parent, str) or path.resolve() in above:
        fail(f"{path}: extends must name another file, and no file in a circle; mend it")
    start = read_toml(path.parent / parent, (*above, path.resolve())) if parent else {"base": {}, "recipe": {}}
    tables = content if content.keys() & {"base", "recipe"} else {"recipe": content}
    for part in start:
        if not isinstance(tables.get(part, {}), dict):
            fail(f"{path}: {part} must be a table, [{part}] and lines below it; mend it")
    stray = [*tables.keys() - start.keys(), *(f"base.{k}" for k in tables.get("base", ()) if k not in OF_BASE)]
    if stray:
        fail(f"{path}: {stray[0]} is no part of a recipe; keys stand below [recipe] or in a file without tables")
    for key, value in tables.get("recipe", {}).items():
        if key not in KEYS:
            fail(f"{path}: {key} is no key of a recipe; {nearest(key, KEYS)}")
        tables["recipe"][key] = typed(key, value, path)
    return {part: start[part] | tables.get(part, {}) for part in start}


def fits(key, value):
    """Whether a value has the type of its key or flag."""
    kind, _, *default, _ = (KEYS | RUN)[key]
    if value is None:
        return default == [None]
    if kind is float and isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, str) and value in kind if isinstance(kind, tuple) else type(value) is kind


def typed(key, value, path):
    """A TOML value as the type that its key has; one sentence where it has another."""
    kind = KEYS[key][0]
    if not fits(key, value):
        wanted = " or ".join(f'"{c}"' for c in kind) if isinstance(kind, tuple) else {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        fail(f"{path}: {key} must be {wanted}, not {value!r}")
    if kind is float:
        value = float(str(value))  # infinite where a whole number is beyond all floats
    check(key, value, f"{path}: {key}")
    return value


def check(key, value, where):
    """Refuse a number outside of its key's range; where: what the sentence names."""
    if key == "max_grad_norm":
        if not value > 0:
            fail(f"{where} must be above 0, not {value}; inf switches clipping off")
    else:
        check_range((KEYS | RUN)[key][1], value, where)


def check_range(limits, value, where):
    if limits is None or value is None:
        return
    low, high = limits
    if not low <= value <= high or value == math.inf:
        wanted = "is a share from 0 to 1" if limits == SHARE else f"must be a number from {low} up" if high == math.inf else f"must be from {low} to {high}"
        fail(f"{where} {wanted}, not {value}")


def nearest(word, words):
    close = difflib.get_close_matches(word, words, 1, 0)
    return f"the nearest is {close[0]}"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with the nearest flag to one that it does not know."""

    def error(self, message):
        fail(f"{message}; python {self.prog} --help lists the flags")

    def parse_args(self, argv=None, namespace=None):
        args, rest = self.parse_known_args(argv, namespace)
        if rest:
            flags = [f for action in self._actions for f in action.option_strings]
            fail(f"{rest[0]} is no flag of {self.prog}; {nearest(rest[0].partition('=')[0], flags)}")
        for flag, value in vars(args).items():
            if value == []:  # what argparse makes of --flag=--
                fail(f"--{flag} is given no value; python {self.prog} --help says what it takes")
        return args


def make_parser(recipe, about):
    """Every flag of train.py: those of a run, then one --key for each key of a recipe with its value as the default."""
    p = Parser(prog="train.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
               usage="train.py --concept FOLDER [flags]", allow_abbrev=False)
    group = p.add_argument_group("recipe (defaults: the base's recipe.toml, then --recipe)")
    for name, (kind, _, default, what) in RUN.items():
        add_flag(p, name, kind, default, what)
    for key, (kind, _, what) in KEYS.items():
        value = recipe[key]
        add_flag(group, key, kind, value, f"{what} [{str(value).lower() if isinstance(value, bool) else value}]")
    return p


def add_flag(group, name, kind, default, what):
    how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"choices": kind} if isinstance(kind, tuple) else \
        {"nargs": "+", "metavar": "TEXT"} if kind is list else {"type": kind, "metavar": {int: "N", float: "X", str: name.split("_")[-1].upper()}[kind]}
    group.add_argument(f"--{name}", default=default, help=what.replace("%", "%%"), required=name == "concept", **how)
