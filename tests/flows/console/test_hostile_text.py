"""Control characters of documents, names and messages never reach a terminal or a log."""

import json
import logging
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.console import options
from flows.console.settings import Settings
from flows.runtime import processes, progress
from model import tokenizer
from model.evaluation import generate
from model.processes.output import fail
from model.runs.job import note_failure
from storage.errors import SourceInvalid
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from tests.flows.in_process import Gpt2
from tests.making import build_dataset, document, settings_of, tiny_config

# Sets the window's title, clears the screen, colours (C1), goes back, reverses the line, forges a line.
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\b\r\u202eabc\u2066\u2028\u200b\x85\nerror: forged"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check(text: str, *, forged: bool = False) -> None:
    """Nothing but tabs and line feeds; `forged`: the text is a document, which may have any lines."""
    assert not CONTROLS.search(text), ascii(text)
    assert forged or not re.search(r"^error: forged", text, re.MULTILINE), text


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """The settings of a dataset with hostile documents, ids, URLs and file names."""
    for number in range(2):
        columns = {name: [f"{name} {n} {HOSTILE}" for n in range(40)] for name in ("id", "url", "dump", HOSTILE)}
        columns["text"] = [document(number * 40 + n, 90) + HOSTILE for n in range(40)]
        path = tmp_path / "source" / f"{number}{HOSTILE}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "source" / "*.parquet"))
    build_dataset(config)
    store = open_store(config.store_url)
    note_failure(store, DatasetKeys("small").record("0" * 64), HOSTILE)
    sizes = ("train.sequence_tokens=32", "train.micro_batch_sequences=2", "train.batch_tokens=256")
    return [word for setting in (*settings_of(config), *sizes) for word in ("--set", setting)]


def test_no_verb_prints_a_control_character(gpt2: Gpt2, settings: list[str]) -> None:
    for verb in (["trace", "--window", "1"], ["trace", "--step", "0"], ["show"], ["log"], ["verify"]):
        shown = gpt2("dataset", *verb, *settings)
        check(shown.text, forged=verb == ["trace", "--window", "1"])
        assert "\\x1b" in shown.text or verb[0] in ("log", "verify")
        if verb[0] != "verify":
            as_json = gpt2("dataset", *verb, "--json", *settings)
            check(as_json.text)
            assert verb[0] != "trace" or HOSTILE in json.loads(as_json.out.splitlines()[0])["id"]
    status = gpt2("status", *settings)
    check(status.text, forged=True)
    assert "\\x1b]0;title" in status.text


@pytest.mark.parametrize(
    "words",
    [
        [HOSTILE], ["status", HOSTILE], ["dataset", "show", HOSTILE], ["dataset", "show", "--version", HOSTILE],
        ["dataset", "build", "--set", f"data.source={HOSTILE}"], ["dataset", "build", "--set", f"{HOSTILE}=1"],
        ["report", f"--to={HOSTILE}"], ["status", f"--config={HOSTILE}"],
    ],
)  # fmt: skip
def test_no_refusal_prints_a_control_character(gpt2: Gpt2, settings: list[str], words: list[str]) -> None:
    refused = gpt2(*words[:2], *settings, *words[2:])  # the last --set wins
    assert refused.code
    check(refused.text, forged=True)  # a user's own words


def test_a_defect_prints_no_control_character(gpt2: Gpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(Settings, "new", fail)
    failed = gpt2("status")
    assert failed.code == 1
    check(failed.text, forged=True)
    assert "RuntimeError" in failed.err


def test_no_error_of_a_build_has_a_control_character(tmp_path: Path) -> None:
    path = tmp_path / f"{HOSTILE}.parquet"
    pq.write_table(pa.table({"text": ["a", None], "id": [HOSTILE, HOSTILE], HOSTILE: [1, 2]}), path)
    for override in ("data.on_bad_document=fail", "data.text_column=other"):
        with pytest.raises(SourceInvalid) as refused:
            build_dataset(tiny_config(str(tmp_path / "store"), str(tmp_path / "*.parquet"), override))
        check(str(refused.value))
        assert "\n" not in str(refused.value)


def test_no_bar_on_a_terminal_shows_a_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    output = StringIO()
    console = options._Terminal(file=output, force_terminal=True, color_system=None, soft_wrap=True, markup=False)
    monkeypatch.setattr(options, "console", console)
    console.print(HOSTILE, style="red")
    assert not CONTROLS.search(output.getvalue())
    with progress.on_console(console):
        bars = progress._bars.get()
        assert bars is not None
        bars.console.print(HOSTILE)
    with options.progress_bar("label", 2) as advance:
        options.say("label", HOSTILE)
        advance()
    assert "\x1b[?25l" in output.getvalue()  # the bar's own controls still work
    assert "title\x07" not in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()
    assert "\x9b" not in output.getvalue()


def log_with_a_cause(_: str) -> None:
    try:
        raise OSError(HOSTILE)
    except OSError:
        logging.getLogger("prefect.task_engine").exception("Task run %r failed: %s", "name", HOSTILE)


@pytest.mark.parametrize(
    ("write", "is_text"),
    [
        (lambda text: generate._print(text, iter([tokenizer.encode(text).tolist()])), True),
        (lambda text: fail(f"error: {text}", 2), True),
        (lambda text: processes._log_output([f"{text}\n"], logging.getLogger("prefect.task_engine").warning), False),
        (log_with_a_cause, True),
    ],
    ids=["generated", "process", "output of a process", "log of Prefect"],
)
def test_no_process_or_log_writes_a_control_character(
    write: Callable[[str], object], is_text: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(HOSTILE)
    sys.stdout.flush()
    shown = "".join(capsys.readouterr()) + caplog.text
    check(shown, forged=is_text)
    assert "\\x1b" in shown


def test_no_stage_forges_a_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "get_run_logger", lambda: logging.getLogger("stage"))
    caplog.set_level(logging.INFO)
    progress.say("tokenise", HOSTILE)
    check(caplog.text)
    assert "\\x1b" in caplog.text
