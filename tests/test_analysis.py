"""Analysis on results made by hand: tables, fits, frontiers, figures, and every claim in each of its verdicts."""

import json

import numpy as np
import pandas as pd
import pytest

from equilab.analysis import figures, get_claims, paper, scaling, speed, tables, verdicts
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN
from equilab.core.config import UserError

RULE = scaling.Rule(confidence=0.95, margin_distance=0.15, margin_l1=0.05, equal_budget=0.05, ranked=300.0)
CONFIG = verdicts.Config(RULE, larger=5.0, keeps=0.7, iterations=(2, 6))
ITERATIONS = (6, 1, 2, 4, 12)  # the first is the headline


def model(name, kind, parameters, fd, **changes):
    """Return what `write_study` needs of a run; cost in FLOPs goes with its parameters."""
    return {
        "name": name,
        "kind": kind,
        "parameters": parameters,
        "fd": fd,
        "flops": 100 * parameters,
        "seed": 0,
        "pairs": 1000,
        "nimg": 9600,
        "batch": 32,
        "conditional": True,
        "normalise": True,
        "conditioning": "additive",
        "decay": "cosine",
        "curve": {0.25: 4.0, 0.5: 2.0, 1: 1.0},
        "falls": {1: 2.0, 2: 1.5, 4: 1.1, 6: 1.0, 12: 1.0},
        "seconds": parameters / 1e5,
        "memory": parameters / 1e3,
        **changes,
    }


def write_study(folder, runs, distance="fd_train"):
    """Write the results of a study as its stages do, as far as analysis reads them; return the folder."""
    keep(folder / "evaluator/summary.json", {"floor": {"bootstrap": {distance: 0.3}}, "samples": 500})
    keep(folder / "pairs/meta.json", {"count": 1000, "held_out": 100, "nfe": 38500})
    keep(folder / "evaluate/teacher/metrics.json", {"of": "teacher", "kind": "unet", "run": "teacher"})
    table(
        folder / "evaluate/teacher/sweep.csv",
        [{"method": "heun", "steps": 18, "nfe": 35, "flops": 1e9, distance: 1.0}],
    )
    save_iterates(folder / "evaluate/teacher", 3, "unet")
    costs = [{"run": "teacher", "what": "sample", "nfe": 35, **timing(5.0, 9.0)}]
    for run in runs:
        keep(folder / f"distill/{run['name']}/summary.json", summary(run))
        at = folder / f"evaluate/{run['name']}"
        rows = [setting(run, distance, count) for count in (ITERATIONS if run["kind"] == "get" else [None])]
        keep(
            at / "metrics.json",
            {"of": f"distill/{run['name']}", "run": run["name"], **rows[0], "nimg": run["nimg"]},
        )
        table(at / "sweep.csv", rows)
        table(
            at / "curve.csv",
            [
                {
                    "nimg": int(run["nimg"] * part),
                    distance: run["fd"] * rise,
                    "l1_held_out": run["fd"] * rise / 20,
                }
                for part, rise in run["curve"].items()
            ],
        )
        save_iterates(at, 24 if run["kind"] == "get" else 1, run["kind"])
        costs += [
            {
                "run": run["name"],
                "what": "sample",
                "iterations": row["iterations"],
                **timing(run["seconds"] * row["flops"] / run["flops"], 5.0),
            }
            for row in rows
        ]
        for gradient, slower, share in (
            (("unrolled", 1.0, 1.0), ("o1", 1.25, 0.5)) if run["kind"] == "get" else (("explicit", 1.0, 1.0),)
        ):
            costs.append(
                {
                    "run": run["name"],
                    "what": "train",
                    "gradient": gradient,
                    "as_trained": gradient != "o1",
                    **timing(3 * run["seconds"] * slower, run["memory"] * share),
                }
            )
    table(folder / "cost/cost.csv", costs)
    environment = {"device": "cpu AVX512", "threads": 2, "torch": "2"}
    keep(
        folder / "cost/cost.json",
        {"environment": environment, "matmul_fp32_flops_s": 1e11, "settings": {"batch": 16}},
    )
    return folder


def keep(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def timing(seconds, memory):
    return {
        "batch": 16,
        "seconds": seconds,
        "seconds_min": 0.98 * seconds,
        "seconds_max": 1.02 * seconds,
        "images_s": 16 / seconds,
        "memory_mib": memory,
    }


def summary(run):
    network = {"kind": run["kind"], "width": run["parameters"], "depth": 1, "patch": 2}
    network |= (
        {"normalise": run["normalise"]} if run["kind"] == "get" else {"conditioning": run["conditioning"]}
    )
    optimisation = {
        "batch": run["batch"],
        "micro_batch": run["batch"],
        "nimg": run["nimg"],
        "lr": 0.1,
        "decay": run["decay"],
    }
    config = {
        "network": network,
        "conditional": run["conditional"],
        "pairs": run["pairs"],
        "seed": run["seed"],
        "loss": "l1",
        "equilibrium": {"init": "zeros", "iterations": 6} if run["kind"] == "get" else None,
        "optimisation": optimisation,
    }
    return {
        "run": run["name"],
        "config": config,
        "parameters": run["parameters"],
        "flops_image": run["flops"],
        "train_flops_image": 3 * run["flops"],
        "nimg": run["nimg"],
        "image": [1, 8, 8],
        "classes": 10,
    }


def setting(run, distance, count):
    fall = run["falls"][count] if count else 1.0
    row = {
        "kind": run["kind"],
        "parameters": run["parameters"],
        "nfe": 1,
        "iterations": count,
        "flops": run["flops"] * ((count or 6) + 1) // 7,
        distance: run["fd"] * fall,
        "l1_held_out": run["fd"] * fall / 20,
        "inception_score": 9.0,
        "precision": 0.8,
        "recall": 0.8,
    }
    solver = {
        "method": "iterate",
        "tolerance": 0.0,
        "pick": "last",
        "memory": None,
        "mixing": None,
        "init": "zeros",
    }
    return row | (
        {**solver, "most_iterations": count, "residual": 0.1 / count, "diverged": 0} if count else {}
    )


def save_iterates(folder, count, kind):
    draw = np.random.default_rng(0)
    traced = {
        name: draw.random((8, count), np.float32) + 0.1 for name in ("norm", "residual", "direction", "drift")
    }
    images = draw.integers(0, 256, (count, 16, 1, 8, 8), np.uint8)
    np.savez(folder / "iterates.npz", images=images, **(traced if kind == "get" else {}))


def read(folder, *runs, **options):
    return tables.read(write_study(folder, runs, **options))


VITS = [model(f"vit-{size}", "vit", size, 4 * (1000 / size) ** 0.5) for size in (100, 1000, 4000, 16000)]


def test_the_fit_recovers_an_exponent_and_its_interval_covers_it_as_often_as_it_says():
    x, draw = np.array([1.0, 2, 4, 8, 16]), np.random.default_rng(0)
    exact = scaling.power_law(x, 3 * x**-0.5, 0.95)
    np.testing.assert_allclose(
        (exact.factor, exact.exponent, exact.low, exact.high), (3, -0.5, -0.5, -0.5), rtol=1e-9
    )
    noisy = [scaling.power_law(x, 3 * x**-0.5 * np.exp(0.1 * draw.normal(size=5)), 0.95) for _ in range(1000)]
    assert 0.93 < np.mean([fit.low < -0.5 < fit.high for fit in noisy]) < 0.97


def test_two_sizes_have_an_exponent_without_an_interval():
    fit = scaling.power_law(np.array([1, 2]), np.array([4, 2]), 0.95)
    assert fit.exponent == pytest.approx(-1) and np.isnan(fit.low) and "too few" in str(fit)


def test_quality_over_training_has_an_exponent_through_one_model_trained_for_several_lengths(tmp_path):
    lengths = [
        {**model(f"vit-{n}", "vit", 1000, 4 * (1000 / n) ** 0.7), "nimg": n, "decay": "cosine"}
        for n in (1000, 2000, 4000)
    ]
    found = read(tmp_path, *lengths, {**model("wide", "vit", 3000, 1.0), "nimg": 8000, "decay": "cosine"})
    regime = found.runs.loc[found.runs["run"] == "vit-4000", "regime"].iloc[0]
    laws = scaling.fits(found, regime, "fd_train", RULE, "train_flops")
    assert laws["ViT"].points == 3 and laws["ViT"].exponent == pytest.approx(-0.7)
    running = read(
        tmp_path / "b", *({**one, "decay": "none"} for one in lengths)
    )  # snapshots on the way are no points of their own
    assert scaling.fits(running, regime, "fd_train", RULE, "train_flops")["ViT"].points == 3
    assert set(scaling.fits_table(found, regime, RULE)["over"]) == {"training FLOPs or images, one model"}


def test_a_run_without_snapshots_has_its_end_on_its_curve(tmp_path):
    folder = write_study(tmp_path, VITS)
    (folder / "evaluate/vit-100/curve.csv").write_text("")
    found = tables.read(folder)
    (end,) = found.curves[found.curves["run"] == "vit-100"].to_dict("records")
    run = found.runs.set_index("run").loc["vit-100"]
    assert end["last"] and all(
        end[key] == run[key] for key in ("nimg", "fd_train", "l1_held_out", "train_flops")
    )


def test_runs_that_differ_in_their_seed_are_replicates_of_one_model(tmp_path):
    found = read(tmp_path, model("b", "get", 1000, 2.0, seed=0), model("a", "get", 1000, 4.0, seed=1), *VITS)
    assert found.runs["model"].nunique() == 5 and found.runs["recipe"].nunique() == 2
    mean = tables.replicated(found.runs, ["model"], ["fd_train"], 0.95).query("kind == 'get'").iloc[0]
    assert (mean["label"], mean["n"], mean["fd_train"]) == ("b", 2, 3.0)
    assert mean["fd_train_half"] == pytest.approx(12.706 * np.sqrt(2) / np.sqrt(2), rel=1e-4)
    assert np.isnan(tables.replicated(found.runs, ["run"], ["fd_train"], 0.95)["fd_train_half"]).all()


def test_the_distance_is_called_what_the_study_calls_it(tmp_path):
    assert read(tmp_path / "a", *VITS).score == "FD"
    found = read(tmp_path / "b", *VITS, distance="fid_train")
    assert (found.score, found.floor, list(found.measures)) == ("FID", 0.3, ["fid_train", "l1_held_out"])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="dvc repro"):
        tables.read(tmp_path)


def test_iterations_are_the_settings_that_differ_from_the_headline_in_nothing_else(tmp_path):
    write_study(tmp_path, [model("get", "get", 1000, 2.0)])
    path = tmp_path / "evaluate/get/sweep.csv"
    rows = pd.read_csv(path)
    pd.concat([rows, rows.iloc[:1].assign(method="anderson"), rows.iloc[:1].assign(init="noise")]).to_csv(
        path, index=False
    )
    assert list(tables.read(tmp_path).iterations()["most_iterations"]) == sorted(ITERATIONS)


def test_at_equal_parameters_a_get_is_compared_with_the_frontier_of_vits(tmp_path):
    """The ViTs follow fd = 4 sqrt(1000 / parameters); a fourth, larger and worse, is not on their frontier."""
    found = read(
        tmp_path,
        *VITS,
        model("worse", "vit", 8000, 3.0),
        model("get", "get", 2000, 2.0),
        model("large", "get", 64000, 0.5),
    )
    rows = scaling.equal_budget(found, tables.main_regime(found), "parameters", "fd_train", RULE).set_index(
        "label"
    )
    assert rows.loc["get", "other"] == pytest.approx(4 / np.sqrt(2)) and rows.loc[
        "get", "ratio"
    ] == pytest.approx(np.sqrt(0.5))
    assert rows.loc["get", "high"] / rows.loc["get", "ratio"] == pytest.approx(1.15)
    assert np.isnan(rows.loc["large", "ratio"]), "no ViT is that large"


def test_a_vit_of_equal_quality_is_bounded_where_no_vit_is_as_good_or_as_bad(tmp_path):
    front = scaling.Frontier(pd.DataFrame({"cost": [1.0, 4.0], "fd": [4.0, 2.0], "fd_half": np.nan}), "fd")
    assert front.reaches(np.sqrt(8)) == (pytest.approx(2), pytest.approx(2))
    assert front.reaches(5.0) == (0, 1) and front.reaches(1.0) == (4, np.inf) and front.reaches(4.0) == (1, 1)


def test_snapshots_count_as_trainings_only_where_the_learning_rate_does_not_fall(tmp_path):
    for decay, count in (("cosine", 2), ("none", 6)):
        found = read(
            tmp_path / decay,
            *[
                {**run, "decay": decay}
                for run in (VITS[1], {**VITS[1], "name": "twice", "parameters": 2000, "flops": 200000})
            ],
        )
        assert len(scaling.points(found, tables.main_regime(found), "train_flops", RULE)) == count
    best = scaling.best_size(found, tables.main_regime(found), "fd_train", RULE)
    assert set(best["kind"]) == {"ViT"} and best["ahead"].min() >= 1


def test_distances_too_large_to_order_models_are_not_compared(tmp_path):
    found = read(tmp_path, *VITS, model("get", "get", 2000, 301.0))
    assert scaling.equal_budget(found, tables.main_regime(found), "parameters", "fd_train", RULE).empty


def test_the_published_tables_are_complete():
    runs = paper.runs().set_index("size")
    assert runs.query("where == 'table 2' or where == 'tables 2, 4'")["fid"].tolist() == [
        15.19,
        10.72,
        8.00,
        7.42,
        7.19,
        11.47,
        6.91,
    ]
    assert runs.loc["GET-Mini", "parameters"] == 19.2e6 and runs.loc["GET-Mini", "nimg"] == 102_400_000
    assert 2 * paper.SIZES["ViT-Base"][1] * 1e9 == runs.loc["ViT-Base", "flops"].iloc[0]


def test_figures_have_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib as mpl

    found = read(
        tmp_path,
        *VITS,
        model("get", "get", 2000, 2.0),
        model("get-published", "get", 2000, 3.0, normalise=False),
    )
    regime = tables.main_regime(found)
    for name, draw in (
        ("parameters", figures.parameters),
        ("budgets", figures.budgets),
        ("speed", speed.speed),
        ("solvers", speed.solvers),
    ):
        figures.save(str(tmp_path / "a"), name, *draw(found, regime, RULE))
        mpl.rcParams.update({"font.size": 20, "savefig.dpi": 30})
        figures.save(str(tmp_path / "b"), name, *draw(found, regime, RULE))
        for kind in ("png", "csv"):
            assert (tmp_path / f"a/{name}.{kind}").read_bytes() == (
                tmp_path / f"b/{name}.{kind}"
            ).read_bytes()
        assert len(pd.read_csv(tmp_path / f"a/{name}.csv")) >= 5


def judged(folder, *runs, of=None):
    """Return the verdict of every claim in a study of `runs`, by (id, part), or of those with the id `of`."""
    study = get_claims.Study(
        CONFIG, read(folder, *runs), json.loads((folder / "pairs/meta.json").read_text())
    )
    tests = {
        key: test
        for key, test in {**get_claims.COUNTED, **get_claims.MEASURED}.items()
        if of in (None, key[0])
    }
    found = verdicts.rows(study, tests)
    assert found["reason"].str.len().min() > 10 and list(found) == list(verdicts.COLUMNS)
    return found.set_index(["id", "part"])["verdict"]


def get(fd, parameters=2000, **changes):
    return model(f"get-{parameters}", "get", parameters, fd, **changes)


def test_every_claim_of_the_paper_has_a_row(tmp_path):
    found = judged(tmp_path, *VITS, get(2.0))
    assert set(found.index.get_level_values(0)) == {*(f"GET-{k}" for k in range(1, 12)), "X-1"}
    assert set(found) <= {HOLDS, FAILS, OPEN}


SAME = 4 / np.sqrt(2)  # the fd of a ViT of 2000 parameters


@pytest.mark.parametrize(("fd", "expected"), [(SAME / 4, HOLDS), (SAME, OPEN), (SAME * 4, FAILS)])
def test_claims_against_vit_follow_the_quality_of_get(tmp_path, fd, expected):
    found = judged(tmp_path, *VITS, get(fd))
    for claim in (
        ("GET-1", ""),
        ("GET-3", "sampling FLOPs"),
        ("GET-3", "training memory"),
        ("GET-3", "training speed"),
        ("X-1", "parameters, distance"),
        ("X-1", "parameters, held-out L1"),
        ("X-1", "training FLOPs, distance"),
    ):
        assert found[claim] == expected, claim
    assert found["GET-2", ""] == (HOLDS if expected == HOLDS else FAILS)
    slower = judged(tmp_path / "slow", *VITS, get(fd, seconds=1e3), of="GET-4")["GET-4", ""]
    assert slower == (OPEN if expected == HOLDS else FAILS), (
        "no ViT is as good, and the GET is not faster than those that are there"
    )


def test_a_claim_against_vit_cannot_be_told_without_vits(tmp_path):
    found = judged(tmp_path, get(2.0))
    assert {found[key] for key in found.index if key[0] in ("GET-1", "GET-2", "GET-3", "GET-4", "X-1")} == {
        OPEN
    }


@pytest.mark.parametrize(("at_two", "expected"), [(1.5, HOLDS), (1.05, OPEN), (0.5, FAILS)])
def test_iterations_help_hurt_or_make_no_difference(tmp_path, at_two, expected):
    falls = {1: 2.0, 2: at_two, 4: 1.0, 6: 1.0, 12: 1.0}
    assert judged(tmp_path, *VITS, get(2.0, falls=falls), of="GET-5")["GET-5", ""] == expected


@pytest.mark.parametrize(("fd", "expected"), [(1.0, HOLDS), (2.1, OPEN), (4.0, FAILS)])
def test_a_larger_a_longer_trained_and_a_richer_model_is_compared_with_its_like(tmp_path, fd, expected):
    assert judged(tmp_path / "size", get(2.0), get(fd, 4000), of="GET-6")["GET-6", ""] == expected
    for part, change in (
        ("training", {"nimg": 38400}),
        ("pairs", {"pairs": 3000}),
        ("batch", {"nimg": 19200, "batch": 64}),
    ):
        found = judged(tmp_path / part, get(2.0), {**get(fd), "name": "other", **change}, of="GET-8")
        assert found["GET-8", part] == expected
        assert set(found[[key for key in found.index if key[0] == "GET-8" and key[1] != part]]) == {OPEN}


@pytest.mark.parametrize(("fd", "expected"), [(4.0, HOLDS), (2.1, OPEN), (1.0, FAILS)])
def test_class_injection_is_compared_in_models_alike_in_all_else(tmp_path, fd, expected):
    vit = model("vit", "vit", 1000, 2.0)
    found = judged(
        tmp_path,
        vit,
        {**vit, "name": "none", "conditional": False, "fd": fd},
        {**vit, "name": "adaln", "conditioning": "adaln_zero", "fd": fd},
        of="GET-10",
    )
    assert found["GET-10", "none"] == found["GET-10", "AdaLN-Zero"] == expected


@pytest.mark.parametrize(
    ("fd", "decay", "expected"),
    [(0.4, "none", HOLDS), (1.0, "none", OPEN), (4.0, "none", FAILS), (0.4, "cosine", OPEN)],
)
def test_the_best_size_for_a_budget_grows_or_not(tmp_path, fd, decay, expected):
    """The small model is as good from the start, the large one improves in proportion to its training."""
    small = get(2.0, nimg=96000, decay=decay, curve={1 / 16: 1.0, 1: 1.0})
    large = get(fd, 4000, nimg=96000, decay=decay, curve={1 / 16: 16.0, 1: 1.0})
    assert judged(tmp_path, small, large, of="GET-7")["GET-7", ""] == expected


def test_constant_memory_may_cost_little_or_much_speed(tmp_path):
    assert judged(tmp_path, *VITS, get(2.0), of="GET-9")["GET-9", ""] == HOLDS
    path = tmp_path / "cost/cost.csv"
    for factor, expected in ((1.15, OPEN), (2.0, FAILS)):
        rows = pd.read_csv(path)
        rows.loc[rows["gradient"] == "o1", ["seconds", "seconds_min", "seconds_max"]] *= factor
        rows.to_csv(path, index=False)
        study = get_claims.Study(CONFIG, tables.read(tmp_path), {"nfe": 1, "count": 1, "held_out": 0})
        assert verdicts.rows(study, get_claims.MEASURED).set_index("id")["verdict"]["GET-9"] == expected


def test_with_seeds_their_interval_decides_and_not_the_margin(tmp_path):
    """FDs 1.95 and 2.05 against 2.4 and 2.42 of the smaller model: within 25%, but far beyond what seeds do."""
    spread = lambda size, values: [
        get(v, size, seed=k) | {"name": f"get-{size}-{k}"} for k, v in enumerate(values)
    ]
    assert (
        judged(tmp_path / "a", *spread(2000, (2.2, 2.21, 2.2)), *spread(4000, (2.1, 2.09, 2.1)), of="GET-6")[
            "GET-6", ""
        ]
        == HOLDS
    )
    assert (
        judged(tmp_path / "b", *spread(2000, (2.2, 4.4, 3.3)), *spread(4000, (1.5, 3.0, 2.2)), of="GET-6")[
            "GET-6", ""
        ]
        == OPEN
    )


def test_a_table_in_markdown_escapes_what_would_break_it():
    found = tables.markdown(pd.DataFrame({"a": ["x|y"], "b": [1234.5], "c": [np.nan], "d": [12345]}))
    assert found.splitlines()[2] == "| x\\|y | 1,234 | – | 12,345 |"
    assert [tables.short(v) for v in (999, 131396, 15e6, 2.5e18)] == ["999", "131k", "15M", "2.5E"]
