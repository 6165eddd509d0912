"""What each job may take of a cluster: the section `resources` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from equilab.core.config import Params, UserError, mapping, nearest, parse
from equilab.graph import STAGES
from equilab.study import Sections

SECTION, DEFAULT = "resources", "default"
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=&|*-]{1,200}$")]  # stands in the head of a script


class Resources(Params):
    """What a job takes: `resources.default`, then `resources.STAGE`, which may say any of these keys otherwise."""

    gpus: int = Field(ge=0, le=1024)  # of a node; where there are several, a process each
    cpus: int = Field(ge=1, le=4096)  # of a node
    memory: float = Field(gt=0, le=1e6)  # of a node, in GB
    hours: float = Field(gt=0, le=10_000)  # after which the job is ended, and begins again where it was
    nodes: int = Field(1, ge=1, le=10_000)
    processes: int | None = Field(None, ge=1, le=1024)  # on a node; null: one a GPU
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None

    @property
    def on_a_node(self) -> int:
        """How many processes a node has."""
        return self.processes or max(1, self.gpus)


def resources_of(sections: Sections, stage: str) -> Resources:
    """Return what jobs of a stage take.

    Raises: UserError if params do not say it.
    """
    where = f"{sections.where}: {SECTION}"
    if sections.values.get(SECTION) is None:
        raise UserError(
            f"{where} is missing; give {SECTION}.{DEFAULT} the keys gpus, cpus, memory (GB) and hours"
        )
    section = mapping(sections.values[SECTION], where)
    for name in section:
        if name not in (DEFAULT, *STAGES):
            raise UserError(f"{where}: unknown stage {name!r}{nearest(name, [DEFAULT, *STAGES])}")
    default = mapping(section.get(DEFAULT) or {}, f"{where}.{DEFAULT}")
    own = mapping(section.get(stage) or {}, f"{where}.{stage}")
    found = parse(Resources, {**default, **own}, f"{where}.{stage if own else DEFAULT}")
    if found.nodes * found.on_a_node > 1 and not STAGES[stage].distributed and own:
        raise UserError(
            f"{where}.{stage}: {stage} works in one process; set nodes to 1, and processes or gpus to 1 or less"
        )
    if STAGES[stage].distributed:
        return found
    return found.model_copy(update={"nodes": 1, "processes": 1, "gpus": min(1, found.gpus)})  # in one process


def check(sections: Sections) -> None:
    """Check the section, where a study has it.

    Raises: UserError naming the key that is wrong.
    """
    if sections.values.get(SECTION) is not None:
        for stage in filter(sections.has, STAGES):
            resources_of(sections, stage)


def torchrun_options(resources: Resources, job: str, node: int, first_host: str) -> list[str]:
    """Return torchrun's options for a job of several processes; `first_host` is that of node 0, where all meet."""
    options = ["--nproc-per-node", str(resources.on_a_node)]
    if resources.nodes == 1:
        return ["--standalone", *options]
    port = 20_000 + sum(map(ord, job)) % 20_000  # another one for another job on the same node
    place = ["--node-rank", str(node), "--master-addr", first_host, "--master-port", str(port)]
    return ["--nnodes", str(resources.nodes), *options, *place]
