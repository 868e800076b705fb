"""Draw with a trained concept: one UNet pass per image.

    python sample.py --prompt "a <v> dog on the beach" "a <v> dog at night"
    python sample.py --compare --prompt "a <v> dog on the beach"       # photos, untouched student, student and teacher
    python sample.py --live                                            # a page that draws while you type
    python sample.py --base emoji --prompt "a dog on the beach"        # the untouched pair, which needs no run
    python sample.py --export my_dog --rank 16     # a copy of the run for other programs, with a small LoRA

Uses the newest run under out/ unless --run names one. Pictures and a grid (a row per prompt, a column per seed) are added
to its samples/ folder; nothing there is overwritten, and each PNG says in text chunks how it was drawn.
"""
import argparse
import shutil
import textwrap
import time
from pathlib import Path

import torch

from data.base import announce_download, find_base, load_pair, load_tokenizer, pick_device, read_config, unknown_words
from data.disk import fail, make_folder, refuse_foreign_bytes, write_atomically
from data.images import add_png, grid, load_prompts, load_strip, refuse_overlap, to_bytes, to_pil
from data.recipe import DRAWING, Parser, check_range, read_toml
from data.run import file_names, load_run, read_run, refuse_obstacles, save_run, slug
from model import compile_networks, draw


def parse_arguments(argv=None):
    p = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--prompt", nargs="+", action="extend", help='what to draw, for example "a <v> dog on the beach"; one or several')
    p.add_argument("--prompt_file", metavar="FILE", help="text file with a prompt per line, drawn after those of --prompt")
    p.add_argument("--compare", action="store_true", help="one grid of the photos, and of untouched student, student and teacher")
    p.add_argument("--live", action="store_true", help="open a page on this machine that draws while you type (needs gradio)")
    p.add_argument("--export", metavar="DIR", help="write the run to DIR as diffusers and ComfyUI load it, instead of drawing")
    p.add_argument("--rank", type=int, help="of the exported LoRAs; default: full rank, which loses nothing")
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--base", help="draw with this untouched base; beside --run: the base's folder, for a run that was trained on one")
    p.add_argument("--num_images", type=int, default=8, help="pictures to draw of each prompt")
    p.add_argument("--steps", type=int, help="1, 2 or 4 for the student (default 1); any number for --teacher (default 16)")
    p.add_argument("--seed", type=int, default=0, help="of the first image; image i uses seed + i")
    p.add_argument("--teacher", action="store_true", help="draw with the multi-step teacher instead of the student")
    p.add_argument("--base_only", action="store_true", help="draw with the untouched base (the token is dropped from the prompt)")
    p.add_argument("--guidance_scale", type=float, help="of the teacher; default: as in training")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--tiny_vae", action=argparse.BooleanOptionalAction, default=False, help="decode with the base's tiny autoencoder: faster, a little softer")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile both networks: pays from some hundred images on")
    p.add_argument("--output_dir", help="default: RUN/samples, or out/base-NAME/samples")
    args = p.parse_args(argv)
    args.prompts = read_prompts(args)
    if bool(args.prompts) + bool(args.export) + args.live != 1:
        fail('give either --prompt, such as "a <v> dog on the beach", or --live, or --export with a folder to write to')
    if args.rank is not None and args.export is None:
        fail(f"--rank {args.rank} is the rank of an exported LoRA: give it together with --export")
    for flag, limits in DRAWING.items():
        check_range(limits, getattr(args, flag), f"--{flag}")
    check_range((0, 2 ** 32 - args.num_images), args.seed, "--seed")  # the last image's, too
    if args.steps is not None and (args.steps < 1 or not args.teacher and args.steps not in (1, 2, 4)):
        fail(f"--steps must be 1, 2 or 4 for the student, not {args.steps}; --teacher takes any number")
    if args.compare and args.teacher:
        fail("--compare draws student and teacher; leave --teacher out (--steps is then the student's)")
    if args.compare and args.base_only:
        fail("--compare draws the untouched student beside the trained models; leave --base_only out")
    if args.live and (odd := [k for k in ("compare", "teacher", "base_only", "compile", "output_dir") if getattr(args, k)]):
        fail(f"--{odd[0]} does nothing beside --live, whose page has its own switches; leave it out")
    pick_device(args.device)
    refuse_foreign_bytes(args)
    if args.base and not args.run:  # the pair as it came
        if args.export or args.compare:
            fail("--export and --compare need a run; name its folder with --run")
        base, args.base_only = find_base(args.base), True
        args.flags = {"base": args.base, "token": "<v>", "class_word": "a", "guidance_scale": read_toml(base.recipe)["recipe"]["guidance_scale"]}
    else:
        args.run, args.flags = read_run(args.run, base=args.base)
    last = read_config(find_base(args.flags["base"], args.flags).teacher, "scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    if (args.steps or 1) > last:
        fail(f"--steps {args.steps} is more than the {last} timesteps of the teacher's schedule; take fewer")
    for flag in ("output_dir", "export"):
        if args.run and getattr(args, flag):
            refuse_overlap(getattr(args, flag), args.flags["concept"], f"--{flag}")
    return args


def read_prompts(args):
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            fail(f"--prompt_file {args.prompt_file} cannot be read ({getattr(error, 'strerror', None) or error}); give a text file with a prompt per line")
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            fail(f"--prompt_file {args.prompt_file} holds no prompt; write one per line")
    if any(not p.strip() for p in prompts):
        fail('--prompt is empty; say what to draw, for example "a <v> dog on the beach"')
    return list(dict.fromkeys(prompts))


def remarks(prompts, args, tokenizer):
    """What a user should know of prompts before they are drawn, a sentence each."""
    token, base = args.flags["token"], args.flags["base"]
    for prompt in prompts:
        length, longest = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
        if length > longest:
            yield f"{prompt!r} takes {length} tokens and the model reads {longest}; what comes later is cut off"
        if args.run and not args.base_only and token not in prompt:
            yield f"{prompt!r} does not hold {token}, so the concept of {args.run} is not in it"
        if not args.run and token in prompt:
            yield f"{token} is dropped from {prompt!r}: the untouched pair has learned no concept (--run names a run)"
    for word in dict.fromkeys(w for p in prompts for w in unknown_words(tokenizer, p.replace(token, " "))):
        yield f"the {base} base does not know {word!r}"


def export(args, device):
    args.export = make_folder(args.export, "--export")
    refuse_obstacles(args.export)
    flags = args.flags
    pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags, torch.float32)
    before = load_run(args.run, pair)
    named = [p.replace("{}", f"{flags['token']} {flags['class_word']}") for p in load_prompts(find_base(flags["base"]).prompts)["preview"][:4]]
    if (args.run / "photos.png").is_file() and args.run.resolve() != args.export.resolve():
        write_atomically(args.export / "photos.png", lambda p: shutil.copyfile(args.run / "photos.png", p))
    save_run(args.export, pair, before, flags, named, args.rank)
    print(f"exported {args.run} to {args.export}; its README.md shows how to load it")


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    token, flags, (device, why) = args.flags["token"], args.flags, pick_device(args.device)
    if args.live:
        from data.live import serve
        return serve(args)
    if args.export:
        return export(args, device)
    role = "teacher" if args.teacher else "student"
    painters = [("student", False), ("student", True), ("teacher", True)] if args.compare else [(role, not args.base_only)]
    roles = {r for r, _ in painters}
    announce_download(flags["base"], flags | {"tiny_vae": args.tiny_vae}, encoders=False, roles=roles)
    tokenizer = load_tokenizer(find_base(flags["base"], flags).teacher)
    tokenizer.add_tokens(token)
    for sentence in remarks(args.prompts, args, tokenizer):
        print(f"note: {sentence}")
    out = make_folder(args.output_dir or (args.run or Path("out", f"base-{Path(flags['base']).name}")) / "samples", "--output_dir")
    pair = load_pair(flags["base"], token, flags["class_word"], device, flags | {"tiny_vae": args.tiny_vae}, roles=roles)
    if args.compile:
        compile_networks(*(d.unet for d in (pair.teacher, pair.student) if d), (pair.tiny_vae or pair.vae).decoder)

    seeds, seconds, drawn, loaded = range(args.seed, args.seed + args.num_images), 0, {}, False
    guidance = flags["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    for role, taught in painters:
        if taught and not loaded:
            load_run(args.run, pair)
            loaded = True
        own = {"teacher": 16, "student": 1}[role]
        steps, who = own if args.compare and role == "teacher" else args.steps or own, role if taught else f"untouched {role}"
        print(f"{f'run {args.run}' if taught else 'base ' + flags['base']}, device {device} ({why}), {who}, {steps} step(s)")
        asked = {p: p if taught else " ".join(p.replace(token, " ").split()) for p in args.prompts}
        names = dict(zip(asked, file_names(asked.values())))
        if args.compile:
            start = time.perf_counter()
            draw(pair, next(iter(asked.values())), seeds, role == "teacher", steps, guidance, args.tiny_vae)
            print(f"torch.compile: {time.perf_counter() - start:.0f} s to warm up")
        for prompt, said in asked.items():
            words = names[prompt] + f"-{role}" * (role == "teacher") + "-base" * (args.run is not None and not taught) + f"-{steps}steps" * (steps != own)
            facts = {"prompt": said, "steps": steps, "model": who, "base": flags["base"], **({"run": args.run} if taught else {})}
            rows = drawn[prompt, who] = []
            for some in (seeds[i:i + 8] for i in range(0, len(seeds), 8)):
                start = time.perf_counter()
                images = draw(pair, said, some, role == "teacher", steps, guidance, args.tiny_vae)
                seconds += time.perf_counter() - start
                for seed, image in zip(some, to_pil(images)):
                    add_png(image, out / f"{words}-seed{seed}.png", facts | {"seed": seed})
                rows.append(to_bytes(images))

    photos = load_strip(args.run / "photos.png", pair.resolution) if args.compare else None
    rows, several = [] if photos is None else [("photos", photos)], len(drawn) > 1
    for prompt, who in sorted(drawn, key=lambda key: args.prompts.index(key[0])):
        label = textwrap.fill(f"{prompt} ({who})" if args.compare else prompt, 24) if several else ""
        rows += [(label if i == 0 else "", part) for i, part in enumerate(drawn[prompt, who])]
    words = f"{(slug(prompt) if args.compare else words) if len(args.prompts) == 1 else f'{len(args.prompts)}-prompts'}{'-compare' * args.compare}-grid.png"
    sheet = grid(rows, [f"seed {s}" for s in seeds] if several and len(seeds) <= 8 and photos is None else ())
    path = add_png(sheet, out / words, {"prompt": "\n".join(args.prompts)})
    count = len(drawn) * len(seeds)
    print(f"{count} images, {1000 * seconds / count:.0f} ms per image; grid: {path}")


if __name__ == "__main__":
    main()
