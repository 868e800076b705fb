"""A run that goes astray stops, says where, and leaves the last good checkpoint. python -m pytest tests/test_numbers.py"""
import json
import os
import shutil

import pytest
import torch

import train as train_script
from conftest import ROOT, exit_of, train
from data.run import checkpoints, read_checkpoint

pytestmark = pytest.mark.usefixtures("quick_pictures")
SHORT = ("--max_train_steps", 6, "--echo_steps", 0, "--checkpointing_steps", 2, "--mixed_precision", "no")


def poison(monkeypatch, name, call, value=float("nan")):
    """Let a loss return `value` from the given call on."""
    count, loss = [], getattr(train_script.losses, name)

    def poisoned(*args, **more):
        count.append(1)
        return loss(*args, **more) + (value if len(count) >= call else 0)
    monkeypatch.setattr(train_script.losses, name, poisoned)


@pytest.mark.parametrize("name, per_step, term, flag", [
    ("reconstruction", 1, "reconstruction", "--teacher_lr"), ("identity_per_sample", 1, "alignment", "--teacher_lr"),
    ("adversarial_per_sample", 2, "adversarial", "--critic_lr"), ("critic", 2, "critic", "--critic_lr")])
def test_the_first_loss_that_is_not_finite_is_named_with_its_step_and_flag(concept, monkeypatch, capsys, name, per_step, term, flag):
    poison(monkeypatch, name, 4 * per_step + 1)
    with pytest.raises(SystemExit) as stop:
        train(*SHORT)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"{term} is nan at iteration 5; lower {flag}" in said and "step-000004" in said
    newest = checkpoints("out/dog")[-1]
    assert newest.name == "step-000004.safetensors" and newest.name in said
    assert all(v.isfinite().all() for v in read_checkpoint(newest)[1].values()) and not os.path.exists("out/dog/config.json")


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_named(concept, monkeypatch, capsys):
    identity = train_script.losses.identity_per_sample
    monkeypatch.setattr(train_script.losses, "identity_per_sample", lambda a, b: identity(a, b) + (a - a).abs().sqrt().mean())  # d sqrt(0) = inf
    with pytest.raises(SystemExit):
        train(*SHORT)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "student's gradient is nan at iteration 1; lower --teacher_lr or --student_lr; no checkpoint had been written yet" in said


def test_a_rate_far_too_high_stops_the_run_with_one_sentence_and_no_result(concept, capsys):
    with pytest.raises(SystemExit) as stop:
        train(*SHORT, "--teacher_lr", 1e30)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--teacher_lr" in said and not os.path.exists("out/dog/config.json")


def test_fp16_is_refused_for_a_v_prediction_teacher_before_training(concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    code, said = exit_of(train_script.main, ["--concept", "dog", "--mixed_precision", "fp16"], capsys)
    assert code == 2 and "--mixed_precision fp16" in said and "bf16" in said


def test_fp16_trains_with_an_epsilon_teacher(concept):
    shutil.copytree(ROOT / "data/emoji/base", "base", symlinks=True)
    config = json.loads(open("base/teacher/scheduler/scheduler_config.json").read())
    with open("base/teacher/scheduler/scheduler_config.json", "w") as f:
        json.dump(config | {"prediction_type": "epsilon"}, f)
    short = ("--base", "base", "--max_train_steps", 1, "--echo_steps", 0, "--train_batch_size", 1)
    logs = []
    for precision in ("no", "fp16"):
        log = json.loads((train(*short, "--mixed_precision", precision) / "log.json").read_text())[0]
        logs.append(torch.tensor([log[k] for k in ("reconstruction", "alignment", "adversarial", "critic")]))
    assert not torch.equal(*logs)
    torch.testing.assert_close(*logs, rtol=.02, atol=.02)


def test_a_critic_that_has_won_is_reported_once(concept, monkeypatch, capsys):
    count = []

    def fading(logits):
        count.append(1)
        return logits.sum(1) * .1 ** len(count)
    monkeypatch.setattr(train_script.losses, "critic_accuracy", lambda *a: torch.tensor(1.))
    monkeypatch.setattr(train_script.losses, "adversarial_per_sample", fading)
    train("--max_train_steps", 4, "--echo_steps", 0, "--adversarial_weight", 1, "--scene_prompts", 0)
    said = capsys.readouterr().out
    assert said.count("the clip critic has won") == 1 and said.count("the identity critic has won") == 1 and "--critic_lr" in said


def test_a_critic_that_is_sometimes_wrong_has_not_won(concept, monkeypatch, capsys):
    count = []

    def fading(logits):
        count.append(1)
        return logits.sum(1) * .1 ** len(count)
    monkeypatch.setattr(train_script.losses, "critic_accuracy", lambda *a: torch.tensor(.99))
    monkeypatch.setattr(train_script.losses, "adversarial_per_sample", fading)
    train("--max_train_steps", 2, "--echo_steps", 0, "--scene_prompts", 0)
    assert "has won" not in capsys.readouterr().out


def test_a_batch_of_scenes_alone_does_not_look_like_a_critic_that_has_won(concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script.losses, "critic_accuracy", lambda *a: torch.tensor(1.))
    monkeypatch.setattr(train_script.losses, "adversarial_per_sample", lambda logits: logits.sum(1))
    train("--max_train_steps", 8, "--echo_steps", 0, "--train_batch_size", 1, "--scene_prompts", .6)
    assert "has won" not in capsys.readouterr().out


def test_accuracy_counts_photos_and_judged_samples_only():
    real, fake = torch.tensor([[0., 1.], [1., 0.]]), torch.tensor([[1., 0.], [0., 1.], [0., 1.]])
    assert train_script.losses.critic_accuracy(real, fake, torch.tensor([1., 1., 0.])) == .5
    assert train_script.losses.critic_accuracy(real[:1], fake, torch.tensor([1., 0., 0.])) == 1
