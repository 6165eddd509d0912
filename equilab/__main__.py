"""`python -m equilab STAGE [RUN] [--seed K] [--params FILE] [--dry-run]`: one stage, one command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from equilab.launching import STOPPED

if TYPE_CHECKING:
    from equilab.core.job import Job

# The rest of the package is imported within functions: interrupted while it is, a command answers as it does later.

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status; what a user can mend is said in sentences on stderr, with status 2; what nobody
    foresaw in one, with status 1, that names the log of its traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        from equilab.core.edge import answered
        from equilab.core.process import prepare_process

        prepare_process()
        return answered(partial(_run_command, words), words)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130


def _run_command(words: list[str]) -> int:
    if words and words[0] in OWN:
        module, _ = OWN[words[0]]
        return importlib.import_module(module).command(words[1:])
    given = _arguments(words)
    return COMMANDS[given.stage](given) if given.stage in COMMANDS else stage(given)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    from equilab.graph import STAGES

    commands = {name: str(command.__doc__).rstrip(".") for name, command in COMMANDS.items()}
    commands |= {name: f"{what} ({name} --help)" for name, (_, what) in OWN.items()}
    lines = [f"  {name:<8} {what[0].lower()}{what[1:]}" for name, what in commands.items()]
    stages = textwrap.fill(", ".join(STAGES), 100, initial_indent="  ", subsequent_indent="  ")
    parser = argparse.ArgumentParser(
        prog="equilab",
        description=__doc__,
        epilog="\n".join(["stages:", stages, "", "commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", metavar="STAGE", help="a stage, or a command, of those below")
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run, of a stage that has runs")
    parser.add_argument(
        "--seed", metavar="K", type=int, help="this replicate of the run; all of them if left out"
    )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, default=Path("params.yaml"), help="the study's params"
    )
    parser.add_argument(
        "--alone", action="store_true", help="work in this process alone, whatever study.launch says"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and what it costs")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="train with another value of a key of the run (optimisation.lr=1e-3), any number of them; needs --out",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="train into a folder of its own")
    if not arguments:
        parser.exit(2, parser.format_help())
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> int:
    """Say all that is wrong with params.yaml."""
    from equilab.check import checked

    checked(given.params)
    print(f"{given.params}: every key is known and every value possible")
    return 0


def graph(given: argparse.Namespace) -> int:
    """Write dvc.yaml anew, of this study or of all that the repository has."""
    from equilab.core.code import PACKAGE
    from equilab.dvc import write

    root = PACKAGE.parent
    repository = [root / "params.yaml", *sorted(root.glob("studies/*/params.yaml"))]
    studies = {params.absolute(): None for params in (*repository, given.params) if params.exists()}
    for params in studies:
        print(write(params.parent))
    return 0


def code(given: argparse.Namespace) -> int:
    """Check params.yaml; write what the stages depend on beside results: their modules, and the params of every job."""
    from equilab.check import checked, write_code

    write_code(checked(given.params))
    return 0


def stages(given: argparse.Namespace) -> int:
    """Print the stages that runs need, in their order; then runs, a line of those that may be made at once."""
    from equilab.dvc import waves
    from equilab.study import open_study

    for names in waves(open_study(given.params)):
        print(*names)
    return 0


def clean(given: argparse.Namespace) -> int:
    """Remove what is left of unfinished runs that params.yaml no longer has, and what it lists as kept where RUN names it; put
    back results that a killed process had put aside, with no others in their place."""
    from equilab.core.edge import LOGS
    from equilab.core.files import SCRATCH, left_over, locked, remove
    from equilab.graph import STAGES
    from equilab.study import open_study

    sections = open_study(given.params)
    os.chdir(given.params.absolute().parent)
    names = {job.name(stage) for stage in filter(sections.has, STAGES) for job in sections.jobs(stage)}
    unfinished = sorted(SCRATCH.glob("*"))
    kept = [folder for folder in unfinished if folder.name != given.run and _is_work_of(names, folder.name)]
    removed = [folder for folder in unfinished if folder not in kept]
    _refuse_unknown_work(given.run, unfinished)
    for folder in [*removed, *left_over(Path("results")), *filter(Path.exists, [LOGS])]:
        size = _mebibytes(folder)
        if given.dry_run:
            print(f"{folder}: {size}")
            continue
        with locked(_job_that_writes(folder)):
            if place := _place_of_former_results(folder):
                os.replace(folder, place)
            else:
                remove(folder)
        print(f"{folder}: {size}, {f'put back as {place}' if place else 'removed'}")
    for folder in kept:
        print(f"{folder}: {_mebibytes(folder)}, kept; `python -m equilab clean {folder.name}` removes it")
    if not removed:
        print("nothing is left of runs that params.yaml no longer has")
    return 0


def _is_work_of(jobs: set[str], folder: str) -> bool:
    """Return whether a folder of unfinished work is that of one of these jobs, or of a try of it (JOB@TRY)."""
    return folder in jobs or folder.rpartition("@")[0] in jobs


def _refuse_unknown_work(name: str | None, unfinished: list[Path]) -> None:
    from equilab.core.config import UserError, nearest

    known = [folder.name for folder in unfinished]
    if name is not None and name not in known:
        raise UserError(f"there is no unfinished work of {name!r}{nearest(name, known)}")


def _place_of_former_results(folder: Path) -> Path | None:
    """Return where the results in a folder belong that a process put aside, and was killed before it put others there."""
    place = folder.with_name(folder.stem.removeprefix("."))
    put_aside = folder.parts[0] == "results" and folder.suffix == ".removed"
    return place if put_aside and folder.exists() and not place.exists() else None


def _mebibytes(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**20:,.1f} MiB"


def _job_that_writes(folder: Path) -> str:
    """Return the name of the job that may be at work in a folder: of scratch, or beside results (results/STAGE/RUN/.SEED.new)."""
    from equilab.core.job import name_of

    if folder.parts[0] != "results":
        return folder.name
    stage, *run = [*folder.parts[1:-1], folder.stem.removeprefix(".")]
    return name_of(stage, *run)


def plan(given: argparse.Namespace) -> int:
    """Print what a whole study takes, and how much of it is left; RUN may be the study's folder."""
    from equilab.planning import planned
    from equilab.study import open_study

    sections = open_study(Path(given.run) / "params.yaml" if given.run else given.params)
    os.chdir(sections.folder)
    print(planned(sections))
    return 0


# commands with arguments of their own: the module of each, and what it does
OWN = {
    "sample": ("equilab.sampling.command", "draw images from a run"),
    "score": ("equilab.score", "score a folder or file of images"),
    "card": ("equilab.card", "write a run as a folder to give away"),
    "compare": ("equilab.compare", "compare the results here with committed ones"),
    "doctor": ("equilab.doctor", "look at this machine and this installation"),
    "submit": ("equilab.cluster.command", "run a study's graph on this machine or on SLURM"),
    "import": ("equilab.published.importing", "read published weights into results"),
}
COMMANDS = {"check": check, "graph": graph, "code": code, "stages": stages, "plan": plan, "clean": clean}


def stage(given: argparse.Namespace) -> int:
    """Run the jobs of a stage that are asked for, one after another, or say what they would cost."""
    from equilab.core.process import is_first
    from equilab.dvc import require_recorded
    from equilab.graph import STAGES
    from equilab.launching import processes
    from equilab.study import job_of, jobs_of, open_study

    sections = open_study(given.params)
    out = given.out and Path(os.path.relpath(given.out, given.params.absolute().parent))
    os.chdir(given.params.absolute().parent)
    asked = jobs_of(sections, given.stage, given.run, given.seed)
    if given.set or out:
        from equilab.trying import tries  # torch, which not every stage needs

        jobs = tries(sections, given.stage, asked, given.set, out)
    else:
        require_recorded(sections, given.stage, asked)
        jobs = [job_of(sections, given.stage, each) for each in asked]
    for job in jobs:
        job.read(job.stage, job.run, job.seed)  # refuses mistakes of a later one before the first begins
    _refuse_half_a_torchrun()
    shared, launch = STAGES[given.stage].distributed, jobs[0].study.launch or ""
    alone = given.alone or given.dry_run or "RANK" in os.environ  # or one of those that torchrun has started
    if shared and launch.startswith("torchrun") and not alone:
        return processes(launch, _command(given, out))
    if not shared and not is_first():
        return 0  # the first process does it alone
    _join_processes(jobs[0])
    if out and not given.dry_run:
        jobs[0].begin()
    for job in jobs:
        if given.dry_run:
            _print_plan(job)
        else:
            _run(job)
    return 0


def _command(given: argparse.Namespace, out: Path | None) -> list[str]:
    """Return the arguments by which a stage is started again; the study's folder is the current one, and `out` leads from it."""
    from equilab.study import Replicate

    job = Replicate(given.run, given.seed).arguments(given.stage)
    tried = [*(f"--set={setting}" for setting in given.set), *([f"--out={out}"] if out else [])]
    return [*job, "--params", given.params.name, *tried]


def _run(job: Job) -> None:
    from equilab.core.files import locked, require_replaceable
    from equilab.graph import STAGES
    from equilab.study import module_of

    with locked(job.name):
        require_replaceable(STAGES[job.stage].outputs(job.out))
        config = job.read(job.stage, job.run, job.seed)
        module_of(job.stage, config).run(config, job)


def _print_plan(job: Job) -> None:
    """Print a job's config and what it will cost; the time rests on a matrix product measured now."""
    import yaml

    from equilab.core.config import plain
    from equilab.planning import duration, size, speed_of
    from equilab.study import module_of

    config = job.read(job.stage, job.run, job.seed)
    print(yaml.safe_dump({job.name: plain(config)}, sort_keys=False), end="")
    plan, speed = module_of(job.stage, config).plan(config, job)(), speed_of(job)
    if plan.note:
        print(plan.note)
    print(f"# parameters: {plan.parameters:,}" if plan.parameters else "# parameters: none")
    print(f"# networks: {plan.flops / 1e9:,.1f} GFLOP")
    print(f"# results on disk: {size(plan.disk)}")
    print(f"# time: {duration(speed.seconds(plan.flops, job))}, at {speed}")


def _refuse_half_a_torchrun() -> None:
    """Refuse a process that is one of several, as the environment says, but was not started by torchrun.

    Raises: UserError naming what torchrun sets.
    """
    from equilab.core.config import UserError

    missing = [name for name in TORCHRUN if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise UserError(
            f"RANK is set, but {', '.join(missing)} not, which torchrun sets: start with `torchrun -m equilab`, or unset RANK"
        )


def _join_processes(job: Job) -> None:
    """Fix the number of threads; join the other processes where torchrun started several."""
    from equilab.graph import STAGES

    if (torch := sys.modules.get("torch")) is None:
        return  # a stage without networks
    about = STAGES[job.stage]
    torch.set_num_threads(getattr(job.study, about.threads_key))
    if "RANK" in os.environ and about.distributed:
        cuda = job.study.device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")


if __name__ == "__main__":
    sys.exit(main())
