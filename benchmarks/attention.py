"""Attention of narrow heads: this project's kernel against PyTorch's scaled_dot_product_attention. On the CPU, forward and backward.

    python benchmarks/attention.py                 32 rows of 128 tokens, at the shapes of v1, v2, v3 and at wider heads

Queries stand at every token, or at 19 of a row as in the last layer, whose output is wanted at masked tokens alone. Both take turns on one thread; the
times are medians of its processor's time, which other work on the machine changes little. First it tells how long the kernel's compiler takes, once for
each head size in a process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from microbert.kernels.attention import SOURCE, _NarrowAttention  # noqa: E402
from microbert.kernels.compile import compiled_kernel  # noqa: E402

B, T = 32, 128
SHAPES = {
    "v1": (2, 2),
    "v2": (4, 2),
    "v3": (8, 2),
    "heads of 4": (8, 4),
    "heads of 8": (8, 8),
    "heads of 16": (8, 16),
}  # heads, numbers of each


def seconds(attention: Callable[[], Tensor], tensors: list[Tensor], output_grad: Tensor) -> tuple[float, float]:
    """Forward and backward."""
    start = time.process_time()
    output = attention()
    between = time.process_time()
    torch.autograd.grad(output, tensors, output_grad)
    return between - start, time.process_time() - between


def compare(name: str, n_queries: int, is_masked: bool, rounds: int) -> str:
    n_heads, d = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    query, key, value, output_grad = (
        torch.randn(B, n, n_heads, d, generator=generator).transpose(1, 2) for n in (n_queries, T, T, n_queries)
    )
    tensors = [x.requires_grad_() for x in (query, key, value)]
    lengths = torch.randint(T // 4, T + 1, (B, 1), generator=generator)
    mask = (torch.arange(T) < lengths)[:, None, None] if is_masked else None
    kernel = compiled_kernel(SOURCE, HEAD=d)
    sides = [
        lambda: _NarrowAttention.apply(*tensors, mask, kernel),
        lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask),
    ]
    times = [[seconds(side, tensors, output_grad) for side in sides] for _ in range(rounds)]
    ours, theirs = ([1e3 * statistics.median(part) for part in zip(*side)] for side in zip(*times))
    return (
        f"{name:12} {n_queries:>7} {'yes' if is_masked else 'no':>8} {ours[0]:>9.2f} + {ours[1]:<5.2f} {theirs[0]:>10.2f} + {theirs[1]:<6.2f}"
        f" {sum(theirs) / sum(ours):>6.1f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for d in sorted({d for _, d in SHAPES.values()}):
        start = time.perf_counter()
        if compiled_kernel(SOURCE, HEAD=d) is None:
            sys.exit("the kernel cannot be compiled here: no C compiler with OpenMP")
        print(f"heads of {d}: compiled in {time.perf_counter() - start:.2f} s")
    print(f"\ntorch {torch.__version__}, {B} x {T} tokens; ms of one thread, forward + backward")
    print(f"{'shape':12} {'queries':>7} {'padding':>8} {'ours':>14} {'PyTorch':>17} {'ratio':>12}")
    for name in SHAPES:
        for n_queries in (T, 19):
            for is_masked in (False, True):
                print(compare(name, n_queries, is_masked, rounds), flush=True)


if __name__ == "__main__":
    main()
