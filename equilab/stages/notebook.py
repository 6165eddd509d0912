"""Stage `notebook`: a notebook of the repository, executed on the study's results and made byte-stable."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from equilab.claims.claim import read_claims
from equilab.core.config import Params, Scalar, UserError, nearest
from equilab.core.files import publishing, write
from equilab.core.job import Job, Plan
from equilab.core.notebooks import parameters, read_notebook

if TYPE_CHECKING:
    from nbformat import NotebookNode

START_SECONDS, CELL_SECONDS = 600, 3600  # a kernel, a cell that take longer hang
WIDGET = "application/vnd.jupyter.widget-view+json"
NOTE = "*Here the notebook ends in a widget, which answers in `notebooks`, opened in JupyterLab, with `results` this study's folder.*"


class Config(Params):
    """An entry of the params section `notebook`."""

    parameters: dict[str, Scalar]  # of the notebook's `parameters` cell, besides `results` and `out`


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: no networks.

    Raises: UserError if the repository has no such notebook, or it has no such parameter, or one of another type.
    """
    _checked(config, job)
    return Plan


def run(config: Config, job: Job) -> None:
    """Execute the notebook in the study's folder and write it, with its figures, into `results/notebook/NAME`.

    What an earlier run wrote is replaced when the last cell has succeeded, not before.

    Raises: UserError naming the cell and the kept notebook, if a cell fails; or as `plan` does.
    """
    import papermill  # these take seconds
    from nbclient.exceptions import CellTimeoutError
    from nbclient.output_widget import OutputWidget
    from nbformat import writes
    from papermill.exceptions import PapermillExecutionError

    source = _checked(config, job)
    # nbclient would tell a widget what its cell has shown, past asyncio and on the socket that awaits the kernel's reply, which then
    # goes unnoticed now and then, so that the notebook hangs; nothing here needs it
    OutputWidget.sync_state = lambda widget: None
    failed = Path(".equilab/notebook") / f"{job.run}.failed.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, whatever the user has installed
        "IPYTHONDIR": str(Path(".equilab/ipython").absolute()),  # the user's own start-up files stay out
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with publishing(job.out, own="*") as fresh:
        given = {"results": "results", "out": fresh.as_posix(), **config.parameters}
        try:
            done = papermill.execute_notebook(
                str(source),
                str(failed),
                given,
                kernel_name="python3",
                cwd=".",
                log_output=False,
                start_timeout=START_SECONDS,
                execution_timeout=CELL_SECONDS,
                extra_arguments=[
                    "--IPKernelApp.log_level=CRITICAL",
                    "--IPKernelApp.exec_PYTHONSTARTUP=False",  # another start-up file of the user's
                ],
            )
        except PapermillExecutionError as error:
            raise UserError(
                f"notebooks/{job.run}.ipynb failed in cell {error.cell_index + 1}: {error.ename}: {error.evalue}; "
                f"it is kept in {failed}, and {job.out} is as it was"
            ) from None
        except CellTimeoutError:
            raise UserError(
                f"notebooks/{job.run}.ipynb: a cell took more than {CELL_SECONDS} s; {job.out} is as it was"
            ) from None
        except RuntimeError as error:  # a kernel that dies, or does not even start
            raise UserError(
                f"notebooks/{job.run}.ipynb: its kernel died ({error}); give it more memory, or run it in JupyterLab to see why"
            ) from None
        text = writes(normalised(done)).replace(fresh.as_posix(), job.out.as_posix())
        write(fresh / f"{job.run}.ipynb", text + "\n")
    failed.unlink()
    print(f"{job.name}: {job.out / f'{job.run}.ipynb'}")


def _checked(config: Config, job: Job) -> Path:
    """Return the path of the notebook, which has every parameter that params give."""
    source = Path(job.study.root) / "notebooks" / f"{job.run}.ipynb"
    if not source.exists():
        known = [path.stem for path in source.parent.glob("*.ipynb")]
        raise UserError(f"notebook.{job.run}: {source} is not there{nearest(job.run, known)}")
    known = parameters(read_notebook(source))
    shows = known.pop("shows", ())  # the notebook's own
    papers = sorted({f"claims/{claim.paper}" for claim in read_claims()})
    for name in shows:
        if name.startswith("claims/") and name not in papers:
            raise UserError(f"{source}: shows: there are no claims {name!r}{nearest(name, papers)}")
    for name, value in config.parameters.items():
        if name not in known:
            raise UserError(f"notebook.{job.run}.parameters.{name}: unknown parameter{nearest(name, known)}")
        if value is None or isinstance(value, str) != isinstance(known[name], str):
            raise UserError(
                f"notebook.{job.run}.parameters.{name}: expected a value like {known[name]!r}, got {value!r}"
            )
    return source


def normalised(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook without what changes from run to run: times, random names, addresses, stderr and
    the state of widgets, each of which leaves a note. Tags and whether a cell's source is hidden stay."""
    from nbformat import from_dict

    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for k, cell in enumerate(notebook.cells):
        cell.id = f"cell-{k:03d}"
        cell.metadata = {key: cell.metadata[key] for key in ("jupyter", "tags") if cell.metadata.get(key)}
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [from_dict(_stable(output)) for output in kept]
    return notebook


def _stable(output: dict) -> dict:
    if WIDGET in output.get("data", {}):
        return {"output_type": "display_data", "data": {"text/markdown": NOTE}, "metadata": {}}
    if "text" in output:
        return {**output, "text": _without_addresses(output["text"])}
    data = dict(output["data"])
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = _without_addresses(data[kind])
    return {**output, "data": data}


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]{6,}", "0x", text)
