"""The feature network and the scores: against published values, closed forms, and torch-fidelity's own pipeline."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from equilab.core import rng
from equilab.core.config import Spec, UserError, parse
from equilab.core.job import Job, Study
from equilab.data import images as data
from equilab.metrics import fidelity
from equilab.models import checkpoint as state
from equilab.models.classifier import CLASSIFIERS, Classifier
from equilab.models.feature_networks import classifier_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with the digits and a classifier of a few seconds of training, as the stages write them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        study = Study(name="digits", root=".", seed=0, threads=1, run_threads=1, device="cpu")
        job = Job(study, "data", None, None, (1, 8, 8), 10, "", print, print)
        params = {"source": "digits", "path": None, "test_path": None, "test": 360, "image": [1, 8, 8]}
        params |= {"classes": 10, "datasets": None, "labels": "uniform"}
        data.run(parse(data.Config, params, "data"), job)
        folder = job.out.resolve()
    images, labels = data.load(folder, "train")[:2]
    images, labels = data.to_float(torch.from_numpy(np.array(images))), torch.from_numpy(labels)
    torch.manual_seed(0)
    sizes = {"width": 24, "features": 64}
    net = Classifier((1, 8, 8), 10, **sizes)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, 300)
    for step in range(300):
        batch = torch.from_numpy(rng.batch(0, "order", 64 * step, 64, len(images)))
        optimiser.zero_grad()
        cross_entropy(net(images[batch])[1], labels[batch]).backward()
        optimiser.step()
        schedule.step()
    about = {"config": {"network": {"kind": "classifier", **sizes}}, "image": [1, 8, 8], "classes": 10}
    about["stage"] = "evaluator"
    state.save_tensors(folder / "weights.safetensors", net.state_dict(), about)
    return folder


@pytest.fixture(scope="module")
def scorer(study):
    return fidelity.Scorer(study, study, study / "cache", CPU)


@pytest.fixture
def images():
    """320 images that are not digits: unit normals as pixels."""
    return data.to_uint8(rng.noise(0, "test images", range(320), (1, 8, 8)))


def features(count, size, seed, scale=1.0):
    return scale * torch.randn(
        count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.images[index]))


def test_a_short_training_classifies_digits_better_than_98_percent(study):
    net, _ = state.load_network(study / "weights.safetensors")
    images, labels = data.load(study, "test")[:2]
    found = net(data.to_float(torch.from_numpy(np.array(images))))[1].argmax(1)
    assert (found.numpy() == labels).mean() > 0.98


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("image", [(1, 8, 8), (3, 32, 32), (3, 12, 20)])
def test_a_classifier_of_either_kind_fits_images_of_any_size_and_has_maps_of_several(kind, image):
    net = CLASSIFIERS[kind](image, 7, width=8, features=5)
    found = net(torch.zeros(2, *image))
    assert [part.shape for part in found] == [(2, 5), (2, 7)]
    maps = classifier_network(net).features(torch.zeros(2, *image))
    sides = [tuple(each.shape[2:]) for each in maps]
    assert sides[0] == image[1:] and max(sides[-1]) <= 4
    assert all(
        2 * after >= before > after for one, next_ in pairwise(sides) for before, after in zip(one, next_)
    )
    assert [each.shape[1] for each in maps] == [8 * 2**k for k in range(len(maps))]


@pytest.mark.parametrize(
    "classes, width, features, message",
    [(0, 8, 4, "at least 2 classes, the data has 0"), (2, 12, 4, "width is 12"), (2, 8, 0, "features 0")],
)
def test_impossible_classifiers_are_refused(classes, width, features, message):
    with pytest.raises(ValueError, match=message):
        Classifier((1, 8, 8), classes, width=width, features=features)


def test_frechet_distance_agrees_with_the_published_values():
    values, _ = golden("metrics")
    one, two = (fidelity.statistics(values[f"in.features{i}"].split(64)) for i in (1, 2))
    for i, found in ((1, one), (2, two)):
        torch.testing.assert_close(found.mean, values[f"out.mu{i}"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.covariance, values[f"out.sigma{i}"], rtol=1e-10, atol=1e-12)
    distance = fidelity.frechet(one, two)
    assert distance == pytest.approx(values["out.fid_float64"].item(), rel=1e-10)
    assert distance == pytest.approx(values["out.fid_edm_script"].item(), rel=1e-10)
    assert distance == pytest.approx(values["out.fid_float32"].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kid_agrees_with_the_published_values(dtype):
    values, about = golden("metrics")
    one, two = (values[f"in.features{i}"].to(getattr(torch, dtype)) for i in (1, 2))
    options = {"subsets": int(about["kid_subsets"]), "subset": int(about["kid_subset_size"]), "seed": 2020}
    tolerance = {"float32": 1e-6, "float64": 1e-10}[dtype]
    assert fidelity.kid(one, two, **options) == pytest.approx(
        values[f"out.kid_mean_{dtype}"].item(), rel=tolerance
    )
    full = fidelity.kid(one, two, subsets=10, subset=400, seed=7)
    assert full == pytest.approx(values[f"out.kid10_full_seed7_mean_{dtype}"].item(), rel=tolerance)


def test_inception_score_agrees_with_the_published_values():
    values, _ = golden("metrics")
    for splits, key in ((10, "isc10_shuffle2020"), (1, "isc1")):
        found = fidelity.inception_score(values["in.logits"], splits=splits, seed=2020)
        assert found == pytest.approx(values[f"out.{key}_mean"].item(), rel=1e-10)


def test_the_inception_score_of_what_is_not_kept_is_that_of_the_same_parts():
    values, _ = golden("metrics")
    logits = values["in.logits"]
    parts = fidelity.Parts(10)
    order = torch.arange(len(logits)).reshape(10, -1).T.flatten()  # image k of part k modulo 10
    for block in logits[order].split(37):
        parts.update(block)
    from torch_fidelity.metric_isc import isc_features_to_metric

    theirs = isc_features_to_metric(logits, 10, False, 0)["inception_score_mean"]
    assert parts.score() == pytest.approx(theirs, rel=1e-12) and parts.count == len(logits)
    single = fidelity.Parts(1)
    single.update(logits)
    assert single.score() == pytest.approx(values["out.isc1_mean"].item(), rel=1e-10)


@pytest.mark.parametrize("neighbours", [3, 5])
def test_precision_and_recall_agree_with_the_published_values(neighbours):
    values, _ = golden("metrics")
    for made, real in ((1, 2), (2, 1)):
        found = fidelity.precision_recall(
            values[f"in.features{made}"], values[f"in.features{real}"], neighbours=neighbours
        )
        key = f"out.prc_k{neighbours}_generated{made}_real{real}"
        assert found == pytest.approx(
            (values[f"{key}_precision"].item(), values[f"{key}_recall"].item()), rel=1e-7
        )


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    # variances along common axes
    a, b = torch.linspace(0.1, 3, 12).double(), torch.linspace(2, 0.5, 12).double()
    gap = torch.linspace(-1, 1, 12).double()
    one = fidelity.Statistics(torch.zeros(12).double(), mix @ a.diag() @ mix.T)
    two = fidelity.Statistics(gap, mix @ b.diag() @ mix.T)
    expected = gap.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert fidelity.frechet(one, two) == pytest.approx(expected.item(), rel=1e-10)
    assert fidelity.frechet(one, one) == pytest.approx(0, abs=1e-10)


def test_statistics_do_not_depend_on_the_blocks():
    rows = features(333, 9, 0, 5.0) + 100
    whole, parts = fidelity.statistics([rows]), fidelity.statistics(rows.split(50))
    torch.testing.assert_close(whole.covariance, rows.T.cov(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.covariance, parts.covariance, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=" 2 images, .* 1;"):
        fidelity.statistics([rows[:1]])


def test_kid_of_two_halves_of_one_distribution_is_near_zero_and_of_two_is_not():
    near = fidelity.kid(features(400, 8, 0), features(400, 8, 1), subsets=10, subset=200, seed=0)
    far = fidelity.kid(features(400, 8, 0), features(400, 8, 1) + 1, subsets=10, subset=200, seed=0)
    assert abs(near) < 0.05 < far


def theirs_of(extractor):
    """Return a feature network as a class of torch-fidelity's."""
    from torch_fidelity import FeatureExtractorBase

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, image):
            features, logits = extractor.network(image)
            return tuple({"features": features, "logits": logits}[name] for name in self.features_list)

    return Registered


def test_scores_are_those_of_torch_fidelity_itself_through_its_registry(scorer, study, images):
    from torch_fidelity import calculate_metrics, register_feature_extractor

    register_feature_extractor("study", theirs_of(scorer.extractor))
    train = data.load(study, "train").images
    theirs = calculate_metrics(
        input1=Images(images),
        input2=Images(train),
        feature_extractor="study",
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=fidelity.BATCH,
        save_cpu_ram=True,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=320,
        kid_subsets=9,
    )
    ours = scorer.scores(images)
    for key, theirs_key, tolerance in [
        ("fd_train", "frechet_inception_distance", 1e-5),  # they take the mean in float32
        ("kid_train", "kernel_inception_distance_mean", 1e-12),
        ("inception_score", "inception_score_mean", 1e-12),
        ("precision", "precision", 1e-12),
        ("recall", "recall", 1e-12),
    ]:
        assert ours[key] == pytest.approx(theirs[theirs_key], rel=tolerance), key


def test_all_scores_are_reported_and_the_distance_is_never_called_fid(scorer, images):
    found = scorer.scores(images)
    assert set(found) == {
        "fd_train",
        "fd_test",
        "kid_train",
        "kid_test",
        "precision",
        "recall",
        "inception_score",
        "n_samples",
    }
    assert found["n_samples"] == 320
    json.dumps(found)


def test_the_distances_alone_are_the_same_numbers_from_an_array_or_from_batches(scorer, images):
    found = scorer.scores(images)
    alone = {key: found[key] for key in ("fd_train", "fd_test")}
    assert scorer.distances(images) == alone
    assert scorer.distances(iter([images[:250], images[250:]])) == alone


def test_noise_scores_worse_than_real_images_by_every_score(scorer, images):
    noise, floor = scorer.scores(images), scorer.floor(1437, seed=0)
    assert (
        set(floor["test"])
        == set(floor["halves"])
        == {
            "fd_train",
            "kid_train",
            "precision",
            "recall",
            "inception_score",
            "n_samples",
            "n_reference",
        }
    )
    for name, sizes in (("test", (360, 1437)), ("halves", (718, 718))):
        assert (floor[name]["n_samples"], floor[name]["n_reference"]) == sizes
        assert 0 < floor[name]["fd_train"] < noise["fd_train"] / 10
        assert abs(floor[name]["kid_train"]) < noise["kid_train"] / 10
    for key in ("precision", "recall", "inception_score"):
        assert floor["test"][key] > noise[key], key


def test_what_costs_quadratically_compares_a_bounded_number_of_images(scorer, images, monkeypatch):
    monkeypatch.setattr(fidelity, "COMPARED", 100)
    found, first = scorer.scores(images), scorer.scores(images[:100])
    for key in ("kid_train", "kid_test", "precision", "recall"):
        assert found[key] == first[key], key
    assert found["fd_train"] != first["fd_train"] and found["n_samples"] == 320
    parts = fidelity.Parts(10)
    for _, logits in fidelity.extract(images, scorer.extractor):
        parts.update(logits)
    assert found["inception_score"] == parts.score() != first["inception_score"]


def test_the_floor_compares_images_that_are_not_in_both_sets(study, tmp_path):
    seen = []

    def network(image):
        seen.append(image.numpy())
        return image.flatten(1).float(), image.flatten(1).float()

    scorer = fidelity.Scorer(study, study, tmp_path, CPU)
    scorer.extractor = scorer.extractor._replace(network=network)
    scorer.floor(300, seed=0)
    images = np.concatenate(seen).reshape(600, -1)
    assert len(np.unique(images, axis=0)) == 600


def test_an_evaluator_of_another_configuration_is_refused(study):
    network = Spec("classifier", {"width": 24, "features": 32}, Classifier)
    for config, told in (
        (SimpleNamespace(network=None), "classifier"),
        (SimpleNamespace(network=network), "'features': 64"),
    ):
        with pytest.raises(UserError, match=told):
            fidelity.Scorer(study, study, study / "cache", CPU, config)


def test_scores_are_float32_whatever_precision_runs_around(scorer, images):
    exact = scorer.scores(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.scores(images) == exact
        assert scorer.distances(images) == {key: exact[key] for key in ("fd_train", "fd_test")}


def test_too_few_images_to_score_are_refused(scorer, images):
    with pytest.raises(ValueError, match=" 10 images, .* 9;"):
        scorer.scores(images[:9])


def test_a_reference_is_computed_once_and_again_when_it_is_damaged(scorer, study, tmp_path):
    calls = []

    def network(image):
        calls.append(len(image))
        return scorer.extractor.network(image)

    train = data.load(study, "train").images
    watched = scorer.extractor._replace(network=network)
    first = fidelity.reference(train, watched, tmp_path, compared=1000)
    seen, (file,) = sum(calls), list(tmp_path.iterdir())
    content = file.read_bytes()
    again = fidelity.reference(train, watched, tmp_path, compared=1000)
    assert sum(calls) == seen == 1437
    torch.testing.assert_close(
        [*again.statistics, *again[1:]], [*first.statistics, *first[1:]], rtol=0, atol=0
    )
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    again = fidelity.reference(train, watched, tmp_path, compared=1000)
    assert sum(calls) == 2 * seen and file.read_bytes() == content


def test_a_reference_is_keyed_by_its_images_its_network_and_how_many_are_compared(scorer, study, tmp_path):
    train = np.array(data.load(study, "train").images[:300])
    other = train.copy()
    other[7, 0, 3, 3] ^= 1
    made = [
        fidelity.reference(train, scorer.extractor, tmp_path, compared=100),
        fidelity.reference(other, scorer.extractor, tmp_path, compared=100),
        fidelity.reference(train, scorer.extractor, tmp_path, compared=200),
        fidelity.reference(train, scorer.extractor._replace(key="other weights"), tmp_path, compared=100),
    ]
    assert [len(one.features) for one in made] == [100, 100, 200, 100]
    assert len(list(tmp_path.iterdir())) == 4
    torch.testing.assert_close([*made[0].statistics], [*made[2].statistics], rtol=0, atol=0)  # of all images


def test_another_process_finds_the_same_bits(scorer, study, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    script = (
        "import json, sys, torch, numpy as np\nfrom pathlib import Path\nfrom equilab.metrics.fidelity import Scorer\n"
        f"torch.set_num_threads({torch.get_num_threads()})\nstudy = Path({str(study)!r})\n"
        f"scorer = Scorer(study, study, Path({str(tmp_path)!r}), torch.device('cpu'))\n"
        f"print(json.dumps([scorer.scores(np.load({str(tmp_path / 'images.npy')!r})), scorer.floor(100, 0)]))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ)
    )
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout.splitlines()[-1]) == [scorer.scores(images), scorer.floor(100, 0)]


def test_inception_weights_that_cannot_be_fetched_are_named_with_their_place(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=f"no route to host.*{fidelity.INCEPTION} .*{tmp_path}/checkpoints"):
        fidelity.inception_extractor(CPU)
    (tmp_path / "checkpoints" / fidelity.INCEPTION).write_bytes(b"cut short")
    with pytest.raises(UserError, match=f"{fidelity.INCEPTION} is damaged"):
        fidelity.inception_extractor(CPU)


def test_inception_features_are_named_fid_and_take_grey_images(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:  # random weights of the right shapes in place of the published ones
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None
        )
        weights = FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
    path = tmp_path / "checkpoints" / fidelity.INCEPTION
    path.parent.mkdir()
    torch.save(weights, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fidelity, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = fidelity.inception_extractor(CPU)
    ((found, logits),) = fidelity.extract(np.full((2, 1, 8, 8), 9, np.uint8), extractor)
    assert extractor.distance == "fid" and found.shape == (2, 2048) and logits.shape == (2, 1008)
