"""What ``python -m benchmarks state`` times does what a call does."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import state_check
from torchcache import torchcache


def test_what_is_timed_sees_a_change():
    net = torchcache()(nn.Linear(4, 4)).eval().requires_grad_(requires_grad=False)
    sides = {"check": state_check.check_of(net), "comparison": state_check.comparison_of(net)}
    times = state_check.time_in_turns(sides, 1)
    assert {side: len(values) for side, values in times.items()} == {"check": 1, "comparison": 1}
    assert not any(call() for call in sides.values())
    state_check.assert_sees_a_change(net)
    net.weight.copy_(torch.zeros(4, 4))
    assert sides["comparison"]()
