"""Analysis of denoisers on results made by hand: tables, figures, and what they choose to compare."""

import json

import numpy as np
import pandas as pd
import pytest

from equilab.analysis import chains, figures, fpdm_claims
from equilab.analysis.scaling import Rule
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN, Config, rows
from equilab.core.config import UserError

FIXED = {"gradient": "s_jfb", "without": 3, "steps": 3}


def setting(steps, blocks=None, method="ddim", reuse=True, budget="constant", explicit=2):
    along = (
        {"blocks": blocks, "budget": budget, "reuse": reuse, "solver": "iterate", "tolerance": 0.0}
        if blocks
        else {}
    )
    spent = blocks or explicit * steps
    fd = 900 / spent + (0 if reuse else 5) + 2 * abs(spent / steps - 4)
    return {
        "method": method,
        "steps": steps,
        "eta": 0.0 if method == "ddim" else None,
        "guidance_scale": None,
        **along,
        "nfe": steps,
        "block_evals": spent,
        "flops": 1e5 * spent,
        "fd_train": fd,
        "residual": 0.1,
        "diverged": 0,
    }


FPDM = [
    setting(10, 40),
    setting(4, 16),
    setting(20, 80),
    *(setting(s, 40) for s in (13, 8, 4)),
    *(setting(s, 40, reuse=False) for s in (10, 8, 4)),
    *(setting(8, 40, budget=k) for k in chains.KINDS[1:]),
    setting(10, 40, "ddpm"),
    setting(20, 80, "ddpm"),
]
DIT = [setting(steps, method=method, explicit=8) for method in ("ddim", "ddpm") for steps in (5, 2, 10)]


def keep(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def study(folder, *runs):
    """Write the results of runs (name, kind, settings, what differs from the base config) as the stages do."""
    keep(folder / "evaluator/summary.json", {"floor": {"bootstrap": {"fd_train": 0.3}}, "samples": 500})
    draw = np.random.default_rng(0)
    for name, kind, settings, changes in runs:
        sizes = {"depth": 8} if kind == "dit" else {"pre": 1, "post": 1}
        config = {
            "network": {"kind": kind, **sizes},
            "seed": 0,
            "weight": "uniform",
            "fixed_point": FIXED if kind == "fpdm" else None,
            "optimisation": {"nimg": 100, "lr": 1e-3},
            **changes,
        }
        keep(
            folder / f"diffusion/{name}/summary.json",
            {
                "run": name,
                "config": config,
                "parameters": 1000 * len(kind),
                "nimg": 100,
                "train_flops_image": 1e6,
            },
        )
        at = folder / f"evaluate/{name}"
        keep(at / "metrics.json", {"of": f"diffusion/{name}", "kind": kind, "run": name})
        pd.DataFrame(settings).to_csv(at / "sweep.csv", index=False)
        found = {}
        for k, one in enumerate(settings):
            found |= {
                f"image_{k}": draw.integers(0, 256, (16, 1, 8, 8), np.uint8),
                f"diverged_{k}": np.arange(16) == 3,
            }
            found[f"t_{k}"] = np.linspace(999, 0, one["steps"]).astype(int)
            if one.get("blocks"):
                each = one["blocks"] // one["steps"] - 2
                found[f"residual_{k}"] = draw.random((3, one["steps"], each + 1)).astype(np.float32)
                found[f"residual_{k}"][:, 0, each:] = np.nan
        np.savez(at / "iterates.npz", **found)
    return chains.read(folder)


BOTH = (("fpdm", "fpdm", FPDM, {}), ("dit", "dit", DIT, {}))


def test_the_usual_chains_have_the_iterations_of_the_headline_whatever_their_length(tmp_path):
    found = chains.usual(study(tmp_path, *BOTH))
    fpdm = found[found["family"] == "FPDM"]
    assert sorted(fpdm["block_evals"]) == [16, 40, 40, 80, 80] and (fpdm["each"] == 2).all()
    assert len(found[found["family"] == "DiT"]) == len(DIT)


def test_smoothing_compares_chains_of_equal_cost(tmp_path):
    _, numbers = chains.smoothing(study(tmp_path, *BOTH), 0.95)
    assert set(numbers["block_evals"]) == {40}
    assert sorted(numbers[numbers["reuse"] == True]["steps"]) == [4, 8, 10, 13]  # noqa: E712
    assert numbers[numbers["family"] == "DiT"]["steps"].tolist() == [5]


def test_budgets_are_compared_where_nothing_else_differs(tmp_path):
    _, numbers = chains.allocations(study(tmp_path, *BOTH), 0.95)
    assert sorted(numbers["budget"]) == sorted(chains.KINDS) and set(numbers["steps"]) == {8}


def test_a_kind_of_budget_need_gain_at_one_setting_alone(tmp_path):
    more = [
        {**setting(4, 40, budget=kind), "fd_train": 100.0 if kind == "increasing" else 1.0}
        for kind in ("increasing", "adaptive")
    ]
    runs = ("fpdm", "fpdm", [*FPDM, *more], {}), BOTH[1]
    groups = chains.alike(study(tmp_path, *runs))
    assert [rows["steps"].iloc[0] for rows in groups] == [4, 8]  # the most to be moved first
    keys = [("FPDM-10", kind) for kind in ("increasing", "adaptive")]
    assert judged(tmp_path, *runs, of=keys).tolist() == [OPEN, HOLDS]


def test_the_images_of_equal_cost_end_with_those_of_a_dit(tmp_path):
    _, numbers = chains.smoothed(study(tmp_path, *BOTH))
    assert numbers["family"].tolist() == ["FPDM"] * 4 + ["DiT"] and set(numbers["block_evals"]) == {40}


def test_seeds_are_averaged_and_every_training_is_listed(tmp_path):
    jfb = {"fixed_point": {**FIXED, "gradient": "jfb", "steps": 1}}
    runs = [("a", "fpdm", FPDM, {}), ("b", "fpdm", FPDM, {"seed": 1}), ("c", "fpdm", FPDM[:1], jfb), BOTH[1]]
    found = chains.trainings(study(tmp_path, *runs), 0.95)
    assert found["seeds"].tolist() == [1, 2, 1] and set(found["gradient"].dropna()) == {"s_jfb", "jfb"}
    assert "±" in found.set_index("run").loc["a", "FD"]


def test_figures_show_their_numbers(tmp_path):
    wide = (
        "wide",
        "fpdm",
        [setting(10, 60), setting(4, 24)],
        {"network": {"kind": "fpdm", "pre": 2, "post": 2}},
    )
    found = study(tmp_path, *BOTH, wide)
    drawn = {
        "budgets": chains.budgets(found, 0.95),
        "smoothing": chains.smoothing(found, 0.95),
        "smoothed": chains.smoothed(found),
        "allocations": chains.allocations(found, 0.95),
        "convergence": chains.convergence(found),
        "layers": chains.layers(found, 0.95),
    }
    for name, (figure, numbers) in drawn.items():
        figures.save(str(tmp_path / "out"), name, figure, numbers)
        assert len(numbers) >= 4 and (tmp_path / f"out/{name}.png").stat().st_size > 5000
    assert {"steps", "reuse", "t", "iteration", "residual"} <= set(drawn["convergence"][1])


def test_a_study_without_denoisers_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no evaluated run of diffusion"):
        chains.read(tmp_path)


def judged(folder, *runs, of=tuple(fpdm_claims.COUNTED)):
    """Return the verdict of every claim by (id, part), or `of` these."""
    config = Config(Rule(0.95, 0.15, 0.05, 0.05, 300.0), larger=5.0, keeps=0.7, iterations=(2, 6))
    found = rows(
        fpdm_claims.Study(config, study(folder, *runs)), {key: fpdm_claims.COUNTED[key] for key in of}
    )
    assert found["reason"].str.len().min() > 10
    return found.set_index(["id", "part"])["verdict"]


def changed(settings, factor, **alike):
    """Return settings with the distance of those that are alike times a factor."""
    return [
        {**one, "fd_train": one["fd_train"] * factor} if alike.items() <= one.items() else one
        for one in settings
    ]


@pytest.mark.parametrize(("factor", "expected"), [(0.3, HOLDS), (1.0, OPEN), (3.0, FAILS)])
def test_claims_follow_the_distances(tmp_path, factor, expected):
    level = [{**one, "fd_train": 10.0} for one in FPDM]
    dits = [{**one, "fd_train": 10.0} for one in DIT]
    dit = ("dit", "dit", dits, {})
    for k, (key, alike) in enumerate(
        {
            ("FPDM-1", "few blocks, DDIM"): {"blocks": 16},
            ("FPDM-1", "few blocks, DDPM"): {"method": "ddpm", "blocks": 40},
            ("FPDM-6", "few iterations"): {"reuse": True, "blocks": 40, "steps": 10},
            ("FPDM-5", ""): {"reuse": True, "blocks": 40, "steps": 8},
            ("FPDM-10", "adaptive"): {"budget": "adaptive"},
            ("FPDM-10", "increasing"): {"budget": "increasing"},
        }.items()
    ):
        found = judged(
            tmp_path / str(k), ("fpdm", "fpdm", changed(level, factor, **alike), {}), dit, of=[key]
        )
        wanted = OPEN if key[0] == "FPDM-5" and expected == FAILS else expected
        assert found[key] == wanted, key
    many = changed([{**one, "fd_train": 10.0} for one in DIT], factor, steps=10)
    key = "FPDM-1", "many blocks, DDIM"
    assert (
        judged(tmp_path / "many", ("fpdm", "fpdm", level, {}), ("dit", "dit", many, {}), of=[key])[key]
        == expected
    )
    worse = [{**FPDM[0], "fd_train": 10.0 / factor}]
    same = [{**FPDM[0], "fd_train": 10.0}]
    base = ("fpdm", "fpdm", level, {})
    none = ("none", "fpdm", worse, {"network": {"kind": "fpdm", "pre": 0, "post": 0}})
    more = ("more", "fpdm", worse, {"fixed_point": {**FIXED, "without": 12, "steps": 12}})
    jfb = ("jfb", "fpdm", worse, {"fixed_point": {**FIXED, "gradient": "jfb", "steps": 1}})
    multi = ("multi", "fpdm", same, {"fixed_point": {**FIXED, "gradient": "multi_step"}})
    found = judged(tmp_path / "trainings", base, none, more, jfb, multi, dit)
    for key in (("FPDM-7", "one or none"), ("FPDM-8", ""), ("FPDM-9", "one step")):
        assert found[key] == expected, key
    assert found["FPDM-9", "stochastic"] == OPEN and found["FPDM-2", "parameters"] == FAILS
    two = [
        {**setting(8, 40), "fd_train": 10.0},
        {**setting(3, 16), "fd_train": 10.0 / factor},
        {**setting(16, 80), "fd_train": 10.0 * factor},
    ]
    two = ("two", "fpdm", two, {"network": {"kind": "fpdm", "pre": 2, "post": 2}})
    found = judged(tmp_path / "layers", base, two, dit)
    assert found["FPDM-7", "small budget"] == found["FPDM-7", "large budget"] == expected


def test_what_a_study_does_not_train_cannot_be_told(tmp_path):
    found = judged(tmp_path, ("fpdm", "fpdm", FPDM[:1], {}))
    assert set(found) == {OPEN}
