"""Each key of the published recipe does what its name says. python -m pytest tests/test_recipe.py"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train as script
from data.base import load_pair
from data.images import Photos, load_photo
from data.recipe import DATA, KEYS, read_toml
from model import hold_first_token, trainable_parameters

PAPER = ("start_word", "detach_first_token", "clip_critics", "own_prompts", "crop", "published_sizes", "mask_erosion", "sample_latents")


def made(*flags):
    """(args, a run made ready) for the emoji base."""
    args = script.parse_arguments(["--concept", "dog", "--mixed_precision", "no", *map(str, flags)])
    return args, script.build(args, torch.device("cpu"))


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_base_sets_every_key_and_the_paper_differs_in_those_of_its_quirks():
    recipes = {name: read_toml(DATA / f"{name}.toml")["recipe"] for name in ("emoji/recipe", "sd-turbo/recipe", "hyper-sd15/recipe", "sd-turbo/paper")}
    assert all(r.keys() == KEYS.keys() for r in recipes.values())
    ours, paper = recipes["sd-turbo/recipe"], recipes["sd-turbo/paper"]
    assert all(ours[k] != paper[k] for k in (*PAPER, "critic_views", "raw_images", "size_augmentation"))
    assert paper["echo_steps"] == 0 and paper["critic_views"] == 0 and paper["swd_weight"] == ours["swd_weight"] == 10


def test_published_sizes_shrink_two_thirds_and_zoom_one_third_with_their_words():
    x = torch.zeros(1, 3, 64, 64)
    photos = Photos(x + 1, torch.ones(1, 1, 64, 64), flip=False, size_augmentation=True, published=True)
    n = 2000
    _, mask, said, _ = photos.batch(n, g())
    side = mask.sum((1, 2, 3)).sqrt()  # pixels of the photo that are left
    zoomed = torch.tensor([w in ("zoomed in", "close up") for w in said])
    small = torch.tensor([w in ("far away", "very small") for w in said])
    assert set(said) == {"", "far away", "very small", "zoomed in", "close up"}
    assert abs(zoomed.float().mean() - 1 / 3) < .04 and (side[zoomed] == 64).all()
    assert (side[small] < .61 * 64).all() and side.min() >= 21 and (side[~small & ~zoomed] > .59 * 64).all()
    factors = torch.tensor([photos.size(1, u, True)[0] for u in np.linspace(0, 1, 9)])
    assert factors.min() == pytest.approx(1 / 3) and factors.max() == pytest.approx(1)


def test_a_squashed_photo_keeps_all_of_its_content(tmp_path):
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    x, mask = load_photo(tmp_path / "wide.png", 32, "squash")
    assert x.shape == (3, 32, 32) and mask.all() and (x[:, :, :14] > .9).all() and (x[:, :, 18:] < -.9).all()


def test_an_eroded_mask_loses_a_ring_but_not_at_the_pictures_border(concept):
    args, m = made("--mask_erosion", 1, "--size_augmentation")
    _, plain = made("--size_augmentation")
    sizes = []
    for step in range(8):
        batch, other = (script.real_batch(run, a, 4, g(step), step) for run, a in ((m, args), (plain, SimpleNamespace(**vars(args) | {"mask_erosion": 0}))))
        assert (batch.mask <= other.mask).all()
        sizes += [(b.sum().item(), o.sum().item()) for b, o in zip(batch.mask, other.mask)]
    whole = m.pair.latent_shape[1] ** 2
    assert all(b == whole for b, o in sizes if o == whole) and any(0 < b < o for b, o in sizes)


def test_sampled_latents_scatter_around_the_mean_as_wide_as_the_encoder_says(concept):
    args, m = made("--sample_latents")
    m.known["spread"] = torch.full_like(m.known["z"], .5)  # the emoji autoencoder gives no distribution
    which = script.real_batch(m, args, 4, g(), 0).z
    mean = script.real_batch(m, SimpleNamespace(**vars(args) | {"sample_latents": False}), 4, g(), 0).z
    assert abs((which - mean).std().item() - .5) < .05 and not torch.equal(which, script.real_batch(m, args, 4, g(1), 0).z)


def test_the_student_draws_its_batchs_own_prompts(concept):
    args, m = made("--own_prompts", "--scene_prompts", 0, "--size_augmentation")
    batch = script.real_batch(m, args, 4, g(), 0)
    assert script.student_prompts(m, args, 4, g(1), batch.prompts)[0] == batch.prompts
    args.own_prompts = False
    assert script.student_prompts(m, args, 4, g(1), batch.prompts)[0] != batch.prompts


def test_a_start_word_is_where_the_token_starts(concept, capsys):
    _, m = made("--start_word", "cat")
    pair = load_pair("emoji", "<v>", "dog")
    cat, dog = (load_pair("emoji", "<v>", word).text.row for word in ("cat", "dog"))
    assert torch.equal(m.pair.text.row, cat) and not torch.equal(cat, dog) and torch.equal(pair.text.row, dog) and m.name == "<v> dog"
    with pytest.raises(SystemExit):
        made("--start_word", "  ")
    assert "--start_word" in capsys.readouterr().err


def test_the_first_token_passes_no_gradient_to_keys_and_values(concept):
    """Values stay as they are; a loss on a context whose other tokens are zero moves nothing."""
    pair = load_pair("emoji", "<v>", "dog")
    unet, noise = pair.student.unet, torch.randn(1, *pair.latent_shape, generator=g())
    moved = trainable_parameters(unet, "kv")
    context = pair.text(["a <v> dog"]).detach()
    context[:, 1:] = 0
    for p in moved.values():
        p.requires_grad_(True)
    before = pair.student.one_step(noise, context)
    assert max(x.abs().max() for x in torch.autograd.grad(before.square().sum(), list(moved.values()))) > 0
    hold_first_token(unet)
    after = pair.student.one_step(noise, context)
    assert torch.equal(before, after) and not any(x.any() for x in torch.autograd.grad(after.square().sum(), list(moved.values())))


def test_critics_go_unclipped_where_the_recipe_says_so(concept, monkeypatch):
    limits, clip = [], script.clip
    monkeypatch.setattr(script, "clip", lambda p, limit, scale: (limits.append(limit), clip(p, limit, scale))[1])
    for flags, limit in ((("--no-clip_critics",), float("inf")), ((), 1.)):
        args, m = made("--adversarial_weight", 1, "--scene_prompts", 0, *flags)
        script.iteration(m, args, script.plan(args)[0], 0)
        assert limits[-1] == limit and limits[0] == 1.


def test_critics_see_many_windows_of_the_photos_and_no_border(concept):
    args, m = made("--critic_views", 6, "--size_augmentation", "--crop", "pad")
    k = next(iter(m.heads))
    assert m.views[k].shape == (len(m.photos.photos), 6, m.heads[k][0].in_features)
    seen = [script.real_batch(m, args, 4, g(step), step).features[k] for step in range(20)]
    rows = torch.cat(seen).unique(dim=0)
    assert len(rows) > 3 * len(m.photos.photos), "more than a head can know by heart"
    known = m.views[k].flatten(0, 1)
    assert all((known == row).all(1).any() for row in rows)


def test_windows_lie_inside_the_photo_and_are_a_part_of_it():
    photo, mask = torch.full((1, 3, 40, 40), -1.), torch.zeros(1, 1, 40, 40)
    photo[:, :, 8:32], mask[:, :, 8:32] = torch.linspace(0, 1, 40), 1  # a padded panorama: grey above and below
    windows = Photos(photo, mask, flip=False, size_augmentation=False).zooms(0, 30, g())
    assert windows.shape == (30, 3, 40, 40) and windows.min() >= -1e-6
    width = windows[:, 0, 20, -1] - windows[:, 0, 20, 0]
    assert width.min() > .5 * 24 / 40 * .9 and width.max() < 24 / 40 and len(windows.unique(dim=0)) > 20


def test_windows_leave_photos_and_noise_of_a_step_as_they_are(concept):
    """So that runs with and without differ by what the critics see alone."""
    batches = []
    for flags in ((), ("--critic_views", 3)):
        args, m = made(*flags)
        generator = g(5)
        batches.append((script.real_batch(m, args, 4, generator, 5).z, torch.rand(3, generator=generator)))
    assert all(torch.equal(a, b) for a, b in zip(*batches))
