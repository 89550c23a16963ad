"""A plan by the names that GGUF files have: its own, or those that gguf maps from transformers' names."""

from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.plan import Plan
from mpq_plugins.weights.gguf_names import mapped, of_gguf


def renamed(plan: Plan, architecture: str | None, layers: int) -> Plan:
    """The plan by GGUF's names, itself where it has them.

    Raises SettingError, naming them, for layers that have no name there.
    """
    names = [name for layer in plan.layers for name in layer.names]
    if of_gguf(names):
        return plan
    found = mapped(names, architecture, layers)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SettingError(
            f"layer {unknown[0]!r}, one of {len(unknown)} such, has no name in GGUF files of {architecture!r}"
            f"{': ' + first_few(unknown, ', ') if len(unknown) > 1 else ''}. Skip it (--skip {unknown[0]!r}), or plan "
            "the model's GGUF file itself"
        )
    # What is left in float need not be in the file under any name.
    skipped = mapped(plan.skipped, architecture, layers)
    kept = tuple(name for name in plan.skipped if name in skipped)
    return plan.model_copy(update={"skipped": kept, "left_alone": ()}).renamed(found | skipped)
