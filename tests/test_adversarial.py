"""Adversarial losses, R1 and augmentation: closed forms, then the published values."""

import math

import torch
from conftest import golden, weights_of

from equilab import published
from equilab.training import adversarial

SIZE = 8


def linear(*weights):
    """Return a discriminator whose logits are linear in the image, one feature network for each weight (K, CHW)."""
    return lambda image, label: tuple(image.flatten(1) @ w.T for w in weights)


def toy(values):
    """Return the reference's discriminator and its two weights."""
    w1, w2 = values["in.disc.w1"].clone().requires_grad_(), values["in.disc.w2"].clone().requires_grad_()
    return (lambda image, label: (image.flatten(1) @ w1.T, image.sin().flatten(1) @ w2.T)), (w1, w2)


def r1(discriminate, image, label):
    """Return R1 of a discriminator at an image."""
    image = image.detach().requires_grad_()
    return adversarial.r1(discriminate(image, label), image)


def close(ours, reference, tolerance):
    """Compare relative to the reference's largest value."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * reference.abs().max().item())


def test_losses_of_constant_logits():
    zeros, threes = (torch.zeros(2, 4), torch.zeros(2, 7)), (torch.full((2, 4), 3.0), torch.full((2, 7), 3.0))
    torch.testing.assert_close(adversarial.generator_loss(zeros).item(), 2 * math.log(2))
    torch.testing.assert_close(adversarial.generator_loss(threes).item(), 2 * math.log(1 + math.exp(-3)))
    expected = 2 * (math.log(2) + math.log(1 + math.exp(3)))
    torch.testing.assert_close(adversarial.discriminator_loss(zeros, threes).item(), expected)


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_summed_weights():
    torch.manual_seed(0)
    w1, w2 = (
        torch.randn(5, 48, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 48, dtype=torch.float64),
    )
    penalty = r1(linear(w1, w2), torch.randn(3, 3, 4, 4, dtype=torch.float64), None)
    total = w1.sum(0) + w2.sum(0)
    torch.testing.assert_close(penalty, total.square().sum())
    penalty.backward()
    torch.testing.assert_close(w1.grad, 2 * total.detach().expand(5, -1))


def test_r1_of_a_quadratic_discriminator_is_four_times_the_squared_norm_of_the_image():
    image = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    penalty = r1(lambda image, label: (image.square().flatten(1),), image, None)
    torch.testing.assert_close(penalty, 4 * image.square().sum() / 3)


def test_all_losses_and_their_gradients_do_not_depend_on_how_a_batch_is_split():
    torch.manual_seed(0)
    w = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)

    def discriminate(image, label):
        return (image.flatten(1) @ w.T, image.flatten(1).sin() @ w.T)

    def losses(real, fake):
        logits = discriminate(real, None), discriminate(fake, None)
        yield adversarial.generator_loss(logits[1])
        yield adversarial.discriminator_loss(*logits)
        yield r1(discriminate, real, None)
        yield adversarial.overfitting(logits[0])

    whole = list(losses(real, fake))
    for parts in (2, 3, 6):
        split = [list(losses(*chunk)) for chunk in zip(real.chunk(parts), fake.chunk(parts))]
        for ours, pieces in zip(whole, zip(*split)):
            mean = torch.stack(pieces).mean()
            torch.testing.assert_close(ours, mean)
            if ours.requires_grad:
                gradients = [torch.autograd.grad(value, w, retain_graph=True)[0] for value in (ours, mean)]
                torch.testing.assert_close(*gradients)


def test_losses_and_gradients_are_the_published_ones_over_the_number_of_samples():
    t, _ = golden("gdd_ncsnpp")
    model, (discriminate, ws) = published.load("gdd", weights_of(t)).model, toy(t)
    loss = 3 * adversarial.generator_loss(discriminate(model.generate(t["in.z_generator"], None).image, None))
    close(loss, t["out.ns.G.loss"], 1e-5)
    loss.backward()
    gradients = {name.replace("net.", "model.", 1): p.grad for name, p in model.named_parameters()}
    keys = [key for key in t if key.startswith("out.ns.G.grad.")]
    assert len(keys) == 4
    for key in keys:
        close(gradients[key.removeprefix("out.ns.G.grad.")], t[key], 1e-4)
    fake = model.generate(t["in.z_discriminator"], None).image.detach()
    loss = 3 * adversarial.discriminator_loss(
        discriminate(t["in.real_images"], None), discriminate(fake, None)
    )
    close(loss, t["out.ns.D.loss"], 1e-5)
    for gradient, name in zip(torch.autograd.grad(loss, ws), ("w1", "w2")):
        close(gradient, t[f"out.ns.D.grad.{name}"], 1e-4)


def test_r1_and_its_gradients_are_the_published_ones():
    t, _ = golden("gdd_ncsnpp")
    discriminate, ws = toy(t)
    for image, reference in zip(t["in.real_images"], t["out.ns.R1.penalty_per_image"], strict=True):
        close(r1(discriminate, image[None], None), reference, 1e-5)
    loss = adversarial.r1_weight(1e-4, 16, samples=1) * r1(discriminate, t["in.real_images"], None)
    close(loss, t["out.ns.R1.loss_times_gain"], 1e-5)
    for gradient, name in zip(torch.autograd.grad(loss, ws), ("w1", "w2")):
        close(gradient, t[f"out.ns.R1.grad.{name}"], 1e-4)


def test_the_equivalent_gamma_gives_the_published_direction_on_any_number_of_devices():
    t, _ = golden("gdd_ncsnpp")
    discriminate, ws = toy(t)
    real, fake = t["in.real_images"], t["in.z_discriminator"]
    main = adversarial.discriminator_loss(discriminate(real, None), discriminate(fake, None))
    penalty = r1(discriminate, real, None)
    theirs = 3 * main + adversarial.r1_weight(1e-4, 1, samples=1) * penalty
    ours = main + adversarial.r1_weight(1e-4, 1, samples=3) * penalty
    gradients = [torch.cat(torch.autograd.grad(loss, ws, retain_graph=True)) for loss in (theirs, ours)]
    torch.testing.assert_close(gradients[0], 3 * gradients[1])


def test_overfitting_is_the_mean_sign_and_moves_the_probability_toward_its_target():
    assert (
        adversarial.overfitting((torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0], [-1.0]])))
        == 0.25
    )
    probability, ramp = 0.0, (adversarial.Adaptive(target=0.6, ramp_nimg=2560), 256)
    for _ in range(5):
        probability = adversarial.adapt(probability, 0.9, *ramp)
    torch.testing.assert_close(probability, 0.5)
    torch.testing.assert_close(adversarial.adapt(probability, 0.3, *ramp), 0.4)
    assert adversarial.adapt(probability, 0.6, *ramp) == probability
    assert adversarial.adapt(0.05, 0.0, *ramp) == 0 and adversarial.adapt(0.95, 1.0, *ramp) == 1


def test_draws_are_functions_of_their_index():
    rows = adversarial.draws(1, "augment", [4, 7])
    assert rows.shape == (2, adversarial.DRAWS) and rows.min() >= 0 and rows.max() < 1
    assert torch.equal(rows[1:], adversarial.draws(1, "augment", [7]))
    assert not torch.equal(rows[0], rows[1])


def augmented(image, gate=None, **amounts):
    """Return the images after one transformation of given amounts (the default changes nothing, but for cutout)."""
    names = ("brightness", "saturation", "contrast", "row", "column", "hole_row", "hole_column")
    gates = [0.0 if k == gate else 0.9 for k in range(3)]
    draws = torch.tensor([gates + [amounts.get(name, 0.5) for name in names]]).expand(len(image), -1)
    return adversarial.augment(image, draws, 0.5)


def test_each_augmentation_does_what_it_says():
    torch.manual_seed(0)
    image = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(augmented(image), image)
    torch.testing.assert_close(augmented(image, 0), image)
    torch.testing.assert_close(augmented(image, 0, brightness=0.9), image + 0.4)
    torch.testing.assert_close(
        augmented(image, 0, saturation=0.0), image.mean(1, keepdim=True).expand_as(image)
    )
    mean = image.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augmented(image, 0, contrast=0.0), (image + mean) / 2)
    assert torch.equal(augmented(image, 1), image)
    down, left = augmented(image, 1, row=0.99), augmented(image, 1, column=0.0)
    assert torch.equal(down[:, :, 1:], image[:, :, :-1]) and not down[:, :, 0].any()
    assert torch.equal(left[..., :-1], image[..., 1:]) and not left[..., -1].any()
    hole = augmented(image, 2)
    assert not hole[:, :, 2:6, 2:6].any() and hole.count_nonzero() == image.count_nonzero() * 3 / 4
    corner = augmented(image, 2, hole_row=0.0, hole_column=0.999)
    assert not corner[:, :, :2, 6:].any() and torch.equal(corner[:, :, 2:], image[:, :, 2:])


def test_augmentation_of_odd_sizes_moves_every_image_its_own_way_and_passes_gradients():
    image = torch.rand(64, 1, 7, 9, requires_grad=True)
    draws = adversarial.draws(0, "augment", range(64))
    out = adversarial.augment(image, draws, 1.0)
    assert torch.equal(out[3:5], adversarial.augment(image[3:5], draws[3:5], 1.0))
    cut = adversarial.augment(
        torch.ones_like(image), torch.cat([torch.full((64, 2), 0.9), draws[:, 2:]], 1), 0.9
    )
    assert (cut == 0).flatten(1).sum(1).max() == 4 * 5 and len(
        {tuple(row.flatten().tolist()) for row in cut}
    ) > 20
    (gradient,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert image.grad.isfinite().all() and image.grad.any()
    assert torch.equal(adversarial.augment(image, draws, 0.0), image)
    half = adversarial.augment(image, draws, 0.5)
    unchanged = sum(torch.equal(a, b) for a, b in zip(half, image))
    assert 2 <= unchanged <= 16  # expected: 64 / 8
