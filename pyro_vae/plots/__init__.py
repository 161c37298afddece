"""Figures of a trained model, from plain arrays.

Every function draws in one matplotlib `Axes`, grids of images included, and returns it. Without `ax=` that is
the Axes of a new figure, `axes.figure`. Pyplot, its open figures and its settings are never touched, no
display is needed, and matplotlib is imported at the first figure. `save(axes, path)` writes the figure to a
file. A notebook shows it where the Axes is the last value of a cell. For a window, or to arrange several,
pass an Axes: with pyplot as plt, `plots.image_grid(x, ax=plt.subplots(layout="constrained")[1])`.

Arrays are anything that NumPy or PyTorch reads as numbers, on any device. Images have values in [0, 1], from
black to full intensity, and shape (..., H, W) or (..., C, H, W) with C = 1 (grey) or 3 (RGB). Latent
dimensions are named by index: z[0] is the first. The colours are safe for colour-blind readers.

Invalid arguments raise an error that names the argument:

- `TypeError`: not numeric, or `ax` is not a matplotlib Axes.
- `ValueError`: empty, of another shape than documented, not finite, or out of range.
"""

from pyro_vae.plots.charts import (
    aggregate_posterior,
    kl_per_dimension,
    latent_scatter,
    pareto_k_histogram,
    save,
    snr,
    training_curves,
)
from pyro_vae.plots.image_grids import PALETTE, heat_map, image_grid, interpolation, manifold, reconstructions

__all__ = [
    "PALETTE",
    "aggregate_posterior",
    "heat_map",
    "image_grid",
    "interpolation",
    "kl_per_dimension",
    "latent_scatter",
    "manifold",
    "pareto_k_histogram",
    "reconstructions",
    "save",
    "snr",
    "training_curves",
]
