"""The real pair's path, by structure: tiny random pipelines of the exact classes. python -m pytest tests/test_sd.py"""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import sample as sample_script
import train as train_script
from conftest import ROOT, exit_of, other_precision, train
from data.benchmark import full_size
from data.base import fetch, find_base, free_memory, load_encoders, load_pair, load_tokenizer

UNET = dict(full_size.UNET, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=32)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=800, max_position_embeddings=77,
            projection_dim=32, bos_token_id=798, eos_token_id=799)
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SMALL = dict(
    teacher_unet=dict(UNET, sample_size=24, attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True),
    student_unet=dict(UNET, sample_size=16, attention_head_dim=[2, 4], use_linear_projection=True),
    text_encoder=dict(full_size.OPENCLIP, **TEXT), teacher_type="v_prediction", tokens=(4, 24),
    vae=dict(full_size.ENCODERS["vae"], block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
             up_block_types=["UpDecoderBlock2D"] * 2, sample_size=32),
    tiny_vae=dict(full_size.ENCODERS["tiny_vae"], encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], num_encoder_blocks=[1, 1],
                  num_decoder_blocks=[1, 1]),
    dino=dict(full_size.ENCODERS["dino"], **VIT, intermediate_size=64, image_size=32, patch_size=16),
    dinov2=dict(full_size.ENCODERS["dinov2"], **VIT, image_size=42, patch_size=14),
    clip=dict(model_type="clip", projection_dim=32, text_config=dict(full_size.OPENCLIP, **TEXT),
              vision_config=dict(full_size.ENCODERS["clip"]["vision_config"], **VIT, intermediate_size=64, image_size=28, projection_dim=32)))
SD15 = dict(SMALL, teacher_unet=dict(UNET, sample_size=16, attention_head_dim=2), student_unet=dict(UNET, sample_size=16, attention_head_dim=2),
            text_encoder=dict(full_size.CLIP_L, **TEXT), teacher_type="epsilon")
TINY_KL = dict(SMALL, vae=SMALL["tiny_vae"])
FAMILIES = {"sd2": SMALL, "sd15": SD15, "tiny": TINY_KL}
SHORT = ("--max_train_steps", 3, "--echo_steps", 3, "--echo_samples", 8, "--checkpointing_steps", 100, "--dinov2_size", 42)


def write_weights(folder):
    """Give every config of a base folder random weights, by the classes' own save_pretrained."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, Dinov2Model, ViTModel
    kinds = {c.__name__: c for c in (AutoencoderKL, AutoencoderTiny, UNet2DConditionModel)}
    ours = {"vit": ViTModel, "dinov2": Dinov2Model, "clip": CLIPModel, "clip_text_model": CLIPTextModel}
    torch.manual_seed(0)
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text())
        kind = kinds.get(config.get("_class_name")) or ours[config["model_type"]]
        network = kind.from_config(config) if "_class_name" in config else kind(kind.config_class(**config))
        with torch.no_grad():
            for p in network.parameters():  # zero-initialised layers would hide what they lead to
                p.add_(.02 * torch.randn_like(p))
        network.save_pretrained(path.parent)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """{family: base folder with random weights}."""
    found = {}
    for name, sizes in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        full_size.write_base(found[name], sizes)
        write_weights(found[name])
    return found


@pytest.fixture
def base(bases, tmp_path):
    """A private copy of the SD2-style base."""
    return Path(shutil.copytree(bases["sd2"], tmp_path / "base"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family, flags", [
    ("sd2", ()), ("sd2", ("--tiny_vae", "--gradient_checkpointing", "--size_augmentation")), ("sd2", ("--recipe", ROOT / "data/sd-turbo/paper.toml", "--echo_steps", 3)),
    ("sd15", ()), ("tiny", ("--crop", "pad"))], ids=str)
def test_both_stages_run_and_move_the_right_parameters(family, flags, bases, concept):
    run = train("--base", bases[family], *SHORT, *flags)
    pair = load_pair(bases[family], "<v>", "dog")
    assert pair.teacher.prediction_type == ("epsilon" if family == "sd15" else "v_prediction") and pair.student.prediction_type == "epsilon"
    assert pair.resolution == 32 and pair.latent_shape == (4, 16, 16)
    for folder, denoiser in ((run, pair.student), (run / "teacher", pair.teacher)):
        delta, weights = load_file(folder / "unet_delta.safetensors"), denoiser.unet.state_dict()
        assert delta.keys() == {k for k in weights if ".attn2.to_k." in k or ".attn2.to_v." in k}
        assert all(v.isfinite().all() and not torch.equal(v, weights[k]) for k, v in delta.items())
    row = load_file(run / "learned_embeds.safetensors")["<v>"]
    assert row.shape == (1, 32) and not torch.equal(row, pair.text.row)
    log = json.loads((run / "log.json").read_text())
    student, teacher = {"alignment", "adversarial", "critic"}, {"reconstruction"}
    assert [row.keys() - {"step"} for row in log] == [teacher | student] * 3 + [teacher | {"echo"}] * 3 + [student] * 3
    flags = json.loads((run / "config.json").read_text())["flags"]
    again = train_script.parse_arguments([x for k, v in flags.items() if v is not None
                                          for x in ([f"--{'' if v else 'no-'}{k}"] if isinstance(v, bool) else [f"--{k}", str(v)])])
    assert {k: v for k, v in vars(again).items() if k in flags} == flags


def test_sampling_a_real_style_run_works_with_either_decoder(bases, concept):
    train("--base", bases["sd2"], *SHORT, "--echo_steps", 0)
    for name, flags in (("full", ()), ("tiny", ("--tiny_vae",)), ("four", ("--steps", "4")), ("teacher", ("--teacher", "--steps", "3"))):
        sample_script.main(["--prompt", "a <v> dog", "--num_images", "2", "--output_dir", name, "--run", "out/dog", "--base", str(bases["sd2"]), *flags])
    pictures = [p.read_bytes() for p in Path().glob("*/a-v-dog*seed*.png")]
    assert len(pictures) == len(set(pictures)) == 8


def test_a_plain_diffusers_pipeline_draws_what_sample_draws(bases, concept):
    from diffusers import StableDiffusionPipeline
    run = train("--base", bases["sd2"], *SHORT, "--echo_steps", 0, "--student_lr", .01)
    sample_script.main(["--prompt", "a <v> dog", "--num_images", "1", "--run", str(run), "--base", str(bases["sd2"])])
    pair = load_pair(bases["sd2"], "<unused>", "dog")
    tokenizer = load_tokenizer(bases["sd2"] / "teacher")
    from transformers import CLIPTextModel
    pipe = StableDiffusionPipeline(pair.vae, CLIPTextModel.from_pretrained(bases["sd2"] / "teacher/text_encoder"), tokenizer, pair.student.unet,
                                   pair.student.scheduler, None, None)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = dict(num_inference_steps=1, guidance_scale=0.0, latents=noise)
    before = np.asarray(pipe("a dog", **call).images[0]).astype(int)
    pipe.load_textual_inversion(str(run / "learned_embeds.safetensors"), token="<v>")
    pipe.unet.load_state_dict(load_file(run / "unet_delta.safetensors"), strict=False)
    after = np.asarray(pipe("a <v> dog", **call).images[0]).astype(int)
    ours = np.asarray(Image.open(run / "samples/a-v-dog-seed0.png")).astype(int)
    assert np.abs(ours - after).max() <= 1 < np.abs(before - after).max()


@pytest.mark.parametrize("flags", [
    ("--tiny_vae",), ("--crop", "pad"), ("--resolution", 48), ("--dinov2_size", 28), ("--recipe", ROOT / "data/sd-turbo/paper.toml", "--mixed_precision", "bf16"),
    ("--mixed_precision", other_precision())], ids=str)
def test_every_flag_of_the_real_pair_is_read(flags, bases, concept, reference):
    widen(concept)
    run = train("--base", bases["sd2"], "--dinov2_size", 42, "--max_train_steps", 2, "--echo_steps", 0, "--no-size_augmentation",
                "--scene_prompts", 0, *flags)
    changed = load_file(run / "unet_delta.safetensors")
    assert any(not torch.equal(v, reference[k]) for k, v in changed.items()), f"{flags} changed nothing"


def widen(folder):
    from PIL import Image
    for path in folder.glob("*.png"):
        Image.open(path).resize((80, 40)).save(path)


@pytest.fixture(scope="module")
def reference(bases, tmp_path_factory):
    import os

    from conftest import ROOT
    here, folder = os.getcwd(), tmp_path_factory.mktemp("reference")
    shutil.copytree(ROOT / "data" / "dog", folder / "dog")
    os.chdir(folder)
    try:
        widen(folder / "dog")
        run = train("--base", bases["sd2"], "--dinov2_size", 42, "--max_train_steps", 2, "--echo_steps", 0, "--no-size_augmentation",
                    "--scene_prompts", 0)
        return load_file(run / "unet_delta.safetensors")
    finally:
        os.chdir(here)


def test_checkpointing_and_compiling_save_memory_and_time_but_change_no_gradient(bases, monkeypatch):
    pair, encoders = load_pair(bases["sd2"], "<v>", "dog"), load_encoders(bases["sd2"], flags={"dinov2_size": 42})
    x = torch.rand(1, 3, 32, 32) * 2 - 1

    def gradients():
        z = torch.ones(1, *pair.latent_shape, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            image = pair.decode(pair.student.one_step(z, pair.text(["a <v> dog"])))
            loss = sum(e.features(image).square().mean() for e in encoders.values())
        return torch.autograd.grad(loss, z)[0], sum(kept)

    before, much = gradients()
    model.save_memory(pair, encoders)
    after, little = gradients()
    assert torch.allclose(before, after, atol=1e-6 * before.abs().max()) and little < much / 2
    names, asked = set(pair.student.unet.state_dict()), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    model.compile_networks(pair.student.unet, pair.vae.decoder, None)
    assert asked == ["UNet2DConditionModel", "Decoder"] and set(pair.student.unet.state_dict()) == names


def test_frozen_weights_in_bf16_train_like_those_in_fp32(bases):
    """What a GPU does: frozen parts stored in bf16, trained ones in fp32, all under autocast."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        pair = load_pair(bases["sd2"], "<v>", "dog", dtype=dtype)
        encoders = load_encoders(bases["sd2"], flags={"dinov2_size": 42}, dtype=dtype)
        moved = model.trainable_parameters(pair.student.unet, "kv")
        assert pair.text.row.dtype == torch.float32 and all(p.dtype == torch.float32 for p in moved.values())
        assert pair.vae.dtype == dtype and next(encoders["dinov2"].parameters()).dtype == dtype
        for p in moved.values():
            p.requires_grad_(True)
        noise = torch.randn(2, *pair.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            x = pair.decode(pair.student.one_step(noise, pair.text(["a <v> dog"] * 2)))
            loss = sum(e.features(x).square().mean() for e in encoders.values())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in moved.values()] + [pair.text.row.grad.flatten()]))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > .95


def test_encoders_see_images_in_their_own_size_and_normalisation(bases):
    encoders = load_encoders(bases["sd2"], flags={"dinov2_size": 28})
    assert set(encoders) == {"dino", "dinov2", "clip", "identity"} and not encoders["clip"].has_critic
    x = torch.rand(2, 3, 50, 50) * 2 - 1
    for name, size in (("dino", 32), ("dinov2", 28), ("clip", 28)):
        seen, mean, std = encoders[name].prepare(x), *(torch.tensor(v).view(3, 1, 1) for v in ([.48, .46, .41], [.27, .26, .28]))
        small = torch.nn.functional.interpolate((x + 1) / 2, size=(size, size), mode="bicubic", antialias=True)
        assert seen.shape == (2, 3, size, size) and torch.allclose(seen, (small - mean) / std, atol=1e-5)
    maps = encoders["identity"].layers(x)
    assert [m.shape for m in maps] == [(2, encoders["clip"].width, 2, 2)] * 4, "patches of 14 in 28 px, without the class token"
    assert not torch.equal(maps[0], maps[3])
    raw = load_encoders(bases["sd2"], flags={"raw_images": True, "dinov2_size": 42})
    y = torch.rand(1, 3, 42, 42) * 2 - 1
    assert torch.equal(raw["dinov2"].prepare(y), y)


def test_identity_tokens_are_those_of_diffusers_ip_adapter(bases):
    from diffusers.models.embeddings import ImageProjection
    encoders, weights = load_encoders(bases["sd2"]), load_file(bases["sd2"] / "encoders/ip_adapter.safetensors")
    theirs = ImageProjection(image_embed_dim=32, cross_attention_dim=24, num_image_text_embeds=4)
    theirs.load_state_dict({k.replace("image_proj.", "").replace("proj.", "image_embeds.", 1) if "proj.proj" in k else k.replace("image_proj.", ""): v
                            for k, v in weights.items()})
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    e = encoders["identity"]
    with torch.no_grad():
        features = e.features(x)
        assert torch.allclose(e.tokens(features), theirs(encoders["clip"].features(x)), atol=1e-5) and e.width == features.shape[1] == 96
    cosine = torch.nn.functional.cosine_similarity(e.tokens(features)[:1], e.tokens(features), dim=2).mean(1)
    assert torch.allclose(e.embed(features)[:1] @ e.embed(features).T, cosine[None], atol=1e-6)


def test_half_size_files_are_taken_and_pickles_are_not(base, capsys):
    weights = base / "student/unet/diffusion_pytorch_model.safetensors"
    half = {k: (v * 2).half() for k, v in load_file(weights).items()}
    save_file(half, base / "student/unet/diffusion_pytorch_model.fp16.safetensors")
    unet = load_pair(base, "<v>", "dog").student.unet
    assert torch.equal(unet.conv_in.weight, half["conv_in.weight"].float())
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        (base / "student/unet" / name).unlink()
    torch.save({}, base / "student/unet/diffusion_pytorch_model.bin")
    code, said = exit_of(lambda argv: load_pair(base, "<v>", "dog"), [], capsys)
    assert code == 2 and "safetensors" in said and "student" in said


@pytest.mark.parametrize("written", ["kohya", "diffusers"])
def test_a_fused_adapter_adds_its_product_to_the_weights(written, base):
    unet = load_pair(base, "<v>", "dog").student.unet
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    conv_up, conv_down = torch.randn(8, 2, 1, 1), torch.randn(2, 4, 3, 3)
    if written == "kohya":
        keys = {"lora_unet_" + name.replace(".", "_"): (up, down, 1.), "lora_unet_conv_in": (conv_up, conv_down, 4.)}
        adapter = {f"{k}.{part}": v for k, (u, d, a) in keys.items() for part, v in
                   (("lora_up.weight", u), ("lora_down.weight", d), ("alpha", torch.tensor(a)))}
        scale = .5, 2.
    else:
        adapter = {f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_A.weight": down, "unet.conv_in.lora.up.weight": conv_up,
                   "unet.conv_in.lora.down.weight": conv_down}
        scale = 1., 1.
    save_file(adapter, base / "student/adapter.safetensors")
    edit(base / "base.json", student_lora=str(base / "student/adapter.safetensors"))
    fused, layer = load_pair(base, "<v>", "dog").student.unet, unet.get_submodule(name)
    assert torch.allclose(fused.get_submodule(name).weight, layer.weight + scale[0] * up @ down, atol=1e-5)
    product = torch.einsum("or,rikl->oikl", conv_up[:, :, 0, 0], conv_down)
    assert torch.allclose(fused.conv_in.weight, unet.conv_in.weight + scale[1] * product, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(base, capsys):
    save_file({"lora_unet_elsewhere.lora_up.weight": torch.ones(2, 2)}, base / "other.safetensors")
    edit(base / "base.json", student_lora=str(base / "other.safetensors"))
    code, said = exit_of(lambda argv: load_pair(base, "<v>", "dog"), [], capsys)
    assert code == 2 and "elsewhere" in said and "other.safetensors" in said


@pytest.mark.parametrize("file, changes, named", [
    ("student/text_encoder/config.json", {"hidden_size": 48}, "text encoders"), ("student/vae/config.json", {"scaling_factor": .13}, "autoencoders"),
    ("student/vae/config.json", {"latent_channels": 8}, "latent_channels"), ("student/unet/config.json", {"cross_attention_dim": 48}, "UNets"),
    ("teacher/text_encoder/config.json", {"hidden_size": 48}, "48"), ("student/tokenizer/vocab.json", {"another": 800}, "tokenizers")])
def test_a_pair_that_does_not_match_is_refused_before_any_weight(file, changes, named, base, concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    if file.startswith("teacher/text"):
        shutil.rmtree(base / "student/text_encoder")
    edit(base / file, **changes)
    code, said = exit_of(train_script.main, ["--concept", "dog", "--base", base], capsys)
    assert code == 2 and named in said and str(base) in said


def test_a_student_may_bring_its_unet_and_scheduler_only(base, concept):
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(base / "student" / part)
    assert train_script.parse_arguments(["--concept", "dog", "--base", str(base)]).base == str(base)


def test_teacher_and_student_replace_those_of_the_base(bases):
    found = find_base("sd-turbo", {"teacher": "a", "student": "b"})
    assert (found.teacher, found.student) == ("a", "b") and found.tiny_vae.startswith("madebyollin/taesd@")
    assert find_base("hyper-sd15").student_lora and find_base("hyper-sd15", {"student": "b"}).student_lora is None
    pair = load_pair(bases["sd2"], "<v>", "dog", "cpu", {"student": str(bases["sd2"] / "teacher"), "resolution": 64})
    assert pair.student.prediction_type == "v_prediction" and pair.latent_shape == (4, 32, 32)
    assert pair.student.scheduler.config.timestep_spacing == "trailing"


def test_a_preset_alone_makes_the_second_family(bases, concept, monkeypatch):
    """--base hyper-sd15 with its hub repositories answered by local folders: an SD1.5 UNet and an adapter become the student."""
    unet = load_pair(bases["sd15"], "<v>", "dog").teacher.unet
    lora = {"lora_unet_conv_in.lora_up.weight": torch.ones(8, 1, 1, 1), "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}
    Path("hub").mkdir()
    save_file(lora, "hub/Hyper-SD15-1step-lora.safetensors")
    encoders = bases["sd15"] / "encoders"
    hub = {"stable-diffusion-v1-5/stable-diffusion-v1-5": bases["sd15"] / "teacher", "ByteDance/Hyper-SD": Path("hub"), "facebook/dinov2-large": encoders / "dinov2",
           "facebook/dino-vits16": encoders / "dino", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": encoders / "clip", "madebyollin/taesd": bases["sd15"] / "tiny_vae"}
    asked = []

    def download(repo, name, revision=None, dry_run=False):
        asked.append((repo, revision))
        path = encoders / "ip_adapter.safetensors" if repo == "h94/IP-Adapter" else hub[repo] / name
        if not path.is_file():
            raise errors.EntryNotFoundError(name)
        return SimpleNamespace(will_download=False) if dry_run else str(path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    run = train("--base", "hyper-sd15", *SHORT, "--tiny_vae")
    assert "weight_name='Hyper-SD15-1step-lora.safetensors'" in (run / "README.md").read_text().replace('"', "'")
    assert ("facebook/dino-vits16", "a7a4d161f5c0bd70478c05ca5777ec7cd8848021") in asked and None not in [revision for _, revision in asked]
    assert "revision='bc08d970" in (run / "README.md").read_text().replace('"', "'")
    pair = load_pair("hyper-sd15", "<v>", "dog")
    assert pair.student.prediction_type == pair.teacher.prediction_type == "epsilon"
    assert torch.allclose(pair.student.unet.conv_in.weight, unet.conv_in.weight + 1) and torch.equal(pair.teacher.unet.conv_in.weight, unet.conv_in.weight)
    assert pair.student.scheduler.config.timestep_spacing == "trailing"


def response(code):
    return SimpleNamespace(status_code=code, headers={}, request=None)


@pytest.mark.parametrize("error, said", [
    (errors.RepositoryNotFoundError("x", response=response(404)), "mirror"), (errors.GatedRepoError("x", response=response(403)), "hf auth login"),
    (errors.LocalEntryNotFoundError("x"), "cannot be reached"), (errors.RevisionNotFoundError("x", response=response(404)), "revision"),
    (errors.HFValidationError("x"), "neither a folder"), (type("ReadError", (Exception,), {})("reset by peer"), "run the same command again"),
    (errors.RemoteEntryNotFoundError("x", response=response(404)), "holds no"),
    (errors.HfHubHTTPError("503 Service Unavailable", response=response(503)), "503")], ids=lambda v: type(v).__name__)
def test_trouble_with_the_hub_is_one_sentence(error, said, concept, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise error
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    code, line = exit_of(train_script.main, ["--concept", "dog", "--base", "sd-turbo"], capsys)
    assert code == 2 and said in line and "stable-diffusion-2-1" in line and "Traceback" not in line


def test_a_missing_optional_file_is_none_and_a_folder_is_named(base, capsys):
    assert fetch(base, "nothing.json", needed=False) is None
    code, line = exit_of(lambda argv: fetch(base, "nothing.json"), [], capsys)
    assert code == 2 and "nothing.json" in line


def test_too_little_memory_is_said_before_loading(bases, concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    monkeypatch.setattr("data.base.free_memory", lambda device: 1000)
    code, line = exit_of(train_script.main, ["--concept", "dog", "--base", bases["sd2"]], capsys)
    assert code == 2 and re.search(r"take [\d.]+ GB.* has 0.0 GB free", line)


def test_what_an_earlier_run_left_on_a_gpu_does_not_count_as_taken(monkeypatch):
    held = [8]
    monkeypatch.setattr("torch.cuda.empty_cache", held.clear)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (24 - sum(held), 24))
    assert free_memory("cuda") == 24


def test_a_folder_is_trained_as_its_autoencoder_or_its_base_json_says(base, concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a: pytest.fail("a model was loaded first"))
    (base / "base.json").unlink()
    found, embedded = find_base(base), find_base(ROOT / "data/emoji/base")
    assert (found.recipe.parent.name, found.prompts) == ("sd-turbo", "photo") and (embedded.recipe.parent.name, embedded.prompts) == ("emoji", "emoji")
    for text, said in (("{", "base.json is damaged"), ("[1]", "base.json is no table"), ('{"teachers": "a"}', "base.json is no table"),
                       ('{"recipe": "sdxl"}', "recipe is 'sdxl'"), ('{"prompts": "photos"}', "prompts is 'photos'"), ('{"prompts": []}', "prompts is []"),
                       ('{"student_lora": "hyper.safetensors"}', "student_lora is 'hyper.safetensors'"), ('{"encoders": {"clip": "a/b"}}', "dino, dinov2, clip"),
                       ('{"encoders": {"dino": "a/b", "dinov2": "a/b", "clip": "a/b", "ip_adapter": "adapter.bin"}}', "ip_adapter is 'adapter.bin'"),
                       ('{"encoders": "nowhere"}', "encoders is neither a folder")):
        (base / "base.json").write_text(text)
        code, line = exit_of(train_script.main, ["--concept", "dog", "--base", base], capsys)
        assert code == 2 and said in line
    (base / "base.json").write_text('{"recipe": "hyper-sd15"}')
    assert (find_base(base).recipe.parent.name, find_base(base).prompts) == ("hyper-sd15", "photo")
    shutil.rmtree(base / "encoders/dino")
    code, line = exit_of(train_script.main, ["--concept", "dog", "--base", base], capsys)
    assert code == 2 and "encoders/dino is neither a folder here" in line


def test_large_pictures_are_decoded_a_few_at_a_time_unless_gradients_pass(bases, monkeypatch):
    pair, seen = load_pair(bases["sd2"], "<v>", "dog"), []
    decode, z = pair.vae.decode, torch.randn(5, *pair.latent_shape)
    monkeypatch.setattr(pair.vae, "decode", lambda z: seen.append(len(z)) or decode(z))
    whole = pair.decode(z)
    pair.resolution = 512
    with torch.no_grad():
        parts = pair.decode(z)
    assert seen == [5, 2, 2, 1] and torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("flags, named", [(("--resolution", "40"), "--resolution"), (("--dinov2_size", "100"), "--dinov2_size"),
                                          (("--teacher", "nowhere/at/all"), "nowhere"), (("--student", "dog"), "dog")])
def test_bad_flags_of_the_real_pair_are_refused(flags, named, base, concept, capsys):
    edit(base / "student/unet/config.json", block_out_channels=[8, 16, 16, 16])
    code, line = exit_of(train_script.main, ["--concept", "dog", "--base", base, *flags], capsys)
    assert code == 2 and named in line


def test_tiny_vae_without_one_is_refused(concept, capsys):
    code, line = exit_of(train_script.main, ["--concept", "dog", "--tiny_vae"], capsys)
    assert code == 2 and "--tiny_vae" in line
