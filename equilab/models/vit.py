"""ViT as a one-step generator: noise in, image out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.core.config import Depth, Size
from equilab.diffusion.protocols import Generated
from equilab.models.family import Family
from equilab.models.layers import AdaLNBlock, AdaLNFinal, Block, Final, Transformer, check_label, unpatchify
from equilab.models.published_keys import Described, Published, blocks_of, heads_of, need

# GET (Geng 2023), table 8, with the other sizes of figure 2; a head has 64 channels (72 in XL), as in DiT
BACKBONES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "expansion": 4},
    "B": {"width": 768, "depth": 12, "heads": 12, "expansion": 4},
    "L": {"width": 1024, "depth": 24, "heads": 16, "expansion": 4},
    "XL": {"width": 1152, "depth": 28, "heads": 16, "expansion": 4},
}
SIZES = {
    f"ViT-{name}/{patch}": {**backbone, "patch": patch, "conditioning": "additive"}
    for name, backbone in BACKBONES.items()
    for patch in (2, 4, 8)
}

# our key's beginning -> the published one, of ViT and GET
PUBLISHED = {
    "patches.": "x_embedder.",
    "positions": "pos_embed",
    "embedding.": "y_embedder.embedding_table.",
    "stack.": "blocks.",
    "injection.": "qkv_inj.",
    "equilibrium.": "deq_blocks.",
    "final.norm.": "final_layer.norm_final.",
    "final.linear.": "final_layer.linear.",
}


class ViT(Transformer):
    """A vision transformer that maps noise (and a class) to an image in one pass: the explicit baseline of GET.

    Two ways to condition it on the class (GET, appendix A): "additive" adds an embedding to query, key and
    value of every block; "adaln_zero" modulates norms and gates as DiT does. The 128.9M parameters that table
    6 gives ViT-B for the latter follow (128,944,908) if the class embedding alone drives six chunks a block
    and two in the decoder, the norms lose their own parameters, and the position table is counted, as
    everywhere in the paper.

    `image` is (channels, height, width); `classes` 0 means unconditional.

    Raises: ValueError for sizes that do not fit each other.
    Source: GET (Geng 2023), section 4 and tables 6 and 8.
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
        conditioning: Literal["additive", "adaln_zero"],
    ):
        super().__init__(image, classes, width, heads, patch, depth=depth, expansion=expansion)
        if (conditioning, classes) == ("adaln_zero", 0):
            raise ValueError("conditioning is 'adaln_zero', but there are no classes; choose 'additive'")
        self.image, self.classes, self.conditioning = image, classes, conditioning
        outputs = patch * patch * image[0]
        if conditioning == "additive":
            self.embedding = class_embedding(classes, 3 * width)
            self.stack = nn.ModuleList(Block(width, heads, expansion) for _ in range(depth))
            self.final = Final(width, outputs)
        else:
            self.embedding = class_embedding(classes, width)
            self.stack = nn.ModuleList(AdaLNBlock(width, heads, expansion, "none") for _ in range(depth))
            self.final = AdaLNFinal(width, outputs)

    def forward(self, noise: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None) -> Generated:
        """Return the image generated from `noise`, and no solution.

        Raises: ValueError if a label is missing, or given to an unconditional model.
        """
        check_label(label, self.classes)
        condition = None
        if self.classes:
            condition = self.embedding(label)[:, None]  # (B, 1, 3D); of adaln_zero (B, 1, D)
        z = self.tokens(noise)  # (B, N, D)
        for block in self.stack:
            z = block(z, condition)  # (B, N, D)
        patches = self.final(z) if self.conditioning == "additive" else self.final(z, condition)
        return Generated(unpatchify(patches, self.image), None)  # (B, C, H, W)

    def blocks(self) -> int:
        """Return the transformer blocks applied for an image."""
        return len(self.stack)


def class_embedding(classes: int, width: int) -> nn.Embedding | None:
    """Return the table of class embeddings, small at the start; None without classes."""
    if classes == 0:
        return None
    table = nn.Embedding(classes, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


def from_published(weights: Mapping[str, Tensor], *, heads: int) -> Described:
    """Return the ViT whose sizes the published `weights` have.

    Raises: ValueError for weights without the tensors that determine the sizes.
    """
    image, classes, sizes = published_sizes(weights)
    return Described(image, classes, {**sizes, "heads": heads, "conditioning": "additive"}, {})


def published_sizes(
    weights: Mapping[str, Tensor], block: str = "blocks.0"
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return (image, rows of the label table, {width, depth, patch, expansion}) of published weights; images are square.

    `block` is the published block whose expansion is read; without a label table, its rows are 0.

    Raises: ValueError naming a tensor that is missing.
    """
    width, channels, patch, _ = need(weights, "x_embedder.proj.weight", 4).shape
    side = round(need(weights, "pos_embed", 3).shape[1] ** 0.5) * patch
    table = weights.get("y_embedder.embedding_table.weight")
    rows = 0 if table is None else len(table)
    sizes = {
        "width": width,
        "depth": blocks_of(weights, "blocks"),
        "patch": patch,
        "expansion": need(weights, f"{block}.mlp.fc1.weight", 2).shape[0] // width,
    }
    return (channels, side, side), rows, sizes


def published_keys(model: nn.Module, table: Mapping[str, str] = PUBLISHED) -> dict[str, str]:
    """Return {published key: our key} of a ViT or GET, or of another model by its `table` of how keys begin."""
    names = {}
    for key in model.state_dict():
        ours, published = next(pair for pair in table.items() if key.startswith(pair[0]))
        names[published + key[len(ours) :]] = key
    return names


FAMILY = Family(
    name="vit",
    label="ViT",
    colour="#de8f05",
    marker="^",
    stage="distill",
    kind="vit",
    network=ViT,
    implicit=False,
    layered=False,
    published=Published(from_published, published_keys, ("x_embedder.", "blocks."), heads_of(SIZES)),
)
