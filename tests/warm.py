"""What a stage imports before it works, imported once: tests start their many processes from here."""

from pathlib import Path

import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401

from equilab import __main__
from equilab.core import config
from equilab.stages import evaluate  # noqa: F401
from equilab.training import teacher

sections = config.read(Path(__file__).parent.parent / "studies/smoke/params.yaml")
teacher.counted(__main__._config(sections, "teacher", None, Path("warm"))[0], (1, 8, 8), 10)
