"""How far a run is, by its steps or by the clock, and what is due on the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import many_examples
from test_config import configure

from microbert.config import InputError
from microbert.course import EXPORT_SECONDS, POINTS_PER_RUN, Course


def walk(course, seconds_a_step=0.0, every=None, n_points=POINTS_PER_RUN):
    """The steps after which something is due, and how many there were."""
    due, step = [], 0
    while not course.is_over:
        step += 1
        course.move(step, course.time_used(step * seconds_a_step))
        if course.is_due(step, every, n_points):
            due.append(step)
    return due, step


@many_examples
@given(st.integers(1, 500), st.integers(1, 120))
def test_without_a_limit_a_run_has_all_its_steps_and_its_points_at_equal_distances_and_one_at_its_end(steps, n_points):
    due, n_steps = walk(Course(configure(), steps, 0, 1e9), 1e9, n_points=n_points)
    interval = -(-steps // n_points)
    assert n_steps == steps and due == [*(step for step in range(interval, steps, interval) if steps - step >= interval / 2), steps]
    assert len(due) <= n_points and due[-1] - ([0, *due][-2]) >= min(steps, interval / 2)


@many_examples
@given(st.integers(1, 500), st.integers(1, 120))
def test_what_comes_every_so_many_steps_comes_at_the_end_too(steps, every):
    assert walk(Course(configure(), steps, 0, 0.0), every=every)[0] == sorted({*range(every, steps, every), steps})


def test_with_a_limit_the_run_ends_with_the_time_and_has_as_many_points():
    course = Course(configure(max_minutes=2), 100_000, 0, prepared_seconds=8.0)
    course.eval_seconds = 10.0
    due, n_steps = walk(course, seconds_a_step=0.5)
    assert n_steps == (120 - 8 - EXPORT_SECONDS - 10) / 0.5 and len(due) == POINTS_PER_RUN and due[-1] == n_steps


def test_a_limit_that_all_steps_keep_changes_nothing():
    assert walk(Course(configure(max_minutes=60), 50, 0, 8.0), 0.5) == walk(Course(configure(), 50, 0, 8.0))


def test_all_processes_go_by_the_first_ones_clock():
    first, second = (Course(configure(max_minutes=1), 100, 0, prepared) for prepared in (0.0, 0.0))
    used = first.time_used(20.0)
    for course in (first, second):
        course.move(3, used)
    assert first.position == second.position == pytest.approx(100 * 20 / (60 - EXPORT_SECONDS))


@pytest.mark.parametrize("eval_seconds, evaluations", [(0.0, 10), (1.0, 8), (5.0, 1), (1000.0, 1), (0.01, 10)])
def test_evaluations_take_a_small_share_of_the_time(eval_seconds, evaluations):
    course = Course(configure(max_minutes=(80 + EXPORT_SECONDS) / 60), 100, 0, 0.0)
    course.eval_seconds = eval_seconds
    assert course.evaluations() == evaluations


def test_time_that_the_preparation_has_used_up_is_told():
    with pytest.raises(InputError, match="max_minutes = 1: the preparation took 55 s"):
        Course(configure(max_minutes=1), 100, 0, 55.0)
