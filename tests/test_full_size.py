"""Dress rehearsal: a run's whole life at the real pair's full size, random weights, 512 px, on a CPU. pytest -m slow tests/test_full_size.py

About 12 GB of disk, 12 GB of memory and an hour of one core. `python tests/test_full_size.py FOLDER` does it in a folder that
stays, and prints seconds and peak memory of every part; a second call goes on after the last part that ended.
"""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
EVERY_LOSS = ("--lpips_weight", ".1", "--denoising_weight", ".1", "--scene_adversarial_weight", ".5", "--scene_prompts", ".5")
FLAGS = ("--base", "sd-turbo", "--concept", "dog", "--class_word", "corgi", "--max_train_steps", "2", "--echo_steps", "1", "--echo_samples", "4",
         "--echo_keep", ".5", "--echo_is_real", "--train_batch_size", "1", "--no-flip", "--gradient_checkpointing", "--critic_views", "1", "--preview_steps", "0",
         "--log_steps", "1", *EVERY_LOSS)
PROMPT = "a <v> corgi on the beach"


def write_files():
    """Every repository of --base sd-turbo in a hub cache: fp16 variants for the pair, fp32 for the encoders, as they are on the hub."""
    import torch
    from safetensors.torch import save_file

    import hub
    from data.base import find_base
    from data.benchmark import full_size
    base, cache, work = find_base("sd-turbo"), Path("hub"), Path("work")
    for repo, parts, size in ((base.teacher, hub.SD21, 96), (base.student, hub.TURBO, 64)):
        hub.write_pipeline(work / "pipeline", hub.full_size(parts, size))
        hub.into_cache(work / "pipeline", cache, repo)
        shutil.rmtree(work / "pipeline")
    sizes = full_size.FULL_SIZE["sd-turbo"]
    full_size.write_base(work, sizes)
    from diffusers import AutoencoderTiny
    from transformers import CLIPModel, Dinov2Model, ViTModel
    for name, kind in (("dino", ViTModel), ("dinov2", Dinov2Model), ("clip", CLIPModel)):
        folder = work / "encoders" / name
        kind(kind.config_class(**json.loads((folder / "config.json").read_text()))).save_pretrained(folder)
        hub.into_cache(folder, cache, base.encoders[name])
    AutoencoderTiny(**{}).save_pretrained(work / "tiny_vae")
    hub.into_cache(work / "tiny_vae", cache, base.tiny_vae)
    (work / "adapter" / "models").mkdir(parents=True)
    shutil.copy(work / "encoders" / "ip_adapter.safetensors", work / "adapter" / "models" / "ip-adapter_sd15.safetensors")
    hub.into_cache(work / "adapter", cache, base.encoders["ip_adapter"].removesuffix("/models/ip-adapter_sd15.safetensors"))
    shutil.rmtree(work)
    shutil.copytree(ROOT / "data" / "dog", "dog")
    return {}


def train(*more, stop_at=None):
    """One call of train.py with its networks metered; frozen weights in bf16 as on a GPU, the teacher's pictures in 2 steps of 16."""
    import torch

    import data.base
    import data.run
    import train as script
    from data.benchmark import cost
    data.base.stored_in = lambda *a: torch.bfloat16
    draw, build, iteration, meter = data.run.draw, script.build, script.iteration, cost.Meter(torch.device("cpu"))
    data.run.draw = lambda pair, prompt, seeds, teacher=False, **k: draw(pair, prompt, seeds, teacher, 2 if teacher else None, **k)
    script.preview = lambda *a: None
    seconds, started = {}, time.time()

    def built(*a, **k):
        m = build(*a, **k)
        cost.book(m, meter)
        seconds["load, study photos"] = time.time() - started
        return m

    def metered(m, args, turn, step):
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGINT)
        begun = time.time()
        meter.seconds = {}
        with meter.measuring():
            result = iteration(m, args, turn, step)
        seconds[f"iteration {step + 1} ({turn.who}, {turn.stage})"] = time.time() - begun
        seconds.update({f"  of it {k}": v for k, v in meter.seconds.items()})
        print({k: round(v.item(), 4) for k, v in (result[0] | result[1]).items()}, f"{peak():.1f} GB", flush=True)
        assert all(v.isfinite() for v in (result[0] | result[1]).values())
        return result
    script.build, script.iteration = built, metered
    try:
        script.main([*FLAGS, *more])
    except SystemExit as stop:
        assert stop.code == 130 and stop_at
    return seconds


def sample():
    import sample as script
    script.main(["--prompt", PROMPT, "--num_images", "1"])
    return {}


def stock():
    """Plain diffusers draws what sample.py drew; both in fp32."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    folder = next(Path("hub").glob("models--stabilityai--sd-turbo/snapshots/*"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", safety_checker=None, dtype=torch.float32)
    pipe.load_textual_inversion("out/dog")
    pipe.load_lora_weights("out/dog")
    image = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, height=512, width=512, generator=torch.Generator().manual_seed(0)).images[0]
    [ours] = Path("out/dog/samples").glob("a-v-corgi-on-the-beach-seed0.png")
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(ours)).astype(int))
    print(f"levels of 255 between stock diffusers and sample.py: mean {difference.mean():.3f}, most {difference.max()}")
    assert difference.mean() < 1 and difference.max() <= 8  # the LoRA is stored in fp16, and alpha multiplies what it rounds by 14.6
    return {}


PARTS = {"write files": write_files, "joint": lambda: train(stop_at=2), "echo, save": lambda: train("--resume_from_checkpoint", "latest"),
         "sample.py": sample, "stock diffusers": stock}


def peak():
    """GB resident at most, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rehearse(folder):
    """Each part in a process of its own, so that its peak memory is its own; {part: {"seconds", "gigabytes", ...}}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    done = json.loads(results.read_text()) if results.is_file() else {}
    for part in PARTS:
        if part not in done:
            env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, __file__, str(folder), part], cwd=folder, env=env, check=True)
            done = json.loads(results.read_text())
    return done


def main(folder, part=None):
    if part is None:
        return print(json.dumps(rehearse(folder), indent=1))
    started, used = time.time(), time.process_time()
    inside = PARTS[part]()
    results = Path(folder, "results.json")
    done = json.loads(results.read_text()) if results.is_file() else {}
    done[part] = {"seconds": time.time() - started, "CPU seconds": time.process_time() - used, "GB at most": peak(), **inside}
    results.write_text(json.dumps(done, indent=1))
    print(part, json.dumps(done[part], indent=1), flush=True)


@pytest.mark.slow
def test_a_run_of_the_real_pairs_full_size_lives_its_whole_life_on_a_cpu(tmp_path):
    done = rehearse(tmp_path)
    assert list(done) == list(PARTS) and max(part["GB at most"] for part in done.values()) < 15
    log = json.loads((tmp_path / "out/dog/log.json").read_text())
    assert {"reconstruction", "denoising", "alignment", "adversarial", "critic", "echo"} <= {k for row in log for k in row}


if __name__ == "__main__":
    main(*sys.argv[1:])
