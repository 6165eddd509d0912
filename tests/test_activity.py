"""Layer activity: what networks tell of their layers, and sums over samples."""

import pytest
import torch

from equilab.models.dit import DiT
from equilab.models.layers import unpatchify
from equilab.models.unet import Block, UNet
from equilab.stages.activation import Activity


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_a_unet_tells_what_its_last_convolutions_put_out_and_is_not_changed_by_it(architecture):
    torch.manual_seed(0)
    net = UNet(
        (1, 8, 8),
        3,
        architecture=architecture,
        width=8,
        multipliers=[1, 2],
        blocks=1,
        attention=[4],
        head_channels=0,
        dropout=0.0,
        augment=0,
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, level, label = torch.randn(2, 1, 8, 8), torch.randn(2), torch.tensor([0, 2])
    kept = {}
    for name, layer in net.named_modules():
        if isinstance(layer, Block):
            last = (
                layer.proj if layer.heads else layer.conv1
            )  # what attention ends with is a convolution as well
            last.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out.clone()}))
    out, told = net(x, level, label, return_activations=True)
    assert list(told) == list(kept) and len(told) == 10
    assert any(layer.heads for layer in net.modules() if isinstance(layer, Block))
    assert all(torch.equal(told[name], kept[name]) for name in told)
    assert torch.equal(out, net(x, level, label))


def test_a_dit_tells_what_each_block_adds():
    torch.manual_seed(0)
    net = DiT((1, 8, 8), 3, width=16, depth=3, heads=2, patch=2, expansion=2, learned_variance=False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    given = torch.randn(2, 1, 8, 8), torch.tensor([3, 5]), torch.tensor([0, 3])
    out, added = net(*given, return_activations=True)
    assert list(added) == ["block.0", "block.1", "block.2"] and torch.equal(out, net(*given))
    condition, _ = net.condition(*given[1:])
    state = net.patches(given[0]) + net.positions + sum(added.values())
    torch.testing.assert_close(unpatchify(net.final(state, condition), net.output), out)


def test_mean_and_root_mean_square_do_not_depend_on_how_samples_come():
    torch.manual_seed(0)
    value = torch.randn(6, 3, 2)
    whole, parts = Activity(), Activity()
    whole.update(1, 80.0, {"a": value})
    for part in value.split([1, 2, 3]):
        parts.update(1, 80.0, {"a": part})
    (one,), (other,) = whole.rows(), parts.rows()
    assert one["mean"] == pytest.approx(value.mean().item(), abs=1e-6)
    assert one["rms"] == pytest.approx(value.square().mean().sqrt().item(), rel=1e-6)
    assert other["mean"] == pytest.approx(one["mean"]) and other["rms"] == pytest.approx(one["rms"])
    assert len(parts.sums) == 1
