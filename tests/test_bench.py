"""The benchmark: what it writes, and that its counts and names hold; its numbers are measured elsewhere."""

import csv

import pytest
import torch

from equilab import bench
from equilab.bench import NETWORKS, PRECISIONS, WORK, Work


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder into which a quick run wrote its table."""
    folder = tmp_path_factory.mktemp("bench")
    bench.main(["--quick", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def rows(written):
    (path,) = written.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_is_named_after_the_machine(written):
    name = bench.machine(torch.device("cpu"))
    assert name.endswith(f", {torch.get_num_threads()} threads") and len(name) > 12
    assert {path.name for path in written.iterdir()} == {f"{bench.slug(name)}.csv", f"{bench.slug(name)}.md"}
    assert bench.slug("AMD EPYC, 2 threads") == "amd-epyc-2-threads"
    assert bench.slug("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 threads") == "intel-r-xeon-r-cpu-2-20ghz-4-threads"
    assert (
        (written / f"{bench.slug(name)}.md").read_text().startswith(f"# {name}, torch {torch.__version__}\n")
    )


def test_each_figure_stands_beside_the_peak_of_its_precision_measured_right_before_and_after_it(rows):
    products = [row for row in rows if row["what"] == "matmul"]
    assert [row["precision"] for row in products] == [*PRECISIONS["cpu"]]
    assert (
        min(float(row["flop_s"]) for row in products) > 1e6
    )  # some machines have no bf16 instructions: 4e8 was seen
    assert (
        float(products[0]["times_fp32"]) == 1
    )  # what a network can gain at most by bf16 stands beside what it gains
    networks = [row for row in rows if row["images_s"]]
    assert len(networks) > 20
    for row in networks:
        share = float(row["flop_s"]) / float(row["peak_flop_s"])
        assert float(row["peak_share"]) == pytest.approx(share, rel=1e-6)
        assert float(row["seconds_min"]) <= float(row["seconds"]) <= float(row["seconds_max"])
        assert float(row["images_s"]) == pytest.approx(int(row["batch"]) / float(row["seconds"]), rel=1e-6)
        assert float(row["memory_mib"]) > 0


def test_every_work_has_a_row_in_each_precision_and_every_switch_one_beside_none(rows):
    found = {(row["what"], row["size"], row["precision"], row["switch"]) for row in rows}
    for work in WORK:
        if "cpu" in work.batch and not work.switches:
            assert {(work.what, work.size, name, "") for name in PRECISIONS["cpu"]} <= found
    assert {switch for *_, switch in found} == {
        "",
        "none",
        "attention unfused",
        "contiguous",
    }  # no compiling when quick


def test_a_goal_is_reached_where_the_figure_says_so(rows):
    goals = [row for row in rows if row["goal"].endswith("% of peak")]
    assert len(goals) == 9
    for row in goals:
        reached = float(row["peak_share"]) >= int(row["goal"].split("%")[0]) / 100
        assert row["reached"] == ("yes" if reached else "no")
    (gain,) = (row for row in rows if row["goal"] == "2.5 times fp32")
    assert (gain["reached"] == "yes") == (float(gain["times_fp32"]) >= 2.5)


def test_the_parts_of_a_step_of_the_small_get_are_all_of_it(rows):
    found = {
        row["what"].removeprefix("a step of GET 0.13M: "): float(row["share"])
        for row in rows
        if "a step of" in row["what"]
    }
    assert min(found.values()) > 0 and sum(found.values()) == pytest.approx(1)
    assert set(found) > {"matrix products", "GELU", "attention", "everything else"}


def test_the_error_of_bf16_is_stated_and_its_network_is_no_identity(rows):
    (row,) = (row for row in rows if row["error_max"])
    assert 0 < float(row["error_mean"]) < float(row["error_max"]) < float(row["image_std"])


def test_a_step_of_the_small_get_is_counted_as_published_forward_and_backward():
    """0.13M parameters; a multiply-accumulate of each weight of a token's blocks, six times those of the tied one."""
    with torch.device("meta"):
        net = bench.network("GET 0.13M", torch.device("meta"), False)
    assert 0.12e6 < sum(p.numel() for p in net.parameters()) < 0.14e6
    work = Work("train", "GET 0.13M", {"cpu": 128})
    step = bench.task(work, "", 128, torch.device("meta"), bench.nullcontext, False)
    assert bench.flops(step) == pytest.approx(5.8e9, rel=0.02)


def test_an_application_of_fpdms_layer_stands_beside_a_layer_of_dit(rows):
    """In each precision; two linear maps of 4 D^2 beside the 12 D^2 and the attention of the block, which is that of DiT."""
    names = ("an application of FPDM's layer", "the same without the maps of its injection")
    found = {name: [row for row in rows if row["what"] == name] for name in names}
    for tied, alone in zip(*found.values()):
        assert (
            1 < float(tied["flop_times"]) < 4 / 3 + 0.1
        )  # the injection's own projections, shared by two applications here
        assert 0.9 < float(alone["flop_times"]) < 1  # its modulation, once
        for row in (tied, alone):
            assert (row["reached"] == "yes") == (
                float(row["seconds_times"]) <= 1.05 * float(row["flop_times"])
            )
    assert [[row["precision"] for row in each] for each in found.values()] == [[*PRECISIONS["cpu"]]] * 2


def test_a_chain_is_as_many_calls_and_the_memory_of_training_is_compared(rows):
    of = {(row["what"], row["size"], row["precision"]): row for row in rows}
    for size in bench.DEEP:
        chain, call = (of[what, size, "fp32"] for what in ("sample", "denoise"))
        assert float(chain["flop_s"]) * float(chain["seconds"]) == pytest.approx(
            bench.STEPS * float(call["flop_s"]) * float(call["seconds"])
        )
    (less,) = (
        row for row in rows if row["what"].startswith("training memory") and row["precision"] == "fp32"
    )
    tied, explicit = (float(of["train", size, "fp32"]["memory_mib"]) for size in reversed(bench.DEEP))
    assert float(less["share"]) == pytest.approx(1 - tied / explicit) and (less["reached"] == "yes") == (
        float(less["share"]) >= 0.6
    )


def test_work_names_networks_that_exist():
    for work in WORK:
        assert work.size in NETWORKS and set(work.batch) <= set(PRECISIONS)
        assert set(work.goals) <= {name for names in PRECISIONS.values() for name in names}
