"""A new model is added in three places: its own file, a line of the registry, and params. Two toys, in a copy of the package,
are trained, evaluated, costed, claimed about and shown in a notebook."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from equilab.core import like

ROOT = Path(__file__).parent.parent

ONE_STEP = '''
"""A toy of one step: a layer from noise and class to an image."""

import math

import torch
from torch import nn

from equilab.diffusion.protocols import Generated
from equilab.models.family import Family


class MLP(nn.Module):
    def __init__(self, image: tuple[int, int, int], classes: int, *, width: int):
        super().__init__()
        self.image, size = image, math.prod(image)
        self.embedding = nn.Embedding(max(classes, 1), width)
        self.inner, self.outer = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, noise, label):
        known = torch.zeros(len(noise), dtype=torch.int64, device=noise.device) if label is None else label
        hidden = (self.inner(noise.flatten(1)) + self.embedding(known)).relu()
        return Generated(self.outer(hidden).unflatten(1, self.image), None)


FAMILY = Family(
    name="mlp",
    label="MLP",
    colour="#777777",
    marker="P",
    stage="distill",
    kind="mlp",
    network=MLP,
    implicit=False,
    layered=False,
    published=None,
)
'''

DENOISER = '''
"""A toy denoiser of timesteps: two convolutions."""

from torch import nn

from equilab.models.family import Family


class Convolutions(nn.Module):
    def __init__(self, image: tuple[int, int, int], classes: int, *, width: int):
        super().__init__()
        self.inner = nn.Conv2d(image[0], width, 3, padding=1)
        self.time, self.outer = nn.Linear(1, width), nn.Conv2d(width, image[0], 3, padding=1)

    def forward(self, x, t, label):
        time = self.time(t[:, None].to(x.dtype) / 100)
        return self.outer((self.inner(x) + time[:, :, None, None]).relu())


FAMILY = Family(
    name="convolutions",
    label="Convolutions",
    colour="#222222",
    marker="X",
    stage="diffusion",
    kind="convolutions",
    network=Convolutions,
    implicit=False,
    layered=False,
    published=None,
)
'''

CLAIM = """
  - id: X-TOY
    claim: an MLP has fewer parameters than a ViT
    where: this study
    published: "–"
    comparison: mlp against vit
    test: cheaper
    measure: null
    cost: parameters
    hypotheses: {holds: it has no depth, fails: it is wide}
"""

NOTEBOOK = {
    "parameters": 'results = "results"\nout = "figures"',
    "": "import equilab\ntables = equilab.results(results)\nprint(tables.runs[['of', 'family', 'label', 'parameters']])",
}

COMMANDS = (
    "check",
    "data",
    "evaluator",
    "teacher",
    "pairs",
    "distill mlp",
    "distill vit",
    "diffusion convolutions",
    "evaluate mlp",
    "evaluate vit",
    "evaluate convolutions",
    "cost",
    "claims",
    "notebook toy",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the package to which both toys are added: two files, two lines of the registry; and a claim and a notebook."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "equilab", root / "equilab", ignore=shutil.ignore_patterns("__pycache__"))
    models, registry = root / "equilab/models", root / "equilab/models/registry.py"
    (models / "mlp.py").write_text(ONE_STEP)
    (models / "convolutions.py").write_text(DENOISER)
    lines = "".join(f'    "{name}": "equilab.models.{name}",\n' for name in ("mlp", "convolutions"))
    registry.write_text(registry.read_text().replace("FAMILIES = {\n", "FAMILIES = {\n" + lines))
    with open(root / "equilab/claims/x.yaml", "a") as file:
        file.write(CLAIM)
    (root / "notebooks").mkdir()
    cells = [
        {"cell_type": "code", "metadata": {"tags": [tag] if tag else []}, "source": source, "outputs": []}
        | {"execution_count": None, "id": f"cell-{tag}"}
        for tag, source in NOTEBOOK.items()
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (root / "notebooks/toy.ipynb").write_text(json.dumps(notebook))
    return root


def params():
    """Return the smoke study with the two toys, and little beside them."""
    smoke = like.read(ROOT / "studies/smoke/params.yaml")
    vit, dit = smoke["distill"]["vit"], smoke["diffusion"]["dit"]
    chain = {**smoke["evaluate"]["dit"]["chain"][0], "fixed_point": None}
    plain = {key: smoke["evaluate"]["vit"][key] for key in ("batch", "precision")}
    plain |= {"sampler": [], "solver": [], "chain": []}
    return {
        "study": {**smoke["study"], "root": "../.."},
        **{name: smoke[name] for name in ("data", "evaluator", "teacher", "pairs")},
        "distill": {"vit": vit, "mlp": {**vit, "network": {"kind": "mlp", "width": 16}}},
        "diffusion": {
            "convolutions": {
                **dit,
                "network": {"kind": "convolutions", "width": 8},
                "diffusion": {**dit["diffusion"], "variance": "small"},
            }
        },
        "evaluate": {
            "vit": {**plain, "of": "distill/vit"},
            "mlp": {**plain, "of": "distill/mlp"},
            "convolutions": {**plain, "of": "diffusion/convolutions", "chain": [chain]},
        },
        "cost": {**smoke["cost"], "runs": ["distill/vit", "distill/mlp", "diffusion/convolutions"]},
        "comparisons": {"mlp against vit": {"runs": ["distill/mlp"], "baseline": ["distill/vit"]}},
        "claims": {"confidence": 0.95},
        "notebook": {"toy": {"parameters": {}}},
        "report": {"title": "toys"},
    }


@pytest.mark.slow
def test_toys_in_three_places_are_trained_evaluated_costed_claimed_about_and_shown(repository):
    study = repository / "studies/toys"
    study.mkdir(parents=True)
    (study / "params.yaml").write_text(yaml.safe_dump(params()))
    run = f"from equilab.__main__ import main\nfor line in {COMMANDS!r}:\n    assert main(line.split()) == 0, line"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=study, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = study / "results"
    for name, of in (("mlp", "distill/mlp"), ("convolutions", "diffusion/convolutions")):
        metrics = json.loads((results / "evaluate" / name / "0/metrics.json").read_text())
        assert (metrics["family"], metrics["of"]) == (name, of) and metrics["flops"] > 0
    costs = pd.read_csv(results / "cost/cost.csv")
    assert {"mlp", "convolutions"} <= set(costs["family"]) and (costs["seconds"] > 0).all()
    assert {"sample", "call", "train"} == set(costs["what"])
    claims = pd.read_csv(results / "claims/x.csv", keep_default_na=False).set_index("id")
    assert list(claims.index) == ["X-TOY"] and claims.loc["X-TOY", "verdict"] in ("holds", "fails")
    shown = (results / "notebook/toy/toy.ipynb").read_text()
    assert "MLP" in shown and "Convolutions" in shown
