"""From result lines to tables with intervals, a report page, and the blind A/B sheet; no model is needed here."""
import base64
import html
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data.disk import fail, write_atomically

HERE = Path(__file__).parent
SCORES = ["CLIP-T", "CLIP-I", "DINO", "identity", "place", "count", "colour", "diversity", "drift"]
FEWEST = 6  # subjects below which no difference is marked: the bootstrap of two values is their range
COMPARED = ["CLIP-T", "CLIP-I", "DINO", "identity"]


# ---------------------------------------------------------------------------------------------------------------
# Results: one JSON line per (method, subject, seed)

def load_methods(benchmark):
    """{name: {"flags": train.py flags or None, "models": [(who, steps)], "subjects": how many}} of a benchmark."""
    return json.loads((HERE / "methods.json").read_text(encoding="utf-8"))[benchmark]


def file_name(job):
    """The path, without a suffix, of a (method, subject, seed) under a benchmark's folders."""
    method, subject, seed = job
    return f"{re.sub(r'[^a-z0-9]+', '_', method.lower())}/{re.sub(r'[^a-z0-9]+', '_', subject.lower())}-{seed}"


def read_results(folder):
    """{(method, subject, seed): line} of results.jsonl and of the jobs finished since it was written."""
    folder, lines = Path(folder), []
    if (folder / "results.jsonl").is_file():
        lines = [json.loads(row) for row in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    lines += [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("jobs/*/*.json"))]
    return {(line["method"], line["subject"], line["seed"]): line for line in lines}


def interval(values, resamples=10_000, seed=0):
    """95 % percentile bootstrap of the mean of values (n,), one per subject (Efron 1979)."""
    values = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return tuple(float(q) for q in np.quantile(values[rows].mean(1), [.025, .975]))


def by_subject(results, method, model, score):
    """{subject: mean over seeds} of one score of one row."""
    seeds = {}
    for (m, subject, _), line in results.items():
        value = line["scores"].get(model, {}).get(score) if m == method else None
        if value is not None:
            seeds.setdefault(subject, []).append(value)
    return {s: sum(v) / len(v) for s, v in sorted(seeds.items())}  # in one order, for intervals draw subjects by number


def paired(results, reference, row, score):
    """(mean, low, high, subjects) of reference - row over subjects that both have, averaged over the seeds that both have.

    A row without training has one seed, which stands for all of them.
    """
    trained = {k: v for k, v in results.items() if v["flags"] is not None}
    seeds = [{(s, seed) for m, s, seed in trained if m == method} for method in (reference[0], row[0])]
    common = {k: v for k, v in results.items() if k not in trained or not all(seeds) or k[1:] in seeds[0] & seeds[1]}
    a, b = by_subject(common, *reference, score), by_subject(common, *row, score)
    differences = [a[s] - b[s] for s in a if s in b]
    return (float(np.mean(differences)), *interval(differences), len(differences)) if differences else None


# ---------------------------------------------------------------------------------------------------------------
# Tables and the report

def markdown(header, rows):
    """A Markdown table; floats get three digits, None is left empty."""
    text = [[f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*text)]
    text.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in text)


def row_names(results):
    """[(method, model)] of a table: the world's own pictures, students, teachers; methods in the order of methods.json."""
    order = [m for methods in json.loads((HERE / "methods.json").read_text(encoding="utf-8")).values() for m in methods]
    rows = dict.fromkeys((line["method"], model) for line in results.values() for model in line["scores"])
    return sorted(rows, key=lambda r: (["world", "student", "teacher"].index(r[1].split(",")[0]),
                                       order.index(r[0]) if r[0] in order else len(order)))


def cost(results, method):
    """(subjects x seeds, iterations, mean CPU seconds) of a method's trainings, for a table."""
    lines = [line for line in results.values() if line["method"] == method]
    seeds = Counter(x["subject"] for x in lines)
    size = f"{len(seeds)} x {'-'.join(map(str, sorted({min(seeds.values()), max(seeds.values())})))}"
    return size, lines[0]["iterations"], f"{np.mean([x['train_cpu_seconds'] for x in lines]):.0f}"


def tables(results, reference):
    """(scores, paired differences) as Markdown."""
    scores, differences = [], []
    for method, model in row_names(results):
        (size, iterations, seconds), cells = cost(results, method), []
        for score in SCORES:
            values = list(by_subject(results, method, model, score).values())
            cells.append(None if not values else f"{np.mean(values):.3f} [{', '.join(f'{v:.3f}' for v in interval(values))}]"
                         if score in COMPARED else float(np.mean(values)))
        scores.append([method, model, size, *cells, iterations, seconds])
        against = [(reference, "student, 1 step")] + [(reference, model)] * model.startswith("teacher")
        for other in against:
            found = {s: paired(results, other, (method, model), s) for s in COMPARED}
            if other != (method, model) and all(found.values()):
                differences.append([f"{method}: {model}", other[1], found["DINO"][3],
                                    *(f"{d:+.3f} [{low:+.3f}, {high:+.3f}]{' *' if n >= FEWEST and (low > 0 or high < 0) else ''}"
                                      for d, low, high, n in found.values())])
    return (markdown(["method", "model", "subjects x seeds", *SCORES, "iterations", "CPU s"], scores),
            markdown(["row", f"against {reference}'s", "subjects", *(f"{s} difference" for s in COMPARED)], differences))


def short_table(results, reference):
    """For README.md: means, and < or > where a row lies below or above the reference's own with an interval that excludes 0.

    Students are compared with the reference's student, teachers with its teacher.
    """
    rows = []
    for method, model in row_names(results):
        (size, _, seconds), cells = cost(results, method), []
        for score in SCORES:
            values = list(by_subject(results, method, model, score).values())
            found = paired(results, (reference, model), (method, model), score) if method != reference else None
            found = found if found and found[3] >= FEWEST else None
            mark = " <" if found and found[1] > 0 else " >" if found and found[2] < 0 else ""
            cells.append(f"{np.mean(values):.3f}{mark}" if values else None)
        rows.append([method, model, size, *cells, seconds])
    return markdown(["method", "model", "subjects x seeds", *SCORES, "CPU s"], rows)


def update_readme(folder, reference, path):
    """Put the short table of a benchmark's results between the two marks in README.md."""
    text = path.read_text(encoding="utf-8")
    head, mark, rest = text.partition("<!-- benchmark -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not mark or not end:
        fail(f"--readme {path} has no <!-- benchmark --> ... <!-- end --> to fill")
    new = f"{head}{mark}{short_table(read_results(folder), reference)}\n{end}{tail}"
    write_atomically(path, lambda p: p.write_text(new, encoding="utf-8"))


def embedded_png(path, width=1100):
    image = Image.open(path).convert("RGB")
    image.thumbnail((width, 10 ** 6))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=85)
    return f'<img src="data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}">'


def html_table(text):
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines()]
    cells = "".join("<tr>" + "".join(f"<{'td' if i else 'th'}>{html.escape(c)}</{'td' if i else 'th'}>" for c in row) + "</tr>"
                    for i, row in enumerate([rows[0]] + rows[2:]))
    return f"<table>{cells}</table>"


def contact(folder, jobs, path):
    """A row for each (method, subject, seed) of the emoji benchmark whose pictures are still there: a photo, then one-step pictures."""
    files = [(folder / "concepts" / job[1] / "00.png", folder / "pictures" / f"{file_name(job)}.png") for job in jobs]
    files = [pair for pair in files if all(p.is_file() for p in pair)]
    if files:
        side, wide = 128, 8 * 128
        sheet = Image.new("RGB", (side + 16 + wide, side * len(files)), "white")
        for i, (photo, picture) in enumerate(files):
            drawn = Image.open(picture)
            sheet.paste(Image.open(photo).convert("RGB").resize((side, side), Image.NEAREST), (0, side * i))
            sheet.paste(drawn.crop((drawn.width - wide, 0, drawn.width, side)), (side + 16, side * i))  # no label, the first of two models
        write_atomically(path, lambda p: sheet.save(p, "WEBP", quality=85))


def write(folder, reference, shown=6):
    """results.jsonl (sorted), table.md, pictures.webp and the self-contained report.html, from whatever is finished."""
    folder = Path(folder)
    results = read_results(folder)
    if not results:
        fail(f"{folder} holds no results yet; run the benchmark first")
    order = sorted(results)
    write_atomically(folder / "results.jsonl", lambda p: p.write_text(
        "".join(json.dumps(results[k], ensure_ascii=False) + "\n" for k in order), encoding="utf-8"))
    scores, differences = tables(results, reference)
    sets = ", ".join(sorted({line["judges"] for line in results.values()}))
    text = (f"Judges: {sets}. Means over subjects of the mean over seeds; [95 % bootstrap interval over subjects].\n\n{scores}\n\n"
            f"{reference} minus the row, paired by subject and seed; * where the interval excludes 0 (from {FEWEST} subjects on).\n\n{differences}\n\n"
            + "".join(f"- {m}: `python train.py --concept SUBJECT --seed SEED {flags}`\n" for m, flags in
                      {line["method"]: line["flags"] for line in results.values()}.items() if flags is not None))
    write_atomically(folder / "table.md", lambda p: p.write_text(text, encoding="utf-8"))
    first = [k for k in order if k[2] == order[0][2]]
    contact(folder, [k for k in first if k[0] == reference][:2 * shown], folder / "pictures.webp")
    subjects = list(dict.fromkeys(k[1] for k in first))[:shown]
    figures = "".join(f"<h2>{html.escape(s)}</h2>" + "".join(
        f"<p>{html.escape(m)}</p>{embedded_png(picture)}" for m, subject, seed in first if subject == s
        if (picture := folder / "pictures" / f"{file_name((m, subject, seed))}.png").is_file()) for s in subjects)
    page = (f"<!doctype html><meta charset=utf-8><title>EchoDistill benchmark</title><style>body{{font:14px sans-serif;margin:2em}}"
            f"td,th{{padding:2px 8px;text-align:left;white-space:nowrap}}tr:nth-child(even){{background:#f4f4f4}}</style><h1>EchoDistill benchmark</h1>"
            f"<p>Judges: {html.escape(sets)}. Means over subjects; in brackets the 95 % bootstrap interval over subjects.</p>{html_table(scores)}"
            f"<p>{html.escape(reference)} minus the row, paired by subject and seed; * where the interval excludes 0.</p>{html_table(differences)}{figures}")
    write_atomically(folder / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    print(text)
    print(f"{len(results)} results: {folder / 'results.jsonl'}, {folder / 'table.md'}, {folder / 'report.html'}")


# ---------------------------------------------------------------------------------------------------------------
# Blind comparison by eye

SHEET = """<!doctype html><meta charset=utf-8><title>Which is better?</title>
<style>body{font:16px sans-serif;margin:2em;text-align:center}img{image-rendering:pixelated;width:256px;margin:4px}
.choice{cursor:pointer;border:4px solid transparent;display:inline-block;margin:0 1em}.choice:hover{border-color:#58f}</style>
<p>The subject:</p><p>PHOTOS</p><h2 id=prompt></h2><p id=left class=choice></p><p id=right class=choice></p>
<p>Click the picture that shows this subject and this prompt better. <span id=count></span></p>
<script>
const trials = TRIALS, votes = [];
function show() {
  if (votes.length == trials.length) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({sheet: SHEET_ID, votes}, null, 1)], {type: "application/json"}));
    link.download = "votes.json"; link.textContent = "Done. Save votes.json"; document.body.replaceChildren(link); return;
  }
  const t = trials[votes.length];
  prompt.textContent = t.prompt; count.textContent = (votes.length + 1) + " of " + trials.length;
  for (const side of ["left", "right"])
    document.getElementById(side).innerHTML = '<img src="data:image/png;base64,' + t[side] + '">';
}
for (const side of ["left", "right"])
  document.getElementById(side).onclick = () => { votes.push({trial: trials[votes.length].number, choice: side}); show(); };
const prompt = document.getElementById("prompt"), count = document.getElementById("count");
show();
</script>
"""


def png_base64(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def ab_sheet(pictures, photos, names, folder, seed):
    """One HTML page that does not tell which is which, and the key that does.

    pictures  [(prompt, PIL image of A, PIL image of B)]
    names     of A and B, kept in key.json beside the page
    """
    rng = random.Random(seed)
    order = list(range(len(pictures)))
    rng.shuffle(order)
    trials, a_is = [], {}
    for number in order:
        prompt, a, b = pictures[number]
        a_is[number] = rng.choice(["left", "right"])
        left, right = (a, b) if a_is[number] == "left" else (b, a)
        trials.append({"number": number, "prompt": prompt, "left": png_base64(left), "right": png_base64(right)})
    identity = f"{rng.getrandbits(64):016x}"
    page = (SHEET.replace("PHOTOS", "".join(f'<img src="data:image/png;base64,{png_base64(p)}" style="width:128px">' for p in photos))
            .replace("TRIALS", json.dumps(trials)).replace("SHEET_ID", json.dumps(identity)))
    write_atomically(folder / "sheet.html", lambda p: p.write_text(page, encoding="utf-8"))
    write_atomically(folder / "key.json", lambda p: p.write_text(
        json.dumps({"sheet": identity, "A": names[0], "B": names[1], "a_is": a_is}, indent=1), encoding="utf-8"))
    print(f"open {folder / 'sheet.html'}, vote, save votes.json beside it; then: python evaluate.py --tally {folder / 'votes.json'}")


def binomial_interval(wins, n, level=.95):
    """Exact (Clopper & Pearson 1934) interval of a share of wins among n."""
    def tail(p, k):  # P(X >= k)
        return sum(math.comb(n, i) * p ** i * (1 - p) ** (n - i) for i in range(k, n + 1))

    def solve(k, target):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, k) < target else (low, middle)
        return low
    alpha = (1 - level) / 2
    return (0.0 if wins == 0 else solve(wins, alpha)), (1.0 if wins == n else solve(wins + 1, 1 - alpha))


def tally(path):
    """Print how often A was preferred; path is votes.json with the sheet's key.json beside it."""
    try:
        votes, key = (json.loads(p.read_text(encoding="utf-8")) for p in (path, path.with_name("key.json")))
        if votes["sheet"] != key["sheet"]:
            fail(f"--tally {path} was voted on another sheet than {path.with_name('key.json')}")
        choices = {str(v["trial"]): v["choice"] for v in votes["votes"]}
        wins = sum(choice == key["a_is"][trial] for trial, choice in choices.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--tally {path} cannot be counted ({type(error).__name__}: {error}); it must lie beside its sheet's key.json")
    if not choices:
        fail(f"--tally {path} holds no votes")
    low, high = binomial_interval(wins, len(choices))
    print(f"A ({key['A']}) preferred to B ({key['B']}) in {wins} of {len(choices)} votes: {wins / len(choices):.1%}, "
          f"95 % interval {low:.1%} to {high:.1%}")
