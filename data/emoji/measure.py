"""What a judge that only names objects does not see: is a set of pictures distributed, and as sharp, as real ones?"""
import torch


def kid(a, b):
    """Kernel inception distance x 1000 of feature sets (n, d) and (m, d): unbiased MMD^2 of the kernel (x.y / d + 1)^3.

    About 0, of either sign, for two samples of one distribution. Binkowski et al., Demystifying MMD GANs, eq. 4.
    """
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):  # mean over pairs of different pictures
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return 1000 * (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def edge_energy(images):
    """Mean length of the colour gradient of images (B, 3, H, W) in [-1, 1], in units of [0, 1] a pixel."""
    x = (images.clamp(-1, 1) + 1) / 2
    right, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (right.square() + down.square()).sqrt().mean().item()
