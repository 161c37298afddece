"""Charts of latent vectors, training and evaluation."""

import importlib.util
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pyro_vae.plots.image_grids import (
    LEGEND,
    LINE_MARKERS,
    PALETTE,
    POINT_MARKERS,
    Array,
    Numbers,
    axes_of,
    finite_array,
    real_array,
)
from pyro_vae.utils.serialization import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "aggregate_posterior",
    "kl_per_dimension",
    "latent_scatter",
    "pareto_k_histogram",
    "save",
    "snr",
    "training_curves",
]

_FEWEST, _MOST = 10, 5_000  # vectors that t-SNE shows well, and in less than a minute
_BLUE, _, _GREEN, _PURPLE, _SKY, _ORANGE, _BLACK = PALETTE[:7]


def latent_scatter(
    z: Numbers,
    labels: Numbers | None = None,
    *,
    names: Sequence[str] | None = None,
    projection: str | None = None,
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw latent vectors as points in the plane, coloured by label.

    Vectors of more than two dimensions are projected, and the axes say how: by t-SNE, which keeps neighbours
    together, whereas distances between groups and their sizes mean little; or on the first two principal
    components, which are linear, and hide groups that differ in other directions. Points are drawn in a
    fixed, shuffled order, so that no label hides another.

    Args:
        z: (N, K) latent vectors with K >= 2, such as the posterior means of N examples.
        labels: (N,) integers from 0 to 99; 0 to 9 differ by colour, each further ten by marker.
        names: Names of the labels 0, 1, ... in the legend; by default their numbers.
        projection: "t-sne", which needs scikit-learn and takes seconds for a thousand vectors, or
            "principal"; by default "t-sne" for 10 to 5,000 vectors where scikit-learn is installed.
        title: Title of the figure; by default describes what is drawn.
        ax: Axes to draw in; by default of a new figure.

    Source: van der Maaten and Hinton, 2008, Visualizing data using t-SNE.

    Example:
        >>> axes = latent_scatter(torch.randn(50, 2), torch.arange(50) % 3, names=["cat", "dog", "owl"])
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['cat', 'dog', 'owl']
        >>> latent_scatter(torch.randn(50, 20), projection="principal").get_title()
        'First two principal components of 50 latent vectors'
    """
    points = finite_array("z", z)
    if points.ndim != 2 or points.shape[0] < 1 or points.shape[1] < 2:
        raise ValueError(f"z must have shape (N, K) with N >= 1 and K >= 2; got {points.shape}")
    count, latent_dim = points.shape
    kinds = np.zeros(count, dtype=int) if labels is None else _labels(labels, count, names)
    axis_names, what = ["z[0]", "z[1]"], f"{count:,} latent vectors"
    if latent_dim > 2:
        points, axis_names, projected = _in_the_plane(points, projection)
        what = f"{projected} of {what}"

    present = np.unique(kinds)
    legend_columns = 0 if labels is None else math.ceil(len(present) / 16)
    axes = axes_of(ax, 5.6 + 0.8 * legend_columns, 5)
    shuffled = np.random.default_rng(0).permutation(count)
    size = float(np.clip(40_000 / count, 5, 36))
    for block, marker in enumerate(POINT_MARKERS):
        chosen = shuffled[kinds[shuffled] // len(PALETTE) == block]
        if len(chosen):
            colours = [PALETTE[kind % len(PALETTE)] for kind in kinds[chosen]]
            across, up = points[chosen].T
            dots = axes.scatter(across, up, s=size, c=colours, marker=marker, alpha=0.7, linewidths=0)
            dots.set_rasterized(True)  # keeps a PDF of many points small
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1], title=what if title is None else title)
    if labels is not None:
        for kind in present:
            block, colour = divmod(kind, len(PALETTE))
            name = str(kind) if names is None else names[kind]
            axes.scatter(
                [], [], s=36, c=PALETTE[colour], marker=POINT_MARKERS[block], linewidths=0, label=name
            )
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
    """Draw the aggregate posterior q(z) = (1/N) Σ q(z|x_n) against the prior, one row per dimension.

    q(z) is a histogram of samples. Each row has its own density scale, common to q and p.

    Args:
        z: (N, K) samples of q(z|x), one or more per example; posterior means would be too narrow.
        dims: Dimensions to draw, from the top; by default all.
        prior: (M, K) samples of the prior; by default the standard normal density, drawn as a curve.
        title: Title of the figure; by default describes what is drawn.
        ax: Axes to draw in; by default of a new figure.

    Source: Hoffman and Johnson, 2016, ELBO surgery: yet another way to carve up the variational evidence
    lower bound.

    Example:
        >>> axes = aggregate_posterior(torch.randn(500, 20), dims=[0, 7])
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['z[0]', 'z[7]']
    """
    samples = finite_array("z", z)
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"z must have shape (N, K) with N, K >= 1; got {samples.shape}")
    count, latent_dim = samples.shape
    drawn = list(range(latent_dim) if dims is None else dims)
    if not drawn or any(k not in range(latent_dim) for k in drawn):
        raise ValueError(f"dims must be non-empty, from 0 to {latent_dim - 1}; got {drawn}")
    prior_samples = None if prior is None else finite_array("prior", prior)
    if prior_samples is not None and (prior_samples.shape[1:] != (latent_dim,) or len(prior_samples) < 1):
        raise ValueError(f"prior must have shape (M, {latent_dim}) with M >= 1; got {prior_samples.shape}")

    axes = axes_of(ax, 6.4, 1.4 + 0.45 * len(drawn))
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
    """Draw the KL divergence of each latent dimension from the prior, in descending order.

    Args:
        kl: (K,) KL(q(z_k|x) ‖ p(z_k)), averaged over the data, in nats per datum.
        se: (K,) standard errors, drawn as error bars of ± one.
        threshold: Nats above which a dimension counts as active here. The active units of Burda et al., 2016,
            are counted by the variance of the posterior mean instead.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

    Example:
        >>> axes = kl_per_dimension([0.001, 2.5, 0.7])
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['1', '2', '0']
    """
    values = finite_array("kl", kl)
    if values.ndim != 1 or values.size < 1:
        raise ValueError(f"kl must have shape (K,), averaged over the data; got {values.shape}")
    errors = np.zeros_like(values) if se is None else finite_array("se", se)
    if errors.shape != values.shape or errors.min() < 0:
        raise ValueError(f"se must be non-negative and have kl's shape {values.shape}; got {errors}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be a positive number of nats; got {threshold}")

    order = np.argsort(-values, kind="stable")
    values, errors = values[order], errors[order]
    place = np.arange(len(values))
    active = int((values > threshold).sum())
    axes = axes_of(ax, float(np.clip(1.5 + 0.25 * len(values), 5, 10)), 3.6)
    axes.bar(place, values, yerr=None if se is None else errors, color=_BLUE, capsize=2)
    every = math.ceil(len(values) / 40)  # more labels would overlap
    axes.set_xticks(place[::every], [str(k) for k in order[::every]], fontsize="small")
    axes.set(xlim=(-0.75, len(values) - 0.25), xlabel="latent dimension, sorted", title=title)
    axes.set_ylabel("nats per datum" if se is None else "nats per datum ± SE")
    axes.margins(y=0.25)
    if active == len(values):  # a line at the threshold would hide behind the axis
        axes.set_xlabel(f"latent dimension, sorted; all above {threshold:g} nats")
        return axes
    # Inactive dimensions are shaded because their bars are too low to be visible.
    axes.axhline(threshold, color=_BLACK, linestyle="--", linewidth=1, label=f"threshold: {threshold:g} nats")
    inactive = f"inactive: {len(values) - active} of {len(values)}"
    axes.axvspan(
        active - 0.5, len(values) - 0.5, color=_ORANGE, alpha=0.2, linewidth=0, zorder=0, label=inactive
    )
    axes.legend(**LEGEND)
    return axes


def training_curves(
    history: Mapping[str, Numbers],
    *,
    references: Mapping[str, float] | None = None,
    title: str = "Evidence lower bound during training",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the bounds of a training run per epoch, with bands of ± one standard error.

    Args:
        history: Table as a dict of columns of equal length: "epoch", and one curve per column whose name ends
            in "_elbo" or "_bound", in nats per datum, with standard errors in the column of that name and
            "_se". NaN marks missing values. Other columns are ignored.
        references: Horizontal lines for comparison, from label to nats per datum.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

    Example:
        >>> history = {"epoch": [1, 2], "train_elbo": [-120.0, -110.0], "train_elbo_se": [0.9, 0.7]}
        >>> axes = training_curves(history, references={"exact log p(x)": -100.0})
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['train ELBO ± SE', 'exact log p(x)']
    """
    if not isinstance(history, Mapping):
        raise TypeError(
            "history must be a dict of columns, such as columns() of the history that fit returns; "
            f"got {type(history).__name__}"
        )
    if "epoch" not in history:
        raise ValueError(f'history needs a column "epoch"; got {", ".join(history) or "no columns"}')
    epoch = finite_array("epoch", history["epoch"])
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
    levels = {label: float(finite_array(label, level)) for label, level in (references or {}).items()}

    axes = axes_of(ax, 6.4, 4)
    for colour, (name, (curve, se)) in zip(itertools.cycle(PALETTE), curves.items(), strict=False):
        measured, banded = ~np.isnan(curve), ~np.isnan(curve + se)
        if measured.any():
            label = name.replace("_", " ").replace("elbo", "ELBO") + (" ± SE" if banded.any() else "")
            few = measured.sum() <= 40  # few enough to mark each epoch with its error
            axes.plot(epoch[measured], curve[measured], ".-" if few else "-", color=colour, label=label)
            if few:
                axes.errorbar(epoch[banded], curve[banded], se[banded], fmt="none", ecolor=colour)
            low, high = (curve - se)[banded], (curve + se)[banded]
            axes.fill_between(epoch[banded], low, high, color=colour, alpha=0.25, linewidth=0)
    for style, (label, level) in zip(itertools.cycle(["--", ":", "-."]), levels.items(), strict=False):
        axes.axhline(level, color=_BLACK, linestyle=style, linewidth=1, label=label)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    late = f" (from {first:g})" if (first := epoch.min()) > 1 else ""
    axes.set(xlabel=f"epoch{late}", ylabel="nats per datum", title=title)
    axes.legend(**LEGEND)
    return axes


def pareto_k_histogram(k: Numbers, *, title: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of the Pareto shapes k̂ of importance weights, with the limits 0.5 and 0.7.

    The guide is good for importance sampling where k̂ < 0.5, usable up to 0.7, and not usable above.

    Args:
        k: (N,) one k̂ per example. It is infinite, and an error, for too few particles.
        title: Title of the figure; by default gives the number of examples.
        ax: Axes to draw in; by default of a new figure.

    Source: Yao, Vehtari, Simpson and Gelman, 2018, Yes, but did it work?: evaluating variational inference,
    arXiv:1802.02538.

    Example:
        >>> pareto_k_histogram([0.1, 0.2, 0.6, 0.9]).get_title()
        'Importance weights of 4 data'
    """
    values = finite_array("k", k)
    if values.ndim != 1 or values.size < 1:
        raise ValueError(f"k must have shape (N,), one per example; got {values.shape}")
    good, bad = values < 0.5, values > 0.7
    parts = [
        part
        for part in (
            (r"good, $\hat{k} < 0.5$", good, _GREEN),
            (r"usable, $0.5 \leq \hat{k} \leq 0.7$", ~good & ~bad, _ORANGE),
            (r"not usable, $\hat{k} > 0.7$", bad, _PURPLE),
        )
        if part[1].any()
    ]
    width = 0.05 * max(1, math.ceil(np.ptp(values) / 5))  # bars end at the limits, in a bounded number
    rounding = 1e-9  # keeps values at the outermost edges
    first = math.floor(values.min() / width - rounding)
    last = math.floor(values.max() / width + rounding) + 1

    axes = axes_of(ax, 6.4, 3.6)
    axes.hist(
        [values[part] for _, part, _ in parts],
        bins=(width * np.arange(first, last + 1)).tolist(),
        stacked=True,  # a bar that contains a limit shows both parts
        color=[colour for _, _, colour in parts],
        label=[f"{name}: {part.sum():,} ({part.mean():.0%})" for name, part, _ in parts],
    )
    for limit in (0.5, 0.7):
        axes.axvline(limit, color=_BLACK, linestyle="--", linewidth=1)
    axes.set(xlabel=r"Pareto shape $\hat{k}$", ylabel="number of data")
    axes.locator_params(axis="y", integer=True)
    axes.set_title(f"Importance weights of {len(values):,} data" if title is None else title)
    axes.margins(y=0.4)
    axes.legend(**LEGEND)
    return axes


def snr(
    particles: Numbers,
    snr: Numbers,
    snr_se: Numbers,
    families: Sequence[str],
    *,
    parameters: str = "guide",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw signal-to-noise ratios of gradients against the number of particles, on logarithmic scales.

    The estimators of a family are joined by a line, in order of particles. An arrow marks an SNR of 0, too
    small to be measured. Grey lines show growth as √S and decay as 1/√S.

    Args:
        particles: (M,) integers S ≥ 1, the particles of each of M estimators.
        snr: (M,) signal-to-noise ratios ≥ 0; neither NaN nor an infinite value is drawn.
        snr_se: (M,) standard errors of `snr`.
        families: M names for the legend.
        parameters: Whose gradient, the "model" or the "guide" parameters', for the title.
        ax: Axes to draw in; by default of a new figure.

    Source: Rainforth et al., 2018, Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> axes = snr([1, 10, 1], [0.5, 1.6, 0.4], [0.1, 0.1, 0.1], ["DReG(S)", "DReG(S)", "STL(S)"])
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['as √S', 'as 1/√S', 'DReG(S)', 'STL(S)']
    """
    if parameters not in ("model", "guide"):
        raise ValueError(f'parameters must be "model" or "guide"; got {parameters!r}')
    sizes = finite_array("particles", particles)
    ratios, errors = real_array("snr", snr), real_array("snr_se", snr_se)
    if not sizes.shape == ratios.shape == errors.shape == (len(families),):
        raise ValueError(
            "particles, snr, snr_se and families must have one shape (M,); "
            f"got {sizes.shape}, {ratios.shape}, {errors.shape} and {len(families)} families"
        )
    if (sizes < 1).any() or (sizes % 1).any():
        raise ValueError(f"particles must be positive integers; got {sizes}")
    if (ratios < 0).any() or (errors < 0).any():
        raise ValueError(f"snr and snr_se must not be negative; got {ratios} and {errors}")
    order = np.argsort(sizes, kind="stable")
    order = order[~np.isnan(ratios[order])]
    if not order.size:
        raise ValueError(f"snr of the {parameters} parameters is NaN for every estimator: nothing to draw")
    sizes, ratios, errors, names = sizes[order], ratios[order], errors[order], np.asarray(families)[order]

    axes = axes_of(ax, 8, 4.4)
    distinct = list(dict.fromkeys(names.tolist()))
    for number, name in enumerate(distinct):
        family, remaining = names == name, (len(distinct) - number) / len(distinct)
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": LINE_MARKERS[number % len(LINE_MARKERS)],
            "linewidth": 1 + 2 * remaining,  # decreasing, so that coinciding lines stay visible
            "markersize": 4 + 5 * remaining,
        }
        _draw_line(axes, sizes[family], ratios[family], errors[family], label=name, **style)
    _draw_slopes(axes, sizes, ratios)
    _set_log_axes(axes, sizes)
    lost = " (arrows: not distinguishable from 0)" if (ratios == 0).any() else ""
    axes.set_title(f"Gradient in the {parameters}'s parameters{lost}")
    axes.legend(edgecolor="none", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def save(axes: "Axes", path: str | os.PathLike[str]) -> None:
    """Write the figure of `axes` to a file, completely or not at all.

    Args:
        axes: Any matplotlib Axes, such as a function of `plots` returns.
        path: File whose suffix (.png, .pdf, .svg, ...) names the format.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If matplotlib has no format of that suffix.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "kl.png"
        >>> save(kl_per_dimension([0.001, 2.5, 0.7]), path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(
            f"path must have a suffix that names the format, such as .png, .pdf or .svg; got {path}"
        )
    with replacing(path) as partial:
        axes.figure.figure.savefig(partial, format=path.suffix[1:], bbox_inches="tight")


def _column(history: Mapping[str, Numbers], name: str, epoch: Array) -> Array:
    """Return a column of the history, all NaN if it is absent."""
    column = finite_array(name, history.get(name, np.full_like(epoch, np.nan)), missing=True)
    if column.ndim != 1 or column.shape != epoch.shape:
        raise ValueError(f"{name} must hold one number per epoch, {epoch.size}; got shape {column.shape}")
    if name.endswith("_se") and (column < 0).any():
        raise ValueError(f"{name} must hold non-negative standard errors; got {np.nanmin(column)}")
    return column


def _labels(labels: Numbers, count: int, names: Sequence[str] | None) -> npt.NDArray[np.int64]:
    """Return labels (N,) as integers; raise unless each has a colour, a marker and, with `names`, a name."""
    kinds = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if kinds.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers; got {kinds.dtype}")
    if kinds.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one per row of z; got {kinds.shape}")
    limit = len(PALETTE) * len(POINT_MARKERS)
    if names is not None:
        limit = min(limit, len(names))
    wrong = (kinds < 0) | (kinds >= limit)
    if wrong.any():
        where = int(np.argmax(wrong))
        named = "" if names is None else f" ({len(names)} names)"
        raise ValueError(f"labels must be from 0 to {limit - 1}{named}; got {kinds[where]} at index {where}")
    return kinds.astype(np.int64)


def _in_the_plane(z: Array, projection: str | None) -> tuple[Array, list[str], str]:
    """Return z (N, K) in two dimensions, the names of these, and the name of the projection."""
    if projection not in (None, "t-sne", "principal"):
        raise ValueError(f'projection must be "t-sne" or "principal"; got {projection!r}')
    installed = importlib.util.find_spec("sklearn") is not None
    if projection == "t-sne" and not installed:
        raise ImportError('projection="t-sne" needs scikit-learn: pip install scikit-learn')
    if projection == "t-sne" and len(z) < _FEWEST:
        raise ValueError(f"t-SNE needs {_FEWEST} vectors or more; got {len(z)}: use projection='principal'")
    if projection == "t-sne" or (projection is None and installed and _FEWEST <= len(z) <= _MOST):
        return _t_sne(z), ["t-SNE 1", "t-SNE 2"], "t-SNE"
    points, shares = _principal_components(z)
    names = [f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]
    return points, names, "First two principal components"


def _principal_components(z: Array) -> tuple[Array, Array]:
    """Return the first two principal components (N, 2) of z (N, K), and their shares of the variance."""
    variances, directions = np.linalg.eigh(np.cov(z, rowvar=False, bias=True))
    first_two = [-1, -2]  # eigh sorts in ascending order
    shares = variances[first_two] / max(variances.sum(), np.finfo(float).tiny)
    return (z - z.mean(0)) @ directions[:, first_two], shares


def _t_sne(z: Array) -> Array:
    """Return the t-SNE embedding of z (N, K) in the plane, (N, 2), the same in each run."""
    from sklearn.manifold import TSNE  # noqa: PLC0415 (optional)

    perplexity = min(30.0, (len(z) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(z))


def _draw_line(axes: "Axes", particles: Array, snr: Array, se: Array, *, label: str, **style: Any) -> None:
    """Draw SNRs with their standard errors, and an SNR of 0 as an arrow down from its standard error."""
    found = snr > 0
    below = np.minimum(se, 0.9 * snr)  # a logarithmic scale has no zero
    # black bars above the markers, which would hide them
    bars: dict[str, Any] = {"ecolor": _BLACK, "elinewidth": 1, "capsize": 5, "barsabove": True}
    axes.errorbar(
        particles[found],
        snr[found],
        np.stack([below, se])[:, found],
        linestyle="-",
        label=label,
        **bars,
        **style,
    )
    lost = ~found
    axes.errorbar(
        particles[lost], se[lost], 0.5 * se[lost], uplims=True, fmt="none", color=style["color"], capsize=3
    )


def _draw_slopes(axes: "Axes", particles: Array, snr: Array) -> None:
    """Draw the slopes √S and 1/√S through the geometric mean of the SNRs."""
    ends = np.array([particles.min(), particles.max()])
    if ends[0] == ends[1] or not (snr > 0).any():
        return
    middle = np.exp(np.log(snr[snr > 0]).mean())
    for power, style, label in ((0.5, "--", "as √S"), (-0.5, ":", "as 1/√S")):
        axes.plot(
            ends, middle * (ends / np.sqrt(ends.prod())) ** power, style, color="grey", label=label, zorder=0
        )


def _set_log_axes(axes: "Axes", particles: Array) -> None:
    """Set logarithmic scales, with ticks at the numbers of particles and at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator  # noqa: PLC0415 (slow)

    axes.set(
        xscale="log", yscale="log", xlabel="particles S, in each group", ylabel="signal-to-noise ratio ± SE"
    )
    ticks = np.unique(particles).astype(int).tolist()
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
