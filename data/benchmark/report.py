"""From result lines to tables with intervals and a page to look at; no model is needed here."""
import base64
import html
import io
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from data.benchmark.blind import fill
from data.disk import fail, fill_marks, save_text, write_atomically

HERE = Path(__file__).parent
SCORES = ["all three", "identity", "obeyed", "KID", "edges", "DINO", "CLIP-I", "CLIP-T", "place", "count", "neighbour", "colour",
          "diversity", "drift"]
LONGEST = 150  # characters of a name, which becomes one of a file
FEWEST = 6  # subjects below which no difference is marked: the bootstrap of two values is their range
COMPARED = {"all three": "this subject, as asked, and well drawn", "KID": "how far are its cells from real ones? (lower is better)", "obeyed": "place, number, neighbour and colour as the prompt asks",
            "CLIP-T": "does the picture follow the prompt?", "CLIP-I": "does it look like the photos?",
            "DINO": "is it this very subject?",
            "identity": "the same, where the prompt leaves the subject as it is"}


# ------------------------------------------------------------------------------------------------------------
# Results: one JSON line per (method, subject, seed)

def name_of(model):
    """The row of a model, ("student", 2) or ("world", 0), in tables."""
    return f"{model[0]}, {model[1]} step{'s' * (model[1] > 1)}" if model[1] else model[0]


def slug(name):
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def file_name(job):
    """The path, without a suffix, of a (method, subject, seed) under a benchmark's folders."""
    method, subject, seed = job
    return f"{slug(method)}/{slug(subject)}-{seed}"


def read_line(text):
    """The result in a line of JSON; a ValueError says what is wrong with it."""
    try:
        line = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(line, dict):
        raise ValueError("it is no JSON object")

    def number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15

    def name(value):
        return isinstance(value, str) and 0 < len(value) <= LONGEST
    rules = {"method": name, "subject": lambda v: name(v) and not re.search(r"^\.|[/\\\0]", v),
             "seed": lambda v: type(v) is int and abs(v) < 2 ** 63,
             "flags": lambda v: v is None or isinstance(v, str) and [v, shlex.split(v)],
             "judges": name, "iterations": number, "train_cpu_seconds": number,
             "scores": lambda v: isinstance(v, dict) and all(
                 model.split(",")[0] in ("world", "student", "teacher") and isinstance(row, dict)
                 and all(map(number, row.values())) for model, row in v.items())}
    later = {"benchmark": lambda v: v in ("emoji", "dreambench"), "train_flags": lambda v: isinstance(v, str),
             "num_seeds": lambda v: type(v) is int, "seconds": number,
             "recipe": lambda v: v is None or isinstance(v, dict)}  # keys that the oldest lines lack
    json.dumps(line, ensure_ascii=False).encode("utf-8")  # half a surrogate pair could not be written again
    for key, right in (rules | later).items():
        if key not in line and key in rules:
            raise ValueError(f"it has no {key}")
        if key in line and not right(line[key]):
            raise ValueError(f"its {key} is {json.dumps(line[key])[:60]}")
    return line


def read_results(folder):
    """({(method, subject, seed): line}, how many are damaged) of results.jsonl and of jobs done since then.

    A damaged line is named and left out.
    """
    folder, results, damaged = Path(folder), {}, 0
    for path in [p for p in (folder / "results.jsonl",) if p.exists()] + sorted(folder.glob("jobs/*/*.json")):
        try:
            whole = path.read_bytes()
        except OSError as error:
            fail(f"{path} cannot be read ({error.strerror}); move it away")
        rows = whole.split(b"\n") if path.suffix == ".jsonl" else [whole]
        for number, row in enumerate(rows, 1):
            if row.strip():
                try:
                    line = read_line(row.decode("utf-8"))
                    results[line["method"], line["subject"], line["seed"]] = line
                except ValueError as error:
                    damaged += 1
                    place = f"{path}, line {number}," if path.suffix == ".jsonl" else str(path)
                    print(f"note: {place} is damaged and left out ({error})")
    return results, damaged


def interval(values, resamples=10_000, seed=0):
    """95 % percentile bootstrap of the mean of values (n,), one per subject (Efron 1979)."""
    values = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return tuple(float(q) for q in np.quantile(values[rows].mean(1), [.025, .975]))


def with_interval(values):
    return f"{np.mean(values):.3f} [{', '.join(f'{v:.3f}' for v in interval(values))}]"


def by_subject(results, method, model, score):
    """{subject: mean over seeds} of one score of one row."""
    seeds = {}
    for (m, subject, _), line in results.items():
        value = line["scores"].get(model, {}).get(score) if m == method else None
        if value is not None:
            seeds.setdefault(subject, []).append(value)
    return {s: sum(v) / len(v) for s, v in sorted(seeds.items())}  # in one order: intervals draw by number


def paired(results, reference, row, score):
    """(mean, low, high, subjects) of reference - row over the subjects, and their seeds, that both have.

    A row without training has one seed, which stands for all of them.
    """
    trained = {k: v for k, v in results.items() if v["flags"] is not None}
    seeds = [{(s, seed) for m, s, seed in trained if m == method} for method in (reference[0], row[0])]
    common = {k: v for k, v in results.items()
              if k not in trained or not all(seeds) or k[1:] in seeds[0] & seeds[1]}
    a, b = by_subject(common, *reference, score), by_subject(common, *row, score)
    differences = [a[s] - b[s] for s in a if s in b]
    return (float(np.mean(differences)), *interval(differences), len(differences)) if differences else None


def sign(found):
    """"<" or ">" where a row lies below or above the reference by an interval that excludes 0, else ""."""
    if not found or found[3] < FEWEST:
        return ""
    return "<" if found[1] > 0 else ">" if found[2] < 0 else ""


# ------------------------------------------------------------------------------------------------------------
# Tables

def cell(value):
    """A cell as text on one line; floats get three digits, None is left empty."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else " ".join(str(value).split())


def plain(text):
    """Text that Markdown takes for neither a column nor HTML."""
    return re.sub("<(?=[A-Za-z!/?])", "&lt;", text.replace("|", "\\|"))


def code(text):
    """Text that stays inside a Markdown code span."""
    return cell(text).replace("`", "'")


def markdown(header, rows):
    text = [[plain(cell(c)) for c in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*text)]
    text.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in text)


def html_table(header, rows):
    lines = ["".join(f"<{tag}>{html.escape(cell(c))}</{tag}>" for c in row)
             for tag, row in [("th", header), *(("td", r) for r in rows)]]
    return f'<div class=scroll><table><tr>{"<tr>".join(lines)}</table></div>'


def row_names(results):
    """[(method, model)]: the world's own pictures, students, teachers; as methods.json orders them."""
    listed = json.loads((HERE / "methods.json").read_text(encoding="utf-8"))
    order = [m for methods in listed.values() for m in methods]
    rows = dict.fromkeys((line["method"], model) for line in results.values() for model in line["scores"])
    return sorted(rows, key=lambda r: (["world", "student", "teacher"].index(r[1].split(",")[0]),
                                       order.index(r[0]) if r[0] in order else len(order)))


def cost(results, method):
    """(subjects x seeds, iterations, mean CPU seconds) of a method's trainings, for a table."""
    lines = [line for line in results.values() if line["method"] == method]
    seeds = Counter(x["subject"] for x in lines)
    size = f"{len(seeds)} x {'-'.join(map(str, sorted({min(seeds.values()), max(seeds.values())})))}"
    return size, lines[0]["iterations"], f"{np.mean([x['train_cpu_seconds'] for x in lines]):.0f}"


def scored(results):
    """Those of SCORES that some result has."""
    return [s for s in SCORES if any(s in row for line in results.values() for row in line["scores"].values())]


def score_table(results):
    """(header, rows): means, with the interval of those that are compared."""
    rows, scores = [], scored(results)
    for method, model in row_names(results):
        (size, iterations, seconds), cells = cost(results, method), []
        for score in scores:
            values = list(by_subject(results, method, model, score).values())
            show = with_interval if score in COMPARED else lambda v: float(np.mean(v))
            cells.append(show(values) if values else None)
        rows.append([method, model, size, *cells, iterations, seconds])
    return ["method", "model", "subjects x seeds", *scores, "iterations", "CPU s"], rows


def difference_table(results, reference):
    """(header, rows): reference minus the row; a teacher is compared with the reference's teacher too."""
    known = scored(results)  # on photos fewer than in the emoji world
    rows, scores = [], [s for s in COMPARED if s in known]
    for method, model in row_names(results):
        for other in [(reference, "student, 1 step")] + [(reference, model)] * model.startswith("teacher"):
            found = {s: paired(results, other, (method, model), s) for s in scores}
            if other != (method, model) and all(found.values()):
                rows.append([f"{method}: {model}", other[1], max(n for *_, n in found.values()),
                             *(f"{d:+.3f} [{low:+.3f}, {high:+.3f}]{' *' * bool(sign((d, low, high, n)))}"
                               for d, low, high, n in found.values())])
    return ["row", f"against {reference}'s", "subjects", *(f"{s} difference" for s in scores)], rows


def short_table(results, reference):
    """Means, and < or > where a row lies below or above the reference's own with an interval that excludes 0.

    Students are compared with the reference's student, teachers with its teacher.
    """
    rows, scores = [], scored(results)
    for method, model in row_names(results):
        (size, _, seconds), cells = cost(results, method), []
        for score in scores:
            values = list(by_subject(results, method, model, score).values())
            mark = sign(paired(results, (reference, model), (method, model), score))
            cells.append(f"{np.mean(values):.3f} {mark}".rstrip() if values else None)
        rows.append([method, model, size, *cells, seconds])
    return markdown(["method", "model", "subjects x seeds", *scores, "CPU s"], rows)


def update_readme(results, reference, path):
    """Put the short table of a benchmark's results between the two marks of a Markdown file."""
    fill_marks(path, "benchmark", "end", f"{short_table(results, reference)}\n", "--readme")


# ------------------------------------------------------------------------------------------------------------
# The page: dots and intervals, pictures, tables

def ticks(low, high, most=5):
    """Round numbers from low to high, at most so many."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= most)
    return [round(k * step, 6) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(results, reference, score, width=340, height=32):
    """One measure as inline SVG: a dot and its 95 % interval for each method, a line through the reference.

    A dot is filled where the paired difference from the reference excludes 0. width, height (of a row) in px.
    """
    rows = []  # (method, model, mean, low, high, subjects, filled)
    for method, model in row_names(results):
        values = list(by_subject(results, method, model, score).values())
        if values:
            other = (reference, "student, 1 step" if model == "world" else model)
            rows.append((method, model, float(np.mean(values)), *interval(values), len(values),
                         bool(sign(paired(results, other, (method, model), score)))))
    if not rows:
        return ""
    low, high = min(r[3] for r in rows), max(r[4] for r in rows)
    low, high = (low, high) if high > low else (low - .05, high + .05)
    most = max(r[5] for r in rows)

    def x(value):
        return f"{8 + (value - low) / (high - low) * (width - 16):.1f}"
    body, y = [], 8
    for model, group in groupby(rows, key=lambda r: r[1]):
        body.append(f'<text class=group x=4 y={y + 20}>{html.escape(model)}</text>')
        y = top = y + 28
        for method, _, mean, left, right, n, filled in group:
            name = textwrap.shorten(method + (f" ({n} subjects)" if n < most else ""), 54, placeholder=" …")
            title = f"{method}, {model}: {mean:.3f} [{left:.3f}, {right:.3f}], {n} subjects"
            kind = "row" + " own" * (method == reference) + " told" * filled
            body.append(f'<g class="{kind}"><title>{html.escape(title)}</title>'
                        f'<rect y={y} width={width} height={height} rx=4 />'
                        f'<text x=4 y={y + 13}>{html.escape(name)}</text>'
                        f'<path d="M{x(left)} {y + 22}H{x(right)}"/>'
                        f'<circle cx={x(mean)} cy={y + 22} r=4 /></g>')
            y += height
        own = [r for r in rows if r[:2] == (reference, model)]
        body += [f'<path class=reference d="M{x(r[2])} {top}V{y}"/>' for r in own]
    grid = "".join(f'<path class=grid d="M{x(t)} 4V{y}"/><text class=tick x={x(t)} y={y + 14}>{t:g}</text>'
                   for t in ticks(low, high))
    return (f'<svg viewBox="0 0 {width} {y + 20}" role=img aria-label="{html.escape(score)} of each method">'
            f'{"".join(body)}{grid}</svg>')


def webp(image, width=1600, alt=""):
    """An <img> that holds its picture."""
    image = image.convert("RGB")
    image.thumbnail((width, width))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=85)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img loading=lazy alt="{html.escape(alt)}" src="data:image/webp;base64,{code}">'


def strips(folder, line, n=8):
    """[(model, PIL image of its first n pictures in a row)] of a job, if its pictures are still there."""
    try:
        job = line["method"], line["subject"], line["seed"]
        sheet = Image.open(folder / "pictures" / f"{file_name(job)}.png")
        sheet.load()
    except OSError:
        return []
    side = sheet.height // len(line["scores"])
    return [(model, sheet.crop((sheet.width - n * side, i * side, sheet.width, (i + 1) * side)))
            for i, model in enumerate(line["scores"])]


def contact(folder, lines, path, side=128):
    """A row for each job whose pictures are still there: a photo, then eight pictures of its first model."""
    rows = [(folder / "concepts" / line["subject"] / "00.png", strips(folder, line)) for line in lines]
    rows = [(photo, found[0][1]) for photo, found in rows if found and photo.is_file()]
    if rows:
        sheet = Image.new("RGB", (side + 16 + 8 * side, side * len(rows)), "white")
        for i, (photo, drawn) in enumerate(rows):
            sheet.paste(Image.open(photo).convert("RGB").resize((side, side), Image.NEAREST), (0, side * i))
            drawn = drawn if drawn.height == side else drawn.resize((8 * side, side))
            sheet.paste(drawn, (side + 16, side * i))
        write_atomically(path, lambda p: sheet.save(p, "WEBP", quality=85))


def first_seeds(results):
    """{(method, subject): its line of the lowest training seed}."""
    first = {}
    for (method, subject, _), line in sorted(results.items(), key=lambda item: item[0][2]):
        first.setdefault((method, subject), line)
    return first


def gallery(folder, lines):
    """The photos of each subject beside the pictures of each method, as HTML; `lines`: one of each."""
    sections = []
    for subject in dict.fromkeys(line["subject"] for line in lines):
        figures = "".join(
            f"<figure><figcaption>{html.escape(line['method'])} <i>{html.escape(model)}</i></figcaption>"
            f"<button>{webp(strip, alt=line['method'])}</button></figure>"
            for line in lines if line["subject"] == subject for model, strip in strips(folder, line))
        photos = "".join(f"<button>{webp(Image.open(p), 512, 'photo')}</button>"
                         for p in sorted((folder / "concepts" / subject).glob("*.png"))[:6])
        if figures:
            left = f"<div class=photos><h3>{html.escape(subject)}</h3>{photos}</div>"
            sections.append(f"<section class=subject>{left}<div class=strips>{figures}</div></section>")
    return "".join(sections) or "<p>The pictures of this benchmark are not in this folder.</p>"


def settings_table(results):
    """(header, rows): what each method was trained with."""
    rows = []
    for method in dict.fromkeys(m for m, _ in row_names(results)):
        lines = [line for (m, _, _), line in results.items() if m == method]
        size, iterations, _ = cost(results, method)
        flags = {" ".join(filter(None, (line.get("train_flags"), line["flags"]))) for line in lines}
        recipe = "; ".join(sorted(flags)) or "the base's own recipe"
        rows.append([method, size, ", ".join(map(str, sorted({line["seed"] for line in lines}))), iterations,
                     recipe if lines[0]["flags"] is not None else "not trained"])
    return ["method", "subjects x seeds", "training seeds", "iterations", "recipe"], rows


def page(folder, results, reference, shown):
    """The self-contained report.html."""
    lines = list(results.values())
    spec = json.loads((HERE / f"{lines[0].get('benchmark', 'emoji')}.json").read_text(encoding="utf-8"))
    subjects = list(dict.fromkeys(line["subject"] for line in lines))
    drawn = {k[1] for k in results if (folder / "pictures" / f"{file_name(k)}.png").is_file()}
    picked = [s for s in subjects if s in drawn][:shown]
    rank = {m: i for i, m in enumerate(dict.fromkeys(m for m, _ in row_names(results)))}
    first = [line for (_, subject), line in sorted(first_seeds(results).items(), key=lambda found: rank[found[0][0]]) if subject in picked]
    seeds = sorted({line.get("num_seeds") for line in lines} - {None})
    trained = sorted({line["seed"] for line in lines if line["flags"] is not None})
    facts = [f"judges: {', '.join(sorted({line['judges'] for line in lines}))}", f"{len(subjects)} subjects",
             f"training seeds {', '.join(str(s) for s in trained)}",
             f"pictures per prompt: {', '.join(map(str, seeds))}, seeds from 0", f"compared with {reference}"]
    panels = "".join(f"<figure class=panel><figcaption><b>{s}</b> {why}</figcaption>{svg}</figure>"
                     for s, why in COMPARED.items() if (svg := forest(results, reference, s)))
    values = {"FACTS": html.escape(" · ".join(facts)), "REFERENCE": html.escape(reference), "PANELS": panels,
              "PROMPTS": html.escape(", ".join(spec["prompts"]["object"][:8]).replace("{}", "…")),
              "GALLERY": gallery(folder, first), "SCORES": html_table(*score_table(results)),
              "DIFFERENCES": html_table(*difference_table(results, reference)), "FEWEST": str(FEWEST),
              "SETTINGS": html_table(*settings_table(results))}
    return fill((HERE / "page.html").read_text(encoding="utf-8"), values)


def write(folder, reference, shown=6):
    """results.jsonl, table.md, pictures.webp and report.html of whatever is finished; returns the results."""
    folder = Path(folder)
    results, damaged = read_results(folder)
    if not results:
        fail(f"{folder} holds no results; run the benchmark first")
    results = dict(sorted(results.items()))  # in one order, whichever job was done first
    if reference not in {method for method, _, _ in results}:
        print(f"note: no result of {reference} is there, so no row is compared with it; --reference names another method")
    if damaged:
        print(f"note: {damaged} damaged; {folder / 'results.jsonl'} is left as it is, the rest is reported")
    else:
        rows = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in results.values())
        save_text(folder / "results.jsonl", rows)
    sets = ", ".join(sorted({line["judges"] for line in results.values()}))
    trained = {m: line["flags"] for (m, _, _), line in results.items() if line["flags"] is not None}
    text = (f"Judges: {plain(cell(sets))}. "
            "Means over subjects of the mean over seeds; [95 % bootstrap interval over subjects].\n\n"
            f"{markdown(*score_table(results))}\n\n"
            f"{plain(cell(reference))} minus the row, paired by subject and seed; "
            f"* where the interval excludes 0 (from {FEWEST} subjects on).\n\n"
            f"{markdown(*difference_table(results, reference))}\n\n"
            + "".join(f"- {plain(cell(m))}: `python train.py --concept SUBJECT --seed SEED {code(flags)}`\n"
                      for m, flags in trained.items()))
    save_text(folder / "table.md", text)
    contact(folder, [line for (method, _), line in sorted(first_seeds(results).items()) if method == reference], folder / "pictures.webp")
    whole = page(folder, results, reference, shown)
    save_text(folder / "report.html", whole)
    print(text)
    written = ", ".join(str(folder / name) for name in ("results.jsonl", "table.md", "report.html"))
    print(f"{len(results)} results: {written}")
    return results
