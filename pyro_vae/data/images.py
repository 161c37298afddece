"""Image sets in memory: stored as 8-bit grey levels, indexed as floats in [0, 1], with binarisation.

`Images` stores a set, and `from_array` creates one from an array or a tensor. Notation: N images, C channels,
H rows, W columns, a grey level k in 0..255, and the value x = k / 255 that a model receives.
"""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["BINARIZE_MODES", "DataError", "Images", "from_array"]

BINARIZE_MODES = ("dynamic", "fixed", "threshold")
_CHANNELS = (1, 3, 4)  # grey, colours, colours with transparency
_PART = 256  # images of a memory map that are looked at together


class DataError(ValueError):
    """Error of invalid data: damaged, unknown or empty, out of range, or of the wrong type or shape."""


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Set of N images, stored as 8-bit grey levels k and indexed as floats x = k / 255.

    `images[index]` is a float32 tensor, (C, H, W) for an int and (B, C, H, W) for a slice, a tensor of
    positions or a mask, so that `svi.step(images[:128])` works as with a tensor. `binarize` defines x:

    - `None`: the grey levels, x = k / 255.
    - `"dynamic"`: x ~ Bernoulli(k / 255), drawn at every access.
    - `"fixed"`: x ~ Bernoulli(k / 255), drawn once, so that pixels are 0 or 255.
    - `"threshold"`: x = 1 where k / 255 ≥ 1/2, so that pixels are 0 or 255.

    Args:
        pixels: uint8, (N, C, H, W), N ≥ 1.
        labels: int64, (N,), or None.
        name: Name of the set, for titles and logs.
        binarize: One of the above; to binarise a set, call `binarized`.

    Raises:
        DataError: If `pixels` or `labels` have the wrong type or shape, or `binarize` is unknown.

    Example:
        >>> pixels = torch.tensor([[[[0, 51, 255]]], [[[102, 0, 0]]]], dtype=torch.uint8)
        >>> images = Images(pixels, name="strips")
        >>> images
        Images('strips', 2 of 1 x 1 x 3, binarize=None)
        >>> images[0]
        tensor([[[0.0000, 0.2000, 1.0000]]])
        >>> images.binarized("threshold")[:].flatten()
        tensor([0., 0., 1., 0., 0., 0.])
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None = None
    name: str = "images"
    binarize: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype != torch.uint8 or len(shape) != 4:
            raise DataError(
                f"{self.name}: expected uint8 pixels (N, C, H, W), got {self.pixels.dtype} {shape}; "
                "from_array converts other arrays"
            )
        if 0 in shape:
            raise DataError(f"{self.name}: no images, the pixels have shape {shape}")
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]):
            raise DataError(
                f"{self.name}: expected int64 labels ({len(self)},), one per image, "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if self.binarize not in (None, *BINARIZE_MODES):
            raise DataError(f"binarize must be None or one of {BINARIZE_MODES}, got {self.binarize!r}")

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        size = " x ".join(str(n) for n in self.shape[1:])
        return f"Images({self.name!r}, {len(self):,} of {size}, binarize={self.binarize!r})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._values(self.pixels[index], None)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return self.pixels.shape

    def batch(self, index: Any, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return `images[index]`, with dynamic binarisation drawn from `generator`.

        Training and evaluation pass separate generators, so that neither changes the draws of the other.

        Args:
            index: Non-negative positions, int64, (B,), or any other index of a tensor.
            generator: Generator on the device of the pixels; None selects torch's global one.

        Returns:
            float32, (B, C, H, W).

        Raises:
            IndexError: If a position is outside the set.

        Example:
            >>> images = Images(torch.full((9, 1, 2, 2), 255, dtype=torch.uint8)).binarized("dynamic")
            >>> images.batch(torch.tensor([3, 5]), torch.Generator().manual_seed(0)).mean()
            tensor(1.)
        """
        if isinstance(index, torch.Tensor) and index.dtype == torch.int64 and index.ndim == 1:
            pixels = self.pixels.index_select(0, index)  # 20 times as fast as pixels[index]
        else:
            pixels = self.pixels[index]
        return self._values(pixels, generator)

    def _values(self, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if self.binarize == "dynamic":
            return _bernoulli(pixels, generator).float()
        return pixels.float().div_(255)

    def mean(self) -> torch.Tensor:
        """Return the mean of k / 255 over the set, float32 (C, H, W): also the mean of binarised draws."""
        sums = [chunk.float().sum(0) for chunk in self.pixels.split(4096)]  # integers < 2^24, exact
        return (torch.stack(sums).double().sum(0) / (255 * len(self))).float()

    def subset(self, index: Any) -> "Images":
        """Return the images and labels at `index`, a slice, a tensor of positions or a mask."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, pixels=self.pixels[index], labels=labels)

    def to(self, device: torch.device | str) -> "Images":
        """Return the same set on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, pixels=self.pixels.to(device), labels=labels)

    def binarized(self, mode: str, *, seed: int = 0) -> "Images":
        """Return the same set in black and white, x in {0, 1}.

        Args:
            mode: `"dynamic"`, `"fixed"` or `"threshold"`: see `Images`.
            seed: Seed of `"fixed"`, whose draw is the same on every device; ignored by other modes.

        Raises:
            DataError: If the mode is unknown, or the set is already binarised.

        Example:
            >>> grey = Images(torch.full((1, 1, 1, 8), 128, dtype=torch.uint8))
            >>> fixed = grey.binarized("fixed", seed=1)
            >>> torch.equal(fixed[0], fixed[0]), fixed[0].unique()
            (True, tensor([0., 1.]))
        """
        if self.binarize is not None:
            raise DataError(f"{self.name}: already binarised ({self.binarize!r}); start from the grey levels")
        pixels = self.pixels
        if mode == "threshold":
            pixels = (pixels >= 128).to(torch.uint8) * 255  # k / 255 ≥ 1/2 where k ≥ 127.5
        elif mode == "fixed":
            pixels = _bernoulli(pixels.cpu(), torch.Generator().manual_seed(seed)).mul_(255).to(pixels.device)
        elif mode != "dynamic":
            raise DataError(f"mode must be one of {BINARIZE_MODES}, got {mode!r}")
        return dataclasses.replace(self, pixels=pixels, binarize=mode)


def _bernoulli(pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw bits, uint8, that are 1 with probability exactly k / 255.

    A byte uniform on 0..254 is below k with this probability. The eight bytes of a random 64-bit word are
    uniform on 0..255; the 3 % of words with a byte of 255 are drawn again. On a CPU this takes a fifth of the
    time of `torch.bernoulli`, which for a batch of 256 MNIST images exceeds the time of the optimiser step.
    """
    if pixels.device.type != "cpu":  # the draw is cheap there, and `nonzero` would synchronise
        return torch.bernoulli(pixels.float().div_(255), generator=generator).to(torch.uint8)
    words = torch.empty(math.ceil(pixels.numel() / 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    uniform = words.view(torch.uint8)
    is_255 = uniform == torch.full_like(uniform, 255)  # a comparison with a scalar takes 20 times as long
    again = is_255.view(torch.int64).nonzero().squeeze(1)
    redrawn = torch.empty(8 * len(again), dtype=torch.uint8).random_(0, 255, generator=generator)
    words.index_copy_(0, again, redrawn.view(torch.int64))
    return (uniform[: pixels.numel()].view(pixels.shape) < pixels).view(torch.uint8)


def from_array(
    array: Any, labels: Any = None, *, name: str = "array", channels_last: bool | None = None
) -> Images:
    """Create an image set from an array, a tensor or nested lists, copied to 256 grey levels.

    An 8-bit memory map, as of `numpy.load(path, mmap_mode="r")`, is not copied, unless it is black and white:
    the rows of a batch are read from the file when they are needed.

    Args:
        array: (N, H, W), (N, C, H, W) or (N, H, W, C), or (N, D) for flattened square images, D = H². Floats
            must be in [0, 1], and are rounded to the nearest k / 255. Integers must be in 0..255. Booleans,
            and integers of at most 1, are black and white, and 1 is white.
        labels: Integers, (N,), or None.
        name: Name of the set; error messages begin with it.
        channels_last: True for (N, H, W, C), False for (N, C, H, W). By default the first if the last axis
            has the length 1, 3 or 4 and the second has not, else the second.

    Raises:
        DataError: If the type or shape is wrong, the set is empty, a value is out of range, NaN or infinite
            (the message gives the index of the first), the labels are not N integers, or both the second and
            the last axis have the length 3 or 4, and `channels_last` does not say which of them is C.

    Example:
        >>> from_array([[[0.0, 0.5], [1.0, 0.25]]], labels=[7], name="one square")
        Images('one square', 1 of 1 x 2 x 2, binarize=None)
        >>> from_array([[[0.0, 0.5], [1.0, 2.55]]])
        Traceback (most recent call last):
        ...
        pyro_vae.data.images.DataError: array: 2.55 at index (0, 1, 1), expected floats in [0, 1]
        >>> from_array(np.zeros((2, 32, 24, 3))).shape
        torch.Size([2, 3, 32, 24])
    """
    pixels = _mapped(array, name, channels_last) if isinstance(array, np.memmap) else None
    if pixels is None:
        pixels = _grey_levels(_as_numpy(array, name), name, channels_last)
    if labels is None:
        return Images(pixels, name=name)
    numbers = _as_numpy(labels, f"{name}: labels")
    if numbers.shape != (len(pixels),) or not np.can_cast(numbers.dtype, np.int64):
        raise DataError(
            f"{name}: expected integer labels ({len(pixels)},), one per image, "
            f"got {numbers.dtype} {numbers.shape}"
        )
    return Images(pixels, torch.from_numpy(np.array(numbers, dtype=np.int64)), name)


def _as_numpy(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; sparse or bfloat16 tensors
        raise DataError(f"{name}: not an array ({error})") from error


def _mapped(array: np.memmap, name: str, channels_last: bool | None) -> torch.Tensor | None:
    """Return pixels, uint8 (N, C, H, W), in the memory of a map, or None if they must be copied."""
    if array.dtype != np.uint8 or any(step < 0 for step in array.strides):
        return None
    shape = _image_shape(array.shape, name)
    is_last = _has_channels_last(array.shape, name, channels_last)
    parts = (array[start : start + _PART] for start in range(0, len(array), _PART))
    if all(part.max() <= 1 for part in parts):  # mostly decided by the first part
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory that may not be written, nor is
        pixels = torch.from_numpy(array)
    return pixels.movedim(-1, 1) if is_last else pixels.reshape(shape)


def _grey_levels(array: np.ndarray, name: str, channels_last: bool | None) -> torch.Tensor:
    """Convert an array to pixels, uint8 (N, C, H, W)."""
    if array.dtype.kind not in "bfiu":
        raise DataError(f"{name}: expected floats, integers or booleans, got {array.dtype}")
    shape = _image_shape(array.shape, name)
    if is_last := _has_channels_last(array.shape, name, channels_last):
        n, h, w, c = shape
        shape = n, c, h, w
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    is_float = array.dtype.kind == "f"
    top, wanted = (1, "floats in [0, 1]") if is_float else (255, "integers in 0..255")
    with np.errstate(invalid="ignore"):
        if not (array.min() >= 0 and array.max() <= top):  # written so that NaN fails
            first = np.unravel_index(np.argmin((array >= 0) & (array <= top)), array.shape)
            raise DataError(f"{name}: {array[first]} at index {tuple(map(int, first))}, expected {wanted}")
    if is_float:
        array = np.rint(array * 255)
    elif array.max() == 1:
        array = array.astype(np.uint8) * np.uint8(255)
    array = np.moveaxis(array, -1, 1) if is_last else array
    return torch.from_numpy(np.array(array, dtype=np.uint8, order="C")).reshape(shape)


def _has_channels_last(shape: tuple[int, ...], name: str, said: bool | None) -> bool:
    """Return whether an array is (N, H, W, C), as its caller says, or else as its shape does."""
    if said is not None or len(shape) != 4:
        if said and len(shape) != 4:
            raise DataError(f"{name}: channels_last=True is for (N, H, W, C), got {shape}: leave it out")
        return bool(said)
    second, last = shape[1], shape[3]
    if second in (3, 4) and last in (3, 4):
        raise DataError(
            f"{name}: {shape} may be (N, C, H, W) or (N, H, W, C): say channels_last=False or True"
        )
    return last in _CHANNELS and second not in _CHANNELS


def _image_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the shape (N, C, H, W), or as it is (N, H, W, C), of the images in an array of any shape."""
    if 0 in shape:
        raise DataError(f"{name}: no images, the array has shape {shape}")
    match shape:
        case (n, d) if math.isqrt(d) ** 2 == d:
            return n, 1, math.isqrt(d), math.isqrt(d)
        case (n, h, w):
            return n, 1, h, w
        case (n, c, h, w):
            return n, c, h, w
    raise DataError(
        f"{name}: expected (N, H, W), (N, C, H, W), (N, H, W, C) or (N, D) with D a square, got {shape}"
    )
