"""Random numbers as a pure function of (seed, counters): the same in any order, on any rank, after any restart.

Each counter is mixed in by the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"). Arrays are uint64, whose multiplication wraps in numpy as the algorithm requires. Tensors are int64, whose
multiplication wraps as well; right shifts clear the bits that the sign fills in.
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN_BITS = 0x9E3779B97F4A7C15
GOLDEN = np.uint64(GOLDEN_BITS)
RANDOM_BITS = 53  # per number of `uniform_bits`


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*counters: int | np.ndarray) -> np.ndarray:
    """Return 64 random bits for each element of the counters. Shape: that of the broadcast counters, at least 1D."""
    bits = np.zeros(1, np.uint64)
    for counter in counters:
        bits = _mix((bits ^ np.asarray(counter).astype(np.uint64)) + GOLDEN)
    return bits


def torch_generator(seed: int, stream: int) -> torch.Generator:
    """Return PyTorch's generator on the CPU for a stream of a seed. Streams are independent of each other."""
    return torch.Generator().manual_seed(int(random_bits(seed, stream)[0] >> np.uint64(1)))


def uniform(bits: np.ndarray) -> np.ndarray:
    """Convert random bits to float64 in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, n: int, *counters: int | np.ndarray) -> np.ndarray:
    """Return the place of each index in the permutation of range(n) given by the counters, in constant memory.

    A four-round Feistel network over the next power of four, repeated until the value is below n (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"). index: at least 1D, each in [0, n); broadcast with the counters.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    round_keys = [np.broadcast_to(random_bits(*counters, number), np.shape(index)) for number in range(4)]
    value = np.asarray(index).astype(np.uint64)
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(right + keys[outside]) & mask)
        value[outside] = (left << shift) | right
        outside = value >= np.uint64(n)
    return value.astype(np.int64)


def uniform_bits(counters: Tensor) -> Tensor:
    """Return SplitMix64's output for each counter as an integer in [0, 2**RANDOM_BITS). int64, on any device."""
    x = counters * _signed(GOLDEN_BITS)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return _shift_right(x ^ _shift_right(x, 31), 64 - RANDOM_BITS)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Shift right by n bits, filling with zeros."""
    return (x >> n) & (2 ** (64 - n) - 1)
