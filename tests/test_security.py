"""Nothing is unpickled, no socket is opened, no code or path of a downloaded file is followed. python -m pytest tests/test_security.py"""
import json
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

import evaluate as evaluate_script
import sample as sample_script
from conftest import ROOT, train
from data.base import load_encoders, load_pair
from test_input import run_folder

SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("kernels/*.py")]


def test_training_drawing_scoring_and_exporting_open_no_socket_and_unpickle_nothing(concept, monkeypatch, pair, encoders, quick_pictures):
    def forbidden(*args, **more):
        raise AssertionError("forbidden")
    for module, names in ((socket, ("socket", "create_connection", "getaddrinfo")), (pickle, ("load", "loads", "Unpickler", "dump", "dumps", "Pickler")),
                          (torch, ("load", "save"))):  # the fixtures have imported every library, some of which pickle as they are imported
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    run = train("--max_train_steps", 1, "--echo_steps", 1, "--echo_samples", 16, "--checkpointing_steps", 1)
    sample_script.main(["--prompt", "a <v> dog", "--num_images", "1"])
    sample_script.main(["--export", "copy", "--rank", "2"])
    evaluate_script.main(["--run", str(run), "--num_seeds", "1"])
    files = [p for folder in (run, Path("copy")) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 30 and {p.suffix for p in files} <= {".safetensors", ".json", ".png", ".md"}


@pytest.mark.parametrize("source", SOURCES, ids=[p.relative_to(ROOT).as_posix() for p in SOURCES])
def test_sources_use_no_pickle_and_no_code_from_elsewhere(source):
    text = source.read_text(encoding="utf-8")
    for word in (r"\btorch\.(load|save)\b", r"\bpickle\b(?!s)", r"trust_remote_code=True", r"\beval\(\"", r"\bexec\(", r"allow_pickle", r"weights_only",
                 r"\.(ckpt|pt|pth)\"", r"os\.system", r"shell=True"):
        assert not re.search(word, text), word


@pytest.fixture
def base(tmp_path):
    """A private copy of the embedded base."""
    return Path(shutil.copytree(ROOT / "data/emoji/base", tmp_path / "base", symlinks=True, ignore=shutil.ignore_patterns("judges")))


class Evil:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("part, name", [("teacher/unet", "diffusion_pytorch_model"), ("student/unet", "diffusion_pytorch_model"),
                                        ("teacher/vae", "diffusion_pytorch_model"), ("teacher/text_encoder", "model")])
def test_pickled_weights_of_a_base_are_refused_not_executed(base, part, name, capsys):
    (base / part / f"{name}.safetensors").unlink()
    for file in (f"{name}.bin", "pytorch_model.bin"):
        torch.save(Evil(), base / part / file)
    with pytest.raises((SystemExit, OSError)):
        load_pair(str(base), "<v>", "dog")
    assert not Path("executed").exists()


def test_code_that_a_models_config_points_to_is_not_executed(base):
    for folder in (base / "encoders/identity", base / "teacher/unet", base / "teacher/text_encoder"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {k: "evil.Evil" for k in ("AutoModel", "AutoConfig")}}))
        (folder / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    load_encoders(str(base))
    load_pair(str(base), "<v>", "dog")
    assert not Path("executed").exists()


def test_a_runs_config_says_nothing_about_where_to_write(monkeypatch):
    run_folder(output_dir="../elsewhere", concept="/etc", resume_from_checkpoint="/etc/passwd")()
    monkeypatch.setattr(sample_script, "load_run", lambda *a: None)
    before = set(Path(".").rglob("*"))
    sample_script.main(["--prompt", "a <v> dog ../../x", "--run", "run", "--num_images", "1"])
    new = set(Path(".").rglob("*")) - before
    assert new and all(p.is_relative_to("run/samples") for p in new) and not Path("../elsewhere").exists()
