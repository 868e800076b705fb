"""What an iteration costs, part by part: FLOPs counted, seconds and memory measured.

    python bench.py --base sd-turbo --random_weights              # no download: full-size networks from the configs below
    python bench.py --base sd-turbo --random_weights --tiny_vae --dinov2_size 224 --gradient_checkpointing
    python bench.py                                               # the embedded pair, on a CPU

FLOPs (two per multiply-add) come from torch's FlopCounterMode on the meta device, so they need neither weights nor a GPU.
"published" computes as the release did: nothing is kept or shared; images are encoded each time, features of the student's image
are computed anew for its own loss, for the identity term and for the critics. "ours" is what train.py does. Without a GPU a large
base is counted only, unless --device cpu asks for more.
"""
import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import losses
from data.images import fail
from kernels.guided_mse import guided_mse
from model import (BASES, RECIPES, Critic, compile_networks, find_base, load_encoders, load_pair, pick_device, save_memory, stored_in,
                   trainable_parameters)

PAPER = 41  # PFLOP per concept: 1000 iterations of batch 2 as published


# ---------------------------------------------------------------------------------------------------------------
# Full-size configs, as the hub repositories have them, and a base folder made of them

NOISE = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
             set_alpha_to_one=False)
UNET = dict(_class_name="UNet2DConditionModel", in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2)
SD2 = dict(UNET, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
OPENCLIP = dict(model_type="clip_text_model", hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096,
                hidden_act="gelu", vocab_size=49408, max_position_embeddings=77, projection_dim=1024, bos_token_id=49406, eos_token_id=49407)
CLIP_L = dict(OPENCLIP, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="quick_gelu",
              projection_dim=768)
LEVELS = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
ENCODERS = {
    "tiny_vae": dict(_class_name="AutoencoderTiny", scaling_factor=1.0),
    "vae": dict(_class_name="AutoencoderKL", block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
                down_block_types=LEVELS[0], up_block_types=LEVELS[1], norm_num_groups=32, sample_size=512, scaling_factor=.18215),
    "dino": dict(model_type="vit", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=224,
                 patch_size=16),
    "dinov2": dict(model_type="dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14),
    "clip": dict(model_type="clip", projection_dim=1024, text_config=dict(OPENCLIP, num_hidden_layers=24),
                 vision_config=dict(model_type="clip_vision_model", hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120,
                                    image_size=224, patch_size=14, hidden_act="gelu", projection_dim=1024))}
FULL_SIZE = {
    "sd-turbo": dict(ENCODERS, teacher_unet=dict(SD2, sample_size=96, upcast_attention=True), student_unet=dict(SD2, sample_size=64),
                     text_encoder=OPENCLIP, teacher_type="v_prediction", tokens=(4, 768)),
    "hyper-sd15": dict(ENCODERS, teacher_unet=dict(UNET, cross_attention_dim=768, attention_head_dim=8, sample_size=64),
                       student_unet=dict(UNET, cross_attention_dim=768, attention_head_dim=8, sample_size=64), text_encoder=CLIP_L,
                       teacher_type="epsilon", tokens=(4, 768))}


def write_base(folder, sizes):
    """A base folder that holds configs, tokenizers and a random image projection, but no other weight; see `load_part`."""
    def write(name, value):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    words = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]  # CLIP's byte alphabet
    words += [w + "</w>" for w in words]
    words += [f"unused{i}" for i in range(sizes["text_encoder"]["vocab_size"] - len(words) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    for part, scheduler, kind in (("teacher", "DDIMScheduler", sizes["teacher_type"]), ("student", "EulerDiscreteScheduler", "epsilon")):
        write(f"{part}/unet/config.json", sizes[f"{part}_unet"])
        write(f"{part}/scheduler/scheduler_config.json", dict(NOISE, _class_name=scheduler, prediction_type=kind, timestep_spacing="trailing"))
        write(f"{part}/vae/config.json", sizes["vae"])
        write(f"{part}/text_encoder/config.json", sizes["text_encoder"])
        write(f"{part}/tokenizer/vocab.json", {w: i for i, w in enumerate(words)})
        write(f"{part}/tokenizer/tokenizer_config.json", dict(
            tokenizer_class="CLIPTokenizer", model_max_length=sizes["text_encoder"]["max_position_embeddings"],
            bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="!"))
        (Path(folder) / part / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write("tiny_vae/config.json", sizes["tiny_vae"])
    for name in ("dino", "dinov2", "clip"):
        write(f"encoders/{name}/config.json", sizes[name])
        pixels = sizes[name].get("image_size") or sizes[name]["vision_config"]["image_size"]
        write(f"encoders/{name}/preprocessor_config.json", dict(size=pixels, image_mean=[.48, .46, .41], image_std=[.27, .26, .28]))
    count, width = sizes["tokens"]
    save_file({"image_proj.proj.weight": torch.randn(count * width, sizes["clip"]["projection_dim"]) * .02,
               "image_proj.proj.bias": torch.zeros(count * width), "image_proj.norm.weight": torch.ones(width),
               "image_proj.norm.bias": torch.zeros(width)}, Path(folder) / "encoders" / "ip_adapter.safetensors")
    write("base.json", dict(recipe="sd-turbo", prompts="photo"))


# ---------------------------------------------------------------------------------------------------------------
# One iteration of train.py, cut at the borders of the networks so that each forward and backward is metered by itself.
# tests/test_bench.py holds its count against that of train.py.

class Meter:
    """FLOPs and, off the meta device, seconds of named parts."""

    def __init__(self, device):
        self.device, self.flops, self.seconds = device, {}, {}

    @contextlib.contextmanager
    def __call__(self, part):
        if self.device.type == "meta":
            with FlopCounterMode(display=False) as counter:
                yield
            self.flops[part] = self.flops.get(part, 0) + counter.get_total_flops()
        else:
            start = self.now()
            yield
            self.seconds[part] = self.seconds.get(part, 0) + self.now() - start

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def iteration(pair, encoders, heads, optimizers, known, x, flags, autocast, meter, published=False):
    """One iteration of batch len(x); known holds latents and features of the photos; published: see the top of this file."""
    n, device = len(x), pair.text.row.device
    eps = torch.randn(n, *pair.latent_shape, device=device)
    t = torch.full((n,), 500, device=device)
    prompts = ["a photo of a <v> dog"] * n
    part = {"identity": "CLIP", "clip": "CLIP", "dino": "DINO", "dinov2": "DINOv2"}

    # teacher
    with meter("autoencoder"), torch.no_grad(), autocast():
        z = pair.encode(x) if published else known["z"]
    with meter("text encoder"), autocast():
        context = pair.text(prompts)
    border = context.detach().requires_grad_()
    with meter("teacher UNet"):
        with autocast():
            out = pair.teacher(pair.teacher.add_noise(z, eps, t), t, border)
        losses.reconstruction(out, pair.teacher.target(z, eps, t)).backward()
    with meter("text encoder"):
        context.backward(border.grad)
    with meter("optimizers"):
        optimizers["teacher"].step()
    # student
    with meter("text encoder"), torch.no_grad(), autocast():
        context = pair.text(prompts)
    with meter("student UNet"), autocast():
        z_s = pair.student.one_step(eps, context)
    z_border = z_s.detach().requires_grad_()
    with meter("autoencoder"), autocast():
        x_s = pair.decode(z_border, tiny=True)
    x_border = x_s.detach().requires_grad_()
    with meter("teacher UNet"), torch.no_grad(), autocast():
        noisy = pair.teacher.add_noise(z_s, eps, t)
        guesses = pair.teacher.guided(noisy, t, context, context[:1])
    z_t, latent = guided_mse(*guesses, noisy, z_border, *pair.teacher.scales(t), torch.ones(n, device=device), flags["guidance_scale"],
                             pair.teacher.prediction_type)
    with torch.no_grad(), autocast():
        with meter("autoencoder"):
            x_t = pair.decode(z_t, tiny=True)
        with meter(part["identity"]):
            f_t = encoders["identity"].features(x_t)
    features = {}
    for k, h in heads.items():
        with meter(part[k]):
            with autocast():
                features[k] = encoders[k].features(x_border)
                again = encoders[k].features(x_border) if published and k == "identity" else features[k]
            loss = losses.adversarial_per_sample(h(features[k])).mean()
            if k == "identity":
                loss = loss + losses.identity_per_sample(encoders[k].tokens(again), encoders[k].tokens(f_t)).mean()
            loss.backward()
    with meter("image losses"):
        latent.mean().backward()
        if flags["swd_projections"]:
            filters = losses.random_projections(flags["swd_projections"], None).to(device)
            positions = 0 if published else flags.get("swd_positions", 16384)
            losses.sliced_wasserstein_per_sample(x_border, x_t, filters, positions=positions).mean().backward()
    with meter("autoencoder"):
        x_s.backward(x_border.grad)
    with meter("student UNet"):
        z_s.backward(z_border.grad)
    # critics
    for k, h in heads.items():
        with meter(part[k]):
            with torch.no_grad(), autocast():
                real = encoders[k].features(x) if published else known[k]
                fake = encoders[k].features(x_s) if published else features[k].detach()
            losses.critic(h(real), h(fake), torch.ones(n, device=device)).backward()
    with meter("optimizers"):
        for name in ("student", "critic"):
            optimizers[name].step()
        for o in optimizers.values():
            o.zero_grad()


def build(base, device, flags, random, dtype=None):
    """(pair, encoders, heads, optimizers, weights that move, one batch of images, what is known of them) on a device."""
    pair = load_pair(base, "<v>", "dog", device, flags, dtype, random)
    encoders = load_encoders(base, device, flags, dtype, random)
    heads = {k: Critic(e.width).to(device) for k, e in encoders.items() if e.has_critic}
    if flags["gradient_checkpointing"]:
        save_memory(pair, encoders)
    if flags["compile"]:
        compile_networks(pair.teacher.unet, pair.student.unet, (pair.tiny_vae or pair.vae).decoder)
    moved = [[*trainable_parameters(d.unet, flags["train_unet"]).values()] for d in (pair.teacher, pair.student)]
    for p in moved[0] + moved[1]:
        p.requires_grad_(True)
    optimizers = {"teacher": torch.optim.AdamW(moved[0] + [pair.text.row], lr=1e-6), "student": torch.optim.AdamW(moved[1], lr=1e-6),
                  "critic": torch.optim.AdamW([p for h in heads.values() for p in h.parameters()], lr=1e-6)}
    n = flags["train_batch_size"]
    x = torch.rand(n, 3, pair.resolution, pair.resolution, device=device) * 2 - 1
    known = {"z": torch.randn(n, *pair.latent_shape, device=device)} | {k: torch.randn(n, encoders[k].width, device=device) for k in heads}
    return pair, encoders, heads, optimizers, x, known


def build_to_count(base, flags):
    """`build` on the meta device, and a meter of FLOPs."""
    return *build(base, "meta", flags | {"compile": False, "gradient_checkpointing": False}, True, torch.float32), Meter(torch.device("meta"))


def count(base, flags, published=False):
    """{part: FLOP} of one iteration, on the meta device."""
    pair, encoders, heads, optimizers, x, known, meter = build_to_count(base, flags)
    iteration(pair, encoders, heads, optimizers, known, x, flags, contextlib.nullcontext, meter, published)
    return meter.flops


def count_echo(base, flags):
    """FLOP that the echo costs beyond its iterations: drawing and ranking the samples, and the teacher's share of echoed images."""
    if not flags["echo_steps"]:
        return 0
    pair, encoders, *_, meter = build_to_count(base, flags)
    noise, t, context = torch.randn(1, *pair.latent_shape, device="meta"), torch.full((1,), 500, device="meta"), pair.text(["a <v> dog"])
    with meter("drawn"), torch.no_grad():
        x = pair.decode(pair.student.one_step(noise, context))
        for k in ("identity", "clip"):
            encoders[k].features(x)
    with meter("heard"):
        pair.teacher(noise, t, context).sum().backward()
    heard = flags["echo_steps"] * max(1, round(flags["echo_share"] * flags["train_batch_size"]))
    return flags["echo_samples"] * meter.flops["drawn"] + heard * meter.flops["heard"]


class Kept:
    """A tensor that autograd keeps for the backward pass; `live` counts the bytes of all that it keeps now, `most` its maximum."""
    storages, live, most, apart = {}, 0, 0, set()

    def __init__(self, tensor):
        self.tensor, self.key = tensor, tensor.untyped_storage()._cdata
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


def count_memory(base, flags):
    """Bytes of weights, of gradients and optimizer, and of what autograd keeps at most, image losses apart: fake CPU tensors under
    the autocast that a GPU would see. What a network needs in passing comes on top."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    half = torch.bfloat16 if flags["mixed_precision"] == "bf16" else torch.float32
    pair, encoders, heads, _, x, known = build(base, "meta", flags | {"compile": False}, True, torch.float32)
    networks = [m for m in (pair.teacher, pair.student, pair.vae, pair.tiny_vae, pair.text, *encoders.values(), *heads.values()) if m is not None]
    with FakeTensorMode(allow_non_fake_inputs=True):
        def fake(t, dtype):
            return torch.empty(t.shape, dtype=dtype, device="cpu", requires_grad=t.requires_grad)

        made = {}  # CLIP is a part of two encoders
        for module in (m for network in networks for m in network.modules()):
            for name, p in module._parameters.items():
                if p is not None and p.device.type == "meta":
                    made[p] = made[p] if p in made else torch.nn.Parameter(fake(p, torch.float32 if p.requires_grad else half), p.requires_grad)
                    module._parameters[name] = made[p]
            for name, b in module._buffers.items():
                if b is not None and b.device.type == "meta":
                    module._buffers[name] = fake(b, b.dtype)
        weights = list({id(p): p for network in networks for p in network.parameters()}.values())
        trained = [p for p in weights if p.requires_grad]
        optimizers = {"teacher": torch.optim.AdamW([p for p in trained if not any(p is q for q in pair.student.parameters())]),
                      "student": torch.optim.AdamW([p for p in pair.student.parameters() if p.requires_grad]),
                      "critic": torch.optim.AdamW([p for h in heads.values() for p in h.parameters()])}
        Kept.storages, Kept.live, Kept.most, Kept.apart = {}, 0, 0, {p.untyped_storage()._cdata for p in weights}
        x, known = fake(x, x.dtype), {k: fake(v, v.dtype) for k, v in known.items()}
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            iteration(pair, encoders, heads, optimizers, known, x, flags | {"swd_projections": 0},
                      lambda: torch.autocast("cpu", torch.bfloat16, enabled=half == torch.bfloat16), Meter(torch.device("cpu")))
        return sum(p.nbytes for p in weights), 3 * sum(p.nbytes for p in trained), Kept.most


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    yes_no = argparse.BooleanOptionalAction
    p.add_argument("--base", default="emoji", help=f"one of {', '.join(BASES)}, or a folder laid out like data/emoji/base")
    p.add_argument("--random_weights", action=yes_no, default=False, help="full-size random networks, nothing is downloaded")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--steps", type=int, default=10, help="iterations that are timed, after two that are not; 0 only counts")
    p.add_argument("--images", type=int, default=16, help="images drawn for the sampling table; 0 skips it")
    p.add_argument("--max_train_steps", type=int, help="of the joint stage, for the cost of a concept; default: the recipe's")
    p.add_argument("--echo_steps", type=int, help="of each network in the echo stage, for the same; default: the recipe's")
    p.add_argument("--train_batch_size", type=int, help="default: the recipe's")
    p.add_argument("--resolution", type=int, help="pixels along one side; default: the student's own")
    p.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16", help="autocast; frozen weights are stored in it")
    p.add_argument("--tiny_vae", action=yes_no, default=False, help="decode for the image losses with the tiny autoencoder")
    p.add_argument("--dinov2_size", type=int, default=518, help="pixels that DINOv2 sees")
    p.add_argument("--gradient_checkpointing", action=yes_no, default=False, help="as in train.py")
    p.add_argument("--compile", action=yes_no, default=False, help="as in train.py")
    args = p.parse_args(argv)
    find_base(args.base)
    if args.random_weights and args.base not in FULL_SIZE:
        fail(f"--random_weights needs sizes that are written down: --base {' or '.join(FULL_SIZE)}")
    if args.steps < 0 or args.images < 0 or (args.train_batch_size or 1) < 1:
        fail("--steps and --images must be 0 or more, --train_batch_size 1 or more")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    recipe = RECIPES[find_base(args.base).recipe]
    flags = {k: recipe[k] for k in ("train_unet", "swd_projections", "guidance_scale", "train_batch_size", "max_train_steps", "echo_steps",
                                    "echo_samples", "echo_share")} \
        | {k: v for k, v in vars(args).items() if v is not None}
    with tempfile.TemporaryDirectory() as folder:
        base = args.base
        if args.random_weights:
            write_base(folder, FULL_SIZE[args.base])
            base = folder
        report(base, args, flags)


def report(base, args, flags):
    """Print the counted table, then, where it is feasible, what was measured."""
    n, joint, echoing = (flags[k] for k in ("train_batch_size", "max_train_steps", "echo_steps"))
    ours = count(base, flags)
    columns = {"ours": ours}
    if not isinstance(BASES.get(args.base), Path):
        plain = flags | {"tiny_vae": False, "dinov2_size": 518}
        columns = {"published": count(base, plain, published=True), "ours": count(base, plain)} \
            | ({"with these flags": ours} if flags != plain else {})
    print(f"TFLOP per image and iteration, {args.base}, counted (batch {n})\n")
    print("| part | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for part in next(iter(columns.values())):
        print(f"| {part} | " + " | ".join(f"{c[part] / n / 1e12:.4g}" for c in columns.values()) + " |")
    sums = {k: sum(c.values()) for k, c in columns.items()}
    print("| sum | " + " | ".join(f"{v / n / 1e12:.4g}" for v in sums.values()) + " |")
    echo = count_echo(base, flags)
    totals = [1000 * v if k == "published" else (joint + echoing) * v + echo for k, v in sums.items()]  # half an iteration teaches one network
    print("| PFLOP per concept | " + " | ".join(f"{v / 1e15:.4g}" for v in totals) + " |")
    print(f"\n({'1000 joint iterations as published; ours: ' * ('published' in columns)}{joint} joint iterations, {echoing} of each network alone, "
          f"and {echo / 1e15:.3g} PFLOP to draw, rank and hear the echo)")

    sizes = [v / 1e9 for v in count_memory(base, flags)]
    print(f"memory, counted (batch {n}, {args.mixed_precision}, {switches(flags)}): weights {sizes[0]:.2f} GB, gradients and optimizer {sizes[1]:.2f} GB, "
          f"kept for the backward pass {sizes[2]:.2f} GB, together {sum(sizes):.1f} GB; what a network needs in passing comes on top")
    device, why = pick_device(args.device)
    if not args.steps or device.type == "cpu" and args.device == "auto" and "published" in columns:
        print("not timed: " + ("--steps 0" if not args.steps else f"{why}; --device cpu would time it all the same, in many minutes and 14 GB"))
        return
    dtype = torch.bfloat16 if args.random_weights and args.mixed_precision == "bf16" else stored_in(device, flags)
    pair, encoders, heads, optimizers, x, known = build(base, device, flags, args.random_weights, dtype)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")

    warm = 0 if "published" in columns and device.type == "cpu" else 2
    for step in range(warm + args.steps):
        if step == warm:
            meter = Meter(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = meter.now()
        iteration(pair, encoders, heads, optimizers, known, x, flags, autocast, meter if step >= warm else Meter(device))
    seconds = (meter.now() - start) / args.steps
    print(f"\n{device} ({why}), torch {torch.__version__}, {args.mixed_precision}, batch {n}, {pair.resolution} px\n")
    print("| part | s per iteration |\n|---|---|")
    for part, s in meter.seconds.items():
        print(f"| {part} | {s / args.steps:.4g} |")
    print(f"| all | {seconds:.4g} |")
    print(f"\n{switches(flags)} -> {peak(device)}, {1 / seconds:.3g} it/s, {sum(ours.values()) / seconds / 1e12:.3g} TFLOP/s")
    if args.images:
        sampling(pair, base, device, args)


def switches(flags):
    return " ".join([f"--{k}" for k in ("tiny_vae", "gradient_checkpointing", "compile") if flags[k]] + [f"--dinov2_size {flags['dinov2_size']}"])


def peak(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB peak"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB peak resident"


@torch.no_grad()
def sampling(pair, base, device, args, batch=8):
    """ms per image of our one-step sampling beside a plain diffusers pipeline around the same networks."""
    from diffusers import StableDiffusionPipeline
    batch = min(batch, args.images)
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

    ms, rounds = {}, max(1, args.images // batch)
    for name, draw in (("ours", ours), ("plain diffusers pipeline", plain)):
        draw()
        start = meter.now()
        for _ in range(rounds):
            draw()
        ms[name] = 1000 * (meter.now() - start) / rounds / batch
    print(f"\nsampling, one step, batch {batch}: " + ", ".join(f"{k} {v:.4g} ms per image" for k, v in ms.items())
          + f"; ratio {ms['plain diffusers pipeline'] / ms['ours']:.3g}")


if __name__ == "__main__":
    main()
