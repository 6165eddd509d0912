"""Students of the teacher: consistency, steps, two players in turn, what is frozen, resumption, refusals."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import golden

from equilab import __main__
from equilab.core import config, rng
from equilab.data.images import load
from equilab.diffusion import losses
from equilab.diffusion.protocols import Denoised
from equilab.models import discriminators as discriminator
from equilab.models import gdd
from equilab.models.precond import EDM
from equilab.training import classify, gan, loop, onestep
from equilab.training.loop import Run, fit

SMOKE = Path(__file__).parent.parent / "studies/smoke/params.yaml"
CPU = torch.device("cpu")
IMAGE = (1, 8, 8)


@pytest.fixture(scope="module")
def sections():
    return config.read(SMOKE)


@pytest.fixture(scope="module")
def entry(sections):
    """The smoke study's GDD."""
    return __main__._config(sections, "gan", "gdd", SMOKE)[0]


def features():
    """Return an untrained feature network."""
    torch.manual_seed(3)
    return discriminator.Classifier(IMAGE, 10, width=8, features=4)


def players(entry, seed=0):
    """Return a student's network, its teacher and a critic, all new, as functions of `seed`."""
    torch.manual_seed(seed)
    net = entry.network.build(IMAGE, 10)
    teacher = EDM(copy.deepcopy(net).eval().requires_grad_(False), sigma_data=0.5)
    gdd.prepare(net, entry.student.freeze)
    return net, teacher, gan.critic_of(entry, "gdd", IMAGE, 10, lambda name: features(), pretrained=False)


def batch_of(entry):
    """Return batches of the trainer's form, of made-up images."""

    def read(positions):
        image = torch.from_numpy(rng.noise(9, "real", positions, IMAGE)).tanh()
        label = torch.from_numpy(rng.integers(9, "label", positions, 10))
        made = [gan._made(9, player, positions, IMAGE, 10) for player in ("generator", "critic")]
        draws = (
            tuple(gan.adversarial.draws(9, name, positions) for name in "abc")
            if entry.augment != "none"
            else (None,) * 3
        )
        weight = gan.adversarial.r1_weight(
            positions.start // entry.optimisation.batch, entry.r1.gamma, entry.r1.interval
        )
        along = (made[0][0], entry.consistency.levels.draw(9, positions)) if entry.consistency else None
        return (image, label), *made, draws, weight, along

    return read


def run_of(entry, folder, **changes):
    """Return a run of both players, its losses, and the players."""
    optimisation = replace(entry.optimisation, **changes)
    net, teacher, critic = players(entry)
    run = Run(net, optimisation, 0, "id", folder, CPU, ("discriminator", critic, entry.discriminator_lr))
    return run, gan.losses_of(entry, net, critic, teacher), (net, teacher, critic)


def test_a_consistency_loss_on_straight_trajectories_has_a_closed_form():
    center, (high, low) = 0.3, (torch.tensor([2.0, 5.0]), torch.tensor([1.0, 4.0]))
    teacher = lambda x, sigma, label: Denoised(torch.full_like(x, center), None, None)  # noqa: E731
    image, noise = torch.rand(2, *IMAGE), torch.randn(2, *IMAGE)
    constant = losses.consistency(teacher, teacher, image, noise, (high, low), None)
    assert constant.item() == 0
    identity = losses.consistency(
        lambda x, *_: Denoised(x, None, None), teacher, image, noise, (high, low), None
    )
    x = image + high[:, None, None, None] * noise
    torch.testing.assert_close(
        identity, ((x - center) * (1 - low / high)[:, None, None, None]).square().mean()
    )


def test_consistency_levels_are_the_published_ones_and_neighbours_are_drawn_by_position():
    values, _ = golden("gdd_ncsnpp")
    names = [key for key in values if key.startswith("out.schedule.")]
    assert names
    for name in names:
        steps = int(name.rsplit("N", 1)[1])
        levels = onestep.Levels(steps, 0.002, 80.0, 7.0)
        torch.testing.assert_close(levels.sigmas(), values[name].float().sort().values, rtol=1e-5, atol=0)
    high, low = levels.draw(1, range(100))
    order = levels.sigmas()
    assert all((order == h).nonzero() == (order == one).nonzero() + 1 for h, one in zip(high, low))
    assert torch.equal(high[40:50], levels.draw(1, range(40, 50))[0]) and len(high.unique()) > 1


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


def test_both_players_move_and_what_is_frozen_stays_without_gradient_or_moments(entry, tmp_path):
    frozen = replace(entry, student=replace(entry.student, freeze="gdd_i"))
    run, losses_of, (net, teacher, critic) = run_of(frozen, tmp_path, nimg=96, report_nimg=96, snapshots=())
    before = {
        key: value.clone()
        for key, value in (*net.state_dict(prefix="g.").items(), *critic.state_dict(prefix="d.").items())
    }
    judge = {key: value.clone() for key, value in teacher.state_dict().items()}
    list(fit(run, batch_of(frozen), *losses_of))
    after = {**net.state_dict(prefix="g."), **critic.state_dict(prefix="d.")}
    trained = {f"{p}.{key}" for p, player in zip("gd", run.players) for key in player.named}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not {key for key in moved if "networks" in key or "projectors" in key}
    assert {key for key in moved if key.startswith("g.")} == {key for key in trained if key.startswith("g.")}
    assert {key for key in trained if key.startswith("d.")} <= moved
    assert all(torch.equal(value, judge[key]) for key, value in teacher.state_dict().items())
    still = [
        p
        for layer in gdd.layers(net)
        if layer.group in gdd.VARIANTS["gdd_i"]
        for p in layer.module.parameters()
    ]
    assert still and all(p.grad is None and not p.requires_grad for p in still)
    assert not {id(p) for p in still} & {id(p) for p in run.players[0].optimizer.state}
    assert list(run.log[0]) == ["nimg", "loss", "lr", "loss_discriminator"]


def test_the_features_of_real_images_are_computed_once_in_an_update_with_r1_too(entry, tmp_path):
    run, losses_of, (_, _, critic) = run_of(
        entry, tmp_path, nimg=32, report_nimg=32, batch=32, micro_batch=32, snapshots=()
    )
    (network,), calls = critic.discriminator.networks, []
    original = network.features
    network.features = lambda image: calls.append(len(image)) or original(image)
    assert batch_of(entry)(range(32))[-2] > 0  # R1 is due
    list(fit(run, batch_of(entry), *losses_of))
    assert calls == [
        32,
        32,
        32,
    ]  # generated ones for the generator; real and generated ones for the discriminator


@pytest.mark.parametrize("name", ["gdd", "gdd-i-2"])
def test_a_run_of_two_players_that_stops_continues_bit_for_bit(sections, tmp_path, name):
    entry = __main__._config(sections, "gan", name, SMOKE)[0]
    sizes = {"nimg": 256, "report_nimg": 64, "snapshots": (), "ema_half_life_nimg": 50.0}
    whole, losses_of, _ = run_of(entry, tmp_path / "whole", **sizes)
    list(fit(whole, batch_of(entry), *losses_of))
    stopped, losses_of, _ = run_of(entry, tmp_path / "stopped", **sizes)
    for step in fit(stopped, batch_of(entry), *losses_of):
        if step.nimg == 160:
            break
    resumed, losses_of, _ = run_of(entry, tmp_path / "stopped", **sizes)
    assert resumed.nimg == 128
    list(fit(resumed, batch_of(entry), *losses_of))
    assert resumed.log == whole.log
    for ours, theirs in zip(resumed.players, whole.players):
        expected = theirs.state()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state().items())
    assert all(torch.equal(value, whole.ema[key]) for key, value in resumed.ema.items())


def test_the_probability_of_augmentation_follows_the_logits(sections, tmp_path):
    entry = __main__._config(sections, "gan", "gdd-i-2", SMOKE)[0]
    _, _, critic = players(entry)
    assert critic.probability == 0
    critic.adapt((torch.ones(4, 3),), 1000)
    torch.testing.assert_close(critic.probability.item(), 0.1)
    critic.adapt((-torch.ones(4, 3),), 500)
    torch.testing.assert_close(critic.probability.item(), 0.05)


def test_a_collapsed_discriminator_and_a_loss_that_is_no_number_stop_the_run_and_keep_its_last_state(
    entry, tmp_path
):
    entry = replace(entry, collapse=0.5)
    assert gan.collapsed(entry, {"loss_discriminator": 0.6}) is None
    run, (generate, _), _ = run_of(entry, tmp_path, nimg=256, report_nimg=64, snapshots=())
    known = {"fall": 1.0}

    def criticise(critic, batch):
        known["fall"] *= 0.8
        return critic(*batch[0], None)[0].mean() * 0 + known["fall"], torch.tensor(known["fall"])

    with pytest.raises(
        config.UserError,
        match=r"the discriminator has collapsed \(its loss is 0\.\d+.*\) at step 4 .*last good state.*; raise r1.gamma",
    ):
        list(fit(run, batch_of(entry), generate, criticise, watch=lambda row: gan.collapsed(entry, row)))
    assert (
        Run(
            players(entry)[0], run.config, 0, "id", tmp_path, CPU, ("discriminator", players(entry)[2], 1e-3)
        ).nimg
        == 64
    )
    with pytest.raises(
        config.UserError,
        match="the loss became nan at step.*lower optimisation.lr or discriminator_lr or clip",
    ):
        list(
            fit(
                run,
                batch_of(entry),
                generate,
                lambda critic, batch: critic(*batch[0], None)[0].mean() * float("nan"),
            )
        )


@pytest.fixture
def study(tmp_path, monkeypatch, sections):
    """The folder of a study with its data, evaluator and teacher, hardly trained."""
    monkeypatch.chdir(tmp_path)
    given = copy.deepcopy(sections)
    keep(given)
    assert __main__.main(["data"]) == 0
    return given


def keep(sections):
    Path("params.yaml").write_text(yaml.safe_dump(sections))


def refused(capsys, *command):
    """Return the sentence with which a command is refused."""
    capsys.readouterr()
    assert __main__.main(list(command)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"network": {"width": 16}}, "gan.gdd.network.width is 16, but the teacher's is 8"),
        (
            {"network": {"architecture": "ncsnpp"}},
            "gan.gdd.network.architecture is ncsnpp, but the teacher's is ddpmpp",
        ),
        ({"network": {"dropout": 0.1}}, "gan.gdd.network.dropout is 0.1; students are trained with 0"),
        ({"conditional": False}, "gan.gdd.conditional is False, but the teacher's is True"),
        ({"features": ["evaluator"]}, "it would leak into the score"),
        ({"features": ["vgg17"]}, "'vgg17' is unknown, choose among study, vgg16"),
        ({"features": ["vgg16"]}, "vgg16 takes 3 channels and the images have 1"),
        ({"features": []}, "features must name networks"),
        ({"discriminator": {"side": 4}}, "give a `side` to reach 4x4"),
        ({"student": {"sigmas": [2.0, 80.0]}}, "give levels that fall"),
        ({"student": {"freeze": "gdd_x"}}, "gan.gdd.student.freeze"),
        ({"augment": "ada"}, "adaptive must be given for augment ada"),
        ({"r1": {"interval": 0}}, "interval is 0"),
        ({"r1": {"gamma": -1.0}}, "gamma must be >= 0"),
        ({"augment": "ada", "adaptive": {"target": 0.6, "ramp_nimg": 0}}, "ramp_nimg must be >= 1"),
        (
            {
                "consistency": {
                    "weight": 1.0,
                    "levels": {"steps": 0, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
                }
            },
            "steps must be >= 1",
        ),
        (
            {
                "consistency": {
                    "weight": 1.0,
                    "levels": {"steps": 4, "sigma_min": 0.01, "sigma_max": 80.0, "rho": 7.0},
                }
            },
            "give the same to both",
        ),
        ({"features": ["study", "study"]}, "names a network twice"),
        ({"optimisation": {"compile": True}}, "optimisation.compile must be false with r1"),
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
    assert sentence in refused(capsys, "gan", "gdd", "--dry-run")


def test_the_stages_refuse_a_missing_teacher_a_leak_and_tell_what_they_freeze(capsys, study):
    assert "results/teacher/weights.safetensors is not there" in refused(capsys, "gan", "gdd")
    assert "results/teacher/weights.safetensors is not there" in refused(capsys, "consistency", "cd")
    few = {"nimg": 64, "report_nimg": 32, "decay_start_nimg": 0, "warmup_nimg": 0, "snapshots": []}
    for entry in (study["evaluator"], study["teacher"], study["features"], *study["gan"].values()):
        entry["optimisation"] = {**entry["optimisation"], **few}
    keep(study)
    for stage in ("evaluator", "teacher"):
        assert __main__.main([stage]) == 0
    shutil.copytree("results/evaluator", "results/features")
    assert "is the evaluator, which scores the images" in refused(capsys, "gan", "gdd")
    shutil.rmtree("results/features")
    assert __main__.main(["features"]) == 0
    capsys.readouterr()
    assert __main__.main(["gan", "gdd-i-2"]) == 0
    shares = capsys.readouterr().out
    assert "# convolution" in shares and shares.count("frozen") == 2 and shares.count("trained") == 7
    assert __main__.main(["gan", "gdd", "--dry-run"]) == 0
    assert "# parameters: 48," in capsys.readouterr().out.replace("\n", " ")
    test_images = load(Path("results/data"), "test").images
    assert len(test_images) == 200
    weights = Path("results/teacher/weights.safetensors")
    tensors, about = loop.load_tensors(weights)
    for image, classes in (((3, 8, 8), 10), ((1, 8, 8), 4)):  # teachers that are sound, of other images
        net = __main__._config(study, "teacher", None, SMOKE)[0].network.build(image, classes)
        loop.save_tensors(weights, net.state_dict(), {**about, "image": list(image), "classes": classes})
        assert (
            f"is a teacher of images {image} in {classes} classes, the data are (1, 8, 8) in 10; train it again"
            in refused(capsys, "gan", "gdd")
        )
    loop.save_tensors(weights, tensors, about)
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "is damaged" in refused(capsys, "gan", "gdd")


def test_the_feature_network_is_not_the_evaluator_even_of_the_same_sizes(study):
    study["features"] = {key: study["evaluator"][key] for key in ("network", "optimisation")}
    keep(study)
    for stage in ("evaluator", "features"):
        assert __main__.main([stage]) == 0
    one, other = (
        loop.load_tensors(Path("results", stage, "weights.safetensors"))[0]
        for stage in ("evaluator", "features")
    )
    assert classify.CLASSIFIERS and not any(
        torch.equal(one[key], other[key]) for key in one if key.endswith("weight") and one[key].ndim > 1
    )


def test_an_update_of_both_players_does_not_depend_on_how_the_batch_is_split(entry, tmp_path):
    """R1 included; through heads without a batch norm, those of maps of few pixels."""
    moved = {}
    alike = replace(
        entry,
        discriminator=replace(
            entry.discriminator, arguments={**entry.discriminator.arguments, "mixing": "last"}
        ),
    )
    for micro in (32, 8):
        run, both, (net, _, critic) = run_of(
            alike, tmp_path / str(micro), micro_batch=micro, nimg=32, report_nimg=32, snapshots=()
        )
        assert not [
            m
            for m in critic.modules()
            if isinstance(m, torch.nn.BatchNorm2d)
            and m.training
            and m not in [*critic.discriminator.networks.modules()]
        ]
        for _ in range(200):  # the spectral norms, a power iteration closer at each pass, are done
            critic(torch.zeros(2, *IMAGE), torch.zeros(2, dtype=torch.int64), None)
        for player in run.players:  # moves by the gradient, not by its sign
            player.optimizer = torch.optim.SGD(player.named.values(), lr=1.0)
        for _ in fit(run, batch_of(alike), *both):
            pass
        moved[micro] = torch.cat(
            [p.detach().flatten() for player in (net, critic) for p in player.parameters()]
        )
    start = torch.cat(
        [
            p.detach().flatten()
            for player in (players(alike)[0], players(alike)[2])
            for p in player.parameters()
        ]
    )
    assert (moved[32] - start).norm() > 1e-5 and (moved[8] - moved[32]).norm() <= 1e-3 * (
        moved[32] - start
    ).norm()


def test_a_student_without_classes_is_trained_in_bf16(entry, tmp_path):
    alone = replace(
        entry,
        conditional=False,
        optimisation=replace(entry.optimisation, precision="bf16", nimg=64, report_nimg=64, snapshots=()),
    )
    torch.manual_seed(0)
    net = alone.network.build(IMAGE, 0)
    teacher = EDM(copy.deepcopy(net).eval().requires_grad_(False), sigma_data=0.5)
    gdd.prepare(net, "gdd")
    critic = gan.critic_of(alone, "gdd", IMAGE, 0, lambda name: features(), pretrained=False)
    run = Run(
        net, alone.optimisation, 0, "id", tmp_path, CPU, ("discriminator", critic, alone.discriminator_lr)
    )
    before = [p.detach().clone() for p in net.parameters()]

    def read(positions):
        image = torch.from_numpy(rng.noise(9, "real", positions, IMAGE)).tanh()
        made = [gan._made(9, player, positions, IMAGE, 0) for player in ("generator", "critic")]
        return (
            (image, None),
            *made,
            (None,) * 3,
            gan.adversarial.r1_weight(positions.start // 32, 1e-4, 2),
            None,
        )

    rows = [
        step.report for step in fit(run, read, *gan.losses_of(alone, net, critic, teacher)) if step.report
    ]
    assert len(rows) == 1 and rows[0]["loss_discriminator"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters())) and {
        p.dtype for p in net.parameters()
    } == {torch.float32}
