"""`like` in params: what a group takes over, and what is said where it leads nowhere."""

import json

import pytest
import yaml
from smoke import ROOT, refused, write_study

from equilab.core import config, like
from equilab.core.config import UserError

STUDIES = [ROOT / "params.yaml", *sorted(ROOT.glob("studies/*/params.yaml"))]
TEXT = """
shared:
  sampler: {method: heun, steps: 18}
pairs: {sampler: {like: shared.sampler, steps: 3}}
distill:
  small: {like: medium, network: {width: 8}, seeds: [0]}
  medium:
    network: {kind: get, width: 16, depth: 3, normalise: true}
    equilibrium: {iterations: 6}
    seeds: [0, 1, 2]
    optimisation: {lr: 1e-3, betas: [0.9, 0.999], clip: 1.0}
  vit: {like: medium, network: {kind: vit, width: 4}, equilibrium: null}
  long: {like: small, optimisation: {nimg: 10, clip: null}}
gan:
  gdd: {optimisation: {like: distill.long.optimisation, betas: [0.0]}}
evaluate:
  small: {sampler: [{like: pairs.sampler}, {like: pairs.sampler, steps: 9}]}
"""


def read(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return like.read(path)


def test_a_group_has_what_it_is_like_but_for_what_it_says(tmp_path):
    found = read(tmp_path, TEXT)
    medium = found["distill"]["medium"]
    small = {**medium, "network": {**medium["network"], "width": 8}, "seeds": [0]}
    assert found["distill"]["small"] == small
    assert found["distill"]["long"] == {
        **small,
        "optimisation": {"lr": 1e-3, "betas": [0.9, 0.999], "clip": None, "nimg": 10},
    }
    assert found["gan"]["gdd"]["optimisation"] == {
        **found["distill"]["long"]["optimisation"],
        "betas": [0.0],
    }


def test_of_another_kind_nothing_is_taken_over_and_null_replaces(tmp_path):
    vit = read(tmp_path, TEXT)["distill"]["vit"]
    assert vit["network"] == {"kind": "vit", "width": 4} and vit["equilibrium"] is None


def test_what_several_places_share_is_taken_from_its_path_in_lists_as_well(tmp_path):
    found = read(tmp_path, TEXT)
    assert found["pairs"]["sampler"] == {"method": "heun", "steps": 3}
    assert [each["steps"] for each in found["evaluate"]["small"]["sampler"]] == [3, 9]
    assert "shared" not in found


def test_a_group_that_says_like_takes_nothing_from_its_counterpart(tmp_path):
    text = "a: {x: {n: {p: 1, q: 2}}, y: {like: x, n: {like: b.m}}}\nb: {m: {r: 3}}\n"
    assert read(tmp_path, text)["a"]["y"] == {"n": {"r": 3}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {small: {}, x: {like: smal}}", ["a.x.like", "did you mean 'small'"]),
        (
            "shared: {heun: {s: 1}}\na: {x: {list: [{like: heun}]}, y: {like: shared.heun}}",
            ["a.x.list[0].like", "'shared.heun'"],
        ),
        ("a: {x: {n: {}}}\nb: {y: {like: a.x.m}}", ["b.y.like", "'a.x.m'", "'a.x.n'"]),
        ("a: {x: {n: 5}, y: {like: a.x.n}}", ["a.y.like", "a.x.n is no group of keys, but 5"]),
        ("a: {x: {like: 5}}", ["a.x.like", "got 5"]),
        ("a: {x: {like: y}, y: {like: z}, z: {like: x}}", ["a.x is like a.y", "a.z", "is like a.x;"]),
        ("a: {x: {like: x}}", ["a.x is like a.x"]),
        ("a: {x: {n: {like: a.x}}}", ["a.x.n.like", "a.x holds"]),
        ("a: {x: {n: {like: b.y}}}\nb: {y: {like: a.x}}", ["a.x", "b.y"]),
        ("a: {like: b}\nb: {x: {}}", ["a: like stands in a group of a section"]),
        ("shared: {n: {s: 1}}\na: {x: 1}", ["shared.n", "nothing is like it"]),
        (
            "a: {" + ", ".join(f"x{i}: {{like: x{i + 1}}}" for i in range(300)) + ", x300: {y: 1}}",
            ["each like the next"],
        ),
        (
            "a: {x0: {y: 1}, "
            + ", ".join(f"x{i + 1}: {{p: {{like: a.x{i}}}, q: {{like: a.x{i}}}}}" for i in range(40))
            + "}",
            ["too large"],
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_like_that_is_mistaken_is_told_in_a_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as told:
        read(tmp_path, text)
    *others, sentence = str(told.value).splitlines()
    assert len(others) < 3 and str(tmp_path / "params.yaml") in sentence
    assert all(word in sentence for word in words), sentence


def test_all_that_like_gets_wrong_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as told:
        read(tmp_path, "a: {x: {like: nowhere}, y: {like: 5}}\nb: {like: a, z: {like: a.z}}\n")
    assert len(str(told.value).splitlines()) == 4


def test_check_says_what_like_gets_wrong(tmp_path, capsys, monkeypatch):
    folder = write_study(tmp_path, {"distill.vit": {"like": "gte", "equilibrium": None}})
    monkeypatch.chdir(folder)
    assert "did you mean 'get'" in refused(capsys, "check")


@pytest.mark.parametrize("params", STUDIES, ids=lambda params: params.parent.name)
def test_no_study_needs_anchors_and_dvc_reads_it_as_we_do(params):
    """`dvc exp run -S` writes params.yaml anew, which anchors do not outlive."""
    text = params.read_text(encoding="utf-8")
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, config._Loader))


def changed_by_dvc(params, override, tmp_path):
    """Return the sections before and after DVC writes a params file with an override."""
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text(params.read_text(encoding="utf-8"), encoding="utf-8")
    before = like.read(path)
    apply_overrides(path, [override])
    assert "&" not in path.read_text(encoding="utf-8") and "# " in path.read_text(encoding="utf-8")
    return before, like.read(path)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("distill.vit-m.optimisation.lr=1e-3", {"vit-m"}),
        ("+distill.get-m-normalised.optimisation.lr=1e-3", {"get-m-normalised"}),
        ("distill.get-m.pairs=100", {"get-m", "vit-m", "get-m-normalised"}),
    ],
)
def test_dvc_changes_one_run_and_those_that_are_like_it_and_nothing_else(override, changed, tmp_path):
    before, after = changed_by_dvc(ROOT / "params.yaml", override, tmp_path)
    runs = {run for run in before["distill"] if before["distill"][run] != after["distill"][run]}
    assert runs == changed
    others = [
        {name: section for name, section in each.items() if name != "distill"} for each in (before, after)
    ]
    assert json.dumps(others[0]) == json.dumps(others[1])
