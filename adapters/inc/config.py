"""MixQuant, PTILMPQ and saved plans as Neural Compressor's configurations, and how they become a plan for a model."""

import copy
import glob
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, cast

from torch import nn

from mpq_plugins.allocation.contract import Allocator
from mpq_plugins.allocation.mixquant import MixQuant
from mpq_plugins.allocation.ptilmpq import PTILMPQ
from mpq_plugins.errors import MismatchError, SettingError
from mpq_plugins.models.kinds import layer_kind
from mpq_plugins.plans.plan import Plan
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.simulation.match import match

from ..shared.compressor_plans import (
    SCHEME,
    as_globs,
    as_plan,
    as_scheme,
    combinations,
    measured_plan,
    reference_size,
    several,
)
from ..shared.compressor_quiet import quiet_import
from .names import BY_TYPE, check_float, checked_white_list, matching, shown

with quiet_import():
    from neural_compressor.common.utils import DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST, GLOBAL, LOCAL
    from neural_compressor.torch.quantization.config import RTNConfig, TorchBaseConfig

T = TypeVar("T")
OneOrMore: TypeAlias = T | Sequence[T]
"""A value, or several for `autotune` to try."""

FLOAT = "fp32"
INCS_OWN = ("params_list", "non_tunable_params", "local_config", "global_config", "white_list")


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

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_initialized and name not in self.params_list and name not in INCS_OWN and name[0] != "_":
            raise SettingError(f"{type(self).__name__}: has no {name} to set; it has {', '.join(self.params_list)}")
        if self._is_initialized and name == "white_list":
            raise SettingError("white_list: is for the making of a configuration; set_local says what differs later")
        super().__setattr__(name, value)

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters alone, without Neural Compressor's own attributes."""
        return {name: getattr(self, name) for name in self.params_list if name != "white_list"}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it, local ones and white_list included; `from_dict` reads it."""
        parameters: dict[str, Any] = _plain(self.get_params_dict())
        if isinstance(self.white_list, list):
            parameters["white_list"] = [_key(listed) for listed in self.white_list]
        local = {
            _key(key): _plain(config.get_params_dict()) if isinstance(config, PlanningConfig) else {"dtype": FLOAT}
            for key, config in self.own_local().items()
        }
        whole = self.white_list != EMPTY_WHITE_LIST
        return parameters if whole and not local else {LOCAL: local, **({GLOBAL: parameters} if whole else {})}

    def own_local(self) -> dict[Any, Any]:
        """The local configurations that were set, and not made by white_list."""
        listed, values = self.white_list if isinstance(self.white_list, list) else (), self.get_params_dict()
        return {
            key: config
            for key, config in self.local_config.items()
            if key not in listed or config.get_params_dict() != values
        }

    @classmethod
    def from_dict(cls, config_dict: Any) -> Self:
        """What `to_dict` gave, or parameters by name. Raises SettingError for anything else."""
        if not isinstance(config_dict, dict):
            raise SettingError(f"{cls.__name__}: is a {type(config_dict).__name__}; give its parameters as a dict")
        if not config_dict.keys() & {GLOBAL, LOCAL}:
            return cls(**{str(name): value for name, value in config_dict.items()})
        _refuse_unknown(cls, {name: None for name in config_dict if name not in (GLOBAL, LOCAL)})
        local = config_dict.get(LOCAL) or {}
        if not isinstance(local, dict) or not all(isinstance(document, dict) for document in local.values()):
            raise SettingError(f"{cls.__name__}: {LOCAL} is to be a dict of configurations by name")
        config = cls.from_dict(config_dict[GLOBAL]) if GLOBAL in config_dict else cls(white_list=EMPTY_WHITE_LIST)
        for name, document in local.items():
            config.set_local(name, RTNConfig(dtype=FLOAT) if document == {"dtype": FLOAT} else cls.from_dict(document))
        return config

    def expand(self) -> list["PlanningConfig"]:
        """One configuration for each combination of the listed values, by `relative_size`."""
        made = self.variants()
        return sorted(made, key=lambda config: config.relative_size()) if len(made) > 1 else made

    def variants(self) -> list["PlanningConfig"]:
        """The same, in the order of the lists."""
        values = self.get_params_dict()
        varied = {name: value for name, value in values.items() if several(name, value, self.sequences)}
        if not varied:
            return [self]
        made = []
        for chosen in combinations(values, varied):
            config = type(self)(**chosen, white_list=self.white_list)
            config.local_config.update(copy.deepcopy(self.own_local()))
            made.append(config)
        return made

    def relative_size(self) -> float:
        """How large its plans are, as far as that can be told without the model.

        Exact for one parameter that varies; `inc.autotune` goes by the true sizes.
        """
        raise NotImplementedError

    def get_model_info(self, model: nn.Module) -> list[tuple[str, str]]:
        """Name and type of every layer that has a quantizable weight, convolutions too.

        Raises SettingError for a model that is quantized already.
        """
        check_float(model)
        return [(name, type(module).__name__) for name, module in model.named_modules() if layer_kind(module)]

    def to_config_mapping(
        self, config_list: list[Any] | None = None, model_info: list[tuple[str, str]] | None = None
    ) -> "OrderedDict[tuple[str, str], PlanningConfig]":
        """Every layer's configuration, by name and type; layers that stay in float are not in it."""
        layers = list(model_info or [])
        configs: dict[tuple[str, str], Any] = {}
        if self.global_config is not None:
            configs = dict.fromkeys(layers, self)
        for key, config in self.local_config.items():
            configs.update(dict.fromkeys(matching(key, layers), config))
        ours = [layer for layer in layers if getattr(configs.get(layer), "name", "") == self.name]
        kept = OrderedDict((layer, configs[layer]) for layer in ours)
        if not kept:
            raise MismatchError(f"{type(self).__name__}: quantizes none of the model's {len(layers)} layers")
        return kept

    def set_local(self, operator_name_or_list: Any, config: Any) -> Self:
        """Another configuration for layers: by a regex on the name, a module type, or a list of these.

        Raises SettingError for a configuration of another algorithm (but RTNConfig(dtype="fp32"), which keeps layers
        in float), and for one with `skip`, which says nothing of a layer.
        """
        if type(config) is not type(self) and getattr(config, "dtype", None) != FLOAT:
            raise SettingError(
                f"set_local({shown(operator_name_or_list)}): is a {type(config).__name__}, and only another "
                f"{type(self).__name__}, or RTNConfig(dtype={FLOAT!r}) for floating point, works here"
            )
        values = config.get_params_dict() if isinstance(config, PlanningConfig) else {}
        another = values != self.get_params_dict()  # white_list sets the configuration itself
        listed = [name for name, value in values.items() if another and several(name, value, self.sequences)]
        if listed:
            raise SettingError(
                f"set_local({shown(operator_name_or_list)}): {listed[0]}: {values[listed[0]]!r} are several, and "
                "a local configuration is not varied; give one value"
            )
        if another and values.get("skip"):
            raise SettingError(f"set_local({shown(operator_name_or_list)}): skip goes with the whole configuration")
        return cast(Self, super().set_local(operator_name_or_list, config))

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
        parameters = {name: value for name, value in values.items() if name not in ("scheme", "skip")}
        return cast(Allocator, self.allocator_class(**parameters))

    def plan_for(self, model: nn.Module, left_out: Sequence[str] = ()) -> Plan:
        """Measure the weights, and allocate."""
        skip = [*self.skip, *(glob.escape(name) for name in left_out)]
        return measured_plan(model, self.allocator(), self.scheme, skip)

    def _settle(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list | tuple) and not value and name != "skip":
                raise SettingError(f"{name}: the list is empty; one value or more")
            setattr(self, name, value)
        self.scheme = _each(self.scheme, as_scheme)
        self.skip = as_globs(self.skip)
        self._post_init()
        if self.variants() == [self]:  # others have checked themselves
            self.allocator()


class MixQuantConfig(AllocatingConfig):
    """MixQuant (arXiv 2309.17341) for `quantize`, `prepare` and `autotune`.

    A list of values for a parameter makes `autotune` try each.

    Args:
        qem: As of `MixQuant`.
        metric: As of `MixQuant`.
        bits: As of `MixQuant`.
        baseline: As of `MixQuant`.
        scheme: The base quantizer, None for asymmetric per-tensor min-max.
        skip: Globs of layers that stay in float.
        white_list: Neural Compressor's, names or module types.
        **kwargs: Refused; they are named in the error.

    Examples:
        >>> from mpq_plugins.adapters import inc
        >>> [config.qem for config in inc.MixQuantConfig(qem=[2.0, 3.0]).variants()]
        [2.0, 3.0]
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
        super().__init__(white_list=checked_white_list(white_list))
        self._settle(qem=qem, metric=metric, bits=bits, baseline=baseline, scheme=scheme, skip=skip)

    def relative_size(self) -> float:
        """Give a size to sort by, of a network that is always the same.

        Returns:
            The size.
        """
        return reference_size(self.allocator(), self.scheme)

    @classmethod
    def get_config_set_for_tuning(cls) -> "MixQuantConfig":
        """Give what is tried where the user names nothing.

        Returns:
            A configuration with a list of values.
        """
        return cls(qem=[4, 3, 2, 1.5])


class PTILMPQConfig(AllocatingConfig):
    """PTILMPQ (arXiv 2404.02947) for `quantize`, `prepare` and `autotune`.

    A list of values for a parameter makes `autotune` try each.

    Args:
        alpha: As of `PTILMPQ`.
        beta_important: As of `PTILMPQ`.
        beta_other: As of `PTILMPQ`.
        important_bits: As of `PTILMPQ`.
        other_bits: As of `PTILMPQ`.
        layer_threshold: As of `PTILMPQ`.
        channel_threshold: As of `PTILMPQ`.
        average_bits: As of `PTILMPQ`.
        size_bytes: As of `PTILMPQ`.
        scheme: None for the paper's, two regions per channel.
        skip: Globs of layers that stay in float.
        white_list: Neural Compressor's, names or module types.
        **kwargs: Refused; they are named in the error.

    Examples:
        >>> from mpq_plugins.adapters import inc
        >>> len(inc.PTILMPQConfig(alpha=[0.0, 0.5, 1.0]).variants())
        3
    """

    name = "ptilmpq"
    allocator_class = PTILMPQ

    def __init__(  # noqa: PLR0913  # PTILMPQ's parameters, and what all configurations have
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
        super().__init__(white_list=checked_white_list(white_list))
        self._settle(
            alpha=alpha, beta_important=beta_important, beta_other=beta_other, important_bits=important_bits,
            other_bits=other_bits, layer_threshold=layer_threshold, channel_threshold=channel_threshold,
            average_bits=average_bits, size_bytes=size_bytes, scheme=scheme, skip=skip,
        )  # fmt: skip

    def relative_size(self) -> float:
        """Give a size to sort by: the one that it is to reach, or that of a network that is always the same.

        Returns:
            The size.
        """
        made = cast(PTILMPQ, self.allocator())
        wanted = made.size_bytes if made.average_bits is None else made.average_bits
        return float(wanted) if wanted is not None else reference_size(made, self.scheme)

    @classmethod
    def get_config_set_for_tuning(cls) -> "PTILMPQConfig":
        """Give what is tried where the user names nothing.

        Returns:
            A configuration with a list of values.
        """
        return cls(alpha=[0.0, 0.25, 0.5, 0.75, 1.0])


class PlanConfig(PlanningConfig):
    """A plan made before, whoever made it.

    Args:
        plan: The plan or its file. A list makes `autotune` try each, smallest first.
        white_list: Neural Compressor's; the plan says what each layer gets, so none but its default is allowed.
        **kwargs: Refused; they are named in the error.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> inc.PlanConfig(plan).plan_for(net) == plan
        True
    """

    name = "mpq_plan"

    def __init__(
        self,
        plan: OneOrMore[Plan | str | Path | dict[str, Any]] | None = None,
        white_list: Any = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(type(self), kwargs)
        super().__init__(white_list=checked_white_list(white_list))
        if white_list not in (DEFAULT_WHITE_LIST, EMPTY_WHITE_LIST):
            raise SettingError("white_list: the plan says which layers are quantized; plan fewer")
        self.plan: Any = _each(plan, as_plan)
        self._post_init()

    def plan_for(self, model: nn.Module, left_out: Sequence[str] = ()) -> Plan:
        """Give the plan itself.

        Args:
            model: The model that is quantized.
            left_out: Not used: the plan says what stays in float.

        Returns:
            The plan.

        Raises:
            MismatchError: The plan was not made for the model.
            SettingError: Several plans are given, which `autotune` alone tries.
        """
        if not isinstance(self.plan, Plan):
            raise SettingError(f"plan: {len(self.plan)} are given, and only autotune tries several; give one")
        match(self.plan, model).require(type(model).__name__)
        return self.plan

    def set_local(self, operator_name_or_list: Any, config: Any) -> Self:
        """Refuse: the plan says what each layer gets.

        Args:
            operator_name_or_list: Not used.
            config: Not used.

        Returns:
            Nothing; it refuses.

        Raises:
            SettingError: Always.
        """
        raise SettingError(f"set_local({shown(operator_name_or_list)}): the plan says what each layer gets; change it")

    def relative_size(self) -> float:
        """Give a size to sort by: the plan's bits in total.

        Returns:
            The bits.
        """
        return float(self.plan.size().total_bits)

    @classmethod
    def get_config_set_for_tuning(cls) -> "PlanConfig":
        """Give nothing to try where no plan is given.

        Returns:
            A configuration that expands to no other.
        """
        return cls([])


CONFIGS: tuple[type[PlanningConfig], ...] = (MixQuantConfig, PTILMPQConfig, PlanConfig)


def _refuse_unknown(kind: type[PlanningConfig], kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        allowed = [name for name in kind._generate_params_list() if name not in kwargs]
        raise SettingError(f"{kind.__name__}: has no {', '.join(kwargs)}; it has {', '.join(allowed)}")


def _key(key: Any) -> str:
    return key if isinstance(key, str) else f"{BY_TYPE}{shown(key)}"


def _each(value: Any, convert: Any) -> Any:
    return [convert(one) for one in value] if isinstance(value, list | tuple) else convert(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Plan):
        return json.loads(value.to_json())
    if isinstance(value, Scheme):
        return SCHEME.dump_python(value, mode="json")
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _composed(config: PlanningConfig) -> str:
    return (
        f"{type(config).__name__}: cannot be added to another configuration, for Neural Compressor would quantize "
        "nothing: use one configuration, with set_local for the layers that differ"
    )
