"""Several concepts, over one or several processes; what a run says and leaves for people. python -m pytest tests/test_many.py"""
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import train as train_script
from conftest import ROOT, exit_of, train
from data.images import photo_paths
from data.many import share
from data.recipe import read_toml

SHORT = ["--max_train_steps", "2", "--echo_steps", "0", "--preview_steps", "0", "--log_steps", "1"]


def concepts(*names):
    for i, name in enumerate(names):
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        for photo in sorted((ROOT / "data/dog").glob("*.png"))[i:i + 2]:
            shutil.copy(photo, folder)
    return [f"photos/{name}" for name in names]


def files(run):
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(Path(run).rglob("*")) if p.is_file()}


def test_of_several_concepts_each_equals_a_run_alone_and_the_same_command_goes_on_after_a_stop(quick_pictures, capsys, monkeypatch):
    dog, cat, hat = concepts("dog", "cat", "hat")
    Path("photos/notes.txt").write_text("no concept")
    train_script.main(["--concept", cat, *SHORT])
    alone = files("out/cat")
    shutil.rmtree("out")
    capsys.readouterr()
    count, loss = [], train_script.losses.reconstruction

    def press(*values):  # Ctrl-C in the first iteration
        count.append(0)
        if len(count) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*values)
    command = ["--concept", cat, dog, hat, "photos/notes.txt", *SHORT]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [c for c, _ in share(command)] == [dog], "the other process's share"
    monkeypatch.setenv("RANK", "0")
    with monkeypatch.context() as patch:
        patch.setattr(train_script.losses, "reconstruction", press)
        with pytest.raises(SystemExit) as stop:
            train_script.main(command)
    said = capsys.readouterr().out
    assert stop.value.code == 130 and "the same command as before goes on" in said and "no folders: 'photos/notes.txt'" in said
    assert [c for c, _ in share(command)] == [cat, hat] and "latest" in share(command)[0][1] and "latest" not in share(command)[1][1]
    command.remove(hat)
    train_script.main(command)
    assert "resumed out/cat/checkpoints" in capsys.readouterr().out and files("out/cat") == alone
    train_script.main(command)
    assert "out/cat is finished and passed over" in capsys.readouterr().out and files("out/cat") == alone


@pytest.mark.slow
def test_two_processes_of_torchrun_train_what_runs_alone_train():
    names = concepts("dog", "cat", "owl")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), "--concept", *names, *SHORT], check=True)
    together = {name: files(f"out/{name}") for name in ("dog", "cat", "owl")}
    shutil.rmtree("out")
    for name in names:
        train_script.main(["--concept", name, *SHORT])
        assert files(f"out/{Path(name).name}") == together[Path(name).name]


def test_torchrun_gives_each_process_its_own_concepts():
    concepts("dog", "cat", "owl")
    Path("show.py").write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom data.many import share\n"
                               "open(f'said{os.environ[\"RANK\"]}', 'w').write(' '.join(c for c, _ in share()))\n")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "show.py", "--concept", "photos/cat", "photos/dog", "photos/owl"],
                   check=True, capture_output=True, timeout=120)
    assert Path("said0").read_text() == "photos/cat photos/owl" and Path("said1").read_text() == "photos/dog"


def test_a_concept_that_cannot_be_trained_does_not_stop_the_others(capsys, monkeypatch):
    good, bad = concepts("good", "bad")
    Path(bad, "broken.png").write_bytes(b"no image")
    trained = []
    monkeypatch.setattr(train_script, "build", lambda args, device: trained.append(args.output_dir) or sys.exit(2))  # far enough
    code, said = exit_of(train_script.main, ["--concept", bad, good, "--output_dir", "runs", *SHORT], capsys)
    assert code == 2 and trained == ["runs/good"] and said.startswith("error: not trained: photos/bad, photos/good")
    code, said = exit_of(train_script.main, ["--concept", good, f"./{good}"], capsys)
    assert code == 2 and "are called good" in said
    code, said = exit_of(train_script.main, ["--concept", *Path(good).iterdir()], capsys)
    assert code == 2 and "folder that holds the photos" in said


def test_previews_hold_the_validation_prompts_and_tensorboard_is_told(concept, monkeypatch, capsys):
    told = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            told.append(("folder", str(folder), purge_step))

        def __getattr__(self, name):
            return lambda *values, **more: told.append((name, *(values[::2] if name == "add_scalar" else values)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(train_script, "find_spec", lambda name: True)
    Path("out/dog/tensorboard").mkdir(parents=True)
    Path("out/dog/tensorboard/events.of.another.run").touch()
    run = train("--max_train_steps", 8, "--echo_steps", 0, "--validation_prompt", "a <v> dog in a hat", "a {} upside down", "--report_to", "tensorboard", "--preview_steps", 8)
    assert Image.open(run / "preview.png").size[0] > 10 * 128
    assert told[0] == ("folder", "out/dog/tensorboard", None) and {("add_scalar", "alignment", i) for i in range(1, 9)} <= {t for t in told if len(t) == 3}
    assert [t[0] for t in told if t[0] in ("add_image", "close")] == ["add_image", "close"] and not Path("out/dog/tensorboard/events.of.another.run").exists()
    said = capsys.readouterr().out
    assert len(re.findall(r"about [\d.]+ minutes to go, \S+ s an iteration; .* out/dog gets .*preview.png", said)) == 1
    assert json.loads((run / "config.json").read_text())["flags"]["validation_prompt"] == ["a <v> dog in a hat", "a {} upside down"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is here")
def test_without_tensorboard_one_sentence_says_so(concept, capsys):
    code, said = exit_of(train_script.main, ["--concept", "dog", "--report_to", "tensorboard"], capsys)
    assert code == 2 and "pip install tensorboard" in said


def test_tensorboards_own_reader_finds_the_curves(concept):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train("--max_train_steps", 2, "--echo_steps", 0, "--preview_steps", 2, "--report_to", "tensorboard")
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    log = json.loads((run / "log.json").read_text())
    assert [e.value for e in events.Scalars("alignment")] == pytest.approx([row["alignment"] for row in log])
    assert events.Tags()["images"] == ["preview"]


def test_a_runs_card_holds_photos_settings_and_licence(concept):
    run = train("--max_train_steps", 1, "--echo_steps", 0, "--lr_decay", .5)
    card, teachers = (run / "README.md").read_text(), (run / "teacher/README.md").read_text()
    assert "![the photos](photos.png)" in card and "photos.png" not in teachers
    usual = read_toml(ROOT / "data/emoji/recipe.toml")["recipe"]
    assert f"Settings: `max_train_steps` 1 ({usual['max_train_steps']}), `lr_decay` 0.5 ({usual['lr_decay']}), `echo_steps` 0 ({usual['echo_steps']}); in" in card
    assert "Noto Emoji Apache-2.0" in card and "load_textual_inversion" in card


@pytest.mark.parametrize("large", [False, True])
def test_of_photographs_the_emoji_base_says_once_what_it_can_do(large, concept, monkeypatch, capsys):
    if large:
        Image.new("RGB", (1640, 480)).save("dog/large.jpg")
    monkeypatch.setattr(train_script, "Progress", lambda *a: sys.exit(0))  # far enough
    with pytest.raises(SystemExit):
        train_script.main(["--concept", "dog", "--class_word", "robot"])
    said = capsys.readouterr().out
    assert said.count("--base sd-turbo") == said.count("dog/large.jpg, 1640 x 480 pixels, only the middle") == large and said.count("the emoji base does not know 'robot'") == 1


def test_a_heic_photo_is_read_where_pillow_heif_is_there(concept, monkeypatch):
    (concept / "IMG_1.HEIC").write_bytes(b"....ftypheic")
    called = []
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=lambda: called.append(1)))
    assert "IMG_1.HEIC" in [p.name for p in photo_paths(concept)] and called
