"""Published weights: what does not fit is named with the nearest key there is."""

import re

import pytest
import torch
from conftest import golden, weights_of
from safetensors.torch import save_file

from equilab import published
from equilab.core.config import UserError
from equilab.models.family import family
from equilab.models.registry import FAMILIES

GET = weights_of(golden("get_uncond")[0])


def test_a_file_and_a_mapping_give_the_same_model(tmp_path):
    save_file(GET, tmp_path / "get.safetensors")
    one, other = (
        published.load("get", tmp_path / "get.safetensors", heads=2),
        published.load("get", GET, heads=2),
    )
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)
    assert not one.training


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ({"blocks.0.attn.qkv.weight": None}, {"heads": 2}, "'blocks.0.attn.qkv.weight' is missing"),
        (
            {"blocks.0.attn.kqv.weight": torch.zeros(1)},
            {"heads": 2},
            "unexpected key 'blocks.0.attn.kqv.weight'",
        ),
        (
            {"blocks.0.attn.kqv.weight": torch.zeros(1)},
            {"heads": 2},
            "the nearest is 'blocks.0.attn.qkv.weight'",
        ),
        ({"blocks.0.mlp.fc1.bias": torch.zeros(7)}, {"heads": 2}, "'blocks.0.mlp.fc1.bias' has shape (7,)"),
        (
            {"x_embedder.proj.weight": torch.zeros(3)},
            {"heads": 2},
            "'x_embedder.proj.weight' has shape (3,), which tells no size",
        ),
        (
            {"deq_blocks.0.mlp.fc1.weight": torch.zeros(4, 0)},
            {"heads": 2},
            "'deq_blocks.0.mlp.fc1.weight' has shape (4, 0)",
        ),
        ({}, {}, "get needs heads"),
        ({}, {"heads": 2, "head": 2}, "get takes no 'head'; the nearest is 'heads'"),
        ({}, {"heads": 5}, "heads"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_nearest_key(change, config, sentence):
    weights = {key: value for key, value in {**GET, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        published.load("get", weights, **config)


def test_an_unknown_family_and_a_missing_or_damaged_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown family 'gett'.*nearest: get"):
        published.load("gett", GET)
    with pytest.raises(FileNotFoundError, match="is not there"):
        published.load("get", tmp_path / "nowhere.safetensors", heads=2)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        published.load("get", tmp_path / "bad.safetensors", heads=2)


def test_a_family_has_its_own_name_and_look():
    found = {name: family(name) for name in FAMILIES}
    assert all(each.name == name for name, each in found.items())
    for what in ("label", "colour", "marker"):
        assert len({getattr(each, what) for each in found.values()}) == len(found), what
    with pytest.raises(UserError, match="unknown family 'gett'.*'get'"):
        family("gett")


def test_every_family_with_published_weights_can_be_loaded_by_its_name():
    assert {name for name in FAMILIES if family(name).published} == set(FAMILIES) - {"cd"}
    with pytest.raises(ValueError, match="unknown family 'cd'"):
        published.load("cd", GET)
