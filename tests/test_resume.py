"""Runs survive signals, kills and damaged checkpoints. python -m pytest tests/test_resume.py (-m slow for fifty kills)"""
import json
import multiprocessing
import os
import platform
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data.run as run_script
import train as train_script
from conftest import ROOT, drawn_in_one_step, train
from data.run import checkpoints, read_checkpoint, restore, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_pictures")
SHORT = ("--max_train_steps", 4, "--echo_steps", 2, "--echo_samples", 32, "--checkpointing_steps", 2, "--log_steps", 3)


def files(run="out/dog"):
    """{name: bytes} of everything in a run's folder."""
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(Path(run).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All files of the uninterrupted short run."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("whole"))
    os.symlink(ROOT / "data" / "dog", "dog")
    try:
        with drawn_in_one_step():
            return files(train(*SHORT, "--preview_steps", 3))
    finally:
        os.chdir(here)


def interrupt_at(step, monkeypatch, number=signal.SIGINT, times=1):
    """Send a signal during the given iteration, `times` times in a row."""
    count, reconstruction = [], train_script.losses.reconstruction

    def interrupt(*args):
        count.append(1)
        for _ in range(times if len(count) == step else 0):
            signal.raise_signal(number)
        return reconstruction(*args)
    monkeypatch.setattr(train_script.losses, "reconstruction", interrupt)


def stopped(*flags):
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    return stop.value.code


@pytest.mark.parametrize("stop_after, number, code", [(2, signal.SIGINT, 130), (5, signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_its_printed_command_completes_the_same_run(concept, monkeypatch, capsys, whole, stop_after, number, code):
    interrupt_at(stop_after, monkeypatch, number)
    assert stopped(*SHORT, "--preview_steps", 3) == code
    assert checkpoints("out/dog")[-1].name == f"step-{stop_after:06d}.safetensors"
    command = capsys.readouterr().out.split("go on with: python train.py ")[1].split("\n")[0]
    train_script.main(train_script.shlex.split(command))
    assert files() == whole


def test_the_echo_asks_what_the_photos_prompts_ask(concept, monkeypatch):
    interrupt_at(7, monkeypatch)  # the first loss of the echo's second iteration
    assert stopped(*SHORT) == 130
    prompts = read_checkpoint(checkpoints("out/dog")[-1])[0]["state"]["echo"]["prompts"]
    assert set(prompts) == {"a <v> dog", "a photo of a <v> dog", "a picture of a <v> dog"} and len(prompts) == 8  # a quarter of 32


def test_a_run_of_low_rank_factors_and_two_tokens_goes_on_exactly_too(concept, monkeypatch):
    variant = (*SHORT, "--train_unet", "lora", "--no-share_text", "--denoising_weight", .1, "--size_augmentation")
    whole = files(train(*variant))
    interrupt_at(3, monkeypatch)
    assert stopped(*variant) == 130
    train(*variant, "--resume_from_checkpoint", "latest")
    assert files() == whole


def test_a_second_signal_stops_at_once_without_a_checkpoint(concept, monkeypatch):
    interrupt_at(1, monkeypatch, times=2)
    assert stopped(*SHORT) == 130 and not checkpoints("out/dog")


def test_a_forgotten_resume_flag_loses_no_work(concept, monkeypatch, capsys):
    interrupt_at(2, monkeypatch)
    stopped(*SHORT)
    saved = checkpoints("out/dog")[-1].read_bytes()
    interrupt_at(1, monkeypatch)
    stopped(*SHORT)
    aside, = checkpoints("out/dog", "checkpoints-before")
    assert aside.read_bytes() == saved and f"--resume_from_checkpoint {aside}" in capsys.readouterr().out
    assert [p.name for p in checkpoints("out/dog")] == ["step-000001.safetensors"]
    interrupt_at(1, monkeypatch)
    stopped(*SHORT)  # forgotten again
    assert aside.read_bytes() == saved and len(checkpoints("out/dog", "checkpoints-before-2")) == 1


def test_the_resume_command_replaces_an_earlier_resume_flag(concept, monkeypatch, capsys):
    interrupt_at(1, monkeypatch)
    stopped(*SHORT)
    interrupt_at(1, monkeypatch)
    stopped("--resume_from_checkpoint", "out/dog/checkpoints/step-000001.safetensors", *SHORT)
    command = capsys.readouterr().out.rsplit("go on with: ", 1)[1]
    assert command.count("--resume_from_checkpoint") == 1 and command.endswith("--log_steps 3 --resume_from_checkpoint latest\n")


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(concept, monkeypatch, capsys, whole):
    interrupt_at(5, monkeypatch)
    stopped(*SHORT, "--preview_steps", 3)
    before, newest = checkpoints("out/dog")
    newest.write_bytes(newest.read_bytes()[:-1000])
    train(*SHORT, "--preview_steps", 3, "--resume_from_checkpoint", "latest")
    said = capsys.readouterr().out
    assert f"{newest} is truncated" in said and f"resumed {before} at iteration 4" in said
    assert files() == whole


def altered(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage, said", [(altered, "has changed"), (foreign, "no checkpoint"), (lambda p: p.write_bytes(b""), "truncated"),
                                          (lambda p: p.write_text("{}"), "truncated"), (lambda p: (p.unlink(), p.mkdir()), "truncated")])
def test_damage_of_every_kind_is_refused_by_name_before_a_model_is_loaded(concept, monkeypatch, capsys, damage, said):
    path = Path("out/dog/checkpoints/step-000002.safetensors")
    save_checkpoint(path, {"token": {"row": torch.zeros(1, 4)}}, {"step": 2, "flags": {}})
    read_checkpoint(path)
    damage(path)
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    for where in ("latest", path):
        assert stopped(*SHORT, "--resume_from_checkpoint", where) == 2
        heard = capsys.readouterr()
        assert str(path) in heard.out + heard.err and said in heard.out + heard.err


@pytest.fixture
def resume(concept, monkeypatch):
    """Flags that go on from a checkpoint, and no models: what they lead to is either a sentence or `Loads`."""
    argv = ["--concept", "dog", "--log_steps", "1", "--preview_steps", "0"]
    with run_script.Run(train_script.parse_arguments(argv), argv) as run:
        run.state = {"token": {"row": torch.zeros(1, 4)}}
        run.checkpoint(1)

    def load(*args, **more):
        raise Loads
    monkeypatch.setattr(train_script, "load_pair", load)
    return "--resume_from_checkpoint", "latest"


class Loads(Exception):
    """All checks are passed and models would be loaded."""


def test_resuming_after_a_photo_has_changed_is_refused_and_names_it(concept, resume, capsys):
    content = (concept / "02.png").read_bytes()
    for change, said in ((lambda: (concept / "02.png").write_bytes((concept / "01.png").read_bytes()), "02.png has changed"),
                         (lambda: (concept / "02.png").unlink(), "02.png is gone"),
                         (lambda: (concept / "0.png").write_bytes(content), "0.png is new")):
        change()
        assert stopped(*resume) == 2
        heard = capsys.readouterr().err
        assert said in heard and "step-000001.safetensors" in heard
        (concept / "0.png").unlink(missing_ok=True)
        (concept / "02.png").write_bytes(content)
    (concept / "02.png").rename(concept / "02b.png")  # the same photo in the same place
    with pytest.raises(Loads):
        train(*resume)


def test_where_the_last_bits_would_differ_a_run_goes_on_only_if_that_is_allowed(resume, monkeypatch, capsys):
    for owner, name, value, said in ((torch, "get_num_threads", lambda: 64, "threads was 1 when"), (run_script, "version", lambda p: "0.1", "diffusers was"),
                                     (torch.backends.cpu, "get_cpu_capability", lambda: "NEON", "NEON")):
        with monkeypatch.context() as other:
            other.setattr(owner, name, value)
            assert stopped(*resume) == 2
            heard = capsys.readouterr().err
            assert said in heard and "--allow_other_bits" in heard
            with pytest.raises(Loads):
                train(*resume, "--allow_other_bits")
            assert said in capsys.readouterr().out
    with pytest.raises(Loads):
        train(*resume)


def test_a_folder_has_one_run_at_a_time_and_the_second_gets_a_sentence(concept, capsys):
    argv = ["--concept", "dog"]
    with run_script.Run(train_script.parse_arguments(argv), argv):
        assert json.loads(Path("out/dog/run.lock").read_text()) == {"pid": os.getpid(), "host": platform.node()}
        assert stopped(*SHORT) == 2
        heard = capsys.readouterr().err
        assert f"goes on as process {os.getpid()} on {platform.node()}" in heard and heard.count("error: ") == 1
        assert Path("out/dog/run.lock").exists(), "the second run removed the first one's lock"
    assert not Path("out/dog/run.lock").exists()


def test_a_lock_that_a_killed_run_left_is_taken_over_and_removed_at_the_end(concept, capsys):
    Path("out/dog").mkdir(parents=True)
    for left in ({"pid": 4_000_000, "host": platform.node()}, {"pid": os.getpid(), "host": platform.node()}):  # processes' numbers come again
        Path("out/dog/run.lock").write_text(json.dumps(left))
        argv = ["--concept", "dog"]
        with pytest.raises(KeyError), run_script.Run(train_script.parse_arguments(argv), argv):
            raise KeyError  # whatever ends a run
        assert f"process {left['pid']}, which was killed, had left out/dog/run.lock" in capsys.readouterr().out
        assert not list(Path("out/dog").iterdir())
    for left in ("", "{", "[]"):  # it was killed while it wrote
        Path("out/dog/run.lock").write_text(left)
        with run_script.Run(train_script.parse_arguments(argv), argv):
            pass


def test_where_no_file_can_be_locked_a_lock_that_is_left_counts(concept, monkeypatch, capsys):
    monkeypatch.setattr(run_script, "fcntl", None)  # as on Windows
    argv = ["--concept", "dog"]
    with run_script.Run(train_script.parse_arguments(argv), argv):
        assert stopped(*SHORT) == 2 and "out/dog/run.lock)" in capsys.readouterr().err
    assert not Path("out/dog/run.lock").exists()


def test_of_many_runs_that_want_a_folder_at_once_only_one_has_it(capsys):
    inside, most, had = [], [], []

    def want(number):
        for _ in range(20):
            try:
                lock = run_script.take_lock(Path("."))
            except SystemExit:
                continue
            inside.append(number)
            most.append(len(inside))
            had.append(number)
            inside.remove(number)
            run_script.drop_lock(lock)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(want, range(8)))
    assert max(most) == 1 and len(had) >= 8 and not Path("run.lock").exists()


def test_resuming_with_other_flags_is_refused_before_a_model_is_loaded(concept, monkeypatch, capsys):
    interrupt_at(1, monkeypatch)
    stopped(*SHORT)
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    assert stopped(*SHORT, "--resume_from_checkpoint", "latest", "--seed", 7) == 2
    assert "--seed is 7" in capsys.readouterr().err


@pytest.mark.parametrize("limit, kept", [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_only_the_newest_checkpoints_are_kept(concept, monkeypatch, limit, kept):
    interrupt_at(5, monkeypatch)
    stopped("--max_train_steps", 6, "--echo_steps", 0, "--checkpointing_steps", 1, "--checkpoints_total_limit", limit)
    assert [int(p.stem[5:]) for p in checkpoints("out/dog")] == kept


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    module, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    save_checkpoint("a.safetensors", {"a": module, "b": {"row": torch.ones(1)}}, {})
    row = torch.zeros(1)
    with pytest.raises(ValueError, match="a/weight"):
        restore(read_checkpoint("a.safetensors")[1], {}, {"b": {"row": row}, "a": other})
    assert row == 0


def test_a_checkpoint_holds_no_value_that_is_not_finite(capsys):
    save_checkpoint("a.safetensors", {"b": {"row": torch.ones(1)}}, {"step": 1})
    with pytest.raises(SystemExit):
        save_checkpoint("a.safetensors", {"b": {"row": torch.tensor([torch.nan])}}, {"step": 2})
    assert "b/row" in capsys.readouterr().err and read_checkpoint("a.safetensors")[0]["step"] == 1


def test_a_checkpoint_gives_back_modules_optimizers_and_meta_bit_for_bit():
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), lr=.1)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    net, optimizer = make()
    step(net, optimizer)
    save_checkpoint("a.safetensors", {"net": net, "adamw": optimizer}, {"history": [{"loss": .1 + .2}]})
    twin, twin_optimizer = make()
    meta, saved = read_checkpoint("a.safetensors")
    restore(saved, meta.pop("state"), {"net": twin, "adamw": twin_optimizer})
    for pair in ((net, optimizer), (twin, twin_optimizer)):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
    assert meta == {"history": [{"loss": .1 + .2}]}


def quiet_train(folder, argv):
    """A training process of its own inside `folder`, forked from a server that has imported torch already."""
    os.chdir(folder)
    os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    with drawn_in_one_step():
        train_script.main(argv)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(concept, kills, capsys):
    joint, echo = kills // 4 + 4, kills // 6 + 2  # a kill costs about an iteration, so that fifty reach every stage
    stages = [(0, "joint"), (joint, "echo, teacher"), (joint + echo, "echo, student"), (joint + 2 * echo, "end")]  # (first iteration, name)
    flags = ["--concept", concept, "--max_train_steps", joint, "--echo_steps", echo, "--echo_samples", 16, "--train_batch_size", 2,
             "--checkpointing_steps", 1, "--preview_steps", 4, "--log_steps", 3, "--seed", 3]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "diffusers", "transformers"])
    chance, hit, during_write, left, seen = random.Random(kills), 0, 0, [], {}

    def finished(folder):
        """Names of the checkpoints that have come so far."""
        seen.setdefault(folder, set()).update(p.name for p in checkpoints(f"{folder}/out/dog"))
        return seen[folder]

    def start(folder, *more):
        os.makedirs(folder, exist_ok=True)
        process = context.Process(target=quiet_train, args=(folder, [str(f) for f in (*flags, *more)]))
        process.start()
        return process
    plain = start("plain")
    plain.join()
    assert plain.exitcode == 0
    start_up, runs = 0, 0
    while hit < kills:  # a run that is through before it was killed often enough counts, and another begins
        folder, runs, began = f"killed{runs}", runs + 1, time.time()
        process = start(folder)
        while True:
            while not start_up and not finished(folder):
                time.sleep(.05)
            start_up = start_up or time.time() - began  # seconds until the first checkpoint
            if hit < kills and chance.random() < .7:  # most kills are to hit the iterations and their writes, not the loading
                before = len(finished(folder))
                while len(finished(folder)) == before and process.is_alive():
                    time.sleep(.02)
                process.join(chance.uniform(0, .2 * start_up))
            else:
                process.join(chance.uniform(0, start_up) if hit < kills else None)
            if process.exitcode is not None:
                break
            process.kill()  # SIGKILL
            process.join()
            hit += 1
            during_write += bool(list(Path(folder).rglob(".*.part")))
            there = checkpoints(f"{folder}/out/dog")
            at = int(there[-1].stem[5:]) if there else 0
            left.append([name for first, name in stages if first <= at][-1])
            process = start(folder, *["--resume_from_checkpoint", "latest"] * bool(there))
        assert process.exitcode == 0, Path(f"{folder}/log.txt").read_text()[-2000:]
        assert files(f"{folder}/out/dog") == files("plain/out/dog")
    with capsys.disabled():
        print(f"\n{hit} kills in {runs} run(s), {during_write} of them during a write; stages: "
              + ", ".join(f"{left.count(name)} in {name}" for _, name in stages))
    assert kills < 50 or all(name in left for _, name in stages[:3]), "a stage was not hit"
