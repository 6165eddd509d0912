"""Shapes and types of every public signature are checked while the tests run."""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores; before torch is imported

import jaxtyping
import pytest
import torch
import yaml

jaxtyped = jaxtyping.jaxtyped


def jaxtyped_once(typechecker):
    """Return the decorator of all that is checked: not of functions within functions, which each call would check anew."""

    def decorated(checked):
        return checked if "<locals>" in checked.__qualname__ else jaxtyped(checked, typechecker=typechecker)

    return decorated


jaxtyping.jaxtyped = jaxtyped_once  # by which the hook checks functions and classes
jaxtyping.install_import_hook("equilab", "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that both processes have work until the end."""
    longest = [
        "test_study",
        "test_killed",
        "test_notebooks",
        "test_memory",
        "test_config",
        "test_students",
        "test_evaluate",
        "test_repository",
        "test_checkpoint_files",
        "test_fidelity",
        "test_latents",
        "test_pairs",
    ]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


def golden(name: str):
    """Return the tensors and the metadata (JSON where it is JSON) of a file of reference values."""
    from safetensors import safe_open

    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if metadata.get("config", "").startswith("{"):
        metadata["config"] = json.loads(metadata["config"])
    return tensors, metadata


def weights_of(tensors: dict) -> dict:
    """Return the published state dict stored in reference values, under its published keys."""
    return {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}


def close(ours, reference, tolerance: float) -> None:
    """Compare with a tolerance relative to the largest value of the reference."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * reference.abs().max().item())


@pytest.fixture
def facts() -> dict:
    """Return the counts and tables computed with the published implementations."""
    return json.loads((GOLDEN / "facts.json").read_text())


@pytest.fixture(scope="module")
def study_of_pairs(tmp_path_factory):
    """A study with its teacher and pairs, made in this process."""
    from smoke import called, write_study

    folder, before = write_study(tmp_path_factory.mktemp("study")), Path.cwd()
    try:
        for stage in ("data", "teacher", "pairs"):
            called(stage, "--params", str(folder / "params.yaml"))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def untrained_study(tmp_path_factory):
    """The results of a study whose runs were not trained."""
    from entries import write_untrained

    folder = tmp_path_factory.mktemp("study")
    write_untrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(untrained_study):
    """The results of a study that evaluates its runs."""
    from entries import EVALUATE

    params = {"study": {"name": "toy"}, "evaluate": EVALUATE}
    (untrained_study / "params.yaml").write_text(yaml.safe_dump(params))
    return untrained_study / "results"
