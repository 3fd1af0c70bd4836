"""The learning rate over a run, as a share of its peak."""

from microbert.config.constants import Config, ResolvedConfig
from microbert.config.learning_rate import peak_learning_rate


def learning_rate_share(position: float, total_steps: int, config: Config) -> float:
    """Return the share of the peak at a position of the run, from 0 to total_steps.

    After a linear warm-up to 1, "linear" decays to 0 at total_steps. "wsd" (warm-up, stable, decay) stays at 1 and
    decays in the last `decay_ratio` of the run.
    """
    warmup, decay = _phases(total_steps, config)
    if position < warmup:
        return (position + 1) / (warmup + 1)
    return max(0.0, min(1.0, (total_steps - position) / decay))


def sum_of_learning_rates(config: ResolvedConfig, total_steps: int) -> float:
    """Return the sum over all steps of a run: about the farthest that a weight can move."""
    warmup, decay = _phases(total_steps, config)
    return peak_learning_rate(config) * (warmup / 2 + (total_steps - warmup - decay) + (decay + 1) / 2)


def _phases(total_steps: int, config: Config) -> tuple[int, int]:
    """Return the steps of the warm-up and of the decay, which never overlap."""
    warmup = min(int(total_steps * config.warmup_ratio), total_steps - 1)
    rest = total_steps - warmup
    return warmup, rest if config.schedule == "linear" else min(rest, max(1, int(total_steps * config.decay_ratio)))
