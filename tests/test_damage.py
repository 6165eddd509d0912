"""Whatever happens to a file of results: it is read as it was, or refused in a sentence that names it."""

import json
from pathlib import Path
from types import SimpleNamespace

import made
import numpy as np
import pytest
import torch

import equilab
from equilab.core import checked, files
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.data import images, latents
from equilab.data.pairset import PairSet, noise_checksum
from equilab.models import checkpoint
from equilab.stages import relative, report

SHAPE = (1, 4, 4)
RUN = {"of": "distill/get", "seed": 0, "family": "get"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study's folder with a file of every kind, as the stages write them."""
    study = tmp_path_factory.mktemp("study")
    runs = {"distill/get": {"fd": [2.0], "curve": [{"nimg": 500, "times": 2.0}]}}
    sections = {"notebook": {"scaling": {"parameters": {}}}, "claims": {"confidence": 0.95}}
    results = made.write_study(study, runs, **sections)
    files.write(results / "scoreboard.md", "words")
    seconds = dict.fromkeys(("seconds", "seconds_min", "seconds_max", "memory_mib"), 0.5)
    active = {"layer": "state", "depth": 0, "step": 1, "at": 2.0, "mean": 0.5, "rms": 0.5}
    made.table(results / "cost/cost.csv", [{**RUN, "what": "sample", "iterations": 6, **seconds}])
    made.table(results / "activation/activation.csv", [{**RUN, **active}])
    made.table(
        results / "relative/relative.csv", [{"seed": 0, "first": "get", "second": "cd", "distance": 1.5}]
    )
    write_arrays(results)
    about = {"nimg": 1000, "log": [{"nimg": 500, "loss": 0.25}], "image": SHAPE}
    checkpoint.save_tensors(results / "weights.safetensors", {"weight": torch.arange(30.0)}, about)
    cell = {"cell_type": "code", "source": ["words"], "metadata": {}}
    made.keep(results / "notebook/scaling/scaling.ipynb", {"cells": [cell]})
    return study


def write_arrays(results):
    """Write arrays of the stages data, pairs, latents and evaluate."""
    pixels = np.arange(96, dtype=np.uint8).reshape(6, *SHAPE)
    sha256 = {}
    for split in ("train", "test"):
        sha256[f"{split}_images.npy"] = files.write_array(results / f"data/{split}_images.npy", pixels)
        sha256[f"{split}_labels.npy"] = files.write_array(results / f"data/{split}_labels.npy", np.arange(6))
    described = {"counts": {"train": 6, "test": 6}, "shape": SHAPE, "classes": 6, "sha256": sha256}
    files.write_json(results / "data/meta.json", described)
    shard = {"images": 6, "sha256": files.write_array(results / "pairs/images-0000000000.npy", pixels)}
    numbers = {"count": 4, "held_out": 2, "classes": 6, "seed": 3, "shard": 6}
    described = {"shape": SHAPE, "dtype": "uint8", "shards": {"images-0000000000.npy": shard}}
    made_by = {"noise_checksum": noise_checksum(3, SHAPE), "teacher": "0f"}
    files.write_json(results / "pairs/meta.json", {**numbers, **described, **made_by})
    sha256 = files.write_array(results / "latents/latents-0000000000.npy", pixels.astype(np.float32))
    described = {
        "shape": SHAPE,
        "count": 6,
        "data": files.sha256_of(results / "data/meta.json"),
        "vae": "0f",
        "shards": {"latents-0000000000.npy": sha256},
    }
    files.write_json(results / "latents/meta.json", described)
    sha256 = files.write_array(results / "evaluate/get/0/samples.npy", pixels)
    path = results / "evaluate/get/0/metrics.json"
    scored = {**json.loads(path.read_text()), "settings": 1, "n_samples": 6, "samples_sha256": sha256}
    files.write_json(path, scored)


def of_tables(*names):
    def read():
        found = equilab.results("results")
        return [getattr(found, name).to_csv() for name in names]

    return read


def of_data():
    return [images.load(Path("results/data"), split, verify=True) for split in ("train", "test")]


def of_pairs():
    pairs = PairSet(Path("results/pairs"))
    pairs.verify()
    return pairs.images, pairs.count, pairs.held_out, pairs.classes, pairs.seed


def job(stage):
    study = Study(name="made", root=".", seed=0, threads=1, run_threads=1, device="cpu")
    config = SimpleNamespace(network=None)  # of the evaluator
    return Job(study, stage, None, None, SHAPE, 6, "", lambda *_: config, lambda *_: (0,))


def of_samples():
    """Return the images that the stage `relative` compares, of two runs that are the same."""
    scorer = SimpleNamespace(statistics=lambda images: images.tolist())
    compared = []

    def frechet(first, second):
        compared.append((first, second))
        return 0.0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relative, "Scorer", lambda *_: scorer)
        patched.setattr(relative, "frechet", frechet)
        patched.setattr(relative, "folder_of", lambda *_: Path("results/evaluate/get/0"))
        relative.run(relative.Config(runs=("get", "again")), job("compared"))
    return compared


def of_notebook():
    """Return the page that the stage `report` makes of a notebook."""
    report.run(report.Config(title="made"), job("report"))
    return Path("results/report/notebook-scaling.html").read_text()


READERS = {
    "evaluate/get/0/metrics.json": of_tables("settings"),
    "evaluate/get/0/sweep.csv": of_tables("settings"),
    "evaluate/get/0/curve.csv": of_tables("snapshots"),
    "evaluate/get/0/iterates.npz": lambda: equilab.results("results").iterates("distill/get"),
    "evaluate/get/0/samples.npy": of_samples,
    "distill/get/0/summary.json": of_tables("runs"),
    "distill/get/0/log.csv": lambda: equilab.results("results").log("distill/get").to_csv(),
    "evaluator/summary.json": of_tables("floor"),
    "cost/cost.csv": of_tables("costs"),
    "activation/activation.csv": of_tables("activation"),
    "relative/relative.csv": of_tables("relative"),
    "data/meta.json": of_data,
    "data/test_images.npy": of_data,
    "data/train_labels.npy": of_data,
    "pairs/meta.json": of_pairs,
    "pairs/images-0000000000.npy": of_pairs,
    "latents/meta.json": lambda: latents.Encoded(Path("results/latents")).shards,
    "latents/latents-0000000000.npy": lambda: latents.Encoded(Path("results/latents")).shards,
    "weights.safetensors": lambda: checkpoint.load_tensors(Path("results/weights.safetensors")),
    "notebook/scaling/scaling.ipynb": of_notebook,
}


# what stages need not have written
OPTIONAL = (
    *(f"{stage}/{stage}.csv" for stage in ("cost", "activation", "relative")),
    "settings",
    "flops_image",
)


def damages(name, content):
    """Yield what may become of a file, by what happened to it."""
    if name not in OPTIONAL:
        yield "removed", None
    yield "empty", b""
    yield "a zip", b"PK\x03\x04" + content[4:]
    yield "zeros", bytes(len(content))
    yield "no text", b"\xff\xfe" + content
    for cut in (len(content) // 2, len(content) - 1):
        yield f"cut to {cut}", content[:cut]
    if name.endswith((".npy", ".npz", ".safetensors")):
        yield "longer", content + b"x"
        for place in {0, 8, 20, 60, len(content) // 2, len(content) - 40}:
            yield f"flipped at {place}", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    if name.endswith((".json", ".ipynb")):
        value = json.loads(content)
        yield from ((text, text.encode()) for text in ("[]", "3", "null", "{}", '"text"', "[" * 20_000))
        for key in value:
            for other in ("text", -0.5, {}) if key.endswith(OPTIONAL[-2:]) else (None, "text", -0.5, {}):
                yield f"{key}: {other}", json.dumps({**value, key: other}).encode()
    if name.endswith(".csv"):
        lines = content.decode().splitlines(keepends=True)
        yield "no rows", lines[0].encode()
        yield "no line but its end", b"\n"
        yield "a cell less", (lines[0] + lines[1].rpartition(",")[0] + "\n").encode()
        yield "no numbers", (lines[0] + ",".join(["x"] * len(lines[0].split(","))) + "\n").encode()
        columns = [line.rstrip("\n").split(",") for line in lines]
        yield "the first column only", "".join(f"{line[0]}\n" for line in columns).encode()


def same(one, other):
    """Return whether two readings, nested as they may be, are equal."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other)) if isinstance(one, (np.ndarray, torch.Tensor)) else one == other


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_result_is_refused_or_read_as_it_was(name, whole, monkeypatch):
    monkeypatch.chdir(whole)
    path, read = Path("results", name), READERS[name]
    content, before = path.read_bytes(), read()
    wrong = []
    try:
        for damage, damaged in damages(name, content):
            path.unlink(missing_ok=True) if damaged is None else path.write_bytes(damaged)
            try:
                found = read()
            except UserError as error:
                if not any(word in str(error) for word in (*path.parts[-2:], "no evaluated run")):
                    wrong.append(f"{damage}: {error}")
            except Exception as error:
                wrong.append(f"{damage}: {type(error).__name__} {str(error).partition(chr(10))[0]}")
            else:
                if not same(before, found):
                    wrong.append(f"{damage}: read as something else")
    finally:
        path.write_bytes(content)
    assert not wrong, "\n".join(wrong)


def test_a_table_that_is_cut_short_between_two_rows_is_refused(whole, monkeypatch):
    monkeypatch.chdir(whole)
    path = Path("results/evaluate/get/0/metrics.json")
    content = path.read_text()
    files.write_json(path, {**json.loads(content), "settings": 2})
    try:
        with pytest.raises(UserError, match=r"sweep.csv is damaged .*1 rows of 2"):
            of_tables("settings")()
    finally:
        path.write_text(content)


def test_weights_that_were_written_before_their_metadata_had_a_checksum_are_read(whole, monkeypatch):
    monkeypatch.setattr(checkpoint, "OF_METADATA", "metadata_checksum_of_later")
    path = whole / "results/older.safetensors"
    checkpoint.save_tensors(path, {"weight": torch.ones(2)}, {"nimg": 3})
    monkeypatch.undo()
    tensors, metadata = checkpoint.load_tensors(path)
    assert tensors["weight"].tolist() == [1, 1] and metadata["nimg"] == 3


def test_unfinished_work_that_is_damaged_says_how_to_clear_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = files.SCRATCH / "distill@get-0/state.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="python -m equilab clean distill@get-0"):
        checkpoint.load_tensors(path)


def test_a_zip_of_arrays_has_those_that_are_needed(tmp_path):
    files.write_arrays(tmp_path / "a.npz", {"images": np.zeros(3)})
    assert checked.read_arrays(tmp_path / "a.npz", "images")["images"].shape == (3,)
    with pytest.raises(UserError, match="it has no trace"):
        checked.read_arrays(tmp_path / "a.npz", "trace")
