"""A stage in a process of its own that starts at once: all are forked from one that has imported what they need."""

import multiprocessing
import os
import signal
from pathlib import Path

# the server that all are forked from looks for what it is to import here; by itself it passes over what it does not find
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["warm"])


def work(folder, command, what="", count=0, after=False):
    """Run a command of the study in `folder`; with `what`, die of SIGKILL at its count-th call (or right after it)."""
    os.chdir(folder)
    os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    from equilab import __main__, rng

    if what:
        place = {"noise": rng, "replace": os, "link": os}[what]
        original, calls = getattr(place, what), []

        def counted(*arguments):
            calls.append(1)
            if len(calls) == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(place, what, counted)
    raise SystemExit(__main__.main(command))


def run(*arguments):
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode
