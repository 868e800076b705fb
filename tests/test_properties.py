"""What must hold for every file and every flag, not for chosen ones. python -m pytest tests/test_properties.py"""
import io
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save

import train
from data.disk import write_atomically
from data.images import load_photos
from data.recipe import KEYS, RUN
from data.run import file_names, read_checkpoint, read_run, restore, save_checkpoint, slug
from model import low_rank
from test_input import FLAGS, run_folder

settings.register_profile("files", deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("files")
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


def or_refused(call, *args):
    """The call's result, or None if it stopped with exit code 2; any other exception is a failure."""
    try:
        return call(*args)
    except SystemExit as stop:
        assert stop.code == 2


@pytest.fixture(scope="module", params=["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def picture(request):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, request.param)
    return request.param.lower(), file.getvalue()


@given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6), length=st.floats(0, 1))
def test_a_damaged_photo_is_read_or_refused(picture, damage, length):
    kind, content = picture
    content = bytearray(content)
    for where, value in damage:
        content[int(where * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"a.{kind}").write_bytes(content[:int(length * len(content)) + 1])
        x = or_refused(load_photos, folder, 8)
    assert x is None or x.shape == (1, 3, 8, 8) and x.isfinite().all() and x.abs().max() <= 1


@given(width=st.integers(1, 90), height=st.integers(1, 90), mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"]),
       colour=st.integers(0, 255), size=st.integers(1, 40))
def test_a_photo_of_any_size_and_mode_becomes_a_square_in_range(width, height, mode, colour, size):
    image = Image.new("L", (width, height), colour).convert(mode) if mode != "I;16" else Image.new(mode, (width, height), colour * 257)
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder, "a.tiff"))
        x = or_refused(load_photos, folder, size)
    assert (x is None) == (mode == "I" or mode == "F" and colour > 1)  # 32 bits: only from 0 to 1 it is known what is white
    if x is None:
        return
    assert x.shape == (1, 3, size, size) and x.abs().max() <= 1
    if mode == "F":
        assert (x - (2 * colour - 1)).abs().max() < 1e-6
    if mode in ("L", "RGB", "I;16"):  # the others store a colour differently
        assert (x - (colour / 127.5 - 1)).abs().max() <= 1 / 127.5 + 1e-6


def test_a_run_of_any_config_is_read_with_sound_flags_or_refused(tmp_path):
    run_folder()()

    @given(JSON)
    def any_json(value):
        Path("run/config.json").write_text(json.dumps(value))
        or_refused(read_run, "run")

    @given(st.binary(max_size=60))
    def any_bytes(value):
        Path("run/config.json").write_bytes(value)
        assert or_refused(read_run, "run") is None

    @given(st.dictionaries(st.sampled_from([*FLAGS, "seed"]), JSON, max_size=2), st.sampled_from([*FLAGS, None]))
    def changed_flags(values, missing):
        flags = {k: v for k, v in (FLAGS | values).items() if k != missing}
        Path("run/config.json").write_text(json.dumps({"format": "echodistill-1", "flags": flags}))
        found = or_refused(read_run, "run")
        if found is not None:
            assert missing is None and found[1]["base"] == "emoji" and found[1]["token"] == "<v>"
            assert isinstance(found[1]["class_word"], str) and 0 <= found[1]["guidance_scale"] < float("inf")
    any_json(), any_bytes(), changed_flags()


NUMBERS = [k for k, (kind, *_) in (RUN | KEYS).items() if kind in (int, float)]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def test_any_number_or_word_for_a_flag_is_taken_or_refused(concept):
    @given(st.sampled_from(NUMBERS), st.integers() | st.floats())
    def numbers(name, value):
        args = or_refused(train.parse_arguments, ["--concept", "dog", f"--{name}={value}"])
        assert args is None or value == value and abs(value) < float("inf") or name == "max_grad_norm"

    @given(st.sampled_from(["token", "class_word", "output_dir", "device", "base", "concept"]), TEXT)
    def words(name, value):
        args = or_refused(train.parse_arguments, ["--concept", "dog", f"--{name}={value}"])
        assert args is None or args.token.split() == [args.token] and args.class_word.strip()
    numbers(), words()


TENSORS = st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.tuples(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99)), max_size=4)


@given(TENSORS, JSON)
def test_every_checkpoint_comes_back_bit_for_bit_and_any_changed_byte_is_seen(described, meta):
    tensors = {k: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype) for k, (dtype, shape, seed) in described.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_checkpoint(path, {"part": tensors}, {"meta": meta})
        read, saved = read_checkpoint(path)
        assert json.dumps(read) == json.dumps({"meta": meta, "state": {"part": {}}}) and set(saved) == {f"part/{k}" for k in tensors}
        for k, v in tensors.items():
            assert saved[f"part/{k}"].dtype == v.dtype and torch.equal(saved[f"part/{k}"], v)
        twins = {k: torch.zeros_like(v) for k, v in tensors.items()}
        restore(saved, {}, {"part": twins})
        assert all(torch.equal(twins[k], v) for k, v in tensors.items())
        content = bytearray(path.read_bytes())
        if any(v.numel() for v in tensors.values()):
            content[-1] ^= 1
            path.write_bytes(content)
            with pytest.raises(ValueError, match="changed"):
                read_checkpoint(path)


@given(st.binary(max_size=200) | st.just(save({"a": torch.zeros(2)})))
def test_no_other_file_is_taken_for_a_checkpoint(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.safetensors"):
            read_checkpoint(path)


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([(), (1, 1), (3, 3)]), st.integers(1, 9), st.integers(0, 9))
def test_a_truncated_lora_is_the_best_of_its_rank_and_the_full_one_is_exact(out, into, kernel, rank, seed):
    delta = torch.randn(out, into, *kernel, generator=torch.Generator().manual_seed(seed))
    up, down = low_rank(delta, rank)
    s = torch.linalg.svdvals(delta.flatten(1).double())
    missed = (delta.flatten(1) - up.flatten(1) @ down.flatten(1)).norm()
    assert len(down) <= max(out, into) and abs(missed - s[rank:].square().sum().sqrt()) < 1e-4


@given(TEXT)
def test_every_prompt_gives_a_file_name_that_every_system_takes(prompt):
    assert set(slug(prompt)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and 0 < len(slug(prompt)) <= 60


@given(st.lists(st.text("aA1 <v>-,!\u72ac\u732b", max_size=6) | st.just("a <v> dog " + "and a cat " * 8), max_size=8))
def test_no_two_prompts_have_the_same_file_name(prompts):
    names = file_names(prompts)
    assert len(set(names)) == len(names) == len(prompts)
    plain = re.compile("[a-z0-9]+( [a-z0-9]+)*")
    by_name = {}
    for p in prompts:
        if not plain.fullmatch(p.replace("<v>", "v")):  # even in different calls of sample.py, in one folder
            assert by_name.setdefault(slug(p), p) == p


# ---------------------------------------------------------------------------------------------------------------
# Whatever the flags and the photos: a run begins, or there is one sentence

class Begins(Exception):
    """All checks are passed, and `train.build` would load the models."""


@pytest.fixture
def begins(concept, monkeypatch, capsys):
    """begins(argv): whether a run begins; else it was refused in one sentence, in time, and nothing was left behind."""
    def build(*args, **more):
        raise Begins
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "check_memory", lambda *a: None)  # its answer is the machine's
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def call(argv):
        before, started = sorted(Path(".").rglob("*")), time.monotonic()
        capsys.readouterr()
        try:
            train.main(argv)
        except Begins:
            new = set(Path(".").rglob("*")) - set(before)
            assert not [p for p in new if not p.is_dir()], "a lock or half a file is left"
            began = True
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code == 2 and said.count("error: ") == 1 and said.count("\n") == 1, said
            assert sorted(Path(".").rglob("*")) == before, "something is left behind"
            began = False
        assert time.monotonic() - started < 10
        for folder in ("out", "elsewhere"):
            shutil.rmtree(folder, ignore_errors=True)
        return began
    return call


ODD_TEXT = st.sampled_from(["", " ", "\udcff", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "9" * 5000, "0x10", "1_000", "true", "x" * 5000, "../..",
                            "~", "dog", "dog/00.png", "emoji", "kv", "lora", "latest", "/dev/zero", "/proc/self/mem", "out\n/x", "-", "--", "=", "\u0661"])
VALUES = st.integers() | st.integers(10 ** 9, 10 ** 30) | st.floats() | ODD_TEXT | TEXT.filter(lambda t: "\0" not in t)


def test_whatever_the_flags_a_run_begins_or_there_is_one_sentence(begins):
    """Any flags, several at once; likely values beside odd ones, so that many runs begin."""
    kinds = {k: kind for k, (kind, *_) in (RUN | KEYS).items() if k not in ("concept", "output_dir")}
    began = []

    def flag(name):
        kind = kinds[name]
        if kind is bool:
            return st.sampled_from([[f"--{name}"], [f"--no-{name}"]]) | VALUES.map(lambda v: [f"--{name}={v}"])
        likely = st.sampled_from(kind) if isinstance(kind, tuple) else st.integers(1, 9) if kind is int else st.floats(0, 1) if kind is float else TEXT
        return (likely | likely | VALUES).map(lambda v: [f"--{name}={v}"])

    @settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(sorted(kinds)).flatmap(flag), max_size=3),
           st.sampled_from([[], [], ["--output_dir", "elsewhere/x"]]) | VALUES.map(lambda v: [f"--output_dir={v}"] if not str(v).startswith(("/", "~")) else []))
    def any_flags(flags, out):
        began.append(begins(["--concept", "dog", *out, *(f for part in flags for f in part)]))
    any_flags()
    assert .1 < sum(began) / len(began) < .9


def test_whatever_lies_in_the_folder_of_photos_a_run_begins_or_there_is_one_sentence(begins, picture):
    kind, content = picture
    makers = {"photo": lambda p: p.write_bytes(content), "empty": lambda p: p.touch(), "half": lambda p: p.write_bytes(content[:len(content) // 2]),
              "text": lambda p: p.write_text("photo"), "folder": Path.mkdir, "pipe": os.mkfifo, "device": lambda p: os.symlink("/dev/zero", p),
              "nowhere": lambda p: os.symlink("gone", p), "loop": lambda p: os.symlink(p.name, p), "sparse": lambda p: (p.touch(), os.truncate(p, 10 ** 10)),
              "float": lambda p: Image.new("F", (4, 4), 7).save(p, "TIFF"), "unreadable": lambda p: (p.write_bytes(content), p.chmod(0))}
    names = st.sampled_from([f"a.{kind}", f"B.{kind.upper()}", "a.png", ".hidden.png", "notes.txt", "x.heic", "\udcff.png", "a\nb.png", "\u72ac.png", "a.tiff"])
    began = []

    @settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names, st.sampled_from(sorted(makers) + ["photo"] * len(makers)), max_size=3))
    def any_folder(files):
        shutil.rmtree("photos", ignore_errors=True)
        Path("photos").mkdir()
        for name, what in files.items():
            makers[what](Path("photos", name))
        began.append(begins(["--concept", "photos"]))
        sound = [name for name in files if not name.startswith(".") and not name.endswith(".txt")]
        if sound and all(files[name] == "photo" for name in sound) and "x.heic" not in sound:
            assert began[-1], "a folder of sound photos was refused"
    any_folder()
    assert any(began) and not all(began)


@given(st.binary(max_size=50), st.binary(max_size=50), st.booleans())
def test_a_file_is_the_old_one_or_the_new_one_and_nothing_else_remains(old, new, breaks):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(old)

        def write(part):
            part.write_bytes(new)
            if breaks:
                raise KeyboardInterrupt
        try:
            write_atomically(path, write)
        except KeyboardInterrupt:
            pass
        assert path.read_bytes() == (old if breaks else new) and [p.name for p in Path(folder).iterdir()] == ["a"]
