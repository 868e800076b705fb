"""Drawing as a user does it: prompts, names, grids, remarks. python -m pytest tests/test_sample.py"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT, exit_of, train
from data.base import load_pair, load_tokenizer, unknown_words
from data.images import add_png
from data.run import load_run
from model import draw


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A short run, made once."""
    here, folder = os.getcwd(), tmp_path_factory.mktemp("taught")
    shutil.copytree(ROOT / "data/dog", folder / "dog")
    os.chdir(folder)
    try:
        return folder / train("--max_train_steps", 2, "--echo_steps", 0)
    finally:
        os.chdir(here)


@pytest.fixture
def run(taught):
    """A private copy of it, at out/dog."""
    return Path(shutil.copytree(taught, "out/dog"))


def says(capsys, *argv):
    sample.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_the_untouched_pair_draws_in_a_fresh_clone(capsys, pair):
    said = says(capsys, "--base", "emoji", "--prompt", "a <v> dog in a spacesuit", "a cat in space", "--num_images", 2, "--seed", 3)
    assert said.count("the emoji base does not know 'spacesuit'") == 1 and "<v> is dropped" in said and said.count("note: ") == 2
    names = {p.name for p in Path("out/base-emoji/samples").iterdir()}
    assert names == {"2-prompts-grid.png", *(f"{w}-seed{s}.png" for w in ("a-dog-in-a-spacesuit", "a-cat-in-space") for s in (3, 4))}
    single = np.asarray(Image.open("out/base-emoji/samples/a-cat-in-space-seed4.png")).astype(int)
    ours = ((draw(pair, "a cat in space", [4])[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(single, ours), "a pair of one network draws what the whole pair draws"


def test_several_prompts_and_a_file_of_them_become_rows_and_seeds_become_columns(run, capsys):
    Path("list.txt").write_text("\ufeffa <v> dog at night\n\n  a dog  \n", encoding="utf-8")
    said = says(capsys, "--prompt", "a <v> dog", "--prompt", "a <v> cat", "--prompt_file", "list.txt", "--num_images", 3)
    assert said.count("note: ") == 1 and "'a dog' does not hold <v>, so the concept of out/dog is not in it" in said
    sheet = Image.open("out/dog/samples/4-prompts-grid.png")
    assert sheet.height == 16 + 4 * 128 and (sheet.width - 3 * 128) > 0
    assert sheet.text["prompt"].split("\n") == ["a <v> dog", "a <v> cat", "a <v> dog at night", "a dog"]
    for column in range(3):
        picture = Image.open(f"out/dog/samples/a-v-cat-seed{column}.png")
        left = sheet.width - (3 - column) * 128
        assert sheet.crop((left, 16 + 128, left + 128, 16 + 256)).tobytes() == picture.resize((128, 128), Image.NEAREST).tobytes()


def test_every_picture_says_how_it_was_drawn(run, capsys):
    says(capsys, "--prompt", "a <v> dog \u2603", "--num_images", 1, "--seed", 7, "--steps", 2)
    text = Image.open(*Path("out/dog/samples").glob("a-v-dog-*-2steps-seed7.png")).text
    assert text == {"prompt": "a <v> dog \u2603", "seed": "7", "steps": "2", "model": "student", "base": "emoji", "run": "out/dog"}


def test_nothing_is_overwritten_and_nothing_written_twice(run, capsys):
    folder = Path("out/dog/samples")
    left_by_train = Image.open(folder / "a-v-dog-seed0.png").tobytes()
    says(capsys, "--prompt", "a <v> dog", "--num_images", 2)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert Image.open(folder / "a-v-dog-seed0.png").tobytes() == left_by_train and "a-v-dog-seed0-2.png" not in first
    says(capsys, "--prompt", "a <v> dog", "--num_images", 2)
    assert first == {p.name: p.read_bytes() for p in folder.iterdir()}, "the same call again changes nothing"
    says(capsys, "--prompt", "a <v>, dog!", "\u72ac <v>", "\u732b <v>", "--num_images", 2)
    second = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert first.items() <= second.items() and len(second.keys() - first.keys()) == 7  # each in a file of its own, and a grid
    Image.new("RGB", (64, 64)).save(folder / "a-v-cat-seed0.png")
    for _ in range(2):
        says(capsys, "--prompt", "a <v> cat", "--num_images", 1)
    third = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert third.keys() - second.keys() == {"a-v-cat-seed0.png", "a-v-cat-seed0-2.png", "a-v-cat-grid.png"}
    assert Image.open(folder / "a-v-cat-seed0.png").getextrema() == ((0, 0),) * 3, "another's picture of that name stays"


def test_compare_shows_photos_untouched_student_and_teacher_in_one_grid(run, capsys):
    says(capsys, "--compare", "--prompt", "a <v> dog on the beach", "--num_images", 2, "--output_dir", "compared")
    sheet = Image.open("compared/a-v-dog-on-the-beach-compare-grid.png")
    assert sheet.height == 4 * 128
    left = sheet.width - 5 * 128
    photo = Image.open(ROOT / "data/dog/00.png").convert("RGB").resize((64, 64), Image.LANCZOS).resize((128, 128), Image.NEAREST)
    assert np.abs(np.asarray(sheet.crop((left, 0, left + 128, 128))).astype(int) - np.asarray(photo)).max() <= 1
    pair = load_pair("emoji", "<v>", "dog")
    untouched = draw(pair, "a dog on the beach", [1])
    load_run(run, pair)
    rows = [untouched, draw(pair, "a <v> dog on the beach", [1]), draw(pair, "a <v> dog on the beach", [1], True, 16, 2.5)]
    for y, image in enumerate(rows, 1):
        shown = sheet.crop((left + 128, 128 * y, left + 256, 128 * (y + 1))).resize((64, 64), Image.NEAREST)
        assert np.array_equal(np.asarray(shown), ((image[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("argv, named", [
    (["--prompt_file", "gone.txt"], "--prompt_file gone.txt"), (["--prompt_file", "empty.txt"], "empty.txt holds no prompt"),
    (["--prompt_file", "dog.png"], "--prompt_file dog.png"), (["--prompt", "a", "--live"], "--live"), (["--prompt", "a", " "], "--prompt is empty"),
    (["--base", "emoji", "--live", "--teacher"], "--teacher does nothing beside --live"), (["--base", "emoji", "--compare", "--prompt", "a"], "--run"), (["--base", "nonesuch", "--prompt", "a"], "--base nonesuch")], ids=str)
def test_prompts_that_cannot_be_read_are_refused_in_one_sentence(argv, named, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_pair", lambda *a, **k: pytest.fail("a model was loaded first"))
    Path("empty.txt").write_text("\n \n")
    shutil.copy(ROOT / "data/dog/00.png", "dog.png")
    code, said = exit_of(sample.main, argv, capsys)
    assert code == 2 and named in said


def test_a_stop_keeps_the_pictures_that_are_drawn(monkeypatch):
    calls = []

    def interrupted(pair, prompt, seeds, *more):
        calls.append(list(seeds))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(pair, prompt, seeds, *more)
    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--base", "emoji", "--prompt", "a dog", "--num_images", "11"])
    assert calls == [[*range(8)], [8, 9, 10]] and len(list(Path("out/base-emoji/samples").glob("a-dog-seed*.png"))) == 8


def test_a_grid_too_large_for_pillow_to_open_again_gets_another_name(monkeypatch):
    for color in ("red", "blue"):
        add_png(Image.new("RGB", (40, 40), color), Path("grid.png"), {})
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert Path("grid.png").is_file() and Path("grid-2.png").is_file()


def test_only_a_small_vocabulary_is_said_to_lack_a_word():
    tokenizer = load_tokenizer(ROOT / "data/emoji/base/teacher")
    assert unknown_words(tokenizer, "A close-up photo of a Dog, next to a spacesuit and a spacesuit 7!") == ["spacesuit"]

    class Large:
        def get_vocab(self):
            return dict.fromkeys(map(str, range(49408)))
    assert unknown_words(Large(), "a spacesuit") == []


def test_every_scene_and_noun_of_the_world_is_known():
    import json
    import world
    tokenizer = load_tokenizer(ROOT / "data/emoji/base/teacher")
    prompts = json.loads((ROOT / "data/prompts.json").read_text(encoding="utf-8"))["emoji"]
    for text in (*world.PLACES, *world.MEDIA, *(p for part in prompts.values() for p in part)):
        assert unknown_words(tokenizer, text.replace("{}", "dog")) == [], text
