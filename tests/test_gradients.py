"""Gradients through fixed points, on a linear map whose derivatives are known and on a small transformer."""

import pytest
import torch

from equilab.models.get import GET
from equilab.solvers import Gradient, Solver, equilibrium

TOKENS, WIDTH = 3, 4
PLAIN = Solver("iterate", 6, 0.0, "last", record=True)


class Linear:
    """f(z) = z A + u with a contraction A, in float64; A and u are to be differentiated."""

    def __init__(self):
        torch.manual_seed(0)
        a = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
        self.a = (0.7 * a / torch.linalg.matrix_norm(a, 2)).requires_grad_()
        self.u = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        self.init = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        self.weight = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)  # of the loss

    def __call__(self, z, rows):
        return z @ self.a + (self.u if rows is None else self.u[rows])

    def grads(self, solution):
        return torch.autograd.grad((self.weight * solution.z).sum(), (self.a, self.u))

    def expected(self, start, steps):
        """Return the gradients of `steps` applications from the constant `start`, written out."""
        z = start.detach()
        for _ in range(steps):
            z = z @ self.a + self.u
        return torch.autograd.grad((self.weight * z).sum(), (self.a, self.u))


def transformer():
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, "patch": 2, "expansion": 2}
    model = GET((1, 8, 8), 0, **sizes, equilibrium_depth=2, equilibrium_expansion=3, normalise=True)
    torch.nn.init.normal_(model.final.linear.weight)  # at zero, where it starts, nothing else has a gradient
    return model, torch.randn(5, 1, 8, 8)


def gradients_of(model, noise, solver, gradient, counts=None):
    model.zero_grad()
    image, solution = model(noise, None, None, lambda f, init: equilibrium(f, init, solver, gradient, counts))
    image.square().mean().backward()
    return image, solution, [p.grad.clone() for p in model.parameters()]


def saved(model, noise, solver, gradient, counts=None):
    """Return the number of elements that autograd keeps for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(noise, None, None, lambda f, init: equilibrium(f, init, solver, gradient, counts))
    return total


def test_unrolled_gradients_pass_every_application_and_stop_at_the_start():
    f = Linear()
    solution = equilibrium(f, f.init, PLAIN, Gradient("unrolled"))
    for ours, expected in zip(f.grads(solution), f.expected(f.init, 6)):
        torch.testing.assert_close(ours, expected)
    fourth = equilibrium(f, f.init, PLAIN, Gradient("unrolled")).iterates[3]
    (ours,) = torch.autograd.grad((f.weight * fourth).sum(), f.a)
    torch.testing.assert_close(ours, f.expected(f.init, 4)[0])
    solution = equilibrium(f, f.init, PLAIN, Gradient("unrolled"))
    assert torch.autograd.grad(solution.z.sum(), f.init, allow_unused=True) == (None,)


def test_o1_has_the_bits_of_unrolled():
    model, noise = transformer()
    image, solution, grads = gradients_of(model, noise, PLAIN, Gradient("unrolled"))
    image1, solution1, grads1 = gradients_of(model, noise, PLAIN, Gradient("o1"))
    assert torch.equal(image, image1) and all(map(torch.equal, grads, grads1))
    assert all(map(torch.equal, solution.iterates, solution1.iterates))


def test_o1_keeps_a_state_an_application_and_unrolled_all_of_it():
    model, noise = transformer()
    state = noise.shape[0] * 16 * 16
    two, nine = (Solver("iterate", k, 0.0, "last", measure=False) for k in (2, 9))

    def growth(gradient):
        return (saved(model, noise, nine, gradient) - saved(model, noise, two, gradient)) / 7

    assert growth(Gradient("o1")) <= 2 * state
    assert growth(Gradient("unrolled")) > 20 * state


@pytest.mark.parametrize(
    ("gradient", "counts", "expected"),
    [
        (Gradient("jfb"), None, (6, 1)),
        (Gradient("s_jfb"), (6, 3), (6, 3)),
        (Gradient("s_jfb"), (0, 2), (0, 2)),
    ],
)
def test_gradients_pass_the_last_applications_alone(gradient, counts, expected):
    f = Linear()
    without, with_gradient = expected
    solution = equilibrium(f, f.init, PLAIN, gradient, counts)
    start = f.init
    for _ in range(without):
        start = f(start, None)
    for ours, theirs in zip(f.grads(solution), f.expected(start, with_gradient)):
        torch.testing.assert_close(ours, theirs)
    assert solution.iterations.tolist() == [without + with_gradient] * 2
    assert len(solution.iterates) == solution.residuals.shape[1] == without + with_gradient
    assert [z.requires_grad for z in solution.iterates] == [False] * without + [True] * with_gradient


@pytest.mark.parametrize("gradient", [Gradient("jfb"), Gradient("s_jfb")])
def test_applications_without_gradient_hold_no_graph(gradient):
    model, noise = transformer()
    kept = []
    for count in (1, 20):
        solver = Solver("iterate", count, 0.0, "last")
        kept.append(saved(model, noise, solver, gradient, (count, 2) if gradient.method == "s_jfb" else None))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("method", ["iterate", "anderson", "broyden"])
@pytest.mark.parametrize("adjoint", ["iterate", "anderson", "broyden"])
def test_implicit_gradients_are_those_of_the_fixed_point_itself(method, adjoint):
    def solver(method):
        anderson = {"memory": 6, "mixing": 1.0} if method == "anderson" else {}
        return Solver(method, 200, 1e-13, "last", **anderson)

    f = Linear()
    solution = equilibrium(f, f.init, solver(method), Gradient("implicit", adjoint=solver(adjoint)))
    inverse = torch.linalg.inv(torch.eye(WIDTH, dtype=torch.float64) - f.a)
    fixed = f.u @ inverse
    torch.testing.assert_close(solution.z, fixed)
    expected = torch.autograd.grad((f.weight * fixed).sum(), (f.a, f.u))
    for ours, theirs in zip(f.grads(solution), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_implicit_gradients_hold_one_application():
    model, noise = transformer()
    gradient = Gradient("implicit", adjoint=PLAIN)
    kept = [saved(model, noise, Solver("iterate", count, 0.0, "last"), gradient) for count in (1, 20)]
    assert kept[0] == kept[1] > 0


def test_the_gradients_of_a_transformer_approach_the_implicit_one_as_steps_grow():
    model, noise = transformer()
    for parameter in model.equilibrium.parameters():
        parameter.data *= 0.5  # makes the map a contraction
    solver = Solver("iterate", 60, 0.0, "last")
    implicit = gradients_of(model, noise, solver, Gradient("implicit", adjoint=solver))[2]

    def error(gradient, counts=None):
        grads = gradients_of(model, noise, solver, gradient, counts)[2]
        return sum((a - b).square().sum() for a, b in zip(grads, implicit)).sqrt().item()

    one = error(Gradient("jfb"))
    eight, thirty = (error(Gradient("s_jfb"), (60, count)) for count in (8, 30))
    assert one > 4 * eight and eight > 50 * thirty


def test_an_adjoint_that_diverges_is_announced():
    f = Linear()
    with torch.no_grad():
        f.a *= 10
    gradient = Gradient("implicit", adjoint=Solver("iterate", 200, 0.0, "last"))
    solution = equilibrium(f, f.init, Solver("iterate", 2, 0.0, "last"), gradient)
    with pytest.warns(UserWarning, match="2 of 2"):
        f.grads(solution)


@pytest.mark.parametrize("gradient", [Gradient("jfb"), Gradient("implicit", adjoint=PLAIN)])
@torch.no_grad()
def test_without_autograd_every_choice_returns_plain_values(gradient):
    model, noise = transformer()
    image = model(noise, None, None, lambda f, init: equilibrium(f, init, PLAIN, gradient)).image
    assert torch.equal(image, model(noise, None, None, Solver("iterate", 7, 0.0, "last")).image)
    assert not image.requires_grad


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"method": "bptt"}, "method"),
        ({"method": "implicit"}, "adjoint"),
        ({"method": "unrolled", "adjoint": PLAIN}, "adjoint"),
    ],
)
def test_an_invalid_gradient_is_refused_by_the_name_of_its_field(fields, key):
    with pytest.raises(ValueError, match=key):
        Gradient(**fields)


@pytest.mark.parametrize(("method", "counts"), [("s_jfb", None), ("s_jfb", (1, 0)), ("jfb", (1, 1))])
def test_counts_that_do_not_fit_the_method_are_refused(method, counts):
    f = Linear()
    with pytest.raises(ValueError, match="counts"):
        equilibrium(f, f.init, PLAIN, Gradient(method), counts)


@pytest.mark.parametrize("method", ["unrolled", "o1"])
def test_only_plain_iteration_is_unrolled(method):
    f = Linear()
    with pytest.raises(ValueError, match="broyden"):
        equilibrium(f, f.init, Solver("broyden", 5, 0.0, "last"), Gradient(method))
