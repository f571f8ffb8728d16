from __future__ import annotations

import itertools

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.training.schedule import WeightAverage, learning_rate_factor, parameter_groups


def factors(schedule, total=20, warmup=0):
    return [learning_rate_factor(s, total, schedule=schedule, warmup_steps=warmup) for s in range(total)]


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_decays_without_a_rise(schedule):
    values = factors(schedule)
    assert values[0] == 1 and values[-1] < 0.1
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_polynomial_has_the_exponent_of_nnunet():
    assert learning_rate_factor(5, 10, schedule="polynomial") == pytest.approx(0.5**0.9)


def test_constant_stays():
    assert factors("constant") == [1.0] * 20


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "constant"])
def test_warm_up_rises_and_leaves_the_rest_alone(schedule):
    warmed, plain = factors(schedule, warmup=5), factors(schedule)
    assert all(later > earlier for earlier, later in itertools.pairwise(warmed[:5]))
    assert warmed[0] == pytest.approx(plain[0] / 6)
    assert warmed[5:] == plain[5:]


def test_an_unknown_schedule_is_named():
    with pytest.raises(UsageError, match=r"'step'.*polynomial"):
        learning_rate_factor(0, 10, schedule="step")


def test_average_follows_the_formula():
    layer = torch.nn.Linear(3, 1)
    average = WeightAverage(layer, decay=0.9)
    expected = layer.weight.detach().clone()
    for updates in range(200):
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(updates))
        average.update(updates=updates)
        decay = min(0.9, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(average.network.weight, expected)


def test_average_without_decay_is_the_network_itself():
    layer = torch.nn.Linear(3, 1)
    average = WeightAverage(layer, decay=0.0)
    torch.nn.init.normal_(layer.weight)
    average.update(updates=1000)
    assert torch.equal(average.network.weight, layer.weight)


def test_norm_statistics_are_averaged_as_the_weights_are_and_counts_copied():
    norm = torch.nn.BatchNorm2d(2)
    average = WeightAverage(norm, decay=0.9)
    expected = norm.running_mean.clone()
    for step in range(3):
        norm(torch.randn(4, 2, 3, 3) + 5 * step)
        average.update(updates=1000)
        expected = 0.9 * expected + 0.1 * norm.running_mean
    torch.testing.assert_close(average.network.running_mean, expected)
    assert average.network.num_batches_tracked == 3


def test_averaging_leaves_the_network_alone():
    layer = torch.nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    average = WeightAverage(layer, decay=0.9)
    torch.nn.init.zeros_(average.network.weight)
    average.update(updates=5)
    assert torch.equal(layer.weight, before)


def test_biases_and_norms_do_not_decay():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.GroupNorm(1, 2))
    decayed, others = parameter_groups(network, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p.dim() for p in decayed["params"]] == [4]
    assert len(others["params"]) == 3
