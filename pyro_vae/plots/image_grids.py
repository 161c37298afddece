"""Image grids, and the style and axes common to all figures.

Notation: C channels, H and W pixels; a tile is an RGB image with opacity, (4, H, W).
"""

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LEGEND",
    "LINE_MARKERS",
    "PALETTE",
    "POINT_MARKERS",
    "Array",
    "Numbers",
    "axes_of",
    "finite_array",
    "heat_map",
    "image_grid",
    "interpolation",
    "manifold",
    "real_array",
    "reconstructions",
]

Numbers: TypeAlias = npt.ArrayLike | torch.Tensor
Array: TypeAlias = npt.NDArray[Any]

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),  # blue, vermilion, green, purple
    *("#56B4E9", "#E69F00", "#000000", "#F0E442"),  # sky, orange, black, yellow
    *("#6622CC", "#662200"),  # violet, brown
)
"""Ten colours for categories: the eight of Okabe and Ito, 2008, Color Universal Design, and two that are at
least as far from each of these, to colour-blind readers too, as the eight are from each other."""

POINT_MARKERS = "o^sDvP*X<>"  # one per ten labels: 0 to 9 are discs of the ten colours, 10 to 19 triangles
LINE_MARKERS = "osD^vP*X<"  # nine, coprime with the ten colours: ninety distinct lines
LEGEND: dict[str, Any] = {"framealpha": 1, "edgecolor": "none"}  # opaque, so readable over the data


def axes_of(ax: "Axes | None", width: float, height: float) -> "Axes":
    """Return `ax`, or the Axes of a new figure of `width` × `height` inches."""
    from matplotlib.axes import Axes  # noqa: PLC0415 (slow)
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow)

    if ax is None:
        ax = Figure(figsize=(width, height), dpi=150, layout="constrained").add_subplot()
        ax._repr_png_ = partial(_png, ax)  # type: ignore[attr-defined] # what a notebook shows
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be a matplotlib Axes; got {type(ax).__name__}")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _png(ax: "Axes") -> bytes:
    file = io.BytesIO()
    ax.get_figure(root=True).savefig(file, format="png", dpi=80)  # type: ignore[union-attr]
    return file.getvalue()


def real_array(name: str, value: Numbers) -> Array:
    """Return `value` as float64; raise unless it holds real numbers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers; got {array.dtype}")
    return array.astype(np.float64)


def finite_array(name: str, value: Numbers, *, missing: bool = False) -> Array:
    """Return `value` as float64; raise unless it is finite, or NaN where values may be `missing`."""
    array = real_array(name, value)
    wrong = np.isinf(array) if missing else ~np.isfinite(array)
    if wrong.any():
        where = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(f"{name} must be finite; got {array[where]} at index {where}, {wrong.sum()} in all")
    return array


def image_grid(
    images: Numbers,
    *,
    columns: int | None = None,
    title: str = "Samples from the prior",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw images in a grid, row by row.

    Args:
        images: (N, H, W) or (N, C, H, W), in [0, 1].
        columns: Images per row; by default the grid is about square.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

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
    binarized: Numbers | None = None,
    columns: int = 10,
    title: str = "Originals and their reconstructions",
    names: tuple[str, str] = ("original", "reconstruction"),
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw each image above its reconstruction.

    Args:
        originals: (N, H, W) or (N, C, H, W), in [0, 1].
        reconstructions: Images of the same shape, such as means of p(x|z) with z ~ q(z|x).
        binarized: Images of the same shape, drawn between the two: the bits that were drawn from originals in
            grey levels, and reconstructed.
        columns: Pairs per row, at most.
        title: Title of the figure.
        names: Labels of the rows of originals and of reconstructions.
        ax: Axes to draw in; by default of a new figure.

    Example:
        >>> x = torch.rand(12, 1, 28, 28)
        >>> axes = reconstructions(x, x.round(), columns=6)
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['original', 'reconstruction', 'original', 'reconstruction']
    """
    rows = {"originals": originals, "binarized": binarized, "reconstructions": reconstructions}
    images = {name: _opaque(_images(name, row, "N")) for name, row in rows.items() if row is not None}
    first = images["originals"]
    for name, row in images.items():
        if row.shape != first.shape:
            raise ValueError(
                f"originals and {name} must have the same shape; got {len(first)} originals of "
                f"{first.shape[2:]} pixels and {len(row)} {name} of {row.shape[2:]}"
            )
    all_names = names if binarized is None else (names[0], "binarised", names[1])
    return _draw_stacks(list(images.values()), all_names, columns=columns, title=title, ax=ax)


def heat_map(
    images: Numbers,
    values: Numbers,
    *,
    columns: int = 10,
    label: str = "log p(x|z) per pixel (nats)",
    title: str = "Images, and where they are surprising",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw each image above a map of one number per pixel, such as `AnomalyDetector.explain`.

    Colours reach from the highest value, the brightest, to the lowest, the darkest: there an image is most
    surprising. Values of several channels are added.

    Args:
        images: (N, H, W) or (N, C, H, W), in [0, 1].
        values: Finite numbers of the same shape.
        columns: Pairs per row, at most.
        label: Label of the colour bar.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

    Example:
        >>> x = torch.rand(6, 1, 28, 28)
        >>> axes = heat_map(x, -x.square(), columns=3)
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['image', 'map', 'image', 'map']
    """
    from matplotlib import colormaps  # noqa: PLC0415 (slow)
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 (slow)
    from matplotlib.colors import Normalize  # noqa: PLC0415 (slow)

    above, numbers = _opaque(_images("images", images, "N")), finite_array("values", values)
    if numbers.shape != np.shape(images):
        raise ValueError(f"values must have the shape of images, {np.shape(images)}; got {numbers.shape}")
    numbers = numbers.sum(1) if numbers.ndim == 4 else numbers
    scale = ScalarMappable(Normalize(numbers.min(), numbers.max()), colormaps["inferno"])
    below = np.asarray(scale.cmap(scale.norm(numbers))).transpose(0, 3, 1, 2)
    axes = _draw_stacks([above, below], ("image", "map"), columns=columns, title=title, ax=ax)
    figure = axes.get_figure(root=False)
    assert figure is not None  # an Axes of a figure was given or made
    figure.colorbar(scale, cax=axes.inset_axes((1.03, 0, 0.03, 1)), label=label)  # inside the one Axes
    return axes


def interpolation(
    images: Numbers, *, title: str = "Interpolation in latent space", ax: "Axes | None" = None
) -> "Axes":
    """Draw paths through latent space, one per row, from left to right.

    Args:
        images: (P, T, H, W) or (P, T, C, H, W), in [0, 1]: P paths of T >= 2 equal steps.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

    Example:
        >>> axes = interpolation(torch.rand(2, 7, 1, 28, 28))
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['start', 'end']
    """
    paths = _opaque(_images("images", images, "P, T"))
    steps, width = paths.shape[1], paths.shape[4]
    if steps < 2:
        raise ValueError("images must hold at least 2 images per path, its start and its end; got 1")
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
    """Draw a two-dimensional latent space as one image, each decoded image at its latent coordinates.

    The image in row i and column j is decoded at z[0] = linspace(left, right, columns)[j] and
    z[1] = linspace(bottom, top, rows)[i]. Row 0 is drawn at the bottom.

    Args:
        images: (rows, columns, H, W) or (rows, columns, C, H, W), in [0, 1]; rows, columns >= 2.
        extent: (left, right, bottom, top), the centres of the outermost images; left < right, bottom < top.
        title: Title of the figure.
        ax: Axes to draw in; by default of a new figure.

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
        raise ValueError(f"images must have at least 2 rows and 2 columns; got {rows} and {columns}")
    corners = finite_array("extent", extent)
    if corners.shape != (4,) or corners[0] >= corners[1] or corners[2] >= corners[3]:
        raise ValueError(
            f"extent must be (left, right, bottom, top), left < right and bottom < top; got {extent}"
        )
    left, right, bottom, top = corners.tolist()
    # The extent of the axes ends at the images' edges, half a step beyond their centres.
    half_width, half_height = (right - left) / (columns - 1) / 2, (top - bottom) / (rows - 1) / 2
    edges = (left - half_width, right + half_width, bottom - half_height, top + half_height)
    axes = _draw(tiles[::-1], title, ax, extent=edges)
    axes.set(xlabel="z[0]", ylabel="z[1]")
    return axes


def _images(name: str, value: Numbers, leading: str) -> Array:
    """Return images as (*leading, C, H, W); raise unless they have such a shape and lie in [0, 1]."""
    images = finite_array(name, value)
    lead = leading.count(",") + 1
    if images.ndim == lead + 2:
        images = np.expand_dims(images, lead)
    if images.ndim != lead + 3 or images.shape[lead] not in (1, 3) or images.size == 0:
        raise ValueError(
            f"{name} must have shape ({leading}, H, W) or ({leading}, C, H, W) with C = 1 or 3 channels, "
            f"and no size 0; got {tuple(np.shape(value))}"
        )
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {low:g} to {high:g}: rescale or clamp them first")
    return images


def _opaque(images: Array) -> Array:
    """Return images (..., C, H, W) as opaque tiles (..., 4, H, W)."""
    *lead, _, height, width = images.shape
    colours = np.broadcast_to(images, (*lead, 3, height, width))
    return np.concatenate([colours, np.ones((*lead, 1, height, width))], axis=-3)


def _in_rows(tiles: Array, columns: int) -> Array:
    """Return tiles (N, 4, H, W) as (rows, columns, 4, H, W), padding the last row with transparent ones."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    rows = -(-len(tiles) // columns)
    blanks = np.zeros((rows * columns - len(tiles), *tiles.shape[1:]))
    return np.concatenate([tiles, blanks]).reshape(rows, columns, *tiles.shape[1:])


def _gap(tiles: Array) -> int:
    """Return the number of pixels between two tiles."""
    return max(1, tiles.shape[-1] // 12)


def _draw_stacks(
    layers: Sequence[Array],
    names: Sequence[str],
    *,
    columns: int,
    title: str,
    ax: "Axes | None",
) -> "Axes":
    """Draw tiles (N, 4, H, W) above others of the same shape, and name each kind at each row."""
    count, _, height, _ = layers[0].shape
    # a transparent line between the images of a stack
    stacks = np.concatenate([np.pad(tiles, [(0, 0), (0, 0), (0, 1), (0, 0)]) for tiles in layers], axis=2)
    stacks = _in_rows(stacks[:, :, :-1], min(columns, count))
    axes = _draw(stacks, title, ax)
    starts = np.arange(len(stacks)) * (stacks.shape[3] + _gap(stacks))
    tops = np.add.outer(starts, np.arange(len(layers)) * (height + 1)).ravel()
    axes.set_yticks(tops + (height - 1) / 2, list(names) * len(stacks))
    return axes


def _draw(
    tiles: Array, title: str, ax: "Axes | None", *, extent: tuple[float, float, float, float] | None = None
) -> "Axes":
    """Draw tiles (rows, columns, 4, H, W) as one image: with gaps, or without gaps in an `extent`."""
    gap = _gap(tiles) if extent is None else 0
    rows, columns, _, height, width = tiles.shape
    spaced = np.pad(tiles, [(0, 0)] * 3 + [(0, gap)] * 2)
    canvas = spaced.transpose(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), 4)
    canvas = canvas[: rows * (height + gap) - gap, : columns * (width + gap) - gap]

    height, width = canvas.shape[:2]
    inches = min(float(np.clip(0.75 * columns, 3, 8)), 9 * width / height)  # width of the canvas
    axes = axes_of(ax, max(3, inches + 0.5), inches * height / width + 0.5)
    if extent is None:
        axes.imshow(canvas, origin="upper")
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    else:
        left, right, bottom, top = extent
        pixels_are_square = (right - left) / width / ((top - bottom) / height)
        axes.imshow(canvas, origin="upper", extent=extent, aspect=pixels_are_square)
    axes.set_title(title)
    return axes
