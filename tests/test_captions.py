"""Captions of the committed figures: each has one, and every number that it quotes stands in the numbers drawn above it."""

import functools
import itertools
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from smoke import current_studies

ROOT = Path(__file__).parent.parent
EXECUTED = [path for study in current_studies() for path in sorted(study.glob("results/notebook/*/*.ipynb"))]
SAVED = re.compile(r'style\.save\(.*?out,\s*f?"([\w{}]+)"', re.S)
NUMBER = re.compile(r"(?<![\w.\-])\d[\d,]*\.\d+(?!\w)")  # with decimals: counts are words of the text


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: "-".join(path.parts[-5:-1]))
def test_a_caption_quotes_numbers_of_the_figures_above_it(path):
    files = []
    for cell in nbformat.read(path, 4).cells:
        names = [re.sub(r"\{.*\}", "*", name) for name in SAVED.findall(cell.source)]
        files += [file for name in names for file in path.parent.glob(f"{name}.csv")]
        if "caption" in cell.metadata.get("tags", []):
            quoted = NUMBER.findall("".join(output.data["text/markdown"] for output in cell.outputs))
            wrong = [number for number in quoted if not any(stands(number, file) for file in files)]
            assert not wrong, f"{path.parent.name}: {wrong} are not in {[file.name for file in files]}"


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: "-".join(path.parts[-5:-1]))
def test_a_figure_has_a_caption_for_its_study(path):
    study = yaml.safe_load((path.parents[3] / "params.yaml").read_text())["study"]["name"]
    cells = nbformat.read(ROOT / "notebooks" / path.name, 4).cells
    for cell, following in itertools.pairwise(cells):
        names = [re.sub(r"\{.*\}", "*", name) for name in SAVED.findall(cell.source)]
        drawn = [file.name for name in names for file in path.parent.glob(f"{name}.png")]
        said = f'"{study}":' in following.source if "caption" in following.metadata.get("tags", []) else False
        said |= following.cell_type == "markdown" and not following.source.startswith("#")
        assert said or not drawn, f"{path.name} says nothing of {drawn} in {study}"


def stands(number, file):
    """Return whether a number, rounded as it is quoted, is among those of a figure."""
    unit = 10.0 ** -len(number.partition(".")[2])
    return bool((np.abs(numbers(file) - float(number.replace(",", ""))) <= 0.5001 * unit).any())


@functools.cache
def numbers(file):
    """Return the numbers of a figure, those in its words, and their means over seeds."""
    frame = pd.read_csv(file).replace([np.inf, -np.inf], np.nan)
    words = frame.select_dtypes(exclude="number").stack().dropna().astype(str)
    found = [frame.select_dtypes("number").to_numpy().ravel()]
    found.append(np.array([float(word) for text in words for word in re.findall(r"\d+\.\d+", text)]))
    if {"run", "seed"} <= set(frame):
        others = [column for column in frame if column not in ("run", "seed")]
        for keys in [*itertools.combinations(others, 2), *itertools.combinations(others, 1), ()]:
            means = frame.groupby(["run", *keys], dropna=False).mean(numeric_only=True)
            found.append(means.to_numpy().ravel())
    values = np.concatenate(found).astype(float)
    return values[np.isfinite(values)]
