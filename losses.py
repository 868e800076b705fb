"""Every term of EchoDistill as a pure function of tensors (arXiv 2510.20512; README.md says which term is which).

Shapes: z (B, C, h, w) latents, x (B, 3, H, W) images in [-1, 1], tokens (B, T, d) image embeddings,
logits (B, 2) with class 1 = real. Functions that end in `_per_sample` return (B,), so that c(t') can weigh them.
"""
import math

import torch
import torch.nn.functional as F

from kernels.lpips_tail import lpips_tail
from kernels.sliced_wasserstein import sliced_wasserstein


# ---------------------------------------------------------------------------------------------------------------
# Teacher: reconstruction (joint stage: real images; echo stage: real and echoed images)

def reconstruction(prediction, target, mask=None):
    """Masked mean squared error of the network output, all (B, C, h, w); mask (B, 1, h, w) in [0, 1].

    Each sample is divided by its own mask area, so a small subject counts as much as a large one; an empty mask
    contributes 0, not NaN.
    """
    error = (prediction - target).square().mean(1, keepdim=True)
    if mask is None:
        return error.mean()
    return ((error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1e-6)).mean()


# ---------------------------------------------------------------------------------------------------------------
# Alignment of the student with the teacher (adversarial diffusion distillation, Sauer et al. 2023, eq. 4)

def alignment_weight(alpha_bar):
    """c(t') = alpha_bar(t'): trust the teacher's guess the more, the less noise it had to see through. (B,) in [0, 1]."""
    return alpha_bar


def identity_per_sample(a, b):
    """1 - mean cosine over T image-prompt tokens, a and b (B, T, d); in [0, 2]."""
    return 1 - F.cosine_similarity(a, b, dim=-1).mean(1)


def latent_per_sample(a, b):
    """Mean squared error of latents (B, C, h, w)."""
    return (a - b).square().mean((1, 2, 3))


def srgb_to_lab(x):
    """sRGB (B, 3, H, W) in [0, 1] to CIELAB under D65, divided by 100 so that L is in [0, 1].

    The division is ours: on the usual scale (L to 100) the same distance takes a hundredth of the weight, and its projections
    would leave the kernel's cells. Values outside of [0, 1] follow the same formulas, in straight lines below 0.
    """
    linear = torch.where(x <= .04045, x / 12.92, ((x.clamp(min=.04045) + .055) / 1.055) ** 2.4)
    to_xyz = x.new_tensor([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]])
    white = x.new_tensor([.95047, 1., 1.08883])
    xyz = torch.einsum("ij,bjhw->bihw", to_xyz / white[:, None], linear)
    d = 6 / 29
    f = torch.where(xyz > d ** 3, xyz.clamp(min=d ** 3) ** (1 / 3), xyz / (3 * d * d) + 4 / 29)
    return torch.stack([1.16 * f[:, 1] - .16, 5 * (f[:, 0] - f[:, 1]), 2 * (f[:, 1] - f[:, 2])], 1)


class IntoGamut(torch.autograd.Function):
    """x clamped to [0, 1]. The gradient passes inside, and outside wherever it leads back: a clamp's own would let a pixel that
    has gone beyond white or black stay there for ever."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        outwards = (x < 0) & (grad > 0) | (x > 1) & (grad < 0)  # a step goes against the gradient
        return torch.where(outwards, 0, grad)


def random_projections(count, generator, size=11):
    """(count, 3, size, size) random filters of unit norm, redrawn each call (He et al. 2024)."""
    w = torch.randn(count, 3, size, size, generator=generator)
    return w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def downsample(x):
    """Half the size after the binomial low-pass (1 4 6 4 1) / 16, reflected at the border."""
    k = x.new_tensor([1., 4., 6., 4., 1.]) / 16
    kernel = (k[:, None] * k[None]).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def sliced_wasserstein_per_sample(x, y, projections, levels=5, positions=0, generator=None, impl=None, raw=False):
    """Multi-scale sliced Wasserstein distance of images in [-1, 1] (He et al., ECCV 2024, arXiv 2407.10181).

    On each level of a Gaussian pyramid in CIELAB: the distance between all patches of the two, sliced by random filters. A level
    with more patches than `positions` (0: no limit) takes those of a square lattice of about so many, placed at random. Levels
    smaller than a filter are left out, so a 64-px image has three. raw: take [-1, 1] for [0, 1], as the release did; unclamped, or
    nothing below mid-grey would be seen.
    """
    x, y = (srgb_to_lab(i if raw else IntoGamut.apply((i + 1) / 2)) for i in (x, y))
    distances = []
    for _ in range(levels):
        rows, columns = (side - projections.shape[-1] + 1 for side in x.shape[-2:])
        if min(rows, columns) < 1:
            break
        step = min(rows, columns, math.ceil(math.sqrt(rows * columns / positions))) if positions else 1
        corner = torch.randint(step, (2,), generator=generator).tolist() if step > 1 else (0, 0)
        distances.append(sliced_wasserstein(x, y, projections, step, corner, impl))
        x, y = downsample(x), downsample(y)
    return torch.stack(distances).mean(0)


def lpips_per_sample(a, b, impl=None):
    """LPIPS (Zhang et al. 2018) of two lists of feature maps (B, C, h, w), summed over the list; gradients reach a.

    All channels weigh 1, as in the paper's uncalibrated form: the published weights are for VGG and AlexNet.
    """
    return sum(lpips_tail(i, j, torch.ones_like(i[0, :, 0, 0]), impl) for i, j in zip(a, b))


ALIGNMENT = ("identity", "latent", "swd", "lpips")  # terms: each with a recipe key TERM_weight


def alignment(student, target, weights, generator=None, impl=None):
    """The weighted distance (B,) of the student's view from the teacher's; a weight of 0 switches its term off.

    student, target  views with .z (B, C, h, w), .x (B, 3, H, W), .tokens (B, T, d) and .layers; gradients reach student alone
    weights          has the recipe keys {identity, latent, swd, lpips}_weight, swd_projections, swd_positions, raw_images
    """
    total = torch.zeros(len(student.z), device=student.z.device)
    if weights.identity_weight:
        total = total + weights.identity_weight * identity_per_sample(student.tokens, target.tokens)
    if weights.latent_weight:
        total = total + weights.latent_weight * latent_per_sample(student.z, target.z)
    if weights.swd_weight:
        filters = random_projections(weights.swd_projections, generator).to(total.device)
        total = total + weights.swd_weight * sliced_wasserstein_per_sample(
            student.x, target.x, filters, positions=weights.swd_positions, generator=generator, impl=impl, raw=weights.raw_images)
    if weights.lpips_weight:
        total = total + weights.lpips_weight * lpips_per_sample(student.layers, target.layers, impl)
    return total


# ---------------------------------------------------------------------------------------------------------------
# Adversarial: the student against the real photos

def adversarial_per_sample(logits):
    """Cross-entropy that wants the head to call the student's image real; logits (B, 2)."""
    return F.cross_entropy(logits, torch.ones_like(logits[:, 0], dtype=torch.long), reduction="none")


def critic(real, fake, weight):
    """Two-class cross-entropy of one head: photos are class 1, student images class 0; each averaged, then halved.

    weight (B,) of each student image; one that no photo could be compared with has 0.
    """
    one = torch.ones_like(real[:, 0], dtype=torch.long)
    zero = torch.zeros_like(fake[:, 0], dtype=torch.long)
    on_fake = (F.cross_entropy(fake, zero, reduction="none") * weight).sum() / weight.sum().clamp(min=1e-6)
    return (F.cross_entropy(real, one) + on_fake) / 2


def critic_accuracy(real, fake, weight):
    """Share of photos and of student images (those with weight > 0) that a head calls what they are; logits (B, 2)."""
    seen = (weight > 0).float()
    right = (real.argmax(1) == 1).sum() + ((fake.argmax(1) == 0) * seen).sum()
    return right / (len(real) + seen.sum())


# ---------------------------------------------------------------------------------------------------------------
# Echo: which of the student's samples are worth giving back to the teacher

def within_prompt(score, number):
    """Scores (N,) standardised among the samples of the same prompt, number (N,): prompts differ in how high and widely they score."""
    same = F.one_hot(number).float()
    same = same / same.sum(0).clamp(min=1).sqrt()  # same @ same.T averages over samples of one prompt
    score = score - same @ (same.T @ score)
    return score / (same @ (same.T @ score.square())).sqrt().clamp(min=1e-6)


def score_echo(samples, photos, asked, number):
    """(likeness, identity, fidelity), each (N,), of N samples. Likeness is the mean cosine to the photos, by all encoders;
    identity is that, and fidelity the cosine to the prompt, both within samples of the same prompt.

    samples, photos  {encoder: unit embeddings (N, d) and (M, d)}, one of them "clip"
    asked (N, d)     "clip"'s embedding of each sample's prompt; number (N,): which prompt that is
    """
    likeness = sum((samples[k] @ photos[k].T).mean(1) for k in photos) / len(photos)
    return likeness, within_prompt(likeness, number), within_prompt((samples["clip"] * asked).sum(1), number)


def select_echo(identity, fidelity, features, keep, floor, max_similarity=.98):
    """Indices of at most `keep` samples, best identity first.

    identity (N,)  likeness to the reference photos
    fidelity (N,)  agreement of the image with its prompt; the lowest `floor` fraction is refused outright
    features (N, d)  a sample closer than cosine `max_similarity` to one already chosen is a copy and is passed over
    """
    features = F.normalize(features, dim=1)
    allowed = fidelity >= fidelity.quantile(floor)
    chosen = []
    for i in identity.argsort(descending=True, stable=True).tolist():
        if allowed[i] and (not chosen or (features[chosen] @ features[i]).max() < max_similarity):
            chosen.append(i)
        if len(chosen) == keep:
            break
    return torch.tensor(chosen, dtype=torch.long)
