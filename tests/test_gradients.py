"""Gradients reach exactly the parameters they should. python -m pytest tests/test_gradients.py"""
import pytest
import torch

import losses
from data.base import load_pair
from model import Critic, trainable_parameters


@pytest.fixture
def fresh():
    pair = load_pair("emoji", "<v>", "dog")
    for d in (pair.teacher, pair.student):
        for p in trainable_parameters(d.unet, "kv").values():
            p.requires_grad_(True)
    return pair


def reached(pair):
    """Names of all parameters of the pair with a non-zero gradient."""
    parts = {"text": pair.text, "vae": pair.vae, "teacher": pair.teacher.unet, "student": pair.student.unet}
    return {f"{k}.{n}" for k, m in parts.items() for n, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def latent_distance(z):
    """(B,) from a teacher that guesses 0."""
    return losses.latent_per_sample(z, torch.zeros_like(z))


def kv(pair, who):
    return {f"{who}.{n}" for n in trainable_parameters(getattr(pair, who).unet, "kv")}


def test_kv_is_the_keys_and_values_of_every_cross_attention(pair):
    names = trainable_parameters(pair.teacher.unet, "kv")
    layers = [n for n, m in pair.teacher.unet.named_modules() if n.endswith("attn2")]
    assert len(layers) == 7 and set(names) == {f"{n}.{w}.weight" for n in layers for w in ("to_k", "to_v")}
    assert len(trainable_parameters(pair.teacher.unet, "all")) == len(list(pair.teacher.unet.parameters()))


def test_the_teachers_loss_reaches_its_kv_and_the_token_only(fresh):
    z, t = torch.randn(2, *fresh.latent_shape), torch.tensor([200, 700])
    out = fresh.teacher(z, t, fresh.text(["a <v> dog"] * 2))
    losses.reconstruction(out, torch.randn_like(out)).backward()
    assert reached(fresh) == kv(fresh, "teacher") | {"text.row"}


@pytest.mark.parametrize("detach", [True, False])
def test_the_students_losses_reach_its_kv_and_the_token_only_when_not_detached(fresh, encoders, detach):
    context = fresh.text(["a <v> dog"] * 2)
    z = fresh.student.one_step(torch.randn(2, *fresh.latent_shape), context.detach() if detach else context)
    x = fresh.decode(z)
    features = encoders["identity"].features(x)
    head = Critic(encoders["identity"].width)
    loss = latent_distance(z) + losses.adversarial_per_sample(head(features))
    loss = loss + losses.identity_per_sample(encoders["identity"].embed(features)[:, None], torch.randn(2, 1, 128))
    loss = loss + losses.sliced_wasserstein_per_sample(x, torch.zeros_like(x), losses.random_projections(4, torch.Generator().manual_seed(0)))
    loss.sum().backward()
    assert reached(fresh) == kv(fresh, "student") | (set() if detach else {"text.row"})


@pytest.mark.parametrize("term", ["adversarial", "identity", "latent", "swd", "lpips"])
def test_each_student_term_alone_has_a_gradient(fresh, encoders, term):
    z = fresh.student.one_step(torch.randn(2, *fresh.latent_shape), fresh.text(["a <v> dog"] * 2).detach())
    x = fresh.decode(z)
    loss = {"adversarial": lambda: losses.adversarial_per_sample(Critic(encoders["clip"].width)(encoders["clip"].features(x))),
            "identity": lambda: losses.identity_per_sample(encoders["identity"].embed(encoders["identity"].features(x))[:, None], torch.randn(2, 1, 128)),
            "latent": lambda: latent_distance(z),
            "lpips": lambda: losses.lpips_per_sample(encoders["identity"].layers(x), encoders["identity"].layers(torch.zeros_like(x))),
            "swd": lambda: losses.sliced_wasserstein_per_sample(x, torch.zeros_like(x), losses.random_projections(4, torch.Generator().manual_seed(0)))}[term]()
    loss.sum().backward()
    assert reached(fresh) == kv(fresh, "student")


def test_the_critics_loss_stays_in_the_critic(fresh, encoders):
    x = fresh.decode(fresh.student.one_step(torch.randn(2, *fresh.latent_shape), fresh.text(["a dog"] * 2)))
    head, features = Critic(encoders["clip"].width), encoders["clip"].features(x)
    losses.critic(head(torch.randn_like(features)), head(features.detach()), torch.ones(2)).backward()
    assert reached(fresh) == set() and all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_only_the_tokens_row_is_a_parameter_of_the_text_encoder(fresh):
    assert [n for n, p in fresh.text.named_parameters() if p.requires_grad] == ["row"] and fresh.text.row.shape == (1, 128)


def test_a_fresh_token_means_its_class_word(pair):
    with torch.no_grad():
        torch.testing.assert_close(pair.text(["a <v> on the beach"]), pair.text(["a dog on the beach"]))
