"""DiT against the published implementation, and by itself."""

import pytest
import torch
from conftest import close, golden, weights_of
from reference import hashed_model
from torch.nn import functional as F

from equilab import published
from equilab.core.config import UserError
from equilab.diffusion.discrete_samplers import explicit, guided
from equilab.metrics.counting import parameters
from equilab.models import dit

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch": 2, "expansion": 2, "learned_variance": True}

# the published code rounds the frequencies of its sinusoids to float32, which puts them up to 6e-5 off (tested below)
FORWARD, GRADIENT = 2e-5, 1e-4


def load():
    tensors, _ = golden("dit_tiny")
    return published.load("dit", weights_of(tensors), heads=2).model, tensors


def drawn():
    """Return a small model of 3 classes with weights under which every part of it matters."""
    torch.manual_seed(0)
    model = dit.DiT((1, 8, 8), 3, **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(4, 1, 8, 8), torch.randint(0, 1000, (4,)), torch.arange(4)


def test_dit_gives_the_published_prediction_loss_and_gradients():
    model, t = load()
    out = model(t["in.x"], t["in.t"], t["in.y"])
    close(out, t["out.y_hat"], FORWARD)
    loss = F.mse_loss(out, t["in.target"])
    close(loss, t["out.loss_mse"], 1e-5)
    loss.backward()
    ours, names = dict(model.named_parameters()), dit.published_keys(model)
    for key in ("blocks.0.adaLN_modulation.1.bias", "final_layer.linear.bias", "t_embedder.mlp.0.bias"):
        close(ours[names[key]].grad, t[f"out.grad_mse.{key}"], GRADIENT)


@torch.no_grad()
def test_a_guided_dit_predicts_as_published():
    model, t = load()
    predict = guided(explicit(model), 4.0, 10, "first_three")
    x, time, label = (t[f"in.cfg_{name}"][:2] for name in "xty")
    close(predict(x, time, label, None, None)[0], t["out.cfg"][:2], FORWARD)


def test_dit_takes_the_null_class_as_published():
    model, t = load()
    null = torch.full_like(t["in.y"], 10)
    close(model(t["in.x"], t["in.t"], null), t["out.y_hat_null"], FORWARD)
    label = torch.where(t["in.drop_ids"] == 1, null, t["in.y"])
    close(model.condition(t["in.t"], label)[1][:, 0], t["out.y_emb_forced_drop_first"], 0)


def test_with_the_published_sinusoids_dit_agrees_ten_times_closer():
    model, t = load()
    model.condition.sinusoid.register_forward_hook(lambda *_: t["out.t_freq"])
    both, alone = model.condition(t["in.t"], t["in.y"])
    close((both - alone)[:, 0], t["out.t_emb"], 1e-6)
    close(model(t["in.x"], t["in.t"], t["in.y"]), t["out.y_hat"], 2e-6)


def test_the_sinusoids_are_closer_to_their_equation_than_the_published_ones():
    t, _ = golden("dit_tiny")
    sinusoid = dit.Condition(0, 8).sinusoid
    times = {"t_freq": t["in.t"], "t_freq_fractional": torch.tensor([0.5, 12.25, 999.75])}
    for name, time in times.items():
        phase = time.double().outer(10000 ** -(torch.arange(128, dtype=torch.float64) / 128))
        exact = torch.cat([phase.cos(), phase.sin()], 1)
        ours, theirs = sinusoid(time.float()).double(), t[f"out.{name}"].double()
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() < 7e-5


def test_full_size_dit_gives_the_published_prediction():
    t, metadata = golden("full_dit-s-2")
    model = hashed_model("dit", (4, 32, 32), 1000, dit.SIZES[metadata["config"]["name"]])
    with torch.no_grad():
        close(model(t["in.x"], t["in.t"], t["in.y"]), t["out.y_hat"], FORWARD)


@pytest.mark.parametrize("name", dit.SIZES)
def test_all_sizes_of_dit_have_the_published_numbers_of_parameters(name, facts):
    counts = facts["dit_parameters_input32_classes1000"][name]
    with torch.device("meta"):
        model = dit.DiT((4, 32, 32), 1000, **dit.SIZES[name])
    assert parameters(model) == counts["trainable"]
    assert model.positions.numel() == counts["pos_embed"]


def test_all_published_sizes_of_dit_are_there(facts):
    assert {*facts["dit_parameters_input32_classes1000"]} == {*dit.SIZES}


def test_blocks_start_as_the_identity_and_the_network_at_zero():
    _, x, t, label = drawn()
    model, z = dit.DiT((1, 8, 8), 3, **SMALL), torch.randn(4, 16, 16)
    assert torch.equal(model.stack[0](z, torch.randn(4, 1, 16)), z)
    assert not model(x, t, label).any()


def test_every_input_matters():
    model, x, t, label = drawn()
    out = model(x, t, label)
    for other in (model(-x, t, label), model(x, t + 1, label), model(x, t, label.flip(0))):
        assert all((out - other).flatten(1).abs().amax(1) > 1e-4)


def test_timesteps_may_be_whole_numbers_or_floats():
    model, x, t, label = drawn()
    assert torch.equal(model(x, t, label), model(x, t.float(), label))


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 8, 4)])
@pytest.mark.parametrize(("learned_variance", "times"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(("classes", "label"), [(0, None), (3, torch.tensor([0, 3]))])
def test_images_of_any_size_with_and_without_classes_keep_their_size(
    image, learned_variance, times, classes, label
):
    model = dit.DiT(image, classes, **SMALL | {"learned_variance": learned_variance})
    out = model(torch.randn(2, *image), torch.tensor([0.5, 999.0]), label)
    assert out.shape == (2, times * image[0], *image[1:])


def test_block_evaluations_are_the_depth():
    assert dit.DiT((1, 8, 8), 0, **SMALL).blocks() == 2


@pytest.mark.parametrize(
    ("change", "key"),
    [({"patch": 3}, "image"), ({"heads": 3}, "width"), ({"width": 18}, "width"), ({"depth": 0}, "depth")],
)
def test_impossible_sizes_are_refused_by_name(change, key):
    with pytest.raises(ValueError, match=key):
        dit.DiT((1, 8, 8), 0, **SMALL | change)


def test_a_label_is_needed_exactly_if_there_are_classes():
    model, x, t, label = drawn()
    with pytest.raises(ValueError, match="no label is given"):
        model(x, t, None)
    with pytest.raises(ValueError, match="a label is given"):
        dit.DiT((1, 8, 8), 0, **SMALL)(x, t, label)


@pytest.mark.parametrize(
    "key", ["pos_embed", "x_embedder.proj.weight", "final_layer.linear.bias", "blocks.0.mlp.fc1.weight"]
)
def test_published_weights_that_lack_a_tensor_are_refused_by_its_name(key):
    weights = weights_of(golden("dit_tiny")[0])
    del weights[key]
    with pytest.raises(UserError, match=key):
        published.load("dit", weights, heads=2)


def test_published_weights_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(UserError, match="heads"):
        published.load("dit", weights_of(golden("dit_tiny")[0]), heads=5)
