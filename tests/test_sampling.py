"""Trained runs as functions from noise to images: every kind of run, its cost, its settings, its precision."""

import copy
import functools

import numpy as np
import pytest
import torch
from entries import ALONG, CHAIN, CLASSES, ENTRIES, FPDM, HEUN, IMAGE, ITERATE, parsed
from torch.utils.flop_counter import FlopCounterMode

from equilab.core import config as configs
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.core.settings import setting_columns
from equilab.sampling.generators import KINDS, describe, load, seeds_of
from equilab.sampling.runs import solver_statistics
from equilab.sampling.settings import ChainSampler, Sampler, Solve


def sampler(**changes):
    return configs.parse(Sampler, {**HEUN, **changes}, "evaluate.run.sampler")


def solve(**changes):
    return configs.parse(Solve, {**ITERATE, **changes}, "evaluate.run.solver")


def chain(along=None, **changes):
    fixed_point = {**ALONG, **(along or {})}
    return configs.parse(ChainSampler, {**CHAIN, "fixed_point": fixed_point, **changes}, "evaluate.run.chain")


SETTINGS = {
    "teacher": sampler(),
    "distill/get": solve(),
    "distill/vit": None,
    "diffusion/fpdm": chain(),
    "diffusion/dit": chain(fixed_point=None),
    "consistency/cd": None,
    "progressive/pd": None,
}


@pytest.fixture(scope="module")
def generator(untrained_study):
    """Return a run by its name; each is loaded once."""
    return functools.cache(lambda of: load(of, study=untrained_study))


def made(generator, setting, indices, **how):
    return generator.generate(generator.inputs(0, indices, setting), setting, **how)


@pytest.mark.parametrize("of", ENTRIES)
def test_every_kind_of_run_makes_images_at_the_cost_that_it_says(generator, of):
    found, setting = generator(of), SETTINGS[of]
    cost = found.cost(setting)
    with FlopCounterMode(display=False) as counter:
        samples = made(found, setting, np.array([5]))
    assert samples.image.shape == (1, *IMAGE) and samples.image.dtype == torch.float32
    assert samples.image.isfinite().all() and samples.image.std() > 0.01
    assert counter.get_total_flops() == cost["flops"]
    iterations = sum(int(solution.iterations.sum()) for solution in samples.solutions)
    assert iterations == (cost["iterations"] or 0)
    assert (cost["block_evals"] is None) == (of in ("teacher", "consistency/cd", "progressive/pd"))


@pytest.mark.parametrize("of", ENTRIES)
def test_an_image_is_a_function_of_its_index_alone(generator, of):
    found, setting = generator(of), SETTINGS[of]
    whole = made(found, setting, np.arange(6)).image
    parts = [made(found, setting, np.arange(*span)).image for span in ((0, 2), (2, 6))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("of", ENTRIES)
def test_the_last_iterate_or_step_is_the_image(generator, of):
    found, setting = generator(of), SETTINGS[of]
    image = made(found, setting, np.arange(3)).image
    iterates = made(found, setting, np.arange(3), return_iterates=True).image
    torch.testing.assert_close(iterates[-1], image, rtol=0, atol=1e-5)
    counts = {"teacher": 3, "distill/get": 5, "distill/vit": 1, "consistency/cd": 2, "progressive/pd": 3}
    assert len(iterates) == counts.get(of, 4)


@pytest.mark.parametrize("of", ENTRIES)
def test_a_lower_precision_is_that_of_the_network_and_images_stay_float32(generator, untrained_study, of):
    exact = made(generator(of), SETTINGS[of], np.arange(2)).image
    lowered = made(load(of, study=untrained_study, precision="bf16"), SETTINGS[of], np.arange(2)).image
    assert lowered.dtype == torch.float32 and not torch.equal(exact, lowered)
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_is_allowed_within_its_context_alone():
    from equilab.core.machine import precision

    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for name in ("tf32", "fp32"):
        with precision(name, torch.device("cpu"))():
            assert [switch.allow_tf32 for switch in switches] == [name == "tf32"] * 2
        assert [switch.allow_tf32 for switch in switches] == before


def test_weights_of_a_snapshot_a_seed_or_another_config(untrained_study, generator):
    assert load("distill/get", study=untrained_study, snapshot=8).metadata["nimg"] == 8
    assert generator("distill/get").metadata["nimg"] == 64
    config = parsed("distill/get")
    assert load("distill/get", study=untrained_study, config=config).run.config == config
    other = config.model_copy(update={"pairs": 7})
    with pytest.raises(UserError, match=r"pairs 40.*\b7\b.*`python -m equilab distill get --seed 0`"):
        load("distill/get", study=untrained_study, config=other)
    with pytest.raises(UserError, match="results/distill/get/3/weights.safetensors"):
        load("distill/get", 3, study=untrained_study)
    with pytest.raises(UserError, match="^'evaluator' .*STAGE/RUN"):
        load("evaluator", study=untrained_study)


def job(latents=None):
    """Return a job of a study with these runs; `latents` is its section of that name."""

    def read(stage, run=None, seed=None):
        return latents if stage == "latents" else parsed(f"{stage}/{run}" if run else stage)

    study = Study(name="s", root=".", seed=9, threads=1, run_threads=1, device="cpu")
    return Job(study, "evaluate", "run", 4, IMAGE, CLASSES, "", read, lambda stage, run: (4, 7))


@pytest.mark.parametrize("of", ENTRIES)
def test_a_run_costs_by_its_config_what_it_costs_by_its_weights(generator, of):
    run = describe(of, job())
    assert run.cost(SETTINGS[of]) == generator(of).cost(SETTINGS[of])
    assert (run.shape, run.classes) == (IMAGE, CLASSES)
    assert run.counted.parameters == sum(weight.numel() for weight in generator(of).net.parameters())


def test_denoisers_of_timesteps_alone_work_in_latents():
    latents = type("Latents", (), {"shape": (2, 4, 4)})
    shapes = {of: describe(of, job(latents)).shape for of in ENTRIES}
    assert {of for of, shape in shapes.items() if shape == (2, 4, 4)} == {"diffusion/fpdm", "diffusion/dit"}


def test_the_seeds_are_the_runs_or_the_studys():
    assert seeds_of("distill/get", job()) == (4, 7)
    assert seeds_of("teacher", job()) == (9,)


def test_an_implicit_generator_starts_where_its_setting_says(generator):
    get = generator("distill/get")
    zeros, noise = (get.inputs(0, np.arange(3), solve(init=init)) for init in ("zeros", "noise"))
    assert zeros.init is None and noise.init.shape == (3, 16, 16)
    torch.testing.assert_close(zeros.noise, noise.noise, rtol=0, atol=0)
    few = [get.generate(inputs, solve(iterations=1)).image for inputs in (zeros, noise)]
    assert not torch.allclose(*few)


def test_cost_is_linear_in_iterations_and_may_be_a_mean(generator):
    get = generator("distill/get")
    one, two, six = (get.cost(solve(iterations=k))["flops"] for k in (1, 2, 6))
    assert six - one == 5 * (two - one) > 0
    assert get.cost(solve(), iterations=1.5)["flops"] == (one + two) / 2


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.5), ("ddpm", None)])
def test_fresh_noise_of_a_step_belongs_to_an_image(generator, method, eta):
    fpdm, setting = generator("diffusion/fpdm"), chain(method=method, eta=eta)
    whole, again = (made(fpdm, setting, np.arange(4)).image for _ in range(2))
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    torch.testing.assert_close(whole[2:], made(fpdm, setting, np.arange(2, 4)).image, rtol=0, atol=1e-5)
    assert whole.abs().max() <= 1


@pytest.mark.parametrize("budget", ["constant", "increasing", "decreasing", "adaptive"])
@pytest.mark.parametrize("blocks", [12, 20, 23])
def test_a_budget_of_blocks_is_spent_to_the_last_one(generator, budget, blocks):
    fpdm, setting = generator("diffusion/fpdm"), chain({"budget": budget, "blocks": blocks})
    samples = made(fpdm, setting, np.arange(3))
    applied = sum(solution.iterations for solution in samples.solutions)
    assert (applied + 2 * setting.steps == blocks).all()
    cost = fpdm.cost(setting)
    assert cost["block_evals"] == blocks and cost["iterations"] == blocks - 8


def test_a_list_of_iterations_must_fit_the_steps_and_the_blocks(generator):
    run = generator("diffusion/fpdm").run
    run.check(chain({"budget": (5, 1, 2, 4)}))
    for budget, blocks in (((5, 1, 2), 20), ((5, 1, 2, 4), 21)):
        with pytest.raises(ValueError, match=f"^budget .* {sum(budget)} .* {len(budget)} .* {blocks - 8}\\b"):
            run.check(chain({"budget": budget, "blocks": blocks}))


def test_samples_that_have_converged_stop_costing_and_end_as_they_would_alone(generator):
    fpdm, setting = generator("diffusion/fpdm"), chain({"blocks": 80, "tolerance": 0.05})
    whole = made(fpdm, setting, np.arange(6))
    iterations = solver_statistics(whole)[:, 0]
    assert 4 <= iterations.min() < iterations.max() <= 72
    alone = [made(fpdm, setting, np.arange(k, k + 1)) for k in range(6)]
    torch.testing.assert_close(whole.image, torch.cat([one.image for one in alone]), rtol=0, atol=1e-5)
    assert iterations.tolist() == [solver_statistics(one)[0, 0] for one in alone]


def test_guidance_costs_twice_and_pulls_away_from_no_class(generator):
    fpdm, indices = generator("diffusion/fpdm"), np.arange(4)
    plain, guided = chain(), chain(guidance={"scale": 1.0, "channels": "all"})
    same = made(fpdm, guided, indices)
    torch.testing.assert_close(same.image, made(fpdm, plain, indices).image, rtol=0, atol=1e-5)
    for counted in ("nfe", "iterations", "block_evals", "flops"):
        assert fpdm.cost(guided)[counted] == 2 * fpdm.cost(plain)[counted], counted
    assert (solver_statistics(same)[:, 0] == 24).all(), "both halves' iterations count"
    far = made(fpdm, chain(guidance={"scale": 4.0, "channels": "all"}), indices)
    assert not torch.allclose(far.image, same.image, atol=1e-3)


def test_reuse_starts_each_step_from_the_last_solution(generator):
    fpdm = generator("diffusion/fpdm")
    first, second = (made(fpdm, chain({"reuse": reuse}), np.arange(4)) for reuse in (False, True))
    assert torch.equal(first.solutions[0].z, second.solutions[0].z)
    assert not torch.allclose(first.solutions[1].z, second.solutions[1].z)


def test_what_a_solver_did_is_its_last_residual_and_whether_it_broke(generator):
    get = generator("distill/get")
    samples = made(get, solve(iterations=4), np.arange(3))
    (solution,) = samples.solutions
    iterations, residual, diverged = solver_statistics(samples).unbind(1)
    assert iterations.tolist() == [4.0] * 3 and not diverged.any()
    torch.testing.assert_close(residual, solution.residuals[:, -1].double())
    broken = solution._replace(diverged=torch.tensor([False, True, False]))
    twice = samples._replace(solutions=(broken, broken), diverged=torch.tensor([True, True, False]))
    assert solver_statistics(twice)[:, 2].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("of", "setting", "key"),
    [
        ("diffusion/fpdm", chain({"blocks": 11}), "blocks.* 11\\b.* 4 "),
        ("diffusion/fpdm", chain(fixed_point=None), "fixed_point"),
        ("diffusion/dit", chain(), "fixed_point.* null"),
        ("diffusion/fpdm", chain({"blocks": 1000}, steps=101), "1..100"),
    ],
)
def test_a_setting_that_does_not_fit_the_run_is_refused(of, setting, key):
    with pytest.raises(ValueError, match=key):
        describe(of, job()).check(setting)


def test_guidance_needs_a_class_that_was_hidden_in_training():
    entry = copy.deepcopy(FPDM) | {"label_dropout": 0.0}
    run = describe("diffusion/fpdm", job())
    run.config = configs.parse(KINDS["diffusion"].training.Config, entry, "diffusion.fpdm")
    with pytest.raises(ValueError, match="label_dropout"):
        run.check(chain(guidance={"scale": 1.5, "channels": "all"}))


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        (lambda: chain(steps=0), "chain.steps"),
        (lambda: chain(eta=None), "eta is None"),
        (lambda: chain(eta=1.5), "chain.eta"),
        (lambda: chain(method="ddpm"), "eta is 0.0"),
        (lambda: chain({"method": "anderson"}), "Anderson"),
        (lambda: chain(guidance={"scale": -1.0, "channels": "all"}), "guidance.scale"),
        (lambda: solve(iterations=0), "solver.iterations"),
        (lambda: solve(iterations=10**12), "solver.iterations"),
        (lambda: solve(tolerance=-1.0), "solver.tolerance"),
        (lambda: chain({"budget": "adaptive", "tolerance": 0.1}), "tolerance"),
        (lambda: solve(memory=3), "memory"),
        (lambda: solve(init="zero"), "did you mean 'zeros'"),
        (lambda: sampler(steps=10**12), "sampler.steps"),
        (lambda: sampler(sigma_min=1e-300), "sampler.sigma_min"),
        (lambda: sampler(sigma_min=90.0), "sigma_min"),
        (lambda: sampler(rho=0.0), "sampler.rho"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_under_its_path(setting, key):
    with pytest.raises(UserError, match=r"^evaluate\.run\.") as error:
        setting()
    assert key in str(error.value)


def test_settings_are_told_apart_by_their_columns():
    columns = setting_columns(configs.plain(solve()))
    assert columns["most_iterations"] == 5 and "iterations" not in columns
    columns = setting_columns(configs.plain(chain(guidance={"scale": 1.5, "channels": "all"})))
    assert columns["method"] == "ddim" and columns["solver"] == "iterate" and columns["guidance_scale"] == 1.5
    assert setting_columns(configs.plain(chain({"budget": (5, 1, 2, 4)})))["budget"] == "5 1 2 4"
    assert list(setting_columns(configs.plain(chain(fixed_point=None)))) == [
        "method",
        "steps",
        "eta",
        "clamp",
    ]
