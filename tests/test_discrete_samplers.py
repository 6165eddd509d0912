"""DDPM and DDIM against the published implementations, and on normal data, where all is known."""

import math

import pytest
import torch
from test_discrete import KINDS, published_diffusion, reference
from test_unet import assert_agree

from equilab.diffusion.discrete import evenly, velocity
from equilab.diffusion.discrete_samplers import ddim, ddpm, explicit, finish, fresh, guided, implicit
from equilab.solvers import Solver
from equilab.solvers.budget import Budget

PLAIN = {"reuse": False, "clamp": False}
ITERATE = Solver("iterate", 3, 0.0, "last")


def of(variance, prediction="v", zero=True):
    return published_diffusion(prediction, zero, variance)


def start():
    return torch.linspace(-2, 2, 12).reshape(2, 1, 2, 3)


def nothing(step):
    return torch.zeros(2, 1, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clamp", [False, True])
def test_single_steps_are_the_published_ones(kind, clamp):
    diffusion, given, out = reference(kind)
    prefix = "clip_" if clamp else ""
    for i, position in enumerate(given("step.t_index").tolist()):
        x, output = given("step.x_t")[i : i + 1], given("step.model_output")[i : i + 1]
        chain = diffusion.chain(evenly(1000, 20)[: position + 1])

        def first(sampler, **options):
            net, noise = explicit(lambda x, t, label: output), given("step.noise")[i : i + 1]
            step = next(sampler(net, x, chain, None, lambda step: noise, reuse=False, clamp=clamp, **options))
            assert step.t == out("step.t_seen_by_model")[i]
            return step.x

        assert_agree(first(ddpm).float(), out(f"step.{prefix}ddpm_sample")[i : i + 1], 1e-5)
        for eta in (0.0, 0.5):
            sample = first(ddim, eta=eta).float()
            assert_agree(sample, out(f"step.{prefix}ddim_eta{eta}_sample")[i : i + 1], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_are_the_published_ones(kind):
    diffusion, given, out = reference(kind)
    chain, noise, noises = (
        diffusion.chain(evenly(1000, 20)),
        given("loop.x_T"),
        lambda step: given("loop.noises")[step],
    )

    def net(x, t, label):
        assert x.dtype == torch.float32
        return torch.cat([0.5 * x.cos() + 0.001 * t[:, None, None, None], (2 * x).sin()], 1)

    last = finish(ddpm(explicit(net), noise, chain, None, noises, **PLAIN))
    assert (last.nfe, last.t, last.solution, last.x.dtype) == (20, 0, None, torch.float64)
    assert_agree(last.x.float(), out("loop.ddpm"), 1e-4)
    assert_agree(
        finish(ddim(explicit(net), noise, chain, None, eta=0.0, **PLAIN)).x.float(), out("loop.ddim"), 1e-4
    )


def denoiser(chain, mean, std):
    """Return the best predict for normal data, whose learned variance is the true one of each step back.

    The image given x is normal: its precision is that of the data plus the SNR.
    """
    diffusion = chain.diffusion

    def net(x, t, label):
        position = (chain.t == t[0]).nonzero()[0]
        level = chain.at(position)
        snr = level.alpha_bar / (1 - level.alpha_bar)
        spread = 1 / (1 / std**2 + snr)
        image = mean + spread * level.alpha_bar.sqrt() / (1 - level.alpha_bar) * (
            x - level.alpha_bar.sqrt() * mean
        )
        noise = (x - level.alpha_bar.sqrt() * image) / (1 - level.alpha_bar).sqrt()
        prediction = noise if diffusion.prediction == "noise" else velocity(image, noise, level)
        if diffusion.variance != "learned":
            return prediction
        coefficient = level.before.sqrt() * (1 - level.alpha_bar / level.before) / (1 - level.alpha_bar)
        true = (level.log_small.exp() + coefficient**2 * spread).log()
        value = 2 * (true - level.log_small) / (level.log_large - level.log_small) - 1
        return torch.cat([prediction, value.expand_as(prediction)], 1)

    return explicit(net)


def moments(sampler, chain, predict, **options):
    """Return mean and standard deviation of what a sampler, affine in its noises, makes of unit noise."""
    count = len(chain.t)
    units = torch.eye(
        count + 1, count, dtype=torch.float64
    )  # row i: one of the noises is 1; the last row: none

    def noises(step):
        return units[:, step + 1 if step + 1 < count else 0][:, None, None, None]

    x = finish(
        sampler(predict, units[:, 0][:, None, None, None], chain, None, noises, **PLAIN, **options)
    ).x.flatten()
    return x[-1].item(), (x[:-1] - x[-1]).norm().item()


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("steps", [3, 5, 40])
def test_ddpm_with_the_true_variances_samples_normal_data_exactly_in_any_number_of_steps(prediction, steps):
    """Up to the last step, which adds no noise: it leaves out the variance of the image at the cleanest timestep."""
    t = [10, 600, 999] if steps == 3 else evenly(1000, steps)
    chain = of("learned", prediction, zero=prediction == "v").chain(t)
    mean, std = moments(ddpm, chain, denoiser(chain, 0.0 if prediction == "noise" else 0.3, 0.5))
    first, last = chain.levels[0][0].item(), chain.levels[0][-1].item()
    missing = 1 / (4 + first / (1 - first))
    assert mean == pytest.approx(0.0 if prediction == "noise" else 0.3, abs=1e-9)
    # without zero terminal SNR the state starts with variance 1, a little too large
    assert std == pytest.approx(math.sqrt(0.25 - missing), rel=1e-9 if prediction == "v" else last)


def test_ddpm_keeps_unit_normal_data_with_the_large_variance_and_constant_data_with_the_small_one():
    chain = of("large").chain(evenly(1000, 7))
    mean, std = moments(ddpm, chain, denoiser(chain, 0.0, 1.0))
    assert (mean, std) == (0, pytest.approx(math.sqrt(0.9999), rel=1e-9))
    chain = of("small").chain(evenly(1000, 7))
    mean, std = moments(ddpm, chain, denoiser(chain, 0.7, 1e-9))
    assert (mean, std) == (pytest.approx(0.7), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("zero", [False, True])
def test_ddim_turns_unit_normal_data_by_the_angles_between_timesteps(zero):
    chain = of("learned", zero=zero).chain(evenly(1000, 9))
    angles = [math.acos(math.sqrt(a)) for a in chain.levels[0].tolist()]
    shrink = math.prod(math.cos(b - a) for a, b in zip([0.0, *angles], angles))
    last = finish(ddim(denoiser(chain, 0.0, 1.0), start(), chain, None, eta=0.0, **PLAIN))
    torch.testing.assert_close(last.x, shrink * start().double(), rtol=1e-6, atol=0)


def test_the_error_of_ddim_on_normal_data_falls_with_the_length_of_the_steps():
    diffusion, errors = of("small"), []
    for steps in (10, 20, 40, 80):
        chain = diffusion.chain(evenly(1000, steps))
        mean, std = moments(ddim, chain, denoiser(chain, 0.3, 0.5), eta=0.0)
        assert mean == pytest.approx(0.3, abs=0.05)
        errors.append(abs(std - 0.5))
    assert all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:]))


def test_ddim_of_eta_one_is_ddpm_of_the_small_variance():
    chain = of("small").chain(evenly(1000, 12))
    predict, noise = (
        denoiser(chain, 0.3, 0.5),
        torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
    )
    noises = fresh(0, "test", [0, 1], noise)
    one = [step.x for step in ddpm(predict, noise, chain, None, noises, **PLAIN)]
    other = [step.x for step in ddim(predict, noise, chain, None, noises, eta=1.0, **PLAIN)]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_images_do_not_depend_on_the_batch_and_the_last_step_draws_nothing():
    chain = of("learned").chain(evenly(1000, 6))
    net = explicit(lambda x, t, label: torch.cat([x.sin() + 0.001 * t[:, None, None, None], x.cos()], 1))
    noise, drawn = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), []
    whole = finish(ddpm(net, noise, chain, None, fresh(3, "test", [5, 6, 7, 8], noise), **PLAIN)).x
    for rows in ([0], [2, 1], [3]):
        one = fresh(3, "test", [5 + i for i in rows], noise[rows])
        part = finish(
            ddpm(net, noise[rows], chain, None, lambda step: drawn.append(step) or one(step), **PLAIN)
        ).x
        assert torch.equal(part, whole[rows])
    assert drawn == 3 * list(range(5))
    assert not torch.equal(fresh(3, "test", [5], noise[:1])(0), fresh(3, "test", [5], noise[:1])(1))


def test_a_step_shows_the_timestep_the_predicted_image_and_the_state():
    chain, calls = of("small").chain([0, 400, 999]), []

    def net(x, t, label):
        calls.append((t.tolist(), label.tolist()))
        return torch.zeros_like(x)  # v of 0: the image is signal * x

    steps = list(ddim(explicit(net), start(), chain, torch.tensor([3, 4]), eta=0.0, **PLAIN))
    assert [step.t for step in steps] == [999, 400, 0]
    assert calls == [([t, t], [3, 4]) for t in (999, 400, 0)]
    assert [step.nfe for step in steps] == [1, 2, 3]
    torch.testing.assert_close(steps[1].image, steps[0].x * chain.levels[0][1].sqrt(), rtol=1e-6, atol=1e-9)
    assert torch.equal(steps[2].x, steps[2].image)
    clamped = finish(
        ddim(explicit(lambda x, t, label: -9 * x), start(), chain, None, eta=0.0, reuse=False, clamp=True)
    )
    assert clamped.x.abs().max() == 1


def test_sampling_keeps_no_graph():
    chain, noise = of("small").chain([0, 999]), start().requires_grad_()
    assert not finish(
        ddpm(explicit(lambda x, t, label: x), noise, chain, None, nothing, **PLAIN)
    ).x.requires_grad
    assert torch.is_grad_enabled()


class Toy:
    """An implicit network: its state solves z = (z + x)/2 for each pixel, so it is x; its prediction of v is -z / 2.

    It keeps what it was called with.
    """

    def __init__(self, slope=0.5):
        self.slope, self.carries, self.labels = slope, [], []

    def __call__(self, x, t, label, carry, solve):
        self.carries.append(carry)
        self.labels.append(label)
        tokens = x.flatten(1)[:, None]  # (B, 1, D)

        def f(z, rows):
            return self.slope * z + 0.5 * (tokens if rows is None else tokens[rows])

        solution = solve(f, torch.zeros_like(tokens) if carry is None else carry)
        return -0.5 * solution.z.reshape(x.shape), solution


def test_solutions_are_carried_from_step_to_step_only_where_they_are_reused():
    chain = of("small").chain(evenly(1000, 8))
    residuals = {}
    for reuse in (False, True):
        toy = Toy()
        steps = list(ddim(implicit(toy, ITERATE), start(), chain, None, eta=0.0, reuse=reuse, clamp=False))
        carried = [step.solution.z for step in steps[:-1]]
        assert toy.carries[0] is None
        for carry, z in zip(toy.carries[1:], carried, strict=True):
            assert (carry is z) == reuse and (carry is None) != reuse
        assert all(step.solution.iterations.tolist() == [3, 3] and not step.diverged.any() for step in steps)
        residuals[reuse] = torch.stack([step.solution.residuals[:, -1] for step in steps])
    assert torch.equal(residuals[True][0], residuals[False][0])
    assert (residuals[True][2:] < residuals[False][2:]).all()
    again = list(ddim(implicit(Toy(), ITERATE), start(), chain, None, eta=0.0, reuse=True, clamp=False))
    assert torch.equal(again[-1].x, steps[-1].x)


@pytest.mark.parametrize("kind", ["constant", "increasing", "decreasing", "adaptive"])
def test_a_budget_gives_each_step_its_iterations_and_is_spent_exactly(kind):
    chain = of("small").chain(evenly(1000, 8))
    for total in (8, 19, 50):
        options = {"reuse": True, "clamp": False, "budget": Budget(kind, total)}
        steps = list(ddim(implicit(Toy(), ITERATE), start(), chain, None, eta=0.0, **options))
        counts = [step.solution.iterations.tolist() for step in steps]
        assert [sum(each) for each in zip(*counts)] == [total, total]
        if kind == "increasing":
            assert counts == sorted(counts)
    with pytest.raises(ValueError, match="^total is 7, but each of 8 steps needs 1"):
        ddpm(implicit(Toy(), ITERATE), start(), chain, None, nothing, **PLAIN, budget=Budget(kind, 7))


def test_samples_may_stop_by_themselves_and_still_carry_their_states():
    chain, solver = of("small").chain(evenly(1000, 5)), Solver("iterate", 60, 1e-4, "last")
    noise = torch.stack([torch.full((1, 2, 3), 1.0), torch.linspace(-3, 3, 6).reshape(1, 2, 3)])
    together = list(ddim(implicit(Toy(), solver), noise, chain, None, eta=0.0, reuse=True, clamp=False))
    alone = list(ddim(implicit(Toy(), solver), noise[1:], chain, None, eta=0.0, reuse=True, clamp=False))
    for one, other in zip(together, alone, strict=True):
        assert one.solution.converged.all() and one.solution.iterations[1] == other.solution.iterations[0]
        assert torch.equal(one.x[1:], other.x)


def test_a_sample_that_diverges_is_reported_from_then_on_and_stands_still():
    chain = of("small").chain([0, 200, 400, 600, 999])

    def bursts(x, t, label, carry, solve):
        output, solution = Toy()(x, t, label, carry, solve)
        scale = torch.ones(3, 1, 1, 1)
        if t[0] == 600:
            solution = solution._replace(diverged=torch.tensor([False, True, False]))
        if t[0] == 400:
            scale[2] = math.inf
        return output * scale, solution

    noise = torch.cat([start(), start()[:1]])
    for clamp in (False, True):
        steps = list(ddim(implicit(bursts, ITERATE), noise, chain, None, eta=0.0, reuse=True, clamp=clamp))
        sound = list(ddim(implicit(Toy(), ITERATE), noise, chain, None, eta=0.0, reuse=True, clamp=clamp))
        reported = [step.diverged.tolist() for step in steps]
        assert reported == [[False] * 3, [False, True, False], *[[False, True, True]] * 3]
        for step, other in zip(steps, sound):
            assert step.x.isfinite().all() and step.image.isfinite().all()
            assert torch.equal(step.x[0], other.x[0])
        assert torch.equal(steps[-1].x[1], steps[0].x[1]) and torch.equal(steps[-1].x[2], steps[1].x[2])


def test_a_map_that_grows_is_a_sample_that_diverges():
    chain = of("small").chain([0, 999])
    steps = list(ddim(implicit(Toy(1e9), ITERATE), start(), chain, None, eta=0.0, reuse=True, clamp=False))
    assert all(step.diverged.all() for step in steps) and torch.equal(steps[-1].x, start().double())


def test_guidance_pulls_away_from_the_null_class_and_its_halves_keep_their_solutions():
    chain, label = of("small").chain(evenly(1000, 4)), torch.tensor([1, 2])

    def net(x, t, label, carry, solve):
        output, solution = toy(x, t, label, carry, solve)
        return output + 0.1 * label[:, None, None, None], solution

    toy, null = Toy(), 7
    predict = guided(implicit(net, ITERATE), 3.0, null, "all")
    steps = list(
        ddim(predict, start(), chain, label, eta=0.0, reuse=True, clamp=False, budget=Budget("adaptive", 9))
    )
    assert all(labels.tolist() == [1, 2, 7, 7] for labels in toy.labels)
    assert [len(step.solution.z) for step in steps] == [4] * 4
    assert all(carry is step.solution.z for carry, step in zip(toy.carries[1:], steps))
    assert sum(step.solution.iterations for step in steps).tolist() == [9] * 4

    x, t, carry = start(), torch.full((2,), 5), torch.randn(4, 1, 6)
    output, solution = predict(x, t, label, carry, 2)
    with_label, first = implicit(net, ITERATE)(x, t, label, carry[:2], 2)
    without, second = implicit(net, ITERATE)(x, t, torch.tensor([7, 7]), carry[2:], 2)
    torch.testing.assert_close(output, without + 3 * (with_label - without))
    torch.testing.assert_close(solution.z, torch.cat([first.z, second.z]))
    torch.testing.assert_close(
        guided(implicit(net, ITERATE), 1.0, null, "all")(x, t, label, carry, 2)[0], with_label
    )


@pytest.mark.parametrize(("channels", "count"), [("all", 5), ("first_three", 3)])
def test_guidance_leaves_the_variance_and_as_published_all_but_three_channels_alone(channels, count):
    net = explicit(lambda x, t, label: torch.cat([x, 2 * x], 1) * label[:, None, None, None])
    x, t = torch.ones(2, 5, 1, 1), torch.zeros(2, dtype=torch.int64)
    output, solution = guided(net, 4.0, 0, channels)(x, t, torch.tensor([1, 1]), None, None)
    assert solution is None
    assert output[0].flatten().tolist() == [4.0] * count + [1.0] * (5 - count) + [2.0] * 5


def test_one_half_that_diverges_is_a_sample_that_diverges():
    chain, label = of("small").chain([0, 999]), torch.tensor([1, 1])

    def net(x, t, label, carry, solve):
        output, solution = Toy()(x, t, label, carry, solve)
        return output, solution._replace(diverged=torch.tensor([False, False, True, False]))

    predict = guided(implicit(net, ITERATE), 2.0, 0, "all")
    step = next(ddim(predict, start(), chain, label, eta=0.0, **PLAIN))
    assert step.diverged.tolist() == [True, False]


def test_what_does_not_fit_is_refused_in_a_sentence():
    chain, x, t = of("small").chain([0, 999]), start(), torch.tensor([5, 5])
    predict = implicit(Toy(), ITERATE)
    with pytest.raises(ValueError, match="^carry holds 3 states for 2 samples; hand in theirs, or None$"):
        predict(x, t, None, torch.zeros(3, 1, 6), None)
    with pytest.raises(ValueError, match="^t mixes timesteps, but a carry is of one; "):
        predict(x, torch.tensor([5, 6]), None, torch.zeros(2, 1, 6), None)
    predict(x, torch.tensor([5, 6]), None, None, None)
    with pytest.raises(ValueError, match="^iterations is 0; give 1 or more$"):
        predict(x, t, None, None, 0)
    for eta in (-0.1, 1.1, 0.5):
        with pytest.raises(ValueError, match=f"^eta is {eta}; give 0..1 and, above 0, noises"):
            ddim(predict, x, chain, None, eta=eta, **PLAIN)
    with pytest.raises(ValueError, match="^channels is 'three'; choose"):
        guided(predict, 2.0, 0, "three")
    with pytest.raises(ValueError, match="^there is no label to guide towards"):
        guided(predict, 2.0, 0, "all")(x, t, None, None, None)
    plain = explicit(lambda x, t, label: x)
    for options in ({"reuse": True}, {"reuse": False, "budget": Budget("constant", 4)}):
        with pytest.raises(ValueError, match="^predict returns no solution, .* without reuse and budget$"):
            next(ddim(plain, x, chain, None, eta=0.0, clamp=False, **options))
    with pytest.raises(ValueError, match="^predict returns 3 states for 2 samples; "):
        next(ddim(lambda *a: predict(torch.cat([x, x[:1]]), *a[1:]), x, chain, None, eta=0.0, **PLAIN))
    with pytest.raises(ValueError, match="^output has 1 channels, .* it needs 2; "):
        next(ddim(plain, x, of("learned").chain([0, 999]), None, eta=0.0, **PLAIN))
    silent = implicit(Toy(), Solver("iterate", 3, 0.0, "last", measure=False))
    with pytest.raises(ValueError, match="^a trace is empty, .* solve with measure=True$"):
        list(ddim(silent, x, chain, None, eta=0.0, **PLAIN, budget=Budget("adaptive", 9)))
