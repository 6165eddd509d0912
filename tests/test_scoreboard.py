"""The scoreboard: every claim once, the verdict of each study beside it, and what they say together; README agrees with it."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from equilab import dvc, study
from equilab.claims.claim import DEPENDS, read_claims, read_papers
from equilab.claims.tests import FAILS, HOLDS, INCONCLUSIVE, NONE
from equilab.core.config import UserError, parse, read
from equilab.core.job import Job, Study
from equilab.stages import claims as claims_stage
from equilab.stages import scoreboard as stage

ROOT = Path(__file__).parent.parent
COLUMNS = claims_stage.table([]).columns


def job():
    about = Study(name="all", root=".", seed=0, threads=1, run_threads=1, device="cpu")
    return Job(about, "scoreboard", None, None, (1, 8, 8), 10, "", print, print)


def judged(folder, claims=(), measured=()):
    """Write what a study has found: a claim's id, its part and the verdict."""
    (folder / "results/claims").mkdir(parents=True)
    (folder / "params.yaml").write_text("{}")
    for name, found in (("claims/get", claims), ("measured", measured)):
        rows = [dict.fromkeys(COLUMNS, "") | dict(zip(("id", "part", "verdict"), each)) for each in found]
        rows = [
            row | {"effect": f"of {folder.name}", "low": "1.5", "high": "2.5", "seeds": "3"} for row in rows
        ]
        pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / "results" / f"{name}.csv", index=False)
    return str(folder)


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """The folders of two studies that have judged claims, by their names."""
    monkeypatch.chdir(tmp_path)
    first = judged(
        tmp_path / "first", [("GET-1", "", HOLDS), ("GET-2", "", NONE)], [("GET-9", "speed", FAILS)]
    )
    return {"first": first, "second": judged(tmp_path / "second", [("GET-1", "", FAILS)])}


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        ({}, "Not tested by any study here."),
        ({"a": HOLDS, "b": HOLDS, "c": HOLDS}, "Holds in a, b and c."),
        ({"A": FAILS, "b": NONE}, "Fails in A."),
        ({"a": INCONCLUSIVE, "b": HOLDS}, "Holds in b; inconclusive in a."),
        ({"a": HOLDS, "b": FAILS}, "The studies disagree: holds in a; fails in b."),
        ({"a": NONE, "b": NONE}, "Open: too few seeds in a and b."),
        ({"a": DEPENDS, "b": NONE}, "Open: depends on the reference in a."),
    ],
)
def test_what_all_studies_say_together_is_a_sentence(verdicts, sentence):
    assert stage.together(verdicts) == sentence


def test_every_claim_is_there_once_with_the_verdict_of_each_study(studies):
    found = stage.scoreboard(studies)
    names = list(dict.fromkeys(zip(found["id"], found["part"])))
    assert names == [(claim.id, claim.part) for claim in read_claims()]
    assert set(found["paper"]) == read_papers().keys()
    both = found[found["id"] == "GET-1"]
    assert list(both["study"]) == ["first", "second"] and list(both["verdict"]) == [HOLDS, FAILS]
    assert list(both["low"]) == ["1.5", "1.5"] and set(both["effect"]) == {"of first", "of second"}
    untested = found[(found["id"] == "GET-9") & (found["part"] == "memory")]
    assert len(untested) == 1 and untested["study"].item() == ""


def test_the_page_has_a_column_for_each_study_that_tests_a_claim_of_the_paper(studies):
    stage.run(stage.Config(studies=studies, earlier=()), job())
    page = Path("results/scoreboard.md").read_text()
    papers = {part.split("\n")[0].split()[0]: part for part in page.split("\n## ")[1:]}
    row = next(line for line in papers["GET"].split("\n") if "GET-1:" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == [HOLDS, FAILS, "The studies disagree: holds in first; fails in second."]
    row = next(line for line in papers["GET"].split("\n") if "GET-2:" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:4] == ["–", ""]
    assert "first" not in papers["GDD"] and "Not tested" in papers["GDD"]
    assert "GET-9, speed**, first: of first (3 seeds)" in papers["Effects"]
    written = pd.read_csv("results/scoreboard.csv", keep_default_na=False, dtype=str)
    pd.testing.assert_frame_equal(written, stage.scoreboard(studies), check_dtype=False)


def test_a_study_that_is_not_there_is_refused_before_anything_runs(studies):
    with pytest.raises(UserError, match=r"^scoreboard\.studies\.third: nowhere .*params\.yaml"):
        stage.plan(stage.Config(studies={**studies, "third": "nowhere"}, earlier=()), job())
    stage.plan(stage.Config(studies=studies, earlier=()), job())


def test_a_study_that_has_not_judged_its_claims_is_named(studies):
    Path(studies["second"], "results/measured.csv").unlink()
    with pytest.raises(
        UserError, match="second/results/claims .*measured.csv .*`dvc repro claims` in .*second"
    ):
        stage.scoreboard(studies)


def test_a_study_without_its_tables_of_claims_is_named(studies):
    shutil.rmtree(Path(studies["second"], "results/claims"))
    with pytest.raises(UserError, match="second/results/claims .*`dvc repro claims`"):
        stage.scoreboard(studies)


def test_a_claim_that_a_study_could_judge_and_has_not_is_told(studies):
    declared = {
        "comparisons": dict.fromkeys(["get against vit, parameters", "get against vit, equal parameters"])
    }
    Path(studies["second"], "params.yaml").write_text(yaml.safe_dump(declared))
    told = stage.overlooked(stage.scoreboard(studies), studies)
    remedy = f"`python -m equilab claims` in {studies['second']}"
    assert any(
        each.startswith("second ") and "X-1, equal parameters" in each and remedy in each for each in told
    )
    assert not any("GET-1" in each and remedy in each for each in told), "it has judged that"
    declared = {"comparisons": {"get against vit, parametres": {}}}
    Path(studies["second"], "params.yaml").write_text(yaml.safe_dump(declared))
    told = stage.overlooked(stage.scoreboard(studies), studies)
    assert any("GET-1" in each and "'get against vit, parametres'" in each for each in told)


def test_a_claim_that_there_is_no_more_is_named(studies, tmp_path):
    studies["third"] = judged(tmp_path / "third", [("GET-0", "old", HOLDS)])
    with pytest.raises(UserError, match="third/results .*GET-0, old, .*`dvc repro claims`"):
        stage.scoreboard(studies)
    found = stage.scoreboard(studies, earlier=["third"])  # what has changed since is left out
    assert "GET-0" not in set(found["id"])


def test_a_study_that_waits_to_be_run_again_is_marked(studies):
    config = parse(stage.Config, {"studies": studies, "earlier": ["second"]}, "scoreboard")
    page = stage.markdown(stage.scoreboard(studies, config.earlier), config)
    assert "second *" in page and "first *" not in page
    with pytest.raises(UserError, match="^scoreboard: earlier .*'secnd'.*'second'"):
        parse(stage.Config, {"studies": studies, "earlier": ["secnd"]}, "scoreboard")


def test_it_is_made_anew_when_the_claims_of_any_study_change_and_after_those_of_its_own():
    sections = study.read(ROOT / "params.yaml")
    needed = dvc.graph(sections)["stages"]["scoreboard"]["deps"]
    for folder in sections.values["scoreboard"]["studies"].values():
        for name in ("claims", "measured.csv"):
            assert Path(folder, "results", name).as_posix() in needed
    assert len(needed) == len(set(needed))
    assert not any("scoreboard" in names for names in dvc.waves(sections)), "runs do not wait for it"


def committed():
    return pd.read_csv(ROOT / "results/scoreboard.csv", keep_default_na=False, dtype=str)


def test_the_committed_scoreboard_is_what_the_committed_claims_of_all_studies_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(stage.Config, read(Path("params.yaml"))["scoreboard"], "scoreboard")
    listed = config.studies
    pd.testing.assert_frame_equal(committed(), stage.scoreboard(listed, config.earlier), check_dtype=False)
    assert Path("results/scoreboard.md").read_text() == stage.markdown(committed(), config)
    judged = {path.parent.parent.resolve() for path in Path().glob("**/results/claims.md")}
    smoke = Path("studies/smoke").resolve()  # whose numbers mean nothing
    assert judged - {smoke} == {Path(folder).resolve() for folder in listed.values()}
    for name, folder in listed.items():
        assert yaml.safe_load(Path(folder, "params.yaml").read_text())["study"]["name"] == name


def test_the_findings_of_the_readme_are_those_of_the_scoreboard():
    """A row names a claim, with its part if the parts differ, the verdict, and in its last link the study."""
    findings = (ROOT / "README.md").read_text().split("## Findings")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\|.*\((\w+-\d+)(?:, ([^)]*))?\) \| ([^|]*) \|.*\[([\w-]+)\]\([^)]*\) \|$", findings, re.M
    )
    assert len(rows) == findings.count("\n| ") - 1, "a row cannot be read"
    board = committed()
    for claim, part, verdict, named in rows:
        found = board[
            (board["id"] == claim) & (board["study"] == named) & (board["part"].isin([part]) | (part == ""))
        ]
        assert set(found["verdict"]) == {verdict}, f"{claim} {part} in {named}"
