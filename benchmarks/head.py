"""The output layer with its loss on the CPU: this project's, in chunks, and PyTorch's, dense.

    python benchmarks/head.py                                     8,192 masked tokens, vocabulary 50,000, 128-dim
    python benchmarks/head.py --rows 608 --vocab-size 25000 --rounds 9

Memory is the growth of a separate process, from before the first call to the peak during one: forward and backward,
gradients included. For the times, both take turns in one process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from checkout import new_parser
from torch import Tensor
from torch.nn import functional as F

from microbert.model.loss import masked_loss
from microbert.runtime.device import peak_memory_gb


def dense_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, n_masked: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum") / n_masked


WAYS: dict[str, Callable[..., Tensor]] = {"chunks": masked_loss, "dense": dense_loss}


def call(way: str, tensors: list[Tensor], labels: Tensor) -> float:
    """Run forward and backward, starting without gradients. Returns the seconds."""
    for tensor in tensors:
        tensor.grad = None
    start = time.perf_counter()
    WAYS[way](*tensors, labels, len(labels)).backward()
    return time.perf_counter() - start


def inputs(rows: int, vocab_size: int, n_embed: int) -> tuple[list[Tensor], Tensor]:
    """Return hidden states, weight and bias, and labels."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((rows, n_embed), (vocab_size, n_embed), (vocab_size,))
    ]
    return tensors, torch.randint(vocab_size, (rows,), generator=generator)


def growth_gb(way: str, rows: int, vocab_size: int, n_embed: int) -> float:
    """Return the growth of this process, whose peak memory must not have been higher before."""
    small = inputs(8, 100, n_embed)
    call(way, *small)  # memory that libraries allocate at their first call
    given = inputs(rows, vocab_size, n_embed)
    before = peak_memory_gb(torch.device("cpu"))
    call(way, *given)
    return peak_memory_gb(torch.device("cpu")) - before


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=8192, help="masked tokens")
    parser.add_argument("--vocab-size", type=int, default=50_000)
    parser.add_argument("--n-embed", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.vocab_size, arguments.n_embed)
    if arguments.growth_of:
        print(json.dumps(growth_gb(arguments.growth_of, *shape)))
        return
    growths = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--growth-of", way], capture_output=True, text=True, check=True
        )
        growths[way] = json.loads(done.stdout)
    given = inputs(*shape)
    seconds = {way: [] for way in WAYS}
    for _ in range(arguments.rounds + 1):
        for way in WAYS:
            seconds[way].append(call(way, *given))
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{shape[0]:,} masked tokens, vocabulary {shape[1]:,}, {shape[2]}-dim, "
        f"{arguments.rounds} rounds after a first one that is not timed"
    )
    for way in WAYS:
        print(f"{way}: {growths[way]:.3f} GB, {statistics.median(seconds[way][1:]):.3f} s")
    ratios = [dense / chunks for chunks, dense in zip(seconds["chunks"][1:], seconds["dense"][1:], strict=True)]
    print(
        f"chunks use {growths['chunks'] / growths['dense']:.1%} of the memory, and are "
        f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
