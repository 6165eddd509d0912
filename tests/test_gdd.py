"""GDD's generator and its frozen layers, against the published implementation and by themselves."""

import json

import pytest
import torch
from conftest import close, golden, weights_of
from reference import UNETS, hashed_unet

from equilab import published
from equilab.core.config import UserError
from equilab.metrics.counting import parameters
from equilab.models import gdd
from equilab.models.unet import UNet

TINY = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_channels": 0}
PUBLISHED = {
    "cifar10_ncsnpp_uncond": ((3, 32, 32), 0, "ncsnpp", UNETS["cifar10"]),
    "cifar10_ncsnpp_cond": ((3, 32, 32), 10, "ncsnpp", UNETS["cifar10"]),
    "ffhq64_ncsnpp_uncond": ((3, 64, 64), 0, "ncsnpp", UNETS["ffhq"]),
    "imagenet64_adm_cond": ((3, 64, 64), 1000, "adm", UNETS["imagenet"]),
}
SIGMAS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigmas": (80.0,)}


def network(image, classes, architecture, sizes):
    return UNet(image, classes, architecture=architecture, dropout=0.0, augment=0, **sizes)


def on_meta(name):
    with torch.device("meta"):
        return network(*PUBLISHED[name])


def test_coefficients_are_the_identity_at_sigma_min_and_nearly_the_network_at_sigma_max():
    sigma = torch.tensor([0.002, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = gdd.coefficients(sigma, sigma_data=0.5, sigma_min=0.002)
    assert (c_skip[0], c_out[0]) == (1, 0)
    torch.testing.assert_close(c_skip[1].item(), 0.25 / (79.998**2 + 0.25))
    torch.testing.assert_close(c_out[1].item(), 0.5 * 79.998 / (80**2 + 0.25) ** 0.5)
    torch.testing.assert_close(c_in, (sigma**2 + 0.25) ** -0.5)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def test_coefficients_agree_with_the_published_ones():
    t, _ = golden("gdd_ncsnpp")
    ours = gdd.coefficients(t["in.coef.t"], sigma_data=0.5, sigma_min=0.002)
    for value, name in zip(ours, ("c_skip", "c_out", "c_in", "c_noise")):
        torch.testing.assert_close(value, t[f"out.coef.{name}"], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_the_generator_agrees_with_the_published_one():
    t, _ = golden("gdd_ncsnpp")
    model, noise = published.load("gdd", weights_of(t)).model, t["in.z_generator"]
    image, solution = model.generate(noise, None)
    assert solution is None
    close(image, t["out.one_step"], 1e-5)
    assert torch.equal(model(noise, None).image, image)
    close(model.denoise(noise, 1.0, None).image, t["out.at_t1"], 1e-5)
    close(model.denoise(noise, torch.ones(3), None).image, t["out.at_t1"], 1e-5)
    close(model.denoise(t["in.real_images"], 0.002, None).image, t["out.at_tmin"], 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_full_size_generator_agrees_with_the_published_one():
    t, metadata = golden("full_gdd_cifar10_ncsnpp_uncond")
    model = hashed_unet("gdd", on_meta("cifar10_ncsnpp_uncond"))
    assert parameters(model) == int(metadata["parameters"])
    close(model.denoise(t["in.x"], t["in.sigma"], None).image, t["out.denoised"], 1e-5)


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_any_teacher_makes_a_generator_with_labels_and_gradients(architecture):
    torch.manual_seed(0)
    model = gdd.GDD(network((1, 8, 8), 3, architecture, TINY), **SIGMAS)
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = model.generate(noise, label).image
    assert not torch.allclose(image, model.generate(noise, label.flip(0)).image)
    image.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model.denoise(noise, 0.002, label).image, noise)


def parameters_of(net, **columns):
    """Return the parameters of the groups of layers whose row has these columns."""
    rows = gdd.table(net)
    return sum(row.parameters for row in rows if all(getattr(row, key) == columns[key] for key in columns))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_groups_of_layers_hold_the_published_parameters(name, facts):
    counts, net = facts["gdd_parameter_groups"][name], on_meta(name)
    published_names = {
        "embedding": "embedding mapping (map_*)",
        "convolution": "block conv0/conv1",
        "projection": "proj",
        "norm": "norm",
        "affine": "affine",
        "qkv": "qkv",
        "skip": "skip",
    }
    theirs = {key.removeprefix("other: "): value for key, value in counts["groups"].items()}
    for row in gdd.table(net):
        if row.group in published_names:
            expected = theirs.pop(published_names[row.group])
            assert row.parameters == expected["n"]
            assert 100 * row.share == pytest.approx(expected["percent"])
    ends = sum(parameters_of(net, group=group) for group in ("input", "residual input", "output"))
    assert ends == sum(value["n"] for value in theirs.values())
    assert parameters_of(net) == counts["total"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_variants_freeze_the_published_parameters(name, facts):
    net = on_meta(name)
    published_counts = facts["gdd_parameter_groups"][name]["freeze"].values()
    for variant, counts in zip(["gdd_i", "gdd_i_qkv", "gdd_i_qkv_skip"], published_counts, strict=True):
        gdd.prepare(net, variant)
        assert parameters_of(net, trained=True) == counts["trainable"]
        assert parameters_of(net, trained=False) == counts["frozen"]
    gdd.prepare(net, "gdd")
    assert parameters_of(net, trained=False) == 0


def test_shares_of_the_blocks_are_those_of_table_2(facts):
    rows = {row.group: row.parameters for row in gdd.table(on_meta("cifar10_ncsnpp_uncond"))}
    shares = {
        "norm_plus_affine": rows["norm"] + rows["affine"],
        "conv0_conv1_plus_proj": rows["convolution"] + rows["projection"],
        "qkv": rows["qkv"],
        "skip": rows["skip"],
    }
    total = sum(shares.values()) - 512  # the last norm is outside the blocks, though it counts as their share
    assert total == 55_393_024
    expected = facts["gdd_parameter_groups_unet_blocks_only_cifar10"]
    for key, count in shares.items():
        assert round(100 * count / total, 3) == expected[key]


def test_gdd_i_freezes_the_published_parameters_and_the_others_learn():
    t, metadata = golden("gdd_ncsnpp")
    model = published.load("gdd", weights_of(t)).model
    gdd.prepare(model.net, "gdd_i")
    trained = {name.replace("net.", "model.", 1) for name, p in model.named_parameters() if p.requires_grad}
    frozen = {
        name.replace("net.", "model.", 1) for name, p in model.named_parameters() if not p.requires_grad
    }
    assert trained == set(json.loads(metadata["trainable_in_gdd_i"]))
    assert frozen == set(json.loads(metadata["frozen_in_gdd_i"]))
    model.generate(t["in.z_generator"], None).image.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["gdd_i", "gdd"])
def test_a_variant_trains_the_published_number_of_parameters(variant):
    t, _ = golden("gdd_ncsnpp")
    model = published.load("gdd", weights_of(t)).model
    gdd.prepare(model.net, variant)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == t[f"out.{variant}.n_trainable"]


def test_a_group_frozen_in_part_has_two_rows_in_the_table():
    net = network((1, 8, 8), 0, "ddpmpp", TINY)
    net.dec.requires_grad_(False)
    norms = [row.trained for row in gdd.table(net) if row.group == "norm"]
    assert norms == [True, False]
    torch.testing.assert_close(sum(row.share for row in gdd.table(net)), 1.0)
    assert {group for group, _ in gdd.layers(net)} == set(gdd.GROUPS) - {"residual input"}


def test_layers_of_another_network_are_refused_by_their_name():
    with pytest.raises(ValueError, match="'0'"):
        list(gdd.layers(torch.nn.Sequential(torch.nn.Linear(1, 1))))


@pytest.mark.parametrize(
    ("sigma_min", "sigmas"), [(1.0, [0.5]), (0.002, [80.0, 80.0]), (0.002, []), (0.0, [80.0])]
)
def test_levels_that_do_not_fall_towards_sigma_min_are_refused(sigma_min, sigmas):
    with pytest.raises(ValueError, match=f"sigma_min {sigma_min}"):
        gdd.GDD(torch.nn.Identity(), sigma_data=0.5, sigma_min=sigma_min, sigmas=sigmas)


def test_weights_of_something_else_are_refused():
    with pytest.raises(UserError, match="'enc.'"):
        published.load("gdd", {})
