"""Find, fetch, check and load a base: a teacher, a student and frozen encoders.

    pair = load_pair("emoji", "<v>", "dog", device)

A pair is two folders in the diffusers layout; sizes, prediction types and scaling factors come from their configs. Every
sentence about a missing or foreign file is here.
"""
import gc
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from data.disk import fail
from data.images import read_prompts
from data.recipe import BASES, DATA, OF_BASE, Parser, read_toml
from model import (CLIP, ConceptText, Denoiser, Encoder, ImageTokens, Pair, ViT, fuse_lora, moves, trainable_parameters)


ENCODERS = ("dino", "dinov2", "clip", "ip_adapter")  # of every base but the embedded one
# whose scheduler draws each role, whatever a repository's own is, and what is set in it
SCHEDULERS = {"teacher": ("DDIMScheduler", {"clip_sample": False}), "student": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})}


def find_base(name, flags=None):
    """Where the parts of a base lie: a name of BASES, or a folder; `teacher` and `student` in a run's flags replace its own.

    .teacher .student .tiny_vae .student_lora: folders or hub repositories ("owner/name", "owner/name@revision");
    .encoders: the folder of the embedded world's, or {"dino", "dinov2", "clip", "ip_adapter": where each lies};
    .licences: {repository: name of its licence}; .recipe: its recipe.toml; .prompts: key of prompts.json; .folder: of a base that is
    one, else None. A folder holds teacher/ and student/, or a base.json with the keys of a recipe's [base]; exit code 2 if neither.
    Its "recipe" is sd-turbo's, or emoji's for a teacher with the embedded pair's autoencoder.
    """
    flags, recipe, folder = flags or {}, name, None
    if name in BASES:
        entry = read_toml(DATA / name / "recipe.toml")["base"]
        folder = DATA / name / entry["folder"] if "folder" in entry else None
    else:
        folder, own = Path(name), Path(name, "base.json")
        if not os.path.isfile(own) and not all(os.path.isdir(folder / part) for part in ("teacher", "student")):
            fail(f"--base {name} is neither one of {', '.join(BASES)} nor a folder with teacher/ and student/ in it")
        entry = read_config(folder, "", "base.json", needed=False) or {}
        if not isinstance(entry, dict) or set(entry) - OF_BASE - {"recipe"}:
            fail(f"{own} is no table of recipe, {', '.join(sorted(OF_BASE))}; mend it")
        if "recipe" not in entry:
            vae = read_config(folder, "teacher/vae", needed=False) or {}
            entry["recipe"] = "emoji" if vae.get("_class_name") == "PatchAutoencoder" else "sd-turbo"
        if (recipe := entry["recipe"]) not in BASES:
            fail(f"{own}: recipe is {recipe!r}; give one of {', '.join(BASES)}")
        entry = {"prompts": read_toml(DATA / recipe / "recipe.toml")["base"]["prompts"]} | entry
        check_entry(own, entry)
    if folder is not None:
        tiny = {"tiny_vae": str(folder / "tiny_vae")} if (folder / "tiny_vae").is_dir() else {}
        encoders = folder / "encoders"
        if not (encoders / "clip" / "heads.safetensors").is_file():  # not the embedded world's
            encoders = {name: f"{encoders}/{name}" for name in ENCODERS} | {"ip_adapter": f"{encoders}/ip_adapter.safetensors"}
        entry = {"teacher": str(folder / "teacher"), "student": str(folder / "student"), "encoders": encoders} | tiny | entry
    given = {part: flags[part] for part in ("teacher", "student") if flags.get(part)}
    if "student" in given:
        given["student_lora"] = None
    defaults = {"tiny_vae": None, "student_lora": None, "licences": {}}
    return SimpleNamespace(**defaults | entry | given | {"recipe": DATA / recipe / "recipe.toml", "folder": folder})


def check_entry(path, entry):
    """Refuse values of a base.json under which nothing could be found."""
    if entry["prompts"] not in (known := list(read_prompts())):
        fail(f"{path}: prompts is {entry['prompts']!r}; give one of {', '.join(known)}")
    at = entry.get("encoders", {})
    if at and not (set(at) == set(ENCODERS) if isinstance(at, dict) else os.path.isdir(at)):
        fail(f"{path}: encoders is neither a folder here nor a table that says where {', '.join(ENCODERS)} lie; mend it or leave it out")
    for key, table in (("student_lora", entry), ("ip_adapter", at if isinstance(at, dict) else {})):  # each is one file, see `fetch_file`
        file = str(table.get(key) or "")
        if file and not os.path.isfile(file) and file.count("/") < 2:
            fail(f"{path}: {key} is {file!r}, neither a file here nor of the form owner/name/file.safetensors")


def read_recipe(argv):
    """(base, {key: value}) that a command line names by --base, --teacher, --student and --recipe; every key has a value."""
    p = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    for flag in ("base", "teacher", "student", "recipe", "train_unet"):
        p.add_argument(f"--{flag}")
    args, _ = p.parse_known_args(argv)
    base = args.base or ("sd-turbo" if args.teacher or args.student else "emoji")
    whole, given = read_toml(find_base(base).recipe), read_toml(args.recipe) if args.recipe else {"base": {}, "recipe": {}}
    if given["base"] not in ({}, whole["base"]):
        of = [name for name in BASES if read_toml(DATA / name / "recipe.toml")["base"] == given["base"]]
        fail(f"--recipe {args.recipe} is of another base than {base}; " + (f"add --base {of[0]}" if of else "leave [base] out of it"))
    own, recipe = given["recipe"], whole["recipe"] | given["recipe"]
    if "carry" not in own and "lora" in (args.train_unet, None if args.train_unet else recipe["train_unet"]):
        recipe["carry"] = False  # low-rank factors of one network mean nothing in another
    return base, recipe


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


def pick_precision(device):
    """("bf16" or "no", the reason in words): bf16 where the hardware computes in it; a CPU without it would emulate it, many times slower."""
    if torch.device(device).type == "cuda":
        has = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") and torch.device(device).type == "cpu" else {}
        has = bool(facts.get("avx512_bf16") or facts.get("amx_bf16") or facts.get("bf16"))
    return ("bf16", "this hardware computes bf16") if has else ("no", "this hardware has no bf16")


def fetch(source, name, needed=True, dry=False):
    """Path of one file of `source`: a folder, or a hub repository "owner/name[@revision]" (downloaded once); None if it has none.

    dry: in place of downloading, what huggingface_hub knows of the file: its size, and whether it is here already.
    """
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
        found = hf_hub_download(repo, name, revision=revision or None, **{"dry_run": True} if dry else {})
        return found if dry else Path(found)
    except errors.HFValidationError:
        fail(f"{source} is neither a folder here nor a hub repository such as stabilityai/sd-turbo; put the folder there, or mend the name")
    except errors.GatedRepoError:
        fail(f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`, or give a local folder")
    except errors.RepositoryNotFoundError:
        fail(f"{source} is not on the hub (withdrawn, renamed or private); give a mirror or a local folder with --teacher or --student")
    except errors.RevisionNotFoundError:
        fail(f"{source}: the hub repository has no such revision; give a mirror or a local folder")
    except errors.LocalEntryNotFoundError:  # of the hub's errors, the one that means "no network and not in the cache"
        if not is_cached(repo, revision):
            fail(f"{source} is not in the local cache and the hub cannot be reached; connect once, or give a local folder")
        if needed:
            fail(f"{source}: {name} is not in the local cache and the hub cannot be reached; connect once to fetch the rest, or give a local folder")
    except errors.EntryNotFoundError:
        if needed:
            fail(f"{source} on the hub holds no {name}; give a mirror or a local folder in the diffusers layout")
    except errors.HfHubHTTPError as error:
        fail(f"{source} cannot be read from the hub ({str(error).splitlines()[0]}); try again later, or give a local folder")
    except OSError as error:  # of the disk, while a file is written
        fail(f"{source}: {name} cannot be kept ({error.strerror or error}); free some space, or point HF_HOME to a larger disk")
    except Exception as error:  # of the connection: those of huggingface_hub's HTTP client are its own
        fail(f"{source}: {name} cannot be fetched ({type(error).__name__}: {error}); run the same command again")


def is_cached(repo, revision=None):
    """Whether the hub cache holds a snapshot of a repository. A file that is optional and not in it then counts as one that the
    repository never had: only a download by huggingface_hub itself leaves markers (`.no_exist`) of those."""
    from huggingface_hub import constants
    home = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    ref = home / "refs" / (revision or "main")
    return (home / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision or "none")).is_dir()


def fetch_file(spec):
    """Path of a file given as "folder/file" or as "owner/name[@revision]/path/in/the/hub/repository"."""
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


def weight_files(part, diffusers):
    """Names that the weights of a part may have, the half-size fp16 file first."""
    stem = f"{part}/" * bool(part) + ("diffusion_pytorch_model" if diffusers else "model")
    return f"{stem}.fp16.safetensors", f"{stem}.safetensors"


def announce_download(base, flags, encoders=True, roles=("teacher", "student")):
    """Print what the hub is going to send, under which licences and where it is kept; refuse if the disk is too small for it.

    encoders: whether those of the losses are wanted, too; roles: whose UNets are.
    """
    from huggingface_hub import constants
    at, sizes = find_base(base, flags), {}
    needed = at.encoders if encoders and isinstance(at.encoders, dict) else {}
    wanted = [(at.teacher, weight_files(part, part != "text_encoder")) for part in ("vae", "text_encoder")]
    wanted += [(getattr(at, role), weight_files("unet", True)) for role in sorted(roles)] + [(at.tiny_vae, weight_files("", True))] * bool(flags.get("tiny_vae") and at.tiny_vae)
    wanted += [(source, weight_files("", False)) for k, source in needed.items() if k != "ip_adapter"]
    for spec in (at.student_lora if "student" in roles else None, needed.get("ip_adapter")):
        if spec and not os.path.isfile(spec):
            owner, name, file = spec.split("/", 2)
            wanted.append((f"{owner}/{name}", (file,)))
    for source, names in wanted:
        found = None if os.path.isdir(source) else next((f for f in (fetch(source, n, needed=False, dry=True) for n in names) if f), None)
        if found and found.will_download:
            sizes[source] = sizes.get(source, 0) + (found.file_size or 0)
    if not sizes:
        return
    total, folder = sum(sizes.values()), Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    print(f"downloading {total / 1e9:.1f} GB, once, into {folder}: " + ", ".join(f"{k.partition('@')[0]} {v / 1e9:.2f} GB" for k, v in sizes.items()))
    for source in sizes:
        if source.partition("@")[0] in at.licences:
            print(f"  {source.partition('@')[0]} comes under the {at.licences[source.partition('@')[0]]}")
    if total > free:
        fail(f"{folder} has {free / 1e9:.1f} GB free, but the download takes {total / 1e9:.1f} GB; free some space, or point HF_HOME to a larger disk")


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
    for file, variant in zip(weight_files(part, diffusers), ("fp16", None)):
        if fetch(source, file, needed=False):
            break
    else:
        where = f"{source} holds no {Path(file).name}{f' in {part}/' if part else ''}"
        fail(f"{where}; weights are read from safetensors only, never from pickles"
             + "; if a download was broken off, connect once more" * (not os.path.isdir(source)))
    try:
        return kind.from_pretrained(folder, variant=variant, use_safetensors=True, **({"low_cpu_mem_usage": False} if diffusers else {}), **config)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        fail(f"{folder} does not hold a {kind.__name__} ({str(error).splitlines()[0]}); fetch it again or give another folder")


def what_it_says(config):
    """A config.json with its class's defaults where it is silent: Stable Diffusion 2.1's autoencoder writes no scaling_factor."""
    import diffusers
    import transformers
    if config is None:
        return None
    if "_class_name" not in config:
        kind = transformers.CLIPTextConfig if config.get("model_type") == "clip_text_model" else None
        return kind(**config).to_dict() if kind else config
    kind = getattr(diffusers, config["_class_name"], None)
    defaults = {k: p.default for k, p in inspect.signature(kind).parameters.items()} if isinstance(kind, type) else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in (defaults | config).items()}


def check_source(flag, source):
    """Refuse what is no folder or hub repository of a model: a file, a LoRA, a name of another form."""
    if os.path.isfile(source):
        what = "a LoRA" if is_lora(Path(source)) else "one file"
        fail(f"{flag} {source} is {what}; give a whole model as a folder in the diffusers layout or a hub repository such as stabilityai/sd-turbo")
    if not os.path.isdir(source):
        if str(source).partition("@")[0].count("/") != 1:
            fail(f"{flag} {source} is neither a folder here nor a hub repository such as stabilityai/sd-turbo")
    elif any(is_lora(p) for p in Path(source).glob("*.safetensors")) and not Path(source, "unet").is_dir():
        fail(f"{flag} {source} holds a LoRA, not a model; give the model that it was made for, in the diffusers layout")


def check_model(flag, source):
    """Refuse half a folder and another kind of model."""
    unet = read_config(source, "unet")
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel" or unet.get("addition_embed_type"):
        fail(f"{flag} {source} is no Stable Diffusion 1 or 2 (its UNet is {unet.get('addition_embed_type') or unet['_class_name']}, as in SDXL); "
             "take a pair such as sd-turbo")
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        fail(f"{flag} {source} draws from {unet['in_channels']} channels (in_channels), as models for inpainting or upscaling do; take one that draws from text alone")
    kind = read_config(source, "scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        fail(f"{flag} {source} predicts {kind!r}; take a model that predicts epsilon or v_prediction")
    for file in sorted(Path(source).glob("*/*.safetensors")) if os.path.isdir(source) else ():
        try:
            with safe_open(file, "pt"):  # the header tells whether the file is whole
                pass
        except (SafetensorError, OSError) as error:
            fail(f"{file} is damaged ({error}); fetch it again or give another folder")


def is_lora(path):
    """Whether a safetensors file holds an adapter: every one has "lora" in its keys."""
    try:
        with safe_open(path, "pt") as f:
            return any("lora" in k for k in f.keys())
    except (SafetensorError, OSError):
        return False


def check_pair(base):
    """Refuse a teacher and a student that do not fit together, by their configs alone. A student may bring its UNet only."""
    def differ(what, a, b, keys):
        for k in keys:
            if b is not None and a.get(k) != b.get(k):
                fail(f"teacher {base.teacher} and student {base.student} have different {what}: {k} is {a.get(k)} and {b.get(k)}; "
                     "take a pair made from one version of Stable Diffusion")

    for check in (check_source, check_model):  # of what is fetched, nothing before both names are sound
        for part, source in (("teacher", base.teacher), ("student", base.student)):
            check(f"--{part}", source)
    text, vae = (what_it_says(read_config(base.teacher, part)) for part in ("text_encoder", "vae"))
    unets = [what_it_says(read_config(source, "unet")) for source in (base.teacher, base.student)]
    differ("text encoders", text, what_it_says(read_config(base.student, "text_encoder", needed=False)),
           ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"))
    differ("autoencoders", vae, what_it_says(read_config(base.student, "vae", needed=False)),
           ("_class_name", "latent_channels", "scaling_factor", "block_out_channels"))
    differ("UNets", *unets, ("in_channels", "cross_attention_dim"))
    if unets[0]["cross_attention_dim"] != text["hidden_size"]:
        fail(f"teacher {base.teacher}: its UNet reads {unets[0]['cross_attention_dim']} numbers per word, its text encoder writes "
             f"{text['hidden_size']}; the folder mixes two models")
    if any(fetch(base.student, f"tokenizer/{name}", needed=False) for name in ("vocab.json", "tokenizer.json")):
        if load_tokenizer(base.teacher).get_vocab() != load_tokenizer(base.student).get_vocab():
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


def unknown_words(tokenizer, text):
    """Words of a text that a base has never read.

    A small vocabulary holds each word of its world whole; what it must spell, its text encoder has not met. A vocabulary of
    tens of thousands spells words that it knows, so it is never said to lack one.
    """
    vocabulary = tokenizer.get_vocab()
    words = dict.fromkeys(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text.lower()))
    return [w for w in words if f"{w}</w>" not in vocabulary] if len(vocabulary) < 5000 else []


def stored_in(device, flags):
    """What frozen weights are stored in: bf16 on an accelerator that computes in it anyway, else fp32."""
    return torch.bfloat16 if (flags or {}).get("mixed_precision") == "bf16" and torch.device(device).type != "cpu" else torch.float32


def load_pair(base, token, class_word, device="cpu", flags=None, dtype=None, random=False, roles=("teacher", "student")):
    """Load a base (a name of BASES or a folder with teacher/ and student/) frozen and in evaluation mode.

    Text encoder, tokenizer and autoencoder are the teacher's; the student brings only its UNet and scheduler.
    flags: a run's, of which teacher, student, resolution, tiny_vae, train_unet, start_word and mixed_precision are read. dtype: of frozen
    weights. random: see `load_part`. roles: whose networks are loaded; drawing needs one.
    """
    import diffusers
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel
    from transformers.utils import logging

    from data.emoji.autoencoder import PatchAutoencoder
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    flags, base, dtype = flags or {}, find_base(base, flags), dtype or stored_in(device, flags)
    check_pair(base)
    if flags.get("tiny_vae") and not base.tiny_vae:
        fail("--tiny_vae: this base names no tiny autoencoder; leave the flag out")

    def load(kind, source, part):
        return load_part(kind, source, part, device if random else None).float()

    kinds = {k.__name__: k for k in (AutoencoderKL, AutoencoderTiny, PatchAutoencoder)}
    vae = load(kinds[read_config(base.teacher, "vae")["_class_name"]], base.teacher, "vae")
    tiny = load(AutoencoderTiny, base.tiny_vae, "") if flags.get("tiny_vae") else None
    denoisers = {}
    for role, (scheduler, fixed) in SCHEDULERS.items():
        source = getattr(base, role)
        folder = fetch(source, "scheduler/scheduler_config.json").parent
        denoisers[role] = Denoiser(load(UNet2DConditionModel, source, "unet"), getattr(diffusers, scheduler).from_pretrained(folder, **fixed)) if role in roles else None
    if base.student_lora and denoisers["student"]:
        path = fetch_file(base.student_lora)
        try:
            fuse_lora(denoisers["student"].unet, load_file(path))
        except ValueError as error:
            fail(f"{path} does not fit the student's UNet: {error}; it was made for another model")
    if torch.device(device).type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor
        for d in filter(None, denoisers.values()):
            d.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow CPU backward
    text = ConceptText(load_tokenizer(base.teacher), load(CLIPTextModel, base.teacher, "text_encoder"), token, flags.get("start_word") or class_word)
    row = text.row.data
    if torch.device(device).type == "cuda" and flags.get("mixed_precision") != "no":
        torch.backends.cuda.matmul.allow_tf32 = True  # for the student's step: as exact as fp16 (1 %), and no number too large
    for role, d in denoisers.items():
        if d is None:
            continue
        stored = dtype if role == "teacher" else torch.float32  # the student's step is never in bf16: see Denoiser.one_step
        for name, p in d.unet.named_parameters():
            p.data = p.data.to(device, torch.float32 if moves(name, flags.get("train_unet", "kv")) else stored)
        d.to(device).eval().requires_grad_(False)
    for module in (text, vae, tiny):
        if module is not None:
            module.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)  # faster convolutions
    text.row = nn.Parameter(row.to(device))
    size = read_config(base.student, "unet")["sample_size"] * 2 ** (len(vae.config.block_out_channels) - 1)
    return Pair(text, vae, denoisers["teacher"], denoisers["student"], text, flags.get("resolution") or size, tiny)


def load_encoder(folder):
    """One image encoder of the embedded world, in evaluation mode."""
    from transformers import AutoModel, CLIPTextModel
    vision = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    heads = load_file(Path(folder) / "heads.safetensors")
    text = CLIPTextModel.from_pretrained(Path(folder) / "text", use_safetensors=True) if "text" in heads else None
    return Encoder(vision, heads["image"], text, heads.get("text"), heads.get("nouns"))


def load_encoders(base, device="cpu", flags=None, dtype=None, random=False):
    """The frozen *training* encoders of a base: "identity", "clip", and any that only a critic's head stands on.

    The judges are not reachable from here. flags: a run's, of which dinov2_size, raw_images and mixed_precision are read.
    """
    flags, base, dtype = flags or {}, find_base(base, flags), dtype or stored_in(device, flags)
    at = base.encoders
    if not isinstance(at, dict):
        return {name: load_encoder(Path(at) / name).to(device, memory_format=torch.channels_last) for name in ("clip", "identity")}
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, Dinov2Model, ViTModel

    def load(kind, name, **config):
        return load_part(kind, at[name], "", device if random else None, **config).to(dtype)

    def preprocessing(name):
        return read_config(at[name], "", "preprocessor_config.json")

    raw = bool(flags.get("raw_images"))
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
        gc.collect()  # what an earlier run of this process still holds
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type == "cpu" and Path("/proc/meminfo").is_file():
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return None


def check_resolution(base, resolution, where):
    """Refuse pixels along one side that autoencoder and UNet cannot halve; where: what the sentence names."""
    if resolution is None:
        return
    step = 2 ** sum(len(read_config(source, part)["block_out_channels"]) - 1 for source, part in ((base.teacher, "vae"), (base.student, "unet")))
    if resolution < step or resolution % step:
        fail(f"{where} must be a multiple of {step} for this pair, not {resolution}")


def check_base(args):
    """Refuse what the base's configs tell of a run's flags, before any weight is read."""
    base = find_base(args.base, vars(args))
    check_pair(base)
    if args.tiny_vae and not base.tiny_vae:
        fail(f"--tiny_vae: the base {args.base} names no tiny autoencoder; leave the flag out")
    if args.mixed_precision == "fp16" and read_config(base.teacher, "scheduler", "scheduler_config.json").get("prediction_type") == "v_prediction":
        fail("--mixed_precision fp16 overflows in a v-prediction teacher (black images); use bf16 or no")
    check_resolution(base, args.resolution, "--resolution")
    if not args.token.strip() or any(c.isspace() for c in args.token):
        fail(f"--token {args.token!r} must be one word without spaces, such as <v>")
    tokenizer = load_tokenizer(base.teacher)
    if len(tokenizer.tokenize(args.token)) == 1:
        fail(f"--token {args.token} is a word that the base already knows; take a new one, such as <v>")
    if args.token in args.class_word:
        fail(f"--class_word {args.class_word} holds the token {args.token} itself; say the ordinary noun, such as dog")
    if args.start_word and not tokenizer.tokenize(args.start_word):
        fail(f"--start_word {args.start_word!r} holds no word; leave it empty to start from the class word")
    if len(tokenizer.tokenize(args.class_word)) > tokenizer.model_max_length // 2:
        fail(f"--class_word {args.class_word[:40]}... fills more than half of the {tokenizer.model_max_length} tokens that the model reads; shorten it")
