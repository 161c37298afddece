"""Image sets in memory: indexing, binarisation, conversion from arrays, errors."""

import copy
import pickle

import numpy as np
import pytest
import torch

from pyro_vae.data.images import DataError, Images, from_array


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> Images:
    return Images(random_pixels(7, 3, 5, 4), torch.arange(7) % 3, "seven")


def test_values_are_the_grey_levels_over_255():
    images = Images(torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16))
    x = images[:]
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [float(np.float32(k) / np.float32(255)) for k in range(256)]


INDICES = [
    3,
    -1,
    slice(1, 6, 2),
    torch.tensor([5, 0, 5]),
    torch.tensor([2, 6], dtype=torch.int32),
    torch.tensor([True, False, True, False, False, False, True]),
    [4, 1],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexes_as_a_tensor_does(images, index):
    expected = images.pixels[index] / 255
    assert torch.equal(images[index], expected)
    assert torch.equal(images.batch(index), expected)
    if not isinstance(index, int):
        subset = images.subset(index)
        assert torch.equal(subset.pixels, images.pixels[index])
        assert torch.equal(subset.labels, images.labels[index])


def test_positions_outside_the_set_are_index_errors(images):
    for get in (images.__getitem__, images.batch):
        for index in (7, torch.tensor([0, 7])):
            with pytest.raises(IndexError):
                get(index)
    assert len(list(images)) == len(images) == 7  # iteration ends at the IndexError


def test_repr_copy_and_pickle(images):
    assert repr(images) == "Images('seven', 7 of 3 x 5 x 4, binarize=None)"
    assert images.shape == (7, 3, 5, 4)
    for twin in (copy.deepcopy(images), pickle.loads(pickle.dumps(images)), images.to("cpu")):
        assert torch.equal(twin.pixels, images.pixels)
        assert torch.equal(twin.labels, images.labels)
        assert (twin.name, twin.binarize) == (images.name, images.binarize)
    with pytest.raises(AttributeError):
        images.name = "eight"


def test_values_do_not_share_memory_with_the_pixels(images):
    kept = images.pixels.clone()
    images[:].zero_()
    images.batch(torch.arange(7)).zero_()
    images.binarized("threshold").pixels.zero_()
    assert torch.equal(images.pixels, kept)


def test_mean_is_exact_over_chunks():
    pixels = random_pixels(9000, 1, 2, 3)
    expected = pixels.double().mean(0) / 255
    assert torch.equal(Images(pixels).mean(), expected.float())
    assert torch.equal(Images(pixels).binarized("dynamic").mean(), expected.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pixels": torch.zeros(2, 1, 3, 3)},
            r"uint8 pixels \(N, C, H, W\), got torch.float32 \(2, 1, 3, 3\)",
        ),
        ({"pixels": random_pixels(2, 3, 3)}, r"got torch.uint8 \(2, 3, 3\)"),
        ({"pixels": random_pixels(0, 1, 3, 3)}, r"no images.*\(0, 1, 3, 3\)"),
        ({"labels": torch.arange(3)}, r"int64 labels \(2,\).*got torch.int64 \(3,\)"),
        ({"labels": torch.zeros(2)}, r"got torch.float32 \(2,\)"),
        ({"binarize": "always"}, "binarize must be None or one of .*'fixed'.*got 'always'"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(DataError, match=message):
        Images(**{"pixels": random_pixels(2, 1, 3, 3), **arguments})


def test_an_empty_subset_raises(images):
    with pytest.raises(DataError, match="seven: no images"):
        images.subset(slice(3, 3))


# -------------------- binarisation


def test_dynamic_bits_have_exactly_the_probability_k_over_255():
    draws = 40_000
    pixels = torch.arange(256, dtype=torch.uint8).repeat(draws, 1).reshape(draws, 1, 16, 16)
    images = Images(pixels).binarized("dynamic")
    x = images.batch(slice(None), torch.Generator().manual_seed(1)).flatten(1).double()
    p = torch.arange(256).double() / 255
    errors = x.mean(0) - p
    assert errors[0] == errors[255] == 0  # black stays black, and white stays white
    standard_errors = (p * (1 - p) / draws).sqrt()
    assert (errors.abs() <= 5 * standard_errors).all()
    # Pooled over the levels, k / 256 instead of k / 255 would be off by 15 standard errors.
    assert errors.sum().abs() <= 5 * standard_errors.square().sum().sqrt()


def test_dynamic_bits_are_independent():
    x = Images(torch.full((40_001, 1, 1, 9), 128, dtype=torch.uint8)).binarized("dynamic")
    z = x.batch(slice(None), torch.Generator().manual_seed(2)).flatten().double() - 128 / 255
    for lag in (1, 2, 7, 8, 9, 16):
        product = z[:-lag] * z[lag:]
        assert product.mean().abs() <= 5 * product.std() / len(product) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 5, 7), (2, 3, 4, 4)])
def test_dynamic_bits_are_redrawn_from_the_generator_only(shape):
    images = Images(torch.full(shape, 128, dtype=torch.uint8)).binarized("dynamic")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.stack([images.batch(slice(None), generator) for _ in range(20)]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (20, *shape)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(first[0], images.batch(slice(None), generator))
    assert set(first.unique().tolist()) == {0.0, 1.0}


def test_indexing_draws_from_the_global_generator(images):
    dynamic = images.binarized("dynamic")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first, second = dynamic[:], dynamic[:]
        torch.manual_seed(4)
        assert torch.equal(dynamic[:], first)
    assert not torch.equal(first, second)


def test_fixed_bits_are_drawn_once():
    images = Images(torch.full((50, 1, 9, 11), 51, dtype=torch.uint8))
    before = torch.get_rng_state()
    fixed, same, other = (images.binarized("fixed", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fixed[:], fixed[:])
    assert torch.equal(fixed[:], same[:])
    assert not torch.equal(fixed[:], other[:])
    assert set(fixed.pixels.unique().tolist()) == {0, 255}
    assert abs(fixed[:].mean() - 0.2) <= 5 * (0.2 * 0.8 / fixed.pixels.numel()) ** 0.5


def test_threshold_is_at_one_half():
    images = Images(torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2))
    assert images.binarized("threshold")[0].flatten().tolist() == [0, 0, 1, 1]
    assert ((images[0] >= 0.5).float() == images.binarized("threshold")[0]).all()


def test_binarising_keeps_labels_and_is_done_once(images):
    for mode in ("dynamic", "fixed", "threshold"):
        binary = images.binarized(mode)
        assert binary.binarize == mode
        assert binary.labels is images.labels
        assert set(binary[:].unique().tolist()) <= {0.0, 1.0}
        assert binary.subset(slice(2)).binarize == mode
        with pytest.raises(DataError, match=f"seven: already binarised \\('{mode}'\\)"):
            binary.binarized("fixed")
    with pytest.raises(DataError, match=r"one of .*'threshold'.*got 'soft'"):
        images.binarized("soft")


# -------------------- from_array

LEVELS = random_pixels(6, 1, 5, 4, seed=7).numpy()


@pytest.mark.parametrize(
    "array",
    [
        LEVELS,
        LEVELS[:, 0],
        LEVELS.astype(np.int64),
        LEVELS.astype(">i2"),
        np.asfortranarray(LEVELS),
        LEVELS / 255,
        (LEVELS / 255).astype(np.float16),
        (LEVELS / 255).astype(">f4"),
        torch.from_numpy(LEVELS) / 255,
        (torch.from_numpy(LEVELS) / 255).requires_grad_(),
        LEVELS[::-1].copy()[::-1],
        LEVELS.tolist(),
    ],
    ids=lambda a: f"{type(a).__name__} {getattr(a, 'dtype', '')} {getattr(a, 'shape', '')}",
)
def test_from_array_keeps_every_grey_level(array):
    images = from_array(array)
    assert torch.equal(images.pixels, torch.from_numpy(LEVELS))
    assert images.labels is None


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_black_and_white_arrays_stay_black_and_white(dtype):
    bits = LEVELS > 99
    assert torch.equal(from_array(bits.astype(dtype))[:], torch.from_numpy(bits).float())
    assert from_array(np.zeros((2, 3, 3), dtype)).pixels.sum() == 0


def test_floats_go_to_the_nearest_grey_level():
    array = np.array([[[0.4, 0.6], [254.4, 254.6]]]) / 255
    assert from_array(array).pixels.flatten().tolist() == [0, 1, 254, 255]


def test_flattened_squares_become_images():
    rows = random_pixels(4, 25)
    assert torch.equal(from_array(rows).pixels, rows.reshape(4, 1, 5, 5))


def test_from_array_copies():
    array = LEVELS.copy()
    images = from_array(array, np.arange(6))
    array[:] = 0
    assert torch.equal(images.pixels, torch.from_numpy(LEVELS))


def mapped(array, folder):
    np.save(folder / "array.npy", array)
    return np.load(folder / "array.npy", mmap_mode="r")


GREYS = random_pixels(7, 3, 5, 6, seed=9).numpy()


@pytest.mark.parametrize(
    "array",
    [GREYS, GREYS[:, 0], GREYS.reshape(35, 18)[:, :16], np.ascontiguousarray(np.moveaxis(GREYS, 1, -1))],
    ids=["channels", "rows and columns", "flattened", "channels last"],
)
def test_a_memory_map_of_8_bits_is_not_copied(array, tmp_path):
    found = mapped(array, tmp_path)
    images = from_array(found)
    assert images.pixels.data_ptr() == found.ctypes.data
    assert torch.equal(images.pixels, from_array(array).pixels)
    assert torch.equal(images[torch.tensor([5, 2])], from_array(array)[[5, 2]])


def test_memory_maps_that_need_other_numbers_are_copied(tmp_path):
    for array in (GREYS // 128, GREYS / 255, GREYS.astype(np.int64)):
        found = mapped(array, tmp_path)
        assert torch.equal(from_array(found).pixels, from_array(array).pixels)
        assert torch.equal(from_array(found[::-1]).pixels, from_array(array[::-1]).pixels)
    assert torch.equal(from_array(mapped(GREYS, tmp_path)[::-1]).pixels, from_array(GREYS[::-1]).pixels)


@pytest.mark.parametrize("labels", [[3, 1, 2, 0, 9, -1], np.array([3, 1, 2, 0, 9, -1], np.int8)])
def test_labels_become_int64(labels):
    assert from_array(LEVELS, labels).labels.tolist() == [3, 1, 2, 0, 9, -1]
    assert from_array(LEVELS, torch.tensor(labels)).labels.dtype == torch.int64


COLOURS = random_pixels(6, 3, 5, 4, seed=8).numpy()


@pytest.mark.parametrize("array", [LEVELS, COLOURS, COLOURS / 255, np.asfortranarray(COLOURS)])
def test_channels_may_come_last(array):
    images = from_array(array, channels_last=False)
    last = np.moveaxis(array, 1, -1)  # of no (N, C, H, W), as axis 1 has length 5
    assert torch.equal(from_array(last).pixels, images.pixels)
    assert torch.equal(from_array(last.copy(), channels_last=True).pixels, images.pixels)
    assert from_array(last, channels_last=False).shape[1] == 5


def test_what_both_layouts_would_fit_is_said():
    narrow = random_pixels(6, 2, 4, 3).numpy()  # two channels, which no rule knows
    assert torch.equal(
        from_array(narrow.swapaxes(1, 3), channels_last=True).pixels, torch.from_numpy(narrow).mT
    )
    with pytest.raises(DataError, match=r"channels_last=True is for \(N, H, W, C\), got \(6, 5, 4\)"):
        from_array(LEVELS[:, 0], channels_last=True)
    spoilt = np.moveaxis(COLOURS, 1, -1).astype(int)
    spoilt[1, 4, 3, 2] = -1
    with pytest.raises(DataError, match=r"-1 at index \(1, 4, 3, 2\)"):  # of the array that was given
        from_array(spoilt)


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    array = np.zeros((3, 2, 2, 5), dtype)
    array[1, 1, 0, 3] = array[2, 0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (with_value(np.nan), r"box: nan at index \(1, 1, 0, 3\), expected floats in \[0, 1\]"),
        (with_value(np.inf), r"box: inf at index \(1, 1, 0, 3\)"),
        (with_value(-np.inf), r"box: -inf at index \(1, 1, 0, 3\)"),
        (with_value(-0.25), r"box: -0.25 at index \(1, 1, 0, 3\)"),
        (with_value(255), r"box: 255.0 at index \(1, 1, 0, 3\)"),
        (with_value(256, np.int32), r"box: 256 at index \(1, 1, 0, 3\), expected integers in 0..255"),
        (with_value(-1, np.int8), r"box: -1 at index \(1, 1, 0, 3\)"),
        (np.zeros((0, 3, 3)), r"box: no images, the array has shape \(0, 3, 3\)"),
        (np.zeros((3, 3, 0)), "box: no images"),
        ([], "box: no images"),
        (np.zeros(9), r"box: expected \(N, H, W\).*got \(9,\)"),
        (3.0, r"box: expected .*got \(\)"),
        (np.zeros((2, 7)), r"box: expected .*D a square, got \(2, 7\)"),
        (np.zeros((2, 3, 4, 5, 6)), r"got \(2, 3, 4, 5, 6\)"),
        (np.zeros((2, 3, 8, 4)), r"box: \(2, 3, 8, 4\) may be .*: say channels_last=False or True"),
        (np.zeros((2, 3, 3), complex), "box: expected floats, integers or booleans, got complex128"),
        ([["a"]], "box: expected floats, integers or booleans, got <U1"),
        ([[[1.0]], [[1.0, 2.0]]], r"box: not an array \(.*inhomogeneous"),
        (torch.zeros(2, 3, 3, dtype=torch.bfloat16), "box: not an array .*BFloat16"),
        (torch.eye(3).to_sparse(), "box: not an array"),
        (None, "box: expected floats, integers or booleans, got object"),
    ],
)
def test_from_array_raises_on_invalid_arrays(array, message):
    with pytest.raises(DataError, match=message):
        from_array(array, name="box")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(5), r"box: expected integer labels \(6,\).*got int64 \(5,\)"),
        (np.zeros((6, 1), int), r"got int64 \(6, 1\)"),
        (np.zeros(6), "got float64"),
        (np.zeros(6, np.uint64), "got uint64"),
        (list("abcdef"), "got <U1"),
        ([[1], [2, 3]], "box: labels: not an array"),
    ],
)
def test_from_array_raises_on_invalid_labels(labels, message):
    with pytest.raises(DataError, match=message):
        from_array(LEVELS, labels, name="box")
