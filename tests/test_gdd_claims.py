"""Students' tables, figures and claims on made-up results: what is compared with what, and which verdict follows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from equilab.analysis import gdd_claims, students, verdicts
from equilab.analysis.scaling import Rule
from equilab.analysis.verdicts import FAILS, HOLDS, OPEN
from equilab.core.config import UserError
from equilab.stages.evaluate import packed

CONFIG = verdicts.Config(Rule(0.95, 0.15, 0.05, 0.05, 300.0), 5.0, 0.7, (2, 6))
JUDGE = {"kind": "features", "mixing": "projected"}
USUAL = {"start": "teacher", "freeze": "gdd", "sigma_min": 0.002, "sigmas": [80.0]}


def put(folder, name, stage, fd, curve=(2.0, 1.5, 1.0), seed=0, student=None, **changes):
    """Write an evaluated run of a stage whose distance is `fd`, at its snapshots `fd` times `curve`."""
    network = {"kind": {"teacher": "unet", "distill": "vit"}.get(stage, "unet")}
    config = {"network": network, "seed": seed, "conditional": True}
    if stage in ("gan", "consistency"):
        config |= {"student": {**USUAL, **(student or {})}, "optimisation": {"nimg": 300}}
    if stage == "gan":
        config |= {
            "discriminator": JUDGE,
            "features": ["study"],
            "discriminator_lr": 1e-3,
            "r1": {"gamma": 1e-4, "interval": 16},
            "augment": "none",
            "adaptive": None,
            "consistency": None,
        }
    config |= changes
    run, of = (None, "teacher") if stage == "teacher" else (name, f"{stage}/{name}")
    nimg = changes.get("nimg", 300)
    (folder / of).mkdir(parents=True)
    (folder / of / "summary.json").write_text(
        json.dumps({"run": run, "config": config, "parameters": 100, "nimg": nimg})
    )
    place = folder / "evaluate" / name
    place.mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps({"of": of, "kind": "unet", "run": name}))
    sweep = pd.DataFrame(
        {"nfe": [35, 11] if stage == "teacher" else [len(config.get("student", USUAL)["sigmas"])]}
    )
    sweep = sweep.assign(fd_train=[fd, 9.0][: len(sweep)], inception_score=9.0, precision=0.8, recall=0.7)
    sweep.to_csv(place / "sweep.csv", index=False)
    along = pd.DataFrame({"nimg": np.arange(1, 4) * nimg // 3, "fd_train": fd * np.array(curve)})
    along.iloc[: 0 if stage == "teacher" else 3].to_csv(place / "curve.csv", index=False)
    (place / "iterates.npz").write_bytes(packed({"images": np.zeros((1, 16, 1, 8, 8), np.uint8)}))


@pytest.fixture
def folder(tmp_path):
    """Results of a teacher, and of nothing else."""
    (tmp_path / "evaluator").mkdir()
    about = {"floor": {"bootstrap": {"fd_train": 0.5}}, "samples": 100}
    (tmp_path / "evaluator/summary.json").write_text(json.dumps(about))
    put(tmp_path, "teacher", "teacher", 2.0)
    return tmp_path


def found(folder):
    """Return the claims table by (id, part)."""
    table = verdicts.rows(gdd_claims.Study(CONFIG, students.read(folder)), gdd_claims.COUNTED)
    return table.set_index(["id", "part"])


def test_without_students_there_is_nothing_to_read_and_a_lone_one_tells_little(folder):
    with pytest.raises(UserError, match="holds no evaluated run of gan or consistency"):
        students.read(folder)
    put(folder, "gdd", "gan", 2.1)
    table = found(folder)
    assert table.loc[("GDD-7", "teacher"), "verdict"] == OPEN  # 2.1 against 2.0
    assert set(table["verdict"]) == {OPEN} and len(table) == len(gdd_claims.COUNTED)


@pytest.mark.parametrize(
    ("value", "verdict"), [(1.0, HOLDS), (2.1, OPEN), (4.0, FAILS)], ids=["better", "alike", "worse"]
)
def test_verdicts_follow_the_distances(folder, value, verdict):
    put(folder, "gdd", "gan", 2.0)
    put(folder, "gdd-i", "gan", value, student={"freeze": "gdd_i"})
    put(folder, "qkv", "gan", 2.0, student={"freeze": "gdd_i_qkv"})
    put(folder, "skips", "gan", 4.0 / value, student={"freeze": "gdd_i_qkv_skip"})
    put(folder, "each", "gan", 4.0 / value, discriminator={"kind": "features", "mixing": "each"})
    put(folder, "augmented", "gan", 4.0 / value, augment="diffaugment", r1=None)
    put(folder, "bare", "gan", 2.0, r1=None)
    put(folder, "cd", "consistency", 2.0)
    put(folder, "cd-i", "consistency", 4.0 / value, student={"freeze": "gdd_i"})
    put(folder, "vit", "distill", 4.0)
    table = found(folder)["verdict"]
    assert table["GDD-5", "convolutions"] == table["GDD-5", "QKV"] == verdict
    for key in (("GDD-2", "projected"), ("GDD-3", "augmentation"), ("GDD-6", "CD"), ("GDD-5", "skips")):
        assert table[key] == verdict, key  # 4 / value against 2
    assert table["GDD-7", "teacher"] == HOLDS  # at worst, GDD's 2.0 is as good as the teacher's
    assert table["GDD-7", "instances"] == verdict  # the best of the others is CD, 2.0
    assert table["GDD-3", "R1"] == OPEN  # both 2.0


def test_a_variant_that_differs_in_more_than_one_thing_is_not_compared(folder):
    put(folder, "gdd", "gan", 2.0)
    put(folder, "gdd-i", "gan", 1.0, student={"freeze": "gdd_i"}, r1={"gamma": 1.0, "interval": 16})
    assert found(folder).loc[("GDD-5", "convolutions"), "verdict"] == OPEN
    longer = {"student": {"freeze": "gdd_i"}, "optimisation": {"nimg": 30000}}
    put(folder, "long", "gan", 1.0, **longer)
    assert found(folder).loc[("GDD-5", "convolutions"), "verdict"] == OPEN
    put(folder, "both", "gan", 1.0, consistency={"weight": 1.0})
    study = students.read(folder)
    assert students.variant(study, "GDD + CD") is not None and students.variant(study, "GDD-I + CD") is None


def test_images_to_reach_what_consistency_distillation_ends_at_are_counted(folder):
    put(folder, "gdd", "gan", 1.0, curve=(3.0, 1.9, 1.0))
    put(folder, "cd", "consistency", 2.0, nimg=3000)
    row = found(folder).loc[("GDD-7", "images")]
    assert (
        row["verdict"] == HOLDS
        and row["interval"] == "15 times as many for CD"
        and "GDD within 200 images, CD within 3,000" in row["ours"]
    )


@pytest.mark.parametrize(
    ("curve", "nimg", "verdict"), [((2.0, 1.0, 1.0), 3000, FAILS), ((2.0, 1.5, 1.0), 150, OPEN)]
)
def test_who_has_not_reached_it_fails_only_if_it_saw_as_many_images(folder, curve, nimg, verdict):
    put(folder, "gdd", "gan", 2.5, curve=(3.0, 2.0, 1.0), nimg=nimg)
    put(folder, "cd", "consistency", 2.0, curve=curve, nimg=600)
    assert found(folder).loc[("GDD-7", "images"), "verdict"] == verdict


def test_what_ends_at_its_best_does_not_overfit_however_many_seeds(folder):
    for seed in range(3):
        put(folder, f"gdd-{seed}", "gan", 2.0, seed=seed)
        put(folder, f"gdd-i-{seed}", "gan", 2.0, seed=seed, student={"freeze": "gdd_i"})
    row = found(folder).loc[("GDD-8", "")]
    assert row["verdict"] == OPEN and row["seeds"] == "3"


def test_the_best_of_all_gets_and_vits_is_what_must_be_beaten(folder):
    put(folder, "gdd", "gan", 2.0)
    put(folder, "vit-a", "distill", 9.0)
    put(folder, "vit-b", "distill", 1.0, width=2)
    assert found(folder).loc[("GDD-7", "instances"), "verdict"] == FAILS


def test_augmentation_is_compared_at_the_same_r1(folder):
    put(folder, "gdd", "gan", 2.0)
    put(folder, "augmented", "gan", 2.0, augment="diffaugment")
    put(folder, "bare", "gan", 1.0, r1=None)
    assert found(folder).loc[("GDD-3", "augmentation"), "verdict"] == OPEN


def test_an_order_of_few_is_no_proof():
    assert verdicts.ordered([1, 2, 3], [1, 2, 3])[1] == pytest.approx(1 / 3)
    assert verdicts.ordered([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx((-1.0, 1 / 12))
    rho, p = verdicts.ordered(range(10), range(10))
    assert rho == pytest.approx(1.0) and p < 1e-3
    assert np.isnan(verdicts.ordered([1, 1], [1, 2])[0])


@pytest.mark.parametrize(
    ("gdd", "gdd_i", "verdict"), [(3.0, 1.0, HOLDS), (1.0, 1.0, OPEN), (1.0, 3.0, FAILS)]
)
def test_overfitting_is_what_the_end_is_above_the_best_snapshot(folder, gdd, gdd_i, verdict):
    put(folder, "gdd", "gan", 2.0, curve=(2.0, 1 / gdd, 1.0))
    put(folder, "gdd-i", "gan", 2.0, curve=(2.0, 1 / gdd_i, 1.0), student={"freeze": "gdd_i"})
    assert found(folder).loc[("GDD-8", ""), "verdict"] == verdict


def relative(folder, distances):
    """Write the students of several steps and their distances to the one-step student."""
    put(folder, "gdd", "gan", 2.0)
    rows = []
    for name, (sigmas, fd, apart) in distances.items():
        put(folder, name, "gan", fd, student={"sigmas": sigmas})
        rows += [
            {"first": "gdd", "second": name, "distance": apart},
            {"first": name, "second": "gdd", "distance": apart},
        ]
    (folder / "relative").mkdir()
    pd.DataFrame(rows).to_csv(folder / "relative/relative.csv", index=False)


def test_students_of_more_steps_are_further_away_and_of_larger_middles_nearer(folder):
    steps = {
        f"gdd-{n}": ([80.0 / 32 ** (k / (n - 1)) for k in range(n)], 2.0 + 0.01 * n, 0.3 * n)
        for n in (2, 4, 8, 10)
    }
    middles = {f"gdd-2-{m:g}": ([80.0, m], 2.0, 0.6 - 0.004 * m) for m in (5.0, 10.0, 20.0)}
    relative(folder, steps | middles)
    table = found(folder)
    assert table.loc[("GDD-1", "alike but apart"), "verdict"] == HOLDS
    assert table.loc[("GDD-1", "steps"), "verdict"] == OPEN  # a perfect order, of four
    assert "rank correlation 1.00, p = 0.083" in table.loc[("GDD-1", "sigma of two steps"), "interval"]
    figure, numbers = students.distances(students.read(folder))
    assert len(numbers) == 7 and all(ax.has_data() for ax in figure.axes)


def test_students_are_alike_in_all_but_the_steps_where_they_saw_as_many_images(folder):
    relative(folder, {"gdd-2": ([80.0, 2.5], 2.1, 0.9)})
    put(folder, "gdd-2-long", "gan", 1.5, student={"sigmas": [80.0, 2.5]}, optimisation={"nimg": 600})
    path = folder / "relative/relative.csv"
    more = pd.DataFrame(
        [
            {"first": "gdd", "second": "gdd-2-long", "distance": 0.7},
            {"first": "gdd-2", "second": "gdd-2-long", "distance": 0.4},
        ]
    )
    pd.concat([pd.read_csv(path), more]).to_csv(path, index=False)
    study = students.read(folder)
    assert students.relatives(study)["run"].tolist() == ["gdd-2"]
    table = students.pairs(study).set_index("rel-FD")
    assert table.loc["gdd-2", "gdd-2-long"] == table.loc["gdd-2-long", "gdd-2"] == 0.4 and np.isnan(
        table.loc["gdd", "gdd"]
    )


def test_the_baselines_are_the_best_of_their_family_and_a_discriminator_from_scratch_is_no_headline(folder):
    put(folder, "vit-a", "distill", 4.0)
    put(folder, "vit-b", "distill", 3.0, pairs=7)
    put(folder, "a-scratch", "gan", 9.0, discriminator={"kind": "stylegan2", "width": 8}, features=[])
    put(folder, "gdd", "gan", 2.0)
    study = students.read(folder)
    label = study.rows.set_index("model")["run"]
    assert [label[study.headline(name)] for name in ("ViT", "GDD")] == ["vit-b", "gdd"]


def test_figures_and_tables_show_every_student(folder):
    put(folder, "gdd", "gan", 2.0)
    put(folder, "gdd-i", "gan", 1.0, student={"freeze": "gdd_i"})
    put(folder, "cd", "consistency", 2.5)
    put(folder, "vit", "distill", 4.0)
    study = students.read(folder)
    assert set(students.methods(study, 0.95)["method"]) == {"teacher", "ViT", "CD", "GDD", "GDD-I"}
    for figure, numbers in (
        students.images(study, 0.95),
        students.gallery(study),
        students.distances(study),
        students.changed(study, 0.95, {"frozen": ["GDD", "GDD-I"], "CD": ["CD", "CD-I"]}),
    ):
        assert figure.axes and isinstance(numbers, pd.DataFrame)
    assert len(students.gallery(study)[1]) == 5 and students.final(
        Path(study.rows["folder"].iloc[0])
    ).shape == (16, 1, 8, 8)
    assert len(students.side_by_side(study, students.first(study), 3).axes) == 6
    assert "3 students in 3 runs" in students.about(study)
