"""Measures see what they are for, and the autoencoder keeps what its code holds. python -m pytest tests/test_measure.py"""
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from data.emoji.autoencoder import PatchAutoencoder
from measure import blur, edge_energy, kid, sensitivities, sibling, without_an_eye
from world import World


@pytest.fixture(scope="module")
def pictures():
    """Two sets of 256 pictures each from the same world."""
    return World("pretrain").sample(512, torch.Generator().manual_seed(0)).images.split(256)


def features(x):
    """A stand-in for a judge: fixed random projections of pixels and of their differences."""
    flat = torch.cat([x.flatten(1), 4 * (x[..., 1:] - x[..., :-1]).flatten(1)], 1)
    return flat @ torch.randn(flat.shape[1], 64, generator=torch.Generator().manual_seed(5)) / 40


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    a, b = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    k = lambda x, y: (float(x @ y) / 4 + 1) ** 3
    within = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (a, b)]
    across = sum(k(x, y) for x in a for y in b) / 35
    assert kid(a, b) == pytest.approx(1000 * (within[0] + within[1] - 2 * across), rel=1e-4)


def test_kid_of_two_samples_of_one_distribution_is_about_zero_and_of_two_distributions_is_not():
    g = torch.Generator().manual_seed(0)
    same = [kid(torch.randn(100, 16, generator=g), torch.randn(100, 16, generator=g)) for _ in range(20)]
    assert abs(sum(same) / 20) < 15 and min(same) < 0 < max(same)  # unbiased: of either sign
    assert kid(torch.randn(100, 16, generator=g), torch.randn(100, 16, generator=g) + 1) > 1000


def test_blurring_raises_kid_and_lowers_edge_energy_the_more_the_stronger(pictures):
    a, b = pictures
    distances = [kid(features(x), features(b)) for x in (a, blur(a), blur(a, 5))]
    sharpness = [edge_energy(x) for x in (a, blur(a), blur(a, 5))]
    assert distances == sorted(distances) and distances[1] > distances[0] + 1
    assert sharpness == sorted(sharpness, reverse=True) and sharpness[1] < .8 * sharpness[0]


def test_edge_energy_of_a_slope_is_its_slope():
    slope = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    assert edge_energy(slope) == pytest.approx(1 / 63, rel=1e-4) and edge_energy(torch.zeros(1, 3, 8, 8)) == 0


def test_an_eye_goes_and_the_outline_stays():
    tiles = World("held_out").sprites
    spoiled = without_an_eye(tiles)
    changed = (spoiled != tiles).any(1).float().mean((1, 2))
    assert torch.equal(spoiled[:, 3], tiles[:, 3]) and changed.max() < .05 and (changed > .01).float().mean() > .9


def test_a_sibling_is_another_individual_of_the_same_noun_and_style():
    world = World("pretrain")
    sprite = torch.arange(len(world.entries))
    other = sibling(world, sprite)
    assert torch.equal(world.noun_of[sprite], world.noun_of[other]) and torch.equal(world.is_flat[sprite], world.is_flat[other])
    assert (other != sprite).float().mean() > .5


def test_judges_move_when_pictures_are_spoiled():
    from transformers import CLIPTokenizer

    from data.base import load_encoder
    base = ROOT / "data" / "emoji" / "base"
    judges = [load_encoder(base / "judges" / k) for k in ("clip", "identity", "names")]
    table = sensitivities(*judges, CLIPTokenizer.from_pretrained(base / "teacher" / "tokenizer"), "held_out", n=24)
    assert table["blur"]["edges"] < -.1 < table["swapped colours"]["edges"]
    assert table["swapped colours"]["identity"] < table["blur"]["identity"] < 0
    assert table["two subjects"]["KID"] > table["blur"]["KID"] > 0
    assert table["mosaic"]["cell KID"] > 50 > 20 > abs(table["pair, wrong neighbour"]["cell KID"]) and table["mosaic"]["identity"] > -.1


# ---------------------------------------------------------------------------------------------------------------
# Autoencoder

@pytest.fixture
def vae(pair):
    n, g = pair.latent_shape[0], torch.Generator().manual_seed(0)
    vae = PatchAutoencoder(latent_channels=n)
    vae.set_code(torch.randn(n, 3, 8, 8, generator=g) / 14, torch.randn(n, generator=g))
    return vae


def test_a_code_as_wide_as_the_patch_loses_nothing(pictures):
    vae, x = PatchAutoencoder(latent_channels=192), pictures[0][:4]
    vae.set_code(torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)))[0].view(192, 3, 8, 8), torch.zeros(192))
    assert (vae(x).sample - x).abs().max() < 1e-4


def test_before_training_decoding_is_the_linear_inverse_and_coding_again_gives_the_same_code(vae, pictures):
    z = vae.encode(pictures[0][:4]).latents
    x = vae.decode(z).sample
    assert torch.equal(x, vae.linear(z)) and (vae.encode(x).latents - z).abs().max() < 1e-4


def test_the_residual_learns_and_the_code_stays(vae, pictures):
    z = vae.encode(pictures[0][:4]).latents
    (vae.decode(z).sample - pictures[0][:4]).square().mean().backward()
    assert vae.decoder.outward.weight.grad.abs().max() > 0
    assert {k for k, _ in vae.named_buffers()} == {"basis", "back", "mean"}  # no gradient reaches them


def test_a_plain_diffusers_pipeline_draws_with_it_and_it_survives_a_file(vae, tmp_path):
    from diffusers import StableDiffusionPipeline
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    z = torch.randn(2, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "data/emoji/base/teacher", vae=again, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae_scale_factor == 8
    picture = pipe("a dog", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 3, 64, 64)


# ---------------------------------------------------------------------------------------------------------------
# Pretraining that goes on from a shipped pair

def test_pretraining_goes_on_from_the_shipped_pair_in_its_own_code(tmp_path, pair, pictures):
    from stages import encoders, latents, teacher
    args = SimpleNamespace(channels=24, init=ROOT / "data/emoji/base", work=tmp_path, freedom=0., cells=True, device="cpu")
    linear, x = latents.code(args), pictures[0][:32]
    assert latents.channels(args) == len(linear["mean"]) == pair.latent_shape[0]
    with torch.no_grad():
        assert (latents.to_latents(linear, x) - pair.encode(x)).abs().max() < .01
    unet, text = teacher.build_unet(args), encoders.build_text(encoders.build_tokenizer(ROOT / "data/emoji/base/teacher/tokenizer"))
    for network, state, own in zip((unet, text), teacher.shipped_teacher(args), (pair.teacher.unet, pair.text.encoder)):
        network.load_state_dict(state)
        assert all(torch.equal(v, own.state_dict()[k][:len(v)]) for k, v in network.state_dict().items() if v.ndim)


def test_an_encoder_goes_on_from_the_shipped_one():
    from stages import encoders
    args = SimpleNamespace(init=ROOT / "data/emoji/base", stage="judge_clip")
    shipped = encoders.shipped_encoder(args)
    assert set(shipped) == {"vision", "image", "text", "caption"}
    encoders.build_vision("judge_clip").load_state_dict(shipped["vision"])
    names = encoders.shipped_encoder(SimpleNamespace(init=args.init, stage="judge_names"))
    assert {k: v.shape for k, v in names["nouns"].items()} == {"weight": (54, 192), "bias": (54,)}
    assert set(encoders.shipped_encoder(SimpleNamespace(init=args.init, stage="identity"))) == {"vision", "image"}
