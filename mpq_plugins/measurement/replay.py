"""Running a model again after one layer's weight changed, computing only what comes at or after that layer.

A first run keeps what every module returned. In a later run the modules that had finished before the changed layer
was first called return that again without computing; whatever the forward does between modules is done as ever. So it
needs no traceable graph, and a model whose modules pass tensors on is re-run from the changed layer down.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Replay:
    """One batch's float run, kept for its re-runs. `run` computes the output with the model as it is."""

    def __init__(self, model: nn.Module, run: Callable[[], Tensor], replays: bool = True) -> None:
        self._model, self._run, self.replays = model, run, replays
        self._calls: dict[nn.Module, list[_Call]] = {}
        self._clock = 0
        with self._recording(), torch.no_grad():
            self.output = run()
        self._forget_changed()

    def again(self, changed: Sequence[nn.Module]) -> Tensor:
        """The output now that the weights of these modules may have changed."""
        first = min((call.start for module in changed for call in self._calls.get(module, ())), default=None)
        if first is None or not self.replays:  # never called, or called past its own __call__
            first = 0
        with self._replaying(first), torch.no_grad():
            return self._run()

    def check(self, changed: Sequence[nn.Module]) -> None:
        """Hold a re-run against a full run, and from now on run in full where they differ.

        They do where modules pass something on other than by what they return: an attribute, a borrowed weight.
        """
        with torch.no_grad():
            self.replays = self.replays and torch.equal(self.again(changed), self._run())

    @contextmanager
    def _recording(self) -> Iterator[None]:
        open_calls: list[_Call] = []

        def before(module: nn.Module, _: Any) -> None:
            self._clock += 1
            open_calls.append(_Call(self._clock))

        def after(module: nn.Module, _: Any, output: Any) -> None:
            self._clock += 1
            call = open_calls.pop()
            call.finish(self._clock, output)
            self._calls.setdefault(module, []).append(call)

        handles = []
        for module in self._model.modules():
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forget_changed(self) -> None:
        """What was changed in place after it was returned would be changed once more in every re-run."""
        for module, calls in list(self._calls.items()):
            if any(call.changed or not call.plain for call in calls):
                del self._calls[module]

    @contextmanager
    def _replaying(self, first: int) -> Iterator[None]:
        finished = [
            (module, calls)
            for module, calls in self._calls.items()
            if module is not self._model and calls[-1].end < first and "forward" not in vars(module)
        ]
        try:
            for module, calls in finished:
                module.forward = _returning(module, [call.output for call in calls])
            yield
        finally:
            for module, _ in finished:
                del module.forward


def _returning(module: nn.Module, outputs: list[Any]) -> Callable[..., Any]:
    """A forward that returns these in turn, and computes once they are used up."""
    left = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for output in left:
            return output
        return type(module).forward(module, *args, **kwargs)

    return forward


class _Call:
    """When a module was called and returned, and what."""

    def __init__(self, start: int) -> None:
        self.start, self.end, self.output = start, start, None
        self._tensors: list[Tensor] = []
        self._seen: list[tuple[int, int]] = []

    def finish(self, end: int, output: Any) -> None:
        self.end, self.output = end, output
        self._tensors = _tensors(output)  # kept, so that no other tensor gets the same id
        self._seen = _identities(self._tensors)

    @property
    def plain(self) -> bool:
        """Whether what was returned is made of tensors and plain values alone, so that a change in it can be seen."""
        return all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(self.output))

    @property
    def changed(self) -> bool:
        """In place, or replaced inside the list or mapping that was returned."""
        return self._seen != _identities(_tensors(self.output))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _identities(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
