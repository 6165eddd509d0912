"""FPDM against the published implementation, and by itself."""

import math

import pytest
import torch
from conftest import golden, weights_of
from hashed import hashed_model
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


def close(ours, reference, tolerance):
    """Compare relative to the reference's largest value."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * reference.abs().max().item())


def load(pre_post_timestep):
    tensors, _ = golden("fpdm_tiny")
    return published.load("fpdm", weights_of(tensors), heads=2, pre_post_timestep=pre_post_timestep), tensors


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
    solver, prefix = Solver("iterate", iterations, 0.0, "last"), f"out.ptc{int(timestep)}_k{iterations}_"

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
    close(predict(x, time, label, None, None)[0], t[prefix + "cfg"][:2], FORWARD)


@pytest.mark.parametrize(
    "counts, gradient, handed",
    [
        ((0, 2), Gradient("s_jfb"), (0, 2)),
        ((2, 3), Gradient("s_jfb"), (2, 3)),
        ((2, 3), Gradient("multi_step", steps=3), None),
    ],
)
def test_fpdm_trains_with_the_published_gradients(counts, gradient, handed):
    model, t = load(True)
    solver, prefix = Solver("iterate", 2, 0.0, "last", measure=False), "out.train_ng{}_k{}".format(*counts)

    def solve(f, init):
        return equilibrium(f, init, solver, gradient, handed)

    out, solution = model(t["in.x1"], t["in.t_mixed"], t["in.y"], None, solve)
    assert solution.iterations.tolist() == [sum(counts)] * 2
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


def test_jfb_is_one_step_and_implicit_is_where_many_steps_lead():
    inputs = drawn(3)
    solver = Solver("iterate", 40, 0.0, "last")

    def of(gradient, counts=None):
        return gradients(*inputs, lambda f, z: equilibrium(f, z, solver, gradient, counts))

    one, implicit = of(Gradient("jfb")), of(Gradient("implicit", adjoint=solver))
    assert all(map(torch.equal, one, of(Gradient("s_jfb"), (40, 1))))
    for ours, expected in zip(of(Gradient("s_jfb"), (40, 30)), implicit):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(one, implicit)) > 1e-3
    for ours, expected in zip(of(Gradient("o1")), of(Gradient("unrolled"))):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_full_size_fpdm_gives_the_published_predictions():
    t, metadata = golden("full_fpdm_xl-2_pre1_post1")
    model = hashed_model(
        "fpdm", fpdm.FPDM, (4, 32, 32), 1000, fpdm.SIZES["FPDM-XL/2"], pre_post_timestep=False
    )
    assert parameters(model) == int(metadata["parameters"])
    solver = Solver("iterate", metadata["config"]["iterations"], 0.0, "last")
    for timestep in (False, True):
        model.pre_post_timestep = timestep
        with torch.no_grad():
            out, _ = model(t["in.x"], t["in.t"], t["in.y"], None, solver)
        close(out, t[f"out.ptc{int(timestep)}"], FORWARD)


def test_all_sizes_of_fpdm_have_the_published_numbers_of_parameters(facts):
    table = facts["fpdm_parameters_input32"]
    baseline = table.pop("DiT-XL/2 in the FPDM repository")
    with torch.device("meta"):
        assert parameters(dit.DiT((4, 32, 32), 1000, **dit.SIZES["DiT-XL/2"])) == baseline
        for name, count in table.items():
            kind, size, *rest = name.split()
            numbers = {word.rstrip("0123456789"): int(word.lstrip("preostcla")) for word in rest}
            classes = numbers.pop("classes")
            assert (
                parameters(fpdm.FPDM((4, 32, 32), classes, **fpdm.SIZES[f"{kind}-{size}"] | numbers)) == count
            ), name
    assert {f"FPDM-{name.split()[1]}" for name in table} == {*fpdm.SIZES}


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


def test_a_carried_solution_continues_the_iterations_and_nothing_else_is_kept():
    model, x, t, label = drawn(3)
    before = set(vars(model))
    out, half = model(x, t, label, None, TWICE)
    continued, _ = model(x, t, label, half.z, TWICE)
    assert torch.equal(continued, model(x, t, label, None, Solver("iterate", 4, 0.0, "last"))[0])
    assert torch.equal(out, model(x, t, label, None, TWICE)[0])
    assert set(vars(model)) == before


@pytest.mark.parametrize("method", ["iterate", "anderson", "broyden"])
def test_samples_that_stop_by_themselves_are_the_same_as_alone(method):
    model, t = load(False)
    options = {"memory": 5, "mixing": 1.0} if method == "anderson" else {}
    solver = Solver(method, 80, 1e-4, "last", **options)
    x, time = torch.cat([t["in.x1"], t["in.x2"]]), torch.cat([t["in.t1"], t["in.t2"]])
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


def test_a_call_costs_the_blocks_of_the_paper_and_a_third_more_for_each_iteration():
    with torch.device("meta"):
        baseline = dit.DiT((4, 32, 32), 1000, **dit.SIZES["DiT-XL/2"])
        model = fpdm.FPDM((4, 32, 32), 1000, **fpdm.SIZES["FPDM-XL/2"])
        x, t, label = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        solvers = [Solver("iterate", k, 0.0, "last", measure=False) for k in (1, 2, 26)]
        calls = [flops(lambda: model(x, t, label, None, solver)) for solver in solvers]
        explicit = flops(lambda: baseline(x, t, label))
    assert baseline.blocks() == model.blocks(26) == 28
    assert 20 * model.blocks(26) == 560 and model.blocks(torch.tensor([1, 5])).tolist() == [3, 7]
    block = explicit / 28
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
@pytest.mark.parametrize("layers", [0, 2])
def test_images_of_any_size_with_any_number_of_layers_keep_their_size(image, layers):
    x, t = torch.randn(2, *image), torch.tensor([0.5, 999.0])
    for classes, label in ((0, None), (3, torch.tensor([0, 3]))):
        changed = {"pre": layers, "post": layers, "learned_variance": layers == 2}
        out, _ = fpdm.FPDM(image, classes, **SMALL | changed)(x, t, label, None, TWICE)
        assert out.shape == (2, image[0] * (2 if layers == 2 else 1), *image[1:])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"patch": 3}, "image"),
        ({"heads": 3}, "width"),
        ({"expansion": 0}, "expansion"),
        ({"pre": -1}, "pre"),
        ({"post": -1}, "post"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, word):
    with pytest.raises(ValueError, match=f"^{word} is "):
        fpdm.FPDM((1, 8, 8), 0, **SMALL | change)


def test_a_label_is_needed_exactly_if_there_are_classes_and_a_carry_must_fit():
    model, x, t, label = drawn(2)
    with pytest.raises(ValueError, match="no label is given"):
        model(x, t, None, None, TWICE)
    with pytest.raises(ValueError, match="a label is given"):
        fpdm.FPDM((1, 8, 8), 0, **SMALL)(x, t, label, None, TWICE)
    for shape in ((3, 16, 16), (2, 4, 16), (2, 16, 8)):
        with pytest.raises(
            ValueError, match=r"^carry has shape \(\d, .*, the state \(2, 16, 16\); give the z"
        ):
            model(x, t, label, torch.zeros(shape), TWICE)


def test_published_weights_that_lack_a_tensor_or_do_not_fit_are_refused_by_name():
    weights = weights_of(golden("fpdm_tiny")[0])
    config = {"heads": 2, "pre_post_timestep": False}
    keys = [
        "pos_embed",
        "final_layer.linear.bias",
        "block_fixed_point.mlp.fc1.weight",
        "block_pre_projection.bias",
    ]
    for key in keys:
        with pytest.raises(UserError, match=f"'{key}' is missing"):
            published.load("fpdm", {k: v for k, v in weights.items() if k != key}, **config)
    with pytest.raises(UserError, match="heads"):
        published.load("fpdm", weights, **config | {"heads": 5})
    with pytest.raises(UserError, match="fpdm needs pre_post_timestep"):
        published.load("fpdm", weights, heads=2)
