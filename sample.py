"""Draw with a trained concept: one UNet pass per image.

    python sample.py --prompt "a <v> dog on the beach"
    python sample.py --export my_dog --rank 16     # a copy of the run for other programs, with a small LoRA

Uses the newest run under out/ unless --run names one; writes single images and a grid into its samples/ folder.
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import torch

from data.images import fail, grid, load_prompts, make_folder, save_png, to_pil
from model import BASES, RUN, check_run, compile_networks, draw, find_base, load_pair, load_run, load_tokenizer, pick_device, save_run, slug


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--prompt", help='what to draw, for example "a <v> dog on the beach"')
    p.add_argument("--export", metavar="DIR", help="write the run to DIR as diffusers and ComfyUI load it, instead of drawing")
    p.add_argument("--rank", type=int, help="of the exported LoRAs; default: full rank, which loses nothing")
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--num_images", type=int, default=8, help="pictures to draw")
    p.add_argument("--steps", type=int, help="1, 2 or 4 for the student (default 1); any number for --teacher (default 16)")
    p.add_argument("--seed", type=int, default=0, help="of the first image; image i uses seed + i")
    p.add_argument("--teacher", action="store_true", help="draw with the multi-step teacher instead of the student")
    p.add_argument("--base_only", action="store_true", help="draw with the untouched base (the token is dropped from the prompt)")
    p.add_argument("--guidance_scale", type=float, help="of the teacher; default: as in training")
    p.add_argument("--base", help="folder of the base, for a run that was trained on one")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--tiny_vae", action=argparse.BooleanOptionalAction, default=False, help="decode with the base's tiny autoencoder: faster, a little softer")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile both networks: pays from some hundred images on")
    p.add_argument("--output_dir", help="default: RUN/samples")
    args = p.parse_args(argv)
    if (args.prompt is None) == (args.export is None):
        fail('give either --prompt, such as "a <v> dog on the beach", or --export with a folder to write to')
    if args.prompt is not None and not args.prompt.strip():
        fail('--prompt is empty; say what to draw, for example "a <v> dog on the beach"')
    if args.rank is not None and (args.rank < 1 or args.export is None):
        fail(f"--rank {args.rank} is the rank of an exported LoRA: give at least 1, together with --export")
    if args.num_images < 1:
        fail(f"--num_images must be at least 1, not {args.num_images}")
    args.steps = (16 if args.teacher else 1) if args.steps is None else args.steps
    if args.steps < 1 or not args.teacher and args.steps not in (1, 2, 4):
        fail(f"--steps must be 1, 2 or 4 for the student, not {args.steps}; --teacher takes any number")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < math.inf:
        fail(f"--guidance_scale must be a number from 0 up, not {args.guidance_scale}")
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed must be from 0 to {2 ** 32 - 1}, not {args.seed}")
    pick_device(args.device)
    args.run, args.flags = read_run(args.run, base=args.base)
    return args


def read_run(folder=None, root="out", base=None):
    """(folder, flags) of a finished run, whole and made by us; without a folder, the one under root whose config.json is newest.

    A run may come from anyone: of what its config names, only a base that we know or that the user names is opened.
    """
    if folder is None:
        configs = sorted(Path(root).glob("*/config.json"), key=lambda p: p.stat().st_mtime)
        if not configs:
            fail("there is no finished run under out/; train one with: python train.py --concept data/dog")
        folder = configs[-1].parent
    folder, config = Path(folder), Path(folder) / "config.json"
    if not os.path.isfile(config):
        fail(f"--run {folder} holds no finished run (no config.json); train one with: python train.py --concept data/dog")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        form, model, flags = read["format"], read.get("model", "student"), read["flags"]
        wanted = {"token": str, "class_word": str, "base": str, "concept": str, "guidance_scale": (int, float)}
        odd = [k for k, kind in wanted.items() if not isinstance(flags[k], kind) or isinstance(flags[k], bool) or flags[k] == ""]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{config} is damaged ({type(error).__name__}: {error}); train again, or name another run with --run")
    if form != RUN:
        fail(f"{config} was not written by this version of train.py (format {form!r}); name another run with --run")
    if model != "student":
        fail(f"--run {folder} is the teacher's half of a run; name the folder above it")
    if odd or not 0 <= flags["guidance_scale"] < math.inf or len(flags["token"].split()) != 1:
        fail(f"{config}: {(odd or ['token or guidance_scale'])[0]} has a value that train.py never writes; train again, or name another run with --run")
    if base is None and flags["base"] not in BASES:
        fail(f"{config} names the base {flags['base']}, a folder outside the run; if you trust it, add --base with that folder")
    own = [flags[part] for part in ("teacher", "student") if flags.get(part)]
    if base is None and own:
        fail(f"{config} names {own[0]}, which is not a part of the base {flags['base']}; if you trust it, add --base {flags['base']}")
    find_base(base or flags["base"])
    check_run(folder, flags["token"])
    return folder, flags | {"base": base or flags["base"]}


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    token, prompt, flags = args.flags["token"], args.prompt, args.flags
    device, why = pick_device(args.device)
    if args.export:
        make_folder(args.export, "--export")
        pair = load_pair(flags["base"], token, flags["class_word"], device, flags, torch.float32)
        before = load_run(args.run, pair)
        named = [p.replace("{}", f"{token} {flags['class_word']}") for p in load_prompts(find_base(flags["base"]).prompts)["preview"][:4]]
        save_run(args.export, pair, before, flags, named, args.rank)
        return print(f"exported {args.run} to {args.export}; its README.md shows how to load it")
    if args.base_only:
        prompt = " ".join(prompt.replace(token, " ").split())
    elif token not in prompt:
        print(f"note: the prompt does not hold {token}, so the subject of {args.run} need not appear")
    tokenizer = load_tokenizer(find_base(flags["base"], flags).teacher)
    tokenizer.add_tokens(token)
    length, longest = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
    if length > longest:
        print(f"note: the prompt takes {length} tokens and the model reads {longest}; what comes later is cut off")
    out = make_folder(args.output_dir or args.run / "samples", "--output_dir")
    pair = load_pair(flags["base"], token, flags["class_word"], device, flags | {"tiny_vae": args.tiny_vae})
    if not args.base_only:
        load_run(args.run, pair)
    if args.compile:
        compile_networks(pair.teacher.unet if args.teacher else pair.student.unet, (pair.tiny_vae or pair.vae).decoder)
    print(f"run {args.run}, device {device} ({why}), {'teacher' if args.teacher else 'student'}, {args.steps} step(s)")

    start, seeds = time.perf_counter(), range(args.seed, args.seed + args.num_images)
    guidance = flags["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    images = draw(pair, prompt, seeds, args.teacher, args.steps, guidance, args.tiny_vae)
    seconds = time.perf_counter() - start

    words = slug(prompt) + ("-teacher" if args.teacher else "") + ("-base" if args.base_only else "")
    words += f"-{args.steps}steps" if args.steps != (16 if args.teacher else 1) else ""
    for seed, image in zip(seeds, to_pil(images)):
        save_png(image, out / f"{words}-seed{seed}.png")
    sheet = out / f"{words}-grid.png"
    save_png(grid([("", row) for row in images.split(8)]), sheet)
    print(f"{args.num_images} images, {1000 * seconds / args.num_images:.0f} ms per image; grid: {sheet}")


if __name__ == "__main__":
    main()
