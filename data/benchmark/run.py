"""Run a benchmark: every (method, subject, seed) is one job, and a job that has its file is never done again.

methods.json lists the methods of each benchmark: a recipe file (null: nothing is trained), the models that
are scored, and on how many subjects.
"""
import contextlib
import functools
import json
import math
import os
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from zlib import crc32

import torch

from data.benchmark import report
from data.base import load_pair, pick_device
from data.disk import fail, save_json
from data.images import grid, load_photos, save_png, to_pil
from data.recipe import read_toml
from data.run import checkpoints, load_run

HERE = Path(__file__).parent
# what a training is told that is no part of its recipe: two results may differ in it and be compared
APART = {"concept", "class_word", "token", "output_dir", "seed", "device", "recipe", "log_steps",
         "preview_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}


# ------------------------------------------------------------------------------------------------------------
# What is compared: subjects, prompts, methods

def read_spec(benchmark):
    """{"subjects", "prompts": {"object", "live"}, "live": class words, "unrelated"} of a benchmark."""
    return json.loads((HERE / f"{benchmark}.json").read_text(encoding="utf-8"))


def templates_for(spec, word):
    return spec["prompts"]["live" if word in spec["live"] else "object"]


def recipe_flags(path):
    """A recipe file (TOML, key = value) as flags of train.py: carry = false is --no-carry."""
    flags = []
    for key, value in read_toml(path)["recipe"].items():
        flags += [f"--{'no-' * (value is False)}{key}"] + [str(value)] * (not isinstance(value, bool))
    return flags


def load_methods(benchmark):
    """{name: {"flags": of train.py or None, "models": [(who, steps)], "subjects": how many}}."""
    listed = json.loads((HERE / "methods.json").read_text(encoding="utf-8"))[benchmark]
    return {name: {"flags": m["recipe"] and shlex.join(recipe_flags(HERE / m["recipe"])),
                   "models": m["models"], "subjects": m["subjects"]} for name, m in listed.items()}


def load_subjects(args, first=True):
    """({name: (photo folder, class word, templates)}, unrelated prompts); the `first` process fills concepts/

    In the emoji world concepts/ holds the photos themselves, else five small copies for the report.
    """
    spec, world = read_spec(args.benchmark), args.benchmark == "emoji"
    concepts = Path(args.output_dir) / "concepts"
    folder = concepts if world else Path(args.data)
    if world:
        sys.path.insert(0, str(HERE.parent / "emoji"))
        from world import World, portraits
        held_out = {e["name"]: e["class"] for e in World("held_out").entries}
        classes = {name: held_out[name] for name in spec["tuning" if args.tuning else "subjects"]}
    else:
        classes = spec["subjects"]
    classes = dict(list(classes.items())[:args.subjects])
    for name in classes:
        if not world and not (folder / name).is_dir():
            fail(f"--data {folder} lacks {name}; fetch the photos with: "
                 f"python data/benchmark/download.py --output {folder}")
        if first and not (concepts / name / "04.png").is_file():
            photos = portraits(name) if world else load_photos(folder / name, 256)[:5]
            for i, picture in enumerate(to_pil(photos)):
                save_png(picture, concepts / name / f"{i:02d}.png")
    subjects = {name: (folder / name, word, templates_for(spec, word)) for name, word in classes.items()}
    return subjects, spec["unrelated"]


def check_methods(args):
    """Make lists of --methods and --method, and refuse what is unknown or cannot be read."""
    known, args.methods = load_methods(args.benchmark), [m for m in (args.methods or "").split(",") if m]
    if wrong := [m for m in args.methods if m not in known]:
        fail(f"--methods {wrong[0]} is unknown; there are: {', '.join(known)}")
    if any("=" not in m for m in args.method):
        fail("--method takes NAME=FLAGS, such as --method 'slow=--student_lr 1e-5'")
    args.method = [tuple(m.split("=", 1)) for m in args.method]
    texts = [("--train_flags", args.train_flags), *(("--method", flags) for _, flags in args.method)]
    for flag, text in texts:
        try:
            shlex.split(text)
        except ValueError as error:
            fail(f"{flag} {text!r} cannot be split into flags ({error}); close the quote")


def choose_methods(args, subjects):
    """The methods that are asked for by name (default: all) and by --method NAME=FLAGS."""
    known = load_methods(args.benchmark)
    methods = {k: known[k] for k in args.methods or ([] if args.method else known)}
    for name, flags in args.method:
        models = [("student", 1), ("teacher", 16)]
        methods[name] = {"flags": flags, "models": models, "subjects": len(subjects)}
    folders = {}
    for name in methods:
        other = folders.setdefault(report.slug(name), name)
        if other != name or not report.slug(name).strip("_") or len(name) > report.LONGEST:
            fail(f"--method {name!r} cannot name a folder of its own (there is {other!r}); "
                 f"take other letters, {report.LONGEST} at most")
    return methods


def resolved(args, subjects, flags):
    """{key: value} of every setting that decides a training: its recipe on top of the base's own."""
    import train
    argv = ["--concept", str(next(iter(subjects.values()))[0]), "--device", args.device]
    argv += shlex.split(args.train_flags) + shlex.split(flags)
    return {k: v for k, v in vars(train.parse_arguments(argv)).items()
            if k not in APART and isinstance(v, (bool, int, float, str, type(None)))}


# ------------------------------------------------------------------------------------------------------------
# One job

def words(job):
    return "{}, {}, seed {}".format(*job)


def train_once(folder, argv, job, recipe):
    """Train into `folder`, or go on where a stop left off; returns CPU seconds over all starts."""
    import train
    record = folder / "cpu_seconds.json"  # outlives a stop, as the checkpoints do
    spent = json.loads(record.read_text()) if record.is_file() else 0.
    if (folder / "config.json").is_file():
        trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))["flags"]
        if changed := [k for k, v in recipe.items() if trained.get(k, v) != v]:
            k = changed[0]
            fail(f"{folder} was trained with {k} {trained[k]!r}, not {recipe[k]!r}; remove it")
        return spent
    found = checkpoints(folder)
    if found and record.is_file() and record.stat().st_mtime >= found[-1].stat().st_mtime:
        argv = argv + ["--resume_from_checkpoint", "latest"]
    else:  # new, or killed outright, and then nobody knows its seconds
        spent = 0.
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.process_time() - spent
    try:
        with (open(folder / "train.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log),
              contextlib.redirect_stderr(log), torch.enable_grad()):
            train.train(argv)  # one run: the processes share out jobs here
    except SystemExit as stop:
        said = (folder / "train.txt").read_text(encoding="utf-8").split("\n")
        last = next((s.removeprefix("error: ") for s in said[::-1] if s.strip()), "")
        if stop.code == 2:
            fail(f"the training of {words(job)} stopped: {last} (all that it said: {folder / 'train.txt'})")
        print(last, file=sys.stderr)
        raise
    finally:
        spent = time.process_time() - begun
        save_json(record, spent)
    return spent


def check_scores(scores, run):
    """Refuse scores that are not finite, and name their run: one of them makes a method's mean NaN."""
    for model, row in scores.items():
        for k, v in row.items():
            if not math.isfinite(v):
                fail(f"{run}: {k} of {model} is {v}, so nothing is recorded; lower its learning rates")


def run_job(job, args, methods, subjects, scorer, device):
    """Train, draw and score one (method, subject, seed); returns its result line."""
    import train
    method, subject, seed = job
    photos_folder, word, templates = subjects[subject]
    flags, recipe = methods[method]["flags"], methods[method]["recipe"]
    folder = Path(args.output_dir) / "runs" / report.file_name(job)
    line = {"method": method, "subject": subject, "seed": seed, "class_word": word, "flags": flags,
            **asked(args), "recipe": recipe, "iterations": 0, "train_cpu_seconds": 0.}
    started = time.time()
    argv = ["--concept", str(photos_folder), "--class_word", word, "--output_dir", str(folder),
            "--seed", str(seed), "--device", args.device, "--preview_steps", "0"]
    argv += shlex.split(args.train_flags) + shlex.split(flags or "")
    if flags is not None:
        line["train_cpu_seconds"] = round(train_once(folder, argv, job, recipe), 1)
        line["iterations"] = json.loads((folder / "log.json").read_text(encoding="utf-8"))[-1]["step"]
    trained = train.parse_arguments(argv)
    pair = load_pair(trained.base, trained.token, word, device, vars(trained))
    if flags is not None:
        load_run(folder, pair)
    photos = load_photos(photos_folder, pair.resolution).to(device)
    token = trained.token if flags is not None else None
    line["scores"], rows = {}, []
    for model in methods[method]["models"]:
        name = report.name_of(model)
        line["scores"][name], images = scorer.score(pair, tuple(model), photos, templates, word,
                                                    trained.guidance_scale, token, subject)
        rows.append((name, images[:8]))
    check_scores(line["scores"], words(job))
    save_png(grid(rows), Path(args.output_dir) / "pictures" / f"{report.file_name(job)}.png")
    line["seconds"] = round(time.time() - started, 1)
    return line


# ------------------------------------------------------------------------------------------------------------
# All jobs

def asked(args):
    """What, beside its recipe, must be the same for a finished job to stand for one that is asked."""
    return {k: getattr(args, k) for k in ("benchmark", "train_flags", "judges", "num_seeds")}


def check_finished(args, results, methods, subjects):
    """Refuse to mix results: a finished job stands for one that is asked only if its settings are the same.

    Lines hold the resolved recipe. Old ones hold flags alone, which are resolved as train.py reads them now.
    """
    settings = functools.cache(lambda flags: resolved(args, subjects, flags))
    for (method, subject, _), line in results.items():
        if method not in methods or subject not in subjects:
            continue
        flags, before, now = methods[method]["flags"], dict(line), asked(args)
        if flags is None or line["flags"] is None:
            now["flags"] = flags
        else:
            before |= line.get("recipe") or settings(line["flags"])
            now |= methods[method]["recipe"]
        for k, v in now.items():
            if before.get(k, v) != v:
                fail(f"{args.output_dir} holds results of {method!r} with {k} {before[k]!r}, not {v!r}; "
                     "take another --output_dir")


def list_jobs(args, methods, subjects):
    """[(method, subject, training seed)] of what is asked; seed 0 where nothing is trained."""
    jobs = []
    for number in args.seeds:
        for i, s in enumerate(subjects):
            seed = 100 * (number + 1) + 50 * args.tuning + i  # a subject's own: else one seed's noise moves them all alike
            wanted = [m for m in methods if i < methods[m]["subjects"]]
            wanted.sort(key=lambda m: crc32(f"{m} {s} {seed}".encode()))  # so that each process gets long ones
            jobs += [(m, s, 0 if methods[m]["flags"] is None else seed) for m in wanted]
    return list(dict.fromkeys(jobs))


def do_jobs(jobs, args, methods, subjects, unrelated, results, make_scorer):
    """Do jobs one after the other; each is written as soon as it is done, with a guess of the time left."""
    import train
    device, out = pick_device(args.device)[0], Path(args.output_dir)
    photos_folder = next(iter(subjects.values()))[0]
    flags = train.parse_arguments(["--concept", str(photos_folder), "--device", args.device,
                                   *shlex.split(args.train_flags)])
    untouched = load_pair(flags.base, flags.token, flags.class_word, device, vars(flags))
    scorer = make_scorer(flags.base, args.judges, unrelated, device, args.num_seeds, untouched)
    seconds = {}
    for line in results.values():
        seconds.setdefault(line["method"], []).append(line.get("seconds", 0.))
    for k, job in enumerate(jobs):
        line = run_job(job, args, methods, subjects, scorer, device)
        save_json(out / "jobs" / f"{report.file_name(job)}.json", line)
        if not args.keep_runs:
            shutil.rmtree(out / "runs" / report.file_name(job), ignore_errors=True)
        seconds.setdefault(job[0], []).append(line["seconds"])
        known = [s for v in seconds.values() for s in v]
        mean = {m: sum(v) / len(v) for m, v in seconds.items()}
        rest = sum(mean.get(j[0], sum(known) / len(known)) for j in jobs[k + 1:])
        print(f"{k + 1}/{len(jobs)} {words(job)}: {line['seconds']:.0f} s; about {rest / 60:.0f} min left",
              flush=True)


@torch.no_grad()
def run_benchmark(args, make_scorer):
    """Do what is left of a benchmark, in as many processes as torchrun started, and write its report."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    subjects, unrelated = load_subjects(args, first=rank == 0)
    methods = choose_methods(args, subjects)
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()  # the first process has drawn the photos
    for method in methods.values():  # what train.py refuses is refused before the first job
        method["recipe"] = None if method["flags"] is None else resolved(args, subjects, method["flags"])
    results, _ = report.read_results(args.output_dir)
    check_finished(args, results, methods, subjects)
    jobs = list_jobs(args, methods, subjects)
    left = [j for j in jobs if j not in results]
    if rank == 0:
        size = f"{len(methods)} methods, {len(subjects)} subjects, {len(args.seeds)} seeds"
        print(f"{len(jobs)} jobs ({size}), {len(jobs) - len(left)} done; {world} process(es)")
    if world > 1:
        torch.distributed.barrier()
    if left:
        do_jobs(left[rank::world], args, methods, subjects, unrelated, results, make_scorer)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        report.write(Path(args.output_dir), args.reference)
