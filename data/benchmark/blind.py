"""Blind comparison by eye: a page of two runs side by side that hides which is which, and its count."""
import base64
import hashlib
import io
import json
import math
import random
import re
from pathlib import Path

from data.disk import fail, save_text

PAGE = Path(__file__).parent / "sheet.html"
SIDES = ("left", "right")


def png_url(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def script_json(value):
    """JSON that can stand inside <script>: no "<" is left that could end it or open another."""
    return json.dumps(value).replace("<", "\\u003c")


def fill(template, values):
    """A page with its <!--NAME--> filled in, in one pass: what is put in is not looked at again."""
    return re.sub("<!--([A-Z]+)-->", lambda found: values[found[1]], template)


def ab_sheet(pictures, photos, names, folder, seed):
    """One HTML page that does not tell which is which, and the key that does.

    pictures  [(prompt, PIL image of A, PIL image of B)]
    names     of A and B, kept in key.json beside the page
    """
    rng = random.Random(f"{seed} {names}")
    order = list(range(len(pictures)))
    rng.shuffle(order)
    trials, a_is = [], {}
    for number in order:
        prompt, a, b = pictures[number]
        a_is[number] = rng.choice(["left", "right"])
        left, right = (a, b) if a_is[number] == "left" else (b, a)
        trials.append({"number": number, "prompt": prompt, "left": png_url(left), "right": png_url(right)})
    identity = hashlib.sha256(json.dumps(trials).encode()).hexdigest()[:16]
    sheet = script_json({"sheet": identity, "photos": [png_url(p) for p in photos], "trials": trials})
    page = fill(PAGE.read_text(encoding="utf-8"), {"SHEET": sheet})
    save_text(folder / "sheet.html", page)
    key = {"sheet": identity, "A": names[0], "B": names[1], "a_is": a_is}
    save_text(folder / "key.json", json.dumps(key, indent=1))
    print(f"open {folder / 'sheet.html'}, vote, save votes.json beside it; then: "
          f"python evaluate.py --tally {folder / 'votes.json'}")


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


def read_object(path, keys):
    """The JSON object in a file, with the keys {name: type} that it must have."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"--tally: {path} cannot be read ({type(error).__name__}: {error}); "
             "votes.json must lie beside its sheet's key.json")
    odd = [k for k, kind in keys.items() if not isinstance(value, dict) or not isinstance(value.get(k), kind)]
    if odd:
        fail(f"--tally: {path} is damaged: {odd[0]!r} is missing or of the wrong kind; save or make it anew")
    return value


def tally(path):
    """Print how often A was preferred; path is votes.json with the sheet's key.json beside it."""
    votes = read_object(path, {"sheet": str, "votes": list})
    key = read_object(path.with_name("key.json"), {"sheet": str, "A": str, "B": str, "a_is": dict})
    if votes["sheet"] != key["sheet"]:
        fail(f"--tally {path} was voted on another sheet than {path.with_name('key.json')}")
    if odd := [k for k, side in key["a_is"].items() if side not in SIDES]:
        fail(f"--tally: {path.with_name('key.json')} is damaged: trial {odd[0]} is neither left nor right")
    choices = {}
    for i, vote in enumerate(votes["votes"], 1):
        trial, choice = (vote.get(k) for k in ("trial", "choice")) if isinstance(vote, dict) else (None, None)
        if str(trial) not in key["a_is"] or choice not in SIDES:
            fail(f"--tally {path}: vote {i} is {json.dumps(vote)[:80]}, not left or right of a trial of this "
                 "sheet; vote again or take it out")
        choices[str(trial)] = choice
    if not choices:
        fail(f"--tally {path} holds no votes")
    wins = sum(choice == key["a_is"][trial] for trial, choice in choices.items())
    low, high = binomial_interval(wins, len(choices))
    print(f"A ({key['A']}) preferred to B ({key['B']}) in {wins} of {len(choices)} votes: "
          f"{wins / len(choices):.1%}, 95 % interval {low:.1%} to {high:.1%}")
