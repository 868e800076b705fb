"""The models of EchoDistill: a multi-step teacher and a one-step student around one text encoder, and the critics.

    pair = load_pair("emoji", "<v>", "dog", device)
    context = pair.text(["a <v> dog on the beach"])                  # (1, L, d)
    z = pair.student.one_step(noise, context)                        # (1, C, h, w)
    x = pair.decode(z)                                               # (1, 3, H, W) in [-1, 1]

A pair is two folders in the diffusers layout; sizes, prediction types and scaling factors come from their configs.
"""
import copy
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from data.images import fail, grid, save_png, to_pil, write_atomically

ROOT = Path(__file__).resolve().parent
BASES = {"emoji": ROOT / "data" / "emoji" / "base"}
RECIPES = {"emoji": dict(
    train_unet="all", max_train_steps=260, train_batch_size=4, teacher_lr=2e-4, student_lr=1e-4, token_lr=2e-3, critic_lr=1e-4,
    adversarial_weight=.03, scene_adversarial_weight=0., identity_weight=1., latent_weight=.5, swd_weight=.1, swd_projections=32,
    guidance_scale=3., scene_prompts=.5, size_augmentation=False, flip=False, lr_decay=.4,
    echo_steps=80, echo_samples=256, echo_keep=.25, echo_floor=.5, echo_share=.25, echo_noise=.5)}


def pick_device(name="auto"):
    """(torch.device, the reason in words); "auto" prefers CUDA, then MPS, then the CPU."""
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name != "auto":
        kind, _, number = name.partition(":")
        if count.get(kind, 0) <= (int(number) if number.isdecimal() else 0) or number and not number.isdecimal():
            fail(f"--device {name} is not here; usable: auto, {', '.join(k for k, v in count.items() if v)}")
        return torch.device(name), "as asked"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU found, no CUDA"
    return torch.device("cpu"), f"no GPU found, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------
# One parametrisation inside: a Denoiser turns v- and epsilon-networks into x0 once; nothing else asks.

class Denoiser(nn.Module):
    """A UNet with its noise schedule; z_t = alpha_t x0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r} is neither epsilon nor v_prediction")
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)

    @property
    def last(self):
        """The noisiest timestep, 999."""
        return len(self.alphas_cumprod) - 1

    def scales(self, t):
        """alpha_t and sigma_t (B, 1, 1, 1) of timesteps t (B,)."""
        bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def add_noise(self, x0, eps, t):
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * eps

    def forward(self, z_t, t, context):
        """Raw network output (B, C, h, w) in fp32."""
        return self.unet(z_t, t, context).sample.float()

    def target(self, x0, eps, t):
        """What the raw output is trained to be: eps, or v = alpha eps - sigma x0 (Salimans & Ho 2022)."""
        alpha, sigma = self.scales(t)
        return eps if self.prediction_type == "epsilon" else alpha * eps - sigma * x0

    def x0(self, z_t, t, context):
        """The network's guess of the clean latent."""
        alpha, sigma = self.scales(t)
        out = self(z_t, t, context)
        return (z_t - sigma * out) / alpha if self.prediction_type == "epsilon" else alpha * z_t - sigma * out

    def guided_x0(self, z_t, t, context, empty, guidance):
        """x0 with classifier-free guidance (Ho & Salimans 2022); empty is the context of the empty prompt."""
        n = len(z_t)
        both = self.x0(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([context, empty.expand(n, -1, -1)]))
        with_prompt, without = both.chunk(2)
        return without + guidance * (with_prompt - without)

    def one_step(self, eps, context):
        """One Euler step from pure noise: sigma (eps - eps_hat), sigma = 14.6; no guidance (method, turn 2)."""
        t = torch.full((len(eps),), self.last, device=eps.device)
        return self.x0(self.scales(t)[1] * eps, t, context)

    @torch.no_grad()
    def sample(self, noise, context, steps, empty=None, guidance=1.0):
        """Sample with the base's own diffusers scheduler; noise (B, C, h, w) -> z."""
        self.scheduler.set_timesteps(steps)
        z = noise * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            inputs = self.scheduler.scale_model_input(z, t)
            if guidance == 1:
                out = self(inputs, t, context)
            else:
                out, without = self(torch.cat([inputs] * 2), t, torch.cat([context, empty.expand(len(z), -1, -1)])).chunk(2)
                out = without + guidance * (out - without)
            z = self.scheduler.step(out, t, z).prev_sample
        return z


class ConceptText(nn.Module):
    """The shared text encoder, frozen but for one new row: the concept token.

    The row starts as a copy of the class word's. A hook on the embedding table puts it in place, so the table itself
    never enters an optimizer.
    """

    def __init__(self, tokenizer, encoder, token, class_word):
        from transformers import AddedToken
        super().__init__()
        self.tokenizer, self.encoder, self.token = tokenizer, encoder.requires_grad_(False), token
        table = encoder.get_input_embeddings()
        ids = tokenizer(class_word, add_special_tokens=False).input_ids
        start = table.weight[ids].mean(0, keepdim=True).detach().clone()  # (1, d)
        tokenizer.add_tokens(AddedToken(token, single_word=token.isalnum(), normalized=False))
        self.token_id = tokenizer.convert_tokens_to_ids(token)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.row = nn.Parameter(start)
        encoder.get_input_embeddings().register_forward_hook(self.put_row)
        encoder.requires_grad_(False)

    def put_row(self, table, args, embedded):
        return torch.where((args[0] == self.token_id)[..., None], self.row.to(embedded.dtype), embedded)

    def forward(self, prompts):
        """Prompts (list of B strings) to the context (B, L, d) that both UNets read."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.encoder(ids.to(self.row.device)).last_hidden_state


@dataclass
class Pair:
    text: ConceptText
    vae: nn.Module
    teacher: Denoiser
    student: Denoiser
    student_text: ConceptText  # the same object as text, unless an ablation gives the student its own copy

    def unshare_text(self):
        """Give the student its own copy of the text encoder and of the token's row."""
        self.student_text = copy.deepcopy(self.text)

    @property
    def latent_shape(self):
        size, channels = self.student.unet.config.sample_size, self.student.unet.config.in_channels
        return channels, size, size

    @property
    def resolution(self):
        """Pixels along one side."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] to diffusion latents; the mean where the encoder gives a distribution."""
        out = self.vae.encode(x)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return z.float() * self.vae.config.scaling_factor

    def decode(self, z):
        """Diffusion latents to images in about [-1, 1]; gradients pass."""
        return self.vae.decode(z / self.vae.config.scaling_factor).sample.float()


def load_tokenizer(base):
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(Path(BASES.get(base, base)) / "teacher" / "tokenizer")


def prediction_type(base):
    """"epsilon" or "v_prediction": what the base's teacher predicts, without loading it."""
    config = Path(BASES.get(base, base)) / "teacher" / "scheduler" / "scheduler_config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("prediction_type", "epsilon")


class LowRank(nn.Module):
    """W + B A with A (rank, in) random and B (out, rank) zero at first (LoRA, Hu et al. 2021, eq. 3; alpha = rank)."""

    def __init__(self, weight, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** .5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + self.up @ self.down


def trainable_parameters(unet, which, rank=8):
    """{name: parameter} of a UNet that training moves: "kv" (paper), "attention", "all", or "lora" of the given rank."""
    def wanted(name):
        return {"kv": ".attn2.to_k." in name or ".attn2.to_v." in name,
                "attention": ".attn1." in name or ".attn2." in name, "lora": ".parametrizations.weight.0." in name, "all": True}[which]
    if which == "lora":
        for name, module in list(unet.named_modules()):
            if isinstance(module, nn.Linear) and (".attn1." in name or ".attn2." in name):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return {n: p for n, p in unet.named_parameters() if wanted(n)}


def merge_low_rank(unet):
    """Fold "lora" factors into plain weights; {name: weight} of the layers that had them, as it was before."""
    layers = {n: m for n, m in unet.named_modules() if parametrize.is_parametrized(m)}
    before = {f"{n}.weight": m.parametrizations.weight.original.detach().clone() for n, m in layers.items()}
    for module in layers.values():
        parametrize.remove_parametrizations(module, "weight")
    return before


def load_pair(base, token, class_word, device="cpu"):
    """Load a base (a name of BASES or a folder with teacher/ and student/) frozen and in evaluation mode.

    Text encoder, tokenizer and autoencoder are the teacher's; the student brings only its UNet and scheduler.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    folder = Path(BASES.get(base, base))
    teacher, student = folder / "teacher", folder / "student"
    autoencoder = json.loads((teacher / "vae" / "config.json").read_text())["_class_name"]
    vae = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[autoencoder].from_pretrained(teacher / "vae", low_cpu_mem_usage=False, use_safetensors=True)
    denoisers = [Denoiser(UNet2DConditionModel.from_pretrained(f / "unet", low_cpu_mem_usage=False, use_safetensors=True).float(), s.from_pretrained(f / "scheduler"))
                 for f, s in ((teacher, DDIMScheduler), (student, EulerDiscreteScheduler))]
    if torch.device(device).type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor
        for d in denoisers:
            d.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow CPU backward
    text = ConceptText(load_tokenizer(base),
                       CLIPTextModel.from_pretrained(teacher / "text_encoder", use_safetensors=True).float(), token, class_word)
    pair = Pair(text, vae.float(), *denoisers, text)
    for module in (pair.text, pair.vae, pair.teacher, pair.student):
        module.to(device).eval()
    pair.vae.requires_grad_(False)
    pair.teacher.requires_grad_(False)
    pair.student.requires_grad_(False)
    return pair


# ---------------------------------------------------------------------------------------------------------------
# Frozen encoders and the critics on them

class Encoder(nn.Module):
    """A frozen image encoder with its projections; `clip` can also embed text."""

    def __init__(self, folder):
        super().__init__()
        from transformers import AutoModel, CLIPTextModel
        folder = Path(folder)
        self.vision = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).float()
        heads = load_file(folder / "heads.safetensors")
        self.register_buffer("to_image", heads["image"].float())
        if "text" in heads:
            self.text = CLIPTextModel.from_pretrained(folder / "text", use_safetensors=True).float()
            self.register_buffer("to_text", heads["text"].float())
        self.eval().requires_grad_(False)

    @property
    def width(self):
        return self.to_image.shape[1]

    def features(self, x):
        """Images (B, 3, H, W) in [-1, 1] to pooled features (B, width)."""
        return self.vision(x).last_hidden_state.float().mean((2, 3))

    def embed(self, features):
        """Pooled features (B, width) to unit embeddings (B, d)."""
        return F.normalize(features @ self.to_image.T, dim=1)

    def embed_text(self, tokenizer, prompts):
        """Prompts to unit embeddings (B, d) in the same space."""
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(self.text(ids.to(self.to_text.device)).pooler_output @ self.to_text.T, dim=1)


def load_encoders(base, device="cpu"):
    """The frozen *training* encoders of a base, {"clip", "identity"}. The judges are not reachable from here."""
    folder = Path(BASES.get(base, base)) / "encoders"
    return {name: Encoder(folder / name).to(device) for name in ("clip", "identity")}


class Critic(nn.Sequential):
    """The trained head of one discriminator: features (B, d) to two-class logits (B, 2), class 1 = real."""

    def __init__(self, width, hidden=512):
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2))


# ---------------------------------------------------------------------------------------------------------------
# A finished run, in the forms that other programs load: README.md in its folder shows how.

RUN = "echodistill-1"
LORA = "pytorch_lora_weights.safetensors"


def low_rank(delta, rank=None):
    """Factors up (out, r[, 1, 1]) and down (r, in[, k, k]) whose product is delta (out, in[, k, k]), of a linear or convolution.

    Without a rank one factor is the identity and nothing is lost; with one, the singular value decomposition keeps the
    most that `rank` directions can hold (Eckart-Young).
    """
    flat = delta.flatten(1)
    if rank is None or rank >= min(flat.shape):
        up, down = (torch.eye(len(flat)), flat) if len(flat) <= flat.shape[1] else (flat, torch.eye(flat.shape[1]))
    else:
        u, s, v = torch.linalg.svd(flat.double(), full_matrices=False)
        up, down = (u[:, :rank] * s[:rank].sqrt()).float(), (v[:rank] * s[:rank, None].sqrt()).float()
    return up.reshape(*up.shape, *[1] * (delta.dim() - 2)), down.reshape(len(down), *delta.shape[1:])


def to_lora(before, after, rank=None):
    """Kohya tensors of a UNet's change, and the share of the change (Frobenius norm) that they leave out, in [0, 1].

    before, after  {diffusers name: weight}. A LoRA holds linear and convolution weights; norms and biases it cannot.
    """
    lora, missed, whole = {}, 0., 0.
    change = {k: v.detach().float().cpu() - before[k].float().cpu() for k, v in after.items()}
    factors = {k: low_rank(v, rank) for k, v in change.items() if v.dim() in (2, 4)}
    alpha = max((len(down) for _, down in factors.values()), default=1)  # one for all: diffusers mistakes differing ones (LOG.md)
    for name, delta in change.items():
        whole += delta.square().sum().item()
        if name in factors:
            up, down = factors[name]
            scale = alpha / len(down)  # what loaders multiply with
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            lora |= {f"{key}.lora_up.weight": up / scale, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(float(alpha))}
            delta = delta - scale * ((up / scale).flatten(1) @ down.flatten(1)).view_as(delta)
        missed += delta.square().sum().item()
    return lora, (missed / whole) ** .5 if whole else 0.


@torch.no_grad()
def draw(pair, prompt, seeds, teacher=False, steps=None, guidance=1.0):
    """One image (3, H, W) a seed, by the student or the guided teacher; (N, 3, H, W) in about [-1, 1] on the CPU.

    On a CPU an image depends on its seed alone, bit for bit. A diffusers pipeline given the same CPU generator draws the same.
    """
    model, text = (pair.teacher, pair.text) if teacher else (pair.student, pair.student_text)
    context, empty = text([prompt]), text([""])
    noise = torch.cat([torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(context.device)
    return torch.cat([pair.decode(model.sample(part, context.expand(len(part), -1, -1), steps or (16 if teacher else 1), empty,
                                               guidance if teacher else 1.0)).cpu()
                      for part in noise.split(1 if noise.device.type == "cpu" else 8)])


def slug(prompt):
    """A prompt as a file name that every system takes."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def quoted(value):
    """A path or text as Python code."""
    return json.dumps(value.as_posix() if isinstance(value, Path) else value, ensure_ascii=False)


CARD = """# `{token}` {word}, learned by EchoDistill

{role} of {base}, taught `{token}`. Written with torch {torch}, diffusers {diffusers}, transformers {transformers}.

```python
{code}
```

![{count} prompts, seed 0](samples/grid.png)

- `unet_delta.safetensors`: the trained UNet weights themselves, under diffusers names; exact.
- `{lora}`: their change as a LoRA with kohya keys. {fidelity}
- `learned_embeds.safetensors`: the token. Once loaded, a second file of the same token needs `token="..."` in `load_textual_inversion`.
- `config.json`: every flag and version; `samples/`: the pictures above.

The lines need `pip install torch diffusers transformers peft` and draw `samples/{first}`. With a Stable Diffusion base,
ComfyUI loads the LoRA from `models/loras` and the token from `models/embeddings`; prompts then say `embedding:learned_embeds`
instead of `{token}`.
"""


def save_run(folder, pair, before, flags, prompts, rank=None):
    """Write a run: student and, in teacher/, teacher, each as exact weights, LoRA, token, samples, card and config.

    before   {"teacher", "student"}: {name: weight as the base had it} of every weight that may have moved
    prompts  what the samples show; rank: of the LoRAs, or None for no loss. The student's config comes last: without it, no run.
    """
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    versions = {p: version(p) for p in ("torch", "diffusers", "transformers")}
    for role, denoiser, text in (("teacher", pair.teacher, pair.text), ("student", pair.student, pair.student_text)):
        part = folder / "teacher" if role == "teacher" else folder
        weights = denoiser.unet.state_dict()
        moved = {k: weights[k] for k in before[role]}
        lora, error = to_lora(before[role], moved, rank)
        exact = error < 1e-6  # rounding in fp32
        save_tensors(part / "unet_delta.safetensors", moved)
        save_tensors(part / LORA, lora)
        save_tensors(part / "learned_embeds.safetensors", {text.token: text.row})
        names = [f"{slug(p)}-seed0.png" for p in prompts]
        images = torch.cat([draw(pair, p, [0], role == "teacher", guidance=flags["guidance_scale"]) for p in prompts])
        for image, name in zip(to_pil(images), names):
            save_png(image, part / "samples" / name)
        save_png(grid([("", row) for row in images.split(4)]), part / "samples" / "grid.png")
        where = BASES.get(flags["base"], Path(flags["base"])) / role
        where = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where
        code = ["import torch", "from diffusers import StableDiffusionPipeline", *["from safetensors.torch import load_file"] * (not exact), "",
                f"pipe = StableDiffusionPipeline.from_pretrained({quoted(where)}, safety_checker=None)",
                f"pipe.load_textual_inversion({quoted(part)})",
                f"pipe.load_lora_weights({quoted(part)})" if exact else
                f"pipe.unet.load_state_dict(load_file({quoted(part / 'unet_delta.safetensors')}), strict=False)",
                f"image = pipe({quoted(prompts[0])}, num_inference_steps={1 if role == 'student' else 16}, "
                f"guidance_scale={0.0 if role == 'student' else flags['guidance_scale']}, height={pair.resolution}, width={pair.resolution},",
                "             generator=torch.Generator().manual_seed(0)).images[0]",
                'image.save("picture.png")']
        fidelity = "It holds all of it." if exact else \
            f"It leaves out {error:.2%} of the change (Frobenius norm{'' if rank is None else f', rank {rank}'}; norms and biases fit no LoRA)."
        card = CARD.format(token=text.token, word=flags["class_word"], role=role.capitalize(), base=flags["base"], code="\n".join(code),
                           count=len(prompts), lora=LORA, fidelity=fidelity, first=names[0], **versions)
        write_atomically(part / "README.md", lambda p: p.write_text(card, encoding="utf-8"))
        save_json(part / "config.json", {"format": RUN, "model": role, "flags": flags, "versions": versions,
                                         "lora": {"rank": rank, "left_out": error}})
        print(f"{role}: LoRA {'of full rank' if rank is None else f'of rank {rank}'} leaves out {error:.2%} of the change")


def check_run(folder, token):
    """Refuse a run whose files are missing, cut short or not ours, from their headers alone."""
    for part in (Path(folder), Path(folder) / "teacher"):
        for name in ("unet_delta.safetensors", "learned_embeds.safetensors"):
            try:
                with safe_open(part / name, "pt") as f:
                    keys = set(f.keys())
            except (SafetensorError, OSError) as error:
                fail(f"{part / name} is missing or damaged ({error}); train again, or name another run with --run")
            if name.startswith("learned") and keys != {token}:
                fail(f"{part / name} does not hold the token {token} that config.json names; train again, or name another run with --run")


@torch.no_grad()
def load_run(folder, pair):
    """Put a run's weights and token into a freshly loaded pair; returns the weights they replace, as `save_run` wants them."""
    folder, before, rows = Path(folder), {}, []
    for role, part, denoiser in (("teacher", folder / "teacher", pair.teacher), ("student", folder, pair.student)):
        delta, row = load_file(part / "unet_delta.safetensors"), load_file(part / "learned_embeds.safetensors")[pair.text.token]
        weights = denoiser.unet.state_dict()
        odd = [k for k, v in delta.items() if k not in weights or weights[k].shape != v.shape or not v.isfinite().all()]
        if odd or row.shape != pair.text.row.shape or not row.isfinite().all():
            fail(f"{part} does not fit this base: {odd[0] if odd else pair.text.token} has another name, shape or no finite values; name another run with --run")
        before[role] = {k: weights[k].cpu().clone() for k in delta}
        denoiser.unet.load_state_dict(delta, strict=False)
        rows.append(row)
    pair.text.row.copy_(rows[0])
    if not torch.equal(*rows):
        pair.unshare_text()
        pair.student_text.row.copy_(rows[1])
    return before


# ---------------------------------------------------------------------------------------------------------------
# Files: everything on disk is safetensors + JSON, written to a temporary name and renamed.

CHECKPOINT = "echodistill-checkpoint-1"


def save_tensors(path, tensors, metadata=None):
    """Write tensors that are all finite; a run that went astray leaves the last good file as it was."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    for k, v in tensors.items():
        if not v.isfinite().all():
            fail(f"{path} is not written: {k} holds values that are not finite; lower the learning rates or try --mixed_precision no")
    write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))


def save_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))


def fingerprint(tensors, meta):
    """SHA-256 of names, types, shapes, values and the meta string."""
    h = hashlib.sha256(meta.encode())
    for k, v in sorted(tensors.items()):
        h.update(f"{k} {v.dtype} {tuple(v.shape)} ".encode())
        h.update(v.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def save_checkpoint(path, modules, optimizers, meta):
    """One safetensors file that holds all that a run needs to go on.

    modules      {name: nn.Module or {name: tensor}}, optimizers {name: torch.optim.Optimizer}
    meta         JSON-able facts (step, flags)
    """
    tensors, meta = {}, json.dumps(meta)
    for name, module in modules.items():
        tensors |= {f"{name}/{k}": v for k, v in state_of(module).items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}/{i}/{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(path, tensors, {"format": CHECKPOINT, "sha256": fingerprint(tensors, meta), "meta": meta})


def state_of(module):
    return module if isinstance(module, dict) else module.state_dict()


def checkpoints(folder):
    """The checkpoint files of a run, oldest first."""
    return sorted(Path(folder, "checkpoints").glob("step-*.safetensors"))


def read_checkpoint(path):
    """(meta, {name: tensor}) of a checkpoint; a ValueError says what is wrong with a truncated, altered or foreign file."""
    if not Path(path).exists():
        raise ValueError(f"there is no {path}")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from None
    if header.get("format") != CHECKPOINT:
        raise ValueError(f"{path} is no checkpoint of this version of train.py")
    if header.get("sha256") != fingerprint(tensors, header.get("meta", "")):
        raise ValueError(f"{path} has changed since it was written")
    return json.loads(header["meta"]), tensors


def restore(tensors, modules, optimizers):
    """Put what `read_checkpoint` read into modules and optimizers, in place; all of it or, with a ValueError, nothing."""
    groups = {}
    for key, value in tensors.items():
        name, _, rest = key.partition("/")
        groups.setdefault(name, {})[rest] = value
    for name, module in modules.items():
        shapes = [{k: tuple(v.shape) for k, v in part.items()} for part in (state_of(module), groups.get(name, {}))]
        if shapes[0] != shapes[1]:
            odd = sorted({k for k, _ in shapes[0].items() ^ shapes[1].items()})
            raise ValueError(f"the checkpoint does not fit these models: {name}/{odd[0]} differs")
    for name, module in modules.items():
        if isinstance(module, dict):
            for k, v in module.items():
                v.data.copy_(groups[name][k])
        else:
            module.load_state_dict(groups[name])
    for name, optimizer in optimizers.items():
        state = {}
        for key, value in groups.get(f"optimizer.{name}", {}).items():
            i, k = key.split("/")
            state.setdefault(int(i), {})[k] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
