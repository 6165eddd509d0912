"""Params: every mistake is a sentence that names the key and the nearest valid name, before anything is done."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, PositiveInt, model_validator
from smoke import ROOT, SMOKE, called, refused, run, write_study

from equilab import __main__, dvc, graph, study
from equilab.core import config, files, like
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
        ({"count": True}, "outer.count", "true"),
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


class Types(Params):
    number: float
    open: Annotated[float, Field(gt=0, lt=1)]
    closed: Annotated[int, Field(ge=1, le=9)]
    switch: bool
    text: str
    pair: tuple[float, float]
    few: Annotated[tuple[int, ...], Field(min_length=1, max_length=2)]
    sizes: Sequence[int]
    words: dict[str, str]
    inner: Inner
    single: config.Scalar


TYPES = {
    "number": 1,
    "open": 0.5,
    "closed": 5,
    "switch": True,
    "text": "a",
    "pair": [1, 2],
    "few": [1],
    "sizes": [1],
}
TYPES |= {"words": {"a": "b"}, "inner": GOOD["inner"], "single": None}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("number", "1", "number.* '1'"),
        ("number", None, "number.* null"),
        ("number", float("nan"), "finite.* nan"),
        ("open", 0, r"more.* 0\.0,.* 0"),
        ("open", 1, r"less.* 1\.0,.* 1"),
        ("closed", 0, "least 1,.* 0"),
        ("closed", 10, "most 9,.* 10"),
        ("closed", 1.5, r"whole.* 1\.5"),
        ("closed", "5", "whole.* '5'"),
        ("closed", [5], r"whole.* \[5\]"),
        ("switch", 1, "true or false.* 1"),
        ("text", 1, "text.* 1"),
        ("pair", [1], r"few.* \[1\]"),
        ("pair", [], r"few.* \[\]"),
        ("pair", [1, 2, 3], r"many.* 2,.* \[1, 2, 3\]"),
        ("few", [], r"few.* 1,.* \[\]"),
        ("few", [1, 2, 3], r"many.* 2,.* \[1, 2, 3\]"),
        ("few", 3, "list.* 3"),
        ("sizes", 3, "list.* 3"),
        ("sizes", "3", "list.* '3'"),
        ("words", [1], r"keys.* \[1\]"),
        ("inner", None, "keys.* null"),
        ("single", [1], r"single.* \[1\]"),
    ],
)
def test_a_value_of_another_type_or_out_of_its_range_is_told_in_plain_words(key, value, told):
    with pytest.raises(UserError) as error:
        config.parse(Types, {**TYPES, key: value}, "p")
    assert re.fullmatch(rf"p\.{key}: [^\n]*{told}", str(error.value))
    assert config.parse(Types, TYPES, "p")


@pytest.mark.parametrize("value", [1, "a", True, 0.5])
def test_a_single_value_of_any_type_is_read(value):
    assert config.parse(Types, {**TYPES, "single": value}, "p").single == value


def test_a_mistaken_value_in_a_list_is_not_told_as_a_list_too_short():
    with pytest.raises(UserError) as error:
        config.parse(Types, {**TYPES, "few": ["x"]}, "p")
    assert re.fullmatch(r"p\.few\[0\]: .* 'x'", str(error.value))


def test_a_mistyped_key_is_told_once():
    mistyped = {("inenr" if key == "inner" else key): value for key, value in GOOD.items()}
    with pytest.raises(UserError) as error:
        config.parse(Outer, mistyped, "p")
    assert re.fullmatch(r"p\.inenr: .* 'inner'\?", str(error.value))


class Network:
    """A network as someone adds it."""

    def __init__(self, image, *, width: int, heads: config.Depth):
        if heads > 9:
            raise RuntimeError("Trying to create tensor with negative dimension\nin a file of C++")
        self.groups = width // heads


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"width": -8}, "p.width: .* 1, .* -8"),
        ({"width": 0}, "p.width: .* 1, .* 0"),
        ({"width": 10**6}, "p.width: .* 16384, .* 1000000"),
        ({"heads": 10}, r"p: net: .*\(Trying to create tensor with negative dimension\).*"),
        ({"heads": 0}, r"p: net: .*by zero\).*"),
        ({"kind": "nte"}, r"p\.kind: 'nte' .* net; .* 'net'\? \(enter it there\)"),
        ({"kind": ["net"]}, r"p\.kind: \['net'\] .* net \(enter it there\)"),
    ],
)
def test_a_network_that_cannot_be_built_is_told_by_its_key(sizes, told):
    given = {"kind": "net", "width": 8, "heads": 2, **sizes}
    with pytest.raises(UserError) as error:
        config.spec({"net": Network}, given, "p", "enter it there").build((1, 8, 8))
    assert re.fullmatch(told, str(error.value))


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("results/pairs/meta.json", "pairs"),
        ("results/teacher/snapshots/0000000320.safetensors", "teacher"),
        ("results/distill/get-m/1/weights.safetensors", "distill get-m --seed 1"),
        ("results/distill/get-m/1/snapshots/0000000320.safetensors", "distill get-m --seed 1"),
        ("/home/results/study/results/notebook/scaling/scaling.ipynb", "notebook scaling"),
        ("results/claims.md", "claims"),
        ("results/measured.csv", "claims"),
    ],
)
def test_a_result_that_is_not_there_is_told_with_the_command_that_writes_it(
    path, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        config.read_json(Path(path))
    assert re.fullmatch(f"{path} .*`python -m equilab {command}` first", str(error.value))


@pytest.mark.parametrize("content", ["{", "[]", "{}", "3"])
def test_a_damaged_result_is_told_from_one_that_is_not_there(tmp_path, content):
    path = tmp_path / "results/pairs/meta.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"meta\.json .*`python -m equilab pairs` again"):
        config.read_json(path, count=Any)


def test_the_first_key_in_which_two_configs_differ_is_found():
    before = {"network": {"kind": "get", "width": 8}, "seed": 0, "levels": [1, 2]}
    assert config.difference(before, before) is None
    assert config.difference(before, {**before, "levels": [1, 3]}) == ("levels", [1, 2], [1, 3])
    other = {**before, "network": {"kind": "get", "width": 9, "depth": 1}, "seed": 1}
    assert config.difference(before, other) == ("network.width", 8, 9)
    assert config.difference({}, {"seed": 1}) == ("seed", None, 1)


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "a: {x: &near 1}\nb: {x: *naer}\n",
            r"\*naer, line 2; .* 'near'",
        ),
        ("a: *b\nb: &b 1\n", r"\*b, line 1"),
        ("a: [1,\nb: 2\n", "line 1, column 4"),
        ("a: {x: 1, x: 2}\n", "'x' .*line 1"),
    ],
)
def test_a_mistake_in_yaml_is_told_with_its_file_and_line(tmp_path, text, told):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.read(path)
    assert re.fullmatch(f"{path} .*YAML: .*{told}.*", str(error.value))
    assert "unicode string" not in str(error.value)


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
        "fpdm-paper-celebahq": ["data.path", "latents.vae"],
        "fpdm-paper-church": ["data.path", "latents.vae"],
        "fpdm-paper-ffhq": ["data.path", "latents.vae"],
        "gdd-paper-afhqv2": ["data.path", "teacher.published.path"],
        "gdd-paper-cond": ["teacher.published.path"],
        "gdd-paper-ffhq": ["data.path", "teacher.published.path"],
        "gdd-paper-imagenet": ["data.path", "data.test_path", "teacher.published.path"],
        "get-paper-cond": ["teacher.published.path"],
        "cifar16": ["data.path", "data.test_path"],
        "cifar10-short": ["data.path", "data.test_path"],
        "get-paper": ["teacher.published.path"],
        "gdd-paper": ["teacher.published.path"],
        "published": ["none of the published files"],
        "published-imagenet": ["none of the published files"],
        "template": ["data.path"],
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
        "evaluate.get-noise.of": "distill/get",
        "comparisons": {"a against b": {"runs": ["distill/gett"], "baseline": ["distill/vit"]}},
    }
    told = check(write_study(tmp_path, changes), capsys, monkeypatch)
    twice = "get and get-noise are of the same run"
    for key in ("distill.get.network", "teacher.network", "gddd", "comparisons.a against b", twice):
        assert any(key in sentence for sentence in told), (key, told)


def test_what_params_the_networks_and_the_disk_show_is_told_in_one_round(tmp_path, capsys, monkeypatch):
    changes = {"cost.warmup": -1, "distill.get.network.heads": 3, "data.source": "folder"}
    told = check(write_study(tmp_path, {**changes, "data.path": "nowhere"}), capsys, monkeypatch)
    assert len(told) == 3
    for key in ("cost.warmup", "distill.get.network", "data.path"):
        assert any(key in sentence for sentence in told), (key, told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"distill.vit.network.kind": "vti"},
            "distill.vit.network.kind: 'vti' .* get, vit; .* 'vit'",
        ),
        ({"distill.vit.network": 3}, "distill.vit.network: .* 3$"),
        (
            {"distill.vit.network": ..., "distill.vit.networ": {"kind": "vit"}},
            "distill.vit.networ: .* 'network'",
        ),
        ({"distill.vit.seeds": []}, r"distill.vit.seeds: .* 1, .* \[\]$"),
        ({"distill.vit.seeds": [-1]}, r"distill.vit.seeds\[0\]: .* 0, .* -1$"),
        ({"distill.vit.seeds": 3}, "distill.vit.seeds: .* 3$"),
        ({"data.labels": None}, "data: labels"),
        ({"data.labels": ...}, "data.labels: "),
    ],
)
def test_check_tells_each_mistake_in_one_line(changes, told, tmp_path, capsys, monkeypatch):
    (sentence,) = check(write_study(tmp_path, changes), capsys, monkeypatch)
    assert re.match(f"equilab: params.yaml: {told}", sentence), sentence


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
        ("evaluator", "evaluator.images", None, ["evaluator", "images"]),
        ("features", "features.images", "third_half", ["features.images", "'first_half'"]),
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


@pytest.mark.parametrize(
    "name",
    [
        "a;touch PWNED",
        "$(touch PWNED)",
        "../../evil",
        "/evil",
        "a.b",
        "a@b",
        "a b",
        "-x",
        "ü",
        "<b>",
        "",
        "a" * 200,
    ],
)
def test_a_name_that_is_no_word_is_refused(name, tmp_path, monkeypatch, capsys):
    folder = write_study(tmp_path)
    params = like.read(folder / "params.yaml")
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


def test_a_study_beside_other_code_is_refused(tmp_path, monkeypatch, capsys):
    """The environment of one clone is active in the folder of another."""
    (tmp_path / "equilab").mkdir()
    monkeypatch.chdir(write_study(tmp_path / "studies/smoke", {"study.root": "../.."}))
    sentence = refused(capsys, "data")
    assert str(ROOT) in sentence and str(tmp_path) in sentence
    assert not Path("results").exists()


def test_a_link_to_params_is_a_study_where_the_link_is(tmp_path, monkeypatch):
    one, other = write_study(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").symlink_to(one / "params.yaml")
    monkeypatch.chdir(other)
    called("data")
    assert (other / "results/data/meta.json").exists() and not (one / "results").exists()


@pytest.mark.parametrize("settings", [{"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_a_rank_without_torchrun_is_refused(tmp_path, monkeypatch, capsys, settings):
    monkeypatch.chdir(write_study(tmp_path))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    sentence = refused(capsys, "data")
    assert "torchrun" in sentence and "MASTER_ADDR" in sentence


def test_an_interruption_is_answered_however_early(tmp_path):
    """Where the package is only being imported it is told in a sentence too."""
    script = """
import builtins, os, signal
import equilab.__main__

imported = builtins.__import__

def interrupted(name, *rest):
    if name == "equilab.core.config":
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *rest)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
builtins.__import__ = interrupted
sys.exit(equilab.__main__.main())
"""
    status, _, err = run(write_study(tmp_path), "data", script=script)
    assert status == 130 and len(err.splitlines()) == 1


def test_an_interruption_is_answered_before_the_command_itself_is_imported(tmp_path):
    """A module in place of Python's argparse interrupts it."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    script = "import signal, subprocess\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsubprocess.run([sys.executable, '-m', 'equilab', 'check'])"
    _, _, err = run(tmp_path, script=script)
    assert len(err.splitlines()) == 1 and "stopped" in err


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


def test_clean_removes_unfinished_work_of_runs_that_are_gone_and_no_other(tmp_path, monkeypatch, capsys):
    folder = write_study(tmp_path, {"distill.get.seeds": [0]})
    kept = ["distill@get-0", "distill@get-0@try1-0a1b2c3d", "evaluate@get-0", "pairs", "teacher"]
    gone = ["distill@get-1", "distill@old-0", ".distill@get-0.removed"]
    left = Path("results/distill/get/.0.new")
    for name in kept + gone:
        (folder / ".equilab/scratch" / name).mkdir(parents=True)
        (folder / ".equilab/scratch" / name / "state.safetensors").write_bytes(bytes(2**20))
    monkeypatch.chdir(folder)
    left.mkdir(parents=True)
    assert __main__.main(["clean", "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if "kept" in line] == [line for line in listed if "clean" in line]
    for name in kept + gone:
        (line,) = [line for line in listed if f"/{name}: 1.0 MiB" in line]
        assert ("kept" in line) == (name in kept)
    assert any(str(left) in line for line in listed) and left.exists()
    assert sorted(path.name for path in Path(".equilab/scratch").iterdir()) == sorted(kept + gone)
    assert __main__.main(["clean"]) == 0
    assert sorted(path.name for path in Path(".equilab/scratch").iterdir()) == kept and not left.exists()
    capsys.readouterr()
    assert __main__.main(["clean"]) == 0 and "nothing is left" in capsys.readouterr().out


def test_clean_removes_the_unfinished_work_that_it_is_told_to(tmp_path, monkeypatch, capsys):
    """Of a run that diverged, or of pairs of a former teacher."""
    monkeypatch.chdir(write_study(tmp_path))
    for name in ("distill@get-0", "pairs"):
        Path(".equilab/scratch", name).mkdir(parents=True)
    assert "did you mean 'distill@get-0'" in refused(capsys, "clean", "distill@get-1")
    called("clean", "pairs")
    assert [path.name for path in Path(".equilab/scratch").iterdir()] == ["distill@get-0"]


def test_clean_puts_back_results_that_have_nothing_in_their_place(tmp_path, monkeypatch, capsys):
    """A process was killed between the two moves by which it publishes."""
    monkeypatch.chdir(write_study(tmp_path))
    aside, superseded = Path("results/evaluate/vit/.0.removed"), Path("results/evaluate/get/.0.removed")
    for folder in (aside, aside.with_name(".0.new"), superseded, superseded.with_name("0")):
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(folder.name)
    called("clean", "--dry-run")
    assert aside.exists() and superseded.exists()
    called("clean")
    assert "results/evaluate/vit/0" in capsys.readouterr().out
    for name, content in {"vit": ".0.removed", "get": "0"}.items():
        (kept,) = Path("results/evaluate", name).iterdir()
        assert kept.name == "0" and (kept / "metrics.json").read_text() == content


def test_clean_leaves_work_that_is_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_study(tmp_path))
    Path(".equilab/scratch/distill@old-0").mkdir(parents=True)
    with files.locked("distill@old-0"):
        assert __main__.main(["clean"]) == 2
    assert "distill@old-0" in capsys.readouterr().err
    Path("results/distill/get/.0.new").mkdir(parents=True)
    Path(".equilab/scratch/distill@old-0").rmdir()
    with files.locked("distill@get-0"):
        assert "distill@get-0" in refused(capsys, "clean")
    Path(".equilab/scratch/distill@old-0").mkdir()
    assert Path(".equilab/scratch/distill@old-0").exists()
