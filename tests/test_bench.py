"""The bench: every row is a call that works, between two products, and counted as arithmetic says."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from equilab import bench
from equilab.metrics.counting import flops
from equilab.metrics.measuring import peak_memory

CPU = torch.device("cpu")


def work_of(network):
    """Return a work of the bench on a batch of two images."""
    (work,) = (work for work in bench.WORKS if work.network == network)
    return replace(work, batch={"cpu": 2})


def test_a_matrix_product_runs_at_its_own_peak():
    a, b = torch.ones(2, 256, 256)
    found = bench.measured(lambda: a @ b, CPU, "fp32", seconds=0.2)
    assert found["flop_s"] * found["seconds"] == pytest.approx(2 * 256**3)
    assert found["peak_share"] == pytest.approx(found["flop_s"] / found["peak_flop_s"])
    assert 0.1 < found["peak_share"] < 3  # a neighbour may come and go
    assert found["memory_mib"] == 256**2 * 4 / 2**20
    assert found["seconds"] * found["calls"] > 0.1


def test_measuring_memory_prints_nothing(capfd):
    assert peak_memory(lambda: torch.zeros(1000), CPU) == 4000
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_training_costs_three_times_what_sampling_does(name):
    """Forward and backward: of a ViT, whose products have gradients for both sides, but for the first one's."""
    calls = bench.calls(work_of("ViT of digits"), CPU, name)
    sample, train = (bench.measured(calls[what], CPU, name, seconds=0.01) for what in ("sample", "train"))
    assert train["flop_s"] * train["seconds"] == pytest.approx(
        3 * sample["flop_s"] * sample["seconds"], rel=0.02
    )
    assert train["memory_mib"] > 3 * sample["memory_mib"]


def test_the_table_is_written_for_programs_and_people_and_named_after_the_machine(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "WORKS", (work_of("ViT of digits"),))
    monkeypatch.setattr(bench, "FEATURES", 16)
    monkeypatch.setattr(bench, "COMMANDS", {"nothing": ("-c", "")})
    bench.main(["--seconds", "0.001", "--out", str(tmp_path)])
    name = bench.slug(bench.machine(CPU))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv", f"{name}.md"}
    text = (tmp_path / f"{name}.md").read_text()
    assert text == capsys.readouterr().out
    assert bench.machine(CPU) in text and torch.__version__ in text
    table = pd.read_csv(tmp_path / f"{name}.csv")
    assert set(table["work"]) == {"ViT of digits", "features", "start"}
    assert (table["seconds"] > 0).all()
    of_networks = table[table["work"] == "ViT of digits"]
    assert set(of_networks["what"]) == {"sample", "train"}
    assert of_networks[["peak_share", "memory_mib"]].notna().all(axis=None)


def test_a_machine_is_told_by_its_processor_and_threads():
    name = bench.machine(CPU)
    assert name.endswith(f", {torch.get_num_threads()} threads")
    assert bench.slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 threads") == "intel-r-xeon-r-cpu-2-20ghz-4-threads"


@pytest.mark.slow
@pytest.mark.parametrize("network", [work.network for work in bench.WORKS])
def test_every_call_can_be_made_and_training_costs_more_than_what_it_trains(network):
    one, train = bench.calls(work_of(network), CPU, "fp32").values()
    assert 0 < flops(one) < flops(train)
