"""Networks in exact arithmetic: integers held in float64, so that no rounding depends on the machine.

Weights and activations are multiples of 2⁻¹², stored as integers. If Σ|W| max|h| + |b| of every output stays
below 2⁵³ in units of 2⁻²⁴, each partial sum of a matrix product is an integer that float64 holds exactly, and
the result is the same in any order: for any batch size, number of threads, library and processor. This bound
is checked for the worst case when a network is converted. Nonlinearities are tables made in integer
arithmetic.

Source: Ballé, Johnston and Minnen, 2019, Integer networks for data compression with latent-variable models,
train such networks in low precision; here a trained one is converted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.fixed_point import (
    ONE,
    Integers,
    exp_negative,
    interpolate,
    normal_cdf_table,
    sigmoid,
    softplus,
)
from pyro_vae.networks import ConvDecoder

__all__ = ["UNIT", "ExactNetwork", "convert", "require_safe"]

UNIT = 4096  # units of 2⁻¹²
_LARGEST = 2**53  # float64 holds every integer up to it
_TABLE_END = 16  # beyond ±16 an activation is x, a constant, or a multiple of x, to 2⁻¹²


def require_safe(bound: int, place: str) -> int:
    """Return a bound on sums in units of 2⁻²⁴; raise if float64 does not hold all integers up to it."""
    if bound >= _LARGEST:
        raise UnsupportedModelError(
            f"{place}: sums may reach {bound:.1e} in units of 2⁻²⁴, beyond the 2⁵³ = {_LARGEST:.1e} that "
            "float64 holds exactly: use a network with smaller weights, with fewer layers, or with "
            "activation='tanh'"
        )
    return bound


class Layer(ABC):
    """A map between arrays (N, ...) of integers in units of 2⁻¹², held in float64."""

    @abstractmethod
    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return the layer's outputs."""

    @abstractmethod
    def bound(self, largest: int) -> int:
        """Return the largest |output| for inputs up to `largest`, or raise if the sums are not exact."""


class _Affine(Layer):
    weight: np.ndarray
    bias: np.ndarray

    def bound(self, largest: int) -> int:
        sums = np.abs(self._rows()).sum(1).astype(object) * largest + np.abs(self.bias)
        return require_safe(int(sums.max()) + UNIT, type(self).__name__) // UNIT + 1

    @abstractmethod
    def _rows(self) -> np.ndarray:
        """Return the weights (outputs, inputs of one output)."""

    def _apply(self, inputs: np.ndarray) -> np.ndarray:
        """Map (..., inputs) to (..., outputs), rounded to units of 2⁻¹²."""
        return np.floor((inputs @ self._rows().T + self.bias + UNIT / 2) / UNIT)


@dataclass(frozen=True)
class Linear(_Affine):
    """Linear map: weight (outputs, inputs) in units of 2⁻¹², bias (outputs,) in units of 2⁻²⁴."""

    weight: np.ndarray
    bias: np.ndarray

    def _rows(self) -> np.ndarray:
        return self.weight

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map (N, inputs) to (N, outputs)."""
        return self._apply(values)


@dataclass(frozen=True)
class Convolution(_Affine):
    """Convolution of (N, C, H, W) as a matrix product: weight (outputs, C, height, width)."""

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int]

    def _rows(self) -> np.ndarray:
        return self.weight.reshape(len(self.weight), -1)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map (N, C, H, W) to (N, outputs, H', W')."""
        (up, left), (down, right) = self.padding, self.stride
        padded = np.pad(values, ((0, 0), (0, 0), (up, up), (left, left)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.weight.shape[2:], (2, 3))
        patches = windows[:, :, ::down, ::right].transpose(0, 2, 3, 1, 4, 5)
        return self._apply(patches.reshape(*patches.shape[:3], -1)).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class TransposedConvolution(_Affine):
    """Transposed convolution, as a convolution of the input with zeros between its pixels.

    The weight (outputs, C, height, width) is torch's (C, outputs, height, width), swapped and mirrored.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]

    def _rows(self) -> np.ndarray:
        return self.weight.reshape(len(self.weight), -1)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map (N, C, H, W) to (N, outputs, H', W')."""
        border = [size - 1 - pad for size, pad in zip(self.weight.shape[2:], self.padding, strict=True)]
        inner = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], self.stride, strict=True)]
        extent = [2 * b + i + e for b, i, e in zip(border, inner, self.output_padding, strict=True)]
        spread = np.zeros((*values.shape[:2], *extent))
        rows, columns = (slice(b, b + i, s) for b, i, s in zip(border, inner, self.stride, strict=True))
        spread[:, :, rows, columns] = values
        return Convolution(self.weight, self.bias, (1, 1), (0, 0))(spread)


@dataclass(frozen=True)
class Activation(Layer):
    """Activation by its name in `networks.MLP`."""

    name: str

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map each element."""
        if self.name == "relu":
            return np.maximum(values, 0.0)
        whole = values.astype(np.int64)
        end = _TABLE_END * UNIT
        inside = activation_table(self.name)[np.clip(whole, -end, end) + end]
        above = inside if self.name == "tanh" else whole
        below = (whole + 50) // 100 if self.name == "leaky_relu" else inside
        return np.where(whole > end, above, np.where(whole < -end, below, inside)).astype(np.float64)

    def bound(self, largest: int) -> int:
        """Return the largest |output|; softplus exceeds its input by at most log 2."""
        return UNIT if self.name == "tanh" else largest + UNIT


@dataclass(frozen=True)
class Reshape(Layer):
    """Change of the shape of each example; (-1,) flattens it."""

    shape: tuple[int, ...]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map (N, ...) to (N, *shape)."""
        return values.reshape(len(values), *self.shape)

    def bound(self, largest: int) -> int:
        """Return the largest |output|."""
        return largest


@dataclass(frozen=True)
class Crop(Layer):
    """Crop of images at the lower right, as in `networks.ConvDecoder`."""

    height: int
    width: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Map (N, C, H, W) to (N, C, height, width)."""
        return values[..., : self.height, : self.width]

    def bound(self, largest: int) -> int:
        """Return the largest |output|."""
        return largest


_LAYERS: dict[str, type[Layer]] = {
    cls.__name__: cls for cls in (Linear, Convolution, TransposedConvolution, Activation, Reshape, Crop)
}


@dataclass(frozen=True)
class ExactNetwork:
    """Layers in exact arithmetic, from integers (N, ...) to int64 (N, ...), all in units of 2⁻¹².

    Args:
        layers: The layers, in order.
        largest_input: Largest |input|.

    Raises:
        UnsupportedModelError: If a sum could exceed 2⁵³.
    """

    layers: tuple[Layer, ...]
    largest_input: int

    def __post_init__(self) -> None:
        bound = self.largest_input
        for layer in self.layers:
            bound = layer.bound(bound)

    def __call__(self, values: Integers) -> Integers:
        """Return the outputs for integers (N, ...); |inputs| must not exceed `largest_input`."""
        result = values.astype(np.float64)
        for layer in self.layers:
            result = layer(result)
        return result.astype(np.int64)

    def to_plain(self) -> list[dict[str, Any]]:
        """Return the layers as plain values and integer tensors, for a file."""

        def plain(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            fits = not value.size or np.abs(value).max() < 2**31
            return torch.from_numpy(value.astype(np.int32 if fits else np.int64))

        return [
            {"layer": type(layer).__name__}
            | {field.name: plain(getattr(layer, field.name)) for field in fields(layer)}  # type: ignore[arg-type]
            for layer in self.layers
        ]

    @classmethod
    def from_plain(cls, content: list[dict[str, Any]], largest_input: int) -> "ExactNetwork":
        """Return the network described by `to_plain`."""

        def restored(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.numpy().astype(np.float64)
            return tuple(value) if isinstance(value, list) else value

        layers = []
        for entry in content:
            settings = {name: restored(value) for name, value in entry.items() if name != "layer"}
            layers.append(_LAYERS[entry["layer"]](**settings))
        return cls(tuple(layers), largest_input)


def convert(network: nn.Module, largest_input: int, input_unit: int = UNIT) -> ExactNetwork:
    """Convert a network of torch to exact arithmetic, rounding its weights to multiples of 2⁻¹².

    Takes `nn.Sequential` (and so `networks.MLP` and `ConvEncoder`) and `networks.ConvDecoder` of linear
    layers, convolutions, transposed convolutions and the activations of `networks.MLP`.

    Args:
        network: The network.
        largest_input: Largest |input| in units of 1/input_unit.
        input_unit: 2¹², or less for whole numbers; the weights of the first layer are then rounded to as
            many bits more, which numbers up to 255 need.

    Raises:
        UnsupportedModelError: If the network has other layers, weights that are not finite, or could exceed
            the integers that float64 holds.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> network = MLP(3, 2, hidden_features=(4,))
        >>> x = torch.randint(-3, 4, (5, 3))
        >>> exact = convert(network, largest_input=3 * UNIT)(x.numpy() * UNIT)
        >>> bool(np.abs(exact / UNIT - network(x.float()).detach().numpy()).max() < 0.01)
        True
    """
    units = chain([UNIT**2 // input_unit], repeat(UNIT))
    layers = tuple(_layers(network, units))
    first = next((layer for layer in layers if not isinstance(layer, Reshape | Crop)), None)
    if input_unit != UNIT and not isinstance(first, _Affine):
        raise UnsupportedModelError(
            "the guide of a likelihood of large counts must begin with a linear or convolutional layer: put "
            f'one there, or take precision="float64"; got {network}'
        )
    return ExactNetwork(layers, largest_input)


def _layers(module: nn.Module, units: Iterator[int]) -> Iterator[Layer]:
    """Yield the layers of a module; those with weights round them to the next of `units`."""
    if isinstance(module, ConvDecoder) and type(module).forward is ConvDecoder.forward:
        yield from _layers(module.stem, units)
        yield from _layers(module.upsample, units)
        yield Crop(module.height, module.width)
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for part in module:
            yield from _layers(part, units)
    elif not isinstance(module, nn.Identity | nn.Dropout):
        yield _layer(module, units)


def _layer(module: nn.Module, units: Iterator[int]) -> Layer:
    made = _CONVERSIONS.get(type(module), lambda *_: None)(module, units)
    if made is None:
        raise UnsupportedModelError(
            f"{module} has no exact form: use a network of nn.Linear, nn.Conv2d, nn.ConvTranspose2d (without "
            "groups and dilation, with zero padding in numbers), nn.Flatten, nn.Unflatten(1, shape) and the "
            'activations of networks.MLP with their default settings, or take precision="float64"'
        )
    return made


def _rounded(parameter: torch.Tensor, unit: int, module: nn.Module) -> np.ndarray:
    values = parameter.detach().cpu().double()
    if not values.isfinite().all():
        raise UnsupportedModelError(f"{module} has weights that are not finite: train the model first")
    return np.rint(values.numpy() * unit)


def _weights(module: Any, unit: int) -> tuple[np.ndarray, np.ndarray]:
    outputs = getattr(module, "out_channels", None) or module.out_features
    bias = torch.zeros(outputs) if module.bias is None else module.bias
    return _rounded(module.weight, unit, module), _rounded(bias, UNIT**2, module)


def _convolution(module: Any, units: Iterator[int]) -> Layer | None:
    is_plain = set(module.dilation) | {module.groups} == {1} and module.padding_mode == "zeros"
    if not is_plain or isinstance(module.padding, str):
        return None
    weight, bias = _weights(module, next(units))
    if not module.transposed:
        return Convolution(weight, bias, module.stride, module.padding)
    if any(pad >= size for pad, size in zip(module.padding, module.kernel_size, strict=True)):
        return None
    mirrored = np.ascontiguousarray(weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
    return TransposedConvolution(mirrored, bias, module.stride, module.padding, module.output_padding)


def _if(condition: Callable[[Any], bool], made: Callable[[Any], Layer]) -> Callable[..., Layer | None]:
    return lambda module, _: made(module) if condition(module) else None


def _always(_: Any) -> bool:
    return True


_CONVERSIONS: dict[type, Callable[..., Layer | None]] = {
    nn.Linear: lambda module, units: Linear(*_weights(module, next(units))),
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.Flatten: _if(lambda m: (m.start_dim, m.end_dim) == (1, -1), lambda _: Reshape((-1,))),
    nn.Unflatten: _if(lambda m: m.dim == 1, lambda m: Reshape(_sizes(m.unflattened_size))),
    nn.ELU: _if(lambda m: m.alpha == 1, lambda _: Activation("elu")),
    nn.GELU: _if(lambda m: m.approximate == "none", lambda _: Activation("gelu")),
    nn.LeakyReLU: _if(lambda m: m.negative_slope == 0.01, lambda _: Activation("leaky_relu")),
    nn.ReLU: _if(_always, lambda _: Activation("relu")),
    nn.SiLU: _if(_always, lambda _: Activation("silu")),
    nn.Softplus: _if(lambda m: (m.beta, m.threshold) == (1, 20), lambda _: Activation("softplus")),
    nn.Tanh: _if(_always, lambda _: Activation("tanh")),
}


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


@cache
def activation_table(name: str) -> Integers:
    """Return an activation at −16, …, 16 in steps of 2⁻¹², rounded to units of 2⁻¹².

    Example:
        >>> (activation_table("tanh")[[0, 16 * UNIT, 17 * UNIT]] / UNIT).tolist()  # at −16, 0, 1
        [-1.0, 0.0, 0.761474609375]
    """
    steps = np.arange(-_TABLE_END * UNIT, _TABLE_END * UNIT + 1, dtype=np.int64)
    t = steps << 18  # in units of 2⁻³⁰
    values = {
        "elu": lambda: np.where(t > 0, t, exp_negative(np.maximum(-t, 0)) - ONE),
        "gelu": lambda: steps * interpolate(normal_cdf_table(), steps << 8) >> 12,
        "leaky_relu": lambda: np.where(t > 0, t, (steps + 50) // 100 << 18),
        "silu": lambda: steps * sigmoid(t) >> 12,
        "softplus": lambda: softplus(t),
        "tanh": lambda: 2 * sigmoid(2 * t) - ONE,
    }[name]()
    table = (values + (1 << 17)) >> 18
    table.setflags(write=False)
    return table
