"""Results as tidy tables: a row each, a column a thing, and a sentence where a file is not there or damaged."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
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
        "progressive/pd-1": {
            "fd": [3.5],
            "curve": [{"nimg": 500, "times": 2.0}],
            "summary": {"nimg_before": 3000},
        },
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
    assert get["optimisation.snapshots"].iloc[0] == (250, 500)
    assert runs["equilibrium.iterations"].isna().sum() == len(runs) - 3  # an explicit model has none
    assert list(get["fd_train"]) == [2.0, 2.2, 2.4]  # the headline's


def test_the_folder_may_be_the_one_that_one_is_in(study, monkeypatch):
    monkeypatch.chdir(study)
    assert list(equilab.results(".").runs["run"]) == list(equilab.results(study).runs["run"])


def test_what_figures_and_claims_need_is_a_column(study):
    runs = equilab.results(study).runs.set_index(["of", "seed"])
    assert runs.loc[("distill/get", 0), "train_flops"] == 30 * 1000
    assert runs.loc[("distill/get", 0), "teacher_calls"] == 100 * 35  # pairs, of 18 steps of Heun's method
    assert runs.loc[("consistency/cd", 0), "teacher_calls"] == 2 * 1000
    chain = runs.loc[("progressive/pd-1", 0)]  # with the images of the students before it
    assert (chain["nimg"], chain["teacher_calls"], chain["train_flops"]) == (4000, 2 * 4000, 30 * 4000)
    rise = runs.loc[("distill/get", 0), "rise_train"]
    assert rise == pytest.approx(2.0)  # it ends at twice its best snapshot
    assert runs.loc[("distill/vit", 0), "rise_train"] == 1.0


@pytest.mark.parametrize(
    ("of", "config", "calls"),
    [
        ("consistency/cd", {"form": "published"}, 4000),  # two steps of Heun's method an image
        ("gan/gdd", {"consistency": None}, 0),
        ("gan/gdd", {"consistency": {"form": "text"}}, 2000),
        ("progressive/pd-1", {}, 2000),
        ("diffusion/fpdm", {}, None),  # has no teacher
        ("distill/get", {"published": "get.pt"}, None),  # trained elsewhere
    ],
)
def test_how_often_the_teacher_is_evaluated_follows_from_how_a_run_is_trained(tmp_path, of, config, calls):
    runs = {of: {"fd": [1.0], "config": config}, "consistency/cd-text": {"fd": [1.0]}}
    found = equilab.results(write_study(tmp_path, runs)).runs.set_index("of")["teacher_calls"]
    assert found["consistency/cd-text"] == 2000
    assert np.isnan(found[of]) if calls is None else found[of] == calls


def test_a_setting_is_a_row_and_the_first_is_the_headline(study):
    settings = equilab.results(study).settings
    get = settings[(settings["of"] == "distill/get") & (settings["seed"] == 1)]
    assert list(get["position"]) == [0, 1, 2] and list(get["most_iterations"]) == [6, 1, 2]
    assert list(get["fd_train"]) == pytest.approx([2.2, 6.6, 3.3])
    chains = settings[settings["of"] == "diffusion/fpdm"]
    assert list(chains["iterations_per_call"]) == [4 / 5] * 2 and list(chains["reuse"]) == [True, False]
    # 0.1 over 0.4; the first step is left out
    assert list(chains["residual_ratio"]) == pytest.approx([0.25] * 2)


def test_snapshots_end_with_the_end_of_training(study):
    snapshots = equilab.results(study).snapshots
    get = snapshots[(snapshots["of"] == "distill/get") & (snapshots["seed"] == 0)]
    assert list(get["nimg"]) == [250, 500, 1000] and list(get["fd_train"]) == pytest.approx([8.0, 1.0, 2.0])
    assert list(get["train_flops"]) == [30 * 250, 30 * 500, 30 * 1000]
    chain = snapshots[snapshots["of"] == "progressive/pd-1"]
    assert list(chain["nimg"]) == [3500, 4000] and list(chain["train_flops"]) == [30 * 3500, 30 * 4000]


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


def layer(of, seed, name, depth, mean, rms):
    """Return the rows of a layer: its activity at three noise levels, of which the order is judged by the lower two."""
    about = {"of": of, "seed": seed, "family": "edm", "layer": name, "depth": depth, "judged_up_to": 30.0}
    levels = zip((80.0, 10.0, 0.1), mean, rms)
    return [
        {**about, "step": step, "at": at, "mean": one, "rms": other}
        for step, (at, one, other) in enumerate(levels, 1)
    ]


def test_of_two_layers_the_deeper_or_the_shallower_is_active_at_the_higher_noise_level(study):
    early, late, first = (0.0, 2.0, 1.0), (0.0, 1.0, 2.0), (3.0, 2.0, 1.0)  # `first` beyond what is judged
    rows = [
        *layer("teacher", 0, "enc.a", 0, late, early),
        *layer("teacher", 0, "enc.b", 1, early, late),
        *layer("teacher", 0, "dec.c", 2, first, early),
        *layer("teacher", 0, "dec.d", 3, late, early),
    ]
    fpdm = {"of": "diffusion/fpdm", "seed": 0, "family": "fpdm", "layer": "iteration.2", "depth": 0}
    table(
        study / "activation/activation.csv", [*rows, {**fpdm, "step": 1, "at": 9.0, "mean": 1.0, "rms": 1.0}]
    )
    found = equilab.results(study)
    assert len(found.activation) == 13 and found.activation["deep"].notna().sum() == 12
    peaks = found.peaks.set_index(["layer", "reading"])
    assert (peaks["deep"].unstack()["mean"]).to_dict() == {"enc.a": 0, "enc.b": 1, "dec.c": 1, "dec.d": 0}
    assert peaks.loc[("dec.c", "mean"), ["sigma", "sigma_judged"]].tolist() == [80.0, 10.0]
    orders = found.orders.set_index("first")
    assert orders["pairs_mean"].to_dict() == {"deep": 2.5, "shallow": 0.5}
    assert orders["pairs_rms"].to_dict() == {"deep": 1.0, "shallow": 2.0}  # those of the decoder are alike


def test_costs_of_a_study_that_measures_no_training_are_those_of_sampling(study):
    row = {
        "of": "distill/get",
        "seed": 0,
        "family": "get",
        "what": "sample",
        "iterations": 6,
        "memory_mib": 7.0,
    }
    table(study / "cost/cost.csv", [{**row, "seconds": 0.2, "seconds_min": 0.1, "seconds_max": 0.3}])
    rows = equilab.results(study).compare("get against vit")
    get = rows[rows["of"] == "distill/get"]
    assert set(get["sample_seconds"]) == {0.2} and get["train_seconds"].isna().all()


def test_images_until_a_target_are_read_off_the_curve_and_are_all_of_a_training_at_least(tmp_path):
    curve = [{"nimg": 250, "times": 8.0}, {"nimg": 500, "times": 2.0}]
    runs = {
        "gan/gdd": {"fd": [2.0, 8.0], "curve": curve},
        "consistency/cd": {"fd": [9.0, 9.0], "curve": curve},
        "distill/get": {"fd": [2.0, 8.0]},
    }
    target = {"run": "distill/get", "margin": 0.5}  # a geometric mean of 4, so that 6 will do
    named = {"runs": ["gan/gdd"], "baseline": ["consistency/cd"]}
    comparisons = {"to the target": {"table": "reached", "target": target, **named}}
    found = equilab.results(write_study(tmp_path, runs, comparisons=comparisons))
    half_way = 250 * 2 ** (np.log(16 / 6) / np.log(16 / 4))  # 16 at 250, 4 at 500
    rows = found.compare("to the target").set_index(["side", "seed"])
    assert rows.loc["runs", "images_train"].tolist() == pytest.approx([half_way, np.inf])
    assert rows.loc["runs", "images_train_least"].tolist() == pytest.approx([half_way, 1000])
    assert rows.loc["baseline", "images_train"].tolist() == [np.inf, np.inf]
    assert rows.loc["baseline", "images_train_least"].tolist() == [1000, 1000]


def test_relative_distances_name_their_runs(study):
    rows = [
        {"seed": 0, "first": "cd", "second": "get", "distance": 1.5, "noises": "same"},
        {"seed": 0, "first": "get", "second": "cd", "distance": 1.5, "noises": "same"},
        {"seed": 0, "first": "cd", "second": "cd", "distance": 0.5, "noises": "others"},
        {"seed": 0, "first": "cd", "second": "get", "distance": 1.75, "noises": "others"},
    ]
    table(study / "relative/relative.csv", rows)
    found = equilab.results(study)
    assert list(found.relative["second_of"])[:3] == ["distill/get", "consistency/cd", "consistency/cd"]
    runs = found.runs.set_index(["of", "seed"])
    assert runs["relative"].dropna().to_dict() == {("distill/get", 0): 1.5}
    assert runs["relative_others"].dropna().to_dict() == {
        ("consistency/cd", 0): 0.5,
        ("distill/get", 0): 1.75,
    }


def test_an_entry_of_evaluate_need_not_be_called_as_its_run(study):
    path = study.parent / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["evaluate"]["mine"] = params["evaluate"].pop("get")
    path.write_text(yaml.safe_dump(params))
    (study / "evaluate/get").rename(study / "evaluate/mine")
    table(study / "relative/relative.csv", [{"seed": 0, "first": "cd", "second": "mine", "distance": 1.5}])
    found = equilab.results(study)
    assert list(found.relative["second_of"]) == ["distill/get"]
    assert found.runs.set_index(["of", "seed"])["relative"].dropna().to_dict() == {("distill/get", 0): 1.5}


def test_the_floor_and_the_iterates(study):
    found = equilab.results(study)
    assert found.floor.set_index("measure").loc["fd_train"].to_dict() == {"test": 9.0, "halves": 4.0}
    assert found.iterates("distill/get", 2)["images"].shape == (1, 2, 1, 8, 8)
    with pytest.raises(UserError, match="seed 3"):
        found.iterates("distill/get", 3)
    assert (found.score, found.distance, found.study) == ("FD", "fd_train", "made by hand")


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        (
            "evaluate/get/1/sweep.csv",
            None,
            ".*`python -m equilab evaluate get --seed 1` first",
        ),
        ("evaluate/get/1/sweep.csv", "fd_train,fd_test\n1,", ".* evaluate get --seed 1` again"),
        ("evaluate/get/0/metrics.json", "{", ".* evaluate get --seed 0` again"),
        ("evaluate/fpdm/0/iterates.npz", "PK", ".* evaluate fpdm --seed 0` again"),
        (
            "distill/vit/2/summary.json",
            '{"stage": "distill"}',
            ".* config.* distill vit --seed 2` again",
        ),
    ],
)
def test_a_missing_or_damaged_file_is_named_with_the_command_that_writes_it(study, path, content, told):
    if content is None:
        (study / path).unlink()
    else:
        (study / path).write_text(content)
    with pytest.raises(UserError, match=f"{path} {told}"):
        equilab.results(study).compare("get against vit")


def test_a_table_of_a_stage_that_has_not_run_has_no_rows(study):
    found = equilab.results(study)
    for name, column in {
        "costs": "seconds",
        "activation": "rms",
        "peaks": "sigma",
        "orders": "pairs_rms",
        "relative": "distance",
        "claims": "id",
    }.items():
        table = getattr(found, name)
        assert table.empty and column in table
    assert found.runs["relative"].isna().all()


def test_a_damaged_table_is_refused(study):
    (study / "cost").mkdir()
    (study / "cost/cost.csv").write_text("of,seed\n1,")
    with pytest.raises(UserError, match="cost.csv "):
        print(equilab.results(study).costs)


def test_the_pairs_of_a_stage_are_in_words_and_those_without_results_left_out(study):
    pairs = equilab.results(study).pairs("distill")
    assert set(pairs["pair"]) == {"get against vit", "get against get (most iterations 1)"}
    assert not pairs.duplicated(["pair", "side", "seed"]).any()
    assert equilab.results(study).pairs("gan").empty
    for seed in range(3):
        shutil.rmtree(study / f"evaluate/vit/{seed}")
    assert set(equilab.results(study).pairs("distill")["pair"]) == {"get against get (most iterations 1)"}


def test_what_is_asked_for_and_not_there_is_said(study, tmp_path):
    with pytest.raises(UserError, match="elsewhere .*`dvc repro`"):
        equilab.results(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="did you mean 'get against vit'"):
        equilab.results(study).compare("get against vits")


def test_a_notebook_reads_what_it_shows_and_nothing_else(study):
    whole, part = equilab.results(study), equilab.results(study, ["teacher", "distill"])
    for name in ("runs", "settings", "snapshots"):
        of = getattr(part, name)["of"].unique()
        assert sorted(of) == ["distill/get", "distill/vit", "teacher"], name
        assert {*of} < {*getattr(whole, name)["of"]}
    none = equilab.results(study, ["gan"])
    assert (
        none.runs.empty and none.settings.empty and {*part.settings} - {"residual_ratio"} <= {*whole.settings}
    )
    for name in ("costs", "activation", "relative", "claims", "measured"):
        with pytest.raises(UserError, match="`parameters` .*`shows`"):
            getattr(part, name)
    for path in study.glob("evaluate/*/*/sweep.csv"):
        if path.parts[-3] not in ("teacher", "get", "vit"):
            path.write_text("damaged")
    assert len(equilab.results(study, ["teacher", "distill"]).settings) == len(part.settings)
    with pytest.raises(UserError, match=r"^shows: 'distil' .* 'distill'"):
        equilab.results(study, ["distil"])


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
