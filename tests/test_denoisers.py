"""FPDM and DiT as a study trains and samples them: counts, losses, chains, costs."""

import numpy as np
import pytest
import torch

from equilab.core import config as configs
from equilab.core.config import UserError
from equilab.diffusion import discrete_losses
from equilab.diffusion.discrete import noised
from equilab.sampling import generators as sample
from equilab.stages import evaluate
from equilab.training import diffusion, loop

OPTIMISATION = dict(
    nimg=64,
    batch=8,
    micro_batch=8,
    lr=1e-3,
    betas=[0.9, 0.999],
    weight_decay=0.0,
    clip=1.0,
    warmup_nimg=0,
    decay="none",
    decay_start_nimg=0,
    ema_half_life_nimg=64.0,
    ema_warmup=0,
    precision="fp32",
    compile=False,
    report_nimg=8,
    snapshots=[],
)
SIZES = dict(width=16, heads=2, patch=2, expansion=2, learned_variance=True)
ENTRY = dict(
    network={"kind": "fpdm", "pre": 1, "post": 1, "pre_post_timestep": False, **SIZES},
    conditional=True,
    label_dropout=0.1,
    diffusion=dict(
        timesteps=100,
        beta_start=1e-3,
        beta_end=0.1,
        zero_terminal_snr=True,
        prediction="v",
        variance="learned",
    ),
    weight="uniform",
    fixed_point=dict(gradient="s_jfb", without=3, steps=2),
    seed=0,
    optimisation=OPTIMISATION,
)
DIT = {**ENTRY, "network": {"kind": "dit", "depth": 3, **SIZES}, "fixed_point": None}
ALONG = dict(
    blocks=20, budget="constant", reuse=True, method="iterate", tolerance=0, memory=None, mixing=None
)
CHAIN = dict(method="ddim", steps=4, eta=0.0, clamp=True, guidance=None, fixed_point=ALONG)


def parsed(entry=ENTRY, **changes):
    return configs.parse(diffusion.Config, {**entry, **changes}, "diffusion.run")


def chain(entry=CHAIN, **changes):
    along = {**ALONG, **changes.pop("along")} if "along" in changes else entry["fixed_point"]
    return configs.parse(
        sample.ChainSampler, {**entry, "fixed_point": along, **changes}, "evaluate.run.chain"
    )


def denoiser(config):
    """Return a denoiser whose output depends on all of its inputs: weights that start at zero are drawn."""
    net = loop.build(config.network, 0, "weights", *config.positional((1, 8, 8), 10))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    about = {"image": (1, 8, 8), "classes": 10, **diffusion.counted(config, (1, 8, 8), 10)}
    return sample.Denoiser(net.eval(), about, torch.device("cpu"), config)


def made(generator, setting, indices):
    return generator.make(*sample.inputs(0, indices, generator, setting), setting)


def test_labels_are_hidden_at_their_rate_by_position_alone():
    config, label = parsed(label_dropout=0.25), np.arange(2000) % 10
    found = diffusion._labels(config, label, range(2000), 10).numpy()
    assert abs((found == 10).mean() - 0.25) < 0.03 and (found[found < 10] == label[found < 10]).all()
    assert (diffusion._labels(config, label[500:600], range(500, 600), 10).numpy() == found[500:600]).all()
    assert (diffusion._labels(parsed(label_dropout=0.0), label, range(2000), 10).numpy() == label).all()


def test_the_counts_of_an_update_are_drawn_from_their_ranges_and_from_nothing_else():
    drawn = [parsed().fixed_point.counts(0, update) for update in range(400)]
    assert {without for without, _ in drawn} == {0, 1, 2, 3} and {steps for _, steps in drawn} == {1, 2}
    assert np.allclose(np.mean(drawn, 0), parsed().fixed_point.mean, atol=0.15)
    assert drawn[17] == parsed().fixed_point.counts(0, 17)
    fixed = parsed(fixed_point=dict(gradient="multi_step", without=3, steps=2)).fixed_point
    assert {fixed.counts(0, update) for update in range(9)} == {(3, 2)}


def test_the_loss_is_the_error_and_the_bound_of_the_networks_output():
    config = parsed()
    net = denoiser(config).net
    image, noise = (
        torch.from_numpy(np.random.default_rng(k).normal(size=(5, 1, 8, 8)).astype("f")) for k in (0, 1)
    )
    t, label = torch.tensor([0, 3, 50, 98, 99]), torch.tensor([0, 1, 2, 9, 10])
    found = diffusion.loss_of(config)(net, (image.tanh(), noise, t, label, (2, 1)))
    steps = config.diffusion.chain()
    output, solution = net(
        noised(image.tanh(), noise, steps.at(t)), t, label, None, diffusion.solver_of((2, 1))
    )
    given = (steps, output, image.tanh(), noise, steps.at(t))
    assert solution.iterations.tolist() == [3] * 5
    expected = discrete_losses.error(*given, "uniform") + discrete_losses.bound(*given)
    torch.testing.assert_close(found, expected.mean())


@pytest.mark.parametrize("entry", [ENTRY, DIT], ids=["fpdm", "dit"])
@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddpm", None)])
def test_an_image_does_not_depend_on_its_batch(entry, method, eta):
    generator = denoiser(parsed(entry))
    setting = chain(method=method, eta=eta, fixed_point=ALONG if entry is ENTRY else None)
    whole = made(generator, setting, np.arange(6)).image
    parts = torch.cat([made(generator, setting, np.arange(*span)).image for span in ((0, 2), (2, 6))])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert whole.abs().max() <= 1 and whole.std() > 0.1


@pytest.mark.parametrize("budget", ["constant", "increasing", "decreasing", "adaptive"])
@pytest.mark.parametrize("blocks", [12, 20, 23])
def test_a_budget_of_blocks_is_spent_to_the_last_one(budget, blocks):
    generator, setting = denoiser(parsed()), chain(along={"budget": budget, "blocks": blocks})
    found = made(generator, setting, np.arange(3))
    applied = sum(solution.iterations for solution in found.solutions)
    assert (applied + 2 * setting.steps == blocks).all() and found.nfe == setting.steps
    cost = generator.cost(setting)
    assert cost["block_evals"] == blocks and cost["iterations"] == blocks - 8
    assert cost["flops"] == pytest.approx(
        sum(diffusion.call(generator.config, (1, 8, 8), 10, int(s.iterations[0])) for s in found.solutions)
    )


def test_samples_that_have_converged_stop_costing_and_end_as_they_would_alone():
    generator, setting = denoiser(parsed()), chain(along={"blocks": 80, "tolerance": 0.05})
    whole = made(generator, setting, np.arange(6))
    told = evaluate._told(whole)
    assert 4 <= told[:, 0].min() < told[:, 0].max() <= 72
    alone = [made(generator, setting, np.arange(k, k + 1)) for k in range(6)]
    torch.testing.assert_close(whole.image, torch.cat([one.image for one in alone]), rtol=0, atol=1e-5)
    assert told[:, 0].tolist() == [evaluate._told(one)[0, 0] for one in alone]


def test_guidance_costs_twice_and_pulls_away_from_no_class():
    generator = denoiser(parsed())
    plain, guided = chain(), chain(guidance={"scale": 1.0, "channels": "all"})
    indices = np.arange(4)
    same = made(generator, guided, indices)
    torch.testing.assert_close(same.image, made(generator, plain, indices).image, rtol=0, atol=1e-5)
    assert generator.cost(guided)["block_evals"] == 2 * generator.cost(plain)["block_evals"] == 40
    assert generator.cost(guided)["flops"] == pytest.approx(2 * generator.cost(plain)["flops"])
    assert (evaluate._told(same)[:, 0] == 24).all(), "both halves' iterations count"
    far = made(generator, chain(guidance={"scale": 4.0, "channels": "all"}), indices)
    assert not torch.allclose(far.image, same.image, atol=1e-3)


def test_reuse_starts_each_step_from_the_last_solution():
    generator = denoiser(parsed())
    first, second = (made(generator, chain(along={"reuse": reuse}), np.arange(4)) for reuse in (False, True))
    assert torch.equal(first.solutions[0].z, second.solutions[0].z)
    assert not torch.allclose(first.solutions[1].z, second.solutions[1].z)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fixed_point": dict(gradient="jfb", without=3, steps=2)}, "gradient jfb has one step"),
        ({"fixed_point": dict(gradient="s_jfb", without=-1, steps=2)}, "without must be >= 0"),
        ({"fixed_point": None}, "fixed_point must be given for fpdm"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"conditional": False}, "0 if conditional is false"),
        ({"diffusion": {**ENTRY["diffusion"], "variance": "small"}}, "network.learned_variance"),
        ({"diffusion": {**ENTRY["diffusion"], "beta_end": 2.0}}, "0 < beta_start <= beta_end < 1"),
        ({"diffusion": {**ENTRY["diffusion"], "prediction": "noise"}}, "predict 'v'"),
        ({"weight": "publisched"}, "did you mean 'published'"),
    ],
)
def test_a_run_that_cannot_be_is_refused_under_its_path(changes, said):
    with pytest.raises(UserError, match=r"^diffusion\.run") as error:
        parsed(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (lambda: chain(along={"blocks": 11}), "blocks is 11, but 4 steps"),
        (lambda: chain(fixed_point=None), "fixed_point must be given for fpdm"),
        (lambda: chain(steps=101, along={"blocks": 1000}), "has room for 1..100"),
        (lambda: chain(steps=0), "steps must be >= 1"),
        (lambda: chain(eta=None), "give 0..1 for ddim"),
        (lambda: chain(along={"method": "anderson"}), "Anderson acceleration needs"),
    ],
)
def test_a_chain_that_does_not_fit_is_refused(setting, said):
    with pytest.raises((UserError, ValueError)) as error:
        sample.budget(parsed(), setting())
    assert said in str(error.value)
