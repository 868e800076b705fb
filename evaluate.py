"""Score finished runs with judges, and compare methods over many subjects.

    python evaluate.py                                    # the newest run under out/, or --run DIR
    python evaluate.py --benchmark emoji                  # 30 subjects x methods x seeds; resumable
    torchrun --nproc_per_node=2 evaluate.py --benchmark emoji
    python evaluate.py --ab_sheet out/a out/b             # a blind A/B page of students (out/a:teacher: its teacher); --tally votes.json counts it

Scores, all means (paper, Sec. 4):
CLIP-T     cosine of picture and prompt without the token
CLIP-I     cosine over all pairs of pictures and photos, by the contrastive encoder
DINO       the same by the instance-discriminating encoder
identity   DINO over the prompts of the subject alone and without an adjective: DINO over all also rewards a model that
           will not draw "a red dog" red, and one that leaves out the hat of "a dog next to a hat"
drift      1 - cosine of one-step pictures of unrelated prompts, before and after, same noise
diversity  1 - cosine between seeds of one prompt
In the emoji world also exact truths, read by probes: place, number of objects and colour as the prompt asks; and
neighbour  whether the naming judge finds the second object that a prompt asks for
edges      edge energy in units of the world's own pictures of the subject: below 1 is soft, above it grainy
KID        kernel inception distance of 8 x 8-pixel cells, in the naming judge, from the world's own pictures of the subject:
           high where a picture is torn or a mosaic, and where it shows another individual
obeyed     mean of place, count, neighbour and colour
all three  geometric mean of identity, obeyed and min(edges, 1 / edges) / (1 + KID / 100): none makes up for another
Training never sees the embedded judges and siglip2; the DINO judges of "paper" and "dreambooth" carry critics of sd-turbo's recipe.
For one run, whose subject the world does not know, edges and KID are against any of its scenes, so only the run's own rows compare.
Untouched models read the prompt without the token. data/benchmark/README.md holds the benchmark's tables.
"""
import argparse
import functools
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from data.base import find_base, load_encoder, load_pair, pick_device
from data.benchmark import blind, report
from data.benchmark.run import check_methods, check_scores, read_spec, run_benchmark, templates_for
from data.disk import fail, refuse_foreign_bytes, save_json
from data.images import grid, load_photos, photo_paths, save_png, to_pil
from data.run import load_run, read_run

# mean and deviation of what the encoders read
CLIP = ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711])
IMAGENET, HALF = ([.485, .456, .406], [.229, .224, .225]), ([.5, .5, .5], [.5, .5, .5])
OBEYED = ("place", "count", "neighbour", "colour")
JUDGES = {  # CLIP-T and CLIP-I by the first, "DINO" by the second: (hub id[@revision] or folder, input side, statistics)
    "paper": (("openai/clip-vit-large-patch14-336", 336, CLIP), ("facebook/dinov2-large", 224, IMAGENET)),
    "dreambooth": (("openai/clip-vit-base-patch32", 224, CLIP),
                   ("facebook/dino-vits16@a7a4d161f5c0bd70478c05ca5777ec7cd8848021", 224, IMAGENET)),  # it holds safetensors
    "siglip2": (("google/siglip2-base-patch16-224", 224, HALF),) * 2,  # no training loss looks through it
}


# ------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of unit embeddings

def mean_cosine(a, b):
    """Mean cosine over all pairs of unit vectors (N, d) and (M, d)."""
    return (a @ b.T).mean().item()


def agreement(a, b):
    """Mean cosine of unit vectors (N, d), row by row."""
    return (a * b).sum(1).mean().item()


def diversity(embedded, num_seeds):
    """1 - mean cosine between seeds (two or more) of one prompt; rows (num_seeds * P, d), seed by seed."""
    e = embedded.view(num_seeds, -1, embedded.shape[1])
    cosines = torch.einsum("spd,tpd->pst", e, e)
    return 1 - cosines[:, ~torch.eye(num_seeds, dtype=torch.bool, device=e.device)].mean().item()


def all_three(identity, obeyed, edges, kid):
    """Geometric mean in [0, 1] of likeness, of the share of prompts obeyed, and of drawing: min(edges, 1 / edges) / (1 + KID / 100)."""
    drawing = min(edges, 1 / max(edges, 1e-9)) / (1 + max(kid, 0) / 100)
    return (max(identity, 0) * obeyed * drawing) ** (1 / 3)


# ------------------------------------------------------------------------------------------------------------
# Judges: embed pictures (N, 3, H, W) in [-1, 1] and prompts to unit vectors (N, d)

class HubJudge(torch.nn.Module):
    """A transformers encoder under its own input statistics; CLS or pooled, as the model defines it."""

    def __init__(self, source, size, statistics, device):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer
        self.source, self.size = source, size
        name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
        try:
            model = AutoModel.from_pretrained(name, revision=revision or "main", use_safetensors=True)
            reads = hasattr(model, "get_text_features")
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main") if reads else None
        except (OSError, ValueError, SafetensorError) as error:
            fail(f"--judges: {source} cannot be loaded ({str(error).splitlines()[0]}); connect to the hub once, or give a folder with clip/ and dino/")
        self.model = model.to(device).eval().requires_grad_(False)
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
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length,
                             return_tensors="pt").input_ids
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


def embedded_judges(base):
    folder = own_judges(base)
    if not folder.is_dir():
        fail(f"--judges embedded: the {base} base ships without judges; take {', '.join(JUDGES)} or a folder")
    return folder


def load_judges(name, base, tokenizer, device):
    """{"clip", "dino"} of "embedded" (the base's own), a key of JUDGES, or a folder with clip/ and dino/."""
    if name == "embedded":
        folder = embedded_judges(base)
        return {"clip": EmbeddedJudge(folder / "clip", tokenizer, device),
                "dino": EmbeddedJudge(folder / "identity", tokenizer, device)}
    if name in JUDGES:
        clip, dino = JUDGES[name]
    else:
        clip, dino = Path(name, "clip"), Path(name, "dino")
        try:
            sizes = [json.loads((k / "config.json").read_text(encoding="utf-8")) for k in (clip, dino)]
            sizes = sizes[0]["vision_config"]["image_size"], sizes[1]["image_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--judges {name} has a damaged config.json ({type(error).__name__}: {error}); mend it")
        clip, dino = (clip, sizes[0], CLIP), (dino, sizes[1], IMAGENET)
    first = HubJudge(*clip, device)
    return {"clip": first, "dino": first if dino == clip else HubJudge(*dino, device)}


def world_pictures(subject, templates, seeds):
    """(S * P, 3, H, W) in [-1, 1]: what P templates ask of a held-out emoji, drawn by the world itself, seed by seed."""
    from world import illustrate  # load_subjects has put its folder on the path
    return torch.cat([illustrate(subject, templates, torch.Generator().manual_seed(s)) for s in seeds])


class Truths:
    """What the emoji world lets us check exactly: place of 25, number of objects 0 / 1 / 2, colour of 11.

    Ridge regressions on the CLIP judge's features (2 x 2 cells), fitted on drawn scenes; `ceiling` holds
    their accuracy on fresh pictures of held-out sprites.
    """

    def __init__(self, encoder, namer, samples=6000, penalty=1e-2):
        sys.path.insert(0, str(Path(__file__).parent / "data" / "emoji"))
        import measure
        import world
        self.measure, self.namer, self.world = measure, namer, world
        self.encoder, self.places, self.colours, self.nouns = encoder, world.PLACES, list(world.COLOURS), world.World("pretrain").nouns
        self.held_out = {e["name"] for e in world.World("held_out").entries}
        classes = {"place": len(self.places), "count": 3, "colour": len(self.colours)}
        features, labels = self.scenes(world, "pretrain+extra", samples, 1)
        self.probes = {k: self.fit(features, labels[k], n, penalty) for k, n in classes.items()}
        features, labels = self.scenes(world, "held_out", 500, 2)
        self.ceiling = {}
        for k, w in self.probes.items():
            right = (features @ w).argmax(1) == labels[k]
            self.ceiling[k] = right[labels[k] >= 0].double().mean().item()

    def scenes(self, world, splits, n, seed):
        """Features (n, d) and labels {name: (n,)} of drawn scenes, a tenth of them empty; -1: none."""
        drawn = world.World(splits, {"beside": .35, "colour": .6, "spotted": 0., "place": 1.})
        g = torch.Generator().manual_seed(seed)
        batch = drawn.sample(n, g)
        empty = torch.rand(n, generator=g) < .1
        images = torch.where(empty[:, None, None, None], drawn.empty(batch.place, g) * 2 - 1, batch.images)
        count = torch.where(empty, 0, 1 + (batch.beside >= 0).long())
        colour = torch.where(count == 1, batch.colour, -1)
        return self.features(images), {"place": batch.place, "count": count, "colour": colour}

    @staticmethod
    def fit(features, labels, classes, penalty):
        known = labels >= 0
        x, y = features[known], F.one_hot(labels[known], classes).double()
        gram = x.T @ x
        ridge = penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.solve(gram + ridge, x.T @ y)

    def features(self, images):
        maps = [F.adaptive_avg_pool2d(self.encoder.vision(x).last_hidden_state, 2).flatten(1).cpu().double()
                for x in images.to(self.encoder.to_image.device).split(128)]
        return F.pad(torch.cat(maps), (0, 1), value=1)

    @functools.cache
    def drawn(self, subject, templates, num_seeds=4):
        """(edge energy, cells) of what templates ask of a held-out subject, drawn by the world; of one that it does not know, of any scenes."""
        images = (world_pictures(subject, templates, range(100, 100 + num_seeds)) if subject in self.held_out
                  else self.world.World("pretrain").sample(100, torch.Generator().manual_seed(100), flat_share=0).images)
        return self.measure.edge_energy(images), self.measure.cells(self.namer, images.to(self.namer.to_image.device))

    def score(self, images, templates, subject=None):
        """Shares of pictures (S * P, 3, H, W) with the place, objects and colour that the P templates ask, their edges and cells."""
        def first(names, test):  # the number of the name that a template asks for, or -1
            return [next((i for i, name in enumerate(names) if test(t, name)), -1) for t in templates]
        sharpness, real = self.drawn(subject, tuple(templates))
        features, right = self.features(images), {"edges": self.measure.edge_energy(images) / sharpness,
                                                  "KID": self.measure.cell_kid(self.measure.cells(self.namer, images), real)}
        asked = {"place": first(self.places, str.endswith),
                 "count": [1 + (" next to " in t) for t in templates],
                 "colour": first(self.colours, lambda t, colour: f" {colour} {{}}" in t)}
        for k, wanted in asked.items():
            wanted = torch.tensor(wanted)
            seen = (features @ self.probes[k]).argmax(1).view(-1, len(templates))
            if (wanted >= 0).any():
                right[k] = (seen == wanted)[:, wanted >= 0].double().mean().item()
        wanted = torch.tensor(first(self.nouns, lambda t, noun: re.search(rf"next to an? {noun}\b", t)))
        if (named := wanted >= 0).any():
            pairs = images.view(-1, len(templates), *images.shape[1:])[:, named].flatten(0, 1)
            seen = self.measure.name_neighbours(self.namer, pairs).cpu().view(2, -1, named.sum())
            right["neighbour"] = (seen == wanted[named]).any(0).double().mean().item()
        return right


# ------------------------------------------------------------------------------------------------------------
# Drawing and scoring one run

def draw(pair, model, prompts, num_seeds, guidance):
    """Pictures (num_seeds * P, 3, H, W), seed by seed, of P prompts; model: ("student" or "teacher", steps).

    Not model.draw, which gives each picture a seed of its own: here one generator's noise serves all prompts
    of a seed, 32 at once. Every score in data/benchmark/results was drawn so.
    """
    who, steps = model
    teaches = who == "teacher"
    text, denoiser = (pair.text, pair.teacher) if teaches else (pair.student_text, pair.student)
    device, empty, images = denoiser.alphas_cumprod.device, pair.text([""]), []
    for seed in range(num_seeds):
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), *pair.latent_shape, generator=g).to(device)
        for i in range(0, len(prompts), 32):
            part, context = noise[i:i + 32], text(prompts[i:i + 32])
            z = denoiser.sample(part, context, steps, empty, guidance if teaches else 1.0)
            images.append(pair.decode(z).clamp(-1, 1))
    return torch.cat(images)


def as_it_is(template):
    """Whether a template asks for the subject alone and without an adjective: "a {} at night", not "a red {}" or "a {} next to a hat"."""
    return re.search(r"\b(a|an|the|one) {}(?! next to)", template) is not None


class Scorer:
    """Judges, probes and the untouched student's pictures, made once and used for every run of one base."""

    def __init__(self, base, judges, unrelated, device, num_seeds, pair):
        self.judges = load_judges(judges, base, pair.text.tokenizer, device)
        self.truths = Truths(self.judges["clip"].encoder, load_encoder(own_judges(base) / "names").to(device)) if judges == "embedded" else None
        self.unrelated, self.num_seeds = unrelated, num_seeds
        self.before = self.embed("clip", draw(pair, ("student", 1), unrelated, 1, 1.0))

    def embed(self, judge, images):
        return torch.cat([self.judges[judge].embed(x) for x in images.split(64)])

    def score(self, pair, model, photos, templates, word, guidance, token=None, subject=None):
        """(scores, first seed's pictures) of one model on templates such as "a {} on the beach".

        word   the class noun; an untrained model, without a token, draws it alone
        model  ("world", 0) is the world's own drawing of `subject`: what a perfect model would score
        """
        n = self.num_seeds
        if model[0] == "world":
            images = world_pictures(subject, templates, range(n)).to(photos.device)
        else:
            name = f"{token} {word}" if token else word
            images = draw(pair, model, [t.replace("{}", name) for t in templates], n, guidance)
        clip, dino = self.embed("clip", images), self.embed("dino", images)
        references = self.embed("dino", photos)
        plain = self.judges["clip"].embed_text([t.replace("{}", word) for t in templates])
        unchanged = torch.tensor([as_it_is(t) for t in templates] * n)
        scores = {"CLIP-T": agreement(clip, plain.repeat(n, 1)),
                  "CLIP-I": mean_cosine(clip, self.embed("clip", photos)),
                  "DINO": mean_cosine(dino, references), "identity": mean_cosine(dino[unchanged], references)}
        if n > 1:
            scores["diversity"] = diversity(clip, n)
        if model[0] == "student":
            after = self.embed("clip", draw(pair, ("student", 1), self.unrelated, 1, 1.0))
            scores["drift"] = 1 - agreement(after, self.before)
        if self.truths:
            scores |= self.truths.score(images, templates, subject)
            shares = [scores[k] for k in OBEYED if k in scores]
            scores["obeyed"] = sum(shares) / len(shares)
            scores["all three"] = all_three(*(scores[k] for k in ("identity", "obeyed", "edges", "KID")))
        return {k: round(v, 4) for k, v in scores.items()}, images[:len(templates)]


def check_photos(run, flags):
    if not Path(flags["concept"]).is_dir():
        fail(f"{run} was trained on the photos in {flags['concept']}, which is no folder now; put them back there")
    photo_paths(flags["concept"])


@torch.no_grad()
def evaluate_run(args):
    """Score the photos, the untouched pair and the trained one: scores.json and contact.png of a run."""
    folder, flags, (device, _) = args.run, args.flags, pick_device(args.device)
    check_photos(folder, flags)
    pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags)
    spec = read_spec("emoji" if args.judges == "embedded" else "dreambench")
    templates = templates_for(spec, flags["class_word"])
    photos = load_photos(flags["concept"], pair.resolution).to(device)
    scorer = Scorer(flags["base"], args.judges, spec["unrelated"], device, args.num_seeds, pair)
    models = [("student", 1), *(("student", s) for s in args.steps), ("teacher", 16)]
    rows, pictures = {}, [("photos", photos)]
    for trained in (False, True):
        if trained:
            load_run(folder, pair)
        for model in models:
            name = ("" if trained else "untouched ") + report.name_of(model)
            rows[name], images = scorer.score(pair, model, photos, templates, flags["class_word"],
                                              flags["guidance_scale"], flags["token"] if trained else None)
            pictures.append((name, images[:10]))
    check_scores(rows, folder)
    between = scorer.embed("dino", photos) @ scorer.embed("dino", photos).T
    if len(photos) > 1:
        others = between[~torch.eye(len(photos), dtype=torch.bool)]
        rows["photos among themselves"] = {"DINO": round(others.mean().item(), 4)}
    cells = [[name, *(row.get(c) for c in report.SCORES)] for name, row in rows.items()]
    print(report.markdown(["", *report.SCORES], cells))
    ceiling = scorer.truths.ceiling if scorer.truths else {}
    if ceiling:
        right = ", ".join(f"{k} {v:.3f}" for k, v in ceiling.items())
        print(f"the probes read {right} of real pictures right")
    names = {k: j.source for k, j in scorer.judges.items()}
    judges = {"set": args.judges, **names}
    save_json(folder / "scores.json", {"num_seeds": args.num_seeds, "prompts": templates, "judges": judges,
                                       "ceiling": ceiling, "scores": rows})
    save_png(grid(pictures), folder / "contact.png")
    print(f"judges: {args.judges} (CLIP: {names['clip']}, DINO: {names['dino']}); {len(templates)} prompts x "
          f"{args.num_seeds} seeds; pictures: {folder / 'contact.png'}")


@torch.no_grad()
def compare_blind(args):
    """The A/B sheet of two runs of one subject: the benchmark's prompts x seeds, by the student or, of RUN:teacher, its teacher."""
    models = [("teacher", 16) if side.endswith(":teacher") else ("student", 1) for side in args.ab_sheet]
    runs, pictures = [read_run(side.removesuffix(":teacher"), base=args.base) for side in args.ab_sheet], []
    concepts = [flags["concept"] for _, flags in runs]
    if concepts[0] != concepts[1]:
        fail(f"--ab_sheet compares two runs of one subject, not of {concepts[0]} and {concepts[1]}")
    check_photos(*runs[0])
    device, first = pick_device(args.device)[0], runs[0][1]
    spec = read_spec("emoji" if own_judges(first["base"]).is_dir() else "dreambench")
    templates = templates_for(spec, first["class_word"])
    for model, (folder, flags) in zip(models, runs):
        pair = load_pair(flags["base"], flags["token"], flags["class_word"], device, flags)
        load_run(folder, pair)
        prompts = [t.replace("{}", f"{flags['token']} {flags['class_word']}") for t in templates]
        pictures.append(to_pil(draw(pair, model, prompts, args.num_seeds, flags["guidance_scale"])))
    plain = [t.replace("a {}", "this {}").replace("{}", first["class_word"]) for t in templates]
    photos = to_pil(load_photos(flags["concept"], pair.resolution))
    names = [f"{folder}{':teacher' * (who == 'teacher')}" for (who, _), (folder, _) in zip(models, runs)]
    pictures = list(zip(plain * args.num_seeds, *pictures))
    blind.ab_sheet(pictures, photos, names, Path(args.output_dir), args.seed)


# ------------------------------------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--run", help="folder that train.py wrote; default: the newest under out/")
    p.add_argument("--base", help="folder of the base, for a run that was trained on one")
    p.add_argument("--steps", default="", help="more step counts for the student, such as 2,4")
    p.add_argument("--num_seeds", type=int, default=4, help="pictures per prompt and model")
    p.add_argument("--judges", help=f"embedded, {', '.join(JUDGES)}, or a folder with clip/ and dino/; "
                                    "default: embedded where the base has its own, else siglip2")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g = p.add_argument_group("benchmark")
    g.add_argument("--benchmark", choices=["emoji", "dreambench"], help="compare methods over many subjects")
    g.add_argument("--subjects", type=int, default=30, help="the first so many")
    g.add_argument("--methods", help="comma-separated names of data/benchmark/methods.json; default: all")
    g.add_argument("--method", action="append", default=[], metavar="NAME=FLAGS",
                   help="a further method by its train.py flags; repeatable")
    g.add_argument("--seeds", default="0,1,2",
                   help="of the trainings; seed s of subject k is 100 (s + 1) + k (tuning: + 50), so that its noise moves one subject, not all alike")
    g.add_argument("--train_flags", default="", help="flags for every training, such as '--base sd-turbo'")
    g.add_argument("--tuning", action="store_true",
                   help="emoji: the subjects that settings may be chosen on, not the 30 that count")
    g.add_argument("--data", default="data/dreambench", help="dreambench: the folder that download.py filled")
    g.add_argument("--reference", default="EchoDistill", help="method that the others are compared with")
    g.add_argument("--keep_runs", action="store_true", help="keep every run's weights")
    g.add_argument("--report", action="store_true", help="only write tables and report.html of what is there")
    g.add_argument("--readme", help="with --report: also fill the benchmark marks of this Markdown file")
    g.add_argument("--output_dir", help="default: out/BENCHMARK, out/BENCHMARK-tuning or out/ab; "
                                        "results of changed code need a new one")
    g = p.add_argument_group("blind comparison by eye")
    g.add_argument("--ab_sheet", nargs=2, metavar=("A", "B"), help="two run folders to compare; DIR:teacher takes its teacher")
    g.add_argument("--tally", metavar="VOTES", help="votes.json saved from a sheet; prints who won")
    g.add_argument("--seed", type=int, default=0, help="of the sheet's order")
    return p


def parse_arguments(argv=None):
    args = parser().parse_args(argv)
    refuse_foreign_bytes(args)
    if args.benchmark:
        args.judges = args.judges or ("siglip2" if args.benchmark == "dreambench" else "embedded")
    own = [Path(args.judges, k, "config.json") for k in ("clip", "dino")] if args.judges else []
    if args.judges not in (None, "embedded", *JUDGES) and not all(path.is_file() for path in own):
        fail(f"--judges {args.judges} is neither embedded, {', '.join(JUDGES)} nor a folder of clip/, dino/")
    for name in ("num_seeds", "subjects"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    try:
        args.steps, args.seeds = ([int(v) for v in text.split(",") if v] for text in (args.steps, args.seeds))
    except ValueError:
        fail("--steps and --seeds are whole numbers with commas between, such as 2,4")
    if any(s not in (1, 2, 4) for s in args.steps):
        fail("--steps takes 2 and 4: the student is made for one step and keeps to few")
    pick_device(args.device)
    args.output_dir = args.output_dir or f"out/{args.benchmark or 'ab'}{'-tuning' * args.tuning}"
    if args.readme and not (args.report and Path(args.readme).is_file()):
        fail(f"--readme {args.readme} goes with --report and names a Markdown file that is there")
    if args.benchmark:
        if args.tuning and "tuning" not in read_spec(args.benchmark):
            fail(f"--tuning needs subjects beside those that count, and {args.benchmark} has none; leave it out")
        check_methods(args)
    elif not args.ab_sheet and not args.tally and not args.report:
        args.run, args.flags = read_run(args.run, base=args.base)
        args.judges = args.judges or ("embedded" if own_judges(args.flags["base"]).is_dir() else "siglip2")
        if args.judges == "embedded":
            embedded_judges(args.flags["base"])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.tally:
        blind.tally(Path(args.tally))
    elif args.ab_sheet:
        compare_blind(args)
    elif args.report:
        results = report.write(Path(args.output_dir), args.reference)
        if args.readme:
            report.update_readme(results, args.reference, Path(args.readme))
    elif args.benchmark:
        run_benchmark(args, Scorer)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    main()
