"""Our arithmetic is diffusers' arithmetic, for both prediction types. python -m pytest tests/test_schedulers.py"""
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from model import Denoiser

NOISE = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def tiny(scheduler):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
                                cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4)
    return Denoiser(unet, scheduler).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_equals_one_euler_step_with_trailing_spacing(kind):
    model = tiny(EulerDiscreteScheduler(prediction_type=kind, **NOISE))
    noise, context = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8)
    scheduler = model.scheduler
    scheduler.set_timesteps(1)
    start = noise * scheduler.sigmas[0]
    out = model(scheduler.scale_model_input(start, scheduler.timesteps[0]), scheduler.timesteps[0], context)
    wanted = scheduler.step(out, scheduler.timesteps[0], start).prev_sample
    assert scheduler.timesteps.tolist() == [999.0] and abs(scheduler.sigmas[0].item() - 14.6146) < 1e-3
    torch.testing.assert_close(model.one_step(noise, context), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0, 250, 999])
def test_x0_equals_ddim_pred_original_sample(kind, t):
    model = tiny(DDIMScheduler(prediction_type=kind, clip_sample=False, **NOISE))
    z, context = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8)
    model.scheduler.set_timesteps(10)
    wanted = model.scheduler.step(model(z, t, context), t, z).pred_original_sample
    torch.testing.assert_close(model.x0(z, torch.tensor([t, t]), context), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_network_that_hits_its_target_recovers_x0(kind):
    model = tiny(DDIMScheduler(prediction_type=kind, **NOISE))
    x0, eps, t = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([10, 400, 900])
    model.forward = lambda z, t, context: model.target(x0, eps, t)
    torch.testing.assert_close(model.x0(model.add_noise(x0, eps, t), t, None), x0, atol=1e-4, rtol=1e-4)


def test_noising_and_velocity_equal_diffusers():
    model = tiny(DDIMScheduler(prediction_type="v_prediction", **NOISE))
    x0, eps, t = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    torch.testing.assert_close(model.add_noise(x0, eps, t), model.scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(model.target(x0, eps, t), model.scheduler.get_velocity(x0, eps, t))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_one_is_the_conditional_guess_and_zero_the_unconditional(kind):
    model = tiny(DDIMScheduler(prediction_type=kind, **NOISE))
    z, t, context, empty = torch.randn(2, 4, 4, 4), torch.tensor([300, 700]), torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    for guidance, wanted in ((1.0, model.x0(z, t, context)), (0.0, model.x0(z, t, empty.expand(2, -1, -1)))):
        torch.testing.assert_close(model.denoise(z, t, context, empty, guidance), wanted, atol=1e-5, rtol=1e-5)
