"""The sum of losses and gradients over the parts of a batch, in this process and in others.

One flat buffer holds all that processes have to agree on in a step:

    gradients | for each parameter, the parts with a gradient | loss, weight, rows, errors, stops, saves

Each part adds to it, and one sum over the processes follows, whatever a part did: so none waits for another
that has raised an error. A loss is a sum over data, unless the plate of a pair subsamples: then it speaks for
all N data, and that of the batch is the mean of its parts, weighted by their lengths. Stops and saves are the
numbers of processes that wish to stop, and to save, after the step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.utils.processes import Processes, raise_for_all

__all__ = ["GradientSum"]

_LOSS, _WEIGHT, _ROWS, _ERRORS, _STOPS, _SAVES = range(6)


class GradientSum:
    """Sum of losses and gradients; one for all steps, since its memory is kept.

    Args:
        processes: Those that take a step together.
        parameters: The parameters.

    Raises:
        ValueError: If the parameters are on several devices.

    Attributes:
        stop: Set it before a step to ask all processes to stop after it; True after the step if one asked.
        save: The same, to save what was trained.
        rows: Number of data of the last step.

    Example:
        >>> weight = torch.zeros(2)
        >>> both = GradientSum(Processes(None), [weight])
        >>> for loss in (1.0, 2.0):  # of two parts
        ...     both.add_gradients([torch.ones(2)])
        ...     both.add_loss(loss, rows=4, scaled=False)
        >>> both.reduce(None)
        (3.0, [tensor([2., 2.])])
        >>> both.rows
        8
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor]):
        devices = {parameter.device for parameter in parameters}
        if len(devices) != 1:
            found = sorted(map(str, devices))
            raise ValueError(f"the parameters must be on one device in each process; got {found}")
        self.processes, self.parameters = processes, list(parameters)
        self.stop, self.save, self.rows, self.is_clear = False, False, 0, True
        dtypes = [parameter.dtype for parameter in parameters]
        dtype = max([torch.float32, *dtypes], key=lambda dtype: torch.finfo(dtype).bits)
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + len(sizes) + 6, dtype=dtype, device=devices.pop())
        *slices, self.present, self.numbers = self.flat.split([*sizes, len(sizes), 6])
        self.sums = [part.view(p.shape) for part, p in zip(slices, parameters, strict=True)]
        self.pending: list[Tensor | None] = []
        self.totals = [0.0] * 6

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Note the gradients of a part, one or None for each parameter; they are read by `add_loss`."""
        self.pending = list(gradients)

    def add_loss(self, loss: float, *, rows: int, scaled: bool) -> None:
        """Add a part, whose gradients have been noted.

        Args:
            loss: Its loss.
            rows: Number of its data.
            scaled: Whether the loss speaks for all N data, and is not a sum over those of the part.
        """
        weight = rows if scaled else 1
        given = [number for number, gradient in enumerate(self.pending) if gradient is not None]
        replaces = self.is_clear and weight == 1 and len(given) == len(self.sums)  # as most often
        if self.is_clear:
            (self.present if replaces else self.flat).zero_()
        if given:
            sums = [self.sums[number] for number in given]
            gradients = [g.to_dense() if g.is_sparse else g for g in self.pending if g is not None]
            if replaces:
                torch._foreach_copy_(sums, gradients)
            else:
                torch._foreach_add_(sums, gradients, alpha=weight)
            self.present[given] += 1
        self.is_clear = False
        self.totals[_LOSS] += loss * weight
        self.totals[_WEIGHT] += rows * scaled
        self.totals[_ROWS] += rows
        self.pending = []

    def reduce(self, error: Exception | None) -> tuple[float, list[Tensor | None]]:
        """Return loss and gradients of the whole batch, the same in all processes.

        The gradients are views of the buffer, which is valid until the next part is added.

        Args:
            error: What a part has raised here, if any.

        Raises:
            Exception: The error; or that of another process, as `Processes.gather` raises it.
        """
        if error is not None or self.is_clear:
            self.flat.zero_()
        if error is not None:
            self.totals = [0.0] * 6
            self.totals[_ERRORS] = 1.0
        self.totals[_STOPS], self.totals[_SAVES] = float(self.stop), float(self.save)
        self.numbers.copy_(torch.tensor(self.totals, dtype=self.flat.dtype))
        self.processes.sum(self.flat)
        loss, weight, rows, errors, stops, saves = self.numbers.tolist()
        present = self.present.tolist()
        self.totals, self.rows, self.pending = [0.0] * 6, int(rows), []
        self.stop, self.save = stops > 0, saves > 0
        if errors:
            own = None if error is None else (type(error).__name__, str(error))
            raise_for_all(self.processes.gather(lambda: own), error)
        if weight:
            self.flat /= weight
            loss /= weight
        gradients: list[Tensor | None] = [
            _like(parameter, total) if count else None
            for parameter, total, count in zip(self.parameters, self.sums, present, strict=True)
        ]
        return loss, gradients

    def clear(self) -> None:
        """Begin a step: the first part is not added to what is there."""
        self.is_clear = True
        self.totals = [0.0] * 6

    def clip(self, gradients: Sequence[Tensor | None], largest: float) -> None:
        """Scale the gradients down to a norm of at most `largest`, as torch's `clip_grad_norm_`."""
        given = [gradient for gradient in gradients if gradient is not None]
        norm = torch.nn.utils.get_total_norm(given)
        torch._foreach_mul_(given, (largest / (norm + 1e-6)).clamp(max=1.0))


def _like(parameter: Tensor, total: Tensor) -> Tensor:
    """Return a sum with dtype and strides of its parameter, as fused updates require."""
    if total.dtype == parameter.dtype and total.stride() == parameter.stride():
        return total
    return torch.empty_like(parameter).copy_(total)
