"""The emoji world keeps its promises. python -m pytest tests/test_world.py"""
import json

import pytest
import torch

from conftest import ROOT
from world import COLOURS, PLACES, SCENES, World, portraits, words


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
