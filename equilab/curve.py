"""The loss of a run, drawn while it trains: for notebooks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from equilab import style
from equilab.core.config import UserError
from equilab.sampling.opening import study_of

LOG = "log.csv"


def watch(path: Path | str, seconds: float | int = 5) -> None:
    """Draw the loss of a run's seeds against training images seen, and again every so many seconds as long as one trains.

    Raises: UserError if the run has reported nothing yet.
    """
    from IPython.display import display

    shown = None
    while True:
        logs, training = _logs(Path(path))
        picture = _drawn(logs)
        if shown is None:
            shown = display(picture, display_id=True)
        else:
            shown.update(picture)
        if not training:
            return
        time.sleep(seconds)


def _logs(path: Path) -> tuple[pd.DataFrame, bool]:
    """Return the rows of all logs of a run, the seed in a column, and whether any of its seeds is training now."""
    study = study_of(path / LOG)
    if study is None:
        raise UserError(
            f"{path} is not in the results of a study; give the folder of a run, such as results/distill/get-m"
        )
    stage, *run = path.absolute().relative_to(study.absolute() / "results").parts
    name = f"{stage}@{'-'.join(run)}" if run else stage
    found = {}
    for log in sorted([path / LOG, *path.glob(f"*/{LOG}")]):
        if log.exists():
            found[log.parent.name if log.parent != path else ""] = pd.read_csv(log)
    unfinished = study / ".equilab/scratch"
    logs = [*unfinished.glob(f"{name}/{LOG}"), *unfinished.glob(f"{name}-*/{LOG}")]
    for log in logs:
        found[log.parent.name.removeprefix(name).lstrip("-")] = pd.read_csv(log)
    if not found:
        raise UserError(
            f"{path} has no {LOG}, and no training of it has reported yet; start it, or wait for its first report"
        )
    training = any(_is_held(study / ".equilab/locks" / log.parent.name) for log in logs)
    rows = [table.assign(seed=seed) for seed, table in found.items()]
    return pd.concat(rows, ignore_index=True), training


def _is_held(lock: Path) -> bool:
    """Return whether a process works on the job of this lock."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _drawn(logs: pd.DataFrame) -> Any:
    """Return the picture of the loss."""
    import seaborn as sns

    figure, ax = style.panels(1, 2.6)
    several = logs["seed"].nunique() > 1
    sns.lineplot(
        logs,
        x="nimg",
        y="loss",
        hue="seed" if several else None,
        palette="colorblind" if several else None,
        ax=ax,
    )
    ax.set(xlabel="training images seen", yscale="log" if (logs["loss"] > 0).all() else "linear")
    return style.picture(figure)
