"""Attention with narrow heads on the CPU: this project's kernel against PyTorch's scaled_dot_product_attention.

    python benchmarks/attention.py                 32 rows of 128 tokens, at the shapes of v1, v2, v3 and at wider heads

Measures forward and backward. Queries are at every token, or at 19 tokens of a row as in the last layer, which computes
masked tokens only. Both sides take turns on one thread. The times are medians of processor time, which other work on
the machine changes little. First prints the kernel's compilation time, spent once per head size in a process.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from checkout import new_parser
from torch import Tensor
from torch.nn import functional as F

from microbert.kernels.attention import SOURCE, _NarrowAttention
from microbert.kernels.compile import compiled_kernel

B, T = 32, 128
SHAPES = {  # number of heads, width of each
    "v1": (2, 2),
    "v2": (4, 2),
    "v3": (8, 2),
    "heads of 4": (8, 4),
    "heads of 8": (8, 8),
    "heads of 16": (8, 16),
}


def seconds(attention: Callable[[], Tensor], tensors: list[Tensor], output_grad: Tensor) -> tuple[float, float]:
    """Return the processor time of the forward and of the backward pass."""
    start = time.process_time()
    output = attention()
    between = time.process_time()
    torch.autograd.grad(output, tensors, output_grad)
    return between - start, time.process_time() - between


def compare(name: str, n_queries: int, is_masked: bool, rounds: int) -> str:
    """Return one row of the table."""
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
    ours, theirs = (
        [1e3 * statistics.median(part) for part in zip(*side, strict=True)] for side in zip(*times, strict=True)
    )
    return (
        f"{name:12} {n_queries:>7} {'yes' if is_masked else 'no':>8} {ours[0]:>9.2f} + {ours[1]:<5.2f} "
        f"{theirs[0]:>10.2f} + {theirs[1]:<6.2f} {sum(theirs) / sum(ours):>6.1f} x"
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side [default: 20]")
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
