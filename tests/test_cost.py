"""Counted cost against the published counts and against arithmetic."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from equilab.metrics.counting import flops, parameters
from equilab.models import get, vit
from equilab.models.layers import Attention
from equilab.solvers import Solver

IMAGE = (3, 32, 32)


def test_parameters_are_those_that_train():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert parameters(module) == 12 + 4 + 8
    module[0].weight.requires_grad_(False)
    assert parameters(module) == 4 + 8


def test_flops_of_products_are_twice_their_multiplications():
    a, b, image, kernel = torch.ones(3, 4), torch.ones(4, 5), torch.ones(2, 3, 8, 8), torch.ones(7, 3, 3, 3)
    assert flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert flops(lambda: torch.nn.functional.conv2d(image, kernel, padding=1)) == 2 * 2 * 7 * 8 * 8 * 27
    assert flops(lambda: (a + a).exp().sum()) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_is_counted_whatever_its_kernel(device, backend):
    attention, z = Attention(32, 4).to(device), torch.zeros(2, 16, 32, device=device)
    forward = 2 * 2 * 16 * 32 * (4 * 32 + 2 * 16)
    with sdpa_kernel(backend), torch.no_grad():
        assert flops(lambda: attention(z)) == forward


def bookkeeping(model, iterations):
    """Return what the published profiler (torchprofile 0.1.0) counts as multiplications beyond the products.

    One for each element that a LayerNorm with parameters returns, or that rearranges patches into an image; in
    torchdeq's solver four for each element of the state at each iteration (damping by 1, keeping the best) and two for
    each comparison of a residual with the best so far.
    """
    state = model.positions.numel()
    blocks = model.blocks(iterations) if iterations else model.blocks()
    norms = state * (2 * blocks + 1) + 3 * 32 * 32
    return norms + 4 * state * iterations + 2 * max(iterations - 1, 0)


def published(facts):
    return facts["get_and_vit_macs_batch1_input32_uncond"]["torchprofile_0.1.0"].items()


def test_vit_has_the_published_multiply_accumulates(facts):
    rows = [(name, counts) for name, counts in published(facts) if name.startswith("ViT")]
    assert len(rows) == 5
    for name, counts in rows:
        with torch.device("meta"):
            model, noise = vit.ViT(IMAGE, 0, **vit.SIZES[name]), torch.zeros(1, *IMAGE)
        assert flops(lambda: model(noise, None)) // 2 + bookkeeping(model, 0) == counts["eval_mode"], name


def test_get_has_the_published_multiply_accumulates(facts):
    rows = [(name, counts) for name, counts in published(facts) if name.startswith("GET")]
    assert len(rows) == 5
    solver = Solver("iterate", 6, 0.0, "last", record=True, measure=False)
    for name, counts in rows:
        with torch.device("meta"):
            model, noise = get.GET(IMAGE, 0, **get.SIZES[name]), torch.zeros(1, *IMAGE)
            one = flops(lambda: model(noise, None, None, solver)) // 2
            all_six = flops(lambda: model(noise, None, None, solver, return_iterates=True)) // 2
        assert one + bookkeeping(model, 6) == counts["eval_mode"], name
        state = model.positions.numel()
        training = bookkeeping(model, 6) - 4 * state * 6 - 10 + 5 * (state + 3 * 32 * 32)
        assert all_six + training == counts["train_mode_as_official"], name


def test_a_backward_pass_is_counted_with_its_forward_pass():
    with torch.device("meta"):
        model, noise = get.GET(IMAGE, 0, **get.SIZES["GET-T/2"]), torch.zeros(2, *IMAGE)
    solver = Solver("iterate", 6, 0.0, "last", measure=False)
    forward = flops(lambda: model(noise, None, None, solver))
    both = flops(lambda: model(noise, None, None, solver).image.sum().backward())
    assert 2.9 * forward < both < 3.2 * forward
