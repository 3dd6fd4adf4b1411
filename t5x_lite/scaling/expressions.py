"""Arithmetic on the columns of a table: `tokens * 1e9`, `log(ppl)`, `1 - active / total`.

Only names, numbers, strings, arithmetic, comparisons and a few functions are read, so that nothing
in an expression can do more than compute. Names with other characters stand in backticks.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from t5x_lite.errors import UserError

_UNITS = {"%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_FUNCTIONS = {f.__name__: f for f in (math.exp, math.log, math.log2, math.log10, math.sqrt)}
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.And: all, ast.Or: any,
}  # fmt: skip


def number(cell: Any) -> float:
    """A cell's number: 1e9, 12,000, 1.5B or 40%, which are 1.5e9 and 0.4.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(cell, str):
        return float(cell)
    text = cell.strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    unit = _UNITS.get(text[-1:].lower())
    return float(text) if unit is None else float(text[:-1]) * unit


class Expression:
    """A column's name, or arithmetic on columns.

    Args:
      text: a name as it stands in the table, or an expression with names of columns.
      known: the table's columns.
      option: what the text was given for, for the errors.

    Raises:
      UserError: a column that isn't there, or what isn't arithmetic.
    """

    def __init__(self, text: str, known: list[str], option: str):
        self.text, self.option = text, option
        self.plain = text.strip() if text.strip() in known else None
        if self.plain is not None:
            return
        quoted = [name.strip() for name in re.findall(r"`([^`]*)`", text)]
        marks = iter(range(len(quoted)))
        source = re.sub(r"`[^`]*`", lambda _: f" _quoted{next(marks)} ", text).strip()
        self.quoted = {f"_quoted{i}": name for i, name in enumerate(quoted)}
        try:
            self.tree = ast.parse(source, mode="eval").body
        except SyntaxError:
            raise self._unknown(text, known) from None
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
                name = self.quoted.get(node.id, node.id)
                if name not in known:
                    raise self._unknown(name, known)
        self._check(self.tree)

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """Its value in a row: a cell as it is, or a number or truth.

        Raises:
          ValueError: a cell is no number, or arithmetic fails.
        """
        return row[self.plain] if self.plain is not None else self._value(self.tree, row)

    def _unknown(self, name, known):
        there = ", ".join(filter(None, known))
        return UserError(f"{self.option}: no column {name!r}; there are: {there}.")

    def _check(self, node):
        """Only what `_value` knows may occur."""
        ok = isinstance(node, ast.Name | ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare) or (
            isinstance(node, ast.Constant) and isinstance(node.value, int | float | str)
        )
        if isinstance(node, ast.Call):
            ok = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and (
                len(node.args) == 1 and not node.keywords
            )  # fmt: skip
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            ok = type(node.op) in _OPERATORS
        if isinstance(node, ast.Compare):
            ok = all(type(op) in _OPERATORS for op in node.ops)
        if not ok:
            raise UserError(
                f"{self.option}: {self.text!r} has {type(node).__name__}, and only + - * / **, "
                f"comparisons, and, or, not, and {', '.join(_FUNCTIONS)} are known."
            )
        children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
        for child in children:
            if isinstance(child, ast.expr):
                self._check(child)

    def _value(self, node, row):
        def value(child):
            return self._value(child, row)

        match node:
            case ast.Constant():
                return float(node.value) if isinstance(node.value, int) else node.value
            case ast.Name():
                return _typed(row[self.quoted.get(node.id, node.id)])
            case ast.Call():
                return _FUNCTIONS[node.func.id](_number(value(node.args[0])))
            case ast.BinOp():
                left, right = _number(value(node.left)), _number(value(node.right))
                return _OPERATORS[type(node.op)](left, right)
            case ast.UnaryOp():
                inside = value(node.operand)
                inside = inside if isinstance(node.op, ast.Not) else _number(inside)
                return _OPERATORS[type(node.op)](inside)
            case ast.BoolOp():
                return _OPERATORS[type(node.op)](value(part) for part in node.values)
        values = [value(part) for part in (node.left, *node.comparators)]
        pairs = zip(node.ops, values, values[1:], strict=False)
        return all(_compare(type(op), left, right) for op, left, right in pairs)


def _typed(cell: Any) -> Any:
    """A number where the cell holds one, its text otherwise."""
    try:
        return cell if isinstance(cell, bool) else number(cell)
    except (TypeError, ValueError):
        return "" if cell is None else cell.strip() if isinstance(cell, str) else cell


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is no number")
    return value


def _compare(op: type, left: Any, right: Any) -> bool:
    if isinstance(left, str) != isinstance(right, str):  # 1e9 > "", "c4" == 3
        return op is ast.NotEq
    return _OPERATORS[op](left, right)
