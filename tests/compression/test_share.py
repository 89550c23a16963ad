"""Trained quantization: shared weights begin as the plan's; centroids learn by the sum of their group's gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Codebook, Part, Plan, Sparsity, finish, prune, share
from mpq_plugins.errors import MismatchError, SettingError
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import with_layer

NAMES = ("conv1", "conv2", "up", "fc")
PARTS = (Part(bits=2, channels=(0, 3, 5)), Part(bits=3, channels=(1, 2, 4)))


def planned(net: nn.Module, scheme: Codebook | None = None, bits: int = 2, fold_bn: bool = False) -> Plan:
    return mpq.Uniform(bits=bits)(mpq.measure(net, scheme or Codebook(), bits=(bits,), fold_bn=fold_bn))


def weight_of(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


@pytest.mark.parametrize("scheme", [Codebook(), Codebook(granularity="per_channel", init="linear")], ids=str)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("fold_bn", [False, True])
def test_it_begins_at_the_weights_the_plan_makes(scheme: Codebook, parts: bool, fold_bn: bool) -> None:
    net = conv_net()
    plan = planned(net, scheme, fold_bn=fold_bn)
    if parts:
        plan = with_layer(plan, "up", bits=None, parts=PARTS)  # a transposed convolution: channels on axis 1
    shared, applied = share(net, plan), mpq.apply(net, plan)
    for name in NAMES:
        assert weight_of(shared, name).equal(weight_of(applied, name))
    x = torch.randn(2, 3, 8, 8)
    assert shared.eval()(x).equal(applied.eval()(x))


def test_the_gradient_of_a_centroid_is_the_sum_of_its_groups() -> None:
    net = conv_net()
    plan = planned(net)
    shared = share(net, plan).double()
    plain = finish(shared)
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for model in (shared, plain):
        nn.functional.cross_entropy(model(x), y).backward()
    for name in NAMES:
        centroids = dict(shared.named_parameters())[f"{name}.parametrizations.weight.original"]
        weight = dict(plain.named_parameters())[f"{name}.weight"]
        assert centroids.grad is not None
        assert weight.grad is not None
        pairs = list(zip(weight.flatten().tolist(), weight.grad.flatten().tolist(), strict=True))
        for value, found in zip(centroids.tolist(), centroids.grad.tolist(), strict=True):
            assert found == pytest.approx(sum(g for w, g in pairs if w == value), rel=1e-9, abs=1e-12)


def test_trained_centroids_are_what_the_plan_finds_again() -> None:
    torch.manual_seed(0)
    net = finish(prune(conv_net().train(), Sparsity(0.5)))
    plan = planned(net, bits=3)
    before = copy.deepcopy(net.state_dict())
    shared = share(net, plan)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.05)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(shared(x), y).backward()
        optimizer.step()
    trained = finish(shared)
    assert trained.state_dict().keys() == net.state_dict().keys()
    again = mpq.apply(trained, plan)
    for name in NAMES:
        weight = weight_of(trained, name)
        assert weight_of(again, name).equal(weight)
        assert len(weight.unique()) <= 8
        assert not weight.equal(weight_of(mpq.apply(net, plan), name))
        assert (weight[weight_of(net, name) == 0] == 0).all()
    assert all(net.state_dict()[name].equal(before[name]) for name in before)
    mpq.verify(trained, plan)


def test_layers_in_float_are_trained_as_they_are() -> None:
    net = conv_net()
    plan = with_layer(planned(net), "fc", bits=32)
    shared = share(net, plan)
    assert isinstance(shared.get_submodule("fc").weight, nn.Parameter)


def test_what_has_no_centroids_is_refused_by_name() -> None:
    net = conv_net()
    affine = mpq.Uniform(bits=4)(mpq.measure(net, Affine(granularity="per_channel"), bits=(4,)))
    with pytest.raises(
        SettingError, match=r"layer 'conv1': is planned asymmetric per_channel minmax, and only codebooks"
    ):
        share(net, affine)
    parts = (Part(bits=2, channels=(0, 1, 2, 3, 4)), Part(bits=16, channels=(5,)))
    with pytest.raises(SettingError, match=r"layer 'up': is partly in floating point, .* Give all of it bits"):
        share(net, with_layer(planned(net), "up", bits=None, parts=parts))
    with pytest.raises(SettingError, match="layer 'embed': its weight is that of 'lm_head' too"):
        share(tied_net(), planned(tied_net()))
    with pytest.raises(MismatchError, match="another model"):
        share(nn.Sequential(nn.Linear(4, 4)), planned(net))


def test_half_precision_stays_itself() -> None:
    net = nn.Sequential(nn.Linear(40, 10)).to(torch.bfloat16)
    shared = share(net, planned(net))
    assert weight_of(shared, "0").dtype == torch.bfloat16
    assert weight_of(shared, "0").equal(weight_of(mpq.apply(net, planned(net)), "0"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_weights_add_up_in_half_precision(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(200, 200, bias=False)).to(dtype)
    shared = share(net, planned(net))
    shared(torch.ones(1, 200, dtype=dtype)).sum().backward()
    (centroids,) = shared.parameters()
    assert centroids.grad is not None
    counts = torch.unique(weight_of(shared, "0"), return_counts=True)[1]
    assert centroids.grad.equal(counts.to(dtype))  # every weight's gradient is 1


def test_a_shared_weight_cannot_be_assigned_in_silence() -> None:
    net = conv_net()
    shared = share(net, planned(net))
    with pytest.raises(SettingError, match="is made of its centroids, and cannot be assigned"):
        shared.get_submodule("fc").weight = torch.zeros(10, 6)
