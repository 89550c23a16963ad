"""Pruning: as many weights go as were asked for, the least ones, and they stay away while the model is trained."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import mpq_plugins as mpq
from mpq_plugins import Deviations, GlobalSparsity, Sparsity, finish, prune
from mpq_plugins.compression.prune import Pruning, checked_thresholds, kept, pruned
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.weights import chunks
from mpq_plugins.weights.find import find_weights
from tests.helpers.nets import conv_net, tied_net

WEIGHTS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 9)), elements=st.floats(-9, 9, width=32))


def layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.clone())
    return linear


def weight_of(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@given(WEIGHTS.map(torch.from_numpy), st.floats(0, 0.99))
def test_a_share_of_the_least_weights_goes_but_none_that_are_alike(weight: Tensor, share: float) -> None:
    found = weight_of(prune(nn.Sequential(layer(weight)), Sparsity(share)), "0")
    ordered = sorted(weight.abs().flatten().tolist())
    going = min(round(share * len(ordered)), len(ordered) - 1)
    expected = weight.where(weight.abs() >= ordered[going], 0) if going else weight
    assert found.equal(expected)


def test_without_equal_weights_the_share_is_exact() -> None:
    net = conv_net()
    for share in (0.0, 0.25, 0.5, 0.9):
        masked = prune(net, Sparsity(share))
        for name in ("conv1", "conv2", "up", "fc"):
            weight = weight_of(masked, name)
            assert int((weight == 0).sum()) == round(share * weight.numel())
    torch_way = copy.deepcopy(net)
    torch_prune.l1_unstructured(torch_way.conv1, "weight", 0.9)
    assert weight_of(prune(net, Sparsity(0.9)), "conv1").equal(torch_way.conv1.weight)


def test_a_share_of_the_whole_network_is_one_threshold() -> None:
    net = conv_net()
    masked = prune(net, GlobalSparsity(0.7))
    names = ("conv1", "conv2", "up", "fc")
    together = torch.cat([weight_of(net, name).flatten() for name in names]).abs()
    threshold = together.sort().values[round(0.7 * len(together))]
    for name in names:
        assert weight_of(masked, name).equal(weight_of(net, name).where(weight_of(net, name).abs() >= threshold, 0))
    shares = [float((weight_of(masked, name) == 0).float().mean()) for name in names]
    assert max(shares) - min(shares) > 0.2


def test_deviations_are_of_each_layer() -> None:
    net = conv_net()
    masked = prune(net, Deviations(0.8))
    for name in ("conv1", "up"):
        weight = weight_of(net, name)
        assert weight_of(masked, name).equal(weight.where(weight.abs() >= 0.8 * weight.std(correction=0), 0))


@pytest.mark.parametrize("pruning", [Sparsity(0.6), GlobalSparsity(0.6), Deviations(0.7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_of_many_chunks_are_pruned_as_one(
    pruning: Pruning, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = list(find_weights(conv_net().to(dtype)))
    whole = checked_thresholds(pruning, weights)
    monkeypatch.setattr(chunks, "CHUNK", 40)
    assert checked_thresholds(pruning, weights) == pytest.approx(whole, rel=1e-12)


def test_layers_have_amounts_by_name() -> None:
    net = conv_net()
    assert Sparsity(np.float32(0.5)).thresholds(list(find_weights(net))).keys() == {"conv1", "conv2", "up", "fc"}  # type: ignore[arg-type]
    masked = prune(net, Sparsity({"conv*": 0.5, "re:f.": 0.9}))
    found = {name: round(float((weight_of(masked, name) == 0).float().mean()), 2) for name in ("conv1", "up", "fc")}
    assert found == {"conv1": 0.5, "up": 0.0, "fc": 0.9}
    assert weight_of(prune(net, Sparsity(0.5), skip=["up"]), "up").equal(weight_of(net, "up"))


def test_what_is_zero_stays_so_and_counts() -> None:
    weight = torch.tensor([[0.0, 0.0, 1.0, -2.0, 3.0, 4.0]])
    assert weight_of(prune(nn.Sequential(layer(weight)), Sparsity(0.34)), "0").equal(weight)
    assert weight_of(prune(nn.Sequential(layer(weight)), Sparsity(0.5)), "0").tolist() == [[0, 0, 0, -2, 3, 4]]
    assert kept(weight, 0.0).tolist() == [[False, False, True, True, True, True]]
    assert not torch.signbit(pruned(weight, 3.5)).any()


@pytest.mark.slow
def test_masks_last_through_training_and_the_model_given_is_never_changed() -> None:
    torch.manual_seed(0)
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    masked = prune(net, Sparsity(0.8))
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.01, weight_decay=0.1)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(masked(x), y).backward()
        optimizer.step()
    trained = finish(masked)
    zeros = {name: weight_of(prune(net, Sparsity(0.8)), name) == 0 for name in ("conv1", "conv2", "up", "fc")}
    for name, where in zeros.items():
        assert (weight_of(trained, name)[where] == 0).all()
        assert not weight_of(trained, name)[~where].equal(weight_of(net, name)[~where])
    assert net.state_dict().keys() == before.keys() == trained.state_dict().keys()
    assert all(net.state_dict()[name].equal(before[name]) for name in before)
    assert trained.state_dict().keys() == net.state_dict().keys()
    mpq.measure(trained.eval(), bits=(4,))  # plain weights again
    assert masked(x).equal(masked(x))


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_copies_and_originals_do_not_disturb_each_other() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = conv_net()
    parametrize.register_parametrization(net.fc, "bias", Same())  # gives fc a class of its own, which copies share
    before = net(x)
    masked = prune(net, Sparsity(0.5))
    twin = copy.deepcopy(masked)
    after = masked(x)
    assert net(x).equal(before)
    finish(twin)
    finish(masked)
    assert masked(x).equal(after)
    assert twin(x).equal(after)
    assert net(x).equal(before)


def test_parameters_keep_their_order() -> None:
    net = conv_net()
    names = [name for name, _ in net.named_parameters()]
    assert [name for name, _ in finish(prune(net, Sparsity(0.5))).named_parameters()] == names
    assert list(finish(prune(net, Sparsity(0.5))).state_dict()) == list(net.state_dict())


def test_what_is_put_on_top_of_a_mask_is_named() -> None:
    masked = prune(conv_net(), Sparsity(0.5))
    parametrize.register_parametrization(masked.get_submodule("fc"), "weight", Same())
    with pytest.raises(SettingError, match="layer 'fc': its weight has another parametrization beside"):
        finish(masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruning", [Deviations(0.83), GlobalSparsity(0.7)], ids=str)
def test_thresholds_are_not_rounded_to_half_precision(dtype: torch.dtype, pruning: Pruning) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(100, 100, dtype=dtype), nn.Linear(100, 100))
    exact = prune(copy.deepcopy(net).float(), pruning)
    for name in ("0", "1"):
        assert (weight_of(prune(net, pruning), name) == 0).equal(weight_of(exact, name) == 0)


def test_foreign_parametrizations_are_left_alone() -> None:
    net = conv_net()
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    masked = prune(net, Sparsity(0.5), skip=["fc"])
    assert torch.nn.utils.parametrize.is_parametrized(finish(masked).get_submodule("fc"))
    with pytest.raises(WeightError, match="'fc': its weight is parametrized"):
        prune(net, Sparsity(0.5))


def test_tied_weights_would_come_apart() -> None:
    with pytest.raises(SettingError, match=r"layer 'embed': its weight is that of 'lm_head' too"):
        prune(tied_net(), Sparsity(0.5))
    masked = prune(tied_net(), Sparsity(0.5), skip=["embed"])
    assert masked.get_submodule("again") is masked.get_submodule("block")  # one module under two names is no matter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity(1.0), r"prune: 1.0 is not allowed; a share from 0 up to, but not, 1"),
        (lambda: Sparsity(-0.1), "prune: -0.1"),
        (lambda: Sparsity({"fc": float("nan")}), "prune: nan"),
        (lambda: Sparsity("0.5"), "prune: '0.5'"),  # type: ignore[arg-type]
        (lambda: GlobalSparsity(1), "prune: 1 is"),
        (lambda: GlobalSparsity(True), "prune: True is"),
        (lambda: Deviations(-1), "prune: -1 is not allowed; standard deviations, 0 or more"),
        (lambda: Deviations(float("inf")), "prune: inf"),
        (lambda: prune(conv_net(), 0.5), r"pruning: 0.5 is not allowed; Sparsity\(0.9\)"),  # type: ignore[arg-type]
        (
            lambda: prune(conv_net(), Sparsity({"fcc": 0.5})),
            r"'fcc' matches no layer; names look like 'conv1', 'conv2'",
        ),
        (lambda: prune(conv_net(), Sparsity({"fc": 0.5, "f*": 0.6})), "layer 'fc' is given both 0.5 and 0.6"),
        (lambda: prune(conv_net(), Deviations(50)), r"layer 'conv1': Deviations\(count=50\) would prune all of it"),
    ],
)
def test_bad_settings_are_refused(make: "object", message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()  # type: ignore[operator]


def test_a_share_of_the_network_that_empties_a_layer_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40))
    with torch.no_grad():
        net[0].weight.mul_(1e-3)  # type: ignore[operator]
    with pytest.raises(SettingError, match=r"layer '0': GlobalSparsity\(share=0.5\) would prune all of it"):
        prune(net, GlobalSparsity(0.5))
    net[0].weight.data.zero_()  # type: ignore[operator]
    prune(net, GlobalSparsity(0.5))  # there is nothing to lose in a layer of zeros


def test_weights_that_are_no_numbers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].weight.data[0, 0] = float("nan")  # type: ignore[operator]
    for pruning in (Sparsity(0.5), GlobalSparsity(0.5), Deviations(1)):
        with pytest.raises(WeightError, match="layer '0': holds NaN or infinite"):
            prune(net, pruning)
