"""Score finished runs with judges that training never sees, and compare methods over many subjects.

    python evaluate.py                                    # the newest run under out/, or --run DIR
    python evaluate.py --benchmark emoji                  # train, draw and score 30 subjects x methods x seeds; resumable
    torchrun --nproc_per_node=2 evaluate.py --benchmark emoji
    python evaluate.py --ab_sheet out/a out/b             # a blind A/B page; --tally votes.json counts it

Scores, all means (paper, Sec. 4): CLIP-T, cosine of picture and prompt without the token; CLIP-I and DINO, cosines over all
pairs of pictures and photos, by a contrastive and by an instance-discriminating encoder; identity is DINO over the prompts that
leave the subject as it is (DINO as the paper has it also rewards a model that will not draw "a red dog" red). Drift: 1 - cosine of one-step
pictures of unrelated prompts, before and after, same noise. Diversity: 1 - cosine between seeds of one prompt. In the emoji
world also exact truths, read by probes: place, number of objects and colour as the prompt asks. Untouched models read the
prompt without the token.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F

from data.benchmark import report
from data.disk import fail, refuse_foreign_bytes
from data.images import grid, load_photos, photo_paths, save_png, to_pil
from data.base import find_base, load_encoder, load_pair, pick_device
from data.disk import save_json
from data.recipe import BASES
from data.run import checkpoints, load_run
from data.run import read_run

HERE = Path(__file__).parent / "data" / "benchmark"
CLIP = ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711])  # mean and deviation of the encoders' inputs
IMAGENET, HALF = ([.485, .456, .406], [.229, .224, .225]), ([.5, .5, .5], [.5, .5, .5])
JUDGES = {  # CLIP-T and CLIP-I by the first, "DINO" by the second: (hub id or folder, input side, statistics)
    "paper": (("openai/clip-vit-large-patch14-336", 336, CLIP), ("facebook/dinov2-large", 224, IMAGENET)),
    "dreambooth": (("openai/clip-vit-base-patch32", 224, CLIP), ("facebook/dino-vits16", 224, IMAGENET)),
    "siglip2": (("google/siglip2-base-patch16-224", 224, HALF),) * 2,  # no training loss looks through it
}


# ---------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of unit embeddings

def mean_cosine(a, b):
    """Mean cosine over all pairs of unit vectors (N, d) and (M, d)."""
    return (a @ b.T).mean().item()


def agreement(a, b):
    """Mean cosine of unit vectors (N, d), row by row."""
    return (a * b).sum(1).mean().item()


def diversity(embedded, num_seeds):
    """1 - mean cosine between different seeds of one prompt; rows ordered seed by seed, (num_seeds * P, d), num_seeds > 1."""
    e = embedded.view(num_seeds, -1, embedded.shape[1])
    cosines = torch.einsum("spd,tpd->pst", e, e)
    return 1 - cosines[:, ~torch.eye(num_seeds, dtype=torch.bool, device=e.device)].mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Judges

class HubJudge(torch.nn.Module):
    """A transformers vision or vision-language encoder under its own input statistics.

    embed: pictures (N, 3, H, W) in [-1, 1] -> unit (N, d), CLS or pooled as the model defines it; embed_text: prompts -> unit (N, d).
    """

    def __init__(self, source, size, statistics, device):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer
        self.source, self.size = source, size
        self.model = AutoModel.from_pretrained(source, use_safetensors=True).to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(source) if hasattr(self.model, "get_text_features") else None
        self.register_buffer("mean", torch.tensor(statistics[0]).view(3, 1, 1).to(device))
        self.register_buffer("deviation", torch.tensor(statistics[1]).view(3, 1, 1).to(device))

    def embed(self, x):
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        x = (((x + 1) / 2).clamp(0, 1) - self.mean) / self.deviation
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(pixel_values=x)
            out = getattr(out, "pooler_output", out)  # transformers 5 wraps it
        else:
            out = self.model(x).last_hidden_state[:, 0]
        return F.normalize(out.float(), dim=1)

    def embed_text(self, prompts):
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        out = self.model.get_text_features(input_ids=ids.to(self.mean.device))
        return F.normalize(getattr(out, "pooler_output", out).float(), dim=1)


class EmbeddedJudge:
    """A judge that ships with a base (an encoder under judges/)."""

    def __init__(self, folder, tokenizer, device):
        self.source, self.encoder, self.tokenizer = str(folder), load_encoder(folder).to(device), tokenizer

    def embed(self, x):
        return self.encoder.embed(self.encoder.features(x))

    def embed_text(self, prompts):
        return self.encoder.embed_text(self.tokenizer, prompts)


def own_judges(base):
    """The folder of judges that ships with a base, which may not be there."""
    return Path(find_base(base).folder or "none") / "judges"


def load_judges(name, base, tokenizer, device):
    """{"clip", "dino"} of the set `name`: "embedded" (the base's own judges/), a key of JUDGES, or a folder with clip/ and dino/."""
    if name == "embedded":
        folder = own_judges(base)
        return {"clip": EmbeddedJudge(folder / "clip", tokenizer, device), "dino": EmbeddedJudge(folder / "identity", tokenizer, device)}
    if name in JUDGES:
        clip, dino = JUDGES[name]
    else:
        side = [json.loads((Path(name) / k / "config.json").read_text(encoding="utf-8")) for k in ("clip", "dino")]
        clip, dino = (Path(name) / "clip", side[0]["vision_config"]["image_size"], CLIP), (Path(name) / "dino", side[1]["image_size"], IMAGENET)
    first = HubJudge(*clip, device)
    return {"clip": first, "dino": first if dino == clip else HubJudge(*dino, device)}


class Truths:
    """What the emoji world lets us check exactly: ridge regressions on the CLIP judge's features (2 x 2 cells), fitted on drawn scenes.

    place of 25, objects 0 / 1 / 2, colour of 11; `ceiling` holds their accuracy on fresh pictures of held-out sprites.
    """

    def __init__(self, encoder, samples=3000, penalty=1e-3):
        sys.path.insert(0, str(Path(__file__).parent / "data" / "emoji"))
        import world
        self.encoder, self.places, self.colours = encoder, world.PLACES, list(world.COLOURS)

        def scenes(splits, n, seed):
            w, g = world.World(splits, {"beside": .35, "colour": .6, "spotted": 0., "place": 1.}), torch.Generator().manual_seed(seed)
            batch = w.sample(n, g)
            empty = torch.rand(n, generator=g) < .1
            images = torch.where(empty[:, None, None, None], w.canvas(batch.place, g) * 2 - 1, batch.images)
            count = torch.where(empty, 0, 1 + (batch.beside >= 0).long())
            return self.features(images), {"place": batch.place, "count": count, "colour": torch.where(count == 1, batch.colour, -1)}

        def weights(features, labels, classes):
            known = labels >= 0
            x, y = features[known], F.one_hot(labels[known], classes).double()
            gram = x.T @ x
            return torch.linalg.solve(gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64), x.T @ y)

        features, labels = scenes("pretrain+extra", samples, 1)
        self.probes = {k: weights(features, labels[k], n) for k, n in (("place", len(self.places)), ("count", 3), ("colour", len(self.colours)))}
        features, labels = scenes("held_out", 500, 2)
        self.ceiling = {k: ((features @ w).argmax(1) == labels[k])[labels[k] >= 0].double().mean().item() for k, w in self.probes.items()}

    def features(self, images):
        maps = [F.adaptive_avg_pool2d(self.encoder.vision(x).last_hidden_state, 2).flatten(1).cpu().double()
                for x in images.to(self.encoder.to_image.device).split(128)]
        return F.pad(torch.cat(maps), (0, 1), value=1)

    def score(self, images, templates):
        """Shares of pictures (S * P, 3, H, W) whose place, number of objects and colour are as the P templates ask."""
        features = self.features(images)
        seen = {k: (features @ w).argmax(1).view(-1, len(templates)) for k, w in self.probes.items()}
        asked = {"place": [next((i for i, p in enumerate(self.places) if t.endswith(p)), -1) for t in templates],
                 "count": [1 + (" next to " in t) for t in templates],
                 "colour": [next((i for i, c in enumerate(self.colours) if f" {c} {{}}" in t), -1) for t in templates]}
        right = {}
        for k, wanted in asked.items():
            wanted = torch.tensor(wanted)
            if (wanted >= 0).any():
                right[k] = (seen[k] == wanted)[:, wanted >= 0].double().mean().item()
        return right


# ---------------------------------------------------------------------------------------------------------------
# Drawing and scoring one run

def draw(pair, model, prompts, num_seeds, guidance):
    """Pictures (num_seeds * P, 3, H, W), seed by seed, of P prompts; model is ("student" or "teacher", steps)."""
    who, steps = model
    teaches = who == "teacher"
    text, denoiser = (pair.text, pair.teacher) if teaches else (pair.student_text, pair.student)
    device, empty, images = denoiser.alphas_cumprod.device, pair.text([""]), []
    for seed in range(num_seeds):
        noise = torch.randn(len(prompts), *pair.latent_shape, generator=torch.Generator().manual_seed(seed)).to(device)
        for z, part in zip(noise.split(32), (prompts[i:i + 32] for i in range(0, len(prompts), 32))):
            images.append(pair.decode(denoiser.sample(z, text(part), steps, empty, guidance if teaches else 1.0)).clamp(-1, 1))
    return torch.cat(images)


def as_it_is(template):
    """Whether a template asks for the subject without an adjective: "a {} at night", not "a red {}"."""
    return re.search(r"\b(a|an|the|one) {}", template) is not None


class Scorer:
    """Judges, probes and the untouched student's pictures, made once and used for every run of one base."""

    def __init__(self, base, judges, unrelated, device, num_seeds, pair):
        self.judges = load_judges(judges, base, pair.text.tokenizer, device)
        self.truths = Truths(self.judges["clip"].encoder) if judges == "embedded" else None
        self.unrelated, self.num_seeds = unrelated, num_seeds
        self.before = self.embed("clip", draw(pair, ("student", 1), unrelated, 1, 1.0))

    def embed(self, judge, images):
        return torch.cat([self.judges[judge].embed(x) for x in images.split(64)])

    def score(self, pair, model, photos, templates, word, guidance, token=None, subject=None):
        """(scores, first seed's pictures) of one model on templates such as "a {} on the beach"; word: the class noun.

        model ("world", 0) stands for the world's own drawing of `subject`: what a perfect model would score.
        """
        if model[0] == "world":
            from world import illustrate
            images = torch.cat([illustrate(subject, templates, torch.Generator().manual_seed(s)) for s in range(self.num_seeds)]).to(photos.device)
        else:
            images = draw(pair, model, [t.replace("{}", f"{token} {word}" if token else word) for t in templates], self.num_seeds, guidance)
        clip, dino = self.embed("clip", images), self.embed("dino", images)
        plain = self.judges["clip"].embed_text([t.replace("{}", word) for t in templates])
        references = self.embed("dino", photos)
        unchanged = torch.tensor([as_it_is(t) for t in templates] * self.num_seeds)
        scores = {"CLIP-T": agreement(clip, plain.repeat(self.num_seeds, 1)), "CLIP-I": mean_cosine(clip, self.embed("clip", photos)),
                  "DINO": mean_cosine(dino, references), "identity": mean_cosine(dino[unchanged], references)}
        if self.num_seeds > 1:
            scores["diversity"] = diversity(clip, self.num_seeds)
        if model[0] == "student":
            scores["drift"] = 1 - agreement(self.embed("clip", draw(pair, ("student", 1), self.unrelated, 1, 1.0)), self.before)
        if self.truths:
            scores |= self.truths.score(images, templates)
        return {k: round(v, 4) for k, v in scores.items()}, images[:len(templates)]


def name_of(model):
    return f"{model[0]}, {model[1]} step{'s' * (model[1] > 1)}" if model[1] else model[0]


def read_spec(benchmark):
    """{"subjects", "prompts": {"object", "live"}, "live": class words, "unrelated"} of a benchmark."""
    return json.loads((HERE / f"{benchmark}.json").read_text(encoding="utf-8"))


def templates_for(spec, word):
    return spec["prompts"]["live" if word in spec["live"] else "object"]


@torch.no_grad()
def evaluate_run(args):
    folder, flags, (device, _) = args.run, args.flags, pick_device(args.device)
    photo_paths(flags["concept"])
    pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags)
    spec = read_spec("emoji" if args.judges == "embedded" else "dreambench")
    templates, unrelated = templates_for(spec, flags["class_word"]), spec["unrelated"]
    photos = load_photos(flags["concept"], pair.resolution).to(device)
    scorer = Scorer(flags["base"], args.judges, unrelated, device, args.num_seeds, pair)
    models = [("student", 1), *(("student", s) for s in args.steps), ("teacher", 16)]
    rows, pictures = {}, [("photos", photos)]
    for trained in (False, True):
        if trained:
            load_run(folder, pair)
        for model in models:
            name = ("" if trained else "untouched ") + name_of(model)
            rows[name], images = scorer.score(pair, model, photos, templates, flags["class_word"], flags["guidance_scale"],
                                              flags["token"] if trained else None)
            pictures.append((name, images[:10]))
    between = scorer.embed("dino", photos) @ scorer.embed("dino", photos).T
    if len(photos) > 1:
        rows["photos among themselves"] = {"DINO": round(between[~torch.eye(len(photos), dtype=torch.bool)].mean().item(), 4)}
    print(report.markdown(["", *report.SCORES], [[name, *(row.get(c) for c in report.SCORES)] for name, row in rows.items()]))
    if scorer.truths:
        print("the probes read " + ", ".join(f"{k} {v:.3f}" for k, v in scorer.truths.ceiling.items()) + " of real pictures right")
    names = {k: j.source for k, j in scorer.judges.items()}
    save_json(folder / "scores.json", {"num_seeds": args.num_seeds, "prompts": templates, "judges": {"set": args.judges, **names},
                                       "ceiling": scorer.truths.ceiling if scorer.truths else {}, "scores": rows})
    save_png(grid(pictures), folder / "contact.png")
    print(f"judges: {args.judges} (CLIP: {names['clip']}, DINO: {names['dino']}); {len(templates)} prompts x {args.num_seeds} seeds; "
          f"pictures: {folder / 'contact.png'}")


# ---------------------------------------------------------------------------------------------------------------
# Benchmarks: every (method, subject, seed) is one job; a job that has its file is never done again.

def load_benchmark(args, first=True):
    """(subjects {name: (photo folder, class word, templates)}, unrelated prompts); `first`, of all processes, draws the emoji world's references."""
    spec = read_spec(args.benchmark)
    if args.benchmark == "dreambench":
        classes, folder = spec["subjects"], Path(args.data)
        if missing := [name for name in list(classes)[:args.subjects] if not (folder / name).is_dir()]:
            fail(f"--data {folder} lacks {missing[0]}; fetch the photos with: python data/benchmark/download.py --output {folder}")
    else:
        sys.path.insert(0, str(HERE.parent / "emoji"))
        from world import World, portraits
        held_out, folder = {e["name"]: e["class"] for e in World("held_out").entries}, Path(args.output_dir) / "concepts"
        classes = {name: held_out[name] for name in spec["tuning" if args.tuning else "subjects"]}
        for name in list(classes)[:args.subjects]:
            if first and not (folder / name / "04.png").is_file():
                for i, picture in enumerate(to_pil(portraits(name))):
                    save_png(picture, folder / name / f"{i:02d}.png")
    return {name: (folder / name, classes[name], templates_for(spec, classes[name])) for name in list(classes)[:args.subjects]}, spec["unrelated"]


def settings(args, flags):
    """What must be the same for a finished job to stand for one that is asked."""
    return {"flags": flags, "train_flags": args.train_flags, "judges": args.judges, "num_seeds": args.num_seeds}


def run_job(job, args, methods, subjects, scorer, device):
    """Train, draw and score one (method, subject, seed); returns its result line."""
    import train
    method, subject, seed = job
    photos_folder, word, templates = subjects[subject]
    folder = Path(args.output_dir) / "runs" / report.file_name(job)
    flags = methods[method]["flags"]
    line = {"method": method, "subject": subject, "seed": seed, **settings(args, flags), "iterations": 0, "train_cpu_seconds": 0.0}
    started = time.time()
    argv = ["--concept", photos_folder, "--class_word", word, "--output_dir", folder, "--seed", seed, "--device", args.device,
            "--preview_steps", 0, *shlex.split(args.train_flags), *shlex.split(flags or "")]
    argv = [str(a) for a in argv]
    record = folder / "cpu_seconds.json"  # outlives a stop, as the checkpoints do
    spent = json.loads(record.read_text()) if record.is_file() else 0.
    if flags is not None and not (folder / "config.json").is_file():
        if checkpoints(folder):
            argv += ["--resume_from_checkpoint", "latest"]
        else:
            spent = 0.
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.process_time() - spent
        try:
            with open(folder / "train.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), torch.enable_grad():
                train.main(argv)
        finally:
            spent = time.process_time() - begun
            save_json(record, spent)
    if flags is not None:
        line["train_cpu_seconds"] = round(spent, 1)
        line["iterations"] = json.loads((folder / "log.json").read_text())[-1]["step"]
    trained = train.parse_arguments(argv)
    pair = load_pair(trained.base, trained.token, word, device, vars(trained))
    if flags is not None:
        load_run(folder, pair)
    photos = load_photos(photos_folder, pair.resolution).to(device)
    line["scores"], rows = {}, []
    for who, steps in methods[method]["models"]:
        line["scores"][name_of((who, steps))], images = scorer.score(pair, (who, steps), photos, templates, word, trained.guidance_scale,
                                                                     trained.token if flags is not None else None, subject)
        rows.append((name_of((who, steps)), images[:8]))
    save_png(grid(rows), Path(args.output_dir) / "pictures" / f"{report.file_name(job)}.png")
    line["seconds"] = round(time.time() - started, 1)
    if not args.keep_runs:
        shutil.rmtree(folder, ignore_errors=True)
    return line


@torch.no_grad()
def compare_blind(args):
    """The A/B sheet of two runs of one subject: the benchmark's prompts x seeds, one step each."""
    runs, pictures = [read_run(folder, base=args.base) for folder in args.ab_sheet], []
    if runs[0][1]["concept"] != runs[1][1]["concept"]:
        fail(f"--ab_sheet compares two runs of one subject, not of {runs[0][1]['concept']} and {runs[1][1]['concept']}")
    device, _ = pick_device(args.device)
    for folder, flags in runs:
        pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags)
        load_run(folder, pair)
        spec = read_spec("emoji" if own_judges(flags["base"]).is_dir() else "dreambench")
        templates = templates_for(spec, flags["class_word"])
        prompts = [t.replace("{}", f"{flags['token']} {flags['class_word']}") for t in templates]
        pictures.append(to_pil(draw(pair, ("student", 1), prompts, args.num_seeds, 1.0)))
    plain = [t.replace("a {}", "this {}").replace("{}", flags["class_word"]) for t in templates] * args.num_seeds
    photos = to_pil(load_photos(flags["concept"], pair.resolution))
    report.ab_sheet(list(zip(plain, *pictures)), photos, [str(f) for f, _ in runs], Path(args.output_dir), args.seed)


@torch.no_grad()
def run_benchmark(args):
    out, (device, _) = Path(args.output_dir), pick_device(args.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    subjects, unrelated = load_benchmark(args, first=rank == 0)
    methods = report.load_methods(args.benchmark)
    methods = {k: methods[k] for k in args.methods or ([] if args.method else methods)}
    for extra in args.method or []:
        name, _, flags = extra.partition("=")
        methods[name] = {"flags": flags, "models": [("student", 1), ("teacher", 16)], "subjects": len(subjects)}
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    results = report.read_results(out)
    jobs = list(dict.fromkeys((m, s, 0 if methods[m]["flags"] is None else seed)  # an untrained model has no seed
                              for seed in args.seeds for i, s in enumerate(subjects) for m in methods if i < methods[m]["subjects"]))
    for job in (j for j in jobs if j in results):
        for k, v in settings(args, methods[job[0]]["flags"]).items():
            if results[job].get(k, v) != v:
                fail(f"{out} holds results of {job[0]!r} with {k} {results[job][k]!r}, not {v!r}; take another --output_dir")
    left = [j for j in jobs if j not in results]
    if rank == 0:
        print(f"{len(jobs)} jobs ({len(methods)} methods, {len(subjects)} subjects, {len(args.seeds)} seeds), {len(jobs) - len(left)} done; {world} process(es)")
    if world > 1:
        torch.distributed.barrier()
    if left:
        import train
        flags = train.parse_arguments(["--concept", str(next(iter(subjects.values()))[0]), "--device", args.device, *shlex.split(args.train_flags)])
        untouched = load_pair(flags.base, flags.token, flags.class_word, device, vars(flags))
        scorer = Scorer(flags.base, args.judges, unrelated, device, args.num_seeds, untouched)
        seconds = {}
        for line in results.values():
            seconds.setdefault(line["method"], []).append(line["seconds"])
        mine = left[rank::world]
        for k, job in enumerate(mine):
            line = run_job(job, args, methods, subjects, scorer, device)
            save_json(out / "jobs" / f"{report.file_name(job)}.json", line)
            seconds.setdefault(job[0], []).append(line["seconds"])
            known = [s for v in seconds.values() for s in v]
            mean = {m: sum(v) / len(v) for m, v in seconds.items()}
            rest = sum(mean.get(j[0], sum(known) / len(known)) for j in mine[k + 1:])
            print(f"{k + 1}/{len(mine)} {job[0]}, {job[1]}, seed {job[2]}: {line['seconds']:.0f} s; about {rest / 60:.0f} min left", flush=True)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        report.write(out, args.reference)


# ---------------------------------------------------------------------------------------------------------------

def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--base", help="folder of the base, for a run that was trained on one")
    p.add_argument("--steps", default="", help="more step counts for the student, such as 2,4")
    p.add_argument("--num_seeds", type=int, default=4, help="pictures per prompt and model")
    p.add_argument("--judges", help=f"embedded, {', '.join(JUDGES)}, or a folder with clip/ and dino/; default: embedded where the base has its own, else siglip2")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g = p.add_argument_group("benchmark")
    g.add_argument("--benchmark", choices=["emoji", "dreambench"], help="compare methods over many subjects")
    g.add_argument("--subjects", type=int, default=30, help="the first so many")
    g.add_argument("--methods", help="comma-separated names of data/benchmark/methods.json; default: all")
    g.add_argument("--method", action="append", metavar="NAME=FLAGS", help="a further method by its train.py flags; repeatable")
    g.add_argument("--seeds", default="0,1,2", help="of the trainings")
    g.add_argument("--train_flags", default="", help="flags for every training, such as '--base sd-turbo'")
    g.add_argument("--tuning", action="store_true", help="emoji: the subjects that settings may be chosen on, not the 30 that count")
    g.add_argument("--data", default="data/dreambench", help="dreambench: the folder that data/benchmark/download.py filled")
    g.add_argument("--reference", default="EchoDistill", help="method that paired differences compare with")
    g.add_argument("--keep_runs", action="store_true", help="keep every run's weights")
    g.add_argument("--report", action="store_true", help="only write tables and report.html from the results that are there")
    g.add_argument("--readme", help="with --report: also put the short table between the benchmark marks of this Markdown file")
    g.add_argument("--output_dir", help="default: out/BENCHMARK, out/BENCHMARK-tuning or out/ab; results of changed code need a new one")
    g = p.add_argument_group("blind comparison by eye")
    g.add_argument("--ab_sheet", nargs=2, metavar=("A", "B"), help="two run folders to compare")
    g.add_argument("--tally", metavar="VOTES", help="votes.json saved from a sheet; prints who won, with its exact interval")
    g.add_argument("--seed", type=int, default=0, help="of the sheet's order")
    args = p.parse_args(argv)
    refuse_foreign_bytes(args)
    if args.benchmark:
        args.judges = args.judges or ("siglip2" if args.benchmark == "dreambench" else "embedded")
    if args.judges not in (None, "embedded") and args.judges not in JUDGES and not all(Path(args.judges, k, "config.json").is_file() for k in ("clip", "dino")):
        fail(f"--judges {args.judges} is neither embedded, {', '.join(JUDGES)} nor a folder with clip/ and dino/ in it")
    for name in ("num_seeds", "subjects"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    try:
        args.steps, args.seeds = ([int(v) for v in value.split(",") if v] for value in (args.steps, args.seeds))
    except ValueError:
        fail("--steps and --seeds are whole numbers with commas between, such as 2,4")
    if any(s not in (1, 2, 4) for s in args.steps):
        fail("--steps takes 2 and 4: the student is made for one step and keeps to few")
    pick_device(args.device)
    args.output_dir = args.output_dir or str(Path("out") / ((args.benchmark or "ab") + "-tuning" * args.tuning))
    if args.readme and not (args.report and Path(args.readme).is_file()):
        fail(f"--readme {args.readme} goes with --report and names a Markdown file that is there")
    if args.benchmark:
        known = report.load_methods(args.benchmark)
        args.methods = [m for m in (args.methods or "").split(",") if m]
        if wrong := [m for m in args.methods if m not in known]:
            fail(f"--methods {wrong[0]} is unknown; there are: {', '.join(known)}")
        if any("=" not in m for m in args.method or []):
            fail("--method takes NAME=FLAGS, such as --method 'slow=--student_lr 1e-5'")
    elif not args.ab_sheet and not args.tally and not args.report:
        args.run, args.flags = read_run(args.run, base=args.base)
        args.judges = args.judges or ("embedded" if own_judges(args.flags["base"]).is_dir() else "siglip2")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.tally:
        report.tally(Path(args.tally))
    elif args.ab_sheet:
        compare_blind(args)
    elif args.report:
        report.write(Path(args.output_dir), args.reference)
        if args.readme:
            report.update_readme(Path(args.output_dir), args.reference, Path(args.readme))
    elif args.benchmark:
        run_benchmark(args)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    main()
