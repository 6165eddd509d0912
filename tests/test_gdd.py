"""GDD's generator and its frozen layers, against the published implementation and by themselves."""

import json

import pytest
import torch
from conftest import golden, weights_of
from hashed import hashed_weights

from equilab import published
from equilab.core.config import UserError
from equilab.models import gdd
from equilab.models.unet import UNet

CIFAR10 = {"width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attention": (16,), "head_channels": 0}
FFHQ = {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "head_channels": 0}
IMAGENET = {
    "width": 192,
    "multipliers": (1, 2, 3, 4),
    "blocks": 3,
    "attention": (32, 16, 8),
    "head_channels": 64,
}
TINY = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_channels": 0}
PUBLISHED = {
    "cifar10_ncsnpp_uncond": ((3, 32, 32), 0, "ncsnpp", CIFAR10),
    "cifar10_ncsnpp_cond": ((3, 32, 32), 10, "ncsnpp", CIFAR10),
    "ffhq64_ncsnpp_uncond": ((3, 64, 64), 0, "ncsnpp", FFHQ),
    "imagenet64_adm_cond": ((3, 64, 64), 1000, "adm", IMAGENET),
}
SIGMAS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigmas": (80.0,)}


def network(image, classes, architecture, sizes):
    return UNet(image, classes, architecture=architecture, dropout=0.0, augment=0, **sizes)


def on_meta(name):
    with torch.device("meta"):
        return network(*PUBLISHED[name])


def close(ours, reference, tolerance):
    """Compare relative to the reference's largest value."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * reference.abs().max().item())


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
    model, noise = published.load("gdd", weights_of(t)), t["in.z_generator"]
    image, solution = model.generate(noise, None)
    assert solution is None
    close(image, t["out.one_step"], 1e-5)
    assert torch.equal(model(noise, None).image, image)
    close(model.denoise(noise, 1.0, None).image, t["out.at_t1"], 1e-5)
    close(model.denoise(noise, torch.ones(3), None).image, t["out.at_t1"], 1e-5)
    close(model.denoise(t["in.real_images"], 0.002, None).image, t["out.at_tmin"], 1e-5)


@torch.no_grad()
def test_the_full_size_generator_agrees_with_the_published_one():
    t, metadata = golden("full_gdd_cifar10_ncsnpp_uncond")
    shapes = {
        f"model.{key}": value.shape for key, value in on_meta("cifar10_ncsnpp_uncond").state_dict().items()
    }
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    weights = {key: taps.outer(taps)[None, None] / 64 for key in shapes if key.endswith("resample_filter")}
    weights |= hashed_weights({key: shape for key, shape in shapes.items() if key not in weights})
    model = published.load("gdd", weights)
    assert sum(p.numel() for p in model.parameters()) == int(metadata["parameters"])
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_and_the_variants_hold_the_published_groups(name, facts):
    counts, net = facts["gdd_parameter_groups"][name], on_meta(name)
    rows = {row.group: row for row in gdd.table(net)}
    groups = {key.removeprefix("other: "): value for key, value in counts["groups"].items()}
    ours = {
        "embedding": "embedding mapping (map_*)",
        "convolution": "block conv0/conv1",
        "projection": "proj",
    }
    for group in ("embedding", "norm", "affine", "convolution", "projection", "qkv", "skip"):
        expected = groups.pop(ours.get(group, group))
        assert rows[group].parameters == expected["n"]
        torch.testing.assert_close(100 * rows[group].share, expected["percent"])
    rest = sum(row.parameters for row in rows.values() if row.group in ("input", "residual input", "output"))
    assert rest == sum(value["n"] for value in groups.values())
    assert sum(row.parameters for row in rows.values()) == counts["total"]
    variants = [variant for variant in gdd.VARIANTS if variant != "gdd"]
    for variant, published_counts in zip(variants, counts["freeze"].values(), strict=True):
        gdd.prepare(net, variant)
        assert sum(row.parameters for row in gdd.table(net) if row.trained) == published_counts["trainable"]
        assert sum(row.parameters for row in gdd.table(net) if not row.trained) == published_counts["frozen"]
    gdd.prepare(net, "gdd")
    assert all(row.trained for row in gdd.table(net))


def test_shares_of_the_blocks_are_those_of_table_2(facts):
    rows = {row.group: row.parameters for row in gdd.table(on_meta("cifar10_ncsnpp_uncond"))}
    blocks = facts["gdd_parameter_groups_unet_blocks_only_cifar10"]
    total = 55_393_024  # without the last norm, whose 512 parameters are outside the blocks
    assert (
        total
        == sum(rows[group] for group in ("norm", "affine", "convolution", "projection", "qkv", "skip")) - 512
    )
    shares = [
        rows["norm"] + rows["affine"],
        rows["convolution"] + rows["projection"],
        rows["qkv"],
        rows["skip"],
    ]
    expected = [blocks[key] for key in ("norm_plus_affine", "conv0_conv1_plus_proj", "qkv", "skip")]
    assert [round(100 * share / total, 3) for share in shares] == expected


def test_gdd_i_freezes_the_published_parameters_and_the_others_learn():
    t, metadata = golden("gdd_ncsnpp")
    model = published.load("gdd", weights_of(t))
    gdd.prepare(model.net, "gdd_i")
    trained = {name.replace("net.", "model.", 1) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(json.loads(metadata["trainable_in_gdd_i"]))
    frozen = {name.replace("net.", "model.", 1) for name, p in model.named_parameters()} - trained
    assert frozen == set(json.loads(metadata["frozen_in_gdd_i"]))
    model.generate(t["in.z_generator"], None).image.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == t["out.gdd_i.n_trainable"]
    gdd.prepare(model.net, "gdd")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == t["out.gdd.n_trainable"]


def test_any_predicate_may_freeze_and_a_group_frozen_in_part_has_two_rows():
    net = network((1, 8, 8), 0, "ddpmpp", TINY)
    gdd.freeze(net, lambda layer: layer.name.startswith("dec."))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if not name.startswith("dec.")}
    norms = [row.trained for row in gdd.table(net) if row.group == "norm"]
    assert norms == [True, False]
    torch.testing.assert_close(sum(row.share for row in gdd.table(net)), 1.0)
    assert {layer.group for layer in gdd.layers(net)} == set(gdd.GROUPS) - {"residual input"}


def test_what_freezes_nothing_or_everything_or_is_unknown_is_refused():
    net = network((1, 8, 8), 0, "ddpmpp", TINY)
    with pytest.raises(ValueError, match="freezes none of the"):
        gdd.freeze(net, lambda layer: layer.group == "residual input")
    with pytest.raises(ValueError, match="freezes every one of the"):
        gdd.freeze(net, lambda layer: True)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="'gdd_ii' is unknown.*nearest: gdd_i"):
        gdd.prepare(net, "gdd_ii")
    with pytest.raises(ValueError, match="'0' belongs to no group"):
        list(gdd.layers(torch.nn.Sequential(torch.nn.Linear(1, 1))))
    for sigma_min, sigmas in ((1.0, [0.5]), (0.002, [80.0, 80.0]), (0.002, []), (0.0, [80.0])):
        with pytest.raises(ValueError, match="give levels that fall"):
            gdd.GDD(net, sigma_data=0.5, sigma_min=sigma_min, sigmas=sigmas)
    with pytest.raises(UserError, match="state dict of an EDM network"):
        published.load("gdd", {})
