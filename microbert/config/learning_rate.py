"""The learning-rate rule: from the constant to the optimizer's peak."""

import dataclasses
import math

from microbert.config.constants import ResolvedConfig, tokens_per_step

PRETRAINING = 128  # peak of pretraining over that of fine-tuning, at a width of 768 and 4096 tokens per step
# highest learning_rate of the sweeps in docs/experiments.md, by the largest n_embed it covers: v1, and v2 to v4
HIGHEST_SWEPT = {4: 2e-4, math.inf: 6e-5}
FAR_ABOVE = 2  # warn when the peak is more than this many times the highest one of the sweeps


def peak_learning_rate(config: ResolvedConfig) -> float:
    """Return the optimizer's peak learning rate.

    `learning_rate` is the rate that fine-tunes a 768-wide BERT. Pretraining from scratch uses PRETRAINING times as
    much. The rate also grows with the inverse fourth root of the width and the square root of the batch
    (arXiv:2205.10287). Factor and fourth root are fitted to sweeps (docs/experiments.md).
    """
    if config.lr_scaling == "none":
        return config.learning_rate
    return (
        config.learning_rate * PRETRAINING * (768 / config.n_embed) ** 0.25 * math.sqrt(tokens_per_step(config) / 4096)
    )


def explain_learning_rate(config: ResolvedConfig) -> str:
    """Return lines that say how the peak follows from the constant, and what the weight decay does at that rate.

    They have a warning if the peak is far above the sweeps.
    """
    peak = peak_learning_rate(config)
    if config.lr_scaling == "none":
        text = f"peak learning rate: {peak:g}, unscaled (lr_scaling = none)"
    else:
        text = (
            f"peak learning rate: {peak:.3g}, scaled from {config.learning_rate:g} to pretraining, width and batch:\n"
            f"  {config.learning_rate:g} x {PRETRAINING} x (768 / {config.n_embed})^(1/4) "
            f"x ({tokens_per_step(config)} / 4096)^(1/2)"
        )
    if peak * config.weight_decay > 0:
        text += (
            f"\nweight decay: {config.weight_decay:g} x the learning rate a step; at the peak, it halves a weight "
            f"without gradients in {math.log(2) / (peak * config.weight_decay):,.0f} steps"
        )
    highest = next(highest for width, highest in HIGHEST_SWEPT.items() if config.n_embed <= width)
    swept = peak_learning_rate(dataclasses.replace(config, learning_rate=highest, lr_scaling="auto"))
    if peak > FAR_ABOVE * swept:
        text += (
            f"\nwarning: that is {peak / swept:.0f} times the highest peak tried at this width. The run may diverge."
            f"\n  At this batch size, sweeps went up to {swept:.2g}: learning_rate = {highest:g}, lr_scaling = auto "
            "(docs/experiments.md)"
        )
    return text
