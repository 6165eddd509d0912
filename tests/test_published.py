"""Published weights: what does not fit is named with the nearest key there is."""

import pytest
import torch
from conftest import golden, weights_of

import equilab
from equilab import published
from equilab.core.config import UserError
from equilab.models.checkpoint import load_network
from equilab.models.family import family
from equilab.models.registry import FAMILIES
from equilab.published import importing

GET = weights_of(golden("get_uncond")[0])
FPDM = weights_of(golden("fpdm_tiny")[0])
HEADS = {"heads": 2}


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ({"blocks.0.attn.qkv.weight": None}, HEADS, "'blocks.0.attn.qkv.weight'"),
        ({"blocks.0.attn.kqv.weight": torch.zeros(1)}, HEADS, "attn.kqv.weight'.*'blocks.0.attn.qkv.weight'"),
        ({"blocks.0.mlp.fc1.bias": torch.zeros(7)}, HEADS, r"'blocks.0.mlp.fc1.bias' .*\(7,\)"),
        ({"x_embedder.proj.weight": torch.zeros(3)}, HEADS, r"'x_embedder.proj.weight' .*\(3,\)"),
        ({"deq_blocks.0.mlp.fc1.weight": torch.zeros(4, 0)}, HEADS, "'deq_blocks.0.mlp.fc1.weight'"),
        ({"module.pos_embed": torch.zeros(1)}, HEADS, "'module.pos_embed'"),
        ({}, {}, r"\bheads=\.\.\."),
        ({}, {"heads": 2, "head": 2}, "'head'.*'heads'"),
        ({}, {"heads": 5}, "heads"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_nearest_key(change, config, sentence):
    weights = {key: value for key, value in {**GET, **change}.items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        published.load("get", weights, **config)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "model.", "module._orig_mod.model."])
def test_what_keys_begin_with_does_not_matter(prefix):
    one = published.load("get", GET, heads=2).model
    other = published.load("get", {prefix + key: value for key, value in GET.items()}, heads=2).model
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert not one.training and all(parameter.requires_grad for parameter in one.parameters())


def test_a_model_does_not_share_the_memory_of_the_weights_that_it_is_made_of():
    weights = {key: value.clone() for key, value in GET.items()}
    model = published.load("get", weights, heads=2).model
    torch.nn.init.zeros_(model.final.linear.bias)
    assert set(weights) == set(GET)
    assert torch.equal(weights["final_layer.linear.bias"], GET["final_layer.linear.bias"])


@pytest.mark.parametrize(
    ("name", "weights", "others"),
    [
        ("vit", GET, "get"),
        ("dit", GET, "get"),
        ("edm", GET, "get"),
        ("dit", FPDM, "fpdm"),
        (
            "get",
            {"enc.8x8": GET["pos_embed"], "dec.8x8": GET["pos_embed"], "map_layer0.b": GET["pos_embed"]},
            "edm or gdd",
        ),
    ],
)
def test_weights_of_another_family_are_said_to_be_of_that(name, weights, others):
    with pytest.raises(UserError, match=rf"\b{others}, .*\b{name}\b"):
        published.load(name, weights)


def test_an_unknown_family_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="'gett'.*'get'"):
        published.load("gett", GET)


def test_every_family_with_published_weights_can_be_loaded_by_its_name():
    assert {name for name in FAMILIES if family(name).published} >= {
        "edm",
        "get",
        "vit",
        "gdd",
        "fpdm",
        "dit",
    }
    with pytest.raises(UserError, match="'cd'"):
        published.load("cd", GET)


def test_a_family_has_its_own_name_and_look():
    found = {name: family(name) for name in FAMILIES}
    assert all(each.name == name for name, each in found.items())
    for what in ("label", "colour", "marker"):
        assert len({getattr(each, what) for each in found.values()}) == len(found), what
    with pytest.raises(UserError, match="'gett'.*'get'"):
        family("gett")


@pytest.mark.parametrize(
    ("name", "file", "config"),
    [
        ("edm", "edm_ncsnpp", ["sigma_data=0.25"]),
        ("gdd", "gdd_ncsnpp", []),
        ("get", "get_cond", ["heads=2"]),
        ("fpdm", "fpdm_tiny", ["heads=2", "pre_post_timestep=false"]),
    ],
)
def test_an_imported_network_is_read_as_one_that_a_stage_trained(
    name, file, config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    weights = weights_of(golden(file)[0])
    torch.save(weights, f"{file}.pt")
    assert importing.command([name, f"{file}.pt", "--out", "theirs", *config]) == 0
    path = tmp_path / "results/imported/theirs/weights.safetensors"
    told = capsys.readouterr().out
    assert told.startswith(f"{path.relative_to(tmp_path)}\n") and "kind: " in told
    network, about = load_network(path)
    keys = family(name).published.keys(network)
    for key, value in weights.items():
        assert torch.equal(network.state_dict()[keys[key.removeprefix("model.")]], value)
    assert about["family"] == name and about["published"]["file"] == f"{file}.pt"
    assert about.get("sigma_data") == {"edm": 0.25, "gdd": 0.5}.get(name)
    model = equilab.load("results/imported/theirs", device="cpu")
    if name != "fpdm":  # which makes latents
        assert model.sample(2, **({"steps": 2} if name == "edm" else {})).images.shape == (
            2,
            *model.run.shape,
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["get", "get.pt", "heads"], "'heads' .*KEY=VALUE"),
        (["get", "get.pt", "heads=[2"], "heads: '\\[2'"),
        (["get", "get.pt", "heads=2", "heads=4"], "^heads [^:]*$"),
        (["get", "get.pt", "--ot=theirs"], "'--ot=theirs' .*KEY=VALUE"),
        (["get", "get.pt", "heads=2", "--out", "../there"], "--out: '../there'"),
        (["get", "GET M v2.pth"], "'GET M v2' .*--out NAME"),
        (["get", "gte.pt", "heads=2"], "gte.pt"),
        (["get", "Get-m.pth", "heads=2"], "GET-M.pth, 77 MB"),
        (["get", "get-b-plu.pth", "heads=2"], "'GET-B-plus.pth'"),
    ],
)
def test_an_import_that_cannot_be_is_refused_and_leaves_nothing(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(GET, "get.pt")
    with pytest.raises(UserError, match=sentence):
        importing.command(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["get.pt"]


def test_an_import_that_is_there_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(GET, "get.pt")
    path = importing.run("get", tmp_path / "get.pt", "theirs", HEADS)
    before = path.read_bytes()
    with pytest.raises(UserError, match="theirs"):
        importing.run("get", tmp_path / "get.pt", "theirs", {"heads": 4})
    assert path.read_bytes() == before


def test_the_arguments_that_an_import_needs_are_named_alone(capsys):
    with pytest.raises(SystemExit):
        importing.command(["get"])
    assert "required: FILE\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused_by_their_key(value):
    bias = GET["blocks.0.mlp.fc1.bias"].double().index_fill(0, torch.tensor([1]), value)
    with pytest.raises(UserError, match="'blocks.0.mlp.fc1.bias' .* finite"):
        published.load("get", {**GET, "blocks.0.mlp.fc1.bias": bias}, heads=2)


def test_a_value_of_another_type_is_told_by_its_key():
    with pytest.raises(UserError, match="^edm.sigma_data: .*'abc'"):
        published.load("edm", weights_of(golden("edm_ncsnpp")[0]), sigma_data="abc")


def test_a_vae_of_a_model_that_makes_no_latents_is_refused():
    with pytest.raises(UserError, match="^vae .*'vae'.* GET "):
        published.load("get", GET, heads=2, vae="vae")


def test_weights_of_others_that_make_no_numbers_are_not_to_be_trained_again():
    weights, key = weights_of(golden("vit_cond")[0]), "x_embedder.proj.weight"
    model = published.load("vit", {**weights, key: torch.full_like(weights[key], 3e38)}, heads=2)
    with pytest.raises(UserError, match="precision fp32"):
        model.sample(1)
