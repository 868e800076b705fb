"""The real pair with the files that its repositories really hold (tests/hub.py). python -m pytest tests/test_hub.py"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hub
import sample as sample_script
import train as train_script
from conftest import exit_of, train
from data.base import announce_download, fetch, find_base, load_pair, load_tokenizer
from data.benchmark import full_size
from test_export import card_code
from test_sd import SMALL, write_weights

SHORT = ("--class_word", "corgi", "--max_train_steps", 2, "--echo_steps", 1, "--echo_samples", 4, "--dinov2_size", 42, "--mixed_precision", "no")
OPTIONAL = "tokenizer/tokenizer.json"  # no repository of the pair has it


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory):
    """teacher/ and student/ as downloaded: fp16 variants only, no tokenizer.json, a padding word that differs between its files."""
    folder = tmp_path_factory.mktemp("pair")
    hub.write_pipeline(folder / "teacher", hub.SD21)
    hub.write_pipeline(folder / "student", hub.TURBO)
    return folder


@pytest.fixture(scope="session")
def cache(pair_folders, tmp_path_factory):
    """A hub cache that holds every repository of --base sd-turbo, with no marker of files that they never had."""
    sizes, cache = tmp_path_factory.mktemp("encoders"), tmp_path_factory.mktemp("hub")
    clip = SMALL["clip"] | {"text_config": SMALL["clip"]["text_config"] | {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2}}
    full_size.write_base(sizes, SMALL | {"clip": clip})
    for part in ("teacher", "student"):
        shutil.rmtree(sizes / part)
    write_weights(sizes)
    base = find_base("sd-turbo")
    for source, folder in ((base.teacher, pair_folders / "teacher"), (base.student, pair_folders / "student"), (base.tiny_vae, sizes / "tiny_vae"),
                           *((base.encoders[k], sizes / "encoders" / k) for k in ("dino", "dinov2", "clip"))):
        hub.into_cache(folder, cache, source)
    (sizes / "adapter" / "models").mkdir(parents=True)
    weights = load_file(sizes / "encoders" / "ip_adapter.safetensors")
    save_file(weights | {"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, sizes / "adapter" / "models" / "ip-adapter_sd15.safetensors")
    hub.into_cache(sizes / "adapter", cache, base.encoders["ip_adapter"].removesuffix("/models/ip-adapter_sd15.safetensors"))
    return cache


@pytest.fixture(autouse=True)
def no_preview(monkeypatch):
    monkeypatch.setattr(train_script, "preview", lambda *a: None)


@pytest.fixture
def offline(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_pair_is_taken_as_its_files_are(pair_folders):
    """SD2.1's autoencoder writes no scaling_factor, and its text config has token ids that are wrong for the tokenizer."""
    pair = load_pair("sd-turbo", "<v>", "corgi", flags={part: str(pair_folders / part) for part in ("teacher", "student")})
    assert pair.vae.config.scaling_factor == .18215 and pair.resolution == 64 and pair.latent_shape == (4, 8, 8)
    assert pair.teacher.prediction_type == "v_prediction" and pair.student.prediction_type == "epsilon"
    assert pair.student.scheduler.config.timestep_spacing == "trailing"
    told = load_file(pair_folders / "teacher/vae/diffusion_pytorch_model.fp16.safetensors")
    attention = pair.vae.encoder.mid_block.attentions[0]
    for name, ours in (("query", attention.to_q), ("key", attention.to_k), ("value", attention.to_v), ("proj_attn", attention.to_out[0])):
        assert torch.equal(ours.weight, told[f"encoder.mid_block.attentions.0.{name}.weight"].float()), f"{name}, as files of 2022 call it"
    told = load_file(pair_folders / "teacher/text_encoder/model.fp16.safetensors")
    assert torch.equal(pair.text.encoder.get_input_embeddings().weight[:49408], told["text_model.embeddings.token_embedding.weight"].float())


def test_words_rows_and_long_prompts_are_those_of_the_real_vocabulary(pair_folders):
    tokenizer, table = load_tokenizer(pair_folders / "teacher"), load_file(pair_folders / "teacher/text_encoder/model.fp16.safetensors")
    table = table["text_model.embeddings.token_embedding.weight"].float()
    assert len(tokenizer) == 49408 and tokenizer("a photo of a dog").input_ids == [49406, 320, 1125, 539, 320, 1929, 49407]
    assert tokenizer.pad_token == "!", "of the two files, the one by which the model was trained"
    flags = {part: str(pair_folders / part) for part in ("teacher", "student")}
    for word, ids in (("corgi", [31320]), ("french bulldog", tokenizer("french bulldog", add_special_tokens=False).input_ids)):
        pair = load_pair("sd-turbo", "<v>", word, flags=flags)
        assert torch.allclose(pair.text.row, table[ids].mean(0, keepdim=True)) and pair.text.token_id == 49408
    long = "a photo of a <v> dog " + "on a very large and quite wonderful beach " * 20
    with torch.no_grad():
        context = pair.text([long, "a <v>"])
        pair.text.row.neg_()
        moved = pair.text([long, "a <v>"])
    assert context.shape == (2, 77, 32) and len(tokenizer(long).input_ids) > 77 and (moved - context).abs().amax((1, 2)).min() > .1


def test_a_complete_cache_trains_and_samples_without_a_network(offline, concept):
    """Asking the offline cache for a file that the repository never had raises what an unknown repository raises."""
    assert fetch("stabilityai/sd-turbo", OPTIONAL, needed=False) is None
    run = train("--base", "sd-turbo", *SHORT)
    assert load_file(run / "unet_delta.safetensors")
    sample_script.main(["--prompt", "a <v> corgi", "--num_images", "1"])
    assert list((run / "samples").glob("a-v-corgi-seed0.png"))


def test_an_incomplete_cache_names_the_file_and_the_mend(offline, concept, cache, tmp_path, monkeypatch, capsys):
    part = tmp_path / "part"
    shutil.copytree(cache, part)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(part))
    code, said = exit_of(lambda argv: fetch("stabilityai/sd-turbo", "unet/other.json"), [], capsys)
    assert code == 2 and "unet/other.json is not in the local cache" in said and "connect once" in said
    for file in part.glob("models--stabilityai*/snapshots/*/unet/*.safetensors"):
        file.unlink()
    code, said = exit_of(train_script.main, ["--concept", "dog", "--base", "sd-turbo", *SHORT], capsys)
    assert code == 2 and f"{find_base('sd-turbo').student} holds no diffusion_pytorch_model.safetensors in unet/" in said
    shutil.rmtree(next(part.glob("models--stabilityai*")))
    code, said = exit_of(train_script.main, ["--concept", "dog", "--base", "sd-turbo", *SHORT], capsys)
    assert code == 2 and f"{find_base('sd-turbo').student} is not in the local cache and the hub cannot be reached" in said


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "fresh"))
    return tmp_path / "fresh"


def test_a_first_run_says_what_it_downloads_and_a_second_needs_no_network(cache, elsewhere, concept, monkeypatch, capsys):
    """With huggingface_hub's own client and cache, against a hub on this machine."""
    with hub.serve(cache, monkeypatch) as sent:
        train("--base", "sd-turbo", *SHORT, "--echo_steps", 0)
        said = capsys.readouterr().out
        line = next(line for line in said.splitlines() if line.startswith("downloading"))
        base = find_base("sd-turbo")
        assert str(elsewhere) in line and " GB, once" in line and all(r.partition("@")[0] in line for r in (base.teacher, base.student, *base.encoders.values()))
        assert "h94/IP-Adapter" in line and "Open RAIL++-M" in said and "Stability AI Community License" in said and "taesd" not in line
        assert len(sent) == len(set(sent)) and not any(name.endswith(".bin") for name in sent)
        sizes = [f for f in elsewhere.rglob("*.safetensors")]
        assert f"downloading {sum(f.stat().st_size for f in sizes) / 1e9:.1f} GB" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    train("--base", "sd-turbo", *SHORT, "--echo_steps", 0)
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("roles", [{"student"}, {"teacher"}, {"teacher", "student"}])
def test_a_drawing_fetches_only_the_networks_that_it_draws_with(roles, monkeypatch):
    asked, base = [], find_base("sd-turbo")
    monkeypatch.setattr("data.base.fetch", lambda source, name, **more: asked.append((source, name)))
    announce_download("sd-turbo", {}, encoders=False, roles=roles)
    assert {source for source, name in asked if name.startswith("unet/")} == {getattr(base, role) for role in roles}
    assert (base.teacher, "vae/diffusion_pytorch_model.safetensors") in asked
    announce_download("hyper-sd15", {}, encoders=False, roles=roles)
    assert any("1step-lora" in name for _, name in asked) == ("student" in roles)


@pytest.mark.parametrize("status, code, said", [(403, "GatedRepo", "accept its licence on its hub page and log in"),
                                                (404, "RepoNotFound", "withdrawn, renamed or private")])
def test_what_the_hub_refuses_is_one_sentence_before_anything_is_loaded(status, code, said, cache, elsewhere, concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a, **k: pytest.fail("a model was loaded first"))
    with hub.serve(cache, monkeypatch, {"facebook/dinov2-large": (status, code)}):
        exit_code, line = exit_of(train_script.main, ["--concept", "dog", "--base", "sd-turbo", *SHORT], capsys)
    assert exit_code == 2 and "facebook/dinov2-large" in line and said in line


def test_too_small_a_disk_is_said_before_the_download(cache, elsewhere, concept, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a, **k: pytest.fail("a model was loaded first"))
    monkeypatch.setattr("data.base.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with hub.serve(cache, monkeypatch) as sent:
        code, line = exit_of(train_script.main, ["--concept", "dog", "--base", "sd-turbo", *SHORT], capsys)
    assert code == 2 and "0.0 GB free" in line and "HF_HOME" in line and not any(name.endswith(".safetensors") for name in sent)


def test_a_revision_can_be_named(offline, capsys):
    pinned = find_base("sd-turbo").student
    assert len(pinned.partition("@")[2]) == 40
    assert fetch(pinned, OPTIONAL, needed=False) is None
    assert fetch(pinned, "unet/config.json").is_file()
    code, said = exit_of(lambda argv: fetch("stabilityai/sd-turbo@" + "4" * 40, "unet/config.json"), [], capsys)
    assert code == 2 and "4444 is not in the local cache" in said


def adapter(folder):
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(8, 1, 1, 1)}, folder / "pytorch_lora_weights.safetensors")


def half(folder):
    shutil.rmtree(folder / "scheduler")


def other(part, **changes):
    def write(folder):
        path = folder / part / "config.json"
        hub.write_json(path, hub.SD21[part] | changes)
    return write


def only_adapter(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    adapter(folder)


BAD = [(half, "holds no scheduler/scheduler_config.json"), (only_adapter, "holds a LoRA, not a model"),
       (other("unet", addition_embed_type="text_time", cross_attention_dim=64), "SDXL"), (other("unet", in_channels=9), "9 channels"),
       (other("unet", cross_attention_dim=24), "cross_attention_dim is 32 and 24"), (other("text_encoder", num_hidden_layers=3), "text encoders"),
       (other("vae", scaling_factor=.13025), "scaling_factor is 0.18215 and 0.13025")]


@pytest.mark.parametrize("spoil, said", BAD, ids=[b[1] for b in BAD])
def test_what_is_no_student_for_the_teacher_is_said_before_anything_is_loaded(spoil, said, pair_folders, offline, concept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "load_pair", lambda *a, **k: pytest.fail("a model was loaded first"))
    student = Path(shutil.copytree(pair_folders / "student", tmp_path / "student"))
    spoil(student)
    code, line = exit_of(train_script.main, ["--concept", "dog", "--student", student], capsys)
    assert code == 2 and said in line and str(student) in line


def test_a_file_in_place_of_a_model_is_said(offline, concept, tmp_path, capsys):
    adapter(tmp_path)
    for flag, file, said in (("--student", "pytorch_lora_weights.safetensors", "is a LoRA"), ("--teacher", "dog/01.png", "is one file")):
        code, line = exit_of(train_script.main, ["--concept", "dog", flag, next(p for p in (Path(file), *Path("dog").glob("*.png")) if p.is_file())], capsys)
        assert code == 2 and said in line and "layout" in line


def test_an_epsilon_teacher_is_fine_where_it_says_so(pair_folders, offline, concept, tmp_path):
    """The 512-px "base" version of Stable Diffusion 2.1 differs by its size and its scheduler."""
    teacher = Path(shutil.copytree(pair_folders / "teacher", tmp_path / "teacher"))
    hub.write_json(teacher / "scheduler" / "scheduler_config.json", hub.SD21_SCHEDULER | {"prediction_type": "epsilon"})
    args = train_script.parse_arguments(["--concept", "dog", "--teacher", str(teacher)])
    assert load_pair(args.base, "<v>", "dog", flags=vars(args)).teacher.prediction_type == "epsilon"


def test_stock_diffusers_on_the_real_files_draws_what_sample_draws(offline, pair_folders, concept):
    """Both halves; the exported LoRA and token on from_pretrained(..., variant="fp16"), as a user has it."""
    from diffusers import StableDiffusionPipeline
    run = train("--base", "sd-turbo", *SHORT, "--echo_steps", 0, "--student_lr", .01, "--teacher_lr", .01)
    for role, part, flags, call in (("student", run, (), dict(num_inference_steps=1, guidance_scale=0.0)),
                                    ("teacher", run / "teacher", ("--teacher", "--steps", "4"), dict(num_inference_steps=4, guidance_scale=7.5))):
        sample_script.main(["--prompt", "a <v> corgi", "--num_images", "1", "--output_dir", role, *flags])
        pipe = StableDiffusionPipeline.from_pretrained(pair_folders / role, variant="fp16", safety_checker=None, dtype=torch.float32)
        call |= dict(height=64, width=64, generator=torch.Generator().manual_seed(0))
        plain = np.asarray(pipe("a corgi", **call).images[0]).astype(int)
        pipe.load_textual_inversion(str(part))
        pipe.load_lora_weights(str(part))
        call["generator"] = torch.Generator().manual_seed(0)
        theirs = np.asarray(pipe("a <v> corgi", **call).images[0]).astype(int)
        ours = np.asarray(Image.open(next(Path(role).glob("a-v-corgi*seed0.png")))).astype(int)
        assert np.abs(ours - theirs).max() <= 1 < np.abs(plain - theirs).max(), role


def test_another_scheduler_is_replaced_in_our_pictures_and_in_the_lines_of_the_card(offline, pair_folders, concept, tmp_path):
    """Stable Diffusion 1.5 comes with PNDM, and some fine-tunes do not say clip_sample."""
    folder, own = Path(shutil.copytree(pair_folders, tmp_path / "pair")), {k: v for k, v in hub.SD21_SCHEDULER.items() if k != "clip_sample"}
    hub.write_json(folder / "teacher/scheduler/scheduler_config.json", own | {"_class_name": "PNDMScheduler"})
    hub.write_json(folder / "teacher/model_index.json", json.loads((folder / "teacher/model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]})
    hub.write_json(folder / "student/scheduler/scheduler_config.json", hub.TURBO_SCHEDULER | {"timestep_spacing": "leading"})
    run = train("--base", "sd-turbo", "--teacher", folder / "teacher", "--student", folder / "student", *SHORT, "--echo_steps", 0)
    for part, line in ((run / "teacher", "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"),
                       (run, 'pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")')):
        code = card_code(part)
        assert line in code
        code, drawn = code.replace("safety_checker=None", 'safety_checker=None, variant="fp16", dtype=torch.float32'), []
        for lines in (code, code.replace(line, "")):
            exec(lines, {})
            drawn.append(np.asarray(Image.open("picture.png")).astype(int))
        ours = np.asarray(Image.open(next((part / "samples").glob("*-seed0.png")))).astype(int)
        assert np.abs(drawn[0] - ours).max() <= 2 < np.abs(drawn[1] - ours).max(), part
