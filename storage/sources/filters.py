"""Filters: which rows of a source file count, by their columns. Knows no file format.

A filter is written as in Python: `int_score >= 4`, `language_score > 0.9`, `dump in ["CC-MAIN-2024-10"]`. The name
`length` means the document's characters: text is read when a shard is made, so a plan cannot know it.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from storage.errors import SourceInvalid

LENGTH = "length"
WRITTEN = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>|not\s+in\b|in\b)\s*(.+)", re.DOTALL)
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "in": lambda found, wanted: found in wanted,
    "not in": lambda found, wanted: found not in wanted,
}


class Filter(NamedTuple):
    """One condition on one column."""

    column: str
    comparison: str
    wanted: Any

    def __str__(self) -> str:
        """The one way in which it is written into a recipe."""
        return f"{self.column} {self.comparison} {self.wanted!r}"

    def keeps(self, found: Any) -> bool:
        """Whether a row with this value counts; one without a value (null) does not. Raises SourceInvalid."""
        try:
            return found is not None and COMPARISONS[self.comparison](found, self.wanted)
        except TypeError as error:
            raise SourceInvalid(
                f"data.filters: {self} was asked of column {self.column!r}, which holds {type(found).__name__}, as "
                f"{str(found)[:40]!r}. Compare it with a value of that type."
            ) from error


def parse(text: str) -> Filter:
    """The filter that is written. Raises ValueError."""
    try:
        found = WRITTEN.fullmatch(text)
        if found is None:
            raise SyntaxError
        column, comparison, wanted = found[1], " ".join(found[2].split()), ast.literal_eval(found[3])
        if isinstance(wanted, list | tuple | set) != comparison.endswith("in"):
            raise SyntaxError
        wanted = sorted(set(wanted)) if comparison.endswith("in") else wanted
        if not all(
            isinstance(one, bool | int | float | str) for one in (wanted if isinstance(wanted, list) else [wanted])
        ):
            raise SyntaxError
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"data.filters: {text!r} cannot be read. Write a column, one of {' '.join(COMPARISONS)}, and a value: "
            f"'int_score >= 4', 'dump in [\"CC-MAIN-2024-10\"]', 'length >= 200' (characters of the document)."
        ) from None
    return Filter(column, comparison, wanted)


def check_columns(filters: tuple[Filter, ...], names: list[str], place: str) -> None:
    """Raise SourceInvalid when a file lacks a column that a filter asks for."""
    for wanted in filters:
        if wanted.column not in (LENGTH, *names):
            raise SourceInvalid(
                f"{place}: column {wanted.column!r} was asked for by data.filters ({wanted}), found "
                f"{', '.join(names) or 'no columns'}. Filter on one of these, or on 'length'."
            )
