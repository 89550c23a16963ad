"""Columns times matrices are what torch's own layer gives, for every geometry that it has."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq_plugins.reconstruction.columns import Columns, choose_positions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),  # torch says how it does it
]

CONVS = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d), True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
PADDINGS = ("numbers", "valid", "same", "reflect", "replicate", "circular")


def ready(layer: nn.Module, seed: int) -> Any:
    """In float64, so that the sums agree to the last digits whatever their order, with weights of a seed."""
    generator = torch.Generator().manual_seed(seed)
    layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A layer and an input for it, with or without a batch."""
    seed, bias = draw(st.integers(0, 2**16)), draw(st.booleans())
    samples = draw(st.sampled_from([None, 1, 3]))
    generator = torch.Generator().manual_seed(seed)
    spatial = draw(st.integers(0, 3))
    if not spatial:
        leading = draw(st.sampled_from([(), (5,), (2, 3), (2, 1, 4)]))
        layer: Any = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 5)), bias=bias)
        return ready(layer, seed), torch.randn(*leading, layer.in_features, generator=generator).double()

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(spatial))

    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 2), each(3, 6 if spatial < 3 else 4)
    transposed = draw(st.booleans())
    common: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    if transposed:
        padding = each(0, 2)
        more = tuple(min(draw(st.integers(0, 2)), max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        zipped = zip(size, stride, padding, dilation, kernel, more, strict=True)
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + m + 1 > 0 for n, s, p, d, k, m in zipped))
        common |= {"padding": padding, "output_padding": more}
    else:
        how = draw(st.sampled_from(PADDINGS))
        padding = each(0, 2)
        assume(how == "same" or all(n + (2 * p if how != "valid" else 0) >= d * (k - 1) + 1
                                    for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))  # fmt: skip
        common |= {"padding": how if how in ("valid", "same") else padding}
        if how == "same":
            common["stride"] = (1,) * spatial
        if how in ("reflect", "replicate", "circular"):
            common["padding_mode"] = how
    layer = CONVS[transposed][spatial - 1](inputs, outputs, kernel, **common)
    shape = (inputs, *size) if samples is None else (samples, inputs, *size)
    return ready(layer, seed), torch.randn(shape, generator=generator).double()


def everywhere(columns: Columns, layer: Any, given: Tensor) -> Tensor:
    samples, positions = columns.samples(given), columns.positions(layer, given)
    return torch.arange(positions).expand(samples, positions)


def product(columns: Columns, layer: Any, u: Tensor) -> Tensor:
    """U W^T + bias, (n, groups, rows)."""
    y = torch.einsum("ngd,grd->ngr", u, columns.matrices(layer.weight))
    return y if layer.bias is None else y + layer.bias.reshape(columns.groups, -1)


@settings(max_examples=250)
@given(cases())
def test_columns_times_matrices_are_the_layers_output(case: tuple[Any, Tensor]) -> None:
    layer, given = case
    columns, output = Columns.of(layer), layer(given)
    chosen = everywhere(columns, layer, given)
    expected = columns.values(output, chosen)
    assert expected.numel() == output.numel()
    torch.testing.assert_close(
        product(columns, layer, columns.columns(layer, given, chosen)), expected, rtol=1e-10, atol=1e-10
    )
    assert columns.outputs(output) == chosen.shape


@given(cases(), st.data())
def test_chosen_positions_are_those_of_the_output(case: tuple[Any, Tensor], data: st.DataObject) -> None:
    layer, given = case
    columns, output = Columns.of(layer), layer(given)
    samples, positions = columns.samples(given), columns.positions(layer, given)
    share = data.draw(st.integers(1, positions))
    rows = st.lists(st.integers(0, positions - 1), min_size=share, max_size=share)
    chosen = torch.tensor([data.draw(rows) for _ in range(samples)]).reshape(samples, share)
    wanted = []  # element by element, out of the output as torch has it
    batched = output if columns.spatial and output.dim() == columns.spatial + 2 else output[None]
    for n in range(samples):
        for position in chosen[n].tolist():
            if not columns.spatial:
                wanted.append(output.reshape(-1, output.shape[-1])[n])
            else:
                at = [int(k) for k in torch.unravel_index(torch.tensor(position), batched.shape[2:])]
                wanted.append(batched[(n, slice(None), *at)])
    expected = torch.stack(wanted).reshape(samples * share, columns.groups, -1)
    assert columns.values(output, chosen).equal(expected)
    made = product(columns, layer, columns.columns(layer, given, chosen))
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)


@given(cases(), st.integers(1, 40))
def test_pieces_one_after_another_are_the_whole(case: tuple[Any, Tensor], most: int) -> None:
    layer, given = case
    columns, output = Columns.of(layer), layer(given)
    chosen = everywhere(columns, layer, given)
    parts = list(columns.pieces(given, chosen, most))
    assert all(at.numel() <= max(most, chosen.shape[1]) for _, at in parts)
    assert torch.cat([at for _, at in parts]).equal(chosen)
    pieces = [columns.columns(layer, piece.of(given), at) for piece, at in parts]
    assert torch.cat(pieces).equal(columns.columns(layer, given, chosen))
    values = [columns.values(piece.of(output), at) for piece, at in parts]
    assert torch.cat(values).equal(columns.values(output, chosen))


@given(cases())
def test_matrices_and_weight_undo_each_other(case: tuple[Any, Tensor]) -> None:
    layer, _ = case
    columns = Columns.of(layer)
    matrices = columns.matrices(layer.weight)
    assert matrices.numel() == layer.weight.numel()
    assert columns.weight(matrices, layer.weight.shape).equal(layer.weight)
    assert columns.matrices(columns.weight(matrices + 1, layer.weight.shape)).equal(matrices + 1)
    outputs = layer.out_features if not columns.spatial else layer.out_channels
    assert matrices.shape[:2] == (columns.groups, outputs // columns.groups)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_positions_are_drawn_without_repeats(samples: int, positions: int, share: int, seed: int) -> None:
    drawn = choose_positions(samples, positions, share, torch.Generator().manual_seed(seed))
    assert drawn.shape == (samples, min(share, positions))
    for row in drawn.tolist():
        assert len(set(row)) == len(row)
        assert all(0 <= position < positions for position in row)
    again = choose_positions(samples, positions, share, torch.Generator().manual_seed(seed))
    assert again.equal(drawn)
    if share >= positions:
        assert drawn.equal(torch.arange(positions).expand(samples, positions))


def test_every_position_is_drawn_as_often_as_the_others() -> None:
    samples, positions, share = 4000, 8, 2
    drawn = choose_positions(samples, positions, share, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=positions).double()
    expected = samples * share / positions
    deviation = math.sqrt(expected * (1 - share / positions))
    assert ((counts - expected).abs() < 5 * deviation).all()


def test_an_empty_batch_has_no_columns() -> None:
    for layer, shape in ((nn.Linear(4, 3), (0, 4)), (nn.Conv2d(2, 3, 2), (0, 2, 5, 5))):
        columns, given = Columns.of(layer), torch.zeros(shape)
        assert columns.samples(given) == 0
