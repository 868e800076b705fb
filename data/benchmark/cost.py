"""What an iteration of train.py costs, part by part: FLOPs counted, seconds and memory measured.

    python data/benchmark/cost.py --base sd-turbo --random_weights              # no download: full-size networks of random weights
    python data/benchmark/cost.py --base sd-turbo --random_weights --tiny_vae --dinov2_size 224 --gradient_checkpointing
    python data/benchmark/cost.py                                               # the embedded pair, on a CPU

Every flag of train.py can be added. FLOPs (two per multiply-add) come from torch's FlopCounterMode while `train.iteration` runs
on the meta device, so they need neither weights nor a GPU. "published" is data/sd-turbo/paper.toml with nothing kept or shared:
photos are encoded anew each time, features of the student's image are computed for its own loss, for the identity term and for
the critics. Without a GPU a large base is counted only, unless --device cpu asks for more.
"""
import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import model
import train
from data.base import find_base, pick_device, stored_in
from data.benchmark.full_size import FULL_SIZE, write_base
from data.disk import fail, fill_marks

NETWORK = {"identity": "CLIP", "clip": "CLIP", "dino": "DINO", "dinov2": "DINOv2"}


# ---------------------------------------------------------------------------------------------------------------
# The step of train.py, metered at the borders of its networks

class Meter:
    """FLOPs and seconds of named parts, while `measuring`; what lies outside of the networks is "losses and the rest"."""
    REST = "losses and the rest"

    def __init__(self, device):
        self.device, self.part, self.flops, self.seconds = device, self.REST, {}, {}
        self.counter, self.mark = None, (0, 0.)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.counter.get_total_flops() if self.counter else 0, time.perf_counter()

    def switch(self, part):
        """From here on, cost belongs to another part; returns the part until now."""
        now, before = self.now(), self.part
        self.flops[before] = self.flops.get(before, 0) + now[0] - self.mark[0]
        self.seconds[before] = self.seconds.get(before, 0) + now[1] - self.mark[1]
        self.mark, self.part = now, part
        return before

    @contextmanager
    def measuring(self):
        backward = torch.Tensor.backward

        def and_rest(tensor, *args, **more):
            backward(tensor, *args, **more)
            self.switch(self.REST)  # a backward pass ends in some network

        with FlopCounterMode(display=False) if self.device.type == "meta" else nullcontext() as self.counter, \
                mock.patch.object(torch.Tensor, "backward", and_rest):
            self.part, self.mark, self.flops, self.seconds = self.REST, self.now(), {}, {}
            yield
            self.switch(self.REST)


class Border(torch.autograd.Function):
    """Passes a tensor through; when its gradient comes by, cost belongs to another part."""

    @staticmethod
    def forward(ctx, x, meter, part):
        ctx.meter, ctx.part = meter, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.meter.switch(ctx.part)
        return grad, None, None


def metered(call, meter, part):
    """`call` with its forward and backward pass booked under a part."""
    def border(x, to):
        return Border.apply(x, meter, to) if isinstance(x, torch.Tensor) and x.requires_grad else x

    @functools.wraps(call)
    def wrapped(*inputs, **more):
        before = meter.switch(part)
        out = call(*(border(x, Meter.REST) for x in inputs), **more)
        out = [border(x, part) for x in out] if isinstance(out, list) else border(out, part)
        meter.switch(before)
        return out
    return wrapped


def book(m, meter):
    """Meter the networks and optimizers of a run."""
    for owner, name, part in [(m.pair.teacher, "forward", "teacher UNet"), (m.pair.student, "forward", "student UNet"),
                              (m.pair.text, "forward", "text encoder"), (m.pair, "encode", "autoencoder"), (m.pair, "decode", "autoencoder"),
                              *((e, name, NETWORK[k]) for k, e in m.encoders.items() for name in ("features", "layers")),
                              *((o, "step", "optimizers") for o in m.optimizers.values())]:
        setattr(owner, name, metered(getattr(owner, name), meter, part))


class Forgetful(model.View):
    """A view that keeps no features, as the release computed them."""

    def features(self, name):
        return self.compute(self.encoders[name].features, self.x)


JOINT, HEARING = train.Turn("both", "joint", 1.), train.Turn("teacher", "echo", 1.)


def build_meta(args):
    """The run on the meta device."""
    fewer = {"critic_views": min(1, args.critic_views)}  # features of windows are known before the first iteration
    args = argparse.Namespace(**vars(args) | {"compile": False, "mixed_precision": "no"} | fewer)
    return args, train.build(args, torch.device("meta"), random=True, dtype=torch.float32)


def count(args, m, published=False):
    """{part: FLOP} of one joint iteration of a run on the meta device."""
    meter = Meter(m.device)
    book(m, meter)
    with mock.patch.object(train, "View", Forgetful if published else model.View), meter.measuring():
        train.iteration(m, args, JOINT, 0)
    return meter.flops


def count_echo(args, m):
    """FLOP that the echo costs beyond its iterations: drawing and ranking the samples, and the teacher's share of echoed images."""
    if not args.echo_steps:
        return 0
    pair, counter = m.pair, FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        x = pair.decode(pair.student.one_step(torch.randn(1, *pair.latent_shape, device="meta"), pair.text(["a <v> dog"])))
        for k in ("identity", "clip"):
            m.encoders[k].features(x)
    drawn = counter.get_total_flops()
    args = argparse.Namespace(**vars(args))
    m.echo.z, m.echo.prompts = torch.randn(8, *pair.latent_shape, device="meta"), ["a <v> dog"] * 8
    heard = []
    for real_only in (True, False):
        args.echo_real_only = real_only
        with FlopCounterMode(display=False) as counter:
            train.iteration(m, args, HEARING, 0)
        heard.append(counter.get_total_flops())
    return args.echo_rounds * (args.echo_samples * drawn + args.echo_steps * (heard[1] - heard[0]))


@torch.no_grad()
def count_picture(pair, tiny=False):
    """FLOP of one one-step picture of a pair on the meta device: (text encoder, UNet, decoder)."""
    z, out, parts = torch.randn(1, *pair.latent_shape, device="meta"), {}, []
    for part in (lambda: out.update(context=pair.text(["a <v> dog"])), lambda: pair.student.one_step(z, out["context"]), lambda: pair.decode(z, tiny)):
        with FlopCounterMode(display=False) as counter:
            part()
        parts.append(counter.get_total_flops())
    return parts


# ---------------------------------------------------------------------------------------------------------------
# Memory: what autograd keeps of one iteration on the meta device, under the rules by which CUDA's autocast chooses precisions

class CudaAttention(TorchFunctionMode):
    """Attention on the meta device as CUDA has it: without a matrix of all pairs."""
    active = []  # the innermost is in force

    def __enter__(self):
        CudaAttention.active.append(type(self))
        return super().__enter__()

    def __exit__(self, *error):
        CudaAttention.active.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, True)[0]
        return func(*args, **kwargs)


class CudaAutocast(CudaAttention):
    """Autocast to bf16 as CUDA does it, on any device: matrix products in bf16, norms, softmax and losses in fp32."""
    LOW = {F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul,
           torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.einsum, torch.conv2d, torch._C._nn.linear, torch.addmm}
    HIGH = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.layer_norm, torch.group_norm, F.mse_loss,
            F.cross_entropy, F.cosine_similarity, F.normalize, torch.exp, torch.Tensor.exp, torch.Tensor.square, torch.Tensor.pow}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if func in self.LOW else torch.float32 if func in self.HIGH else None

        def cast(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        if dtype:
            args, kwargs = [cast(x) for x in args], {k: cast(v) for k, v in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)


class Kept:
    """A tensor that autograd keeps for the backward pass; `live` counts the bytes of all that it keeps now, `most` its maximum."""
    storages, live, most, apart = {}, 0, 0, set()

    @classmethod
    def watch(cls, apart):
        """Hooks that count from 0, leaving out the storages of tensors `apart`."""
        cls.storages, cls.live, cls.most, cls.apart = {}, 0, 0, {p.untyped_storage()._cdata for p in apart}
        return torch.autograd.graph.saved_tensors_hooks(cls, lambda kept: kept.tensor)

    def __init__(self, tensor):
        self.tensor, self.key = tensor.detach(), tensor.untyped_storage()._cdata  # with its graph, a saved output would keep itself
        size, users = Kept.storages.get(self.key, (0 if self.key in Kept.apart else tensor.untyped_storage().nbytes(), 0))
        Kept.storages[self.key] = size, users + 1
        Kept.live += 0 if users else size
        Kept.most = max(Kept.most, Kept.live)

    def __del__(self):
        size, users = Kept.storages.pop(self.key)
        if users > 1:
            Kept.storages[self.key] = size, users - 1
        else:
            Kept.live -= size


def watch_memory(m, args, half):
    """Bytes of (weights, gradients and optimizer moments, what autograd keeps at most) in one joint iteration without sliced Wasserstein."""
    networks = [n for n in (m.pair.teacher, m.pair.student, m.pair.vae, m.pair.tiny_vae, m.pair.text, *m.encoders.values(), *m.heads.values()) if n is not None]
    weights = list({id(p): p for n in networks for p in n.parameters()}.values())
    args = argparse.Namespace(**vars(args) | {"swd_weight": 0.})
    m.autocast = autocast = CudaAutocast if half else nullcontext

    def stored(module):
        return autocast() if next(module.parameters()).dtype == torch.bfloat16 else nullcontext()

    with mock.patch.object(model, "as_stored", stored), CudaAttention(), Kept.watch(weights):
        train.iteration(m, args, JOINT, 0)
    return sum(p.nbytes for p in weights), 3 * sum(p.nbytes for p in weights if p.requires_grad), Kept.most


def count_memory(args):
    """`watch_memory` on the meta device, with the frozen weights in bf16 where a GPU would keep them so."""
    half = args.mixed_precision == "bf16"
    def as_now():  # what gradient checkpointing computes again, it computes under the same rules
        return nullcontext(), CudaAttention.active[-1]() if CudaAttention.active else nullcontext()

    again = functools.partial(torch.utils.checkpoint.checkpoint, context_fn=as_now)
    with mock.patch("torch.utils.checkpoint.checkpoint", again), mock.patch("transformers.modeling_utils.checkpoint", again):
        args, m = build_meta(args)
        for n in (m.pair.teacher, m.pair.vae, m.pair.tiny_vae, m.pair.text, *m.encoders.values()):
            for p in n.parameters() if n is not None and half else ():
                if not p.requires_grad:
                    p.data = p.data.to(torch.bfloat16)
        return watch_memory(m, args, half)


# ---------------------------------------------------------------------------------------------------------------
# The report

def parse_arguments(argv=None):
    """(ours, train.py's flags as a list) of a command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--base", default="emoji", help="emoji, sd-turbo, hyper-sd15, or a folder laid out like data/emoji/base")
    p.add_argument("--random_weights", action="store_true", help="full-size random networks, nothing is downloaded")
    p.add_argument("--count", action=argparse.BooleanOptionalAction, default=True, help="count FLOPs and memory before the measurement")
    p.add_argument("--steps", type=int, default=10, help="iterations that are timed, after two that are not; 0 only counts")
    p.add_argument("--write", metavar="FILE", help="put the table of the embedded pair between the cost marks of a Markdown file")
    p.add_argument("--images", type=int, default=16, help="images drawn for the sampling table; 0 skips it")
    ours, rest = p.parse_known_args(argv)
    find_base(ours.base)
    if ours.random_weights and ours.base not in FULL_SIZE:
        fail(f"--random_weights needs sizes that are written down: --base {' or '.join(FULL_SIZE)}")
    if ours.steps < 0 or ours.images < 0:
        fail("--steps and --images must be 0 or more")
    if ours.write and (ours.base != "emoji" or not ours.steps or not os.path.isfile(ours.write)):
        fail(f"--write {ours.write} takes the embedded pair's times: give a Markdown file that is there, --base emoji and --steps of 1 or more")
    return ours, rest


def main(argv=None):
    ours, rest = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        base = ours.base
        if ours.random_weights:
            write_base(folder, FULL_SIZE[ours.base])
            base = folder
        fixed = ["--base", base, "--concept", str(ROOT / "data" / "dog"), "--class_word", "dog"]
        args = train.parse_arguments(fixed + rest)
        if ours.write:
            return write_table(ours, args, ours.write)
        report(ours, args, [*fixed, "--train_batch_size", str(args.train_batch_size)])


def report(ours, args, plain):
    """Print the counted tables, then, where it is feasible, what was measured; plain: train.py's flags without any that lower the cost."""
    large = find_base(ours.base).folder is None
    flops = print_counts(ours, args, plain, large) if ours.count else None
    device, why = pick_device(args.device)
    if not ours.steps or device.type == "cpu" and args.device == "auto" and large:
        print("not timed: " + ("--steps 0" if not ours.steps else f"{why}; --device cpu would time it all the same, in many minutes and 14 GB"))
        return
    measure(ours, args, device, why, flops, 0 if large and device.type == "cpu" else 2)


def print_counts(ours, args, plain, large):
    """Print FLOPs by part and memory by flag set; returns the FLOPs of one iteration with the flags given."""
    n, columns, echoes = args.train_batch_size, {"ours": args}, []
    if large:
        columns = {"ours": train.parse_arguments(plain), "with these flags": args}
        if find_base(args.base).recipe.parent.name == "sd-turbo":  # whose paper.toml it is
            columns = {"published": train.parse_arguments([*plain, "--recipe", str(ROOT / "data/sd-turbo/paper.toml")])} | columns
    for name, flags in columns.items():
        counted, m = build_meta(flags)
        columns[name] = flags, count(counted, m, name == "published")
        echoes.append(count_echo(counted, m))
    print(f"TFLOP per image and iteration, {ours.base}, counted (batch {n})\n")
    print("| part | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for part in sorted({k for _, c in columns.values() for k, v in c.items() if v}):
        print(f"| {part} | " + " | ".join(f"{c.get(part, 0) / a.train_batch_size / 1e12:.4g}" for a, c in columns.values()) + " |")
    print("| sum | " + " | ".join(f"{sum(c.values()) / a.train_batch_size / 1e12:.4g}" for a, c in columns.values()) + " |")
    totals = [(a.max_train_steps + a.echo_rounds * a.echo_steps) * sum(c.values()) + e for (a, c), e in zip(columns.values(), echoes)]  # half an iteration teaches one network
    print("| PFLOP per concept | " + " | ".join(f"{v / 1e15:.4g}" for v in totals) + " |")
    print(f"\n(with these flags {args.max_train_steps} joint iterations, {args.echo_steps} of each network alone, and "
          f"{echoes[-1] / 1e15:.3g} PFLOP to draw, rank and hear the echo)")
    drawn = [f"{v / 1e12:.3g}" for v in count_picture(m.pair, args.tiny_vae)]
    print("one picture, one step: text encoder {}, UNet {}, decoder {} TFLOP".format(*drawn))
    print_memory({"published" if name == "published" else switches(flags): flags for name, (flags, _) in columns.items()}, args)
    return sum(list(columns.values())[-1][1].values())


def print_memory(sets, args):
    """The table of memory by flag set {name: flags}, and with gradient checkpointing added to the last of them."""
    sets = sets | {f"{switches(args)} --gradient_checkpointing": argparse.Namespace(**vars(args) | {"gradient_checkpointing": True})}
    print(f"\nGB at batch {args.train_batch_size}, counted as CUDA's autocast would keep it, not yet measured; what a network needs in passing comes on top\n")
    print("| flags | precision | weights | gradients, optimizer | kept for the backward pass | together |\n|---|---|---|---|---|---|")
    for name, flags in sets.items():
        sizes = [v / 1e9 for v in count_memory(flags)]
        print(f"| {name} | {flags.mixed_precision} | " + " | ".join(f"{v:.2f}" for v in sizes) + f" | {sum(sizes):.1f} |", flush=True)
    print()


def timed(ours, args, device, warm):
    """(the run, {part: seconds per iteration}) of the real iteration."""
    dtype = torch.bfloat16 if ours.random_weights and args.mixed_precision == "bf16" else stored_in(device, vars(args))
    m = train.build(args, device, random=ours.random_weights, dtype=dtype)
    meter = Meter(device)
    book(m, meter)
    for step in range(warm):
        train.iteration(m, args, JOINT, step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with meter.measuring():
        for step in range(warm, warm + ours.steps):
            train.iteration(m, args, JOINT, step)
    return m, {k: v / ours.steps for k, v in meter.seconds.items()}


def measure(ours, args, device, why, flops, warm):
    """Print seconds of the real iteration by part, peak memory, and images per second."""
    m, parts = timed(ours, args, device, warm)
    print(f"\n{device} ({why}), torch {torch.__version__}, {args.mixed_precision}, batch {args.train_batch_size}, {m.pair.resolution} px\n")
    print("| part | s per iteration |\n|---|---|")
    for part, s in parts.items():
        print(f"| {part} | {s:.4g} |")
    seconds = sum(parts.values())
    print(f"| all | {seconds:.4g} |")
    print(f"\n{switches(args)} -> {peak(device)}, {1 / seconds:.3g} it/s" + (f", {flops / seconds / 1e12:.3g} TFLOP/s" if flops else ""))
    if ours.images:
        sampling(m.pair, device, ours.images)


def matmul_rate(dtype, size=1024, rounds=20):
    """FLOP per second of one large matrix product on the CPU, the best of some."""
    a, best = torch.randn(size, size, dtype=dtype), float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def write_table(ours, args, path):
    """Put what a default iteration and a picture cost on this CPU between the marks of a Markdown file."""
    flops, rates, found = count(*build_meta(args)), {"no": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)}, {}
    for precision in rates:
        m, found[precision] = timed(ours, argparse.Namespace(**vars(args) | {"mixed_precision": precision}), torch.device("cpu"), 2)
    rows = [(part, flops[part], *(found[p][part] for p in rates)) for part in flops if found["no"][part] > .001]
    rows.append(("sum", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    lines = [f"One joint iteration of the default recipe (batch {args.train_batch_size}), {torch.get_num_threads()} thread(s) of "
             f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}. Floor: the GFLOP at the rate of a large matrix "
             f"product, measured beside it ({rates['no'] / 1e9:.0f} GFLOP/s in fp32, {rates['bf16'] / 1e9:.0f} in bf16).", "",
             "| part | GFLOP | fp32, s | share of the floor | bf16, s | share of the floor |", "|---|---|---|---|---|---|"]
    for part, flop, full, half in rows:
        shares = [f"{flop / rates[p] / s:.0%}" for p, s in (("no", full), ("bf16", half))]
        lines.append(f"| {part} | {flop / 1e9:.2f} | {full:.3f} | {shares[0]} | {half:.3f} | {shares[1]} |")
    lines += ["", *picture(m.pair), "", f"Written by `python data/benchmark/cost.py --write {path}`.", ""]
    fill_marks(path, "cost", "end cost", "\n".join(lines), "--write")


def picture(pair):
    """Lines about one picture: a new process of sample.py beside a bare `import torch`, and in a process that has drawn before."""
    def wall(*command):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        draw = [str(ROOT / "sample.py"), "--base", "emoji", "--prompt", "a dog on the beach", "--num_images", "1", "--output_dir", out]
        runs = sorted((wall(*draw), wall("-c", "import torch")) for _ in range(5))
    noise, t = torch.randn(1, *pair.latent_shape), []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            pair.decode(pair.student.one_step(noise, pair.text(["a dog on the beach"])))
            t.append(time.perf_counter() - start)
    cold, bare = runs[2]
    return [f"One picture: {cold:.1f} s in a new process (`sample.py --num_images 1`), of which `import torch` alone takes {bare:.1f} s; "
            f"{1000 * sorted(t)[6]:.0f} ms once the networks are loaded."]


def switches(args):
    return " ".join([f"--{k}" for k in ("tiny_vae", "gradient_checkpointing", "compile") if getattr(args, k)] + [f"--dinov2_size {args.dinov2_size}"])


def peak(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB peak"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB peak resident"


@torch.no_grad()
def sampling(pair, device, images):
    """ms per image of our one-step sampling beside a plain diffusers pipeline around the same networks."""
    from diffusers import StableDiffusionPipeline
    batch = min(8, images)
    pipe = StableDiffusionPipeline(vae=pair.vae, text_encoder=pair.text.encoder, tokenizer=pair.text.tokenizer, unet=pair.student.unet,
                                   scheduler=pair.student.scheduler, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    prompt, meter = "a photo of a <v> dog", Meter(device)

    def ours():
        noise = torch.randn(batch, *pair.latent_shape).to(device)
        return pair.decode(pair.student.sample(noise, pair.text([prompt]).expand(batch, -1, -1), 1), tiny=True).cpu()

    def plain():
        with torch.autocast(device.type, torch.bfloat16, enabled=pair.vae.dtype == torch.bfloat16):
            return pipe(prompt, num_images_per_prompt=batch, num_inference_steps=1, guidance_scale=0.0, height=pair.resolution,
                        width=pair.resolution, output_type="pt").images.cpu()

    ms, rounds = {}, max(1, images // batch)
    for name, draw in (("ours", ours), ("plain diffusers pipeline", plain)):
        draw()
        start = meter.now()[1]
        for _ in range(rounds):
            draw()
        ms[name] = 1000 * (meter.now()[1] - start) / rounds / batch
    print(f"\nsampling, one step, batch {batch}: " + ", ".join(f"{k} {v:.4g} ms per image" for k, v in ms.items())
          + f"; ratio {ms['plain diffusers pipeline'] / ms['ours']:.3g}")


if __name__ == "__main__":
    main()
