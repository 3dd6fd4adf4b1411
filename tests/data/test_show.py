import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from t5x_lite.data.mixtures import Mixture
from t5x_lite.data.objectives import CausalLM, SpanCorruption
from t5x_lite.data.show import list_data, show
from t5x_lite.errors import UserError


def shown(task, width=160, **options):
    console = Console(file=io.StringIO(), width=width)
    show(task=task, console=console, **options)
    return console.file.getvalue()


def table(text, heading):
    """The cells of the table below a heading."""
    lines = text[text.index(heading) :].split("\n")[2:]
    end = next((n for n, line in enumerate(lines) if not line.strip() or "…" in line), len(lines))
    return [line.split() for line in lines[1:end]]


def test_a_row_is_printed_as_the_model_gets_it(prepared):
    text = shown(prepared, length=24, rows=1, tokens=0, seed=3)
    row = prepared.batches(batch_size=1, length=24, seed=3).row(0)
    assert f"row 0: 24 of 24 positions, loss on {int(row['weights'].sum())}" in text
    cells = table(text, "row 0:")
    assert len(cells) == 24
    for place, line in enumerate(cells):
        assert line[1:4] == [str(row[n][place]) for n in ("segments", "positions", "tokens")]
        assert str(row["targets"][place]) in line[4:]
        assert line[-1] == f"{row['weights'][place]:g}"


def test_both_sides_of_an_encoder_decoder_are_printed(prepared):
    task = dataclasses.replace(prepared, objective=SpanCorruption())
    text = shown(task, length=24, rows=2, tokens=5)
    for number in (0, 1):
        assert f"row {number}: encoder, 24 of 24 positions\n" in text
        assert f"row {number}: " in text
    assert "<extra_id_0>" in text
    assert "… 19 more: --tokens 0 shows all" in text


def test_the_first_row_and_the_split_can_be_chosen(prepared):
    rows = [np.asarray(b["tokens"][0]) for b in prepared.evaluation(batch_size=1, length=24)]
    text = shown(prepared, length=24, rows=1, first=2, split="validation", tokens=3)
    assert "hills, row 2:" in text
    assert [line[3] for line in table(text, "row 2:")] == [str(t) for t in rows[2][:3]]
    many = shown(prepared, length=24, rows=10_000, split="validation", tokens=1)
    assert many.count("positions, loss on") == len(rows)


def test_a_mixture_names_its_tasks_and_rates(prepared):
    packed = dataclasses.replace(prepared, objective=CausalLM(packing="best_fit"))
    mixture = Mixture("both", [packed], (2,), prepared.data_dir)
    assert "hills: CausalLM" in shown(mixture, length=24)
    assert "rate 2" in shown(mixture, length=24)


def test_numbers_out_of_range_are_refused(prepared):
    for name, value in (("rows", 0), ("tokens", -1), ("first", -1)):
        with pytest.raises(UserError, match=f"{name}={value}"):
            shown(prepared, **{name: value})


def test_what_is_shipped_and_what_is_prepared_are_listed(prepared, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.gin").write_text("# Predict\n# it. More.\nX = 1\n# no\n")
    (tmp_path / "tasks" / "more").mkdir()
    (tmp_path / "tasks" / "more" / "two.gin").write_text("X = 1\n")
    console = Console(file=io.StringIO(), width=120)
    list_data(tmp_path, prepared.data_dir, console)
    text = console.file.getvalue()
    assert "tasks/mine.gin" in text
    assert "Predict it\n" in re.sub(" +\n", "\n", text)
    assert "tasks/more/two.gin" in text
    tokens = sum(prepared.store(s).lengths("text").sum() for s in ("train", "validation"))
    assert f"{tokens:,} (363)" in text
    list_data(tmp_path, str(tmp_path / "none"), console)
    assert "nothing is prepared" in console.file.getvalue()
