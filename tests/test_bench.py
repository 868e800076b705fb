"""What bench.py counts is what train.py computes. python -m pytest tests/test_bench.py"""
import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from conftest import train
from model import load_pair
from test_sd import bases  # noqa: F401 (a fixture)

FLAGS = {"train_unet": "kv", "swd_projections": 16, "guidance_scale": 7.5, "train_batch_size": 2, "dinov2_size": 42, "tiny_vae": False,
         "gradient_checkpointing": False, "compile": False, "mixed_precision": "no"}


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_an_iteration_of_the_bench_costs_what_one_of_train_costs(bases, concept):  # noqa: F811
    flags = ["--base", bases["sd2"], "--dinov2_size", 42, "--swd_projections", 16, "--echo_steps", 0, "--mixed_precision", "no", "--tiny_vae"]
    two, three = (counted(lambda: train(*flags, "--max_train_steps", n)) for n in (2, 3))
    pair, encoders, heads, optimizers, x, known = bench.build(bases["sd2"], torch.device("cpu"), FLAGS | {"tiny_vae": True}, False)
    meter = bench.Meter(torch.device("cpu"))
    ours = counted(lambda: bench.iteration(pair, encoders, heads, optimizers, known, x, FLAGS, contextlib.nullcontext, meter))
    assert abs(three - two - ours) < .01 * ours  # train.py also watches how the critics pull on the student
    assert set(meter.seconds) > {"teacher UNet", "student UNet", "autoencoder", "text encoder", "DINOv2", "CLIP"}


def test_the_published_recipe_counts_41_petaflop_and_ours_with_its_switches_at_most_12(capsys):
    """At full size, on the meta device; the other figures are those of the README's table."""
    bench.main(["--base", "sd-turbo", "--random_weights", "--tiny_vae", "--dinov2_size", "224", "--max_train_steps", "600", "--echo_steps", "120", "--steps", "0"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| PFLOP"))
    published, ours, switched = (float(v) for v in row.split("|")[2:5])
    assert abs(published - bench.PAPER) < .5 and switched <= 12 < ours < published


def test_the_counted_memory_is_what_autograd_really_keeps(bases):  # noqa: F811
    from diffusers.models.attention_processor import AttnProcessor2_0
    flags = FLAGS | {"mixed_precision": "bf16"}
    weights, state, kept = bench.count_memory(bases["sd2"], flags)
    pair, encoders, heads, optimizers, x, known = bench.build(bases["sd2"], torch.device("cpu"), flags, False, torch.bfloat16)
    for denoiser in (pair.teacher, pair.student):
        denoiser.unet.set_attn_processor(AttnProcessor2_0())  # as on a GPU
    networks = (pair.teacher, pair.student, pair.vae, pair.text, encoders["dino"], encoders["dinov2"], encoders["identity"], *heads.values())
    parameters = [p for network in networks for p in network.parameters()]
    bench.Kept.storages, bench.Kept.live, bench.Kept.most, bench.Kept.apart = {}, 0, 0, {p.untyped_storage()._cdata for p in parameters}
    with torch.autograd.graph.saved_tensors_hooks(bench.Kept, lambda kept: kept.tensor):
        bench.iteration(pair, encoders, heads, optimizers, known, x, flags | {"swd_projections": 0},
                        lambda: torch.autocast("cpu", torch.bfloat16), bench.Meter(torch.device("cpu")))
    assert abs(sum(p.nbytes for p in parameters) - weights) < .01 * weights and 3 * sum(p.nbytes for p in parameters if p.requires_grad) == state
    assert abs(bench.Kept.most - kept) < .02 * kept and bench.Kept.live == 0
    assert bench.count_memory(bases["sd2"], flags | {"gradient_checkpointing": True})[2] < .7 * kept


def test_full_size_configs_have_the_known_numbers_of_weights(tmp_path):
    """866 M and 860 M in the UNets of Stable Diffusion 2.1 and 1.5, 84 M in their VAE, 340 M in OpenCLIP-H without its last layer."""
    for name, unet, text in (("sd-turbo", 866, 340), ("hyper-sd15", 860, 123)):
        bench.write_base(tmp_path / name, bench.FULL_SIZE[name])
        pair = load_pair(tmp_path / name, "<v>", "dog", "meta", dtype=torch.float32, random=True)
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (pair.teacher, pair.student, pair.vae, pair.text.encoder)]
        assert [round(s) for s in sizes] == [unet, unet, 84, text] and pair.resolution == 512 and pair.latent_shape == (4, 64, 64)
    kv = bench.trainable_parameters(load_pair(tmp_path / "sd-turbo", "<v>", "dog", "meta", dtype=torch.float32, random=True).teacher.unet, "kv")
    assert len(kv) == 32 and round(sum(p.numel() for p in kv.values()) / 1e6, 1) == 25.6


def test_the_bench_times_parts_memory_and_sampling(bases, capsys):  # noqa: F811
    bench.main(["--base", str(bases["sd2"]), "--device", "cpu", "--dinov2_size", "42", "--steps", "1", "--images", "2", "--tiny_vae"])
    out = capsys.readouterr().out
    for part in ("| teacher UNet |", "| all |", "it/s", "GB peak", "ms per image; ratio"):
        assert part in out


@pytest.mark.slow
def test_one_iteration_of_the_full_size_networks_runs_on_a_cpu_in_12_gb(capsys):
    """Random bf16 weights of SD 2.1, SD-Turbo, CLIP-H, DINOv2-L and DINO-S; small pictures, so that it takes minutes."""
    bench.main(["--base", "sd-turbo", "--random_weights", "--device", "cpu", "--steps", "1", "--images", "0", "--resolution", "128", "--tiny_vae",
                "--dinov2_size", "224", "--train_batch_size", "1"])
    out = capsys.readouterr().out
    assert "| student UNet |" in out and float(out.rsplit("-> ")[-1].split(" GB")[0]) < 12
