"""Answers for people: coloured on a terminal, plain in a pipe."""

import re

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from t5x_lite.serve.answers import Answer

# A model of bytes may write what a terminal takes for commands.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(answer: Answer, prompts: int, samples: int, console: Console) -> None:
    """Prints one of `prompts` × `samples` answers.

    On a terminal, what the model wrote stands out from what it was given. Elsewhere a heading comes
    only where there are several answers, so that a single one is nothing but its text.
    """
    which = [f"prompt {answer.prompt + 1} of {prompts}"] if prompts > 1 else []
    which += [f"sample {answer.sample + 1} of {samples}"] if samples > 1 else []
    if console.is_terminal:
        _show_in_colour(answer, which, console)
    else:
        _print_plainly(answer, which, console)


def _show_in_colour(answer: Answer, which: list[str], console: Console) -> None:
    if not answer.candidates:
        end = "complete" if answer.stopped else "cut off"
        which = [*which, f"{answer.tokens} tokens, {end}"]
    console.print(Rule(Text(" · ".join(which), "dim"), align="left", style="dim"))
    parts = ((_CONTROL.sub("�", text), "bold" if new else "dim") for text, new in answer.segments)
    console.print(Text.assemble(*parts))
    if answer.candidates:
        table = Table(box=None, pad_edge=False, show_header=False)
        for number, candidates in enumerate(answer.candidates, 1):
            ranked = (Text(f"{_name(piece)} {prob:.1%}") for piece, prob in candidates)
            table.add_row(Text(f"mask {number}", "dim"), *ranked)
        console.print(table)


def _print_plainly(answer: Answer, which: list[str], console: Console) -> None:
    lines = [f"--- {', '.join(which)} ---"] if which else []
    lines.append(answer.text)
    for number, candidates in enumerate(answer.candidates, 1):
        ranked = ", ".join(f"{_name(piece)} {prob:.3f}" for piece, prob in candidates)
        lines.append(f"mask {number}: {ranked}")
    print(*lines, sep="\n", file=console.file, flush=True)


def _name(piece: str) -> str:
    return _CONTROL.sub("�", piece.replace("\n", "\\n").replace("\t", "\\t"))
