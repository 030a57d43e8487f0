"""A HellaSwag file is read, or its bad line is named; each convention lays out its items as published."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import tokenizer
from model.evaluation.hellaswag import Question, _cleaned, completion_style, harness_style, questions
from storage.errors import SourceInvalid

GOOD: dict[str, Any] = {
    "ctx": "A man sits on a roof. He",
    "activity_label": "Roof work",
    "ctx_a": "A man sits on a roof.",
    "ctx_b": "he",
    "endings": ["is", "starts pulling up roofing", "rips", "is holding"],
    "label": 3,
}
GOOD_TOO: dict[str, Any] = GOOD | {"ind": 4, "ctx": "Café", "ctx_b": "", "label": "0", "split": "val"}


def lines(*values: Any) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def question(**changed: Any) -> Question:
    [parsed] = questions(lines(GOOD | changed), "val.jsonl")
    return parsed


# The file


def test_a_line_is_read_unchanged() -> None:
    texts = {name: GOOD[name] for name in ("ctx", "activity_label", "ctx_a", "ctx_b")}
    expected = Question(**texts, endings=tuple(GOOD["endings"]), label=3)
    assert questions(lines(GOOD), "val.jsonl") == [expected]
    assert [parsed.label for parsed in questions(lines(GOOD, GOOD_TOO), "val.jsonl")] == [3, 0]


def test_a_parquet_file_of_the_hub_gives_the_same_questions() -> None:
    body = io.BytesIO()
    rows = [line | {"label": str(line["label"]), "split": "val", "ind": 1} for line in (GOOD, GOOD_TOO)]
    pq.write_table(pa.Table.from_pylist(rows), body)
    assert questions(body.getvalue(), "x.parquet") == questions(lines(GOOD, GOOD_TOO), "x.jsonl")
    with pytest.raises(SourceInvalid, match=r"x\.parquet"):
        questions(body.getvalue()[:-9], "x.parquet")


def test_empty_lines_are_skipped_and_still_counted() -> None:
    assert len(questions(b"\n" + lines(GOOD) + b"\n \n" + lines(GOOD_TOO) + b"\r\n\n", "val.jsonl")) == 2
    with pytest.raises(SourceInvalid, match=r"line 4\b"):
        questions(b"\n" + lines(GOOD) + b"\n \n{}\n", "val.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"no json", id="no JSON"),
        pytest.param(b"\xff\xfe{}", id="no UTF-8"),
        pytest.param(lines(GOOD)[:-5], id="cut in half"),
        pytest.param(lines([1, 2]), id="a list"),
        pytest.param(lines("text"), id="a string"),
        *(pytest.param(lines(without(name)), id=f"no {name}") for name in GOOD),
        pytest.param(lines(GOOD | {"activity_label": ""}), id="an empty activity"),
        pytest.param(lines(GOOD | {"ctx_a": ""}), id="an empty first half"),
        pytest.param(lines(GOOD | {"ctx_b": None}), id="null for the second half"),
        pytest.param(lines(GOOD | {"endings": list("abc")}), id="three endings"),
        pytest.param(lines(GOOD | {"endings": list("abcde")}), id="five endings"),
        pytest.param(lines(GOOD | {"endings": None}), id="null for endings"),
        pytest.param(lines(GOOD | {"endings": "abcd"}), id="a string for endings"),
        pytest.param(lines(GOOD | {"endings": ["a", "b", "", "d"]}), id="an empty ending"),
        pytest.param(lines(GOOD | {"endings": ["a", "b", 3, "d"]}), id="a number for an ending"),
        pytest.param(lines(GOOD | {"ctx": ""}), id="an empty context"),
        pytest.param(lines(GOOD | {"ctx": 5}), id="a number for a context"),
        pytest.param(lines(GOOD | {"ctx": ["a"]}), id="a list for a context"),
        pytest.param(lines(GOOD | {"label": 4}), id="label 4"),
        pytest.param(lines(GOOD | {"label": -1}), id="label -1"),
        pytest.param(lines(GOOD | {"label": 1.5}), id="label 1.5"),
        pytest.param(lines(GOOD | {"label": 1.0}), id="label 1.0"),
        pytest.param(lines(GOOD | {"label": True}), id="label true"),
        pytest.param(lines(GOOD | {"label": "x"}), id="label x"),
        pytest.param(lines(GOOD | {"label": ""}), id="the empty label of the test split"),
        pytest.param(lines(GOOD | {"label": None}), id="null for a label"),
    ],
)
def test_a_malformed_line_is_named(line: bytes) -> None:
    with pytest.raises(SourceInvalid, match=r"val\.jsonl.*line 2\b"):
        questions(lines(GOOD) + b"\n" + line + b"\n" + lines(GOOD), "val.jsonl")


@pytest.mark.parametrize("body", [b"", b"\n\n"])
def test_a_file_without_items_is_refused(body: bytes) -> None:
    with pytest.raises(SourceInvalid, match=r"val\.jsonl"):
        questions(body, "val.jsonl")


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(SourceInvalid, match=f"found {name}: .*evaluation.hellaswag"):
        questions(lines(without(name)), "val.jsonl")


# Completion style


def test_completion_style_keeps_the_text_and_tokenises_each_ending_separately() -> None:
    item = completion_style(question(ctx="Café [header] x ", endings=["un", "deux mots", "[title] x", "🙂"]))
    assert tokenizer.decode(item.context) == "Café [header] x "
    assert [tokenizer.decode(ending) for ending in item.endings] == [" un", " deux mots", " [title] x", " 🙂"]
    assert item.endings == [tokenizer.encode(f" {text}").tolist() for text in ("un", "deux mots", "[title] x", "🙂")]
    assert item.lengths == [len(ending) for ending in item.endings]
    assert item.label == 3


# Harness style


@pytest.mark.parametrize(
    ("changed", "context"),
    [
        ({}, "Roof work: A man sits on a roof. He"),
        ({"ctx_b": ""}, "Roof work: A man sits on a roof."),
        ({"ctx_b": "THE MAN Then"}, "Roof work: A man sits on a roof. The man then"),
        ({"ctx_a": "[header] How to. [title] Buy [step] one.", "ctx_b": ""}, "Roof work: How to.. Buy one."),
        ({"ctx_a": "Go  on. [substeps] Two", "ctx_b": ""}, "Roof work: Go on. Two"),
        ({"ctx_a": "[a]  [b] x", "ctx_b": ""}, "Roof work:  x"),  # one pass: four spaces become two
        ({"activity_label": " Personal Care", "ctx_b": ""}, "Personal Care: A man sits on a roof."),
        ({"ctx_b": "[ unclosed"}, "Roof work: A man sits on a roof. [ unclosed"),
    ],
)
def test_harness_style_prepends_the_activity_and_removes_markup(changed: dict[str, str], context: str) -> None:
    item = harness_style(question(**changed))
    assert tokenizer.decode(item.context) == context
    assert [tokenizer.decode(ending) for ending in item.endings] == [f" {ending}" for ending in GOOD["endings"]]


@pytest.mark.parametrize(
    ("mark", "kept"), [("[", "["), ("[a", "[a"), ("[\n", "[\n"), ("]", "]"), ("[a\n]", "[a\n]"), ("[a[b]", "")]
)
def test_marks_are_removed_in_linear_time(mark: str, kept: str) -> None:
    """40,000 `[` without a `]` took a minute. A mark does not reach over the end of a line."""
    assert _cleaned(f"x{mark * 300_000}x") == f"x{kept * 300_000}x"


def test_harness_style_tokenises_context_and_ending_together_and_moves_a_trailing_space_to_the_ending() -> None:
    item = harness_style(question(ctx_a="Press the", ctx_b="[x]", endings=["a", "[step] b", " c [title] d", "é[x]"]))
    assert tokenizer.decode(item.context) == "Roof work: Press the"
    texts = ["  a", "   b", "  c. d", "  é"]
    together = [tokenizer.encode(f"Roof work: Press the{text}").tolist() for text in texts]
    assert [item.context + ending for ending in item.endings] == together
    assert item.lengths == [1, 2, 4, 1]  # characters of the cleaned ending, not its bytes and not its tokens
