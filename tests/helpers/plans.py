"""Plans for tests, plain and with parts."""

from hypothesis import strategies as st
from torch import nn

from mpq_plugins import Affine, Codebook, EntropyCoded, LayerChoice, Part, Piecewise, Plan, SettingError, find_weights
from mpq_plugins.plans.plan import AllocatorRecord
from mpq_plugins.plans.scheme import Scheme

SCHEMES: list[Scheme] = [
    Affine(),
    Affine(symmetric=True),
    Affine(granularity="per_channel"),
    Affine(granularity="per_channel", symmetric=True, range="mse"),
    Affine(granularity="per_group", group_size=2),
    Affine(granularity="per_channel", symmetric="full"),
    Affine(granularity="per_group", group_size=2, symmetric="full", range="mse", scale_dtype="float16"),
    Affine(granularity="per_channel", scale_dtype="bfloat16"),
    Affine(granularity="per_channel", stochastic=5),
    Affine(symmetric=True, stochastic=6),
    Piecewise(),
    Piecewise(granularity="per_channel", storage="shared", breakpoint="gaussian"),
    Piecewise(granularity="per_group", group_size=2, breakpoint="laplacian_root"),
    Codebook(),
    Codebook(granularity="per_channel", init="linear"),
    EntropyCoded(),
    EntropyCoded(step=3.0),
]


def plan_of(*layers: LayerChoice, fold_bn: bool = False) -> Plan:
    """A plan made by hand."""
    record = AllocatorRecord(name="hand", parameters={})
    return Plan(made_with={}, allocator=record, model="sha256:test", fold_bn=fold_bn, layers=layers)


def with_layer(plan: Plan, name: str, **changes: object) -> Plan:
    """The plan with one layer's fields changed and validated again; what goes into a layer in float stays in float."""

    def changed(layer: LayerChoice) -> LayerChoice:
        kept = {"scheme": layer.scheme, "activations": layer.activations}
        made = LayerChoice(**(layer.model_dump() | kept | changes))
        return made.model_copy(update={"activations": None}) if made.in_float else made

    layers = tuple(changed(layer) if layer.name == name else layer for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


def linear(name: str, out: int, inputs: int, scheme: Scheme, bits: int | dict[int, tuple[int, ...]]) -> LayerChoice:
    """A linear layer with bits, or with parts bits -> channels."""
    parts = tuple(Part(bits=b, channels=c) for b, c in bits.items()) if isinstance(bits, dict) else None
    return LayerChoice(
        name=name, kind="linear", shape=(out, inputs), channel_axis=0, numel=out * inputs,
        bits=None if isinstance(bits, dict) else bits, parts=parts, scheme=scheme,
    )  # fmt: skip


def possible(scheme: Scheme, out: int, inputs: int, channels: int) -> list[int]:
    """The widths that so many channels of a linear layer can have."""

    def fits(bits: int) -> bool:
        try:
            scheme.check_bits(bits)
            scheme.check_part(bits, (out, inputs), 0, channels, "fc")
        except SettingError:
            return False
        return True

    return [*(bits for bits in (1, 2, 3, 4, 8) if fits(bits)), 16, 32]


def fits(net: nn.Module, scheme: Scheme, bits: int) -> bool:
    """Whether every layer can have that width."""
    try:
        scheme.check_bits(bits)
        for weight in find_weights(net):
            scheme.check_part(bits, weight.shape, weight.channel_axis, weight.channels, weight.name)
    except SettingError:
        return False
    return True


@st.composite
def layers(draw: st.DrawFn, name: str = "fc") -> LayerChoice:
    """Any valid linear layer."""
    out, inputs = draw(st.integers(1, 12)), draw(st.sampled_from([2, 4, 6]))
    scheme = draw(st.sampled_from(SCHEMES))
    if draw(st.booleans()):
        return linear(name, out, inputs, scheme, draw(st.sampled_from(possible(scheme, out, inputs, out))))
    widths = draw(st.lists(st.sampled_from(possible(scheme, out, inputs, 1)), min_size=out, max_size=out))
    return linear(name, out, inputs, scheme, {b: tuple(i for i, w in enumerate(widths) if w == b) for b in set(widths)})


plans = (
    st.integers(1, 4)
    .flatmap(lambda n: st.tuples(*(layers(f"block.{i}") for i in range(n))))
    .map(lambda ls: plan_of(*ls))
)
