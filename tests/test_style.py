"""The look of figures: one for a family everywhere, plain numbers on logarithmic axes, the same bytes for the same data."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from equilab import style
from equilab.models.family import family
from equilab.models.registry import FAMILIES

RUNS = pd.DataFrame(
    {
        "run": ["get-m", "get-s", "get-s-long", "vit"],
        "label": ["GET", "GET", "GET", "ViT"],
        "parameters": [200, 100, 100, 150],
    }
)


@pytest.fixture(autouse=True)
def close_figures():
    with matplotlib.rc_context():
        style.use()
        yield
    plt.close("all")


def test_every_family_has_a_look_of_its_own():
    look = style.by_family()
    labels = [family(name).label for name in FAMILIES]
    assert set(look["palette"]) == set(look["markers"]) == set(labels)
    assert len({*look["palette"].values()}) == len({*look["markers"].values()}) == len(labels)


def test_runs_share_the_marker_of_their_family_and_are_darker_the_larger():
    look = style.by_run(RUNS)
    darkness = {run: -sum(matplotlib.colors.to_rgb(colour)) for run, colour in look["palette"].items()}
    assert look["markers"]["get-s"] == look["markers"]["get-m"] == family("get").marker
    assert darkness["get-m"] > darkness["get-s"]
    assert matplotlib.colors.same_color(look["palette"]["vit"], family("vit").colour)


def test_runs_of_a_family_can_be_told_apart_by_dashes_and_by_shade():
    look = style.by_run(RUNS)
    assert len({look["dashes"][run] for run in ("get-s", "get-s-long", "get-m")}) == 3
    assert len({matplotlib.colors.to_hex(colour) for colour in look["palette"].values()}) == len(RUNS)


def test_a_figure_is_saved_with_its_numbers_to_the_same_bytes_whatever_the_user_has_set(tmp_path):
    numbers = pd.DataFrame({"x": [1.0, 2.0], "y": [0.123456789, 3.0]})
    for name in ("first", "second"):
        matplotlib.rcParams.update({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30})
        style.use()
        figure, ax = style.panels(1, 2.0)
        ax.plot(numbers["x"], numbers["y"])
        style.save(figure, tmp_path / name, "line", numbers)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("first", "second")
    )
    assert first == second and set(first) == {"line.png", "line.csv"}
    assert first["line.csv"] == b"x,y\n1,0.123457\n2,3\n"
    assert Image.open(tmp_path / "first/line.png").mode in ("RGB", "RGBA")
    assert not plt.get_fignums()  # Jupyter would show it once more


@pytest.mark.parametrize("low, high", [(90, 130), (0.4, 9), (20, 900), (6e3, 5e4), (1e5, 3e8), (1e-7, 1)])
def test_a_logarithmic_axis_has_a_few_plain_numbers_within_its_range(low, high, tmp_path):
    figure, ax = style.panels(1, 2.0)
    ax.plot([low, high], [low, high])
    ax.set(xscale="log", yscale="log")
    style.save(figure, tmp_path, "log", pd.DataFrame())
    start, end = ax.get_xlim()
    shown = [tick for tick in ax.xaxis.get_major_ticks() if start <= tick.get_loc() <= end]
    texts = [tick.label1.get_text() for tick in shown]
    assert 2 <= len(texts) <= 9
    assert not [text for text in texts if "$" in text or "^" in text]


def test_one_legend_names_each_line_once():
    figure, axes = style.panels(2, 2.0)
    for ax in axes:
        ax.plot([0, 1], label="GET")
        ax.legend()
    axes[1].plot([1, 0], label="ViT")
    style.legend(figure)
    assert [ax.get_legend() for ax in axes] == [None, None]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GET", "ViT"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_as_it_is(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, channels, 4, 5)).astype(np.uint8)
    figure = style.images(images, ["above", "below"], ["a", "b", "c"])
    shown = [ax.get_images()[0] for ax in figure.axes]
    assert len(shown) == 6
    for each, image in zip(shown, images.reshape(6, channels, 4, 5)):
        np.testing.assert_array_equal(np.asarray(each.get_array()), image.transpose(1, 2, 0).squeeze())
    assert [ax.get_ylabel() for ax in figure.axes] == ["above", "", "", "below", "", ""]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]


def test_a_table_shows_numbers_in_four_digits_and_missing_ones_empty(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda value: shown.append(value.data))
    style.table(
        pd.DataFrame(
            {"run": ["a", None], "fd": [1.23456, np.nan], "nimg": [51200, 3], "holds": [True, False]}
        )
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[0].splitlines()[2:]]
    assert rows == [["a", "1.235", "51,200", "True"], ["", "", "3", "False"]]
