"""Samplers of noise levels against the published ones, and on Gaussian data, where all is known."""

import math

import numpy as np
import pytest
import torch
from conftest import close
from reference import stored_denoiser

from equilab.diffusion.protocols import Denoised, finish
from equilab.diffusion.samplers import Churn, euler, euler_step, heun, heun_step
from equilab.diffusion.schedules import edm_sigmas

MEAN, STD = 0.3, 0.5  # of Gaussian data
PUBLISHED_CHURN = Churn(3.0, 0.05, 50.0, 1.003)


def schedule(steps, **changes):
    return edm_sigmas(steps, **{"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0} | changes)


def exact(x, sigma, label, carry=None):
    """The best denoiser of Gaussian data; its carry counts the calls."""
    calls = torch.tensor(1) if carry is None else carry + 1
    return Denoised((STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2), calls, None)


def noise():
    return torch.linspace(-2, 2, 12).reshape(1, 3, 2, 2)


@pytest.mark.parametrize("steps", [5, 18, 40])
def test_the_schedule_agrees_with_the_published_one(steps):
    values, _, _ = stored_denoiser("edm_ddpmpp")
    torch.testing.assert_close(schedule(steps), values[f"out.schedule{steps}"], rtol=1e-10, atol=0)


def test_a_schedule_of_one_step_goes_from_the_largest_sigma_to_zero():
    assert schedule(1).tolist() == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize(
    ("key", "value"), [("sigma_min", 0.0), ("sigma_min", 80.0), ("rho", 0.0), ("sigma_max", -1.0)]
)
def test_a_range_that_is_no_schedule_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        schedule(5, **{key: value})


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match="steps=0"):
        schedule(0)


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
@pytest.mark.parametrize(
    ("run", "sampler", "levels", "churn", "nfe"),
    [
        ("heun5", heun, schedule(5), None, 9),
        ("heun5_sigma_0.01_50_rho5", heun, schedule(5, sigma_min=0.01, sigma_max=50.0, rho=5.0), None, 9),
        ("euler5", euler, schedule(5), None, 5),
        ("heun6_churn", heun, schedule(6), PUBLISHED_CHURN, 11),
        pytest.param("heun18", heun, schedule(18), None, 35, marks=pytest.mark.slow),
    ],
)
def test_samplers_agree_with_the_published_ones(name, run, sampler, levels, churn, nfe):
    values, model, label = stored_denoiser(name)
    noises = values["in.churn_noises"]
    last = finish(sampler(model, values["in.latents"], levels, label, churn, noises.__getitem__))
    assert last.nfe == nfe
    assert last.x.dtype == torch.float64
    close(last.x, values[f"out.{run}"], 1e-4)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_the_error_on_gaussian_data_falls_with_the_order_of_the_method(sampler, order):
    counts, errors = [32, 64, 128, 256], []
    for steps in counts:
        sigmas = schedule(steps, sigma_min=0.01, sigma_max=10.0)[:-1]
        shrink = math.sqrt((STD**2 + sigmas[-1].item() ** 2) / (STD**2 + 10.0**2))
        solution = MEAN + (10 * noise().double() - MEAN) * shrink
        errors.append((finish(sampler(exact, noise(), sigmas, None)).x - solution).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.1)


@pytest.mark.parametrize(("sampler", "calls"), [(euler, 18), (heun, 35)])
def test_nfe_is_the_number_of_calls_and_the_carry_passes_through_all(sampler, calls):
    carries = []

    def counted(x, sigma, label, carry=None):
        carries.append(carry)
        return exact(x, sigma, label, carry)

    steps = list(sampler(counted, noise(), schedule(18), None))
    assert steps[-1].nfe == len(carries) == calls
    assert carries == [None, *range(1, calls)]
    assert [step.noise_level for step in steps] == schedule(18)[:-1].tolist()


def test_a_step_shows_the_image_predicted_where_it_began():
    first, second = list(heun(exact, noise(), schedule(3), None))[:2]
    assert torch.equal(second.image, exact(first.x, second.noise_level, None).image)


@pytest.mark.parametrize(("sampler", "step"), [(euler, euler_step), (heun, heun_step)])
def test_a_sampler_is_its_single_steps_one_after_another(sampler, step):
    sigmas = schedule(4).tolist()
    x = sigmas[0] * noise().double()
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x, _ = step(exact, x, sigma, sigma_next, None)
    assert torch.equal(x, finish(sampler(exact, noise(), schedule(4), None)).x)


def test_a_single_step_is_differentiable():
    x = noise().double().requires_grad_()
    heun_step(exact, x, 2.0, 1.0, None)[0].sum().backward()
    assert (x.grad > 0).all()


def test_a_state_that_is_not_finite_is_reported_from_then_on():
    def breaking(x, sigma, label, carry=None):
        image = torch.zeros_like(x)
        image[1] = torch.nan if sigma < 1 else 0
        return Denoised(image, None, None)

    steps = list(euler(breaking, noise().expand(2, -1, -1, -1), schedule(5), None))
    for step in steps:
        assert step.diverged.tolist() == [False, step.noise_level < 1]


def test_churn_consumes_one_noise_a_step_and_adds_it_between_its_limits_only():
    drawn = []

    def zeros(step):
        drawn.append(step)
        return torch.zeros(1, 3, 2, 2)

    still = finish(heun(exact, noise(), schedule(6), None)).x
    outside = finish(heun(exact, noise(), schedule(6), None, Churn(3.0, 90.0, 100.0, 1.0), zeros)).x
    inside = finish(heun(exact, noise(), schedule(6), None, Churn(3.0, 0.05, 50.0, 1.0), zeros)).x
    assert drawn == 2 * list(range(6))
    assert torch.equal(outside, still)
    assert not torch.equal(inside, still)


def test_churn_raises_sigma_by_a_factor_of_the_root_of_two_at_most():
    assert Churn(100.0, 0.05, 50.0, 1.0).gamma(1.0, 6) == math.sqrt(2) - 1


def test_sampling_keeps_no_graph():
    start = noise().requires_grad_()
    assert not finish(heun(exact, start, schedule(2), None)).x.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sigmas", [[80.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, -1.0]])
def test_levels_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        finish(euler(exact, noise(), torch.tensor(sigmas, dtype=torch.float64), None))


def test_churn_without_noises_is_refused():
    with pytest.raises(ValueError, match="noises"):
        finish(heun(exact, noise(), schedule(2), None, PUBLISHED_CHURN))
