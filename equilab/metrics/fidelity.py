"""Scores of generated against real images on the features of one network; the only file that imports torch-fidelity.

On Inception's features the distance is called `fid`, on those of the study's own classifier `fd`. torch-fidelity is
imported where it is needed, as it brings torchvision along, which takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import UserError, digest, unusable
from equilab.core.machine import precision
from equilab.core.progress import bar
from equilab.data.images import load, to_float
from equilab.models.checkpoint import checksum, load_network, load_tensors, read_metadata, save_tensors

DEFINITION = 1  # of what a kept Reference holds; a higher number leaves older files unread
BATCH = 250  # images through a feature network at once; decides the last bits
COMPARED = 10_000  # at most so many images of a side are compared one with another: KID, precision, recall
KID_SUBSET = 1000  # images in a subset, as published
NEIGHBOURS = 3  # of precision and recall, as published
SPLITS = 10  # of the inception score, as published
SEED = 2020  # torch-fidelity's
CACHE = Path(".equilab/references")  # of a study, ignored by git and DVC
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # its first digits, which the name of the file carries

Images = UInt8[np.ndarray, "n c h w"] | Iterable[UInt8[np.ndarray, "_ c h w"]]  # an array, or batches


class Extractor(NamedTuple):
    """A feature network: uint8 images (B, C, H, W) on `device` to features (B, D) and logits (B, K), both float32.

    `distance` is what the Frechet distance on it is called, `key` changes with its weights.
    """

    network: Callable[[Tensor], tuple[Tensor, Tensor]]
    distance: str
    key: str
    device: torch.device


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features."""

    mean: Float64[Tensor, d]
    covariance: Float64[Tensor, "d d"]


class Reference(NamedTuple):
    """An image set as scores need it: statistics of all its images, features and logits of those compared."""

    statistics: Statistics
    features: Float32[Tensor, "m d"]
    logits: Float32[Tensor, "m k"]


def classifier_extractor(classifier: nn.Module) -> Extractor:
    """Return the extractor of a trained Classifier, on the device that it is on."""

    def network(image: Tensor) -> tuple[Tensor, Tensor]:
        return classifier(to_float(image))

    device = next(classifier.parameters()).device
    return Extractor(network, "fd", checksum(classifier.state_dict()), device)


def inception_extractor(device: torch.device) -> Extractor:
    """Return torch-fidelity's Inception-v3: its 2048 pooled features, of grey images with their channel repeated.

    Its weights are fetched once into torch's hub folder.

    Raises: UserError naming the file to place, and where, if it is missing and cannot be fetched, or is damaged.
    Differs: precision and recall are measured on Inception's features, as in Dhariwal & Nichol 2021, not on VGG's, so
        that one network serves all scores.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as inceptionv3

    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                inceptionv3.URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights could not be fetched ({error}); place the file {INCEPTION} of the "
                f"releases of torch-fidelity at {path}"
            ) from error
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    if not weights.startswith(INCEPTION_SHA256):
        raise UserError(
            f"{path} is damaged: its sha256 must start with {INCEPTION_SHA256}; remove it and run again"
        )
    # torch-fidelity unpickles the file: refuse one that holds more than tensors
    torch.load(path, weights_only=True)
    inception = inceptionv3.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], str(path)).to(device)

    def network(image: Tensor) -> tuple[Tensor, Tensor]:
        return inception(image.expand(-1, 3, -1, -1))

    key = f"{weights} {importlib.metadata.version('torch-fidelity')}"
    return Extractor(network, "fid", key, device)


def extract(
    images: Images, extractor: Extractor
) -> Iterator[tuple[Float32[Tensor, "b d"], Float32[Tensor, "b k"]]]:
    """Yield features (B, D) and logits (B, K) on the CPU, of an array in batches of BATCH, else batch by batch."""
    for batch in _batches(images) if isinstance(images, np.ndarray) else images:
        pixels = torch.from_numpy(np.array(batch)).to(extractor.device)
        with torch.no_grad(), _float32(extractor.device):
            features, logits = extractor.network(pixels)
        yield features.cpu(), logits.cpu()


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield BATCH rows at a time."""
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Compute in float32, whatever the precision of what runs around: a score must not depend on it."""
    with torch.autocast(device.type, enabled=False), precision("fp32", device)():
        yield


def statistics(blocks: Iterable[Float[Tensor, "_ d"]]) -> Statistics:
    """Return mean and unbiased covariance of features that come in blocks, summed in float64.

    Raises: ValueError for fewer than two images.
    """
    count, total, products = 0, 0.0, 0.0
    for block in blocks:
        block = block.double()
        count += len(block)
        total = total + block.sum(0)  # (D,)
        products = products + block.T @ block  # (D, D)
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {count}; give more")
    mean = total / count
    return Statistics(mean, (products - count * torch.outer(mean, mean)) / (count - 1))


def frechet(a: Statistics, b: Statistics) -> float:
    """Return the squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Source: Heusel et al. 2017 (FID), equation 6.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    sides = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in (a, b)]
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]


def kid(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], *, subsets: int, subset: int, seed: int
) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3, a mean over random subsets of `subset` images.

    It may be slightly below zero for equal distributions.

    Source: Binkowski et al. 2018 (KID), section 4.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    options = {"kid_subsets": subsets, "kid_subset_size": subset, "rng_seed": seed, "verbose": False}
    return kid_features_to_metric(features, reference, **options)[KEY_METRIC_KID_MEAN]


def inception_score(logits: Float[Tensor, "n k"], *, splits: int, seed: int) -> float:
    """Return exp of the mean KL divergence from p(label | image) to p(label), a mean over `splits` shuffled parts.

    Source: Salimans et al. 2016, section 4.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits, splits, True, seed)[KEY_METRIC_ISC_MEAN]


class Parts:
    """The inception score of more logits than are kept: image k is of part k modulo `splits`, and of each part there are sums alone.

    Source: as of `inception_score`.
    """

    def __init__(self, splits: int):
        self.splits, self.count, self.sums = splits, 0, 0.0

    def update(self, logits: Float[Tensor, "b k"]) -> None:
        """Add the logits of the next images."""
        log = logits.double().log_softmax(1)  # (B, K)
        negative_entropy = (log.exp() * log).sum(1, True)  # (B, 1)
        each = torch.cat([log.exp(), negative_entropy, log.new_ones(len(log), 1)], 1)  # (B, K + 2)
        part = (torch.arange(len(log)) + self.count) % self.splits
        self.count += len(log)
        self.sums = self.sums + log.new_zeros(self.splits, each.shape[1]).index_add(0, part, each)

    def score(self) -> float:
        """Return exp of the mean KL divergence from p(label | image) to p(label), a mean over the parts."""
        means = self.sums[:, :-1] / self.sums[:, -1:]  # (S, K + 1)
        return (means[:, -1] + torch.special.entr(means[:, :-1]).sum(1)).exp().mean().item()


def precision_recall(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], *, neighbours: int
) -> tuple[float, float]:
    """Return the share of images within the real images' manifold, and of real images within theirs.

    A manifold is the union of balls around its images, each out to its `neighbours`-th nearest one.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": neighbours, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(features, reference, **options)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def reference(
    images: UInt8[np.ndarray, "n c h w"], extractor: Extractor, cache: Path, *, compared: int
) -> Reference:
    """Return the Reference of real images, computed once and kept in `cache` under a hash of all that it depends on.

    Statistics are those of all images; features are kept of at most `compared` of them, drawn with a fixed seed, which
    bounds the memory that KID, precision and recall take. A damaged file is computed again.
    """
    path = cache / f"{digest(DEFINITION, _sha256(images), extractor.key, compared)}.safetensors"
    try:
        kept, _ = load_tensors(path)
    except UserError:  # missing or damaged
        kept = _reference(images, extractor, compared)
        save_tensors(path, kept, {})
    return Reference(Statistics(kept["mean"], kept["covariance"]), kept["features"], kept["logits"])


def _reference(images: np.ndarray, extractor: Extractor, compared: int) -> dict[str, Tensor]:
    keep = torch.zeros(len(images), dtype=torch.bool)
    keep[rng.generator(SEED, "compared images").permutation(len(images))[:compared]] = True
    rows = []

    def blocks() -> Iterator[Tensor]:
        for chosen, (features, logits) in zip(keep.split(BATCH), extract(images, extractor)):
            rows.append((features[chosen], logits[chosen]))
            progress.update(len(features))
            yield features

    with bar("features of real images", len(images)) as progress:
        found = statistics(blocks())
    features, logits = (torch.cat(parts) for parts in zip(*rows))  # (M, D), (M, K)
    return {**found._asdict(), "features": features, "logits": logits}


def _sha256(images: np.ndarray) -> str:
    found = hashlib.sha256(repr((images.shape, images.dtype)).encode())
    for batch in _batches(images):
        found.update(batch.tobytes())
    return found.hexdigest()


class Scorer:
    """Scores images against a study's real ones, split "train" and "test", on its evaluator.

    `evaluator`, `data`: the results of these stages. `cache`: where references are kept. `config`: the params section
    `evaluator`, if the network must be of that.

    Raises: UserError naming the file that is missing, damaged or of another configuration, and what to do.
    """

    def __init__(self, evaluator: Path, data: Path, cache: Path, device: torch.device, config: Any = None):
        weights = evaluator / "weights.safetensors"
        inception = read_metadata(weights).get("network") == "inception"
        if config is not None and inception != (config.network is None):
            there = "Inception" if inception else "a classifier"
            raise unusable(weights, f"is {there}, but params ask for the other")
        if inception:
            self.extractor = inception_extractor(device)
        else:
            classifier, _ = load_network(weights, config)
            self.extractor = classifier_extractor(classifier.to(device))
        images = {split: load(data, split, verify=True).images for split in ("train", "test")}
        self.references = {
            split: reference(each, self.extractor, cache, compared=COMPARED) for split, each in images.items()
        }
        self.train, self.test_size = images["train"], len(images["test"])

    def distances(self, images: Images) -> dict[str, float]:
        """Return `fd_train` and `fd_test` (with Inception `fid_...`) alone, in memory that does not grow."""
        return self._distances(self.statistics(images), self.references)

    def statistics(self, images: Images) -> Statistics:
        """Return the statistics of images' features, in memory that does not grow with their number."""
        return statistics(features for features, _ in extract(images, self.extractor))

    def scores(self, images: Images) -> dict[str, float]:
        """Return all scores by name.

        `distances`; `kid_train`, `kid_test`; `precision`, `recall` against train; `inception_score`; `n_samples`. KID,
        precision and recall, whose cost is quadratic, compare the first 10,000 images with as many real ones. Of more than
        these nothing is kept: memory does not grow with them.

        Raises: ValueError for fewer than 10 images.
        """
        found, parts = self._gathered(images)
        values = self._scores(found, self.references)
        if parts.count > COMPARED:
            values |= {"inception_score": parts.score(), "n_samples": parts.count}
        return values

    def _gathered(self, images: Images) -> tuple[Reference, Parts]:
        """Return the Reference that images make, those compared being the first, and the parts of their inception score."""
        kept, parts = [], Parts(SPLITS)

        def blocks() -> Iterator[Tensor]:
            for features, logits in extract(images, self.extractor):
                if parts.count < COMPARED:
                    kept.append((features, logits))
                parts.update(logits)
                yield features

        found = statistics(blocks())
        return Reference(found, *(torch.cat(side)[:COMPARED] for side in zip(*kept))), parts

    def floor(self, n_samples: int, seed: int) -> dict[str, dict[str, float]]:
        """Return the scores of real images in place of samples, {"test": scores, "halves": scores}.

        Both are of two real sets that share no image: what a perfect generator gets with as many samples against as many
        images. "test": the test images against all of train. "halves": training images against as many others, `n_samples`
        on either side, or half of train where that is fewer. `n_samples` and `n_reference` are the sizes of both sets.

        Raises: ValueError for fewer than 10 images.
        """
        size = min(n_samples, len(self.train) // 2)
        order = rng.generator(seed, "floor").permutation(len(self.train))
        (half, _), (other, _) = (
            self._gathered(self.train[chosen] for chosen in _batches(part))
            for part in order[: 2 * size].reshape(2, size)
        )
        sizes = {"n_samples": size, "n_reference": size}
        test = self._scores(self.references["test"], {"train": self.references["train"]})
        return {
            "test": {**test, "n_samples": self.test_size, "n_reference": len(self.train)},
            "halves": {**self._scores(half, {"train": other}), **sizes},
        }

    def _scores(self, found: Reference, references: Mapping[str, Reference]) -> dict[str, float]:
        compared, logits = found.features, found.logits
        count = len(logits)
        if count < SPLITS:
            raise ValueError(f"scores need at least {SPLITS} images, got {count}; sample more")
        values = self._distances(found.statistics, references)
        for split, real in references.items():
            sizes = len(compared), len(real.features)
            subset = min(KID_SUBSET, *sizes)
            # an image is drawn twice on average, as by 100 subsets of 50,000 images
            subsets = math.ceil(2 * max(sizes) / subset)
            values[f"kid_{split}"] = kid(compared, real.features, subsets=subsets, subset=subset, seed=SEED)
        device, real = self.extractor.device, references["train"].features
        values["precision"], values["recall"] = precision_recall(
            compared.to(device), real.to(device), neighbours=NEIGHBOURS
        )
        values["inception_score"] = inception_score(logits, splits=SPLITS, seed=SEED)
        values["n_samples"] = count
        return values

    def _distances(self, found: Statistics, references: Mapping[str, Reference]) -> dict[str, float]:
        what = self.extractor.distance
        return {f"{what}_{split}": frechet(found, real.statistics) for split, real in references.items()}
