"""Files laid out as the authors' are read to the reference values; files that are something else are refused, each in a sentence."""

import copyreg
import gzip
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import authors
import pytest
import torch
from conftest import close, golden, weights_of
from safetensors.torch import save_file

from equilab import published
from equilab.core.config import UserError
from equilab.models import vit
from equilab.models.checkpoint import save_tensors
from equilab.models.unet import UNet
from equilab.published import pickles
from equilab.solvers import Solver

SMALL = {"architecture": "ddpmpp", "width": 64, "multipliers": (4,), "blocks": 1, "attention": ()}
SMALL |= {"head_channels": 0, "dropout": 0.0, "augment": 0}
FOUR, SIX = (Solver("iterate", iterations, 0.0, "last") for iterations in (4, 6))
MEBIBYTE = 2**20


def denoised(model, t):
    x = t["in.x"] * t["in.sigmas"][0].clamp_min(0.5)
    return model.denoise(x, t["in.sigmas"][0], None).image, t["out.denoised"][0]


def one_step(model, t):
    return model.generate(t["in.z_generator"], None).image, t["out.one_step"]


def equilibrium(model, t):
    return model(t["in.x"], t["in.y"], t["in.z0"], SIX).image, t["out.plain_iter6"]


def image(model, t):
    return model(t["in.x"], t["in.y"]).image, t["out.y_hat"]


def prediction(model, t):
    return model(t["in.x"], t["in.t"], t["in.y"]), t["out.y_hat"]


def fixed_point(model, t):
    return model(t["in.x1"], t["in.t1"], t["in.y"], None, FOUR)[0], t["out.ptc0_k4_x1_t1"]


def write_nvidia(name, **attributes):
    def write(path, weights):
        others = {key: value + 1 for key, value in weights.items()}
        authors.nvidia(path, weights, name, raw=others, sigma_data=0.5, **attributes)

    return write


def write_training(args, legacy=False):
    def write(path, weights):
        authors.training(path, weights, args, legacy=legacy)

    return write


# family -> reference values, what is compared, what the file does not tell, and the file as its authors write it
FILES = {
    "edm": ("edm_ddpmpp", denoised, {}, write_nvidia("EDMPrecond", sigma_min=0, sigma_max=float("inf"))),
    "gdd": ("gdd_ncsnpp", one_step, {}, write_nvidia("GDDPrecond", eps=0.002)),
    "get": (
        "get_cond",
        equilibrium,
        {"heads": 2},
        write_training({"model": "GET", "mem": False, "lr": 1e-4}),
    ),
    "vit": ("vit_cond", image, {"heads": 2}, write_training({"model": "ViT", "cond": True})),
    "dit": ("dit_tiny", prediction, {"heads": 2}, write_training({"image_size": 256, "seed": 2**40})),
    "fpdm": (
        "fpdm_tiny",
        fixed_point,
        {"heads": 2},
        write_training({"fixed_point_pre_post_timestep_conditioning": False}.items()),
    ),
}


def write_strided(path, weights):
    """Save convolutions channels-last, and the others as views into one storage."""
    flat = torch.cat([value.flatten() for value in weights.values()])
    parts = flat.split([value.numel() for value in weights.values()])
    views = {key: part.view(value.shape) for (key, value), part in zip(weights.items(), parts, strict=True)}
    last = {key: v.contiguous(memory_format=torch.channels_last) for key, v in weights.items() if v.ndim == 4}
    torch.save(views | last, path)


WAYS = {
    "zip": lambda path, weights: torch.save(weights, path),
    "legacy": lambda path, weights: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path, weights: save_file(weights, path),
    "ordered, by DDP": lambda path, weights: torch.save(
        authors.state_dict({f"module.{key}": value for key, value in weights.items()}), path
    ),
    "parameters": lambda path, weights: torch.save(
        {key: torch.nn.Parameter(value) for key, value in weights.items()}, path
    ),
    "under state_dict": lambda path, weights: torch.save({"state_dict": weights, "epoch": 3}, path),
    "views": write_strided,
    "double": lambda path, weights: torch.save({key: value.double() for key, value in weights.items()}, path),
}


@pytest.mark.parametrize("family", FILES)
@torch.inference_mode()
def test_a_file_as_its_authors_write_it_gives_the_reference_values_of_the_averaged_weights(
    family, tmp_path, capsys
):
    name, compared, config, write = FILES[family]
    values, _ = golden(name)
    path = tmp_path / "published"
    write(path, weights_of(values))
    close(*compared(published.load(family, path, **config).model, values), 2e-5)
    assert " ema " in capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FILES)
@torch.inference_mode()
def test_every_format_gives_the_reference_values(family, way, tmp_path, capsys):
    name, compared, config, _ = FILES[family]
    config = config | {"pre_post_timestep": False} if family == "fpdm" else config
    values, _ = golden(name)
    path = tmp_path / "weights"
    WAYS[way](path, weights_of(values))
    model = published.load(family, path, **config).model
    close(*compared(model, values), 2e-5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_the_precision_are_read_as_float32(dtype, legacy, tmp_path):
    weights = {key: value.to(dtype) for key, value in weights_of(golden("vit_cond")[0]).items()}
    torch.save(weights, tmp_path / "vit.pt", _use_new_zipfile_serialization=not legacy)
    model = published.load("vit", tmp_path / "vit.pt", heads=2).model
    for key, ours in vit.published_keys(model).items():
        assert torch.equal(model.state_dict()[ours], weights[key].float())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_nvidias_pickles_of_every_protocol_give_the_same_weights(protocol, tmp_path):
    weights = weights_of(golden("edm_ncsnpp")[0])
    authors.nvidia(tmp_path / "edm.pkl", weights, "EDMPrecond", protocol, sigma_data=0.25)
    model = published.load("edm", tmp_path / "edm.pkl").model
    assert model.sigma_data == 0.25
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, weights[f"model.{key}"])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_of_a_named_model_needs_no_config(legacy, tmp_path):
    path = tmp_path / "latest.pth"
    for family, name in {"get": "GET-T/2", "vit": "ViT-XL/8", "dit": "DiT-XL/4"}.items():
        weights = weights_of(golden(FILES[family][0])[0])
        authors.training(path, weights, {"model": name}, legacy=legacy)
        model = published.load(family, path, **({} if family == "get" else {"heads": 4})).model
        assert model.stack[0].attn.heads == 4
    authors.training(path, weights_of(golden("fpdm_tiny")[0]), {"model": "DiT-S/2"}.items(), legacy=legacy)
    with pytest.raises(UserError, match=r"pre_post_timestep=\.\.\."):
        published.load("fpdm", path)


def test_heads_that_do_not_fit_are_said_to_be_those_of_the_file(tmp_path):
    authors.training(tmp_path / "get.pth", weights_of(golden("get_uncond")[0]), {"model": "GET-M/2"})
    with pytest.raises(UserError, match=r" 6; .*heads=\.\.\."):
        published.load("get", tmp_path / "get.pth")


def test_the_settings_in_a_file_count_where_none_are_given(tmp_path):
    weights = weights_of(golden("gdd_ncsnpp")[0])
    authors.nvidia(tmp_path / "gdd.pkl", weights, "GDDPrecond", eps=0.001, sigma_data=0.25)
    told = published.load("gdd", tmp_path / "gdd.pkl").model
    given = published.load("gdd", tmp_path / "gdd.pkl", sigma_min=0.01).model
    assert (told.sigma_min, told.sigma_data, told.sigmas) == (0.001, 0.25, (80.0,))
    assert (given.sigma_min, given.sigma_data) == (0.01, 0.25)


@pytest.mark.parametrize(
    ("family", "module", "sentence"),
    [
        ("edm", "GDDPrecond", r"\bgdd, .*\bedm\b"),
        ("gdd", "EDMPrecond", r"\bedm, .*\bgdd\b"),
        ("edm", "VPPrecond", "VPPrecond, "),
        ("get", "EDMPrecond", r"\bedm, .*\bget\b"),
    ],
)
def test_the_network_within_another_model_is_refused(family, module, sentence, tmp_path):
    authors.nvidia(tmp_path / "network.pkl", weights_of(golden("edm_ddpmpp")[0]), module)
    with pytest.raises(UserError, match=sentence):
        published.load(family, tmp_path / "network.pkl")


@pytest.mark.parametrize("way", ["zip", "legacy", "safetensors", "nvidia"])
def test_reading_takes_no_more_than_twice_the_memory_of_the_file(way, tmp_path):
    torch.manual_seed(0)
    net = UNet((3, 16, 16), 0, **SMALL)
    path = tmp_path / "edm"
    if way == "nvidia":
        authors.nvidia(path, net.state_dict(), "EDMPrecond")
    else:
        WAYS[way](path, net.state_dict())
    tracemalloc.start()
    model = published.load("edm", path).model
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(model.net.map_layer0.weight, net.map_layer0.weight)
    assert peak < 2 * path.stat().st_size


def test_weights_that_share_what_is_stored_are_refused_where_they_are_larger_than_the_file(tmp_path):
    weights = weights_of(golden("get_uncond")[0])
    stored = torch.zeros(max(value.numel() for value in weights.values()))
    shared = {key: stored[: value.numel()].view(value.shape) for key, value in weights.items()}
    torch.save(shared, tmp_path / "get.pt")
    with pytest.raises(UserError, match="get.pt: .*larger"):
        published.load("get", tmp_path / "get.pt", heads=2)


def saved(legacy=False):
    buffer = io.BytesIO()
    torch.save(weights_of(golden("get_uncond")[0]), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def as_safetensors(tmp_path):
    save_file(weights_of(golden("get_uncond")[0]), tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            ".*`git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "is a web page"),
        (gzip.compress(saved()), ".*gzip"),
        (b"\x93NUMPY\x01\x00v\x00", ".* safetensors, "),
        (b"cos\nsystem\n(S'true'\ntR.", ".* safetensors, "),
        (pickle.dumps({"ema": {}}, 4)[:-1], ".*cut short"),
        (saved()[:-1000], ".*cut short"),
        (saved()[:100], ".*cut short"),
        (saved(legacy=True)[:-1000], ".*cut short"),
        (saved(legacy=True)[:1000], ".*cut short"),
        (
            pickle.dumps({"images": [1, 2], "labels": None}, 4),
            ".* ema, .* images, labels$",
        ),
        (pickle.dumps([1, 2], 4), ".* ema, .* none$"),
    ],
)
def test_a_file_that_is_something_else_gets_its_own_sentence(content, sentence, tmp_path):
    path = tmp_path / "get.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"get.pth {sentence}"):
        published.load("get", path, heads=2)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({0: torch.zeros(1)}, ".* ema, .* 0$"),
        ({"x" * 10**6: torch.zeros(1)}, "'xxx"),
        ({str(n): torch.zeros(1) for n in range(10_001)}, "10,001 "),
        ({"a.weight": torch.zeros(1)}, "'enc.'"),
        (
            {"enc.8x8_conv.weight": torch.zeros(1, 1, 3, 3), "map_layer0.weight": torch.zeros(4, 0)},
            "tells no size",
        ),
        (
            {"map_noise.freqs": torch.zeros(1), "map_layer0.weight": torch.zeros(4, 1)}
            | {f"enc.8x8_{name}.weight": torch.zeros(1, 1, 3, 3) for name in ("conv", "block0.conv1")},
            "zero",
        ),
    ],
)
def test_tensors_that_are_no_network_are_refused_in_a_sentence(weights, sentence, tmp_path):
    torch.save(weights, tmp_path / "edm.pt")
    with pytest.raises(UserError, match=sentence) as told:
        published.load("edm", tmp_path / "edm.pt")
    assert len(str(told.value)) < 400


def test_weights_of_ours_are_said_to_be(tmp_path):
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"equilab\.load\("):
        published.load("get", tmp_path / "weights.safetensors", heads=2)


@pytest.mark.parametrize("length", [100, 9000, -1000])
def test_safetensors_that_were_cut_short_are_said_to_be(length, tmp_path):
    path = tmp_path / "get.safetensors"
    path.write_bytes(as_safetensors(tmp_path)[:length])
    with pytest.raises(UserError, match="get.safetensors .*cut short"):
        published.load("get", path, heads=2)


def test_a_folder_and_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} .*directory"):
        published.load("get", tmp_path, heads=2)
    with pytest.raises(UserError, match="nowhere.pt .*docs/checkpoints.md"):
        published.load("get", tmp_path / "nowhere.pt", heads=2)


def test_an_archive_that_is_not_by_torch_is_refused(tmp_path):
    path = tmp_path / "get.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("get.pth", saved())
    with pytest.raises(UserError, match="get.zip .*unpack it"):
        published.load("get", path, heads=2)


# Hostile files. Each runs `make_canary` where it can, or takes memory or time without end.

CANARY = "canary"


def make_canary(*_):
    open(CANARY, "w").close()


class Called:
    """Pickled as the call of something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(function, *arguments, protocol=4):
    return pickle.dumps({"ema": Called(function, *arguments)}, protocol)


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()  # SHORT_BINUNICODE


def named(module, name):
    return f"c{module}\n{name}\n".encode()  # GLOBAL


SHELL = text(f"touch {CANARY}")
SYSTEM = named("os", "system")
ORDERED = named("collections", "OrderedDict")


def legacy(content, keys=b"]."):
    """Return a file by torch before 1.6 whose third pickle is given."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*start, content, b"\x80\x02" + keys])


def archived(content, compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, member in members.items():
            archive.writestr(f"archive/{name}", member)
    return buffer.getvalue()


def inner(content):
    """Return a pickle that hands bytes to torch's reader of storages."""
    return (
        b"\x80\x04"
        + named("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", len(content))
        + content
        + b"\x85R."
    )


def stored_tensor(offset, shape, stride, count=4):
    """Return a legacy file of a tensor of four numbers, whatever its shape claims."""

    def numbers(values):
        return (
            b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"
        )

    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    made = (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + numbers([offset])[1:-1]
        + numbers(shape)
    )
    made += numbers(stride) + b"\x89N" + b"tR"
    content = b"\x80\x02}" + text("pos_embed") + made + b"s."
    return legacy(content, b"]" + text("0") + b"a.") + struct.pack("<q4f", 4, 1, 2, 3, 4)


def doubled(levels):
    """Return the opcodes of a tuple that holds a tuple twice, that holds one twice, and so on: 2**levels items."""
    return b")" + b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))


def modules_doubled(levels):
    """Return a pickle of modules each of which holds the one before twice; the last one is under ema."""
    opcodes = b"\x80\x04}("
    for level in range(levels):
        before = b"h" + bytes([level - 1]) if level else b"N"
        children = b"}(" + text("a") + before + text("b") + before + b"u"
        module = (
            named("torch.nn.modules.container", "Sequential")
            + b")\x81}"
            + text("_modules")
            + children
            + b"sb"
        )
        opcodes += text(f"module {level}" if level < levels - 1 else "ema") + module + b"q" + bytes([level])
    return opcodes + b"u."


def extension():
    """Register a code for os.system, as a library could, and let the unpickler have met it before."""
    if ("os", "system") not in copyreg._extension_registry:
        copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = os.system
    return b"\x80\x04\x82\xf0" + SHELL + b"\x85R."


def collisions():
    """Return a pickle of a dictionary whose numbers all have the same hash."""
    numbers = (b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(4_000))
    return b"\x80\x02}(" + b"".join(numbers) + b"u."


def zip_bomb():
    return archived(b"\x80\x02]" + b"N" * (64 * MEBIBYTE) + b".", zipfile.ZIP_DEFLATED)


def overlapping():
    """Return an archive whose members are one another's bytes: each is said to be as long as the file."""
    content = bytearray(archived(b"\x80\x02}.", **{f"data/{n}": b"0" * 4096 for n in range(8)}))
    place = 0
    while (place := content.find(b"PK\x01\x02", place)) >= 0:
        content[place + 20 : place + 28] = struct.pack("<II", len(content) - 512, len(content) - 512)
        place += 4
    return bytes(content)


HOSTILE = {
    "os.system": lambda: calls(os.system, f"touch {CANARY}"),
    "os.system, protocol 2": lambda: calls(os.system, f"touch {CANARY}", protocol=2),
    "builtins.eval": lambda: calls(eval, f"open({CANARY!r}, 'w')"),
    "builtins.exec": lambda: calls(exec, f"open({CANARY!r}, 'w')"),
    "builtins.getattr": lambda: calls(getattr, Called(__import__, "os"), "system"),
    "builtins.open": lambda: calls(open, CANARY, "w"),
    "a function of this test": lambda: calls(make_canary),
    "reduce chain": lambda: calls(
        map, Called(getattr, Called(__import__, "os"), "system"), [f"touch {CANARY}"]
    ),
    "subprocess.Popen by NEWOBJ": lambda: b"\x80\x02" + named("subprocess", "Popen") + SHELL + b"\x85\x81.",
    "NEWOBJ_EX": lambda: b"\x80\x04" + ORDERED + b")}\x92.",
    "STACK_GLOBAL through memo": lambda: (
        b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93" + SHELL + b"\x85R."
    ),
    "STACK_GLOBAL through memo, without POP": lambda: (
        b"\x80\x04(" + text("os") + b"\x94" + text("system") + b"\x94h\x00h\x01\x93" + SHELL + b"\x85Rt."
    ),
    "INST": lambda: b"\x80\x02(" + SHELL + b"ios\nsystem\n.",
    "OBJ": lambda: b"\x80\x02(" + SYSTEM + SHELL + b"o.",
    "EXT1 of a known extension": extension,
    "a name within an allowed module": lambda: (
        b"\x80\x04" + text("torch.storage") + text("io.open") + b"\x93" + SHELL + b"\x85R."
    ),
    "a dotted name": lambda: (
        b"\x80\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93."
    ),
    "torch.load": lambda: b"\x80\x02" + named("torch", "load") + SHELL + b"\x85R.",
    "pickle.loads": lambda: b"\x80\x02" + named("pickle", "loads") + b"C\x01.\x85R.",
    "the state of a name": lambda: b"\x80\x02" + ORDERED + b"}" + text("__init__") + SHELL + b"sb.",
    "the class of an object": lambda: (
        b"\x80\x02" + named("argparse", "Namespace") + b")\x81}" + text("__class__") + SYSTEM + b"sb."
    ),
    "a call of an object": lambda: (
        b"\x80\x02" + named("argparse", "Namespace") + b")\x81" + SHELL + b"\x85R."
    ),
    "a call of a dictionary": lambda: b"\x80\x02}" + SHELL + b"\x85R.",
    "in a file by torch": lambda: archived(calls(os.system, f"touch {CANARY}", protocol=2)),
    "in a file by torch before 1.6": lambda: legacy(calls(os.system, f"touch {CANARY}", protocol=2)),
    "in the keys of storages": lambda: legacy(b"\x80\x02}.", SYSTEM + SHELL + b"\x85R."),
    "in a reference to a storage": lambda: legacy(
        b"\x80\x02(" + text("storage") + SYSTEM + text("0") + text("cpu") + b"K\x01tQ."
    ),
    "in a reference in text": lambda: legacy(b"\x80\x02P0\n."),
    "in the bytes of a storage": lambda: inner(calls(os.system, f"touch {CANARY}", protocol=2)),
    "in the bytes of a storage, after its head": lambda: inner(
        legacy(calls(os.system, f"touch {CANARY}", protocol=2))
    ),
    "a storage within a storage within a storage": lambda: inner(legacy(inner(legacy(inner(b"N."))))),
    "compressed": lambda: gzip.compress(calls(os.system, f"touch {CANARY}")),
    "compressed, in an archive": lambda: archived(calls(os.system, f"touch {CANARY}"), zipfile.ZIP_DEFLATED),
    "memo at 2**32": lambda: b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo that is not there": lambda: b"\x80\x02j\xff\xff\xff\xff.",
    "bytes of 2**62": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"short.",
    "text of 2**31": lambda: b"\x80\x02X" + struct.pack("<I", 2**31) + b"short.",
    "text of 2**63": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"short.",
    "frame of 2**62": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "number of 2**31 bytes": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    "number in a million digits": lambda: b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "the hash of nested tuples": lambda: b"\x80\x02}" + doubled(60) + b"Ns.",
    "a set of nested tuples": lambda: b"\x80\x04\x8f(" + doubled(60) + b"\x90.",
    "numbers that collide": collisions,
    "nested tuples as a name": lambda: b"\x80\x04" + doubled(60) + text("system") + b"\x93.",
    "nested tuples as a device": lambda: b"\x80\x04" + named("torch", "device") + doubled(60) + b"\x85R.",
    "modules that hold one another twice": lambda: modules_doubled(60),
    "a list in itself": lambda: b"\x80\x02]q\x00h\x00a.",
    "many lists in one another": lambda: b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b".",
    "many instructions": lambda: b"\x80\x02" + b"(" * 30_000 + b".",
    "zip bomb": zip_bomb,
    "members that overlap": overlapping,
    "a tensor of 2**60 numbers": lambda: stored_tensor(0, [2**60], [0]),
    "a tensor beyond its storage": lambda: stored_tensor(2, [4], [1]),
    "a tensor before its storage": lambda: stored_tensor(-1, [2], [1]),
    "a tensor of negative shape": lambda: stored_tensor(0, [-4], [-1]),
    "a tensor of 2**70 numbers": lambda: stored_tensor(0, [2**70], [1]),
    "a storage larger than it is": lambda: stored_tensor(0, [2**20], [1], count=2**20),
    "a tensor without a storage": lambda: (
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00))\x89NtR."
    ),
    "nothing": lambda: b"\x80\x02.",
    "marks that are not there": lambda: b"\x80\x02ttt.",
    "safetensors with a header of 2**26": lambda: struct.pack("<Q", 2**26) + b"{" + b" " * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence_without_effect(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # 2,000,000 take seconds, with types checked a minute
    monkeypatch.setattr(pickles, "MOST_OPCODES", 20_000)
    content = HOSTILE[name]()
    (tmp_path / "file").write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(UserError, match=r"^file ") as told:
            published.load("get", tmp_path.joinpath("file").relative_to(tmp_path), heads=2)
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(told.value)) < 400 and "\n" not in str(told.value)
    assert seconds < 60 and peak < 300 * MEBIBYTE
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
