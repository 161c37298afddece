"""NumPyro's SVI under `jax.jit`: one call per step, or all steps of a block in one jitted loop."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from cases import LEARNING_RATE, Case, Order
from jax import Array, lax, random
from numpyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO
from numpyro.infer.svi import SVIState
from torch import nn

NAMES = ("NumPyro, jitted step", "NumPyro, jitted loop")
Layer = Callable[[list[Array], Array], Array]
convolve = partial(lax.conv_general_dilated, dimension_numbers=("NCHW", "OIHW", "NCHW"))


def functional(network: nn.Sequential, first: int) -> Layer:
    """Return a torch network as a function of all parameters, of which its own begin at `first`."""
    layers: list[Layer] = []
    for module in network:
        layers.append(LAYERS[type(module)](module, first))
        first += len(list(module.parameters()))

    def apply(parameters: list[Array], x: Array) -> Array:
        for layer in layers:
            x = layer(parameters, x)
        return x

    return apply


def convolution(module: nn.Conv2d, i: int) -> Layer:
    pads = [(pad, pad) for pad in module.padding]
    return lambda p, x: convolve(x, p[i], module.stride, pads) + p[i + 1][:, None, None]


def transposed_convolution(module: nn.ConvTranspose2d, i: int) -> Layer:
    """Return a transposed convolution: flipped kernel, input dilated by the stride."""
    pads = [(k - 1 - pad, k - 1 - pad) for k, pad in zip(module.kernel_size, module.padding, strict=True)]

    def apply(p: list[Array], x: Array) -> Array:
        kernel = jnp.flip(p[i].swapaxes(0, 1), (2, 3))
        return convolve(x, kernel, (1, 1), pads, lhs_dilation=module.stride) + p[i + 1][:, None, None]

    return apply


LAYERS: dict[type[nn.Module], Callable[..., Layer]] = {
    nn.Linear: lambda module, i: lambda p, x: x @ p[i].T + p[i + 1],
    nn.Tanh: lambda module, i: lambda p, x: jnp.tanh(x),
    nn.ReLU: lambda module, i: lambda p, x: jax.nn.relu(x),
    nn.Flatten: lambda module, i: lambda p, x: x.reshape(len(x), -1),
    nn.Unflatten: lambda module, i: lambda p, x: x.reshape(len(x), *module.unflattened_size),
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed_convolution,
}


class Peer:
    def __init__(self, name: str, case: Case, pixels: np.ndarray):
        self.in_loop = name.endswith("loop")
        encoder, decoder = case.networks()
        start = [p.detach().numpy() for p in (*encoder.parameters(), *decoder.parameters())]
        encode = functional(encoder, 0)
        decode = functional(decoder, len(list(encoder.parameters())))

        def parameters() -> list[Array]:
            return [numpyro.param(f"p{number}", jnp.array(value)) for number, value in enumerate(start)]

        def model(x: Array) -> None:
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(case.latent), 1.0).to_event(1))
                likelihood = dist.Bernoulli(logits=decode(parameters(), z))
                numpyro.sample("x", likelihood.to_event(len(case.event_shape)), obs=x)

        def guide(x: Array) -> None:
            with numpyro.plate("data", len(x)):
                loc, raw = jnp.split(encode(parameters(), x), 2, axis=-1)
                numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw) + 1e-6).to_event(1))

        elbo = TraceMeanField_ELBO() if case.particles == 1 else RenyiELBO(0, case.particles)
        self.svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), elbo)
        self.order = Order(len(pixels), case.batch)
        self.key = random.key(1)
        rows = jnp.array(pixels.reshape(-1, *case.event_shape))

        def make(key: Array, index: Array) -> Array:
            return random.bernoulli(key, rows[index] / 255).astype(jnp.float32)

        self.made = jnp.stack([make(random.key(n), self.order.next().numpy()) for n in range(16)])
        self.state = self.svi.init(random.key(0), self.made[0])

        def step(state: SVIState, key: Array, index: Array) -> tuple[SVIState, Array]:
            key, draw = random.split(key)
            return self.svi.update(state, make(draw, index))[0], key

        def loop(state: SVIState, key: Array, order: Array, begin: int, end: int) -> tuple[SVIState, Array]:
            def body(number: Array, carry: tuple[SVIState, Array]) -> tuple[SVIState, Array]:
                index = lax.dynamic_slice(order, [number * case.batch], [case.batch])
                return step(*carry, index)

            return lax.fori_loop(begin, end, body, (state, key))

        def ready_loop(state: SVIState, made: Array, end: int) -> SVIState:
            return lax.fori_loop(0, end, lambda n, state: self.svi.update(state, made[n % 16])[0], state)

        self.update = jax.jit(lambda state, x: self.svi.update(state, x)[0], donate_argnums=0)
        self.step, self.loop, self.ready_loop = (
            jax.jit(function, donate_argnums=0) for function in (step, loop, ready_loop)
        )

    def run(self, steps: int, *, ready: bool) -> int:
        if self.in_loop:
            self.run_loop(steps, ready=ready)
        else:
            for number in range(steps):
                if ready:
                    self.state = self.update(self.state, self.made[number % 16])
                else:
                    index = self.order.next().numpy()
                    self.state, self.key = self.step(self.state, self.key, index)
        jax.block_until_ready(self.state)
        return steps

    def run_loop(self, steps: int, *, ready: bool) -> None:
        if ready:
            self.state = self.ready_loop(self.state, self.made, steps)
            return
        while steps:
            order, begin, end = self.order.several(steps)
            self.state, self.key = self.loop(self.state, self.key, order.numpy(), begin, end)
            steps -= end - begin

    def weights(self) -> list[np.ndarray]:
        parameters = self.svi.get_params(self.state)
        return [np.asarray(parameters[f"p{number}"]) for number in range(len(parameters))]


make_peer = Peer
