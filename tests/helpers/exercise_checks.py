"""What is tested of the checks of a notebook: what they say of wrong answers and right.

TOLD   {exercise: {mutant: what its learner must read}}
RIGHT  {exercise: {name: source of an answer that is right in another way}}
"""

import pytest


def checked(lesson, explained, right):
    """The three tests of a notebook's checks, for a test module to name."""
    exercises = {exercise.id: exercise for exercise in lesson.exercises}

    @pytest.mark.parametrize("id, name", _rows(explained))
    def a_common_mistake_is_named(id, name):
        refusal = lesson.judge(exercises[id], lesson.wrong[id][name])
        assert explained[id][name] in str(refusal)

    @pytest.mark.parametrize("id, name", _rows(right))
    def an_answer_that_is_right_in_another_way_passes(id, name):
        assert lesson.judge(exercises[id], right[id][name]) is None

    def every_exercise_has_both():
        assert set(explained) == set(right) == set(exercises)

    return (
        a_common_mistake_is_named,
        an_answer_that_is_right_in_another_way_passes,
        every_exercise_has_both,
    )


def _rows(table):
    return [(id, name) for id, names in table.items() for name in names]
