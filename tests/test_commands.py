"""`sample` writes what others read, `score` reads what others write; each mistake is a sentence."""

import re

import numpy as np
import pytest
from PIL import Image
from smoke import write_study

from equilab import __main__, graph
from equilab.core.config import UserError, plain
from equilab.models.checkpoint import save_tensors
from equilab.sampling import command, opening
from equilab.score import score
from equilab.study import config_of, read

GET = "distill/get"


@pytest.fixture
def sample(results, capsys):
    """Return a call of the command on the GET; it gives what was printed."""

    def call(*arguments, of=GET):
        assert command.command([str(results / of), "--device", "cpu", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


def test_samples_are_a_grid_a_folder_or_what_evaluators_read(sample, results, tmp_path):
    for out in ("grid.png", "arrays.npz", "folder"):
        told = sample("--count", 5, "--out", tmp_path / out, "--seed", 2, "--iterations", 4)
        assert "5 images of distill/get, nfe 1, 4 iterations each" in told
    expected = opening.open_run(results / GET).sample(5, seed=2, iterations=4)
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays["arr_0"].transpose(0, 3, 1, 2), expected.images)
        assert np.array_equal(arrays["arr_1"], expected.labels)
    images = [np.array(Image.open(path)) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(images, expected.images[:, 0])
    assert Image.open(tmp_path / "grid.png").size[0] > 3 * 60


def test_options_are_given_by_their_names_with_values_as_in_params(sample, tmp_path):
    out = tmp_path / "a.npz"
    told = sample(
        "--out", out, "--count=2", "--label", "3,4", "--steps=2", "--blocks", 12, of="diffusion/fpdm"
    )
    assert "nfe 2, 8 iterations each" in told
    with np.load(out) as arrays:
        assert arrays["arr_1"].tolist() == [3, 4]
    for value in ("None", "null"):
        sample(
            "--out", tmp_path / f"{value}.PNG", "--method", "ddpm", "--eta", value, of="diffusion/fpdm"
        )  # ddpm has none


def test_a_label_that_is_no_class_is_told(capsys):
    with pytest.raises(SystemExit):
        command.command(["models/get", "--out", "a.png", "--label", "cat"])
    assert "'cat' is no class" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_every_stage_and_command_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    printed = "".join(capsys.readouterr())
    assert all(name in printed for name in (*graph.STAGES, *__main__.COMMANDS, *__main__.OWN))
    assert ended.value.code == (0 if arguments else 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "a.jpg"], "a.jpg .*GRID.png"),
        (["--out", "full"], "full "),
        (["--out", "full/file.png"], "full/file.png "),
        (["--out", "full/file.png/a.png"], "full/file.png .*folder"),
        (["--out", "a.png", "--iterations", "6", "--iterations=7"], "--iterations .*once"),
        (["--out", "a.png", "--iterations"], "--iterations .*--OPTION"),
        (["--out", "a.png", "six"], "six .*--OPTION"),
        (["--out", "a.png", "--iteration", "6"], "did you mean 'iterations'"),
        (["--out", "a.png", "--label", "12"], "label .*12"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    results,
    arguments,
    sentence,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file.png").touch()
    assert __main__.main(["sample", str(results / GET), *arguments]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The smoke study with its data and an evaluator that was not trained."""
    folder = write_study(tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert __main__.main(["data"]) == 0
    config = config_of(read(folder / "params.yaml"), "evaluator")
    about = {"stage": "evaluator", "image": [1, 8, 8], "classes": 10, "config": plain(config)}
    tensors = config.network.build((1, 8, 8), 10).state_dict()
    save_tensors(folder / "results/evaluator/weights.safetensors", tensors, about)
    return folder


@pytest.fixture
def scored(evaluated, tmp_path, monkeypatch):
    """Return the scores of images in a file that a function writes."""
    monkeypatch.chdir(tmp_path)
    return lambda name: score(tmp_path / name, evaluated / "params.yaml")


def test_the_same_images_score_the_same_however_they_are_kept(evaluated, scored, tmp_path, capsys):
    images = np.load(evaluated / "results/data/test_images.npy")[:60]
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "images.npz", images.transpose(0, 2, 3, 1))
    for number, image in enumerate(images):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(tmp_path / f"folder/{number:03d}.png")
    first = scored("images.npy")
    assert {"fd_train", "fd_test", "kid_train", "kid_test", "precision", "recall"} <= first.keys()
    assert first["n_samples"] == 60 and first["fd_test"] < first["fd_train"]
    assert re.search(r"\b100 .*\b60\b", capsys.readouterr().err)
    for other in ("images.npz", "folder"):
        assert scored(other) == pytest.approx(first, rel=1e-6)


def write(name, images):
    """Return what writes a file of images."""
    return lambda folder: (np.save if name.endswith(".npy") else np.savez)(folder / name, images)


def picture(mode):
    def write(folder):
        for number in range(12):
            Image.new(mode, (8, 8)).save(folder / f"{number}.png")

    return write


GREY = np.zeros((20, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("a.npy", write("a.npy", GREY[:7]), "7 images, .* 10 "),
        ("a.npy", write("a.npy", GREY.astype(float)), "float64 .* uint8"),
        ("a.npz", write("a.npz", np.zeros((20, 16, 16, 3), np.uint8)), r"uint8 \(20, 3, 16, 16\)"),
        ("a.npz", lambda folder: np.savez(folder / "a.npz", images=GREY), "arr_0"),
        ("a.npz", lambda folder: (folder / "a.npz").write_bytes(b"PK nothing"), "a.npz .*numpy.savez"),
        ("a.npy", lambda folder: None, "a.npy "),
        ("a.png", lambda folder: Image.new("L", (8, 8)).save(folder / "a.png"), "a.png .* zip"),
        ("", picture("RGB"), "data.image"),
        ("", picture("RGBA"), "neither .*RGB"),
        ("", lambda folder: None, "holds no image"),
        ("nowhere", lambda folder: None, "nowhere "),
    ],
)
def test_images_that_cannot_be_scored_are_told(scored, tmp_path, name, make, sentence):
    make(tmp_path)
    with pytest.raises(UserError, match=sentence):
        scored(name)


def test_a_study_without_an_evaluator_is_told(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(folder)
    np.save("a.npy", GREY)
    asked = f"--params {folder / 'params.yaml'}"
    with pytest.raises(UserError, match=f"equilab data {asked}` and `python -m equilab evaluator {asked}`"):
        score(tmp_path / "a.npy", folder / "params.yaml")
