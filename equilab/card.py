"""`python -m equilab card PATH [--out FOLDER]`: a run as a folder to give away: weights, config, and a card that says what it is."""

from __future__ import annotations

import argparse
import inspect
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from equilab.claims.tests import SEEDS, mean
from equilab.core.config import UserError, plain
from equilab.core.files import write, write_json
from equilab.core.like import read
from equilab.sampling.generators import Generator
from equilab.sampling.hub import FILES
from equilab.sampling.opening import find_weights, open_run, study_of
from equilab.stages.report import interval
from equilab.tables import SCORES, Results

CONFIDENCE = 0.95  # of an interval over seeds
BUDGET = {
    "nimg": "training images seen",
    "optimisation.batch": "images in an update",
    "train_flops": "FLOPs of the training",
    "pairs": "noise/image pairs of the teacher",
    "teacher_calls": "evaluations of the teacher",
}
COST = ("nfe", "iterations", "block_evals", "flops")


def command(arguments: list[str]) -> int:
    """Print the card of a run, or write the folder to give away."""
    parser = argparse.ArgumentParser(prog="equilab card", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="the folder of a run, such as models/get")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="a new folder; without it the card is printed"
    )
    given = parser.parse_args(arguments)
    if given.out is None:
        print(card(find_weights(Path(given.path))), end="")
    else:
        give(given.path, given.out)
        print(f"{given.out}: {', '.join(FILES)}")
    return 0


def give(path: Path | str, out: Path) -> None:
    """Write the weights of a run, what it takes to sample them, and its card into a new folder.

    Raises: UserError if the run has no weights, or the folder is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give a new folder, or remove it")
    weights = find_weights(Path(path))
    text, model = card(weights), open_run(weights, device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, out / "weights.safetensors")
    about = {"of": model.run.of, "setting": model.setting, "config": model.metadata["config"]}
    write_json(out / "config.json", about)
    write(out / "README.md", text)


def card(weights: Path) -> str:
    """Return the card of a run, in Markdown: what it is, its data, budget, scores with intervals, limits and licence.

    A folder that was given away has its card already.

    Raises: UserError if the weights, or results of the study that they lie in, are damaged.
    """
    study = study_of(weights)
    if study is None and all(weights.with_name(name).exists() for name in FILES):
        return weights.with_name("README.md").read_text(encoding="utf-8")
    model = open_run(weights, device="cpu")
    params = read(study / "params.yaml") if study else {}
    rows = pd.DataFrame()
    if study and any((study / "results").glob("evaluate/*/*/metrics.json")):
        rows = Results(study / "results").runs
        rows = rows[rows["of"] == model.run.of]
        if model.metadata.get("seed", rows["seed"].min()) not in rows["seed"].tolist():
            rows = pd.DataFrame()  # others may have been evaluated, this seed has not
    parts = [_head(model, params), _loading(model), _data(params), _budget(model, rows), _scores(model, rows)]
    return "\n\n".join([*parts, _limits(model, rows), _licence(model)]) + "\n"


def _yaml(value: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(plain(value), sort_keys=False)}```"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _head(model: Generator, params: dict[str, Any]) -> str:
    """Return what the model is."""
    run, family = model.run, model.run.family
    licence = "other" if "published" in model.metadata else "mit"
    tags = f"---\nlibrary_name: equilab\nlicense: {licence}\ntags: [equilab, {family.label}, image-generation]\n---"
    study = f" of the study {params['study']['name']}" if params else ""
    documented = inspect.getdoc(family.network).splitlines()
    source = next((line for line in documented if line.startswith("Source:")), "")
    classes = f"of {run.classes} classes" if run.classes else "without classes"
    size = " x ".join(map(str, run.shape))
    makes = "latents" if _in_latents(model) else "images"
    what = f"It makes {makes} ({size}) {classes}, and has {model.metadata['parameters']:,} parameters."
    return "\n\n".join(
        [tags, f"# {family.label}: {run.of}{study}", f"{documented[0]} {source}".strip(), what]
    )


def _in_latents(model: Generator) -> bool:
    """Return whether an autoencoder makes images of what the model makes."""
    return model.vae is not None or model.run.in_latents


def _loading(model: Generator) -> str:
    """Return how the model is loaded."""
    vae, option = (', vae="FOLDER"', " --vae FOLDER") if _in_latents(model) else ("", "")
    code = f'import equilab\n\nmodel = equilab.load("PATH"{vae})  # of this folder, or "hf://owner/name"'
    shell = f"`python -m equilab sample PATH{option} --out grid.png` draws from a shell."
    return f"## How to load it\n\n```python\n{code}\nsamples = model.sample(16, seed=0)\n```\n\n{shell}"


def _data(params: dict[str, Any]) -> str:
    """Return what the model was trained on."""
    said = params.get("data")
    return "## Data\n\n" + (
        _yaml({"data": said}) if said else "Its study is not beside it, so its data are not known."
    )


def _budget(model: Generator, rows: pd.DataFrame) -> str:
    """Return what the training took, and how the model is built."""
    if (published := model.metadata.get("published")) is not None:
        told = ", ".join(f"{key} {value}" for key, value in published.items() if value)
        spent = f"Not trained here: its weights are published ones ({told})."
    elif rows.empty:
        spent = f"It has seen {model.metadata['nimg']:,} training images."
    else:
        row = rows.iloc[0]
        known = [
            (words, f"{row[name]:,.4g}" if row[name] >= 1e7 else f"{row[name]:,.0f}")
            for name, words in BUDGET.items()
            if name in rows and not pd.isna(row[name])
        ]
        spent = _table(("budget", ""), known)
    return f"## Budget\n\n{spent}\n\nIts config:\n\n{_yaml(model.metadata['config'])}"


def _scores(model: Generator, rows: pd.DataFrame) -> str:
    """Return cost and scores at the headline setting: of this seed, and of all, with an interval."""
    setting, at = model.setting or model.run.usual(), "## Scores\n\n"
    if setting is not None:
        at += f"At this setting, which `sample` takes unless told otherwise:\n\n{_yaml(setting)}\n\n"
    if rows.empty:
        return f"{at}It has not been evaluated."
    own = rows[rows["seed"] == model.metadata.get("seed", rows["seed"].iloc[0])].iloc[0]
    cost = ", ".join(f"{name} {own[name]:,.6g}" for name in COST if name in rows and not pd.isna(own[name]))
    names = [name for name in rows if name.startswith(SCORES) and not rows[name].isna().any()]
    columns = [("score", *names), (f"seed {own['seed']}", *(f"{own[name]:.4g}" for name in names))]
    if len(rows) > 1:
        columns.append((f"all {len(rows)} seeds", *(_over_seeds(rows[name]) for name in names)))
    head, *scored = zip(*columns)
    table = _table(head, scored)
    return f"{at}An image costs {cost}.\n\n{table}"


def _over_seeds(values: pd.Series) -> str:
    """Return the geometric mean over seeds and its interval by Student's t on logarithms; without enough seeds, their range."""
    if len(values) < SEEDS or (values <= 0).any():
        return f"{values.min():.4g} to {values.max():.4g}"
    low, high = interval(values, CONFIDENCE)
    return f"{mean(values):.4g} ({low:.4g} to {high:.4g})"


def _limits(model: Generator, rows: pd.DataFrame) -> str:
    """Return what the scores do not say."""
    limits = [
        "It draws what its training images show, their faults and their classes included, and nothing else."
    ]
    if "fd_train" in rows:
        limits.append(
            "`fd` and `kid` are on the features of the study's own classifier: they compare models of the study alone."
        )
    if 0 < len(rows) < SEEDS:
        limits.append(
            f"Scores are of {len(rows)} seed{'s' * (len(rows) > 1)}; another seed may differ by more than models do."
        )
    elif len(rows):
        limits.append(
            f"In brackets are intervals of {CONFIDENCE:.0%} over seeds, by Student's t on logarithms."
        )
    if _in_latents(model):
        limits.append("It makes latents: give the folder of their autoencoder as `vae`.")
    return "## Limits\n\n" + "\n".join(f"- {each}" for each in limits)


def _licence(model: Generator) -> str:
    """Return under which terms the folder may be used."""
    if "published" in model.metadata:
        return "## Licence\n\nThe weights are the authors': their licence holds. The code, equilab, is under MIT."
    return "## Licence\n\nMIT, as the code, equilab; the licence of the training images may ask for more."
