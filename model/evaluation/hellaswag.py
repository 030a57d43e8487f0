"""HellaSwag (Zellers et al., 2019): reads a file of its items and lays them out in the two common conventions.

    file ─▶ Question ─┬▶ completion style: raw text, ending tokenised apart, acc_norm by the mean loss a token
                      └▶ harness style: activity and cleaned text, tokenised together, acc_norm by the loss a character

nanoGPT and llm.c use the first, EleutherAI's lm-evaluation-harness (task version 1.0) the second. Their numbers differ,
so the metrics' names say which one it is. Imports no model.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from model.evaluation.items import ENDINGS, Item
from storage.errors import SourceInvalid

TEXTS = ("ctx", "activity_label", "ctx_a", "ctx_b")
MAY_BE_EMPTY = "ctx_b"  # in items from WikiHow


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    ctx: str
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


def questions(body: bytes | bytearray, name: str) -> list[Question]:
    """The questions of a file: JSON lines, or parquet as on the Hub. Raises SourceInvalid, which names the line."""
    parsed = []
    for number, line in _lines(body, name):
        try:
            parsed.append(_question(line if isinstance(line, dict) else json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceInvalid(
                f"{name}: line {number:,} should be a HellaSwag item ({', '.join(TEXTS)}, four endings, label 0 to 3), "
                f"found {type(error).__name__}: {error}. Repair the file of evaluation.hellaswag, or leave the setting "
                f"empty."
            ) from error
    if not parsed:
        raise SourceInvalid(f"{name}: the file has no HellaSwag items. Set evaluation.hellaswag to another file.")
    return parsed


def completion_style(question: Question) -> Item:
    """The raw context, and each ending tokenised apart with a space before it."""
    endings = [tokenizer.encode(f" {ending}").tolist() for ending in question.endings]
    context = tokenizer.encode(question.ctx).tolist()
    return Item(context, endings, question.label, [len(ending) for ending in endings])


def harness_style(question: Question) -> Item:
    """The activity before the cleaned context, each cleaned ending tokenised together with it."""
    text = cleaned(f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}")
    context = text.rstrip()  # GPT-2's tokens begin with a space, so a trailing space belongs to the endings
    spaces = text[len(context) :]
    ids, endings = tokenizer.encode(context).tolist(), [cleaned(ending) for ending in question.endings]
    together = [tokenizer.encode(f"{context}{spaces} {ending}").tolist()[len(ids) :] for ending in endings]
    # An empty context becomes the start of a document
    return Item(ids or [tokenizer.EOT], together, question.label, [len(ending) for ending in endings])


CONVENTIONS: dict[str, tuple[Callable[[Question], Item], str]] = {
    "completion": (
        completion_style,
        "raw context, ending tokenised apart, acc by the sum, acc_norm by the mean a token",
    ),
    "harness": (
        harness_style,
        "activity label, cleaned text, tokenised together, acc by the sum, acc_norm by the sum a character",
    ),
}


def cleaned(text: str) -> str:
    """The text without WikiHow's marks, as the harness cleans it: double spaces become single ones, in one pass."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _question(fields: dict[str, Any]) -> Question:
    texts = {name: fields[name] for name in TEXTS}
    endings, label = fields["endings"], str(fields["label"])
    for name, text in texts.items():
        if not isinstance(text, str) or not (text or name == MAY_BE_EMPTY):
            raise ValueError(f"{name} {text!r:.80}")
    if (
        not isinstance(endings, list)
        or len(endings) != ENDINGS
        or not all(isinstance(text, str) and text for text in endings)
    ):
        raise ValueError(f"endings {endings!r:.80}")
    if label not in {"0", "1", "2", "3"}:
        raise ValueError(f"label {label!r:.20}")
    return Question(**texts, endings=tuple(endings), label=int(label))


def _lines(body: bytes | bytearray, name: str) -> Iterator[tuple[int, Any]]:
    """Lines that are not blank, or rows of a parquet file, each with its number from 1."""
    if not name.endswith(".parquet"):
        yield from ((number, line) for number, line in enumerate(bytes(body).splitlines(), 1) if line.strip())
        return
    try:
        rows = pq.read_table(pa.BufferReader(body)).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceInvalid(
            f"{name}: not a readable parquet file: {error}. Set evaluation.hellaswag to another file."
        ) from error
    yield from enumerate(rows, 1)
