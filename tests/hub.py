"""The real repositories' files, written down from their public copies, with tiny widths: what load_pair meets on a user's disk.

Only the keys that the real files have are here. A key that is absent there is absent here, so that class defaults speak. Nothing
is taken from our own writers. Counts that shape the code are real: four levels, the vocabulary, the token ids, the file names.
"""
import gzip
import importlib.util
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTHS = [8, 16, 16, 16]  # for 320 640 1280 1280 in a UNet, for 128 256 512 512 in an autoencoder

SD21_UNET = dict(
    _class_name="UNet2DConditionModel", _diffusers_version="0.8.0", act_fn="silu", attention_head_dim=[1, 2, 2, 2], block_out_channels=WIDTHS,
    center_input_sample=False, cross_attention_dim=32, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], downsample_padding=1,
    flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05, norm_num_groups=4,
    out_channels=4, sample_size=12, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, use_linear_projection=True)
SD21_VAE = dict(
    _class_name="AutoencoderKL", _diffusers_version="0.8.0", act_fn="silu", block_out_channels=WIDTHS, down_block_types=["DownEncoderBlock2D"] * 4,
    in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=4, out_channels=3, sample_size=96,
    up_block_types=["UpDecoderBlock2D"] * 4)
SD21_SCHEDULER = dict(
    _class_name="DDIMScheduler", _diffusers_version="0.8.0", beta_end=.012, beta_schedule="scaled_linear", beta_start=.00085, clip_sample=False,
    num_train_timesteps=1000, prediction_type="v_prediction", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None)
TEXT = dict(
    architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="gelu", hidden_size=32,
    initializer_factor=1.0, initializer_range=.02, intermediate_size=64, layer_norm_eps=1e-05, max_position_embeddings=77,
    model_type="clip_text_model", num_attention_heads=4, num_hidden_layers=2, pad_token_id=1, projection_dim=16, torch_dtype="float16",
    vocab_size=49408)
TURBO_SCHEDULER = dict(
    _class_name="EulerDiscreteScheduler", _diffusers_version="0.24.0.dev0", beta_end=.012, beta_schedule="scaled_linear", beta_start=.00085,
    clip_sample=False, interpolation_type="linear", num_train_timesteps=1000, prediction_type="epsilon", set_alpha_to_one=False,
    skip_prk_steps=True, steps_offset=1, timestep_spacing="trailing", trained_betas=None, use_karras_sigmas=False)
REAL = {"unet": dict(block_out_channels=[320, 640, 1280, 1280], attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, norm_num_groups=32),
        "vae": dict(block_out_channels=[128, 256, 512, 512], norm_num_groups=32, sample_size=768),
        "text_encoder": dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, projection_dim=512), "scheduler": {}}
SD21 = {"unet": SD21_UNET, "vae": SD21_VAE, "text_encoder": TEXT, "scheduler": SD21_SCHEDULER}
TURBO = {"unet": SD21_UNET | {"sample_size": 8}, "vae": SD21_VAE | {"scaling_factor": .18215}, "text_encoder": TEXT, "scheduler": TURBO_SCHEDULER}


def full_size(parts, sample_size):
    """The same configs with the widths that the repositories have; sample_size: of the UNet, 96 or 64."""
    return {k: v | REAL[k] | ({"sample_size": sample_size} if k == "unet" else {}) for k, v in parts.items()}


def added(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


TOKENIZER = dict(add_prefix_space=False, bos_token=added("<|startoftext|>"), do_lower_case=True, eos_token=added("<|endoftext|>"), errors="replace",
                 model_max_length=77, name_or_path="stabilityai/stable-diffusion-2", pad_token="<|endoftext|>",
                 special_tokens_map_file="./special_tokens_map.json", tokenizer_class="CLIPTokenizer", unk_token=added("<|endoftext|>"))
SPECIAL = {k: {i: v for i, v in added(t).items() if i != "__type"} for k, t in
           (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"))} | {"pad_token": "!"}


def merges():
    """CLIP's 48,894 merges in order; refiners, a test requirement, ships the file that OpenAI published."""
    [folder] = importlib.util.find_spec("refiners").submodule_search_locations
    with gzip.open(Path(folder, "foundationals", "clip", "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as f:
        return f.read().split("\n")[1:49152 - 256 - 2 + 1]


def vocabulary():
    """CLIP's 49,408 words by the published rule: bytes, bytes that end a word, each merge's product, two marks."""
    letters = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]
    words = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges()] + ["<|startoftext|>", "<|endoftext|>"]
    return {w: i for i, w in enumerate(words)}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def weights(kind, config):
    """Random weights in fp16 under the names that the real files use."""
    from transformers import CLIPTextModel
    torch.manual_seed(7)
    if kind is CLIPTextModel:
        state = kind(kind.config_class(**config)).state_dict()
        state = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        network = kind.from_config(config)
        with torch.no_grad():
            for p in network.parameters():  # zero-initialised layers would hide what they lead to
                p.add_(.02 * torch.randn_like(p))
        state = network.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # the autoencoder's, since 2022
    for new, name in old.items() if "quant_conv.weight" in state else ():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in state.items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def write_pipeline(folder, parts, variants=("fp16",)):
    """One diffusers pipeline folder; variants of its weights: "fp16", "" or both."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.8.0", "feature_extractor": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", parts["scheduler"]["_class_name"]], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]})
    for part, config in parts.items():
        write_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), config)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        state, stem = weights(kind, parts[part]), "model" if part == "text_encoder" else "diffusion_pytorch_model"
        for variant in variants:
            save_file(state if variant else {k: v.float() if v.is_floating_point() else v for k, v in state.items()},
                      folder / part / f"{stem}{variant and '.'}{variant}.safetensors", {"format": "pt"})
    write_json(folder / "tokenizer" / "vocab.json", vocabulary())
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges(), ""]), encoding="utf-8")
    write_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    write_json(folder / "tokenizer" / "special_tokens_map.json", SPECIAL)
    return folder


def into_cache(folder, cache, repo):
    """Copy a folder into a hub cache as an earlier download of "owner/name[@revision]" leaves it, without markers of files that never were there."""
    repo, _, revision = repo.partition("@")
    revision = revision or "3" * 40
    home = cache / f"models--{repo.replace('/', '--')}"
    write = home / "refs" / "main"
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(revision)
    shutil.copytree(folder, home / "snapshots" / revision)


@contextmanager
def serve(cache, monkeypatch, refused=None):
    """A hub on this machine that holds the repositories of a cache; refused: {repository: (status, what the real hub calls it)}.

    Answers as the real one does: HEAD and GET of resolve/REVISION/FILE with size, etag and commit; yields the files it has sent.
    """
    sent = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            repo, _, rest = self.path.strip("/").partition("/resolve/")
            name = rest.partition("/")[2]
            home = cache / f"models--{repo.replace('/', '--')}"
            revision = next((home / "snapshots").iterdir()).name if home.is_dir() else ""
            file = home / "snapshots" / revision / name
            status, trouble = (refused or {}).get(repo) or ((404, "RepoNotFound") if not revision else (200, "") if file.is_file() else (404, "EntryNotFound"))
            body = file.read_bytes() if status == 200 else b""
            self.send_response(status)
            for key, value in (("X-Error-Code", trouble), ("X-Repo-Commit", revision), ("ETag", f'"{abs(hash((repo, name)))}"'), ("Content-Length", str(len(body)))):
                if value:
                    self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                sent.append(f"{repo}/{name}")
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield sent
    finally:
        server.shutdown()
        server.server_close()
