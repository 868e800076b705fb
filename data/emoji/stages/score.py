"""Stage measure: do the exported pair's pictures hold what was asked? The judges answer; training never sees them."""
import time
from pathlib import Path

import torch

from data.base import load_encoder, load_pair
from data.disk import fill_marks, save_json
from data.images import grid, save_png
from measure import edge_energy, kid, name_neighbours, name_objects
from stages.loop import make_world
from world import PLACES, World, article

HERE = Path(__file__).resolve().parents[1]


@torch.no_grad()
def measure(args):
    """Fill the table of README.md, or print it of another --base: args.samples prompts "a NOUN PLACE" and half as many "a NOUN next to a NOUN PLACE"; scores, a grid.

    object, both    the naming judge's first choice; for a pair that of each half, in the middle of a picture of its own
    place           the clip judge's first choice among all places, the noun given
    KID             of the identity judge's embeddings against twice as many fresh real pictures; edges: in units of theirs
    """
    base = Path(args.base).resolve()
    own = base == HERE / "base"  # of another pair the table is only printed
    pair, judge, eye, namer = load_pair(base, "<v>", "dog"), *(load_encoder(base / "judges" / k) for k in ("clip", "identity", "names"))
    plain = dict.fromkeys(World.P, 0.0) | {"place": 1.0}
    alone, paired = (make_world(args, p=plain | {"beside": p}) for p in (0.0, 1.0))
    nouns, g = [article(w) for w in alone.nouns], torch.Generator().manual_seed(args.seed + 12345)
    real = {"one": alone.sample(args.samples, g, flat_share=0), "two": paired.sample(args.samples // 2, g, flat_share=0)}
    noise = {k: torch.randn(len(v.captions), *pair.latent_shape, generator=g) for k, v in real.items()}

    def embed(encoder, images):
        return torch.cat([encoder.embed(encoder.features(x)) for x in images.clamp(-1, 1).split(64)])

    def embed_text(captions):  # (n, m) captions -> (n, m, d)
        flat = [c for row in captions for c in row]
        rows = torch.cat([judge.embed_text(pair.text.tokenizer, flat[i:i + 256]) for i in range(0, len(flat), 256)])
        return rows.view(len(captions), -1, rows.shape[1])

    places = embed_text([[f"{nouns[a]} {p}" for p in PLACES] for a in real["one"].noun.tolist()])
    fresh = alone.sample(2 * args.samples, g, flat_share=0).images
    known, sharp = embed(eye, fresh), edge_energy(fresh)
    root = known.shape[1] ** .5

    def judged(images):
        left, right = name_neighbours(namer, images["two"])
        a, b = real["two"].noun, real["two"].beside
        row = {"object": name_objects(namer, images["one"]) == real["one"].noun,
               "place": torch.einsum("nd,nkd->nk", embed(judge, images["one"]), places).argmax(1) == real["one"].place,
               "both": (left == a) & (right == b) | (left == b) & (right == a)}
        row = {k: round(v.float().mean().item(), 3) for k, v in row.items()}
        return row | {"KID": round(kid(embed(eye, images["one"]) * root, known * root), 1),
                      "edges": round(edge_energy(images["one"]) / sharp, 3)}

    def draw(which, steps, guidance=1.0):
        start, out = time.perf_counter(), {}
        for kind, batch in real.items():
            parts = zip(noise[kind].split(32), (batch.captions[i:i + 32] for i in range(0, len(batch.captions), 32)))
            out[kind] = torch.cat([pair.decode(which.sample(z, pair.text(c), steps, pair.text([""]), guidance)) for z, c in parts])
        return out, 1000 * (time.perf_counter() - start) / sum(len(v) for v in out.values())

    through = {k: torch.cat([pair.decode(pair.encode(x)) for x in v.images.split(32)]) for k, v in real.items()}
    scores = {"real pictures": judged({k: v.images for k, v in real.items()}), "through the autoencoder": judged(through)}
    pictures = {}
    for name, which, steps, guidance in (("teacher", pair.teacher, 16, args.guidance), ("student", pair.student, 1, 1.0),
                                         ("student, 2 steps", pair.student, 2, 1.0), ("student, 4 steps", pair.student, 4, 1.0)):
        pictures[name], ms = draw(which, steps, guidance)
        scores[name] = judged(pictures[name]) | {"ms per image": round(ms, 1)}
    for name, row in scores.items():
        print(f"{name}: {row}", flush=True)
    save_json(base / "scores.json", {"prompts": args.samples, "seed": args.seed, "freedom": args.freedom, **scores})
    rows = [(name, pictures[name][kind][i:i + 10]) for kind, i in (("one", 0), ("one", 10), ("one", 20), ("two", 0)) for name in ("teacher", "student")]
    save_png(grid(rows), (HERE if own else base) / "samples.png")
    print("\n".join(real["one"].captions[:30] + real["two"].captions[:10]))
    table = [f"| {args.samples} prompts, {args.samples // 2} of neighbours | object, of {len(nouns)} | place, of {len(PLACES)} | both neighbours | KID | edges | ms per image |", "|---" * 7 + "|"]
    for name, row in scores.items():
        table.append("| " + " | ".join([name, *(f"{row[k]:.3f}" for k in ("object", "place", "both")), f"{row['KID']:.0f}", f"{row['edges']:.2f}", f"{row.get('ms per image', '')}"]) + " |")
    if own:
        fill_marks(HERE / "README.md", "pair", "end pair", "\n".join(table) + "\n", "measure")
    else:
        print("\n".join(table))
