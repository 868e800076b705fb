"""Pretraining of the embedded pair: its stages follow one another, go on after a kill and end in time. python -m pytest tests/test_pretrain.py"""
import os
import shutil
import signal
from pathlib import Path

import pretrain
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from stages import encoders, loop, student, teacher
from world import World, words

BASE = str(ROOT / "data/emoji/base")


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def stage(name, *flags, work="work", batch=4):
    pretrain.main([name, "--work", work, "--batch", str(batch), "--log_every", "1", *map(str, flags)])
    return Path(work, name)


def weights(folder):
    return load_file(folder / "checkpoint.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("name, flags", [("identity", []), ("teacher", ["--init", BASE])])  # of one optimizer, of two
def test_a_killed_stage_goes_on_as_if_nothing_had_happened(monkeypatch, name, flags):
    whole = weights(stage(name, "--steps", 4, *flags))
    with monkeypatch.context() as m:
        kept = loop.Batches.__getitem__
        m.setattr(loop.Batches, "__getitem__", lambda self, i: (os.kill(os.getpid(), signal.SIGTERM) if i == 1 else None, kept(self, i))[1])
        with pytest.raises(SystemExit) as stop:
            stage(name, "--steps", 4, *flags, work="killed")
    assert stop.value.code == 130 and not same(weights(Path("killed", name)), whole)
    assert same(weights(stage(name, "--steps", 4, *flags, work="killed")), whole)
    assert [line.split()[1] for line in open(f"killed/{name}/log.txt")] == ["1", "2", "3", "4"]


def test_muon_turns_what_multiplies_and_leaves_the_rest_to_adamw():
    module = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(8, 16, 3), "embedding": torch.nn.Embedding(9, 8), "norm": torch.nn.GroupNorm(2, 8)})
    optimizers = teacher.muon_and_adamw(module, 1e-3)
    before = module["conv"].weight.detach().clone()
    for w in module.parameters():
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    optimizers["muon"].step()
    moved = (module["conv"].weight.detach() - before * (1 - 1e-5)).flatten(1) / (1e-3 * .2 * 72 ** .5)  # learning rate, AdamW's size for (16, 72)
    assert torch.linalg.svdvals(moved).sub(1).abs().max() < .4  # five Newton-Schulz steps come so near to orthogonal
    handled = [w for o in optimizers.values() for group in o.param_groups for w in group["params"]]
    assert [w.numel() for w in handled] == [before.numel(), 16, 72, 8, 8]


def test_a_student_takes_the_one_step_that_training_and_sampling_take(pair):
    noise, context = torch.randn(2, *pair.latent_shape, generator=torch.Generator().manual_seed(0)), pair.text(["a dog", "a cat"])
    with torch.no_grad():
        assert torch.allclose(teacher.denoiser(pair.teacher.unet).one_step(noise, context), pair.teacher.one_step(noise, context), atol=1e-5)  # both predict v


def test_matching_moves_a_student_to_where_the_guided_teacher_and_not_the_fake_would_have_it():
    class Knows(torch.nn.Linear):  # the clean latent, whatever the noise
        def __init__(self, of_prompt, of_empty):
            super().__init__(1, 1)
            self.x = of_prompt, of_empty

        def forward(self, z_t, t, context):
            x, a = torch.where(context.view(-1, 1, 1, 1) > 0, *self.x), bar[t].sqrt().view(-1, 1, 1, 1)
            return type("", (), {"sample": (a * z_t - x) / (1 - a ** 2).sqrt()})
    of_teacher, of_fake = (teacher.denoiser(Knows(*x)) for x in ((.5, .1), (.2, 9.)))
    g, bar = torch.Generator().manual_seed(0), of_fake.alphas_cumprod
    z, eps, t, context, empty = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g), torch.tensor([100, 900]), torch.ones(2, 1, 1), torch.zeros(1, 1, 1)
    step = student.away_from_teacher(z, t, eps, of_teacher, of_fake, context, empty, 2.)
    assert torch.allclose(step, (.2 - .9) / (z - .9).abs().mean((1, 2, 3), keepdim=True) * torch.ones_like(z), atol=1e-3)  # .9 = .1 + 2 (.5 - .1)


def test_the_tokenizer_comes_out_the_same_every_time_with_a_token_for_each_word():
    first, second = (encoders.build_tokenizer(name) for name in ("first", "second"))
    assert first.get_vocab() == second.get_vocab()
    assert [w for w in words() if len(first.tokenize(w)) > 1] == ["close-up"]


def test_workers_draw_the_same_batches():
    assert same(weights(stage("identity", "--steps", 2)), weights(stage("identity", "--steps", 2, "--workers", 1, work="ahead")))


def test_a_stage_ends_when_its_minutes_are_over_and_at_rest(monkeypatch):
    factors, kept = [], loop.trapezoid
    monkeypatch.setattr(loop, "trapezoid", lambda *a: factors.append(kept(*a)) or factors[-1])
    folder = stage("identity", "--steps", 1000, "--minutes", 1e-9)
    assert factors == [0] and len(open(folder / "log.txt").readlines()) == 1


def test_the_rate_rises_holds_and_falls():
    assert loop.trapezoid(0, 0, .3) == 1 / 200 and loop.trapezoid(500, .5, .3) == 1 and loop.trapezoid(900, .85, .3) == pytest.approx(.5) and loop.trapezoid(9, 1, .3) == 0 and loop.trapezoid(500, .99, 0) == 1


def test_from_the_shipped_encoders_through_every_stage_to_a_pair_that_draws():
    for name in ("clip", "identity", "judge_clip", "judge_identity", "judge_names"):
        before = encoders.shipped_encoder(type("", (), {"init": BASE, "stage": name}))["image"]["weight"]
        after = weights(stage(name, "--steps", 1, "--init", BASE))["image/weight"]
        assert 0 < (after - before).abs().max() < 1e-4, name  # one step at a two hundredth of the rate
    stage("vae", "--steps", 2, "--sharpen", 0, "--init", BASE)
    stage("teacher", "--steps", 1, "--noises", 2, "--init", BASE)
    stage("pairs", "--steps", 1)
    moved = weights(stage("student", "--steps", 2))
    assert not torch.equal(moved["ema/conv_in.weight"], weights(Path("work/teacher"))["ema/0.conv_in.weight"])
    matched = weights(stage("match", "--steps", 2))
    assert not torch.equal(matched["ema/conv_in.weight"], moved["ema/conv_in.weight"]) and not torch.equal(matched["fake/conv_in.weight"], matched["ema/conv_in.weight"])
    stage("export", "--base", "base")
    from data.base import load_encoders, load_pair
    pair, training_family = load_pair("base", "<v>", "dog"), load_encoders("base")
    assert torch.equal(pair.student.unet.conv_in.weight, matched["ema/conv_in.weight"].half().float())
    assert set(training_family) == {"identity", "clip"} and pair.latent_shape == (24, 8, 8)
    with torch.no_grad():
        x = pair.decode(pair.student.sample(torch.randn(2, *pair.latent_shape), pair.text(["a dog", "a cat"]), 1))
    assert x.shape == (2, 3, 64, 64) and x.isfinite().all()
    readme = (ROOT / "data/emoji/README.md").read_bytes()
    shutil.copytree(Path(BASE, "judges"), "base/judges", dirs_exist_ok=True)
    pretrain.main(["measure", "--base", "base", "--samples", "2", "--work", "work"])
    assert Path("base/samples.png").is_file() and Path("base/scores.json").is_file() and (ROOT / "data/emoji/README.md").read_bytes() == readme
    assert torch.equal(pair.vae.decoder.outward.weight, weights(Path("work/vae"))["ema/decoder.outward.weight"].half().float())


def test_export_writes_what_has_a_checkpoint_and_leaves_the_rest(tmp_path):
    base = Path(shutil.copytree(BASE, tmp_path / "base", symlinks=True))
    stage("vae", "--steps", 1, "--init", BASE)
    before = {p: p.read_bytes() for p in base.rglob("*.safetensors")}
    stage("export", "--base", base)
    changed = {p.relative_to(base).as_posix() for p in base.rglob("*.safetensors") if p.read_bytes() != before[p]}
    assert changed == {"teacher/vae/diffusion_pytorch_model.safetensors"}
    from data.base import load_pair
    old, new = load_pair(BASE, "<v>", "dog"), load_pair(base, "<v>", "dog")
    with torch.no_grad():
        x = World("pretrain").sample(2, torch.Generator().manual_seed(0)).images
        assert (new.encode(x) - old.encode(x)).abs().max() < .01, "the same code"


def test_one_module_may_learn_alone():
    folder = stage("judge_names", "--steps", 2, "--only", "nouns", "--lr", .1, "--init", BASE)
    shipped, moved = encoders.shipped_encoder(type("", (), {"init": BASE, "stage": "judge_names"})), weights(folder)
    assert torch.equal(moved["image/weight"], shipped["image"]["weight"]) and not torch.equal(moved["nouns/weight"], shipped["nouns"]["weight"])
