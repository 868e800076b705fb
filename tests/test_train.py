"""train.py and sample.py as a user calls them, on the embedded pair. python -m pytest tests/test_train.py"""
import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample as sample_script
import train as train_script
from conftest import ROOT, other_precision, train
from data.images import to_pil
from data.images import load_photos
from data.base import load_encoders, load_pair
from data.run import load_run

SHORT = ("--max_train_steps", 4, "--echo_steps", 2, "--echo_samples", 32, "--checkpointing_steps", 3, "--log_steps", 3)
JOINT = ("--max_train_steps", 2, "--echo_steps", 0)
ECHO = ("--max_train_steps", 1, "--echo_steps", 3, "--echo_samples", 48)


def tensors(run):
    return load_file(run / "unet_delta.safetensors") | {f"teacher.{k}": v for k, v in load_file(run / "teacher/unet_delta.safetensors").items()} \
        | load_file(run / "learned_embeds.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_twenty_steps_lower_the_losses_and_change_the_picture(concept, quick_pictures):
    run = train("--max_train_steps", 20, "--echo_steps", 0)
    log = json.loads((run / "log.json").read_text())
    assert [row["step"] for row in log] == list(range(1, 21))
    pair, photos = load_pair("emoji", "<v>", "dog"), load_photos(concept, 64)
    noise = torch.randn(8, *pair.latent_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def teacher_loss():
        z, t = pair.encode(photos[:4]), torch.tensor([100, 300, 500, 700])
        out = pair.teacher(pair.teacher.add_noise(z, noise[:4], t), t, pair.text(["a photo of a <v> dog"] * 4))
        return (out - pair.teacher.target(z, noise[:4], t)).square().mean().item()

    @torch.no_grad()
    def draw():
        return pair.decode(pair.student.one_step(noise, pair.text(["a <v> dog"] * 8)))

    loss_before, before = teacher_loss(), draw()
    load_run(run, pair)
    assert teacher_loss() < loss_before
    assert (draw() - before).abs().mean() > .01
    critics = [row["critic"] for row in log]
    assert sum(critics[-5:]) < sum(critics[:5])


def test_same_seed_same_bytes_and_another_seed_other_bytes(concept, quick_pictures):
    a, log = tensors(train(*SHORT)), open("out/dog/log.json").read()
    assert same(a, tensors(train(*SHORT))) and open("out/dog/log.json").read() == log
    assert not same(a, tensors(train(*SHORT, "--seed", 1)))


def test_the_echo_its_absence_and_its_control_are_three_different_runs(concept, quick_pictures):
    echo, control = tensors(train(*SHORT)), tensors(train(*SHORT, "--echo_real_only"))
    off = tensors(train("--max_train_steps", 4, "--echo_steps", 0))
    assert not same(echo, control) and not same(control, off) and not same(echo, off)


@pytest.mark.parametrize("flags", [
    ("--reconstruction_weight", 0), ("--adversarial_weight", 0), ("--identity_weight", 0), ("--latent_weight", 0), ("--swd_weight", 0), ("--scene_adversarial_weight", .3),
    ("--scene_prompts", 0), ("--flip",), ("--lr_decay", 1), ("--size_augmentation",), ("--weight_alignment",), ("--target_noise", .9), ("--no-carry",), ("--kv_rate", 3), ("--no-detach_prompt",),
    ("--guidance_scale", 1), ("--train_unet", "kv"), ("--train_unet", "attention"), ("--teacher_lr", 0), ("--student_lr", 0),
    ("--token_lr", 0), ("--critic_lr", .01), ("--weight_decay", .5), ("--max_grad_norm", .01), ("--swd_projections", 3), ("--swd_positions", 100), ("--lpips_weight", 1),
    ("--train_batch_size", 2), ("--mixed_precision", other_precision()), ("--class_word", "cat")], ids=str)
def test_every_flag_is_read(concept, flags, reference, quick_pictures):
    run = train(*JOINT, *flags)
    assert not same(reference(*JOINT), tensors(run)), f"{flags} changed nothing"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What runs with no more flags than these learn; each is run once."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(ROOT / "data" / "dog", folder / "dog")

    @cache
    def learned(*flags):
        with chdir(folder):
            return tensors(train(*flags))
    return learned


@pytest.mark.parametrize("flags", [("--echo_keep", .1), ("--echo_keep", 0), ("--echo_floor", .9), ("--echo_share", .25), ("--echo_noise", .9), ("--echo_weight", 3)], ids=str)
def test_every_echo_flag_is_read(concept, flags, reference, quick_pictures):
    assert not same(reference(*ECHO), tensors(train(*ECHO, *flags)))


def test_a_frozen_part_does_not_move(concept, quick_pictures):
    run = train(*JOINT, "--token_lr", 0, "--weight_decay", 0, "--student_lr", 0, "--no-carry")
    pair = load_pair("emoji", "<v>", "dog")
    unet = pair.student.unet.state_dict()
    assert all(torch.equal(v, unet[k]) for k, v in load_file(run / "unet_delta.safetensors").items())
    assert torch.equal(load_file(run / "learned_embeds.safetensors")["<v>"], pair.text.row)


def test_a_run_leaves_pictures_json_and_safetensors_and_no_pickle(concept):
    run = train(*SHORT, "--preview_steps", 2)
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    half = {"README.md", "config.json", "unet_delta.safetensors", "learned_embeds.safetensors", "pytorch_lora_weights.safetensors",
            *(f"samples/{name}.png" for name in ("grid", "a-v-dog-seed0", "a-v-dog-on-the-beach-seed0"))}
    assert files == half | {f"teacher/{name}" for name in half} | {
        "samples/a-v-dog-in-the-snow-seed0.png", "samples/a-v-dog-at-night-seed0.png", "log.json", "losses.png", "preview.png", "photos.png", "echo.png",
        "previews/00002.png", "previews/00004.png", "previews/00006.png", "previews/00008.png"}
    assert Image.open(run / "preview.png").width > 8 * 128
    flags = json.loads((run / "config.json").read_text())["flags"]
    train_script.parse_arguments([x for k, v in flags.items() if v not in (None, "") and not isinstance(v, bool) for x in (f"--{k}", str(v))])


def test_sample_finds_the_run_and_draws_the_same_bytes_twice(concept, capsys):
    train(*SHORT)
    grids = []
    for _ in range(2):
        sample_script.main(["--prompt", "a <v> dog on the beach", "--num_images", "3", "--seed", "5"])
        out = capsys.readouterr().out
        assert re.search(r"\d+ ms per image", out)
        grids.append(open("out/dog/samples/a-v-dog-on-the-beach-grid.png", "rb").read())
    assert grids[0] == grids[1]
    names = {p.name for p in (Path("out/dog/samples")).iterdir() if "seed0" not in p.name and p.name != "grid.png"}
    assert names == {"a-v-dog-on-the-beach-grid.png", *(f"a-v-dog-on-the-beach-seed{i}.png" for i in (5, 6, 7))}
    single = open("out/dog/samples/a-v-dog-on-the-beach-seed6.png", "rb").read()
    for flags in (["--steps", "2"], ["--steps", "4"], ["--teacher"], ["--base_only"]):
        sample_script.main(["--prompt", "a <v> dog on the beach", "--num_images", "2", "--seed", "5", "--output_dir", "other", *flags])
    other = {p.name: p.read_bytes() for p in Path("other").iterdir()}
    assert len(other) == len(set(other.values())) == 12 and single not in other.values()
    sample_script.main(["--prompt", "a <v> dog on the beach", "--num_images", "1", "--seed", "6", "--output_dir", "alone"])
    assert open("alone/a-v-dog-on-the-beach-seed6.png", "rb").read() == single, "an image depends on its seed alone"


def test_training_never_loads_a_judge(concept, quick_pictures, tmp_path):
    base = tmp_path / "base"
    import shutil
    shutil.copytree(ROOT / "data/emoji/base", base, symlinks=True, ignore=shutil.ignore_patterns("judges"))
    run = train(*SHORT, "--base", base)
    assert (run / "config.json").exists()
    for script in ("train.py", "model.py", "losses.py", "sample.py"):
        assert "judges" not in re.sub(r'"""(?s:.*?)"""|#[^\n]*', "", (ROOT / script).read_text()), script
    ours, theirs = load_encoders("emoji"), ROOT / "data/emoji/base/judges"
    for name, encoder in ours.items():
        judge = load_file(theirs / name / "model.safetensors")
        assert encoder.vision.config.model_type != json.loads((theirs / name / "config.json").read_text())["model_type"]
        state = encoder.vision.state_dict()
        assert not any(torch.equal(v.float(), state[k]) for k, v in judge.items() if k in state and v.ndim > 1)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_base_is_an_ordinary_diffusers_pipeline(name, pair):
    script = f"""
import sys
sys.path.insert(0, r"{ROOT}")
import data.emoji.autoencoder
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(r"{ROOT / 'data/emoji/base' / name}")
pipe.set_progress_bar_config(disable=True)
noise = torch.randn(1, *{pair.latent_shape}, generator=torch.Generator().manual_seed(0))
image = pipe("a dog on the beach", num_inference_steps={1 if name == 'student' else 8}, guidance_scale={0.0 if name == 'student' else 3.0}, latents=noise).images[0]
image.save("plain.png")
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    noise, context = torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(0)), pair.text(["a dog on the beach"])
    with torch.no_grad():
        z = pair.student.sample(noise, context, 1) if name == "student" else pair.teacher.sample(noise, context, 8, pair.text([""]), 3.0)
        ours = np.asarray(to_pil(pair.decode(z))[0]).astype(int)
    assert np.abs(ours - np.asarray(Image.open("plain.png")).astype(int)).max() <= 1


def test_a_plain_diffusers_script_draws_what_sample_draws(concept, pair):
    from diffusers import StableDiffusionPipeline

    import data.emoji.autoencoder  # noqa: F401  from_pretrained looks it up among the imported modules
    run = train(*JOINT)
    sample_script.main(["--prompt", "a <v> dog on the beach", "--num_images", "1"])
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "data/emoji/base/student")
    noise = torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(0))
    call = dict(prompt="a <v> dog on the beach", num_inference_steps=1, guidance_scale=0.0, latents=noise)
    before = np.asarray(pipe(**call).images[0]).astype(int)
    pipe.load_textual_inversion(str(run / "learned_embeds.safetensors"), token="<v>")
    pipe.unet.load_state_dict(load_file(run / "unet_delta.safetensors"), strict=False)
    after = np.asarray(pipe(**call).images[0]).astype(int)
    ours = np.asarray(Image.open(run / "samples/a-v-dog-on-the-beach-seed0.png")).astype(int)
    assert np.abs(ours - after).max() <= 1 < np.abs(before - after).max()
