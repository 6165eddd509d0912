"""`python -m equilab STAGE [RUN] [--params FILE] [--dry-run]`: one stage, one command."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import sys
from pathlib import Path

import yaml

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # idle threads sleep soon: a busy neighbour costs less; before torch
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that measures memory need not speak
if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc
    # a freed tensor's memory stays with the process: to take it anew, page by page, was a tenth of a small network's step
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD

from equilab import graph
from equilab.core import config
from equilab.core.config import UserError
from equilab.core.job import (
    Job,
    Plan,
    Study,
)

COMMANDS = ("check", "graph", "code")
USUAL_SHARE = 0.3  # of the matmul peak that small networks reach; for estimates of time alone


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status; what a user can mend is one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="equilab", description=__doc__)
    parser.add_argument(
        "stage",
        metavar="STAGE",
        help=f"{', '.join(graph.STAGES)}; or check: validate params.yaml; "
        "or graph: write dvc.yaml anew; or code: list the "
        "modules of every stage and the params, for DVC",
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the run, where the stage's section is a dictionary of runs"
    )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, default=Path("params.yaml"), help="the study's params"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and what it costs")
    given = parser.parse_args(arguments)
    try:
        return _command(given.stage, given.run, given.params, given.dry_run)
    except UserError as error:
        print(f"equilab: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what no stage foresaw: a file in the way, a full disk
        print(
            f"equilab: {error.filename or 'a file'}: {error.strerror or error}; make it readable or writable, free disk space, "
            "or run the stage that writes it again",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("equilab: stopped; the same command continues where it was", file=sys.stderr)
        return 130


def _command(stage: str, run: str | None, params: Path, dry_run: bool) -> int:
    if stage in COMMANDS and (run is not None or dry_run):
        raise UserError(f"{stage} takes neither a run nor --dry-run; call it alone")
    if stage == "graph":
        print(*graph.write(graph.PACKAGE.parent), sep="\n")
        return 0
    sections = config.read(params)
    os.chdir(params.resolve().parent)
    if stage == "code":
        from equilab.core.files import remove_others, write

        for name, one in graph.STAGES.items():
            write(Path(f"results/code/{name}.txt"), graph.listed(one.module))
        write(Path("results/code/params.json"), json.dumps(sections, default=str))
        remove_others(Path("results/code"), [f"{name}.txt" for name in graph.STAGES], "*.txt")
        return 0
    known = ["study", *graph.STAGES]
    for name in sections:
        if name not in known:
            raise UserError(f"{params}: unknown section {name!r}{config.nearest(name, known)}")
    needed = ["study", *(name for name, one in graph.STAGES.items() if not one.optional)]
    for name in needed if stage == "check" else ["study", "data", *([stage] if stage in known else [])]:
        _section(sections, name, params)
    study = config.parse(Study, sections["study"], f"{params}: study")
    data = _config(sections, "data", None, params)[0]
    read = lambda stage, run=None: (
        _config(sections, stage, run, params)[0] if stage != "latents" or sections.get(stage) else None
    )
    if stage == "check":
        from equilab.core.machine import device_of

        for name in (name for name in graph.STAGES if sections.get(name)):
            for one in (
                config.mapping(sections[name], f"{params}: {name}") if graph.STAGES[name].each else [None]
            ):
                settings, module = _config(sections, name, one, params)
                job = Job(study, name, one, data.image, data.classes, "", read)
                device_of(job)
                module.plan(settings, job, read)
        print(f"{params}: every key is known and every value possible")
        return 0
    if stage not in graph.STAGES:
        raise UserError(f"unknown stage {stage!r}{config.nearest(stage, [*graph.STAGES, *COMMANDS])}")
    settings, module = _config(sections, stage, run, params)
    job = Job(study, stage, run, data.image, data.classes, graph.code(module.__name__), read)
    _processes(study, study.run_threads if graph.STAGES[stage].each else study.threads)
    if dry_run:
        print(yaml.safe_dump({job.name: config.plain(settings)}, sort_keys=False), end="")
        _print(module.plan(settings, job, read)(), job)
        return 0
    from equilab.core.files import locked

    with locked(job.name):
        module.run(settings, job)
    return 0


def _print(plan: Plan, job: Job) -> None:
    """Print what a stage will cost; the time rests on a matrix product measured now."""
    import torch

    from equilab.core.machine import device_of
    from equilab.metrics.measuring import matmul_peak

    peak = matmul_peak(device_of(job), torch.float32, longest=0.1)
    seconds = plan.flops / (USUAL_SHARE * peak)
    disk = "not known before the images are read" if plan.disk is None else f"{plan.disk / 2**20:,.1f} MiB"
    if plan.note:
        print(plan.note)
    print(f"# parameters: {plan.parameters:,}" if plan.parameters else "# parameters: none")
    print(f"# networks: {plan.flops / 1e9:,.1f} GFLOP")
    print(f"# results on disk: {disk}")
    print(
        f"# time: about {seconds / 60:,.1f} min and 5 s of start, at {USUAL_SHARE:.0%} of this machine's {peak / 1e12:.2f} TFLOP/s"
    )


def _section(sections: dict, name: str, params: Path):
    """Return a section of the params.

    Raises: UserError if it is missing.
    """
    if sections.get(name) is None:
        raise UserError(f"{params}: missing section {name!r}; give it")
    return sections[name]


def _config(sections: dict, stage: str, run: str | None, params: Path):
    """Return the stage's config and its module."""
    section, path = _section(sections, stage, params), f"{params}: {stage}"
    if graph.STAGES[stage].each:
        config.mapping(section, path)
        if run is None:
            raise UserError(f"{stage} needs the name of a run: {', '.join(section) or 'this study has none'}")
        if run not in section:
            raise UserError(f"{path}: no run {run!r}{config.nearest(run, section)}")
        section, path = section[run], f"{path}.{run}"
    elif run is not None:
        raise UserError(f"{stage} has no runs; call it without {run!r}")
    module = importlib.import_module(graph.STAGES[stage].module)
    return config.parse(module.Config, section, path), module


def _processes(study: Study, threads: int) -> None:
    """Fix the number of threads; join the other processes where torchrun started several."""
    if (torch := sys.modules.get("torch")) is None:
        return  # a stage without networks
    torch.set_num_threads(threads)
    if "RANK" in os.environ:
        cuda = study.device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")


if __name__ == "__main__":
    sys.exit(main())
