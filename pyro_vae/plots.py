"""Figures of a trained model, from arrays and tables; nothing here knows a model.

One rule for all: a figure is one matplotlib `Axes`, grids of images included, and every function returns
the `Axes` it drew in. Without `ax=` that is a new figure of a fitting size, `axes.figure`, which belongs to
the caller alone: pyplot, its list of open figures and its settings are never touched, no display is needed,
and matplotlib is imported at the first figure. `save(axes, path)` writes the picture. To see it in a notebook
or a window, or to arrange several, pass an `ax=` of your own: with pyplot as plt,
`plots.image_grid(x, ax=plt.subplots(layout="constrained")[1])`.

Arrays are anything NumPy or PyTorch can read as numbers, on any device. Images hold values in [0, 1], from
black to full intensity, and have shape (..., H, W) or (..., C, H, W) with C = 1 (grey) or 3 (RGB).
Latent dimensions are named as they are indexed: z[0] is the first. Colours stay apart for
colour-blind readers.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pyro_vae.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

Numbers: TypeAlias = npt.ArrayLike | torch.Tensor
Array: TypeAlias = npt.NDArray[Any]

_BLUE, _VERMILION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_SKY, _ORANGE, _BLACK, _YELLOW = "#56B4E9", "#E69F00", "#000000", "#F0E442"
_VIOLET, _BROWN = "#6622CC", "#662200"

PALETTE = (_BLUE, _VERMILION, _GREEN, _PURPLE, _SKY, _ORANGE, _BLACK, _YELLOW, _VIOLET, _BROWN)
"""Ten colours for categories: the eight of Okabe and Ito, 2008, Color Universal Design, and two that are as
far from them, to colour-blind readers too, as the eight are from each other."""

_MARKERS = "o^sDvP*X<>"  # labels 0 to 9 are discs of the ten colours, 10 to 19 triangles, and so on
_LEGEND: dict[str, Any] = {"framealpha": 1, "edgecolor": "none"}  # readable on whatever lies behind


def image_grid(
    images: Numbers,
    *,
    columns: int | None = None,
    title: str = "Samples from the prior",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw images row by row in a grid.

    Args:
        images: (N, H, W) or (N, C, H, W), in [0, 1].
        columns: Images in a row; by default the grid is about square.
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If the images are no numbers, or `ax` is no matplotlib Axes.
        ValueError: If the images have another shape, are none, not finite or outside [0, 1].

    Example:
        >>> axes = image_grid(torch.rand(6, 1, 28, 28), columns=3)
        >>> axes.get_title()
        'Samples from the prior'
    """
    tiles = _opaque(_images("images", images, "N"))
    return _draw(_in_rows(tiles, math.isqrt(len(tiles) - 1) + 1 if columns is None else columns), title, ax)


def reconstructions(
    originals: Numbers,
    reconstructions: Numbers,
    *,
    columns: int = 10,
    title: str = "Originals and their reconstructions",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw each image above its reconstruction.

    Args:
        originals: (N, H, W) or (N, C, H, W), in [0, 1].
        reconstructions: As many images of the same shape, such as means of p(x|z), z ~ q(z|x).
        columns: Pairs in a row, at most.
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: As in `image_grid`.
        ValueError: If the two differ in shape, or as in `image_grid`.

    Example:
        >>> x = torch.rand(12, 1, 28, 28)
        >>> axes = reconstructions(x, x.round(), columns=6)
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['original', 'reconstruction', 'original', 'reconstruction']
    """
    above = _opaque(_images("originals", originals, "N"))
    below = _opaque(_images("reconstructions", reconstructions, "N"))
    if above.shape != below.shape:
        raise ValueError(
            f"every original needs one reconstruction of its size; got {len(above)} originals of "
            f"{above.shape[2:]} pixels and {len(below)} reconstructions of {below.shape[2:]}"
        )
    seam = np.zeros_like(above[:, :, :1])  # a transparent line between the two
    pairs = _in_rows(np.concatenate([above, seam, below], axis=2), min(columns, len(above)))
    axes = _draw(pairs, title, ax)
    height = above.shape[2]
    tops = np.add.outer(np.arange(len(pairs)) * (pairs.shape[3] + _gap(pairs)), [0, height + 1]).ravel()
    axes.set_yticks(tops + (height - 1) / 2, ["original", "reconstruction"] * len(pairs))
    return axes


def interpolation(
    images: Numbers, *, title: str = "Interpolation in latent space", ax: "Axes | None" = None
) -> "Axes":
    """Draw paths through latent space, one a row, from left to right.

    Args:
        images: (P, T, H, W) or (P, T, C, H, W), in [0, 1]: P paths of T images, decoded at equal steps.
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: As in `image_grid`.
        ValueError: If a path has fewer than 2 images, or as in `image_grid`.

    Example:
        >>> axes = interpolation(torch.rand(2, 7, 1, 28, 28))
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['start', 'end']
    """
    paths = _opaque(_images("images", images, "P, T"))
    steps, width = paths.shape[1], paths.shape[4]
    if steps < 2:
        raise ValueError("a path needs at least 2 images, its start and its end; got 1")
    axes = _draw(paths, title, ax)
    ends = np.array([0, (steps - 1) * (width + _gap(paths))]) + (width - 1) / 2
    axes.set_xticks(ends, ["start", "end"])
    return axes


def manifold(
    images: Numbers,
    extent: Sequence[float],
    *,
    title: str = "Images decoded over the latent plane",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a two-dimensional latent space as one picture, each image at its latent coordinates.

    Row i, column j of the images is decoded at z[0] = linspace(left, right, columns)[j] and
    z[1] = linspace(bottom, top, rows)[i]. So row 0 is drawn at the bottom.

    Args:
        images: (rows, columns, H, W) or (rows, columns, C, H, W), in [0, 1].
        extent: (left, right, bottom, top): where the centres of the outermost images lie.
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: As in `image_grid`.
        ValueError: If there are fewer than 2 rows or columns, if the extent does not increase, or as in
            `image_grid`.

    Example:
        >>> z1, z0 = torch.meshgrid(torch.linspace(-2, 2, 5), torch.linspace(-3, 3, 7), indexing="ij")
        >>> z = torch.stack([z0, z1], dim=-1)
        >>> images = torch.sigmoid(z @ torch.randn(2, 784)).reshape(5, 7, 28, 28)  # or the decoder's means
        >>> axes = manifold(images, extent=(-3, 3, -2, 2))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('z[0]', 'z[1]')
    """
    tiles = _opaque(_images("images", images, "rows, columns"))
    rows, columns = tiles.shape[:2]
    if rows < 2 or columns < 2:
        raise ValueError(f"a manifold needs at least 2 rows and 2 columns; got {rows} and {columns}")
    corners = _array("extent", extent)
    if corners.shape != (4,) or corners[0] >= corners[1] or corners[2] >= corners[3]:
        raise ValueError(
            f"extent must be (left, right, bottom, top), left < right and bottom < top; got {extent}"
        )
    left, right, bottom, top = corners.tolist()
    # an image reaches half a step beyond its centre
    half_width, half_height = (right - left) / (columns - 1) / 2, (top - bottom) / (rows - 1) / 2
    edges = (left - half_width, right + half_width, bottom - half_height, top + half_height)
    axes = _draw(tiles[::-1], title, ax, extent=edges)
    axes.set(xlabel="z[0]", ylabel="z[1]")
    return axes


def latent_scatter(
    z: Numbers,
    labels: Numbers | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw latent vectors as points in the plane, coloured by label.

    Vectors of more than two dimensions are projected on the first two principal components of z; the title
    and the axes say so. Points are drawn in one fixed, shuffled order, so that no label hides another.

    Args:
        z: (N, K) latent vectors with K >= 2, such as the posterior means of N data.
        labels: (N,) integers from 0 to 99: 0 to 9 differ by colour, every further ten by marker.
        names: Names of the labels 0, 1, ..., for the legend; by default their numbers.
        title: Title of the figure; by default it says what is drawn.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If z is no numbers, the labels are no integers, or `ax` is no matplotlib Axes.
        ValueError: If z has another shape or is not finite, or the labels are not N, outside 0 to 99, or
            without a name.

    Example:
        >>> axes = latent_scatter(torch.randn(50, 2), torch.arange(50) % 3, names=["cat", "dog", "owl"])
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['cat', 'dog', 'owl']
        >>> latent_scatter(torch.randn(50, 20)).get_title()
        'First two principal components of 50 latent vectors'
    """
    points = _array("z", z)
    if points.ndim != 2 or points.shape[0] < 1 or points.shape[1] < 2:
        raise ValueError(f"z must have shape (N, K) with N >= 1 and K >= 2; got {points.shape}")
    count, latent_dim = points.shape
    kinds = np.zeros(count, dtype=int) if labels is None else _labels(labels, count, names)
    axis_names, what = ["z[0]", "z[1]"], f"{count:,} latent vectors"
    if latent_dim > 2:
        points, shares = _principal_components(points)
        axis_names = [f"component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]
        what = f"First two principal components of {what}"

    present = np.unique(kinds)
    legend_columns = 0 if labels is None else math.ceil(len(present) / 16)
    axes = _axes(ax, 5.6 + 0.8 * legend_columns, 5)
    shuffled = np.random.default_rng(0).permutation(count)
    size = float(np.clip(40_000 / count, 5, 36))
    for block, marker in enumerate(_MARKERS):
        chosen = shuffled[kinds[shuffled] // len(PALETTE) == block]
        if len(chosen):
            colours = [PALETTE[kind % len(PALETTE)] for kind in kinds[chosen]]
            across, up = points[chosen].T
            dots = axes.scatter(across, up, s=size, c=colours, marker=marker, alpha=0.7, linewidths=0)
            dots.set_rasterized(True)  # a PDF of many points stays small
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1], title=what if title is None else title)
    if labels is not None:
        for kind in present:
            block, colour = divmod(kind, len(PALETTE))
            name = str(kind) if names is None else names[kind]
            axes.scatter([], [], s=36, c=PALETTE[colour], marker=_MARKERS[block], linewidths=0, label=name)
        axes.legend(
            title="label", ncols=legend_columns, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    return axes


def aggregate_posterior(
    z: Numbers,
    *,
    dims: Sequence[int] | None = None,
    prior: Numbers | None = None,
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the aggregate posterior q(z) = (1/N) Σ q(z|x_n) against the prior, a row for each dimension.

    q(z) is a histogram of samples. Each row has its own scale of density, one for q and p.

    Args:
        z: (N, K) samples of q(z|x), one or more a datum. (Posterior means would look too narrow.)
        dims: Dimensions to draw, from the top; by default all.
        prior: (M, K) samples of the prior; by default the prior is standard normal, and drawn as a curve.
        title: Title of the figure; by default it says what is drawn.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If z or prior is no numbers, or `ax` is no matplotlib Axes.
        ValueError: If z or prior has another shape or is not finite, or there is no such dimension.

    Source: Hoffman and Johnson, 2016, ELBO surgery: yet another way to carve up the variational evidence
    lower bound.

    Example:
        >>> axes = aggregate_posterior(torch.randn(500, 20), dims=[0, 7])
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['z[0]', 'z[7]']
    """
    samples = _array("z", z)
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"z must have shape (N, K) with N, K >= 1; got {samples.shape}")
    count, latent_dim = samples.shape
    drawn = list(range(latent_dim) if dims is None else dims)
    if not drawn or any(k not in range(latent_dim) for k in drawn):
        raise ValueError(f"dims must name some of the dimensions 0 to {latent_dim - 1}; got {drawn}")
    prior_samples = None if prior is None else _array("prior", prior)
    if prior_samples is not None and (prior_samples.shape[1:] != (latent_dim,) or len(prior_samples) < 1):
        raise ValueError(
            f"prior must hold samples of shape (M, {latent_dim}), as z does; got {prior_samples.shape}"
        )

    axes = _axes(ax, 6.4, 1.4 + 0.45 * len(drawn))
    reach = max(4.0, 1.05 * float(abs(samples[:, drawn]).max()))
    edges = np.linspace(-reach, reach, 402)
    standard_normal = np.exp(-((edges[:-1] + edges[1:]) ** 2) / 8) / math.sqrt(2 * math.pi), edges
    for row, k in enumerate(drawn):
        q, q_edges = np.histogram(samples[:, k], bins="scott", density=True)
        p, p_edges = standard_normal
        if prior_samples is not None:
            p, p_edges = np.histogram(prior_samples[:, k], bins="scott", density=True)
        scale = 0.85 / max(q.max(), p.max())
        axes.axhline(-row, color="0.8", linewidth=0.8, zorder=0)
        posterior = axes.stairs(scale * q - row, q_edges, baseline=-row, fill=True, color=_SKY)
        reference = axes.stairs(scale * p - row, p_edges, baseline=None, color=_BLACK)
    axes.set(xlim=(-reach, reach), ylim=(0.85 - len(drawn), 1.6), xlabel="z")
    axes.set_title(f"Aggregate posterior and prior, {count:,} samples" if title is None else title)
    axes.set_yticks(-np.arange(len(drawn)), [f"z[{k}]" for k in drawn])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.legend([posterior, reference], ["q(z)", "p(z)"], loc="upper right", ncols=2, frameon=False)
    return axes


def kl_per_dimension(
    kl: Numbers,
    se: Numbers | None = None,
    *,
    threshold: float = 0.01,
    title: str = "KL divergence from the prior, by latent dimension",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how many nats each latent dimension carries, the largest first.

    Args:
        kl: (K,) KL(q(z_k|x) ‖ p(z_k)), averaged over the data, in nats per datum.
        se: (K,) standard errors, drawn as bars of ± one.
        threshold: Dimensions of more nats count as active here. (The active units of Burda et al., 2016, are
            counted by the variance of the posterior mean.)
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If kl or se is no numbers, or `ax` is no matplotlib Axes.
        ValueError: If kl has another shape or is not finite, se differs from it in shape or is negative, or
            the threshold is not positive.

    Example:
        >>> axes = kl_per_dimension([0.001, 2.5, 0.7])
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['1', '2', '0']
    """
    values = _array("kl", kl)
    if values.ndim != 1 or values.size < 1:
        raise ValueError(f"kl must have shape (K,), averaged over the data; got {values.shape}")
    errors = np.zeros_like(values) if se is None else _array("se", se)
    if errors.shape != values.shape or errors.min() < 0:
        raise ValueError(f"se must be non-negative and of kl's shape {values.shape}; got {errors}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be a positive number of nats; got {threshold}")

    order = np.argsort(-values, kind="stable")
    values, errors = values[order], errors[order]
    place = np.arange(len(values))
    active = int((values > threshold).sum())
    axes = _axes(ax, float(np.clip(1.5 + 0.25 * len(values), 5, 10)), 3.6)
    axes.bar(place, values, yerr=None if se is None else errors, color=_BLUE)
    axes.axhline(threshold, color=_BLACK, linestyle="--", linewidth=1, label=f"threshold: {threshold:g} nats")
    # inactive dimensions are shaded, as their bars are too low to be seen
    inactive = f"inactive: {len(values) - active} of {len(values)}"
    axes.axvspan(
        active - 0.5, len(values) - 0.5, color=_ORANGE, alpha=0.2, linewidth=0, zorder=0, label=inactive
    )
    every = math.ceil(len(values) / 40)  # with more names than that, they would overlap
    axes.set_xticks(place[::every], [str(k) for k in order[::every]], fontsize="small")
    axes.set(xlim=(-0.75, len(values) - 0.25), xlabel="latent dimension, sorted", title=title)
    axes.set_ylabel("nats per datum" if se is None else "nats per datum ± SE")
    axes.margins(y=0.25)
    axes.legend(**_LEGEND)
    return axes


def training_curves(
    history: Mapping[str, Numbers],
    *,
    references: Mapping[str, float] | None = None,
    title: str = "Evidence lower bound during training",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the bounds of a training run, epoch by epoch, in bands of ± one standard error.

    Args:
        history: A table, as a dict of columns of equal length: "epoch", and a curve for every column whose
            name ends in "_elbo" or "_bound", in nats per datum. The column of that name and "_se" holds its
            standard errors. NaN stands for what was not measured. Other columns are not drawn.
        references: Horizontal lines to compare with, from label to nats per datum.
        title: Title of the figure.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If a column is no numbers, or `ax` is no matplotlib Axes.
        ValueError: If there is no curve or no epoch, if columns differ in length, a value is infinite or a
            standard error negative.

    Example:
        >>> history = {"epoch": [1, 2], "train_elbo": [-120.0, -110.0], "train_elbo_se": [0.9, 0.7]}
        >>> axes = training_curves(history, references={"exact log p(x)": -100.0})
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['train ELBO ± SE', 'exact log p(x)']
    """
    if "epoch" not in history:
        raise ValueError(f'history needs a column "epoch"; got {", ".join(history) or "no columns"}')
    epoch = _array("epoch", history["epoch"])
    curves = {
        name: (_column(history, name, epoch), _column(history, f"{name}_se", epoch))
        for name in history
        if name.endswith(("_elbo", "_bound"))
    }
    if all(np.isnan(curve).all() for curve, _ in curves.values()):
        raise ValueError(
            'history needs a column that ends in "_elbo" or "_bound" and holds a number; '
            f"got {', '.join(curves) or 'none'}, of {epoch.size} epochs"
        )
    levels = {label: float(_array(label, level)) for label, level in (references or {}).items()}

    axes = _axes(ax, 6.4, 4)
    for colour, (name, (curve, se)) in zip(itertools.cycle(PALETTE), curves.items(), strict=False):
        measured, banded = ~np.isnan(curve), ~np.isnan(curve + se)
        if measured.any():
            label = name.replace("_", " ").replace("elbo", "ELBO") + (" ± SE" if banded.any() else "")
            few = measured.sum() <= 40  # then every epoch is marked, and a single one too shows its error
            axes.plot(epoch[measured], curve[measured], ".-" if few else "-", color=colour, label=label)
            if few:
                axes.errorbar(epoch[banded], curve[banded], se[banded], fmt="none", ecolor=colour)
            low, high = (curve - se)[banded], (curve + se)[banded]
            axes.fill_between(epoch[banded], low, high, color=colour, alpha=0.25, linewidth=0)
    for style, (label, level) in zip(itertools.cycle(["--", ":", "-."]), levels.items(), strict=False):
        axes.axhline(level, color=_BLACK, linestyle=style, linewidth=1, label=label)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(xlabel="epoch", ylabel="nats per datum", title=title)
    axes.legend(**_LEGEND)
    return axes


def pareto_k_histogram(k: Numbers, *, title: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draw the Pareto shapes k̂ of importance weights, with the limits 0.5 and 0.7.

    Where k̂ < 0.5 the guide is good for importance sampling, up to 0.7 it is usable, above it is not.

    Args:
        k: (N,) one k̂ a datum.
        title: Title of the figure; by default it counts the data.
        ax: Axes to draw in; by default those of a new figure.

    Raises:
        TypeError: If k is no numbers, or `ax` is no matplotlib Axes.
        ValueError: If k has another shape or is not finite (k̂ is infinite for too few particles).

    Source: Yao, Vehtari, Simpson and Gelman, 2018, Yes, but did it work?: evaluating variational inference,
    arXiv:1802.02538.

    Example:
        >>> pareto_k_histogram([0.1, 0.2, 0.6, 0.9]).get_title()
        'Importance weights of 4 data'
    """
    values = _array("k", k)
    if values.ndim != 1 or values.size < 1:
        raise ValueError(f"k must have shape (N,), one a datum; got {values.shape}")
    good, bad = values < 0.5, values > 0.7
    parts = [
        (r"good, $\hat{k} < 0.5$", good, _GREEN),
        (r"usable, $0.5 \leq \hat{k} \leq 0.7$", ~good & ~bad, _ORANGE),
        (r"not usable, $\hat{k} > 0.7$", bad, _PURPLE),
    ]
    width = 0.05 * max(1, math.ceil(np.ptp(values) / 5))  # bars meet the limits, and are never too many
    rounding = 1e-9  # so that no value on an edge is lost
    first = math.floor(values.min() / width - rounding)
    last = math.floor(values.max() / width + rounding) + 1

    axes = _axes(ax, 6.4, 3.6)
    axes.hist(
        [values[part] for _, part, _ in parts],
        bins=(width * np.arange(first, last + 1)).tolist(),
        stacked=True,  # a bar across a limit shows both its parts
        color=[colour for _, _, colour in parts],
        label=[f"{name}: {part.sum():,} ({part.mean():.0%})" for name, part, _ in parts],
    )
    for limit in (0.5, 0.7):
        axes.axvline(limit, color=_BLACK, linestyle="--", linewidth=1)
    axes.set(xlabel=r"Pareto shape $\hat{k}$", ylabel="number of data")
    axes.locator_params(axis="y", integer=True)
    axes.set_title(f"Importance weights of {len(values):,} data" if title is None else title)
    axes.margins(y=0.4)
    axes.legend(**_LEGEND)
    return axes


def save(axes: "Axes", path: str | os.PathLike[str]) -> None:
    """Write the figure of `axes` to a file, whole or not at all; see `files.replacing`.

    Args:
        axes: What a function of this module returned, or any other matplotlib Axes.
        path: The file; the suffix (.png, .pdf, .svg, ...) names the format.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the suffix names no format of matplotlib's.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "samples.png"
        >>> save(image_grid(torch.rand(4, 28, 28)), path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path} needs a suffix that names the format, such as .png, .pdf or .svg")
    with replacing(path) as partial:
        axes.figure.figure.savefig(partial, format=path.suffix[1:], bbox_inches="tight")


def _axes(ax: "Axes | None", width: float, height: float) -> "Axes":
    """Return `ax`, or the Axes of a new figure of that size in inches; only here is matplotlib imported."""
    from matplotlib.axes import Axes  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    if ax is None:
        ax = Figure(figsize=(width, height), dpi=150, layout="constrained").add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be a matplotlib Axes; got {type(ax).__name__}")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _array(name: str, value: Numbers, *, missing: bool = False) -> Array:
    """Return `value` as float64, refusing what is no finite number; NaN passes where it means `missing`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers; got {array.dtype}")
    array = array.astype(np.float64)
    wrong = np.isinf(array) if missing else ~np.isfinite(array)
    if wrong.any():
        where = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(f"{name} must be finite; got {array[where]} at index {where}, {wrong.sum()} in all")
    return array


def _column(history: Mapping[str, Numbers], name: str, epoch: Array) -> Array:
    """Return a column of the table, NaN where the table has none."""
    column = _array(name, history.get(name, np.full_like(epoch, np.nan)), missing=True)
    if column.ndim != 1 or column.shape != epoch.shape:
        raise ValueError(f"{name} must hold one number an epoch, {epoch.size}; got shape {column.shape}")
    if name.endswith("_se") and (column < 0).any():
        raise ValueError(f"{name} holds standard errors, which are not negative; got {np.nanmin(column)}")
    return column


def _labels(labels: Numbers, count: int, names: Sequence[str] | None) -> npt.NDArray[np.int64]:
    kinds = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if kinds.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers; got {kinds.dtype}")
    if kinds.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one a row of z; got {kinds.shape}")
    limit = len(PALETTE) * len(_MARKERS)
    if names is not None:
        limit = min(limit, len(names))
    wrong = (kinds < 0) | (kinds >= limit)
    if wrong.any():
        where = int(np.argmax(wrong))
        named = "" if names is None else f" ({len(names)} names)"
        raise ValueError(f"labels must be from 0 to {limit - 1}{named}; got {kinds[where]} at index {where}")
    return kinds.astype(np.int64)


def _principal_components(z: Array) -> tuple[Array, Array]:
    """Project (N, K) on the first two principal components; return (N, 2) and their shares of variance."""
    variances, directions = np.linalg.eigh(np.cov(z, rowvar=False, bias=True))
    first_two = [-1, -2]  # eigh sorts upwards
    shares = variances[first_two] / max(variances.sum(), np.finfo(float).tiny)
    return (z - z.mean(0)) @ directions[:, first_two], shares


def _images(name: str, value: Numbers, leading: str) -> Array:
    """Return images as (*leading, C, H, W), or say what is wrong with them."""
    images = _array(name, value)
    lead = leading.count(",") + 1
    if images.ndim == lead + 2:
        images = np.expand_dims(images, lead)
    if images.ndim != lead + 3 or images.shape[lead] not in (1, 3) or images.size == 0:
        raise ValueError(
            f"{name} must have shape ({leading}, H, W) or ({leading}, C, H, W) with C = 1 or 3 channels, "
            f"and none of it 0; got {tuple(np.shape(value))}"
        )
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {low:g} to {high:g}: rescale or clamp them first")
    return images


def _opaque(images: Array) -> Array:
    """Return (..., C, H, W) as (..., 4, H, W): red, green, blue, and opacity 1."""
    *lead, _, height, width = images.shape
    colours = np.broadcast_to(images, (*lead, 3, height, width))
    return np.concatenate([colours, np.ones((*lead, 1, height, width))], axis=-3)


def _in_rows(tiles: Array, columns: int) -> Array:
    """Return (N, 4, H, W) as (rows, columns, 4, H, W); what is left of the last row is transparent."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    rows = -(-len(tiles) // columns)
    blanks = np.zeros((rows * columns - len(tiles), *tiles.shape[1:]))
    return np.concatenate([tiles, blanks]).reshape(rows, columns, *tiles.shape[1:])


def _gap(tiles: Array) -> int:
    """Pixels between two tiles."""
    return max(1, tiles.shape[-1] // 12)


def _draw(
    tiles: Array, title: str, ax: "Axes | None", *, extent: tuple[float, float, float, float] | None = None
) -> "Axes":
    """Draw tiles (rows, columns, 4, H, W) as one picture: apart from each other, or filling an `extent`."""
    gap = _gap(tiles) if extent is None else 0
    rows, columns, _, height, width = tiles.shape
    spaced = np.pad(tiles, [(0, 0)] * 3 + [(0, gap)] * 2)
    picture = spaced.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), 4)
    picture = picture[: rows * (height + gap) - gap, : columns * (width + gap) - gap]

    height, width = picture.shape[:2]
    inches = min(float(np.clip(0.75 * columns, 3, 8)), 9 * width / height)  # of the picture's width
    axes = _axes(ax, max(3, inches + 0.5), inches * height / width + 0.5)
    if extent is None:
        axes.imshow(picture, origin="upper")
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    else:
        left, right, bottom, top = extent
        pixels_are_square = (right - left) / width / ((top - bottom) / height)
        axes.imshow(picture, origin="upper", extent=extent, aspect=pixels_are_square)
    axes.set_title(title)
    return axes
