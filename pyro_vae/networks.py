"""Neural networks: modules from tensor to tensor, with one leading batch dimension.

`likelihoods` and `guides` call a network through `apply_batched`, so that a network for inputs of shape
(N, *event) also takes (S, N, *event), the shape of S particles of N examples. Constructors raise TypeError
for an argument of another type and ValueError for a size out of range, naming the argument.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pyro_vae.utils.columns import COUNTS, REAL, parse_columns, parse_units
from pyro_vae.utils.serialization import rebuildable
from pyro_vae.utils.validation import (
    require_count,
    require_floating,
    require_module,
    require_shape,
    require_tensor,
    to_shape,
)

__all__ = [
    "MLP",
    "RAW_ONE",
    "ColumnEncoder",
    "ConvDecoder",
    "ConvEncoder",
    "NetworkOptions",
    "apply_batched",
    "apply_in_context",
    "as_context",
    "check_input",
    "context_of",
    "decoder",
    "encoder",
    "positive",
    "with_context",
]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class NetworkOptions(TypedDict, total=False):
    """Keyword arguments of every guide and likelihood, documented in `Guide` and `Likelihood`."""

    hidden_features: Sequence[int]
    activation: str
    network: nn.Module | Literal["conv"] | None
    context_dim: int


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {name!r}")
    return _ACTIVATIONS[name]()


@rebuildable
class MLP(nn.Sequential):
    """Multilayer perceptron: flatten, then linear layers with an activation between them.

    Args:
        in_features: Number of inputs; an input of shape (N, *event) is flattened to (N, in_features).
        out_features: Number of outputs.
        hidden_features: Width of each hidden layer; empty for one linear map.
        activation: Name of the activation between the layers: elu, gelu, leaky_relu, relu, silu,
            softplus or tanh.

    Example:
        >>> import torch
        >>> MLP(784, 40, hidden_features=(400,))(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 40])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
    ):
        require_count("in_features", in_features)
        require_count("out_features", out_features)
        widths = [in_features, *require_shape("hidden_features", hidden_features), out_features]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), _activation(activation)]
        super().__init__(*layers[:-1])


@rebuildable
class ColumnEncoder(nn.Module):
    """Perceptron from a table of mixed columns: each becomes numbers near 1 first, and 0 where it is missing.

    Real numbers are standardised, of log-normal ones the logarithms; counts become log((1 + x)/(1 + scale));
    two values −1 and 1; ordered levels equal steps from −1 to 1; categories are one-hot.

    Args:
        columns: As for `likelihoods.Columns`.
        out_features: Number of outputs.
        offset: As for `likelihoods.Columns`.
        scale: As for `likelihoods.Columns`.
        hidden_features: As in `MLP`.
        activation: As in `MLP`.

    Raises:
        TypeError: If an entry of `columns` does not name a family.
        ValueError: If a family, a number of levels or a unit is invalid.

    Example:
        >>> import torch
        >>> from pyro_vae.guides import DiagonalNormal
        >>> network = ColumnEncoder(["normal", ("categorical", 3)], 4)
        >>> network.features(torch.tensor([[0.5, 2.0]]), torch.tensor([[True, True]]))
        tensor([[0.5000, 0.0000, 0.0000, 1.0000]])
        >>> guide = DiagonalNormal((2,), 2, network=network, mask_input=True)
        >>> guide(torch.zeros(7, 2)).mean.shape
        torch.Size([7, 2])
    """

    shift: Tensor
    width: Tensor
    is_log: Tensor
    is_count: Tensor
    plain: Tensor
    category: Tensor
    code: Tensor

    def __init__(
        self,
        columns: Sequence[Any],
        out_features: int,
        *,
        offset: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        hidden_features: Sequence[int] = (400,),
        activation: str = "relu",
    ):
        super().__init__()
        self.columns = parse_columns(columns)
        families = [column.family for column in self.columns]
        shift, width = parse_units(self.columns, offset, scale)
        for place, (family, levels) in enumerate(self.columns):
            if family in COUNTS:
                shift[place], width[place] = torch.log1p(width[place]), 1.0
            elif family not in REAL:
                shift[place] = width[place] = (max(2, levels) - 1) / 2
        categories = [(place, c.levels) for place, c in enumerate(self.columns) if c.family == "categorical"]
        buffers = {
            "shift": shift,
            "width": width,
            "is_log": torch.tensor([family == "log-normal" for family in families]),
            "is_count": torch.tensor([family in COUNTS for family in families]),
            "plain": torch.tensor(
                [j for j, family in enumerate(families) if family != "categorical"], dtype=torch.int64
            ),
            "category": torch.tensor([place for place, k in categories for _ in range(k)], dtype=torch.int64),
            "code": torch.tensor([code for _, k in categories for code in range(k)], dtype=torch.int64),
        }
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)
        size = len(self.plain) + len(self.code) + len(self.columns)
        self.network = MLP(size, out_features, hidden_features=hidden_features, activation=activation)

    def features(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return the numbers (N, F) of x (N, D), 0 where it is not observed; one-hot categories come last."""
        logs = torch.where(self.is_log & (x > 0), x, 1.0).log()
        value = torch.where(self.is_log, logs, torch.where(self.is_count, x.clamp(min=0).log1p(), x))
        number = torch.where(observed, (value - self.shift.to(x.dtype)) / self.width.to(x.dtype), 0.0)
        is_code = observed[:, self.category] & (x[:, self.category] == self.code)
        return torch.cat([number[:, self.plain], is_code.to(x.dtype)], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D), or (N, 2D) with 1 where each is observed as `mask_input` gives it, to outputs."""
        D = len(self.columns)
        if x.shape[1] not in (D, 2 * D):
            raise ValueError(
                f"ColumnEncoder takes {D} columns, or {2 * D} numbers with where each is observed; got "
                f"{x.shape[1]}: a context is not among them"
            )
        observed = x[:, D:] > 0 if x.shape[1] == 2 * D else torch.ones_like(x, dtype=torch.bool)
        features = self.features(x[:, :D], observed)
        return self.network(torch.cat([features, observed.to(x.dtype)], -1))


@rebuildable
class ConvEncoder(nn.Sequential):
    """Convolutional network from images: stride-2 convolutions that halve the image, then a linear map.

    Args:
        event_shape: (channels, height, width) of one image.
        out_features: Number of outputs.
        channels: Output channels of each convolution; each halves the image, which must be large enough.
        activation: As in `MLP`.

    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 28), 40)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 40])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        out_features: int,
        *,
        channels: Sequence[int] = (32, 64),
        activation: str = "relu",
    ):
        fan_in, height, width = _image_shape("event_shape", event_shape)
        require_count("out_features", out_features)
        channels = require_shape("channels", channels)
        if min(height, width) < 2 ** len(channels):
            raise ValueError(
                f"{len(channels)} halvings need an image of at least {2 ** len(channels)} pixels per side; "
                f"got {height} x {width}: pass fewer channels"
            )
        layers: list[nn.Module] = []
        for fan_out in channels:
            layers += [
                nn.Conv2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1),
                _activation(activation),
            ]
            fan_in, height, width = fan_out, height // 2, width // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(fan_in * height * width, out_features))


@rebuildable
class ConvDecoder(nn.Module):
    """Convolutional network to images: a linear map, then transposed convolutions that double the image.

    The result is cropped to a size that is not a multiple of 2 to the number of doublings.

    Args:
        in_features: Number of inputs.
        out_shape: (channels, height, width) of the output. A likelihood with P parameters per pixel
            (`Likelihood.num_parameters`) takes P times its event's channels.
        channels: Input channels of each transposed convolution; each doubles the image.
        activation: As in `MLP`.

    Example:
        >>> import torch
        >>> ConvDecoder(20, (1, 28, 28))(torch.zeros(3, 20)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        *,
        channels: Sequence[int] = (64, 32),
        activation: str = "relu",
    ):
        super().__init__()
        out_channels, self.height, self.width = _image_shape("out_shape", out_shape)
        require_count("in_features", in_features)
        channels = require_shape("channels", channels)
        if not channels:
            raise ValueError("channels must have at least one entry, per transposed convolution; got none")
        shrink = 2 ** len(channels)
        seed_shape = (channels[0], -(-self.height // shrink), -(-self.width // shrink))
        widen = nn.Linear(in_features, math.prod(seed_shape))
        self.stem = nn.Sequential(widen, _activation(activation), nn.Unflatten(1, seed_shape))
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(channels, [*channels[1:], out_channels], strict=True):
            convolution = nn.ConvTranspose2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1)
            layers += [convolution, _activation(activation)]
        self.upsample = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor) -> Tensor:
        """Map (N, in_features) to (N, *out_shape)."""
        return self.upsample(self.stem(z))[..., : self.height, : self.width]


def encoder(
    network: Any, event_shape: tuple[int, ...], out_features: int, *, context_dim: int = 0, **options: Any
) -> nn.Module:
    """Return the network of a guide: as given, by default an `MLP`, and for "conv" a `ConvEncoder`.

    Raises:
        TypeError: If `network` is neither a module, nor None, nor a string.
        ValueError: If it is another string, or "conv" for data other than images, or with a context.
    """
    if network is None:
        return MLP(math.prod(event_shape) + context_dim, out_features, **options)
    if not _is_conv(network, event_shape):
        require_module("network", network)
        return cast(nn.Module, network)
    if context_dim:
        raise ValueError(
            'network="conv" of a guide has no input for a context: leave network out, or pass a module that '
            f"takes x and y in one vector of {math.prod(event_shape) + context_dim} numbers"
        )
    return ConvEncoder(event_shape, out_features, activation=options["activation"])


def decoder(
    network: Any, in_features: int, event_shape: tuple[int, ...], *, num_outputs: int, **options: Any
) -> nn.Module:
    """Return the network of a likelihood, as `encoder` does that of a guide; "conv" is a `ConvDecoder`."""
    if network is None:
        return MLP(in_features, num_outputs, **options)
    if not _is_conv(network, event_shape):
        require_module("network", network)
        return cast(nn.Module, network)
    _, *size = event_shape
    shape = (num_outputs // math.prod(size), *size)
    return ConvDecoder(in_features, shape, activation=options["activation"])


def _is_conv(network: Any, event_shape: tuple[int, ...]) -> bool:
    """Return whether a network is chosen by name, for images; raise if it cannot be."""
    if not isinstance(network, str):
        return False
    if network != "conv":
        raise ValueError(f'network must be a module, or "conv"; got {network!r}')
    if len(event_shape) != 3:
        raise ValueError(
            f'network="conv" is for images, event_shape (channels, height, width); got {event_shape}'
        )
    return True


def _image_shape(name: str, given: Sequence[int]) -> tuple[int, int, int]:
    shape = require_shape(name, given)
    if len(shape) != 3:
        raise ValueError(f"{name} must be an image shape, (channels, height, width); got {shape}")
    return shape


def positive(raw: Tensor) -> Tensor:
    """Map the real line to positive numbers without overflow: log(1 + e^raw) + 1e-6.

    Linear for large inputs, where exp(raw) overflows float32 at 89; the floor keeps log and division finite.

    Example:
        >>> import torch
        >>> positive(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([1.0000e-06, 6.9315e-01, 1.0000e+04])
    """
    return F.softplus(raw) + 1e-6


RAW_ONE = math.log(math.expm1(1.0 - 1e-6))  # positive(RAW_ONE) = 1


def apply_batched(network: nn.Module, inputs: Tensor, event_dim: int) -> Tensor:
    """Apply a network for (N, *event) to inputs (*batch, *event), by flattening and restoring the batch.

    Under `torch.autocast` the network computes in low precision, and its outputs return to the precision of
    its parameters, so that densities and divergences keep their digits.
    """
    batch_shape = inputs.shape[: inputs.dim() - event_dim]
    event_shape = inputs.shape[inputs.dim() - event_dim :]
    outputs = network(
        inputs if len(batch_shape) == 1 else inputs.reshape(math.prod(batch_shape), *event_shape)
    )
    if torch.is_autocast_enabled(inputs.device.type):
        outputs = outputs.to(next((parameter.dtype for parameter in network.parameters()), torch.float32))
    return outputs if len(batch_shape) == 1 else outputs.reshape(*batch_shape, *outputs.shape[1:])


def as_context(y: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return a context (*, size): y itself if it is floating-point, or classes 0 … size − 1 (*,) as one-hot.

    Raises:
        ValueError: If y has another size, a class is out of range, or a number is not finite.

    Example:
        >>> import torch
        >>> as_context(torch.tensor([2, 0]), 3, torch.float32)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    require_tensor("y", y)
    if y.is_floating_point():
        if y.dim() == 0 or y.shape[-1] != size:
            hint = ": y[:, None] has it" if size == 1 else "; classes are integers, y.long(), (*,)"
            raise ValueError(
                f"y must have shape (*, {size}), as context_dim says; got {tuple(y.shape)}{hint}"
            )
        if not y.isfinite().all():
            index = tuple((~y.isfinite()).nonzero()[0].tolist())
            raise ValueError(f"y must be finite; got {y[index]} at index {list(index)}")
        return y
    outside = (y < 0) | (y >= size)
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"y holds classes and must lie in 0 … {size - 1}, as context_dim = {size} says; got "
            f"{y[index]} at index {list(index)}"
        )
    # `F.one_hot` would read the values of y, so that no graph of a step could be recorded
    return (y[..., None] == torch.arange(size, device=y.device)).to(dtype)


def with_context(module: nn.Module, inputs: Tensor, y: Tensor | None) -> Tensor:
    """Append a context y to inputs (*, D), both broadcast over *, if the module has `context_dim` above 0.

    Raises:
        TypeError: If y is missing, or the module takes none.
        ValueError: As `as_context`.
    """
    context = context_of(module, inputs, y)
    return inputs if context is None else torch.cat(_broadcast(inputs, context), -1)


def context_of(module: nn.Module, inputs: Tensor, y: Tensor | None) -> Tensor | None:
    """Return the context (*, C) of a module, or None if it takes none; raise as `with_context`."""
    size = int(getattr(module, "context_dim", 0))
    if size == 0 and y is None:
        return None
    if size == 0 or y is None:
        found = "got none: pass y" if y is None else "got one: build it with context_dim"
        raise TypeError(f"{type(module).__name__} takes {'a' if size else 'no'} context y; {found}")
    return as_context(y, size, inputs.dtype).to(inputs.device)


def apply_in_context(
    module: nn.Module, inputs: Tensor, y: Tensor | None, event_dim: int
) -> tuple[Tensor, torch.Size]:
    """Apply `module.network` to inputs (*, *event), with a context y appended if the module takes one.

    Where inputs and context are broadcast, as for each of several classes, the first layer of an `MLP` is
    applied to each of the two before they are.

    Returns:
        The outputs and their batch shape, *.

    Raises:
        TypeError: As `with_context`.
        ValueError: As `as_context`.
    """
    network = cast(nn.Module, module.network)
    context = context_of(module, inputs, y)
    if context is None:
        return apply_batched(network, inputs, event_dim), inputs.shape[: inputs.dim() - event_dim]
    inputs = inputs.flatten(inputs.dim() - event_dim)
    batch_shape = _batch_shape(inputs, context)
    if type(network) is MLP and inputs.shape[:-1] != context.shape[:-1]:
        first, *others = list(network)[1:]
        if type(first) is nn.Linear and not (first._forward_hooks or first._forward_pre_hooks):
            weights = first.weight.split([inputs.shape[-1], context.shape[-1]], 1)
            hidden = F.linear(inputs, weights[0], first.bias) + F.linear(context, weights[1])
            return apply_batched(nn.Sequential(*others), hidden, 1), batch_shape
    return apply_batched(network, torch.cat(_broadcast(inputs, context), -1), 1), batch_shape


def _broadcast(*parts: Tensor) -> list[Tensor]:
    batch_shape = _batch_shape(*parts)
    return [part.expand(*batch_shape, -1) for part in parts]


def _batch_shape(*parts: Tensor) -> torch.Size:
    shapes = [part.shape[:-1] for part in parts]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        inputs, context = map(tuple, shapes)
        raise ValueError(
            f"y has batch shape {context}, but the examples have {inputs}: pass a y for each example"
        ) from error


def check_input(module: nn.Module, name: str, value: Tensor, event_shape: Sequence[int]) -> None:
    """Raise for an input whose type, event shape, dtype or device a module cannot take.

    Raises:
        TypeError: If the value is not a floating-point tensor of the module's dtype.
        ValueError: If its trailing dimensions are not `event_shape`, or it is on another device.
    """
    where = f"{type(module).__name__}: {name}"
    shape = f"(*, {', '.join(map(str, event_shape))})"
    require_floating(where, value)
    if value.shape[max(0, value.dim() - len(event_shape)) :] != tuple(event_shape):
        cure = to_shape(name, value.shape, event_shape, type(module).__name__)
        raise ValueError(f"{where} must have shape {shape}; got {tuple(value.shape)}: {cure}")
    parameter = next(module.parameters(), None)
    if parameter is None:
        return
    if value.dtype != parameter.dtype and not torch.is_autocast_enabled(value.device.type):
        raise TypeError(
            f"{where} is {value.dtype}, the parameters are {parameter.dtype}: "
            f"convert {name}, by {name}.to({parameter.dtype}), or all modules, as by vae.to({value.dtype})"
        )
    if value.device != parameter.device:
        raise ValueError(
            f"{where} lies on {value.device}, the parameters on {parameter.device}: "
            f"move one of them ({name}.to({str(parameter.device)!r}))"
        )
