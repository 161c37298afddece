"""Batches with a stated share of labelled examples, of which there are few."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.data.permutations import permutation
from pyro_vae.utils.isolation import derived_seed

__all__ = ["Balance"]


@dataclass(frozen=True, eq=False)
class Balance:
    """Labelled and unlabelled examples, and the labelled ones' least share of a batch.

    An epoch passes once over the unlabelled examples, and over the labelled ones, in a new order each time,
    as often as the share needs. `weights` make up for the repetition.

    Args:
        labelled: Positions of the labelled examples, (L,), at least one.
        unlabelled: Positions of the others, (U,), at least one.
        share: Of a batch, below 1.

    Example:
        >>> balance = Balance(torch.arange(2), torch.arange(2, 11), share=0.25)
        >>> balance.lengths(4)  # one labelled and three others each
        [4, 4, 4]
    """

    labelled: Tensor
    unlabelled: Tensor
    share: float

    def num_labelled(self, batch_size: int) -> int:
        """Return the number of labelled examples in a batch: their share in the data, if that is larger."""
        total = len(self.labelled) + len(self.unlabelled)
        share = max(self.share, len(self.labelled) / total)
        return max(1, min(batch_size - 1, round(share * batch_size)))

    def lengths(self, batch_size: int) -> list[int]:
        """Return the lengths of the batches of an epoch; the last may be smaller."""
        labelled = self.num_labelled(batch_size)
        full, rest = divmod(len(self.unlabelled), max(1, batch_size - labelled))
        return [batch_size] * full + [labelled + rest] * (rest > 0)

    def positions(self, batch_size: int, seed: int) -> Callable[[int], Tensor]:
        """Return a function from the number of a batch to the positions of its examples, labelled first."""
        labelled, lengths = self.num_labelled(batch_size), self.lengths(batch_size)
        order = permutation(len(self.unlabelled), seed)

        def positions(which: int) -> Tensor:
            begin = which * (batch_size - labelled)
            others = order(torch.arange(begin, begin + lengths[which] - labelled))
            return torch.cat([self._labelled(which * labelled, labelled, seed), self.unlabelled[others]])

        return positions

    def _labelled(self, begin: int, count: int, seed: int) -> Tensor:
        """Return `count` labelled positions of passes over them, each in an order of its own."""
        number = torch.arange(begin, begin + count)
        passes = number // len(self.labelled)
        chosen = torch.empty_like(number)
        for each in passes.unique().tolist():
            order = permutation(len(self.labelled), derived_seed(seed, each))
            chosen[passes == each] = order(number[passes == each] % len(self.labelled))
        return self.labelled[chosen]

    def weights(self, batch_size: int, length: int) -> Tensor:
        """Return the weight of each example, (B,): the share of its kind in the data over that here."""
        labelled = self.num_labelled(batch_size)
        counts = torch.tensor([labelled, length - labelled])
        sizes = torch.tensor([len(self.labelled), len(self.unlabelled)], dtype=torch.float64)
        return ((sizes / sizes.sum()) * length / counts).repeat_interleave(counts)
