"""What LPIPS does with one pair of feature maps (Zhang et al. 2018, eq. 1), loss and gradient in one pass.

    n(p) = sqrt(sum_c a(p)^2 + eps),   u = a / n,   v likewise of b
    loss = mean over positions p of sum_c w_c (u - v)^2
    dloss/da = (g - u sum_c g u) / n / positions,   g = 2 w (u - v)

eps is inside the root (the reference implementation adds it outside, where an all-zero feature has no gradient but NaN).
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.dispatch import jit, on_device_of, resolve, tl, triton

EPS = 1e-10


def lpips_tail_torch(a, b, weights):
    """The specification."""
    u, v = (i / (i.square().sum(1, keepdim=True) + EPS).sqrt() for i in (a, b.detach()))
    return ((u - v).square() * weights.view(-1, 1, 1)).sum(1).mean((1, 2))


@jit
def lpips_tail_kernel(a, b, weights, gradient, partial, channels, positions, EPS: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """P positions of one sample with all their channels; partial (B, blocks) is their share of the loss."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c, p = tl.arange(0, C), block * P + tl.arange(0, P)
    mask = (c < channels)[:, None] & (p < positions)[None, :]
    at = (sample * channels + c)[:, None] * positions + p[None, :]
    x, y = tl.load(a + at, mask=mask, other=0.).to(ACC), tl.load(b + at, mask=mask, other=0.).to(ACC)
    w = tl.load(weights + c, mask=c < channels, other=0.).to(ACC)[:, None]
    norm = tl.sqrt(tl.sum(x * x, 0) + EPS)[None, :]
    u, v = x / norm, y / tl.sqrt(tl.sum(y * y, 0) + EPS)[None, :]
    g = w * (u - v)
    tl.store(partial + sample * tl.num_programs(0) + block, tl.sum(tl.sum(g * (u - v), 0), 0) / positions)
    g = (g - u * tl.sum(g * u, 0)[None, :]) / norm * (2. / positions)
    tl.store(gradient + at, g, mask=mask)


class LPIPSTail(torch.autograd.Function):

    @staticmethod
    def forward(ctx, a, b, weights):
        a, b, weights = a.contiguous(), b.contiguous(), weights.contiguous()
        wide, (n, channels, height, width) = a.dtype == torch.float64, a.shape
        c = triton.next_power_of_2(channels)
        p = max(8, 4096 // c)  # at least a sector of memory per channel, and 16 values per thread below: more spill from registers
        gradient = torch.empty_like(a)
        partial = torch.empty(n, triton.cdiv(height * width, p), dtype=torch.float64 if wide else torch.float32, device=a.device)
        with on_device_of(a):
            lpips_tail_kernel[(partial.shape[1], n)](a, b, weights, gradient, partial, channels, height * width, EPS=EPS, WIDE=wide, C=c, P=p,
                                                     num_warps=min(32, c * p // 512))
        ctx.save_for_backward(gradient)
        return partial.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return (gradient * grad.view(-1, 1, 1, 1)).to(gradient.dtype), None, None


def lpips_tail(a, b, weights, impl=None):
    """Distance (B,) of feature maps a and b (B, C, H, W) under weights (C,); the gradient reaches a alone."""
    return LPIPSTail.apply(a, b, weights) if resolve(impl, a.device)[0] == "triton" and a.numel() else lpips_tail_torch(a, b, weights)
