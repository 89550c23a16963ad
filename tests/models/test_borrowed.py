"""Every way of computing with another module's weight is told by its name, and reading its metadata is none."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mpq_plugins.models.borrowed import borrowed_in_source, borrowed_uses


class Base(nn.Module):
    """Layers under every kind of name; (N, 4) -> (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.deep = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        self.box = [self.a]
        self.pairs = [(self.a, nn.Identity())]
        self.code = lambda x: F.linear(x, self.b.weight)
        self.bound = functools.partial(F.linear, weight=self.a.weight)

    def by_method(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight)

    def gives(self) -> Tensor:
        return self.a.weight

    @property
    def tied(self) -> Tensor:
        return self.a.weight

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters())


def through(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(x, layer.weight)  # type: ignore[arg-type]


def dtype_of(layer: nn.Module) -> torch.dtype:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def use_argument(self: Any, x: Tensor) -> Tensor:
    return F.linear(self.b(x), self.a.weight)


def use_keyword(self: Any, x: Tensor) -> Tensor:
    return F.linear(input=x, weight=self.a.weight)


def use_bias(self: Any, x: Tensor) -> Tensor:
    return torch.addmm(self.a.bias, x, self.a.weight.t())


def use_operand(self: Any, x: Tensor) -> Tensor:
    result: Tensor = x @ self.a.weight.data
    return result


def use_local(self: Any, x: Tensor) -> Tensor:
    weight, bias = self.a.weight, self.b.bias
    return self.b(x) @ weight.t() if bias is not None else x


def use_walrus(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, weight) if (weight := self.a.weight) is not None else x


def use_loop(self: Any, x: Tensor) -> Tensor:
    for layer in self.many:
        x = F.linear(x, layer.weight)
    return x


def use_index(self: Any, x: Tensor) -> Tensor:
    result: Tensor = F.linear(x, self.many[1].weight) + self.many[0](x)
    return result


def use_enumerate(self: Any, x: Tensor) -> Tensor:
    for _, (layer, after) in enumerate(self.pairs):
        x = after(F.linear(x, layer.weight))
    return x


def use_deep(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.deep[1][0].weight)


def use_list(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.box[0].weight)


def use_dict(self: Any, x: Tensor) -> Tensor:
    kept = {"w": self.a.weight}
    return F.linear(x, kept["w"])


def use_comprehension(self: Any, x: Tensor) -> Tensor:
    return x @ torch.cat([layer.weight for layer in self.many] + [self.b.weight]).t()[:, :4]


def use_getattr(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, getattr(self, "a").weight)  # noqa: B009


def use_helper(self: Any, x: Tensor) -> Tensor:
    result: Tensor = through(x, self.a) + self.b(x)
    return result


def use_method(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.by_method(x)
    return result


def use_returned(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.gives())


def use_property(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.tied)


def use_checkpointed(self: Any, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(self.by_method, x, use_reentrant=False)
    return result


def use_lambda(self: Any, x: Tensor) -> Tensor:
    return (lambda y: F.linear(y, self.a.weight))(x)


def use_kept_lambda(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.code(x)
    return result


def use_partial(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.bound(x)
    return result


def use_inner(self: Any, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        result: Tensor = y @ self.a.weight
        return result

    return inner(x)


def use_in_place(self: Any, x: Tensor) -> Tensor:
    self.a.weight.data.mul_(0.5)
    result: Tensor = self.a(x)
    return result


def use_row(self: Any, x: Tensor) -> Tensor:
    result: Tensor = x * self.a.weight[0]
    return result


USES: dict[Callable[[Any, Tensor], Tensor], set[str]] = {
    use_argument: {"a.weight"},
    use_keyword: {"a.weight"},
    use_bias: {"a.weight", "a.bias"},
    use_operand: {"a.weight"},
    use_local: {"a.weight"},
    use_walrus: {"a.weight"},
    use_loop: {"many.0.weight", "many.1.weight"},
    use_index: {"many.1.weight"},
    use_enumerate: {"a.weight"},
    use_deep: {"deep.1.0.weight"},
    use_list: {"a.weight"},
    use_dict: {"a.weight"},
    use_comprehension: {"many.0.weight", "many.1.weight", "b.weight"},
    use_getattr: {"a.weight"},
    use_helper: {"a.weight"},
    use_method: {"a.weight"},
    use_returned: {"a.weight"},
    use_property: {"a.weight"},
    use_checkpointed: {"a.weight"},
    use_lambda: {"a.weight"},
    use_kept_lambda: {"b.weight"},
    use_partial: {"a.weight"},
    use_inner: {"a.weight"},
    use_in_place: {"a.weight"},
    use_row: {"a.weight"},
}


def read_dtype(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.b(x.to(self.a.weight.dtype).to(self.a.weight.device))
    return result.view(-1, self.a.weight.shape[0], self.a.weight.size(1) // self.a.weight.numel() + 1)


def read_presence(self: Any, x: Tensor) -> Tensor:
    if self.a.weight is not None and self.a.weight.requires_grad and isinstance(self.a.weight, Tensor):
        x = x.to(self.a.weight) + torch.zeros_like(self.a.weight)[0, 0]
    result: Tensor = self.b(x)
    return result


def read_local(self: Any, x: Tensor) -> Tensor:
    weight = self.a.weight
    result: Tensor = self.b(x).to(weight.dtype)
    return result


def read_helper(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.b(x.to(dtype_of(self.a)).to(self.dtype))
    return result


def read_calls(self: Any, x: Tensor) -> Tensor:
    for layer in (*self.many, *self.deep):
        x = layer(x)
    result: Tensor = checkpoint(self.a, x, use_reentrant=False)
    return result


READS = [read_dtype, read_presence, read_local, read_helper, read_calls]


def net(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    made: nn.Module = type("Net", (Base,), {"forward": forward})().eval()
    return made


@pytest.mark.parametrize(("forward", "names"), USES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_use_is_found(forward: Callable[[Any, Tensor], Tensor], names: set[str]) -> None:
    assert borrowed_in_source(net(forward)) == names


@pytest.mark.parametrize("forward", READS, ids=lambda value: value.__name__)
def test_metadata_and_calls_of_layers_are_no_use(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert borrowed_in_source(net(forward)) == set()


class Watch(TorchFunctionMode):
    """Notes which tensors functions get, but for those that a layer of torch's hands over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.seen = 0, set[int]()

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and getattr(function, "__name__", "") not in (
            "__get__",
            "size",
            "numel",
            "to",
            "zeros_like",
        ):
            self.seen |= {id(one) for one in _flat((args, kwargs or {})) if isinstance(one, nn.Parameter)}
        return function(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
        return
    for one in inner:
        yield from _flat(one)


@pytest.mark.parametrize("forward", [*USES, *READS], ids=lambda value: value.__name__)
def test_no_function_gets_a_parameter_that_was_not_told(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, watch = net(forward), Watch()

    def enter(*_: Any) -> None:
        watch.inside += 1

    def leave(*_: Any) -> None:
        watch.inside -= 1

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with torch.no_grad(), watch:
        model(torch.randn(2, 4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[key] for key in watch.seen if key in names} <= borrowed_in_source(model)


class Own(nn.Linear):
    """Computes with its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class OfItsBase(Own):
    """By way of its parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Lends(nn.Linear):
    """Has a way of computing that others call."""

    def backwards(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Calls(nn.Module):
    """Calls another's method."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own = Lends(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.backwards(self.encoder(x)) * self.own


class Head(nn.Module):
    """Gets another's weight."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Given(nn.Module):
    """Gives a weight away."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), Head()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids), self.embedding.weight)
        return logits


class Twice(nn.Module):
    """Has a layer's weight under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kernel = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.kernel)


def test_a_layers_own_forward_may_use_its_weight() -> None:
    tied = nn.Sequential(Own(4, 4), OfItsBase(4, 4))
    tied[1].weight = tied[0].weight
    assert borrowed_in_source(tied) == set()


def test_what_a_layer_lends_is_found_wherever_it_is_used() -> None:
    assert borrowed_in_source(Calls()) == {"encoder.weight"}
    assert borrowed_in_source(Given()) == {"embedding.weight"}
    assert borrowed_in_source(Twice()) == {"layer.weight"}
    inner = nn.Sequential(nn.ReLU(), Calls())
    assert borrowed_in_source(inner) == {"1.encoder.weight"}


def test_patched_forwards_and_hooks_are_read() -> None:
    patched = Base()
    patched.forward = lambda x: F.linear(x, patched.a.weight)
    assert borrowed_in_source(patched) == {"a.weight"}
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def adds(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output @ hooked.get_parameter("0.weight")

    hooked[1].register_forward_hook(adds)
    assert borrowed_in_source(hooked) == {"0.weight"}


def test_functions_that_take_a_weight_as_theirs_are_told_apart() -> None:
    def mixed(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.a.weight) + F.linear(x, weight=self.many[1].weight)
        return F.linear(self.b.weight, F.linear(y, self.b.weight)) @ F.linear(y, F.normalize(self.many[0].weight))

    assert borrowed_uses(net(mixed)) == {
        "a.weight": {F.linear}, "b.weight": {F.linear, None}, "many.0.weight": {None}, "many.1.weight": {None}
    }  # fmt: skip


def test_a_hook_is_not_its_layers_own_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda layer, _, y: y + layer.weight.sum())
    assert borrowed_in_source(model) == {"0.weight"}


def test_code_without_source_is_judged_by_its_names() -> None:
    space: dict[str, Any] = {"F": F, "nn": nn}
    exec("def uses(self, x): return F.linear(self.b(x), self.a.weight)\ndef calls(self, x): return self.a(x)", space)
    assert borrowed_in_source(net(space["uses"])) == {"a.weight", "b.weight"}
    assert borrowed_in_source(net(space["calls"])) == set()


@pytest.mark.slow
def test_a_trained_transformers_code_is_followed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    found = borrowed_in_source(transformers.MambaForCausalLM(config))
    assert {name for name in found if "conv1d" in name} == {
        "backbone.layers.0.mixer.conv1d.weight", "backbone.layers.0.mixer.conv1d.bias"
    }  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    assert borrowed_in_source(transformers.ViTForImageClassification(vision)) == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_within_a_model_is_no_trouble() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second: Any = torch.jit.script(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x) @ self.first.weight)
            return y

    assert borrowed_in_source(Holds()) == {"first.weight"}
