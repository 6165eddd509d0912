"""Discriminators against the published implementation, and by themselves."""

import math
import re
import sys

import pytest
import torch
from conftest import close, golden, weights_of
from torch import nn
from torch.nn import functional as F

from equilab.core.config import UserError, spec
from equilab.models import feature_networks
from equilab.models.classifier import Classifier
from equilab.models.discriminators import (
    FeatureDiscriminator,
    Head,
    Projector,
    Residual,
    StyleGAN2,
    equalised,
    minibatch_deviation,
)
from equilab.models.feature_networks import FeatureNetwork, classifier_network, feature_network
from equilab.training import adversarial

SIZES = {"channels": 4, "width": 16, "embedding": 5, "condition": 6}
PUBLISHED = {
    "mixing": "projected",
    "side": 224,
    "channels": 64,
    "width": 512,
    "embedding": 320,
    "condition": 64,
}


def small(classes=10, mixing="projected", side=8, channels=1):
    """Return a discriminator over a small untrained classifier."""
    torch.manual_seed(0)
    network = classifier_network(Classifier((channels, 8, 8), 10, width=8, features=8))
    return FeatureDiscriminator([network], (channels, 8, 8), classes, mixing=mixing, side=side, **SIZES)


def head_of(name):
    """Return the reference's head filled with its weights, its values and labels."""
    t, metadata = golden(f"gdd_disc_head_{name}")
    config = metadata["config"]
    sizes = {"width": 512, "embedding": config["embedding_dim"], "condition": config["cmap_dim"]}
    head = Head(config["in_channels"], 1, config["classes"], **sizes)
    names = {
        "main.0.main.": "halve.0.",
        "main.1.": "logits.",
        "cls.": "logits.",
        "embed.": "condition.embedding.",
        "embed_proj.weight": "condition.projection.parametrizations.weight.original",
        "embed_proj.bias": "condition.projection.bias",
    }
    weights = {}
    for key, value in weights_of(t).items():
        theirs = next(part for part in names if key.startswith(part))
        weights[key.replace(theirs, names[theirs], 1)] = value
    head.load_state_dict(weights)
    return head, t, t["in.c"].argmax(1) if "in.c" in t else None


@pytest.mark.parametrize("name", ["uncond", "cond"])
def test_heads_agree_with_the_published_ones_in_evaluation_and_training(name):
    head, t, label = head_of(name)
    close(head.eval()(t["in.x"], label), t["out.eval_before"], 1e-5)
    x = t["in.x"].clone().requires_grad_()
    logits = head.train()(x, label)
    close(logits, t["out.train"], 1e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    close(gradient, t["out.train_input_grad"], 1e-4)
    convolution, norm = head.halve[0][0], head.halve[0][1]
    last = "out.after_train.main.1.weight_u" if name == "uncond" else "out.after_train.cls.weight_u"
    close(convolution.weight_u, t["out.after_train.main.0.main.0.weight_u"], 1e-5)
    close(head.logits.weight_u, t[last], 1e-5)
    close(norm.running_mean, t["out.after_train.main.0.main.1.running_mean"], 1e-5)
    close(norm.running_var, t["out.after_train.main.0.main.1.running_var"], 1e-5)
    close(head.eval()(t["in.x"], label), t["out.eval_after"], 1e-5)


def test_projected_maps_agree_with_the_published_ones():
    t, metadata = golden("gdd_feature_projector")
    projector = Projector(metadata["config"]["backbone_channels"], metadata["config"]["cout"])
    weights = {}
    names = {"ccm": "across_channels", "csm": "across_scales"}
    for key, value in weights_of(t).items():
        level, kind, parameter = re.fullmatch(r"layer(\d)_(ccm|csm)\..*\b(\w+)", key).groups()
        weights[f"{names[kind]}.{level}.{parameter}"] = value
    projector.load_state_dict(weights)
    maps = projector([t[f"in.feat{level}"] for level in range(4)])
    for level, ours in enumerate(maps):
        close(ours, t[f"out.out{level}"], 1e-5)
    assert not any(p.requires_grad for p in projector.parameters())


def parameters_of(module, trained=None):
    """Return the number of parameters, all or those that are trained or not."""
    return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))


@pytest.mark.parametrize(("kind", "classes"), [("uncond", 0), ("cond", 1000)])
def test_the_projected_discriminator_over_vgg_has_the_published_sizes(kind, classes, facts):
    reference = facts["gdd_discriminator"]["backbone1"]
    with torch.device("meta"):
        network = feature_network("vgg16_bn", pretrained=False)
        model = FeatureDiscriminator([network], (3, 32, 32), classes, **PUBLISHED)
        label = torch.zeros(2, dtype=torch.int64) if classes else None
        logits = model(torch.zeros(2, 3, 32, 32), label)
        maps = model.projectors[0](network.features(torch.zeros(1, 3, 224, 224))[-4:])
    assert parameters_of(model, trained=True) == reference[kind]["parameters_per_backbone"]["vgg16_bn"]
    assert parameters_of(model.projectors) == reference["projector_parameters"]["vgg16_bn"]
    assert [list(x.shape[1:]) for x in maps] == list(reference["feature_shapes"][0].values())
    assert [tuple(x.shape) for x in logits] == [(2, 4 * 11 * 11)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "unused"),
    [("backbone0", 2 * (768 * 1000 + 1000)), ("backbone1", 0)],  # DeiT has two classifiers
)
def test_the_published_pairs_of_networks_have_the_published_sizes(backbone, unused, facts):
    reference = facts["gdd_discriminator"][backbone]
    with torch.device("meta"):
        networks = [feature_network(name, pretrained=False) for name in reference["backbones"]]
        model = FeatureDiscriminator(networks, (3, 64, 64), 0, **PUBLISHED)
        logits = model(torch.zeros(2, 3, 64, 64), None)
    projectors = [parameters_of(projector) for projector in model.projectors]
    assert projectors == list(reference["projector_parameters"].values())
    assert parameters_of(model, trained=True) == reference["uncond"]["parameters"]
    assert parameters_of(model, trained=False) + unused == reference["feature_net_parameters"]
    assert [list(x.shape[1:]) for x in logits] == reference["uncond"]["returned_element_shapes"][::2]


@pytest.mark.parametrize("mixing", ["projected", "each", "last"])
@pytest.mark.parametrize("classes", [0, 10])
def test_only_heads_learn_and_gradients_reach_the_image(mixing, classes):
    model = small(classes, mixing).train()
    assert model.heads.training and not any(module.training for module in model.networks[0].modules())
    image, label = torch.rand(3, 1, 8, 8), torch.tensor([0, 3, 9]) if classes else None
    (logits,) = model(image, label)
    levels = 1 if mixing == "last" else 2
    assert logits.shape == (3, levels)
    penalty = adversarial.r1(model(image.requires_grad_(), label), image)
    (adversarial.generator_loss((logits,)) + penalty).backward()
    assert penalty > 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == name.startswith("heads."), name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_images_are_resized_once_and_seen_by_every_network_as_it_was_trained():
    torch.manual_seed(0)
    seen = []

    class Record(nn.Module):
        def forward(self, image):
            seen.append(image)
            return [image]

    networks = [
        FeatureNetwork("a", Record(), 3, feature_networks.IMAGENET),
        FeatureNetwork("b", Record(), 3, feature_networks.HALF),
    ]
    model = FeatureDiscriminator(networks, (3, 4, 4), 0, mixing="last", side=8, **SIZES)
    seen.clear()
    image = torch.rand(2, 3, 4, 4) * 2 - 1
    assert len(model(image, None)) == 2
    expected = F.interpolate(image, 8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[1], expected)
    mean, std = (torch.tensor(values)[:, None, None] for values in feature_networks.IMAGENET)
    torch.testing.assert_close(seen[0], ((expected + 1) / 2 - mean) / std)


def test_maps_of_vgg_are_those_before_each_pooling():
    network = feature_network("vgg16", pretrained=False)
    maps = network.features(torch.rand(1, 3, 32, 32))
    assert [tuple(x.shape[1:3]) for x in maps] == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]


def test_lpips_sees_directions_only():
    model = small(0, "each")
    doubled = [2 * x for x in model.networks[0].features(torch.rand(1, 1, 8, 8))]
    for one, other in zip(model.mix(0, doubled), model.mix(0, [x / 2 for x in doubled])):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.norm(dim=1), torch.ones_like(one[:, 0]))
    zero = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.mix(0, [zero])[0].sum(), zero, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), zero)[0].isfinite().all()


def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2((1, 8, 8), 10, width=8, embedding=5, condition=6)


@pytest.mark.parametrize("build", [small, stylegan2])
def test_a_label_is_needed_and_changes_the_logits_of_its_image_alone(build):
    model = build().eval()
    image = torch.rand(3, 1, 8, 8)
    (first,) = model(image, torch.tensor([0, 1, 2]))
    (second,) = model(image, torch.tensor([0, 1, 3]))
    assert torch.equal(first[:2], second[:2])
    assert not torch.allclose(first[2], second[2])
    with pytest.raises(ValueError, match="no label"):
        model(image, None)


def test_minibatch_deviation_of_known_values():
    x = torch.tensor([0.0, 0.0, 2.0, 4.0, 0.0, 0.0, 2.0, 4.0]).view(8, 1, 1, 1).expand(8, 2, 4, 4)
    out = minibatch_deviation(x)
    assert torch.equal(out[:, :2], x)
    # of (0, 2, 0, 2) and (0, 4, 0, 4)
    expected = torch.tensor([1.0, 2.0]).repeat(4)[:, None, None].expand(8, 4, 4)
    torch.testing.assert_close(out[:, 2], expected)
    torch.testing.assert_close(minibatch_deviation(x[:3])[:, 2], torch.full((3, 4, 4), 1e-4))


def test_equalised_layers_start_at_unit_gain_and_learn_at_the_same_rate():
    torch.manual_seed(0)
    for layer in (nn.Linear(400, 300), nn.Conv2d(50, 60, 3)):
        weight = equalised(layer).weight
        fan_in = weight[0].numel()
        torch.testing.assert_close(weight.std().item(), fan_in**-0.5, rtol=0.02, atol=0)
        weight.sum().backward()
        original = layer.parametrizations.weight.original
        torch.testing.assert_close(original.grad, torch.full_like(original, fan_in**-0.5))


@pytest.mark.parametrize("classes", [0, 3])
def test_stylegan2_keeps_its_scale_and_every_parameter_learns(classes):
    torch.manual_seed(0)
    model = StyleGAN2((3, 16, 16), classes, width=32, embedding=4, condition=4)
    image, label = torch.randn(64, 3, 16, 16), torch.arange(64) % classes if classes else None
    (logits,) = model(image, label)
    assert logits.shape == (64, 1) and 0.05 < logits.std() < 5
    loss = adversarial.discriminator_loss((logits,), (logits,))
    penalty = adversarial.r1(model(image.requires_grad_(), label), image)
    (loss + penalty).backward()
    unused = {"logits.bias"} if not classes else set()  # real and generated images push it apart alike
    for name, parameter in model.named_parameters():
        assert name in unused or parameter.grad.any(), name
    assert len(model.blocks) == 2


def test_a_label_given_to_an_unconditional_discriminator_is_refused():
    model = StyleGAN2((3, 4, 4), 0, width=8, embedding=4, condition=4)
    with pytest.raises(ValueError, match="a label"):
        model(torch.zeros(1, 3, 4, 4), torch.tensor([0]))


def test_a_residual_block_of_a_constant_image_is_known():
    """Inside, away from the zeros around the image, a blur keeps a constant and a convolution sums its weights."""
    torch.manual_seed(0)
    block = Residual(3)
    x = torch.full((1, 3, 16, 16), 0.7)

    def constant(layer, value):
        value = layer.weight.sum((2, 3)) @ value
        return value if layer.bias is None else value + layer.bias

    def activate(value):
        return F.leaky_relu(value, 0.2) * math.sqrt(2)

    value = x[0, :, 0, 0]
    main = activate(constant(block.conv1, activate(constant(block.conv0, value))))
    expected = (main + constant(block.skip[1], value)) * math.sqrt(0.5)
    torch.testing.assert_close(block(x)[0, :, 4, 4], expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"side": 2}, "1x1.*side"),
        ({"image": (3, 8, 8)}, "1 channels.* 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, named):
    network = classifier_network(Classifier((1, 8, 8), 10, width=8, features=8))
    config = {
        "networks": [network],
        "image": (1, 8, 8),
        "classes": 0,
        "mixing": "projected",
        "side": 8,
        **SIZES,
    }
    with pytest.raises(ValueError, match=named):
        FeatureDiscriminator(**config | change)


@pytest.mark.parametrize(
    ("change", "named"), [({"mixing": "mixed"}, "mixing: 'mixed'.*projected"), ({"width": 4}, "width")]
)
def test_params_out_of_their_range_are_refused_by_their_key(change, named):
    given = {"kind": "features", "mixing": "projected", "side": 8, **SIZES, **change}
    with pytest.raises(UserError, match=rf"discriminator\.{named}"):
        spec({"features": FeatureDiscriminator}, given, "discriminator")


def test_images_that_are_too_small_for_a_network_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"vgg16.*\(3, 8, 8\).*side"):
        feature_network("vgg16", pretrained=False).probe((3, 8, 8))


def test_a_network_of_timm_needs_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it raises ImportError
    with pytest.raises(ValueError, match="timm"):
        feature_network("tf_efficientnet_lite0", pretrained=False)


def test_weights_that_cannot_be_fetched_are_refused_with_the_reason(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="vgg16_bn.*no route to host"):
        feature_network("vgg16_bn", pretrained=True)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_is_filled_with_the_fetched_weights_read_without_running_anything(monkeypatch, name):
    options = {}
    source = feature_network(name, pretrained=False).maps
    weights = dict(zip(torch_keys(name), source.state_dict().values(), strict=True))

    def fetch(url, **kwargs):
        options.update(kwargs)
        return weights | {"classifier.6.bias": torch.zeros(1000)}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    filled = feature_network(name, pretrained=True).maps
    image = torch.rand(1, 3, 16, 16)
    for ours, theirs in zip(filled(image), source.eval()(image), strict=True):
        assert torch.equal(ours, theirs)
    assert options == {"check_hash": True, "weights_only": True}


def torch_keys(name):
    """Return the names of torchvision's weights of the convolutional part of a VGG."""
    from torchvision.models import get_model

    with torch.device("meta"):
        return [key for key in get_model(name, weights=None).state_dict() if key.startswith("features.")]


@pytest.mark.parametrize("side", [3, 12, 20, 2])
def test_stylegan2_takes_only_squares_that_halve_to_4(side):
    with pytest.raises(ValueError, match="4x4"):
        StyleGAN2((3, side, side), 0, width=8, embedding=4, condition=4)
