"""The bench: every row is a call that works, between two products, and counted as arithmetic says."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from equilab import bench

CPU = torch.device("cpu")


def product(size):
    """Return a work whose call is a square matrix product."""
    a, b = torch.ones(2, size, size)
    return bench.Work("product", lambda subject: {"call": lambda: a @ b}, ".", "distill", "get-m", {"cpu": 1})


def test_a_matrix_product_runs_at_its_own_peak():
    (row,) = bench.measured(product(256), CPU, "fp32", seconds=0.2)
    assert row["flop_s"] * row["seconds"] == pytest.approx(2 * 256**3)
    assert row["peak_share"] == pytest.approx(row["flop_s"] / row["peak_flop_s"])
    assert 0.1 < row["peak_share"] < 3  # a neighbour may come and go
    assert row["memory_mib"] == 256**2 * 4 / 2**20
    assert row["seconds"] * row["calls"] > 0.1 and 0 <= row["seconds_iqr"] < row["seconds"] * 10


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_training_costs_three_times_what_sampling_does(name):
    """Forward and backward: of a ViT, all whose products have gradients for both sides but the first."""
    (work,) = (work for work in bench.WORKS if work.network == "ViT of digits")
    sample, train = bench.measured(replace(work, batch={"cpu": 2}), CPU, name, seconds=0.01)
    assert (sample["what"], train["what"]) == ("sample", "train")
    assert train["flop_s"] * train["seconds"] == pytest.approx(
        3 * sample["flop_s"] * sample["seconds"], rel=0.02
    )
    assert train["memory_mib"] > 3 * sample["memory_mib"]
    assert {row["precision"] for row in (sample, train)} == {name}


def test_the_table_is_written_for_programs_and_people_and_named_after_the_machine(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "WORKS", (product(64),))
    monkeypatch.setattr(bench, "FEATURES", 16)
    monkeypatch.setattr(bench, "COMMANDS", {"nothing": ("-c", "")})
    bench.main(["--seconds", "0.001", "--out", str(tmp_path)])
    name = bench.slug(bench.machine(CPU))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv", f"{name}.md"}
    text = (tmp_path / f"{name}.md").read_text()
    assert text == capsys.readouterr().out
    assert bench.machine(CPU) in text and torch.__version__ in text
    table = pd.read_csv(tmp_path / f"{name}.csv")
    assert set(table["work"]) == {"product", "features", "start"}
    assert (table["seconds"] > 0).all()
    assert table.loc[table["work"] == "product", "peak_share"].notna().all()


def test_a_machine_is_told_by_its_processor_and_threads():
    name = bench.machine(CPU)
    assert name.endswith(f", {torch.get_num_threads()} threads")
    assert bench.slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 threads") == "intel-r-xeon-r-cpu-2-20ghz-4-threads"


@pytest.mark.slow
@pytest.mark.parametrize("work", bench.WORKS, ids=lambda work: work.network)
def test_every_work_is_measured(work):
    rows = list(bench.measured(replace(work, batch={"cpu": 2}), CPU, "fp32", seconds=0.001))
    assert len(rows) == 2
    for row in rows:
        assert row["work"] == work.network and row["batch"] == 2
        assert row["flop_s"] > 0 and row["memory_mib"] > 0 and 0 < row["peak_share"] < 3
