"""Progressive distillation: the target in closed form, a chain of students, what it cost, resumption, refusals."""

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from smoke import write_study

from equilab import __main__, dvc, study
from equilab.core import rng
from equilab.core.config import UserError
from equilab.core.files import sha256_of
from equilab.diffusion import losses
from equilab.diffusion.protocols import Denoised
from equilab.diffusion.samplers import euler_step
from equilab.models.checkpoint import read_metadata
from equilab.sampling.runs import Inputs, ProgressiveStudent
from equilab.training import onestep, progressive

IMAGE = (1, 8, 8)
LEVELS = onestep.Levels(steps=4, sigma_min=0.002, sigma_max=80.0, rho=7.0)
RUNS = {run: f"progressive/{run}/0" for run in ("pd-2", "pd-1")}


def bent(x, sigma, label, carry=None):
    """A denoiser whose trajectories are curved."""
    sigma = torch.as_tensor(sigma).expand(len(x))[:, None, None, None]
    return Denoised(torch.tanh(x / (1 + sigma)) + 0.1 * sigma.sqrt(), None, None)


def test_one_step_with_the_target_ends_where_two_of_the_teacher_end():
    x = 5 * torch.randn(1, *IMAGE, dtype=torch.float64)
    first, middle, last = levels = (5.0, 3.0, 0.5)
    between, _ = euler_step(bent, x, first, middle, None)
    end, _ = euler_step(bent, between, middle, last, None)
    target = losses.progressive_target(bent, x, tuple(torch.tensor([s]).double() for s in levels), None)
    torch.testing.assert_close(target, (first * end - last * x) / (first - last))
    as_told = Denoised(target, None, None)
    landed, _ = euler_step(lambda *_: as_told, x, first, last, None)
    torch.testing.assert_close(landed, end)
    at_zero = losses.progressive_target(
        bent, x, tuple(torch.tensor([s]).double() for s in (5.0, 3.0, 0.0)), None
    )
    torch.testing.assert_close(at_zero, bent(between, middle, None).image)


def test_the_target_keeps_its_digits_where_levels_lie_close_together():
    near = [torch.tensor([80.0 * (1 - step * 2e-5)], dtype=torch.float64) for step in range(3)]
    x = 80 * torch.randn(1, *IMAGE, dtype=torch.float64)
    exact = losses.progressive_target(bent, x, tuple(near), None)
    rounded = losses.progressive_target(bent, x.float(), tuple(level.float() for level in near), None)
    assert (rounded - exact).abs().max() < 1e-3  # the quotient of the docstring loses all but two digits


@pytest.mark.parametrize(("weight", "at"), [("truncated_snr", (4.0, 1.0)), ("snr_plus_one", (5.0, 1.25))])
def test_errors_are_weighted_by_the_noise_level(weight, at):
    def teacher(x, sigma, label):
        return Denoised(torch.full_like(x, 0.3), None, None)

    def student(x, sigma, label):
        return Denoised(torch.full_like(x, 0.5), None, None)

    for sigma, expected in zip((0.5, 2.0), at):
        sigmas = tuple(torch.full((3,), sigma * share) for share in (1.0, 0.5, 0.1))
        image, noise = torch.zeros(3, *IMAGE), torch.randn(3, *IMAGE)
        found = losses.progressive(student, teacher, image, noise, sigmas, None, losses.SNR_WEIGHTS[weight])
        torch.testing.assert_close(found.item(), expected * 0.2**2)


def test_a_student_steps_between_every_second_level_of_its_teacher():
    teachers = LEVELS.model_copy(update={"steps": 8}).sigmas()
    assert torch.equal(teachers[::2], LEVELS.sigmas())
    begin, middle, end = progressive.draw(LEVELS, 1, range(100))
    place = [int((teachers == sigma).nonzero()) for sigma in begin]
    assert set(place) == {2, 4, 6, 8}
    assert torch.equal(middle, teachers[[k - 1 for k in place]]) and torch.equal(
        end, teachers[[k - 2 for k in place]]
    )
    assert torch.equal(begin[40:50], progressive.draw(LEVELS, 1, range(40, 50))[0])


def test_a_student_is_sampled_by_as_many_steps_of_euler(tmp_path):
    sections = study.read(write_study(tmp_path) / "params.yaml")
    config = study.config_of(sections, "progressive", "pd-2")
    run = ProgressiveStudent("progressive/pd-2", config, IMAGE, 10, progressive.cost)
    noise = torch.randn(3, *IMAGE)
    found = run.sample(bent, Inputs(noise, None), None, False).image
    x = noise.double() * 80
    for sigma, after in pairwise(config.levels.sigmas().double().flip(0).tolist()):
        x, _ = euler_step(bent, x, sigma, after, None)
    torch.testing.assert_close(found, x.float())
    assert run.nfe(None) == 2 and run.cost(None)["flops"] == run.counted.image.flops()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A study with a teacher, its student of two steps, and that one's student of one, all hardly trained."""
    few = {"nimg": 96, "report_nimg": 32, "decay_start_nimg": 0, "warmup_nimg": 0, "snapshots": []}
    entries = ("teacher", "progressive.pd-2", "progressive.pd-1")
    changes = {f"{entry}.optimisation.{key}": few[key] for entry in entries for key in few}
    folder = write_study(tmp_path_factory.mktemp("chain"), changes)
    for command in (["data"], ["teacher"], ["progressive", "pd-2"], ["progressive", "pd-1"]):
        assert called(folder, *command) == 0
    return folder


def called(folder, *command):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return __main__.main(list(command))


def content(folder):
    """Return the bytes of all that the stage wrote."""
    paths = (folder / "results/progressive").rglob("*.*")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_each_student_starts_from_the_one_before_and_knows_how_many_images_those_before_it_saw(chain):
    found = {name: chain / "results" / name / "weights.safetensors" for name in ("teacher", *RUNS.values())}
    for run, (teacher, before) in {"pd-2": ("teacher", 0), "pd-1": (RUNS["pd-2"], 96)}.items():
        about = read_metadata(found[RUNS[run]])
        assert about["inputs"]["teacher"] == sha256_of(found[teacher])
        assert (about["family"], about["nimg"], about["nimg_before"]) == ("pd", 96, before)


@pytest.mark.parametrize("run", ["pd-2", "pd-1"])
def test_a_student_that_is_stopped_continues_to_the_same_bytes(chain, monkeypatch, run):
    whole, original = content(chain), rng.noise
    left = [False, *[True] * 3]  # of six micro-batches; its state has been saved

    def stopping(*arguments):
        if not left.pop():
            raise KeyboardInterrupt
        return original(*arguments)

    shutil.rmtree(chain / "results/progressive" / run)
    monkeypatch.setattr(rng, "noise", stopping)
    assert called(chain, "progressive", run) == 130
    assert not (chain / "results/progressive" / run / "0").exists()
    left[:] = [True] * 4  # it does not begin anew
    assert called(chain, "progressive", run) == 0
    assert content(chain) == whole


def test_a_student_without_its_teacher_says_what_is_missing(chain, tmp_path, capsys):
    study = tmp_path / "study"
    shutil.copytree(chain, study)
    (study / "results/progressive/pd-2/0/weights.safetensors").unlink()
    assert called(study, "progressive", "pd-1") == 2
    assert "results/progressive/pd-2/0/weights.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"pd-1.levels.steps": 2},
            "progressive.pd-1.levels .* 2 .* 80 .* 0.002 .* pd-2 ",
        ),
        ({"pd-2.levels.steps": 3}, "progressive.pd-1.levels .* pd-2 3 "),
        ({"pd-1.levels.sigma_max": 40.0}, "progressive.pd-1.levels .* 40 .* pd-2 .* 80 "),
        ({"pd-1.teacher": "progressive/pd-3"}, "'pd-3'; did you mean 'pd-2'"),
        (
            {"pd-1.teacher": "gan/gdd"},
            "'gan/gdd' .*progressive/RUN",
        ),
        ({"pd-1.seeds": [0, 1]}, "progressive.pd-1.seeds: 1 .* pd-2, .* 0"),
        ({"pd-1.network.width": 16}, "progressive.pd-1.network.width .*16, .* 8"),
        ({"pd-1.weight": "snr"}, "'snr' .*truncated_snr, snr_plus_one"),
        ({"pd-2.teacher": "progressive/pd-1"}, "progressive.pd-2.levels .* pd-1 "),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_work_starts(tmp_path, capsys, changes, sentence):
    folder = write_study(tmp_path, {f"progressive.{key}": value for key, value in changes.items()})
    assert called(folder, "progressive", "pd-1", "--seed", "0", "--dry-run") == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (folder / "results").exists()


def test_a_student_waits_for_its_teacher_and_one_of_an_unknown_teacher_or_in_a_circle_is_told(
    tmp_path, capsys
):
    lines = dvc.waves(study.read(write_study(tmp_path) / "params.yaml"))
    place = {name: number for number, names in enumerate(lines) for name in names}
    assert (
        place["teacher"]
        < place["progressive@pd-2-0"]
        < place["progressive@pd-1-0"]
        < place["evaluate@pd-1-0"]
    )
    assert place["progressive@pd-2-0"] == place["distill@get-0"]
    for teacher, sentence in (
        ("progressive/pd-3", "progressive.pd-2.teacher: 'progressive/pd-3' "),
        ("progressive/pd-1", "progressive.pd-2, progressive.pd-1: "),
    ):
        folder = write_study(tmp_path, {"progressive.pd-2.teacher": teacher})
        with pytest.raises(UserError, match=sentence):
            dvc.waves(study.read(folder / "params.yaml"))
        assert called(folder, "check") == 2
        assert sentence in capsys.readouterr().err


def test_an_update_is_counted_with_two_calls_of_the_teacher(tmp_path):
    sections = study.read(write_study(tmp_path) / "params.yaml")
    two, one = (study.config_of(sections, "progressive", run) for run in ("pd-2", "pd-1"))
    counted = progressive.cost(one, IMAGE, 10)
    call = counted.image.flops()
    assert progressive.cost(two, IMAGE, 10).image.flops() == 2 * call
    assert 4 * call < counted.train_flops_image < 5 * call  # two forward, one forward and backward
    assert np.isclose(counted.train_flops_image, progressive.cost(two, IMAGE, 10).train_flops_image)
