"""What a judge that only names objects does not see, and whether a judge sees what it should.

    kid(features, features of real pictures), cell_kid(...), edge_energy(images)     # pure functions
    name_objects(judge, images), name_neighbours(judge, images)
    python data/emoji/measure.py                                      # real pictures spoiled on purpose, as the judges see them

The table's first row holds the scores of real pictures; every other row how much each score moves when those are spoiled.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent


def kid(a, b):
    """Kernel inception distance x 1000 of feature sets (n, d) and (m, d): unbiased MMD^2 of the kernel (x.y / d + 1)^3.

    About 0, of either sign, for two samples of one distribution. Binkowski et al., Demystifying MMD GANs, eq. 4. Features of
    small networks are heavy-tailed and their cubes are all outlier: give unit embeddings times sqrt(d), x.y / d is a cosine then.
    """
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):  # mean over pairs of different pictures
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return 1000 * (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def cells(judge, images, stage=2):
    """(N * cells, d) features of the cells of images (N, 3, H, W) in an inner stage of a judge: of 8 x 8 pixels, for the naming judge."""
    maps = [judge.vision(x, output_hidden_states=True).hidden_states[stage] for x in images.clamp(-1, 1).split(64)]
    return torch.cat(maps).permute(0, 2, 3, 1).flatten(0, 2)


def cell_kid(found, real, most=2048):
    """KID x 1000 of cells (n, d) against those of real pictures (m, d), each feature in units of the real ones' deviation.

    A whole picture can be of the right subject and place and still be a mosaic: its cells are what no real picture has.
    """
    g = torch.Generator().manual_seed(0)
    found, real = ((v.cpu() - real.cpu().mean(0)) / real.cpu().std(0) for v in (found, real))
    return kid(*(v[torch.randperm(len(v), generator=g)[:most]] for v in (found, real)))


def edge_energy(images):
    """Mean length of the colour gradient of images (B, 3, H, W) in [-1, 1], in units of [0, 1] a pixel."""
    x = (images.clamp(-1, 1) + 1) / 2
    right, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (right.square() + down.square()).sqrt().mean().item()


def name_objects(judge, images):
    """(N,) numbers of the nouns that the naming judge says first of images (N, 3, H, W)."""
    return torch.cat([judge.name(judge.features(x)).argmax(1) for x in images.clamp(-1, 1).split(64)])


def halves(images):
    """The left and the right halves of images (N, 3, H, W), each in the middle of a picture of its own whose border repeats."""
    quarter = images.shape[-1] // 4
    return [F.pad(half, (quarter, quarter, 0, 0), mode="replicate") for half in images.chunk(2, 3)]


def name_neighbours(judge, images):
    """(2, N): the same for the left and the right half of images of two objects."""
    return torch.stack([name_objects(judge, half) for half in halves(images)])


# ---------------------------------------------------------------------------------------------------------------
# Spoiled pictures. A judge that scores them like real ones cannot tell a good model from a bad one.

def blur(images, size=3):
    """Box blur of images (B, 3, H, W)."""
    return F.avg_pool2d(F.pad(images, [size // 2] * 4, "replicate"), size, 1)


def mosaic(images, amount=.2, side=8):
    """Images (B, 3, H, W) whose patches of side x side pixels each have a little light and colour of their own."""
    light = amount * torch.randn(*images.shape[:2], *(n // side for n in images.shape[2:]), generator=torch.Generator().manual_seed(0))
    return (images + light.repeat_interleave(side, 2).repeat_interleave(side, 3)).clamp(-1, 1)


def without_an_eye(tiles, radius=7):
    """Sprites (N, 4, 64, 64) with the darkest spot of their upper part, an eye or the nose of a face, in their mean colour."""
    n, side = len(tiles), tiles.shape[-1]
    alpha = tiles[:, 3:]
    luma = (tiles[:, :3] * alpha).sum(1, keepdim=True) / 3 + (1 - alpha)  # outside is white
    dark = F.avg_pool2d(luma, 5, 1, 2)[:, 0, 12:40, 12:-12].flatten(1).argmin(1)
    y, x = 12 + dark // (side - 24), 12 + dark % (side - 24)
    rows, columns = torch.arange(side).view(1, -1, 1), torch.arange(side).view(1, 1, -1)
    inside = ((rows - y.view(-1, 1, 1)) ** 2 + (columns - x.view(-1, 1, 1)) ** 2 <= radius ** 2).view(n, 1, side, side)
    mean = (tiles[:, :3] * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True)
    return torch.cat([torch.where(inside, mean, tiles[:, :3]), alpha], 1)


def show(world, sprites, place, g, tiles=None):
    """Pictures (B, 3, 64, 64) in [-1, 1] of one or two sprites (each (B,) numbers) at places (B,): in the middle, or side by side.

    tiles (each (B, 4, 64, 64)): what the sprites look like, if not like themselves. One generator's state means one pose.
    """
    from world import GRID, SIZE, SIZES
    n, kind, upright = len(place), "beside" if len(sprites) == 2 else "", torch.zeros(len(place), dtype=torch.bool)
    tiles = [world.sprites[s] for s in sprites] if tiles is None else tiles
    centres = [[2.0 * GRID / SIZE * side, 2 * GRID / SIZE] for side in (2, -2)] if kind else [[0.0, 0.0]]
    canvas = world.canvas(place, g)
    poses = [(tile, torch.full((n,), float(SIZES[kind])), torch.tensor(centre).expand(n, 2), .3 * torch.rand(n, generator=g) - .15, upright)
             for tile, centre in zip(tiles, centres)]
    rows = torch.arange(n if kind else 0)
    other, neighbour = (sprites[1], poses[1]) if kind else (rows, None)
    kinds = torch.full((n,), list(SIZES).index(kind))
    images = world.compose(canvas, place, sprites[0], poses[0], kinds, rows, other, neighbour, g, mirror=False)
    return images.clamp(0, 1) * 2 - 1


@torch.no_grad()
def sensitivities(clip, identity, namer, tokenizer, splits="pretrain", n=300, seed=0, freedom=None):
    """{row: {score: value}}: "real", then the change of each score under each corruption, on pictures that it touches.

    object, both    the naming judge's first choice of all nouns; for a pair that of each half
    place           the clip judge's first choice of all places, the noun given
    CLIP-T          cosine of picture and true caption; individual: the identity judge's first choice among all individuals,
    identity        mean cosine with two other pictures of the same individual
    KID             of the identity judge's embeddings against fresh real pictures of that kind; cell KID: `cell_kid` in the naming judge
    edges           in units of those of real pictures
    """
    from world import FREEDOM, PLACES, World, article
    world = World(splits, freedom=FREEDOM if freedom is None else freedom)
    g = torch.Generator().manual_seed(seed)
    face = torch.tensor([e["class"] in FACES and e["style"] != "flat" and "face" in e["name"] + " face" * (e["class"] in ROUND)
                         for e in world.entries])
    solid = torch.where(~world.is_flat)[0]  # a flat drawing would have to be called one
    sprite = solid[torch.randint(len(solid), (n,), generator=g)]
    other, wrong = (sprite.roll(k) for k in (1, 2))
    fine = (world.noun_of[sprite] != world.noun_of[other]) & (world.noun_of[other] != world.noun_of[wrong])
    place = torch.randint(len(PLACES), (n,), generator=g)
    tiles = world.sprites
    names = [article(world.nouns[i]) for i in world.noun_of.tolist()]
    single = [f"{names[a]} {PLACES[p]}" for a, p in zip(sprite.tolist(), place.tolist())]
    double = [f"{names[a]} next to {names[b]} {PLACES[p]}" for a, b, p in zip(sprite.tolist(), other.tolist(), place.tolist())]

    def draw(*which, tiles=None):
        return show(world, which, place, torch.Generator().manual_seed(seed + 1), tiles)

    def embed(judge, x):
        return torch.cat([judge.embed(judge.features(v)) for v in x.split(64)])

    def embed_text(captions):
        return torch.cat([clip.embed_text(tokenizer, captions[i:i + 128]) for i in range(0, len(captions), 128)])

    gallery = torch.arange(len(world.entries)).repeat(2)  # two other pictures of every individual
    views = show(world, [gallery], torch.randint(len(PLACES), (len(gallery),), generator=g), g)
    references = embed(identity, views).view(2, len(world.entries), -1)
    again = [solid[torch.randint(len(solid), (2 * n,), generator=g)] for _ in range(2)]
    elsewhere = torch.randint(len(PLACES), (2 * n,), generator=g)
    fresh = {k: show(world, again[:k], elsewhere, g) for k in (1, 2)}
    fresh = {k: (embed(identity, v), edge_energy(v), cells(namer, v)) for k, v in fresh.items()}

    def distance(embedded, k):
        return kid(embedded * embedded.shape[1] ** .5, fresh[k][0] * embedded.shape[1] ** .5)

    def cell_distance(parts, k):
        return cell_kid(parts.flatten(0, 1), fresh[k][2])

    table = embed_text([f"{article(w)} {p}" for w in world.nouns for p in PLACES]).view(len(world.nouns), len(PLACES), -1)

    def scores(x, captions, kind):
        """{score: (n,) per picture}, the identity judge's embeddings and the naming judge's cells (n, cells, d)."""
        e, own, parts = embed(clip, x), embed(identity, x), cells(namer, x).unflatten(0, (n, -1))
        near = torch.einsum("nd,vkd->nk", own, references) / 2
        out = {"CLIP-T": (e * embed_text(captions)).sum(1)}
        if kind == 2:
            right, left = world.noun_of[torch.stack([sprite, other])]
            return out | {"both": (name_neighbours(namer, x) == torch.stack([left, right])).all(0).float()}, own, parts
        return out | {"object": (name_objects(namer, x) == world.noun_of[sprite]).float(),
                      "place": (torch.einsum("nd,nkd->nk", e, table[world.noun_of[sprite]]).argmax(1) == place).float(),
                      "individual": (near.argmax(1) == sprite).float(), "identity": near[torch.arange(n), sprite]}, own, parts

    everyone = torch.ones(n, dtype=torch.bool)
    one, two = draw(sprite), draw(sprite, other)
    swapped = torch.cat([tiles[:, [1, 2, 0]], tiles[:, 3:]], 1)
    cases = [("blur", blur(one), single, 1, everyone), ("mosaic", mosaic(one), single, 1, everyone),
             ("swapped colours", draw(sprite, tiles=[swapped[sprite]]), single, 1, everyone),
             ("missing eye or nose", draw(sprite, tiles=[without_an_eye(tiles)[sprite]]), single, 1, face[sprite]),
             ("two subjects", draw(sprite, sprite), single, 1, everyone),
             ("another of its class", draw(sibling(world, sprite)), single, 1, sibling(world, sprite) != sprite),
             ("pair, blur", blur(two), double, 2, fine), ("pair, wrong neighbour", draw(sprite, wrong), double, 2, fine),
             ("pair, no neighbour", one, double, 2, fine)]
    clean = {1: scores(one, single, 1), 2: scores(two, double, 2)}
    rows_of = {}
    for name, k, x in (("real", 1, one), ("real pairs", 2, two)):
        rows = everyone if k == 1 else fine
        rows_of[name] = {s: v[rows].mean().item() for s, v in clean[k][0].items()} \
            | {"KID": distance(clean[k][1][rows], k), "cell KID": cell_distance(clean[k][2][rows], k), "edges": edge_energy(x[rows]) / fresh[k][1]}
    for name, x, captions, k, rows in cases:
        if not rows.any():
            continue
        new, own, parts = scores(x, captions, k)
        rows_of[name] = {s: (v - clean[k][0][s])[rows].mean().item() for s, v in new.items()}
        real = one if k == 1 else two
        rows_of[name] |= {"KID": distance(own[rows], k) - distance(clean[k][1][rows], k),
                        "cell KID": cell_distance(parts[rows], k) - cell_distance(clean[k][2][rows], k),
                        "edges": (edge_energy(x[rows]) - edge_energy(real[rows])) / fresh[k][1], "pictures": int(rows.sum())}
    return rows_of


def sibling(world, sprite):
    """Another individual of the same noun and style for each sprite, itself where there is none."""
    out = sprite.clone()
    for i, s in enumerate(sprite.tolist()):
        alike = torch.where((world.noun_of == world.noun_of[s]) & (world.is_flat == world.is_flat[s]))[0]
        out[i] = alike[(alike == s).nonzero().item() + 1 - len(alike)] if len(alike) > 1 else s
    return out


FACES = {"dog", "cat", "fox", "bear", "horse", "cow", "pig", "rabbit", "frog", "penguin", "owl", "octopus"}
ROUND = {"fox", "bear", "frog", "penguin", "owl"}  # classes whose only emoji shows the face


def main():
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    from transformers import CLIPTokenizer

    from data.base import load_encoder
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default=str(HERE / "base"), help="folder with judges/ and teacher/tokenizer")
    p.add_argument("--splits", default="pretrain", help='individuals to draw: "pretrain", or "held_out" that no judge has seen')
    p.add_argument("--samples", type=int, default=300, help="pictures")
    p.add_argument("--freedom", type=float, help="of the world, from 0 to 1 (default: as the shipped pair knows it)")
    args = p.parse_args()
    base = Path(args.base)
    tokenizer = CLIPTokenizer.from_pretrained(base / "teacher" / "tokenizer")
    table = sensitivities(*(load_encoder(base / "judges" / k) for k in ("clip", "identity", "names")), tokenizer, args.splits, args.samples, freedom=args.freedom)
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in table.items():
        cells = [f"{row[c]:.3g}" if name.startswith("real") or c == "pictures" else f"{row[c]:+.3f}" if abs(row[c]) < 1 else f"{row[c]:+.1f}"
                 for c in columns if c in row]
        values = iter(cells)
        print(f"| {name} | " + " | ".join(next(values) if c in row else "" for c in columns) + " |")


if __name__ == "__main__":
    main()
