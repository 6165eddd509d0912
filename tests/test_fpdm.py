"""FPDM against the published implementation, and by itself."""

import math
import re

import published_sizes
import pytest
import torch
from conftest import close, golden, weights_of
from reference import hashed_model
from torch.nn import functional as F

from equilab import published
from equilab.core.config import UserError
from equilab.diffusion.discrete_samplers import guided, implicit
from equilab.metrics.counting import flops, parameters
from equilab.metrics.measuring import peak_memory
from equilab.models import dit, fpdm
from equilab.solvers import Gradient, Solver, equilibrium

SMALL = {"width": 16, "pre": 1, "post": 1, "heads": 2, "patch": 2, "expansion": 2}
SMALL |= {"learned_variance": True, "pre_post_timestep": False}
TWICE = Solver("iterate", 2, 0.0, "last")

# the published code rounds the frequencies of its sinusoids to float32, which puts them up to 6e-5 off (test_dit.py)
FORWARD, GRADIENT = 2e-5, 1e-4


def load(pre_post_timestep):
    tensors, _ = golden("fpdm_tiny")
    return published.load(
        "fpdm", weights_of(tensors), heads=2, pre_post_timestep=pre_post_timestep
    ).model, tensors


def drawn(batch, **change):
    """Return a small model of 3 classes whose every part matters and whose map contracts; x, t and labels for it."""
    torch.manual_seed(0)
    model = fpdm.FPDM((1, 8, 8), 3, **SMALL | change)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(batch, 1, 8, 8), torch.randint(0, 1000, (batch,)), torch.arange(batch) % 4


@pytest.mark.parametrize("timestep", [False, True])
@pytest.mark.parametrize("iterations", [1, 4])
def test_fpdm_gives_the_published_predictions_and_reuses_solutions_as_published(timestep, iterations):
    model, t = load(timestep)
    solver = Solver("iterate", iterations, 0.0, "last")
    prefix = f"out.ptc{int(timestep)}_k{iterations}_"

    def call(x, time, carry):
        return model(t[f"in.{x}"], t[f"in.{time}"], t["in.y"], carry, solver)

    first, solution = call("x1", "t1", None)
    close(first, t[prefix + "x1_t1"], FORWARD)
    close(solution.z, t[prefix + "solution_after_first"], 1e-5)
    second, after = call("x2", "t2", solution.z)
    close(second, t[prefix + "x2_t2_reused"], FORWARD)
    close(after.z, t[prefix + "solution_after_second"], 1e-5)
    close(call("x2", "t2", None)[0], t[prefix + "x2_t2_fresh"], FORWARD)
    close(call("x1", "t_mixed", None)[0], t[prefix + "x1_tmixed"], FORWARD)
    predict = guided(implicit(model, solver), 4.0, 10, "first_three")
    x, time, label = (t[f"in.cfg_{name}"][:2] for name in "xty")
    close(predict(x, time, label, None, {})[0], t[prefix + "cfg"][:2], FORWARD)


@pytest.mark.parametrize(("without", "with_gradient"), [(0, 2), (2, 3)])
def test_fpdm_trains_with_the_published_gradients(without, with_gradient):
    model, t = load(True)
    solver = Solver("iterate", 1, 0.0, "last", measure=False)
    prefix = f"out.train_ng{without}_k{with_gradient}"

    def solve(f, init):
        return equilibrium(f, init, solver, Gradient("s_jfb"), (without, with_gradient))

    out, solution = model(t["in.x1"], t["in.t_mixed"], t["in.y"], None, solve)
    assert solution.iterations.tolist() == [without + with_gradient] * 2
    close(out, t[prefix], FORWARD)
    loss = F.mse_loss(out, t["in.target"])
    close(loss, t[prefix + "_loss_mse"], 1e-5)
    loss.backward()
    ours, names = dict(model.named_parameters()), dit.published_keys(model)
    keys = [key.removeprefix(prefix + "_grad.") for key in t if key.startswith(prefix + "_grad.")]
    assert len(keys) == 6
    for key in keys:
        close(ours[names[key]].grad, t[f"{prefix}_grad.{key}"], GRADIENT)


def gradients(model, x, t, label, solve):
    model.zero_grad()
    model(x, t, label, None, solve)[0].square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def gradients_of(gradient, counts=None):
    """Return the gradients of a small model whose fixed point is solved by 40 iterations."""
    solver = Solver("iterate", 40, 0.0, "last")
    return gradients(*drawn(3), lambda f, init: equilibrium(f, init, solver, gradient, counts))


def test_the_jacobian_free_gradient_is_one_step():
    one = gradients_of(Gradient("jfb"))
    assert all(map(torch.equal, one, gradients_of(Gradient("s_jfb"), (40, 1))))


def test_the_implicit_gradient_is_where_many_steps_lead():
    implicit = gradients_of(Gradient("implicit", adjoint=Solver("iterate", 40, 0.0, "last")))
    for ours, expected in zip(gradients_of(Gradient("s_jfb"), (40, 30)), implicit):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    one = gradients_of(Gradient("jfb"))
    assert max((a - b).abs().max() for a, b in zip(one, implicit)) > 1e-3


def test_o1_has_the_bits_of_unrolled():
    assert all(map(torch.equal, gradients_of(Gradient("o1")), gradients_of(Gradient("unrolled"))))


@pytest.mark.slow
def test_full_size_fpdm_gives_the_published_predictions():
    t, metadata = golden("full_fpdm_xl-2_pre1_post1")
    model = hashed_model(
        "fpdm", (4, 32, 32), 1000, published_sizes.FPDM["FPDM-XL/2"], pre_post_timestep=False
    )
    assert parameters(model) == int(metadata["parameters"])
    solver = Solver("iterate", metadata["config"]["iterations"], 0.0, "last")
    for timestep in (False, True):
        model.pre_post_timestep = timestep
        with torch.no_grad():
            out, _ = model(t["in.x"], t["in.t"], t["in.y"], None, solver)
        close(out, t[f"out.ptc{int(timestep)}"], FORWARD)


def size_of(entry):
    """Return name, classes and changed sizes of an entry of the facts: "FPDM XL/2 pre1 post1 classes1000"."""
    _, size, *rest = entry.split()
    numbers = {}
    for word in rest:
        name, number = re.fullmatch(r"([a-z]+)(\d+)", word).groups()
        numbers[name] = int(number)
    return f"FPDM-{size}", numbers.pop("classes"), numbers


def test_all_sizes_of_fpdm_have_the_published_numbers_of_parameters(facts):
    table = facts["fpdm_parameters_input32"]
    baseline = table.pop("DiT-XL/2 in the FPDM repository")
    sizes = {entry: size_of(entry) for entry in table}
    assert {name for name, _, _ in sizes.values()} == {*published_sizes.FPDM}
    with torch.device("meta"):
        assert parameters(dit.DiT((4, 32, 32), 1000, **dit.SIZES["DiT-XL/2"])) == baseline
        for entry, (name, classes, changes) in sizes.items():
            model = fpdm.FPDM((4, 32, 32), classes, **published_sizes.FPDM[name] | changes)
            assert parameters(model) == table[entry], entry


def test_one_application_is_the_equation_with_state_and_injection_concatenated():
    model, *_ = drawn(2)
    h, z, condition = torch.randn(2, 16, 16), torch.randn(2, 16, 16), torch.randn(2, 1, 16)
    merged = model.merge2(F.gelu(model.merge1(torch.cat([z, model.injection(h)], 2)), approximate="tanh"))
    expected = model.fixed(merged, condition)
    f = model.map(h, condition)
    torch.testing.assert_close(f(z, None), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(f(z[1:], torch.tensor([1])), expected[1:], rtol=0, atol=1e-6)


def test_without_their_timestep_pre_and_post_layers_see_the_class_alone():
    model, x, t, label = drawn(4)
    _, solution = model(x, t, label, None, TWICE)

    def around(time, labels):
        """Return the start that the pre layers give, and what the post layers make of a fixed solution."""
        starts = []
        out, _ = model(x, time, labels, None, lambda f, init: starts.append(init) or solution)
        return starts[0], out

    first = around(t, label)
    assert all(map(torch.equal, first, around(t + 1, label)))
    assert not any(map(torch.allclose, first, around(t, label.flip(0))))
    assert not torch.allclose(solution.z, model(x, t + 1, label, None, TWICE)[1].z)
    model.pre_post_timestep = True
    assert not any(map(torch.allclose, around(t, label), around(t + 1, label)))


def test_a_carried_solution_continues_the_iterations():
    model, x, t, label = drawn(3)
    _, half = model(x, t, label, None, TWICE)
    continued, _ = model(x, t, label, half.z, TWICE)
    whole, _ = model(x, t, label, None, Solver("iterate", 4, 0.0, "last"))
    assert torch.equal(continued, whole)


def test_nothing_is_kept_from_call_to_call():
    model, x, t, label = drawn(3)
    first, solution = model(x, t, label, None, TWICE)
    model(-x, t + 1, label, solution.z, TWICE)
    assert torch.equal(model(x, t, label, None, TWICE)[0], first)


@pytest.mark.parametrize("method", ["iterate", "anderson", "broyden"])
def test_samples_that_stop_by_themselves_are_the_same_as_alone(method):
    model, t = load(False)
    options = {"memory": 5, "mixing": 1.0} if method == "anderson" else {}
    solver = Solver(method, 80, 1e-4, "last", **options)
    x = torch.cat([t["in.x1"], t["in.x2"]])
    time = torch.cat([t["in.t1"], t["in.t2"]])
    label = torch.tensor([3, 10, 0, 7])
    with torch.no_grad():
        out, solution = model(x, time, label, None, solver)
        assert solution.converged.all() and len(set(solution.iterations.tolist())) > 1
        for i in range(4):
            one, alone = model(x[i : i + 1], time[i : i + 1], label[i : i + 1], None, solver)
            assert abs(alone.iterations[0] - solution.iterations[i]) <= (method != "iterate")
            close(one[0], out[i], 1e-5 if method == "iterate" else 1e-3)
        exact = model(x, time, label, None, Solver("iterate", 150, 0.0, "last"))[1].z
        close(solution.z, exact, 1e-3)


def test_memory_does_not_grow_with_the_iterations_without_gradient():
    model, x, t, label = drawn(32, width=64)
    solver = Solver("iterate", 1, 0.0, "last", measure=False)

    def peak(gradient, counts):
        def solve(f, init):
            return equilibrium(f, init, solver, gradient, counts)

        def step():
            model(x, t, label, None, solve)[0].square().mean().backward()
            model.zero_grad(set_to_none=True)

        step()
        return peak_memory(step, torch.device("cpu"))

    few, many = peak(Gradient("s_jfb"), (1, 2)), peak(Gradient("s_jfb"), (24, 2))
    assert abs(many - few) < 0.01 * few
    assert peak(Gradient("s_jfb"), (1, 12)) > 2 * few


def test_block_evaluations_are_those_of_the_paper():
    with torch.device("meta"):
        baseline = dit.DiT((4, 32, 32), 1000, **dit.SIZES["DiT-XL/2"])
        model = fpdm.FPDM((4, 32, 32), 1000, **published_sizes.FPDM["FPDM-XL/2"])
    assert baseline.blocks() == model.blocks(26) == 28
    assert model.blocks(torch.tensor([1, 5])).tolist() == [3, 7]


@pytest.mark.slow
def test_an_iteration_costs_a_third_more_than_a_block_of_a_dit():
    with torch.device("meta"):
        baseline = dit.DiT((4, 32, 32), 1000, **dit.SIZES["DiT-XL/2"])
        model = fpdm.FPDM((4, 32, 32), 1000, **published_sizes.FPDM["FPDM-XL/2"])
        x, t, label = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        solvers = [Solver("iterate", k, 0.0, "last", measure=False) for k in (1, 2, 26)]
        calls = [flops(lambda: model(x, t, label, None, solver)) for solver in solvers]
        block = flops(lambda: baseline(x, t, label)) / 28
    assert math.isclose(calls[1] - calls[0], 1.32 * block, rel_tol=0.01)
    assert math.isclose(calls[2] - calls[1], 24 * (calls[1] - calls[0]))


def test_in_bfloat16_the_state_stays_float32():
    model, x, t, label = drawn(4)
    solver = Solver("iterate", 30, 0.02, "last", record=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, solution = model(x, t, label, None, solver)
    assert {z.dtype for z in solution.iterates} == {torch.float32} and solution.converged.all()
    with torch.no_grad():
        close(out.float(), model(x, t, label, None, Solver("iterate", 30, 0.0, "last"))[0], 0.1)


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 8, 4)])
@pytest.mark.parametrize(("classes", "label"), [(0, None), (3, torch.tensor([0, 3]))])
@pytest.mark.parametrize(("layers", "learned_variance", "times"), [(0, False, 1), (2, True, 2)])
def test_images_of_any_size_with_any_number_of_layers_keep_their_size(
    image, classes, label, layers, learned_variance, times
):
    changes = {"pre": layers, "post": layers, "learned_variance": learned_variance}
    model = fpdm.FPDM(image, classes, **SMALL | changes)
    out, _ = model(torch.randn(2, *image), torch.tensor([0.5, 999.0]), label, None, TWICE)
    assert out.shape == (2, times * image[0], *image[1:])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch": 3}, "image"),
        ({"heads": 3}, "width"),
        ({"expansion": 0}, "expansion"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, key):
    with pytest.raises(ValueError, match=key):
        fpdm.FPDM((1, 8, 8), 0, **SMALL | change)


def test_a_label_is_needed_exactly_if_there_are_classes():
    model, x, t, label = drawn(2)
    with pytest.raises(ValueError, match="no label is given"):
        model(x, t, None, None, TWICE)
    with pytest.raises(ValueError, match="a label is given"):
        fpdm.FPDM((1, 8, 8), 0, **SMALL)(x, t, label, None, TWICE)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 4, 16), (2, 16, 8)])
def test_a_carry_of_other_states_is_refused(shape):
    model, x, t, label = drawn(2)
    with pytest.raises(ValueError, match=r"carry.*\(2, 16, 16\)"):
        model(x, t, label, torch.zeros(shape), TWICE)


@pytest.mark.parametrize(
    "key",
    ["pos_embed", "final_layer.linear.bias", "block_fixed_point.mlp.fc1.weight", "block_pre_projection.bias"],
)
def test_published_weights_that_lack_a_tensor_are_refused_by_its_name(key):
    weights = weights_of(golden("fpdm_tiny")[0])
    del weights[key]
    with pytest.raises(UserError, match=key):
        published.load("fpdm", weights, heads=2, pre_post_timestep=False)


@pytest.mark.parametrize(
    ("config", "key"),
    [({"heads": 5, "pre_post_timestep": False}, "heads"), ({"heads": 2}, "pre_post_timestep")],
)
def test_published_weights_need_a_config_that_fits(config, key):
    with pytest.raises(UserError, match=key):
        published.load("fpdm", weights_of(golden("fpdm_tiny")[0]), **config)
