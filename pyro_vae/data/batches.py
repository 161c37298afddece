"""Minibatches of data in memory: their order, and their binarisation on the way.

Order and binarisation are functions of the seed, the epoch and the number of the batch alone, so that a run
can be resumed at any batch, and reading ahead changes nothing.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.images import Images
from pyro_vae.utils.isolation import derived_seed, seed_at
from pyro_vae.utils.validation import require_floating

__all__ = ["Batches"]

_ORDER, _BITS, _SPLIT, _FIXED = 10, 11, 12, 13  # streams of random numbers
_CHUNK = 4096  # data checked at a time


class Batches:
    """Data of one run, in batches.

    Args:
        data: Tensor (N, *event_shape) or `Images`.
        binarize: None, "dynamic", "fixed" or "threshold"; see `pyro_vae.data.Images`. For a tensor
            of grey levels in [0, 1] the same three are done here.
        seed: Seed of the order and of the binarisation.
        device: Device of the batches; the data stay on theirs.

    Raises:
        TypeError: If the data are of another type, or not floating-point where they are to be binarised.
        ValueError: If they are to be binarised and lie outside [0, 1], or are binarised already.

    Example:
        >>> batches = Batches(torch.arange(5.0)[:, None], seed=1)
        >>> [len(batch) for batch in batches.epoch(0, batch_size=2)]
        [2, 3]
    """

    def __init__(
        self,
        data: Tensor | Images,
        *,
        binarize: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(data, Tensor | Images):
            raise TypeError(
                "data must be a tensor (N, *event_shape) or pyro_vae.data.Images; "
                f"got {type(data).__name__}: convert with torch.as_tensor or pyro_vae.data.from_array"
            )
        if isinstance(data, Tensor):
            if data.dim() == 0 or data.layout != torch.strided:
                raise ValueError(
                    f"data must be a dense tensor (N, *event_shape); got {data.layout} {tuple(data.shape)}"
                )
            data = data.detach()
        self.seed = seed
        self.device = torch.device(device)
        self.bits = torch.Generator(data.pixels.device if isinstance(data, Images) else data.device)
        self.dynamic = False
        if binarize is None:
            self.data = data
        elif isinstance(data, Images):
            self.data = data.binarized(binarize, seed=seed)
        else:
            self.data = self._binarized(data, binarize)

    def _binarized(self, grey: Tensor, mode: str) -> Tensor:
        require_floating("data", grey)
        if not ((grey >= 0) & (grey <= 1)).all():
            raise ValueError(
                f"binarize={mode!r} needs grey levels in [0, 1]; got {grey.min():.6g} to {grey.max():.6g}: "
                "divide those of 0..255 by 255"
            )
        if mode == "fixed":
            return torch.bernoulli(grey, generator=self.bits.manual_seed(derived_seed(self.seed, _FIXED)))
        if mode == "threshold":
            return (grey >= 0.5).to(grey.dtype)
        if mode != "dynamic":
            raise ValueError(f"binarize must be 'dynamic', 'fixed', 'threshold' or None; got {mode!r}")
        self.dynamic = True
        return grey

    def __len__(self) -> int:
        return len(self.data)

    def split(self, fraction: float) -> tuple["Batches", "Batches"]:
        """Hold out a random fraction of the data: the rest, and the held-out part.

        Raises:
            ValueError: If either part would be empty.
        """
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"a validation fraction of {fraction} of {len(self)} data leaves {count} for validation "
                f"and {len(self) - count} for training; both need at least 1"
            )
        order = self._order(_SPLIT, 0)
        return self._part(order[count:], 0), self._part(order[:count], 1)

    def _part(self, index: Tensor, number: int) -> "Batches":
        data = self.data.subset(index) if isinstance(self.data, Images) else self.data[index]
        part = Batches(data, seed=derived_seed(self.seed, _SPLIT, number), device=self.device)
        part.dynamic = self.dynamic
        return part

    def _order(self, *key: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, *key))
        return torch.randperm(len(self), generator=generator)

    def lengths(self, batch_size: int) -> list[int]:
        """Return the lengths of the batches of an epoch.

        The last may be smaller. A single example left over joins the batch before it: batch normalisation
        cannot train on one, and its gradient would be mostly noise.

        Example:
            >>> Batches(torch.zeros(7, 2)).lengths(3), Batches(torch.zeros(8, 2)).lengths(3)
            ([3, 4], [3, 3, 2])
        """
        full, rest = divmod(len(self), batch_size)
        lengths = [batch_size] * full
        if rest == 1 and full:
            lengths[-1] += 1
        elif rest:
            lengths.append(rest)
        return lengths

    def epoch(self, number: int, *, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the batches (B, *event_shape) of a pass in random order, from the batch `start` on."""
        bits = derived_seed(self.seed, _BITS, number)
        parts = self._order(_ORDER, number).split(self.lengths(batch_size))
        for batch in range(start, len(parts)):
            yield self._at(parts[batch], seed_at(bits, batch))

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the batches (B, *event_shape) of a pass in the order of the data."""
        bits = derived_seed(self.seed, _BITS)  # the same at each pass
        for number, index in enumerate(torch.arange(len(self)).split(batch_size)):
            yield self._at(index, seed_at(bits, number))

    def _at(self, index: Tensor, seed: int) -> Tensor:
        if self._binarisation == "dynamic":
            self.bits.manual_seed(seed)
        if isinstance(self.data, Images):
            return self.data.batch(index.to(self.data.pixels.device), self.bits).to(self.device)
        batch = self.data.index_select(0, index.to(self.data.device))
        return (torch.bernoulli(batch, generator=self.bits) if self.dynamic else batch).to(self.device)

    def check(self, check_data: Callable[[Tensor], None]) -> None:
        """Pass all the data to a check, in chunks; of data that are binarised on the way, the first ones.

        Raises:
            ValueError: What the check raises, with the first index of the chunk it speaks of.
        """
        for number, chunk in enumerate(self.in_order(_CHUNK)):
            try:
                check_data(chunk)
            except ValueError as error:
                if number:
                    raise ValueError(f"{error} (counting from datum {number * _CHUNK})") from error
                raise
            if self._binarisation == "dynamic":
                break

    @property
    def _binarisation(self) -> str | None:
        return self.data.binarize if isinstance(self.data, Images) else ("dynamic" if self.dynamic else None)

    def describe(self) -> dict[str, Any]:
        """Return plain values that tell these data from others: shape, binarisation and a check sum."""
        stored = self.data.pixels if isinstance(self.data, Images) else self.data
        content = stored.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {
            "shape": list(stored.shape),
            "binarize": self._binarisation,
            "checksum": zlib.crc32(content),
        }
