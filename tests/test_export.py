"""What a run leaves behind loads in plain diffusers and is named as ComfyUI expects. python -m pytest tests/test_export.py"""
import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import sample as sample_script
import data.emoji.autoencoder  # noqa: F401  from_pretrained looks it up among the imported modules
from conftest import ROOT, train
from data.base import load_pair
from data.run import save_run, slug
from model import low_rank, to_lora, trainable_parameters

FLAGS = {"token": "<v>", "class_word": "dog", "base": "tiny", "concept": "dog", "guidance_scale": 3.0}
PROMPTS = ["a <v> dog on the beach", "a <v> dog"]


def levels(a, b):
    """The largest difference of two pictures (files or PIL images) in 8-bit levels."""
    a, b = (np.asarray(Image.open(x) if isinstance(x, (str, Path)) else x).astype(int) for x in (a, b))
    return np.abs(a - b).max()


def card_code(folder):
    return re.search(r"```python\n(.*?)```", Path(folder, "README.md").read_text(encoding="utf-8"), re.S)[1]


def run_card(folder):
    """Execute the lines of a card as they stand; returns the picture they save and the base's own for the same seed."""
    scope = {}
    exec(card_code(folder), scope)
    taught = Image.open("picture.png").copy()
    base = re.sub(r"pipe\.(load_textual_inversion|load_lora_weights|unet\.load_state_dict)\(.*\n", "", card_code(folder))
    exec(base, {})
    return taught, Image.open("picture.png").copy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base with the layout of Stable Diffusion 2.1 and SD-Turbo, small and random: v teacher, epsilon student, AutoencoderKL."""
    base = tmp_path_factory.mktemp("tiny") / "tiny"
    noise = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}
    torch.manual_seed(0)
    for name, scheduler in (("teacher", DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **noise)),
                            ("student", EulerDiscreteScheduler(prediction_type="epsilon", **noise))):
        unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32, 32, 32), attention_head_dim=(2, 4, 4, 4), norm_num_groups=8,
                                    cross_attention_dim=128, use_linear_projection=True)
        vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            norm_num_groups=4, latent_channels=4)
        loaded = StableDiffusionPipeline.from_pretrained(ROOT / "data/emoji/base/teacher", unet=unet, vae=vae, scheduler=scheduler)
        loaded.save_pretrained(base / name)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(base / "student" / part)
        shutil.copytree(base / "teacher" / part, base / "student" / part)
    return base


def taught(tiny, which, folder="out/tiny", rank=None):
    """A run whose weights were moved at random instead of trained."""
    if not Path("tiny").exists():
        os.symlink(tiny, "tiny")
    pair, g = load_pair("tiny", "<v>", "dog"), torch.Generator().manual_seed(1)
    before = {}
    with torch.no_grad():
        for role in ("teacher", "student"):
            parameters = getattr(pair, role).unet.named_parameters() if callable(which) else \
                trainable_parameters(getattr(pair, role).unet, which).items()
            moved = {k: v for k, v in parameters if not callable(which) or which(v)}
            before[role] = {k: v.clone() for k, v in moved.items()}
            for v in moved.values():
                v += .3 * v.std() * torch.randn(v.shape, generator=g) if v.numel() > 1 else 0
        pair.text.row += .5 * torch.randn(pair.text.row.shape, generator=g)
    save_run(folder, pair, before, FLAGS, PROMPTS, rank)
    return Path(folder)


@pytest.mark.parametrize("part", ["", "teacher"])
def test_the_cards_lines_draw_what_sample_draws_with_weights_loaded_as_a_lora(tiny, part):
    run = taught(tiny, "kv")
    assert "load_lora_weights" in card_code(run / part) and "It holds all of it." in (run / part / "README.md").read_text()
    ours = run / part / "samples" / f"{slug(PROMPTS[0])}-seed0.png"
    picture, base = run_card(run / part)
    assert levels(picture, ours) <= 1 < levels(base, ours)
    sample_script.main(["--prompt", PROMPTS[0], "--run", str(run), "--base", "tiny", "--num_images", "1", "--output_dir", "drawn", *["--teacher"] * bool(part)])
    drawn, = Path("drawn").glob("*-seed0.png")
    assert levels(drawn, ours) == 0


def test_every_linear_and_convolution_loads_as_a_lora(tiny):
    run = taught(tiny, lambda v: v.dim() in (2, 4))
    assert len(load_file(run / "pytorch_lora_weights.safetensors")) == 3 * len(load_file(run / "unet_delta.safetensors"))
    assert "load_lora_weights" in card_code(run)
    picture, base = run_card(run)
    assert levels(picture, run / "samples" / f"{slug(PROMPTS[0])}-seed0.png") <= 1 < levels(base, picture)


@pytest.mark.parametrize("part", ["", "teacher"])
def test_what_no_lora_can_hold_is_loaded_exactly_and_the_card_says_what_is_left_out(tiny, part, capsys):
    run = taught(tiny, "all")
    left_out = json.loads((run / part / "config.json").read_text())["lora"]["left_out"]
    assert 0 < left_out < 1 and f"leaves out {left_out:.2%}" in capsys.readouterr().out
    assert f"leaves out {left_out:.2%}" in (run / part / "README.md").read_text() and "load_state_dict" in card_code(run / part)
    picture, base = run_card(run / part)
    assert levels(picture, run / part / "samples" / f"{slug(PROMPTS[0])}-seed0.png") <= 1 < levels(base, picture)


def test_the_embedded_pair_after_real_training_draws_the_same_in_diffusers(concept):
    os.symlink(ROOT / "data", "data")
    for which in ("kv", "all"):
        run = train("--max_train_steps", 2, "--echo_steps", 0, "--train_unet", which, "--student_lr", .003, "--teacher_lr", .003)
        for part in ("", "teacher"):
            picture, base = run_card(run / part)
            assert levels(picture, run / part / "samples" / "a-v-dog-seed0.png") <= 1 < levels(base, picture), (which, part)
        if which == "kv":
            picture, base = run_card(ROOT / "data/sd-turbo")  # the README's own example
            assert levels(picture, run / "samples/a-v-dog-on-the-beach-seed0.png") <= 1 < levels(base, picture)


def test_export_writes_the_same_run_again_and_truncates_the_lora_on_request(tiny, capsys):
    run = taught(tiny, "kv")
    capsys.readouterr()
    errors = []
    for rank in ("1", "4", None):
        sample_script.main(["--export", "copy", "--run", str(run), "--base", "tiny", *(["--rank", rank] if rank else [])])
        said = re.search(r"student: LoRA of (?:rank \d|full rank) leaves out (\S+)%", capsys.readouterr().out)
        errors.append(float(said[1]))
        lora = load_file("copy/pytorch_lora_weights.safetensors")
        assert not rank or {len(v) for k, v in lora.items() if ".lora_down." in k} == {int(rank)}
        for part in ("", "teacher/"):
            for name in ("unet_delta.safetensors", "learned_embeds.safetensors"):
                assert Path("copy", part + name).read_bytes() == (run / (part + name)).read_bytes()
    assert errors[0] > errors[1] > errors[2] == 0  # of the printed two decimals
    sample_script.main(["--prompt", PROMPTS[0], "--run", "copy", "--base", "tiny", "--num_images", "1"])


def test_the_printed_error_is_the_share_of_the_change_that_the_loras_product_misses():
    g = torch.Generator().manual_seed(0)
    before = {"a.weight": torch.randn(6, 5, generator=g), "b.weight": torch.randn(4, 3, 3, 3, generator=g), "b.bias": torch.randn(4, generator=g)}
    after = {k: v + torch.randn(v.shape, generator=g) for k, v in before.items()}
    lora, error = to_lora(before, after, 2)
    product = {f"{n}.weight": lora[f"lora_unet_{n}.alpha"] / 2 * (lora[f"lora_unet_{n}.lora_up.weight"].flatten(1) @ lora[f"lora_unet_{n}.lora_down.weight"].flatten(1)) for n in "ab"}
    missed = sum((after[k] - before[k] - product.get(k, torch.zeros(1)).view_as(v) if k in product else after[k] - before[k]).square().sum()
                 for k, v in before.items())
    assert abs(error - (missed / sum((after[k] - before[k]).square().sum() for k in before)).sqrt()) < 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 3, 3, 3), (8, 2, 1, 1)])
def test_full_rank_factors_give_the_change_back_bit_for_bit(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(delta)
    assert torch.equal((up.flatten(1) @ down.flatten(1)).view(shape), delta)
    assert up.shape == (shape[0], len(down), *[1] * (len(shape) - 2)) and down.shape[1:] == shape[1:]


# What ComfyUI's key map (comfy/lora.py, model_lora_keys_unet) accepts for SD 1 and 2: "lora_unet_" and the diffusers name of a
# weight without ".weight", "." written "_". The 16 cross-attention layers of that UNet, by hand:
COMFYUI = [f"lora_unet_{block}_transformer_blocks_0_attn2_to_{x}" for x in "kv" for block in (
    "down_blocks_0_attentions_0", "down_blocks_0_attentions_1", "down_blocks_1_attentions_0", "down_blocks_1_attentions_1",
    "down_blocks_2_attentions_0", "down_blocks_2_attentions_1", "mid_block_attentions_0",
    "up_blocks_1_attentions_0", "up_blocks_1_attentions_1", "up_blocks_1_attentions_2",
    "up_blocks_2_attentions_0", "up_blocks_2_attentions_1", "up_blocks_2_attentions_2",
    "up_blocks_3_attentions_0", "up_blocks_3_attentions_1", "up_blocks_3_attentions_2")]


def tiny_weights(base, role):
    return load_file(base / role / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("part", ["", "teacher"])
def test_lora_keys_are_those_of_comfyuis_key_map(tiny, part):
    lora = load_file(taught(tiny, "kv") / part / "pytorch_lora_weights.safetensors")
    assert set(lora) == {f"{k}.{end}" for k in COMFYUI for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    change = {k: v - tiny_weights(tiny, part or "student")[k] for k, v in load_file(Path("out/tiny", part, "unet_delta.safetensors")).items()}
    for name, delta in change.items():  # ComfyUI adds alpha / rank * up @ down
        up, down, alpha = (lora[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        torch.testing.assert_close(alpha / len(down) * up @ down, delta, rtol=1e-5, atol=1e-6)


def test_files_have_names_modes_and_forms_that_every_system_reads(tiny):
    run = taught(tiny, "kv")
    files = [p for p in run.rglob("*") if p.is_file()]
    forms = {p.suffix for p in files}
    assert forms == {".safetensors", ".json", ".md", ".png"}
    umask = os.umask(0)
    os.umask(umask)
    for p in files:
        assert not set(p.name) & set('<>:"\\|?*') and p.name.isascii()
        assert stat.S_IMODE(p.stat().st_mode) == 0o666 & ~umask
    for part in ("", "teacher"):
        (token, row), = load_file(run / part / "learned_embeds.safetensors").items()
        assert token == "<v>" and row.shape == (1, 128)
        assert (run / part / "samples" / "grid.png").is_file() and "samples/grid.png" in (run / part / "README.md").read_text()
