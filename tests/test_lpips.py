"""LPIPS against torch-fidelity's, with weights of our own in place of those that it fetches."""

import re

import pytest
import torch
from test_discriminator import torch_keys

from equilab.core.config import UserError
from equilab.models.feature_networks import Lpips, feature_network
from equilab.training import onestep

LEVELS = {"steps": 4, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}


@pytest.fixture
def weights(monkeypatch):
    """Put random weights where both implementations look for the trained ones."""
    torch.manual_seed(0)
    vgg = feature_network("vgg16", pretrained=False).maps
    trunk = dict(zip(torch_keys("vgg16"), vgg.state_dict().values(), strict=True))
    linear = {
        f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate([64, 128, 256, 512, 512])
    }
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trunk)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: linear)
    return vgg, linear


def test_the_distance_is_torch_fidelitys(weights, monkeypatch):
    from torch_fidelity import sample_similarity_lpips as theirs
    from torchvision.models import vgg16

    vgg, linear = weights
    trunk = vgg16()
    trunk.features.load_state_dict(
        dict(zip(trunk.features.state_dict(), vgg.state_dict().values(), strict=True))
    )
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: trunk)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: linear)
    reference = theirs.SampleSimilarityLPIPS("lpips", sample_similarity_resize=64)
    image, target = 2 * torch.rand(2, 3, 3, 32, 32) - 1
    expected = reference((image + 1) * 127.5, (target + 1) * 127.5).mean()
    torch.testing.assert_close(Lpips(64, pretrained=True)(image, target), expected, rtol=1e-4, atol=0)


def test_images_that_are_alike_are_at_no_distance_and_others_have_a_gradient(weights):
    distance, image = Lpips(32, pretrained=True), 2 * torch.rand(2, 3, 32, 32) - 1
    assert distance(image, image) == 0
    moved = image.clone().requires_grad_()
    distance(moved, torch.zeros_like(image)).backward()
    assert moved.grad.isfinite().all() and moved.grad.any()
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_a_consistency_loss_by_lpips_has_its_weights_or_says_where_they_belong(weights, monkeypatch):
    loss = onestep.ConsistencyLoss(levels=onestep.Levels(**LEVELS), metric="lpips", form="text")
    given = loss.distance(torch.device("cpu"))
    assert given.side == 224 and torch.equal(given.weight0, weights[1]["lin0.model.1.weight"].flatten())
    assert loss.distance(torch.device("meta")).weight0.device.type == "meta"

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(
        UserError,
        match=rf"lpips.*weights-vgg16-lpips\.pth .*no route to host.* {re.escape(torch.hub.get_dir())}",
    ):
        loss.distance(torch.device("cpu"))
