"""Losses of noise levels and of images against the published ones, and in closed form."""

import pytest
import torch
from conftest import close, golden
from reference import stored_denoiser

from equilab.diffusion import losses
from equilab.diffusion.protocols import Denoised


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
@torch.no_grad()
def test_the_training_loss_is_the_published_one_over_the_number_of_values_of_an_image(name):
    values, model, label = stored_denoiser(name)
    image, noise = values["in.loss.images"], values["in.loss.noise"]
    sigma = losses.edm_sigma(values["in.loss.rnd_normal"].flatten(), -1.2, 1.2)
    close(sigma, values["out.loss.sigma"], 1e-6)
    close(losses.edm_weight(sigma, 0.5), values["out.loss.weight"], 1e-6)
    loss = losses.edm(model, image, noise, sigma, label, 0.5)
    close(loss, values["out.loss.mean"], 1e-5)
    close(loss, values["out.loss.sum_over_batch"] / image[0].numel(), 1e-5)


def test_the_best_denoiser_of_data_that_are_zero_has_the_loss_of_its_noise():
    sigma = torch.tensor([0.1, 2.0])
    image, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    loss = losses.edm(lambda x, sigma, label: Denoised(x, None, None), image, noise, sigma, None, 0.5)
    assert loss.item() == pytest.approx(((0.01 + 0.25) / 0.25 + (4 + 0.25) / 0.25) / 2)


def edm_of(image, target):
    sigma = image.abs().mean(dim=(1, 2, 3))
    return losses.edm(lambda x, sigma, label: Denoised(x**2, None, None), target, image, sigma, None, 0.5)


@pytest.mark.parametrize("loss", [losses.l1, losses.l2, edm_of])
def test_the_losses_of_equal_parts_average_to_the_loss_of_the_batch(loss):
    image, target = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    parts = torch.stack([loss(a, b) for a, b in zip(image.chunk(3), target.chunk(3))])
    torch.testing.assert_close(parts.mean(), loss(image, target), rtol=1e-12, atol=0)


def test_l1_and_l2_are_the_mean_absolute_and_the_mean_squared_error():
    image, target = torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    assert losses.l1(image, target).item() == 2
    assert losses.l2(image, target).item() == 5


def test_fixed_point_correction_agrees_with_the_published_sum():
    values, _ = golden("get_uncond")
    loss = losses.fixed_point_correction(values["out.loss_per_iterate"], 0.8)
    close(loss, values["out.loss_fp_correction"], 1e-6)
    assert losses.fixed_point_correction(torch.tensor([1.0, 10.0, 100.0]), 0.0).item() == 100
