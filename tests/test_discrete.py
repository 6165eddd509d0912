"""Discrete diffusion and its losses: against the published implementations, and in closed form."""

import math

import pytest
import torch
from conftest import close, golden
from reference import DIFFUSIONS, published_diffusion

from equilab.diffusion import discrete_losses as losses
from equilab.diffusion.discrete import (
    Diffusion,
    evenly,
    image_of_noise,
    image_of_v,
    noise_of_image,
    noised,
    posterior_mean,
    velocity,
)


def exactly(ours, published):
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize(
    ("kind", "part", "compared"),
    [
        ("noise", "full", 6),
        ("noise", "respaced20", 7),
        ("v", "full", 3),
        ("v", "respaced20", 6),
        ("zero", "full", 3),
        ("zero", "respaced20", 6),
    ],
)
def test_the_levels_of_all_timesteps_and_of_twenty_are_the_published_ones(kind, part, compared):
    published = DIFFUSIONS[kind].values("out")
    chain = DIFFUSIONS[kind].diffusion.chain(None if part == "full" else evenly(1000, 20))
    level = chain.at(torch.arange(len(chain.t)))
    ones, zeros = torch.ones_like(level.alpha_bar), torch.zeros_like(level.alpha_bar)
    ours = {
        "timesteps": chain.t,
        "alphas_cumprod": level.alpha_bar,
        "snrs": level.alpha_bar / (1 - level.alpha_bar),
        "betas": level.log_large.exp(),
        "posterior_variance": torch.cat([zeros[:1], level.log_small[1:].exp()]),
        "posterior_log_variance_clipped": level.log_small,
        "posterior_mean_coef1": posterior_mean(ones, zeros, level),
        "posterior_mean_coef2": posterior_mean(zeros, ones, level),
    }
    stored = [key for key in ours if f"{part}.{key}" in published]
    assert len(stored) == compared
    for key in stored:
        exactly(ours[key].flatten(), published[f"{part}.{key}"])


def test_timesteps_are_spaced_as_published():
    published, _ = golden("diffusion_eps")
    assert evenly(1000, 250) == published["out.space_timesteps.250"].tolist()
    assert evenly(1000, 20) == published["out.respaced20.timesteps"].tolist()
    assert evenly(1000, 1) == [999]
    for steps in range(2, 101):
        t = evenly(100, steps)
        assert (t[0], t[-1], len(set(t)), sorted(t)) == (0, 99, steps, t)


@pytest.mark.parametrize("steps", [0, 101])
def test_more_steps_than_timesteps_or_none_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}.*100"):
        evenly(100, steps)


def test_any_timesteps_that_rise_are_a_chain():
    diffusion = DIFFUSIONS["v"].diffusion
    strided = list(range(0, 1000, 50))
    assert strided == golden("diffusion_eps")[0]["out.space_timesteps.ddim20"].tolist()
    chain = diffusion.chain(strided)
    assert torch.equal(chain.levels[0], diffusion.alpha_bar()[::50])
    single = diffusion.chain([999]).at(torch.tensor([0]))
    assert single.before.item() == 1 and single.log_small.item() == single.log_large.item()


@pytest.mark.parametrize("t", [[], [3, 2], [1, 1], [-1, 4], [5, 1000]])
def test_timesteps_that_do_not_rise_within_the_diffusion_are_refused(t):
    with pytest.raises(ValueError, match="999"):
        DIFFUSIONS["v"].diffusion.chain(t)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"timesteps": 1}, "timesteps"),
        ({"beta_start": 0.0}, "beta_start is 0.0"),
        ({"beta_start": 0.03}, "beta_start is 0.03"),
        ({"beta_end": 1.0}, "beta_end 1.0"),
        ({"beta_end": 0.99, "timesteps": 4000}, "beta_end=0.99"),
        ({"beta_end": 0.99, "timesteps": 4000, "zero_terminal_snr": True}, "beta_end=0.99"),
        ({"prediction": "noise", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"prediction": "velocity"}, "prediction"),
        ({"variance": "fixed"}, "variance"),
    ],
)
def test_what_is_no_diffusion_is_refused_by_name(change, key):
    valid = published_diffusion("v", zero_terminal_snr=False).model_dump()
    with pytest.raises(ValueError, match=key):
        Diffusion(**valid | change)


def test_image_noise_and_v_determine_each_other():
    torch.manual_seed(0)
    image, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    level = DIFFUSIONS["zero"].diffusion.chain().at(torch.tensor([0, 1, 500, 998, 999]))
    x, v = noised(image, noise, level), velocity(image, noise, level)
    exactly(image_of_v(x, v, level), image)
    torch.testing.assert_close(noise_of_image(x, image, level), noise, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(image_of_noise(x, noise, level)[:3], image[:3], rtol=1e-9, atol=1e-12)
    assert torch.equal(x[4], noise[4]) and torch.equal(v[4], -image[4])  # at SNR 0
    angle = level.alpha_bar.sqrt().acos()
    exactly(x, angle.cos() * image + angle.sin() * noise)
    torch.testing.assert_close(velocity(image.float(), noise.float(), level), v.float())


def test_the_posterior_is_that_of_two_normal_distributions():
    """x1 = a x0 + noise known before x2 = b x1 + noise is seen: precisions add."""
    chain = DIFFUSIONS["v"].diffusion.chain([300, 600])
    level = chain.at(torch.tensor([1]))
    first, second = chain.levels[0]
    b, spread = (second / first).sqrt(), 1 - second / first
    precision = 1 / (1 - first) + b**2 / spread
    image, x = torch.tensor([[0.3]]), torch.tensor([[-1.2]])
    mean = (first.sqrt() * image / (1 - first) + b * x / spread) / precision
    torch.testing.assert_close(posterior_mean(image[None, None], x[None, None], level)[0, 0], mean.float())
    exactly(level.log_small.exp().squeeze(), 1 / precision)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_images_means_and_variances_of_a_step_are_the_published_ones(kind):
    given, out = DIFFUSIONS[kind].values("in"), DIFFUSIONS[kind].values("out")
    chain = DIFFUSIONS[kind].diffusion.chain(evenly(1000, 20))
    x, position = given["step.x_t"], given["step.t_index"]
    level = chain.at(position)
    prediction, value = chain.split(given["step.model_output"], 3)
    predicted = chain.image(x, prediction, level)
    log_variance = chain.log_variance(value, level)
    for prefix, image in (("", predicted), ("clip_", predicted.clamp(-1, 1))):
        close(image, out[f"step.{prefix}pred_xstart"], 1e-5)
        close(posterior_mean(image, x, level), out[f"step.{prefix}mean"], 1e-5)
        close(log_variance, out[f"step.{prefix}log_variance"], 1e-6)
        close(log_variance.exp(), out[f"step.{prefix}variance"], 1e-5)
    assert torch.equal(chain.t[position], out["step.t_seen_by_model"])


@pytest.mark.parametrize("variance", ["small", "large"])
def test_variances_that_are_not_learned_are_the_published_ones_where_they_are_used(variance):
    published, _ = golden("diffusion_eps")
    chain = published_diffusion("noise", False, variance).chain(evenly(1000, 20))
    at = published["in.step.t_index"]
    prediction, value = chain.split(published["in.step.x_t"], 3)
    assert value is None and torch.equal(prediction, published["in.step.x_t"])
    ours = chain.log_variance(None, chain.at(at)).flatten().float()
    # at index 0 no noise is added
    close(ours[1:], published[f"out.step.fixed_{variance}.log_variance"][1:], 1e-6)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_training_losses_are_the_published_ones(kind):
    given, out = DIFFUSIONS[kind].values("in"), DIFFUSIONS[kind].values("out")
    chain = DIFFUSIONS[kind].diffusion.chain()
    image, noise, output = given["train.x0"], given["train.noise"], given["train.model_output"]
    level = chain.at(given["train.t"])
    x = noised(image, noise, level)
    close(x, out["train.x_t"], 1e-6)
    close(posterior_mean(image, x, level), out["train.posterior_mean"], 1e-5)
    error = losses.error(chain, output, image, noise, level, "uniform" if kind == "noise" else "published")
    bound = losses.bound(chain, output, image, noise, level)
    assert error.dtype == bound.dtype == torch.float32
    close(error, out["train.mse"], 1e-5)
    close(bound, out["train.vb"], 1e-5)
    close(error + bound, out["train.loss"], 1e-5)
    if kind == "zero":
        assert error[4] == out["train.mse"][4] == 0  # t = 999: SNR 0


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_bound_trains_the_variance_alone_and_the_error_the_prediction_alone(kind):
    given = DIFFUSIONS[kind].values("in")
    chain = DIFFUSIONS[kind].diffusion.chain()
    output = given["train.model_output"].requires_grad_()
    rest = given["train.x0"], given["train.noise"], chain.at(given["train.t"])
    (gradient,) = torch.autograd.grad(losses.bound(chain, output, *rest).sum(), output)
    assert gradient.isfinite().all()
    assert not gradient[:, :3].any() and gradient[:, 3:].flatten(1).any(1).all()
    (gradient,) = torch.autograd.grad(losses.error(chain, output, *rest, "uniform").sum(), output)
    assert not gradient[:, 3:].any() and gradient[:, :3].flatten(1).any(1).all()


@pytest.mark.parametrize("kind", ["v", "zero"])
def test_the_published_weight_of_v_is_that_of_the_image_it_implies(kind):
    diffusion = DIFFUSIONS[kind].diffusion
    alpha_bar = diffusion.alpha_bar()
    weight = losses.v_weight(diffusion.chain().at(torch.arange(1000)))
    exactly(weight, DIFFUSIONS[kind].values("out")["full.loss_weight_on_x0_error"] * (1 - alpha_bar))
    assert (weight[-1] == 0) == (kind == "zero")
    assert weight.argmax() == (alpha_bar - 2 / 3).abs().argmin()


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_error_of_a_prediction_that_is_off_by_one_is_its_weight(kind):
    image, noise = torch.rand(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    chain = DIFFUSIONS[kind].diffusion.chain()
    level = chain.at(torch.tensor([0, 700, 999]))
    target = noise if kind == "noise" else velocity(image, noise, level)
    output = torch.cat([target + 1, torch.zeros(3, 2, 2, 2)], 1)
    torch.testing.assert_close(losses.error(chain, output, image, noise, level, "uniform"), torch.ones(3))
    if kind != "noise":
        error = losses.error(chain, output, image, noise, level, "published")
        torch.testing.assert_close(error, losses.v_weight(level).float())


def test_the_bound_of_a_perfect_prediction_is_what_its_variance_costs():
    chain = DIFFUSIONS["v"].diffusion.chain()
    level = chain.at(torch.tensor([1, 10, 300, 999]))
    image, noise = torch.rand(2, 4, 1, 2, 2, dtype=torch.float64)
    v = velocity(image, noise, level)
    small = losses.bound(chain, torch.cat([v, torch.full_like(v, -1)], 1), image, noise, level)
    torch.testing.assert_close(small, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    large = losses.bound(chain, torch.cat([v, torch.full_like(v, 1)], 1), image, noise, level)
    ratio = (level.log_large - level.log_small).flatten()
    torch.testing.assert_close(large, (ratio + (-ratio).exp() - 1) / 2 / math.log(2), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.2), (0.9, 0.05), (0.0, 0.01)])
def test_the_probabilities_of_all_bins_sum_to_one_and_are_nearly_normal(mean, deviation):
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1)
    log_variance = torch.full_like(bins, 2 * math.log(deviation))
    probabilities = losses.log_likelihood(bins, torch.full_like(bins, mean), log_variance).exp().flatten()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    edges = torch.special.ndtr((bins.flatten()[:-1] + 1 / 255 - mean) / deviation)
    normal = torch.cat([edges[:1], edges.diff(), 1 - edges[-1:]])
    torch.testing.assert_close(probabilities, normal, rtol=0, atol=4e-4)


def test_the_losses_of_equal_parts_average_to_the_loss_of_the_batch():
    given = DIFFUSIONS["zero"].values("in")
    chain = DIFFUSIONS["zero"].diffusion.chain()

    def bound(rows):
        output, image, noise = (
            given[f"train.{name}"][rows].double() for name in ("model_output", "x0", "noise")
        )
        return losses.bound(chain, output, image, noise, chain.at(given["train.t"][rows]))

    parts = torch.cat([bound(slice(i, i + 1)) for i in range(5)])
    torch.testing.assert_close(parts, bound(slice(None)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("diffusion", "channels", "weight", "named"),
    [
        (published_diffusion("v", False), 3, "uniform", "3 channels.* 6"),
        (published_diffusion("v", False, "small"), 6, "uniform", "6 channels.* 3"),
    ],
)
def test_an_error_that_does_not_fit_the_diffusion_is_refused(diffusion, channels, weight, named):
    chain, image, output = diffusion.chain(), torch.zeros(1, 3, 2, 2), torch.zeros(1, channels, 2, 2)
    with pytest.raises(ValueError, match=named):
        losses.error(chain, output, image, image, chain.at(torch.tensor([5])), weight)
