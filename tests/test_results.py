"""Results as tidy tables: a row each, a column a thing, and a sentence where a file is missing or damaged."""

import subprocess
import sys

import numpy as np
import pytest
from made import SOLVER, table, write_study

import equilab
from equilab.core.config import UserError

ITERATIONS = [
    {**SOLVER, "most_iterations": count, "times": times} for count, times in ((6, 1.0), (1, 3.0), (2, 1.5))
]
CHAIN = {"method": "ddim", "steps": 5, "blocks": 20, "budget": "constant", "reuse": True}


@pytest.fixture
def study(tmp_path):
    residual = np.full((3, 5, 2), np.nan)  # percentiles, steps, iterations
    residual[1] = [[9.0, 9.0], [1.0, 0.4], [1.0, 0.4], [1.0, 0.1], [0.1, np.nan]]
    runs = {
        "teacher": {"fd": [1.0]},
        "distill/get": {
            "fd": [2.0, 2.2, 2.4],
            "settings": ITERATIONS,
            "curve": [{"nimg": 250, "times": 4.0}, {"nimg": 500, "times": 0.5}],
            "config": {"network": {"width": 8}, "equilibrium": {"iterations": 6}},
        },
        "distill/vit": {"fd": [3.0, 3.3, 3.6], "config": {"network": {"width": 16}, "equilibrium": None}},
        "diffusion/fpdm": {
            "fd": [5.0],
            "settings": [CHAIN, {**CHAIN, "reuse": False}],
            "arrays": {
                f"{name}_{k}": array
                for k in (0, 1)
                for name, array in (("residual", residual), ("t", np.arange(5)))
            },
        },
        "consistency/cd": {"fd": [4.0]},
    }
    points = {"runs": ["distill/get"], "baseline": [{"run": "distill/get", "at": {"most_iterations": 1}}]}
    comparisons = {
        "get against vit": {"runs": ["distill/get", "distill/get"], "baseline": ["distill/vit"]},
        "six against one": points,
        "half way": {
            "table": "snapshots",
            "runs": [{"run": "distill/get", "at": {"nimg": 500}}],
            "baseline": ["distill/get"],
        },
    }
    comparisons["half way"]["baseline"] = [{"run": "distill/get", "at": {"nimg": 250}}]
    return write_study(tmp_path, runs, comparisons=comparisons)


def test_a_run_is_a_row_for_each_seed_with_its_config_flattened(study):
    runs = equilab.results(study).runs
    get = runs[runs["of"] == "distill/get"]
    assert (
        list(get["seed"]) == [0, 1, 2] and set(get["label"]) == {"GET"} and set(get["stage"]) == {"distill"}
    )
    assert list(get["network.width"]) == [8] * 3 and list(get["equilibrium.iterations"]) == [6] * 3
    assert get["optimisation.snapshots"].iloc[0] == (5,)
    assert runs["equilibrium.iterations"].isna().sum() == len(runs) - 3  # an explicit model has none
    assert list(get["fd_train"]) == [2.0, 2.2, 2.4]  # the headline's


def test_what_figures_and_claims_need_is_a_column(study):
    runs = equilab.results(study).runs.set_index(["of", "seed"])
    assert runs.loc[("distill/get", 0), "train_flops"] == 30 * 1000
    assert runs.loc[("distill/get", 0), "teacher_calls"] == 100 * 35  # pairs, of 18 steps of Heun's method
    assert runs.loc[("consistency/cd", 0), "teacher_calls"] == 2 * 1000
    assert runs.loc[("distill/get", 0), "rise_train"] == pytest.approx(
        2.0
    )  # it ends at twice its best snapshot
    assert runs.loc[("distill/vit", 0), "rise_train"] == 1.0


def test_a_setting_is_a_row_and_the_first_is_the_headline(study):
    settings = equilab.results(study).settings
    get = settings[(settings["of"] == "distill/get") & (settings["seed"] == 1)]
    assert list(get["position"]) == [0, 1, 2] and list(get["most_iterations"]) == [6, 1, 2]
    assert list(get["fd_train"]) == pytest.approx([2.2, 6.6, 3.3])
    chains = settings[settings["of"] == "diffusion/fpdm"]
    assert list(chains["iterations_per_call"]) == [4 / 5] * 2 and list(chains["reuse"]) == [True, False]
    assert list(chains["residual_ratio"]) == pytest.approx(
        [0.25] * 2
    )  # 0.1 over 0.4; the first step is left out


def test_snapshots_end_with_the_end_of_training(study):
    snapshots = equilab.results(study).snapshots
    get = snapshots[(snapshots["of"] == "distill/get") & (snapshots["seed"] == 0)]
    assert list(get["nimg"]) == [250, 500, 1000] and list(get["fd_train"]) == pytest.approx([8.0, 1.0, 2.0])
    assert list(get["train_flops"]) == [30 * 250, 30 * 500, 30 * 1000]


def test_a_comparison_is_rows_of_both_sides_seed_by_seed(study):
    rows = equilab.results(study).compare("get against vit")
    assert len(rows) == 12 and list(rows["pair"].unique()) == [0, 1]
    baseline = rows[(rows["pair"] == 1) & (rows["side"] == "baseline")]  # one baseline serves every pair
    assert list(baseline["fd_train"]) == [3.0, 3.3, 3.6] and list(baseline["network.width"]) == [16] * 3
    settings = equilab.results(study).compare("six against one")
    assert list(settings[settings["side"] == "baseline"]["fd_train"]) == pytest.approx([6.0, 6.6, 7.2])
    assert set(settings["point"]) == {"get", "get (most iterations 1)"}
    snapshots = equilab.results(study).compare("half way")
    assert list(snapshots[snapshots["side"] == "runs"]["fd_train"]) == pytest.approx([1.0, 1.1, 1.2])


def test_what_was_measured_stands_beside_every_seed(study):
    row = {"batch": 4, "seconds": 0.2, "seconds_min": 0.1, "seconds_max": 0.3, "memory_mib": 7.0}
    get = {"of": "distill/get", "seed": 0, "family": "get", **row}
    rows = [
        {**get, "what": "sample", "iterations": 6},
        {**get, "what": "sample", "iterations": 1, "seconds": 0.05},
        {**get, "what": "train", "as_trained": True, "memory_mib": 20.0},
        {**get, "what": "train", "as_trained": False, "memory_mib": 10.0},
    ]
    table(study / "cost/cost.csv", rows)
    found = equilab.results(study)
    assert list(found.costs["most_iterations"].dropna()) == [6, 1] and set(found.costs["label"]) == {"GET"}
    compared = found.compare("six against one").set_index("side")
    assert set(compared.loc["runs", "sample_seconds"]) == {0.2} and set(
        compared.loc["baseline", "sample_seconds"]
    ) == {0.05}
    assert set(compared["train_memory"]) == {20.0}


def test_relative_distances_name_their_runs(study):
    rows = [
        {"seed": 0, "first": "cd", "second": "get", "distance": 1.5},
        {"seed": 0, "first": "get", "second": "cd", "distance": 1.5},
    ]
    table(study / "relative/relative.csv", rows)
    found = equilab.results(study)
    assert list(found.relative["second_of"]) == ["distill/get", "consistency/cd"]
    runs = found.runs.set_index(["of", "seed"])["relative"].dropna()
    assert runs.to_dict() == {("distill/get", 0): 1.5}


def test_the_floor_and_the_iterates(study):
    found = equilab.results(study)
    assert found.floor.set_index("measure").loc["fd_train"].to_dict() == {"bootstrap": 0.3, "test": 9.0}
    assert found.iterates("distill/get", 2)["images"].shape == (1, 2, 1, 8, 8)
    with pytest.raises(UserError, match="seed 3"):
        found.iterates("distill/get", 3)
    assert (found.score, found.distance, found.study) == ("FD", "fd_train", "made by hand")


@pytest.mark.parametrize(
    ("path", "stage", "content"),
    [
        ("evaluate/get/1/sweep.csv", "evaluate", None),
        ("evaluate/get/1/sweep.csv", "evaluate", "fd_train,fd_test\n1,"),
        ("evaluate/get/0/metrics.json", "evaluate", "{"),
        ("evaluate/fpdm/0/iterates.npz", "evaluate", "PK"),
        ("distill/vit/2/summary.json", "distill/vit", '{"stage": "distill"}'),
    ],
)
def test_a_missing_or_damaged_file_is_named_with_its_stage(study, path, stage, content):
    if content is None:
        (study / path).unlink()
    else:
        (study / path).write_text(content)
    with pytest.raises(UserError, match=f"{path}.*{stage}"):
        equilab.results(study).compare("get against vit")


def test_what_a_stage_has_not_written_is_said(study, tmp_path):
    for name in ("costs", "activation", "relative"):
        with pytest.raises(UserError, match="missing or damaged; run the stage"):
            getattr(equilab.results(study), name)
    with pytest.raises(UserError, match="no evaluated run"):
        equilab.results(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="did you mean 'get against vit'"):
        equilab.results(study).compare("get against vits")


def test_published_numbers_say_where_they_stand():
    found = equilab.published_numbers("get_runs")
    assert (found["updates"] * found["batch"] == found["nimg"]).all()
    counted = 3.0 * found["flops"] * found["nimg"]
    assert counted.tolist() == pytest.approx(found["train_flops"].astype(float).tolist())
    assert found.loc[found["model"] == "GET-Mini", "fid"].item() == 10.72
    assert found[["paper", "where"]].notna().all(axis=None)
    with pytest.raises(UserError, match="get_runs"):
        equilab.published_numbers("get_run")


def test_importing_equilab_imports_neither_torch_nor_pandas():
    code = "import sys, equilab; sys.exit(bool({'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
