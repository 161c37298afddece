"""A pair: a Pyro model and a guide as one module that owns their parameters.

Pyro keeps what `pyro.param` and `pyro.module` name in one global store, where two programs that use the same
names share parameters without being told. A `Pair` runs its programs with a store of its own in place of that
one, and registers what they create in it like any module's parameters.
"""

import os
import sys
from abc import abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, Self, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_vae.objectives.sites import Program, guide_messenger, require_programs, run_pair
from pyro_vae.utils import serialization
from pyro_vae.utils.arrays import as_tensor
from pyro_vae.utils.frames import columns_trained_on, is_frame, require_columns
from pyro_vae.utils.isolation import ModuleStates, before_change, evaluation_mode

__all__ = [
    "OwnParameters",
    "Pair",
    "Programs",
    "as_programs",
    "as_tensors",
    "make_parameters",
    "split_pair",
    "stored_parameters",
    "waits_to_run",
]


class Programs(NamedTuple):
    """A model and a guide as they are, with the parameters that Pyro's global store holds."""

    model: Program
    guide: Program


def as_programs(call: str, pair: Any) -> Any:
    """Return an object with the attributes model and guide: `pair` itself, or the two of a 2-tuple.

    Args:
        call: The right call, for the message.
        pair: An object with both, such as a `VAE` or a `Pair`, or a tuple (model, guide).

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(pair, tuple) and len(pair) == 2 and not hasattr(pair, "model"):
        pair = Programs(*pair)
    if isinstance(pair, type):
        raise TypeError(f"expected a model and a guide; got the class {pair.__name__} itself: build one")
    if not _has_both(pair):
        raise TypeError(
            "expected an object with Pyro functions model and guide, such as a VAE or pyro_vae.Pair(model, "
            f"guide), or a tuple (model, guide); got {type(pair).__name__}: call {call}"
        )
    require_programs(call, pair.model, pair.guide)
    return pair


def split_pair(call: str, first: Any, *rest: Any) -> tuple[Program, Program, tuple[Any, ...]]:
    """Return model, guide and further arguments of a call f(model, guide, ...) or f(pair, ...).

    Raises:
        TypeError: If the first argument is neither a pair nor followed by a guide; shows the right call.
    """
    if not (isinstance(first, tuple) or _has_both(first)):
        if not rest:
            raise TypeError(f"expected a model and a guide, or a pair of both; got one argument: call {call}")
        require_programs(call, first, rest[0])
        return first, rest[0], rest[1:]
    if rest and _has_both(rest[0]):
        raise TypeError(f"expected one pair; got two, a {type(first).__name__} twice: call {call}")
    programs = as_programs(call, first)
    return programs.model, programs.guide, rest


def _has_both(pair: Any) -> bool:
    return all(callable(getattr(pair, name, None)) for name in ("model", "guide"))


class Stored(nn.Module):
    """What the programs of a pair have named by `pyro.param` and `pyro.module`.

    Attributes:
        tensors: Unconstrained parameters by Pyro's names, wherever they are registered.
        constraints: Their constraints.
        named: Modules by the names that the programs give them, wherever they are registered.
        waiting: Loaded values, by key, of what the programs have not named yet.
        promised: Constraints of these values, as text, by Pyro's names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.names: dict[Tensor, str] = {}
        self.named: dict[str, nn.Module] = {}
        self.waiting: dict[str, Tensor] = {}
        self.promised: dict[str, str] = {}

    def add_parameter(self, name: str, init: Any, constraint: Any) -> None:
        """Enter a new parameter with an initial value; a module's own is entered as it is."""
        value = init() if callable(init) else init
        if not isinstance(value, Tensor):
            raise TypeError(f"the initial value of parameter {name!r} must be a tensor; got {value!r}")
        if self.promised.pop(name, str(constraint)) != str(constraint):
            raise ValueError(
                f"the constraint of parameter {name!r} is {constraint}; it was another when saved"
            )
        if not (isinstance(value, nn.Parameter) and _is_real(constraint)):
            with torch.no_grad():
                value = nn.Parameter(transform_to(constraint).inv(value.detach()).contiguous().clone())
            self.register(name, value)
        elif self._key(name) in self.waiting:
            self.register(name, value)  # a user's parameter, which has loaded values
        self.tensors[name], self.constraints[name], self.names[value] = value, constraint, name

    def register(self, name: str, parameter: Tensor) -> None:
        """Register a parameter, and fill it with the value that was loaded for it."""
        if any(parameter is own for own in self._parameters.values()):
            return
        key = self._key(name)
        loaded = self.waiting.pop(key, parameter.detach())
        if loaded.shape != parameter.shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(parameter.shape)}, but the loaded one "
                f"{tuple(loaded.shape)}: build the pair as it was when it was saved"
            )
        parameter.data.copy_(loaded)
        self.register_parameter(key, cast(nn.Parameter, parameter))

    def _key(self, name: str) -> str:
        """Return a name as torch allows it: without dots, and other than the attributes of a module."""
        key = name.replace(".", "/")
        while hasattr(self, key):
            key += "_"
        return key

    def add(self, name: str, module: nn.Module) -> None:
        """Register a module, and fill it with values that were loaded for it."""
        key = self._key(name)
        self.add_module(key, module)
        own = {k: self.waiting.pop(k) for k in list(self.waiting) if k.startswith(f"{key}.")}
        if own:
            module.load_state_dict({k.removeprefix(f"{key}."): value for k, value in own.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        known = {*self._parameters, *self._modules}
        for key, value in state_dict.items():
            inner = key.removeprefix(prefix)
            if not self.tensors and key.startswith(prefix) and inner.split(".")[0] not in known:
                self.waiting[inner] = value
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[-2]
        unexpected[:] = [key for key in unexpected if key.removeprefix(prefix) not in self.waiting]

    def __getstate__(self) -> dict[str, Any]:
        for tensor in self.tensors.values():
            vars(tensor).pop("unconstrained", None)  # Pyro's weak reference, which cannot be copied
        return vars(self)


def _is_real(constraint: Any) -> bool:
    return constraint is None or isinstance(constraint, type(constraints.real))


class OwnParameters(nn.Module):
    """A module whose Pyro programs keep parameters in a store of their own; see the file."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = Stored()
        self.pending: dict[str, Tensor] | None = None
        """A loaded state that fits only when the programs have run once, as an autoguide's."""

    @abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""

    @abstractmethod
    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters to a file."""

    def _as_mask(self, observed: Any) -> Any:
        """Return where data are observed as `_as_tensor`, of booleans if it is a data frame of booleans."""
        found = self._as_tensor(observed)
        return found.bool() if is_frame(observed) else found

    def _as_tensor(self, value: Any) -> Any:
        """Return data as the tensor that `fit` makes of them, of the parameters' type and device.

        Args:
            value: See `utils.arrays.as_tensor`; tensors, and what does not hold rows, stay as they are.

        Raises:
            ValueError: If a data frame has other columns than those trained on.
        """
        if isinstance(value, Tensor):
            return value
        require_columns(columns_trained_on(self), value)
        parameter = next(self.parameters(), torch.zeros(()))
        return as_tensor(value, dtype=parameter.dtype, device=parameter.device)

    def _own_store(self) -> "_OwnStore":
        """Return a context in which Pyro's store is this module's, and what is named is registered."""
        return _OwnStore(self)


class _OwnStore(Messenger):
    """Exchange the content of Pyro's store for a module's in a block.

    A copy of a pair has copies of the modules that its programs name, but the programs, if they are
    functions, still call the originals. For the block these get parameters, buffers and mode of the copies.
    """

    _ATTRIBUTES = ("_parameters", "_buffers", "training")

    def __init__(self, owner: OwnParameters):
        super().__init__()
        self.owner, self.stored = owner, owner.stored
        self.lent: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> Self:
        store, stored = pyro.get_param_store(), self.stored
        self.outer = store._params, store._constraints, store._param_to_name
        store._params, store._constraints, store._param_to_name = (
            stored.tensors,
            stored.constraints,
            stored.names,
        )
        self.num_before = len(stored.tensors)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if len(self.stored.tensors) > self.num_before:
            self._register_once()
        store = pyro.get_param_store()
        store._params, store._constraints, store._param_to_name = self.outer
        for module, attributes in reversed(self.lent):
            vars(module).update(attributes)
        self.lent.clear()

    def _register_once(self) -> None:
        """Register what a PyroModule has entered in the store, unless the module is one of the owner's."""
        modules = (module for module in self.owner.modules() if module is not self.stored)
        elsewhere = {id(p) for module in modules for p in module._parameters.values()}
        for name, tensor in self.stored.tensors.items():
            if id(tensor) in elsewhere:
                for key in [k for k, own in self.stored._parameters.items() if own is tensor]:
                    del self.stored._parameters[key]
            elif isinstance(tensor, nn.Parameter):
                self.stored.register(name, tensor)

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if getattr(msg["fn"], "__self__", None) is not pyro.get_param_store():
            return  # a VAE's own
        name, *rest = msg["args"]
        held = self.stored.tensors.get(name)
        if held is None:
            if rest:
                self._meet(name, rest[0], msg["kwargs"].get("constraint") or constraints.real)
        elif rest and isinstance(rest[0], nn.Parameter) and rest[0] is not held:
            self._lend(name)

    def _meet(self, name: str, init: Any, constraint: Any) -> None:
        if isinstance(init, nn.Parameter) and _is_real(constraint):
            given, module = _module_being_named() or (name, None)
            if module is not None:
                self.stored.named[given] = module
                if module not in set(self.owner.modules()):
                    self.stored.add(given, module)
        self.stored.add_parameter(name, init, constraint)

    def _lend(self, name: str) -> None:
        """Let the module that a program names have the state of the one that is registered for it."""
        given, module = _module_being_named() or (name, None)
        own = self.stored.named.get(given)
        if module is None or own is None or any(module is lent for lent, _ in self.lent):
            return
        for original, copied in zip(module.modules(), own.modules(), strict=True):
            before_change(original)
            self.lent.append((original, {key: vars(original)[key] for key in self._ATTRIBUTES}))
            vars(original).update({key: vars(copied)[key] for key in self._ATTRIBUTES})


class _NamedModules:
    """Follow the calls of `pyro.module` in a block: it sends no message for a module without parameters."""

    def __init__(self) -> None:
        self.found: dict[str, nn.Module] = {}

    def __enter__(self) -> None:
        self.is_free = sys.getprofile() is None
        if self.is_free:
            sys.setprofile(self._follow)

    def __exit__(self, *_: Any) -> None:
        if self.is_free:
            sys.setprofile(None)

    def _follow(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call" and frame.f_code is pyro.module.__code__:
            self.found[frame.f_locals["name"]] = frame.f_locals["nn_module"]


def _module_being_named() -> tuple[str, nn.Module] | None:
    """Return name and module of the `pyro.module(...)` that is running: its parameters' messages lack it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is pyro.module.__code__:
            return frame.f_locals["name"], frame.f_locals["nn_module"]
        frame = frame.f_back
    return None


class Pair(OwnParameters):
    """A Pyro model and a guide as one module, for `fit`, `evaluate`, `SVI` and all else that takes a `VAE`.

    Its parameters are its own: those of the modules that the two belong to, and what they name by
    `pyro.param` and `pyro.module`, which enters no global store. So `parameters()`, `state_dict()`,
    `deepcopy` and `.to(device)` work, and pairs that use the same names never meet. Initial values come from
    the programs; values in Pyro's global store are not read. `pyro.infer.SVI(pair.model, pair.guide, ...)`
    trains it too.

    Args:
        model: A Pyro model: a function, a method, or a module.
        guide: A Pyro guide of the same arguments.

    Raises:
        TypeError: If one is not callable, or is a distribution or a class; or if the guide runs the model
            itself, as an `AutoNormalMessenger` does.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0, 1))
        ...         pyro.sample("x", dist.Normal(z, 1), obs=x)
        >>> def guide(x):
        ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, scale))
        >>> pair = Pair(model, guide)
        >>> pair.make_parameters(torch.zeros(3))
        >>> [name for name, _ in pair.named_parameters()], len(pyro.get_param_store())
        (['stored.scale'], 0)
    """

    written: Programs
    """The two as they were given."""

    def __init__(self, model: Program, guide: Program):
        for program in (model, guide):
            if isinstance(program, type | TorchDistributionMixin):
                raise TypeError(f"expected two Pyro functions, Pair(model, guide); got {program!r}")
        require_programs("Pair(model, guide)", model, guide)
        if guide_messenger(guide) is not None:
            raise TypeError(
                f"a {type(guide).__name__} runs the model itself, and cannot be taken apart from it: use "
                "AutoNormal, or pyro_vae.SVI(model, guide, ...)"
            )
        super().__init__()
        owners = [getattr(program, "__self__", program) for program in (model, guide)]
        self.programs = nn.ModuleList(
            dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module))
        )
        # not as submodules, whose state would be stored twice
        vars(self)["written"] = Programs(model, guide)

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with self._own_store():
            return self.written.model(*args, **kwargs)

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide."""
        with self._own_store():
            return self.written.guide(*args, **kwargs)

    def make_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Run both once, in evaluation mode, so that parameters exist before an optimiser is made of them.

        Arguments are those of the model and the guide; a small batch is enough. `fit` does this itself.
        """
        make_parameters(self, args, kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, buffers and constraints to a file, for `load`.

        Raises:
            OSError: If the file cannot be written; an existing file is then unchanged.
            ValueError: If loaded values wait for programs that have not run yet.
        """
        if self.stored.waiting:
            raise ValueError(
                "the pair was loaded and has not run since, so that it does not hold all values yet: call "
                "pair.make_parameters(*batch) first"
            )
        serialization.write(path, "pair", {"state": self.state_dict(), "constraints": self._constraints()})

    def load(self, path: str | os.PathLike[str]) -> "Pair":
        """Read what `save` wrote into this pair, built from the same programs as the saved one; return it.

        Parameters that the programs have not made yet get their values when they are made.

        Raises:
            FileNotFoundError: If the file does not exist.
            CheckpointError: If the file is damaged, holds another kind of content, or other programs.
        """
        content = serialization.read(path, "pair")

        def restore() -> Pair:
            for name, constraint in self._constraints().items():
                saved = content["constraints"].get(name, constraint)
                if saved != constraint:
                    raise ValueError(f"parameter {name!r} was {saved}, is {constraint}")
            made = self.stored.tensors
            try:
                self.load_state_dict(content["state"])
            except RuntimeError:
                if made:
                    raise
                self.pending = content["state"]  # of modules that are built when they first run
            self.stored.promised = {n: c for n, c in content["constraints"].items() if n not in made}
            return self

        return serialization.fitting(path, restore)

    def _constraints(self) -> dict[str, str]:
        return {name: str(constraint) for name, constraint in self.stored.constraints.items()}


def as_tensors(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments as tensors for a program of a `VAE` or a `Pair`, else as they are, as in Pyro.

    A program of another kind may take arrays or data frames itself.
    """
    owner = getattr(program, "__self__", None)
    if not isinstance(owner, OwnParameters):
        return args, kwargs
    convert = owner._as_tensor
    masked = {
        name: owner._as_mask(value) if name == "observed" else convert(value)
        for name, value in kwargs.items()
    }
    return tuple(map(convert, args)), masked


def make_parameters(pair: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a pair once without gradients, in evaluation mode, so that lazy parameters are made."""
    args, kwargs = as_tensors(pair.model, args, kwargs)
    states, named = ModuleStates(), _NamedModules()
    with evaluation_mode(pair.model, pair.guide), torch.no_grad(), poutine.block(), states.followed(), named:
        run_pair(pair.model, pair.guide, args, kwargs)
    states.restore_buffers()  # of modules that were not known as the pair's, and ran in training mode
    if isinstance(pair, OwnParameters):
        for name, module in named.found.items():
            if module not in set(pair.modules()):  # it has no parameter that is trained, but buffers, say
                pair.stored.named[name] = module
                pair.stored.add(name, module)
        if pair.pending is not None:
            pair.load_state_dict(pair.pending)
            pair.pending = None
    waiting = pair.stored.waiting if isinstance(pair, OwnParameters) else {}
    if waiting:
        raise ValueError(
            f"the loaded file holds {', '.join(map(repr, waiting))}, which the programs do not name with "
            "these arguments: it is of other programs, or needs other arguments"
        )


def waits_to_run(pair: Any) -> bool:
    """Return whether a pair has loaded values that it takes when its programs run for the first time."""
    return isinstance(pair, OwnParameters) and bool(pair.stored.waiting or pair.pending is not None)


def stored_parameters(*programs: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the unconstrained parameters in Pyro's global store and in those of the pairs given, by name."""
    found = dict(pyro.get_param_store().named_parameters())
    for program in programs:
        owner = getattr(program, "__self__", program)
        if isinstance(owner, OwnParameters):
            found.update(owner.stored.tensors)
    return found
