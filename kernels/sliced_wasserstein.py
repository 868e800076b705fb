"""Sliced Wasserstein distance of all patches of two images, without a sort and without the projections in memory.

Every patch of x is projected on K random filters, which gives P values u per filter; those of y are v. Per filter

    W1 = mean |sort(u) - sort(v)| = integral |F_u(s) - F_v(s)| ds,        dW1/du = -sign(F_u(u) - F_v(u)) / P

with F the cumulative distributions. Cut the axis into cells. The integral of F_u over one cell is known exactly from two sums,
how many values lie below the cell and how far those inside lie from its right edge, so

    W1_cells = sum over cells | integral over the cell of (F_u - F_v) |

errs only in cells in which F_u - F_v changes sign. There both are within the cell's mass of each other, hence the bound

    0 <= W1 - W1_cells <= sum over those cells of width * max(mass_u, mass_v)

and the derivative of W1_cells is the formula above with one sign per cell, exactly. The cells are those of floating point itself:
of 1 + |value - centre| * 32 the exponent and six bits of mantissa are the cell, and the bits below are the place inside it. So they are
finest (1/2048) at the centre, which is the projected mean colour, at most 1/64 of 1/32 + the distance from it elsewhere, and no pass over
the data is needed to place them. They reach 63.9 to both sides; a unit filter on CIELAB patches stays within 33.

The bound is worst where the two images are nearly the same, for then F_u - F_v changes sign in many cells. Noise of this deviation
on a 64-px photo (images in [0, 1], CIELAB as in losses.py) makes W1_cells too low by, and turns its gradient to a cosine of,

    .05: .2 %, .98     .016: 1.4 %, .94     .008: 4 %, .90     .004: 10 %, .80     .002: 19 %, .73

Two bits more of mantissa would divide the error by 16 and multiply the table by 4. Student and teacher stay farther apart than that
in training, so six bits were kept; a use on images that are nearly equal wants more.

Counts and places are integers, so sums do not depend on their order: the same input gives the same bytes on a GPU too.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import jit, on_device_of, resolve, tl, triton

MANTISSA = 6                   # bits of mantissa that number a cell: 64 cells per octave
OCTAVES = 11
CELLS = 2 * OCTAVES << MANTISSA
FINEST = 1 / 32                # values this near the centre share the finest octave
PLACE = 17                     # bits of the place inside a cell; all that float32 has left
COUNT = 40                     # one int64 holds the count above this bit and the sum of places below it: P < 2 ** 22


# ---------------------------------------------------------------------------------------------------------------
# The specification: sort. And the same cells in plain torch, which is what the kernels must give.

def sorted_distance(x, y, filters, step=1, corner=(0, 0)):
    """Exact W1, mean over filters; the patches are those of a lattice of this step from this corner."""
    a, b = (F.conv2d(i[..., corner[0]:, corner[1]:], filters, stride=step).flatten(2).sort(-1).values for i in (x, y))
    return (a - b).abs().mean((1, 2))


def cell_of(projection, centre):
    """Cell and distance from its right edge (2 ** PLACE = the cell's width) of each value; centre (B, K, 1)."""
    wide = projection.dtype == torch.float64
    d, below = projection - centre, (52 if wide else 23) - MANTISSA
    bits = (1 + d.abs() / FINEST).view(torch.int64 if wide else torch.int32) - ((1023 << 52) if wide else (127 << 23))
    bits = bits.clamp(0, (OCTAVES << MANTISSA + below) - 1)
    cell, place = bits >> below, (bits & (1 << below) - 1) >> below - PLACE
    return torch.where(d < 0, CELLS // 2 - 1 - cell, CELLS // 2 + cell).long(), torch.where(d < 0, place, (1 << PLACE) - place).long()


def histogram_torch(x, filters, centre, step, corner):
    cell, place = cell_of(F.conv2d(x[..., corner[0]:, corner[1]:], filters, stride=step).flatten(2), centre[..., None])
    return torch.zeros(*cell.shape[:2], CELLS, dtype=torch.int64, device=x.device).scatter_add_(2, cell, (1 << COUNT) + place)


def gradient_torch(x, filters, centre, sign, scale, step, corner):
    inside = x[..., corner[0]:, corner[1]:]
    projection = F.conv2d(inside, filters, stride=step)
    cell, _ = cell_of(projection.flatten(2), centre[..., None])
    g = sign.gather(2, cell).view_as(projection) * scale.view(-1, 1, 1, 1)
    out = F.conv_transpose2d(g, filters, stride=step)
    return F.pad(out, (corner[1], inside.shape[3] - out.shape[3], corner[0], inside.shape[2] - out.shape[2]))


# ---------------------------------------------------------------------------------------------------------------
# Triton. P positions in rows of `columns` are the lattice; N filters at a time; TAPS = 3 * SIZE * SIZE, in blocks of 32.

@jit
def project(x, weights, pos, positions, columns, plane, line, step, k, padded,
            SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """(M, N) projections of patches `pos` on filters `k`; x points at the lattice's corner in one image of three planes."""
    TAPS: tl.constexpr = 3 * SIZE * SIZE
    start = (pos // columns) * step * line + (pos % columns) * step
    acc = tl.zeros((M, N), x.dtype.element_ty)
    for block in range(0, TAPS, 32):
        tap = block + tl.arange(0, 32)
        offset = (tap // (SIZE * SIZE)) * plane + (tap // SIZE % SIZE) * line + tap % SIZE
        patch = tl.load(x + start[:, None] + offset[None, :], mask=(pos < positions)[:, None] & (tap < TAPS)[None, :], other=0.)
        w = tl.load(weights + tap[:, None] * padded + k[None, :])  # zero beyond the last tap and filter
        acc = tl.dot(patch, w, acc, input_precision=PRECISION, out_dtype=x.dtype.element_ty)
    return acc


@jit
def cells(projection, centre, MANTISSA: tl.constexpr, OCTAVES: tl.constexpr, PLACE: tl.constexpr, WIDE: tl.constexpr):
    """cell_of(); WIDE for float64."""
    TOTAL: tl.constexpr = 52 if WIDE else 23
    BELOW: tl.constexpr = TOTAL - MANTISSA
    d = projection - centre
    if WIDE:
        bits = (1 + tl.abs(d) * 32).to(tl.int64, bitcast=True) - (1023 << 52)
    else:
        bits = (1 + tl.abs(d) * 32).to(tl.int32, bitcast=True) - (127 << 23)
    bits = tl.minimum(tl.maximum(bits, 0), (OCTAVES << TOTAL) - 1)  # integers: also what a NaN becomes stays in the table
    cell, place = bits >> BELOW, (bits & ((1 << BELOW) - 1)) >> (BELOW - PLACE)
    HALF: tl.constexpr = OCTAVES << MANTISSA
    return tl.where(d < 0, HALF - 1 - cell, HALF + cell), tl.where(d < 0, place, (1 << PLACE) - place)


@jit
def locate(x, weights, centre, positions, columns, plane, line, step, filters, padded,
           MANTISSA: tl.constexpr, OCTAVES: tl.constexpr, PLACE: tl.constexpr, WIDE: tl.constexpr,
           SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """This program's image b, patches pos and filters k, and where they fall: cell and place (M, N), row of a table (1, N)."""
    b = tl.program_id(2).to(tl.int64)
    pos = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    k = tl.program_id(1) * N + tl.arange(0, N)
    acc = project(x + b * 3 * plane, weights, pos, positions, columns, plane, line, step, k, padded, SIZE, M, N, PRECISION)
    cell, place = cells(acc, tl.load(centre + b * padded + k)[None, :], MANTISSA, OCTAVES, PLACE, WIDE)
    return b, pos, k, cell, place, (b * filters + k)[None, :] * (2 * OCTAVES << MANTISSA)


@jit
def histogram_kernel(x, weights, centre, table, positions, columns, plane, line, step, filters, padded,
                     MANTISSA: tl.constexpr, OCTAVES: tl.constexpr, PLACE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
                     SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Add M patches of image b on N filters to table (B, filters, CELLS) int64."""
    b, pos, k, cell, place, row = locate(x, weights, centre, positions, columns, plane, line, step, filters, padded,
                                        MANTISSA, OCTAVES, PLACE, WIDE, SIZE, M, N, PRECISION)
    tl.atomic_add(table + row + cell, place.to(tl.int64) + (1 << COUNT), sem="relaxed",
                  mask=(pos < positions)[:, None] & (k < filters)[None, :])


@jit
def sign_kernel(x, weights, centre, sign, out, positions, columns, plane, line, step, filters, padded,
                MANTISSA: tl.constexpr, OCTAVES: tl.constexpr, PLACE: tl.constexpr, WIDE: tl.constexpr,
                SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Look up the sign of each projection, sign (B, filters, CELLS) int8, into out (B, P, padded) int8, 0 for padding filters."""
    b, pos, k, cell, _, row = locate(x, weights, centre, positions, columns, plane, line, step, filters, padded,
                                        MANTISSA, OCTAVES, PLACE, WIDE, SIZE, M, N, PRECISION)
    valid = (pos < positions)[:, None]
    found = tl.load(sign + row + cell, mask=valid & (k < filters)[None, :], other=0)
    tl.store(out + (b * positions + pos)[:, None] * padded + k[None, :], found, mask=valid)


@jit
def transpose_kernel(signs, weights, scale, out, rows, columns, height, width, plane, line, step, padded,
                     SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Transposed convolution of signs (B, rows * columns, padded) into out (B, 6, height, width), from the corner on.

    Each pixel gathers from the patches that hold it, so nothing is added twice and no atomics are needed. Pixels go by phase,
    their place modulo the lattice's step: pixels of one phase meet the same taps. weights (SIZE, SIZE, padded, 16) hold the three
    channels twice, rounded to tf32 and what that left over, so the sum of both halves of out is float32's.
    """
    b = tl.program_id(2).to(tl.int64)
    py, px = tl.program_id(1) // step, tl.program_id(1) % step
    across = (width - px + step - 1) // step
    pixel = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    row, column = pixel // across, pixel % across
    first = (b * rows + row) * columns + column  # the patch whose corner is this pixel's phase, shifted below
    channel = tl.arange(0, 16)
    acc = tl.zeros((M, 16), weights.dtype.element_ty)
    for v in range(0, (SIZE - py + step - 1) // step):
        in_rows = (row >= v) & (row < rows + v)
        for u in range(0, (SIZE - px + step - 1) // step):
            inside = in_rows & (column >= u) & (column < columns + u)
            patch = signs + (first - (v * columns + u))[:, None] * padded
            tap = weights + ((py + v * step) * SIZE + px + u * step) * padded * 16 + channel[None, :]
            for start in range(0, padded, N):
                k = start + tl.arange(0, N)
                g = tl.load(patch + k[None, :], mask=inside[:, None], other=0).to(weights.dtype.element_ty)
                acc = tl.dot(g, tl.load(tap + k[:, None] * 16), acc, input_precision=PRECISION, out_dtype=weights.dtype.element_ty)
    y, x = py + row * step, px + column * step
    tl.store(out + (b * 6 + channel)[None, :] * plane + (y * line + x)[:, None], acc * tl.load(scale + b),
             mask=(y < height)[:, None] & (channel < 6)[None, :])


FEW = 2 ** 15  # patches; measured on an H100, the sort of 16,384 takes 9 ms where the cells take 13, and of 252,000 42 where they take 25
BLOCK = 128  # patches or pixels per program
AT_ONCE = 64 * 2 ** 20  # bytes of signs, one per projection, that the gradient holds at a time


def layout(x, filters, centre, step, corner):
    """(grid, weights and centre with filters padded to blocks of N, rows of the lattice, its sizes, constants) of a projecting kernel."""
    k, size, (height, width) = len(filters), filters.shape[-1], x.shape[-2:]
    n = min(64, max(16, triton.next_power_of_2(k)))
    padded = triton.cdiv(k, n) * n
    weights = F.pad(filters.flatten(1).T, (0, padded - k, 0, -filters[0].numel() % 32)).contiguous()
    rows, columns = ((side - start - size) // step + 1 for side, start in zip((height, width), corner))
    constants = dict(MANTISSA=MANTISSA, OCTAVES=OCTAVES, PLACE=PLACE, WIDE=x.dtype == torch.float64, SIZE=size, M=BLOCK, N=n,
                     PRECISION="tf32" if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32 else "ieee", num_warps=8, num_stages=2)
    return ((triton.cdiv(rows * columns, BLOCK), padded // n, len(x)), weights, F.pad(centre, (0, padded - k)).contiguous(), rows,
            (rows * columns, columns, height * width, width, step, k, padded), constants)


def histogram_triton(x, filters, centre, step, corner):
    x, table = x.contiguous(), torch.zeros(len(x), len(filters), CELLS, dtype=torch.int64, device=x.device)
    grid, weights, centre, _, sizes, constants = layout(x, filters, centre, step, corner)
    with on_device_of(x):
        histogram_kernel[grid](x[..., corner[0]:, corner[1]:], weights, centre, table, *sizes, COUNT=COUNT, **constants)
    return table


def gradient_triton(x, filters, centre, sign, scale, step, corner):
    x, size, (height, width) = x.contiguous(), filters.shape[-1], x.shape[-2:]
    grid, weights, centre, rows, sizes, constants = layout(x, filters, centre, step, corner)
    positions, columns, plane, line, _, k, padded = sizes
    coarse = filters if constants["WIDE"] else (filters.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    back = F.pad(torch.cat([coarse, filters - coarse], 1).permute(2, 3, 0, 1), (0, 10, 0, padded - k)).contiguous()  # (S, S, padded, 16)
    out = torch.zeros(len(x), 6, height, width, dtype=x.dtype, device=x.device)
    height, width = height - corner[0], width - corner[1]
    pixels, images = triton.cdiv(height, step) * triton.cdiv(width, step), max(1, AT_ONCE // (positions * padded))
    for part in (slice(i, i + images) for i in range(0, len(x), images)):
        count = len(x[part])
        signs = torch.empty(count, positions, padded, dtype=torch.int8, device=x.device)
        with on_device_of(x):
            sign_kernel[(*grid[:2], count)](x[part, :, corner[0]:, corner[1]:], weights, centre[part], sign[part], signs, *sizes, **constants)
            transpose_kernel[(triton.cdiv(pixels, BLOCK), step * step, count)](
                signs, back, scale[part], out[part, :, corner[0]:, corner[1]:], rows, columns, height, width, plane, line, step, padded,
                SIZE=size, M=BLOCK, N=constants["N"], PRECISION="ieee" if constants["WIDE"] else "tf32", num_warps=8, num_stages=2)
    return out[:, :3] + out[:, 3:]


# ---------------------------------------------------------------------------------------------------------------

class CellDistance(torch.autograd.Function):
    """W1_cells, mean over filters; keeps the two images and one byte per cell for the gradient, which it computes when asked."""

    @staticmethod
    def forward(ctx, x, y, filters, step, corner, impl):
        histogram = histogram_triton if impl == "triton" else histogram_torch
        centre = (x.mean((2, 3)) + y.mean((2, 3))) / 2 @ filters.sum((2, 3)).T  # (B, K)
        area = []  # integral of F over each cell, in units of width / (P 2 ** PLACE)
        for i in (x, y):
            table = histogram(i, filters, centre, step, corner)
            count, places = table >> COUNT, table & (1 << COUNT) - 1
            area.append((count.cumsum(-1) - count << PLACE) + places)
        difference = area[0] - area[1]
        positions = count[0, 0].sum()
        ctx.save_for_backward(x, y, filters, centre, difference.sign().neg().to(torch.int8), positions)
        ctx.lattice, ctx.impl = (step, corner), impl
        octave = torch.arange(OCTAVES, device=x.device).repeat_interleave(1 << MANTISSA)
        width = FINEST / (1 << MANTISSA) * torch.exp2(octave.to(x.dtype))
        total = (difference.abs() * torch.cat([width.flip(0), width])).sum(-1).mean(-1) / (positions << PLACE)
        return total + 0 * centre.sum(1)  # a NaN in an image has no cell, but must not be lost

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, filters, centre, sign, positions = ctx.saved_tensors
        gradient = gradient_triton if ctx.impl == "triton" else gradient_torch
        scale = grad / (positions * len(filters)) + 0 * centre.sum(1)
        return (*(gradient(i, filters, centre, sign, s * scale, *ctx.lattice) if needed else None
                  for i, s, needed in zip((x, y), (1, -1), ctx.needs_input_grad)), None, None, None, None)


def sliced_wasserstein(x, y, filters, step=1, corner=(0, 0), impl=None):
    """Distance (B,) of the patches of x and y (B, 3, H, W), sliced by filters (K, 3, S, S); gradients reach x and y.

    Patches start at every `step`-th pixel from `corner` = (row, column). impl "torch" sorts and is exact; "triton" and "cells"
    (the same in plain torch) agree with it as this file's docstring says, if |projection - centre| < 63.9. "auto" (or None) sorts on a
    CPU, and everywhere up to FEW patches.
    """
    rows, columns = ((side - start - filters.shape[-1]) // step + 1 for side, start in zip(x.shape[-2:], corner))
    if impl in (None, "auto") and rows * columns <= FEW:
        impl = "torch"
    elif impl in (None, "auto", "triton"):
        impl = resolve(impl, x.device)[0]
    if not len(x):
        impl = "torch"  # no programs to launch
    if impl == "triton" and x.is_cuda and x.dtype == torch.float64:
        impl = "cells"  # seen with Triton 3.6: its products of float64 do not compile for Hopper
    if impl == "torch":
        return sorted_distance(x, y, filters, step, corner)
    return CellDistance.apply(x, y, filters, step, corner, impl)
