"""Progress of a run, by its steps or by the clock: when to log, evaluate and save.

The position goes from 0 to the number of steps in all epochs. Each step advances it by one. If max_minutes ends the run
sooner, the position follows the share of the time that is used up, and so does the learning rate.
"""

from microbert.config.constants import Config
from microbert.errors import InputError

POINTS_PER_RUN = 10  # evaluations and checkpoints, if eval_every and save_every are None
EXPORT_SECONDS = 20  # reserved for the export and its check, on a slow machine or with a large model
EXPORT_SHARE = 0.25  # of max_minutes, at most, unless that is less than
LOADING_SHARE = 0.5  # of the time that loading the libraries of the export took: measured is a fifth of it
EVALUATIONS_SHARE = 0.1  # of the time that max_minutes leaves, at most


class Progress:
    """The position of a run, and what is due there.

    prepared_seconds: from the start of the run to its first step. loading_seconds: to load the libraries of the export.
    eval_seconds: of the evaluation at the end, 0.0 if unknown. sample_seconds: of each one before, likewise.
    """

    def __init__(self, config: Config, steps: int, step: int, prepared_seconds: float, loading_seconds: float) -> None:
        """Raise InputError if max_minutes leaves no time to train."""
        self.steps, self.position = steps, float(step)
        self._before = float(step) - 1  # so that what was due at this step still is
        self._config, self.eval_seconds, self.sample_seconds = config, 0.0, 0.0
        self._seconds: float | None = None
        self._idle_seconds = self._table_seconds = 0.0
        if config.max_minutes is not None:
            needed = max(EXPORT_SHARE * 60 * config.max_minutes, LOADING_SHARE * loading_seconds)
            export_seconds = min(EXPORT_SECONDS, needed)
            self._seconds = 60 * config.max_minutes - prepared_seconds - export_seconds
            if self._seconds <= 0:
                raise InputError(
                    f"max_minutes = {config.max_minutes:g}: the preparation took {prepared_seconds:.0f} s, and the "
                    f"export takes about {export_seconds:.0f} s, so no time is left to train. The prepared data is "
                    "saved: the same command has more time now"
                )

    def reserve_table(self, table_seconds: float, seconds: float) -> None:
        """Reserve the time for the table by length that follows the evaluation at the end, after `eval_seconds` is set.

        seconds: time of the run so far, without the preparation. Raises InputError if both leave a new run no time to
        train.
        """
        self._table_seconds = table_seconds
        needed = self.eval_seconds + table_seconds
        if self._seconds is not None and self.position == 0 and seconds + needed >= self._seconds:
            left = max(0.0, self._seconds - seconds)
            raise InputError(
                f"max_minutes = {self._config.max_minutes:g}: {left:.0f} s are left before the export, and the last "
                f"evaluation takes about {needed:.0f} s, so no time is left to train. Set a larger max_minutes, "
                "or a smaller max_samples"
            )

    def time_used(self, seconds: float) -> float:
        """Return the share of the training time that is used up after these seconds; 0.0 without max_minutes."""
        if self._seconds is None:
            return 0.0
        # what follows the last step
        reserved = self.eval_seconds + self._table_seconds + self._idle_seconds
        return (seconds - self._idle_seconds) / max(1e-9, self._seconds - reserved)

    def begin(self, step: int, seconds: float) -> None:
        """Set the position before the first step. The schedule of a new run starts here, not when the run started."""
        if step == 0:
            self._idle_seconds = seconds
        self.move(step, self.time_used(seconds))

    def move(self, step: int, time_used: float) -> None:
        """Advance to the position after `step` steps. time_used: as the first process measures it."""
        self._before, self.position = self.position, min(float(self.steps), max(float(step), self.steps * time_used))

    @property
    def is_over(self) -> bool:
        return self.position >= self.steps

    def is_due(self, step: int, every: int | None, n_points: int = POINTS_PER_RUN) -> bool:
        """Return whether something is due now: every `every` steps, or n_points times in the run if `every` is None.

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
        """Return the number of evaluations in a run whose eval_every is None."""
        if self._seconds is None or not self.sample_seconds:
            return POINTS_PER_RUN
        return max(1, min(POINTS_PER_RUN, int(EVALUATIONS_SHARE * self._seconds / self.sample_seconds)))


def duration(seconds: float) -> str:
    """Return the seconds in the unit that suits them: "90 s", "45 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
