"""The learning-rate rule: from the constant to the optimizer's peak."""

import dataclasses
import math

from microbert.config.constants import Config, tokens_per_step

PRETRAINING = 128  # times the learning rate of fine-tuning
# the highest learning_rate of the sweeps in docs/experiments.md, by the width up to which it holds: v1's; v2's to v4's
HIGHEST_SWEPT = {4: 2e-4, math.inf: 6e-5}
FAR_ABOVE = 2  # times the peak of the highest: there is a warning


def peak_learning_rate(config: Config) -> float:
    """The peak that the optimizer gets.

    `learning_rate` is read as that with which one fine-tunes a 768-wide BERT. Training from scratch takes PRETRAINING times as much, a narrower model
    more, by the fourth root of the width, and a larger batch more, by the square-root rule (arXiv:2205.10287). Factor and root are fitted to
    sweeps (docs/experiments.md).
    """
    if config.lr_scaling == "none":
        return config.learning_rate
    return (
        config.learning_rate * PRETRAINING * (768 / config.n_embed) ** 0.25 * math.sqrt(tokens_per_step(config) / 4096)
    )


def explain_learning_rate(config: Config) -> str:
    """One line: the constant, the peak, and how the one came from the other. A second one warns of a peak far above
    those that were tried."""
    peak = peak_learning_rate(config)
    if config.lr_scaling == "none":
        line = f"learning rate: {peak:g} as it stands (lr_scaling = none)"
    else:
        line = (
            f"learning rate: {config.learning_rate:g} is what fine-tunes a 768-wide BERT; from scratch, at this width "
            f"and batch, the peak is {config.learning_rate:g} x {PRETRAINING} x (768/{config.n_embed})^(1/4) x "
            f"sqrt({tokens_per_step(config)}/4096) = {peak:.3g}"
        )
    highest = next(highest for width, highest in HIGHEST_SWEPT.items() if config.n_embed <= width)
    swept = peak_learning_rate(dataclasses.replace(config, learning_rate=highest, lr_scaling="auto"))
    if peak > FAR_ABOVE * swept:
        line += (
            f"\nwarning: that is {peak / swept:.0f} times the highest peak that sweeps over v1 to v4 covered at such a "
            f"width, which is {swept:.2g} at this batch (learning_rate = {highest:g} with lr_scaling = auto; "
            "docs/experiments.md): the run may diverge"
        )
    return line
