"""Draw with a trained concept: one UNet pass per image.

    python sample.py --prompt "a <v> dog on the beach"

Uses the newest run under out/ unless --run names one; writes single images and a grid into its samples/ folder.
"""
import argparse
import json
import re
import time
from pathlib import Path

import torch

from data.images import fail, grid, save_png, to_pil
from model import load_pair, load_run, pick_device


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--prompt", required=True, help='what to draw, for example "a <v> dog on the beach"')
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--num_images", type=int, default=8, help="pictures to draw")
    p.add_argument("--steps", type=int, help="1, 2 or 4 for the student (default 1); any number for --teacher (default 16)")
    p.add_argument("--seed", type=int, default=0, help="of the first image; image i uses seed + i")
    p.add_argument("--teacher", action="store_true", help="draw with the multi-step teacher instead of the student")
    p.add_argument("--base_only", action="store_true", help="draw with the untouched base (the token is dropped from the prompt)")
    p.add_argument("--guidance_scale", type=float, help="of the teacher; default: as in training")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--output_dir", help="default: RUN/samples")
    args = p.parse_args(argv)
    if not args.prompt.strip():
        fail('--prompt is empty; say what to draw, for example "a <v> dog on the beach"')
    if args.num_images < 1:
        fail(f"--num_images must be at least 1, not {args.num_images}")
    args.steps = (16 if args.teacher else 1) if args.steps is None else args.steps
    if args.steps < 1 or not args.teacher and args.steps not in (1, 2, 4):
        fail(f"--steps must be 1, 2 or 4 for the student, not {args.steps}; --teacher takes any number")
    args.run, args.flags = read_run(args.run)
    return args


def read_run(folder=None, root="out"):
    """(folder, flags) of a finished run; without a folder, the one under root whose config.json is newest."""
    if folder is None:
        configs = sorted(Path(root).glob("*/config.json"), key=lambda p: p.stat().st_mtime)
        if not configs:
            fail("there is no finished run under out/; train one with: python train.py --concept data/dog")
        folder = configs[-1].parent
    config = Path(folder) / "config.json"
    if not config.is_file():
        fail(f"--run {folder} holds no finished run (no config.json); train one with: python train.py --concept data/dog")
    try:
        return Path(folder), json.loads(config.read_text(encoding="utf-8"))["flags"]
    except (ValueError, KeyError):
        fail(f"{config} is damaged; train again, or name another run with --run")


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    token, prompt, flags = args.flags["token"], args.prompt, args.flags
    if args.base_only:
        prompt = " ".join(prompt.replace(token, " ").split())
    elif token not in prompt:
        print(f"note: the prompt does not hold {token}, so the subject of {args.run} need not appear")
    device, why = pick_device(args.device)
    pair = load_pair(flags["base"], token, flags["class_word"], device)
    if not args.base_only:
        load_run(args.run, pair)
    print(f"run {args.run}, device {device} ({why}), {'teacher' if args.teacher else 'student'}, {args.steps} step(s)")

    guidance = flags["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    model, guidance = (pair.teacher, guidance) if args.teacher else (pair.student, 1.0)
    noise = torch.cat([torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(args.seed + i))
                       for i in range(args.num_images)]).to(device)
    context, empty, images, seconds = pair.text([prompt]), pair.text([""]), [], 0.0
    for part in noise.split(1 if device.type == "cpu" else 8):  # on a CPU an image is bitwise the same in any batch
        start = time.perf_counter()
        images.append(pair.decode(model.sample(part, context.expand(len(part), -1, -1), args.steps, empty, guidance)).cpu())
        seconds += time.perf_counter() - start
    images = torch.cat(images)

    out = Path(args.output_dir) if args.output_dir else args.run / "samples"
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    words += ("-teacher" if args.teacher else "") + ("-base" if args.base_only else "")
    words += f"-{args.steps}steps" if args.steps != (16 if args.teacher else 1) else ""
    for i, image in enumerate(to_pil(images)):
        save_png(image, out / f"{words}-seed{args.seed + i}.png")
    sheet = out / f"{words}-grid.png"
    save_png(grid([("", row) for row in images.split(8)]), sheet)
    print(f"{args.num_images} images, {1000 * seconds / args.num_images:.0f} ms per image; grid: {sheet}")


if __name__ == "__main__":
    main()
