"""Three lines: a model by its path, samples of it, and what is said where that cannot be."""

import inspect
import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import golden, weights_of
from entries import ENTRIES, IMAGE
from PIL import Image
from smoke import ROOT

import equilab
from equilab.core.config import UserError
from equilab.sampling.settings import changed


def model(results, of, **how):
    return equilab.load(results / of, device="cpu", **how)


@pytest.mark.parametrize("of", ENTRIES)
def test_three_lines_make_images_of_every_family_whatever_the_batch(results, of):
    found = model(results, of)
    samples, parts = found.sample(6, seed=3), found.sample(6, seed=3, batch=4)
    assert samples.images.shape == (6, *IMAGE) and samples.images.dtype == np.uint8
    assert abs(samples.images.astype(int) - parts.images).max() <= 1
    assert np.array_equal(samples.labels, parts.labels) and len(samples) == 6
    assert samples.nfe == {"teacher": 5, "consistency/cd": 2, "progressive/pd": 3}.get(
        of, 4 if "diffusion" in of else 1
    )
    assert not np.array_equal(samples.images, found.sample(6, seed=4).images)
    if of in ("distill/get", "diffusion/fpdm"):
        assert samples.residuals.shape == (6, samples.iterations[0]) and (samples.residuals > 0).all()
        assert samples.iterations.tolist() == [2 if of == "distill/get" else 12] * 6
    else:
        assert samples.iterations is None and samples.residuals is None


def test_the_first_images_are_those_of_the_evaluation(results):
    get = model(results, "distill/get")
    inputs = get.inputs(0, np.arange(3), get.setting)
    expected = get.pixels.decode(get.generate(inputs, get.setting).image).numpy()
    assert np.array_equal(get.sample(3).images, expected)


def test_a_label_is_of_all_images_or_of_each(results):
    get = model(results, "distill/get")
    assert get.sample(3, label=7).labels.tolist() == [7, 7, 7]
    each = get.sample(3, label=[1, 7, 2])
    assert each.labels.tolist() == [1, 7, 2]
    assert np.array_equal(each.images[1], get.sample(3, label=torch.tensor([1, 7, 2])).images[1])
    assert np.array_equal(each.images[1], get.sample(3, label=7).images[1])
    for label in (10, -1, [1, 2], np.ones(3)):
        with pytest.raises(UserError, match="^label is"):
            get.sample(3, label=label)
    with pytest.raises(UserError, match="^label is"):
        equilab.published.load("get", weights_of(golden("get_uncond")[0]), heads=2).sample(2, label=1)


def test_options_change_the_setting_by_their_names(results):
    get, fpdm = model(results, "distill/get"), model(results, "diffusion/fpdm")
    assert get.sample(2, iterations=5, method="anderson", memory=3, mixing=1.0).iterations.tolist() == [5, 5]
    assert fpdm.sample(2, steps=2, blocks=10, budget="decreasing").iterations.tolist() == [6, 6]
    guided = fpdm.sample(2, guidance_scale=2.0, guidance_channels="all")
    assert guided.nfe == 8 and guided.iterations.tolist() == [24, 24]
    assert fpdm.sample(2, solver="anderson", memory=2, mixing=0.5).nfe == 4
    assert model(results, "teacher").sample(1, steps=2).nfe == 3


@pytest.mark.parametrize(
    ("of", "options", "sentence"),
    [
        ("distill/get", {"iteration": 3}, "GET .*'iteration'; did you mean 'iterations'"),
        ("distill/vit", {"iterations": 3}, "iterations .* GET, .* ViT, "),
        ("distill/get", {"guidance_scale": 3.0}, "guidance_scale .* FPDM, DiT, .* GET"),
        ("diffusion/dit", {"blocks": 30}, "blocks .* FPDM, .* DiT"),
        ("consistency/cd", {"colour": 1}, "CD .*'colour'"),
        ("distill/get", {"iterations": 0}, "option.iterations"),
        ("distill/get", {"init": "zero"}, "did you mean 'zeros'"),
        ("diffusion/fpdm", {"guidance_channels": "all"}, "option.guidance_scale: "),
        ("diffusion/fpdm", {"budget": 3}, "option.budget: 3 .*constant, increasing"),
        ("diffusion/fpdm", {"budget": "constent"}, "did you mean 'constant'"),
        ("diffusion/fpdm", {"memory": 3}, "option.solver: memory .*mixing"),
        ("diffusion/fpdm", {"method": "ddpm", "eta": 0.5}, "eta .*0.5.* ddpm"),
        ("diffusion/fpdm", {"blocks": 3}, "FPDM: blocks .* 3\\b.* 4 "),
        ("distill/get", {"count": 0}, "count .* 0; .* 1 "),
        ("distill/get", {"batch": 0}, "batch is 0"),
        ("distill/get", {"seed": -1}, "seed .* -1; .* 0 "),
        ("distill/get", {"seed": 2**70}, "seed .* 2[*][*]63 - 1"),
    ],
)
def test_an_option_that_cannot_be_is_told_with_the_remedy(results, of, options, sentence):
    with pytest.raises(UserError) as error:
        model(results, of).sample(**{"count": 2, **options})
    assert re.search(sentence, str(error.value)) and "\n" not in str(error.value)


def test_another_method_brings_along_what_it_needs(results):
    get, fpdm, dit = (model(results, of) for of in ("distill/get", "diffusion/fpdm", "diffusion/dit"))

    def same(found, short, long):
        assert np.array_equal(found.sample(2, **short).images, found.sample(2, **long).images)

    anderson, plainly = {"memory": 5, "mixing": 1.0}, {"memory": None, "mixing": None}
    same(get, {"method": "anderson"}, {"method": "anderson", **anderson})
    same(fpdm, {"solver": "anderson"}, {"solver": "anderson", **anderson})
    same(fpdm, {"method": "ddpm"}, {"method": "ddpm", "eta": None})
    assert dit.sample(2, method="ddpm").nfe == 4
    drawn = replace(dit, setting=changed(dit.setting, {"method": "ddpm"}))
    same(drawn, {"method": "ddim"}, {"method": "ddim", "eta": 0.0})
    fast = replace(get, setting=changed(get.setting, {"method": "anderson", "memory": 3}))
    same(fast, {"method": "iterate"}, {"method": "iterate", **plainly})
    assert changed(fast.setting, {"method": "torchdeq_anderson"}).memory == 3
    same(fpdm, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_channels": "first_three"})


# what a type checker would find, without one
AS_TYPED = """
import numpy as np
import equilab
model = equilab.load("models/get", device="cpu")
images = np.zeros((2, 1, 8, 8), np.uint8)
for call in (
    lambda: equilab.load("models/get", precision="fp16"),
    lambda: model.sample(1, label="3"),
    lambda: equilab.published.load("get", {"a": 1}),
    lambda: equilab.published.load("get", {"a": np.zeros(3)}),
    lambda: equilab.published.load("get", None),
    lambda: equilab.show(images / 255),
    lambda: equilab.show(images[0]),
    lambda: equilab.show(images.transpose(0, 2, 3, 1)),
    lambda: equilab.show(images[:0]),
    lambda: equilab.show("images"),
    lambda: equilab.show(images, columns=-1),
):
    try:
        call()
    except equilab.UserError as error:
        print(error)
"""


def test_values_of_another_type_are_told():
    done = subprocess.run([sys.executable, "-c", AS_TYPED], cwd=ROOT, capture_output=True, text=True)
    expected = [
        "'fp16'; give one of fp32, tf32, bf16",
        "label is '3'",
        "int under 'a'",
        "ndarray under 'a'",
        "weights is None",
    ]
    shown = ["float64", r"\(1, 8, 8\)", r"\(2, 8, 8, 1\)", r"\(0, 1, 8, 8\)", "are str;", "columns is -1"]
    told = done.stdout.splitlines()
    assert len(told) == len(expected + shown), done.stderr
    for line, sentence in zip(told, expected + shown):
        assert re.search(sentence, line)


def test_a_model_is_told_in_a_line(results):
    told = repr(model(results, "distill/get"))
    assert "distill/get" in told and "fp32 on cpu" in told and len(told) < 120


def test_a_path_leads_to_a_run_a_seed_or_a_file(results, tmp_path):
    run = results / "distill/get"
    for path in (run, run / "0", run / "0/weights.safetensors", run / "0/snapshots/0000000008.safetensors"):
        found = equilab.load(path, device="cpu")
        assert found.run.of == "distill/get" and found.setting.iterations == 2
    assert equilab.load(run / "0/snapshots/0000000008.safetensors").metadata["nimg"] == 8
    shutil.copytree(run / "0", tmp_path / "given")  # outside of any study
    assert equilab.load(tmp_path / "given", device="cpu").sample(2).iterations.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("path", "how", "sentence"),
    [
        ("distill/gte", {}, "distill/gte "),
        ("distill", {}, "get, vit"),
        ("distill/get", {"seed": 3}, "seed 3; .* 0$"),
        ("distill/get/0", {"seed": 0}, "seed is 0"),
        ("distill/get/0/weights.safetensors", {"seed": 1}, "seed is 1"),
        ("distill/get", {"device": "tpu"}, "device .*'tpu'.* cpu"),
        ("distill/get", {"vae": "vae"}, "vae .*'vae'.* GET "),
        ("diffusion/fpdm", {"vae": "vae"}, "vae .*config.json"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(results, path, how, sentence):
    with pytest.raises(UserError) as error:
        equilab.load(results / path, **how)
    assert re.search(sentence, str(error.value))


def test_weights_that_are_not_there_yet_are_named(tmp_path):
    (tmp_path / "get").mkdir()
    (tmp_path / "get/summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"get/weights\.safetensors"):
        equilab.load(tmp_path / "get")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04 by torch", "equilab.published.load"),
        (b"\x80\x04 a pickle", "python -m equilab import FAMILY"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (None, "fetch it again"),
    ],
)
def test_what_is_no_file_of_ours_is_told_with_what_fetches_or_reads_it(results, tmp_path, content, sentence):
    whole = (results / "distill/get/0/weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(UserError, match=rf"weights\.safetensors .*{sentence}"):
        equilab.load(tmp_path)


def test_a_path_may_begin_at_home(results, monkeypatch):
    monkeypatch.setenv("HOME", str(results))
    assert equilab.load("~/distill/get", device="cpu").run.of == "distill/get"


def test_latents_are_no_images_without_what_decodes_them():
    weights = weights_of(golden("dit_tiny")[0])
    model = equilab.published.load("dit", weights, heads=2)
    if model.run.in_latents:
        with pytest.raises(UserError, match="vae=FOLDER"):
            model.sample(1, steps=1)


def test_samples_are_shown_side_by_side(results, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    samples = model(results, "distill/get").sample(6)
    equilab.show(samples)
    equilab.show(samples.images, columns=6)
    square, row = (Image.open(io.BytesIO(picture.data)).size for picture in shown)
    assert square[0] > square[1] > row[1] and row[0] > 2 * row[1]  # three columns of two rows, and six of one


def test_what_can_be_imported_is_listed_typed_and_documented():
    assert set(equilab.__all__) <= set(dir(equilab))
    functions = {name: found for name, found in vars(equilab).items() if inspect.isfunction(found)}
    for name in functions.keys() & set(equilab.__all__):
        hints, documented = inspect.get_annotations(functions[name]), functions[name].__doc__
        assert hints.keys() >= {*inspect.signature(functions[name]).parameters, "return"}, name
        assert ">>>" in documented, name
    assert equilab.Samples.__doc__ and equilab.Generator.sample.__doc__
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = equilab.lod
