"""The training loop against closed forms: schedule, average, accumulation, resumption; and its refusals."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import golden
from torch import nn

from equilab import study
from equilab.core import files, like, machine
from equilab.core.config import UserError
from equilab.models import checkpoint as state
from equilab.training.loop import Logged, Run, fit
from equilab.training.optimisation import Optimisation, ema_decay, learning_rate

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
BASE = Optimisation(
    nimg=320,
    batch=8,
    micro_batch=8,
    lr=1e-2,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    clip=1.0,
    warmup_nimg=80,
    decay="cosine",
    decay_start_nimg=160,
    ema_half_life_nimg=64.0,
    ema_warmup=0.0,
    precision="fp32",
    compile=False,
    report_nimg=80,
    snapshots=(160, 320),
)
TARGET = torch.linspace(-1, 1, 5)


def changed(**values):
    """Return the base with other values, checked."""
    return Optimisation(**{**BASE.model_dump(), **values})


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return self.dropout(x * self.weight)


def batch_of(positions):
    return torch.stack([torch.sin(torch.arange(5.0) + p) for p in positions])


def loss(net, x):
    return (net(x) - x * TARGET).square().mean()


def train(folder, config=BASE, stop=None):
    folder.mkdir(exist_ok=True)
    run = Run(Line(), config, 0, folder, CPU)
    for step in fit(run, batch_of, loss):
        if step.nimg == stop:
            break
    return run


def test_the_learning_rate_warms_up_holds_and_decays():
    assert learning_rate(BASE, 0) == pytest.approx(1e-2 * 8 / 80)
    assert learning_rate(BASE, 80) == learning_rate(BASE, 152) == 1e-2
    assert learning_rate(BASE, 240) == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi / 2)))
    linear = changed(decay="linear")
    assert learning_rate(linear, 280) == pytest.approx(1e-2 * 0.25)


def test_the_average_has_its_half_life_and_its_warm_up():
    warmed = changed(ema_warmup=0.05)
    assert ema_decay(BASE, 0) ** (64 / 8) == pytest.approx(0.5)
    assert ema_decay(warmed, 0) == 0
    assert ema_decay(warmed, 800) == pytest.approx(0.5 ** (8 / 40))


def test_the_average_is_the_closed_form_of_the_weights_of_all_updates(tmp_path):
    run, average = Run(Line(), BASE, 0, tmp_path, CPU), torch.zeros(5)
    decay = ema_decay(BASE, 0)
    for _ in fit(run, batch_of, loss):
        average = decay * average + (1 - decay) * run.net.weight.detach()
    torch.testing.assert_close(run.ema["weight"], average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stop", [8, 80, 88, 160, 312])
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, stop):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop=stop)
    resumed = train(tmp_path / "parts")
    assert resumed.log == whole.log and resumed.nimg == 320
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_the_log_is_there_from_the_first_report_on(tmp_path):
    train(tmp_path / "run", stop=160)
    head, *rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert head == "nimg,loss,lr" and [row.split(",")[0] for row in rows] == ["80", "160"]


def test_accumulated_micro_batches_are_the_large_batch(tmp_path):
    torch.manual_seed(0)
    start, runs = nn.Linear(5, 5).state_dict(), []
    for micro in (8, 2):
        net, folder = nn.Linear(5, 5), tmp_path / str(micro)
        net.load_state_dict(start)
        folder.mkdir()
        runs.append(Run(net, changed(micro_batch=micro), 0, folder, CPU))
        for _ in fit(runs[-1], batch_of, loss):
            pass
    torch.testing.assert_close(runs[0].ema, runs[1].ema, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shown", [False, True], ids=["all of it", "a part that the log does not show"])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, shown):
    def broken(net, x):
        value = loss(net, x)
        spoiled = value * (math.nan if batches.pop(0) >= 12 else 1.0)
        return Logged(spoiled, value) if shown else spoiled

    batches = list(range(40))
    run = Run(Line(), BASE, 0, tmp_path, CPU)
    with pytest.raises(UserError, match=r"loss .*nan .* 13 \(104 .*optimisation\.lr"):
        for _ in fit(run, batch_of, broken):
            pass
    tensors, metadata = state.load_tensors(tmp_path / "state.safetensors")
    assert metadata["nimg"] == 80 and tensors["net.weight"].isfinite().all()


def test_weights_that_are_no_longer_finite_are_found_where_the_loss_was_still_good(tmp_path):
    config = changed(
        nimg=80, clip=None, warmup_nimg=0, decay="none", snapshots=(), batch=80, micro_batch=80
    ).model_copy(update={"lr": 1e38})  # more than params may give
    run = Run(Line(), config, 0, tmp_path, CPU)
    with pytest.raises(UserError, match=r"^weight .*\b80\b.*optimisation\.lr"):
        for _ in fit(run, batch_of, lambda net, x: loss(net, x) * 1e30):
            pass
    assert not list(tmp_path.iterdir()), "nothing is kept"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"micro_batch": 3}, "batch .*micro_batch"),
        ({"nimg": 321}, r"nimg \(321\).* batch "),
        ({"report_nimg": 100}, r"report_nimg \(100\).* batch "),
        ({"report_nimg": 96}, "nimg .* report_nimg"),
        ({"snapshots": (100,)}, "snapshots: 100"),
        ({"lr": 0.0}, "lr"),
        ({"lr": 1e300}, "lr"),
        ({"batch": 10**12, "micro_batch": 10**12}, "batch"),
        ({"snapshots": (400,)}, "snapshots: 400"),
        ({"decay_start_nimg": 320}, "decay_start_nimg"),
        ({"clip": -1.0}, "clip"),
        ({"warmup_nimg": -1}, "warmup_nimg"),
        ({"ema_warmup": 2.0}, "ema_warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_counts_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        changed(**change)


def test_damaged_foreign_and_missing_files_are_refused_with_their_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    state.save_tensors(path, {"a": torch.arange(1000.0)}, {"note": "whole"})
    content = path.read_bytes()
    assert state.load_tensors(path)[1]["note"] == "whole"
    path.write_bytes(content[:-7])
    with pytest.raises(UserError, match="weights.safetensors is damaged"):
        state.load_tensors(path)
    path.write_bytes(content[:-7] + b"1234567")
    with pytest.raises(UserError, match="weights.safetensors .*checksum"):
        state.load_tensors(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="weights.safetensors .*equilab"):
        state.load_tensors(path)
    with pytest.raises(UserError, match="none.safetensors"):
        state.load_tensors(tmp_path / "none.safetensors")


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(UserError, match=r"1073741824.* GiB .* GiB"):
        files.require_disk({tmp_path / "not" / "yet": 2**60})


def test_precision_bf16_is_autocast_and_fp32_is_not():
    a = torch.randn(4, 4)
    with machine.precision("bf16", CPU)():
        assert (a @ a).dtype == torch.bfloat16
    with machine.precision("fp32", CPU)():
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "batch", "half_life"), [("cifar", 256, 500_000.0), ("imagenet", 512, 50_000_000.0)]
)
def test_the_average_decays_as_published(name, batch, half_life):
    tensors, _ = golden("gdd_ncsnpp")
    nimg, decay = (tensors[f"out.ema.{name}.{key}"] for key in ("images_before_step", "decay"))
    config = BASE.model_copy(update={"batch": batch, "ema_half_life_nimg": half_life, "ema_warmup": 0.05})
    found = [ema_decay(config, int(seen)) for seen in nimg]
    assert len(found) == 43 and found == pytest.approx(decay.tolist(), rel=1e-12)


def numbers(value, place=()):
    """Yield every number within a section of params, with its place."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from numbers(entry, (*place, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


@pytest.mark.parametrize(
    "stage",
    [
        *("evaluator", "teacher", "features", "distill", "diffusion", "gan", "consistency", "progressive"),
        *("evaluate", "activation", "claims"),
    ],
)
def test_every_number_of_params_has_a_range_that_is_known_before_anything_is_built(stage):
    params = ROOT / "studies/smoke/params.yaml"
    found = list(numbers(like.read(params)[stage]))
    assert found
    for place, value in found:
        if "seeds" in place:
            continue  # any number is one
        sections = like.read(params)
        entry = sections[stage]
        for key in place[:-1]:
            entry = entry[key]
        entry[place[-1]] = 10**12 if isinstance(value, int) else 1e300
        run = None if study.STAGES[stage].jobs == "one" else place[0]
        name = next(key for key in reversed(place) if isinstance(key, str))  # of a list, where it is in one
        with pytest.raises(UserError, match=re.escape(name)):
            study.config_of(study.Sections(sections, "params.yaml", params.parent), stage, run)
