"""Filters: conditions on columns that decide which rows of a source file count: `int_score >= 4`, `dump in ["x"]`.

`length` is the document's number of characters, which a plan ignores, since planning a parquet file reads no text.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from storage.errors import SourceInvalid

LENGTH = "length"
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>|not\s+in\b|in\b)\s*(.+)", re.DOTALL)
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda value, operand: value in operand,
    "not in": lambda value, operand: value not in operand,
}


class Filter(NamedTuple):
    """A condition on one column."""

    column: str
    comparison: str
    operand: Any

    def __str__(self) -> str:
        """The canonical form, as a recipe holds it."""
        return f"{self.column} {self.comparison} {self.operand!r}"


def parse(text: str) -> Filter:
    """Parse a filter. Raises ValueError."""
    unreadable = ValueError(
        f"data.filters: {text!r} cannot be read. Write a column, a comparison ({' '.join(COMPARISONS)}) and a value: "
        f"'int_score >= 4', 'dump in [\"CC-MAIN-2024-10\"]', 'length >= 200' (characters of the document)."
    )
    match = CONDITION.fullmatch(text)
    if match is None:
        raise unreadable
    column, comparison = match[1], " ".join(match[2].split())
    try:
        operand = ast.literal_eval(match[3])
        if isinstance(operand, list | tuple | set) and comparison.endswith("in"):
            operand = sorted(set(operand))  # one canonical form for the recipe
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise unreadable from None
    is_list = isinstance(operand, list)
    values = operand if is_list else [operand]
    if is_list != comparison.endswith("in") or not all(isinstance(value, bool | int | float | str) for value in values):
        raise unreadable
    return Filter(column, comparison, operand)


def keeps_row(filters: Sequence[Filter], columns: Mapping[str, object], place: str, row: int) -> bool:
    """Whether a row passes all filters; null, or a missing column, never passes. Raises SourceInvalid."""
    for condition in filters:
        value = columns.get(condition.column)
        try:
            if value is None or not COMPARISONS[condition.comparison](value, condition.operand):
                return False
        except TypeError as error:
            raise SourceInvalid(
                f"{place}: row {row:,}: data.filters: {condition} compares values of different types: column "
                f"{condition.column!r} holds {type(value).__name__} {str(value)[:40]!r}. Use a value of that type."
            ) from error
    return True


def check_columns(filters: Sequence[Filter], names: list[str], place: str) -> None:
    """Raise SourceInvalid if the file lacks a column that a filter names."""
    for condition in filters:
        if condition.column not in (LENGTH, *names):
            raise SourceInvalid(
                f"{place}: data.filters ({condition}) needs column {condition.column!r}, found "
                f"{', '.join(names) or 'no columns'}. Filter on one of these, or on 'length'."
            )
