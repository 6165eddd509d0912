"""What a VAE's config says: how its latents are scaled, and what of it is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from equilab.core import config
from equilab.core.config import UserError
from equilab.core.job import Job, Study
from equilab.data import latents

IMAGE = (1, 8, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a VAE of 8x8 grey images to latents 2x4x4."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": (8, 8)}
    made = AutoencoderKL(
        **sizes, **blocks, layers_per_block=1, norm_num_groups=4, sample_size=8, scaling_factor=0.5
    )
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def vae(saved, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(saved, tmp_path / "vae")


def change(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def opened(folder):
    parsed = config.parse(latents.Config, {"vae": str(folder), "shape": [2, 4, 4], "batch": 64}, "latents")
    return latents.open_vae(parsed, IMAGE)


@pytest.mark.parametrize(
    "keys, center, deviation",
    [
        ({}, [0, 0], [1, 1]),
        ({"shift_factor": 0.1}, [0.1, 0.1], [1, 1]),
        ({"latents_mean": [0.1, -0.2], "latents_std": [2.0, 4.0]}, [0.1, -0.2], [2, 4]),
        ({"latents_mean": [0, 1], "latents_std": [2, 4]}, [0, 1], [2, 4]),
    ],
)
def test_latents_are_scaled_as_the_vae_says_and_back(vae, keys, center, deviation):
    change(vae, scaling_factor=0.3, **keys)
    found = opened(vae)
    image, noise = torch.randn(3, *IMAGE), torch.randn(3, 2, 4, 4)
    with torch.inference_mode():
        posterior = found.net.encode(image).latent_dist
        encoded = posterior.mean + posterior.std * noise
        decoded, latent = found.net.decode(encoded).sample, found.encode(image, noise)
        again = found.decode(latent)
    center, deviation = (torch.tensor(each).reshape(-1, 1, 1) for each in (center, deviation))
    torch.testing.assert_close(latent, (encoded - center) * 0.3 / deviation)
    torch.testing.assert_close(again, decoded)


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"latents_mean": [0.1, 0.1]}, "latents_std"),
        ({"latents_mean": [0.1, 0.1], "latents_std": [1, 1], "shift_factor": 0.1}, "shift_factor"),
        ({"latents_mean": [0.1], "latents_std": [1]}, "each latent channel"),
        ({"latents_mean": [0.1, 0.1], "latents_std": [1, 0]}, "latents_std[1]"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": -1}, "scaling_factor"),
        ({"scaling_factor": "1"}, "scaling_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"shift_factor": float("inf")}, "shift_factor"),
        ({"shift_factor": [1]}, "shift_factor"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name"),
        ({"_class_name": 3}, "_class_name"),
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 3}, "3 channels"),
        ({"latent_channels": 10**12}, "latent_channels"),
        ({"latent_channels": True}, "latent_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [8, "8"]}, "block_out_channels[1]"),
        ({"block_out_channels": [8] * 99}, "block_out_channels"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"block_out_channels": [8, 16]}, "cannot be read"),
        ({"act_fn": "nothing"}, "nothing"),
        ({"act_fn": None}, "cannot be read"),
        ({"down_block_types": ["a", "b"]}, "cannot be read"),
        ({"down_block_types": 3}, "cannot be read"),
        ({"norm_num_groups": 0}, "cannot be read"),
        ({"norm_num_groups": 3}, "cannot be read"),
        ({"sample_size": "large"}, "cannot be read"),
        ({"use_quant_conv": False}, "quant_conv"),
        ({"shift_vector": [1, 2]}, "'shift_vector'"),
    ],
)
def test_a_config_that_is_not_to_be_relied_on_is_refused_by_name(vae, keys, part):
    change(vae, **keys)
    with pytest.raises(UserError) as error:
        opened(vae)
    sentence = str(error.value)
    assert (
        part in sentence
        and sentence.startswith("latents.vae")
        and str(vae) in sentence
        and "\n" not in sentence
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_a_config_that_is_damaged_is_refused(vae, content):
    (vae / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        opened(vae)


def test_weights_of_a_vae_that_are_damaged_are_refused(vae):
    path = vae / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-10], b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match="latents.vae.*cannot be read"):
            opened(vae)
    path.unlink()
    with pytest.raises(UserError, match="latents.vae"):
        opened(vae)


def test_latents_made_with_another_scaling_are_not_decoded(vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = config.parse(latents.Config, {"vae": str(vae), "shape": [2, 4, 4], "batch": 64}, "latents")
    shared = {"name": "t", "root": ".", "seed": 0, "threads": 1, "run_threads": 1, "device": "cpu"}
    study = config.parse(Study, shared, "study")
    job = Job(study, "evaluate", "dit", 0, IMAGE, 0, "", lambda *_: parsed, lambda *_: (0,))
    known = opened(vae)
    os.makedirs("results/latents")
    (tmp_path / "results/latents/meta.json").write_text(json.dumps({"vae": known.checksum()}))
    pixels = latents.pixels(job, (2, 4, 4), True, torch.device("cpu"))
    latent = torch.randn(2, 2, 4, 4)
    with torch.inference_mode():
        wanted = known.net.decode(latent / 0.5).sample
    np.testing.assert_array_equal(pixels.decode(latent), latents.to_uint8(wanted.clamp(-1, 1)))
    change(vae, shift_factor=0.1)
    with pytest.raises(UserError, match="another VAE"):
        latents.pixels(job, (2, 4, 4), True, torch.device("cpu"))
