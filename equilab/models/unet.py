"""The U-Nets of EDM: DDPM++ and NCSN++ after Song et al. 2021, ADM after Dhariwal and Nichol 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from equilab.core.config import Size

SizeOrZero = Annotated[int, Field(ge=0, le=16_384)]
Blocks = Annotated[int, Field(ge=1, le=256)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class Sinusoid(nn.Module):
    """Embeds noise labels as cosines, then sines, of channels/2 frequencies 10000^(-k/n).

    n is the index of the last frequency, which is 1/10000 then; with `open_end` it is their number.
    """

    def __init__(self, channels: int, *, open_end: bool):
        super().__init__()
        self.count, self.open_end = channels // 2, open_end

    def forward(self, noise_label: Float[Tensor, b]) -> Float[Tensor, "b d"]:
        """Return the embedding of the noise labels."""
        k = torch.arange(self.count, dtype=torch.float32, device=noise_label.device)  # (D/2,)
        n = self.count if self.open_end else self.count - 1
        phase = noise_label.outer(10000 ** -(k / n))  # (B, D/2)
        return torch.cat([phase.cos(), phase.sin()], dim=1)  # (B, D)


class Fourier(nn.Module):
    """Embeds noise labels as cosines, then sines, of channels/2 fixed random frequencies."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise_label: Float[Tensor, b]) -> Float[Tensor, "b d"]:
        """Return the embedding of the noise labels."""
        phase = noise_label.outer(2 * math.pi * self.freqs)  # (B, D/2)
        return torch.cat([phase.cos(), phase.sin()], dim=1)  # (B, D)


class Resample(nn.Module):
    """Doubles ("up") or halves ("down") height and width by a separable filter; outside the image are zeros."""

    def __init__(self, direction: str, taps: Sequence[int]):
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return x at twice or half its size."""
        return _resample(x, self.resample_filter, self.direction)


class ResampleConv(nn.Conv2d):
    """Resamples as `Resample`, then convolves without changing the size."""

    def __init__(self, cin: int, cout: int, kernel: int, direction: str, taps: Sequence[int]):
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Return the convolution of x at twice or half its size."""
        return super().forward(_resample(x, self.resample_filter, self.direction))


class ConvDown(ResampleConv):
    """Convolves, then halves height and width; zeros surround the image before both, none are added in between."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Return the convolution of x at half its size."""
        margin = self.padding[0] + (self.resample_filter.shape[-1] - 1) // 2
        x = F.conv2d(x, self.weight, self.bias, padding=margin)  # (B, D, H + 2, W + 2)
        return _resample(x, self.resample_filter, "down", padding=0)  # (B, D, H/2, W/2)


class Block(nn.Module):
    """A residual block conditioned on an embedding, with resampling before and attention after it if asked.

    DDPM++ and NCSN++ add the embedding and scale each sum by sqrt(1/2); ADM modulates the normalised features by it.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        *,
        adm: bool,
        heads: int,  # of the attention; 0 = no attention
        dropout: float,
        resample: str | None = None,  # "up", "down"
        taps: Sequence[int] = (1, 1),
    ):
        super().__init__()
        self.adm, self.heads, self.dropout = adm, heads, dropout
        self.scale = 1.0 if adm else math.sqrt(0.5)
        eps = 1e-5 if adm else 1e-6
        self.norm0 = _norm(cin, eps)
        if resample:
            self.conv0 = ResampleConv(cin, cout, 3, resample, taps)
        else:
            self.conv0 = nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * cout if adm else cout)
        self.norm1 = _norm(cout, eps)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        if resample:
            self.skip = Resample(resample, taps) if adm else ResampleConv(cin, cout, 1, resample, taps)
        else:
            self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        if heads:
            self.norm2 = _norm(cout, eps)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        embedding: Float[Tensor, "b e"],
        activations: list[Tensor] | None = None,
    ) -> Float[Tensor, "b d h2 w2"]:
        """Return the map; the last convolution's output is appended to `activations`, if that is given."""
        h = self.conv0(F.silu(self.norm0(x), inplace=True))  # (B, D, H', W')
        condition = self.affine(embedding)[:, :, None, None]  # (B, D or 2D, 1, 1)
        if self.adm:
            scale, shift = condition.chunk(2, dim=1)  # (B, D, 1, 1) each
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h.add_(condition))
        h = self.conv1(F.dropout(F.silu(h, inplace=True), self.dropout, self.training))  # (B, D, H', W')
        x = self.skip(x)  # (B, D, H', W')
        if self.heads:
            x = h.add_(x).mul_(self.scale)
            h = self._attention(x)  # (B, D, H', W'), of a convolution as well
        if activations is not None:
            activations.append(h.clone())  # what follows writes into it
        return h.add_(x).mul_(self.scale)

    def _attention(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).flatten(2)  # (B, 3C, HW)
        qkv = qkv.unflatten(1, (self.heads, -1, 3))  # (B, heads, C/heads, 3, HW)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # (B, heads, HW, C/heads) each
        z = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C/heads)
        return self.proj(z.transpose(2, 3).reshape(b, c, height, width))  # (B, C, H, W)


class UNet(nn.Module):
    """Maps a scaled noisy image and its noise label to F(x; c_noise) of EDM's preconditioning; returns the shape of x.

    Layers are found by name in `enc` and `dec`, in the order of their use; state-dict keys equal the
    published ones. `attention` lists the heights at which blocks attend; the first block of the decoder
    always does. Weights are drawn from torch's global generator, distributed as the published ones. Fastest
    in channels-last memory format.

    Raises: ValueError for sizes that cannot be built.
    Source: EDM, appendix F, "architecture"; names of keys and order of layers as in the published weights.
    """

    def __init__(
        self,
        image: tuple[int, int, int],  # channels, height, width
        classes: int,  # 0 = unconditional
        *,
        architecture: Literal["ddpmpp", "ncsnpp", "adm"],
        width: Size,  # channels that `multipliers` multiply
        multipliers: Annotated[Sequence[Size], Field(min_length=1)],  # one per resolution, finest first
        blocks: Blocks,  # per resolution in the encoder, one more in the decoder
        attention: Sequence[Size],
        head_channels: SizeOrZero,  # of an attention head; 0 = a single head
        dropout: Dropout,
        augment: SizeOrZero,  # size of the augmentation label; 0 = none
    ):
        super().__init__()
        _check(image, multipliers, attention)
        channels, height, _ = image
        resolutions = [height >> level for level in range(len(multipliers))]
        self.classes, self.augment, self.adm = classes, augment, architecture == "adm"
        ncsnpp = architecture == "ncsnpp"
        taps = (1, 3, 3, 1) if ncsnpp else (1, 1)
        noise_channels = 2 * width if ncsnpp else width
        embedding = 4 * width

        self.map_noise = Fourier(noise_channels) if ncsnpp else Sinusoid(noise_channels, open_end=self.adm)
        if classes:
            self.map_label = nn.Linear(classes, embedding if self.adm else noise_channels, bias=not self.adm)
        if augment:
            self.map_augment = nn.Linear(augment, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        def block(cin: int, cout: int, attend: bool = False, resample: str | None = None) -> Block:
            heads = _heads(cout, head_channels) if attend else 0
            return Block(
                cin, cout, embedding, adm=self.adm, heads=heads, dropout=dropout, resample=resample, taps=taps
            )

        self.enc = nn.ModuleDict()
        skips = []  # channels of each activation that the decoder takes up
        side = channels  # of NCSN++'s second path
        cout = width * multipliers[0] if self.adm else width
        for r, multiplier in zip(resolutions, multipliers):
            if r == height:
                self.enc[f"{r}x{r}_conv"] = nn.Conv2d(channels, cout, 3, padding=1)
            else:
                self.enc[f"{r}x{r}_down"] = block(cout, cout, resample="down")
                if ncsnpp:
                    self.enc[f"{r}x{r}_aux_residual"] = ConvDown(side, cout, 3, "down", taps)
                    side = cout
            skips.append(cout)
            for i in range(blocks):
                cin, cout = cout, width * multiplier
                self.enc[f"{r}x{r}_block{i}"] = block(cin, cout, r in attention)
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for r, multiplier in zip(reversed(resolutions), reversed(multipliers)):
            if r == resolutions[-1]:
                self.dec[f"{r}x{r}_in0"] = block(cout, cout, True)
                self.dec[f"{r}x{r}_in1"] = block(cout, cout)
            else:
                self.dec[f"{r}x{r}_up"] = block(cout, cout, resample="up")
            for i in range(blocks + 1):
                cin, cout = cout + skips.pop(), width * multiplier
                attend = r in attention and (self.adm or i == blocks)
                self.dec[f"{r}x{r}_block{i}"] = block(cin, cout, attend)
        norm = _norm(cout, 1e-5 if self.adm else 1e-6)
        conv = nn.Conv2d(cout, channels, 3, padding=1)
        if self.adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{height}x{height}_aux_norm"] = norm
            self.dec[f"{height}x{height}_aux_conv"] = conv
        self._initialise()

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        noise_label: Float[Tensor, b],
        label: Int64[Tensor, b] | None,
        augment_label: Float[Tensor, "b a"] | None = None,
        return_activations: bool = False,
    ) -> Float[Tensor, "b c h w"] | tuple[Float[Tensor, "b c h w"], dict[str, Tensor]]:
        """Return F(x); None as `label` or `augment_label` is no class or augmentation for the whole batch.

        With `return_activations`, also the output (B, D, H', W') of the last convolution of each block, by
        "enc." or "dec." and its name.

        Raises: ValueError for a label or an augmentation label that the network was not built for.
        """
        embedding = self._embed(noise_label, label, augment_label)  # (B, E)
        activations = [] if return_activations else None
        skips, side = [], x
        for layer in self.enc.values():
            if isinstance(layer, ConvDown):
                x = side = (x + layer(side)) * math.sqrt(0.5)  # (B, C', H', W')
                skips.pop()
            elif isinstance(layer, Block):
                x = layer(x, embedding, activations)  # (B, C', H', W')
            else:
                x = layer(x)  # (B, C', H, W)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)  # (B, C' + C'', H', W')
            if isinstance(layer, Block):
                x = layer(x, embedding, activations)  # (B, C', H', W')
        norm, conv = (self.out_norm, self.out_conv) if self.adm else list(self.dec.values())[-2:]
        out = conv(F.silu(norm(x)))  # (B, C, H, W)
        if activations is None:
            return out
        blocks = [name for name, layer in self.named_modules() if isinstance(layer, Block)]
        return out, dict(zip(blocks, activations, strict=True))

    def _embed(self, noise_label: Tensor, label: Tensor | None, augment_label: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of the noise level, the class and the augmentation."""
        if label is not None and not self.classes:
            raise ValueError("label given to a network with classes=0; give None")
        if augment_label is not None and not self.augment:
            raise ValueError("augment_label given to a network with augment=0; give None")
        x = self.map_noise(noise_label)  # (B, D)
        if not self.adm:
            x = x.roll(x.shape[1] // 2, dims=1)  # sines first
        if self.classes and label is None:
            one_hot = x.new_zeros(len(x), self.classes)  # (B, classes)
        elif self.classes:
            one_hot = F.one_hot(label, self.classes).to(x.dtype)  # (B, classes)
        if self.classes and not self.adm:
            x = x + self.map_label(one_hot * math.sqrt(self.classes))
        if augment_label is not None:
            x = x + self.map_augment(augment_label)
        x = self.map_layer1(F.silu(self.map_layer0(x)))  # (B, E)
        if self.classes and self.adm:
            x = x + self.map_label(one_hot)
        return F.silu(x)

    def _initialise(self) -> None:
        """Draw the weights anew as published; the last layer of each branch starts at or near zero."""
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            last = name.endswith(("conv1", "proj", "aux_conv", "out_conv"))
            if not self.adm:
                gain = math.sqrt(0.2) if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(layer.weight, 1e-5 if last else gain)
            elif name == "map_label":
                nn.init.normal_(layer.weight)
            elif last or name == "map_augment":
                nn.init.zeros_(layer.weight)
            if layer.bias is not None and (last or not self.adm):
                nn.init.zeros_(layer.bias)


def _filter(taps: Sequence[int]) -> Tensor:
    taps = torch.tensor(taps, dtype=torch.float32)
    return (taps.outer(taps) / taps.sum() ** 2)[None, None]  # (1, 1, k, k)


def _resample(x: Tensor, kernel: Tensor, direction: str, padding: int | None = None) -> Tensor:
    """Filter every channel of x with `kernel` (1, 1, k, k) and keep every second row and column, or double them."""
    channels = x.shape[1]
    padding = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    kernel = kernel.expand(channels, -1, -1, -1)  # (C, 1, k, k)
    if direction == "up":
        return F.conv_transpose2d(x, 4 * kernel, None, 2, padding, groups=channels)  # (B, C, 2H, 2W)
    return F.conv2d(x, kernel, None, 2, padding, groups=channels)  # (B, C, H/2, W/2)


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"width and multipliers lead to a layer of {channels} channels, which do not split into groups; choose "
            "width so that width * multipliers are multiples of 4, or of 32 where two of them add up to more than 128"
        )
    return nn.GroupNorm(groups, channels, eps)


def _heads(channels: int, head_channels: int) -> int:
    if head_channels and channels % head_channels:
        raise ValueError(f"head_channels={head_channels} does not divide {channels} channels; give a divisor")
    return channels // head_channels if head_channels else 1


def _check(image: tuple[int, int, int], multipliers: Sequence[int], attention: Sequence[int]) -> None:
    levels = len(multipliers)
    _, height, across = image
    if height != across or height % 2 ** (levels - 1):
        raise ValueError(
            f"image={image} cannot be halved {levels - 1} times; give a square whose side is a multiple of "
            f"{2 ** (levels - 1)}, or fewer multipliers"
        )
    resolutions = [height >> level for level in range(levels)]
    if not set(attention) <= set(resolutions):
        raise ValueError(f"attention={list(attention)} must be among the heights of the maps, {resolutions}")
