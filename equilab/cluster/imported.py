"""What jobs import, imported once in the process that they are forked from; it computes nothing."""

import importlib

from equilab.core.process import prepare_process
from equilab.graph import STAGES

prepare_process()
for _stage in STAGES.values():
    importlib.import_module(_stage.module)
for _name in ("torch._dynamo", "papermill"):  # what optimisers and notebooks import when they are first used
    importlib.import_module(_name)
