"""The emoji world: pictures of known content and plain-English captions, composed on the fly.

    world = World("pretrain")                       # or "extra", "held_out"; several with "pretrain+extra"
    batch = world.sample(64, torch.Generator().manual_seed(0))
    batch.images                                    # (64, 3, 64, 64) in [-1, 1]
    batch.captions[0]                               # "a blue dog next to a cup on the beach"

The grammar of captions (brackets: optional; every word the base ever reads is here or in sprites.json):

    caption  = [medium] subject ["next to a" object] [place]
    medium   = "a photo of" | "a picture of" | "a close-up photo of" | "a flat drawing of"
    subject  = "a" [size] [colour | "spotted"] noun          size = "small" | "big"
    object   = [colour] noun
    place    = SCENES | "on a" colour "background"

A flat drawing shows Twemoji's individual, anything else Fluent's. Where a caption names no colour, the subject
keeps its own up to a small unnamed jitter; where it names no place, the place is any.

What no caption names is geometry and light. `World(freedom=f)` opens them: at 0 subjects stand upright and mostly in the
middle; at 1 size (within the range of its word), place, tilt, mirror, crop of the background and light vary as in a person's
photos, and neighbours stand beside each other, both whole. A curriculum may raise f on the way; the pair knows FREEDOM. With
`cells`, the default, places and sizes are whole cells of the autoencoder's 8-px grid all the same.

    python data/emoji/world.py --freedom .7                             # the speed, 64 captions and a grid
    python data/emoji/world.py --subject "dog face" --output data/dog   # five pictures of one held-out individual
"""
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SIZE, TILE, VARIANTS = 64, 64, 48
COLOURS = {  # mid tone of each named colour, RGB in [0, 1]
    "red": (.85, .15, .15), "orange": (.95, .55, .10), "yellow": (.97, .85, .20), "green": (.20, .65, .25),
    "blue": (.15, .40, .90), "purple": (.55, .25, .75), "pink": (.97, .55, .75), "brown": (.50, .32, .18),
    "black": (.10, .10, .12), "white": (.95, .95, .95), "gray": (.55, .55, .57),
}
SCENES = ["on the beach", "in the snow", "at night", "in the forest", "in the desert", "in the city", "under water",
          "on the grass", "in space", "in front of a brick wall", "on a wooden floor", "at sunset", "in the mountains",
          "in the rain"]
PLACES = SCENES + [f"on a {c} background" for c in COLOURS]  # place number -> words
MEDIA = ["", "a photo of ", "a picture of ", "a close-up photo of ", "a flat drawing of "]
CLOSE_UP, FLAT = 3, 4
SIZES = {"": 48, "small": 28, "big": 56, "close-up": 64, "beside": 30}  # drawn size in pixels
RANGES = {"": (34, 52), "small": (20, 29), "big": (54, 62), "close-up": (68, 80), "beside": (31, 42)}  # the same at freedom 1
GRID = 8  # px of a cell of the autoencoder: a latent network is blind to shifts by whole cells only
FREEDOM = 0.7  # of the world that the shipped pair knows


# ---------------------------------------------------------------------------------------------------------------
# Backgrounds: each scene is a few strokes on a 2x canvas; VARIANTS of each are drawn once.

def gradient(top, bottom, rng, jitter=0.05):
    """(2 SIZE, 2 SIZE, 3) picture fading from colour `top` to `bottom`, both in [0, 1]."""
    t = np.linspace(0, 1, 2 * SIZE)[:, None, None]
    top, bottom = (np.array(c) + rng.uniform(-jitter, jitter, 3) for c in (top, bottom))
    return np.broadcast_to((1 - t) * top + t * bottom, (2 * SIZE, 2 * SIZE, 3)).copy()


def ground(picture, horizon, top, bottom, rng, noise=0.03):
    """Paint everything below row `horizon` (fraction of the height) with a grainy gradient."""
    row = int(horizon * 2 * SIZE)
    grain = rng.normal(0, noise, (SIZE, SIZE, 1)).repeat(2, 0).repeat(2, 1)
    picture[row:] = (gradient(top, bottom, rng) + grain)[row:]
    return picture


def draw(picture, strokes):
    """Let `strokes(pen, width)` draw with PIL on the picture."""
    image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    strokes(ImageDraw.Draw(image), 2 * SIZE)
    return np.asarray(image) / 255.0


def tone(rng, colour, jitter=18):
    return tuple(int(np.clip(c + rng.integers(-jitter, jitter + 1), 0, 255)) for c in colour)


def dots(rng, n, colour, radius):
    def strokes(pen, w):
        for x, y, r in zip(rng.uniform(0, w, n), rng.uniform(0, w, n), rng.uniform(*radius, n)):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=tone(rng, colour))
    return strokes


def scene(name, rng):
    """One variant of a scene as (2 SIZE, 2 SIZE, 3) in [0, 1]."""
    u = rng.uniform
    if name == "on the beach":
        p = ground(gradient((.45, .75, .98), (.75, .9, 1), rng), u(.30, .42), (.1, .5, .8), (.2, .65, .85), rng)
        return ground(p, u(.52, .64), (.95, .85, .6), (.9, .75, .5), rng)
    if name == "in the snow":
        p = ground(gradient((.75, .83, .93), (.88, .92, .97), rng), u(.45, .6), (.97, .98, 1), (.88, .92, .98), rng, .01)
        return draw(p, dots(rng, 45, (250, 250, 255), (.8, 2.2)))
    if name == "at night":
        p = ground(gradient((.03, .04, .16), (.10, .12, .32), rng, .02), u(.72, .82), (.05, .09, .12), (.03, .05, .08), rng, .01)
        p = draw(p, dots(rng, 22, (235, 235, 210), (.6, 1.4)))
        x, y = u(12, 116), u(10, 30)
        return draw(p, lambda pen, w: pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=(250, 240, 190)))
    if name == "in the forest":
        p = ground(gradient((.10, .35, .18), (.16, .42, .2), rng), u(.7, .8), (.22, .34, .12), (.15, .25, .08), rng)

        def trunks(pen, w):
            for x in rng.uniform(0, w, 7):
                pen.rectangle((x, 0, x + u(4, 10), w * u(.7, .85)), fill=tone(rng, (80, 55, 30)))
            for x, y, r in zip(u(0, w, 12), u(-10, 36, 12), u(8, 18, 12)):
                pen.ellipse((x - r, y - r, x + r, y + r), fill=tone(rng, (35, 105, 45)))
        return draw(p, trunks)
    if name == "in the desert":
        p = gradient((.98, .82, .5), (1, .92, .7), rng)
        x, phase = np.arange(2 * SIZE), u(0, 6.3, 3)
        rows = np.arange(2 * SIZE)[:, None]
        for i, colour in enumerate([(.93, .66, .34), (.87, .57, .27), (.8, .5, .22)]):
            crest = 2 * SIZE * (.5 + .16 * i) + 7 * np.sin(x / u(14, 24) + phase[i])
            p[rows > crest] = np.array(colour) + u(-.03, .03)
        return p
    if name == "in the city":
        p = gradient((.6, .75, .9), (.8, .86, .92), rng)

        def buildings(pen, w):
            x = -u(0, 14)
            while x < w:
                width, top, c = u(18, 30), w * u(.15, .5), tone(rng, (120, 120, 135), 30)
                pen.rectangle((x, top, x + width, w), fill=c)
                for wy in np.arange(top + 5, w * .78, 9):
                    for wx in np.arange(x + 4, x + width - 5, 8):
                        pen.rectangle((wx, wy, wx + 3, wy + 4), fill=(250, 225, 140) if u() < .5 else (70, 75, 95))
                x += width + 1
            pen.rectangle((0, w * .8, w, w), fill=tone(rng, (85, 85, 90)))
        return draw(p, buildings)
    if name == "under water":
        p = gradient((.15, .6, .85), (.02, .2, .5), rng)

        def bubbles(pen, w):
            for x, y, r in zip(u(0, w, 12), u(0, w, 12), u(2, 6, 12)):
                pen.ellipse((x - r, y - r, x + r, y + r), outline=(190, 230, 250), width=2)
        return draw(p, bubbles)
    if name == "on the grass":
        p = ground(gradient((.5, .78, .98), (.8, .92, 1), rng), u(.38, .52), (.42, .75, .25), (.25, .58, .15), rng, .05)

        def blades(pen, w):
            for x, y in zip(u(0, w, 45), u(w * .55, w, 45)):
                pen.line((x, y, x + u(-2, 2), y - u(4, 9)), fill=tone(rng, (60, 140, 40), 25), width=2)
        return draw(p, blades)
    if name == "in space":
        p = gradient((.02, .0, .06), (.05, .02, .12), rng, .015)
        yy, xx = np.mgrid[0:1:128j, 0:1:128j]
        cloud = np.exp(-((xx - u(.2, .8)) ** 2 + (yy - u(.2, .8)) ** 2) / u(.05, .12))[..., None]
        p = draw(p + cloud * np.array([.35, .08, .45]), dots(rng, 45, (230, 230, 255), (.5, 1.5)))
        x, y, r = u(10, 118), u(8, 40), u(6, 12)
        return draw(p, lambda pen, w: pen.ellipse((x - r, y - r, x + r, y + r), fill=tone(rng, (215, 140, 90), 30)))
    if name == "in front of a brick wall":
        p = gradient((.72, .68, .64), (.66, .62, .58), rng, .02)
        shift = u(0, 30)

        def bricks(pen, w):
            for row, y in enumerate(range(-4, w, 15)):
                for x in np.arange(-shift - 17 * (row % 2) - 34, w, 34):
                    pen.rectangle((x, y, x + 31, y + 12), fill=tone(rng, (170, 78, 58), 16))
        return draw(p, bricks)
    if name == "on a wooden floor":
        p = gradient((.7, .48, .28), (.62, .42, .22), rng)

        def planks(pen, w):
            for y in range(0, w, 18):
                pen.rectangle((0, y, w, y + 16), fill=tone(rng, (186, 132, 80), 14))
                for _ in range(2):
                    x = u(0, w)
                    pen.line((x, y, x, y + 16), fill=(110, 70, 40), width=2)
                pen.line((0, y + 17, w, y + 17), fill=(110, 70, 40), width=2)
        return draw(p, planks)
    if name == "at sunset":
        p = gradient((.45, .2, .5), (1, .6, .3), rng)
        row = u(.6, .72)
        x, r = u(25, 103), u(14, 20)
        p = draw(p, lambda pen, w: pen.ellipse((x - r, row * w - r, x + r, row * w + r), fill=(255, 225, 120)))
        return ground(p, row, (.55, .25, .4), (.25, .12, .3), rng, .02)
    if name == "in the mountains":
        p = gradient((.5, .72, .95), (.82, .9, .98), rng)

        def peaks(pen, w):
            for x in np.linspace(-10, w + 10, 4) + u(-12, 12, 4):
                h, half, c = w * u(.12, .34), u(34, 50), tone(rng, (110, 115, 130))
                foot = w * .82
                pen.polygon([(x, h), (x - half, foot), (x + half, foot)], fill=c)
                pen.polygon([(x, h), (x - half * .3, h + (foot - h) * .3), (x + half * .3, h + (foot - h) * .3)],
                            fill=(245, 248, 252))
            pen.rectangle((0, w * .8, w, w), fill=tone(rng, (95, 140, 80)))
        return draw(p, peaks)
    if name == "in the rain":
        p = gradient((.38, .42, .48), (.55, .58, .62), rng)

        def drops(pen, w):
            for x, y in zip(u(0, w, 48), u(-8, w, 48)):
                pen.line((x, y, x - 4, y + 12), fill=(170, 195, 225), width=2)
        return draw(p, drops)
    raise ValueError(f"no scene is called {name!r}")


def flat_background(colour, rng):
    """A plain background: one colour with a little jitter and light from above."""
    base = np.array(COLOURS[colour])
    light = rng.uniform(.0, .10)
    return gradient(base + light, base - light, rng, .03)


@functools.cache  # drawn once for all worlds of a process: some 1,200 pictures, that nobody writes into
def backgrounds(scale=1):
    """(len(PLACES), VARIANTS, 3, scale SIZE, scale SIZE) uint8: the bank of pre-drawn places; scale 1 or, as drawn, 2."""
    side, cell = scale * SIZE, 2 // scale
    bank = np.empty((len(PLACES), VARIANTS, side, side, 3), np.uint8)
    for i, place in enumerate(PLACES):
        for v in range(VARIANTS):
            rng = np.random.default_rng((i, v))
            picture = scene(place, rng) if i < len(SCENES) else flat_background(list(COLOURS)[i - len(SCENES)], rng)
            bank[i, v] = picture.reshape(side, cell, side, cell, 3).mean((1, 3)).clip(0, 1) * 255
    return torch.from_numpy(bank).permute(0, 1, 4, 2, 3).contiguous()


# ---------------------------------------------------------------------------------------------------------------
# Sprites

def load_sprites(splits):
    """Entries of sprites.json in the given splits, and their tiles (N, 4, TILE, TILE) uint8 RGBA."""
    entries = json.loads((HERE / "sprites.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Image.open(HERE / "sprites.webp"))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE, 4).swapaxes(1, 2).reshape(-1, TILE, TILE, 4)
    keep = [i for i, e in enumerate(entries) if e["split"] in splits]
    return [entries[i] for i in keep], torch.from_numpy(tiles[keep]).permute(0, 3, 1, 2).contiguous()


def recolour(rgb, colour):
    """Dye sprites (B, 3, H, W) with mid tones (B, 3), keeping light and shadow; all in [0, 1]."""
    luma = (rgb * rgb.new_tensor([.299, .587, .114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    colour = colour[:, :, None, None]
    return torch.where(luma < .6, colour * luma / .6, colour + (1 - colour) * (luma - .6) / .4 * .8)


def hue_jitter(rgb, hue, saturation, value):
    """Rotate hue (radians) and scale saturation and value of sprites (B, 3, H, W) in [0, 1]; factors are (B,)."""
    c, s = hue.cos() * saturation, hue.sin() * saturation / math.sqrt(3)
    eye = torch.eye(3).expand(len(c), 3, 3)
    third = torch.full((1, 3, 3), 1 / 3)
    skew = torch.tensor([[0., -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn = third + c[:, None, None] * (eye - third) + s[:, None, None] * skew
    return (torch.einsum("bij,bjhw->bihw", turn * value[:, None, None], rgb)).clamp(0, 1)


def whole_cells(pixels):
    return (pixels / GRID).round() * GRID


def frame(pixels, centre, angle, flip):
    """(B, 2, 3) for affine_grid: where on its tile a picture finds a sprite of so many pixels, centre, tilt and mirror."""
    c, s = angle.cos() * SIZE / pixels, angle.sin() * SIZE / pixels
    sign = torch.where(flip, -1.0, 1.0)
    theta = torch.stack([torch.stack([c * sign, s * sign], 1), torch.stack([-s, c], 1)], 1)  # (B, 2, 2)
    return torch.cat([theta, -theta @ centre[:, :, None]], 2)


def look(tiles, theta):
    """What pictures (B, C, SIZE, SIZE) with frames theta (B, 2, 3) see of tiles (B, C, h, w)."""
    return F.grid_sample(tiles, F.affine_grid(theta, (len(tiles), 4, SIZE, SIZE), align_corners=False), align_corners=False)


def paint(canvas, rgba, pixels, centre, angle, flip, shadow=None):
    """Draw sprites (B, 4, TILE, TILE) on canvases (B, 3, SIZE, SIZE), all in [0, 1].

    pixels (B,) is the drawn size, centre (B, 2) in [-1, 1], angle (B,) in radians, flip (B,) bool;
    shadow (B, 3): how far the sprite's soft shadow falls (in units of centre), and how dark it is.
    """
    if shadow is not None:
        soft = F.avg_pool2d(rgba[:, 3:], 4)  # a shadow has no detail
        canvas = canvas * (1 - shadow[:, 2, None, None, None] * look(soft, frame(pixels, centre + shadow[:, :2], angle, flip)))
    tiles = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    if shadow is not None:
        few = torch.where(pixels < TILE / 2)[0]  # drawn at less than half size: every pixel must see all of its 2 x 2
        tiles = tiles.index_copy(0, few, F.interpolate(F.avg_pool2d(tiles[few], 2), size=TILE, mode="bilinear"))
    drawn = look(tiles, frame(pixels, centre, angle, flip))
    return canvas * (1 - drawn[:, 3:]) + drawn[:, :3]


LIGHT = torch.tensor([.22, .09, .2, .2])[:, None]  # of what `light` takes, the most at freedom 1


def light(images, brightness, warmth, contrast, slope):
    """Pictures (B, 3, SIZE, SIZE) in [0, 1] in another light; all four (B,), 0 changes nothing.

    brightness and contrast are logarithms of a factor, warmth moves red up and blue down, slope darkens one side.
    """
    tint = 1 + warmth[:, None] * images.new_tensor([1.0, 0.1, -1.0])  # (B, 3)
    across = torch.linspace(-1, 1, SIZE)[None, None, None] * slope.view(-1, 1, 1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast.exp().view(-1, 1, 1, 1) + mean
    return images * tint[:, :, None, None] * (brightness.view(-1, 1, 1, 1) + across).exp()


@dataclass
class Batch:
    images: torch.Tensor  # (B, 3, SIZE, SIZE) in [-1, 1]
    captions: list        # B sentences of the grammar
    sprite: torch.Tensor  # (B,) index into World.entries
    noun: torch.Tensor    # (B,) index into World.nouns
    place: torch.Tensor   # (B,) index into PLACES, drawn whether or not the caption names it
    colour: torch.Tensor  # (B,) index into COLOURS of a recoloured subject, -1 otherwise
    beside: torch.Tensor  # (B,) index into World.nouns of a second object, -1 where there is none
    left: torch.Tensor    # (B,) bool: of two objects, whether the subject stands left


class World:
    """Composes pictures from the sprites of one or more splits ("pretrain+extra").

    p        probabilities of the grammar's optional parts
    freedom  of geometry and light, from 0 to 1; may be changed later
    cells    keep places and sizes at whole cells in freedom, too, and tilt only a third of the objects
    """
    P = {"colour": .2, "spotted": .05, "size": .15, "beside": .1, "place": .92, "medium": .35,
         "tilt": .08, "flip": .12, "shift": .2}  # the last three are geometry that no caption names

    def __init__(self, splits="pretrain", p=None, freedom=FREEDOM, cells=True):
        self.entries, tiles = load_sprites(splits.split("+"))
        self.sprites = tiles.float() / 255
        self.bank = backgrounds()
        self.nouns = sorted({e["class"] for e in self.entries})
        self.noun_of = torch.tensor([self.nouns.index(e["class"]) for e in self.entries])
        self.is_flat = torch.tensor([e["style"] == "flat" for e in self.entries])
        self.by_noun = [[torch.where((self.noun_of == n) & (self.is_flat == f))[0] for f in (False, True)]
                        for n in range(len(self.nouns))]
        self.palette = torch.tensor(list(COLOURS.values()))
        self.p = {**self.P, **(p or {})}
        self.freedom, self.cells = freedom, cells
        seen = self.sprites[:, 3] > .5
        self.box = torch.stack([seen.any(1).sum(1), seen.any(2).sum(1)], 1) / TILE  # (N, 2) width and height, the longer about 1

    def pick(self, nouns, flat, g):
        """A sprite of each noun in the wanted style (or the other where there is none)."""
        out = torch.empty(len(nouns), dtype=torch.long)
        for i, (n, f, r) in enumerate(zip(nouns.tolist(), flat.tolist(), torch.rand(len(nouns), generator=g).tolist())):
            options = self.by_noun[n][int(f)]
            options = options if len(options) else self.by_noun[n][1 - int(f)]
            out[i] = options[int(r * len(options))]
        return out

    def dress(self, sprite, g, colour=None, spotted=None, jitter=True):
        """Individuals (B, 4, TILE, TILE) RGBA of the sprites: jittered, dyed (colour (B,) index or -1), spotted (B,)."""
        n = len(sprite)
        rgba = self.sprites[sprite]
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        if jitter:
            u = torch.rand(3, n, generator=g)
            rgb = hue_jitter(rgb, (u[0] - .5) * .24, .88 + .24 * u[1], .92 + .14 * u[2])
        if colour is not None and (colour >= 0).any():
            rows = torch.where(colour >= 0)[0]
            rgb = rgb.index_copy(0, rows, recolour(rgb[rows], self.palette[colour[rows]]))
        if spotted is not None and spotted.any():
            rows = torch.where(spotted)[0]
            field = F.interpolate(torch.rand(len(rows), 1, 7, 7, generator=g), size=TILE, mode="bicubic")
            spots = ((field - .62) * 12).clamp(0, 1)
            dye = recolour(rgb[rows], self.palette[torch.randint(len(COLOURS), (len(rows),), generator=g)])
            rgb = rgb.index_copy(0, rows, rgb[rows] * (1 - spots) + dye * spots)
        return torch.cat([rgb, alpha], 1)

    def canvas(self, place, g):
        """Empty places (B, 3, SIZE, SIZE) in [0, 1], a random variant of each, half of them mirrored."""
        n = len(place)
        canvas = self.bank[place, torch.randint(VARIANTS, (n,), generator=g)].float() / 255
        return torch.where((torch.rand(n, generator=g) < .5)[:, None, None, None], canvas.flip(3), canvas)

    def cropped_canvas(self, place, g):
        """Empty places (B, 3, SIZE, SIZE) in [0, 1]: a crop of a random variant of each, half of them mirrored."""
        n = len(place)
        bank = backgrounds(2)[place, torch.randint(VARIANTS, (n,), generator=g)].float()
        zoom = 1 - .3 * self.freedom * torch.rand(n, generator=g)
        shift = (1 - zoom) * (2 * torch.rand(n, generator=g) - 1)  # sideways: the horizon stays within the scene's own range
        mirror = torch.where(torch.rand(n, generator=g) < .5, -1.0, 1.0)
        zero = torch.zeros(n)
        return look(bank, torch.stack([zoom * mirror, zero, shift, zero, zoom, zero], 1).view(n, 2, 3)) / 255  # a quarter of the pixels by now

    def empty(self, place, g):
        """Pictures (B, 3, SIZE, SIZE) in [0, 1] of places where nothing stands."""
        if not self.freedom:
            return self.canvas(place, g)
        return light(self.cropped_canvas(place, g), *self.freedom * LIGHT * (2 * torch.rand(4, len(place), generator=g) - 1)).clamp(0, 1)

    def extent(self, sprite, pixels, angle):
        """Half width and half height in pixels (B, 2) that sprites take up when drawn."""
        w, h = (self.box[sprite] * pixels[:, None] / 2).unbind(1)
        c, s = angle.cos().abs(), angle.sin().abs()
        return torch.stack([w * c + h * s, w * s + h * c], 1)

    def compose(self, canvas, place, sprite, subject, kind, rows, other, neighbour, g, mirror=True):
        """Pictures (B, 3, SIZE, SIZE) of subjects and, in some rows, neighbours: on empty canvases as they are told, or freely."""
        if self.freedom:
            return self.compose_freely(place, sprite, subject, kind, rows, other, neighbour, g, mirror)
        images = paint(canvas, *subject)
        return images.index_copy(0, rows, paint(images[rows], *neighbour)) if len(rows) else images

    def compose_freely(self, place, sprite, subject, kind, rows, other, neighbour, g, mirror=True):
        """Pictures (B, 3, SIZE, SIZE) in [0, 1] of subjects and, in some rows, neighbours, on their way to freedom 1.

        subject, neighbour: what `paint` takes (rgba, pixels, centre, angle, flip), as it is at freedom 0; each number is drawn
        at freedom 1 and mixed with the given one. kind (B,): row of RANGES; rows, other (K,): where neighbours stand, and which.
        """
        n, k, f = len(place), len(rows), self.freedom
        snap = whole_cells if self.cells else lambda v: v

        def middle(*shape):  # in [-1, 1], more often near 0
            return torch.rand(*shape, generator=g) + torch.rand(*shape, generator=g) - 1

        def pose(given, kind):
            rgba, pixels, centre, angle, flip = given
            low, high = torch.tensor(list(RANGES.values()), dtype=torch.float)[kind].unbind(1)
            free = low + (high - low) * torch.rand(len(kind), generator=g)
            again = torch.rand(len(kind), generator=g) < f * mirror
            flip = torch.where(again, torch.rand(len(kind), generator=g) < .5, flip)
            tilt = .4 * middle(len(kind))
            if self.cells:
                tilt = tilt * (torch.rand(len(kind), generator=g) < 1 / 3)
            return rgba, pixels, centre, angle, flip, snap(free), tilt

        rgba, pixels, centre, angle, flip, size, tilt = pose(subject, kind)
        half = self.extent(sprite, size, tilt)
        room = (SIZE / 2 - half).abs()  # to the border, or to the subject's own edge where it is larger than the picture
        out = torch.where(torch.rand(n, 1, generator=g) < .12, 1.0, 0.0) * .3 * half  # some are cut off by the border
        spot = (2 * torch.rand(n, 2, generator=g) - 1 + torch.tensor([0.0, .2])).clamp(-1, 1) * (room + out)  # rather low than high
        if k:
            rgba2, pixels2, centre2, angle2, flip2, size2, tilt2 = pose(neighbour, kind[rows])
            half2 = self.extent(other, size2, tilt2)
            fit = ((SIZE - 3) / 2 / (half[rows, 0] + half2[:, 0])).clamp(max=1)
            fit1, fit2 = snap(size[rows] * fit) / size[rows], snap(size2 * fit) / size2
            size = size.index_copy(0, rows, size[rows] * fit1)
            size2, h1, h2 = size2 * fit2, half[rows] * fit1[:, None], half2 * fit2[:, None]
            slack = SIZE - 3 - 2 * (h1 + h2)[:, 0]
            gap, left = 1 + .5 * slack * torch.rand(k, generator=g), torch.rand(k, generator=g)
            x1 = 1 + left * (slack + 1 - gap) + h1[:, 0] - SIZE / 2  # were it the left one
            apart = h1[:, 0] + gap + h2[:, 0]
            if self.cells:  # whole cells, as near as they can be
                apart = ((h1 + h2)[:, 0] / GRID - .1).ceil() * GRID
                x1 = snap(x1.clamp(h1[:, 0] - SIZE / 2).minimum(SIZE / 2 - apart - h2[:, 0]))
            side = centre[rows, 0].sign()  # -1: the subject stands left
            floor = SIZE / 2 - 5 - 14 * torch.rand(k, generator=g)
            y1, y2 = (torch.maximum(floor + 3 * middle(k) - h[:, 1], h[:, 1] + 1 - SIZE / 2) for h in (h1, h2))
            spot = spot.index_copy(0, rows, torch.stack([-side * x1, y1], 1))
            spot2 = torch.stack([-side * (x1 + apart), y2], 1)
        canvas = self.cropped_canvas(place, g)
        shadow = f * torch.cat([middle(n, 1) * .12, .03 + .08 * torch.rand(n, 1, generator=g), .4 * torch.rand(n, 1, generator=g)], 1)
        u = f * middle(4, n)
        stand = lambda given, free: snap((given * SIZE / 2).lerp(free, f)) * 2 / SIZE
        canvas = paint(canvas, rgba, snap(pixels.lerp(size, f)), stand(centre, spot), angle.lerp(tilt, f), flip, shadow)
        if k:
            drawn = paint(canvas[rows], rgba2, snap(pixels2.lerp(size2, f)), stand(centre2, spot2), angle2.lerp(tilt2, f), flip2, shadow[rows])
            canvas = canvas.index_copy(0, rows, drawn)
        return light(canvas, *LIGHT * u)

    def individuals(self, n, g, alike=False):
        """Two pictures each of n random individuals in different places, for instance discrimination.

        alike: half of them are dyed in one colour, so that only shape and marking tell those apart.
        Returns (2, n, 3, SIZE, SIZE) in [-1, 1].
        """
        sprite = torch.randint(len(self.entries), (n,), generator=g)
        coin = torch.rand(n, generator=g)
        colour = torch.randint(len(COLOURS), (n,), generator=g)
        colour = torch.where(coin < .5, colour[0], -1) if alike else torch.where(coin < .2, colour, -1)
        rgba = self.dress(sprite, g, colour, coin > .8)
        views = []
        for _ in range(2):
            pixels = 24 + 36 * torch.rand(n, generator=g)
            centre = (torch.rand(n, 2, generator=g) * 1.5 - .75) * (1 - pixels / SIZE)[:, None]
            u = torch.rand(2, n, generator=g)
            pose = pixels, centre, u[0] * .5 - .25, u[1] < .5
            place = torch.randint(len(PLACES), (n,), generator=g)
            if self.freedom:
                v = self.freedom * (2 * torch.rand(4, n, generator=g) - 1)
                shadow = self.freedom * torch.tensor([.04, .06, .2]).expand(n, 3)
                canvas = paint(self.cropped_canvas(place, g), rgba, *pose, shadow)
                views.append(light(canvas, *LIGHT * v))
            else:
                views.append(paint(self.canvas(place, g), rgba, *pose))
        return torch.stack(views).clamp(0, 1) * 2 - 1

    def sample(self, n, g, flat_share=.2):
        """n pictures with captions, all randomness from the generator g."""
        def chance(p):
            return torch.rand(n, generator=g) < p

        def uniform(low, high):
            return low + (high - low) * torch.rand(n, generator=g)

        def number(k):
            return torch.randint(k, (n,), generator=g)

        flat = chance(flat_share)
        noun, place = number(len(self.nouns)), number(len(PLACES))
        sprite = self.pick(noun, flat, g)
        flat = self.is_flat[sprite]
        medium = torch.where(chance(self.p["medium"]), 1 + number(3), 0)
        medium = torch.where(flat, FLAT, medium)
        beside = torch.where(chance(self.p["beside"]) & (medium != CLOSE_UP), number(len(self.nouns)), -1)
        two = beside >= 0
        size_word = torch.where(chance(self.p["size"]) & ~two & (medium != CLOSE_UP), 1 + number(2), 0)  # 0, small, big
        kind = torch.where(two, 4, torch.where(medium == CLOSE_UP, 3, size_word))  # row of SIZES
        pixels = torch.tensor(list(SIZES.values()), dtype=torch.float)[kind]
        colour = torch.where(chance(self.p["colour"]), number(len(COLOURS)), -1)
        spotted = chance(self.p["spotted"]) & (colour < 0)

        canvas = self.canvas(place, g)
        room = ((SIZE - pixels) / 2 / GRID).floor().clamp(max=1) * chance(self.p["shift"])  # cells to either side
        side = torch.where(chance(.5), -1.0, 1.0)
        x = torch.where(two, 2 * side, (uniform(-1.5, 1.5)).round() * room)
        y = torch.where(two, 1.0, (uniform(-1.5, 1.5)).round() * room)
        centre = torch.stack([x, y], 1) * 2 * GRID / SIZE

        def pose():  # tilt and mirror
            return torch.where(chance(self.p["tilt"]), uniform(-.2, .2), 0), chance(self.p["flip"])

        subject = self.dress(sprite, g, colour, spotted), pixels, centre, *pose()
        other_colour = torch.where(chance(self.p["colour"]), number(len(COLOURS)), -1)
        rows, neighbour, other = torch.where(two)[0], None, sprite[:0]
        if len(rows):
            other = self.pick(beside[rows], flat[rows], g)
            rgba = self.dress(other, g, other_colour[rows])
            neighbour = rgba, pixels[rows], centre[rows] * torch.tensor([-1.0, 1.0]), *(v[rows] for v in pose())
        say_place = chance(self.p["place"])
        images = self.compose(canvas, place, sprite, subject, kind, rows, other, neighbour, g)

        names = list(COLOURS)
        captions = []
        for i, (m, z, c, sp, b, oc, pl, say) in enumerate(zip(*(t.tolist() for t in (
                medium, size_word, colour, spotted, beside, other_colour, place, say_place)))):
            words = ["", "small ", "big "][z] + (names[c] + " " if c >= 0 else "spotted " if sp else "")
            text = f"{MEDIA[m]}{article(words + self.nouns[noun[i]])}"
            if b >= 0:
                text += " next to " + article((names[oc] + " " if oc >= 0 else "") + self.nouns[b])
            captions.append(text + (" " + PLACES[pl] if say else ""))
        return Batch(images.clamp(0, 1) * 2 - 1, captions, sprite, noun, place, colour, beside, side < 0)


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def words():
    """Every word that captions can hold, for the tokenizer (sorted)."""
    entries, _ = load_sprites(["pretrain"])
    text = " ".join(PLACES + MEDIA + [e["class"] for e in entries]) + " a an small big spotted next to and the with"
    return sorted(set(text.split()) | set(COLOURS))


PORTRAIT_PLACES = ["on the grass", "on a wooden floor", "in the city", "on a gray background", "on a purple background"]


VIEWS = [  # at freedom 1: pixels, centre in pixels, tilt; brightness, warmth, contrast, slope as in `light`; shadow's darkness
    (50, (2, 8), .06, .05, .03, .05, .10, .35), (38, (-9, 9), -.20, -.10, .08, .0, -.12, .25),
    (58, (1, -1), .12, -.03, -.03, .05, .05, .30), (44, (8, 4), -.10, -.16, -.02, .0, .15, .40),
    (32, (8, -8), .24, .02, .05, .05, -.10, .20)]


def portraits(name, n=5, seed=0, freedom=FREEDOM):
    """n reference pictures (n, 3, SIZE, SIZE) in [-1, 1] of one held-out individual, each in another place.

    At freedom 0 they are one pose, at 1 they are what a person's photos are: sizes, places, tilts and lights of VIEWS.
    Never mirrored: which eye has the patch is part of the individual.
    """
    world, g = World("held_out", freedom=freedom), torch.Generator().manual_seed(seed)
    sprite = torch.tensor([[e["name"] for e in world.entries].index(name)] * n)
    place = torch.tensor([PLACES.index(PORTRAIT_PLACES[i % len(PORTRAIT_PLACES)]) for i in range(n)])
    pixels = torch.full((n,), float(SIZES[""]))
    centre, still, upright = torch.zeros(n, 2), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    rgba = world.dress(sprite, g, jitter=False)
    if not freedom:
        return paint(world.canvas(place, g), rgba, pixels, centre, still, upright).clamp(0, 1) * 2 - 1
    size, spot, tilt, *lights, dark = (torch.tensor([VIEWS[i % len(VIEWS)][j] for i in range(n)], dtype=torch.float) for j in range(8))
    shadow = freedom * torch.stack([torch.full((n,), .05), torch.full((n,), .08), dark], 1)
    pose = whole_cells(pixels.lerp(size, freedom)), whole_cells(freedom * spot) * 2 / SIZE, freedom * tilt, upright
    picture = paint(world.cropped_canvas(place, g), rgba, *pose, shadow)
    return light(picture, *(freedom * v for v in lights)).clamp(0, 1) * 2 - 1


def illustrate(name, templates, g, freedom=FREEDOM):
    """What templates such as "a red {} next to a ball at night" ask of one held-out individual, drawn by the world itself.

    Returns (len(templates), 3, SIZE, SIZE) in [-1, 1]; where no place is named, any.
    """
    world = World("pretrain+held_out", freedom=freedom)
    n, kind, beside = len(templates), [], []
    sprite = torch.tensor([[(e["name"], e["split"]) for e in world.entries].index((name, "held_out"))] * n)
    place, colour = torch.randint(len(PLACES), (n,), generator=g), torch.full((n,), -1)
    for i, t in enumerate(templates):
        place[i] = next((k for k, p in enumerate(PLACES) if t.endswith(p)), place[i])
        colour[i] = next((k for k, c in enumerate(COLOURS) if f"{c} {{}}" in t), -1)
        beside.append(next((k for k, w in enumerate(world.nouns) if re.search(f"next to an? {w}\\b", t)), -1))
        kind.append(list(SIZES).index("beside" if beside[i] >= 0 else next((k for k in ("small", "big", "close-up") if k in t), "")))
    beside, kind = torch.tensor(beside), torch.tensor(kind)
    pixels = torch.tensor(list(SIZES.values()), dtype=torch.float)[kind]
    two, still, upright = beside >= 0, torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    centre = torch.where(two[:, None], torch.tensor([2.0, 1.0]) * 2 * GRID / SIZE, 0)
    rgba = world.dress(sprite, g, colour, torch.tensor(["spotted" in t for t in templates]), jitter=False)
    canvas = world.canvas(place, g)
    seen = torch.tensor([e["split"] == "pretrain" for e in world.entries])  # by every model and judge, as a neighbour has to be
    world.by_noun = [[k[seen[k]] for k in styles] for styles in world.by_noun]
    neighbour = world.pick(beside.clamp(min=0), upright, g)
    other = world.dress(neighbour, g)
    rows = torch.where(two)[0]
    second = other[rows], pixels[rows], (centre * torch.tensor([-1.0, 1.0]))[rows], still[rows], upright[rows]
    subject = rgba, pixels, centre, still, upright
    return world.compose(canvas, place, sprite, subject, kind, rows, neighbour[rows], second, g, mirror=False).clamp(0, 1) * 2 - 1


if __name__ == "__main__":
    import argparse
    import sys
    import time
    sys.path.insert(0, str(HERE.parents[1]))
    from data.images import grid, save_png, to_pil
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--subject", help='write five reference pictures of a held-out individual, for example "dog face"')
    p.add_argument("--freedom", type=float, default=FREEDOM, help="of geometry and light, from 0 to 1")
    p.add_argument("--output", default=str(HERE / "work" / "world"), help="folder to write to")
    args = p.parse_args()
    if args.subject:
        for i, picture in enumerate(to_pil(portraits(args.subject, freedom=args.freedom))):
            save_png(picture, Path(args.output) / f"{i:02d}.png")
    else:
        torch.set_num_threads(1)
        world, g = World(freedom=args.freedom), torch.Generator().manual_seed(0)
        world.sample(64, g)
        start = time.perf_counter()
        for _ in range(20):
            batch = world.sample(64, g)
        print(f"{20 * 64 / (time.perf_counter() - start):.0f} images/s on one thread")
        save_png(grid([("", row) for row in batch.images.split(8)]), Path(args.output) / "world.png")
        print("\n".join(batch.captions))
