"""Figures from arrays; see `pyro_vae.plots.charts` for what holds of all."""

from pyro_vae.plots.charts import (
    PALETTE,
    aggregate_posterior,
    kl_per_dimension,
    latent_scatter,
    pareto_k_histogram,
    save,
    training_curves,
)
from pyro_vae.plots.image_grids import image_grid, interpolation, manifold, reconstructions

__all__ = [
    "PALETTE",
    "aggregate_posterior",
    "image_grid",
    "interpolation",
    "kl_per_dimension",
    "latent_scatter",
    "manifold",
    "pareto_k_histogram",
    "reconstructions",
    "save",
    "training_curves",
]
