"""Bad input is answered with one sentence and exit code 2, before any model is loaded. python -m pytest tests/test_input.py"""
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
import sample
import train
from conftest import ROOT, exit_of
from data.base import read_recipe
from data.recipe import make_parser
from data.images import Photos, load_photos
from data.disk import save_json, save_tensors


@pytest.fixture
def no_models(monkeypatch):
    for script in (train, sample, evaluate):
        monkeypatch.setattr(script, "load_pair", lambda *a, **k: pytest.fail("a model was loaded first"))


def picture(mode="RGB", size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def photo(name, content):
    """A concept folder photos/ with one file; content: bytes, or a function of its path."""
    def make():
        Path("photos").mkdir()
        content(Path("photos", name)) if callable(content) else Path("photos", name).write_bytes(content)
    return make


PNG = (ROOT / "data/dog/00.png").read_bytes()
HEADER = b"IHDR" + struct.pack(">II", 30000, 30000) + PNG[24:29]
BOMB = PNG[:12] + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + PNG[33:]  # says that it unpacks to 900 million pixels
FLAGS = {"token": "<v>", "class_word": "dog", "base": "emoji", "concept": "dog", "guidance_scale": 3.0}


def run_folder(change=None, **flags):
    """A run folder run/ that passes every check made before models are loaded, but for what change() or the flags spoil."""
    def make():
        for part in ("run", "run/teacher"):
            save_tensors(Path(part, "unet_delta.safetensors"), {"conv_in.bias": torch.zeros(96)})
            save_tensors(Path(part, "learned_embeds.safetensors"), {"<v>": torch.zeros(1, 128)})
        save_json("run/config.json", {"format": "echodistill-1", "flags": {k: v for k, v in (FLAGS | flags).items() if v is not None}})
        if change:
            change()
    return make


def write(name, content):
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def cut(name):
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:-20])


def set_token(name):
    return lambda: save_tensors(name, {"<w>": torch.zeros(1, 128)})


def loop(name):
    return lambda: (Path(name).unlink(missing_ok=True), os.symlink(Path(name).name, name))


def base_folder(change):
    """A copy (of links) of the embedded base at base/, spoilt by change()."""
    return lambda: (shutil.copytree(ROOT / "data/emoji/base", "base", copy_function=os.symlink), change())


def replace(name, content):
    return lambda: (os.unlink(name), Path(name).write_bytes(content(Path(ROOT, "data/emoji", name).read_bytes())))


D = ["--concept", "dog"]
P = ["--concept", "photos"]
BAD = [  # what is made first, the script, its flags, what the sentence must name
    # concept folders
    (None, train, ["--concept", "nowhere"], "--concept nowhere"), (None, train, ["--concept", ""], "--concept"),
    (None, train, ["--concept", "dog/00.png"], "00.png"), (None, train, ["--concept", "x" * 5000], "--concept"), (None, train, [], "--concept"),
    (lambda: Path("photos").mkdir(), train, P, "photos"), (loop("photos"), train, P, "--concept photos"),
    (photo("readme.txt", b"no image"), train, P, "holds no image"), (photo(".hidden.png", PNG), train, P, "holds no image"),
    (photo("a.png", PNG[:500]), train, P, "a.png"), (photo("a.png", b""), train, P, "a.png"), (photo("a.png", b"GIF89a"), train, P, "a.png"),
    (photo("a.jpg", b"\xff\xd8\xff\xe0" + bytes(200)), train, P, "a.jpg"), (photo("a.webp", b"RIFF\x00\x00\x00\x00WEBPVP8 "), train, P, "a.webp"),
    (photo("a.png", Path.mkdir), train, P, "a.png"), (photo("a.png", lambda p: os.symlink("a.png", p)), train, P, "a.png"),
    (photo("a.png", lambda p: os.symlink("gone.png", p)), train, P, "a.png"), (photo("a.png", BOMB), train, P, "million pixels"),
    (photo("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), train, P, "a.png"),
    (photo("a.png", os.mkfifo), train, P, "a.png is a pipe"), (photo("a.png", lambda p: os.symlink("/dev/zero", p)), train, P, "a.png is a pipe"),
    *[(photo("a.tiff", lambda p, values=values: Image.fromarray(values).save(p)), train, P, "a.tiff has 32 bits per pixel") for values in (
        np.full((9, 9), 200, np.int32), np.full((9, 9), 200, np.float32), np.full((9, 9), -.5, np.float32), np.full((9, 9), np.nan, np.float32))],
    # output folders in, at and above the photos
    *[(lambda: os.symlink("dog", "link"), train, [*D, "--output_dir", out], f"--output_dir {out}") for out in ("dog", "dog/run", ".", "link", "link/run")],
    (lambda: os.symlink("dog", "link"), train, ["--concept", "link", "--output_dir", "dog"], "--output_dir dog"),
    (run_folder(), sample, ["--run", "run", "--prompt", "a", "--output_dir", "./dog"], "--output_dir ./dog"),
    # output folders with something in the way, of another run, or finished
    (lambda: Path("out/dog/config.json").mkdir(parents=True), train, D, "out/dog/config.json is a folder"),
    (lambda: (Path("out/dog").mkdir(parents=True), Path("out/dog/checkpoints").touch()), train, D, "out/dog/checkpoints is a file"),
    (lambda: (Path("there/samples").mkdir(parents=True), run_folder()(), Path("there/README.md").mkdir()), sample,
     ["--run", "run", "--export", "there"], "there/README.md is a folder"),
    (lambda: (Path("out/dog").mkdir(parents=True), save_json("out/dog/run.lock", {"pid": 7, "host": "elsewhere"})), train, D, "process 7 on elsewhere"),
    (run_folder(lambda: (Path("out").mkdir(), os.rename("run", "out/dog"))), train, [*D, "--resume_from_checkpoint", "latest"],
     'is finished; draw with: python sample.py --run out/dog --prompt "a <v> dog"'),
    # text that is no UTF-8 (as Python hands it over)
    *[(None, train, [*D, f"--{flag}", "\udcff"], f"--{flag}") for flag in ("token", "class_word", "output_dir", "device", "base", "teacher", "recipe", "concept",
                                                                          "resume_from_checkpoint", "kernels", "seed")],
    (lambda: shutil.copytree("dog", "\udcff"), train, ["--concept", "\udcff"], "--concept \\udcff"),
    *[(run_folder(), sample, ["--run", "run", "--prompt", "a", f"--{flag}", "\udcff"], f"--{flag}") for flag in ("prompt", "output_dir", "device", "base")],
    (run_folder(), evaluate, ["--run", "run", "--device", "\udcff"], "--device"),
    # recipes that are no files, no tables, or go in a circle
    *[(make, train, [*D, "--recipe", "a.toml"], "a.toml") for make in (
        lambda: os.mkfifo("a.toml"), lambda: Path("a.toml").mkdir(), lambda: Path("a.toml").write_text('extends = "a.toml"'),
        lambda: (Path("a.toml").write_text('extends = "b.toml"'), Path("b.toml").write_text('extends = "a.toml"')),
        lambda: Path("a.toml").write_text("extends = 3"), lambda: Path("a.toml").write_text("recipe = 3"), lambda: Path("a.toml").write_text("base = 3"),
        lambda: Path("a.toml").write_text("teacher_lr = " + "[" * 5000), lambda: Path("a.toml").write_text("max_train_steps = 1" + "0" * 400),
        lambda: Path("a.toml").write_text("teacher_lr = 1" + "0" * 400), lambda: Path("a.toml").write_text("train_unet = []"))],
    # flags of train out of range
    *[(None, train, D + [f"--{name}", value], f"--{name}") for name, value in (
        ("max_train_steps", 0), ("max_train_steps", "many"), ("train_batch_size", -1), ("student_lr", -1), ("student_lr", "nan"), ("teacher_lr", "inf"),
        ("max_grad_norm", 0), ("max_grad_norm", "nan"), ("echo_keep", 2), ("echo_share", -.1), ("lr_decay", 1.5), ("swd_projections", 0),
        ("guidance_scale", "inf"), ("log_steps", 0), ("checkpointing_steps", 0), ("checkpoints_total_limit", -1), ("lora_rank", 0),
        *((name, 10 ** power) for power in (11, 20) for name in (
            "max_train_steps", "echo_steps", "train_batch_size", "lora_rank", "swd_projections", "swd_positions", "echo_samples", "log_steps",
            "preview_steps", "checkpointing_steps", "checkpoints_total_limit")),
        ("resolution", 64 * 10 ** 11), ("dinov2_size", 14 * 10 ** 11), ("dinov2_size", 100),
        ("seed", -1), ("seed", 10 ** 18), ("mixed_precision", "fp64"), ("train_unet", "some"), ("unknown_flag", 1), ("student", 1),
        ("device", "abacus"), ("device", "cpu:banana"), ("device", "cuda:99"), ("base", "nonesuch"), ("base", "dog"), ("base", "x" * 5000), ("teacher", "x" * 5000), ("recipe", "x" * 5000),
        ("resume_from_checkpoint", "x" * 5000), ("output_dir", "x" * 5000),
        ("token", "two words"), ("token", ""), ("token", "dog"), ("token", "<|endoftext|>"),
        ("class_word", " "), ("class_word", "a <v>"), ("class_word", "very " * 30 + "good dog"),
        ("output_dir", "dog/00.png"), ("output_dir", "dog/00.png/deeper"), ("output_dir", "/proc/nowhere"), ("output_dir", "x" * 300),
        ("resume_from_checkpoint", "gone"), ("resume_from_checkpoint", "latest"), ("resume_from_checkpoint", "dog/00.png"),
        ("resume_from_checkpoint", "dog"))],
    # flags of train that contradict each other
    (None, train, D + ["--echo_real_only", "--echo_steps", 0], "--echo_real_only"),
    (None, train, D + ["--prior_weight", 1], "--denoising_weight 0"),
    (None, train, D + ["--echo_rounds", 1000, "--echo_steps", 10 ** 6], "--echo_rounds"), (None, train, D + ["--echo_rounds", 10 ** 11], "--echo_rounds"),
    (None, train, D + ["--mask_erosion", 10 ** 11], "--mask_erosion"), (None, train, D + ["--critic_views", 10 ** 11], "--critic_views"),
    (None, train, D + ["--teacher_lr", 0, "--student_lr", 0, "--token_lr", 0], "--teacher_lr"),
    *[(None, train, D + [f for w in off for f in (f"--{w}_weight", 0)] + more, "nothing would be learned; raise one, such as --reconstruction_weight") for off, more in (
        (("reconstruction", "adversarial", "identity", "latent", "swd"), []), (("reconstruction",), ["--student_lr", 0]))],
    (None, train, D + ["--mixed_precision", "fp16"], "--mixed_precision fp16"), (None, train, D + ["--sequential"], "--echo_steps 0"),
    (None, train, D + ["--carry", "--train_unet", "lora"], "--carry moves"),
    (loop("dog/06.png"), train, D, "06.png"),
    # bases with missing, cut, damaged or foreign parts
    *[(base_folder(change), train, [*D, "--base", "base"], named) for change, named in (
        (lambda: os.unlink("base/teacher/unet/config.json"), "unet/config.json"), (lambda: shutil.rmtree("base/student"), "--base base"),
        (lambda: shutil.rmtree("base/teacher/tokenizer"), "tokenizer"), (lambda: shutil.rmtree("base/teacher/scheduler"), "scheduler_config.json"),
        (replace("base/teacher/unet/diffusion_pytorch_model.safetensors", lambda b: b[:-9]), "base/teacher/unet/diffusion_pytorch_model.safetensors"),
        (replace("base/student/unet/diffusion_pytorch_model.safetensors", lambda b: b[:4]), "base/student/unet/diffusion_pytorch_model.safetensors"),
        (replace("base/teacher/vae/diffusion_pytorch_model.safetensors", lambda b: b""), "vae/diffusion_pytorch_model.safetensors"),
        (replace("base/teacher/vae/config.json", lambda b: b[:50]), "vae/config.json"), (replace("base/student/unet/config.json", lambda b: b"{"), "unet/config.json"),
        (replace("base/student/unet/config.json", lambda b: re.sub(rb'"in_channels": \d+', b'"in_channels": 4', b)), "in_channels"),
        (replace("base/teacher/scheduler/scheduler_config.json", lambda b: b.replace(b"v_prediction", b"sample")), "--teacher"),
        (replace("base/teacher/tokenizer/tokenizer.json", lambda b: b[:100]), "tokenizer"))],
    (None, train, D + ["--teacher", "dog"], "dog"), (None, train, D + ["--student", "a/b/c"], "--student"), (None, train, D + ["--resolution", 65], "--resolution"),
    # flags of sample and evaluate
    *[(run_folder(), sample, ["--run", "run", *flags], named) for flags, named in (
        ([], "--prompt"), (["--prompt", "  "], "--prompt"), (["--prompt", "a", "--num_images", 0], "--num_images"), (["--prompt", "a", "--steps", 3], "--steps"),
        (["--prompt", "a", "--num_images", 10 ** 18], "--num_images"), (["--export", "there", "--rank", 10 ** 11], "--rank"),
        (["--prompt", "a", "--teacher", "--steps", 1001], "--steps 1001"), (["--prompt", "a", "--teacher", "--steps", 10 ** 20], "--steps"),
        (["--prompt", "a", "--teacher", "--steps", 0], "--steps"), (["--prompt", "a", "--compare", "--teacher", "--steps", 16], "--compare"), (["--prompt", "a", "--guidance_scale", "nan"], "--guidance_scale"),
        (["--prompt", "a", "--seed", -5], "--seed"), (["--prompt", "a", "--device", "abacus"], "--device"), (["--prompt", "a", "--rank", 4], "--rank"),
        (["--prompt", "a", "--export", "there"], "--export"), (["--export", "there", "--rank", 0], "--rank"), (["--export", "run/config.json"], "--export"),
        (["--prompt", "a", "--output_dir", "run/config.json"], "--output_dir"), (["--prompt", "a", "--output_dir", "/proc/nowhere"], "--output_dir"),
        (["--prompt", "a", "--base", "nonesuch"], "--base"))],
    (run_folder(), sample, ["--run", "run", "--prompt", "a", "--compare", "--base_only"], "--base_only"),
    (None, sample, ["--prompt", "a dog"], "train.py"), (None, evaluate, [], "train.py"), (run_folder(), evaluate, ["--run", "run", "--num_seeds", 0], "--num_seeds"),
    (run_folder(), evaluate, ["--run", "run", "--device", "abacus"], "--device"),
    # run folders: half-written, foreign, edited by hand
    *[(make, script, ["--run", "run", *more], named) for script, more in ((sample, ["--prompt", "a <v> dog"]), (evaluate, [])) for make, named in (
        (None, "run"), (lambda: Path("run").mkdir(), "run"), (run_folder(lambda: os.unlink("run/config.json")), "config.json"),
        (run_folder(write("run/config.json", b'{"format": "echodis')), "config.json"), (run_folder(write("run/config.json", b"\xff\xfe\x00")), "config.json"),
        (run_folder(write("run/config.json", b"[" * 100_000)), "config.json"), (run_folder(write("run/config.json", [1, 2])), "config.json"),
        (run_folder(write("run/config.json", {"format": "diffusers", "flags": FLAGS})), "format"), (run_folder(write("run/config.json", {"format": "echodistill-1"})), "flags"),
        (run_folder(write("run/config.json", {"format": "echodistill-1", "model": "teacher", "flags": FLAGS})), "teacher"),
        (run_folder(token=None), "token"), (run_folder(token=7), "token"), (run_folder(token="two words"), "token"), (run_folder(class_word=""), "class_word"),
        (run_folder(guidance_scale="3"), "guidance_scale"), (run_folder(guidance_scale=float("nan")), "guidance_scale"), (run_folder(guidance_scale=True), "guidance_scale"),
        (run_folder(base="../elsewhere"), "--base"), (run_folder(base="/etc"), "--base"), (run_folder(base=["emoji"]), "base"),
        (run_folder(lambda: os.unlink("run/unet_delta.safetensors")), "run/unet_delta.safetensors"), (run_folder(cut("run/unet_delta.safetensors")), "run/unet_delta.safetensors"),
        (run_folder(write("run/learned_embeds.safetensors", b"")), "run/learned_embeds.safetensors"), (run_folder(set_token("run/learned_embeds.safetensors")), "<v>"),
        (run_folder(lambda: shutil.rmtree("run/teacher")), "run/teacher"), (run_folder(loop("run/unet_delta.safetensors")), "run/unet_delta.safetensors"),
        (run_folder(loop("run/config.json")), "config.json"),
        (run_folder(lambda: (os.unlink("run/config.json"), Path("run/config.json").mkdir())), "config.json"),
        *((run_folder(resolution=size), "config.json: resolution") for size in (65, -8, 10 ** 12)), (run_folder(resolution="64"), "config.json: resolution"),
        (run_folder(train_unet=["kv"]), "train_unet"), (run_folder(mixed_precision=3), "mixed_precision"),
        (run_folder(lambda: save_tensors("run/unet_delta.safetensors", {})), "run/unet_delta.safetensors holds no tensor"),
        (run_folder(lambda: save_tensors("run/teacher/unet_delta.safetensors", {"conv_in.bias": torch.zeros(96, dtype=torch.int8)})),
         "run/teacher/unet_delta.safetensors holds integers"),
        (run_folder(lambda: (os.unlink("run/unet_delta.safetensors"), os.mkfifo("run/unet_delta.safetensors"))), "run/unet_delta.safetensors"))],
]


def test_the_table_of_bad_input_is_long_enough():
    assert len(BAD) >= 60 and {script for _, script, _, _ in BAD} == {train, sample, evaluate}


@pytest.mark.parametrize("make, script, argv, named", BAD, ids=[f"{i}-{s.__name__}-{' '.join(map(str, a))[:50]}" for i, (_, s, a, _) in enumerate(BAD)])
def test_bad_input_is_refused_in_one_sentence(make, script, argv, named, concept, no_models, capsys):
    if make:
        make()
    before = {p: None if p.is_dir() and not p.is_symlink() else os.lstat(p).st_mtime_ns for p in Path(".").rglob("*")}
    code, said = exit_of(script.main, argv, capsys)
    assert code == 2 and named in said and said.count("error: ") == 1 and "Traceback" not in said
    assert before == {p: None if p.is_dir() and not p.is_symlink() else os.lstat(p).st_mtime_ns for p in Path(".").rglob("*")}, "something was left behind"


@pytest.mark.parametrize("prompt, said", [("a dog", "does not hold <v>"), ("a <v> dog " + "and another one " * 20, "tokens and the model reads 24"),
                                          ("\u72ac <v> \u0441\u043e\u0431\u0430\u043a\u0430", "does not know '\u72ac'"), ("a <v> dog", None)])
def test_odd_prompts_are_drawn_and_said_to_be_odd(prompt, said, monkeypatch, capsys):
    run_folder()()
    monkeypatch.setattr(sample, "load_run", lambda *a: None)
    sample.main(["--prompt", prompt, "--run", "run", "--num_images", "1"])
    out = capsys.readouterr().out
    assert said in out if said else "note" not in out
    assert len(list(Path("run/samples").glob("*-seed0.png"))) == 1


@pytest.mark.parametrize("part, spoilt", [("run", {"nonesuch": torch.zeros(1)}), ("run/teacher", {"conv_in.bias": torch.zeros(7)}),
                                          ("run", {"conv_in.bias": torch.full((96,), torch.nan)})], ids=["name", "shape", "nan"])
def test_weights_that_do_not_fit_the_base_are_refused(part, spoilt, capsys):
    run_folder(lambda: save_file(spoilt, Path(part, "unet_delta.safetensors")))()
    code, said = exit_of(sample.main, ["--prompt", "a <v> dog", "--run", "run", *["--teacher"] * part.endswith("teacher")], capsys)
    assert code == 2 and part in said and next(iter(spoilt)) in said


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize("limit", [1000, 100_000, 3_000_000])
def test_a_full_disk_stops_the_run_with_one_sentence_and_leaves_no_half_file(concept, limit, capsys):
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond it: writing fails as on a full disk
    try:
        code, said = exit_of(train.main, D + ["--max_train_steps", "2", "--echo_steps", "0", "--checkpointing_steps", "1", "--train_unet", "kv"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "cannot be written" in said and "out/dog" in said and not Path("out/dog/config.json").exists()
    assert not [p for p in Path("out").rglob("*") if p.name.endswith(".part")]


def test_no_space_left_is_said_for_every_kind_of_file(monkeypatch, capsys):
    from data.disk import write_atomically
    from data.images import save_png

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    for name, save in (("a.png", lambda: save_png(picture(), "a.png")), ("a.json", lambda: save_json("a.json", {})),
                       ("a.safetensors", lambda: save_tensors("a.safetensors", {"x": torch.zeros(1)}))):
        Path(name).write_text("as it was")
        with pytest.raises(SystemExit) as stop:
            save()
        assert stop.value.code == 2 and f"{name} cannot be written (No space left on device)" in capsys.readouterr().err
        assert Path(name).read_text() == "as it was" and not list(Path(".").glob(".*.part"))
    with pytest.raises(SystemExit):
        write_atomically("a.json/b.json", lambda p: p.write_text(""))
    assert "a.json/b.json cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("LA", "png")])
def test_every_kind_of_image_is_read(mode, suffix):
    Path("photos").mkdir()
    if mode == "I;16":
        Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save("photos/a.png")
    else:
        picture(mode).save(f"photos/a.{suffix}")
    x = load_photos("photos", 32)
    assert x.shape == (1, 3, 32, 32) and x.isfinite().all() and x.std() > .05 and x.abs().max() <= 1


@pytest.mark.parametrize("dtype, white", [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_a_tiff_of_any_depth_has_the_same_colours(dtype, white):
    Path("photos").mkdir()
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((ramp * white).astype(dtype)).save("photos/a.tiff")
    torch.testing.assert_close(load_photos("photos", 8)[0, 0], torch.from_numpy(ramp * 2 - 1).float(), atol=.01, rtol=0)


def test_the_cost_counts_take_a_batch_size_in_two_words(concept, monkeypatch):
    from data.benchmark import cost
    seen = []
    monkeypatch.setattr(cost, "report", lambda *given: seen.append(given))
    cost.main(["--steps", "0", "--train_batch_size", "3"])
    (_, args, plain), = seen
    assert args.train_batch_size == train.parse_arguments(plain).train_batch_size == 3


def test_the_cost_counts_refuse_an_empty_batch(capsys):
    from data.benchmark import cost
    code, said = exit_of(cost.main, ["--steps", 0, "--train_batch_size", 0], capsys)
    assert code == 2 and "--train_batch_size" in said


@pytest.mark.parametrize("flags", [["nowhere.md"], ["page.md", "--steps", "0"], ["page.md", "--base", "sd-turbo"]])
def test_a_table_that_cannot_be_written_is_refused_before_anything_is_timed(flags, monkeypatch, capsys):
    from data.benchmark import cost
    monkeypatch.setattr(cost, "write_table", lambda *a: pytest.fail("something was timed first"))
    Path("page.md").touch()
    code, said = exit_of(cost.main, ["--write", *flags], capsys)
    assert code == 2 and f"--write {flags[0]}" in said


def test_a_heic_photo_is_refused_with_what_to_do(concept, no_models, capsys):
    (concept / "IMG_0001.HEIC").write_bytes(b"....ftypheic")
    code, said = exit_of(train.main, ["--concept", "dog"], capsys)
    assert code == 2 and "IMG_0001.HEIC" in said and "JPEG" in said


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (3, 5), (1200, 30)])
def test_crop_takes_the_centre_square_or_pads_the_whole_photo(size):
    Path("photos").mkdir()
    image = Image.new("RGB", size, "black")
    side = min(size)
    image.paste("white", ((size[0] - side) // 2, (size[1] - side) // 2, (size[0] + side) // 2, (size[1] + side) // 2))
    image.save("photos/a.png")
    x, mask = load_photos("photos", 64, masks=True)
    assert mask.min() == 1 and x[..., 8:-8, 8:-8].min() > .5
    x, mask = load_photos("photos", 64, "pad", masks=True)
    ratio = min(size) / max(size)
    assert x.shape == (1, 3, 64, 64) and abs(mask.mean() - ratio) < .03 and mask.sum() >= 64
    assert (x * (1 - mask)).abs().max() < .01 and (x * mask).abs().max() > .9
    wide = mask[0, 0].any(0).all() if size[0] > size[1] else mask[0, 0].any(1).all()
    assert wide, "the longer side fills the frame"


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
    source = "".join((ROOT / name).read_text() for name in ("train.py", "losses.py", "data/base.py", "data/run.py", "data/progress.py", "data/recipe.py"))
    computed = {f"{k}_lr" for k in ("teacher", "student", "token", "critic")}  # getattr(args, f"{k}_lr")
    for action in make_parser(read_recipe([])[1], "")._actions:
        assert action.help, action.dest
        read = re.search(rf"\b(args|weights)\.{action.dest}\b|flags(\.get\(|\[)\"{action.dest}\"", source)
        assert action.dest == "help" or read or action.dest in computed, f"--{action.dest} is never read"


def test_photos_are_mirrored_only_where_that_is_asked():
    photos, g = torch.rand(3, 3, 8, 8), torch.Generator().manual_seed(0)
    x, _, _, which = Photos(photos, torch.ones(3, 1, 8, 8), flip=False, size_augmentation=False).batch(8, g)
    assert torch.equal(x, photos[which]) and which.max() < 3
    x, _, _, which = Photos(photos, torch.ones(3, 1, 8, 8), flip=True, size_augmentation=False).batch(32, g)
    assert torch.equal(x, torch.cat([photos, photos.flip(3)])[which]) and which.max() >= 3 > which.min()


@pytest.mark.parametrize("size, border", [(64, 0), (512, 0), (64, 31), (16, 7)])
def test_size_augmentation_never_has_an_empty_mask_and_says_what_it_did(size, border):
    """border: of grey that --crop pad left at top and bottom; 31 of 64 is a panorama of 1 to 32."""
    kept = torch.zeros(2, 1, size, size)
    kept[:, :, border:size - border] = 1
    photos = Photos(kept.expand(-1, 3, -1, -1), kept, flip=True, size_augmentation=True)
    x, mask, said, _ = photos.batch(64, torch.Generator().manual_seed(0))
    latent = torch.nn.functional.interpolate(mask, size=size // 8, mode="area")
    assert set(said) == {"", "small", "big"}
    assert (latent.sum((1, 2, 3)) > 0).all() and set(mask.unique().tolist()) == {0., 1.}
    if border:
        return
    for image, m, word in zip(x, mask, said):
        assert (m.min() == 0) == (word == "small") and (image * (1 - m) == 0).all() and torch.allclose(image * m, m.expand_as(image), atol=1e-5)
