"""Charts: what is drawn equals the given numbers."""

import math

import numpy as np
import pytest
import torch
from figures import HISTORY, normal
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from pyro_vae import plots

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
    ax = plots.latent_scatter(z, projection="principal")
    centred = z - z.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (u * s)[:, :2].abs().numpy()
    shown = np.abs(ax.collections[0].get_offsets())
    np.testing.assert_allclose(np.sort(shown, axis=0), np.sort(expected, axis=0), atol=1e-10)
    share = s**2 / (s**2).sum()
    assert ax.get_xlabel() == f"principal component 1 ({share[0]:.0%} of the variance)"
    assert ax.get_ylabel() == f"principal component 2 ({share[1]:.0%} of the variance)"
    assert ax.get_title() == "First two principal components of 41 latent vectors"


def test_t_sne_keeps_groups_together_that_principal_components_mix():
    labels = np.arange(240) % 12
    z = 4 * np.eye(12)[labels] + normal(240, 12).numpy()  # groups in twelve directions
    shuffled = np.random.default_rng(0).permutation(240)  # the documented, fixed order of the points

    def share_of_nearest_with_the_same_label(projection):
        points = plots.latent_scatter(z, projection=projection).collections[0].get_offsets()
        distance = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(240, np.inf))
        kinds = labels[shuffled]
        return (kinds[distance.argmin(1)] == kinds).mean()

    assert share_of_nearest_with_the_same_label("t-sne") > 0.9
    assert share_of_nearest_with_the_same_label("principal") < 0.5


def test_the_projection_is_named_and_the_same_each_time():
    z = normal(31, 5)
    ax = plots.latent_scatter(z)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("t-SNE 1", "t-SNE 2")
    assert ax.get_title() == "t-SNE of 31 latent vectors"
    again = plots.latent_scatter(z, projection="t-sne")
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), again.collections[0].get_offsets())
    assert plots.latent_scatter(z[:9]).get_xlabel().startswith("principal component 1")  # too few


def test_without_scikit_learn_points_lie_on_principal_components(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plots.latent_scatter(normal(31, 5)).get_xlabel().startswith("principal component 1")
    with pytest.raises(ImportError, match="needs scikit-learn: pip install scikit-learn"):
        plots.latent_scatter(normal(31, 5), projection="t-sne")


# ---- charts


def test_aggregate_posterior_is_a_histogram_against_the_standard_normal():
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


def test_a_legend_names_only_what_is_drawn():
    ax = plots.kl_per_dimension([0.3, 0.05, 2.0], threshold=0.04)
    assert ax.get_legend() is None
    assert ax.get_xlabel() == "latent dimension, sorted; all above 0.04 nats"
    [entry] = plots.pareto_k_histogram([0.8, 0.9]).get_legend().get_texts()
    assert entry.get_text() == r"not usable, $\hat{k} > 0.7$: 2 (100%)"


def test_training_curves_that_begin_late_say_so():
    late = {name: column[2:] for name, column in HISTORY.items()}
    assert plots.training_curves(late).get_xlabel() == "epoch (from 3)"


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


def test_training_curves_of_one_epoch_mark_only_that_epoch():
    ax = plots.training_curves({name: column[:1] for name, column in HISTORY.items()})
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


def test_snr_joins_the_estimators_of_a_family_in_order_of_particles():
    particles, families = [24, 1, 3, 3], ["DReG(S)", "STL(S)", "DReG(S)", "VIMCO(S)"]
    ax = plots.snr(
        particles, [0.8, 0.3, 0.5, math.nan], [0.1, 0.2, 0.1, math.nan], families, parameters="model"
    )
    assert ax.get_xscale() == ax.get_yscale() == "log"
    lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    assert list(lines) == ["as √S", "as 1/√S", "STL(S)", "DReG(S)"]
    np.testing.assert_array_equal(lines["DReG(S)"].lines[0].get_xydata(), [[3, 0.5], [24, 0.8]])
    [errors] = lines["DReG(S)"].lines[2]
    heights = [np.ptp(segment[:, 1]) for segment in errors.get_segments()]
    np.testing.assert_allclose(heights, [0.2, 0.2])
    assert errors.get_zorder() > lines["DReG(S)"].lines[0].get_zorder()  # seen on their markers
    for label, power in (("as √S", 0.5), ("as 1/√S", -0.5)):
        (left, right), (start, end) = lines[label].get_data()
        assert (left, right) == (1, 24)
        assert math.log(end / start) / math.log(right / left) == pytest.approx(power)
        assert start * end == pytest.approx((0.8 * 0.3 * 0.5) ** (2 / 3))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "3", "24"]
    assert ax.get_title() == "Gradient in the model's parameters"


def test_snr_of_0_is_an_arrow_from_its_standard_error():
    ax = plots.snr([1, 4], [0.5, 0.0], [0.1, 0.2], ["a", "b"])
    assert ax.get_title() == "Gradient in the guide's parameters (arrows: not distinguishable from 0)"
    [arrow] = [c for c in ax.containers if c.lines[0] is None and c.lines[2][0].get_segments()]
    np.testing.assert_allclose(arrow.lines[2][0].get_segments(), [[[4, 0.1], [4, 0.2]]])


def test_families_differ_in_colour_and_marker():
    looks = {
        (line.lines[0].get_color(), line.lines[0].get_marker())
        for line in plots.snr([1] * 90, [0.5] * 90, [0.1] * 90, [str(n) for n in range(90)]).containers
        if line.lines[0] is not None
    }
    assert len(looks) == 90


# ---- saving


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_save_writes_the_format_of_the_suffix(tmp_path, suffix, start):
    plots.save(plots.kl_per_dimension([1.0]), tmp_path / f"kl{suffix}")
    assert (tmp_path / f"kl{suffix}").read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 1


def test_save_accepts_axes_of_a_subfigure(tmp_path):
    ax = Figure().subfigures(1, 2)[1].add_subplot()
    plots.save(plots.kl_per_dimension([1.0], ax=ax), str(tmp_path / "kl.png"))
    assert (tmp_path / "kl.png").exists()


def test_save_that_fails_leaves_the_earlier_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "kl.png"
    path.write_bytes(b"earlier")

    def full_disk(self, file, **options):
        file.write_bytes(b"half an im")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plots.save(plots.kl_per_dimension([1.0]), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"kl.png": b"earlier"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("kl", ValueError, "path must have a suffix that names the format"),
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

BAD_INPUT = {
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
    "unknown projection": (
        lambda: plots.latent_scatter(normal(5, 3), projection="umap"),
        ValueError,
        'must be "t-sne" or "principal"; got .umap',
    ),
    "too few for t-SNE": (
        lambda: plots.latent_scatter(normal(9, 3), projection="t-sne"),
        ValueError,
        "needs 10 vectors or more; got 9: use projection='principal'",
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
    "SE of another length": (
        lambda: plots.kl_per_dimension([0.1, 0.2], [0.1]),
        ValueError,
        "have kl's shape",
    ),
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
        r"train_elbo must hold one number per epoch.*2; got shape \(1,\)",
    ),
    "infinite ELBO": (
        lambda: plots.training_curves({"epoch": [1], "train_elbo": [-INF]}),
        ValueError,
        "train_elbo must be finite; got -inf",
    ),
    "negative SE of a curve": (
        lambda: plots.training_curves({"epoch": [1], "train_elbo": [1.0], "train_elbo_se": [-1.0]}),
        ValueError,
        "train_elbo_se must hold non-negative standard errors",
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
    "parameters of neither": (
        lambda: plots.snr([1], [0.1], [0.1], ["a"], parameters="decoder"),
        ValueError,
        'parameters must be "model" or "guide"; got .decoder.',
    ),
    "no SNR": (lambda: plots.snr([1], [NAN], [NAN], ["a"]), ValueError, "guide .*nothing to draw"),
    "no estimator": (lambda: plots.snr([], [], [], []), ValueError, "nothing to draw"),
    "families too few": (
        lambda: plots.snr([1, 2], [0.1, 0.2], [0.1, 0.1], ["a"]),
        ValueError,
        r"families must have one shape \(M,\); got \(2,\), \(2,\), \(2,\) and 1",
    ),
    "half a particle": (
        lambda: plots.snr([1.5], [0.1], [0.1], ["a"]),
        ValueError,
        "positive integers; got .1.5",
    ),
    "no particles": (lambda: plots.snr([0], [0.1], [0.1], ["a"]), ValueError, "positive integers"),
    "negative SNR": (lambda: plots.snr([1], [-0.1], [0.1], ["a"]), ValueError, "snr and snr_se .* negative"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_raises_an_error_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
