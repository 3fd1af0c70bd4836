"""What a run reports while it trains: the lines of metrics.jsonl, the held-out loss
on the terminal, and the progress bar."""

import time

from tqdm import tqdm

from microbert.data.training_rows import TrainingRows
from microbert.runtime.metrics import Metrics
from microbert.runtime.run import Run
from microbert.train.checkpoint import State
from microbert.train.health_check import Health
from microbert.train.held_out import Evaluation
from microbert.train.progress import Progress


class TrainingLog:
    """Measures the training time of a run, and writes its metrics. Only the first process writes.

    Between two lines of training metrics, the losses accumulate in `state`.
    """

    def __init__(self, run: Run, state: State, progress: Progress, rows: TrainingRows, bar: tqdm) -> None:
        """bar: the progress bar of the steps."""
        self._config, self._state, self._progress, self._rows, self._bar = run.config, state, progress, rows, bar
        self.metrics = Metrics(
            run.folder, state.step, writes=run.world.is_first, for_tensorboard=run.config.report_to == "tensorboard"
        )
        self._seconds_before, self._start = state.seconds, time.perf_counter()
        self._first_step = self._logged_step = state.step
        self._grad_norm = self._step_start = self._step_seconds = 0.0

    def seconds(self) -> float:
        """Return the training time of the run, over all its starts, and update `state` with it."""
        self._state.seconds = self._seconds_before + time.perf_counter() - self._start
        return self._state.seconds

    def begin_step(self) -> None:
        self._step_start = time.perf_counter()

    def add(self, loss: float, grad_norm: float) -> None:
        """Add the loss to the mean of the next line, and keep the gradient norm for it."""
        self._state.loss_sum += loss
        self._state.loss_steps += 1
        self._grad_norm = grad_norm

    def end_step(self) -> None:
        self._step_seconds += time.perf_counter() - self._step_start
        if self._state.step == self._first_step + 1:
            self._bar.unpause()  # leave evaluation and compilation out of the estimate of the remaining time
        self._bar.update(1)

    def write_training(self, learning_rate: float, peak_gb: float) -> None:
        """Write a line of training metrics, over the steps since the last one."""
        state = self._state
        before, seen = self._rows.seen(self._logged_step), self._rows.seen(state.step)
        samples_per_second = (seen.rows - before.rows) / self._step_seconds
        tokens_per_second = (seen.tokens - before.tokens) / self._step_seconds
        mean_loss = state.loss_sum / state.loss_steps
        self._write(
            {
                "train/loss": mean_loss,
                "train/learning_rate": learning_rate,
                "train/grad_norm": self._grad_norm,
                "train/samples_per_second": round(samples_per_second, 1),
                "train/tokens_per_second": round(tokens_per_second),
                "train/peak_memory_gb": round(peak_gb, 3),
            }
        )
        share = ""
        if self._config.max_minutes is not None:
            share = f"{self._progress.position / self._progress.steps:.0%} of the time, "
        self._bar.set_postfix_str(
            f"{share}loss {mean_loss:.3f}, {tokens_per_second / 1000:.0f}k tokens/s", refresh=False
        )
        self._logged_step, self._step_seconds = state.step, 0.0
        state.loss_sum, state.loss_steps = 0.0, 0

    def write_evaluation(self, result: Evaluation, health: Health | None) -> None:
        """Write a line of metrics of an evaluation, and print it. health: None if it was not looked at."""
        values = {"eval/loss": result.loss, "eval/accuracy": result.accuracy, "eval/sequences": result.sequences}
        self._write(values | (health.metrics() if health else {}))
        of_steps = f"/{self._progress.steps}" if self._config.max_minutes is None else ""
        self._bar.write(
            f"step {self._state.step:>6}{of_steps}  held-out loss {result.loss:.4f}  accuracy {result.accuracy:.1%}"
        )

    def show(self, lines: list[str]) -> None:
        """Print lines above the progress bar."""
        for line in lines:
            self._bar.write(line)

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _write(self, values: dict[str, float]) -> None:
        seen = self._rows.seen(self._state.step)
        position = {
            "step": self._state.step,
            "epoch": round(seen.epochs, 4),
            "tokens": seen.tokens,
            "seconds": round(self.seconds(), 3),
        }
        self.metrics.write(position | values)
