"""What every training stage does around the loop: build the network, train it in a scratch folder, publish the results."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import Params, Spec, UserError, plain
from equilab.core.files import SCRATCH, publishing, require_disk, scratch, write_json
from equilab.core.job import Job, Plan, Watcher
from equilab.core.machine import barrier, device_of, environment, identity, rank, require_memory
from equilab.core.progress import bar
from equilab.data.images import Dataset, label_counts, to_float
from equilab.metrics.counting import Cost, network_on_meta
from equilab.models.checkpoint import load_tensors, save_tensors
from equilab.models.family import Family, Stage, families
from equilab.training.loop import Adversary, BatchOf, Loss, Run, Watch, fit
from equilab.training.optimisation import Optimisation

Finish = Callable[[Path], dict[str, Any]]  # (folder of the results) -> what more the summary says of them


class Model(Params):
    """What sampling needs to know of every run that makes images, which has a `network` and is `conditional` or not."""

    stage: ClassVar[Stage]  # that trains it

    @property
    def family(self) -> Family:
        """The family of models that it is of."""
        return families(self.stage)[self.network.kind]

    def classes_of(self, classes: int) -> int:
        """Return how many of the data's classes the network knows: all of them, or 0 if it is not conditional."""
        return classes if self.conditional else 0

    def require_classes(self, job: Job, classes: int) -> None:
        """Refuse data without classes where the network is conditional.

        Raises: UserError naming the key.
        """
        if self.conditional and not classes:
            place = f"{job.stage}.{job.run}" if job.run else job.stage
            raise UserError(f"{place}.conditional is true, but the data have no labels; set it to false")

    def on_meta(self, image: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for such data on the meta device.

        Raises: UserError if its sizes do not fit.
        """
        return network_on_meta(self.network, image, self.classes_of(classes))


def build(spec: Spec, seed: int, purpose: str, *given: Any) -> nn.Module:
    """Return a freshly initialised network, a pure function of (seed, purpose).

    Raises: UserError if this machine has less memory than its parameters take, before they take it.
    """
    sizes = [parameter.numel() for parameter in network_on_meta(spec, *given).parameters()]
    require_memory(4 * sum(sizes), f"{spec.path or spec.kind}: a network of {sum(sizes):,} parameters")
    torch.manual_seed(rng.torch_seed(seed, purpose))
    return spec.build(*given).to(memory_format=torch.channels_last)


def counted_once(cost: Callable[..., Cost]) -> Callable[..., Cost]:
    """Return `cost(config, ...)`, remembered; seed, optimisation and R1 make no difference to what it counts."""
    remembered = functools.cache(cost)

    @functools.wraps(cost)
    def counted(config: Params, *given: Any) -> Cost:
        indifferent = {"seed", "optimisation", "r1"} & set(type(config).model_fields)
        return remembered(config.model_copy(update=dict.fromkeys(indifferent)), *given)

    return counted


def images_at(
    config: Model, data: Dataset, seed: int, purpose: str, positions: range
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, b] | None]:
    """Return the images in -1..1 at these positions of an endless shuffled pass, and their labels if the network is conditional."""
    items = rng.batch(seed, purpose, positions.start, len(positions), len(data.images))
    label = torch.from_numpy(data.labels[items]) if config.conditional else None
    return to_float(torch.from_numpy(data.images[items])), label


def about(image: tuple[int, ...], classes: int, cost: Cost, iterations: int | float = 0) -> dict[str, Any]:
    """Return what is kept with weights: what the network is of, and what it costs at so many iterations."""
    return {
        "image": image,
        "classes": classes,
        "parameters": cost.parameters,
        "flops_image": cost.image.flops(iterations),
    }


def train(
    job: Job,
    config: Any,
    inputs: dict[str, str],
    net: nn.Module,
    batch_of: BatchOf,
    loss: Loss,
    about: dict[str, Any],
    adversary: Adversary | None = None,
    watch: Watch | None = None,
    finish: Finish | None = None,
) -> None:
    """Train `net` from wherever its scratch folder stands and write the results of the stage into `job.out`, all in one move.

    `weights.safetensors` (averaged weights), `snapshots/`, `log.csv` (a row a report), `summary.json`. `inputs` names
    what the run depends on besides its config (checksums); `about` is kept with the weights. `finish` looks at the results
    before they are published.
    """
    optimisation, about = config.optimisation, {**about, **label_counts(job)}
    about |= {"stage": job.stage, "run": job.run, "config": plain(config), "inputs": inputs}
    if job.run is not None:
        about |= {"seed": job.seed, "family": config.family.name}
    _require_disk(job, net, optimisation, about["parameters"], adversary)
    # what is unfinished goes last, when the results are in their place
    with scratch(job, identity(job, config, inputs)) as folder, publishing(job.out) as fresh:
        run = Run(net, optimisation, job.study.seed, folder, device_of(job), adversary)
        _say_processes(job, run)
        with bar(job.name, optimisation.nimg, done=run.nimg) as progress, _watcher(job, run) as watcher:
            for step in fit(run, batch_of, loss, watch):
                progress.update(step.nimg - progress.n)
                if step.report:
                    progress.set_postfix(loss=f"{step.report['loss']:.4g}")
                if step.report and watcher:
                    watcher.report(step.report)
                    if step.nimg in optimisation.snapshots:
                        watcher.snapshot(run.snapshot(step.nimg), {**about, "nimg": step.nimg})
        if rank() == 0:
            _write(job, run, about, fresh, finish)
        barrier()


def _say_processes(job: Job, run: Run) -> None:
    """Say that the number of processes has changed, on which the bits of a training depend."""
    if len(run.processes) > 1 and rank() == 0:
        numbers = ", then ".join(map(str, run.processes))
        print(
            f"equilab: {job.name} goes on with another number of processes ({numbers}): the same training to rounding, "
            "in other bits",
            file=sys.stderr,
        )


def _watcher(job: Job, run: Run) -> contextlib.AbstractContextManager[Watcher | None]:
    """Return what the training reports to, in the first process, if the study says that there is any."""
    if job.watcher is None or rank() != 0:
        return contextlib.nullcontext()
    return contextlib.closing(job.watcher(job, run.nimg))


def _require_disk(
    job: Job, net: nn.Module, config: Optimisation, parameters: int, adversary: Adversary | None
) -> None:
    """Check that the results fit on their disk; two states (weights, average, moments) of what is trained, and the snapshots,
    on that of what is unfinished."""
    nets = nn.ModuleList([net] if adversary is None else [net, adversary.net])
    state = 4 * sum(p.numel() for p in nets.parameters())
    snapshots = parameters * len(config.snapshots)
    require_disk({SCRATCH: 4 * (2 * state + snapshots), job.out: 4 * (parameters + snapshots)})


def _write(job: Job, run: Run, about: dict[str, Any], fresh: Path, finish: Finish | None) -> None:
    """Write the results of a run that is done into a fresh folder."""
    snapshots = fresh / "snapshots"
    snapshots.mkdir()
    for nimg in run.config.snapshots:
        tensors, _ = load_tensors(run.snapshot(nimg))
        save_tensors(snapshots / f"{nimg:010d}.safetensors", tensors, {**about, "nimg": nimg})
    save_tensors(fresh / "weights.safetensors", run.ema, {**about, "nimg": run.nimg})
    run.write_log(fresh)
    processes = run.processes[0] if len(run.processes) == 1 else run.processes
    found = {"nimg": run.nimg, "loss": run.log[-1]["loss"], "environment": environment(job, processes)}
    if finish is not None:
        found |= finish(fresh)
    write_json(fresh / "summary.json", {**about, **found})
    print(f"{job.name}: loss {found['loss']:.4g} after {run.nimg:,} images, in {job.out}")


def plan(config: Optimisation, cost: Cost, note: str = "", teacher_calls: int = 0) -> Plan:
    """Return what training costs; `teacher_calls` are the evaluations of the teacher for a training image."""
    kept = 1 + len(config.snapshots)
    weights = 4 * cost.parameters  # bytes
    return Plan(
        parameters=cost.parameters,
        flops=float(cost.train_flops_image * config.nimg),
        disk=kept * weights,
        note=note,
        images=config.nimg,
        teacher_calls=teacher_calls * config.nimg,
        memory=2 * weights + 12 * cost.parameters_trained,  # with the average; gradient and two moments
    )
