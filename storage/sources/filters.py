"""Filters: conditions on columns that decide which rows of a source file count: `int_score >= 4`, `dump in ["x"]`.

A column may be inside another (`meta.score`), and a name with other characters is quoted (`"my score" >= 3`). Text that
is compared with a number is converted to one. Dates and times are compared with ISO text: `day >= "2024-03-01"`.
`length` is the document's number of characters, which a plan ignores, since planning a parquet file reads no text.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, NamedTuple

from storage.errors import SourceInvalid

LENGTH = "length"
NAME = re.compile(r"\w+(\.\w+)*")
CONDITION = re.compile(r"\s*(\w+(?:\.\w+)*|\"[^\"]+\")\s*(<=|>=|==|!=|<|>|not\s+in\b|in\b)\s*(.+)", re.DOTALL)
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
        column = self.column if NAME.fullmatch(self.column) else f'"{self.column}"'
        return f"{column} {self.comparison} {self.operand!r}"


def parse(text: str) -> Filter:
    """Parse a filter. Raises ValueError."""
    unreadable = ValueError(
        f"data.filters: {text!r} cannot be read. Write a column, a comparison ({' '.join(COMPARISONS)}) and a value: "
        f"'int_score >= 4', 'dump in [\"CC-MAIN-2024-10\"]', 'length >= 200' (characters of the document)."
    )
    if not (match := CONDITION.fullmatch(text)):
        raise unreadable
    column, comparison = match[1].strip('"'), " ".join(match[2].split())
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
            if value is None or not _compare(value, condition):
                return False
        except (TypeError, ValueError, OverflowError) as error:
            problem = f"data.filters: {condition} compares values of different types"
            value_found = f"column {condition.column!r} holds {type(value).__name__} {str(value)[:40]!r}"
            raise SourceInvalid(f"{place}: row {row:,}: {problem}: {value_found}. Use a value of that type.") from error
    return True


def _compare(value: object, condition: Filter) -> bool:
    """Raises TypeError, ValueError, and OverflowError for a time that is before the year 1 in UTC."""
    operand = condition.operand
    operands = operand if isinstance(operand, list) else [operand]
    if isinstance(value, date):
        moments = [_moment(item) for item in operands]
        value, operand = _moment(value), moments if isinstance(operand, list) else moments[0]
    elif isinstance(value, str) and operands and not any(isinstance(item, str) for item in operands):
        if not value:  # an empty cell of CSV
            return False
        value = int(value) if value.isdecimal() else float(value)  # not all integers are floats
    elif not isinstance(value, str) and any(isinstance(item, str) for item in operands):
        raise TypeError("a number never equals text: == would drop every row, != would keep it")
    elif isinstance(value, Decimal):
        value = float(value)  # as the operand is: 1.1 == 1.1
    return COMPARISONS[condition.comparison](value, operand)


def _moment(value: date | str) -> datetime:
    """A date or time, or its text in ISO format, as a time in UTC. Without a time zone it is UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def value_at(columns: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field inside one: `meta.score`; None below null. Raises KeyError."""
    if path in columns:
        return columns[path]
    outer = next((name for name in columns if path.startswith(f"{name}.")), path)  # a name may have a dot, too
    if not isinstance(value := columns[outer], Mapping | None):
        raise KeyError(path)
    return None if value is None else value_at(value, path.removeprefix(f"{outer}."))


def nested_names(columns: Mapping[str, Any]) -> Iterator[str]:
    """The names of the fields inside columns, as `value_at` takes them."""
    for name, value in columns.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in (*value, *nested_names(value)))


def check_columns(filters: Sequence[Filter], names: list[str], place: str) -> None:
    """Raise SourceInvalid if the file lacks a column that a filter names."""
    for condition in filters:
        if condition.column not in (LENGTH, *names):
            problem = f"({condition}) needs column {condition.column!r}, found {columns_like(condition.column, names)}"
            raise SourceInvalid(f"{place}: data.filters {problem}. Filter on one of these, or on 'length'.")


def columns_like(name: str, names: Sequence[str], likely: Sequence[str] = ()) -> str:
    """The names of a file's columns, for an error: all, then those that may be meant instead of `name`."""
    similar = get_close_matches(name, names, cutoff=0.5) or [other for other in names if other in likely]
    return (", ".join(names) or "no columns") + (f" (perhaps {' or '.join(map(repr, similar))})" if similar else "")
