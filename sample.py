"""Draw with a trained concept: one UNet pass per image.

    python sample.py --prompt "a <v> dog on the beach"
    python sample.py --export my_dog --rank 16     # a copy of the run for other programs, with a small LoRA

Uses the newest run under out/ unless --run names one; writes single images and a grid into its samples/ folder.
"""
import argparse
import os
import time

import torch

from data.base import find_base, load_pair, load_tokenizer, pick_device, read_config
from data.disk import fail, make_folder, refuse_foreign_bytes
from data.images import grid, load_prompts, save_png, to_pil
from data.recipe import DRAWING, check_range
from data.run import load_run, read_run, refuse_obstacles, save_run, slug
from model import compile_networks, draw


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
    if args.rank is not None and args.export is None:
        fail(f"--rank {args.rank} is the rank of an exported LoRA: give it together with --export")
    for flag, limits in DRAWING.items():
        check_range(limits, getattr(args, flag), f"--{flag}")
    args.steps = (16 if args.teacher else 1) if args.steps is None else args.steps
    if args.steps < 1 or not args.teacher and args.steps not in (1, 2, 4):
        fail(f"--steps must be 1, 2 or 4 for the student, not {args.steps}; --teacher takes any number")
    pick_device(args.device)
    refuse_foreign_bytes(args)
    args.run, args.flags = read_run(args.run, base=args.base)
    teacher = find_base(args.flags["base"], args.flags).teacher
    last = read_config(teacher, "scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    if args.steps > last:
        fail(f"--steps {args.steps} is more than the {last} timesteps of the teacher's schedule; take fewer")
    if args.output_dir and os.path.realpath(args.output_dir) == os.path.realpath(args.flags["concept"]):
        fail(f"--output_dir {args.output_dir} is the folder of photos, so what is drawn would become photos; choose another folder")
    return args


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    token, prompt, flags = args.flags["token"], args.prompt, args.flags
    device, why = pick_device(args.device)
    if args.export:
        make_folder(args.export, "--export")
        refuse_obstacles(args.export)
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
