"""A block's samples: rows that belong together, kept apart where calls differ, used whole where they must be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import mpq_plugins as mpq
from mpq_plugins import Affine, SettingError
from mpq_plugins.reconstruction.cache import Cache
from mpq_plugins.reconstruction.capture import Call
from mpq_plugins.reconstruction.collect import Collector
from mpq_plugins.reconstruction.samples import Sample, Samples

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
Block = Callable[..., Tensor]
Given = tuple[tuple[Any, ...], dict[str, Any]]


def call(given: Given, output: Tensor | None = None) -> Call:
    leaves, spec = tree_flatten(given)
    return Call(tuple(leaves), spec, output)


def collect(
    block: Block, calls: Sequence[Given], rough: Sequence[Given] | None = None, mixing: bool = False, memory: int = 0
) -> Samples:
    """What a Collector makes of these calls; rough: the quantized model's, where they are others."""
    with Cache(memory) as cache:
        collector = Collector(cache, "b", lambda args, kwargs: block(*args, **kwargs), mixing, CPU)
        for own, exact in zip(rough or calls, calls, strict=True):
            collector.add(call(own), call(exact, block(*exact[0], **exact[1])), None)
        return collector.samples()


def numbered(*counts: int, width: int = 3) -> list[Tensor]:
    """Batches of rows, every value of which says which row it is."""
    rows = torch.arange(float(sum(counts))).mul(10)[:, None] + torch.arange(float(width))
    return list(rows.split(list(counts)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("memory", [0, 1 << 20])
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 99))
def test_rows_that_are_drawn_belong_together(memory: int, counts: list[int], count: int, seed: int) -> None:
    def block(x: Tensor, *, mask: Tensor, scale: Tensor) -> Tensor:
        return torch.where(mask[:, None], x * scale, -x)

    scale = torch.tensor(0.5)
    calls: list[Given] = [
        ((x,), {"mask": torch.rand(len(x), generator=generator(seed + k)) < 0.5, "scale": scale})
        for k, x in enumerate(numbered(*counts))
    ]
    samples = collect(block, calls, memory=memory)
    drawn = samples.draw(count, 0.0, generator(seed))
    assert drawn.count == min(count, sum(counts))
    assert drawn.target.equal(block(*drawn.args, **drawn.kwargs))
    numbers = drawn.args[0][:, 0]
    assert len(numbers.unique()) == drawn.count
    assert set(numbers.tolist()) <= {10.0 * k for k in range(sum(counts))}
    assert drawn.kwargs["scale"].equal(scale)
    assert drawn.kwargs["mask"].dtype == torch.bool


def test_draws_follow_the_generator_and_reach_every_row() -> None:
    samples = collect(double, [((x,), {}) for x in numbered(5, 5)])
    same, again, other = (samples.draw(4, 0.0, generator(seed)) for seed in (1, 1, 2))
    assert same.target.equal(again.target)
    assert not same.target.equal(other.target)
    one = generator()
    seen = {float(samples.draw(1, 0.0, one).args[0][0, 0]) for _ in range(200)}
    assert seen == {10.0 * k for k in range(10)}


def test_importance_goes_with_its_row() -> None:
    with Cache(1 << 20) as cache:
        collector = Collector(cache, "b", lambda args, _: double(*args), False, CPU)
        for x in numbered(4, 3):
            collector.add(call(((x,), {})), call(((x,), {}), double(x)), x + 1)
        samples = collector.samples()
    drawn = samples.draw(5, 0.0, generator())
    assert drawn.importance is not None
    assert drawn.importance.equal(drawn.args[0] + 1)
    assert [own.importance.equal(own.args[0] + 1) for own in samples.in_order() if own.importance is not None] == [True]
    assert collect(double, [((x,), {}) for x in numbered(4)]).draw(2, 0.0, generator()).importance is None


def test_groups_of_other_shapes_are_drawn_in_proportion() -> None:
    calls: list[Given] = [((x,), {}) for x in (*numbered(20, 10), *numbered(10, width=5))]
    samples = collect(double, calls)
    assert [len(group.target) for group in samples.groups] == [30, 10]
    one = generator()
    widths = [samples.draw(4, 0.0, one).target.shape[1] for _ in range(2000)]
    assert set(widths) == {3, 5}
    assert 0.72 < widths.count(3) / 2000 < 0.78  # 8 standard deviations of 3/4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"k": 2}, {"k": 3}),
        ({"k": 2.0}, {"k": 2.5}),
        ({"k": 1}, {"k": True}),
        ({"k": None}, {"k": 1}),
        ({"k": torch.tensor(2.0)}, {"k": torch.tensor(3.0)}),
        ({"k": torch.ones(1, 3)}, {"k": torch.zeros(1, 3)}),
        ({"k": torch.ones(1, 3)}, {"k": torch.ones(1, 3, dtype=torch.float64)}),
        ({"k": 1}, {"other": 1}),
    ],
    ids=str,
)
def test_calls_with_other_constants_are_kept_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    def block(x: Tensor, k: Any = None, other: Any = None) -> Tensor:
        return x + (0 if k is None else k) * 1.0 + (0 if other is None else 100)

    first, second, third = numbered(4, 4, 4)
    calls: list[Given] = [((first,), one), ((second,), other), ((third,), one)]
    samples = collect(block, calls)
    assert [len(group.target) for group in samples.groups] == [8, 4]
    for own in samples.in_order():
        assert own.target.equal(block(*own.args, **own.kwargs))


def test_calls_of_other_types_are_kept_apart() -> None:
    calls: list[Given] = [((torch.ones(4, 3),), {}), ((torch.ones(4, 3).double(),), {})]
    assert [group.target.dtype for group in collect(double, calls).groups] == [torch.float32, torch.float64]


def softmax(x: Tensor) -> Tensor:
    return x.softmax(0)


def sequence_first(x: Tensor) -> Tensor:
    """(length, batch, features): every step sees all others."""
    return x + x.mean(0, keepdim=True)


def flattened(x: Tensor, count: int) -> Tensor:
    """Only runs on as many samples as it is told."""
    return x.reshape(count, 3)


@pytest.mark.parametrize(
    ("block", "rest"), [(softmax, ()), (sequence_first, ()), (lambda x: x - x[-1:], ()), (flattened, (6,))]
)
def test_samples_that_depend_on_one_another_are_used_whole(block: Block, rest: tuple[Any, ...]) -> None:
    calls: list[Given] = [((torch.randn(6, 3, generator=generator(k)), *rest), {}) for k in range(3)]
    samples = collect(block, calls)
    assert len(samples.groups) == 3
    one = generator()
    drawn = [samples.draw(2, 0.0, one) for _ in range(30)]
    found = {next(k for k, (args, _) in enumerate(calls) if args[0].equal(own.args[0])) for own in drawn}
    assert found == {0, 1, 2}
    assert all(own.target.equal(block(*own.args)) for own in drawn)
    assert [own.count for own in samples.in_order()] == [6, 6, 6]


def test_a_dependence_that_the_first_rows_do_not_show_is_seen() -> None:
    calls: list[Given] = [((torch.tensor([[3.0, 1.0], [2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]) + k,), {}) for k in range(2)]
    samples = collect(lambda x: x - x.amax(), calls)  # the largest value is in the first row
    assert [group.whole for group in samples.groups] == [True, True]


def test_samples_used_whole_may_be_many() -> None:
    x = torch.randn(300, 2, generator=generator())
    (sample,) = collect(softmax, [((x,), {})]).in_order()
    assert sample.args[0].equal(x)


def test_a_first_call_of_one_row_does_not_hide_that_rows_depend_on_one_another() -> None:
    rows = [torch.randn(count, 4, 3, generator=generator(count)) for count in (1, 6, 6)]
    samples = collect(sequence_first, [((x,), {}) for x in rows])
    one = generator()
    for _ in range(20):
        drawn = samples.draw(3, 0.0, one)
        assert torch.allclose(drawn.target, sequence_first(*drawn.args), atol=1e-5)


def test_outputs_whose_first_dimension_no_input_has_are_used_whole() -> None:
    calls: list[Given] = [((torch.randn(2, 6, generator=generator(k)),), {}) for k in range(2)]
    samples = collect(lambda x: x.t() * 2, calls)
    assert [group.whole for group in samples.groups] == [True, True]
    for own in samples.in_order():
        assert own.target.equal(own.args[0].t() * 2)


class Counting:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class Once(Counting):
    def __call__(self, x: Tensor) -> Tensor:
        if self.count:
            raise ValueError("closed\nby hand")
        self.count += 1
        return x


class Growing(Counting):
    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.repeat(1, self.count)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Counting(), "block 'b': gives something else when it is run again"),
        (lambda x: x + torch.rand_like(x), "block 'b': gives something else when it is run again"),
        (nn.Dropout(0.5).train(), "block 'b': gives something else when it is run again"),
        (Growing(), "block 'b': gives something else when it is run again"),
        (Once(), r"block 'b': does not run on its own inputs again \(ValueError: closed\); name others"),
    ],
    ids=["state", "random", "dropout", "shape", "once"],
)
def test_blocks_with_state_or_randomness_are_refused_by_name(block: Block, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(SettingError, match=said):
        collect(block, [((torch.ones(8, 3),), {})])


@pytest.mark.parametrize(
    "rough",
    [
        ((torch.ones(4, 2),), {}),
        ((torch.ones(4, 3).int(),), {}),
        ((torch.ones(4, 3), 1), {}),
        ((), {"x": torch.ones(4, 3)}),
    ],
)
def test_calls_that_the_two_nets_make_differently_are_refused(rough: Given) -> None:
    with pytest.raises(SettingError, match="block 'b': the quantized model gives it inputs of other shapes"):
        collect(double, [((torch.ones(4, 3),), {})], [rough])


def mixed_samples() -> tuple[Samples, Tensor]:
    """Inputs that are negative in the quantized model, positive in the float one, beside ids and a mask."""
    x = torch.rand(40, 50, generator=generator()) + 1
    ids, mask = torch.arange(40), torch.rand(40, generator=generator(1)) < 0.5

    def block(x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return x + ids[:, None] + mask[:, None]

    samples = collect(block, [((x, ids, mask), {})], [((-x, ids + 100, ~mask), {})], mixing=True)
    return samples, x


@pytest.mark.parametrize(("mix", "least", "most"), [(0.0, 0, 0), (1.0, 1, 1), (0.5, 0.45, 0.55), (0.1, 0.07, 0.13)])
def test_that_share_of_values_is_the_float_models(mix: float, least: float, most: float) -> None:
    samples, x = mixed_samples()
    drawn = samples.draw(40, mix, generator(3))
    values, ids, mask = drawn.args
    rows = ids - 100  # never mixed: they are no numbers to learn from
    assert values.abs().equal(x[rows])
    assert least <= float((values > 0).float().mean()) <= most
    assert drawn.target.equal(x[rows] + rows[:, None] + ~mask[:, None])


def test_images_are_mixed_value_by_value() -> None:
    x = torch.rand(6, 5, 8, 8, generator=generator()) + 1
    samples = collect(double, [((x,), {})], [((-x,), {})], mixing=True)
    for own in (samples, replace(samples, channels_last=True)):
        drawn = own.draw(6, 0.5, generator(3))
        exact = (drawn.args[0] > 0).float()
        assert drawn.args[0].abs().equal(drawn.target / 2)
        for dimensions in ((0,), (1,), (2,), (3,), (2, 3)):
            assert float(exact.mean([d for d in range(4) if d not in dimensions]).min()) > 0.2
        assert exact.unique(dim=0).shape[0] == 6


def test_in_order_nothing_is_mixed() -> None:
    samples, x = mixed_samples()
    assert torch.cat([own.args[0] for own in samples.in_order()]).equal(-x)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_in_order_is_every_sample_once(counts: list[int]) -> None:
    batches = numbered(*counts)
    other = numbered(7, width=2)
    samples = collect(double, [((x,), {}) for x in (*batches, *other)])
    found = list(samples.in_order())
    assert torch.cat([own.args[0] for own in found if own.args[0].shape[1] == 3]).equal(torch.cat(batches))
    assert torch.cat([own.args[0] for own in found if own.args[0].shape[1] == 2]).equal(other[0])
    assert all(own.target.equal(own.args[0] * 2) for own in found)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_channels_last_gives_equal_values(memory: int) -> None:
    calls: list[Given] = [((torch.randn(5, 3, 4, 2, generator=generator(k)), torch.ones(5, 3)), {}) for k in range(2)]
    samples = collect(lambda x, y: x * y[:, :, None, None], calls, memory=memory)
    for plain, laid_out in zip(_some(samples), _some(replace(samples, channels_last=True)), strict=True):
        assert plain.args[0].is_contiguous()
        assert laid_out.args[0].is_contiguous(memory_format=torch.channels_last)
        assert laid_out.args[0].equal(plain.args[0])
        assert laid_out.args[1].equal(plain.args[1])
        assert laid_out.target.equal(plain.target)


def _some(samples: Samples) -> list[Sample]:
    return [samples.draw(4, 0.0, generator(5)), *samples.in_order()]


class Doubles(nn.Module):
    """Doubles its input, in place or not, before its layers."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2) if self.in_place else x * 2
        found: Tensor = self.second(torch.relu(self.first(x)))
        return found


def learned(in_place: bool, whole: bool) -> list[mpq.BlockReport]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), Doubles(in_place), Doubles(in_place)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, Affine(granularity="per_channel"), (3,)))
    reports: list[mpq.BlockReport] = []
    shape = (6, 5, 4) if whole else (16, 4)
    batches = [torch.randn(*shape, generator=generator(k)) for k in range(2)]
    mpq.reconstruct(net, plan, batches, steps=20, batch_size=8, lr=0.02, finished=reports.append)
    return [replace(report, seconds=0) for report in reports]


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_that_changes_its_inputs_in_place_learns_as_one_that_does_not(whole: bool) -> None:
    assert learned(True, whole) == learned(False, whole)


class Adds(Doubles):
    """Adds to its input in place, which autograd does not allow once a layer has kept it."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.second(torch.relu(self.first(x)))
        return x


class Cut(Doubles):
    """Lets no gradient through."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [Adds, Cut])
def test_blocks_that_no_gradient_goes_through_are_refused_by_name(kind: type[Doubles]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), kind(False)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    with pytest.raises(SettingError, match="block '1'"):
        mpq.reconstruct(net, plan, [torch.randn(8, 4)], steps=2)


@pytest.mark.parametrize("counts", [(0,), (0, 8), (8, 0), (8, 0, 8)])
def test_batches_without_samples_are_refused(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net, bits=(3,)))
    batches = [torch.randn(count, 4, generator=generator()) for count in counts]
    with pytest.raises(SettingError, match=f"batches: batch {counts.index(0)} holds no samples"):
        mpq.reconstruct(net, plan, batches, steps=2)
