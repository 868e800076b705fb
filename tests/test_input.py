"""Bad input is answered with one sentence and exit code 2, before any model is loaded. python -m pytest tests/test_input.py"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import ROOT, exit_of
from data.images import load_photos


@pytest.fixture
def no_models(monkeypatch):
    for script in (train, sample):
        monkeypatch.setattr(script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))


def picture(mode="RGB", size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


BAD = [
    (["--concept", "nowhere"], "nowhere"), (["--concept", "empty"], "empty"), (["--concept", "broken"], "broken.png"),
    (["--concept", "text"], "text"), (["--concept", "dog/00.png"], "00.png"),
    (["--concept", "dog", "--max_train_steps", "0"], "--max_train_steps"), (["--concept", "dog", "--train_batch_size", "-1"], "--train_batch_size"),
    (["--concept", "dog", "--student_lr", "-1"], "--student_lr"), (["--concept", "dog", "--student_lr", "nan"], "--student_lr"),
    (["--concept", "dog", "--max_grad_norm", "0"], "--max_grad_norm"), (["--concept", "dog", "--student", "1"], "--student"),
    (["--concept", "dog", "--echo_keep", "2"], "--echo_keep"), (["--concept", "dog", "--token", "two words"], "--token"),
    (["--concept", "dog", "--token", "dog"], "--token"), (["--concept", "dog", "--class_word", " "], "--class_word"),
    (["--concept", "dog", "--base", "nonesuch"], "--base"), (["--concept", "dog", "--device", "abacus"], "--device"),
    (["--concept", "dog", "--unknown_flag", "1"], "--unknown_flag"), (["--concept", "dog", "--train_unet", "some"], "--train_unet"),
    (["--concept", "dog", "--resume_from_checkpoint", "gone"], "gone"), (["--concept", "dog", "--output_dir", "dog/00.png"], "--output_dir"),
]


@pytest.mark.parametrize("argv, named", BAD, ids=[" ".join(a[1:]) for a, _ in BAD])
def test_train_refuses(argv, named, concept, no_models, capsys):
    for name in ("empty", "broken", "text"):
        Path(name).mkdir()
    Path("broken/broken.png").write_bytes((concept / "00.png").read_bytes()[:500])
    Path("text/readme.txt").write_text("no image")
    code, said = exit_of(train.main, argv, capsys)
    assert code == 2 and named in said and "Traceback" not in said
    assert not Path("out").exists()


@pytest.mark.parametrize("argv, named", [
    (["--prompt", "  "], "--prompt"), (["--prompt", "a dog"], "train.py"), (["--prompt", "a dog", "--run", "nowhere"], "nowhere"),
    (["--prompt", "a dog", "--num_images", "0"], "--num_images"), (["--prompt", "a dog", "--steps", "3"], "--steps"), ([], "--prompt"),
    (["--prompt", "a dog", "--run", "half"], "half")])
def test_sample_refuses(argv, named, no_models, capsys):
    Path("half").mkdir()
    Path("half/config.json").write_text('{"format": "echodis')
    code, said = exit_of(sample.main, argv, capsys)
    assert code == 2 and named in said


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("LA", "png")])
def test_every_kind_of_image_is_read(mode, suffix):
    Path("photos").mkdir()
    if mode == "I;16":
        Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save("photos/a.png")
    else:
        picture(mode).save(f"photos/a.{suffix}")
    x = load_photos("photos", 32)
    assert x.shape == (1, 3, 32, 32) and x.isfinite().all() and x.std() > .05 and x.abs().max() <= 1


def test_exif_turns_a_photo_upright():
    Path("photos").mkdir()
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # white above; EXIF says that the top of the scene is the right-hand side
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees clockwise to show
    image.save("photos/a.jpg", exif=exif, quality=95)
    x = load_photos("photos", 32)[0]
    assert x[:, :, 24:].mean() > .9 and x[:, :, :8].mean() < -.9


def test_hidden_and_foreign_files_are_passed_over(concept):
    (concept / ".hidden.png").write_bytes(b"no image")
    (concept / "notes.txt").write_text("no image")
    assert len(load_photos(concept, 16)) == 5


def test_one_photo_is_enough_to_train(concept):
    for p in sorted(concept.iterdir())[1:]:
        p.unlink()
    from conftest import train as run
    assert (run("--max_train_steps", 1, "--echo_steps", 0) / "config.json").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_help_is_printed(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], check=True, capture_output=True, text=True)
    assert "--device" in done.stdout


def test_every_flag_of_train_has_a_sentence_and_is_read():
    source = (ROOT / "train.py").read_text().split("def parse_arguments")[1]
    for action in train.parser()._actions:
        assert action.help, action.dest
        assert action.dest == "help" or f"args.{action.dest}" in source, f"--{action.dest} is never read"


def test_size_augmentation_never_has_an_empty_mask_and_says_what_it_did():
    args = train.argparse.Namespace(flip=True, size_augmentation=True)
    photos = train.Photos(torch.ones(2, 3, 64, 64), args)
    x, mask, said = photos.batch(64, torch.Generator().manual_seed(0))
    assert set(said) == {"", "small", "big"} and (mask.sum((1, 2, 3)) > 100).all()
    for image, m, word in zip(x, mask, said):
        assert (m.min() == 0) == (word == "small") and (image * (1 - m) == 0).all() and torch.allclose(image * m, m.expand_as(image), atol=1e-5)
