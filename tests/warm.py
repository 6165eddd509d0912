"""What a stage imports before it works, imported once: `test_killed` starts its many processes from here."""

from pathlib import Path

from equilab import __main__, config
from equilab.training import distill, teacher  # noqa: F401

sections = config.read(Path(__file__).parent.parent / "studies/smoke/params.yaml")
teacher.counted(__main__._config(sections, "teacher", None, Path("warm"))[0], (1, 8, 8), 10)
