"""What it costs at every call to see that the weights are still those that were hashed.

The module has the parts of a ViT-B/16 (Dosovitskiy et al. 2021), written out in classes of its own, but is
narrow: what counts at every call is the number of its parts, not their sizes. In turns, round by round: the
check of our cache (all of it, and the comparison alone), behind the class door and behind the instance
door, and what anybody would write first, a walk over all parameters that notes identity, pointer and
version. torchcache 0.6.0 is in the table with what it does in the same run when a weight changes. In the
end all weights of the real sizes are hashed, which a call does only when something moved.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.hits import RIVAL, install_rival, spread
from benchmarks.workload import BenchmarkError
from torchcache import cache_of, torchcache

#: What a call may pay for the check, at the median.
TARGET_MICROSECONDS = 100.0

CALLS_PER_ROUND = 100
ROUNDS_AT_LEAST = 5
FULL_HASHES = 5
RIVAL_TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a vision transformer whose number of parts is always that of a ViT-B."""

    width: int
    hidden: int
    n_classes: int
    n_tokens: int = 197
    n_heads: int = 12
    n_blocks: int = 12
    patch: int = 16


NARROW = Sizes(width=24, hidden=96, n_classes=10)
REAL = Sizes(width=768, hidden=3072, n_classes=1000)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.n_heads = sizes.n_heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Let each token ``(n, tokens, width)`` look at the others."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        transformed: Tensor = self.fc2(self.act(self.fc1(x)))
        return transformed


class Block(nn.Module):
    """One block of the encoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform."""
        x = x + self.attn(self.norm1(x))
        added: Tensor = self.mlp(self.norm2(x))
        return x + added


class VisionTransformer(nn.Module):
    """The module that is checked."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, sizes.width, kernel_size=sizes.patch, stride=sizes.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.randn(1, sizes.n_tokens, sizes.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.n_blocks)))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.n_classes)
        # Frozen and in eval mode, as whoever caches has it.
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        classes: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return classes


@torchcache()
class CachedVisionTransformer(VisionTransformer):
    """The same behind the class door."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``python -m benchmarks state``."""
    parser.add_argument("--rounds", type=int, default=31, help=f"timed rounds of {CALLS_PER_ROUND} calls")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where the rival is installed")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return 1 if the median of a check misses the target, else 0.

    Raises:
        BenchmarkError: If the rival cannot be installed or run, or a check did not see what it must.
    """
    if args.rounds < ROUNDS_AT_LEAST:
        raise BenchmarkError(f"--rounds must be {ROUNDS_AT_LEAST} at least")
    torch.set_num_threads(args.threads)
    verdict_of_rival = ask_rival(install_rival(args.work_dir))

    by_class = CachedVisionTransformer(NARROW)
    by_instance = torchcache()(VisionTransformer(NARROW))
    for module in (by_class, by_instance):
        assert_sees_a_change(module)
    sides = {
        "class door: the check": check_of(by_class),
        "class door: comparison alone": comparison_of(by_class),
        "instance door: the check": check_of(by_instance),
        "instance door: comparison alone": comparison_of(by_instance),
        "rival: full walk": full_walk_of(by_class),
    }
    times = time_in_turns(sides, args.rounds)

    machine = f"{platform.platform()}, cores {os.cpu_count()}, threads {args.threads}"
    print(f"{machine}, python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    print(
        f"microseconds a call; shape of a ViT-B: {len(list(by_class.parameters()))} parameters, "
        f"{len(list(by_class.modules()))} modules; {args.rounds} rounds of {CALLS_PER_ROUND} calls, in turns"
    )
    print(f"{'side':34}{'min':>8}{'median':>8}{'max':>8}")
    for side, values in times.items():
        print(f"{side:34}" + "".join(f"{value:8.1f}" for value in spread(values)))
    print(f"{f'rival {RIVAL}':34}{verdict_of_rival:>24}")

    missed = False
    for side in ("class door: the check", "instance door: the check"):
        _, median, _ = spread(times[side])
        is_met = median < TARGET_MICROSECONDS
        missed |= not is_met
        print(f"{side}: {median:.1f} us (target under {TARGET_MICROSECONDS:g} us){'' if is_met else ' MISSED'}")
    print_full_hash()
    return 1 if missed else 0


def check_of(module: nn.Module) -> Callable[[], object]:
    """Return what a call does to name the present state and to see that it may be cached."""
    state = cache_of(module)._core.caller.state
    return lambda: state.look().reason or state.reason_of_gradients()


def comparison_of(module: nn.Module) -> Callable[[], object]:
    """Return the part of the check that compares with what was seen last."""
    identity = cache_of(module)._core.identity
    seen = identity.look()
    return lambda: identity.has_moved(seen)


def full_walk_of(module: nn.Module) -> Callable[[], object]:
    """Return the check that anybody would write first. It sees neither plain state nor hidden writes."""
    return lambda: [(id(p), p.data_ptr(), p._version) for p in module.parameters()]


def assert_sees_a_change(module: nn.Module) -> None:
    """See to it that what is timed does its work.

    Raises:
        BenchmarkError: If the check does not see a weight that changed, or sees one that did not.
    """
    look = cache_of(module)._core.caller.state.look
    before = look()
    if before.reason is not None or look() != before:
        raise BenchmarkError(f"the state does not stand still: {before}")
    weight = next(module.parameters())
    weight.data.add_(1.0)  # through .data: torch's version counter does not move
    if look().fingerprint == before.fingerprint:
        raise BenchmarkError("the check does not see that a weight changed")
    weight.data.sub_(1.0)
    look()


def time_in_turns(sides: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, list[float]]:
    """Return the mean microseconds of a call in each round, after a round that warms up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(n_rounds + 1):
        for side, call in sides.items():
            started = time.perf_counter()
            for _ in range(CALLS_PER_ROUND):
                call()
            times[side].append((time.perf_counter() - started) / CALLS_PER_ROUND * 1e6)
    return {side: values[1:] for side, values in times.items()}


def print_full_hash() -> None:
    """Hash all weights of a real ViT-B, again and again, and print how fast."""
    module = torchcache()(VisionTransformer(REAL))
    cache = cache_of(module)
    state = cache._core.caller.state
    n = sum(p.numel() for p in module.parameters())
    n_bytes = sum(p.nbytes for p in module.parameters())
    state.look()
    seconds = []
    for _ in range(FULL_HASHES):
        cache.refresh()
        started = time.perf_counter()
        state.look()
        seconds.append(time.perf_counter() - started)
    low, middle, high = (n_bytes / s / 1e9 for s in spread(seconds)[::-1])
    print(
        f"full hash of {n / 1e6:.1f} M float32 parameters ({n_bytes / 1e6:.0f} MB): {middle:.1f} GB/s "
        f"(min {low:.1f}, max {high:.1f}), {n_bytes / middle / 1e6:.1f} ms;\n"
        "  that happens at the first call, when something moved, and now and then to be sure (1 % of the time at most)"
    )


#: 0.6.0 has our package's name, so it has a process of its own, as in benchmarks/_rival.py.
_RIVAL_PROGRAM = """
import os, sys
from importlib.metadata import version
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the rival logs to stdout
import torch, torchcache
assert version("torchcache") == sys.argv[1], torchcache.__file__

@torchcache.torchcache()
class Linear(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.requires_grad_(False)  # it refuses others

module, x = Linear().eval(), torch.randn(4, 8)
with torch.no_grad():
    module(x)
    module.weight.add_(1.0)
    fresh = torch.nn.functional.linear(x, module.weight, module.bias)
    print("sees it" if torch.allclose(module(x), fresh) else "none: serves stale results", file=replies)
"""


def ask_rival(folder: Path) -> str:
    """Return what the rival does when a weight changes between two calls.

    Raises:
        BenchmarkError: If its process fails.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
    env |= {"PYTHONPATH": str(folder), "TORCHCACHE_LOG_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RIVAL_PROGRAM, RIVAL],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=RIVAL_TIMEOUT_SECONDS,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise BenchmarkError(f"the rival's process failed ({error}); see its messages above") from error
    return done.stdout.strip()
