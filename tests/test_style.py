"""The look of figures: the same bytes whatever a user's settings, a colour and a marker of its own for every family."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from equilab import style

DATA = pd.DataFrame(
    {"run": ["get", "vit", "vit"], "label": ["GET", "ViT", "ViT"], "parameters": [1000, 1000, 5000]}
)


@pytest.fixture(autouse=True)
def settings():
    """Leave matplotlib as it was."""
    with mpl.rc_context():
        yield


def drawn(folder):
    style.use()
    figure, ax = style.panels(1)
    ax.plot(DATA["parameters"], [1.0, 2.0, 30.0], label="ours")
    ax.set(yscale="log")
    style.legend(figure)
    style.save(figure, folder, "ours", DATA)
    return (folder / "ours.png").read_bytes(), (folder / "ours.csv").read_bytes()


def test_the_same_data_give_the_same_bytes_whatever_the_user_has_set(tmp_path):
    first = drawn(tmp_path / "first")
    mpl.rcParams.update({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30})
    assert drawn(tmp_path / "second") == first
    assert pd.read_csv(tmp_path / "first/ours.csv").equals(DATA)


def test_families_are_told_apart_by_colour_and_by_marker():
    look = style.by_family()
    for key in ("palette", "markers"):
        assert len(set(look[key].values())) == len(look[key]), key


def test_runs_of_a_family_share_its_marker_and_are_told_apart():
    runs = pd.concat([DATA, DATA.iloc[[1]].assign(run="vit-long")])
    look, families = style.by_run(runs), style.by_family()
    assert {look["markers"][run] for run in ("vit", "vit-long")} == {families["markers"]["ViT"]}
    seen = {
        (tuple(np.round(mpl.colors.to_rgb(look["palette"][run]), 3)), look["dashes"][run])
        for run in runs["run"]
    }
    assert len(seen) == runs["run"].nunique()


def test_a_grid_of_images_has_a_row_for_each_name():
    style.use()
    figure = style.images(np.zeros((2, 3, 1, 8, 8), np.uint8), ["teacher", "student"])
    names = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert len(figure.axes) == 6 and names == ["teacher", "student"]
