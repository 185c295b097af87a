"""What the walk takes for a collective, and for a question for the rank."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchcache.keys.code import walk_code
from torchcache.keys.collectives import is_spanning, plain_class


def walk(text):
    names = {"__name__": "mine", "torch": torch, "nn": nn}
    exec(compile(textwrap.dedent(text), "mine.py", "exec", dont_inherit=True), names)
    return walk_code(names["target"])


CALLS = {
    "by module": "import torch.distributed as dist\ndef target(x):\n    dist.all_reduce(x)",
    "by torch": "def target(x):\n    torch.distributed.broadcast(x, 0)",
    "by name": "from torch.distributed import all_gather\ndef target(x):\n    all_gather([], x)",
    "by another name": "from torch.distributed import barrier as wait\ndef target(x):\n    wait()",
    "by a late import of the module": "def target(x):\n    import torch.distributed as d\n    d.scatter(x)",
    "by a late import of a part of torch": "def target(x):\n    from torch import distributed as d\n    d.gather(x)",
    "by a late import of the name": "def target(x):\n    from torch.distributed import reduce as r\n    r(x, 0)",
    "by its functional form": """
        import torch.distributed._functional_collectives as functional
        def target(x):
            return functional.all_gather_tensor(x, 0, None)
    """,
    "by its differentiable form": """
        from torch.distributed.nn.functional import reduce
        def target(x):
            return reduce(x, 0)
    """,
    "by an operator": "def target(x):\n    return torch.ops._c10d_functional.all_reduce(x, 'sum', '0')",
    "by a group": "def target(x, group=None):\n    group.allreduce([x]).wait()",
    "by a partial": """
        import functools, torch.distributed
        talk = functools.partial(torch.distributed.broadcast, src=0)
        def target(x):
            talk(x)
    """,
    "by a closure": """
        def make():
            import torch.distributed as dist
            def target(x):
                dist.send(x, 1)
            return target
        target = make()
    """,
    "by a helper": """
        import torch.distributed as dist
        def helper(x):
            return other(x)
        def other(x):
            dist.recv(x)
        def target(x):
            return helper(x)
    """,
    "by another method": """
        import torch.distributed as dist
        class target(nn.Module):
            def forward(self, x):
                return self.talk(x)
            def talk(self, x):
                dist.all_reduce(x)
    """,
    "by a gradient function": """
        import torch.distributed as dist
        class F(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                dist.all_reduce(x)
        def target(x):
            return F.apply(x)
    """,
    "of a DTensor": "def target(x):\n    return x.full_tensor()",
}


@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS)
def test_a_collective_that_the_code_can_call_is_found(text):
    assert walk(text).collectives


OTHERS = {
    "questions": """
        import torch.distributed as dist
        def target(x):
            return x * dist.get_rank() if dist.is_initialized() else x
    """,
    "methods of tensors": """
        import torch.distributed as dist
        def target(x, i):
            dist.get_rank()
            return x.gather(1, i).scatter(1, i, 0)
    """,
    "what does not run": """
        import torch.distributed as dist
        class target(nn.Module):
            def forward(self, x):
                return x
            def training_step(self, x):
                dist.all_reduce(x)
    """,
    "functions of the user's own": """
        from functools import reduce
        def broadcast(x):
            return x
        def target(x):
            return reduce(broadcast, [x])
    """,
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_what_only_looks_like_a_collective_is_none(text):
    assert walk(text).collectives == set()


def test_code_that_asks_for_its_rank_is_known():
    for text in ("import torch.distributed as d\ndef target(x):\n    return x * d.get_rank()",
                 "from torch.distributed import get_world_size\ndef target(x):\n    return x * get_world_size()",
                 "def target(x):\n    from torch.distributed import get_rank as r\n    return x * r()"):  # fmt: skip
        assert walk(text).asks_rank
    assert not walk("import torch.distributed as d\ndef target(x):\n    return x * d.is_initialized()").asks_rank


def test_a_class_that_fully_shard_made_stands_for_the_users_own():
    class Own(nn.Module):
        pass

    sharded = type("FSDPOwn", (FSDPModule, Own), {"__module__": "torch.distributed.fsdp._fully_shard"})
    assert plain_class(sharded) is Own
    assert plain_class(Own) is Own
    assert is_spanning(sharded, is_root=False)
    assert not is_spanning(sharded, is_root=True), "its hooks run outside of the cached call"
    assert is_spanning(nn.parallel.DistributedDataParallel, is_root=True)
    assert not is_spanning(Own, is_root=False)
