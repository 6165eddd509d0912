"""Params: every mistake is one sentence that names the key and the nearest valid name."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from equilab import __main__, graph
from equilab.core import config
from equilab.core.config import UserError
from equilab.core.job import Job

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "studies/smoke/params.yaml"


@dataclass(frozen=True)
class Inner:
    rate: float
    mode: Literal["fast", "slow"]


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    sizes: tuple[int, ...]
    limit: float | None

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be >= 1, got {self.count}")


GOOD = {"count": 1, "inner": {"rate": 1, "mode": "fast"}, "sizes": [1, 2], "limit": None}


def test_a_mapping_becomes_a_frozen_dataclass():
    found = config.parse(Outer, GOOD, "params: outer")
    assert found == Outer(1, Inner(1.0, "fast"), (1, 2), None)
    assert isinstance(found.inner.rate, float)
    assert config.plain(found) == {**GOOD, "inner": {"rate": 1.0, "mode": "fast"}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cuont": 1}, "params: outer.cuont: unknown key; did you mean 'count'?"),
        ({"count": 1.5}, "params: outer.count: expected int, got 1.5"),
        ({"count": True}, "params: outer.count: expected int, got True"),
        ({"count": 0}, "params: outer: count must be >= 1, got 0"),
        ({"inner": {"rate": "x", "mode": "fast"}}, "params: outer.inner.rate: expected float, got 'x'"),
        ({"inner": {"rate": 1.0}}, "params: outer.inner.mode: missing key"),
        ({"inner": {"rate": 1.0, "mode": "fats"}}, "'fats' is not one of fast, slow; did you mean 'fast'?"),
        ({"inner": 3}, "params: outer.inner: expected keys with values, got 3"),
        ({"sizes": 3}, "params: outer.sizes: expected a list, got 3"),
        ({"sizes": [1, "a"]}, "params: outer.sizes[1]: expected int, got 'a'"),
    ],
)
def test_a_mistake_is_named_with_its_path(change, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        config.parse(Outer, {**GOOD, **change}, "params: outer")


def test_yaml_numbers_are_those_of_version_1_2_and_keys_are_given_once(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {x: 1e-3, y: -2.5E4, z: 7}\n")
    assert config.read(path) == {"a": {"x": 1e-3, "y": -2.5e4, "z": 7}}
    path.write_text("a: {x: 1, x: 2}\n")
    with pytest.raises(UserError, match="'x' is given twice"):
        config.read(path)
    path.write_text("a: [1\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        config.read(path)
    for broken in ("a: {x: 2024-13-45}\n", "a: {x: 0b_}\n", "a: &a {x: *a}\n"):
        path.write_text(broken)
        with pytest.raises(UserError, match="is not valid YAML"):
            config.read(path)
    with pytest.raises(UserError, match="is not there; run in the folder of a study"):
        config.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "params", [ROOT / "params.yaml", *sorted(ROOT.glob("studies/*/params.yaml"))], ids=str
)
def test_every_study_passes_its_check(params, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status, told = __main__.main(["check", "--params", str(params)]), capsys.readouterr().err
    if params.parent.name == "fpdm-paper":  # its VAE is not part of the repository
        assert status == 2 and "vae holds no VAE; place there" in told
    else:
        assert status == 0, told


@pytest.mark.parametrize(
    ("stage", "path", "value", "sentence"),
    [
        (["distill", "get"], "distill.get.network.heads", 3, "width"),
        (["distill", "get"], "distill.get.network.patch", 3, "patch"),
        (["distill", "get"], "distill.get.network.widht", 3, "unknown key; did you mean 'width'?"),
        (["distill", "get"], "distill.get.network.kind", "gett", "did you mean 'get'?"),
        (["distill", "get"], "distill.get.equilibrium", None, "equilibrium must be given for get"),
        (["distill", "gte"], "study.seed", 0, "no run 'gte'; did you mean 'get'?"),
        (["distill"], "study.seed", 0, "distill needs the name of a run: get, get-noise, vit"),
        (["teacher", "x"], "study.seed", 0, "teacher has no runs"),
        (["techer"], "study.seed", 0, "unknown stage 'techer'; did you mean 'teacher'?"),
        (["teacher"], "teacher.optimisation.batch", 7, "multiple of micro_batch"),
        (["teacher"], "teacher.network.width", 9, "width"),
        (["teacher"], "study.threads", 0, "threads and run_threads must be >= 1"),
        (["pairs"], "pairs.sampler.sigma_min", 90.0, "sigma_min"),
        (["pairs"], "pairs.shard", 70, "shard (70) must be a multiple of batch"),
        (["evaluator"], "evaluator.samples", 10**20, "samples must be 10 to 10,000,000"),
        (["cost"], "cost.runs", [], "the number of runs must be >= 1"),
        (["evaluate", "get"], "evaluate.get.batch", 0, "batch must be >= 1"),
        (["data"], "techer", {}, "unknown section 'techer'; did you mean 'teacher'?"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    stage, path, value, sentence, tmp_path, monkeypatch, capsys
):
    params = config.read(SMOKE)
    place = params
    *above, last = path.split(".")
    for key in above:
        place = place[key]
    place[last] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    assert __main__.main([*stage, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


def test_every_key_of_params_reaches_a_config():
    """No leaf is unread: what `parse` returns holds exactly what params give."""
    sections = config.read(SMOKE)
    for name, stage in ((name, stage) for name, stage in graph.STAGES.items() if name in sections):
        for run in sections[name] if stage.each else [None]:
            settings, _ = __main__._config(sections, name, run, SMOKE)
            given = sections[name][run] if stage.each else sections[name]
            assert config.plain(settings).keys() == given.keys()


def test_the_plan_of_what_measures_and_looks_at_networks_is_the_sum_of_their_calls():
    """Of a GET and a teacher, by hand: calls, images, iterations, training steps."""
    from equilab.stages import activation, cost
    from equilab.training import distill, teacher

    sections = config.read(SMOKE)
    read = lambda stage, run=None: __main__._config(sections, stage, run, SMOKE)[0]  # noqa: E731
    job = Job(read_study(sections), "cost", None, (1, 8, 8), 10, "", read)
    get, unet = read("distill", "get"), read("teacher")
    about = [distill.counted(get, job.image, 10), teacher.counted(unet, job.image, 10)]
    one, two = distill.generation(get, job.image, 10, [1, 2])
    sampler = read("cost").sampler
    settings = cost.Config(("distill/get", "teacher"), 4, (1, 2), sampler, 1, 2)
    ways = [replace(get, equilibrium=replace(get.equilibrium, gradient=name)) for name in ("unrolled", "o1")]
    steps = sum(distill.counted(way, job.image, 10)["train_flops_image"] for way in ways)
    found = cost.plan(settings, job, read)()
    assert get.equilibrium.gradient in ("unrolled", "o1")
    assert found.flops == 4 * (1 + 2 + 1) * (one + two + steps + sampler.nfe * about[1]["flops_image"])
    assert found.parameters == sum(each["parameters"] for each in about)
    looked = activation.Config(("distill/get", "teacher"), 5, 5, activation.Levels(7, 0.002, 80.0, 7.0), 3, 2)
    assert activation.plan(looked, job, read)().flops == 5 * (two + 7 * about[1]["flops_image"])


def read_study(sections):
    """Return what all stages of a study share."""
    return config.parse(config.Study, sections["study"], "study")


@pytest.mark.parametrize(
    "stage",
    [
        "data",
        "evaluator",
        "teacher",
        "pairs",
        "distill get",
        "evaluate get",
        "evaluate fpdm",
        "cost",
        "relative",
        "activation",
        "claims",
    ],
)
def test_a_dry_run_tells_the_configuration_and_the_cost_and_writes_nothing(
    stage, tmp_path, monkeypatch, capsys
):
    from equilab.metrics import measuring

    monkeypatch.setattr(measuring, "matmul_peak", lambda device, dtype, longest: 1e12)
    (tmp_path / "params.yaml").write_text(SMOKE.read_text())
    monkeypatch.chdir(tmp_path)
    assert __main__.main([*stage.split(), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    resolved = yaml.safe_load(printed)[stage.replace(" ", "@")]
    name, _, run = stage.partition(" ")
    given = config.read(SMOKE)[name][run] if run else config.read(SMOKE)[name]
    assert resolved.keys() == given.keys()
    for word in ("# parameters: ", "# networks: ", "# results on disk: ", "# time: about "):
        assert word in printed
    if stage == "distill get":
        assert "# parameters: 5,876" in printed
    if stage not in ("data", "claims"):
        assert (
            float(re.search(r"# time: about ([\d.,]+) min", printed)[1]) >= 0
            and "# parameters: none" not in printed
        )
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]
