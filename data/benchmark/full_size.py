"""Configs of the real networks as their hub repositories have them, and a base folder made of them: for counting, and for tests."""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NOISE = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
             set_alpha_to_one=False)
UNET = dict(_class_name="UNet2DConditionModel", in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2)
SD2 = dict(UNET, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
OPENCLIP = dict(model_type="clip_text_model", hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096,
                hidden_act="gelu", vocab_size=49408, max_position_embeddings=77, projection_dim=1024, bos_token_id=49406, eos_token_id=49407)
CLIP_L = dict(OPENCLIP, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="quick_gelu",
              projection_dim=768)
LEVELS = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
ENCODERS = {
    "tiny_vae": dict(_class_name="AutoencoderTiny", scaling_factor=1.0),
    "vae": dict(_class_name="AutoencoderKL", block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
                down_block_types=LEVELS[0], up_block_types=LEVELS[1], norm_num_groups=32, sample_size=512, scaling_factor=.18215),
    "dino": dict(model_type="vit", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=224,
                 patch_size=16),
    "dinov2": dict(model_type="dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14),
    "clip": dict(model_type="clip", projection_dim=1024, text_config=dict(OPENCLIP, num_hidden_layers=24),
                 vision_config=dict(model_type="clip_vision_model", hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120,
                                    image_size=224, patch_size=14, hidden_act="gelu", projection_dim=1024))}
FULL_SIZE = {
    "sd-turbo": dict(ENCODERS, teacher_unet=dict(SD2, sample_size=96, upcast_attention=True), student_unet=dict(SD2, sample_size=64),
                     text_encoder=OPENCLIP, teacher_type="v_prediction", tokens=(4, 768)),
    "hyper-sd15": dict(ENCODERS, teacher_unet=dict(UNET, cross_attention_dim=768, attention_head_dim=8, sample_size=64),
                       student_unet=dict(UNET, cross_attention_dim=768, attention_head_dim=8, sample_size=64), text_encoder=CLIP_L,
                       teacher_type="epsilon", tokens=(4, 768))}


def write_base(folder, sizes):
    """A base folder that holds configs, tokenizers and a random image projection, but no other weight; see `load_part`."""
    def write(name, value):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    words = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]  # CLIP's byte alphabet
    words += [w + "</w>" for w in words]
    words += [f"unused{i}" for i in range(sizes["text_encoder"]["vocab_size"] - len(words) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    for part, scheduler, kind in (("teacher", "DDIMScheduler", sizes["teacher_type"]), ("student", "EulerDiscreteScheduler", "epsilon")):
        write(f"{part}/unet/config.json", sizes[f"{part}_unet"])
        write(f"{part}/scheduler/scheduler_config.json", dict(NOISE, _class_name=scheduler, prediction_type=kind, timestep_spacing="trailing"))
        write(f"{part}/vae/config.json", sizes["vae"])
        write(f"{part}/text_encoder/config.json", sizes["text_encoder"])
        write(f"{part}/tokenizer/vocab.json", {w: i for i, w in enumerate(words)})
        write(f"{part}/tokenizer/tokenizer_config.json", dict(
            tokenizer_class="CLIPTokenizer", model_max_length=sizes["text_encoder"]["max_position_embeddings"],
            bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="!"))
        (Path(folder) / part / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write("tiny_vae/config.json", sizes["tiny_vae"])
    for name in ("dino", "dinov2", "clip"):
        write(f"encoders/{name}/config.json", sizes[name])
        pixels = sizes[name].get("image_size") or sizes[name]["vision_config"]["image_size"]
        write(f"encoders/{name}/preprocessor_config.json", dict(size=pixels, image_mean=[.48, .46, .41], image_std=[.27, .26, .28]))
    count, width = sizes["tokens"]
    save_file({"image_proj.proj.weight": torch.randn(count * width, sizes["clip"]["projection_dim"]) * .02,
               "image_proj.proj.bias": torch.zeros(count * width), "image_proj.norm.weight": torch.ones(width),
               "image_proj.norm.bias": torch.zeros(width)}, Path(folder) / "encoders" / "ip_adapter.safetensors")
    write("base.json", dict(recipe="sd-turbo", prompts="photo"))
