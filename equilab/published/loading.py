"""A network filled with published weights: every tensor of the checkpoint is used, and every one of the network filled."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import create_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equilab.core.config import Params, UserError, nearest, parse, spec
from equilab.data.reading import expanded
from equilab.models.family import Family
from equilab.models.family import family as family_of
from equilab.models.published_keys import Described, nearest_key, need
from equilab.models.registry import FAMILIES
from equilab.published.formats import Contents, read
from equilab.published.tensors import StoredTensor
from equilab.sampling.generators import Generator, from_network
from equilab.sampling.opening import device_named, with_vae

PREFIXES = ("module.", "net.", "model.")  # of DDP, and of the classes around networks
COMPILED = "_orig_mod."  # of torch.compile, at any place in a key
MOST_TENSORS, LONGEST_KEY = 10_000, 200  # of published networks: 600 and 60
FILLS = ("uniform_", "normal_", "zero_", "zeros_", "ones_", "fill_", "xavier_uniform_", "kaiming_uniform_")


class Loaded(NamedTuple):
    """A family's network filled with published weights, what described it, and the entry of the file it was in."""

    family: Family
    network: nn.Module
    described: Described
    entry: str | None

    def about(self, name: str | None) -> dict[str, Any]:
        """Return what a stage would keep with such weights, of a run of this name."""
        described = self.described
        sizes = {"kind": self.family.kind, **described.sizes}
        found = {
            "stage": self.family.stage,
            "run": name,
            "family": self.family.name,
            "image": described.image,
            "classes": described.classes,
            "config": {"network": sizes, "conditional": described.classes > 0, **described.settings},
            "parameters": sum(each.numel() for each in self.network.parameters()),
            "published": {"entry": self.entry},
        }
        if "sigma_data" in described.settings:
            found["sigma_data"] = described.settings["sigma_data"]
        return found


def load(
    family: str,
    weights: str | Path | Mapping[str, Tensor],
    *,
    device: str = "auto",
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    vae: Path | str | None = None,
    **config: Any,
) -> Generator:
    """Return the model of `family` that published weights describe, filled with them, in evaluation mode and float32.

    `weights` is a file that the authors published, or a mapping from published key names to tensors. Sizes are those of the
    tensors; what these do not determine comes from the settings in the file, or from `config` (our words: `heads`, ...).
    `vae` is the folder of the autoencoder of a model that makes latents.

    >>> model = equilab.published.load("get", "GET-M.pth", heads=6)
    >>> model.sample(16, seed=0, iterations=6).images.shape
    (16, 3, 32, 32)

    Raises: UserError for an unknown family, a file that is damaged, of another family or unsafe, a missing, unexpected or
        misshapen key (with the nearest one), numbers that are not finite, or a `config` entry that the family does not take.
    """
    loaded = load_network(family, weights, config)
    name = "weights" if isinstance(weights, Mapping) else Path(weights).stem
    device = device_named(device)
    generator = from_network(
        loaded.network.eval(), loaded.about(name), name, device=device, precision=precision
    )
    return with_vae(generator, vae)


def load_network(
    family: str, weights: str | Path | Mapping[str, Tensor], config: Mapping[str, Any]
) -> Loaded:
    """Return the network of `load` with what described it.

    Raises: UserError as `load` does.
    """
    reading = _family(family)
    if isinstance(weights, Mapping):
        _require_tensors(weights)
        name, contents, limit = "the weights", Contents(dict(weights)), None
    elif isinstance(weights, (str, Path)):
        path = expanded(str(weights))
        name, contents, limit = str(path), read(path), path.stat().st_size
    else:
        raise UserError(
            f"weights is {weights!r}; give a file, or a mapping from published key names to tensors"
        )
    try:
        bare = _bare(contents.weights)
        contents.weights.clear()  # what is read is forgotten
        _check_family(reading, bare, contents.module)
        shapes = {key: torch.empty(value.shape, device="meta") for key, value in bare.items()}
        settings = reading.published.config(contents.settings)
        described = _described(reading, shapes, settings, config)
        network = _network(reading, described, name, settings.keys() - config.keys())
        _check_keys(network, reading, shapes)
        _check_memory(bare, limit)
        _fill(network, reading, bare)
    except (ValueError, ArithmeticError) as error:  # a size that is 0 divides others
        raise UserError(f"{name}: {error}") from None
    if contents.others:
        others = ", ".join(contents.others)
        print(
            f"equilab: {name}: the weights under {contents.entry} are read, not those under {others}",
            file=sys.stderr,
        )
    return Loaded(reading, network, described, contents.entry)


def _require_tensors(weights: Mapping[Any, Any]) -> None:
    """Refuse a mapping that is none from names to tensors.

    Raises: UserError naming the first entry that is not.
    """
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"the weights hold {type(value).__name__} under {key!r}; give a mapping from published key names to torch's "
                "tensors, such as the entry of a checkpoint in which they are"
            )


def _family(name: str) -> Family:
    known = [each for each in FAMILIES if family_of(each).published is not None]
    if name not in known:
        raise UserError(
            f"unknown family {name!r}; weights are published of {', '.join(known)}{nearest(name, known)}"
        )
    return family_of(name)


def _bare(weights: Mapping[str, Tensor | StoredTensor]) -> dict[str, Tensor | StoredTensor]:
    """Return the weights by their keys within the network."""
    if len(weights) > MOST_TENSORS:
        raise ValueError(f"there are {len(weights):,} tensors, more than any published network has")
    bare = {}
    for key, tensor in weights.items():
        if len(key) > LONGEST_KEY:
            raise ValueError(f"published key {key[:40]!r} is no name of a tensor")
        short = key.replace(COMPILED, "")
        while short.startswith(PREFIXES):
            short = short.partition(".")[2]
        if short in bare:
            raise ValueError(f"published key {key!r} is there twice, with another beginning")
        bare[short] = tensor
    return bare


def _check_family(family: Family, weights: Mapping[str, Any], module: str | None) -> None:
    """Refuse weights of another family, if their keys or the class around them tell."""
    readable = [family_of(name) for name in FAMILIES]
    fitting = [each for each in readable if each.published and _has_signs(weights, each.published.signs)]
    most = max((len(each.published.signs) for each in fitting), default=0)
    likeliest = [each for each in fitting if len(each.published.signs) == most]
    if module is not None:
        likeliest = [each for each in likeliest if each.published.module in (None, module)]
        if not likeliest and family.published.module not in (None, module):
            raise ValueError(
                f"the weights are of a {module}, which is not read; {family.name} is, a {family.published.module}"
            )
    if likeliest and family not in likeliest:
        others = " or ".join(each.name for each in likeliest)
        raise ValueError(f"the weights are of {others}, not of {family.name}; give that family")


def _has_signs(keys: Mapping[str, Any], signs: tuple[str, ...]) -> bool:
    return all(any(key.startswith(sign) for key in keys) for sign in signs)


def _described(
    family: Family, shapes: Mapping[str, Tensor], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Described:
    """Return what the weights describe by their shapes, with what the file says besides and what is given."""
    describe = family.published.describe
    entries = list(inspect.signature(describe).parameters.values())[1:]
    known = [entry.name for entry in entries]
    for name in config:
        if name not in known:
            takes = ", ".join(known)
            raise ValueError(f"{family.name} takes no {name!r}{nearest_key(name, known)}; it takes {takes}")
    types = typing.get_type_hints(describe)
    given = create_model("Given", __base__=Params, **{name: (types[name], ...) for name in config})
    parse(given, dict(config), family.name)
    config = {**settings, **config}
    for entry in entries:
        if entry.default is entry.empty and entry.name not in config:
            raise ValueError(
                f"{family.name} needs {entry.name}, which its tensors do not determine; give {entry.name}=..."
            )
    return describe(shapes, **config)


def _network(family: Family, described: Described, where: str, of_file: Collection[str]) -> nn.Module:
    """Return the network that is described, without numbers; `of_file` are the keys that the settings in the file say.

    Raises: UserError if its sizes do not fit each other.
    """
    sizes = {"kind": family.kind, **described.sizes}
    try:
        network = spec({family.kind: family.network}, sizes, f"{where}: network")
        with _Unfilled():
            return network.build(described.image, described.classes)
    except UserError as error:
        told = [
            f"{name} is that of the settings in the file, {name}=... overrides it"
            for name in described.sizes
            if name in of_file
        ]
        raise UserError("; ".join([str(error), *told])) from None


class _Unfilled(TorchFunctionMode):
    """Networks are built without drawing their weights, which nobody would look at; their memory stays untouched."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _check_keys(network: nn.Module, family: Family, shapes: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not just those of the network."""
    keys, own = family.published.keys(network), network.state_dict()
    for published in keys:
        need(shapes, published)
    for published, tensor in shapes.items():
        if published not in keys:
            raise ValueError(
                f"unexpected key {published!r} in the published weights{nearest_key(published, keys)}"
            )
        if tensor.shape != own[keys[published]].shape:
            raise ValueError(
                f"published key {published!r} has shape {tuple(tensor.shape)}, the {family.name} model built here needs "
                f"{tuple(own[keys[published]].shape)}; the weights are damaged, or of another model"
            )


def _check_memory(weights: Mapping[str, Tensor | StoredTensor], limit: int | None) -> None:
    """Refuse tensors that share what is stored: together they can be larger than any memory."""
    stored = [tensor for tensor in weights.values() if isinstance(tensor, StoredTensor)]
    if limit is not None and sum(tensor.nbytes for tensor in stored) > limit:
        raise ValueError("the weights are larger than the file, which no checkpoint's are; do not trust it")


def _fill(network: nn.Module, family: Family, weights: dict[str, Tensor | StoredTensor]) -> None:
    """Move the published tensors into the network, one after another."""
    own, filled = network.state_dict(), {}
    for published, ours in family.published.keys(network).items():
        tensor = weights.pop(published)
        tensor = tensor.read() if isinstance(tensor, StoredTensor) else tensor.detach().clone()
        filled[ours] = tensor.to(own[ours].dtype)
        _require_finite(published, filled[ours])
    network.load_state_dict(filled, assign=True)


def _require_finite(key: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds numbers of which no image can be made."""
    if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum takes a tenth of the time
        raise ValueError(
            f"published key {key!r} holds numbers that are not finite; fetch the weights again, or give others"
        )
