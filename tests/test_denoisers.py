"""FPDM and DiT as a study trains them: labels, iterations, losses, configs."""

import numpy as np
import pytest
import torch
from entries import DIT, FPDM, drawn

from equilab.core import config as configs
from equilab.core.config import UserError
from equilab.diffusion import discrete_losses
from equilab.diffusion.discrete import noised
from equilab.training import diffusion


def parsed(**changes):
    """Return the config of an FPDM with other values."""
    return configs.parse(diffusion.Config, {**FPDM, **changes}, "diffusion.run")


def test_labels_are_hidden_at_their_rate_by_position_alone():
    config, label = parsed(label_dropout=0.25), np.arange(2000) % 10
    found = diffusion.with_hidden_labels(config, label, range(2000), 10).numpy()
    assert abs((found == 10).mean() - 0.25) < 0.03 and (found[found < 10] == label[found < 10]).all()
    assert (
        diffusion.with_hidden_labels(config, label[500:600], range(500, 600), 10).numpy() == found[500:600]
    ).all()
    assert (
        diffusion.with_hidden_labels(parsed(label_dropout=0.0), label, range(2000), 10).numpy() == label
    ).all()


def test_the_iterations_of_an_update_are_drawn_from_their_ranges_and_from_nothing_else():
    fixed_point = parsed().fixed_point
    drawn = [fixed_point.draw(0, update) for update in range(400)]
    assert {iterations.no_grad for iterations in drawn} == {0, 1, 2, 3}
    assert {iterations.grad for iterations in drawn} == {1, 2}
    assert np.allclose(np.mean(drawn, 0), fixed_point.mean(), atol=0.15)
    assert drawn[17] == parsed().fixed_point.draw(0, 17)
    steady = {"gradient": "multi_step", "no_grad_iterations": 3, "grad_iterations": 2}
    assert {parsed(fixed_point=steady).fixed_point.draw(0, update) for update in range(9)} == {(3, 2)}


def test_the_loss_is_the_error_and_the_bound_of_the_networks_output():
    config = parsed()
    net = drawn(config)
    image, noise = (
        torch.from_numpy(np.random.default_rng(k).normal(size=(5, 1, 8, 8)).astype("f")) for k in (0, 1)
    )
    t, label = torch.tensor([0, 3, 50, 98, 99]), torch.tensor([0, 1, 2, 9, 10])
    iterations = diffusion.Iterations(2, 1)
    batch = diffusion.Batch(image.tanh(), noise, t, label, iterations)
    found = diffusion.loss_of(config)(net, batch)
    steps = config.diffusion.chain()
    x = noised(image.tanh(), noise, steps.at(t))
    output, solution = net(x, t, label, None, diffusion.solver_of(iterations))
    given = (steps, output, image.tanh(), noise, steps.at(t))
    assert solution.iterations.tolist() == [3] * 5
    expected = discrete_losses.error(*given, "uniform") + discrete_losses.bound(*given)
    torch.testing.assert_close(found, expected.mean())


JFB = {"gradient": "jfb", "no_grad_iterations": 3, "grad_iterations": 2}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fixed_point": JFB}, "grad_iterations to 1"),
        ({"fixed_point": {**JFB, "gradient": "s_jfb", "no_grad_iterations": -1}}, "no_grad_iterations"),
        ({"fixed_point": None}, "fixed_point must be given"),
        ({"network": DIT["network"]}, "network.kind is dit"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"conditional": False}, "label_dropout is 0.1"),
        ({"diffusion": {**FPDM["diffusion"], "variance": "small"}}, "network.learned_variance"),
        ({"diffusion": {**FPDM["diffusion"], "beta_end": 2.0}}, "beta_end 2.0"),
        ({"diffusion": {**FPDM["diffusion"], "prediction": "noise"}}, "predict 'v'"),
        ({"weight": "publisched"}, "did you mean 'published'"),
    ],
)
def test_a_run_that_cannot_be_is_refused_under_its_path(changes, key):
    with pytest.raises(UserError, match=r"^diffusion\.run") as error:
        parsed(**changes)
    assert key in str(error.value)
