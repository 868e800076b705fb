"""The alignment target and the student's latent distance to it, from the teacher's two raw outputs, in one pass.

    x0(out)   = (z_t - sigma out) / alpha  for an epsilon teacher,   alpha z_t - sigma out  for a v teacher
    z_T       = x0(without) + guidance (x0(with_prompt) - x0(without))               classifier-free guidance, Ho & Salimans 2022
    loss_b    = weight_b mean((z_S - z_T)^2),       dloss_b/dz_S = 2 weight_b (z_S - z_T) / n,   n latent values per sample

z_T is a constant to the student (arXiv 2510.20512; Sauer et al. 2023, eq. 4). Eager torch makes some 20 launches of this and
reads or writes the latents 44 times; the kernel does it in one launch with four reads and two writes.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.dispatch import jit, on_device_of, resolve, tl, triton


def guided_mse_torch(with_prompt, without, z_t, z_s, alpha, sigma, weight, guidance, epsilon):
    """The specification."""
    with torch.no_grad():
        with_prompt, without = ((z_t - sigma * out) / alpha if epsilon else alpha * z_t - sigma * out for out in (with_prompt, without))
        z_teacher = without + guidance * (with_prompt - without)
    return z_teacher, weight * (z_s - z_teacher).square().mean((1, 2, 3))


@jit
def guided_mse_kernel(with_prompt, without, z_t, z_s, alpha, sigma, weight, guidance, z_teacher, gradient, partial, n,
                      EPSILON: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one sample; partial (B, blocks) is its share of the loss."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask, i = i < n, b * n + i
    a, s, w = tl.load(alpha + b).to(ACC), tl.load(sigma + b).to(ACC), tl.load(weight + b).to(ACC)
    scale = tl.load(guidance).to(ACC)
    noisy = tl.load(z_t + i, mask=mask, other=0.).to(ACC)
    prompted = s * tl.load(with_prompt + i, mask=mask, other=0.).to(ACC)
    free = s * tl.load(without + i, mask=mask, other=0.).to(ACC)
    if EPSILON:
        prompted, free = (noisy - prompted) / a, (noisy - free) / a
    else:
        prompted, free = a * noisy - prompted, a * noisy - free
    target = free + scale * (prompted - free)
    difference = tl.where(mask, tl.load(z_s + i, mask=mask, other=0.).to(ACC) - target, 0.)
    tl.store(z_teacher + i, target, mask=mask)
    tl.store(gradient + i, 2 * w / n * difference, mask=mask)
    tl.store(partial + b * tl.num_programs(0) + block, tl.sum(difference * difference, 0) * w / n)


class GuidedMSE(torch.autograd.Function):

    @staticmethod
    def forward(ctx, with_prompt, without, z_t, z_s, alpha, sigma, weight, guidance, epsilon):
        inputs = [i.contiguous() for i in (with_prompt, without, z_t, z_s, alpha, sigma, weight)]
        wide, n, block = z_s.dtype == torch.float64, z_s[0].numel(), 1024
        z_teacher, gradient = torch.empty_like(inputs[3]), torch.empty_like(inputs[3])
        partial = torch.empty(len(z_s), triton.cdiv(n, block), dtype=torch.float64 if wide else torch.float32, device=z_s.device)
        guidance = torch.full((1,), guidance, dtype=partial.dtype, device=z_s.device)  # a float argument would have 32 bits
        with on_device_of(z_s):
            guided_mse_kernel[(partial.shape[1], len(z_s))](*inputs, guidance, z_teacher, gradient, partial, n, EPSILON=epsilon, WIDE=wide, BLOCK=block)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(z_teacher)
        return z_teacher, partial.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad):
        return None, None, None, ctx.saved_tensors[0] * grad.view(-1, 1, 1, 1), *[None] * 5


def guided_mse(with_prompt, without, z_t, z_s, alpha, sigma, weight, guidance, prediction_type, impl=None):
    """(z_T (B, C, h, w), loss (B,)); the gradient reaches z_s alone.

    with_prompt, without, z_t, z_s (B, C, h, w); alpha, sigma (B, 1, 1, 1) of z_t's noise level; weight (B,) of each sample, such
    as c(t'); prediction_type "epsilon" or "v_prediction" of the teacher.
    """
    arguments = with_prompt, without, z_t, z_s, alpha, sigma, weight, guidance, prediction_type == "epsilon"
    return GuidedMSE.apply(*arguments) if resolve(impl, z_s.device)[0] == "triton" and len(z_s) else guided_mse_torch(*arguments)
