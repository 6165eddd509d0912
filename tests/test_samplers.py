import math

import numpy as np
import pytest
import torch
from test_unet import assert_agree, stored

from equilab.diffusion.protocols import Denoised
from equilab.diffusion.samplers import Churn, euler, finish, heun
from equilab.diffusion.schedules import edm_sigmas

PUBLISHED = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
MEAN, STD = 0.3, 0.5  # of Gaussian data


def exact(x, sigma, label, carry=None):
    """The best denoiser of Gaussian data; its carry counts the calls."""
    return Denoised((STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2), (carry or 0) + 1, None)


def noise():
    return torch.linspace(-2, 2, 12).reshape(1, 3, 2, 2)


@pytest.mark.parametrize("steps", [5, 18, 40])
def test_the_schedule_agrees_with_the_published_one(steps):
    values, _, _ = stored("edm_ddpmpp")
    torch.testing.assert_close(
        edm_sigmas(steps, **PUBLISHED), values[f"out.schedule{steps}"], rtol=1e-10, atol=0
    )


def test_a_schedule_of_one_step_goes_from_the_largest_sigma_to_zero():
    assert edm_sigmas(1, **PUBLISHED).tolist() == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize(
    "change", [{"sigma_min": 0.0}, {"sigma_min": 80.0}, {"rho": 0.0}, {"sigma_max": -1.0}]
)
def test_a_range_that_is_no_schedule_is_refused(change):
    with pytest.raises(ValueError, match=str(next(iter(change)))):
        edm_sigmas(5, **PUBLISHED | change)
    with pytest.raises(ValueError, match="steps=0"):
        edm_sigmas(0, **PUBLISHED)


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
def test_samplers_agree_with_the_published_ones(name):
    values, model, label = stored(name)
    start, churn = values["in.latents"], Churn(3.0, 0.05, 50.0, 1.003)
    other = edm_sigmas(5, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    runs = {
        "heun5": (heun(model, start, edm_sigmas(5, **PUBLISHED), label), 9),
        "heun18": (heun(model, start, edm_sigmas(18, **PUBLISHED), label), 35),
        "heun5_sigma_0.01_50_rho5": (heun(model, start, other, label), 9),
        "euler5": (euler(model, start, edm_sigmas(5, **PUBLISHED), label), 5),
        "heun6_churn": (
            heun(
                model,
                start,
                edm_sigmas(6, **PUBLISHED),
                label,
                churn,
                lambda step: values["in.churn_noises"][step],
            ),
            11,
        ),
    }
    for run, (steps, claimed) in runs.items():
        image, nfe = finish(steps)
        assert nfe == claimed
        assert image.dtype == torch.float64
        assert_agree(image, values[f"out.{run}"], 1e-4)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_the_error_on_gaussian_data_falls_with_the_order_of_the_method(sampler, order):
    counts, errors = [32, 64, 128, 256], []
    for steps in counts:
        sigmas = edm_sigmas(steps, sigma_min=0.01, sigma_max=10.0, rho=7.0)[:-1]
        image, _ = finish(sampler(exact, noise(), sigmas, None))
        shrink = math.sqrt((STD**2 + sigmas[-1].item() ** 2) / (STD**2 + 10.0**2))
        errors.append((image - (MEAN + (10 * noise().double() - MEAN) * shrink)).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.1)


@pytest.mark.parametrize(("sampler", "claimed"), [(euler, 18), (heun, 35)])
def test_the_claimed_number_of_calls_is_the_number_of_calls_and_the_carry_passes_through_all(
    sampler, claimed
):
    steps = list(sampler(exact, noise(), edm_sigmas(18, **PUBLISHED), None))
    assert [step.nfe for step in steps][-1] == claimed == steps[-1].calls[-1].carry
    assert sum(len(step.calls) for step in steps) == claimed
    assert [step.sigma for step in steps] == edm_sigmas(18, **PUBLISHED)[1:].tolist()


def test_a_step_shows_the_state_and_what_the_denoiser_made_of_the_one_before():
    before, after = list(heun(exact, noise(), edm_sigmas(3, **PUBLISHED), None))[:2]
    assert torch.equal(after.denoised, exact(before.x, before.sigma, None).image)


def test_churn_consumes_one_noise_a_step_and_adds_it_between_its_limits_only():
    drawn = []

    def zeros(step):
        drawn.append(step)
        return torch.zeros(1, 3, 2, 2)

    sigmas = edm_sigmas(6, **PUBLISHED)
    still, _ = finish(heun(exact, noise(), sigmas, None))
    outside, _ = finish(heun(exact, noise(), sigmas, None, Churn(3.0, 90.0, 100.0, 1.0), zeros))
    inside, _ = finish(heun(exact, noise(), sigmas, None, Churn(3.0, 0.05, 50.0, 1.0), zeros))
    assert drawn == 2 * list(range(6))
    assert torch.equal(outside, still)
    assert not torch.equal(inside, still)
    assert Churn(100.0, 0.05, 50.0, 1.0).gamma(1.0, 6) == math.sqrt(2) - 1


def test_sampling_keeps_no_graph():
    start = noise().requires_grad_()
    assert not finish(heun(exact, start, edm_sigmas(2, **PUBLISHED), None))[0].requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sigmas", [[80.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, -1.0]])
def test_levels_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="do not fall"):
        euler(exact, noise(), torch.tensor(sigmas, dtype=torch.float64), None)


def test_churn_without_noises_is_refused():
    with pytest.raises(ValueError, match="give noises"):
        heun(exact, noise(), edm_sigmas(2, **PUBLISHED), None, Churn(3.0, 0.05, 50.0, 1.003))
