"""How likeness and obedience change with one setting: train along it on the tuning subjects, and draw the figure.

    python data/benchmark/curve.py iterations     # updates of each network: both together, with carry and without, against teacher first
    python data/benchmark/curve.py noise          # the lowest noise level that alignment targets start from
    python data/benchmark/curve.py selection      # the share of samples that an echo keeps
    python data/benchmark/curve.py weight         # of the echo: above 0 the teacher learns from it, below 0 away from it

It is evaluate.py's benchmark with a method for each point, so it may be stopped and goes on. --output_dir (default: out/NAME) holds
results.jsonl and NAME.png: student solid and teacher hollow, the means over subjects, from six on with 95 % bootstrap intervals of what
the setting changes: each subject's own mean over the figure's points is taken out first (Cousineau 2005, Morey 2008), for subjects
differ more than settings do.
"""
import argparse
import math
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.benchmark.report import FEWEST, by_subject, interval, read_results
from data.disk import fail
from data.images import save_png

CURVES = {  # name: (flag of train.py, its values, {line: further flags})
    "iterations": ("max_train_steps", (10, 20, 40, 70, 100),
                   {"together": "--echo_steps 0", "together without carry": "--echo_steps 0 --no-carry",
                    "teacher first": f"--recipe {shlex.quote(str(ROOT / 'data/benchmark/emoji/sequential.toml'))}"}),
    "noise": ("target_noise", (0, .15, .3, .45, .6, .75), {"together": "--echo_steps 0"}),
    "selection": ("echo_keep", (.05, .1, .25, .5, 1), {"echo": ""}),
    "weight": ("echo_weight", (-.35, -.2, -.1, 0, .3, 1), {"echo": ""}),
}
SCORES = {"identity": "likeness to the photos (identity)", "obeyed": "prompts obeyed (place, number, neighbour, colour)",
          "all three": "identity, obeyed and drawing: all three"}
MODELS = ["student, 1 step", "teacher, 16 steps"]
INKS = [(200, 60, 40), (230, 150, 0), (40, 90, 200)]


def points(results, lines, values, model, score):
    """{line: [(place of the value, mean, low, high)]} of the methods "LINE VALUE", over the subjects that all with results have."""
    found = {(line, i): by_subject(results, f"{line} {value}", model, score) for line in lines for i, value in enumerate(values)}
    found = {k: v for k, v in found.items() if v}
    subjects = sorted(set.intersection(*map(set, found.values()))) if found else []
    rows = {line: [] for line in lines}
    if subjects:
        table = np.array([[v[s] for s in subjects] for v in found.values()])  # (points, subjects)
        widen = math.sqrt(len(table) / (len(table) - 1)) if len(table) > 1 else 1
        for (line, i), row, apart in zip(found, table, (table - table.mean(0)) * widen):
            around = interval(apart - apart.mean()) if len(subjects) >= FEWEST else (0, 0)
            rows[line].append((i, float(row.mean()), *(row.mean() + v for v in around)))
    return rows


def figure(results, name, size=(520, 316)):
    """The picture of one of CURVES; values stand at equal distances."""
    flag, values, lines = CURVES[name]
    w, h = size
    sheet = Image.new("RGB", (w * len(SCORES), h), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (score, title) in enumerate(SCORES.items()):
        drawn = {model: points(results, lines, values, model, score) for model in MODELS}
        rows = {(line, model): drawn[model][line] for line in lines for model in MODELS}
        every = [v for row in rows.values() for p in row for v in p[2:]]
        if not every:
            fail(f"no result has {score}; run the curve {name!r} without --report first")
        low, high = min(every), max(every) if max(every) > min(every) else min(every) + .1
        left, top, right, bottom = panel * w + 50, 30, (panel + 1) * w - 20, h - 76

        def place(i, value):
            return left + 20 + i * (right - left - 40) / max(len(values) - 1, 1), bottom - 10 - (value - low) / (high - low) * (bottom - top - 20)
        pen.text((left, 8), title, fill="black")
        pen.rectangle((left, top, right, bottom), outline="lightgray")
        for value in (low, high):
            pen.text((left - 40, place(0, value)[1] - 6), f"{value:.3f}", fill="gray")
        for i, value in enumerate(values):
            pen.text((place(i, low)[0] - 8, bottom + 6), f"{value:g}", fill="black")
        pen.text((left, bottom + 20), f"--{flag}", fill="gray")
        for n, ((line, model), row) in enumerate(rows.items()):
            ink, hollow, shift = INKS[list(lines).index(line)], model == MODELS[1], 3 * n
            where = [(x + shift, y) for x, y in (place(i, mean) for i, mean, _, _ in row)]
            if len(where) > 1:
                pen.line(where, fill=ink, width=1 if hollow else 2)
            for (x, y), (i, _, a, b) in zip(where, row):
                pen.line((x, place(i, a)[1], x, place(i, b)[1]), fill=ink)
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="white" if hollow else ink, outline=ink)
            x, y = left + 110 + n % 2 * 190, bottom + 22 + n // 2 * 16
            pen.ellipse((x - 12, y + 2, x - 4, y + 10), fill="white" if hollow else ink, outline=ink)
            pen.text((x, y), f"{line}, {model.split(',')[0]}", fill="black")
    return sheet


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("name", choices=CURVES)
    p.add_argument("--subjects", type=int, default=8, help="the first so many of the tuning subjects")
    p.add_argument("--seeds", default="0", help="of the trainings")
    p.add_argument("--output_dir", help="default: out/NAME")
    p.add_argument("--report", action="store_true", help="only draw what is there")
    args = p.parse_args(argv)
    folder = Path(args.output_dir or f"out/{args.name}")
    if not args.report:
        import evaluate
        flag, values, lines = CURVES[args.name]
        methods = [f"--method={line} {value}={more} --{flag} {value}" for line, more in lines.items() for value in values]
        evaluate.main(["--benchmark", "emoji", "--tuning", "--subjects", str(args.subjects), "--seeds", args.seeds,
                       "--output_dir", str(folder), *methods])
    results, _ = read_results(folder)
    save_png(figure(results, args.name), folder / f"{args.name}.png")
    print(f"{len(results)} results: {folder / args.name}.png")


if __name__ == "__main__":
    main()
