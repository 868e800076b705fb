"""Score a finished run with the judges, which training never sees.

    python evaluate.py                      # the newest run under out/, or --run DIR

Draws prompts x seeds with the student (one step), the teacher and both untouched; prints a table, writes scores.json and
a contact sheet. Judges of the embedded base: CLIP-T and CLIP-I by judges/clip (ConvNeXt, image-text contrast), identity by
judges/identity (ConvNeXt, instance discrimination, the part that DINO plays in the paper). As in the paper (Sec. 4), each
score is a mean cosine over all pairs; CLIP-T reads the prompt without the token; the untouched models, too, read the
prompt without it.
"""
import argparse
from pathlib import Path

import torch

from data.images import fail, grid, load_photos, load_prompts, save_png
from model import BASES, Encoder, load_pair, load_run, pick_device, save_json
from sample import read_run


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--num_seeds", type=int, default=4, help="pictures per prompt and model")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = p.parse_args(argv)
    if args.num_seeds < 1:
        fail(f"--num_seeds must be at least 1, not {args.num_seeds}")
    args.run, args.flags = read_run(args.run)
    return args


@torch.no_grad()
def main(argv=None):
    args = parse_arguments(argv)
    flags = args.flags
    device, _ = pick_device(args.device)
    pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags)
    folder = Path(BASES.get(flags["base"], flags["base"])) / "judges"
    clip, identity = (Encoder(folder / name).to(device) for name in ("clip", "identity"))
    photos = load_photos(flags["concept"], pair.resolution).to(device)
    templates = load_prompts("emoji")["evaluation"]
    plain = [t.replace("{}", flags["class_word"]) for t in templates]
    named = [t.replace("{}", f"{flags['token']} {flags['class_word']}") for t in templates]
    noise = torch.randn(args.num_seeds * len(plain), *pair.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)

    def embed(judge, x):
        return torch.cat([judge.embed(judge.features(part)) for part in x.split(64)])

    asked, photo_clip, photo_identity = clip.embed_text(pair.text.tokenizer, plain), embed(clip, photos), embed(identity, photos)

    def draw(prompts, teacher):
        prompts, rows = prompts * args.num_seeds, []
        for i in range(0, len(prompts), 32):
            context = pair.text(prompts[i:i + 32])
            z = pair.teacher.sample(noise[i:i + 32], context, 16, pair.text([""]), flags["guidance_scale"]) if teacher else \
                pair.student.sample(noise[i:i + 32], context, 1)
            rows.append(pair.decode(z).clamp(-1, 1))
        return torch.cat(rows)

    def score(x):
        seen = embed(clip, x)
        return {"CLIP-T": (seen * asked.repeat(args.num_seeds, 1)).sum(1).mean().item(),
                "CLIP-I": (seen @ photo_clip.T).mean().item(), "identity": (embed(identity, x) @ photo_identity.T).mean().item()}

    pictures = {"untouched student": draw(plain, False), "untouched teacher": draw(plain, True)}
    load_run(args.run, pair)
    pictures |= {"student, 1 step": draw(named, False), "teacher, 16 steps": draw(named, True)}
    scores = {name: {k: round(v, 4) for k, v in score(x).items()} for name, x in pictures.items()}
    between = photo_identity @ photo_identity.T
    scores["photos among themselves"] = {"identity": round(between[~torch.eye(len(photos), dtype=torch.bool)].mean().item(), 4)
                                         if len(photos) > 1 else 1.0}
    for name, row in scores.items():
        print(f"{name:<24}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    save_json(args.run / "scores.json", {"num_seeds": args.num_seeds, "prompts": templates, "judges": "embedded", **scores})
    rows = [("photos", photos)] + [(name, x[:len(plain)]) for name, x in pictures.items()]
    save_png(grid(rows), args.run / "contact.png")
    print(f"judges: {folder}; {len(plain)} prompts x {args.num_seeds} seeds; pictures: {args.run / 'contact.png'}")


if __name__ == "__main__":
    main()
