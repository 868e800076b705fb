"""A run's folder: its checkpoints, how it goes on, and the finished run in forms that other programs load.

Everything on disk is safetensors + JSON + PNG, written to a temporary name and renamed.
"""
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data.base import SCHEDULERS, check_resolution, find_base, pick_device, read_config
from data.disk import fail, make_folder, save_json, save_tensors, save_text
from data.images import grid, photo_hashes, save_png, to_pil
from data.recipe import BASES, KEYS, RUN, check, fits, read_toml
from model import draw, to_lora

try:
    import fcntl
except ImportError:
    fcntl = None

FORMAT, CHECKPOINT = "echodistill-1", "echodistill-checkpoint-3"
LORA, LOCK = "pytorch_lora_weights.safetensors", "run.lock"
FOLDERS = {"checkpoints", "checkpoints-before", "previews", "samples", "teacher", "tensorboard"}
FILES = {"config.json", "unet_delta.safetensors", "learned_embeds.safetensors", LORA, LOCK, "README.md", "log.json", "losses.png",
         "preview.png", "photos.png", "echo.png"}
ROOT = Path(__file__).resolve().parents[1]
MAY_CHANGE_ON_RESUME = {"output_dir", "device", "resume_from_checkpoint", "allow_other_bits", "preview_steps", "checkpointing_steps",
                        "checkpoints_total_limit", "validation_prompt", "report_to"}


# ---------------------------------------------------------------------------------------------------------------
# A run in progress

class Run:
    """The folder of a run that trains; owns its signals, checkpoints and the place to go on from.

    state   {name: module, optimizer, {name: tensor} or any object with a flat state_dict() and load_state_dict()}: all that a
            checkpoint holds. What is added to the loop is saved and resumed by being put into `m.state` of train.build.
    """

    def __init__(self, args, argv=None):
        self.args, self.argv, self.asked, self.first, self.state = args, sys.argv[1:] if argv is None else argv, [], 0, {}
        self.facts = {"photos": photo_hashes(args.concept), "bits": bits(args.device)}
        self.resumed = find_checkpoint(args, self.facts) if args.resume_from_checkpoint else None
        self.out = make_folder(args.output_dir, "--output_dir")
        refuse_obstacles(self.out)

    def __enter__(self):
        self.lock = take_lock(self.out)
        self.handlers = {s: signal.signal(s, lambda number, _: sys.exit(128 + number)) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        drop_lock(self.lock)
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def restore(self, state):
        """Register all that training changes, and put back what the checkpoint to go on from holds of it."""
        self.state = state
        if self.resumed:
            path, meta, tensors = self.resumed
            try:
                restore(tensors, meta["state"], state)
            except ValueError as error:
                fail(f"--resume_from_checkpoint {path}: {error}; has --base or the code changed since?")
            self.first, self.resumed = meta["step"], None
            self.set_aside([p for p in checkpoints(self.out) if p.stem > f"step-{self.first:06d}"] if self.args.resume_from_checkpoint != "latest" else [])
            print(f"resumed {path} at iteration {self.first}")
        else:
            self.clear()

    def set_aside(self, left):
        """Move checkpoints of a way that is left, from which a next "latest" must not go on, to a new folder, which is returned."""
        aside = next(p for n in itertools.count(1) if not (p := self.out / f"checkpoints-before{f'-{n}' * (n > 1)}").exists())
        for path in left:
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        return aside

    def clear(self):
        """Nothing of an earlier run may be taken for a part of this one, nor its unfinished work be lost by a forgotten flag."""
        if left := checkpoints(self.out):
            print(f"note: an unfinished run was here; to go on with it instead, add --resume_from_checkpoint {self.set_aside(left) / left[-1].name}")
        for part in ("checkpoints", "previews", "tensorboard"):
            shutil.rmtree(self.out / part, ignore_errors=True)
        for old in self.out.glob("echo*.png"):
            old.unlink()

    def steps(self, total, bar):
        """The iterations left, with a checkpoint after some, and after the one in which Ctrl-C or SIGTERM asks to stop.

        bar: wraps an iterable with a progress bar, as tqdm does.
        """
        for s in self.handlers:  # the first signal asks for a checkpoint, the second ends the program at once
            signal.signal(s, lambda number, _: sys.exit(128 + number) if self.asked else self.asked.append(128 + number))
        for step in bar(range(self.first, total)):
            yield step
            leave = list(self.asked)  # a signal that comes later waits for the next iteration
            if (step + 1) % self.args.checkpointing_steps == 0 or leave:
                self.checkpoint(step + 1)
            if leave:
                again = re.sub(r" ?--resume_from_checkpoint[ =]('[^']*'|\S+)", "", shlex.join(map(str, self.argv)))
                print(f"\nstopped after iteration {step + 1}; go on with: python train.py {again} --resume_from_checkpoint latest")
                sys.exit(leave[0])

    def checkpoint(self, step):
        path = self.out / "checkpoints" / f"step-{step:06d}.safetensors"
        save_checkpoint(path, self.state, {"step": step, "flags": vars(self.args)} | self.facts)
        if self.args.checkpoints_total_limit:
            for old in [p for p in checkpoints(self.out) if p <= path][:-self.args.checkpoints_total_limit]:
                old.unlink()

    def finish(self):
        """The finished run is complete without its checkpoints; a signal that came meanwhile ends what follows."""
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        if self.asked:
            sys.exit(self.asked[0])


def take_lock(out):
    """The open file out/run.lock, which says who trains in this folder; it is refused to a second run until the first is over.

    The system drops the lock of a process that ends, however it ends, so a file that a killed run left counts for nothing.
    Windows does not, and neither does another machine tell: there a file that is left has to be deleted by hand.
    """
    path, me = out / LOCK, {"pid": os.getpid(), "host": platform.node()}
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            fail(f"{path} cannot be written ({error.strerror}); remove it or choose another --output_dir")
        held = not own(file)
        try:
            if held or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # its owner has just ended and removed it
    file.seek(0)
    try:
        owner = json.loads(file.read())
        pid, host = owner["pid"], owner["host"]
    except (ValueError, KeyError, TypeError):  # not yet written, or its writer was killed
        pid, host = None, me["host"]
    if held or host != me["host"] or pid and fcntl is None:
        file.close()
        fail(f"--output_dir {out} belongs to a run that goes on as process {pid or '?'} on {host}; wait for it or choose another "
             f"folder{'' if held else f' (if that run is over, delete {path})'}")
    if pid:
        print(f"note: process {pid}, which was killed, had left {path}; taken over")
    file.truncate(0)
    file.write(json.dumps(me))
    file.flush()
    return file


def drop_lock(file):
    if fcntl is None:
        file.close()  # Windows removes no open file; elsewhere a file that was closed might be another run's by now
    Path(file.name).unlink(missing_ok=True)
    file.close()


def own(file):
    """Lock an open file for this process alone; False if another holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def refuse_obstacles(out):
    """Refuse, before the work and not after it, an output folder in which a folder stands where a file must go, or the reverse."""
    for part in (Path(out), Path(out, "teacher")):
        for path in part.iterdir() if part.is_dir() else ():
            if path.name in FILES and path.is_dir() or path.name in FOLDERS and not path.is_dir():
                fail(f"{path} is {'a folder' if path.is_dir() else 'a file'} in the way of the run's own; remove it or choose another folder")


def bits(device):
    """What decides the last bits of a run beside its flags and photos: libraries, processor and number of threads."""
    device = pick_device(device)[0]
    if device.type == "cpu":
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        known = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", info, re.M))
        features = sorted(f for f in known.get("flags", "").split() if f.startswith(("avx", "amx", "fma")))
        name = " ".join([*(known.get(k, "") for k in ("vendor_id", "cpu family", "model")), torch.backends.cpu.get_cpu_capability(), *features])
        processor = {"processor": name if features else f"{platform.processor() or platform.machine()} {name}".strip(),
                     "threads": torch.get_num_threads()}
    else:
        processor = {"processor": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)}
    return {p: version(p) for p in ("torch", "diffusers", "transformers", "pillow")} | processor


def find_checkpoint(args, facts):
    """(path, meta, tensors) to go on from; "latest" passes over a damaged file and says so, a damaged PATH is refused."""
    latest = args.resume_from_checkpoint == "latest"
    for path in checkpoints(args.output_dir)[::-1] if latest else [Path(args.resume_from_checkpoint)]:
        try:
            meta, tensors = read_checkpoint(path)
        except ValueError as error:
            if not latest:
                fail(f"--resume_from_checkpoint: {error}; name another one, or say latest")
            print(f"note: {error}; the one before is used")
            continue
        for k, v in vars(args).items():
            if k not in MAY_CHANGE_ON_RESUME and meta["flags"].get(k) != v:
                fail(f"--{k} is {v} but {path} was made with {meta['flags'].get(k)}; give the same flags to resume")
        check_facts(args, path, meta, facts)
        return path, meta, tensors
    if latest and os.path.isfile(Path(args.output_dir, "config.json")):
        fail(f"--resume_from_checkpoint: the run in {args.output_dir} is finished; draw with: python sample.py --run "
             f"{shlex.quote(args.output_dir)} --prompt \"a {args.token} {args.class_word}\" (or leave the flag out to train anew)")
    fail(f"--resume_from_checkpoint: there is no whole checkpoint in {Path(args.output_dir, 'checkpoints')}; leave the flag out to start anew")


def check_facts(args, path, meta, facts):
    """Refuse to go on from a checkpoint whose photos have changed, or, unless allowed, where the bits would come out differently."""
    then, now = meta["photos"], facts["photos"]
    if list(then.values()) != list(now.values()):
        odd = next(k for k in [*now, *then] if now.get(k) != then.get(k))
        change = "is new" if odd not in then else "is gone" if odd not in now else "has changed"
        fail(f"--concept {args.concept}: {odd} {change} since {path} was made; put the photos back as they were, "
             "or leave --resume_from_checkpoint out to start anew")
    odd = [k for k in facts["bits"].keys() | meta["bits"].keys() if facts["bits"].get(k) != meta["bits"].get(k)]
    for k in sorted(odd):
        change = f"{k} was {meta['bits'].get(k)} when {path} was made and is {facts['bits'].get(k)} here, so the last bits will differ"
        if not args.allow_other_bits:
            fail(f"--resume_from_checkpoint: {change} from an uninterrupted run's; go on as before, or add --allow_other_bits")
        print(f"note: {change}")


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file; tensors under "name/key", all else as JSON in its header

def flat(state):
    """A state_dict as ({key: tensor}, {key: JSON-able value}); an optimizer's moments get keys "number/what"."""
    state = state if isinstance(state, dict) else state.state_dict()
    if set(state) == {"state", "param_groups"}:
        state = {f"{i}/{k}": torch.as_tensor(v) for i, moments in state["state"].items() for k, v in moments.items()}
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def fingerprint(tensors, meta):
    """SHA-256 of names, types, shapes, values and the meta string."""
    h = hashlib.sha256(meta.encode())
    for k, v in sorted(tensors.items()):
        h.update(f"{k} {v.dtype} {tuple(v.shape)} ".encode())
        h.update(v.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def save_checkpoint(path, state, meta):
    """One safetensors file that holds all that a run needs to go on; state as in `Run`, meta: JSON-able facts."""
    tensors, rest = {}, {}
    for name, part in state.items():
        own, rest[name] = flat(part)
        tensors |= {f"{name}/{k}": v for k, v in own.items()}
    meta = json.dumps(meta | {"state": rest})
    save_tensors(path, tensors, {"format": CHECKPOINT, "sha256": fingerprint(tensors, meta), "meta": meta})


def checkpoints(folder, part="checkpoints"):
    """The checkpoint files of a run, oldest first."""
    return sorted(Path(folder, part).glob("step-*.safetensors"))


def read_checkpoint(path):
    """(meta, {name: tensor}) of a checkpoint; a ValueError says what is wrong with a truncated, altered or foreign file."""
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}")
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is truncated or no safetensors file (it is no file)")
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


def restore(tensors, rest, state):
    """Put what `read_checkpoint` read into `state`, in place; all of it or, with a ValueError, nothing."""
    if rest and rest.keys() != state.keys():
        raise ValueError(f"the checkpoint does not fit this code: only one of them has {sorted(rest.keys() ^ state.keys())[0]}")
    found = {name: {} for name in state}
    for key, value in tensors.items():
        name, _, key = key.partition("/")
        found.setdefault(name, {})[key] = value
    for name, part in state.items():
        if isinstance(part, (dict, torch.nn.Module)):
            shapes = [{k: tuple(v.shape) for k, v in tensors.items()} for tensors in (flat(part)[0], found[name])]
            if shapes[0] != shapes[1]:
                odd = sorted({k for k, _ in shapes[0].items() ^ shapes[1].items()})
                raise ValueError(f"the checkpoint does not fit these models: {name}/{odd[0]} differs")
    for name, part in state.items():
        if isinstance(part, dict):
            for k, v in part.items():
                v.data.copy_(found[name][k])
        elif isinstance(part, torch.optim.Optimizer):
            moments = {}
            for key, value in found[name].items():
                i, k = key.split("/")
                moments.setdefault(int(i), {})[k] = value
            part.load_state_dict({"state": moments, "param_groups": part.state_dict()["param_groups"]})
        else:
            part.load_state_dict(found[name] | rest.get(name, {}))


# ---------------------------------------------------------------------------------------------------------------
# A finished run, in the forms that other programs load: README.md in its folder shows how.

def slug(prompt):
    """A prompt as a file name that every system takes; what it leaves out of all but plain words is told by a hash at the end."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if re.fullmatch(r"<?[a-z0-9]+>?( <?[a-z0-9]+>?)*", prompt) and len(name) <= 60:
        return name
    return f"{name[:50].strip('-') or 'picture'}-{hashlib.sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:8]}"


def file_names(prompts):
    """A name for each of several prompts, no two of them equal: `slug`, numbered where it still meets another."""
    names = []
    for name in map(slug, prompts):
        number = iter(range(2, len(prompts) + 2))
        unique = name
        while unique in names:
            unique = f"{name}-{next(number)}"
        names.append(unique)
    return names


def quoted(value):
    """A path or text as Python code."""
    return json.dumps(value.as_posix() if isinstance(value, Path) else value, ensure_ascii=False)


CARD = """# `{token}` {word}, learned by EchoDistill

{role} of {base}, taught `{token}`. Written with torch {torch}, diffusers {diffusers}, transformers {transformers}.

```python
{code}
```

![{count} prompts, seed 0](samples/grid.png)
{photos}
- `unet_delta.safetensors`: the trained UNet weights themselves, under diffusers names; exact.
- `{lora}`: their change as a LoRA with kohya keys. {fidelity}
- `learned_embeds.safetensors`: the token. Once loaded, a second file of the same token needs `token="..."` in `load_textual_inversion`.
- `config.json`: every flag and version; `samples/`: the pictures above.

The lines need `pip install torch diffusers transformers peft` and draw `samples/{first}`. With a Stable Diffusion base,
ComfyUI loads the LoRA from `models/loras` and the token from `models/embeddings`; prompts then say `embedding:learned_embeds`
instead of `{token}`.

Settings: {settings}.

Licence of the base: {licence}. Weights made from it are bound by it, too.
"""


def loading_code(part, role, base, exact, prompt, guidance, size):
    """The lines of plain diffusers that load one half of a run and draw its first sample."""
    def named(source):  # as arguments of from_pretrained and the like
        name, _, revision = (str(source), "", "") if os.path.isdir(source) else str(source).partition("@")
        return quoted(Path(name).relative_to(ROOT) if Path(name).is_relative_to(ROOT) else name), f", revision={quoted(revision)}" * bool(revision)

    source, revision = named(getattr(base, role))
    lines = ["import torch", "from diffusers import StableDiffusionPipeline"]
    if base.folder and read_config(base.teacher, "vae")["_class_name"] == "PatchAutoencoder":
        lines.insert(1, "import data.emoji.autoencoder  # for from_pretrained")
    if not exact:
        lines += ["from safetensors.torch import load_file"]
    lines += ["", f"pipe = StableDiffusionPipeline.from_pretrained({source}{revision}, safety_checker=None)"]
    if role == "student" and base.student_lora:
        folder, _, file = base.student_lora.rpartition("/")
        folder, revision = named(folder)
        lines += [f"pipe.load_lora_weights({folder}{revision}, weight_name={quoted(file)})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    (scheduler, fixed), its = SCHEDULERS[role], read_config(getattr(base, role), "scheduler", "scheduler_config.json")
    if not {"_class_name": scheduler, **fixed}.items() <= its.items():
        lines.insert(1, f"from diffusers import {scheduler}")
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {', '.join(f'{k}={quoted(v) if isinstance(v, str) else v}' for k, v in fixed.items())})")
    steps, guidance = (1, 0.0) if role == "student" else (16, guidance)
    return "\n".join([
        *lines, f"pipe.load_textual_inversion({quoted(part)})",
        f"pipe.load_lora_weights({quoted(part)})" if exact else
        f"pipe.unet.load_state_dict(load_file({quoted(part / 'unet_delta.safetensors')}), strict=False)",
        f"image = pipe({quoted(prompt)}, num_inference_steps={steps}, guidance_scale={guidance}, height={size}, width={size},",
        "             generator=torch.Generator().manual_seed(0)).images[0]", 'image.save("picture.png")'])


def licences(base):
    """What the models of a base come under, as a part of a card's sentence."""
    sources = [str(source).partition("@")[0] for source in (base.teacher, base.student, base.student_lora)]
    known = [f"{what}: {name}" for what, name in base.licences.items() if base.folder or any(s == what or s.startswith(f"{what}/") for s in sources)]
    return "; ".join(known) or "read it where the base comes from"


def changed_settings(flags, base):
    """Flags of a run whose values are not those of its base's recipe, as a sentence of a card."""
    usual = read_toml(base.recipe)["recipe"]
    rows = [f"`{k}` {flags[k]} ({usual[k]})" for k in KEYS if k in flags and usual[k] not in (flags[k], "auto")]
    return f"{', '.join(rows)}; in brackets the base's recipe, which holds the rest" if rows else "all as in the base's recipe"


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
        names = [f"{name}-seed0.png" for name in file_names(shown)]
        images = torch.cat([draw(pair, p, [0], role == "teacher", guidance=flags["guidance_scale"]) for p in shown])
        for image, name in zip(to_pil(images), names):
            save_png(image, part / "samples" / name)
        save_png(grid([("", row) for row in images.split(4)]), part / "samples" / "grid.png")
        fidelity = "It holds all of it." if exact else \
            f"It leaves out {error:.2%} of the change (Frobenius norm{'' if rank is None else f', rank {rank}'}; norms and biases fit no LoRA)."
        base = find_base(flags["base"], flags)
        code = loading_code(part, role, base, exact, shown[0], flags["guidance_scale"], pair.resolution)
        card = CARD.format(token=text.token, word=flags["class_word"], role=role.capitalize(), base=flags["base"], code=code,
                           count=len(shown), lora=LORA, fidelity=fidelity, first=names[0],
                           photos="\n![the photos](photos.png)\n" if (part / "photos.png").is_file() else "",
                           settings=changed_settings(flags, base), licence=licences(base), **versions)
        save_text(part / "README.md", card)
        save_json(part / "config.json", {"format": FORMAT, "model": role, "flags": flags, "versions": versions,
                                         "lora": {"rank": rank, "left_out": error}})
        print(f"{role}: LoRA {'of full rank' if rank is None else f'of rank {rank}'} leaves out {error:.2%} of the change")


# ---------------------------------------------------------------------------------------------------------------
# Reading a finished run

def read_run(folder=None, root="out", base=None):
    """(folder, flags) of a finished run, whole and made by us; without a folder, the one under root whose config.json is newest.

    A run may come from anyone: of what its config names, only a base that we know or that the user names is opened.
    """
    if folder is None:
        configs = sorted((p for p in Path(root).glob("*/config.json") if p.is_file()), key=lambda p: p.stat().st_mtime)
        if not configs:
            fail("there is no finished run under out/; train one with: python train.py --concept data/dog")
        folder = configs[-1].parent
    folder, config = Path(folder), Path(folder) / "config.json"
    if not os.path.isfile(config):
        fail(f"--run {folder} holds no finished run (no config.json); train one with: python train.py --concept data/dog")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        form, model, flags = read["format"], read.get("model", "student"), read["flags"]
        odd = [k for k in ("token", "class_word", "base", "concept", "guidance_scale") if flags[k] in (None, "")]
        odd += [k for k in flags if k in KEYS | RUN and not fits(k, flags[k])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{config} is damaged ({type(error).__name__}: {error}); train again, or name another run with --run")
    if form != FORMAT:
        fail(f"{config} was not written by this version of train.py (format {form!r}); name another run with --run")
    if model != "student":
        fail(f"--run {folder} is the teacher's half of a run; name the folder above it")
    if odd or len(flags["token"].split()) != 1:
        fail(f"{config}: {(odd or ['token'])[0]} has a value that train.py never writes; train again, or name another run with --run")
    for k in flags:
        if k in KEYS | RUN:
            check(k, flags[k], f"{config}: {k}")
    if base is None and flags["base"] not in BASES:
        fail(f"{config} names the base {flags['base']}, a folder outside the run; if you trust it, add --run {folder} --base with that folder")
    own = [flags[part] for part in ("teacher", "student") if flags.get(part)]
    if base is None and own:
        fail(f"{config} names {own[0]}, which is not a part of the base {flags['base']}; if you trust it, add --run {folder} --base {flags['base']}")
    check_resolution(find_base(base or flags["base"], flags), flags.get("resolution"), f"{config}: resolution")
    check_run(folder, flags["token"])
    return folder, flags | {"base": base or flags["base"]}


def check_run(folder, token):
    """Refuse a run whose files are missing, cut short or not ours, from their headers alone."""
    for part in (Path(folder), Path(folder) / "teacher"):
        for name in ("unet_delta.safetensors", "learned_embeds.safetensors"):
            try:
                if (part / name).exists() and not (part / name).is_file():
                    raise OSError("it is no file")
                with safe_open(part / name, "pt") as f:
                    keys = set(f.keys())
                    kinds = {f.get_slice(k).get_dtype() for k in keys}
            except (SafetensorError, OSError) as error:
                fail(f"{part / name} is missing or damaged ({error}); train again, or name another run with --run")
            if not keys or not kinds <= {"F64", "F32", "F16", "BF16"}:
                fail(f"{part / name} holds {'integers' if keys else 'no tensor'} where trained weights belong; train again, or name another run with --run")
            if name.startswith("learned") and keys != {token}:
                fail(f"{part / name} does not hold the token {token} that config.json names; train again, or name another run with --run")


@torch.no_grad()
def load_run(folder, pair):
    """Put a run's weights and token into a freshly loaded pair; returns the weights they replace, as `save_run` wants them."""
    folder, before, rows = Path(folder), {}, []
    for role, part, denoiser in (("teacher", folder / "teacher", pair.teacher), ("student", folder, pair.student)):
        row = load_file(part / "learned_embeds.safetensors")[pair.text.token]
        delta, weights = (load_file(part / "unet_delta.safetensors"), denoiser.unet.state_dict()) if denoiser else ({}, {})
        odd = [k for k, v in delta.items() if k not in weights or weights[k].shape != v.shape or not v.isfinite().all()]
        if odd or row.shape != pair.text.row.shape or not row.isfinite().all():
            fail(f"{part} does not fit this base: {odd[0] if odd else pair.text.token} has another name, shape or no finite values; name another run with --run")
        before[role] = {k: weights[k].cpu().clone() for k in delta}
        if denoiser:
            denoiser.unet.load_state_dict(delta, strict=False)
        rows.append(row)
    pair.text.row.copy_(rows[0])
    if not torch.equal(*rows):
        pair.unshare_text()
        pair.student_text.row.copy_(rows[1])
    return before
