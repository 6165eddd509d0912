"""A run as a folder that is given away: by hand, or on the hub, of which tests have a fake."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import golden, weights_of
from made import write_study as write_results

import equilab
from equilab import __main__
from equilab.card import card, give
from equilab.core.config import UserError
from equilab.published import importing

GET = "distill/get"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder."""
    import huggingface_hub

    folder = tmp_path / "hub"

    class Api:
        def create_repo(self, name, exist_ok):
            (folder / name).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            for name in allow_patterns:
                shutil.copy(f"{folder_path}/{name}", folder / repo_id / name)

    def download(name, revision, allow_patterns):
        if not (folder / name).exists() or revision:
            raise OSError("404: there is no such repository\nRequest ID: 1")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_a_run_is_given_away_and_drawn_from_as_in_its_study(results, hub, tmp_path):
    assert equilab.push(results / GET, "someone/get-digits") == "https://hub/someone/get-digits"
    expected = equilab.load(results / GET).sample(4)
    give(results / GET, tmp_path / "given")
    for path in (tmp_path / "given", "hf://someone/get-digits"):
        samples = equilab.load(path).sample(4)
        assert np.array_equal(samples.images, expected.images)
        assert samples.iterations.tolist() == [2] * 4  # of its study's headline, not of its training
    (tmp_path / "given/README.md").write_text("edited")
    equilab.push(tmp_path / "given", "someone/get-digits")
    assert (hub / "someone/get-digits/README.md").read_text() == "edited"


@pytest.mark.parametrize("of", ["teacher", "distill/vit", "diffusion/fpdm", "consistency/cd"])
def test_every_kind_of_run_has_a_card(results, of, tmp_path, capsys):
    assert __main__.main(["card", str(results / of), "--out", str(tmp_path / "given")]) == 0
    text = (tmp_path / "given/README.md").read_text()
    assert text.startswith("---\nlibrary_name: equilab\nlicense: mit\n") and of in text
    for heading in ("How to load it", "Data", "Budget", "Scores", "Limits", "Licence"):
        assert f"## {heading}" in text
    assert equilab.load(tmp_path / "given").setting == equilab.load(results / of).setting


def test_a_card_has_budget_and_scores_with_intervals(results, tmp_path):
    found = write_results(
        tmp_path, {GET: {"fd": [2.0, 2.2, 2.4]}, "distill/vit": {"fd": [3.0]}}, data={"source": "digits"}
    )
    for run in ("get", "vit"):
        shutil.copy(results / f"distill/{run}/0/weights.safetensors", found / f"distill/{run}/0")
    text = card(found / "distill/get/0/weights.safetensors")
    assert "made by hand" in text and "source: digits" in text
    assert "| training images seen | 1,000 |" in text and "| FLOPs of the training | 30,000 |" in text
    low, high = np.exp(
        np.log([2.0, 2.2, 2.4]).mean()
        + np.array([-1, 1]) * 4.3027 * np.log([2.0, 2.2, 2.4]).std(ddof=1) / 3**0.5
    )
    assert f"| fd_train | 2 | 2.19 ({low:.4g} to {high:.4g}) |" in text.replace("2.194", "2.19")
    assert "1 seed" not in text and "1 seed" in card(found / "distill/vit/0/weights.safetensors")


def test_the_card_of_published_weights_says_whose_they_are(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save(weights_of(golden("get_uncond")[0]), "get.pt")
    path = importing.run("get", tmp_path / "get.pt", "theirs", {"heads": 2})
    text = card(path)
    assert "license: other" in text and "get.pt" in text
    assert "| fd_train |" not in text, "it has not been evaluated"


def test_the_card_of_a_model_that_makes_latents_says_so(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save(weights_of(golden("fpdm_tiny")[0]), "fpdm.pt")
    config = {"heads": 2, "pre_post_timestep": False}
    text = card(importing.run("fpdm", tmp_path / "fpdm.pt", "theirs", config))
    assert 'equilab.load("PATH", vae="FOLDER")' in text
    assert "sample PATH --vae FOLDER" in text


def test_a_folder_that_was_given_away_has_its_card(results, tmp_path, capsys):
    give(results / GET, tmp_path / "given")
    (tmp_path / "given/README.md").write_text("edited\n")
    assert __main__.main(["card", str(tmp_path / "given")]) == 0
    assert capsys.readouterr().out == "edited\n"
    give(tmp_path / "given", tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == "edited\n"
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "given/config.json").read_text()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "hf://nobody/nothing",
            "^hf://nobody/nothing .*404: there is no such repository.*`hf auth login`",
        ),
        ("hf://nobody/nothing@v1", "^hf://nobody/nothing@v1 .*404.*`hf auth login`"),
        ("hf://nothing", "'nothing' .*owner/name"),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub, path, sentence):
    with pytest.raises(UserError, match=sentence):
        equilab.load(path)


def test_without_a_network_one_sentence(results, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="^hf://someone/get .*no route to host.*`hf auth login`"):
        equilab.load("hf://someone/get")
    with pytest.raises(UserError, match=" someone/get .*no route to host.*`hf auth login`"):
        equilab.push(results / GET, "someone/get")
    with pytest.raises(UserError, match="'get' .*owner/name"):
        equilab.push(results / GET, "get")


def test_a_folder_that_is_there_is_not_written_over(results, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        give(results / GET, tmp_path)


def test_what_beside_the_weights_is_damaged_is_told(results, tmp_path):
    give(results / GET, tmp_path / "given")
    path = tmp_path / "given/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "setting": {**about["setting"], "iterations": 0}}))
    with pytest.raises(UserError, match=r"config\.json: setting\.iterations"):
        equilab.load(tmp_path / "given")
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json .*fetch"):
        equilab.load(tmp_path / "given")
