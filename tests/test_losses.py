"""Every loss against a plain float64 formula. python -m pytest tests/test_losses.py"""
import numpy as np
import pytest
import torch

import losses


def d(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_is_the_mean_over_the_mask_of_each_sample():
    p, t, mask = d(2, 3, 4, 4), d(2, 3, 4, 4, seed=1), torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[0, 0, :2], mask[1, 0, 1, 1] = 1, 1
    by_hand = (((p - t)[0, :, :2] ** 2).mean() + ((p - t)[1, :, 1, 1] ** 2).mean()) / 2
    torch.testing.assert_close(losses.reconstruction(p, t, mask), by_hand)
    torch.testing.assert_close(losses.reconstruction(p, t), ((p - t) ** 2).mean())


def test_an_empty_mask_gives_zero_and_no_nan():
    p = d(1, 3, 4, 4).requires_grad_()
    loss = losses.reconstruction(p, d(1, 3, 4, 4, seed=1), torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0 and p.grad.abs().sum() == 0


def test_identity_is_one_minus_the_mean_cosine():
    a, b = d(3, 4, 8), d(3, 4, 8, seed=1)
    by_hand = [1 - np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(i, j)]) for i, j in zip(a.numpy(), b.numpy())]
    np.testing.assert_allclose(losses.identity_per_sample(a, b).numpy(), by_hand, rtol=1e-12)
    assert losses.identity_per_sample(a, a).abs().max() < 1e-12


def test_alignment_weight_is_alpha_bar(pair):
    bar = pair.teacher.alphas_cumprod
    torch.testing.assert_close(losses.alignment_weight(bar[[0, 999]]), torch.tensor([1 - .00085, .0047]), atol=1e-4, rtol=0)


def test_cielab_of_known_colours():
    rgb = torch.tensor([[1., 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64).view(4, 3, 1, 1)
    lab = losses.srgb_to_lab(rgb).view(4, 3) * 100
    wanted = torch.tensor([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]], dtype=torch.float64)
    torch.testing.assert_close(lab, wanted, atol=.05, rtol=0)


def test_halving_an_image_leaves_no_trace_of_its_finest_pattern_and_keeps_flat_areas():
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2. - 1
    assert losses.downsample(board.expand(1, 3, 16, 16)).abs().max() < 1e-6
    torch.testing.assert_close(losses.downsample(torch.full((1, 3, 16, 16), .7)), torch.full((1, 3, 8, 8), .7))


def test_sliced_wasserstein_equals_sorting_by_hand():
    x, y = torch.rand(1, 3, 24, 24, dtype=torch.float64) * 2 - 1, torch.rand(1, 3, 24, 24, dtype=torch.float64) * 2 - 1
    w = losses.random_projections(5, torch.Generator().manual_seed(0)).double()
    assert torch.allclose(w.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    a, b = (losses.srgb_to_lab((i + 1) / 2) for i in (x, y))
    levels = []
    for _ in range(2):  # 24 and 12 px hold an 11-px filter, 6 px does not
        size = a.shape[-1] - 10
        patches = [np.array([i[0, :, r:r + 11, c:c + 11].numpy() for r in range(size) for c in range(size)]) for i in (a, b)]
        u, v = (np.sort(np.einsum("nchw,kchw->kn", p, w.numpy()), 1) for p in patches)
        levels.append(np.abs(u - v).mean())
        a, b = losses.downsample(a), losses.downsample(b)
    np.testing.assert_allclose(losses.sliced_wasserstein_per_sample(x, y, w).item(), np.mean(levels), rtol=1e-9)


def test_sliced_wasserstein_of_an_image_with_itself_is_zero_and_its_gradient_finite():
    x = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    w = losses.random_projections(4, torch.Generator().manual_seed(0))
    assert losses.sliced_wasserstein_per_sample(x, x.detach(), w).abs().max() < 1e-6
    losses.sliced_wasserstein_per_sample(x, torch.zeros_like(x), w).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def pull(x, y, **more):
    """Gradient (1, 3, H, W) of the distance at x."""
    x = x.clone().requires_grad_()
    losses.sliced_wasserstein_per_sample(x, y, losses.random_projections(32, torch.Generator().manual_seed(0)), **more).sum().backward()
    return x.grad


@pytest.mark.parametrize("beyond, aim", [(1.5, .2), (-1.5, -.2)])
def test_sliced_wasserstein_brings_pixels_back_from_beyond_black_and_white(beyond, aim):
    """A clamp's own gradient is 0 there."""
    x, y = torch.full((1, 3, 16, 16), beyond), torch.full((1, 3, 16, 16), aim)
    g = pull(x, y)
    assert (-g.sum() * (aim - beyond) > 0) and g.abs().sum() > 0
    assert not pull(x, torch.full_like(x, torch.tensor(beyond).sign().item())).any(), "white is as white as it gets"


def test_sliced_wasserstein_clamps_values_as_before():
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2
    w = losses.random_projections(4, torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    assert torch.equal(losses.sliced_wasserstein_per_sample(x, y, w), losses.sliced_wasserstein_per_sample(x.clamp(-1, 1), y, w))
    inside = x.abs() < 1
    given, i = torch.randn_like(x), x.clone().requires_grad_()
    losses.IntoGamut.apply((i + 1) / 2).backward(given)
    assert torch.equal(i.grad[inside], given[inside] / 2)


def test_raw_images_are_pulled_below_mid_grey_as_above():
    """In [-1, 1] taken for [0, 1] a clamp would leave no gradient in the darker half."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 3, 24, 24, generator=g) * 2 - 1, torch.rand(1, 3, 24, 24, generator=g) * 2 - 1
    grad = pull(x, y - .3, raw=True)
    dark = x < 0
    assert (grad[dark] != 0).float().mean() > .95 and (grad[~dark] != 0).float().mean() > .95
    flat = pull(torch.full((1, 3, 16, 16), -.2), torch.full((1, 3, 16, 16), -.8), raw=True)
    assert flat.sum() > 0, "both are black to a clamp"


def test_the_wasserstein_weight_of_the_real_pair_is_the_published_strength():
    """Paper: .1 of a distance in which L goes to 100."""
    from data.recipe import DATA, read_toml
    x, y = torch.rand(1, 3, 24, 24) * 2 - 1, torch.rand(1, 3, 24, 24) * 2 - 1
    w = losses.random_projections(8, torch.Generator().manual_seed(0))
    ours = losses.sliced_wasserstein_per_sample(x, y, w)
    srgb_to_lab = losses.srgb_to_lab
    try:
        losses.srgb_to_lab = lambda i: 100 * srgb_to_lab(i)
        theirs = losses.sliced_wasserstein_per_sample(x, y, w)
    finally:
        losses.srgb_to_lab = srgb_to_lab
    for name in ("sd-turbo/recipe.toml", "sd-turbo/paper.toml", "hyper-sd15/recipe.toml"):
        torch.testing.assert_close(read_toml(DATA / name)["recipe"]["swd_weight"] * ours, .1 * theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("colour", [-1., 0., 1.])
def test_sliced_wasserstein_has_a_finite_gradient_on_flat_pictures(colour):
    x = torch.full((1, 3, 16, 16), colour, requires_grad=True)
    losses.sliced_wasserstein_per_sample(x, torch.rand(1, 3, 16, 16), losses.random_projections(4, torch.Generator().manual_seed(0))).sum().backward()
    assert x.grad.isfinite().all()


def test_adversarial_and_critic_are_two_class_cross_entropies():
    fake, real = d(4, 2), d(4, 2, seed=1)
    p = lambda logits: torch.softmax(logits, 1)[:, 1]  # noqa: E731  probability of real
    torch.testing.assert_close(losses.adversarial_per_sample(fake), -p(fake).log())
    weight = torch.tensor([1., 0, 1, 0], dtype=torch.float64)  # images 1 and 3 are not judged
    by_hand = (-p(real).log().mean() - (1 - p(fake)).log()[[0, 2]].mean()) / 2
    torch.testing.assert_close(losses.critic(real, fake, weight), by_hand)
    assert losses.critic(real, fake, 0 * weight).isfinite()


def test_echo_keeps_the_most_alike_that_are_faithful_and_distinct():
    identity = torch.tensor([.9, .8, .7, .6, .5, .4])
    fidelity = torch.tensor([.0, .9, .9, .9, .9, .1])
    features = torch.eye(6)
    features[2] = features[1]  # a copy of sample 1
    assert losses.select_echo(identity, fidelity, features, keep=2, floor=.4).tolist() == [1, 3]
    assert losses.select_echo(identity, fidelity, features, keep=6, floor=0., max_similarity=2).tolist() == [0, 1, 2, 3, 4, 5]
