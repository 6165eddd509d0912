"""GET, the Generative Equilibrium Transformer: noise in, image out, with a fixed point for depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.core.config import Depth, Size
from equilab.diffusion.protocols import Generated
from equilab.models.family import Family
from equilab.models.layers import Block, Final, Linear, Transformer, check_label, normalised, unpatchify
from equilab.models.published_keys import Described, Published, blocks_of, heads_of, need
from equilab.models.vit import class_embedding, published_keys, published_sizes

# GET (Geng 2023), table 7, where E of GET-Small is printed as 6 but its 37.2M parameters need 8; a head has 64 channels
SHARED = {"patch": 2, "expansion": 4, "equilibrium_depth": 3, "normalise": False}
SIZES = {
    "GET-T/2": {"width": 256, "depth": 6, "heads": 4, "equilibrium_expansion": 6, **SHARED},
    "GET-M/2": {"width": 384, "depth": 6, "heads": 6, "equilibrium_expansion": 6, **SHARED},
    "GET-S/2": {"width": 512, "depth": 6, "heads": 8, "equilibrium_expansion": 8, **SHARED},
    "GET-B/2": {"width": 768, "depth": 1, "heads": 12, "equilibrium_expansion": 12, **SHARED},
    "GET-B/2+": {"width": 768, "depth": 6, "heads": 12, "equilibrium_expansion": 8, **SHARED},
}


class GET(Transformer):
    """An injection transformer read once, an equilibrium transformer applied until its state no longer changes.

    The state z (B, N, D) is the fixed point of `step` under the injections of `inject`; `decode` makes it an image.

    `image` is (channels, height, width); `classes` 0 means unconditional.

    Raises: ValueError for sizes that do not fit each other.
    Source: GET (Geng 2023), section 3, equations (6) to (9).
    Differs: with `normalise`, z passes a LayerNorm without parameters after each application of the
        weight-tied stack. This is not in the paper, where z grows along a direction and the residual falls
        like 1/k only.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        *,
        width: Size,
        depth: Depth,
        heads: Size,
        patch: Size,
        expansion: Size,
        equilibrium_depth: Depth,
        equilibrium_expansion: Size,
        normalise: bool,
    ):
        depths = {"depth": depth, "equilibrium_depth": equilibrium_depth}
        expansions = {"expansion": expansion, "equilibrium_expansion": equilibrium_expansion}
        super().__init__(image, classes, width, heads, patch, **depths, **expansions)
        self.image, self.classes, self.normalise = image, classes, normalise
        self.embedding = class_embedding(classes, 3 * width)
        self.stack = nn.ModuleList(Block(width, heads, expansion) for _ in range(depth))
        self.injection = Linear(width, 3 * width * equilibrium_depth, bias=False)
        tied = [Block(width, heads, equilibrium_expansion) for _ in range(equilibrium_depth)]
        self.equilibrium = nn.ModuleList(tied)
        self.final = Final(width, patch * patch * image[0])

    @property
    def state_shape(self) -> tuple[int, int]:
        """The shape (N, D) of the equilibrium state of an image."""
        return tuple(self.positions.shape[1:])

    def inject(self, noise: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None) -> tuple[Tensor, ...]:
        """Return what each equilibrium block adds to query, key and value: (B, N, 3D) each, the class included.

        Raises: ValueError if a label is missing, or given to an unconditional model.
        """
        check_label(label, self.classes)
        condition = self.embedding(label)[:, None] if self.classes else None  # (B, 1, 3D)
        h = self.tokens(noise)  # (B, N, D)
        for block in self.stack:
            h = block(h, condition)  # (B, N, D)
        injections = self.injection(h).chunk(len(self.equilibrium), 2)  # (B, N, 3D) each
        return injections if condition is None else tuple(u + condition for u in injections)

    def step(self, z: Float[Tensor, "b n d"], injections: tuple[Tensor, ...]) -> Float[Tensor, "b n d"]:
        """Return the state after one application of the weight-tied stack: the map whose fixed point is sought."""
        for block, injection in zip(self.equilibrium, injections):
            z = block(z, injection)  # (B, N, D)
        return normalised(z) if self.normalise else z

    def decode(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        """Return the images of states."""
        return unpatchify(self.final(z), self.image)  # (B, C, H, W)

    def forward(
        self,
        noise: Float[Tensor, "b c h w"],
        label: Int64[Tensor, b] | None,
        init: Float[Tensor, "b n d"] | None,
        solve: Callable,
        return_iterates: bool = False,
    ) -> Generated:
        """Return the image generated from `noise`, and the Solution of its state.

        `init` is the state to start from (None: zeros; published: unit normal noise, drawn anew), `solve(f, init)` finds the
        fixed point of f(z, rows), where `rows` are the samples to advance (None: all). With `return_iterates`, the image is
        (K, B, C, H, W), of all iterates.

        Raises: ValueError if a label is missing or superfluous, or iterates are asked of a solver that does not record.
        """
        injections = self.inject(noise, label)

        def f(z: Tensor, rows: Tensor | None) -> Tensor:
            return self.step(z, injections if rows is None else tuple(u[rows] for u in injections))

        if init is None:
            init = noise.new_zeros(len(noise), *self.state_shape)
        solution = solve(f, init)
        if not return_iterates:
            return Generated(self.decode(solution.z), solution)
        if not solution.iterates:
            raise ValueError(
                "return_iterates is true, but the solution holds no iterates; solve with record=True"
            )
        images = self.decode(torch.cat(solution.iterates))  # (K*B, C, H, W)
        return Generated(images.unflatten(0, (-1, len(noise))), solution)  # (K, B, C, H, W)

    def blocks(self, iterations: int | float | Tensor) -> int | float | Tensor:
        """Return the transformer blocks applied for an image at these iterations: its block_evals."""
        return len(self.stack) + len(self.equilibrium) * iterations


def from_published(weights: Mapping[str, Tensor], *, heads: int) -> Described:
    """Return the GET whose sizes the published `weights` have.

    Raises: ValueError for weights without the tensors that determine the sizes.
    """
    image, classes, sizes = published_sizes(weights)
    sizes |= {
        "heads": heads,
        "equilibrium_depth": blocks_of(weights, "deq_blocks"),
        "equilibrium_expansion": need(weights, "deq_blocks.0.mlp.fc1.weight", 2).shape[0] // sizes["width"],
        "normalise": False,
    }
    return Described(image, classes, sizes, {})


FAMILY = Family(
    name="get",
    label="GET",
    colour="#0173b2",
    marker="o",
    stage="distill",
    kind="get",
    network=GET,
    implicit=True,
    layered=True,
    published=Published(
        from_published,
        published_keys,
        ("x_embedder.", "blocks.", "qkv_inj.", "deq_blocks."),
        heads_of(SIZES),
    ),
)
