"""How far a run is, by its steps or by the clock, and what is due on the way.

The position goes from 0 to the number of steps in all epochs. Each step moves it on by one; where max_minutes will end the run sooner, it goes by the
share of the time that is used up, and the learning rate with it.
"""

from .config import Config, InputError

POINTS_PER_RUN = 10  # evaluations and checkpoints, where eval_every and save_every are None
EXPORT_SECONDS = 20  # kept for the export and its check, on a slow machine
EVALUATIONS_SHARE = 0.1  # of the time that max_minutes leaves, at most


class Course:
    """prepared_seconds: from the start of the run to its first step. eval_seconds: an evaluation takes so long, 0.0 where that is not known yet."""

    def __init__(self, config: Config, steps: int, step: int, prepared_seconds: float) -> None:
        """Raises InputError where max_minutes leaves no time to train."""
        self.steps, self.position, self._before = steps, float(step), float(step) - 1  # what was due here, and not done, still is
        self._config, self.eval_seconds = config, 0.0
        self._seconds = None if config.max_minutes is None else 60 * config.max_minutes - prepared_seconds - EXPORT_SECONDS
        if self._seconds is not None and self._seconds <= 0:
            raise InputError(f"max_minutes = {config.max_minutes:g}: the preparation took {prepared_seconds:.0f} s, and export takes about {EXPORT_SECONDS}, so no time is "
                             "left to train. What is prepared stays: the same command has more time now")

    def time_used(self, seconds: float) -> float:
        """The share of the time for training that is used up after so many seconds of it; 0.0 without max_minutes."""
        if self._seconds is None:
            return 0.0
        return seconds / max(1e-9, self._seconds - self.eval_seconds)  # the last evaluation comes when all steps are done

    def move(self, step: int, time_used: float) -> None:
        """To where `step` steps are done. time_used: by the first process's clock."""
        self._before, self.position = self.position, min(float(self.steps), max(float(step), self.steps * time_used))

    @property
    def is_over(self) -> bool:
        return self.position >= self.steps

    def is_due(self, step: int, every: int | None, n_points: int = POINTS_PER_RUN) -> bool:
        """Whether something is due now that comes every so many steps; or n_points times in the run, where `every` is None; and at its end.

        Of the n_points none comes shortly before the end: what is gathered from one to the next would be from a few steps there.
        """
        if every is not None:
            return self.is_over or step % every == 0
        interval = max(1, -(-self.steps // n_points))
        return self.is_over or (self.position // interval > self._before // interval and self.steps - self.position >= interval / 2)

    def evaluations(self) -> int:
        """How many there are in a run, where eval_every is None."""
        if self._seconds is None or not self.eval_seconds:
            return POINTS_PER_RUN
        return max(1, min(POINTS_PER_RUN, int(EVALUATIONS_SHARE * self._seconds / self.eval_seconds)))
