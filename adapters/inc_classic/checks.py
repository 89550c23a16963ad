"""What of a classic configuration our strategies cannot run, and Neural Compressor would take without a word."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpq_plugins.errors import SettingError

from ..shared.compressor_plans import check_max_trials

WEIGHT_ONLY, STATIC = "post_training_weight_only", "post_training_static_quant"
DECIDED = {"bits", "group_size", "scheme", "algorithm"}
CHANGING = ("smooth_quant", "layer_wise_quant", "fast_bias_correction", "weight_correction", "rtn_args", "awq_args",
            "gptq_args", "teq_args", "autoround_args")  # fmt: skip


def check_conf(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise SettingError for what a plan does not go with; `arguments` are those of `fit`."""
    if config.approach not in (WEIGHT_ONLY, STATIC):
        raise SettingError(f"approach: {config.approach!r} is not allowed with a plan; weight_only or static")
    kwargs = config.tuning_criterion.strategy_kwargs
    if kwargs is not None and not isinstance(kwargs, dict):
        raise SettingError(f"strategy_kwargs: is a {type(kwargs).__name__}; a dict, such as {{'qem': [3, 2]}}")
    check_max_trials(config.tuning_criterion.max_trials)
    for option, key, _ in _constraints(config):
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise SettingError(f"{option}[{key!r}]: is no regular expression ({error})") from error
    if config.approach == WEIGHT_ONLY:
        _check_weight_only(config, arguments)
    elif arguments.get("q_dataloader") is None and arguments.get("q_func") is None:
        raise SettingError("calib_dataloader: none given, static quantization needs it, or calib_func")


def _check_weight_only(config: Any, arguments: Mapping[str, Any]) -> None:
    if arguments.get("q_func") is not None:
        raise SettingError("calib_func: a plan's weights need no calibration; leave it out")
    recipes = [name for name in CHANGING if (config.recipes or {}).get(name)]
    if recipes:
        raise SettingError(f"recipes: {', '.join(recipes)} would change the plan's weights; leave it out")
    for option, key, constraint in _constraints(config):
        decided = DECIDED & {*constraint.get("weight", {})}
        if decided:
            raise SettingError(
                f"{option}[{key!r}]: sets {', '.join(sorted(decided))}, which the strategy decides; leave it out "
                "or keep the layer in fp32"
            )


def _constraints(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """What the user has constrained: the option, its key, and what is set there."""
    for option in ("op_type_dict", "op_name_dict"):
        for key, constraint in (getattr(config, option) or {}).items():
            yield option, key, constraint
