"""docs/memory_questions.md is what its commands print, and each has its thread."""

import re

from tools import memory_questions
from tools.memory_questions import PAGE, QUESTIONS, answers


def test_the_page_is_what_the_commands_say():
    page = PAGE.read_text("utf-8")
    assert memory_questions.between_marks(page, answers(), "answers") == page


def test_every_question_has_a_thread_of_its_own():
    threads = [question.thread for question in QUESTIONS]
    assert len(set(threads)) == len(threads) >= 5
    for thread in threads:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", thread)
