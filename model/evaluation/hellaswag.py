"""HellaSwag (Zellers et al., 2019): reads a file of its items and lays them out in the two common conventions.

    file ─▶ Question ─┬▶ completion style: raw text, ending tokenised separately, acc_norm by mean loss per token
                      └▶ harness style: activity and cleaned text, tokenised together, acc_norm by loss per character

nanoGPT and llm.c use the first, EleutherAI's lm-evaluation-harness (task version 1.0) the second. Their numbers differ,
so the metrics' names contain the convention. Imports no model.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from model import tokenizer
from model.evaluation.items import Item
from storage.errors import SourceInvalid
from storage.stores.store import first_problem

Text = Annotated[str, Field(min_length=1)]
DIGITS = ["0", "1", "2", "3"]  # a label is a number, or its digit as text


class Question(BaseModel, frozen=True):
    """One line of the file."""

    ctx: Text
    activity_label: Text
    ctx_a: Text
    ctx_b: str  # empty in items from WikiHow
    endings: tuple[Text, Text, Text, Text]
    label: Annotated[int, Field(strict=True, ge=0, le=3), BeforeValidator(lambda x: int(x) if x in DIGITS else x)]


def questions(body: bytes | bytearray, name: str) -> list[Question]:
    """The questions of a file: JSON lines, or parquet as on the Hub. Raises SourceInvalid, which names the line."""
    parsed = []
    for number, line in _lines(body, name):
        validate = Question.model_validate_json if isinstance(line, bytes) else Question.model_validate
        try:
            parsed.append(validate(line))
        except ValidationError as error:
            expected = f"line {number:,} should be a HellaSwag item ({', '.join(Question.model_fields)})"
            remedy = "Repair the file of evaluation.hellaswag, or leave the setting empty."
            raise SourceInvalid(f"{name}: {expected}, found {first_problem(error)}. {remedy}") from error
    if not parsed:
        raise SourceInvalid(f"{name}: the file has no HellaSwag items. Set evaluation.hellaswag to another file.")
    return parsed


def completion_style(question: Question) -> Item:
    """The raw context, and each ending tokenised separately with a space before it."""
    endings = [tokenizer.encode(f" {ending}").tolist() for ending in question.endings]
    return Item(tokenizer.encode(question.ctx).tolist(), endings, question.label, [len(ending) for ending in endings])


def harness_style(question: Question) -> Item:
    """The activity and the cleaned context. Each cleaned ending is tokenised together with them."""
    text = _cleaned(f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}")
    context = text.rstrip()  # GPT-2's tokens begin with a space, so a trailing space belongs to the endings
    spaces = text[len(context) :]
    ids, endings = tokenizer.encode(context).tolist(), [_cleaned(ending) for ending in question.endings]
    together = [tokenizer.encode(f"{context}{spaces} {ending}").tolist()[len(ids) :] for ending in endings]
    # An empty context becomes the start of a document
    return Item(ids or [tokenizer.EOT], together, question.label, [len(ending) for ending in endings])


RAW = "raw context, ending tokenised separately, acc by the sum, acc_norm by the mean per token"
CLEANED = "activity label, cleaned text, tokenised together, acc by the sum, acc_norm by the sum per character"
CONVENTIONS = {"completion": (completion_style, RAW), "harness": (harness_style, CLEANED)}


def _cleaned(text: str) -> str:
    """The text without WikiHow's marks, as the harness cleans it: double spaces become single ones, in one pass."""
    # As r"\[.*?\]", which is quadratic if "[" is never closed: such text matches too, and stays
    marked = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^]\n]*(\]?)", lambda mark: "" if mark[1] else mark[0], marked).replace("  ", " ")


def _lines(body: bytes | bytearray, name: str) -> Iterator[tuple[int, Any]]:
    """Lines that are not blank, or rows of a parquet file, each with its number from 1."""
    if not name.endswith(".parquet"):
        return ((number, line) for number, line in enumerate(bytes(body).splitlines(), 1) if line.strip())
    try:
        return enumerate(pq.read_table(pa.BufferReader(body)).to_pylist(), 1)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceInvalid(f"{name}: invalid parquet ({error}). Set evaluation.hellaswag to another file.") from error
