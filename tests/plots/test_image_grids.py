"""Image grids: every pixel drawn is the given one, in the documented place."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch
from figures import images

from pyro_vae import plots


def drawn_image(ax):
    [image] = ax.images
    return np.asarray(image.get_array())


def tile(canvas, row, column, height, width):
    """Cut a tile out of a canvas whose gaps are one pixel, as they are for such small tiles."""
    top, left = row * (height + 1), column * (width + 1)
    return canvas[top : top + height, left : left + width]


def assert_shows(canvas, image):
    """Assert that the canvas shows the image (C, H, W) as an opaque (H, W, 4)."""
    colour = np.broadcast_to(np.asarray(image, dtype=float), (3, *image.shape[1:])).transpose(1, 2, 0)
    np.testing.assert_array_equal(canvas[..., :3], colour)
    assert (canvas[..., 3] == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_shows_every_image_in_reading_order(channels):
    x = images(7, channels, 5, 4)
    canvas = drawn_image(plots.image_grid(x, columns=3))
    assert canvas.shape == (3 * 5 + 2, 3 * 4 + 2, 4)
    for n, image in enumerate(x):
        assert_shows(tile(canvas, n // 3, n % 3, 5, 4), image)
    opaque = canvas[..., 3].sum()
    assert opaque == 7 * 5 * 4  # gaps and the empty places are transparent


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 3), (9, 3), (10, 4)])
def test_image_grid_is_about_square(count, columns):
    assert drawn_image(plots.image_grid(images(count, 6, 5))).shape[1] == columns * 5 + columns - 1


def test_images_are_drawn_upright_whatever_the_settings():
    with matplotlib.rc_context({"image.origin": "lower", "image.cmap": "jet"}):
        ax = plots.image_grid(images(1, 6, 5))
    assert ax.images[0].origin == "upper"


@pytest.mark.parametrize(
    "value",
    [
        images(2, 4, 3).to(torch.bfloat16).requires_grad_(),
        images(2, 4, 3) > 0.5,
        (images(2, 4, 3) > 0.5).long(),
        images(2, 4, 3).numpy().astype(np.float16),
        images(2, 4, 3).tolist(),
    ],
    ids=["bfloat16 with gradient", "bool", "integers", "float16", "lists"],
)
def test_images_of_any_numeric_type(value):
    expected = torch.as_tensor(value).detach().double()
    assert_shows(drawn_image(plots.image_grid(value[:1])), expected[:1])


def test_reconstructions_stand_below_their_originals():
    x, x_hat = images(5, 1, 6, 4), images(5, 1, 6, 4).flip(0)
    ax = plots.reconstructions(x, x_hat, columns=2)
    canvas = drawn_image(ax)
    assert canvas.shape[:2] == (3 * (2 * 6 + 1) + 2, 2 * 4 + 1)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["original", "reconstruction"] * 3
    for row, (centre, label) in enumerate(zip(ax.get_yticks(), labels, strict=True)):
        top = int(centre - 2.5)
        source = {"original": x, "reconstruction": x_hat}[label]
        for column in range(2):
            n = 2 * (row // 2) + column
            if n < 5:
                assert_shows(canvas[top : top + 6, 5 * column : 5 * column + 4], source[n])


def test_bits_stand_between_originals_and_reconstructions():
    x, x_hat = images(5, 1, 6, 4), images(5, 1, 6, 4).flip(0)
    ax = plots.reconstructions(x, x_hat, binarized=x.round(), columns=3)
    canvas = drawn_image(ax)
    assert canvas.shape[:2] == (2 * (3 * 6 + 2) + 1, 3 * 4 + 2)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["original", "binarised", "reconstruction"] * 2
    for row, centre in enumerate(ax.get_yticks()):
        top, source = int(centre - 2.5), (x, x.round(), x_hat)[row % 3]
        for column in range(3 if row < 3 else 2):
            n = 3 * (row // 3) + column
            assert_shows(canvas[top : top + 6, 5 * column : 5 * column + 4], source[n])


def test_a_heat_map_is_darkest_where_values_are_lowest():
    x, values = images(3, 1, 6, 4), torch.zeros(3, 1, 6, 4)
    values[1, 0, 2, 3] = -5.0
    values[2, 0, 4, 1] = 1.0
    ax = plots.heat_map(x, values)
    canvas = drawn_image(ax)
    assert canvas.shape[:2] == (2 * 6 + 1, 3 * 4 + 2)
    assert_shows(canvas[:6, 5:9], x[1])
    brightness = canvas[7:, :, :3].sum(2) + 9 * (canvas[7:, :, 3] == 0)  # gaps are transparent
    assert np.unravel_index(brightness.argmin(), brightness.shape) == (2, 5 + 3)
    brightness[canvas[7:, :, 3] == 0] = 0
    assert np.unravel_index(brightness.argmax(), brightness.shape) == (4, 10 + 1)
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "log p(x|z) per pixel (nats)"
    assert bar.get_ylim() == (-5, 1)


def test_few_reconstructions_leave_no_empty_columns():
    assert drawn_image(plots.reconstructions(images(3, 6, 5), images(3, 6, 5))).shape[1] == 3 * 5 + 2


def test_interpolation_has_a_row_for_each_path():
    paths = images(2, 5, 3, 6, 4)
    ax = plots.interpolation(paths)
    for path, step in itertools.product(range(2), range(5)):
        assert_shows(tile(drawn_image(ax), path, step, 6, 4), paths[path, step])
    assert dict(zip([text.get_text() for text in ax.get_xticklabels()], ax.get_xticks(), strict=True)) == {
        "start": 1.5,
        "end": 4 * 5 + 1.5,
    }


def test_manifold_puts_each_image_at_its_coordinates():
    grid = images(3, 5, 6, 4)
    z0, z1 = np.linspace(-2, 4, 5), np.linspace(10, 11, 3)
    ax = plots.manifold(grid, (-2, 4, 10, 11))
    canvas = drawn_image(ax)
    assert canvas.shape == (3 * 6, 5 * 4, 4)
    left, right, bottom, top = ax.images[0].get_extent()
    assert ax.images[0].origin == "upper"  # the first row of the canvas is the top
    for i, j in itertools.product(range(3), range(5)):
        x = (z0[j] - left) / (right - left) * canvas.shape[1]  # the centre, in pixels from the corner
        y = (top - z1[i]) / (top - bottom) * canvas.shape[0]
        assert x - 2 == pytest.approx(4 * j, abs=1e-9)
        first_row, first_column = round(y - 3), round(x - 2)
        assert_shows(canvas[first_row : first_row + 6, first_column : first_column + 4], grid[i, j][None])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
    ax.figure.draw_without_rendering()
    size = ax.bbox
    assert size.width / 20 == pytest.approx(size.height / 18, rel=1e-6)  # square pixels


# ---- bad input

NAN, INF = math.nan, math.inf
X = images(3, 6, 5)

BAD_INPUT = {
    "flat images": (lambda: plots.image_grid(images(3, 30)), ValueError, r"\(N, H, W\) or .*got \(3, 30\)"),
    "channels last": (
        lambda: plots.image_grid(images(3, 6, 5, 3)),
        ValueError,
        r"1 or 3 channels.*\(3, 6, 5, 3\)",
    ),
    "no images": (lambda: plots.image_grid(images(0, 6, 5)), ValueError, r"no size 0; got \(0, 6, 5\)"),
    "grey levels to 255": (
        lambda: plots.image_grid(X * 255),
        ValueError,
        r"images must lie in \[0, 1\]; got",
    ),
    "below 0": (lambda: plots.image_grid(X - 0.5), ValueError, "rescale or clamp"),
    "NaN": (
        lambda: plots.image_grid(torch.where(torch.arange(90).reshape(3, 6, 5) == 43, NAN, X)),
        ValueError,
        r"nan at index \(1, 2, 3\), 1 ",
    ),
    "no numbers": (lambda: plots.image_grid([[["a"]]]), TypeError, "images must hold real numbers"),
    "complex": (lambda: plots.image_grid(X * 1j), TypeError, "complex"),
    "no columns": (lambda: plots.image_grid(X, columns=0), ValueError, "columns must be at least 1; got 0"),
    "fewer reconstructions": (
        lambda: plots.reconstructions(X, X[:2]),
        ValueError,
        "3 originals .* 2 reconstructions",
    ),
    "fewer bits": (
        lambda: plots.reconstructions(X, X, binarized=X[:2]),
        ValueError,
        "3 originals .* 2 binarized",
    ),
    "other size": (lambda: plots.reconstructions(X, X[:, :4]), ValueError, r"\(6, 5\) pixels .* \(4, 5\)"),
    "bad reconstruction": (
        lambda: plots.reconstructions(X, X * INF),
        ValueError,
        "reconstructions must be finite",
    ),
    "other map": (lambda: plots.heat_map(X, X[:, :4]), ValueError, "values must have the shape of images"),
    "bad map": (lambda: plots.heat_map(X, X * INF), ValueError, "values must be finite"),
    "no path": (lambda: plots.interpolation(X), ValueError, r"\(P, T, H, W\)"),
    "path of one image": (lambda: plots.interpolation(X[:, None]), ValueError, "at least 2 images"),
    "no grid": (lambda: plots.manifold(X, (0, 1, 0, 1)), ValueError, r"\(rows, columns, H, W\)"),
    "one row": (lambda: plots.manifold(X[None], (0, 1, 0, 1)), ValueError, "got 1 and 3"),
    "extent upside down": (
        lambda: plots.manifold(images(2, 3, 6, 5), (0, 1, 1, 0)),
        ValueError,
        "bottom < top",
    ),
    "extent too short": (
        lambda: plots.manifold(images(2, 3, 6, 5), (0, 1)),
        ValueError,
        "left, right, bottom, top",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_raises_an_error_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
