"""ViT as a one-step generator: noise in, image out."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.models import Generated
from equilab.models.layers import (
    AdaLNBlock,
    AdaLNFinal,
    Block,
    Final,
    Patches,
    check_label,
    check_sizes,
    sine_cosine_table,
    unpatchify,
)
from equilab.published import need

# GET (Geng 2023), table 8 and figure 2; heads are those of DiT's models of the same size
SIZES = {
    f"ViT-{name}/{patch}": {
        "width": width,
        "depth": depth,
        "heads": heads,
        "patch": patch,
        "expansion": 4,
        "conditioning": "additive",
    }
    for name, width, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
    for patch in (2, 4, 8)
}


class ViT(nn.Module):
    """A vision transformer that maps noise (and a class) to an image in one pass: the explicit baseline of GET.

    Two ways to tell it the class (GET, appendix A): "additive" adds an embedding to query, key and value of every
    block; "adaln_zero" modulates norms and gates as DiT does. The 128.9M parameters that table 6 gives ViT-B for the
    latter follow (128,944,908) if the class embedding alone drives six chunks a block and two in the decoder, the norms
    lose their own parameters, and the position table is counted, as everywhere in the paper.

    `image` is (channels, height, width); `classes` 0 means unconditional.

    Raises: ValueError for sizes that do not fit each other.
    Source: GET (Geng 2023), section 4 and tables 6 and 8.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        expansion: int,
        conditioning: str,
    ):
        super().__init__()
        check_sizes(image, classes, width, heads, patch, depth=depth, expansion=expansion)
        if conditioning not in ("additive", "adaln_zero") or (conditioning, classes) == ("adaln_zero", 0):
            raise ValueError(f"conditioning is {conditioning!r}; choose 'additive', or 'adaln_zero' if there are classes")
        self.image, self.classes = image, classes
        self.patches = Patches(image[0], width, patch)
        self.register_buffer("positions", sine_cosine_table(width, image[1] // patch, image[2] // patch))
        outputs = patch * patch * image[0]
        if conditioning == "additive":
            self.embedding = nn.Embedding(classes, 3 * width) if classes else None
            self.blocks = nn.ModuleList(Block(width, heads, expansion) for _ in range(depth))
            self.final = Final(width, outputs)
        else:
            self.embedding = nn.Embedding(classes, width)
            self.blocks = nn.ModuleList(AdaLNBlock(width, heads, expansion, "none") for _ in range(depth))
            self.final = AdaLNFinal(width, outputs)
        if classes:
            nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, noise: Float[Tensor, "b c h w"], label: Int64[Tensor, "b"] | None) -> Generated:
        """Return the image generated from `noise`, and no solution.

        Raises: ValueError if a label is missing, or given to an unconditional model.
        """
        check_label(label, self.classes)
        z = self.patches(noise) + self.positions  # (B, N, D)
        ...
