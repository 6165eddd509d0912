"""Processes that start at once: all are forked from one that has imported what they need (warm.py)."""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

HERE = Path(__file__).parent
# the server that all are forked from looks for what it is to import here; by itself it passes over what it does not find
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["warm"])


def work(folder, command, what="", count=0, after=False, environment=()):
    """Run a command of the study in `folder`; with `what`, die of SIGKILL at its count-th call (or right after it)."""
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    from equilab import __main__
    from equilab.core import rng

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
    """Work in a process of its own; return its exit status."""
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def serve(listener):
    """Run the modules that the program `python` beside this file asks for at a socket, each in a process of its own."""
    os.environ["MPLBACKEND"] = (
        "module://matplotlib_inline.backend_inline"  # as a kernel sets it; nothing else draws
    )
    for module in (
        "ipykernel.kernelapp",
        "nbconvert",
        "papermill",
        "seaborn",
        "torch_fidelity",
        "torchdeq.solver",
    ):
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with listener:
        while True:
            connection = listener.accept()[0]
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(connection, 2**18, 3)
    if child := os.fork():
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    folder, environment, module, arguments = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable, sys.argv = (
        str(HERE / "python"),
        [module, *arguments],
    )  # kernels of notebooks start like this too
    runpy.run_module(module, run_name="__main__", alter_sys=True)
