"""Transformer layers that ViT, GET and their relatives share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of every LayerNorm


class Linear(nn.Linear):
    """A linear map that starts at Xavier-uniform weights and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Patches(nn.Module):
    """The image cut into patches, each mapped to a token; tokens in row order."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the tokens of `image`."""
        return self.proj(image).flatten(2).mT.contiguous()  # (B, N, D)


class Transformer(nn.Module):
    """What every transformer here begins with: the tokens of an image's patches, each with its position.

    `image` is (channels, height, width); `classes` 0 means unconditional. `sizes` are all others that must be 1 or more.

    Raises: ValueError naming the size that does not fit.
    """

    def __init__(
        self, image: tuple[int, int, int], classes: int, width: int, heads: int, patch: int, **sizes: int
    ):
        super().__init__()
        for name, size in {"width": width, "heads": heads, "patch": patch, **sizes}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; give 1 or more")
        if min(image) < 1 or image[1] % patch or image[2] % patch:
            raise ValueError(
                f"image is {image} (channels, height, width); give multiples of the patch, {patch}"
            )
        if width % heads or width % 4:
            raise ValueError(f"width is {width}; give a multiple of 4 and of the heads, {heads}")
        if classes < 0:
            raise ValueError(f"classes is {classes}; give their number, 0 for an unconditional model")
        self.patches = Patches(image[0], width, patch)
        self.register_buffer("positions", sine_cosine_table(width, image[1] // patch, image[2] // patch))

    def tokens(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the tokens of `image`, their positions added."""
        return self.patches(image) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention whose query, key and value take an additive injection u: (q, k, v) = z W_i + u.

    Source: GET (Geng 2023), section 3, equation (10).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self, z: Float[Tensor, "b n d"], injection: Float[Tensor, "b m 3*d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the attended tokens; an injection of one token (m = 1) is added to all."""
        qkv = self.qkv(z)  # (B, N, 3D)
        if injection is not None:
            qkv = qkv + injection
        parts = [part.unflatten(2, (self.heads, -1)) for part in qkv.chunk(3, 2)]  # (B, N, H, D/H) each
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, H, N, D/H) each
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two linear maps with a GELU between, exact ("none") or by the hyperbolic tangent ("tanh")."""

    def __init__(self, width: int, hidden: int, gelu: str):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.gelu = gelu

    def forward(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the mapped tokens."""
        return self.fc2(F.gelu(self.fc1(z), approximate=self.gelu))


class Block(nn.Module):
    """A pre-norm transformer block with an additive injection: z + Attention(LN(z), u), then z + MLP(LN(z)).

    Source: GET (Geng 2023), section 3, "Transformer Block".
    """

    def __init__(self, width: int, heads: int, expansion: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = MLP(width, expansion * width, "none")

    def forward(
        self, z: Float[Tensor, "b n d"], injection: Float[Tensor, "b m 3*d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens after one block."""
        z = z + self.attn(self.norm1(z), injection)  # (B, N, D)
        return z + self.mlp(self.norm2(z))  # (B, N, D)


class AdaLNBlock(nn.Module):
    """A transformer block whose norms are modulated and whose branches are gated by a condition; starts as identity.

    Source: DiT (Peebles and Xie 2023), section 3.2, adaLN-Zero.
    """

    def __init__(self, width: int, heads: int, expansion: int, gelu: str):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, expansion * width, gelu)
        self.modulation = ZeroLinear(width, 6 * width)

    def forward(self, z: Float[Tensor, "b n d"], condition: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b n d"]:
        """Return the tokens after one block."""
        return self.modulated(z, self.modulation(F.silu(condition)))

    def modulated(
        self, z: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 1 6*d"]
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens after one block; of a block that is applied many times, the modulation is the same."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 2)  # (B, 1, D) each
        z = z + gate1 * self.attn(modulate(z, shift1, scale1))  # (B, N, D)
        return z + gate2 * self.mlp(modulate(z, shift2, scale2))  # (B, N, D)


class Final(nn.Module):
    """The decoder of tokens to patches: LayerNorm, then a linear map that starts at zero.

    Source: GET (Geng 2023), section 3, "Image Decoder"; the start is that of the published code, of GET and of ViT,
        and not in the paper.
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.linear = ZeroLinear(width, outputs)

    def forward(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n o"]:
        """Return a patch for each token."""
        return self.linear(self.norm(z))  # (B, N, O)


class AdaLNFinal(nn.Module):
    """The decoder of tokens to patches whose norm is shifted and scaled by a condition; starts at zero.

    Source: DiT (Peebles and Xie 2023), section 3.2, "Transformer decoder".
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = ZeroLinear(width, outputs)
        self.modulation = ZeroLinear(width, 2 * width)

    def forward(self, z: Float[Tensor, "b n d"], condition: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b n o"]:
        """Return a patch for each token."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, 2)  # (B, 1, D) each
        return self.linear(modulate(z, shift, scale))  # (B, N, O)


def modulate(
    z: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """Return LN(z) (1 + scale) + shift, the LayerNorm without parameters."""
    return torch.addcmul(shift, normalised(z), 1 + scale)


def normalised(z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Return z with each token at zero mean and unit variance: a LayerNorm without parameters."""
    return F.layer_norm(z, z.shape[-1:], eps=EPS)


def sine_cosine_table(width: int, rows: int, columns: int) -> Float[Tensor, "1 n d"]:
    """Return the position table of a grid in row order: half of the channels for the column, half for the row.

    Each half holds the sines, then the cosines, of the index times 10000^(-k / (width / 4)).
    """
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    by_column = column.reshape(-1, 1) * frequencies  # (N, D/4)
    by_row = row.reshape(-1, 1) * frequencies  # (N, D/4)
    table = torch.cat([by_column.sin(), by_column.cos(), by_row.sin(), by_row.cos()], 1)  # (N, D)
    return table[None].float()  # (1, N, D)


def unpatchify(patches: Float[Tensor, "b n o"], image: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    """Return the image (channels, height, width) that the patches make up; channels run fastest within a patch."""
    channels, height, width = image
    patch = round((patches.shape[2] / channels) ** 0.5)
    pixels = patches.unflatten(2, (patch, patch, channels))  # (B, N, P, P, C)
    grid = pixels.unflatten(1, (height // patch, width // patch))  # (B, H/P, W/P, P, P, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)  # (B, C, H, W)


def check_label(label: Tensor | None, classes: int) -> None:
    """Raise unless there is a label exactly where a model has classes.

    Raises: ValueError for a label that is missing, or given to an unconditional model.
    """
    if (label is None) != (classes == 0):
        given = "no label is given" if label is None else "a label is given"
        raise ValueError(f"{given} to a model of {classes} classes; pass one exactly if there are classes")
