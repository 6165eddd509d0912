"""Solvers on maps whose fixed points, rates and counts are known."""

import warnings

import pytest
import torch

from equilab.solvers import Solver

METHODS = ["iterate", "anderson", "broyden", "torchdeq_iterate", "torchdeq_anderson"]
TOKENS, WIDTH = 3, 4


def solver(method, iterations, tolerance=0.0, pick="last", **fields):
    if method.endswith("anderson"):
        fields = {"memory": 5, "mixing": 1.0} | fields
    return Solver(method, iterations, tolerance, pick, **fields)


class Rotation:
    """f(z) = rate Q z + b, Q orthogonal, a rate for each sample: the error shrinks by exactly `rate` an application."""

    def __init__(self, *rates, seed=0):
        torch.manual_seed(seed)
        self.rates = torch.tensor(rates, dtype=torch.float64)[:, None, None]
        self.q = torch.linalg.qr(torch.randn(TOKENS * WIDTH, TOKENS * WIDTH, dtype=torch.float64))[0]
        self.b = torch.randn(len(rates), TOKENS, WIDTH, dtype=torch.float64)
        self.init = torch.randn_like(self.b)
        system = torch.eye(TOKENS * WIDTH, dtype=torch.float64) - self.rates * self.q
        self.fixed = torch.linalg.solve(system, self.b.flatten(1)).unflatten(1, (TOKENS, WIDTH))
        self.seen = torch.zeros(len(rates), dtype=torch.int64)

    def __call__(self, z, rows):
        rows = torch.arange(len(self.b)) if rows is None else rows
        self.seen[rows] += 1
        turned = (z.flatten(1).double() @ self.q.T).view(z.shape)
        return (self.rates[rows] * turned + self.b[rows]).to(z.dtype)

    def alone(self, i):
        other = Rotation(0.5)
        other.rates, other.q = self.rates[i : i + 1], self.q
        other.b, other.init = self.b[i : i + 1], self.init[i : i + 1]
        return other


def norm(z):
    return z.flatten(1).norm(dim=1)


def test_plain_iteration_converges_at_the_predicted_rate_and_stops_at_the_predicted_iteration():
    f = Rotation(0.3, 0.5, 0.8)
    solution = solver("iterate", 100, 1e-6, record=True)(f, f.init)
    rates = f.rates.flatten()
    start = norm(f.init - f.fixed)
    first_step = norm(f(f.init, None) - f.init)
    for k, z in enumerate(solution.iterates[:10], 1):
        torch.testing.assert_close(norm(z - f.fixed), start * rates**k, rtol=1e-9, atol=0)
        residual = (first_step * rates ** (k - 1) / norm(z)).float()
        torch.testing.assert_close(solution.residuals[:, k - 1], residual, rtol=1e-5, atol=0)
    needed = torch.log(1e-6 * norm(f.fixed) / first_step) / torch.log(rates) + 1
    assert torch.equal(solution.iterations, needed.ceil().long())
    assert solution.converged.all() and not solution.diverged.any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_fixed_point_and_counts_its_applications(method):
    f = Rotation(0.3, 0.6, 0.8)
    solution = solver(method, 150, 1e-6)(f, f.init)
    torch.testing.assert_close(solution.z, f.fixed, rtol=0, atol=1e-4)
    assert solution.converged.all() and not solution.diverged.any()
    assert torch.equal(solution.iterations, f.seen)
    assert len(set(solution.iterations.tolist())) > 1
    measured = ~solution.residuals.isnan()
    assert torch.equal(measured.sum(1), solution.iterations)
    for row, count in zip(solution.residuals, solution.iterations):
        assert row[count - 1] <= 1e-6 and (row[: count - 1] > 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pick", ["last", "lowest"])
def test_a_sample_solved_among_others_gets_the_result_it_gets_alone(method, pick):
    f = Rotation(0.2, 0.9, 0.6, 4.0)
    together = solver(method, 60, 1e-6, pick)(f, f.init)
    for i in range(4):
        g = f.alone(i)
        alone = solver(method, 60, 1e-6, pick)(g, g.init)
        torch.testing.assert_close(together.z[i], alone.z[0], rtol=1e-6, atol=1e-9)
        for name in ("iterations", "residuals", "converged", "diverged"):
            ours, other = getattr(together, name)[i], getattr(alone, name)[0]
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_without_tolerance_all_iterations_run(method, iterations):
    f = Rotation(0.5, 0.0)  # the second is solved by its first application
    solution = solver(method, iterations, record=True)(f, f.init)
    assert f.seen.tolist() == solution.iterations.tolist() == [iterations, iterations]
    assert solution.residuals.shape == (2, iterations)
    assert len(solution.iterates) == iterations
    assert not solution.converged.any() and not solution.diverged.any()
    torch.testing.assert_close(solution.iterates[0], f(f.init, None))
    torch.testing.assert_close(solution.z[1], f.fixed[1])
    assert torch.equal(solution.iterates[-1], solution.z)


@pytest.mark.parametrize("method", METHODS)
def test_each_sample_may_have_its_own_iterations_and_tolerance(method):
    f = Rotation(0.5, 0.5, 0.5)
    solution = solver(method, torch.tensor([2, 50, 5]), torch.tensor([0.0, 1e-3, 0.5]))(f, f.init)
    assert solution.residuals.shape == (3, 50)
    assert torch.equal(solution.iterations, f.seen)
    assert solution.iterations[0] == 2 and 2 < solution.iterations[1] < 50 and solution.iterations[2] < 5
    assert solution.converged.tolist() == [False, True, True]
    assert solution.last_residual[1] <= 1e-3 and solution.last_residual[2] <= 0.5
    for i, (iterations, tolerance) in enumerate([(2, 0.0), (50, 1e-3), (5, 0.5)]):
        g = f.alone(i)
        alone = solver(method, iterations, tolerance)(g, g.init)
        torch.testing.assert_close(solution.z[i], alone.z[0], rtol=1e-6, atol=1e-9)
        assert solution.last_residual[i] == pytest.approx(alone.last_residual[0].item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_that_breaks_is_reported_keeps_its_last_finite_state_and_leaves_the_others_alone(method):
    f = Rotation(0.4, 0.4, 0.4)

    def breaking(z, rows):
        rows = torch.arange(3) if rows is None else rows
        fz = f(z, rows)
        return torch.where(((rows == 1) & (f.seen[rows] == 3))[:, None, None], torch.nan, fz)

    solution = solver(method, 50, 1e-8, record=True)(breaking, f.init)
    assert solution.diverged.tolist() == [False, True, False]
    assert solution.converged.tolist() == [True, False, True]
    assert torch.equal(solution.iterations, f.seen)
    assert solution.iterations[1] == 3
    assert solution.residuals[1, 2] == torch.inf
    assert solution.residuals[1, 3:].isnan().all()
    assert torch.equal(solution.z[1], solution.iterates[1][1])
    torch.testing.assert_close(solution.z[::2], f.fixed[::2], rtol=0, atol=1e-6)


def broken(z, rows):
    return z / 0


def test_growth_without_bound_is_divergence():
    f = Rotation(10.0, 0.1)
    solution = solver("iterate", 50)(f, f.init)
    assert solution.diverged.tolist() == [True, False]
    assert 6 <= solution.iterations[0] <= 8
    assert solution.iterations[1] == 50
    assert solution.z.isfinite().all()


def test_a_solve_ends_when_all_samples_are_broken():
    start = torch.ones(2, TOKENS, WIDTH)
    solution = solver("iterate", 50)(broken, start)
    assert solution.diverged.all()
    assert solution.iterations.tolist() == [1, 1]
    assert torch.equal(solution.z, start)


def test_anderson_needs_far_fewer_applications_than_plain_iteration_on_a_slow_map():
    f = Rotation(0.99, 0.98)
    plain = solver("iterate", 2000, 1e-6)(f, f.init)
    fast = solver("anderson", 2000, 1e-6, memory=20)(f, f.init)
    assert plain.converged.all() and fast.converged.all()
    assert (20 * fast.iterations < plain.iterations).all()
    torch.testing.assert_close(fast.z, f.fixed, rtol=0, atol=1e-4)


def test_anderson_takes_the_combination_of_least_residual():
    f = Rotation(0.9)
    first, second, third = solver("anderson", 3, record=True, mixing=0.7)(f, f.init).iterates
    x0, x1 = f.init, f.init + 0.7 * (first - f.init)
    g0, g1 = first - x0, second - x1
    torch.testing.assert_close(second, f(x1, None))
    weight = torch.linalg.lstsq((g1 - g0).view(-1, 1), g1.view(-1, 1)).solution.squeeze()  # of g0
    x2 = weight * (x0 + 0.7 * g0) + (1 - weight) * (x1 + 0.7 * g1)
    torch.testing.assert_close(third, f(x2, None), rtol=1e-9, atol=1e-9)


def test_anderson_works_on_bfloat16_states_and_under_autocast():
    f = Rotation(0.95, 0.9)
    half = solver("anderson", 40, 0.02)(f, f.init.bfloat16())
    assert half.converged.all() and half.z.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        single = solver("anderson", 40, 1e-5, memory=20)(f, f.init.float())
        proposed = solver("broyden", 40, 1e-5)(f, f.init.float())
    for solution in (single, proposed):
        assert solution.converged.all() and solution.z.dtype == torch.float32
        torch.testing.assert_close(solution.z, f.fixed.float(), rtol=0, atol=1e-3)


def test_lowest_picks_each_samples_iterate_of_smallest_absolute_residual():
    targets = torch.tensor([[5.0, 6.0, 9.0, 9.5, 20.0], [1.0, 9.0, 8.9, 3.0, 2.0]])
    calls = iter(range(5))

    def f(z, rows):
        return targets[:, next(calls), None, None]

    solution = solver("iterate", 5, pick="lowest", record=True)(f, torch.zeros(2, 1, 1))
    torch.testing.assert_close(solution.z.flatten(), torch.tensor([9.5, 8.9]))
    assert solution.iterates[-1].flatten().tolist() == [20.0, 2.0]


def test_plain_iteration_has_the_same_bits_measured_or_not():
    f = Rotation(0.5, 0.9)
    measured = solver("iterate", 6, record=True)(f, f.init)
    bare = solver("iterate", 6, record=True, measure=False)(f, f.init)
    assert torch.equal(measured.z, bare.z)
    assert torch.equal(measured.iterations, bare.iterations)
    assert all(map(torch.equal, measured.iterates, bare.iterates))
    assert bare.residuals.shape == (2, 0)


def test_without_measuring_a_state_that_is_not_finite_is_still_reported():
    assert solver("iterate", 2, measure=False)(broken, torch.ones(2, TOKENS, WIDTH)).diverged.all()


@pytest.mark.parametrize(
    "method, iterations", [("iterate", 8), ("anderson", 8), ("anderson", 3), ("broyden", 8)]
)
def test_the_iterates_are_those_of_torchdeq(method, iterations):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter
    f = Rotation(0.9, 0.7)
    theirs, options = {
        "iterate": (fixed_point_iter, {"max_iter": iterations}),
        "anderson": (anderson_solver, {"max_iter": iterations, "m": 5, "lam": 1e-12}),
        "broyden": (broyden_solver, {"max_iter": iterations - 1}),
    }[method]
    reference, _, trace = theirs(lambda z: f(z, None), f.init, tol=0, return_final=True, **options)
    solution = solver(method, iterations)(f, f.init)
    if method == "broyden":  # returns the point, we return f of the point
        reference = f(reference, None)
    torch.testing.assert_close(solution.z, reference, rtol=1e-6, atol=1e-9)
    last = trace["rel_trace"][:, -1].float()
    torch.testing.assert_close(solution.residuals[:, -1], last, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", ["iterate", "anderson"])
def test_torchdeqs_own_methods_agree_with_ours(method):
    f = Rotation(0.9, 0.7)
    ours = solver(method, 40, 1e-7)(f, f.init)
    theirs = solver(f"torchdeq_{method}", 40, 1e-7)(f, f.init)
    torch.testing.assert_close(theirs.z[ours.converged], ours.z[ours.converged], rtol=0, atol=1e-5)
    assert torch.equal(theirs.converged, ours.converged)
    if method == "iterate":
        assert torch.equal(theirs.iterations, ours.iterations)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"method": "newton"}, "method"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"pick": "best"}, "pick"),
        ({"measure": False, "tolerance": 0.1}, "measure"),
        ({"iterations": torch.tensor([3, 0])}, "iterations"),
        ({"tolerance": torch.tensor([0.1, -1.0])}, "tolerance"),
        ({"iterations": torch.tensor([3, 2]), "measure": False}, "measure"),
        ({"memory": 5}, "memory"),
        ({"method": "anderson", "mixing": 1.0}, "memory"),
        ({"method": "anderson", "memory": 1, "mixing": 1.0}, "memory"),
        ({"method": "torchdeq_anderson", "memory": 5}, "mixing"),
        ({"method": "anderson", "memory": 5, "mixing": 1.5}, "mixing"),
    ],
)
def test_an_invalid_solver_is_refused_by_the_name_of_its_field(fields, key):
    valid = {"method": "iterate", "iterations": 3, "tolerance": 0.0, "pick": "last"}
    with pytest.raises(ValueError, match=key):
        Solver(**valid | fields)
