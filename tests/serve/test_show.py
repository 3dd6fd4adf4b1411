import io

from rich.console import Console

from t5x_lite.serve.answers import Answer
from t5x_lite.serve.show import show

ANSWER = Answer(1, 0, (("[bold]Hi", False), (" there\x1b[31m!", True)), tokens=3, stopped=True)
FILLED = Answer(0, 0, (("a cat", False),), candidates=((("▁cat", 0.75), ("\n", 0.25)),))


def shown(answer, prompts=1, samples=1, terminal=False):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, color_system=None)
    show(answer, prompts, samples, console)
    return file.getvalue()


def test_a_single_answer_in_a_pipe_is_its_text_alone():
    assert shown(ANSWER) == ANSWER.text + "\n"


def test_several_answers_in_a_pipe_say_which_they_are():
    assert shown(ANSWER, 3, 2) == f"--- prompt 2 of 3, sample 1 of 2 ---\n{ANSWER.text}\n"
    assert shown(ANSWER, 1, 2).startswith("--- sample 1 of 2 ---\n")


def test_a_terminal_gets_no_commands_from_a_model():
    text = shown(ANSWER, 3, terminal=True)
    assert "[bold]Hi there�[31m!" in text
    assert "prompt 2 of 3 · 3 tokens, complete" in text


def test_candidates_are_ranked_for_each_mask():
    assert shown(FILLED) == "a cat\nmask 1: ▁cat 0.750, \\n 0.250\n"
    text = shown(FILLED, terminal=True)
    assert "▁cat 75.0%" in text
    assert "\\n 25.0%" in text
