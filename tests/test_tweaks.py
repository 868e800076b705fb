"""A research tweak is a short patch: each of tests/tweaks/ is applied to a copy and runs. python -m pytest tests/test_tweaks.py"""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, drawn_in_one_step

SHORT = ["--concept", str(ROOT / "data" / "dog"), "--max_train_steps", "2", "--echo_steps", "2", "--echo_samples", "16", "--echo_floor", "0",
         "--train_batch_size", "2", "--scene_prompts", "0", "--log_steps", "1", "--preview_steps", "0", "--mixed_precision", "no"]


def copy_of_the_code(folder):
    """The code in a folder of its own; base, sprites and pictures are links."""
    for name in ("train.py", "model.py", "losses.py", "kernels"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data", folder / "data", ignore=lambda where, names: [n for n in names if n in ("base", "results", "__pycache__")])
    os.symlink(ROOT / "data" / "emoji" / "base", folder / "data" / "emoji" / "base")


def go(folder, argv, stop_at):
    """train.py of a folder, in a process of its own; stop_at: Ctrl-C in that call of the teacher's loss."""
    os.chdir(folder)
    os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    import train
    assert train.__file__ == str(folder / "train.py")
    calls, reconstruction = [], train.losses.reconstruction

    def interrupt(*args):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return reconstruction(*args)
    train.losses.reconstruction = interrupt
    with drawn_in_one_step():
        train.main(argv)


def run(folder, *more, stop_at=0, code=0):
    """{file: bytes} of a finished run's weights and log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "transformers"])
    process = context.Process(target=go, args=(folder, [*SHORT, *more], stop_at))
    process.start()
    process.join()
    assert process.exitcode == code, (folder / "log.txt").read_text()[-2000:]
    out = folder / "out" / "dog"
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.name in ("log.json", "unet_delta.safetensors", "echo.png")}


def patched(name, folder):
    copy_of_the_code(folder)
    if name:
        subprocess.run(["git", "apply", ROOT / "tests" / "tweaks" / f"{name}.patch"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return run(patched(None, folder))


def student_moved(files, tmp_path):
    """How far the student's weights went from the base's."""
    (tmp_path / "delta.safetensors").write_bytes(files["unet_delta.safetensors"])
    base = load_file(ROOT / "data/emoji/base/student/unet/diffusion_pytorch_model.safetensors")
    return sum((v - base[k].float()).square().sum().item() for k, v in load_file(tmp_path / "delta.safetensors").items())


IN_EFFECT = {  # of the first log row with the tweak, of that without
    "perceptual_distance": lambda row, before: row["alignment"] > before["alignment"],
    "c_of_t": lambda row, before: row["alignment"] < before["alignment"],
    "two_targets": lambda row, before: row["alignment"] != before["alignment"] and row["reconstruction"] == before["reconstruction"],
    "hinge": lambda row, before: abs(before["critic"] - .69) < .1 and abs(row["critic"] - 1) < .2,
    "critic_on_pixels": lambda row, before: row["adversarial"] > 1.2 * before["adversarial"],
    "critic_on_latents": lambda row, before: row["adversarial"] > 1.2 * before["adversarial"],
    "prior_preservation": lambda row, before: row["prior"] > 0 and row["reconstruction"] == before["reconstruction"]}


@pytest.mark.parametrize("name", IN_EFFECT)
def test_a_tweak_of_the_loss_is_in_effect_from_the_first_iteration(name, plain, tmp_path):
    files = run(patched(name, tmp_path))
    row, before = (json.loads(f["log.json"])[0] for f in (files, plain))
    assert IN_EFFECT[name](row, before) and files["unet_delta.safetensors"] != plain["unet_delta.safetensors"]


def test_another_choice_of_echoes_changes_the_echo_stage_alone(plain, tmp_path):
    files = run(patched("choice_of_echoes", tmp_path))
    assert json.loads(files["log.json"])[:2] == json.loads(plain["log.json"])[:2] and files["echo.png"] != plain["echo.png"]


def test_a_moving_average_is_what_is_saved_and_survives_a_stop(plain, tmp_path):
    folder = patched("moving_average", tmp_path)
    whole = run(folder)
    assert student_moved(whole, tmp_path) < .5 * student_moved(plain, tmp_path)
    shutil.rmtree(folder / "out")
    run(folder, stop_at=2, code=130)
    assert run(folder, "--resume_from_checkpoint", "latest") == whole


def test_every_patch_says_what_it_is_and_is_short():
    for path in sorted((ROOT / "tests" / "tweaks").glob("*.patch")):
        text = path.read_text()
        added = [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
        assert path.stem in [*IN_EFFECT, "choice_of_echoes", "moving_average"] and not text.startswith("---"), path.name
        assert len(added) <= 12 and text.count("\n+++ ") <= 2 and "kernels/" not in text, path.name


def test_the_patches_that_the_readme_shows_are_these():
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line[:1] in ("+", "-") and line[1:5] == "    "]
    patches = "".join((ROOT / "tests" / "tweaks" / f"{name}.patch").read_text() for name in ("c_of_t", "choice_of_echoes"))
    assert len(shown) == 4 and all(f"{line}\n" in patches for line in shown)
