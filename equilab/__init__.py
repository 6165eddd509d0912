"""equilab: one-step and equilibrium generators on one teacher, one data path, one metric and one cost currency."""

__version__ = "0.1.0"
