"""How commands begin and what they say when they end too early: interrupted, or as one of several processes (`study.launch`).

It is imported before all else, so it imports little itself: interrupted after that, a command answers in a sentence.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

STOPPED = "equilab: stopped; the same command continues where it was"


def say(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Say of an interruption, in place of its traceback, that the command was stopped: an excepthook of `sys`."""
    if issubclass(kind, KeyboardInterrupt):
        print(STOPPED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def processes(launch: str, arguments: Sequence[str]) -> int:
    """Run a command of equilab as `launch` says, by torchrun; return its exit status.

    `launch` is checked (`equilab.core.job.checked_launch`): torchrun's options follow its first word.

    Raises: KeyboardInterrupt if it is interrupted.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the sentence below says it
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        run(parse_args([*launch.split()[1:], *arguments]))
    except ChildFailedError as error:
        return _told(error)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        print(
            f"equilab: stopped by {error.sigval.name}; the same command continues where it was",
            file=sys.stderr,
        )
        return 128 + error.sigval
    return 0


def _told(error) -> int:
    """Say which process ended first, unless it has said itself why; return the exit status."""
    rank, first = error.get_first_failure()
    if first.exitcode == 2:
        return 2  # it has said a sentence
    how = f"status {first.exitcode}"
    if first.exitcode < 0:
        how = f"signal {signal.Signals(-first.exitcode).name}"
    print(
        f"equilab: process {rank} was ended by {how}, and all others with it; the same command continues where it was",
        file=sys.stderr,
    )
    return 1
