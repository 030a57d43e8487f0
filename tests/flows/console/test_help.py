"""The help of every verb, the version, shell completion, and the page of settings."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.console import cli
from tests.flows.in_process import Gpt2

ROOT = Path(__file__).parents[3]
VERBS = [[verb] for verbs in cli.VERBS.values() for verb in verbs]
VERBS += [["dataset", verb] for verbs in cli.DATASET_VERBS.values() for verb in verbs]


def test_every_verb_has_help_with_an_example_that_its_parser_accepts(gpt2: Gpt2) -> None:
    """Its arguments are named in the usage."""
    for verb in VERBS:
        outcome = gpt2(*verb, "--help")
        command = " ".join(["gpt2", *verb])
        assert outcome.code == 0, outcome
        assert outcome.out.startswith(f"Usage: {command} [OPTIONS]")
        assert "[ARGS" not in outcome.out
        [example] = re.findall(r"Example: (gpt2 .*)", outcome.out)
        assert example.startswith(command)
        _, bound, _ = cli.app.parse_args(shlex.split(example)[1:], exit_on_error=False, print_error=False)
        assert bound is not None
        assert gpt2(*verb, "-h").out == outcome.out


def test_the_usage_marks_what_may_be_left_out(gpt2: Gpt2) -> None:
    for verb, arguments in (("import", "FOLDER NAME"), ("generate", "[NAME]"), ("report", "[NAMES...]"), ("demo", "")):
        assert gpt2(verb, "--help").out.splitlines()[0] == f"Usage: gpt2 {verb} [OPTIONS] {arguments}".rstrip()


def test_the_version_is_that_of_the_package(gpt2: Gpt2) -> None:
    assert gpt2("--version").out.strip() == version("gpt2-pipeline")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_verbs_and_their_options(shell: str) -> None:
    script = cli.app.generate_completion(shell=shell)
    for word in ("pretrain", "dataset", "--prompt", "--detach"):
        assert word in script.replace("\\", "") or word.lstrip("-") in script


def test_the_page_of_settings_is_what_the_verb_prints(gpt2: Gpt2) -> None:
    assert gpt2("settings", "--markdown").out == (ROOT / "model" / "SETTINGS.md").read_text()
    listed = gpt2("settings").out
    for text in ("train.max_steps = 19073", "demo", "gpt2-124m"):
        assert text in listed
