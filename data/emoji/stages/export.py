"""Stage export: data/emoji/base in the diffusers layout."""
import json
import os
import shutil
from pathlib import Path

import torch

from data.disk import save_json, save_tensors
from stages.encoders import WIDTHS, build_text, build_tokenizer, build_vision
from stages.loop import saved
from stages.teacher import SCHEDULE, build_unet, load_teacher
from stages.vae import build_vae


def export(args):
    """Write what --work holds into base/: teacher/, student/ (parts they share are links into teacher/), encoders/, judges/.

    What has no checkpoint there stays as it is: a new decoder or judge alone needs no new pair.
    """
    work, base = Path(args.work), Path(args.base)
    ran = {stage for stage in [*WIDTHS, "vae", "teacher", "student", "match"] if (work / stage / "checkpoint.safetensors").exists()}
    tokenizer, vae = build_tokenizer(work / "tokenizer"), build_vae(args)
    if "vae" in ran:
        vae.load_state_dict(saved(args, "vae", "ema"))
    else:
        vae = type(vae).from_pretrained(base / "teacher", subfolder="vae")
    if ran & {"student", "match"}:
        export_pair(args, base, tokenizer, vae.half(), "match" if "match" in ran else "student")
    elif "vae" in ran:
        shutil.rmtree(base / "teacher" / "vae")
        vae.half().save_pretrained(base / "teacher" / "vae")
        for index in (base / role / "model_index.json" for role in ("teacher", "student")):
            save_json(index, json.loads(index.read_text()) | {"vae": [type(vae).__module__, type(vae).__name__]})
    for stage in sorted(ran & set(WIDTHS)):
        export_encoder(args, base, stage, tokenizer)
    size = sum(f.stat().st_size for f in base.rglob("*") if f.is_file() and not f.parent.is_symlink())
    print(f"{base}: {size / 1e6:.1f} MB; written: {', '.join(sorted(ran))}")


def export_pair(args, base, tokenizer, vae, stage):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
    teacher, text = load_teacher(args)
    student = build_unet(args)
    student.load_state_dict(saved(args, stage, "ema"))
    common = SCHEDULE | {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 1}
    schedulers = {"teacher": DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **common), "student": EulerDiscreteScheduler(**common)}
    for name, unet in (("teacher", teacher), ("student", student)):
        shutil.rmtree(base / name, ignore_errors=True)
        StableDiffusionPipeline(vae=vae, text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(),
                                scheduler=schedulers[name], safety_checker=None, feature_extractor=None,
                                requires_safety_checker=False).save_pretrained(base / name)
    config = base / "teacher" / "text_encoder" / "config.json"  # stored in fp16 like the rest, but to be loaded in fp32 like it
    save_json(config, json.loads(config.read_text()) | {"dtype": "float32"})
    for shared in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(base / "student" / shared)
        os.symlink(Path("..") / "teacher" / shared, base / "student" / shared)


def export_encoder(args, base, stage, tokenizer):
    family, _, name = stage.rpartition("_")
    folder = base / ("judges" if family else "encoders") / name
    vision = build_vision(stage)
    vision.load_state_dict(saved(args, stage, "vision"))
    vision.half().save_pretrained(folder)
    heads = {"image": saved(args, stage, "image")["weight"]}
    if name == "clip":
        encoder = build_text(tokenizer)
        encoder.load_state_dict(saved(args, stage, "text"))
        encoder.half().save_pretrained(folder / "text")
        heads |= {"text": saved(args, stage, "caption")["weight"]}
    if name == "names":
        nouns = saved(args, stage, "nouns")
        heads["nouns"] = torch.cat([nouns["weight"], nouns["bias"][:, None]], 1)
    save_tensors(folder / "heads.safetensors", heads)
