"""The claims of the papers: in words and as tests (YAML), their published numbers (CSV), what a study compares to test them.

Published numbers are FID on CIFAR-10 (GET, GDD) and on ImageNet 256 (FPDM) unless a column says otherwise. Parameters and costs are as
printed, but for `flops` and `train_flops` of `get_runs`: those we count from the published sizes, twice the multiply-accumulates, in
training three forward passes for each image. There, updates of models with classes are of 256 images, as section 4.1 says; the caption
of table 6 says nothing. What stands only in a plot, or is not printed, is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from equilab.core.config import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent


def published(name: str) -> pd.DataFrame:
    """Return a table of published numbers by its name, such as "get_runs"; the columns `paper` and `where` say where they stand.

    Raises: UserError naming the nearest, if there is none of that name.
    """
    import pandas as pd  # needed for this alone

    path = HERE / f"{name}.csv"
    known = sorted(each.stem for each in HERE.glob("*.csv"))
    if name not in known:
        raise UserError(f"there are no published numbers {name!r}{nearest(name, known)}")
    return pd.read_csv(path)
