"""FPDM, the fixed point diffusion model: a DiT whose middle layers are one layer, applied any number of times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn
from torch.nn import functional as F

from equilab.core.config import Depth, Size
from equilab.models import dit
from equilab.models.family import Family
from equilab.models.layers import AdaLNBlock, AdaLNFinal, Linear, Transformer, unpatchify
from equilab.models.published_keys import Described, Published, blocks_of, heads_of
from equilab.solvers import Solution


class FPDM(Transformer):
    """Explicit pre layers, a fixed-point layer with their output injected, explicit post layers; all are DiT blocks.

    The state z (B, N, D) solves z = Block(W2 GELU(W1 [z, injection])) under timestep and class.
    `pre_post_timestep` conditions the pre, post and final layers on the timestep too: if false, they depend
    on the class alone.

    `learned_variance`, `image` and `classes` as of a DiT; `pre` and `post` may be 0.

    Raises: ValueError for sizes that do not fit each other.
    Source: FPDM (Bai and Melas-Kyriazi 2024), section 3.2, equations (1) to (4), and figure 2.
    Differs: how state and injection meet is left open by the paper and taken from its code: concatenated,
        through two linear maps with a GELU between, without residual or norm. An unconditional model has no
        label table; the published ones are trained on one class. No state is kept: what one call solved,
        `carry` hands to the next.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        *,
        width: Size,
        pre: Depth,
        post: Depth,
        heads: Size,
        patch: Size,
        expansion: Size,
        learned_variance: bool,
        pre_post_timestep: bool,
    ):
        super().__init__(image, classes, width, heads, patch, expansion=expansion)
        self.output = ((1 + learned_variance) * image[0], *image[1:])
        self.pre_post_timestep = pre_post_timestep
        self.condition = dit.Condition(classes, width)
        self.pre = nn.ModuleList(AdaLNBlock(width, heads, expansion, "tanh") for _ in range(pre))
        self.injection = Linear(width, width)
        self.merge1 = Linear(2 * width, 2 * width)
        self.merge2 = Linear(2 * width, width)
        self.fixed = AdaLNBlock(width, heads, expansion, "tanh")
        self.post = nn.ModuleList(AdaLNBlock(width, heads, expansion, "tanh") for _ in range(post))
        self.final = AdaLNFinal(width, patch * patch * self.output[0])

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Real[Tensor, b],
        label: Int64[Tensor, b] | None,
        carry: Float[Tensor, "k n d"] | None,
        solve: Callable,
    ) -> tuple[Float[Tensor, "b o h w"], Solution]:
        """Return the prediction for `x` at timesteps t >= 0, and the Solution of its state.

        `carry` is the state to start from: the z of an earlier call's solution, or None for the output of the
        pre layers. `solve(f, init)` finds the fixed point of f(z, rows), where `rows` are the samples to
        advance (None: all). A label is 0..classes - 1, or `classes`: the null class.

        Raises: ValueError if a label is missing or superfluous, or the carry does not fit x.
        """
        condition, alone = self.condition(t, label)  # (B, 1, D) each
        explicit = condition if self.pre_post_timestep else alone
        h = self.tokens(x)  # (B, N, D)
        for block in self.pre:
            h = block(h, explicit)  # (B, N, D)
        if carry is not None and carry.shape != h.shape:
            raise ValueError(
                f"carry has shape {tuple(carry.shape)}, the state {tuple(h.shape)}; "
                "give the z of a solution for as many images of the same size, or None"
            )
        solution = solve(self.map(h, condition), h if carry is None else carry)
        z = solution.z
        for block in self.post:
            z = block(z, explicit)  # (B, N, D)
        return unpatchify(self.final(z, explicit), self.output), solution  # (B, O, H, W)

    def map(self, h: Float[Tensor, "b n d"], condition: Float[Tensor, "b 1 d"]) -> Callable:
        """Return f(z, rows), one application of the fixed-point layer, for the output `h` of the pre layers.

        With W1 = [V U], W1 [z, injection] + b = V z + (U injection + b). The second term is the same in all
        applications, and so is what the condition makes of the block: both are computed once.
        """
        # FPDM-S/2, 256 tokens, batch 4, one CPU core: 14.3 applications a second, 12.0 with [z, injection] concatenated
        modulation = self.fixed.modulation(F.silu(condition))  # (B, 1, 6D)
        of_state, of_injection = self.merge1.weight.chunk(2, 1)  # (2D, D) each
        injected = F.linear(self.injection(h), of_injection, self.merge1.bias)  # (B, N, 2D)
        device = h.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # autocast remembers the cast of a whole parameter alone, and would cast this part in each application
            of_state = of_state.to(torch.get_autocast_dtype(device))

        def f(z: Tensor, rows: Tensor | None) -> Tensor:
            u, m = (injected, modulation) if rows is None else (injected[rows], modulation[rows])
            merged = torch.addmm(u.flatten(0, 1), z.flatten(0, 1), of_state.T)  # (B*N, 2D)
            merged = merged.unflatten(0, z.shape[:2])  # (B, N, 2D)
            state = self.merge2(F.gelu(merged, approximate="tanh")).to(z.dtype)  # (B, N, D)
            return self.fixed.modulated(state, m)  # (B, N, D)

        return f

    def blocks(self, iterations: int | float | Tensor) -> int | float | Tensor:
        """Return the transformer blocks applied in a call at these iterations: its block_evals.

        The two linear maps before the block of each iteration do not count, though they add a third to its FLOPs.

        Source: FPDM (Bai and Melas-Kyriazi 2024), section 4.2, footnote 4.
        """
        return len(self.pre) + iterations + len(self.post)


def from_published(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    pre_post_timestep: bool,
    prediction: str = "v",
    zero_terminal_snr: bool = True,
) -> Described:
    """Return the FPDM whose sizes the published `weights` have.

    Raises: ValueError for weights without the tensors that determine the sizes.
    """
    image, classes, sizes = dit.published_sizes(weights, "block_fixed_point")
    del sizes["depth"]
    sizes |= {
        "pre": blocks_of(weights, "blocks_pre"),
        "post": blocks_of(weights, "blocks_post"),
        "heads": heads,
        "pre_post_timestep": pre_post_timestep,
    }
    diffusion = dit.published_diffusion(sizes, classes, prediction, zero_terminal_snr)
    return Described(image, classes, sizes, diffusion)


def published_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings stored with published weights say that these do not: the heads, and who is told the timestep."""
    timestep = settings.get("fixed_point_pre_post_timestep_conditioning")
    found = heads_of(dit.SIZES)(settings)
    return found if timestep is None else {**found, "pre_post_timestep": timestep}


FAMILY = Family(
    name="fpdm",
    label="FPDM",
    colour="#d55e00",
    marker="P",
    stage="diffusion",
    kind="fpdm",
    network=FPDM,
    implicit=True,
    layered=True,
    published=Published(
        from_published,
        dit.published_keys,
        ("x_embedder.", "t_embedder.", "block_pre_projection.", "block_fixed_point."),
        published_config,
    ),
)
