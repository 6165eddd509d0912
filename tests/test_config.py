"""Params: every mistake is a sentence that names the key and the nearest valid name, before anything is done."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import PositiveInt, model_validator
from smoke import ROOT, SMOKE, run, write_study

from equilab import __main__, dvc, graph, study
from equilab.core import config
from equilab.core.config import Params, UserError

STUDIES = [ROOT / "params.yaml", *sorted(ROOT.glob("studies/*/params.yaml"))]


class Inner(Params):
    rate: float
    mode: Literal["fast", "slow"]


class Outer(Params):
    count: PositiveInt
    inner: Inner
    sizes: tuple[int, ...]
    limit: float | None

    @model_validator(mode="after")
    def _enough(self):
        if self.count > 10 * len(self.sizes):
            raise ValueError(f"count ({self.count}) is too much for the sizes")
        return self


GOOD = {"count": 1, "inner": {"rate": 1, "mode": "fast"}, "sizes": [1, 2], "limit": None}


def test_a_mapping_becomes_a_frozen_model():
    found = config.parse(Outer, GOOD, "params: outer")
    assert found == Outer(count=1, inner=Inner(rate=1.0, mode="fast"), sizes=(1, 2), limit=None)
    assert isinstance(found.inner.rate, float)
    assert config.plain(found) == {**GOOD, "inner": {"rate": 1.0, "mode": "fast"}}
    with pytest.raises(ValueError, match="count"):
        found.count = 2


@pytest.mark.parametrize(
    ("change", "key", "word"),
    [
        ({"cuont": 1}, "outer.cuont", "'count'"),
        ({"count": 1.5}, "outer.count", "1.5"),
        ({"count": True}, "outer.count", "True"),
        ({"count": 0}, "outer.count", "0"),
        ({"count": 100}, "outer", "100"),
        ({"inner": {"rate": "x", "mode": "fast"}}, "outer.inner.rate", "'x'"),
        ({"inner": {"rate": float("inf"), "mode": "fast"}}, "outer.inner.rate", "inf"),
        ({"inner": {"rate": 1.0}}, "outer.inner.mode", "missing"),
        ({"inner": {"rate": 1.0, "mode": "fats"}}, "outer.inner.mode", "'fast'"),
        ({"inner": 3}, "outer.inner", "3"),
        ({"sizes": 3}, "outer.sizes", "3"),
        ({"sizes": [1, "a"]}, "outer.sizes[1]", "'a'"),
    ],
)
def test_a_mistake_is_named_with_its_path(change, key, word):
    with pytest.raises(UserError) as told:
        config.parse(Outer, {**GOOD, **change}, "params: outer")
    (sentence,) = str(told.value).splitlines()
    assert sentence.startswith(f"params: {key}: ") and word in sentence


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as told:
        config.parse(Outer, {"count": 0, "inner": {"rate": "x", "mode": "fats"}, "limit": None, "x": 1}, "p")
    sentences = str(told.value).splitlines()
    for key in ("p.count", "p.inner.rate", "p.inner.mode", "p.sizes", "p.x"):
        assert len([sentence for sentence in sentences if sentence.startswith(f"{key}: ")]) == 1


def test_numbers_of_yaml_are_those_of_version_1_2(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {x: 1e-3, y: -2.5E4, z: 7}\n")
    assert config.read(path) == {"a": {"x": 1e-3, "y": -2.5e4, "z": 7}}


BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)
MERGES = BOMB.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n")


@pytest.mark.parametrize(
    "text",
    [
        "a: {x: 1, x: 2}\n",
        "a: [1\n",
        "a: {x: 2024-13-45}\n",
        "a: {x: 0b_}\n",
        "a: &a {x: *a}\n",
        "a: !!bool zzz\n",
        "a: !!int ''\n",
        "a: !!timestamp zz\n",
        "a: !!map [1]\n",
        "a: !!python/object:os.system x\n",
        "1: 2\n",
        "a: " + "[" * 900 + "]" * 900 + "\n",
        "a: " + "[" * 50_000 + "]" * 50_000 + "\n",
        BOMB,
        MERGES,
        "",
        "- a\n",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_yaml_of_sections_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        config.read(path)
    assert str(told.value).startswith(f"{path} ") and "\n" not in str(told.value)


def test_params_are_utf_8_whatever_the_locale(tmp_path):
    folder = write_study(tmp_path, {"report.title": "Ziffern – größer"})
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, out, err = run(folder, "report", "--dry-run", environment=settings)
    assert status == 0, err
    assert "report:" in out
    (folder / "params.yaml").write_bytes("study: {name: größer}\n".encode("latin-1"))
    with pytest.raises(UserError, match="params.yaml"):
        config.read(folder / "params.yaml")


def check(folder, capsys, monkeypatch):
    """Return the sentences that `check` tells of a study."""
    monkeypatch.chdir(folder)
    status = __main__.main(["check"])
    told = capsys.readouterr()
    assert status == (2 if told.err else 0)
    return told.err.splitlines()


def test_smoke_passes_its_check(capsys, monkeypatch):
    assert check(SMOKE.parent, capsys, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("params", STUDIES, ids=lambda params: params.parent.name)
def test_every_study_passes_its_check(params, capsys, monkeypatch):
    told = check(params.parent, capsys, monkeypatch)
    # the images, the VAE and the published weights of some are not part of the repository
    absent = {
        "fpdm-paper": ["data.path", "data.test_path", "latents.vae"],
        "cifar10-short": ["data.path", "data.test_path"],
        "get-paper": ["teacher.published.path"],
        "gdd-paper": ["teacher.published.path"],
        "published": ["none of the published files"],
        "published-imagenet": ["none of the published files"],
    }
    keys = absent.get(params.parent.name, [])
    assert len(told) == len(keys) and all(key in sentence for key, sentence in zip(keys, told))


def test_check_tells_all_mistakes_that_params_show(tmp_path, capsys, monkeypatch):
    folder = write_study(
        tmp_path,
        {
            "techer": {},
            "study.threads": 0,
            "pairs.shard": 70,
            "distill.get.optimisation.batch": 7,
            "distill.vit.network.kind": "vti",
            "diffusion.dit.seeds": [1, 1],
            "evaluate.gdd.of": "gan/gddd",
            "activation": [],
            "relative": 0,
            "cost": {},
        },
    )
    told = check(folder, capsys, monkeypatch)
    wrong = ("'techer'", "study.threads", "pairs:", "distill.get.optimisation", "distill.vit.network.kind")
    for key in (*wrong, "diffusion.dit.seeds", "evaluate.gdd.of", "activation:", "relative:", "cost.runs"):
        assert any(key in sentence for sentence in told), key
    assert not any("Traceback" in sentence for sentence in told)


def test_check_tells_all_mistakes_that_the_networks_show(tmp_path, capsys, monkeypatch):
    changes = {
        "distill.get.network.heads": 3,
        "teacher.network.width": 9,
        "relative.runs": ["gdd", "gddd"],
        "comparisons": {"a against b": {"runs": ["distill/gett"], "baseline": ["distill/vit"]}},
    }
    told = check(write_study(tmp_path, changes), capsys, monkeypatch)
    for key in ("distill.get.network", "teacher.network", "gddd", "comparisons.a against b"):
        assert any(key in sentence for sentence in told), (key, told)


def test_check_tells_when_dvc_yaml_is_of_other_params(tmp_path, capsys, monkeypatch):
    folder = write_study(tmp_path)
    (folder / "dvc.yaml").write_text(dvc.text(study.read(folder / "params.yaml")))
    assert check(folder, capsys, monkeypatch) == []
    write_study(folder, {"distill.get.seeds": [0, 1, 2]})
    (sentence,) = check(folder, capsys, monkeypatch)
    assert "dvc.yaml" in sentence


@pytest.mark.parametrize(
    ("command", "path", "value", "words"),
    [
        ("distill get", "distill.get.network.heads", 3, ["distill.get.network", "width"]),
        ("distill get", "distill.get.network.patch", 3, ["distill.get.network", "patch"]),
        ("distill get", "distill.get.network.widht", 3, ["distill.get.network.widht", "'width'"]),
        ("distill get", "distill.get.network.kind", "gett", ["distill.get.network.kind", "'get'"]),
        ("distill get", "distill.get.equilibrium", None, ["distill.get", "equilibrium"]),
        ("distill gte", "study.seed", 0, ["'gte'", "'get'"]),
        ("distill", "study.seed", 0, ["get, get-noise, vit"]),
        ("distill get --seed 7", "study.seed", 0, ["7", "0, 1"]),
        ("distill get", "distill.get.seeds", ..., ["distill.get.seeds", "missing"]),
        ("distill get", "distill.get.seed", 0, ["distill.get.seed", "'seeds'"]),
        ("distill get", "distill.get.seeds", [], ["distill.get.seeds"]),
        ("distill get", "distill.get.seeds", [0, -1], ["distill.get.seeds[1]"]),
        ("teacher x", "study.seed", 0, ["teacher", "'x'"]),
        ("teacher --seed 0", "study.seed", 0, ["teacher", "seed"]),
        ("techer", "study.seed", 0, ["'techer'", "'teacher'"]),
        ("teacher", "teacher.optimisation.batch", 7, ["teacher.optimisation", "7"]),
        ("teacher", "teacher.network.width", 9, ["teacher.network", "width"]),
        ("teacher", "teacher", ..., ["'teacher'", "missing"]),
        ("teacher", "study.threads", 0, ["study.threads", "0"]),
        ("teacher", "study.name", "a b", ["study.name", "'a b'"]),
        ("teacher", "study.root", ".", ["study.root"]),
        ("pairs", "pairs.sampler.sigma_min", 90.0, ["pairs.sampler", "90"]),
        ("pairs", "pairs.shard", 70, ["pairs", "70"]),
        ("evaluator", "evaluator.samples", 10**20, ["evaluator.samples"]),
        ("cost", "cost.runs", [], ["cost.runs"]),
        ("evaluate get", "evaluate.get.batch", 0, ["evaluate.get.batch"]),
        ("evaluate get", "evaluate.get.of", "distill/gett", ["evaluate.get.of", "'distill/get'"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    command, path, value, words, tmp_path, monkeypatch, capsys
):
    folder = write_study(tmp_path, {path: value})
    monkeypatch.chdir(folder)
    assert __main__.main([*command.split(), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert [p.name for p in folder.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("name", ["a;touch PWNED", "$(touch PWNED)", "../../evil", "/tmp/x", "a.b", "a@b", "a b", "-x", "ü", "<b>", "", "a" * 200])  # fmt: skip
def test_a_name_that_is_no_word_is_refused(name, tmp_path, monkeypatch, capsys):
    folder = write_study(tmp_path)
    params = config.read(folder / "params.yaml")
    params["distill"][name] = params["distill"]["vit"]
    params["notebook"][name] = {"parameters": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    told = check(folder, capsys, monkeypatch)
    for section in ("distill", "notebook"):
        assert any(f"{section}: " in sentence and repr(name) in sentence for sentence in told), told
    if not name.startswith("-"):
        assert __main__.main(["--dry-run", "distill", name]) == 2
    assert [p.name for p in folder.iterdir()] == ["params.yaml"]


def test_a_run_has_the_config_of_its_entry_with_one_seed(tmp_path):
    sections = study.open_study(write_study(tmp_path) / "params.yaml")
    found = [study.config_of(sections, "distill", "get", seed) for seed in sections.seeds("distill", "get")]
    assert [each.seed for each in found] == [0, 1] and found[0] == study.config_of(sections, "distill", "get")
    assert found[1] == found[0].model_copy(update={"seed": 1})


def test_every_key_of_params_reaches_a_config():
    """No leaf is unread: what is parsed holds exactly what params give."""
    sections = study.read(SMOKE)
    for stage in filter(sections.has, graph.STAGES):
        for job in sections.jobs(stage):
            given, _ = sections.frozen(stage, job)
            read = config.plain(study.config_of(sections, stage, *job))
            assert {key: read[key] for key in given} == given


@pytest.mark.parametrize(
    "command",
    [
        "data",
        "evaluator",
        "teacher",
        "pairs",
        "distill get",
        "evaluate get",
        "evaluate fpdm",
        "cost",
        "claims",
    ],
)
def test_a_dry_run_tells_the_configuration_and_the_cost_and_writes_nothing(
    command, tmp_path, monkeypatch, capsys
):
    from equilab.metrics import measuring

    monkeypatch.setattr(measuring, "matmul_peak", lambda device, dtype, longest: 1e12)
    folder = write_study(tmp_path)
    monkeypatch.chdir(folder)
    assert __main__.main([*command.split(), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    stage, _, run = command.partition(" ")
    sections = study.read(folder / "params.yaml")
    resolved = yaml.safe_load(printed)
    jobs = [job for job in sections.jobs(stage) if job.run == (run or None)]
    assert list(resolved) == [f"{stage}@{job.item}" if run else stage for job in jobs]
    for given, job in zip(resolved.values(), jobs):
        entry, _ = sections.frozen(stage, job)
        assert {key: given[key] for key in entry} == entry
    for word in ("parameters", "networks", "results on disk", "time"):
        assert printed.count(f"# {word}: ") == len(jobs)
    assert [p.name for p in folder.iterdir()] == ["params.yaml"]


def test_a_study_beside_other_code_is_refused(tmp_path):
    """The environment of one clone is active in the folder of another."""
    (tmp_path / "equilab").mkdir()
    folder = write_study(tmp_path / "studies/smoke", {"study.root": "../.."})
    status, _, err = run(folder, "data")
    assert status == 2 and str(ROOT) in err and str(tmp_path) in err
    assert not (folder / "results").exists()


def test_a_link_to_params_is_a_study_where_the_link_is(tmp_path):
    one, other = write_study(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").symlink_to(one / "params.yaml")
    assert run(other, "data")[0] == 0
    assert (other / "results/data/meta.json").exists() and not (one / "results").exists()


@pytest.mark.parametrize("settings", [{"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_a_rank_without_torchrun_is_refused(tmp_path, settings):
    status, _, err = run(write_study(tmp_path), "data", environment=settings)
    assert status == 2 and "torchrun" in err and "MASTER_ADDR" in err


def test_an_interruption_is_answered_however_early(tmp_path):
    """Where the package is only being imported it is told in a sentence too."""
    script = "import equilab.__main__ as m, builtins, signal, os\noriginal = builtins.__import__\ndef slow(name, *rest):\n    if name == 'equilab.core.config': os.kill(os.getpid(), signal.SIGINT)\n    return original(name, *rest)\nbuiltins.__import__ = slow\nsys.exit(m.main())"
    status, _, err = run(write_study(tmp_path), "data", script=script)
    assert status == 130 and len(err.splitlines()) == 1


def test_a_command_starts_from_any_folder(tmp_path):
    folder = write_study(tmp_path / "study")
    done = subprocess.run(
        [sys.executable, "-m", "equilab", "data", "--params", "study/params.yaml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 0 and (folder / "results/data/meta.json").exists()
    assert not (tmp_path / "results").exists()


def test_params_that_are_not_there_are_told(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        config.read(Path(tmp_path / "nowhere.yaml"))
