"""Pairs and the runs made from them: by index, checked, the same bytes from any number of processes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from smoke import SMOKE, write_study

from equilab import __main__
from equilab.core import config, like, rng
from equilab.core.config import UserError
from equilab.data.images import to_uint8
from equilab.data.pairset import NOISE, PairSet
from equilab.diffusion.protocols import finish
from equilab.diffusion.settings import Sampler
from equilab.models.checkpoint import load_network, load_tensors, save_tensors
from equilab.models.precond import EDM


@pytest.fixture
def copy(study_of_pairs, tmp_path):
    """The results of the pairs, to be damaged."""
    shutil.copytree(study_of_pairs / "results/pairs", tmp_path / "pairs")
    return tmp_path / "pairs"


def test_a_pair_is_a_function_of_its_index(study_of_pairs):
    found = PairSet(study_of_pairs / "results/pairs")
    assert (found.count, found.held_out, found.classes, found.shape) == (200, 40, 10, (1, 8, 8))
    some = found.read(np.array([7, 239, 0]))
    for k, index in enumerate((7, 239, 0)):
        alone = found.read(np.array([index]))
        torch.testing.assert_close(some.noise[k], alone.noise[0], rtol=0, atol=0)
        torch.testing.assert_close(some.image[k], alone.image[0], rtol=0, atol=0)
        assert some.label[k] == alone.label[0]
        expected = rng.noise(found.seed, NOISE, [index], found.shape)
        np.testing.assert_array_equal(alone.noise.numpy(), expected)


def test_a_pair_is_what_the_teacher_makes_of_its_noise(study_of_pairs):
    found = PairSet(study_of_pairs / "results/pairs")
    net, about = load_network(study_of_pairs / "results/teacher/weights.safetensors")
    sampler = config.parse(Sampler, like.read(SMOKE)["pairs"]["sampler"], "pairs.sampler")
    noise, image, label = found.read(np.arange(30))
    last = finish(sampler.start(EDM(net, sigma_data=about["config"]["sigma_data"]), noise, label))
    difference = (to_uint8(last.x).int() - to_uint8(image).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01
    assert last.nfe == found.meta["nfe_image"] == sampler.nfe == 5 and found.meta["nfe"] == 5 * 240


def test_the_set_is_memory_mapped(study_of_pairs):
    assert all(isinstance(array, np.memmap) for array in PairSet(study_of_pairs / "results/pairs").images)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: (folder / "meta.json").unlink(),
            "meta.json .*fetch it first",
        ),
        (
            lambda folder: (folder / "meta.json").write_text("{"),
            "meta.json .*fetch it again",
        ),
        (lambda folder: (folder / "images-0000000060.npy").unlink(), "images-0000000060.npy "),
        (
            lambda folder: shorten(folder / "images-0000000060.npy"),
            "images-0000000060.npy is damaged",
        ),
        (lambda folder: change(folder / "images-0000000120.npy"), "images-0000000120.npy is damaged"),
        (
            lambda folder: np.save(folder / "images-0000000000.npy", np.zeros((60, 3, 8, 8), np.uint8)),
            "images-0000000000.npy holds uint8",
        ),
        (lambda folder: forge(folder / "meta.json"), "noise"),
    ],
)
def test_damaged_pairs_are_refused_with_the_file_and_the_remedy(copy, damage, sentence):
    damage(copy)
    with pytest.raises(UserError, match=sentence):
        PairSet(copy).verify()


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def change(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def forge(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_checksum": "0"}))


def test_a_run_refuses_more_pairs_than_there_are_and_classes_that_are_not_there(
    study_of_pairs, tmp_path, capsys, monkeypatch
):
    shutil.copytree(study_of_pairs / "results", tmp_path / "results")
    write_study(tmp_path, {"distill.vit.pairs": 201})
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["distill", "vit"]) == 2
    assert re.search("distill.vit.pairs .*201, .* 200", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pairs.sampler.sigma_max", 70.0, "pairs.sampler "),
        ("pairs.count", 260, "results/pairs/meta.json .*200, .*pairs.count .*260"),
        ("study.seed", 7, "results/pairs/meta.json .* 0, .*study.seed .*7"),
    ],
)
def test_pairs_made_otherwise_than_params_say_now_are_refused(
    study_of_pairs, tmp_path, capsys, monkeypatch, key, value, told
):
    shutil.copytree(study_of_pairs / "results", tmp_path / "results")
    write_study(tmp_path, {key: value})
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["distill", "vit"]) == 2
    assert re.search(f"{told}.*`python -m equilab pairs`", capsys.readouterr().err)


def test_pairs_of_another_teacher_are_refused_and_pairs_alone_are_not(
    study_of_pairs, tmp_path, capsys, monkeypatch
):
    shutil.copytree(study_of_pairs / "results", tmp_path / "results")
    write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "results/teacher/weights.safetensors"
    tensors, about = load_tensors(weights)
    save_tensors(weights, {name: tensor + 1 for name, tensor in tensors.items()}, about)
    assert __main__.main(["distill", "vit"]) == 2
    assert re.search("results/pairs/meta.json .*results/teacher/weights.safetensors", capsys.readouterr().err)
    weights.unlink()
    assert __main__.main(["distill", "vit"]) == 0


def test_weights_of_another_configuration_are_refused(study_of_pairs, tmp_path, capsys, monkeypatch):
    shutil.copytree(study_of_pairs / "results", tmp_path / "results")
    write_study(tmp_path, {"teacher.sigma_std": 1.1})
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["pairs"]) == 2
    told = capsys.readouterr().err
    assert re.search("weights.safetensors .*sigma_std 1.2, .* 1.1.*`python -m equilab teacher`", told)
