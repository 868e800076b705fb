"""Stages clip, identity (training family) and judge_clip, judge_identity, judge_names (judges); tokenizer and text encoder."""
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.base import load_encoder
from measure import halves
from stages.latents import code, from_latents, to_latents
from stages.loop import make_world, opened, run
from world import article, hue_jitter, words

WIDTHS = {"clip": 192, "identity": 144, "judge_clip": 192, "judge_identity": 192, "judge_names": 192}


def build_tokenizer(folder):
    """A CLIP byte-pair tokenizer in which each word of the world but "close-up" is one token; saved to and loaded from `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        last = [c + "</w>" for c in letters]  # named here, or their numbers come in another order every time
        bpe.train_from_iterator([w + " " + w for w in words()] * 2, trainers.BpeTrainer(
            vocab_size=4096, special_tokens=last, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
        bpe.model.save(str(folder))
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        for token in ("<|startoftext|>", "<|endoftext|>"):
            vocab.setdefault(token, len(vocab))
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=24)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions, device="cpu"):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def build_text(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id))


def build_vision(stage):
    """Training encoders are ResNets, the judges a ConvNeXt and a RegNet: no shared architecture, seed or data order."""
    from transformers import ConvNextV2Config, ConvNextV2Model, RegNetConfig, RegNetModel, ResNetConfig, ResNetModel
    sizes = [48, 96, WIDTHS[stage]]
    if stage == "judge_identity":
        return RegNetModel(RegNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 2, 2], groups_width=48, layer_type="x", downsample_in_first_stage=True))
    if stage in ("judge_clip", "judge_names"):
        return ConvNextV2Model(ConvNextV2Config(hidden_sizes=sizes, depths=[2, 2, 2], num_stages=3))
    return ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 2, 2], layer_type="basic"))


def shipped_encoder(args):
    """Weights of an encoder stage's modules as --init holds them."""
    family, _, name = args.stage.rpartition("_")
    encoder = load_encoder(Path(args.init) / ("judges" if family else "encoders") / name)
    weights = {"vision": encoder.vision.state_dict(), "image": {"weight": encoder.to_image}}
    if name == "clip":
        weights |= {"text": encoder.text.state_dict(), "caption": {"weight": encoder.to_text}}
    if hasattr(encoder, "nouns"):
        weights["nouns"] = {"weight": encoder.nouns[:, :-1], "bias": encoder.nouns[:, -1]}
    return weights


def contrast(a, b, scale, false=None):
    """Symmetric InfoNCE of matching rows (B, d); scale is the log of the inverse temperature.

    false (B, d): one more row that a's own row must not be taken for. Returns the loss and how often the match is found.
    """
    a, b, temperature = F.normalize(a, dim=1), F.normalize(b, dim=1), scale.exp().clamp(max=100)
    logits, target = temperature * a @ b.T, torch.arange(len(a), device=a.device)
    wide = logits if false is None else torch.cat([logits, temperature * (a * F.normalize(false, dim=1)).sum(1, keepdim=True)], 1)
    return (F.cross_entropy(wide, target) + F.cross_entropy(logits.T, target)) / 2, (wide.argmax(1) == target).float().mean()


def falsified(world, batch, g):
    """The captions of a batch with one noun exchanged: the neighbour's, where there is one and a coin says so, else the subject's.

    In a batch of random captions the place and the subject alone find the match, and nobody ever looks at the neighbour.
    """
    out = []
    coins, nouns = torch.rand(len(batch.captions), generator=g), torch.randint(len(world.nouns) - 1, (len(batch.captions),), generator=g)
    for caption, noun, beside, coin, new in zip(batch.captions, *(v.tolist() for v in (batch.noun, batch.beside, coins, nouns))):
        old = beside if beside >= 0 and coin < .7 else noun
        new += new >= old  # any but the old one
        head, middle, tail = caption.partition(" next to ")
        one = lambda part: re.sub(rf"\b(an? )?{world.nouns[old]}\b", lambda m: article(world.nouns[new]) if m[1] else world.nouns[new], part, count=1)
        out.append(head + middle + one(tail) if beside >= 0 and old == beside else one(head) + middle + tail)
    return out


def spoil(images, linear, g):
    """Pictures (B, 3, 64, 64) in other light, half of them as a generator might draw them.

    Light: hue, saturation and value of each picture, as DINO does, so that an individual is its shape and marking more than its
    exact tone. Generator: from a code of C x 8 x 8 with noise of up to half the code's size.
    """
    u = torch.rand(3, len(images), generator=g)
    images = hue_jitter((images + 1) / 2, (u[0] - .5) * .4, .6 + .8 * u[1], .7 + .6 * u[2]) * 2 - 1
    z = to_latents(linear, images)
    noisy = z + .5 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
    return torch.where((torch.rand(len(z), generator=g) < .5).view(-1, 1, 1, 1), from_latents(linear, noisy).clamp(-1, 1), images)


def train_encoder(args):
    judge, with_text = args.stage.startswith("judge"), not args.stage.endswith("identity")
    args.seed += {"clip": 10, "identity": 20, "judge_clip": 30, "judge_identity": 40, "judge_names": 50}[args.stage]
    torch.manual_seed(args.seed)
    world = make_world(args, "pretrain" if with_text else "pretrain+extra")
    tokenizer = build_tokenizer(Path(args.work) / "tokenizer")
    modules = {"vision": build_vision(args.stage), "image": nn.Linear(WIDTHS[args.stage], 128, bias=False)}
    if with_text:
        modules |= {"text": build_text(tokenizer), "caption": nn.Linear(128, 128, bias=False), "nouns": nn.Linear(WIDTHS[args.stage], len(world.nouns))}
    for name, weights in (shipped_encoder(args) if args.init else {}).items():
        modules[name].load_state_dict(weights)
    modules = {k: m.to(args.device) for k, m in modules.items()}
    scale = nn.Parameter(torch.tensor(2.6, device=args.device))
    parameters = [p for m in modules.values() for p in m.parameters()] + [scale]
    if args.only:
        for p in parameters:
            p.requires_grad_(False)
        parameters = list(modules[args.only].requires_grad_().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=.02, fused=True)

    def look(images):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16 and args.stage not in ("judge_clip", "judge_names")):  # ConvNeXt is faster in fp32
            return modules["vision"](images.to(args.device)).last_hidden_state.float().mean((2, 3))

    def embed(images):
        return modules["image"](look(images))

    def draw(i, g):
        if not with_text:
            views = opened(world, args, i).individuals(args.batch, g, alike=judge).flatten(0, 1)
            return {"images": spoil(views, linear, g) if judge else views}
        batch = opened(world, args, i).sample(args.batch, g)
        shown = F.one_hot(batch.noun, len(world.nouns)) + torch.where(batch.beside[:, None] < 0, 0, F.one_hot(batch.beside.clamp(min=0), len(world.nouns)))
        out = {"images": batch.images, "ids": tokenize(tokenizer, batch.captions + falsified(world, batch, g)), "shown": shown / shown.sum(1, keepdim=True)}
        two = batch.beside >= 0
        if args.stage == "judge_names" and two.any():  # it will be asked for each half of two objects
            left, right = torch.where(batch.left, batch.noun, batch.beside), torch.where(batch.left, batch.beside, batch.noun)
            out |= {"halves": torch.cat(halves(batch.images[two])), "in_half": torch.cat([left[two], right[two]])}
        return out

    def step(batch):
        features = look(batch["images"])
        if with_text:
            b, false = modules["caption"](modules["text"](batch["ids"].to(args.device)).pooler_output).chunk(2)
            loss, accuracy = contrast(modules["image"](features), b, scale, false)
            loss = loss + F.cross_entropy(modules["nouns"](features), batch["shown"].to(args.device))  # captions alone teach the neighbour last
            if "halves" in batch:
                loss = loss + F.cross_entropy(modules["nouns"](look(batch["halves"])), batch["in_half"].to(args.device))
        else:
            loss, accuracy = contrast(*modules["image"](features).chunk(2), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "accuracy": accuracy}

    fixed = world.sample(24, torch.Generator().manual_seed(1)) if with_text else None
    linear = code(args) if args.stage == "judge_identity" else None
    views = None if with_text else world.individuals(24, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def preview():
        """Each picture beside the one that its embedding finds: by its caption, or among second views."""
        if with_text:
            ids = tokenize(tokenizer, fixed.captions, args.device)
            found = (embed(fixed.images) @ F.normalize(modules["caption"](modules["text"](ids).pooler_output), dim=1).T).argmax(1)
            return torch.stack([fixed.images, fixed.images[found.cpu()]], 1).flatten(0, 1)
        found = (embed(views[0]) @ F.normalize(embed(views[1]), dim=1).T).argmax(1)
        return torch.stack([views[0], views[1][found.cpu()]], 1).flatten(0, 1)

    run(args.stage, args, modules | {"scale": {"scale": scale}}, {"adamw": optimizer}, draw, step, preview)
