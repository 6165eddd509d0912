"""Claims: four tests against closed forms, declared comparisons, and a claim that YAML alone adds."""

import contextlib
import json
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from made import SOLVER, table, write_study
from scipy import stats
from smoke import current_studies

import equilab
from equilab.claims.claim import DEPENDS, judge, judge_by_kid, read_claims, refuse_mistyped
from equilab.claims.comparisons import check_comparisons
from equilab.claims.tests import (
    COLUMNS,
    FAILS,
    HOLDS,
    INCONCLUSIVE,
    NONE,
    better,
    cheaper,
    no_worse,
    ordered,
    told_apart,
)
from equilab.core.config import UserError, read
from equilab.core.job import Job, Study
from equilab.stages import claims as stage
from equilab.tables import NotRunError


def rows(*pairs, **columns):
    """Return the rows of a comparison: of each pair the values of runs and of baseline, a row for each seed."""
    found = []
    for pair, sides in enumerate(pairs):
        for side, values in zip(("runs", "baseline"), sides):
            of = f"distill/{side}-{pair}"
            found += [
                {"pair": pair, "side": side, "point": of, "of": of, "seed": seed, "fd": value}
                for seed, value in enumerate(values)
            ]
    table = pd.DataFrame(found)
    return table.assign(
        **{
            name: table["side"].map(dict(zip(("runs", "baseline"), values)))
            for name, values in columns.items()
        }
    )


ROOT = pathlib.Path(__file__).parent.parent
STUDIES = [ROOT / "params.yaml", *ROOT.glob("studies/*/params.yaml")]
OURS, THEIRS = [1.0, 1.1, 1.3], [2.0, 2.6, 2.2, 2.5]


def test_better_is_welchs_interval_of_logarithms():
    outcome = better(rows((OURS, THEIRS)), "fd", 0.9)
    expected = stats.ttest_ind(np.log(THEIRS), np.log(OURS), equal_var=False).confidence_interval(0.9)
    assert (outcome.low, outcome.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert (outcome.verdict, outcome.seeds) == (HOLDS, 3)
    assert better(rows((THEIRS, OURS)), "fd", 0.9).verdict == FAILS
    assert better(rows(([1.0, 2.0, 4.0], THEIRS)), "fd", 0.9).verdict == INCONCLUSIVE
    assert better(rows((OURS, THEIRS)), "fd", 0.9, times=5.0).verdict == FAILS


def test_settings_of_one_network_are_compared_seed_by_seed():
    found = rows(([1.0, 2.0, 4.0], [1.1, 2.2, 4.5])).assign(of="distill/get")
    outcome = better(found, "fd", 0.95)
    expected = stats.ttest_rel(np.log([1.1, 2.2, 4.5]), np.log([1.0, 2.0, 4.0])).confidence_interval(0.95)
    assert (outcome.low, outcome.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert outcome.verdict == HOLDS  # the networks differ by more than the settings do


def test_all_pairs_must_hold_with_intervals_that_are_right_at_once():
    outcome = better(rows((OURS, THEIRS), (OURS, THEIRS)), "fd", 0.9)
    one = better(rows((OURS, THEIRS)), "fd", 0.95)
    assert (outcome.low, outcome.high) == pytest.approx((one.low, one.high)) and outcome.verdict == HOLDS
    outcome = better(rows((OURS, THEIRS), (THEIRS, OURS)), "fd", 0.9)
    assert outcome.verdict == FAILS
    assert "runs-1 against distill/baseline-1" in outcome.effect  # the pair that decides
    assert better(rows((OURS, THEIRS), (OURS, OURS)), "fd", 0.9).verdict == INCONCLUSIVE


def test_fewer_than_three_seeds_give_numbers_and_no_verdict():
    outcome = better(rows(([1.0], [2.0])), "fd", 0.95)
    assert outcome.verdict == NONE and np.isnan(outcome.low) and outcome.seeds == 1
    assert "1 against 2 (ratio 2)" in outcome.effect
    assert better(rows((OURS, THEIRS), (OURS, [2.0, 2.1])), "fd", 0.95).verdict == NONE
    one_fails = rows((THEIRS, OURS), (OURS, [2.0]))  # which is enough
    assert better(one_fails, "fd", 0.95).verdict == FAILS


def test_no_worse_allows_a_margin():
    alike = rows(([1.0, 1.01, 1.02], [1.0, 1.01, 1.02]))
    assert no_worse(alike, "fd", 0.95, 0.15).verdict == HOLDS
    assert no_worse(alike, "fd", 0.95, 0.001).verdict == INCONCLUSIVE
    assert no_worse(rows((THEIRS, OURS)), "fd", 0.95, 0.15).verdict == FAILS


def test_seeds_that_are_all_alike_are_no_difference():
    outcome = better(rows(([1.0] * 3, [1.0] * 3)), "fd", 0.95)
    assert (outcome.low, outcome.high, outcome.verdict) == (1.0, 1.0, INCONCLUSIVE)


def test_recall_is_better_the_higher():
    found = rows((THEIRS, OURS)).rename(columns={"fd": "recall"})
    outcome, mirrored = better(found, "recall", 0.95), better(rows((OURS, THEIRS)), "fd", 0.95)
    assert outcome.verdict == HOLDS and (outcome.low, outcome.high) == pytest.approx(
        (mirrored.low, mirrored.high)
    )


def test_a_recall_of_0_has_no_interval():
    for sides in (([0.0, 0.1, 0.2], OURS), (OURS, [0.0, 0.1, 0.2])):
        outcome = better(rows(sides).rename(columns={"fd": "recall"}), "recall", 0.95)
        assert outcome.verdict == INCONCLUSIVE and np.isnan([outcome.low, outcome.high]).all()


def test_a_counted_cost_needs_no_seeds():
    found = rows(([1.0], [2.0]), parameters=(10, 50))
    outcome = cheaper(found, None, 0.95, "parameters")
    assert (outcome.verdict, outcome.low, outcome.high, outcome.seeds) == (HOLDS, 5.0, 5.0, None)
    exactly = cheaper(found, None, 0.95, "parameters", times=5.0)
    assert exactly.verdict == INCONCLUSIVE  # not more than five times
    assert cheaper(found, None, 0.95, "parameters", times=6.0).verdict == FAILS
    assert cheaper(found, "fd", 0.95, "parameters").verdict == NONE  # the quality is not counted
    assert cheaper(rows(([1.0], [2.0]), parameters=(50, 10)), "fd", 0.95, "parameters").verdict == FAILS


def test_cheaper_wants_cost_and_quality():
    assert cheaper(rows((OURS, THEIRS), flops=(10, 50)), "fd", 0.95, "flops").verdict == HOLDS
    assert cheaper(rows((OURS, THEIRS), flops=(50, 10)), "fd", 0.95, "flops").verdict == FAILS
    assert cheaper(rows((THEIRS, OURS), flops=(10, 50)), "fd", 0.95, "flops").verdict == FAILS
    assert cheaper(rows((OURS, OURS), flops=(10, 50)), "fd", 0.95, "flops", margin=1.0).verdict == HOLDS


def test_measured_seconds_have_the_spread_of_their_calls():
    found = rows(([1.0], [1.0]), seconds=(1.0, 2.0), seconds_min=(0.9, 1.5), seconds_max=(1.2, 2.5))
    outcome = no_worse(found, "seconds", 0.95, 0.0)
    assert (outcome.low, outcome.high) == pytest.approx((1.5 / 1.2, 2.5 / 0.9)) and outcome.verdict == HOLDS


def test_ordered_means_that_every_step_is_better():
    def order(*values):
        found = rows(*((value,) for value in values))
        return ordered(found, "fd", 0.95)

    large, middle, small = [8.0, 8.1, 8.2], [4.0, 4.1, 4.2], [2.0, 2.1, 2.2]
    assert order(large, middle, small).verdict == HOLDS
    assert order(large, small, middle).verdict == FAILS
    assert order(large, middle, [4.0, 4.15, 4.2]).verdict == INCONCLUSIVE
    assert order([8.0], [4.0]).verdict == NONE


CLAIM = {
    "id": "NEW-1",
    "claim": "GET is better than ViT",
    "where": "table 0",
    "published": "1 against 2",
    "comparison": "get against vit",
    "test": "better",
    "hypotheses": {"holds": "it is deeper", "fails": "it is not"},
}
FD = [1.0, 1.01, 1.02]
COMPARISONS = {"get against vit": {"runs": ["distill/get"], "baseline": ["distill/vit"]}}


def claims_of(folder, *claims):
    folder.mkdir(exist_ok=True)
    (folder / "new.yaml").write_text(yaml.safe_dump({"paper": "New (2025)", "claims": list(claims)}))
    return read_claims(folder)


def test_a_claim_is_added_in_yaml_alone_and_listed_where_it_is_compared(tmp_path):
    runs = {"distill/get": {"fd": FD}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
    found = equilab.results(write_study(tmp_path, runs, comparisons=COMPARISONS))
    claim, other = claims_of(tmp_path / "claims", CLAIM, {**CLAIM, "id": "NEW-2", "comparison": "undeclared"})
    outcome = judge(claim, found, 0.95)
    assert (
        outcome.verdict == HOLDS
        and "to training images" in outcome.effect
        and "to held-out images" in outcome.effect
    )
    assert judge(other, found, 0.95) is None


def test_of_a_run_that_is_no_better_than_the_mean_image_nothing_is_concluded(tmp_path):
    """As after a training of four updates."""
    runs = {"distill/get": {"fd": FD}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
    results = write_study(tmp_path, runs, comparisons=COMPARISONS)
    (claim,) = claims_of(tmp_path / "claims", CLAIM)
    path = results / "evaluator/summary.json"
    for limit, verdict in ((3.0, HOLDS), (1.5, NONE), (0.5, NONE)):
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "trivial": {"fd_train": limit, "fd_test": limit}}))
        outcome = judge(claim, equilab.results(results), 0.95)
        assert outcome.verdict == verdict
        assert ("mean image" in outcome.effect) == (verdict == NONE)


def test_kid_has_a_verdict_of_its_own_where_it_is_positive(tmp_path):
    """By FD the first run is the better one; `kid` is that of the other."""
    (claim,) = claims_of(tmp_path / "claims", CLAIM)
    for kid, verdict in ((0.4, HOLDS), (0.1, FAILS), (-0.1, NONE), (None, NONE)):
        kids = {"distill/get": 0.2, "distill/vit": kid}
        given = {of: [{"kid_train": each, "kid_test": each}] for of, each in kids.items() if each}
        runs = {"distill/get": {"fd": FD}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
        runs = {of: {**run, "settings": given.get(of, [{}])} for of, run in runs.items()}
        found = equilab.results(write_study(tmp_path / str(kid), runs, comparisons=COMPARISONS))
        assert judge(claim, found, 0.95).verdict == HOLDS
        assert judge_by_kid(claim, found, 0.95) == verdict


def test_a_cost_that_is_counted_decides_without_seeds():
    outcome = cheaper(rows(([1.0], [2.0]), parameters=(20, 10)), "fd", 0.95, "parameters")
    assert (outcome.verdict, outcome.seeds) == (FAILS, None)


def test_references_that_disagree_are_said_to(tmp_path):
    runs = {"distill/get": {"fd": FD, "held_out": 9.0}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
    found = equilab.results(write_study(tmp_path, runs, comparisons=COMPARISONS))
    (claim,) = claims_of(tmp_path / "claims", CLAIM)
    # better than half of ViT's, and more than twice the other
    assert judge(claim, found, 0.95).verdict == DEPENDS
    runs["distill/get"]["held_out"] = 4.0  # on average as good
    found = equilab.results(write_study(tmp_path / "b", runs, comparisons=COMPARISONS))
    assert judge(claim, found, 0.95).verdict == DEPENDS


def test_a_measure_that_the_runs_lack_is_an_error_and_an_unmeasured_cost_is_not_listed(tmp_path):
    runs = {"distill/get": {"fd": FD, "l1": None}, "distill/vit": {"fd": FD}}
    found = equilab.results(write_study(tmp_path, runs, comparisons=COMPARISONS))
    l1, seconds = claims_of(
        tmp_path / "claims",
        {**CLAIM, "measure": "l1_held_out"},
        {**CLAIM, "part": "speed", "test": "cheaper", "cost": "train_seconds"},
    )
    with pytest.raises(UserError, match="NEW-1.*l1_held_out"):
        judge(l1, found, 0.95)
    assert judge(seconds, found, 0.95) is None and seconds.measured and not l1.measured


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test": "best"}, r"claims\[0\].test: 'best' "),
        ({"tset": "better"}, r"claims\[0\].tset: .* 'test'"),
        ({"test": "cheaper"}, "cheaper .*cost"),
        ({"cost": "parameters"}, "better .*cost"),
        ({"margin": 0.1}, "better .*margin"),
        ({"test": "no worse", "times": 2.0}, "no worse .*times"),
        ({"measure": None}, "without a measure"),
        (
            {"measure": "fid"},
            r"claims\[0\].measure: 'fid' .* 'fd'",
        ),
        ({"test": "cheaper", "cost": "flosp"}, r"claims\[0\].cost: 'flosp' .*; did you mean 'flops'"),
    ],
)
def test_a_mistake_in_a_claim_is_a_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        claims_of(tmp_path, {**CLAIM, **change})


def test_two_claims_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="NEW-1"):
        claims_of(tmp_path, CLAIM, CLAIM)


def test_readings_of_activity_must_agree():
    claim = next(claim for claim in read_claims() if claim.name == "GDD-4, students")
    deep, shallow = [14.0, 15.0, 16.0], [9.0, 9.5, 8.0]
    found = rows((deep, shallow)).assign(of="gan/gdd").rename(columns={"fd": "pairs_mean"})

    def judged(rms):
        results = SimpleNamespace(
            comparisons={claim.comparison: None},
            compare=lambda _: found.assign(pairs_rms=rms),
            distance="fd_train",
            runs=pd.DataFrame({"of": ["gan/gdd"], "fd_train": [5.0]}),
            trivial={},
        )
        return judge(claim, results, 0.95)

    outcome = judged([*deep, *shallow])
    assert (outcome.verdict, outcome.seeds) == (HOLDS, 3) and "by the mean" in outcome.effect
    assert judged([*shallow, *deep]).verdict == INCONCLUSIVE  # one reading holds, the other fails
    assert judged([12.0] * 6).verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "effect"),
    [
        (
            [10, 11, 12],
            [50, 60, np.inf],
            HOLDS,
            "11 against 66.9 or more",
        ),  # it is behind, whatever it would take
        ([10, 11, 12], [10, 11, np.inf], INCONCLUSIVE, "or more"),
        ([90, np.inf, np.inf], [10, 11, 12], FAILS, "96.5 or more against 11"),  # and here it is the run
        ([11, 12, np.inf], [90, 91, 92], INCONCLUSIVE, "or more"),
        ([np.inf] * 3, [50, np.inf, np.inf], INCONCLUSIVE, "100 or more against 79.4 or more"),
        ([10, np.inf], [20, 30], NONE, ""),
    ],
)
def test_what_did_not_happen_in_a_training_of_a_hundred_takes_more(ours, theirs, verdict, effect):
    found = rows((ours, theirs)).rename(columns={"fd": "images_train"})
    found["images_train_least"] = found["images_train"].clip(upper=100.0)
    outcome = better(found, "images_train", 0.95)
    assert outcome.verdict == verdict and effect in outcome.effect


SECTIONS = {
    "progressive": {"pd": {"optimisation": {"nimg": 100, "snapshots": [50], "decay": "none"}}},
    "distill": {
        name: {"optimisation": {"nimg": 100, "snapshots": [50], "decay": decay}}
        for name, decay in (("get", "none"), ("vit", "cosine"), ("idle", "none"))
    },
    "evaluate": {
        "get": {
            "of": "distill/get",
            "solver": [
                {**SOLVER, "iterations": count, "memory": memory}
                for count, memory in ((6, 1), (2, 1), (2, 5))
            ],
        },
        "vit": {"of": "distill/vit"},
    },
    "cost": {"runs": ["distill/get"]},
    "activation": {"runs": ["distill/get"]},
}


REACHED = {"table": "reached", "target": {"run": "distill/vit", "margin": 0.1}}


@pytest.mark.parametrize(
    ("comparison", "sentence"),
    [
        (
            {"runs": ["distill/gat"], "baseline": ["distill/vit"]},
            r"comparisons.x.runs\[0\]: .*'distill/gat'; did you mean 'distill/get'",
        ),
        (
            {"runs": ["distill/get"], "baseline": ["distill/idle"]},
            r"x.baseline\[0\]: distill/idle ",
        ),
        (
            {"runs": [{"run": "distill/get", "at": {"most_iterations": 3}}, "distill/vit"]},
            r"runs\[0\].at: no setting .* most_iterations 3",
        ),
        (
            {"runs": [{"run": "distill/get", "at": {"most_iterations": 2}}, "distill/vit"]},
            r"runs\[0\].at: 2 settings",
        ),
        (
            {"runs": [{"run": "distill/get", "at": {"most_iteration": 2}}, "distill/vit"]},
            r"at.most_iteration: .* mean 'most_iterations'",
        ),
        (
            {"runs": ["distill/get"] * 3, "baseline": ["distill/vit"] * 2},
            "comparisons.x: baseline .* 3",
        ),
        ({"runs": ["distill/get"]}, "comparisons.x: give a baseline"),
        ({"runs": ["distill/get"], "base": []}, "comparisons.x.base: "),
        (
            {"table": "snapshots", "runs": [{"run": "distill/get", "at": {"nimg": 60}}, "distill/vit"]},
            r"at.nimg: .* 60",
        ),
        ({"table": "snapshots", "runs": ["distill/get", "distill/vit"]}, r"runs\[0\].at: .*snapshot"),
        (
            {"table": "snapshots", "runs": [{"run": "progressive/pd", "at": {"nimg": 50}}, "distill/vit"]},
            r"runs\[0\]: snapshots of progressive/pd are counted from the first student of its chain",
        ),
        (
            {"table": "costs", "runs": ["distill/vit", "distill/get"]},
            r"runs\[0\]: cost.runs .*distill/vit",
        ),
        (
            {"table": "costs", "runs": [{"run": "distill/get", "at": {"steps": 1}}, "distill/vit"]},
            r"at.steps: .*costs",
        ),
        (
            {"table": "reached", "runs": ["distill/get", "distill/get"]},
            "comparisons.x: target .*reached",
        ),
        (
            {**REACHED, "runs": ["distill/get"], "baseline": ["distill/vit"]},
            r"baseline\[0\]: .*distill/vit decays",
        ),
        (
            {
                **REACHED,
                "runs": [{"run": "distill/get", "at": {"most_iterations": 6}}],
                "baseline": ["distill/get"],
            },
            r"runs\[0\]: .*snapshots",
        ),
        (
            {**REACHED, "target": {"run": "distill/idle", "margin": 0.1}, "runs": ["distill/get"] * 2},
            "comparisons.x.target: distill/idle ",
        ),
        (
            {"table": "orders", "runs": ["distill/get", "distill/vit"]},
            r"runs\[0\].at: .* first: deep or shallow",
        ),
        (
            {"table": "orders", "runs": [{"run": "distill/vit", "at": {"first": "deep"}}, "distill/get"]},
            r"runs\[0\]: activation.runs .*distill/vit",
        ),
    ],
)
def test_a_mistaken_comparison_is_refused_with_its_key(comparison, sentence):
    with pytest.raises(UserError, match=sentence):
        check_comparisons({**SECTIONS, "comparisons": {"x": comparison}})


def test_a_comparison_singles_out_a_setting():
    point = {"run": "distill/get", "at": {"most_iterations": 2, "memory": 5}}
    found = check_comparisons(
        {**SECTIONS, "comparisons": {"x": {"runs": [point], "baseline": ["distill/vit"]}}}
    )
    (pair,) = found["x"].pairs
    assert str(pair["runs"]) == "get (most iterations 2, memory 5)" and str(pair["baseline"]) == "vit"
    assert check_comparisons({}) == {}


def test_all_mistaken_comparisons_are_told():
    comparisons = {
        "x": {"runs": ["distill/gat"], "baseline": ["distill/vat"]},
        "y": {"runs": "distill/get"},
        "z": {"runs": ["distill/get"], "baseline": [{"run": "distill/vit", "at": {"steps": [1]}}]},
    }
    with pytest.raises(UserError) as told:
        check_comparisons({**SECTIONS, "comparisons": comparisons}, "p: ")
    expected = [
        r"comparisons\.x\.runs\[0\]: .*'distill/gat'.* 'distill/get'.*",
        r"comparisons\.x\.baseline\[0\]: .*'distill/vat'.* 'distill/vit'.*",
        r"comparisons\.y\.runs: .* 'distill/get'",
        r"comparisons\.z\.baseline\[0\]\.at\.steps: .* \[1\]",
    ]
    for sentence, words in zip(str(told.value).splitlines(), expected, strict=True):
        assert re.fullmatch(f"p: {words}", sentence)


def test_a_comparison_that_is_mistyped_in_a_claim_is_told(tmp_path):
    claim, other = claims_of(
        tmp_path, {**CLAIM, "comparison": "get agianst vit"}, {**CLAIM, "id": "NEW-2", "comparison": "other"}
    )
    with pytest.raises(UserError, match="NEW-1: .*'get agianst vit'; did you mean 'get against vit'"):
        refuse_mistyped([claim, other], ["get against vit"])
    (right,) = claims_of(tmp_path, {**CLAIM, "comparison": "get against vit"})
    refuse_mistyped([right, claim, other], ["get against vit"])  # there is a claim about it


def run_stage(folder, monkeypatch):
    monkeypatch.chdir(folder)
    study = Study(name="made", root=".", seed=0, threads=1, run_threads=1, device="cpu")
    seeds = {"get": (0, 1, 2), "vit": (0, 1, 2, 3), "get-s": (0,)}
    job = Job(study, "claims", None, None, (1, 8, 8), 10, "", print, lambda _, run: seeds[run])
    stage.run(stage.Config(confidence=0.95), job)


def test_claims_are_judged_by_the_results_that_there_are(tmp_path, monkeypatch, capsys):
    runs = {"distill/get": {"fd": FD, "parameters": 10}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
    runs["distill/get-s"] = {"fd": []}  # not trained yet
    one = COMPARISONS["get against vit"]
    comparisons = {
        "get against vit, parameters": one,
        "sizes of get": {"runs": ["distill/get-s", "distill/get"]},
        "o1 memory against unrolled": {**one, "table": "costs"},
        "of my own": one,
    }
    cost = {"runs": ["distill/get", "distill/vit"]}
    results = write_study(tmp_path, runs, comparisons=comparisons, cost=cost)
    run_stage(tmp_path, monkeypatch)
    assert pd.read_csv(results / "claims/get.csv")["id"].tolist() == ["GET-1"]
    told = "evaluate@vit-3, evaluate@get-s-0, cost"
    assert (results / "claims.md").read_text().endswith(f"\n\nNot run yet: {told}.\n")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "results/claims.md: 1 claims judged: 1 hold",
        "results/measured.md: 0 claims judged",
        "claims: comparisons without a claim: of my own",
        f"claims: not run yet: {told}",
    ]


def test_numbers_have_as_many_digits_as_tell_them_apart():
    assert told_apart([5110.0, 6000.0]) == ["5.11k", "6k"]
    assert told_apart([5110.0, 5113.0]) == ["5.11k", "5.113k"]
    assert told_apart([5112.1, 5112.2]) == ["5.1121k", "5.1122k"]
    assert told_apart([5110.0, 5110.0, 1.0]) == ["5.11k", "5.11k", "1"]
    assert "1.001 against 1.002 " in better(rows(([1.001], [1.002])), "fd", 0.95).effect


def test_the_stage_writes_a_page_and_a_table(tmp_path, monkeypatch):
    runs = {"distill/get": {"fd": FD, "parameters": 10}, "distill/vit": {"fd": [2 * fd for fd in FD]}}
    comparisons = {
        "get against vit, parameters": {**COMPARISONS["get against vit"], "differs": "of two ViTs one"},
        "get against a costlier vit": COMPARISONS["get against vit"],
    }
    results = write_study(tmp_path, runs, comparisons=comparisons)
    seconds = {
        "what": "train",
        "as_trained": True,
        "seconds_min": 1.0,
        "seconds_max": 2.0,
        "seconds": 1.5,
        "memory_mib": 1.0,
    }
    cost = [
        {"of": f"distill/{name}", "seed": 0, "family": name, "iterations": None, **seconds}
        for name in ("get", "vit")
    ]
    table(results / "cost/cost.csv", cost)
    run_stage(tmp_path, monkeypatch)
    claims = pd.read_csv(results / "claims/get.csv", keep_default_na=False).set_index("id")
    assert claims.loc["GET-1", "verdict"] == HOLDS and claims.loc["GET-1", "where"] == "table 4, figure 2b"
    assert claims.loc["GET-1", "differs"] == "of two ViTs one" and claims.loc["GET-1", "by_kid"] == NONE
    measured = pd.read_csv(results / "measured.csv", keep_default_na=False)
    assert set(measured["id"]) == {"GET-3"} and set(measured["part"]) == {"training memory", "training speed"}
    page = (results / "claims.md").read_text()
    assert "| GET-1 " in page and "Hypotheses" in page and "made" in page.splitlines()[0]
    assert "GET-1: of two ViTs one" in page


def test_every_declared_comparison_serves_a_claim():
    """A name that no claim knows would leave its claim out of the study without a word."""
    known = {claim.comparison for claim in read_claims()}
    for path in STUDIES:
        assert set(read(path)["comparisons"]) <= known, path


def test_every_claim_is_about_a_comparison_of_some_study():
    """A name that no study knows would leave the claim out of all without a word."""
    declared = {name for path in STUDIES for name in read(path)["comparisons"]}
    assert {claim.comparison for claim in read_claims()} <= declared


@pytest.mark.slow
def test_every_column_that_a_claim_can_be_about_is_one_of_the_tables():
    columns = set()
    for folder in (".", "studies/digits-fpdm", "studies/digits-gdd"):
        found = equilab.results(ROOT / folder / "results")
        columns |= {*found.settings, *found.runs, *found.costs}
        for name in found.comparisons:
            with contextlib.suppress(NotRunError):
                columns |= {*found.compare(name)}
    made = {f"{name}_{split}" for name in ("fd", "rise") for split in ("train", "test")}
    assert made <= columns and set(COLUMNS) - {"fd", "kid", "rise", "images"} <= columns


@pytest.mark.slow
@pytest.mark.parametrize("folder", current_studies(), ids=lambda folder: folder.name)
def test_the_committed_claims_are_what_the_committed_results_say(folder):
    results = folder / "results"
    judged = stage.judged_claims(equilab.results(results), 0.95, read_claims())
    for files, measured in (
        (sorted(results.glob("claims/*.csv")), False),
        ([results / "measured.csv"], True),
    ):
        tables = [pd.read_csv(file, keep_default_na=False, dtype=str) for file in files]
        kept = pd.concat(tables, ignore_index=True)
        said = stage.table([one for one in judged if one.claim.measured == measured])
        pd.testing.assert_frame_equal(said.reset_index(drop=True), kept, check_dtype=False)
