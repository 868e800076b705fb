"""The echo as publicly described, each part a key of the recipe. python -m pytest tests/test_echo.py"""
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train as script
from conftest import train
from test_resume import files, stopped

SHORT = ("--max_train_steps", 1, "--echo_steps", 2, "--echo_samples", 16, "--mixed_precision", "no")


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """A finished run writes its weights and draws no pictures: these tests do not look at them."""
    def save(folder, pair, before, *rest):
        for role, denoiser in (("teacher", pair.teacher), ("student", pair.student)):
            save_file(denoiser.unet.state_dict(), folder / f"{role}.safetensors")
        save_file({"row": pair.text.row}, folder / "row.safetensors")
    monkeypatch.setattr(script, "preview", lambda *a: None)
    monkeypatch.setattr(script, "save_run", save)


def numbers_heard(monkeypatch):
    """Sizes of what the reconstruction loss is asked about, in order."""
    seen, reconstruction = [], script.losses.reconstruction

    def look(prediction, *rest):
        seen.append(len(prediction))
        return reconstruction(prediction, *rest)
    monkeypatch.setattr(script.losses, "reconstruction", look)
    return seen

@pytest.mark.parametrize("flags, heard", [((), [4, 4, 2, 4, 2]), (("--echo_replaces",), [4, 2, 2, 2, 2]),
                                          (("--echo_replaces", "--echo_share", 1), [4, 4, 4]), (("--echo_replaces", "--echo_real_only"), [4, 4, 4])])
def test_echoes_join_photos_or_replace_them_in_the_teachers_batch(flags, heard, concept, monkeypatch):
    """Photos, then echoes, of one joint iteration and two of the echo, batch 4."""
    seen = numbers_heard(monkeypatch)
    train(*SHORT, *flags)
    assert seen == heard

def test_in_a_shared_batch_each_picture_counts_once(concept, monkeypatch):
    """With half a batch replaced the teacher's loss is the mean over photos and echoes alike."""
    sums, backward = [], torch.Tensor.backward
    monkeypatch.setattr(script.losses, "reconstruction", lambda prediction, *rest: prediction.sum() * 0 + len(prediction))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: (sums.append(self.item()), backward(self, *a, **k))[1])
    train(*SHORT, "--echo_replaces", "--echo_share", .25, "--echo_weight", 1, "--student_lr", 0)
    assert sums == [4, 3 * 3 / 4 + 1 / 4, 3 * 3 / 4 + 1 / 4]

def test_echoes_stand_as_real_before_the_critics_while_the_student_follows(concept, monkeypatch):
    real, critic = [], script.passed_off_as_real

    def look(m, args, features, step):
        mixed = critic(m, args, features, step)
        real.append((m.echo.features, features, mixed))
        return mixed
    monkeypatch.setattr(script, "passed_off_as_real", look)
    train(*SHORT)
    assert not real, "off"
    train(*SHORT, "--echo_is_real")
    assert len(real) == 2, "in the student's two iterations alone"
    for echo, photos, mixed in real:
        for k in photos.keys() & mixed.keys():
            assert torch.equal(mixed[k][:2], photos[k][:2]) and len(mixed[k]) == 4
            assert all((echo[k] == row).all(1).any() for row in mixed[k][2:]), "what the encoder says of echoes"

def test_what_the_critics_call_real_changes_the_student_and_not_the_teachers_part(concept):
    runs = []
    for flags in ((), ("--echo_is_real",)):
        run = train(*SHORT, "--adversarial_weight", 1, "--scene_prompts", 0, *flags)
        runs.append([(run / f"{role}.safetensors").read_bytes() for role in ("student", "teacher")])
    assert runs[0][0] != runs[1][0] and runs[0][1] == runs[1][1]

def test_rounds_repeat_both_parts_and_each_begins_with_new_samples(concept, capsys):
    args = script.parse_arguments(["--concept", "dog", *map(str, SHORT), "--echo_rounds", "2"])
    assert [(t.who, t.round) for t in script.plan(args)] == [("both", 0), *[("teacher", 1)] * 2, *[("student", 1)] * 2, *[("teacher", 2)] * 2,
                                                              *[("student", 2)] * 2]
    run = train(*SHORT, "--echo_rounds", 2, "--student_lr", 1e-3)
    assert capsys.readouterr().out.count("samples kept") == 2
    assert (run / "echo.png").read_bytes() != (run / "echo-2.png").read_bytes()
    train(*SHORT)
    assert (run / "echo.png").is_file() and not (run / "echo-2.png").exists(), "nothing of an earlier run is left"

def test_a_run_that_stops_inside_the_second_round_goes_on_byte_for_byte(concept, monkeypatch):
    """In the teacher's part, where the echo is heard, and in the student's, where critics look at it."""
    flags = (*SHORT, "--echo_rounds", 2, "--echo_replaces", "--echo_is_real", "--log_steps", 3, "--critic_views", 2)
    whole, iteration, stops = files(train(*flags)), script.iteration, [6, 8]

    def stop(m, args, turn, step):
        assert turn.round == 2 or step < 5
        if step + 1 in stops:
            stops.remove(step + 1)
            signal.raise_signal(signal.SIGINT)
        return iteration(m, args, turn, step)
    monkeypatch.setattr(script, "iteration", stop)
    assert stopped(*flags) == 130 and stopped(*flags, "--resume_from_checkpoint", "latest") == 130 and not stops
    train(*flags, "--resume_from_checkpoint", "latest")
    assert files() == whole


def test_echoes_are_kept_as_bytes(concept):
    """A quarter of what fp32 takes in a checkpoint, and exactly what the teacher heard."""
    echo = script.Echo()
    assert echo.state_dict() == {}
    args = script.parse_arguments(["--concept", "dog", *map(str, SHORT)])
    m = script.build(args, torch.device("cpu"))
    turn = script.plan(args)[1]
    script.listen(m, args, turn, Path("."))
    state = m.echo.state_dict()
    assert state["images"].dtype == torch.uint8 and state["round"] == 1 and len(state["prompts"]) == len(state["images"])
    z, m.echo = m.echo.z, echo
    m.echo.load_state_dict(state)
    script.listen(m, args, turn, Path("."))
    assert torch.equal(m.echo.z, z)
