"""Baselines and ablations are what their names say. Run: python -m pytest tests/test_methods.py"""
import json
import shlex

import pytest
import torch
from safetensors.torch import load_file

import data.run as run_script
import train as script
from conftest import train
from data.base import load_pair
from data.benchmark.run import HERE, load_methods, recipe_flags
from data.run import load_run
from model import trainable_parameters

SHORT = ("--max_train_steps", 2, "--train_batch_size", 2, "--lr_decay", 0)


pytestmark = pytest.mark.usefixtures("quick_pictures")


def recipe(name):
    """The flags of a recipe of the benchmark, cut short."""
    return (*recipe_flags(HERE / "emoji" / f"{name}.toml"), *SHORT)


def moved(run, part=""):
    """Names of the weights that a run changed, against the base."""
    before = dict(getattr(load_pair("emoji", "<v>", "dog"), part or "student").unet.named_parameters())
    after = load_file(run / part / "unet_delta.safetensors") if part == "teacher" else load_file(run / "unet_delta.safetensors")
    return {k for k, v in after.items() if not torch.equal(v, before[k])}


def token_moved(run):
    return not torch.equal(load_file(run / "learned_embeds.safetensors")["<v>"], load_pair("emoji", "<v>", "dog").text.row)


def test_textual_inversion_moves_the_token_alone(concept):
    run = train(*recipe("textual_inversion"))
    assert not moved(run) and not moved(run, "teacher") and token_moved(run)


def test_custom_diffusion_moves_the_students_keys_and_values_and_the_token(concept):
    run = train(*recipe("custom_diffusion"))
    assert moved(run) == set(trainable_parameters(load_pair("emoji", "<v>", "dog").student.unet, "kv"))
    assert not moved(run, "teacher") and token_moved(run)


def test_the_prior_is_what_the_untouched_student_draws_of_the_class(concept, monkeypatch):
    taught, draw_class = [], script.draw_class
    monkeypatch.setattr(script, "draw_class", lambda m, args: taught.append(draw_class(m, args)) or taught[0])
    plain = load_file(train(*recipe("dreambooth"), "--seed", 0) / "unet_delta.safetensors")
    assert not taught
    run = train(*recipe("dreambooth_prior"), "--seed", 0)
    assert all({"denoising", "prior"} <= row.keys() for row in json.loads((run / "log.json").read_text()))
    assert any(not torch.equal(v, plain[k]) for k, v in load_file(run / "unet_delta.safetensors").items()) and not moved(run, "teacher")
    pair, noise = load_pair("emoji", "<v>", "dog"), torch.randn(len(taught[0].z), 24, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = taught[0].prompts
    assert {"a dog", "a dog in space"} < set(prompts) and "<v>" not in " ".join(prompts)
    with torch.no_grad():
        torch.testing.assert_close(taught[0].z[4:8], pair.student.one_step(noise[4:8], pair.text(prompts[4:8])))


def test_lora_changes_attention_weights_by_at_most_its_rank(concept):
    run = train(*recipe("lora"), "--lora_rank", 2, "--student_lr", 1e-2)
    before = dict(load_pair("emoji", "<v>", "dog").student.unet.named_parameters())
    changes = [v - before[k] for k, v in load_file(run / "unet_delta.safetensors").items()]
    assert changes and all(torch.linalg.matrix_rank(c.double(), rtol=1e-4) == 2 for c in changes)


def test_what_is_carried_to_the_student_is_the_teachers_change(concept):
    run = train(*recipe("teacher_kv"), "--teacher_lr", 1e-4)
    pair = load_pair("emoji", "<v>", "dog")
    student, teacher = dict(pair.student.unet.named_parameters()), dict(pair.teacher.unet.named_parameters())
    after = load_file(run / "unet_delta.safetensors")
    for k, v in load_file(run / "teacher" / "unet_delta.safetensors").items():
        assert not torch.equal(v, teacher[k])
        torch.testing.assert_close(after[k], student[k] + (v - teacher[k]), rtol=0, atol=1e-6)  # rounded step by step


def test_the_echo_stage_teaches_the_teacher_and_carries_nothing_back(concept):
    frozen = (*SHORT, "--student_lr", 0, "--train_unet", "kv", "--carry")
    whole = [load_file(train(*frozen, "--echo_steps", steps, "--echo_samples", 16) / part / "unet_delta.safetensors")
             for steps in (0, 2) for part in ("", "teacher")]
    student, teacher, student_after, teacher_after = whole
    assert all(torch.equal(student[k], student_after[k]) and not torch.equal(teacher[k], teacher_after[k]) for k in student)


def test_in_the_echo_stage_the_teacher_moves_first_and_then_the_student_alone(concept, monkeypatch):
    seen = {}

    def look(path, state, meta):
        seen[meta["step"]] = {k: torch.cat([p.detach().flatten() for p in state[k].values()]) for k in ("teacher", "student", "token")}
    monkeypatch.setattr(run_script, "save_checkpoint", look)
    train(*SHORT, "--max_train_steps", 1, "--echo_steps", 1, "--echo_samples", 16, "--checkpointing_steps", 1)
    still = {(step, k) for step in (2, 3) for k in seen[step] if torch.equal(seen[step][k], seen[step - 1][k])}
    assert still == {(2, "student"), (3, "teacher"), (3, "token")}


def test_a_sequential_run_first_trains_the_teacher_just_as_it_would_alone(concept):
    alone = train(*SHORT, "--echo_steps", 0, "--student_lr", 0, "--no-carry")
    expected = load_file(alone / "teacher" / "unet_delta.safetensors")
    assert not moved(alone)
    run = train(*recipe("sequential"))
    found = load_file(run / "teacher" / "unet_delta.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items()) and moved(run)


def test_without_a_shared_encoder_the_student_learns_a_token_of_its_own(concept):
    run = train(*recipe("own_text_encoder"), "--echo_steps", 0)
    pair = load_pair("emoji", "<v>", "dog")
    load_run(run, pair)
    assert pair.student_text is not pair.text and not torch.equal(pair.student_text.row, pair.text.row)
    torch.testing.assert_close(pair.student_text.row, load_file(run / "learned_embeds.safetensors")["<v>"], rtol=0, atol=0)
    assert torch.equal(pair.student_text(["a dog"]), pair.text(["a dog"])) and not torch.equal(pair.student_text(["a <v>"]), pair.text(["a <v>"]))


@pytest.mark.parametrize("name", [k for k, v in load_methods("emoji").items() if v["flags"]])
def test_every_method_is_accepted_and_differs_from_the_default(name, concept):
    plain, flags = (vars(script.parse_arguments(["--concept", "dog", *f])) for f in ([], shlex.split(load_methods("emoji")[name]["flags"])))
    assert plain != flags


@pytest.mark.parametrize("name", [k for k, v in load_methods("dreambench").items() if v["flags"]])
def test_every_method_for_photos_is_accepted(name, concept):
    script.parse_arguments(["--concept", "dog", *shlex.split(load_methods("dreambench")[name]["flags"])])
