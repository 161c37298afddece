"""Pictures in memory: 8-bit grey levels, floats in [0, 1] where they are used, binarised on the way.

`Images` holds them, `from_array` takes them from an array or a tensor. N counts pictures, C channels, H rows,
W columns; k is a grey level, 0..255, and x = k / 255 the value a model sees.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["BINARIZE_MODES", "DataError", "Images", "from_array"]

BINARIZE_MODES = ("dynamic", "fixed", "threshold")


class DataError(ValueError):
    """Data that cannot be used: damaged, foreign, empty, out of range, of the wrong shape, or unknown."""


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """N pictures, kept as the 8-bit grey levels k that files hold, given out as floats x = k / 255.

    `images[index]` is a float32 tensor, (C, H, W) for an int and (B, C, H, W) for a slice, a tensor of
    positions or a mask, so that `svi.step(images[:128])` works as with a tensor. `binarize` says what x is:

    - `None`: the grey levels, x = k / 255.
    - `"dynamic"`: x ~ Bernoulli(k / 255), drawn afresh at every access.
    - `"fixed"`: the same, drawn once; `"threshold"`: x = 1 where k / 255 ≥ 1/2. Their pixels are 0 or 255.

    Args:
        pixels: uint8, (N, C, H, W), N ≥ 1.
        labels: int64, (N,), or None.
        name: What the pictures are, for titles and logs.
        binarize: One of the above; to binarise pictures, call `binarized`.

    Raises:
        DataError: `pixels` or `labels` of another type or shape, no pictures, or an unknown `binarize`.

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
            raise DataError(f"{self.name}: no pictures, the pixels have shape {shape}")
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]):
            raise DataError(
                f"{self.name}: expected int64 labels ({len(self)},), one for each picture, "
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
        """`images[index]` with dynamic binarisation drawn from `generator`, not from torch's global one.

        Training and evaluation each hand in a generator of their own, so that neither disturbs the other.

        Args:
            index: Positions, int64, (B,), none of them negative; or anything else that indexes a tensor.
            generator: Lives on the pixels' device; None stands for the global one.

        Returns:
            float32, (B, C, H, W).

        Raises:
            IndexError: A position outside the set.

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
        """The mean of k / 255 over the set, float32 (C, H, W): also the mean of what is drawn from it."""
        sums = [
            chunk.float().sum(0) for chunk in self.pixels.split(4096)
        ]  # whole numbers below 2^24, so exact
        return (torch.stack(sums).double().sum(0) / (255 * len(self))).float()

    def subset(self, index: Any) -> "Images":
        """Those at `index` (a slice, a tensor of positions or a mask), with their labels, as a set."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, pixels=self.pixels[index], labels=labels)

    def to(self, device: torch.device | str) -> "Images":
        """The same set on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, pixels=self.pixels.to(device), labels=labels)

    def binarized(self, mode: str, *, seed: int = 0) -> "Images":
        """The same set in black and white, x in {0, 1}.

        Args:
            mode: `"dynamic"`, `"fixed"` or `"threshold"`: see the class.
            seed: Of the one draw of `"fixed"`, which is the same on every device; the others ignore it.

        Raises:
            DataError: An unknown mode, or a set that is binarised already.

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
            raise DataError(f"the mode of binarisation must be one of {BINARIZE_MODES}, got {mode!r}")
        return dataclasses.replace(self, pixels=pixels, binarize=mode)


def _bernoulli(pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Bits, uint8, that are 1 with probability k / 255, exactly.

    A byte that is uniform on 0..254 lies below k with that probability. A random 64-bit word is eight bytes,
    uniform on 0..255; the 3 % of words that hold a 255 are drawn again. On a CPU this takes a fifth of the
    time of `torch.bernoulli`, which for a batch of 256 MNIST pictures would cost more than the optimiser.
    """
    if pixels.device.type != "cpu":  # where the draw is cheap, and `nonzero` would wait for the device
        return torch.bernoulli(pixels.float().div_(255), generator=generator).to(torch.uint8)
    words = torch.empty(math.ceil(pixels.numel() / 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    uniform = words.view(torch.uint8)
    is_255 = uniform == torch.full_like(uniform, 255)  # a comparison with a scalar takes 20 times as long
    again = is_255.view(torch.int64).nonzero().squeeze(1)
    redrawn = torch.empty(8 * len(again), dtype=torch.uint8).random_(0, 255, generator=generator)
    words.index_copy_(0, again, redrawn.view(torch.int64))
    return (uniform[: pixels.numel()].view(pixels.shape) < pixels).view(torch.uint8)


def from_array(array: Any, labels: Any = None, *, name: str = "array") -> Images:
    """Takes pictures from an array, a tensor or nested lists, which it copies to 256 grey levels.

    Args:
        array: (N, H, W) or (N, C, H, W), or (N, D) for flattened square pictures, D = H². Floats lie in
            [0, 1] and are rounded to the nearest k / 255. Integers lie in 0..255; where none is above 1 they
            are, like booleans, black and white, and 1 is white.
        labels: Whole numbers, (N,), or None.
        name: What the pictures are; error messages begin with it.

    Raises:
        DataError: Another type or shape, no pictures, a value out of range, NaN or infinite (the message
            names the first), or labels that are not whole numbers, one for each picture.

    Example:
        >>> from_array([[[0.0, 0.5], [1.0, 0.25]]], labels=[7], name="one square")
        Images('one square', 1 of 1 x 2 x 2, binarize=None)
        >>> from_array([[[0.0, 0.5], [1.0, 2.55]]])
        Traceback (most recent call last):
        ...
        pyro_vae.data.images.DataError: array: 2.55 at index (0, 1, 1), expected floats in [0, 1]
    """
    pixels = _grey_levels(_as_numpy(array, name), name)
    if labels is None:
        return Images(pixels, name=name)
    numbers = _as_numpy(labels, f"{name}: labels")
    if numbers.shape != (len(pixels),) or not np.can_cast(numbers.dtype, np.int64):
        raise DataError(
            f"{name}: expected whole numbers ({len(pixels)},) as labels, one for each picture, "
            f"got {numbers.dtype} {numbers.shape}"
        )
    return Images(pixels, torch.from_numpy(np.array(numbers, dtype=np.int64)), name)


def _as_numpy(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; sparse or bfloat16 tensors
        raise DataError(f"{name}: not an array ({error})") from error


def _grey_levels(array: np.ndarray, name: str) -> torch.Tensor:
    """Pixels, uint8 (N, C, H, W)."""
    if array.dtype.kind not in "bfiu":
        raise DataError(f"{name}: expected floats, integers or booleans, got {array.dtype}")
    shape = _picture_shape(array.shape, name)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    is_float = array.dtype.kind == "f"
    top, wanted = (1, "floats in [0, 1]") if is_float else (255, "integers in 0..255")
    with np.errstate(invalid="ignore"):
        if not (array.min() >= 0 and array.max() <= top):  # so put, NaN fails too
            first = np.unravel_index(np.argmin((array >= 0) & (array <= top)), array.shape)
            raise DataError(f"{name}: {array[first]} at index {tuple(map(int, first))}, expected {wanted}")
    if is_float:
        array = np.rint(array * 255)
    elif array.max() == 1:
        array = array.astype(np.uint8) * np.uint8(255)
    return torch.from_numpy(np.array(array, dtype=np.uint8, order="C")).reshape(shape)


def _picture_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """(N, C, H, W) for the shape of an array that `from_array` takes."""
    if 0 in shape:
        raise DataError(f"{name}: no pictures, the array has shape {shape}")
    match shape:
        case (n, d) if math.isqrt(d) ** 2 == d:
            return n, 1, math.isqrt(d), math.isqrt(d)
        case (n, h, w):
            return n, 1, h, w
        case (n, c, h, w) if c in (1, 3, 4) or w not in (1, 3, 4):
            return n, c, h, w
        case (_, _, _, _):
            raise DataError(f"{name}: {shape} looks like (N, H, W, C): move the last axis to (N, C, H, W)")
    raise DataError(f"{name}: expected (N, H, W), (N, C, H, W) or (N, D) with D a square, got {shape}")
