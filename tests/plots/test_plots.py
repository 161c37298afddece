"""Rules for all figures: one Axes, no overlapping text, no side effects, a colour-blind safe palette."""

import itertools
import pickle
import subprocess
import sys
import textwrap

import matplotlib
import numpy as np
import pytest
import torch
from figures import HISTORY, images, normal
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pyro_vae import plots

SNR = (
    [1, 100, 10, 5],
    [0.2, 1.1, 0.4, 0.0],
    [0.1, 0.2, 0.1, 0.3],
    ["IWAE(S)", "DReG(S)", "DReG(S)", "VIMCO(S)"],
)

FIGURES = {
    "image_grid": lambda **kw: plots.image_grid(images(7, 3, 5, 4), **kw),
    "reconstructions": lambda **kw: plots.reconstructions(images(23, 1, 6, 5), images(23, 1, 6, 5), **kw),
    "reconstructions in one column": lambda **kw: plots.reconstructions(
        images(12, 6, 5), images(12, 6, 5), columns=1, **kw
    ),
    "heat_map": lambda **kw: plots.heat_map(images(7, 3, 6, 5), -images(7, 3, 6, 5), **kw),
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
    "snr": lambda **kw: plots.snr(*SNR, **kw),
    "pareto_k_histogram": lambda **kw: plots.pareto_k_histogram(normal(53) / 3 + 0.4, **kw),
}

every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def test_public_names():
    charts = {"aggregate_posterior", "kl_per_dimension", "latent_scatter", "pareto_k_histogram", "snr"}
    grids = {"heat_map", "image_grid", "interpolation", "manifold", "reconstructions"}
    assert set(plots.__all__) == charts | grids | {"PALETTE", "save", "training_curves"}
    assert all(hasattr(plots, name) for name in plots.__all__)


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


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"snr"}))
def test_has_a_title_that_can_be_replaced(name):
    draw = FIGURES[name]
    assert draw().get_title()
    assert draw(title="Another").get_title() == "Another"


@every_figure
def test_changes_no_setting_and_no_random_state(draw):
    def state():
        return matplotlib.rcParams.copy(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # an earlier test may have changed them
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


def test_a_notebook_shows_the_figure_as_it_is_then():
    ax = plots.latent_scatter([[0.0, 1.0], [2.0, 3.0]], [4, 5])
    first = ax._repr_png_()
    assert first.startswith(b"\x89PNG")
    ax.set_title("Another title")
    assert ax._repr_png_() != first
    copy = pickle.loads(pickle.dumps(ax))
    assert copy._repr_png_() == ax._repr_png_()
    assert not hasattr(plots.latent_scatter([[0.0, 1.0]], ax=Figure().add_subplot()), "_repr_png_")


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
