"""The emoji world keeps its promises. python -m pytest tests/test_world.py"""
import json

import pytest
import torch

import world as module
from conftest import ROOT
from world import COLOURS, PLACES, SCENES, SIZE, SIZES, World, illustrate, paint, portraits, words


@pytest.fixture(scope="module")
def world():
    return World("pretrain")


def test_the_same_generator_gives_the_same_pictures_and_captions(world):
    a, b = (world.sample(16, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.images, b.images) and a.captions == b.captions
    assert not torch.equal(a.images, world.sample(16, torch.Generator().manual_seed(4)).images)


def test_pictures_lie_in_range_and_captions_in_the_grammar(world):
    batch = world.sample(256, torch.Generator().manual_seed(0))
    assert batch.images.shape == (256, 3, 64, 64) and batch.images.abs().max() <= 1
    known = set(words())
    for caption, noun in zip(batch.captions, batch.noun.tolist()):
        assert set(caption.split()) <= known and world.nouns[noun] in caption


def test_it_has_the_scenes_the_colours_and_the_second_objects(world):
    assert len(SCENES) >= 12 and len(COLOURS) >= 10
    text = " | ".join(world.sample(2000, torch.Generator().manual_seed(1)).captions)
    for part in [*PLACES, "next to", "a blue ", "spotted", "flat drawing of", "close-up", "small", "big"]:
        assert part in text, part


def test_held_out_subjects_are_another_artists_and_pretraining_never_loads_them(world):
    entries = json.loads((ROOT / "data/emoji/sprites.json").read_text(encoding="utf-8"))
    held = [e for e in entries if e["split"] == "held_out"]
    assert len(held) >= 40 and {e["style"] for e in held} == {"noto"}
    assert {e["style"] for e in entries if e["split"] != "held_out"} == {"3d", "flat"}
    assert {e["class"] for e in held} <= set(world.nouns)
    assert all(e["split"] == "pretrain" for e in world.entries)
    assert sum(e["live"] for e in held) >= 9


def test_two_views_of_an_individual_differ_in_place_only(world):
    a, b = world.individuals(8, torch.Generator().manual_seed(0))
    assert a.shape == (8, 3, 64, 64) and not torch.equal(a, b)


def test_portraits_are_the_default_concept():
    from data.images import load_photos
    assert (portraits("dog face") - load_photos(ROOT / "data/dog", 64)).abs().max() <= 1 / 127


# ---------------------------------------------------------------------------------------------------------------
# Freedom: what no caption names.

FIRST = ["a doughnut on a black background", "a truck in space"]  # of the first pair's world, which knew of no freedom; seed 0
SECOND = ["a picture of a red rabbit on a pink background", "a flat drawing of a turtle in front of a brick wall"]
MEANS = [.3926, -.1405, .0549, -.0904]


@pytest.fixture
def drawn(monkeypatch):
    """draw(n, seed, freedom, cells, **p) -> (batch, silhouettes [(n, 64, 64), ...], poses) of each call of `paint`."""
    def draw(n, seed, freedom, cells=False, **p):
        masks, poses = [], []

        def record(canvas, rgba, pixels, centre, angle, flip, shadow=None):
            white = torch.cat([torch.ones_like(rgba[:, :3]), rgba[:, 3:]], 1)
            masks.append(paint(torch.zeros_like(canvas), white, pixels, centre, angle, flip)[:, 0])
            poses.append((pixels, centre, angle, flip))
            return paint(canvas, rgba, pixels, centre, angle, flip, shadow)
        monkeypatch.setattr(module, "paint", record)
        batch = World("pretrain", dict(World.P, **p), freedom, cells).sample(n, torch.Generator().manual_seed(seed))
        return batch, masks, poses
    return draw


def box(mask):
    """Left, top, right, bottom of a silhouette (64, 64)."""
    rows, columns = (torch.where((mask > .5).any(d))[0] for d in (1, 0))
    return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


def test_without_freedom_the_world_is_the_one_that_the_first_pair_was_trained_in():
    world, g = World("pretrain", freedom=0.), torch.Generator().manual_seed(0)
    first, second = world.sample(4, g), world.sample(4, g)
    assert first.captions[:2] == FIRST and second.captions[:2] == SECOND
    assert (second.images.mean((1, 2, 3)) - torch.tensor(MEANS)).abs().max() < 1e-3


@pytest.mark.parametrize("cells", [False, True])
def test_freedom_changes_pictures_and_no_caption(cells):
    free, bound = (World("pretrain", None, f, cells).sample(64, torch.Generator().manual_seed(0)) for f in (1., 0.))
    assert free.captions == bound.captions and free.images.abs().max() <= 1
    assert ((free.images - bound.images).abs().mean((1, 2, 3)) > .01).all()


def test_a_little_freedom_changes_little(world):
    g = lambda: torch.Generator().manual_seed(0)
    far, near, upright = (World("pretrain", {"flip": 0.}, f, cells=False).sample(64, g()) for f in (1., .02, 0.))
    assert (near.images - upright.images).abs().mean() < .5 * (far.images - upright.images).abs().mean()


def test_in_freedom_size_place_tilt_and_mirror_vary(drawn):
    _, masks, [(pixels, centre, angle, flip)] = drawn(400, 0, 1., beside=0., medium=0., size=0.)
    assert pixels.std() > 4 and centre.std(0).min() > .15 and angle.std() > .1 and angle.abs().max() < .45
    assert .4 < flip.float().mean() < .6
    assert torch.quantile(masks[0].mean((1, 2)), .02) > .04  # and nobody is lost beyond the border


def test_in_freedom_the_light_varies_and_colours_keep_their_names():
    p = dict.fromkeys(World.P, 0.) | {"place": 1.}
    a, b = (World("pretrain", p, f).sample(400, torch.Generator().manual_seed(0)) for f in (0., 1.))
    corner = b.images[..., :6, :6].mean((2, 3))
    on_red = corner[a.place == PLACES.index("on a red background")]
    assert on_red.std(0).max() > .05  # not one red
    assert (on_red[:, 0] > on_red[:, 1] + .5).all()  # but red


def test_in_freedom_small_is_small_and_still_something_and_big_is_big(drawn):
    batch, [masks], _ = drawn(600, 0, 1., beside=0., medium=0., size=.7)
    sides = [max(r - l, b - t) for l, t, r, b in map(box, masks)]
    by_word = {w: [s for s, c in zip(sides, batch.captions) if w in c.split()] for w in ("small", "big")}
    assert 17 <= min(by_word["small"]) and max(by_word["small"]) <= 34
    assert sum(by_word["big"]) / len(by_word["big"]) > 50


def test_in_freedom_of_whole_cells_sizes_and_places_are_cells_and_both_vary(drawn):
    _, masks, [(pixels, centre, angle, flip)] = drawn(400, 0, .7, True, beside=0., medium=0., tilt=0.)
    assert (pixels % 8 == 0).all() and len(pixels.unique()) >= 4
    assert (centre * 32 % 8 == 0).all() and centre.std(0).min() > .1
    assert .2 < (angle != 0).float().mean() < .45 and .2 < flip.float().mean() < .6
    assert torch.quantile(masks[0].mean((1, 2)), .02) > .03


@pytest.mark.parametrize("freedom, cells", [(.5, False), (1., False), (.7, True)])
def test_in_freedom_neighbours_are_both_whole_and_both_large_enough_to_be_recognised(drawn, freedom, cells):
    batch, (subjects, neighbours), _ = drawn(200, 0, freedom, cells, beside=1., medium=0.)
    assert all("next to" in c for c in batch.captions)
    assert (subjects * neighbours).amax((1, 2)).max() < .6  # at most the soft outlines touch
    for masks in (subjects, neighbours):
        border = torch.cat([masks[:, 0], masks[:, -1], masks[..., 0], masks[..., -1]], 1)
        assert cells or border.max() < (.5 if freedom == 1 else .9)  # at 0 they stand one pixel from it, and tilt; of cells at it
        sides = [max(r - l, b - t) for l, t, r, b in map(box, masks)]
        assert min(sides) >= 17 and sum(sides) / len(sides) > 26


def test_free_portraits_differ_in_size_place_tilt_and_light_and_show_the_same_side(monkeypatch):
    poses = []
    monkeypatch.setattr(module, "paint", lambda *a: poses.append(a[2:6]) or paint(*a))
    pictures = portraits("dog face", freedom=1.)
    [(pixels, centre, angle, flip)] = poses
    assert pictures.shape == (5, 3, SIZE, SIZE) and pictures.abs().max() <= 1
    assert pixels.max() > 1.5 * pixels.min() and len(set(map(tuple, centre.tolist()))) == len(set(angle.tolist())) == 5
    assert not flip.any()
    assert ((pixels / SIZE + centre.abs().amax(1)) < 1.1).all()  # wholly or nearly so in the picture


def test_the_range_of_each_word_lies_around_or_beside_its_size():
    for word, (low, high) in module.RANGES.items():
        assert low < high and (word in ("close-up", "beside") or low <= SIZES[word] <= high)


def test_free_illustrations_hold_what_the_templates_ask_and_are_never_mirrored(monkeypatch):
    poses, templates = [], ["a small {} at night", "a {} next to a ball on the beach", "a big {} in the snow"]
    monkeypatch.setattr(module, "paint", lambda *a: poses.append(a[2:6]) or paint(*a))
    pictures = illustrate("dog face", templates, torch.Generator().manual_seed(0), freedom=1.)
    (pixels, centre, _, flip), (_, beside, _, other_flip) = poses
    assert pictures.shape == (3, 3, SIZE, SIZE) and pictures[0].mean() < pictures[2].mean() - .5  # night, snow
    assert pixels[0] <= 32 and pixels[2] >= 56 and not flip.any() and not other_flip.any()
    assert centre[1, 0] * beside[0, 0] < 0 or abs(centre[1, 0] - beside[0, 0]) > .5


def test_the_neighbour_of_an_illustration_is_one_that_the_pair_has_seen(monkeypatch):
    drawn = []
    monkeypatch.setattr(World, "dress", lambda self, sprite, *a, real=World.dress, **k: drawn.append([self.entries[i]["split"] for i in sprite]) or real(self, sprite, *a, **k))
    illustrate("dog face", ["a {} next to a cat"] * 8, torch.Generator().manual_seed(0))  # a cat is held out, too
    assert drawn == [["held_out"] * 8, ["pretrain"] * 8]


@pytest.mark.parametrize("freedom", [0., .7])
def test_an_empty_place_is_that_place(freedom):
    night, snow = World(freedom=freedom).empty(torch.tensor([PLACES.index("at night"), PLACES.index("in the snow")]), torch.Generator().manual_seed(0))
    assert night.mean() < .4 < .7 < snow.mean() and 0 <= night.min() and snow.max() <= 1
