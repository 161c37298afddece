"""Figures: what is drawn equals what was given, nothing is clipped, and nothing is left behind."""

import itertools
import math
import subprocess
import sys
import textwrap

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from pyro_vae import plots


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


HISTORY = {
    "epoch": [1, 2, 3, 4],
    "train_bound": [-200.0, -150.0, -130.0, -120.0],
    "train_bound_se": [4.0, 3.0, 2.0, 1.0],
    "validation_elbo": [math.nan, -155.0, math.nan, -125.0],
    "validation_elbo_se": [math.nan, 5.0, math.nan, math.nan],
    "learning_rate": [1e-3, 1e-3, 1e-4, 1e-4],
}

FIGURES = {
    "image_grid": lambda **kw: plots.image_grid(images(7, 3, 5, 4), **kw),
    "reconstructions": lambda **kw: plots.reconstructions(images(23, 1, 6, 5), images(23, 1, 6, 5), **kw),
    "reconstructions in one column": lambda **kw: plots.reconstructions(
        images(12, 6, 5), images(12, 6, 5), columns=1, **kw
    ),
    "interpolation": lambda **kw: plots.interpolation(images(3, 7, 6, 5), **kw),
    "manifold": lambda **kw: plots.manifold(images(4, 9, 6, 5), (-3, 3, -2, 2), **kw),
    "latent_scatter": lambda **kw: plots.latent_scatter(normal(31, 2), **kw),
    "latent_scatter of many labels": lambda **kw: plots.latent_scatter(
        normal(310, 5), torch.arange(310) % 62, **kw
    ),
    "aggregate_posterior": lambda **kw: plots.aggregate_posterior(normal(101, 13), **kw),
    "kl_per_dimension": lambda **kw: plots.kl_per_dimension(normal(20).exp(), normal(20).exp() / 9, **kw),
    "kl_per_dimension of many": lambda **kw: plots.kl_per_dimension(normal(101).exp(), **kw),
    "training_curves": lambda **kw: plots.training_curves(HISTORY, references={"exact": -110.0}, **kw),
    "training_curves of one epoch": lambda **kw: plots.training_curves(
        {name: column[:1] for name, column in HISTORY.items()}, **kw
    ),
    "pareto_k_histogram": lambda **kw: plots.pareto_k_histogram(normal(53) / 3 + 0.4, **kw),
}

every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


# ---- what holds for every figure


@every_figure
def test_draws_in_the_given_axes_or_in_a_figure_of_its_own(draw):
    ax = Figure().subplots(1, 2)[1]
    assert draw(ax=ax) is ax
    assert ax.has_data()
    assert not ax.figure.axes[0].has_data()
    own = draw()
    assert isinstance(own, Axes)
    assert own.figure.axes == [own]
    assert own.figure.canvas.manager is None  # unknown to pyplot
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes; got Figure"):
        draw(ax=Figure())


@every_figure
def test_has_a_title_that_can_be_replaced(draw):
    assert draw().get_title()
    assert draw(title="Another").get_title() == "Another"


@every_figure
def test_changes_no_setting_and_no_random_state(draw):
    def state():
        return matplotlib.rcParams.copy(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a figure before this one may have set
        before = state()
        draw().figure.draw_without_rendering()
        assert state() == before


@every_figure
def test_text_is_neither_clipped_nor_overlapping(draw):
    ax = draw()
    ax.figure.draw_without_rendering()
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label]
    texts += [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
    texts += [label for label in ax.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    if ax.get_legend():
        boxes.append(ax.get_legend().get_window_extent())
    for box in boxes:
        assert -1 <= box.x0 <= box.x1 <= ax.figure.bbox.x1 + 1
        assert -1 <= box.y0 <= box.y1 <= ax.figure.bbox.y1 + 1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))


def test_import_is_light_and_drawing_needs_neither_pyplot_nor_a_display(tmp_path):
    code = """
        import os, sys
        for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
            os.environ.pop(name, None)
        import pyro_vae, pyro_vae.plots as plots
        assert not any(name.split(".")[0] == "matplotlib" for name in sys.modules)
        plots.save(plots.latent_scatter([[0.0, 1.0], [2.0, 3.0]], [4, 5]), "scatter.png")
        assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)
    assert (tmp_path / "scatter.png").stat().st_size > 0


# ---- pictures


def picture(ax):
    [image] = ax.images
    return np.asarray(image.get_array())


def tile(canvas, row, column, height, width):
    """Tiles as small as here stand one pixel apart."""
    top, left = row * (height + 1), column * (width + 1)
    return canvas[top : top + height, left : left + width]


def assert_shows(canvas, image):
    """Image (C, H, W) as an opaque (H, W, 4)."""
    colour = np.broadcast_to(np.asarray(image, dtype=float), (3, *image.shape[1:])).transpose(1, 2, 0)
    np.testing.assert_array_equal(canvas[..., :3], colour)
    assert (canvas[..., 3] == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_shows_every_image_in_reading_order(channels):
    x = images(7, channels, 5, 4)
    canvas = picture(plots.image_grid(x, columns=3))
    assert canvas.shape == (3 * 5 + 2, 3 * 4 + 2, 4)
    for n, image in enumerate(x):
        assert_shows(tile(canvas, n // 3, n % 3, 5, 4), image)
    opaque = canvas[..., 3].sum()
    assert opaque == 7 * 5 * 4  # gaps and the empty places are transparent


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 3), (9, 3), (10, 4)])
def test_image_grid_is_about_square(count, columns):
    assert picture(plots.image_grid(images(count, 6, 5))).shape[1] == columns * 5 + columns - 1


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
    assert_shows(picture(plots.image_grid(value[:1])), expected[:1])


def test_reconstructions_stand_below_their_originals():
    x, x_hat = images(5, 1, 6, 4), images(5, 1, 6, 4).flip(0)
    ax = plots.reconstructions(x, x_hat, columns=2)
    canvas = picture(ax)
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


def test_few_reconstructions_leave_no_empty_columns():
    assert picture(plots.reconstructions(images(3, 6, 5), images(3, 6, 5))).shape[1] == 3 * 5 + 2


def test_interpolation_has_a_row_for_each_path():
    paths = images(2, 5, 3, 6, 4)
    ax = plots.interpolation(paths)
    for path, step in itertools.product(range(2), range(5)):
        assert_shows(tile(picture(ax), path, step, 6, 4), paths[path, step])
    assert dict(zip([text.get_text() for text in ax.get_xticklabels()], ax.get_xticks(), strict=True)) == {
        "start": 1.5,
        "end": 4 * 5 + 1.5,
    }


def test_manifold_puts_each_image_at_its_coordinates():
    grid = images(3, 5, 6, 4)
    z0, z1 = np.linspace(-2, 4, 5), np.linspace(10, 11, 3)
    ax = plots.manifold(grid, (-2, 4, 10, 11))
    canvas = picture(ax)
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


# ---- points


def test_scatter_draws_each_point_in_its_colour():
    z, labels = normal(23, 2), torch.arange(23) % 10
    ax = plots.latent_scatter(z, labels)
    points = ax.collections[0]
    drawn = {
        tuple(xy): tuple(rgba[:3])
        for xy, rgba in zip(points.get_offsets(), points.get_facecolors(), strict=True)
    }
    assert drawn == {tuple(xy.tolist()): to_rgb(plots.PALETTE[k]) for xy, k in zip(z, labels, strict=True)}
    assert not np.array_equal(points.get_offsets(), z)  # shuffled
    again = plots.latent_scatter(z, labels).collections[0]
    np.testing.assert_array_equal(points.get_offsets(), again.get_offsets())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [str(k) for k in range(10)]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_aspect()) == ("z[0]", "z[1]", 1)
    assert ax.get_title() == "23 latent vectors"


def test_labels_beyond_the_palette_differ_by_marker():
    z = normal(25, 2)
    ax = plots.latent_scatter(z, torch.arange(25))
    for first, points in zip([0, 10, 20], ax.collections, strict=False):
        expected = sorted(map(tuple, z[first : first + 10].tolist()))
        assert sorted(map(tuple, points.get_offsets().tolist())) == expected
    handles, texts = ax.get_legend().legend_handles, ax.get_legend().get_texts()
    looks = {
        (tuple(handle.get_facecolor()[0]), handle.get_paths()[0].vertices.tobytes()) for handle in handles
    }
    assert len(looks) == len(texts) == 25


def test_colour_of_a_label_does_not_depend_on_the_other_labels():
    [points, *_] = plots.latent_scatter([[0.0, 1.0]], [7]).collections
    np.testing.assert_array_equal(points.get_facecolors()[0], to_rgba(plots.PALETTE[7], alpha=0.7))


def test_scatter_without_labels_has_no_legend():
    assert plots.latent_scatter(normal(23, 2)).get_legend() is None


def test_many_dimensions_are_shown_by_principal_components_and_say_so():
    z = normal(41, 4) * torch.tensor([0.1, 3.0, 1.0, 0.2]) + 5
    ax = plots.latent_scatter(z)
    centred = z - z.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (u * s)[:, :2].abs().numpy()
    shown = np.abs(ax.collections[0].get_offsets())
    np.testing.assert_allclose(np.sort(shown, axis=0), np.sort(expected, axis=0), atol=1e-10)
    share = s**2 / (s**2).sum()
    assert ax.get_xlabel() == f"principal component 1 ({share[0]:.0%} of the variance)"
    assert ax.get_ylabel() == f"principal component 2 ({share[1]:.0%} of the variance)"
    assert ax.get_title() == "First two principal components of 41 latent vectors"


# Machado, Oliveira and Fernandes, 2009: how linear RGB looks without one kind of cone
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_palette_is_safe_for_colour_blind_readers(sight):
    rgb = np.array([to_rgb(colour) for colour in plots.PALETTE])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHT[sight]).T, 0, 1)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = seen @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.diag([np.inf] * 10)
    okabe_ito, added = distance[:8, :8].min(), distance[8:].min()
    assert added >= okabe_ito > 15


# ---- charts


def test_aggregate_posterior_is_a_histogram_beside_the_standard_normal():
    z = normal(401, 3) * torch.tensor([1.0, 0.3, 2.0])
    ax = plots.aggregate_posterior(z, dims=[2, 0])
    for row, k in enumerate([2, 0]):
        q, p = (patch.get_data() for patch in ax.patches[2 * row : 2 * row + 2])
        assert q.baseline == -row
        density, edges = np.histogram(z[:, k], bins="scott", density=True)
        np.testing.assert_array_equal(q.edges, edges)
        scale = (q.values + row).max() / density.max()
        np.testing.assert_allclose(q.values + row, scale * density, atol=1e-12)
        centre = (p.edges[1:] + p.edges[:-1]) / 2
        normal_density = np.exp(-(centre**2) / 2) / math.sqrt(2 * math.pi)
        np.testing.assert_allclose(p.values + row, scale * normal_density, atol=1e-12)
        assert 0 < q.values.max() + row < 1  # below the next row
        assert 0 < p.values.max() + row < 1
    assert [text.get_text() for text in ax.get_yticklabels()] == ["z[2]", "z[0]"]
    assert list(ax.get_yticks()) == [0, -1]
    assert ax.get_xlim()[0] < z[:, [0, 2]].min() < z[:, [0, 2]].max() < ax.get_xlim()[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["q(z)", "p(z)"]


def test_aggregate_posterior_against_samples_of_another_prior():
    z, prior = normal(401, 2), 3 * normal(203, 2)
    p = plots.aggregate_posterior(z, prior=prior).patches[3].get_data()
    density, edges = np.histogram(prior[:, 1], bins="scott", density=True)
    np.testing.assert_array_equal(p.edges, edges)
    shape = (p.values + 1) / density.max()
    np.testing.assert_allclose(shape, shape.max() * density / density.max(), atol=1e-12)


def test_kl_is_sorted_and_the_inactive_are_shaded():
    ax = plots.kl_per_dimension([0.3, 0.05, 2.0, 0.01, 0.7], [0.1, 0.2, 0.3, 0.0, 0.5], threshold=0.05)
    [errors, bars] = sorted(ax.containers, key=lambda container: type(container).__name__, reverse=True)
    assert [bar.get_height() for bar in bars] == [2.0, 0.7, 0.3, 0.05, 0.01]
    segments = errors.lines[2][0].get_segments()
    np.testing.assert_allclose([high - low for (_, low), (_, high) in segments], [0.6, 1.0, 0.2, 0.4, 0.0])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "4", "0", "1", "3"]
    shade = ax.patches[-1]
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (2.5, 4.5)
    assert next(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--") == 0.05
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["threshold: 0.05 nats", "inactive: 2 of 5"]
    assert ax.get_ylabel() == "nats per datum ± SE"


def test_training_curves_draw_what_was_measured():
    ax = plots.training_curves(HISTORY, references={"exact": -110.0, "published": -112.0})
    train, validation = ax.lines[:2]
    np.testing.assert_array_equal(train.get_xydata().T, [HISTORY["epoch"], HISTORY["train_bound"]])
    np.testing.assert_array_equal(validation.get_xydata(), [[2, -155], [4, -125]])
    train_band, validation_band = (
        band.get_paths()[0].vertices for band in ax.collections if band.get_facecolor().size
    )
    for epoch, mean, se in zip(
        HISTORY["epoch"], HISTORY["train_bound"], HISTORY["train_bound_se"], strict=True
    ):
        heights = set(train_band[train_band[:, 0] == epoch, 1])
        assert heights == {mean - se, mean + se}
    assert set(validation_band[:, 1]) == {-160, -150}
    levels = {
        line.get_label(): line.get_ydata()[0]
        for line in ax.lines
        if line.get_label() in ("exact", "published")
    }
    assert levels == {"exact": -110, "published": -112}
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert legend == {"train bound ± SE", "validation ELBO ± SE", "exact", "published"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per datum")


def test_training_curves_without_validation_or_standard_errors():
    nothing = [math.nan] * 2
    table = {"epoch": [3, 4], "train_elbo": [-2.0, -1.0], "validation_elbo": nothing}
    ax = plots.training_curves(table)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train ELBO"]


def test_training_curves_of_one_epoch_mark_that_epoch_alone():
    ax = FIGURES["training_curves of one epoch"]()
    left, right = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if left <= tick <= right] == [1]
    [error_bars] = ax.containers
    assert error_bars.lines[2][0].get_segments()[0].tolist() == [[1, -204], [1, -196]]


def test_pareto_k_counts_every_value_on_its_side_of_the_limits():
    k = np.concatenate([np.arange(-20, 40) * 0.05, [0.5, 0.7, 0.499, 0.701]])
    ax = plots.pareto_k_histogram(k)
    good, usable, bad = ([bar.get_height() for bar in container] for container in ax.containers)
    below = (k < 0.5).sum()
    above = (k > 0.7).sum()
    assert (sum(good), sum(usable), sum(bad)) == (below, len(k) - below - above, above)
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 0.7]
    edges = {round(bar.get_x(), 9) for bar in ax.containers[0]}
    assert {0.5, 0.7} <= edges
    counts = [text.get_text().rsplit(": ")[1] for text in ax.get_legend().get_texts()]
    assert counts == [f"{n} ({n / len(k):.0%})" for n in (below, len(k) - below - above, above)]
    assert ax.get_title() == f"Importance weights of {len(k)} data"


@pytest.mark.parametrize("k", [[0.5], [-0.2, -0.2], [1e6, -5.0]], ids=["one", "equal", "far apart"])
def test_pareto_k_of_odd_data(k):
    ax = plots.pareto_k_histogram(k)
    assert sum(bar.get_height() for container in ax.containers for bar in container) == len(k)
    assert sum(len(container) for container in ax.containers) < 1000


# ---- saving


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_save_writes_the_format_of_the_suffix(tmp_path, suffix, start):
    plots.save(FIGURES["kl_per_dimension"](), tmp_path / f"kl{suffix}")
    assert (tmp_path / f"kl{suffix}").read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 1


def test_save_accepts_axes_of_a_subfigure(tmp_path):
    ax = Figure().subfigures(1, 2)[1].add_subplot()
    plots.save(plots.kl_per_dimension([1.0], ax=ax), str(tmp_path / "kl.png"))
    assert (tmp_path / "kl.png").exists()


def test_save_that_fails_leaves_the_earlier_picture_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "kl.png"
    path.write_bytes(b"earlier")

    def full_disk(self, file, **options):
        file.write_bytes(b"half a pict")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plots.save(plots.kl_per_dimension([1.0]), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"kl.png": b"earlier"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("kl", ValueError, "needs a suffix that names the format"),
        ("kl.docx", ValueError, "docx"),
        ("missing/kl.png", FileNotFoundError, "missing"),
    ],
)
def test_save_to_an_impossible_path(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        plots.save(plots.kl_per_dimension([1.0]), tmp_path / name)
    assert not list(tmp_path.iterdir())


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
    "no images": (lambda: plots.image_grid(images(0, 6, 5)), ValueError, r"none of it 0; got \(0, 6, 5\)"),
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
    "other size": (lambda: plots.reconstructions(X, X[:, :4]), ValueError, r"\(6, 5\) pixels .* \(4, 5\)"),
    "bad reconstruction": (
        lambda: plots.reconstructions(X, X * INF),
        ValueError,
        "reconstructions must be finite",
    ),
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
    "one latent dimension": (lambda: plots.latent_scatter(normal(5, 1)), ValueError, "K >= 2; got .5, 1."),
    "no latent vector": (lambda: plots.latent_scatter(normal(0, 2)), ValueError, "N >= 1"),
    "NaN in z": (
        lambda: plots.latent_scatter([[0, 1], [2, NAN]]),
        ValueError,
        r"z must be finite; got nan at .* \(1, 1\)",
    ),
    "labels too few": (
        lambda: plots.latent_scatter(normal(5, 2), [0, 1]),
        ValueError,
        r"shape \(5,\).*got \(2,\)",
    ),
    "real labels": (
        lambda: plots.latent_scatter(normal(2, 2), [0.0, 1.0]),
        TypeError,
        "labels must be integers; got float",
    ),
    "negative label": (
        lambda: plots.latent_scatter(normal(2, 2), [0, -1]),
        ValueError,
        "0 to 99; got -1 at index 1",
    ),
    "label 100": (
        lambda: plots.latent_scatter(normal(2, 2), [100, 0]),
        ValueError,
        "0 to 99; got 100 at index 0",
    ),
    "label without a name": (
        lambda: plots.latent_scatter(normal(2, 2), [0, 2], names=["a", "b"]),
        ValueError,
        r"0 to 1 \(2 names\); got 2 at index 1",
    ),
    "label 100 with a name": (
        lambda: plots.latent_scatter(normal(2, 2), [0, 100], names=["a"] * 101),
        ValueError,
        "0 to 99 .101 names.; got 100",
    ),
    "flat z": (lambda: plots.aggregate_posterior(normal(5)), ValueError, r"\(N, K\)"),
    "no such dimension": (
        lambda: plots.aggregate_posterior(normal(5, 3), dims=[0, 3]),
        ValueError,
        "0 to 2; got .0, 3.",
    ),
    "negative dimension": (lambda: plots.aggregate_posterior(normal(5, 3), dims=[-1]), ValueError, "0 to 2"),
    "no dimension": (lambda: plots.aggregate_posterior(normal(5, 3), dims=[]), ValueError, "0 to 2"),
    "other prior": (
        lambda: plots.aggregate_posterior(normal(5, 3), prior=normal(5, 2)),
        ValueError,
        r"shape \(M, 3\).*got \(5, 2\)",
    ),
    "KL per datum": (lambda: plots.kl_per_dimension(normal(5, 3)), ValueError, r"shape \(K,\).*got \(5, 3\)"),
    "infinite KL": (lambda: plots.kl_per_dimension([0.1, INF]), ValueError, "kl must be finite; got inf"),
    "negative SE": (
        lambda: plots.kl_per_dimension([0.1, 0.2], [0.1, -0.1]),
        ValueError,
        "se must be non-negative",
    ),
    "SE of another length": (lambda: plots.kl_per_dimension([0.1, 0.2], [0.1]), ValueError, "of kl's shape"),
    "no threshold": (
        lambda: plots.kl_per_dimension([0.1], threshold=0),
        ValueError,
        "threshold must be .* got 0",
    ),
    "no epoch": (lambda: plots.training_curves({"train_elbo": [1.0]}), ValueError, '"epoch"; got train_elbo'),
    "no curve": (
        lambda: plots.training_curves({"epoch": [1], "loss": [1.0]}),
        ValueError,
        '"_elbo" or "_bound"',
    ),
    "no epochs": (
        lambda: plots.training_curves({"epoch": [], "train_elbo": []}),
        ValueError,
        "got train_elbo, of 0 epochs",
    ),
    "nothing measured": (
        lambda: plots.training_curves({"epoch": [1], "train_elbo": [NAN]}),
        ValueError,
        "holds a number",
    ),
    "lengths differ": (
        lambda: plots.training_curves({"epoch": [1, 2], "train_elbo": [1.0]}),
        ValueError,
        r"train_elbo must hold one number an epoch.*2; got shape \(1,\)",
    ),
    "infinite ELBO": (
        lambda: plots.training_curves({"epoch": [1], "train_elbo": [-INF]}),
        ValueError,
        "train_elbo must be finite; got -inf",
    ),
    "negative SE of a curve": (
        lambda: plots.training_curves({"epoch": [1], "train_elbo": [1.0], "train_elbo_se": [-1.0]}),
        ValueError,
        "train_elbo_se holds standard errors",
    ),
    "reference NaN": (
        lambda: plots.training_curves(HISTORY, references={"a": NAN}),
        ValueError,
        "a must be finite",
    ),
    "no k": (lambda: plots.pareto_k_histogram([]), ValueError, "k must have shape"),
    "infinite k": (
        lambda: plots.pareto_k_histogram([0.1, INF]),
        ValueError,
        "k must be finite; got inf at index .1,.",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
