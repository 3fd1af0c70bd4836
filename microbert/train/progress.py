"""Progress of a run, by its steps or by the clock: when to log, evaluate and save.

The position goes from 0 to the number of steps in all epochs. Each step moves it on by one; where max_minutes will end the run sooner, it goes by the
share of the time that is used up, and the learning rate with it.
"""

from microbert.config.constants import Config
from microbert.errors import InputError

POINTS_PER_RUN = 10  # evaluations and checkpoints, where eval_every and save_every are None
EXPORT_SECONDS = 20  # reserved for the export and its check, on a slow machine or with a large model
EXPORT_SHARE = 0.25  # of max_minutes, at most, unless that is less than
LOADING_SHARE = 0.5  # of the time that loading the libraries of the export took: measured is a fifth of it
EVALUATIONS_SHARE = 0.1  # of the time that max_minutes leaves, at most


class Course:
    """Where a run is, and what is due.

    prepared_seconds: from the start of the run to its first step. eval_seconds: of one evaluation, 0.0 where unknown.
    loading_seconds: to load the libraries of the export.
    """

    def __init__(self, config: Config, steps: int, step: int, prepared_seconds: float, loading_seconds: float) -> None:
        """Raises InputError where max_minutes leaves no time to train."""
        self.steps, self.position, self._before = (
            steps,
            float(step),
            float(step) - 1,
        )  # what was due here, and not done, still is
        self._config, self.eval_seconds = config, 0.0
        self._seconds, self._idle_seconds = None, 0.0
        if config.max_minutes is not None:
            needed = max(EXPORT_SHARE * 60 * config.max_minutes, LOADING_SHARE * loading_seconds)
            export_seconds = min(EXPORT_SECONDS, needed)
            self._seconds = 60 * config.max_minutes - prepared_seconds - export_seconds
        if self._seconds is not None and self._seconds <= 0:
            raise InputError(
                f"max_minutes = {config.max_minutes:g}: the preparation took {prepared_seconds:.0f} s, and the export "
                f"takes about {export_seconds:.0f} s, so no time is left to train. The prepared data is saved: the "
                "same command has more time now"
            )

    def reserve_evaluation(self, eval_seconds: float, seconds: float) -> None:
        """Reserve the time for the evaluation at the end. seconds: of the run so far, without its preparation.

        Raises InputError for a run that has not started to train where that leaves no time for it.
        """
        self.eval_seconds = eval_seconds
        if self._seconds is not None and self.position == 0 and seconds + eval_seconds >= self._seconds:
            left = max(0.0, self._seconds - seconds)
            raise InputError(
                f"max_minutes = {self._config.max_minutes:g}: {left:.0f} s are left before the export, and one "
                f"evaluation takes about {eval_seconds:.0f} s, so no time is left to train. Set a larger max_minutes, "
                "or a smaller max_samples"
            )

    def time_used(self, seconds: float) -> float:
        """The share of the time for training that is used up after so many seconds of it; 0.0 without max_minutes."""
        if self._seconds is None:
            return 0.0
        reserved = self.eval_seconds + self._idle_seconds  # the last evaluation comes when all steps are done
        return (seconds - self._idle_seconds) / max(1e-9, self._seconds - reserved)

    def begin(self, step: int, seconds: float) -> None:
        """Set the position before the first step. The schedule of a new run starts here, however long that took."""
        if step == 0:
            self._idle_seconds = seconds
        self.move(step, self.time_used(seconds))

    def move(self, step: int, time_used: float) -> None:
        """To where `step` steps are done. time_used: by the first process's clock."""
        self._before, self.position = self.position, min(float(self.steps), max(float(step), self.steps * time_used))

    @property
    def is_over(self) -> bool:
        return self.position >= self.steps

    def is_due(self, step: int, every: int | None, n_points: int = POINTS_PER_RUN) -> bool:
        """Return whether something is due now: after every so many steps, or n_points times where `every` is None.

        It is always due at the end of the run. Of several points, none comes shortly before the end, where it would
        cover only a few steps, and one comes before the first step.
        """
        if every is not None:
            return self.is_over or step % every == 0
        if n_points == 1:
            return self.is_over
        interval = max(1, -(-self.steps // n_points))
        return self.is_over or (
            self.position // interval > self._before // interval and self.steps - self.position >= interval / 2
        )

    def evaluations(self) -> int:
        """How many there are in a run, where eval_every is None."""
        if self._seconds is None or not self.eval_seconds:
            return POINTS_PER_RUN
        return max(1, min(POINTS_PER_RUN, int(EVALUATIONS_SHARE * self._seconds / self.eval_seconds)))
