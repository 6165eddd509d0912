"""DiT, the diffusion transformer: a noisy image, its timestep and its class in, a prediction out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn
from torch.nn import functional as F

from equilab.core.config import Depth, Size
from equilab.models import vit
from equilab.models.family import Family
from equilab.models.layers import AdaLNBlock, AdaLNFinal, Linear, Transformer, check_label, unpatchify
from equilab.models.published_keys import Described, Published, heads_of, need
from equilab.models.unet import Sinusoid

# DiT (Peebles and Xie 2023), table 1: width, depth and heads are those of ViT
SIZES = {
    f"DiT-{name}/{patch}": {**backbone, "patch": patch, "learned_variance": True}
    for name, backbone in vit.BACKBONES.items()
    for patch in (2, 4, 8)
}

# our key's beginning -> the published one, of DiT and FPDM
PUBLISHED = vit.PUBLISHED | {
    "condition.fc1.": "t_embedder.mlp.0.",
    "condition.fc2.": "t_embedder.mlp.2.",
    "condition.embedding.": "y_embedder.embedding_table.",
    "final.modulation.": "final_layer.modulation.",
    "pre.": "blocks_pre.",
    "injection.": "block_pre_projection.",
    "merge1.": "block_fixed_point_projection_fc1.",
    "merge2.": "block_fixed_point_projection_fc2.",
    "fixed.": "block_fixed_point.",
    "post.": "blocks_post.",
}


class Condition(nn.Module):
    """What the blocks are conditioned on: the embeddings of the timestep and of the class.

    256 sinusoids of the timestep pass two linear maps; a class is a row of a table, its last row the null class.

    Source: DiT (Peebles and Xie 2023), section 3.2 and appendix A.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.classes = classes
        self.sinusoid = Sinusoid(256, open_end=True)
        self.fc1 = Linear(256, width)
        self.fc2 = Linear(width, width)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)
        self.embedding = vit.class_embedding(classes + 1 if classes else 0, width)

    def forward(
        self, t: Real[Tensor, b], label: Int64[Tensor, b] | None
    ) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b 1 d"]]:
        """Return the condition of timestep and class together, and of the class alone (zeros without classes).

        Raises: ValueError if a label is missing, or given to an unconditional model.
        """
        check_label(label, self.classes)
        embedded = self.sinusoid(t.float())  # (B, 256)
        timestep = self.fc2(F.silu(self.fc1(embedded)))[:, None]  # (B, 1, D)
        if self.classes == 0:
            return timestep, torch.zeros_like(timestep)
        alone = self.embedding(label)[:, None]  # (B, 1, D)
        return timestep + alone, alone


class DiT(Transformer):
    """A vision transformer whose blocks are modulated by the timestep and the class: the explicit baseline of FPDM.

    With `learned_variance` it returns twice the channels: the prediction, then the values that a variance
    between its bounds is made of. `image` is (channels, height, width); `classes` 0 means unconditional.

    Raises: ValueError for sizes that do not fit each other.
    Source: DiT (Peebles and Xie 2023), section 3.2, adaLN-Zero.
    Differs: labels are not dropped here; who trains for classifier-free guidance hands in the null class.
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
        learned_variance: bool,
    ):
        super().__init__(image, classes, width, heads, patch, depth=depth, expansion=expansion)
        self.output = ((1 + learned_variance) * image[0], *image[1:])
        self.condition = Condition(classes, width)
        self.stack = nn.ModuleList(AdaLNBlock(width, heads, expansion, "tanh") for _ in range(depth))
        self.final = AdaLNFinal(width, patch * patch * self.output[0])

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Real[Tensor, b],
        label: Int64[Tensor, b] | None,
        return_activations: bool = False,
    ) -> Float[Tensor, "b o h w"] | tuple[Float[Tensor, "b o h w"], dict[str, Tensor]]:
        """Return the prediction for `x` at timesteps t >= 0; a label is 0..classes - 1, or `classes`: the null class.

        With `return_activations`, also what each block adds to its input (B, N, D), by "block" and its number.

        Raises: ValueError if a label is missing, or given to an unconditional model.
        """
        condition, _ = self.condition(t, label)  # (B, 1, D)
        z = self.tokens(x)  # (B, N, D)
        activations = {}
        for k, block in enumerate(self.stack):
            before = z
            z = block(z, condition)  # (B, N, D)
            if return_activations:
                activations[f"block.{k}"] = z - before
        out = unpatchify(self.final(z, condition), self.output)  # (B, O, H, W)
        return (out, activations) if return_activations else out

    def blocks(self) -> int:
        """Return the transformer blocks applied in a call: its block_evals."""
        return len(self.stack)


def from_published(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    prediction: str = "noise",
    zero_terminal_snr: bool = False,
) -> Described:
    """Return the DiT whose sizes the published `weights` have.

    Raises: ValueError for weights without the tensors that determine the sizes.
    """
    image, classes, sizes = published_sizes(weights, "blocks.0")
    diffusion = published_diffusion(sizes, classes, prediction, zero_terminal_snr)
    return Described(image, classes, {**sizes, "heads": heads}, diffusion)


def published_diffusion(
    sizes: Mapping[str, Any], classes: int, prediction: str, zero_terminal_snr: bool
) -> dict[str, Any]:
    """Return the diffusion that published DiTs and FPDMs are trained in, as params say it.

    Source: DiT (Peebles and Xie 2023), section 4; FPDM (Bai and Melas-Kyriazi 2024), section 4.1.
    """
    diffusion = {
        "timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "zero_terminal_snr": zero_terminal_snr,
        "prediction": prediction,
        "variance": "learned" if sizes["learned_variance"] else "large",
    }
    return {"label_dropout": 0.1 if classes else 0.0, "diffusion": diffusion}


def published_sizes(
    weights: Mapping[str, Tensor], block: str
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return (image, classes, {width, depth, patch, expansion, learned_variance}) of published DiT or FPDM weights.

    Images are square, `block` is a published block, and the last row of the label table is the null class.

    Raises: ValueError naming a tensor that is missing.
    """
    image, rows, sizes = vit.published_sizes(weights, block)
    outputs = len(need(weights, "final_layer.linear.bias", 1)) // sizes["patch"] ** 2  # channels
    return image, max(rows - 1, 0), sizes | {"learned_variance": outputs == 2 * image[0]}


def published_keys(model: nn.Module) -> dict[str, str]:
    """Return {published key: our key} of a DiT or FPDM."""
    names = vit.published_keys(model, PUBLISHED)
    return {key.replace(".modulation.", ".adaLN_modulation.1."): ours for key, ours in names.items()}


FAMILY = Family(
    name="dit",
    label="DiT",
    colour="#ca9161",
    marker="X",
    stage="diffusion",
    kind="dit",
    network=DiT,
    implicit=False,
    layered=True,
    published=Published(
        from_published, published_keys, ("x_embedder.", "blocks.", "t_embedder."), heads_of(SIZES)
    ),
)
