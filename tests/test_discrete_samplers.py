"""DDPM and DDIM against the published implementations, and on normal data, where all is known."""

import math

import pytest
import torch
from conftest import close
from reference import DIFFUSIONS, published_diffusion

from equilab.diffusion.discrete import evenly, velocity
from equilab.diffusion.discrete_samplers import (
    ddim,
    ddim_step,
    ddpm,
    ddpm_step,
    explicit,
    fresh,
    guided,
    implicit,
)
from equilab.diffusion.protocols import finish
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


def last_of(sampler, predict, noise, chain, label=None, noises=None, **options):
    """Return the last step of a sampler without reuse and clamping, unless told otherwise."""
    return finish(sampler(predict, noise, chain, label, noises, **PLAIN | options))


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("prefix", ["", "clip_"])
def test_single_steps_are_the_published_ones(kind, prefix):
    given, out = DIFFUSIONS[kind].values("in"), DIFFUSIONS[kind].values("out")
    chain = DIFFUSIONS[kind].diffusion.chain(evenly(1000, 20))
    x, position = given["step.x_t"].double(), given["step.t_index"]
    level = chain.at(position)
    prediction, value = chain.split(given["step.model_output"].double(), 3)
    image = chain.image(x, prediction, level)
    if prefix:
        image = image.clamp(-1, 1)
    noise = given["step.noise"].double() * (position > 0)[:, None, None, None]  # the last step adds none
    sample = ddpm_step(image, x, level, chain.log_variance(value, level), noise)
    close(sample.float(), out[f"step.{prefix}ddpm_sample"], 1e-5)
    for eta in (0.0, 0.5):
        sample = ddim_step(image, x, level, eta, noise)
        close(sample.float(), out[f"step.{prefix}ddim_eta{eta}_sample"], 1e-5)


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("clamp", [False, True])
def test_a_sampler_is_its_single_steps_one_after_another(kind, clamp):
    given = DIFFUSIONS[kind].values("in")
    chain = DIFFUSIONS[kind].diffusion.chain(evenly(1000, 5))
    output, noises = given["step.model_output"][:1].double(), given["loop.noises"][:, :1]
    x = start = given["step.x_t"][:1].double()
    predict = explicit(lambda x, t, label: output)
    steps = list(ddpm(predict, start, chain, None, noises.__getitem__, reuse=False, clamp=clamp))
    for k, step in enumerate(steps):
        level = chain.at(torch.tensor([4 - k]))
        prediction, value = chain.split(output, 3)
        image = chain.image(x, prediction, level)
        image = image.clamp(-1, 1) if clamp else image
        noise = noises[k].double() if k < 4 else None
        x = ddpm_step(image, x, level, chain.log_variance(value, level), noise)
        assert torch.equal(step.image, image)
        assert torch.equal(step.x, x)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_samplers_are_the_published_ones(kind):
    given, out = DIFFUSIONS[kind].values("in"), DIFFUSIONS[kind].values("out")
    chain = DIFFUSIONS[kind].diffusion.chain(evenly(1000, 20))

    def net(x, t, label):
        assert x.dtype == torch.float32
        return torch.cat([0.5 * x.cos() + 0.001 * t[:, None, None, None], (2 * x).sin()], 1)

    last = last_of(ddpm, explicit(net), given["loop.x_T"], chain, noises=given["loop.noises"].__getitem__)
    assert (last.nfe, last.noise_level, last.solutions, last.x.dtype) == (20, 0, (), torch.float64)
    close(last.x.float(), out["loop.ddpm"], 1e-4)
    last = last_of(ddim, explicit(net), given["loop.x_T"], chain, eta=0.0)
    close(last.x.float(), out["loop.ddim"], 1e-4)


def denoiser(chain, mean, std):
    """Return the best predict for normal data, whose learned variance is the true one of each step back.

    The image given x is normal: its precision is that of the data plus the SNR.
    """
    diffusion = chain.diffusion

    def net(x, t, label):
        position = (chain.t == t[0]).nonzero()[0]
        level = chain.at(position)
        root, rest = level.alpha_bar.sqrt(), 1 - level.alpha_bar
        spread = 1 / (1 / std**2 + level.alpha_bar / rest)
        image = mean + spread * root / rest * (x - root * mean)
        noise = (x - root * image) / rest.sqrt()
        prediction = noise if diffusion.prediction == "noise" else velocity(image, noise, level)
        if diffusion.variance != "learned":
            return prediction
        coefficient = level.before.sqrt() * (1 - level.alpha_bar / level.before) / rest
        true = (level.log_small.exp() + coefficient**2 * spread).log()
        value = 2 * (true - level.log_small) / (level.log_large - level.log_small) - 1
        return torch.cat([prediction, value.expand_as(prediction)], 1)

    return explicit(net)


def moments(sampler, chain, predict, **options):
    """Return mean and standard deviation of what a sampler, affine in its noises, makes of unit noise."""
    count = len(chain.t)
    # row i: one of the noises is 1; the last row: none
    units = torch.eye(count + 1, count, dtype=torch.float64)
    units = units.T[:, :, None, None, None]  # the first is the start

    def noises(step):
        return units[step + 1]

    x = last_of(sampler, predict, units[0], chain, noises=noises, **options).x.flatten()
    return x[-1].item(), (x[:-1] - x[-1]).norm().item()


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("t", [[10, 600, 999], evenly(1000, 5), evenly(1000, 40)], ids=["3", "5", "40"])
def test_ddpm_with_the_true_variances_samples_normal_data_exactly_in_any_number_of_steps(prediction, t):
    """Up to the last step, which adds no noise: it leaves out the variance of the image at the cleanest timestep."""
    chain = of("learned", prediction, zero=prediction == "v").chain(t)
    alpha_bar = chain.levels[0].tolist()
    center = 0.3 if prediction == "v" else 0.0
    mean, std = moments(ddpm, chain, denoiser(chain, center, 0.5))
    assert mean == pytest.approx(center, abs=1e-9)
    missing = 1 / (4 + alpha_bar[0] / (1 - alpha_bar[0]))
    # without zero terminal SNR the state starts with variance 1, a little too large
    assert std == pytest.approx(math.sqrt(0.25 - missing), rel=1e-9 if prediction == "v" else alpha_bar[-1])


def test_ddpm_keeps_unit_normal_data_with_the_large_variance():
    chain = of("large").chain(evenly(1000, 7))
    mean, std = moments(ddpm, chain, denoiser(chain, 0.0, 1.0))
    assert (mean, std) == (0, pytest.approx(math.sqrt(0.9999), rel=1e-9))


def test_ddpm_keeps_constant_data_with_the_small_variance():
    chain = of("small").chain(evenly(1000, 7))
    mean, std = moments(ddpm, chain, denoiser(chain, 0.7, 1e-9))
    assert (mean, std) == (pytest.approx(0.7), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("zero", [False, True])
def test_ddim_turns_unit_normal_data_by_the_angles_between_timesteps(zero):
    chain = of("learned", zero=zero).chain(evenly(1000, 9))
    angles = [math.acos(math.sqrt(a)) for a in chain.levels[0].tolist()]
    shrink = math.prod(math.cos(b - a) for a, b in zip([0.0, *angles], angles))
    last = last_of(ddim, denoiser(chain, 0.0, 1.0), start(), chain, eta=0.0)
    torch.testing.assert_close(last.x, shrink * start().double(), rtol=1e-6, atol=0)


def test_the_error_of_ddim_on_normal_data_falls_with_the_length_of_the_steps():
    diffusion, errors = of("small"), []
    for steps in (10, 20, 40, 80):
        chain = diffusion.chain(evenly(1000, steps))
        mean, std = moments(ddim, chain, denoiser(chain, 0.3, 0.5), eta=0.0)
        assert mean == pytest.approx(0.3, abs=0.05)
        errors.append(abs(std - 0.5))
    assert all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:]))


def test_ddim_of_an_eta_above_zero_without_noises_is_refused():
    chain = of("small").chain(evenly(1000, 4))
    with pytest.raises(ValueError, match="noises"):
        ddim(denoiser(chain, 0.3, 0.5), start(), chain, None, eta=0.5, **PLAIN)


def test_ddim_of_eta_one_is_ddpm_of_the_small_variance():
    chain = of("small").chain(evenly(1000, 12))
    predict = denoiser(chain, 0.3, 0.5)
    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    noises = fresh(0, "test", [0, 1], noise)
    one = [step.x for step in ddpm(predict, noise, chain, None, noises, **PLAIN)]
    other = [step.x for step in ddim(predict, noise, chain, None, noises, eta=1.0, **PLAIN)]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_images_do_not_depend_on_the_batch():
    chain = of("learned").chain(evenly(1000, 6))
    predict = explicit(lambda x, t, label: torch.cat([x.sin() + 0.001 * t[:, None, None, None], x.cos()], 1))
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def images(rows):
        noises = fresh(3, "test", [5 + i for i in rows], noise[rows])
        return last_of(ddpm, predict, noise[rows], chain, noises=noises).x

    whole = images([0, 1, 2, 3])
    for rows in ([0], [2, 1], [3]):
        assert torch.equal(images(rows), whole[rows])


def test_fresh_noise_differs_from_step_to_step_and_the_last_step_draws_none():
    chain, drawn = of("small").chain(evenly(1000, 6)), []
    noises = fresh(3, "test", [5, 6], start())
    assert not torch.equal(noises(0), noises(1))

    def observed(step):
        drawn.append(step)
        return noises(step)

    last_of(ddpm, explicit(lambda x, t, label: x), start(), chain, noises=observed)
    assert drawn == [0, 1, 2, 3, 4]


def test_a_step_shows_the_timestep_the_predicted_image_and_the_state():
    chain, calls = of("small").chain([0, 400, 999]), []

    def net(x, t, label):
        calls.append((t.tolist(), label.tolist()))
        return torch.zeros_like(x)  # v of 0: the image is signal * x

    first, second, third = ddim(explicit(net), start(), chain, torch.tensor([3, 4]), eta=0.0, **PLAIN)
    assert [step.noise_level for step in (first, second, third)] == [999, 400, 0]
    assert [step.nfe for step in (first, second, third)] == [1, 2, 3]
    assert calls == [([t, t], [3, 4]) for t in (999, 400, 0)]
    torch.testing.assert_close(second.image, first.x * chain.levels[0][1].sqrt(), rtol=1e-6, atol=1e-9)
    assert torch.equal(third.x, third.image)


def test_clamped_images_stay_within_their_range():
    chain = of("small").chain([0, 400, 999])
    last = last_of(ddim, explicit(lambda x, t, label: -9 * x), start(), chain, eta=0.0, clamp=True)
    assert last.x.abs().max() == 1


def test_sampling_keeps_no_graph():
    chain, noise = of("small").chain([0, 999]), start().requires_grad_()
    last = last_of(ddpm, explicit(lambda x, t, label: x), noise, chain, noises=nothing)
    assert not last.x.requires_grad
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


def steps_of(predict, noise, chain, label=None, **options):
    """Return the steps of a deterministic DDIM that reuses solutions, unless told otherwise."""
    return list(ddim(predict, noise, chain, label, **{"eta": 0.0, "reuse": True, "clamp": False} | options))


@pytest.mark.parametrize("reuse", [False, True])
def test_solutions_are_carried_from_step_to_step_only_where_they_are_reused(reuse):
    toy = Toy()
    steps = steps_of(implicit(toy, ITERATE), start(), of("small").chain(evenly(1000, 8)), reuse=reuse)
    assert toy.carries[0] is None
    for carry, step in zip(toy.carries[1:], steps):
        assert carry is (step.solutions[0].z if reuse else None)
    for step in steps:
        assert step.solutions[0].iterations.tolist() == [3, 3]
        assert not step.diverged.any()


def test_reused_solutions_leave_smaller_residuals():
    chain = of("small").chain(evenly(1000, 8))
    residuals = {}
    for reuse in (False, True):
        steps = steps_of(implicit(Toy(), ITERATE), start(), chain, reuse=reuse)
        residuals[reuse] = torch.stack([step.solutions[0].residuals[:, -1] for step in steps])
    assert torch.equal(residuals[True][0], residuals[False][0])
    assert (residuals[True][2:] < residuals[False][2:]).all()


@pytest.mark.parametrize("kind", ["constant", "increasing", "decreasing", "adaptive"])
@pytest.mark.parametrize("total", [8, 19, 50])
def test_a_budget_gives_each_step_its_iterations_and_is_spent_exactly(kind, total):
    chain = of("small").chain(evenly(1000, 8))
    steps = steps_of(implicit(Toy(), ITERATE), start(), chain, budget=Budget(kind, total))
    counts = [step.solutions[0].iterations.tolist() for step in steps]
    assert [sum(each) for each in zip(*counts)] == [total, total]
    if kind == "increasing":
        assert counts == sorted(counts)


def test_an_adaptive_budget_makes_of_a_sample_what_it_makes_of_it_alone():
    chain, noise = of("small").chain(evenly(1000, 5)), torch.randn(3, 1, 2, 3)
    together = steps_of(implicit(Toy(), ITERATE), noise, chain, budget=Budget("adaptive", 30))
    for k in range(3):
        alone = steps_of(implicit(Toy(), ITERATE), noise[k : k + 1], chain, budget=Budget("adaptive", 30))
        for one, other in zip(together, alone, strict=True):
            assert one.solutions[0].iterations[k] == other.solutions[0].iterations[0]
            torch.testing.assert_close(one.x[k : k + 1], other.x)


def test_a_budget_that_is_too_small_for_the_chain_is_refused():
    chain = of("small").chain(evenly(1000, 8))
    with pytest.raises(ValueError, match=r"total is 7.* 8 steps"):
        steps_of(implicit(Toy(), ITERATE), start(), chain, budget=Budget("constant", 7))


def test_samples_may_stop_by_themselves_and_still_carry_their_states():
    chain, solver = of("small").chain(evenly(1000, 5)), Solver("iterate", 60, 1e-4, "last")
    noise = torch.stack([torch.full((1, 2, 3), 1.0), torch.linspace(-3, 3, 6).reshape(1, 2, 3)])
    together = steps_of(implicit(Toy(), solver), noise, chain)
    alone = steps_of(implicit(Toy(), solver), noise[1:], chain)
    for one, other in zip(together, alone, strict=True):
        assert one.solutions[0].converged.all()
        assert one.solutions[0].iterations[1] == other.solutions[0].iterations[0]
        assert torch.equal(one.x[1:], other.x)


@pytest.mark.parametrize("clamp", [False, True])
def test_a_sample_that_diverges_is_reported_from_then_on_and_stands_still(clamp):
    chain = of("small").chain([0, 200, 400, 600, 999])

    def breaking(x, t, label, carry, solve):
        output, solution = Toy()(x, t, label, carry, solve)
        if t[0] == 600:
            solution = solution._replace(diverged=torch.tensor([False, True, False]))
        if t[0] == 400:
            output[2] = math.inf
        return output, solution

    noise = torch.cat([start(), start()[:1]])
    steps = steps_of(implicit(breaking, ITERATE), noise, chain, clamp=clamp)
    sound = steps_of(implicit(Toy(), ITERATE), noise, chain, clamp=clamp)
    assert [step.diverged.tolist() for step in steps] == [
        [False, False, False],
        [False, True, False],
        [False, True, True],
        [False, True, True],
        [False, True, True],
    ]
    for step, other in zip(steps, sound):
        assert step.x.isfinite().all() and step.image.isfinite().all()
        assert torch.equal(step.x[0], other.x[0])
    assert torch.equal(steps[-1].x[1], steps[0].x[1])
    assert torch.equal(steps[-1].x[2], steps[1].x[2])


def test_a_map_that_grows_is_a_sample_that_diverges():
    chain = of("small").chain([0, 999])
    steps = steps_of(implicit(Toy(1e9), ITERATE), start(), chain)
    assert all(step.diverged.all() for step in steps)
    assert torch.equal(steps[-1].x, start().double())


class LabelledToy(Toy):
    """A toy whose prediction depends on the label too."""

    def __call__(self, x, t, label, carry, solve):
        output, solution = super().__call__(x, t, label, carry, solve)
        return output + 0.1 * label[:, None, None, None], solution


def test_guidance_pulls_away_from_the_null_class():
    x, t, label = start(), torch.full((2,), 5), torch.tensor([1, 2])
    carry = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    predict = implicit(LabelledToy(), ITERATE)
    twice = {"iterations": 2}
    with_label, first = predict(x, t, label, carry[:2], twice)
    without, second = predict(x, t, torch.tensor([7, 7]), carry[2:], twice)
    output, solution = guided(predict, 3.0, 7, "all")(x, t, label, carry, twice)
    torch.testing.assert_close(output, without + 3 * (with_label - without))
    torch.testing.assert_close(solution.z, torch.cat([first.z, second.z]))
    plain, _ = guided(predict, 1.0, 7, "all")(x, t, label, carry, twice)
    torch.testing.assert_close(plain, with_label)


def test_both_halves_of_guidance_keep_their_solutions_along_a_chain():
    chain, toy = of("small").chain(evenly(1000, 4)), LabelledToy()
    predict = guided(implicit(toy, ITERATE), 3.0, 7, "all")
    steps = steps_of(predict, start(), chain, torch.tensor([1, 2]), budget=Budget("adaptive", 9))
    solutions = [step.solutions[0] for step in steps]
    assert [labels.tolist() for labels in toy.labels] == 4 * [[1, 2, 7, 7]]
    assert [len(solution.z) for solution in solutions] == [4, 4, 4, 4]
    for carry, solution in zip(toy.carries[1:], solutions):
        assert carry is solution.z
    assert sum(solution.iterations for solution in solutions).tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize(("channels", "count"), [("all", 5), ("first_three", 3)])
def test_guidance_leaves_the_variance_and_as_published_all_but_three_channels_alone(channels, count):
    net = explicit(lambda x, t, label: torch.cat([x, 2 * x], 1) * label[:, None, None, None])
    x, t = torch.ones(2, 5, 1, 1), torch.zeros(2, dtype=torch.int64)
    output, solution = guided(net, 4.0, 0, channels)(x, t, torch.tensor([1, 1]), None, {})
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


TWO = {"x": start(), "t": torch.tensor([5, 5]), "label": None, "carry": None, "limits": {}}


def test_a_call_without_an_iteration_is_refused():
    with pytest.raises(ValueError, match="iterations is 0"):
        implicit(Toy(), ITERATE)(**TWO | {"limits": {"iterations": 0}})


def test_without_a_carry_samples_may_be_at_different_timesteps():
    implicit(Toy(), ITERATE)(**TWO | {"t": torch.tensor([5, 6])})


def test_an_output_without_the_learned_variance_is_refused():
    with pytest.raises(ValueError, match="1 channels.* 2"):
        steps_of(explicit(lambda x, t, label: x), start(), of("learned").chain([0, 999]), reuse=False)
