"""`python -m equilab doctor`: what this machine and this installation are, and a remedy for each thing that is wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from equilab.core.code import PACKAGE
from equilab.core.config import UserError

ROOT = PACKAGE.parent
PYTHON = (3, 10), (3, 14)  # from the first, up to but not including the second
LEAST_DISK = 5 * 2**30  # bytes that a study on two cores takes with ease


class Trouble(Exception):
    """What is wrong, and the remedy after a semicolon; `wrong` is False where a study can do without."""

    def __init__(self, said: str, wrong: bool = True):
        super().__init__(said)
        self.wrong = wrong


def command(arguments: list[str]) -> int:
    """Print a line for each thing that was looked at; return 0 if a study can run, otherwise 1."""
    argparse.ArgumentParser(prog="equilab doctor", description=__doc__).parse_args(arguments)
    status = 0
    for name, look in LOOKS.items():
        mark, said = "ok", ""
        try:
            said = look()
        except Trouble as trouble:
            mark, said = ("WRONG" if trouble.wrong else "note"), str(trouble)
        except Exception as error:  # one look that fails keeps no other from being taken
            mark, said = "WRONG", f"could not be told ({type(error).__name__}: {error})"
        status |= mark == "WRONG"
        print(f"{mark:<5}  {name}: {said}")
    return status


def python() -> str:
    """Return the version of Python, and where it is."""
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        raise Trouble(f"{platform.python_version()}; use one of 3.10 to 3.13: make study PYTHON=python3.12")
    return f"{platform.python_version()}, {sys.prefix}"


def versions() -> str:
    """Return how many installed packages are of the pinned versions."""
    pins: dict[str, list[str]] = {}
    for name, pin in re.findall(
        r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text("utf-8"), re.M
    ):
        pins.setdefault(name, []).append(pin)
    installed, differing = 0, []
    for name, pinned in pins.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            installed += 1
            if version.partition("+")[0] not in [pin.partition("+")[0] for pin in pinned]:
                differing.append(f"{name} {version} (pinned: {', '.join(pinned)})")
    if differing:
        few = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise Trouble(f"{few}; install what is pinned: rm -r .venv && make study", wrong=False)
    return f"{installed} packages, all of them as in requirements.lock"


def code() -> str:
    """Return where the code is that runs."""
    here = Path.cwd()
    above = [folder for folder in (here, *here.parents) if (folder / "equilab/core").is_dir()]
    if above and above[0].resolve() != ROOT.resolve():
        raise Trouble(
            f"{ROOT}, but you are in {above[0]}; use the environment of that checkout, or PYTHONPATH"
        )
    return str(ROOT)


def torch_pair() -> str:
    """Return the versions of torch and torchvision, which have to fit each other."""
    import torch

    remedy = "install the pinned pair again: rm -r .venv && make study"
    try:
        operations = importlib.import_module("torchvision.ops")
        operations.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # compiled for one version of torch
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Trouble(f"torchvision does not fit torch {torch.__version__} ({reason}); {remedy}") from None
    return f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}"


def gpu() -> str:
    """Return the GPUs that torch sees, and the driver."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}, driver {_driver() or 'not known'}"
    if driver := _driver():
        built = (
            f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for the CPU alone"
        )
        raise Trouble(
            f"there is one (driver {driver}), but torch {built}; update the driver, or install a torch that fits it",
            False,
        )
    return "none, and none is needed for the studies of digits"


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, if there is one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def threads() -> str:
    """Return how many CPU threads there are, and what the environment says of their number."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = filter(os.environ.get, ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    said = [f"{name}={os.environ[name]}" for name in names]
    words = f" ({', '.join(said)}, which study.threads overrides)" if said else ""
    if (load := os.getloadavg()[0]) > there:
        raise Trouble(
            f"{there}, and {load:.1f} of other work; expect it to take longer, or wait", wrong=False
        )
    return f"{there}{words}"


def kernel() -> str:
    """Return the Jupyter kernel that notebooks run in."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise Trouble("python3 is not there; python -m ipykernel install --sys-prefix") from None
    program = shutil.which(spec.argv[0]) or spec.argv[0]
    if not Path(program).exists():
        raise Trouble(
            f"python3 starts {program}, which is not there; python -m ipykernel install --sys-prefix"
        )
    return f"python3, {spec.resource_dir}"


def git() -> str:
    """Return the version of git, and whether it reads this repository."""
    if shutil.which("git") is None:
        raise Trouble("not installed; install it, or tell DVC: dvc config --local core.no_scm true")
    version = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        return f"{version}, at {asked.stdout.strip()[:7]}"
    if "dubious ownership" in asked.stderr:
        raise Trouble(f"{ROOT} is another user's; git config --global --add safe.directory {ROOT}")
    if not (ROOT / ".git").exists():
        if _no_scm():
            return f"{version}; {ROOT} is no repository, and DVC knows"
        raise Trouble(
            f"{ROOT} is no repository; tell DVC where you call it: dvc config --local core.no_scm true"
        )
    raise Trouble(f"{ROOT} cannot be read ({' '.join(asked.stderr.split())}); git status says more")


def _no_scm() -> bool:
    local = Path(".dvc/config.local")
    return local.exists() and re.search(r"no_scm\s*=\s*true", local.read_text("utf-8")) is not None


def dvc() -> str:
    """Return the version of DVC, which has to be on PATH."""
    version = f"dvc {importlib.metadata.version('dvc')}"
    if shutil.which("dvc") is None:
        raise Trouble(f"{version} is installed, but not on PATH; source .venv/bin/activate")
    return version


def locks() -> str:
    """Return whether files can be locked here, and which jobs of the study are being worked on."""
    from equilab.core import files

    if not Path("params.yaml").exists():
        raise Trouble("there is no study in this folder, whose jobs would hold any", wrong=False)
    name = f"doctor-{os.getpid()}"
    try:
        with files.locked(name):
            pass
    except UserError as error:
        raise Trouble(str(error)) from None
    finally:
        Path(".equilab/locks", name).unlink(missing_ok=True)
    held = []
    for path in sorted(Path(".equilab/locks").glob("*")):
        try:
            with files.locked(path.name):
                pass
        except UserError:
            held.append(path.name)
    return f"work; held now: {', '.join(held)}" if held else "work; none is held"


def disk() -> str:
    """Return how much is free where the study writes."""
    places = {name: Path(name) if Path(name).exists() else Path() for name in ("results", ".equilab", ".dvc")}
    free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    least = min(free, key=free.get)
    words = f"{free[least] / 2**30:,.1f} GiB free for {least}"
    if free[least] < LEAST_DISK:
        raise Trouble(f"{words}; python -m equilab plan says what the study takes", wrong=False)
    if unwritable := [name for name, place in places.items() if not os.access(place, os.W_OK)]:
        raise Trouble(f"{', '.join(unwritable)} cannot be written; change the permissions")
    return words


def locale_() -> str:
    """Return the encoding of this process's output."""
    encoding = (getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False)).lower()
    if encoding.replace("-", "") not in ("utf8", "utf8sig"):
        raise Trouble(f"output is {encoding}; for names with accents: export PYTHONUTF8=1", wrong=False)
    return f"UTF-8 ({os.environ.get('LC_ALL') or os.environ.get('LANG') or 'no LANG'})"


def study() -> str:
    """Return the study of the current folder."""
    from equilab.study import open_study

    if not Path("params.yaml").exists():
        raise Trouble("none in this folder; change into one, where params.yaml is", wrong=False)
    try:
        return f"{open_study(Path('params.yaml')).study.name}; python -m equilab check reads all of it"
    except UserError as error:
        raise Trouble(str(error).partition("\n")[0]) from None


LOOKS: dict[str, Callable[[], str]] = {
    "python": python,
    "versions": versions,
    "code": code,
    "torch": torch_pair,
    "GPU": gpu,
    "threads": threads,
    "kernel": kernel,
    "git": git,
    "dvc": dvc,
    "locks": locks,
    "disk": disk,
    "locale": locale_,
    "study": study,
}
