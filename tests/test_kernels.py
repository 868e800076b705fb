"""Every Triton kernel against its torch reference, on the GPU if there is one, else interpreted. python -m pytest tests/test_kernels.py"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from conftest import ROOT, train
from kernels.dispatch import resolve, triton
from kernels.guided_mse import guided_mse, guided_mse_torch
from kernels.lpips_tail import lpips_tail, lpips_tail_torch
from kernels.sliced_wasserstein import sliced_wasserstein

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
swd = sys.modules["kernels.sliced_wasserstein"]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filters_of(count, size=3, dtype=torch.float32):
    return losses.random_projections(count, torch.Generator().manual_seed(1), size).to(DEVICE, dtype)


def distance_and_gradients(x, y, filters, impl, step=1, corner=(0, 0)):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    distance = sliced_wasserstein(x, y, filters, step, corner, impl)
    return distance.detach(), *torch.autograd.grad((distance * torch.arange(1, len(x) + 1, device=DEVICE)).sum(), (x, y))


# ---------------------------------------------------------------------------------------------------------------
# Sliced Wasserstein

def crossing_bound(u, v, centre):
    """The docstring's bound for one filter: the sum of width * max(mass) over the cells in which F_u - F_v has both signs."""
    edges = np.exp2(np.arange(swd.OCTAVES + 1))
    edges = np.concatenate([np.linspace(a, b, 65)[:-1] for a, b in zip(edges[:-1], edges[1:])]) - 1
    edges = centre + swd.FINEST * np.concatenate([-edges[::-1], edges[1:]])
    s = np.unique(np.concatenate([u, v, edges]))
    difference = np.searchsorted(np.sort(u), s, "right") / len(u) - np.searchsorted(np.sort(v), s, "right") / len(v)
    cell = np.searchsorted(edges, s, "right") - 1
    crosses = np.intersect1d(cell[difference > 1e-12], cell[difference < -1e-12])
    mass = [np.bincount(np.searchsorted(edges, i, "right") - 1, minlength=len(edges)) / len(i) for i in (u, v)]
    return (np.append(np.diff(edges), 0) * np.maximum(*mass))[crosses].sum()


@pytest.mark.parametrize("blend", [0., .9, .99])
def test_cells_are_below_the_sort_by_no_more_than_the_bound(blend):
    x, y = rand(1, 3, 40, 40, dtype=torch.float64), rand(1, 3, 40, 40, seed=1, dtype=torch.float64)
    y, w = blend * x + (1 - blend) * y, filters_of(8, 5, torch.float64)
    exact, cells = (sliced_wasserstein(x, y, w, impl=i).item() for i in ("torch", "cells"))
    u, v = (F.conv2d(i, w).flatten(2)[0].cpu().numpy() for i in (x, y))
    centre = ((x.mean((2, 3)) + y.mean((2, 3))) / 2 @ w.sum((2, 3)).T)[0].tolist()
    bound = np.mean([crossing_bound(*i) for i in zip(u, v, centre)])
    assert -1e-9 <= exact - cells <= bound + 1e-9 and bound < .2 * exact, (exact, cells, bound)


def test_cells_have_the_gradient_of_the_sort():
    x, y, w = losses.srgb_to_lab(rand(2, 3, 64, 64)), losses.srgb_to_lab(rand(2, 3, 64, 64, seed=1) ** 1.2), filters_of(16, 11)
    (exact, *g), (cells, *h) = (distance_and_gradients(x, y, w, i) for i in ("torch", "cells"))
    torch.testing.assert_close(cells, exact, rtol=1e-3, atol=0)
    for a, b in zip(g, h):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > .99 and abs(a.norm() / b.norm() - 1) < .01


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, count, size, step, corner", [
    ((2, 3, 13, 13), 5, 3, 1, (0, 0)), ((1, 3, 12, 17), 70, 3, 1, (0, 0)), ((2, 3, 23, 17), 4, 5, 2, (1, 0)), ((1, 3, 19, 24), 3, 3, 5, (4, 3)),
    ((3, 3, 5, 5), 2, 5, 1, (0, 0)), ((1, 3, 26, 24), 3, 11, 4, (2, 1))])
def test_the_kernel_gives_what_the_cells_in_torch_give(shape, count, size, step, corner, dtype):
    x, y, w = rand(*shape, dtype=dtype), rand(*shape, seed=1, dtype=dtype) * .7, filters_of(count, size, dtype)
    wanted, got = (distance_and_gradients(x, y, w, i, step, corner) for i in ("cells", "triton"))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=0)
    for a, b in zip(got[1:], wanted[1:]):  # a rounding error may put a value beside an edge into the next cell, hence the norm
        assert (a - b).norm() < (2e-3 if dtype == torch.float32 else 1e-9) * b.norm()


@needs_triton
def test_the_kernels_gradient_is_the_derivative_of_its_distance():
    x, w = rand(2, 3, 6, 5, dtype=torch.float64), filters_of(3, 3, torch.float64)
    y = x.flip(0) + 1.5  # far enough that no cell changes sign: there the distance is linear
    x.requires_grad_(), y.requires_grad_()
    torch.autograd.gradcheck(lambda a, b: sliced_wasserstein(a, b, w, impl="triton"), (x, y), eps=1e-2, atol=1e-4, fast_mode=True)


@needs_triton
def test_the_kernel_reads_any_memory_layout():
    x, y, w = rand(2, 3, 9, 8), rand(1, 3, 9, 8, seed=1), filters_of(2)
    wanted = distance_and_gradients(x, y.repeat(2, 1, 1, 1), w, "triton")
    got = distance_and_gradients(x.contiguous(memory_format=torch.channels_last), y.expand(2, -1, -1, -1), w, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@needs_triton
def test_many_images_go_in_parts_and_nothing_is_read_before_it_is_written(monkeypatch):
    x, y, w = rand(3, 3, 9, 8), rand(3, 3, 9, 8, seed=1), filters_of(2)
    wanted = distance_and_gradients(x, y, w, "triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(99))
    monkeypatch.setattr(swd, "AT_ONCE", 2 * 42 * 16)  # bytes of two images
    got = distance_and_gradients(x, y, w, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@needs_triton
@pytest.mark.parametrize("impl", ["triton", "cells"])
def test_equal_pictures_have_no_distance_and_no_gradient_and_neither_has_an_empty_batch(impl):
    x = rand(2, 3, 9, 8)
    x[1] = .5
    assert all((i == 0).all() for i in distance_and_gradients(x, x, filters_of(4), impl))
    assert [i.shape[0] for i in distance_and_gradients(x[:0], x[:0], filters_of(4), impl)] == [0, 0, 0]


@needs_triton
@pytest.mark.parametrize("impl", ["triton", "cells"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_lost(impl, bad):
    x = rand(2, 3, 9, 8)
    x[1, 0, 4, 4] = bad
    distance, gradient, _ = distance_and_gradients(x, rand(2, 3, 9, 8, seed=1), filters_of(4), impl)
    assert distance.isfinite().tolist() == [True, False] and gradient[0].isfinite().all() and not gradient[1].isfinite().any()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_lattice_of_patches_estimates_the_distance_of_all(impl):
    x, y, w = rand(2, 3, 24, 24) * 2 - 1, rand(2, 3, 24, 24, seed=1) - 1, filters_of(4)
    everything = losses.sliced_wasserstein_per_sample(x, y, w, 1)
    calls = [losses.sliced_wasserstein_per_sample(x, y, w, 1, 121, torch.Generator().manual_seed(s), impl) for s in (0, 0, 1)]
    assert torch.equal(calls[0], calls[1]) and not torch.equal(calls[0], calls[2])
    torch.testing.assert_close(calls[0], everything, rtol=.1, atol=0)
    torch.testing.assert_close(losses.sliced_wasserstein_per_sample(x, y, w, 1, 484, impl=impl), everything, rtol=1e-3, atol=0)
    assert losses.sliced_wasserstein_per_sample(x[..., :3], y[..., :3], w, 1, 1, torch.Generator(), impl).shape == (2,)


# ---------------------------------------------------------------------------------------------------------------
# Guided x0 and the latent distance; the tail of LPIPS

SHAPES = [(2, 4, 8, 8), (1, 1, 1, 1), (3, 5, 21, 13), (0, 4, 8, 8)]


def guided_inputs(shape, dtype=torch.float32):
    latents = [rand(*shape, seed=s, dtype=dtype) - .5 for s in range(4)]
    level = rand(shape[0], 1, 1, 1, seed=4, dtype=dtype) * .9 + .05
    return [*latents, level.sqrt(), (1 - level).sqrt(), rand(shape[0], seed=5, dtype=dtype)]


def guided(inputs, kind, impl, guidance=7.5):
    z_s = inputs[3].detach().requires_grad_()
    z_teacher, loss = guided_mse(*inputs[:3], z_s, *inputs[4:], guidance, kind, impl)
    assert not z_teacher.requires_grad
    return z_teacher, loss.detach(), torch.autograd.grad((loss * torch.arange(1, len(loss) + 1, device=DEVICE)).sum(), z_s)[0]


def tail(a, b, w, impl):
    a = a.detach().requires_grad_()
    loss = lpips_tail(a, b, w, impl)
    return loss.detach(), torch.autograd.grad((loss * torch.arange(1, len(loss) + 1, device=DEVICE)).sum(), a)[0]


def tail_inputs(shape, dtype=torch.float32):
    return rand(*shape, dtype=dtype) - .5, rand(*shape, seed=1, dtype=dtype) - .5, rand(shape[1], seed=2, dtype=dtype)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_guided_distance_is_its_formula_in_numpy(kind):
    inputs = guided_inputs((2, 4, 3, 3), torch.float64)
    p, u, z_t, z_s, alpha, sigma, weight = (i.cpu().numpy() for i in inputs)
    p, u = ((z_t - sigma * i) / alpha if kind == "epsilon" else alpha * z_t - sigma * i for i in (p, u))
    z_teacher = 7.5 * p - 6.5 * u
    for got, wanted in zip(guided(inputs, kind, "torch"), (
            z_teacher, weight * ((z_s - z_teacher) ** 2).mean((1, 2, 3)), 2 * (weight * [1, 2])[:, None, None, None] * (z_s - z_teacher) / 36)):
        np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=1e-10)


def test_the_tail_is_its_formula_in_numpy():
    a, b, w = (i.cpu().numpy() for i in tail_inputs((2, 5, 3, 2), torch.float64))
    u, v = (i / np.sqrt((i ** 2).sum(1, keepdims=True)) for i in (a, b))
    got = lpips_tail(*tail_inputs((2, 5, 3, 2), torch.float64), "torch")
    np.testing.assert_allclose(got.cpu().numpy(), (w[:, None, None] * (u - v) ** 2).sum(1).mean((1, 2)), rtol=1e-7)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_no_gradient_reaches_the_teachers_side(impl):
    inputs = [i.requires_grad_() for i in guided_inputs((2, 4, 3, 3))]
    z_teacher, loss = guided_mse(*inputs, 7.5, "v_prediction", impl)
    loss.sum().backward()
    assert not z_teacher.requires_grad and [i.grad is not None for i in inputs[:6]] == [False, False, False, True, False, False]
    a, b, w = (i.requires_grad_() for i in tail_inputs((2, 5, 3, 2)))
    lpips_tail(a, b, w.detach(), impl).sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_guided_kernel_is_as_near_to_float64_as_rounding_allows(shape, kind):
    wide = guided(guided_inputs(shape, torch.float64), kind, "torch")
    for got, wanted in zip(guided([i.float() for i in guided_inputs(shape, torch.float64)], kind, "triton"), wide):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(guided(guided_inputs(shape, torch.float64), kind, "triton"), wide):
        torch.testing.assert_close(got, wanted)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES + [(1, 100, 5, 7)], ids=str)
def test_the_tails_kernel_is_as_near_to_float64_as_rounding_allows(shape):
    wide = tail(*tail_inputs(shape, torch.float64), "torch")
    for got, wanted in zip(tail(*[i.float() for i in tail_inputs(shape, torch.float64)], "triton"), wide):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(tail(*tail_inputs(shape, torch.float64), "triton"), wide):
        torch.testing.assert_close(got, wanted)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_the_kernels_err_no_more_than_twice_what_torch_does(dtype):
    low = [i.to(dtype) for i in guided_inputs((2, 4, 8, 8))]
    for got, torchs, exact in zip(guided(low, "v_prediction", "triton"), guided(low, "v_prediction", "torch"),
                                  guided([i.float() for i in low], "v_prediction", "torch")):
        assert (got.float() - exact).norm() <= 2 * (torchs.float() - exact).norm() + 1e-2 * exact.norm()
    low = [i.to(dtype) for i in tail_inputs((2, 16, 8, 8))]
    for got, torchs, exact in zip(tail(*low, "triton"), tail(*low, "torch"), tail(*[i.float() for i in low], "torch")):
        assert (got.float() - exact).norm() <= 2 * (torchs.float() - exact).norm() + 1e-2 * exact.norm()


@needs_triton
def test_the_kernels_gradients_are_the_derivatives():
    p, u, z_t, z_s, *rest = guided_inputs((2, 2, 2, 2), torch.float64)
    torch.autograd.gradcheck(lambda z: guided_mse(p, u, z_t, z, *rest, 3., "epsilon", "triton")[1], z_s.requires_grad_())
    a, b, w = tail_inputs((2, 3, 2, 2), torch.float64)
    torch.autograd.gradcheck(lambda i: lpips_tail(i, b, w, "triton"), a.requires_grad_())


@needs_triton
def test_both_kernels_read_any_memory_layout_and_nothing_before_it_is_written(monkeypatch):
    inputs, maps = guided_inputs((2, 4, 8, 8)), tail_inputs((2, 16, 8, 8))
    wanted = *guided(inputs, "v_prediction", "triton"), *tail(*maps, "triton")
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))
    inputs[:4] = [i.contiguous(memory_format=torch.channels_last) for i in inputs[:4]]
    maps = *(i.contiguous(memory_format=torch.channels_last) for i in maps[:2]), maps[2]
    assert all(torch.equal(a, b) for a, b in zip((*guided(inputs, "v_prediction", "triton"), *tail(*maps, "triton")), wanted))


@needs_triton
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_features_of_zero_have_a_finite_gradient_and_nan_is_not_lost(impl):
    a, b, w = tail_inputs((2, 16, 3, 3))
    a[0], b[0] = 0, 0
    assert all(i.isfinite().all() for i in tail(a, b, w, impl)) and tail(a, b, w, impl)[0][0] == 0
    assert all((i == 0).all() for i in tail(b, b, w, impl))
    a[1, 2, 1, 1] = float("nan")
    loss, gradient = tail(a, b, w, impl)
    assert loss.isnan().tolist() == [False, True] and gradient[1, :, 1, 1].isnan().all() and gradient[0].isfinite().all()
    inputs = guided_inputs((2, 4, 3, 3))
    inputs[0][1, 0, 0, 0] = float("nan")
    assert guided(inputs, "epsilon", impl)[1].isnan().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------------
# Which implementation runs

def test_without_a_gpu_torch_runs_and_asking_for_triton_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve("auto", "cpu") == ("torch", "no CUDA device") and resolve("torch", "cuda") == ("torch", "as asked")
    with pytest.raises(ValueError, match="CUDA"):
        resolve("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(None, "cpu")[0] == "torch"


def test_auto_sorts_few_patches_and_counts_cells_of_many(monkeypatch):
    asked = []
    monkeypatch.setattr(swd, "resolve", lambda impl, device: asked.append(impl) or ("cells", ""))
    x, y, w = rand(1, 3, 14, 14), rand(1, 3, 14, 14, seed=1), filters_of(2)
    few, cells = (sliced_wasserstein(x, y, w, impl=i) for i in ("torch", "cells"))
    assert not torch.equal(few, cells)
    assert torch.equal(sliced_wasserstein(x, y, w), few) and asked == []
    monkeypatch.setattr(swd, "FEW", 143)  # of 12 x 12
    assert torch.equal(sliced_wasserstein(x, y, w, impl="auto"), cells) and asked == ["auto"]
    assert torch.equal(sliced_wasserstein(x, y, w, 2, (1, 1), "auto"), sliced_wasserstein(x, y, w, 2, (1, 1), "torch")) and asked == ["auto"]


def test_everything_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, losses
from kernels.dispatch import resolve
assert resolve(None, "cuda") == ("torch", "Triton is not installed")
x = torch.rand(1, 3, 16, 16)
assert losses.sliced_wasserstein_per_sample(x, x.flip(2) ** 2, losses.random_projections(2, torch.Generator())) > 0
try:
    resolve("triton", "cpu")
except ValueError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "pip install triton" in done.stdout, done.stderr


COMPILE = """
import sys
from importlib import import_module
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for module, name, pointers, constants, options in eval(sys.argv[1]):
    kernel = getattr(import_module(module), name)
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    done = compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", int(sys.argv[2]), 32), options=options)
    print(name, len(done.asm["cubin"]), done.metadata.shared)
"""
PROJECTS = dict(MANTISSA=6, OCTAVES=11, PLACE=17, WIDE=False, SIZE=11, M=128, N=64, PRECISION="tf32")
JOBS = [
    ("kernels.sliced_wasserstein", "histogram_kernel", dict(x="*fp32", weights="*fp32", centre="*fp32", table="*i64"), PROJECTS | dict(COUNT=40),
     dict(num_warps=8, num_stages=2)),
    ("kernels.sliced_wasserstein", "sign_kernel", dict(x="*fp32", weights="*fp32", centre="*fp32", sign="*i8", out="*i8"), PROJECTS,
     dict(num_warps=8, num_stages=2)),
    ("kernels.sliced_wasserstein", "transpose_kernel", dict(signs="*i8", weights="*fp32", scale="*fp32", out="*fp32"),
     dict(SIZE=11, M=128, N=64, PRECISION="tf32"), dict(num_warps=8, num_stages=2)),
    ("kernels.guided_mse", "guided_mse_kernel", dict.fromkeys("with_prompt without z_t z_s alpha sigma weight guidance z_teacher gradient partial".split(), "*fp32"),
     dict(EPSILON=True, WIDE=False, BLOCK=1024), {}),
    ("kernels.lpips_tail", "lpips_tail_kernel", dict(a="*bf16", b="*bf16", weights="*fp32", gradient="*bf16", partial="*fp32"),
     dict(EPS=1e-10, WIDE=False, C=2048, P=8), dict(num_warps=32))]


@needs_triton
@pytest.mark.parametrize("target", [80, 90])
def test_every_kernel_compiles_for_a_gpu_and_fits_its_shared_memory(target):
    """Ampere and Hopper machine code, made by Triton's own ptxas; no GPU is needed for that."""
    done = subprocess.run([sys.executable, "-c", COMPILE, repr(JOBS), str(target)], cwd=ROOT, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [name for _, name, *_ in JOBS]
    assert all(int(code) > 0 and int(shared) <= 99 * 1024 for _, code, shared in lines)  # what a 4090 lends one program


@pytest.mark.slow
def test_the_bench_prints_a_table_per_kernel_and_says_if_there_is_no_gpu():
    done = subprocess.run([sys.executable, "kernels/bench.py", "--size", "emoji"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ("No CUDA GPU" in done.stdout) == (DEVICE == "cpu"), done.stderr
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines() if re.match(r"\| [a-zT]", line)]
    assert {"sort (exact)", "sort of 1024 patches", "cells in torch", "eager", "torch.compile"} <= {name for name, *_ in rows}
    assert all(float(back) > 0 and float(peak) > 0 for _, _, back, peak, *_ in rows)
    assert [float(v) for v in rows[0][-2:]] == [0, 1] and float(dict((r[0], r[-1]) for r in rows)["cells in torch"]) > .999


@needs_triton
def test_training_with_either_implementation_has_the_same_losses_and_gradients(concept, monkeypatch):
    monkeypatch.setattr(swd, "BLOCK", 4096)  # the interpreter's time goes by programs
    clip, gradients, logs = torch.nn.utils.clip_grad_norm_, {"torch": [], "triton": []}, []

    def record(parameters, *rest):
        parameters = list(parameters)
        gradients[impl].append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, *rest)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    for impl in gradients:
        train("--max_train_steps", 1, "--echo_steps", 0, "--train_batch_size", 1, "--swd_projections", 3, "--swd_positions", 64,
              "--mixed_precision", "no", "--kernels", impl, "--output_dir", impl)
        logs.append(json.loads((Path(impl) / "log.json").read_text()))
    for a, b in zip(*logs):
        assert a == pytest.approx(b, rel=1e-3)
    assert len(gradients["torch"]) == len(gradients["triton"]) == 4  # teacher, student, token and critics
    for a, b in zip(*gradients.values()):
        assert (a - b).norm() < .02 * a.norm()
    assert not torch.equal(gradients["torch"][1], gradients["triton"][1]), "the flag changed nothing"


@pytest.mark.parametrize("noise, low, cosine", [(.05, .005, .97), (.008, .06, .85)])
def test_cells_err_on_nearly_equal_images_as_little_as_the_docstring_says(noise, low, cosine):
    from data.images import load_photos
    g = torch.Generator().manual_seed(0)
    x = (load_photos(ROOT / "data" / "dog", 64)[:1] + 1) / 2
    filters, y = losses.random_projections(32, g), (x + noise * torch.randn(x.shape, generator=g)).clamp(0, 1)
    a, b = losses.srgb_to_lab(x).requires_grad_(), losses.srgb_to_lab(y)
    (exact, g1), (cells, g2) = ((v, torch.autograd.grad(v.sum(), a)[0]) for v in (sliced_wasserstein(a, b, filters, impl=i) for i in ("torch", "cells")))
    assert 0 <= 1 - cells / exact < low and torch.nn.functional.cosine_similarity(g1.flatten(), g2.flatten(), dim=0) > cosine
