"""What the walk takes for a collective, and for a question for the rank."""

from __future__ import annotations

import textwrap
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchcache.keys.code import walk_code
from torchcache.keys.collectives import is_spanning, plain_class
from torchcache.keys.state import StateTracker


def talks_of(text):
    names = {"__name__": "mine", "torch": torch, "nn": nn}
    exec(compile(textwrap.dedent(text), "mine.py", "exec", dont_inherit=True), names)
    return walk_code(names["target"]).talks


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
    "of a DTensor": """
        from torch.distributed.tensor import DTensor
        def target(x):
            return x.full_tensor() if isinstance(x, DTensor) else x
    """,
    "by a local name for the module": "def target(x):\n    d = torch.distributed\n    d.broadcast(x, 0)",
    "by a local name in another function": """
        import torch.distributed as dist
        def helper(d, x):
            d.broadcast(x, 0)
        def target(x):
            helper(dist, x)
    """,
    "by a late import of torch": "def target(x):\n    import torch as t\n    t.distributed.broadcast(x, 0)",
    "by a default": """
        import torch.distributed as dist
        def target(x, *, talk=dist.broadcast):
            talk(x, 0)
    """,
    "by a default module": """
        import torch.distributed as dist
        def target(x, d=dist):
            d.broadcast(x, 0)
    """,
    "by a default group": """
        import torch.distributed as dist
        def target(x, group=dist.group):
            group.WORLD.barrier()
    """,
    "by a class attribute": """
        import torch.distributed as dist
        class target(nn.Module):
            talk = staticmethod(dist.broadcast)
            def forward(self, x):
                self.talk(x, 0)
    """,
    "by a module in a class attribute": """
        import torch.distributed as dist
        class target(nn.Module):
            dist = dist
            def forward(self, x):
                self.dist.broadcast(x, 0)
    """,
    "by a dict": """
        import torch.distributed as dist
        TALKS = {"gather": dist.gather}
        def target(x):
            TALKS["gather"](x)
    """,
    "by getattr": "import torch.distributed as d\ndef target(x):\n    getattr(d, 'broadcast')(x, 0)",
    "by getattr of any name": "import torch.distributed as d\ndef target(x, name):\n    getattr(d, name)(x)",
    "by the default group": """
        from torch.distributed import distributed_c10d as c10d
        def target(x):
            group = c10d._get_default_group()
            group.broadcast(x, 0)
    """,
    "by the world": "import torch.distributed as d\ndef target(x):\n    d.group.WORLD.barrier()",
    "by an operator of an ambiguous name": "def target(x):\n    torch.ops._c10d_functional.broadcast(x, 0, '0')",
}


@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS)
def test_a_collective_that_the_code_can_call_is_found(text):
    assert talks_of(text).collectives


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
    "methods and functions that DTensor has as well": """
        class T:
            def permute_tensor(x):
                return x
        class target(nn.Module):
            def redistribute(self, x):
                return x
            def forward(self, x):
                return T.permute_tensor(self.redistribute(x).full_tensor())
    """,
    "getattr of a question": """
        import torch.distributed as dist
        def target(x):
            return x if getattr(dist, "is_available", None) else -x
    """,
    "a table without any": """
        import torch.distributed as dist
        TABLE = {"gather": torch.gather, "is": dist.is_initialized}
        def target(x, i):
            return TABLE["gather"](x, 1, i).gather(1, i)
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
    assert talks_of(text).collectives == set()


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        self.held.barrier()
        return x


@pytest.mark.parametrize("held", [dist, dist.barrier, dist.ProcessGroup(0, 1)], ids=["module", "function", "group"])
def test_what_the_state_holds_of_torch_distributed_makes_the_code_talk(held):
    module, other = Holder(held), Holder(nn.Identity())
    for holder, expected in (module, {"barrier"}), (other, set()):
        walk, _ = StateTracker(weakref.ref(holder)).walk(Holder)
        assert walk.talks.collectives == expected


ASKS = {
    "by module": "import torch.distributed as d\ndef target(x):\n    return x * d.get_rank()",
    "by name": "from torch.distributed import get_world_size\ndef target(x):\n    return x * get_world_size()",
    "by another name": "from torch.distributed import get_rank as r\ndef target(x):\n    return x * r()",
    "by an alias": "import torch.distributed as d\nr = d.get_rank\ndef target(x):\n    return x * r()",
    "by a default": "import torch.distributed as d\ndef target(x, r=d.get_rank):\n    return x * r()",
    "by a table": "import torch.distributed as d\nT = [d.get_rank]\ndef target(x):\n    return x * T[0]()",
    "by getattr": "import torch.distributed as d\ndef target(x):\n    return x * getattr(d, 'get_rank')()",
    "by a late import": "def target(x):\n    from torch.distributed import get_rank as r\n    return x * r()",
    "by the world": "import torch.distributed as d\ndef target(x):\n    return x * d.group.WORLD.rank()",
    "by a name for groups": "from torch.distributed import group\ndef target(x):\n    return x * group.WORLD.size()",
    "by a late import of the module": """
        def target(x):
            import torch.distributed as d
            return x * d.group.WORLD.rank()
    """,
    "by a class attribute": """
        import torch.distributed as dist
        class target(nn.Module):
            my_rank = staticmethod(dist.get_rank)
            def forward(self, x):
                return x * self.my_rank()
    """,
}


@pytest.mark.parametrize("text", ASKS.values(), ids=ASKS)
def test_code_that_asks_for_its_rank_is_known(text):
    assert talks_of(text).asks_rank


def test_code_that_only_asks_whether_there_is_a_job_does_not_ask_for_its_rank():
    talks = talks_of("import torch.distributed as d\ndef target(x):\n    return x.size(0) * d.is_initialized()")
    assert not talks.asks_rank
    assert talks.reaches
    assert not talks_of("def target(x):\n    return x.size(0)").reaches


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
