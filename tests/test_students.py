"""Students of the teacher: consistency, steps, two networks in turn, what is frozen, resumption, refusals."""

import copy
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import smoke
import torch
from conftest import golden
from smoke import called, keep, refused

from equilab import study
from equilab.core import config
from equilab.data.images import Dataset, load
from equilab.diffusion import losses
from equilab.diffusion.protocols import Denoised
from equilab.models import checkpoint, gdd
from equilab.models.classifier import Classifier
from equilab.models.feature_networks import classifier_network
from equilab.models.precond import EDM
from equilab.study import Sections
from equilab.training import classify, gan, onestep
from equilab.training.loop import Halt, Logged, Run, fit

CPU = torch.device("cpu")
IMAGE = (1, 8, 8)
LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
STYLEGAN2 = {"kind": "stylegan2", "width": 8, "embedding": 8, "condition": 8}


@pytest.fixture(scope="module")
def sections():
    """The params of the smoke study, for a study anywhere."""
    return smoke.sections()


def config_of(sections, stage, run=None):
    return study.config_of(Sections(sections, "params.yaml", smoke.SMOKE.parent), stage, run)


@pytest.fixture(scope="module")
def entry(sections):
    """The smoke study's GDD."""
    return config_of(sections, "gan", "gdd")


def changed(model, **values):
    """Return a group of params with other values."""
    return model.model_copy(update=values)


def made_up_images():
    """Return data of random images in ten classes."""
    random = np.random.default_rng(9)
    return Dataset(random.integers(0, 256, (300, *IMAGE), dtype=np.uint8), random.integers(0, 10, 300), 10)


def networks(entry, seed=0):
    """Return a student's network, its teacher and a discriminator, all new, as functions of `seed`."""
    torch.manual_seed(seed)
    classes = 10 if entry.conditional else 0
    net = entry.network.build(IMAGE, classes)
    teacher = EDM(copy.deepcopy(net).eval().requires_grad_(False), sigma_data=0.5)
    gdd.prepare(net, entry.student.freeze)
    torch.manual_seed(3)
    features = classifier_network(Classifier(IMAGE, 10, width=8, features=4))
    return net, teacher, gan.build_discriminator(entry, [features], IMAGE, 10)


def batch_of(entry):
    return partial(gan.batch_of, entry, made_up_images())


def run_of(entry, folder, discriminator_loss=None, **values):
    """Return a run of a student and its discriminator, the student's loss, and the networks."""
    optimisation = changed(entry.optimisation, **values)
    net, teacher, discriminator = networks(entry)
    adversary = gan.adversary_of(entry, net, teacher, discriminator)
    if discriminator_loss:
        adversary = adversary._replace(loss=discriminator_loss)
    run = Run(net, optimisation, 0, folder, CPU, adversary)
    return run, gan.generator_loss_of(entry, discriminator, teacher), (net, teacher, discriminator)


def to_center(x, sigma, label):
    """A denoiser whose trajectories are straight lines to 0.3."""
    return Denoised(torch.full_like(x, 0.3), None, None)


def identity(x, sigma, label):
    return Denoised(x, None, None)


def test_a_consistency_loss_on_straight_trajectories_has_a_closed_form():
    image, noise, levels = (
        torch.rand(2, *IMAGE),
        torch.randn(2, *IMAGE),
        torch.tensor([[2.0, 5.0], [1.0, 4.0]]),
    )
    given = to_center, image, noise, (levels[0], levels[1]), None, losses.l2
    assert losses.consistency(to_center, *given).item() == 0
    high, low = levels[:, :, None, None, None]
    x = image + high * noise
    expected = ((x - 0.3) * (1 - low / high)).square().mean()
    torch.testing.assert_close(losses.consistency(identity, *given), expected)


def test_the_published_consistency_loss_aims_at_the_lowest_level_and_lets_the_teacher_take_the_last_step():
    image, noise, levels = (
        torch.rand(2, *IMAGE),
        torch.randn(2, *IMAGE),
        torch.tensor([[2.0, 5.0], [1.0, 4.0]]),
    )
    given = to_center, image, noise, (levels[0], levels[1]), None, losses.l2

    def halfway(x, sigma, label):
        return Denoised(x / 2, None, None)

    high, low = levels[:, :, None, None, None]
    x = image + high * noise
    below = 0.3 + (x - 0.3) * low / high
    by_student = below / 2 + 0.5 / low * (below - below / 2)  # Euler's step from `low` to 0.5
    by_teacher = 0.3 + (x - 0.3) * 0.5 / high
    for lowest, target in (
        ((0.5, 0.7), by_student),
        ((0.5, 1.0), torch.stack([by_teacher[0], by_student[1]])),
        ((0.5, 4.0), by_teacher),
    ):
        found = losses.published_consistency(halfway, *given, lowest=lowest)
        torch.testing.assert_close(found, (x / 2 - target).square().mean())


def test_consistency_levels_are_the_published_ones_and_neighbours_are_drawn_by_position():
    values, _ = golden("gdd_ncsnpp")
    names = [key for key in values if key.startswith("out.schedule.")]
    assert names
    for name in names:
        steps = int(name.rsplit("N", 1)[1])
        levels = onestep.Levels(steps=steps, **LEVELS)
        torch.testing.assert_close(levels.sigmas(), values[name].float().sort().values, rtol=1e-5, atol=0)
    order = levels.sigmas()
    for first in (1, 2):
        high, low = levels.draw(1, range(400), first)
        assert all((order == h).nonzero() == (order == one).nonzero() + 1 for h, one in zip(high, low))
        assert high.min() == order[first] and high.max() == order[-1]
        assert torch.equal(high[40:50], levels.draw(1, range(40, 50), first)[0])


def test_a_student_of_two_steps_goes_where_the_equation_says():
    class Known(gdd.GDD):
        def denoise(self, x, sigma, label, carry=None):
            return Denoised(0.1 * x + sigma, None, None)

    noise = torch.randn(3, *IMAGE)
    net = torch.nn.Identity()
    one = Known(net, sigma_data=0.5, sigma_min=0.002, sigmas=[80.0])
    torch.testing.assert_close(one.generate(noise, None).image, 8 * noise + 80)
    two = Known(net, sigma_data=0.5, sigma_min=0.002, sigmas=[80.0, 20.0])
    x = 80 * noise
    first = 0.1 * x + 80
    middle = (80 - 20) / 80 * (first - x) + x  # F(x, t, s) of table 5
    torch.testing.assert_close(two.generate(noise, None).image, 0.1 * middle + 20)
    assert two(noise, None, return_iterates=True).image.shape == (2, 3, *IMAGE)


def test_both_networks_move_and_what_is_frozen_stays_without_gradient_or_moments(entry, tmp_path):
    frozen = changed(entry, student=changed(entry.student, freeze="gdd_i"))
    run, loss, (net, teacher, discriminator) = run_of(frozen, tmp_path, nimg=96, report_nimg=96, snapshots=())
    named = {"generator": net, "discriminator": discriminator}
    before = {key: copy.deepcopy(network.state_dict()) for key, network in named.items()}
    before_teacher = copy.deepcopy(teacher.state_dict())
    list(fit(run, batch_of(frozen), loss))
    for trainable, (key, network) in zip(run.trainables, named.items()):
        after = network.state_dict()
        moved = {name for name, value in before[key].items() if not torch.equal(value, after[name])}
        assert set(trainable.named) <= moved
        assert not {name for name in moved if "networks" in name or "projectors" in name}
        if key == "generator":
            assert moved == set(trainable.named)
    assert all(torch.equal(value, before_teacher[key]) for key, value in teacher.state_dict().items())
    layers = [layer for group, layer in gdd.layers(net) if group in gdd.VARIANTS["gdd_i"]]
    still = [parameter for layer in layers for parameter in layer.parameters()]
    assert still and all(p.grad is None and not p.requires_grad for p in still)
    assert not {id(p) for p in still} & {id(p) for p in run.trainables[0].optimizer.state}
    assert list(run.log[0]) == ["nimg", "loss", "lr", "loss_discriminator"]


def test_the_features_of_real_images_are_computed_once_in_an_update_with_r1_too(entry, tmp_path):
    run, loss, (_, _, discriminator) = run_of(
        entry, tmp_path, nimg=32, report_nimg=32, batch=32, micro_batch=32, snapshots=()
    )
    (network,), calls = discriminator.discriminator.networks, []
    original = network.features
    network.features = lambda image: calls.append(len(image)) or original(image)
    assert batch_of(entry)(range(32)).r1_weight > 0  # R1 is due
    list(fit(run, batch_of(entry), loss))
    assert calls == [32] * 3  # generated for the generator; real and generated for the discriminator


def test_joint_r1_is_part_of_every_so_many_losses_and_weighs_half_of_gamma_on_average(entry):
    entry = changed(entry, r1=gan.R1(gamma=0.02, interval=3, form="joint", samples=4))
    size = entry.optimisation.batch
    batches = [batch_of(entry)(range(k * size, k * size + 2)) for k in range(12)]
    assert [batch.r1_weight > 0 for batch in batches] == 4 * [True, False, False]
    assert sum(batch.r1_weight for batch in batches) / 12 == pytest.approx(0.02 / 2 / 4)


class Linear(torch.nn.Module):
    """A discriminator with one logit, linear in the image: R1 is the square of its weight's norm, wherever it is taken."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 64))

    def forward(self, image, label):
        return (image.flatten(1) @ self.weight[:, None],)


def test_published_r1_moves_the_discriminator_by_itself_after_every_so_many_updates(entry, tmp_path):
    """With beta1 = 0, Adam moves by the gradient over the root of its average square: for a constant gradient by its sign."""
    r1 = gan.R1(gamma=0.5, interval=3, form="published", samples=4)
    sizes = {"nimg": 40, "batch": 8, "micro_batch": 8, "report_nimg": 40, "snapshots": ()}
    optimisation = changed(entry.optimisation, betas=(0.0, 0.9), weight_decay=0.0, **sizes)
    entry = changed(entry, r1=r1, optimisation=optimisation, discriminator_lr=0.01)
    net, teacher, _ = networks(entry)
    discriminator = gan.AugmentedDiscriminator(Linear(), "none", None)
    weight, slope = discriminator.discriminator.weight, torch.linspace(1, 2, 64)
    expected = weight.detach().clone()
    adversary = gan.adversary_of(entry, net, teacher, discriminator)
    adversary = adversary._replace(loss=lambda network, batch: (network.discriminator.weight * slope).sum())
    run = Run(net, optimisation, 0, tmp_path, CPU, adversary)
    for _ in fit(run, batch_of(entry), lambda net, batch: 0 * sum(p.sum() for p in net.parameters())):
        pass
    rate, beta = 0.01 * 3 / 4, 0.9 ** (3 / 4)
    expected -= 4 * rate  # updates 0, 1, 2 and 3, by the sign of their slope, which is 1
    penalty = 0.5 / 2 * 3 / 4 * 2 * expected  # the gradient of gamma/2 * interval / samples * |w|^2
    square = beta * (1 - beta**4) * slope**2 + (1 - beta) * penalty**2
    expected -= rate * penalty / (square / (1 - beta**5)).sqrt()  # after the update 3
    square = beta * square + (1 - beta) * slope**2
    expected -= rate * slope / (square / (1 - beta**6)).sqrt()  # update 4
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gdd", "gdd-i-2"])
def test_a_run_of_two_networks_that_stops_continues_bit_for_bit(sections, tmp_path, name):
    entry = config_of(sections, "gan", name)
    sizes = {"nimg": 128, "report_nimg": 64, "snapshots": (), "ema_half_life_nimg": 50.0}
    whole, loss, _ = run_of(entry, tmp_path / "whole", **sizes)
    list(fit(whole, batch_of(entry), loss))
    stopped, loss, _ = run_of(entry, tmp_path / "stopped", **sizes)
    for step in fit(stopped, batch_of(entry), loss):
        if step.nimg == 96:
            break
    resumed, loss, _ = run_of(entry, tmp_path / "stopped", **sizes)
    assert resumed.nimg == 64
    list(fit(resumed, batch_of(entry), loss))
    assert resumed.log == whole.log
    for ours, theirs in zip(resumed.trainables, whole.trainables):
        expected = theirs.state()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state().items())
    assert all(torch.equal(value, whole.ema[key]) for key, value in resumed.ema.items())


def test_what_a_batch_holds_depends_on_its_positions_alone(sections):
    entry = config_of(sections, "gan", "gdd-i-2")
    whole, part = (batch_of(entry)(positions) for positions in (range(32), range(8, 16)))
    for ours, theirs in zip(tensors(part), tensors(whole), strict=True):
        torch.testing.assert_close(ours, theirs[8:16], rtol=0, atol=0)
    assert len(tensors(part)) == 12


def tensors(batch):
    """Return all tensors of a nested tuple."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [each for value in batch if isinstance(value, (tuple, torch.Tensor)) for each in tensors(value)]


def test_the_probability_of_augmentation_follows_the_logits(sections):
    _, _, discriminator = networks(config_of(sections, "gan", "gdd-i-2"))
    assert discriminator.probability == 0
    discriminator.adapt((torch.ones(4, 3),), 1000)
    torch.testing.assert_close(discriminator.probability.item(), 0.1)
    discriminator.adapt((-torch.ones(4, 3),), 500)
    torch.testing.assert_close(discriminator.probability.item(), 0.05)


def test_a_collapsed_discriminator_stops_the_run_and_keeps_its_last_state(entry, tmp_path):
    entry = changed(entry, collapse=0.5)
    assert gan.collapsed(entry, {"loss_discriminator": 0.6}) is None
    assert isinstance(gan.collapsed(entry, {"loss_discriminator": 0.4}), Halt)
    known = {"fall": 1.0}

    def falling(discriminator, batch):
        known["fall"] *= 0.8
        value = discriminator(batch.real, batch.label, None)[0].mean() * 0 + known["fall"]
        return Logged(value, torch.tensor(known["fall"]))

    run, loss, _ = run_of(entry, tmp_path, falling, nimg=256, report_nimg=64, snapshots=())
    sentence = r"collapsed .*0\.\d+.* 4 .* r1\.gamma"
    with pytest.raises(config.UserError, match=sentence):
        list(fit(run, batch_of(entry), loss, partial(gan.collapsed, entry)))
    resumed, _, _ = run_of(entry, tmp_path, nimg=256, report_nimg=64, snapshots=())
    assert resumed.nimg == 64


def test_a_loss_that_is_no_number_names_both_learning_rates(entry, tmp_path):
    def broken(discriminator, batch):
        return discriminator(batch.real, batch.label, None)[0].mean() * float("nan")

    run, loss, _ = run_of(entry, tmp_path, broken, nimg=256, report_nimg=64, snapshots=())
    sentence = "nan .*optimisation.lr .*discriminator_lr"
    with pytest.raises(config.UserError, match=sentence):
        list(fit(run, batch_of(entry), loss))


@pytest.fixture
def given(tmp_path, monkeypatch, sections):
    """The params of a study whose data are in the current folder, and whose classifiers are trained on a few images."""
    monkeypatch.chdir(tmp_path)
    given = copy.deepcopy(sections)
    for stage in ("evaluator", "features"):
        given[stage]["optimisation"] |= {"nimg": 64, "report_nimg": 64}
    keep(given)
    called("data")
    return given


def beside(**levels):
    """Return a consistency loss as params have it."""
    levels = {"steps": 4, **LEVELS, **levels}
    return {"weight": 1.0, "levels": levels, "metric": "squared", "form": "text"}


def save_untrained(given, stage, image=IMAGE, classes=10):
    """Write the results of a stage that has trained nothing; return the path of the weights."""
    stage_config, path = config_of(given, stage), Path("results", stage, "weights.safetensors")
    net = stage_config.network.build(image, classes)
    about = {"image": image, "classes": classes, "stage": stage, "config": stage_config}
    checkpoint.save_tensors(path, net.state_dict(), about)
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"network": {"width": 16}}, "gan.gdd.network.width .*16, .* 8"),
        (
            {"network": {"architecture": "ncsnpp"}},
            "gan.gdd.network.architecture .*ncsnpp, .* ddpmpp",
        ),
        ({"network": {"dropout": 0.1}}, "gan.gdd.network.dropout .*0.1; .* 0"),
        ({"conditional": False}, "gan.gdd.conditional .*False, .* True"),
        ({"features": ["evaluator"]}, "features .*evaluator"),
        ({"features": ["vgg17"]}, "features: 'vgg17' .* study, vgg16"),
        ({"features": ["vgg16"]}, "vgg16 .*3 channels"),
        ({"features": []}, "features .*discriminator"),
        ({"discriminator": {"side": 4}}, "`side` .*4x4"),
        ({"student": {"sigmas": [2.0, 80.0]}}, "sigmas .*\\[2.0, 80.0\\]"),
        ({"student": {"freeze": "gdd_x"}}, "gan.gdd.student.freeze"),
        ({"augment": "ada"}, "adaptive .*augment ada"),
        ({"r1": {"interval": 0}}, "gan.gdd.r1.interval"),
        ({"r1": {"gamma": -1.0}}, "gan.gdd.r1.gamma"),
        ({"r1": {"form": "lazy"}}, "gan.gdd.r1.form"),
        ({"r1": {"samples": 0}}, "gan.gdd.r1.samples"),
        ({"augment": "ada", "adaptive": {"target": 0.6, "ramp_nimg": 0}}, "gan.gdd.adaptive.ramp_nimg"),
        ({"consistency": beside(steps=0)}, "consistency.levels.steps"),
        ({"consistency": beside(steps=10**12)}, "consistency.levels.steps"),
        ({"consistency": beside(steps=1) | {"form": "published"}}, "levels.steps .*1"),
        ({"consistency": beside() | {"form": "code"}}, "gan.gdd.consistency.form"),
        (
            {"consistency": beside() | {"metric": "lpips"}},
            "gan.gdd.consistency.metric .*lpips, .* 3 .* 1",
        ),
        (
            {"consistency": beside(sigma_min=0.01)},
            r"levels .* 0\.01, .* 0\.002",
        ),
        ({"discriminator_lr": 1e300}, "gan.gdd.discriminator_lr"),
        ({"student": {"sigma_min": 1e-300}}, "gan.gdd.student.sigma_min"),
        ({"features": ["study", "study"]}, "features: 'study'"),
        ({"optimisation": {"compile": True}}, "optimisation.compile .*r1"),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_work_starts(
    capsys, tmp_path, monkeypatch, sections, change, sentence
):
    monkeypatch.chdir(tmp_path)
    given = copy.deepcopy(sections)
    for key, value in change.items():
        one = given["gan"]["gdd"]
        one[key] = {**(one[key] or {}), **value} if isinstance(value, dict) else value
    keep(given)
    assert re.search(sentence, refused(capsys, "gan", "gdd", "--dry-run"))


def test_the_stages_refuse_a_missing_teacher_and_tell_what_they_freeze(capsys, given):
    assert "results/teacher/weights.safetensors" in refused(capsys, "gan", "gdd")
    assert "results/teacher/weights.safetensors" in refused(capsys, "consistency", "cd")
    given["gan"]["gdd-i-2"]["optimisation"] |= {"nimg": 64, "report_nimg": 32, "snapshots": []}
    keep(given)
    for stage in ("evaluator", "teacher"):
        save_untrained(given, stage)
    assert "results/features/weights.safetensors" in refused(capsys, "gan", "gdd")
    save_untrained(given, "features")
    capsys.readouterr()
    called("gan", "gdd-i-2")
    shares = capsys.readouterr().out
    assert "# convolution" in shares and shares.count("frozen") == 2 and shares.count("trained") == 7
    metadata = checkpoint.read_metadata(Path("results/gan/gdd-i-2/0/weights.safetensors"))
    assert (metadata["family"], metadata["run"], metadata["seed"]) == ("gdd", "gdd-i-2", 0)
    called("gan", "gdd", "--dry-run")
    assert "# parameters: 48," in capsys.readouterr().out.replace("\n", " ")
    assert len(load(Path("results/data"), "test").images) == 200


@pytest.mark.parametrize(("image", "classes"), [((3, 8, 8), 10), ((1, 8, 8), 4)])
def test_a_teacher_of_other_images_is_refused(capsys, given, image, classes):
    weights = save_untrained(given, "teacher", image, classes)
    sentence = rf"{re.escape(str(image))} .*{classes} .*\(1, 8, 8\) .*10"
    assert re.search(sentence, refused(capsys, "gan", "gdd"))
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "is damaged" in refused(capsys, "gan", "gdd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"network": {"kind": "classifier", "width": 16, "features": 8}},
            "features.network.kind .*classifier",
        ),
        ({"images": "first_half"}, "features.images .*first_half .*evaluator.images"),
        ({"images": "all"}, "features.images .*all .*evaluator.images"),
    ],
)
def test_a_discriminator_does_not_look_through_what_the_evaluator_knows(
    capsys, tmp_path, monkeypatch, sections, change, sentence
):
    monkeypatch.chdir(tmp_path)
    keep({**sections, "features": {**sections["features"], **change}})
    assert re.search(sentence, refused(capsys, "gan", "gdd", "--dry-run"))
    alone = {**sections["gan"]["gdd"], "discriminator": STYLEGAN2, "features": []}  # looks through none
    keep({**sections, "features": {**sections["features"], **change}, "gan": {"gdd": alone}})
    called("gan", "gdd", "--dry-run")


def test_the_halves_of_the_training_images_are_disjoint_and_each_holds_all_classes():
    labels = np.repeat(np.arange(5), 21)  # sorted, as folders of classes are
    first, second = (classify.part_of(part, 105, 0) for part in ("first_half", "second_half"))
    assert sorted([*first, *second]) == list(classify.part_of("all", 105, 0)) == list(range(105))
    assert set(labels[first]) == set(labels[second]) == set(range(5))


def test_an_update_of_both_networks_does_not_depend_on_how_the_batch_is_split(entry, tmp_path):
    """R1 included; through heads without a batch norm, those of maps of few pixels."""
    arguments = {**entry.discriminator.arguments, "mixing": "last"}
    spec = config.Spec(entry.discriminator.kind, arguments, entry.discriminator.target)
    alike = changed(entry, discriminator=spec)
    moved = {}
    for micro in (32, 8):
        run, loss, (net, _, discriminator) = run_of(
            alike, tmp_path / str(micro), micro_batch=micro, nimg=32, report_nimg=32, snapshots=()
        )
        heads = discriminator.discriminator.heads
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in heads.modules())
        for _ in range(200):  # the spectral norms, a power iteration closer at each pass, are done
            discriminator(torch.zeros(2, *IMAGE), torch.zeros(2, dtype=torch.int64), None)
        for trainable in run.trainables:  # moves by the gradient, not by its sign
            trainable.optimizer = torch.optim.SGD(trainable.named.values(), lr=1.0)
        list(fit(run, batch_of(alike), loss))
        moved[micro] = flat(net, discriminator)
    net, _, discriminator = networks(alike)
    start = flat(net, discriminator)
    assert (moved[32] - start).norm() > 1e-5
    assert (moved[8] - moved[32]).norm() <= 1e-3 * (moved[32] - start).norm()


def flat(*modules):
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def test_a_student_without_classes_is_trained_in_bf16(entry, tmp_path):
    alone = changed(entry, conditional=False)
    run, loss, (net, _, _) = run_of(alone, tmp_path, precision="bf16", nimg=64, report_nimg=64, snapshots=())
    before = flat(net)
    rows = [step.report for step in fit(run, batch_of(alone), loss) if step.report]
    assert len(rows) == 1 and rows[0]["loss_discriminator"] > 0
    assert not torch.equal(before, flat(net))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_updates_are_counted_where_the_features_network_is_given(sections, entry):
    features = config_of(sections, "features").network
    assert gan.cost(entry, IMAGE, 10).train_flops_image is None
    counted = gan.cost(entry, IMAGE, 10, features)
    assert counted.train_flops_image > 3 * counted.image.flops()
    assert counted.parameters_trained == counted.parameters
    other = changed(entry, seed=5, optimisation=changed(entry.optimisation, lr=1.0))
    assert gan.cost(other, IMAGE, 10, features) is counted
