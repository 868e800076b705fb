"""Recipes, results, tables, the page and the blind sheet; no model is loaded. python -m pytest tests/test_benchmark.py"""
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train as script
from conftest import ROOT, exit_of, train
from data.benchmark import blind, curve, report, run
from data.disk import fail

HERE, STUDENT = ROOT / "data" / "benchmark", "student, 1 step"
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>|\n| `x`"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def line(method, subject, seed, dino, flags="", **more):
    scores = {STUDENT: {k: dino for k in report.COMPARED}}
    return (method, subject, seed), {"method": method, "subject": subject, "seed": seed, "flags": flags, "judges": "embedded",
                                     "iterations": 1, "train_cpu_seconds": 1., "scores": scores} | more


def write_results(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for _, r in rows), encoding="utf-8")


# -- recipes ----------------------------------------------------------------------------------------------------

def settings(flags):
    return vars(script.parse_arguments(["--concept", "dog", *flags]))


def test_a_recipe_file_becomes_flags_of_train(tmp_path):
    (tmp_path / "a.toml").write_text('# why\ncarry = false\nflip = true\ntrain_unet = "kv"\nstudent_lr = 1e-3\nswd_weight = 1\n')
    assert run.recipe_flags(tmp_path / "a.toml") == ["--no-carry", "--flip", "--train_unet", "kv", "--student_lr", "0.001", "--swd_weight", "1.0"]


@pytest.mark.parametrize("content", [b"carry = maybe\n", b"\xff\xfe", b"carry = false\ncarry = true\n", b"carries = false\n", b"swd_weight = -1\n", None])
def test_a_damaged_recipe_is_refused_by_its_name(content, tmp_path, capsys):
    if content:
        (tmp_path / "a.toml").write_bytes(content)
    code, message = exit_of(lambda argv: run.recipe_flags(tmp_path / "a.toml"), [], capsys)
    assert code == 2 and "a.toml" in message


def test_every_recipe_file_is_listed_and_says_in_a_comment_what_it_is():
    listed = [m["recipe"] for methods in json.loads((HERE / "methods.json").read_text()).values() for m in methods.values()]
    files = [p for folder in ("emoji", "dreambench") for p in (HERE / folder).glob("*.toml")]
    assert sorted(filter(None, listed)) == sorted(p.relative_to(HERE).as_posix() for p in files) and len(files) > 20
    assert all(p.read_text().startswith("# ") for p in files)


def test_the_committed_results_were_trained_with_the_recipes_that_are_listed(concept):
    results, damaged = report.read_results(HERE / "results")
    methods = run.load_methods("emoji")
    now = functools.cache(lambda name: settings(methods[name]["flags"].split()))
    assert {"EchoDistill", "no echo (real only)", "teacher first then distil"} < {name for name, *_ in results} and not damaged
    for (name, *_), line in results.items():
        assert (line["flags"] is None) == (methods[name]["flags"] is None)
        assert line["flags"] is None or line["recipe"] == {k: now(name)[k] for k in line["recipe"]} | {"mixed_precision": line["recipe"]["mixed_precision"]}, name


def test_the_front_table_is_that_of_the_committed_results():
    results, _ = report.read_results(HERE / "results")
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| student, 1 step | all three |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    called = {"teacher first, then distil": "teacher first then distil", "no echo, as many iterations": "no echo (real only)", "the world's own drawings": "real pictures"}
    assert len(rows) == 10
    for label, *cells, seconds in rows:
        method = called.get(label, label)
        mean = [np.mean(list(report.by_subject(results, method, "world" if method == "real pictures" else STUDENT, s).values())) for s in ("all three", "identity", "obeyed", "KID")]
        assert cells == [*(f"{v:.3f}"[1:] for v in mean[:3]), str(round(mean[3]))] and seconds == ("" if method == "real pictures" else report.cost(results, method)[2]), label


# -- what stands for what ---------------------------------------------------------------------------------------

class NoScorer:
    """In place of the judges: every picture has one score, given by the test."""
    value = .5

    def __init__(self, *args):
        pass

    def score(self, pair, model, photos, templates, *more):
        return {"DINO": self.value}, torch.zeros(len(templates), 3, 8, 8)


def benchmark(*flags, scorer=NoScorer):
    args = evaluate.parse_arguments(["--benchmark", "emoji", "--subjects", "1", "--seeds", "0", "--output_dir", "bench", *map(str, flags)])
    run.run_benchmark(args, scorer)


def refused(capsys, *flags, scorer=NoScorer):
    return exit_of(lambda argv: benchmark(*argv, scorer=scorer), flags, capsys)


def finished(flags, **more):
    write_results(Path("bench"), [line("slow", "cat face", 100, .5, flags, num_seeds=4, train_flags="", **more)])


def test_a_finished_job_stands_for_one_whose_flags_mean_the_same(capsys):
    finished("--student_lr 1e-3 --no-carry")
    benchmark("--method", "slow=--no-carry --student_lr .001")
    assert "1 jobs" in (said := capsys.readouterr().out) and "1 done" in said
    code, message = refused(capsys, "--method", "slow=--student_lr .001")
    assert code == 2 and "carry False, not True" in message and "--output_dir" in message


def test_a_recipe_that_changed_after_a_job_was_done_is_noticed(capsys):
    benchmark_args = evaluate.parse_arguments(["--benchmark", "emoji", "--method", "slow=--student_lr .001"])
    recipe = run.resolved(benchmark_args, {"dog": (ROOT / "data" / "dog",)}, "--student_lr .001")
    finished("--student_lr .001", recipe=recipe)
    benchmark("--method", "slow=--student_lr .001")
    assert "1 done" in capsys.readouterr().out
    finished("--student_lr .001", recipe=recipe | {"identity_weight": .9})  # as if the base's own recipe had said so
    code, message = refused(capsys, "--method", "slow=--student_lr .001")
    assert code == 2 and "identity_weight 0.9, not 0.3" in message


def test_no_two_subjects_share_a_seed():
    methods = {"plain": {"flags": None, "subjects": 9}, "few": {"flags": "", "subjects": 2}, "all": {"flags": "", "subjects": 9}}

    def seeds(*flags):
        args = evaluate.parse_arguments(["--benchmark", "emoji", "--seeds", "0,1", *flags])
        jobs = run.list_jobs(args, methods, ["cat", "dog", "owl"])
        assert len(jobs) == len(set(jobs)) == 3 + 2 * 2 + 2 * 3
        return {name: [(s, seed) for m, s, seed in jobs if m == name] for name in methods}
    own = seeds()
    assert own["all"] == [("cat", 100), ("dog", 101), ("owl", 102), ("cat", 200), ("dog", 201), ("owl", 202)]
    assert [seed for _, seed in seeds("--tuning")["few"]] == [150, 151, 250, 251]
    assert own["few"] == [("cat", 100), ("dog", 101), ("cat", 200), ("dog", 201)] and {seed for _, seed in own["plain"]} == {0}


def test_a_kept_run_of_another_recipe_is_not_taken_for_this_one(concept, capsys):
    kept = Path("bench/runs/slow/cat_face-100")
    kept.mkdir(parents=True)
    (kept / "config.json").write_text(json.dumps({"flags": {"student_lr": .5}}))
    code, message = refused(capsys, "--method", "slow=--student_lr .001")
    assert code == 2 and "student_lr 0.5, not 0.001" in message and str(kept) in message


@pytest.mark.parametrize("flags, named", [
    (["--train_flags", "--token '<v>"], "--train_flags"), (["--method", "a=--token '<v>"], "--method"), (["--method", "a=\""], "--method"),
    (["--method", "=--flip"], "--method"), (["--method", "slow --flip"], "--method"), (["--methods", "nonesuch"], "--methods"),
    (["--methods", "no carry", "--method", "No-Carry=--flip"], "folder"), (["--methods", "untouched", "--method", "a=--student_lr -1"], "student_lr")])
def test_flags_that_cannot_be_read_are_refused_before_anything_is_drawn(flags, named, capsys):
    code, message = refused(capsys, *flags)
    assert code == 2 and message.startswith("error: ") and named in message and not Path("bench/pictures").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_do_not_enter_the_results(value, capsys):
    scorer = type("Broken", (NoScorer,), {"value": value})
    code, message = refused(capsys, "--methods", "untouched", scorer=scorer)
    assert code == 2 and "untouched, cat face, seed 0" in message and f"DINO of {STUDENT} is {value}" in message
    assert not list(Path("bench").rglob("*.json*")) and not Path("bench/pictures").exists()


def test_scores_of_one_run_that_are_not_finite_are_refused_too(capsys):
    code, message = exit_of(lambda argv: run.check_scores({STUDENT: {"DINO": float("nan")}}, "out/dog"), [], capsys)
    assert code == 2 and "out/dog" in message and "DINO" in message


def test_a_training_that_stops_inside_a_job_says_why_on_the_terminal(monkeypatch, capsys):
    def stop(argv):
        print("step 1\nstep 2")
        fail("the student's loss is not finite at step 2; lower --student_lr")
    monkeypatch.setattr(script, "train", stop)
    code, message = refused(capsys, "--method", "wild=--student_lr 1")
    assert code == 2 and "wild, cat face, seed 100" in message and "not finite at step 2; lower --student_lr" in message
    log = Path("bench/runs/wild/cat_face-100/train.txt")
    assert str(log) in message and "step 1" in log.read_text() and not list(Path("bench").glob("jobs/*/*"))


def test_a_job_killed_outright_starts_anew_for_its_seconds_are_not_known(monkeypatch, tmp_path):
    calls, folder = [], tmp_path / "runs"

    def trained(argv):
        calls.append("--resume_from_checkpoint" in argv)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "step-000001.safetensors").write_bytes(b"")
        if len(calls) == 1:
            sys.exit(130)
    monkeypatch.setattr(script, "train", trained)
    with pytest.raises(SystemExit):
        run.train_once(folder, [], ("a", "cat", 0), {})
    run.train_once(folder, [], ("a", "cat", 0), {})  # after a stop that was asked for
    os.utime(folder / "cpu_seconds.json", (0, 0))  # as if a later checkpoint had been written and no record
    run.train_once(folder, [], ("a", "cat", 0), {})
    assert calls == [False, True, False]


def test_differences_are_of_the_scores_that_there_are():
    known = {"DINO": .5, "CLIP-T": .3}
    header, rows = report.difference_table(dict(line(m, s, 0, .5, scores={STUDENT: known}) for m in ("EchoDistill", "other") for s in "abcdef"), "EchoDistill")
    assert header == ["row", "against EchoDistill's", "subjects", "CLIP-T difference", "DINO difference"] and [r[:3] for r in rows] == [[f"other: {STUDENT}", STUDENT, 6]]


# -- damaged results --------------------------------------------------------------------------------------------

GOOD = line("a", "cat", 0, .5)[1]
DAMAGED = [b"{", b"[1, 2]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"method": "a"}', b"<<<<<<< HEAD", *[json.dumps(GOOD | bad).encode() for bad in (
    {"method": ""}, {"method": 3}, {"subject": None}, {"seed": "0"}, {"seed": True}, {"seed": .5}, {"flags": 3}, {"flags": "--token '<v>"}, {"judges": None}, {"iterations": "many"},
    {"train_cpu_seconds": None}, {"train_cpu_seconds": float("nan")}, {"scores": []}, {"scores": {STUDENT: 3}}, {"scores": {"critic": {"DINO": .5}}},
    {"scores": {STUDENT: {"DINO": float("nan")}}}, {"scores": {STUDENT: {"DINO": float("inf")}}}, {"scores": {STUDENT: {"DINO": "high"}}},
    {"scores": {STUDENT: {"DINO": None}}}, {"scores": {STUDENT: {"DINO": True}}}, {"seconds": "long"}, {"recipe": 3}, {"train_flags": 3}, {"num_seeds": "4"},
    {"benchmark": "../../secret"}, {"subject": "../../secret"}, {"subject": "/etc"}, {"subject": "a\0b"}, {"subject": ".."}, {"method": "m" * 300},
    {"judges": "\ud800"}, {"seed": 10 ** 400}, {"iterations": 10 ** 400}, {"flags": "--token \ud800"})]]


@pytest.mark.parametrize("bad", DAMAGED, ids=[d[-60:].decode("ascii", "replace") for d in DAMAGED])
def test_a_damaged_line_is_named_left_out_and_kept(bad, tmp_path, capsys):
    whole = b"\n".join(json.dumps(line("a", s, 0, .5)[1]).encode() for s in ("cat", "dog")) + b"\n" + bad + b"\n" + json.dumps(
        line("a", "pig", 0, .5)[1]).encode() + b"\n"
    (tmp_path / "results.jsonl").write_bytes(whole)
    evaluate.main(["--report", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'results.jsonl'}, line 3, is damaged and left out" in said and "left as it is" in said and "3 results" in said
    assert (tmp_path / "results.jsonl").read_bytes() == whole and "3 x 1" in (tmp_path / "table.md").read_text()
    assert "NaN" not in (tmp_path / "report.html").read_text()


def test_a_damaged_job_file_is_named_and_left_out(tmp_path, capsys):
    write_results(tmp_path, [line("a", "cat", 0, .5)])
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    (tmp_path / "jobs" / "a" / "dog-0.json").write_text('{"method": "a"')
    evaluate.main(["--report", "--output_dir", str(tmp_path)])
    assert "dog-0.json is damaged and left out" in (said := capsys.readouterr().out) and "1 results" in said


def test_results_that_are_no_file_are_refused(tmp_path, capsys):
    (tmp_path / "results.jsonl").mkdir()
    code, message = exit_of(evaluate.main, ["--report", "--output_dir", tmp_path], capsys)
    assert code == 2 and "results.jsonl" in message


def test_a_name_with_a_line_separator_of_unicode_is_one_line(tmp_path):
    write_results(tmp_path, [line("a\u2028b", "cat", 0, .5)])
    for _ in range(2):
        evaluate.main(["--report", "--output_dir", str(tmp_path)])
    assert list(report.read_results(tmp_path)[0]) == [("a\u2028b", "cat", 0)]


# -- tables -----------------------------------------------------------------------------------------------------

def test_the_interval_of_a_mean_is_near_the_normal_one_and_repeats():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = report.interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=.02) and high == pytest.approx(values.mean() + half, abs=.02)
    assert report.interval(values) == (low, high) and report.interval([2., 2.]) == (2., 2.)


def test_paired_differences_use_only_what_both_methods_have():
    results = dict([line("a", "cat", 0, .9), line("a", "cat", 1, .1), line("a", "dog", 0, .8), line("a", "pig", 0, 0.),
                    line("b", "cat", 0, .5), line("b", "dog", 0, .6)])
    mean, low, high, subjects = report.paired(results, ("a", "student, 1 step"), ("b", "student, 1 step"), "DINO")
    assert mean == pytest.approx(.3) and (low, high) == (pytest.approx(.2), pytest.approx(.4)) and subjects == 2
    results |= dict([line("untouched", "cat", 0, .2, flags=None)])  # one seed stands for all: (.9 + .1) / 2 - .2
    assert report.paired(results, ("a", "student, 1 step"), ("untouched", "student, 1 step"), "DINO")[0] == pytest.approx(.3)


def test_a_row_says_of_how_many_seeds_it_is():
    results = dict([line("a", "cat", 0, .9), line("a", "cat", 1, .1), line("a", "dog", 0, .8), line("b", "dog", 0, .5), line("b", "cat", 0, .3)])
    assert report.cost(results, "a")[0] == "2 x 1-2" and report.cost(results, "b")[0] == "2 x 1"


def test_no_order_of_results_changes_an_interval():
    results = dict([line("a", f"s{i}", 0, (i * i % 7) / 7) for i in range(9)] + [line("b", f"s{i}", 0, i / 9) for i in range(9)])
    pair = ("a", "student, 1 step"), ("b", "student, 1 step"), "DINO"
    assert report.paired(results, *pair) == report.paired(dict(reversed(results.items())), *pair)


def test_the_readmes_table_marks_what_differs_and_is_the_same_when_made_again(tmp_path):
    rows = [line(m, f"s{i}", 0, v + i % 3 / 100) for m, v in (("EchoDistill", .8), ("worse", .7), ("same", .8)) for i in range(12)]
    write_results(tmp_path, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark -->\nold\n<!-- end -->\nafter\n")
    argv = ["--report", "--output_dir", str(tmp_path), "--readme", str(readme)]
    evaluate.main(argv)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    found = {r.split("|")[1].strip(): r for r in text.splitlines() if r.startswith("|")}
    assert ".710 <" in found["worse"] and "<" not in found["same"] and ">" not in found["same"]
    evaluate.main(argv)
    assert readme.read_text() == text


@pytest.mark.parametrize("wins, n, low, high", [(7, 10, .3475, .9333), (0, 10, 0, .3085), (10, 10, .6915, 1), (50, 100, .3983, .6017)])
def test_the_binomial_interval_is_clopper_and_pearsons(wins, n, low, high):
    assert blind.binomial_interval(wins, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_markdown_table_keeps_its_columns_whatever_a_cell_holds():
    rows = report.markdown(["a|b", "c"], [["x | y\n| z", None], ["plain", .5], ["\r\n", "<b>"]]).splitlines()
    assert len(rows) == 5 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_the_table_of_the_benchmarks_readme_is_what_the_results_say():
    results, _ = report.read_results(HERE / "results")
    assert report.short_table(results, "EchoDistill") in (HERE / "README.md").read_text(encoding="utf-8")


def test_a_curve_shows_each_value_of_each_line_and_falls_where_the_scores_fall():
    scores = lambda v: {m: {"identity": .5 + .004 * v, "obeyed": .9 - .004 * v, "all three": .5} for m in curve.MODELS}
    rows = {(f"{line} {v}", s, 0): {"scores": scores(v)} for line in ("together", "teacher first") for v in (10, 20, 40, 70) for s in "ab"}
    drawn = np.asarray(curve.figure(rows, "iterations")).astype(int)
    red = (np.abs(drawn - curve.INKS[0]).sum(2) < 30)
    left, right = (np.argwhere(half)[:, ::-1] for half in np.split(red[:240], 3, 1)[:2])  # (x, y); y grows downward
    assert len(left) > 100 and np.corrcoef(left.T)[0, 1] < -.8 and np.corrcoef(right.T)[0, 1] > .8
    assert [p[0] for p in curve.points(rows, ["together"], (10, 20, 40, 70, 100), curve.MODELS[0], "obeyed")["together"]] == [0, 1, 2, 3]
    with pytest.raises(SystemExit, match="2"):
        curve.figure({}, "noise")


def test_a_curves_intervals_leave_out_what_sets_subjects_apart_and_subjects_that_a_point_lacks():
    score, gain = dict(zip("abcdefg", (.1, .5, .9, .2, .3, .4, .8))), dict(zip("abcdef", (.10, .12, .08, .11, .09, .16)))
    rows = {(f"echo {v}", s, 0): {"scores": {curve.MODELS[0]: {"identity": score[s] + v * gain.get(s, 0)}}}
            for v in (0, 1) for s in score if (v, s) != (0, "g")}
    drawn = curve.points(rows, ["echo"], (0, 1, 2), curve.MODELS[0], "identity")["echo"]
    mean, half = np.mean([score[s] for s in gain]), np.array(list(gain.values())) / 2
    around = report.interval((half - half.mean()) * 2 ** .5)  # of two points each subject's own mean takes half of the variance
    assert drawn[0][:2] == (0, pytest.approx(mean)) and drawn[1] == pytest.approx((1, mean + .11, *(mean + .11 + v for v in around)))
    few = curve.points({k: v for k, v in rows.items() if k[1] in "abc"}, ["echo"], (0, 1), curve.MODELS[0], "identity")["echo"]
    assert all(point[1:] == pytest.approx((point[1],) * 3) for point in few), "too few subjects for an interval"


# -- the page ---------------------------------------------------------------------------------------------------

def test_the_forest_plot_puts_dots_and_intervals_where_the_numbers_are():
    spread = [-.1, 0, .1] * 4
    values = {"EchoDistill": .6, "near": .6, "far": .3}
    results = dict([line(m, f"s{i}", 0, v + spread[i], "") for m, v in values.items() for i in range(12)])
    svg = report.forest(results, "EchoDistill", "DINO")
    found = {m[1]: (float(m[2]), float(m[3]), float(m[4])) for m in re.finditer(
        r'<title>([^,]*),.*?<path d="M([\d.]+) [\d.]+H([\d.]+)"/><circle cx=([\d.]+) ', svg)}
    assert set(found) == set(values) and found["near"] == found["EchoDistill"]
    for left, right, dot in found.values():
        assert dot - left == pytest.approx(right - dot, rel=.1) and 0 < left < dot < right < 340
    ticks = {float(m[2]): float(m[1]) for m in re.finditer(r"<text class=tick x=([\d.]+) y=[\d.]+>([\d.]+)</text>", svg)}
    a, b = min(ticks), max(ticks)
    for name, value in values.items():
        place = ticks[a] + (value - a) / (b - a) * (ticks[b] - ticks[a])
        assert found[name][2] == pytest.approx(place, abs=.2)
    kinds = re.findall(r'<g class="([^"]*)"><title>([^,]*),', svg)
    assert kinds == [("row own", "EchoDistill"), ("row", "near"), ("row told", "far")]


@pytest.mark.parametrize("low, high", [(0, 1), (.289, .823), (-.002, .0031), (17, 4000)])
def test_ticks_are_few_round_and_inside(low, high):
    found = report.ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low <= t <= high for t in found) and len({round(b - a, 6) for a, b in zip(found, found[1:])}) == 1


def make_pictures(folder, rows, subject):
    for i in range(5):
        (folder / "concepts" / subject).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 90, 200)).save(folder / "concepts" / subject / f"{i:02d}.png")
    for job, row in rows:
        path = folder / "pictures" / f"{report.file_name(job)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + 8 * 8, 8 * len(row["scores"])), "red").save(path)


def test_the_page_shows_plots_then_photos_beside_pictures_then_tables(tmp_path):
    rows = [line(m, "teapot", s, v) for m, v in (("EchoDistill", .8), ("other", .7)) for s in (1, 2)]
    write_results(tmp_path, rows)
    make_pictures(tmp_path, rows, "teapot")
    evaluate.main(["--report", "--output_dir", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<svg") < page.index("alt=\"photo\"") < page.index("alt=\"EchoDistill\"") < page.index("<table")
    assert page.count("<svg") == 7 and page.count('alt="photo"') == 5 and page.count('alt="other"') == 1  # the first seed
    assert "training seeds 1, 2" in page and "a … on the beach" in page and "http" not in page and "prefers-color-scheme" in page


def tags(page):
    """Every tag of a page but the base64 of its pictures."""
    return re.findall(r"<[a-z!/][^>]*>", page)


def test_nothing_that_comes_from_a_run_becomes_html_of_the_page(tmp_path):
    for folder, name in ((tmp_path / "evil", EVIL), (tmp_path / "tame", "tame")):
        rows = [line(m, name.replace("/", ""), 0, .5, f"--token {name}", judges=name, train_flags=name) for m in (name, "EchoDistill")]
        write_results(folder, rows)
        make_pictures(folder, rows, name.replace("/", ""))
        evaluate.main(["--report", "--output_dir", str(folder), "--reference", name])
    evil, tame = ((tmp_path / k / "report.html").read_text(encoding="utf-8") for k in ("evil", "tame"))
    assert "<img src=x" not in evil and html.escape("</script><img src=x") in evil
    assert len(tags(evil)) == len(tags(tame)) and evil.count("<script") == 1
    table = [r for r in (tmp_path / "evil" / "table.md").read_text(encoding="utf-8").splitlines() if r.startswith("|")]
    assert table[0].count("|") == len(re.findall(r"(?<!\\)\|", table[2]))


# -- blind sheet ------------------------------------------------------------------------------------------------

def sheet_of(page):
    return json.loads(re.search(r'<script type="application/json" id="sheet">(.*?)</script>', page)[1])


def make_sheet(folder, n=40, prompt="prompt {}", inks=("red", "blue")):
    pictures = [(prompt.replace("{}", str(i)), *(Image.new("RGB", (4, 4), ink) for ink in inks)) for i in range(n)]
    blind.ab_sheet(pictures, [pictures[0][1]], ("runs/secret_a", "runs/secret_b"), folder, seed=0)
    page = (folder / "sheet.html").read_text()
    return page, sheet_of(page), blind.png_url(pictures[0][1])


def save_votes(folder, sheet, votes):
    (folder / "votes.json").write_text(json.dumps({"sheet": sheet, "votes": votes}))


def test_the_sheet_hides_which_is_which_and_the_tally_finds_it_again(tmp_path, capsys):
    page, sheet, red = make_sheet(tmp_path)
    trials = sheet["trials"]
    assert "secret" not in page
    assert 10 < sum(t["left"] == red for t in trials) < 30 and [t["number"] for t in trials] != list(range(40))
    assert sheet["sheet"] == json.loads((tmp_path / "key.json").read_text())["sheet"]
    votes = [{"trial": t["number"], "choice": "left" if (t["left"] == red) == (i < 30) else "right"} for i, t in enumerate(trials)]
    save_votes(tmp_path, sheet["sheet"], votes)
    evaluate.main(["--tally", str(tmp_path / "votes.json")])
    assert "runs/secret_a" in (said := capsys.readouterr().out) and "30 of 40 votes: 75.0%" in said
    _, other, _ = make_sheet(tmp_path / "other", inks=("red", "green"))
    save_votes(tmp_path, other["sheet"], votes)
    code, message = exit_of(evaluate.main, ["--tally", tmp_path / "votes.json"], capsys)
    assert code == 2 and "another sheet" in message


@pytest.mark.parametrize("vote", [{"trial": 0, "choice": "middle"}, {"trial": 0, "choice": ""}, {"trial": 0, "choice": None}, {"trial": 0}, {"choice": "left"},
                                  {"trial": 99, "choice": "left"}, {"trial": 0, "choice": ["left"]}, ["left"], "left", None, 7])
def test_a_vote_for_neither_side_is_refused_and_never_counted(vote, tmp_path, capsys):
    _, sheet, _ = make_sheet(tmp_path)
    save_votes(tmp_path, sheet["sheet"], [{"trial": 1, "choice": "left"}, vote])
    code, message = exit_of(evaluate.main, ["--tally", tmp_path / "votes.json"], capsys)
    assert code == 2 and message.startswith("error: ") and "vote 2" in message


@pytest.mark.parametrize("name", ["votes.json", "key.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"{}", b'{"sheet": 3}', b'{"sheet": "SHEET", "votes": 3, "a_is": 3}',
                                     b'{"sheet": "SHEET", "votes": [], "A": "a", "B": "b", "a_is": {"0": "up"}}', "folder", None])
def test_damaged_votes_and_keys_are_refused_in_one_sentence(name, content, tmp_path, capsys):
    _, sheet, _ = make_sheet(tmp_path)
    save_votes(tmp_path, sheet["sheet"], [{"trial": 0, "choice": "left"}])
    (tmp_path / name).unlink()
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content.replace(b"SHEET", sheet["sheet"].encode()))
    code, message = exit_of(evaluate.main, ["--tally", tmp_path / "votes.json"], capsys)
    assert code == 2 and message.startswith("error: --tally") and name in message


def test_no_prompt_ends_the_script_that_holds_it(tmp_path):
    page, sheet, _ = make_sheet(tmp_path, 3, "this " + EVIL + " {} <!--SHEET-->")
    plain, _, _ = make_sheet(tmp_path / "plain", 3)
    assert len(tags(page)) == len(tags(plain)) and "<img src=x" not in page
    assert all(t["prompt"].startswith("this " + EVIL) for t in sheet["trials"])


def test_two_runs_of_one_subject_make_a_sheet(concept):
    short = "--max_train_steps 2 --train_batch_size 2 --echo_steps 1 --echo_samples 4".split()
    run_a = train(*short)
    run_a.rename("out/a")
    evaluate.main(["--ab_sheet", "out/a", str(train(*short, "--seed", "1")), "--num_seeds", "1"])
    sheet = sheet_of(Path("out/ab/sheet.html").read_text())
    assert len(sheet["trials"]) == 25 and any("on the beach" in t["prompt"] for t in sheet["trials"]) and len(sheet["photos"]) == 5
    evaluate.main(["--ab_sheet", "out/a", "out/a:teacher", "--num_seeds", "1"])
    trials = sheet_of(Path("out/ab/sheet.html").read_text())["trials"]
    assert all(t["left"] != t["right"] for t in trials) and "out/a:teacher" in Path("out/ab/key.json").read_text()


def in_chromium(page, folder, script):
    """The page's own HTML after a script has run in it."""
    path = folder / "page.html"
    path.write_text(page.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    return subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_keys_vote_undo_takes_back_a_reload_forgets_nothing_and_prompts_stay_text(tmp_path):
    page, sheet, _ = make_sheet(tmp_path, 3, EVIL + " {}")
    script = """
        const press = (key, more) => document.dispatchEvent(new KeyboardEvent("keydown", {key, ...more}));
        const told = () => votes.map(v => v.trial + v.choice).join() + " " + at("count").textContent + " " + document.title;
        if (!localStorage.first) {
          press("ArrowLeft"); press("ArrowRight", {repeat: true}); press("ArrowRight"); press("Backspace");
          localStorage.first = told();
          location.reload();
        } else {
          const back = told();
          press("ArrowRight"); at("right").click(); press("ArrowRight");
          document.body.dataset.told = [localStorage.first, back, told()].join("; ");
        }"""
    a, b, c = (t["number"] for t in sheet["trials"])
    title = "Which is better?"
    dom = in_chromium(page, tmp_path, script)
    once = f"{a}left 2 of 3 {title}"
    assert f'data-told="{once}; {once}; {a}left,{b}right,{c}right 3 of 3 {title}"' in dom and 'href="blob:' in dom


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_a_picture_of_the_report_grows_on_a_click_and_no_name_runs(tmp_path):
    rows = [line(EVIL, "teapot", 0, .5), line("EchoDistill", "teapot", 0, .6)]
    write_results(tmp_path, rows)
    make_pictures(tmp_path, rows, "teapot")
    evaluate.main(["--report", "--output_dir", str(tmp_path), "--reference", "EchoDistill"])
    click = "document.querySelector('.strips img').click(); document.body.dataset.open = large.open + ' ' + large.querySelectorAll('img').length;"
    wide = "document.body.dataset.fits = document.documentElement.scrollWidth <= innerWidth; document.body.dataset.title = document.title;"
    dom = in_chromium((tmp_path / "report.html").read_text(encoding="utf-8"), tmp_path, click + wide)
    assert 'data-open="true 1"' in dom and 'data-fits="true"' in dom and 'data-title="EchoDistill benchmark"' in dom
