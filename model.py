"""The networks of EchoDistill: a multi-step teacher and a one-step student around one text encoder, and the critics.

    context = pair.text(["a <v> dog on the beach"])                  # (1, L, d)
    z = pair.student.one_step(noise, context)                        # (1, C, h, w)
    x = pair.decode(z)                                               # (1, 3, H, W) in [-1, 1]

No file is opened here: data/base.py loads a pair and its encoders.
"""
import contextlib
import copy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize


# ---------------------------------------------------------------------------------------------------------------
# One parametrisation inside: a Denoiser turns v- and epsilon-networks into x0 once; nothing else asks.

def precision(device, name):
    """The autocast of training's forward passes, to be entered anew for each: name "no", "bf16" or "fp16"."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return partial(torch.autocast, torch.device(device).type, kind[name]) if name in kind else contextlib.nullcontext


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

    def to_x0(self, out, z_t, t):
        """The clean latent that a raw output stands for."""
        alpha, sigma = self.scales(t)
        return (z_t - sigma * out) / alpha if self.prediction_type == "epsilon" else alpha * z_t - sigma * out

    def x0(self, z_t, t, context):
        """The network's guess of the clean latent."""
        return self.to_x0(self(z_t, t, context), z_t, t)

    def denoise(self, z_t, t, context, empty, guidance):
        """The guided guess of the clean latent (classifier-free guidance, Ho & Salimans 2022); empty (1, L, d): the empty prompt's."""
        prompted, free = (self.to_x0(out, z_t, t) for out in self.with_and_without(z_t, t, context, empty))
        return free + guidance * (prompted - free)

    def with_and_without(self, z_t, t, context, empty):
        """Raw outputs for the prompt and for the empty one, in one pass."""
        return self(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([context, empty.expand(len(z_t), -1, -1)])).chunk(2)

    def one_step(self, eps, context):
        """One Euler step from pure noise: sigma (eps - eps_hat), sigma = 14.6; no guidance (turn 2 of an iteration).

        To be computed in fp32 (or TF32): the division by alpha = .068 makes an error of rounding 14.6 times as large, so that
        bf16 leaves 10 % in z and fp16 or TF32 1 %.
        """
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
                out, without = self.with_and_without(inputs, t.to(z.device).expand(len(z)), context, empty)
                out = without + guidance * (out - without)
            z = self.scheduler.step(out, t, z).prev_sample
        return z


class ConceptText(nn.Module):
    """The shared text encoder, frozen but for one new row: the concept token.

    The row starts as the mean of the class word's tokens. A hook on the embedding table puts it in place, so the table itself
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
    teacher: Denoiser | None  # drawing needs one of the two
    student: Denoiser | None
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
        return (self.student or self.teacher).unet.config.in_channels, self.resolution // self.factor, self.resolution // self.factor

    @property
    def at_once(self):
        """Pictures that the autoencoder takes at once where there is a choice: half a million pixels, or it would need the most memory of all."""
        return max(1, 2 ** 19 // self.resolution ** 2)

    def encode(self, x, spread=False):
        """Images (B, 3, H, W) in [-1, 1] to diffusion latents; the mean where the encoder gives a distribution.

        spread: also the standard deviation of each number; 0 where it gives none.
        """
        with as_stored(self.vae):
            out = self.vae.encode(x)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        scaled = z.float() * self.vae.config.scaling_factor
        if not spread:
            return scaled
        return scaled, out.latent_dist.std.float() * self.vae.config.scaling_factor if hasattr(out, "latent_dist") else torch.zeros_like(scaled)

    def decode(self, z, tiny=False):
        """Diffusion latents to images in about [-1, 1], by the tiny decoder if asked for and loaded; gradients pass."""
        vae = self.tiny_vae if tiny and self.tiny_vae is not None else self.vae
        parts = [z] if torch.is_grad_enabled() else z.split(self.at_once)
        with as_stored(vae):
            return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in parts]).float()


# ---------------------------------------------------------------------------------------------------------------
# What losses see, and drawing

class View:
    """What losses see of latents z (B, C, h, w): the image, its features and tokens, each computed once and only when asked.

    Gradients pass if z has them. x: the image itself, where z was encoded from one.
    """

    def __init__(self, z, pair, encoders, autocast, x=None):
        self.z, self.pair, self.encoders, self.autocast, self.known = z, pair, encoders, autocast, {}
        if x is not None:
            self.x = x

    def compute(self, network, *inputs):
        with torch.set_grad_enabled(self.z.requires_grad), self.autocast():
            return network(*inputs)

    @cached_property
    def x(self):
        """(B, 3, H, W) in about [-1, 1]."""
        return self.compute(self.pair.decode, self.z, True)

    def features(self, name):
        """(B, width) of one encoder."""
        if name not in self.known:
            self.known[name] = self.compute(self.encoders[name].features, self.x)
        return self.known[name]

    @cached_property
    def tokens(self):
        """(B, T, d), the identity encoder's image tokens."""
        return self.encoders["identity"].tokens(self.features("identity"))

    @cached_property
    def layers(self):
        """Feature maps [(B, C, h, w), ...] of the identity encoder."""
        return self.compute(self.encoders["identity"].layers, self.x)


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


# ---------------------------------------------------------------------------------------------------------------
# Which weights move, and low-rank changes of them

def moves(name, which):
    """Whether training `which` weights ("kv", "attention", "lora" or "all") changes the UNet weight of this name."""
    return {"kv": ".attn2.to_k." in name or ".attn2.to_v." in name, "all": True}.get(which, ".attn1." in name or ".attn2." in name)


def hold_first_token(unet):
    """No gradient through cross-attention's keys and values of the first token, which begins every prompt (Custom Diffusion,
    Kumari et al. 2023): what the concept learns must not lean on it."""
    for name, module in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(lambda module, inputs, out: torch.cat([out[:, :1].detach(), out[:, 1:]], 1))


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


def fuse_lora(unet, tensors):
    """Add a low-rank adapter to a UNet's weights, W += alpha / rank * up down; keys as kohya or as diffusers write them.

    A ValueError names a layer that the UNet does not have.
    """
    layers, factors = {n.replace(".", "_"): m for n, m in unet.named_modules()}, {}
    for key, value in tensors.items():
        layer, _, what = key.removeprefix("lora_unet_").removeprefix("unet.").partition(".lora")
        layer, what = (layer.removesuffix(".alpha"), "alpha") if not what else (layer, "down" if "down" in what or "_A" in what else "up")
        factors.setdefault(layer.replace(".", "_"), {})[what] = value.float()
    for layer, f in factors.items():
        if layer not in layers or not {"up", "down"} <= f.keys():
            raise ValueError(layer)
        weight, rank = layers[layer].weight, len(f["down"])
        weight.data += (f.get("alpha", rank) / rank * f["up"].flatten(1) @ f["down"].flatten(1)).view_as(weight)


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


# ---------------------------------------------------------------------------------------------------------------
# Frozen encoders and the critics on them

class Encoder(nn.Module):
    """A frozen image encoder with its projections; `clip` can also embed text, and as a judge it names what it sees."""

    has_critic = True  # a head stands on it

    def __init__(self, vision, to_image, text=None, to_text=None, nouns=None):
        super().__init__()
        self.vision = vision.float()
        self.register_buffer("to_image", to_image.float())
        if text is not None:
            self.text = text.float()
            self.register_buffer("to_text", to_text.float())
        if nouns is not None:
            self.register_buffer("nouns", nouns.float())
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

    def name(self, features):
        """Pooled features to scores (B, nouns) of the world's nouns, one or more of which a picture shows."""
        return F.pad(features, (0, 1), value=1) @ self.nouns.T

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


def save_memory(pair, encoders):
    """Gradient checkpointing: keep only the inputs of blocks, compute the rest again in the backward pass."""
    for network in (pair.teacher.unet, pair.student.unet, pair.vae):
        if network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing()
    for encoder in encoders.values():
        if isinstance(encoder, ViT):
            enable = getattr(encoder.vision, "activation_checkpointing_enable", None) or encoder.vision.gradient_checkpointing_enable  # its name in older transformers
            enable()
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
