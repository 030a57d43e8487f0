"""HellaSwag (Zellers et al., 2019): a file of its items, and the two conventions in which their endings are scored.

    file ─▶ Question ─┬▶ completion style: raw text, ending tokenised apart, acc_norm by the mean loss a token
                      └▶ harness style: activity and cleaned text, tokenised together, acc_norm by the loss a character

The first is nanoGPT's and llm.c's, the second that of EleutherAI's lm-evaluation-harness (its task version 1.0). Their
numbers differ, so each has its name in its metrics' keys. Knows no model.
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
MAY_BE_EMPTY = "ctx_b"  # of an item of WikiHow


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
    """The questions of a file, JSON lines or parquet as on the Hub. Raises SourceInvalid, naming the line."""
    found = []
    for number, line in _lines(body, name):
        try:
            found.append(_question(line if isinstance(line, dict) else json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceInvalid(
                f"{name}: line {number:,} should be a HellaSwag item ({', '.join(TEXTS)}, four endings, label 0 to 3), "
                f"found {type(error).__name__}: {error}. Mend evaluation.hellaswag, or leave it empty."
            ) from error
    if not found:
        raise SourceInvalid(f"{name}: HellaSwag items were asked for, found none. Mend evaluation.hellaswag.")
    return found


def completion_style(question: Question) -> Item:
    """The raw context, and each ending tokenised apart with a space before it."""
    endings = [tokenizer.encode(f" {ending}").tolist() for ending in question.endings]
    context = tokenizer.encode(question.ctx).tolist()
    return Item(context, endings, question.label, [len(ending) for ending in endings])


def harness_style(question: Question) -> Item:
    """The activity before the cleaned context, each cleaned ending tokenised together with it."""
    asked = f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}"
    context = cleaned(asked).rstrip()  # a space at its end belongs to the endings, as GPT-2's tokens have it
    spaces = cleaned(asked)[len(context) :]
    ids, endings = tokenizer.encode(context).tolist(), [cleaned(ending) for ending in question.endings]
    together = [tokenizer.encode(f"{context}{spaces} {ending}").tolist()[len(ids) :] for ending in endings]
    # Where nothing is left of the context, a document begins
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
    """The text without WikiHow's marks. Two spaces become one where the marks were, in one pass, as in the harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _question(found: dict[str, Any]) -> Question:
    texts = {name: found[name] for name in TEXTS}
    endings, label = found["endings"], str(found["label"])
    for name, text in texts.items():
        if not isinstance(text, str) or not (text or name == MAY_BE_EMPTY):
            raise ValueError(f"{name} {text!r:.80}")
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        raise ValueError(f"endings {endings!r:.80}")
    if not all(isinstance(text, str) and text for text in endings):
        raise ValueError(f"endings {endings!r:.80}")
    if label not in {"0", "1", "2", "3"}:
        raise ValueError(f"label {label!r:.20}")
    return Question(**texts, endings=tuple(endings), label=int(label))


def _lines(body: bytes | bytearray, name: str) -> Iterator[tuple[int, Any]]:
    """Numbered from 1: lines that are not blank, or a parquet file's rows."""
    if not name.endswith(".parquet"):
        yield from ((number, line) for number, line in enumerate(bytes(body).splitlines(), 1) if line.strip())
        return
    try:
        rows = pq.read_table(pa.BufferReader(body)).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceInvalid(
            f"{name}: a parquet file was asked for, found {error}. Mend evaluation.hellaswag."
        ) from error
    yield from enumerate(rows, 1)
