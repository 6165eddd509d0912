"""The families of models by name: a new one is entered here, and described by a `FAMILY` in its own module.

Which name leads where does not change what a run computes: stages do not depend on this module (see `equilab.graph`), but on
the modules of the families that they run.
"""

FAMILIES = {
    "edm": "equilab.models.precond",
    "get": "equilab.models.get",
    "vit": "equilab.models.vit",
    "fpdm": "equilab.models.fpdm",
    "dit": "equilab.models.dit",
    "gdd": "equilab.models.gdd",
    "cd": "equilab.models.gdd:CONSISTENCY",
    "pd": "equilab.models.precond:PROGRESSIVE",
}
