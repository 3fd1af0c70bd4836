"""The position of a run, by its steps or by the clock, and what is due there."""

import pytest
from configs import configure
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples

from microbert.errors import InputError
from microbert.train.progress import EVALUATIONS_SHARE, EXPORT_SECONDS, EXPORT_SHARE, POINTS_PER_RUN, Progress


def progress_of(config, steps, prepared_seconds=0.0, loading_seconds=0.0):
    return Progress(config, steps, 0, prepared_seconds, loading_seconds)


def walk(progress, seconds_a_step=0.0, every=None, n_points=POINTS_PER_RUN):
    """Return the steps after which something is due, and the number of steps."""
    due, step = [], 0
    while not progress.is_over:
        step += 1
        progress.move(step, progress.time_used(step * seconds_a_step))
        if progress.is_due(step, every, n_points):
            due.append(step)
    return due, step


@many_examples
@given(st.integers(1, 500), st.integers(1, 120))
def test_without_a_limit_the_points_have_equal_distances_and_one_is_at_the_end(steps, n_points):
    due, n_steps = walk(progress_of(configure(), steps, 1e9), 1e9, n_points=n_points)
    interval = -(-steps // n_points)
    assert n_steps == steps and due == [
        *(step for step in range(interval, steps, interval) if steps - step >= interval / 2),
        steps,
    ]
    assert len(due) <= n_points and due[-1] - ([0, *due][-2]) >= min(steps, interval / 2)


@many_examples
@given(st.integers(1, 500), st.integers(1, 120))
def test_what_is_due_every_n_steps_is_also_due_at_the_end(steps, every):
    assert walk(progress_of(configure(), steps), every=every)[0] == sorted({*range(every, steps, every), steps})


def test_with_a_limit_the_run_ends_in_time_with_as_many_points():
    progress = progress_of(configure(max_minutes=2), 100_000, prepared_seconds=8.0)
    progress.eval_seconds = 10.0
    due, n_steps = walk(progress, seconds_a_step=0.5)
    assert n_steps == (120 - 8 - EXPORT_SECONDS - 10) / 0.5 and len(due) == POINTS_PER_RUN and due[-1] == n_steps


def test_a_limit_longer_than_all_steps_changes_nothing():
    assert walk(progress_of(configure(max_minutes=60), 50, 8.0), 0.5) == walk(progress_of(configure(), 50, 8.0))


def test_all_processes_use_the_clock_of_the_first_one():
    first, second = (progress_of(configure(max_minutes=2), 100) for _ in range(2))
    used = first.time_used(20.0)
    for progress in (first, second):
        progress.move(3, used)
    assert first.position == second.position == pytest.approx(100 * 20 / (120 - EXPORT_SECONDS))


@pytest.mark.parametrize("eval_seconds, evaluations", [(0.0, 10), (1.0, 8), (5.0, 1), (1000.0, 1), (0.01, 10)])
def test_evaluations_use_a_small_share_of_the_time(eval_seconds, evaluations):
    progress = progress_of(configure(max_minutes=(80 + EXPORT_SECONDS) / 60), 100)
    progress.sample_seconds = eval_seconds
    assert progress.evaluations() == evaluations


def test_a_limit_used_up_by_the_preparation_is_an_error():
    with pytest.raises(InputError, match="max_minutes = 1: the preparation took 55 s"):
        progress_of(configure(max_minutes=1), 100, 55.0)


def simulate(minutes, step_seconds, eval_seconds, prepared_seconds=2.0, loading_seconds=2.0):
    """Simulate a run. Return the seconds in steps, those from start to export, and the positions of its steps."""
    progress = progress_of(configure(max_minutes=minutes), 10_000, prepared_seconds, loading_seconds)
    clock, in_steps, positions = 0.0, 0.0, []
    progress.sample_seconds, progress.eval_seconds = eval_seconds / 5, eval_seconds
    progress.reserve_table(0.0, clock)
    if progress.is_due(0, None, progress.evaluations()):
        clock += progress.sample_seconds
    progress.begin(0, clock)
    while not progress.is_over:
        positions.append(progress.position)
        clock, in_steps = clock + step_seconds, in_steps + step_seconds
        progress.move(len(positions), progress.time_used(clock))
        if progress.is_due(len(positions), None, progress.evaluations()):
            clock += eval_seconds if progress.is_over else progress.sample_seconds
    return in_steps, prepared_seconds + clock, positions


@pytest.mark.parametrize("eval_seconds", [0.01, 0.3, 2.5, 5.0])
@pytest.mark.parametrize("minutes", [0.5, 1, 5])
def test_most_of_the_time_is_for_steps_and_enough_remains_for_the_export(minutes, eval_seconds):
    in_steps, ended, positions = simulate(minutes, 0.02, eval_seconds)
    reserved = min(EXPORT_SECONDS, EXPORT_SHARE * 60 * minutes)
    time_left = 60 * minutes - 2.0 - reserved
    assert ended <= 60 * minutes - reserved + 0.02
    for_steps = 1 - EVALUATIONS_SHARE - 1.2 * eval_seconds / time_left
    assert in_steps > min(0.7, for_steps) * time_left
    assert positions[0] == 0  # so that the learning rate has its whole warm-up


def test_a_slow_machine_reserves_more_time_for_the_export():
    ends = [simulate(1, 0.02, 0.1, loading_seconds=seconds)[1] for seconds in (3, 36, 1000)]
    assert ends == pytest.approx([45, 42, 40], abs=0.1)


def test_the_table_at_the_end_has_its_time():
    shares = []
    for table_seconds in (0.0, 10.0):
        progress = progress_of(configure(max_minutes=1), 100)
        progress.eval_seconds = 5.0
        progress.reserve_table(table_seconds, 0.0)
        progress.begin(0, 0.0)
        shares.append(progress.time_used(15.0))
    assert shares == pytest.approx([15 / (45 - 5), 15 / (45 - 5 - 10)])
    with pytest.raises(InputError, match="evaluation takes about 46 s"):
        progress = progress_of(configure(max_minutes=1), 100)
        progress.eval_seconds = 6.0
        progress.reserve_table(40.0, 0.0)


def test_an_evaluation_that_leaves_no_time_to_train_is_an_error():
    progress = progress_of(configure(max_minutes=0.5), 100, 2.0)
    progress.eval_seconds = 15.0
    progress.reserve_table(0.0, 5.0)
    progress.eval_seconds = 17.0
    with pytest.raises(InputError, match="max_minutes = 0.5: 16 s are left .* evaluation takes about 17 s"):
        progress.reserve_table(0.0, 5.0)
    resumed = Progress(configure(max_minutes=0.5), 100, 3, 2.0, 0.0)
    resumed.eval_seconds = 17.0
    resumed.reserve_table(0.0, 20.0)
    resumed.begin(3, 20.0)
    assert resumed.is_over
