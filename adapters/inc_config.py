"""MixQuant, PTILMPQ and saved plans as Neural Compressor's configurations, and how they become a plan for a model."""

import copy
import glob
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from torch import nn

from mpq_plugins.allocate.base import Allocator
from mpq_plugins.allocate.mixquant import MixQuant
from mpq_plugins.allocate.ptilmpq import PTILMPQ
from mpq_plugins.errors import MismatchError, SettingError, first_few
from mpq_plugins.legalise import require_legal
from mpq_plugins.match import match
from mpq_plugins.plan import LayerChoice, Plan
from mpq_plugins.scheme import NamedScheme, Scheme
from mpq_plugins.validation import first_problem
from mpq_plugins.weights import layer_kind

from .inc_plan import CAPABILITIES, as_plan, combinations, measured_plan, several
from .inc_quiet import quiet_import, refuse_module

try:
    with quiet_import():
        refuse_module("neural_compressor.strategy")  # of 3.7 and earlier, which have an older torch part
        from neural_compressor.common.utils import DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST
        from neural_compressor.torch.quantization.config import TorchBaseConfig
except ImportError as error:
    raise ImportError(
        "Neural Compressor 3.8 or later is not here: pip install 'mpq-plugins[inc]', or use "
        "mpq_plugins.adapters.inc_classic with 3.7 or earlier"
    ) from error

T = TypeVar("T")
OneOrMore: TypeAlias = T | Sequence[T]
"""A value, or several for `autotune` to try."""

FLOAT = "fp32"
SCHEME: TypeAdapter[Scheme] = TypeAdapter(NamedScheme)


class PlanningConfig(TorchBaseConfig):  # type: ignore[misc]  # Neural Compressor has no types
    """What our configurations share. A parameter given as a list of values makes `autotune` try each.

    Raises SettingError where the compressor would be silent: a parameter that does not exist, a name that matches no
    layer or matches others by its beginning alone, a composition with another algorithm.
    """

    name: ClassVar[str]
    sequences: ClassVar[tuple[str, ...]] = ()
    supported_configs: ClassVar[list[Any]] = []

    def plan_for(self, model: nn.Module, left_out: Sequence[str] = ()) -> Plan:
        """The plan for a model's weights, layers named `left_out` staying in float."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Self]:
        """Itself: `TuningConfig(config_set=...)` takes one configuration where it would need a list."""
        yield self

    def __add__(self, other: object) -> Self:
        raise SettingError(_composed(self))

    def _get_op_name_op_type_config(self) -> None:
        # Of ours, only a composition asks for it: it would ignore what is meant for the whole model.
        raise SettingError(_composed(self))

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters alone, without Neural Compressor's own attributes."""
        return {name: getattr(self, name) for name in self.params_list if name != "white_list"}

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON has them, local configurations included; `from_dict` reads them."""
        return cast("dict[str, Any]", _plain(super().to_dict()))

    def expand(self) -> list["PlanningConfig"]:
        """One configuration for each combination of the listed values, the one for the smallest model first."""
        values = self.get_params_dict()
        varied = {name: own for name, own in values.items() if several(name, own, self.sequences)}
        if not varied:
            return [self]
        made = []
        for chosen in combinations(values, varied):
            config = type(self)(**chosen, white_list=self.white_list)
            # What white_list says is the new one's own already.
            config.local_config = {**copy.deepcopy(self.local_config), **config.local_config}
            made.append(config)
        return sorted(made, key=lambda config: config.relative_size())

    def relative_size(self) -> float:
        """A number that grows with the plan, whatever the model is."""
        raise NotImplementedError

    def get_model_info(self, model: nn.Module) -> list[tuple[str, str]]:
        """Name and type of every layer that has a quantizable weight, convolutions too."""
        return [(name, type(module).__name__) for name, module in model.named_modules() if layer_kind(module)]

    def to_config_mapping(
        self, config_list: list[Any] | None = None, model_info: list[tuple[str, str]] | None = None
    ) -> "OrderedDict[tuple[str, str], PlanningConfig]":
        """Every layer's configuration, by name and type; layers that stay in float are not in it."""
        layers = list(model_info or [])
        found: dict[tuple[str, str], Any] = {}
        if self.global_config is not None:
            found = dict.fromkeys(layers, self)
        for key, config in self.local_config.items():
            self._check_local(key, config)
            found.update(dict.fromkeys(_matching(key, layers), config))
        own = [layer for layer in layers if getattr(found.get(layer), "name", "") == self.name]
        kept = OrderedDict((layer, found[layer]) for layer in own)
        if not kept:
            raise MismatchError(f"{type(self).__name__}: quantizes none of the model's {len(layers)} layers")
        return kept

    def _check_local(self, key: Any, config: Any) -> None:
        if type(config) is not type(self) and getattr(config, "dtype", None) != FLOAT:
            raise SettingError(
                f"set_local({_shown(key)}): is a {type(config).__name__}, and only another {type(self).__name__}, or "
                f"RTNConfig(dtype={FLOAT!r}) for floating point, works here"
            )

    @classmethod
    def register_supported_configs(cls) -> None:
        """Nothing: there is no table of operators, for every layer kind of ours is supported."""


class AllocatingConfig(PlanningConfig):
    """A configuration that is an allocator's parameters."""

    allocator_class: ClassVar[type[Any]]
    sequences = ("bits", "important_bits", "other_bits", "skip")

    scheme: Scheme | None
    skip: Any

    def allocator(self) -> Allocator:
        """The allocator. Raises SettingError for a value that it does not have, lists of values included."""
        values = self.get_params_dict()
        listed = [name for name, value in values.items() if several(name, value, self.sequences)]
        if listed:
            first = listed[0]
            raise SettingError(f"{first}: {values[first]!r} are several values, which autotune tries; give one")
        own = {name: value for name, value in values.items() if name not in ("scheme", "skip")}
        return cast(Allocator, self.allocator_class(**own))

    def plan_for(self, model: nn.Module, left_out: Sequence[str] = ()) -> Plan:
        """Measure the weights, and allocate."""
        skip = [*self.skip, *(glob.escape(name) for name in left_out)]
        return measured_plan(model, self.allocator(), self.scheme, skip)

    def _settle(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list | tuple) and not value and name != "skip":
                raise SettingError(f"{name}: the list is empty; one value or more")
            setattr(self, name, value)
        self.scheme = _each(self.scheme, _scheme)
        if isinstance(self.skip, str):
            raise SettingError(f"skip: {self.skip!r} is a string; give globs, ({self.skip!r},)")
        self._post_init()
        if self.expand() == [self]:  # others have checked themselves
            self.allocator()


class MixQuantConfig(AllocatingConfig):
    """MixQuant (arXiv 2309.17341) for `quantize`, `prepare` and `autotune`; parameters as those of `MixQuant`.

    scheme: the base quantizer, None for asymmetric per-tensor min-max. skip: globs of layers that stay in float;
    white_list: Neural Compressor's, names or module types.
    """

    name = "mixquant"
    allocator_class = MixQuant

    def __init__(
        self,
        qem: OneOrMore[float] = 2.0,
        metric: OneOrMore[str] = "relative",
        bits: OneOrMore[Sequence[int]] = tuple(range(2, 9)),
        baseline: OneOrMore[int] = 8,
        scheme: OneOrMore[Scheme | None] = None,
        skip: Sequence[str] = (),
        white_list: Any = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(type(self), kwargs)
        super().__init__(white_list=white_list)
        self._settle(qem=qem, metric=metric, bits=bits, baseline=baseline, scheme=scheme, skip=skip)

    def relative_size(self) -> float:
        """A larger QEM never makes a larger plan."""
        return -cast(MixQuant, self.allocator()).qem

    @classmethod
    def get_config_set_for_tuning(cls) -> "MixQuantConfig":
        """What is tried where the user names nothing."""
        return cls(qem=[4, 3, 2, 1.5])


class PTILMPQConfig(AllocatingConfig):
    """PTILMPQ (arXiv 2404.02947) for `quantize`, `prepare` and `autotune`; parameters as those of `PTILMPQ`.

    scheme: None for the paper's, two regions per channel. skip, white_list: as in MixQuantConfig.
    """

    name = "ptilmpq"
    allocator_class = PTILMPQ

    def __init__(
        self,
        alpha: OneOrMore[float | None] = None,
        beta_important: OneOrMore[float | None] = None,
        beta_other: OneOrMore[float | None] = None,
        important_bits: OneOrMore[Sequence[int]] = (5, 4),
        other_bits: OneOrMore[Sequence[int]] = (4, 3),
        layer_threshold: OneOrMore[float | None] = None,
        channel_threshold: OneOrMore[float | None] = None,
        average_bits: OneOrMore[float | None] = None,
        size_bytes: OneOrMore[int | None] = None,
        scheme: OneOrMore[Scheme | None] = None,
        skip: Sequence[str] = (),
        white_list: Any = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(type(self), kwargs)
        super().__init__(white_list=white_list)
        self._settle(
            alpha=alpha, beta_important=beta_important, beta_other=beta_other, important_bits=important_bits,
            other_bits=other_bits, layer_threshold=layer_threshold, channel_threshold=channel_threshold,
            average_bits=average_bits, size_bytes=size_bytes, scheme=scheme, skip=skip,
        )  # fmt: skip

    def relative_size(self) -> float:
        """The bits a weight would have on average in a network of equal layers; thresholds make it unknown: 0."""
        made = cast(PTILMPQ, self.allocator())
        if made.size_bytes is not None or made.average_bits is not None:
            return float(made.size_bytes or made.average_bits or 0)
        shares = (made.alpha, made.beta_important, made.beta_other)
        if any(share is None for share in shares):
            return 0.0
        alpha, *betas = cast("tuple[float, float, float]", shares)
        important, other = (
            beta * high + (1 - beta) * low
            for beta, (high, low) in zip(betas, (made.important_bits, made.other_bits), strict=True)
        )
        return alpha * important + (1 - alpha) * other

    @classmethod
    def get_config_set_for_tuning(cls) -> "PTILMPQConfig":
        """What is tried where the user names nothing."""
        return cls(alpha=[0.0, 0.25, 0.5, 0.75, 1.0])


class PlanConfig(PlanningConfig):
    """A plan made before, whoever made it: the plan or its file. A list makes `autotune` try each, smallest first."""

    name = "mpq_plan"

    def __init__(
        self,
        plan: OneOrMore[Plan | str | Path | dict[str, Any]],
        white_list: Any = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(type(self), kwargs)
        super().__init__(white_list=white_list)
        if white_list not in (DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST):
            raise SettingError("white_list: the plan says which layers are quantized; plan fewer")
        self.plan: Any = _each(plan, as_plan)
        self._post_init()

    def plan_for(self, model: nn.Module, left_out: Sequence[str] = ()) -> Plan:
        """The plan itself. Raises MismatchError for a model that it was not made for."""
        if not isinstance(self.plan, Plan):
            raise SettingError(f"plan: {len(self.plan)} are given, and only autotune tries several; give one")
        match(self.plan, model).require(type(model).__name__)
        return self.plan

    def set_local(self, operator_name_or_list: Any, config: Any) -> Self:
        """Refused: the plan says what each layer gets. Raises SettingError."""
        raise SettingError(f"set_local({_shown(operator_name_or_list)}): the plan says what each layer gets; change it")

    def relative_size(self) -> float:
        """Its bits in total."""
        return float(self.plan.size().total_bits)

    @classmethod
    def get_config_set_for_tuning(cls) -> list[Any]:
        """Nothing to try where no plan is given."""
        return []


CONFIGS: tuple[type[PlanningConfig], ...] = (MixQuantConfig, PTILMPQConfig, PlanConfig)


def joint_plan(model: nn.Module, configs: Mapping[str, PlanningConfig]) -> Plan:
    """One plan from the configuration of each layer, by name; layers that have none stay in float.

    Raises MismatchError and SettingError as the configurations do, and SettingError for layers of one weight that
    have different ones, or for a plan with quantized activations.
    """
    every = [name for name, module in model.named_modules() if layer_kind(module)]
    distinct: list[PlanningConfig] = []
    for config in configs.values():
        if config not in distinct:
            distinct.append(config)
    left_out = [] if isinstance(distinct[0], PlanConfig) else [name for name in every if name not in configs]
    plans = [config.plan_for(model, left_out) for config in distinct]
    if len(plans) == 1:
        require_legal(plans[0], CAPABILITIES)
        return plans[0]
    layers: list[LayerChoice] = []
    skipped: list[str] = []
    names = dict.fromkeys(name for plan in plans for layer in plan.layers for name in layer.names)
    done: set[str] = set()
    for name in (name for name in every if name in names and name not in done):
        config = configs[name]
        layer = plans[distinct.index(config)].by_any_name.get(name)
        tied = next(plan.by_any_name[name].names for plan in plans if name in plan.by_any_name)
        if any(configs.get(other, config) != config for other in tied):
            alike = first_few([repr(other) for other in tied], ", ")
            raise SettingError(f"set_local: {alike} share a weight; configure them alike")
        done |= {*tied}
        if layer is None:
            skipped.append(name)
        else:
            layers.append(layer)
    first = plans[0]
    update = {"layers": tuple(layers), "skipped": (*first.skipped, *(n for n in skipped if n not in first.skipped))}
    return first.model_copy(update=update)


def _refuse_unknown(kind: type[PlanningConfig], kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        allowed = [name for name in kind._generate_params_list() if name not in kwargs]
        raise SettingError(f"{kind.__name__}: has no {', '.join(kwargs)}; it has {', '.join(allowed)}")


def _each(value: Any, convert: Any) -> Any:
    return [convert(one) for one in value] if isinstance(value, list | tuple) else convert(value)


def _scheme(value: Any) -> Scheme | None:
    if value is None or isinstance(value, Scheme):
        return value
    try:
        return SCHEME.validate_python(value)
    except ValidationError as error:
        raise SettingError(f"scheme: {first_problem(error)}; give Affine(...), Piecewise(...) or None") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return json.loads(value.to_json())
    if isinstance(value, Scheme):
        return SCHEME.dump_python(value, mode="json")
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _matching(key: Any, layers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The layers that a local configuration is for: by type, or by a regex on the name as the compressor matches it."""
    if not isinstance(key, str):
        hits = [layer for layer in layers if layer[1] == getattr(key, "__name__", "")]
    else:
        try:
            hits = [layer for layer in layers if re.match(key, layer[0])]
        except re.error as error:
            raise SettingError(f"set_local({key!r}): is no regular expression ({error})") from error
        loose = [repr(name) for name, _ in hits if not re.fullmatch(key, name)]
        if loose:
            exact = (
                f"{f'^{re.escape(key)}$'!r} for that layer alone, or " if any(key == name for name, _ in hits) else ""
            )
            raise SettingError(
                f"set_local({key!r}): would take {first_few(loose, ', ')} too, by the beginning of the name; write "
                f"{exact}{f'{key}.*'!r} for all of them"
            )
    if not hits:
        names = ", ".join(repr(name) for name, _ in layers[:3])
        raise MismatchError(f"set_local({_shown(key)}): matches no layer; names look like {names}")
    return hits


def _shown(key: Any) -> str:
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))


def _composed(config: PlanningConfig) -> str:
    return (
        f"{type(config).__name__}: cannot be added to another configuration, for Neural Compressor would quantize "
        "nothing: use one configuration, with set_local for the layers that differ"
    )
