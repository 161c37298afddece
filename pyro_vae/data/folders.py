"""Read a folder of image files: upright, of one size and mode, with subfolders as classes."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.data.images import DataError, Images, from_array

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_options", "load_folder", "reading"]

logger = logging.getLogger("pyro_vae")

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LEFTOVERS = ("__MACOSX", "@eaDir", "Thumbs.db")  # of archives, file servers and file managers
_SPLITS = {"train", "test", "val", "valid", "validation"}  # subfolders that are not classes
_GREY, _COLOUR = ("1", "L"), ("P", "RGB")
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Convert any error of a parser over the content into a `DataError` that names the file."""
    try:
        yield
    except (DataError, PermissionError, IsADirectoryError, MemoryError):
        raise  # not the fault of the content
    except Exception as error:
        reason = str(error) or type(error).__name__
        message = f"{path} is damaged or not a valid {kind} ({reason}): delete it or use an intact copy"
        raise DataError(message) from error


def load_folder(folder: Path, split: str, *, size: int | tuple[int, int] | None, mode: str | None) -> Images:
    """Read all images of a folder, or of its subfolder `split` where it is divided into such; see `load`."""
    folder = _split_of(folder, split)
    paths = _image_paths(folder)
    classes = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    if "" in classes and len(set(classes)) > 1:
        raise DataError(f"{folder} contains images, {paths[classes.index('')]}, and subfolders of images")
    arrays: list[np.ndarray] = []
    num_profiles = 0
    for path in paths:
        array, has_profile = _read_image(folder / path, size, mode)
        if arrays and array.shape != arrays[0].shape:
            raise DataError(_unlike(folder / path, array.shape, paths[0], arrays[0].shape))
        arrays.append(array)
        num_profiles += has_profile
    if num_profiles:
        logger.warning(
            "%s: %d images have a colour profile other than sRGB, which is not applied", folder, num_profiles
        )
    labels = None if "" in classes else np.unique(classes, return_inverse=True)[1]
    return from_array(np.stack(arrays), labels, name=str(folder))


def _split_of(folder: Path, split: str) -> Path:
    """Return the subfolder of a split where the folder is divided into such, train among them, else it."""
    parts = {path.name for path in folder.iterdir() if path.is_dir() and not _is_leftover(path.name)}
    if "train" in parts and len(parts) > 1 and parts <= _SPLITS:
        if split not in parts:
            raise DataError(f"{folder} has the splits {', '.join(sorted(parts))}, and not {split!r}")
        return folder / split
    if split != "train":
        raise DataError(f"{folder} has no {split!r} split: load all of it and take a subset")
    return folder


def _image_paths(folder: Path) -> list[Path]:
    """Return the images of a folder, relative to it, without hidden files and what programs leave behind."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    ]
    paths = sorted(path for path in found if not any(map(_is_leftover, path.parts)))
    if len(paths) < len(found):
        logger.warning(
            "%s: %d images in hidden files or folders, or left by other programs, were skipped",
            folder,
            len(found) - len(paths),
        )
    if not paths:
        raise DataError(f"{folder} contains no images ({', '.join(_SUFFIXES)})")
    return paths


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _unlike(path: Path, found: tuple[int, ...], first: Path, expected: tuple[int, ...]) -> str:
    options = []
    if found[1:] != expected[1:]:
        options.append("size= (such as size=64) scales and crops all images to one size")
    if found[0] != expected[0]:
        options.append('mode="L" or mode="RGB" converts all to grey or to colour')
    return f"{path} is {found} but {first} is {expected} (C, H, W): {'; '.join(options)}"


def _read_image(path: Path, size: int | tuple[int, int] | None, mode: str | None) -> tuple[np.ndarray, bool]:
    """Read an image file, upright: uint8, (1, H, W) or (3, H, W); and whether its colours need a profile."""
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415  (only needed here)

    with reading(path, "image file"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        content = io.BytesIO(path.read_bytes())  # from a file, Pillow would allocate any announced size
        try:
            image: Image.Image = Image.open(content)
        except UnidentifiedImageError:
            raise ValueError("its format is unknown to Pillow") from None
        has_profile = _has_other_profile(image)
        image = _in_mode(path, ImageOps.exif_transpose(image), mode)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        array = np.asarray(image)
    return (array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)), has_profile


def _in_mode(path: Path, image: "Image.Image", mode: str | None) -> "Image.Image":
    """Convert to "L" or "RGB": as the file has it, or as asked for."""
    from PIL import Image  # noqa: PLC0415

    has_alpha = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa")
    if mode is None:
        if has_alpha or image.mode not in (*_GREY, *_COLOUR):
            found = f"{image.mode} with transparency" if "transparency" in image.info else image.mode
            raise DataError(
                f'{path} has mode {found}, expected 8-bit grey or RGB: mode="L" or mode="RGB" converts it'
            )
        return image.convert("L" if image.mode in _GREY else "RGB")
    if image.mode in _SIXTEEN_BIT:  # Pillow would clip, not scale
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"{path} has mode {image.mode}, whose range of values is unknown: scale it to 8 bits")
    elif has_alpha:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _has_other_profile(image: "Image.Image") -> bool:
    """Return whether an image has a colour profile that is not sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode in _GREY:
        return False
    from PIL import ImageCms  # noqa: PLC0415

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return "srgb" not in ImageCms.getProfileDescription(opened).lower()
    except (ImageCms.PyCMSError, OSError):
        return True


def check_options(size: int | tuple[int, int] | None, mode: str | None) -> None:
    """Raise unless `size` and `mode` are what `load` takes."""
    sizes = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
    if size is not None and not all(type(side) is int and side >= 1 for side in sizes):
        raise DataError(f"size must be a number of pixels or (height, width); got {size!r}")
    if mode not in (None, "L", "RGB"):
        raise DataError(f'mode must be "L" (grey), "RGB" or None; got {mode!r}')
