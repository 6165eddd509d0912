"""Latents: a small VAE of our own making, saved to disk and loaded; encoding, training, sampling, and what can go wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import smoke
import torch
from diffusers import AutoencoderKL
from smoke import called, keep, refused

from equilab import __main__, dvc
from equilab.core import like, rng
from equilab.data import images as data
from equilab.data import latents
from equilab.study import open_study


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a VAE of 8x8 grey images to latents 2x4x4."""
    torch.manual_seed(0)
    made = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=8,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae):
    """The folder of a study in latents, without teacher, pairs and one-step generators; its data and latents are there."""
    folder, before = tmp_path_factory.mktemp("study"), Path.cwd()
    sections = smoke.sections()
    for name in (
        "teacher",
        "pairs",
        "distill",
        "features",
        "gan",
        "consistency",
        "progressive",
        "relative",
        "activation",
    ):
        del sections[name]
    sections["latents"] = {"vae": str(vae), "shape": [2, 4, 4], "batch": 64}
    sections["evaluate"] = {name: sections["evaluate"][name] for name in ("fpdm", "dit")}
    for entry in sections["evaluate"].values():
        entry["chain"] = [{**entry["chain"][0], "clamp": False}]
    sections["cost"]["runs"] = ["diffusion/fpdm", "diffusion/dit"]
    sections["notebook"] = {}
    sections["comparisons"] = {"fpdm against dit": sections["comparisons"]["fpdm against dit"]}
    keep(sections, folder)
    os.chdir(folder)
    for stage in ("data", "latents"):
        called(stage)
    os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The same, with its evaluator and its denoisers."""
    trained, before = tmp_path_factory.mktemp("trained") / "study", Path.cwd()
    shutil.copytree(folder, trained)
    os.chdir(trained)
    for command in (["evaluator"], ["diffusion", "fpdm"], ["diffusion", "dit"]):
        called(*command)
    os.chdir(before)
    return trained


@pytest.fixture
def study(folder, tmp_path, monkeypatch):
    """A copy of the study, which is the current folder."""
    return entered(folder, tmp_path, monkeypatch)


@pytest.fixture
def trained_study(trained, tmp_path, monkeypatch):
    """A copy of the study in which all is trained, which is the current folder."""
    return entered(trained, tmp_path, monkeypatch)


def entered(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")


def content():
    return {path.name: path.read_bytes() for path in sorted(Path("results/latents").iterdir())}


def test_a_latent_is_a_draw_from_the_posterior_times_the_scaling_factor(study, vae):
    items = np.array([3, 700, 1500])
    found = latents.Encoded(Path("results/latents")).read(items)
    images = data.load(Path("results/data"), "train").images
    net = AutoencoderKL.from_pretrained(vae).eval()
    with torch.inference_mode():
        encoded = net.encoder(data.to_float(torch.from_numpy(images[items])))
        moments = net.quant_conv(encoded)  # mean and log variance
    mean, log_variance = moments.chunk(2, 1)
    noise = torch.from_numpy(rng.noise(0, "latents", items, (2, 4, 4)))
    torch.testing.assert_close(found, 0.5 * (mean + (log_variance / 2).exp() * noise))
    meta = json.loads(Path("results/latents/meta.json").read_text())
    assert meta["count"] == len(images) == 1597 and len(meta["shards"]) == 2


def test_a_killed_run_continues_with_the_shard_it_was_at_and_ends_in_the_same_bytes(study, monkeypatch):
    whole, encode, calls = content(), AutoencoderKL.encode, []

    def counted(vae, image):
        calls.append(len(image))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(vae, image)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    assert __main__.main(["latents"]) == 130 and content() == whole  # what was there is still there
    called("latents")
    assert content() == whole and sum(calls[20:]) == 1597 - 1024


def test_a_run_killed_while_it_publishes_ends_in_the_same_bytes(study, monkeypatch):
    whole, written = content(), latents.write_json

    def killed(*given):
        raise KeyboardInterrupt

    for path in Path("results/latents").iterdir():
        path.unlink()
    monkeypatch.setattr(latents, "write_json", killed)
    assert __main__.main(["latents"]) == 130 and "meta.json" not in content()
    monkeypatch.setattr(latents, "write_json", written)
    called("latents")
    assert content() == whole


def test_the_vae_that_decodes_is_the_one_that_encoded(trained_study, capsys, vae):
    net = AutoencoderKL.from_pretrained(vae)
    net.decoder.conv_out.bias.data += 1
    net.save_pretrained("other")
    sections = like.read(Path("params.yaml"))
    sections["latents"]["vae"] = "other"
    keep(sections)
    told = refused(capsys, "evaluate", "dit")
    assert re.search("results/latents/meta.json .* other .*`python -m equilab latents`", told)
    assert not Path("results/evaluate").exists()


def test_samples_are_decoded_to_pixels(trained_study):
    called("evaluate", "fpdm")
    samples = np.load("results/evaluate/fpdm/0/samples.npy")
    assert samples.shape == (100, 1, 8, 8) and samples.dtype == np.uint8
    with np.load("results/evaluate/fpdm/0/iterates.npz") as kept:
        assert kept["images"].shape == (4, 16, 1, 8, 8) and kept["image_0"].shape == (16, 1, 8, 8)
        assert np.array_equal(kept["images"][-1], samples[:16])  # the last prediction is the image
    summary = json.loads(Path("results/diffusion/fpdm/0/summary.json").read_text())
    assert summary["image"] == [2, 4, 4] and set(summary["inputs"]) == {"data", "latents"}


@pytest.mark.slow
def test_claims_are_of_what_a_study_in_latents_has(trained_study):
    for command in (["check"], ["evaluate", "fpdm"], ["evaluate", "dit"], ["cost"], ["claims"]):
        called(*command)
    claims = Path("results/claims.md").read_text()
    assert "FPDM-2" in claims and "GET-" not in claims


def test_the_graph_has_the_stages_of_the_study_alone(study):
    stages = dvc.graph(open_study(Path("params.yaml")))["stages"]
    assert list(stages) == [
        "code",
        "data",
        "evaluator",
        "latents",
        "diffusion",
        "evaluate",
        "cost",
        "claims",
        "report",
    ]
    assert (
        "results/latents" in stages["diffusion"]["do"]["deps"]
        and "${latents.vae}" in stages["evaluate"]["do"]["deps"]
    )
    assert not [
        path
        for stage in stages.values()
        for path in stage.get("do", stage)["deps"]
        if "pairs/" in path or ("distill" in path and "results" in path)
    ]
    assert "latents" not in dvc.graph(open_study(smoke.SMOKE))["stages"]


@pytest.mark.parametrize(
    ("change", "command", "sentence"),
    [
        (
            {"vae": "nowhere"},
            ["check"],
            "latents.vae: nowhere .*config.json and diffusion_pytorch_model",
        ),
        ({"shape": [4, 4, 4]}, ["latents"], r"latents.shape .*\[4, 4, 4\]"),
        ({"batch": 100}, ["latents"], "latents.batch"),
    ],
)
def test_a_vae_that_is_missing_or_does_not_fit_is_named(study, capsys, change, command, sentence):
    sections, before = like.read(Path("params.yaml")), content()
    sections["latents"] |= change
    keep(sections)
    assert re.search(sentence, refused(capsys, *command))
    assert content() == before


def test_a_damaged_vae_or_shard_other_data_and_clamped_latents_are_refused(study, capsys, vae):
    shard = Path("results/latents/latents-0000000000.npy")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    told = refused(capsys, "diffusion", "dit")
    assert re.search(f"{shard} .*`python -m equilab latents`", told)
    shard.write_bytes(whole)
    sections = like.read(Path("params.yaml"))
    sections["evaluate"]["dit"]["chain"][0]["clamp"] = True
    keep(sections)
    assert "clamp" in refused(capsys, "check")
    meta = Path("results/data/meta.json")
    meta.write_text(meta.read_text() + " ")
    assert re.search("results/latents/meta.json .*results/data", refused(capsys, "diffusion", "dit"))
    sections["latents"]["vae"] = "broken"
    keep(sections)
    Path("broken").mkdir()
    Path("broken/config.json").write_text((vae / "config.json").read_text())
    assert "broken" in refused(capsys, "check")
