"""Parameter groups, the optimizer and the learning-rate schedule."""

import torch
from torch import nn

from .config import Config, peak_learning_rate

BETAS = (0.9, 0.98)  # RoBERTa's second beta (arXiv:1907.11692): steadier than 0.999 when a run has few steps
EPS = 1e-6


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norms do not, as in BERT. Every parameter is in exactly one group."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=peak_learning_rate(config), betas=BETAS, eps=EPS, fused=True)


def learning_rate_share(step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of the peak for a step (from 0): linear warm-up to 1, then linear decay, which would reach 0 at total_steps."""
    warmup = int(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total_steps - step) / (total_steps - warmup)


def reach(config: Config, total_steps: int) -> float:
    """The sum of the learning rates of a run: Adam moves no weight by more than about this."""
    return peak_learning_rate(config) * sum(learning_rate_share(step, total_steps, config.warmup_ratio) for step in range(total_steps))
