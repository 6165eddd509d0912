"""Checkpoints laid out as the authors' are, with classes of our own in place of theirs."""

import argparse
import contextlib
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source in a file was run')"


def reconstruct(meta):
    raise SystemExit("a module was made by what is in a file")


class EasyDict(dict):
    pass


@contextlib.contextmanager
def persistence():
    """Have the names that NVIDIA's pickles use, as far as writing needs them."""
    reconstruct.__module__, reconstruct.__qualname__ = (
        "torch_utils.persistence",
        "_reconstruct_persistent_obj",
    )
    EasyDict.__module__ = "dnnlib.util"
    names = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, content in names.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Persistent(nn.Module):
    """A module that is pickled with its source, as by `torch_utils.persistence`."""

    def __init__(self, name, **attributes):
        super().__init__()
        self.__dict__["name"] = name
        for key, value in attributes.items():
            setattr(self, key, value)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != "name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.name, "state": state}
        return reconstruct, (meta,), None


def modules(weights, name, frozen=("resample_filter", "freqs"), **attributes):
    """Return modules within modules whose state dict has these weights: Persistent ones, and a ModuleDict for "enc" and "dec"."""
    root = Persistent(name, **attributes)
    for key, value in weights.items():
        *path, last = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                inner = (
                    nn.ModuleDict()
                    if part in ("enc", "dec")
                    else Persistent("Layer", skip_scale=np.sqrt(0.5))
                )
                module.add_module(part, inner)
            module = module._modules[part]
        if last in frozen:
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, nn.Parameter(value, requires_grad=False))
    return root


def nvidia(path, weights, name, protocol=4, raw=None, **attributes):
    """Write a pickle as EDM's and GDD's training does; `raw` are weights that are not averaged, as GDD's has them."""
    kwargs = {"img_resolution": 8, "model_type": "SongUNet", "channel_mult": [1, 2], "extra": EasyDict(a=1)}
    content = {
        "ema": modules(weights, name, _init_kwargs=kwargs, _init_args=(), use_fp16=False, **attributes)
    }
    if raw is not None:
        content["net"] = modules(raw, name, _init_kwargs=kwargs, **attributes)
    content["loss_fn"] = Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5)
    content["augment_pipe"] = Persistent("AugmentPipe", p=0.12, xflip=1e8, device=torch.device("cpu"))
    content["dataset_kwargs"] = {
        "path": "cifar10-32x32.zip",
        "use_labels": False,
        "max_size": 50000,
        "classes": {1, 2},
    }
    with persistence():
        path.write_bytes(pickle.dumps(content, protocol))


def state_dict(weights):
    """Return weights as `nn.Module.state_dict` gives them: ordered, with an attribute of its own."""
    ordered = OrderedDict(weights)
    ordered._metadata = OrderedDict({"": {"version": 1}})
    return ordered


def training(path, weights, args, raw=None, legacy=False):
    """Write a checkpoint as the training of GET, DiT and FPDM does: model, average, optimiser, options."""
    raw = {key: value + 1 for key, value in weights.items()} if raw is None else raw
    optimiser = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    optimiser.param_groups[0]["params"][0].grad = torch.ones(3)
    optimiser.step()
    content = {
        "args": argparse.Namespace(**args) if isinstance(args, dict) else dict(args),
        "model": state_dict(raw),
        "ema": state_dict(weights),
        "opt": optimiser.state_dict(),
        "train_steps": 400_000,
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
