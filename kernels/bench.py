"""Time, memory and error of every kernel against its competitors: python kernels/bench.py [--size emoji] [--write]
and where a training step of the embedded pair spends its time: python kernels/bench.py --profile

Prints the tables of README.md beside it; --write puts them there: those of the GPU if there is one, else those of the CPU, where
Triton has nothing to run on. Forward, then forward and backward, in the median; the peak of memory above the inputs; the rate of
the ideal traffic (inputs read once, gradient written once); and how far distance and gradient are from the first row's.
"""
import argparse
import platform
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import losses
from data.images import load_photos
from kernels.dispatch import triton
from kernels.guided_mse import guided_mse
from kernels.lpips_tail import lpips_tail

HERE = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
COLUMNS = "| | forward, ms | with backward, ms | peak, MiB | GB/s | distance off | cosine of gradients |\n|---|---|---|---|---|---|---|"
SIZES = {  # batch, pixels, filters, latent, feature maps: SD-Turbo's as its training would have them, with VGG's maps as LPIPS has them
    "emoji": (4, 64, 32, (24, 8, 8), [(32, 16, 16), (48, 16, 16), (96, 8, 8), (144, 4, 4)]),
    "sd-turbo": (2, 512, 128, (4, 64, 64), [(64, 512, 512), (128, 256, 256), (256, 128, 128), (512, 64, 64), (512, 32, 32)])}


def pictures(batch, pixels):
    """Two batches of photos with a little noise, as a student's and a teacher's would have, in [-1, 1]."""
    photos = F.interpolate(load_photos(HERE.parent / "data" / "dog", 64), size=(pixels, pixels), mode="bicubic")
    g = torch.Generator().manual_seed(0)
    return [(photos[i:i + batch] + .03 * torch.randn(batch, 3, pixels, pixels, generator=g)).clamp(-1, 1).to(DEVICE) for i in (0, 1)]


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cases(size):
    """(title, tensors with a gradient, bytes of ideal traffic, {provider: function of those tensors to the distances (B,)})."""
    batch, pixels, count, latent, maps = SIZES[size]
    x, y = pictures(batch, pixels)
    filters, others = (losses.random_projections(count, torch.Generator().manual_seed(s)).to(DEVICE) for s in (1, 3))

    def sliced(impl, positions=0, filters=filters):
        return lambda x: losses.sliced_wasserstein_per_sample(x, y, filters, 5, positions, torch.Generator().manual_seed(2), impl)
    rows = {"sort (exact)": sliced("torch"), "sort, another draw of filters": sliced("torch", filters=others)}
    for n in (1024, 4096, 16384):
        if n < (pixels - 10) ** 2:
            rows |= {f"sort of {n} patches": sliced("torch", n), f"cells of {n} patches in Triton": sliced("triton", n)}
    rows |= {"cells in torch": sliced("cells"), "cells in Triton": sliced("triton")}
    if GPU or size == "emoji":  # at 512 px a CPU takes half a minute for each sort
        rows["sort, torch.compile"] = torch.compile(sliced("torch"), dynamic=False)
    yield f"Sliced Wasserstein, batch {batch}, {pixels} px, {count} filters, fp32", [x], 3 * x.nbytes, rows

    *outs, z_t, z_s = (rand(batch, *latent, seed=s) for s in range(4))
    level = torch.linspace(.1, .9, batch, device=DEVICE).view(-1, 1, 1, 1)

    def guided(impl):
        return lambda z_s: guided_mse(*outs, z_t, z_s, level.sqrt(), (1 - level).sqrt(), level.flatten(), 7.5, "v_prediction", impl)[1]
    yield f"Guided x0 and latent distance, batch {batch}, latents {latent}, fp32", [z_s], 6 * z_s.nbytes, {
        "eager": guided("torch"), "torch.compile": torch.compile(guided("torch"), dynamic=False), "Triton": guided("triton")}

    a, b = ([rand(batch, *m, seed=s) for m in maps] for s in (1, 2))

    def tail(impl):
        return lambda *a: sum(lpips_tail(i, j, torch.ones_like(i[0, :, 0, 0]), impl) for i, j in zip(a, b))
    yield f"LPIPS tail, batch {batch}, maps {', '.join('x'.join(map(str, m)) for m in maps)}, fp32", a, 3 * sum(i.nbytes for i in a), {
        "eager": tail("torch"), "torch.compile": torch.compile(tail("torch"), dynamic=False), "Triton": tail("triton")}

    if not GPU:
        return  # the sum of the above
    yield f"The alignment path without its networks (guided x0, latent distance, sliced Wasserstein), batch {batch}, {pixels} px", [x, z_s], \
        3 * x.nbytes + 6 * z_s.nbytes, {name: lambda x, z, s=sliced(*s), g=guided(s[0]): s(x) + g(z) for name, s in {
            "eager, all patches": ("torch",), "eager, 16384 patches at most": ("torch", 16384), "Triton, all patches": ("triton",),
            "Triton, 16384 patches at most": ("triton", 16384)}.items()}


def measure(call):
    """(milliseconds in the median, bytes that torch holds at most above what it held before, the result)."""
    if GPU:
        result = call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before  # read before the timer takes 256 MiB to empty the cache with
        return triton.testing.do_bench(call, return_mode="median"), peak, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        started = time.process_time()
        result = call()
        times = [1000 * (time.process_time() - started)]
    held = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    while times[0] < 3000 and len(times) < 6:  # a call of seconds is not repeated; of shorter ones the first is a warm-up
        started = time.process_time()
        call()
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times[1:] or times), most, result


def table(tensors, traffic, rows):
    lines, first = [COLUMNS], None
    for name, distance in rows.items():
        if "Triton" in name and not GPU:
            continue

        def forward():
            return distance(*(i.detach().requires_grad_() for i in tensors))

        def both():
            inputs = [i.detach().requires_grad_() for i in tensors]
            loss = distance(*inputs)
            return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), inputs)])
        if "compile" in name:
            both()
        back, peak, (loss, gradient) = measure(both)
        there, _, _ = measure(forward)
        first = first or (loss, gradient)
        off = ((loss - first[0]) / first[0]).abs().max().item()
        cosine = F.cosine_similarity(gradient.double(), first[1].double(), dim=0).item()
        lines.append(f"| {name} | {there:.3g} | {back:.3g} | {peak / 2 ** 20:.3g} | {traffic / back / 1e6:.3g} | {off:.1e} | {cosine:.4f} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def profile(steps=4):
    """Operators of one iteration of `train.py --concept data/dog`, in the mean over all but the first."""
    import tempfile

    import train
    from data import progress
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU] + GPU * [torch.profiler.ProfilerActivity.CUDA])

    class Watched(progress.tqdm):
        def __iter__(self):
            for i, step in enumerate(super().__iter__()):
                if i == 1:
                    watch.start()
                yield step
            watch.stop()
    progress.tqdm = Watched
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--concept", str(HERE.parent / "data" / "dog"), "--max_train_steps", str(steps), "--echo_steps", "0", "--preview_steps", "0",
                    "--output_dir", folder])
    took = "self_device_time_total" if GPU else "self_cpu_time_total"
    rows = sorted(watch.key_averages(), key=lambda e: -getattr(e, took))
    total = sum(getattr(e, took) for e in rows)
    print(f"\n{total / 1000 / (steps - 1):.0f} ms per iteration\n\n| operator | calls | ms | share |\n|---|---|---|---|")
    for e in rows[:14]:
        print(f"| {e.key} | {e.count / (steps - 1):.0f} | {getattr(e, took) / 1000 / (steps - 1):.1f} | {getattr(e, took) / total:.1%} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--size", choices=[*SIZES, "all"], default="all")
    p.add_argument("--write", action="store_true", help="also put the tables into kernels/README.md")
    p.add_argument("--profile", action="store_true", help="instead: the operators of one training iteration of the embedded pair")
    args = p.parse_args()
    if args.profile:
        return profile()
    if args.write and args.size != "all":
        p.error("--write needs --size all")
    if GPU:
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    else:
        where = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU time"
        print("No CUDA GPU here: Triton's rows are left out, the others run on the CPU.")
    text = f"Measured on {where}.\n"
    for size in SIZES if args.size == "all" else [args.size]:
        for title, tensors, traffic, rows in cases(size):
            text += f"\n**{title}**\n\n{table(tensors, traffic, rows)}\n"
    print(text)
    if args.write:
        readme, part = HERE / "README.md", DEVICE
        readme.write_text(re.sub(rf"(<!-- {part} -->\n).*?(<!-- end of {part} -->)", lambda m: m[1] + text + m[2], readme.read_text(encoding="utf-8"),
                                 flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
