"""What data/benchmark/cost.py counts is what train.py computes. python -m pytest tests/test_cost.py"""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train as script
from conftest import train
from data.base import load_pair
from data.benchmark import cost, full_size
from model import trainable_parameters
from test_export import COMFYUI
from test_sd import bases  # noqa: F401 (a fixture)

FLAGS = ["--concept", "dog", "--train_batch_size", "2", "--dinov2_size", "42", "--swd_projections", "16", "--mixed_precision", "no"]


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_an_iteration_of_a_run_costs_what_is_counted_and_every_network_is_booked(bases, concept):  # noqa: F811
    flags = [*FLAGS, "--base", str(bases["sd2"]), "--tiny_vae"]
    two, three = (counted(lambda: train(*flags[2:], "--echo_steps", 0, "--max_train_steps", n)) for n in (2, 3))
    found = cost.count(*cost.build_meta(script.parse_arguments(flags)))
    assert three - two == pytest.approx(sum(found.values()), rel=.05), "on a CPU torch does not count the fused attention"
    assert {k for k, v in found.items() if v} == {"teacher UNet", "student UNet", "autoencoder", "text encoder", "DINOv2", "DINO", "CLIP", cost.Meter.REST}


def test_each_networks_share_is_what_it_costs_alone(bases, concept):  # noqa: F811
    """A forward pass counted by itself, and backward passes as the paper's turns ask for them."""
    args = script.parse_arguments([*FLAGS, "--base", str(bases["sd2"])])
    found, (_, m) = cost.count(*cost.build_meta(args)), cost.build_meta(args)
    image, t = torch.zeros(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    z, context = torch.zeros(2, 4, 16, 16, device="meta"), torch.zeros(2, 77, 32, device="meta")
    forward = {"DINO": counted(lambda: m.encoders["dino"].features(image)), "text encoder": counted(lambda: m.pair.text(["a"] * 2)),
               "autoencoder": counted(lambda: m.pair.decode(z)), "student UNet": counted(lambda: m.pair.student(z, t, context))}
    assert found["DINO"] == pytest.approx(2 * forward["DINO"], rel=.05), "once, and back to the image"
    assert found["text encoder"] == pytest.approx(3 * forward["text encoder"], rel=.15), "twice, and once back to the token"
    assert found["autoencoder"] == pytest.approx(3 * forward["autoencoder"], rel=.1), "of student and target, and back to the student"
    assert 2 * forward["student UNet"] < found["student UNet"] < 3 * forward["student UNet"], "back to its keys and values alone"


@pytest.mark.slow
def test_the_published_recipe_counts_41_petaflop_and_ours_with_its_switches_at_most_12(capsys, monkeypatch):
    """At full size, on the meta device; the other figures are those of the README's table."""
    monkeypatch.setattr(cost, "print_memory", lambda sets, args: None)  # counted below, on small networks
    cost.main(["--base", "sd-turbo", "--random_weights", "--tiny_vae", "--dinov2_size", "224", "--max_train_steps", "600", "--echo_steps", "120", "--steps", "0"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| PFLOP"))
    published, ours, switched = (float(v) for v in row.split("|")[2:5])
    assert abs(published - 41) < .5 and switched <= 12 < ours < published


def test_the_counted_memory_is_what_autograd_really_keeps(bases, concept):  # noqa: F811
    """On the CPU, with real tensors under the same rules of precision."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    args = script.parse_arguments([*FLAGS, "--base", str(bases["sd2"]), "--mixed_precision", "bf16"])
    weights, state, kept = cost.count_memory(args)
    m = script.build(args, torch.device("cpu"), dtype=torch.bfloat16)
    for denoiser in (m.pair.teacher, m.pair.student):
        denoiser.unet.set_attn_processor(AttnProcessor2_0())  # as on a GPU
    real = cost.watch_memory(m, args, True)
    assert abs(real[0] - weights) < .01 * weights and real[1] == state and abs(real[2] - kept) < .02 * kept and cost.Kept.live == 0
    args.gradient_checkpointing = True
    assert cost.count_memory(args)[2] < .7 * kept


def test_attention_in_fp32_keeps_no_matrix_either():
    """The student's step is in fp32, outside of autocast; CUDA's fused attention serves it too."""
    q = torch.randn(1, 2, 256, 16, device="meta", requires_grad=True)
    with cost.CudaAttention(), cost.Kept.watch([q]):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert cost.Kept.live <= 2 * q.nbytes < 2 * 256 * 256 * 4
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_gradient_checkpointing_recomputes_in_the_precision_of_the_forward_pass(bases, concept):  # noqa: F811
    """The student's UNet in fp32, all else in bf16; torch compares what is recomputed with what was kept."""
    args = script.parse_arguments([*FLAGS, "--base", str(bases["sd2"]), "--mixed_precision", "bf16", "--gradient_checkpointing"])
    assert cost.count_memory(args)[2] > 0 and not cost.CudaAttention.active


def test_norms_are_kept_in_fp32_as_cuda_autocast_does():
    x, norm, linear = torch.randn(2, 8, 4, 4), torch.nn.GroupNorm(2, 8), torch.nn.Linear(4, 4)
    with cost.CudaAutocast():
        assert linear(x).dtype == torch.bfloat16 and norm(linear(x)).dtype == torch.float32
    assert linear(x).dtype == torch.float32


def test_full_size_configs_have_the_known_numbers_of_weights(tmp_path):
    """866 M and 860 M in the UNets of Stable Diffusion 2.1 and 1.5, 84 M in their VAE, 340 M in OpenCLIP-H without its last layer."""
    for name, unet, text in (("sd-turbo", 866, 340), ("hyper-sd15", 860, 123)):
        full_size.write_base(tmp_path / name, full_size.FULL_SIZE[name])
        pair = load_pair(tmp_path / name, "<v>", "dog", "meta", dtype=torch.float32, random=True)
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (pair.teacher, pair.student, pair.vae, pair.text.encoder)]
        assert [round(s) for s in sizes] == [unet, unet, 84, text] and pair.resolution == 512 and pair.latent_shape == (4, 64, 64)
    kv = trainable_parameters(load_pair(tmp_path / "sd-turbo", "<v>", "dog", "meta", dtype=torch.float32, random=True).teacher.unet, "kv")
    assert len(kv) == 32 and round(sum(p.numel() for p in kv.values()) / 1e6, 1) == 25.6
    assert {"lora_unet_" + k.removesuffix(".weight").replace(".", "_") for k in kv} == set(COMFYUI), "what ComfyUI's key map has for this layout"


def test_the_bench_times_parts_memory_and_sampling(bases, capsys):  # noqa: F811
    cost.main(["--base", str(bases["sd2"]), "--device", "cpu", "--dinov2_size", "42", "--steps", "1", "--images", "2", "--tiny_vae"])
    out = capsys.readouterr().out
    for part in ("| teacher UNet |", "| all |", "it/s", "GB peak", "ms per image; ratio"):
        assert part in out


@pytest.mark.slow
def test_one_iteration_of_the_full_size_networks_runs_on_a_cpu_in_12_gb(capsys):
    """Random bf16 weights of SD 2.1, SD-Turbo, CLIP-H, DINOv2-L and DINO-S; small pictures, so that it takes minutes."""
    cost.main(["--base", "sd-turbo", "--random_weights", "--device", "cpu", "--steps", "1", "--images", "0", "--resolution", "128", "--tiny_vae",
                "--dinov2_size", "224", "--train_batch_size", "1"])
    out = capsys.readouterr().out
    assert "| student UNet |" in out and float(out.rsplit("-> ")[-1].split(" GB")[0]) < 12


@pytest.mark.slow
def test_the_readmes_memory_table_is_what_is_counted(tmp_path):
    import shlex

    from conftest import ROOT
    full_size.write_base(tmp_path / "base", full_size.FULL_SIZE["sd-turbo"])
    lines = (ROOT / "data/sd-turbo/README.md").read_text(encoding="utf-8").split("| flags | weights |")[1].splitlines()[2:]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines[:next(i for i, line in enumerate(lines) if not line)]]
    assert len(rows) == 5
    for flags, *told in rows:
        flags = [str(ROOT / f) if f.endswith(".toml") else f for f in shlex.split(flags.replace("`", "").replace(", fp32", ""))]
        precision = ["--mixed_precision", "no" if "--recipe" in flags else "bf16"]
        sizes = [v / 1e9 for v in cost.count_memory(script.parse_arguments(
            ["--base", str(tmp_path / "base"), "--concept", str(ROOT / "data/dog"), *precision, *flags]))]
        assert [f"{v:.2f}" for v in sizes] + [f"{sum(sizes):.1f} GB"] == told[:4], flags
