"""Variational autoencoder as two Pyro functions, the generative model p(z) p(x|z) and the guide q(z|x).

    model(x):  plate("data") → z ~ prior() → x ~ likelihood(z), observed
    guide(x):  plate("data") → z ~ posterior(x)

Notation: x (N, *event_shape), z (N, K), N examples per batch, K latent dimensions.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.data.sources import arguments
from pyro_vae.objectives.pair import OwnParameters
from pyro_vae.utils import serialization
from pyro_vae.utils.elements import check_observed, observe_elements
from pyro_vae.utils.frames import columns_trained_on, note_columns
from pyro_vae.utils.isolation import evaluation_mode, isolated_generators
from pyro_vae.utils.model_card import (
    ModelCard,
    count_parameters,
    describe_part,
    describe_scores,
    describe_support,
    describe_versions,
)
from pyro_vae.utils.serialization import rebuild, rebuildable, spec
from pyro_vae.utils.validation import (
    known_support,
    nan_message,
    outside_support,
    require_count,
    require_floating,
    same_support,
    to_shape,
)

__all__ = ["VAE"]


@rebuildable
class VAE(OwnParameters):
    r"""Variational autoencoder: model p(z) p(x|z) and guide q(z|x) for `pyro.infer.SVI` or `pyro_vae.SVI`.

    .. math:: \mathrm{ELBO}(x) = E_q[\log p(x|z)] - \mathrm{KL}(q(z|x) \,\|\, p(z)) \le \log p(x)

    in nats per datum. Sites: latent "z", observed "x", plate "data" over the batch. The parameters belong to
    the modules, or to the VAE if a guide function names them by `pyro.param` or `pyro.module`; Pyro's global
    parameter store is not used, so that VAEs, copies and pickles train independently. (A `PyroModule` as
    prior or likelihood shares parameters with others of the same names, by Pyro's rules; `fit` isolates it.)

    `fit` and `pyro_vae.SVI` check with `check_guide` that the guide fits.

    Args:
        prior: Module that returns p(z) with event shape (K,), called without arguments. See `priors`.
        likelihood: Module from z (*, K) to p(x|z) with batch shape (*,). See `likelihoods`.
        guide: Module from x (N, *event_shape) to q(z|x) with batch shape (N,) and event shape (K,), see
            `guides`; or a Pyro guide function of x with its own plate and the sample site "z".

    Raises:
        TypeError: If a part is not callable, or is a class or a distribution.
        ValueError: If prior and likelihood have different numbers of latent dimensions.

    Source:
        D. P. Kingma, M. Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114.

    Example:
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(20),
        ...     likelihood=likelihoods.Bernoulli(20, (1, 28, 28)),
        ...     guide=guides.DiagonalNormal((1, 28, 28), 20),
        ... )
        >>> x = torch.bernoulli(torch.full((5, 1, 28, 28), 0.3))
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(x)
    """

    takes_context = False

    def __init__(
        self, *, prior: nn.Module, likelihood: nn.Module, guide: nn.Module | Callable[[Tensor], Any]
    ):
        super().__init__()
        _require_parts(prior=prior, likelihood=likelihood, guide=guide)
        if type(self) is VAE:
            _require_no_argument(prior)
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = guide  # q(z|x), which approximates p(z|x)

    def model(self, x: Tensor, *context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Run the generative model p(z) p(x|z) with x observed.

        Args:
            x: (N, *event_shape).
            *context: What a `ConditionalVAE` is given.
            observed: Where x is observed, bool (N, *event_shape): what is missing has no density, and its
                values play no role. By default all is observed.
        """
        emit_param_sites(prior=self.prior, likelihood=self.likelihood)
        with data_plate(x):
            z = pyro.sample("z", self.p_z(*context))
            p, x = self._observable(z, x, *context, observed=observed)
            return pyro.sample("x", check_event_shape(p, x), obs=x)

    def _observable(
        self, z: Tensor, x: Tensor, *context: Tensor, observed: Tensor | None
    ) -> tuple[dist.Distribution, Tensor]:
        """Return p(x|z) of what is observed, and x with valid values where it is missing."""
        p = self.decode(z, *context)
        return (p, x) if observed is None else observe_elements(p, x, observed)

    def guide(self, x: Tensor, *context: Tensor, observed: Tensor | None = None) -> Tensor:
        """Run the guide q(z|x), given 0 where x is missing; arguments are those of the model."""
        emit_param_sites(posterior=self.posterior)
        with self._own_store() if self.names_parameters else nullcontext():
            q = self._call_posterior(x, *context, observed=observed)
        if not isinstance(q, dist.Distribution):
            return q  # the function samples its own sites
        with data_plate(x):
            return pyro.sample("z", q)

    @property
    def names_parameters(self) -> bool:
        """Whether the guide may make parameters as it runs: a Pyro guide function, or a `PyroModule`."""
        return isinstance(self.posterior, PyroModule) or not isinstance(self.posterior, nn.Module)

    def _call_posterior(self, x: Tensor, *context: Tensor, observed: Tensor | None = None) -> Any:
        posterior: Callable[..., Any] = self.posterior
        options: dict[str, Any] = {}
        if observed is not None:
            x = torch.where(observed, x, 0.0)
            if getattr(posterior, "mask_input", False):
                options["observed"] = observed
        if getattr(posterior, "needs_log_joint", False):  # it optimises q under this model
            return posterior(x, partial(self.log_joint, observed=observed), **options)
        return posterior(x, *context, **options)

    def p_z(self, *context: Tensor) -> dist.Distribution:
        """Return p(z), with batch shape () and event shape (K,)."""
        return self.prior(*context)

    def encode(self, x: Any, *context: Any, observed: Any = None) -> dist.Distribution:
        """Return q(z|x), with batch shape (N,) and event shape (K,).

        Here and in the methods below, arguments are tensors, or arrays, sparse matrices, data frames or
        `Images`, which become tensors as in `fit`.

        Args:
            x: (N, *event_shape).
            *context: y, of a `ConditionalVAE`.
            observed: Where x is observed, bool (N, *event_shape); by default everywhere.
        """
        x, observed = self._as_tensor(x), self._as_mask(observed)
        context = tuple(map(self._as_tensor, context))
        # not around the call, as Pyro would add its table of shapes to an error
        with explaining_nan(x), poutine.block(), self._own_store(), poutine.trace() as tracer:
            q = self._call_posterior(x, *context, observed=observed)
        return q if isinstance(q, dist.Distribution) else tracer.trace.nodes["z"]["fn"]

    def decode(self, z: Any, *context: Any) -> dist.Distribution:
        """Return p(x|z), with batch shape (*,) and event shape `event_shape`, for z (*, K)."""
        return self.likelihood(*map(self._as_tensor, (z, *context)))

    def log_joint(self, x: Any, z: Any, *context: Any, observed: Any = None) -> Tensor:
        """Return log p(x, z) = log p(x|z) + log p(z), (*, N), for x (N, *event_shape) and z (*, N, K)."""
        x, z, observed = self._as_tensor(x), self._as_tensor(z), self._as_mask(observed)
        context = tuple(map(self._as_tensor, context))
        p, x = self._observable(z, x, *context, observed=observed)
        return p.log_prob(x) + self.p_z(*context).log_prob(z)

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draw examples, (N, *event_shape), from the model: z ~ p(z), then x ~ p(x|z).

        Args:
            num_samples: Number of examples, N.
            mean: Return E[x|z] instead of a draw of x, as is common for images.
        """
        require_count("num_samples", num_samples)
        p = self.decode(self.prior().sample((num_samples,)))
        return p.mean if mean else p.sample()

    @torch.no_grad()
    def reconstruct(self, x: Any, *context: Any, observed: Any = None) -> Tensor:
        """Return E[x|z], (N, *event_shape), at the mean of q(z|x), or at a draw if q has no analytic mean."""
        q = self.encode(x, *context, observed=observed)
        try:
            z = q.mean
        except NotImplementedError:
            z = q.sample()
        return self.decode(z, *context).mean

    def with_guide(self, guide: nn.Module | Callable[[Tensor], Any]) -> "VAE":
        """Return a VAE with another q(z|x) that shares (does not copy) the prior and likelihood."""
        return type(self)(prior=self.prior, likelihood=self.likelihood, guide=guide)

    def describe(self, scores: Any = None) -> ModelCard:
        """Return a card of the model: parts, the data that it takes, versions; text, HTML or Markdown.

        Args:
            scores: What `evaluate` returned for held-out data, or a dict of names and values, to show.

        Raises:
            TypeError: If the scores are neither.

        Example:
            >>> from pyro_vae import guides, likelihoods, priors
            >>> vae = VAE(
            ...     prior=priors.StandardNormal(2),
            ...     likelihood=likelihoods.Poisson(2, (6,), hidden_features=(5,)),
            ...     guide=guides.DiagonalNormal((6,), 2, hidden_features=(5,)),
            ... )
            >>> vae.describe({"log p(x)": -9.5})
            VAE: 110 parameters, float32
            prior       StandardNormal(latent_dim=2)
            likelihood  Poisson(latent_dim=2, ...): 51 parameters, weights 5 × 2, 6 × 5
            guide       DiagonalNormal(event_shape=(6,), ...): 59 parameters, weights 5 × 6, 4 × 5
            data        x (N, 6), whole numbers ≥ 0
            log p(x)    -9.5
            versions    pyro_vae ..., pyro-ppl ..., torch ...
        """
        parts: dict[str, Any] = {"prior": self.prior, "likelihood": self.likelihood, "guide": self.posterior}
        if hasattr(self, "classifier"):
            parts["classifier"] = self.classifier
        columns = columns_trained_on(self)
        parameter = next(self.parameters(), torch.zeros(()))
        dtype = str(parameter.dtype).removeprefix("torch.")
        rows = [(name, describe_part(part)) for name, part in parts.items()]
        rows += [("data", text) for text in [self._described_data()] if text]
        rows += [("columns", ", ".join(columns))] if columns else []
        rows += [*describe_scores(scores), ("versions", describe_versions())]
        title = f"{type(self).__name__}: {count_parameters(self):,} parameters, {dtype}"
        return ModelCard(title, tuple(rows))

    def _described_data(self) -> str:
        """Return shape and values of x, and the size of a context, as far as the likelihood tells them."""
        event_shape = getattr(self.likelihood, "event_shape", None)
        latent_dim = getattr(self.likelihood, "latent_dim", None)
        if event_shape is None or latent_dim is None:
            return ""
        size = getattr(self.likelihood, "context_dim", 0)
        parameter = next(self.parameters(), torch.zeros(()))
        context = [parameter.new_zeros(1, size)] if size else []
        with evaluation_mode(self), torch.no_grad(), isolated_generators(parameter.device, seed=0):
            p = self.decode(parameter.new_zeros(1, latent_dim), *context)
        shape = ", ".join(map(str, event_shape))
        values = describe_support(known_support(p))
        other = "−1 where missing" if hasattr(self, "classifier") else f"or numbers (N, {size})"
        y = f"; y, classes 0 … {size - 1}, {other}" if size else ""
        return f"x (N, {shape})" + f", {values}" * bool(values) + y

    def check_data(self, batch: Any) -> None:
        """Raise if data have the wrong shape or lie outside the likelihood's support.

        Raises:
            TypeError: If x is not a floating-point tensor, or there are more arguments than x.
            ValueError: If x is empty, has another event shape, or contains a value outside the support; the
                message names the first such value and its index. A support that depends on z, or that the
                distribution does not state, is not checked.
        """
        (x, *context), observed = self._arguments(batch)
        require_floating("x", x)
        if observed is not None:
            check_observed(x, observed)
        with evaluation_mode(self), torch.no_grad(), isolated_generators(x.device, seed=0):
            of_one = [y[:1] for y in context if y is not None]
            p_z = self.p_z(*of_one)
            shape = p_z.batch_shape or (1,)
            p, other = (self.decode(p_z.expand(shape).sample(), *of_one) for _ in range(2))
        support = known_support(check_event_shape(p, x))
        if support is None or not same_support(support, known_support(other)):
            return
        if observed is not None:
            x = torch.where(observed, x, p.sample()[0])
        message = outside_support("x", x, type(self.likelihood).__name__, support)
        if message:
            hint = (
                "; if NaN means missing, pass missing='nan' to fit and evaluate, and to what does not take "
                "it the mean of pyro_vae.applications.impute"
            )
            raise ValueError(message + hint * bool(x.isnan().any()))

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], Tensor | None]:
        """Return x, with the context of a conditional VAE, and where x is observed; raise for others."""
        args, kwargs = arguments(batch)
        signature = inspect.signature(self.model)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        required = [p.name for p in parameters if p.default is p.empty]
        if not args and not set(required) <= set(kwargs) <= {p.name for p in parameters}:
            raise TypeError(
                f"a {type(self).__name__} takes arguments by the names {', '.join(required)}; got a dict of "
                f"{', '.join(map(repr, kwargs)) or 'nothing'}: give its entries these names"
            )
        bound = signature.bind_partial(*args, **kwargs)
        given, observed = bound.args, bound.kwargs.get("observed")
        if len(given) != 1 + self.takes_context:
            takes, remedy = (
                ("x and y", "pass (x, y)")
                if self.takes_context
                else ("x alone", "pass x, or use pyro_vae.ConditionalVAE or a pyro_vae.Pair")
            )
            raise TypeError(
                f"a {type(self).__name__} takes {takes}; got {len(given)} arguments, a "
                f"{type(batch).__name__}: {remedy}"
            )
        return tuple(map(self._as_tensor, given)), self._as_mask(observed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters and constructor arguments of the VAE to a file.

        After training on a data frame, also the names of its columns, which other frames must have.

        Load it with `VAE.load(path)`, or with `VAE.load(path, into=vae)` if it has user-defined modules.

        Raises:
            OSError: If the file cannot be written; an existing file is then unchanged.
        """
        serialization.write(path, "VAE", file_content(self))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, into: "VAE | None" = None, device: str | torch.device = "cpu"
    ) -> "VAE":
        """Read a VAE written by `save`, without executing code from the file.

        Args:
            path: The file.
            into: A VAE of the same architecture to load the parameters into and return; required if the VAE
                has user-defined modules.
            device: Device of the VAE if it is rebuilt.

        Raises:
            FileNotFoundError: If the file does not exist.
            CheckpointError: If the file is damaged, is not a saved VAE, needs `into`, or does not match it.
        """
        content = serialization.read(path, "VAE", device=device)
        state = content["state"]
        if into is None and content["spec"] is None:
            raise serialization.CheckpointError(
                f"{path} holds a VAE with user-defined modules, which cannot be rebuilt from a file: build "
                "the VAE as before and call VAE.load(path, into=vae)"
            )

        def restore() -> VAE:
            vae = into
            if vae is None:
                dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
                vae = cast(VAE, rebuild(content["spec"], state)).to(device=device, dtype=dtype)
            if content["spec"] is not None and spec(vae) not in (None, content["spec"]):
                raise ValueError("the parts or their settings differ from those of `into`")
            if not isinstance(vae, cls):
                raise ValueError(f"it is a {type(vae).__name__}: call {type(vae).__name__}.load")
            vae.load_state_dict(state)
            note_columns(vae, content.get("columns"))
            return vae

        return serialization.fitting(path, restore)


@contextmanager
def explaining_nan(x: Any) -> Iterator[None]:
    """Say, of an error in a block, that x holds NaN, if it does."""
    try:
        yield
    except ValueError as error:
        if isinstance(x, Tensor):
            try:
                require_no_nan(x)
            except ValueError as explained:
                raise explained from error
        raise


def require_no_nan(x: Tensor) -> None:
    """Raise ValueError, with its index, for a value of x that is NaN."""
    if x.isnan().any():
        raise ValueError(nan_message(x))


def file_content(vae: VAE) -> dict[str, Any]:
    """Return what a file of a VAE holds: description, parameters, and the columns of the frame trained on."""
    return {"spec": spec(vae), "state": vae.state_dict(), "columns": columns_trained_on(vae)}


def require_vae(caller: str, vae: Any, *, instead: str = "") -> None:
    """Raise TypeError unless `vae` is a VAE without a context; `instead` is what to do with a context."""
    if not isinstance(vae, VAE):
        raise TypeError(f"{caller} takes a pyro_vae.VAE; got {type(vae).__name__}")
    if vae.takes_context:
        raise TypeError(
            f"{caller} takes a pyro_vae.VAE of x alone; got a {type(vae).__name__}, whose answer depends on "
            f"y{instead}"
        )


def data_plate(x: Tensor) -> pyro.plate:
    if len(x) == 0:
        raise ValueError("x is empty: the batch must hold at least one example")
    return pyro.plate("data", len(x))


def check_event_shape(p: dist.Distribution, x: Tensor) -> dist.Distribution:
    """Return p, or raise if it is not a distribution with the event shape of x."""
    if not isinstance(p, dist.Distribution):
        raise TypeError(f"the likelihood must return a Pyro distribution; got {type(p).__name__}")
    require_events(x, p.event_shape)
    return p


def require_events(x: Tensor, event_shape: Sequence[int]) -> None:
    """Raise unless x is a floating-point tensor (N, *event_shape), N ≥ 1."""
    require_floating("x", x)
    if x.dim() == 0 or x.shape[1:] != tuple(event_shape):
        raise ValueError(
            f"x must have shape (N, {', '.join(map(str, event_shape))}), as in the likelihood; "
            f"got {tuple(x.shape)}: {to_shape('x', x.shape, event_shape, 'the VAE')}"
        )
    if len(x) == 0:
        raise ValueError("x is empty: the batch must hold at least one example")


def _require_parts(**parts: Any) -> None:
    """Raise if a part does not return distributions, or prior and likelihood differ in latent dimensions."""
    for name, part in parts.items():
        if isinstance(part, type) or not callable(part) or isinstance(part, dist.Distribution):
            got = f"the class {part.__name__} itself: build one" if isinstance(part, type) else repr(part)
            raise TypeError(
                f"{name} must be a module that returns a distribution when called, such as those of "
                f"pyro_vae.priors, likelihoods and guides; got {got}"
            )
    prior, likelihood = (getattr(parts[name], "latent_dim", None) for name in ("prior", "likelihood"))
    if prior != likelihood and None not in (prior, likelihood):
        raise ValueError(
            f"the prior has {prior} latent dimensions, the likelihood expects {likelihood}: use the same "
            "latent_dim for both"
        )


def _require_no_argument(prior: Any) -> None:
    """Raise if a prior takes x or z, as a guide or a likelihood in its place does."""
    names = [*inspect.signature(getattr(prior, "forward", prior)).parameters]
    if names and names[0] in ("x", "z"):
        raise TypeError(
            f"prior must return p(z) when called without arguments, as those of pyro_vae.priors; got a "
            f"{type(prior).__name__}, which takes {names[0]}"
        )


def emit_param_sites(**modules: Any) -> None:
    """Emit a Pyro "param" site for each parameter, so that Pyro's SVI trains it.

    `pyro.module` would register parameters by name in the global store, so that a second VAE or a copy would
    use the first one's parameters and not be trained. A PyroModule emits its own sites.
    """
    for prefix, module in modules.items():
        if isinstance(module, nn.Module) and not isinstance(module, PyroModule):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    _param(parameter, name=f"{prefix}.{name}")


def _alias(parameter: nn.Parameter) -> Tensor:
    # Pyro reads the attribute `unconstrained` of a site's value. It is set on an alias, because on the
    # parameter itself it would break copying and pickling.
    alias = parameter.detach()
    alias.unconstrained = lambda: parameter  # type: ignore[attr-defined]
    return alias


_param = poutine.runtime.effectful(_alias, type="param")
