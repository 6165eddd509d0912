"""ViT and GET against the published implementations, and by themselves."""

import pytest
import torch
from conftest import close, golden, weights_of
from reference import hashed_model, signed_uniform
from torch.nn import functional as F

from equilab import published
from equilab.core.config import UserError, spec
from equilab.metrics.counting import parameters
from equilab.models import get, vit
from equilab.solvers import Gradient, Solver, equilibrium

HEADS = 2  # of the small reference models

SMALL = {"width": 16, "depth": 1, "heads": 2, "patch": 2, "expansion": 2}
SMALL_GET = {**SMALL, "equilibrium_depth": 2, "equilibrium_expansion": 3, "normalise": False}


def small_get(classes, **changes):
    """Return a small GET, its final layer drawn at random: it starts at zero, and so would every image be."""
    torch.manual_seed(0)
    model = get.GET((1, 4, 4), classes, **SMALL_GET | changes)
    torch.nn.init.normal_(model.final.linear.weight)
    return model


def load(family, name):
    tensors, _ = golden(f"{family}_{name}")
    return published.load(family, weights_of(tensors), heads=HEADS).model, tensors, tensors.get("in.y")


@pytest.mark.parametrize("name", ["uncond", "cond"])
def test_vit_gives_the_published_image_loss_and_gradient(name):
    model, t, label = load("vit", name)
    image, solution = model(t["in.x"], label)
    assert solution is None
    close(image, t["out.y_hat"], 1e-5)
    loss = F.l1_loss(image, t["in.target"])
    close(loss, t["out.loss_l1"], 1e-5)
    loss.backward()
    close(model.stack[0].attn.qkv.weight.grad, t["out.grad_l1.blocks.0.attn.qkv.weight"], 1e-4)


@pytest.mark.parametrize("name", ["uncond", "cond"])
def test_get_gives_the_published_injections_and_images_after_k_iterations(name):
    model, t, label = load("get", name)
    injections = torch.cat(model.inject(t["in.x"], label), 2)
    if label is not None:  # the published ones are without the class
        injections = injections - model.embedding(label).repeat(1, 2)[:, None]
    close(injections, t["out.injection"], 1e-5)
    for k in (1, 2, 3, 6):
        image = model(t["in.x"], label, t["in.z0"], Solver("iterate", k, 0.0, "last")).image
        close(image, t[f"out.plain_iter{k}"], 1e-5)


@pytest.mark.parametrize("name", ["uncond", "cond"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_get_evaluates_at_the_lowest_residual_as_published(name, k):
    model, t, label = load("get", name)
    solver = Solver("iterate", k, 0.0, "lowest", record=True)
    image, solution = model(t["in.x"], label, t["in.z0"], solver)
    close(image, t[f"out.official_eval_iter{k}"], 1e-5)
    iterates = torch.stack(solution.iterates)
    before = torch.stack([t["in.z0"], *solution.iterates[:-1]])
    distances = (iterates - before).flatten(2).norm(dim=2).T  # (B, K)
    close(distances, t[f"out.official_eval_abs_residual_trace_iter{k}"][:, 1:], 1e-5)
    relative = distances / iterates.flatten(2).norm(dim=2).T
    torch.testing.assert_close(solution.residuals, relative, rtol=1e-5, atol=0)
    best = t[f"out.official_eval_best_step_iter{k}"].long()
    assert torch.equal(distances.argmin(1) + 1, best)
    assert torch.equal(solution.z, iterates[best - 1, torch.arange(len(best))])


@pytest.mark.parametrize("name", ["uncond", "cond"])
@pytest.mark.parametrize("method", ["unrolled", "o1"])
@pytest.mark.parametrize("loss_name", ["fp_correction", "last_l1"])
def test_get_trains_with_the_published_losses_and_gradients(name, method, loss_name):
    model, t, label = load("get", name)
    solver = Solver("iterate", 6, 0.0, "last", record=True, measure=False)

    def solve(f, init):
        return equilibrium(f, init, solver, Gradient(method))

    images = model(t["in.x"], label, t["in.z0"], solve, return_iterates=True).image
    close(images, t["out.train_preds"], 1e-5)
    losses = (images - t["in.target"]).abs().flatten(1).mean(1)
    close(losses, t["out.loss_per_iterate"], 1e-5)
    loss = (losses * 0.8 ** torch.arange(5, -1, -1)).sum() if loss_name == "fp_correction" else losses[-1]
    close(loss, t[f"out.loss_{loss_name}"], 1e-5)
    loss.backward()
    names = vit.published_keys(model)
    ours = dict(model.named_parameters())
    prefix = f"out.grad_{loss_name}."
    published_gradients = {key.removeprefix(prefix): t[key] for key in t if key.startswith(prefix)}
    assert len(published_gradients) >= 4
    for key, gradient in published_gradients.items():
        close(ours[names[key]].grad, gradient, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_get_gives_the_published_image():
    t, metadata = golden("full_get-b-2plus")
    model = hashed_model("get", (3, 32, 32), 0, get.SIZES[metadata["config"]["name"]])
    z0 = torch.from_numpy(signed_uniform("z0", 256 * 768) * 3**0.5).float().reshape(1, 256, 768)
    solver = Solver("iterate", 2, 0.0, "last", record=True)
    images = model(t["in.x"], None, z0, solver, return_iterates=True).image
    close(images[0], t["out.plain_iter1"], 1e-5)
    close(images[1], t["out.plain_iter2"], 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_vit_gives_the_published_image():
    t, metadata = golden("full_vit-b-2")
    model = hashed_model("vit", (3, 32, 32), 0, vit.SIZES[metadata["config"]["name"]])
    close(model(t["in.x"], None).image, t["out.y_hat"], 1e-5)


SIZES = {
    **{name: (get.GET, sizes) for name, sizes in get.SIZES.items()},
    **{name: (vit.ViT, sizes) for name, sizes in vit.SIZES.items()},
}


def test_all_published_sizes_are_there(facts):
    names = facts["get_and_vit_parameters_input32_classes10"]
    assert {name.removesuffix(" cond") for name in names} == {*SIZES}


@pytest.mark.parametrize("name", SIZES)
def test_all_sizes_have_the_published_numbers_of_parameters(name, facts):
    table = facts["get_and_vit_parameters_input32_classes10"]
    network, sizes = SIZES[name]
    for entry, classes in ((name, 0), (f"{name} cond", 10)):
        if entry in table:
            with torch.device("meta"):
                model = network((3, 32, 32), classes, **sizes)
            assert parameters(model) == table[entry]["trainable"]
            assert model.positions.numel() == table[entry]["pos_embed"]


def test_vit_with_adaln_zero_has_the_size_of_table_6():
    with torch.device("meta"):
        model = vit.ViT((3, 32, 32), 10, **vit.SIZES["ViT-B/2"] | {"conditioning": "adaln_zero"})
    assert parameters(model) + model.positions.numel() == 128_944_908


def test_vit_with_adaln_zero_starts_at_zero_and_then_uses_noise_and_label():
    torch.manual_seed(0)
    model = vit.ViT((1, 4, 4), 3, **SMALL, conditioning="adaln_zero")
    noise, label = torch.randn(1, 1, 4, 4).expand(2, -1, -1, -1), torch.tensor([0, 2])
    assert not model(noise, label).image.any()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    first, second = model(noise, label).image
    assert not torch.allclose(first, second)
    assert not torch.allclose(model(-noise, label).image[0], first)


@pytest.mark.parametrize("classes", [0, 3])
def test_get_and_vit_start_at_the_grey_image_as_published(classes):
    noise, label = torch.randn(2, 1, 4, 4), torch.tensor([0, 2]) if classes else None
    solver = Solver("iterate", 2, 0.0, "last")
    assert not get.GET((1, 4, 4), classes, **SMALL_GET)(noise, label, None, solver).image.any()
    assert not vit.ViT((1, 4, 4), classes, **SMALL, conditioning="additive")(noise, label).image.any()


def test_normalised_states_have_zero_mean_and_unit_variance():
    model = small_get(0, normalise=True)
    z = model(torch.randn(3, 1, 4, 4), None, None, Solver("iterate", 3, 0.0, "last")).solution.z
    torch.testing.assert_close(z.mean(2), torch.zeros(3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.var(2, correction=0), torch.ones(3, 4), rtol=1e-4, atol=0)


def test_a_get_used_twice_gives_the_same_bits():
    model = small_get(3)
    noise, label = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    solver = Solver("iterate", 4, 0.0, "last")
    first = model(noise, label, None, solver)
    model(torch.randn(3, 1, 4, 4), label, first.solution.z, solver)
    second = model(noise, label, None, solver)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.solution.residuals, second.solution.residuals)


def test_a_get_starts_at_zeros_and_its_samples_do_not_touch_each_other():
    model = small_get(3, normalise=True)
    noise, label = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    solver = Solver("iterate", 40, 1e-3, "last")
    image, solution = model(noise, label, torch.zeros(3, *model.state_shape), solver)
    torch.testing.assert_close(model(noise, label, None, solver).image, image, rtol=0, atol=0)
    for i in range(3):
        alone = model(noise[i : i + 1], label[i : i + 1], None, solver)
        torch.testing.assert_close(alone.image[0], image[i], rtol=0, atol=1e-5)
        assert alone.solution.iterations[0] == solution.iterations[i]


def test_block_evaluations_follow_from_the_iterations():
    with torch.device("meta"):
        model = get.GET((3, 32, 32), 0, **get.SIZES["GET-T/2"])
        baseline = vit.ViT((3, 32, 32), 0, **vit.SIZES["ViT-L/2"])
    assert model.blocks(6) == 24
    assert model.blocks(torch.tensor([1, 6])).tolist() == [9, 24]
    assert model.state_shape == (256, 256)
    assert baseline.blocks() == 24


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch": 3}, "image"),
        ({"heads": 3}, "width"),
        ({"width": 18}, "width"),
        ({"depth": 0}, "depth"),
        ({"expansion": 0}, "expansion"),
        ({"equilibrium_depth": 0}, "equilibrium_depth"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, key):
    with pytest.raises(ValueError, match=key):
        get.GET((1, 4, 4), 0, **SMALL_GET | change)


def test_a_label_is_needed_exactly_if_there_are_classes():
    noise, solver = torch.zeros(1, 1, 4, 4), Solver("iterate", 1, 0.0, "last")
    with pytest.raises(ValueError, match="no label"):
        get.GET((1, 4, 4), 3, **SMALL_GET)(noise, None, None, solver)
    with pytest.raises(ValueError, match="a label"):
        vit.ViT((1, 4, 4), 0, **SMALL, conditioning="additive")(noise, torch.tensor([0]))


def test_a_conditioning_that_lacks_classes_is_refused():
    with pytest.raises(ValueError, match="adaln_zero"):
        vit.ViT((1, 4, 4), 0, **SMALL, conditioning="adaln_zero")


def test_an_unknown_conditioning_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"network\.conditioning: 'concatenated'.*additive"):
        spec({"vit": vit.ViT}, {"kind": "vit", **SMALL, "conditioning": "concatenated"}, "network")


@pytest.mark.parametrize("family", ["get", "vit"])
@pytest.mark.parametrize(
    "key", ["pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.bias"]
)
def test_published_weights_that_lack_a_tensor_are_refused_by_its_name(family, key):
    weights = weights_of(golden(f"{family}_cond")[0])
    del weights[key]
    with pytest.raises(UserError, match=key):
        published.load(family, weights, heads=HEADS)


@pytest.mark.parametrize("family", ["get", "vit"])
def test_published_weights_that_do_not_fit_the_heads_are_refused(family):
    with pytest.raises(UserError, match="heads"):
        published.load(family, weights_of(golden(f"{family}_cond")[0]), heads=5)


def test_all_iterates_need_a_recording_solver():
    model, solver = get.GET((1, 4, 4), 0, **SMALL_GET), Solver("iterate", 1, 0.0, "last")
    with pytest.raises(ValueError, match="record"):
        model(torch.zeros(1, 1, 4, 4), None, None, solver, return_iterates=True)
