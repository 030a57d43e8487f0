"""Runs every command of every README as written, in a copy of the project with small settings.

The Hub is a local stand-in, the bucket is on a real S3 server. ELSEWHERE lists what is not run.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from flows.platform import server as prefect
from tests import hub as stand_in
from tests import servers
from tests.making import document, write_parquet
from tests.ports import free_port

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "storage/README.md", "model/README.md", "flows/README.md", "deploy/README.md")
ELSEWHERE = {  # tests/rehearse_stack.py runs what needs Docker's registry or a GPU, tests/flows/platform the server
    "gpt2 serve",
    "docker compose up --wait",
    "docker compose -f docker-compose.yml -f deploy/docker-compose.gpu.yml up --wait",
}
SMALL = {
    "layers = 12": "layers = 1", "heads = 12": "heads = 2", "width = 768": "width = 16", "layers = 4": "layers = 1",
    "heads = 4": "heads = 2", "width = 64": "width = 16",
    "batch_tokens = 524_288": "batch_tokens = 1_024",
    "max_steps = 19_073": "max_steps = 4\ncheckpoint_every_steps = 2", "warmup_steps = 715": "warmup_steps = 1",
    "max_steps = 650": "max_steps = 4", "warmup_steps = 100\n": "warmup_steps = 1\n",
}  # fmt: skip


def blocks(page: str) -> list[str]:
    """The blocks of commands of a page, in their order."""
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Each command without the comment beside it."""
    lines = [line for block in blocks(page) for line in re.sub(r"\\\n *", "", block).splitlines()]
    return [re.sub(r"\s{2,}#.*$", "", line).strip() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project with small settings, texts of its user and a model."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("flows", "model", "storage", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for path in (folder / "model" / "presets").glob("*.toml"):
        path.write_text(smaller(path.read_text()))
    write_parquet(folder / "texts" / "mine.parquet", [document(number, 2_000) for number in range(40)])
    shape = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=1024)
    GPT2LMHeadModel(shape).save_pretrained(folder / "path" / "to" / "gpt2")
    (folder / "hellaswag_val.jsonl").write_text(items())
    return folder


def smaller(text: str) -> str:
    for given, small in SMALL.items():
        text = text.replace(given, small)
    return text


def items() -> str:
    """Four items in HellaSwag's layout."""
    item = {"activity_label": "Cats", "ctx_a": "The cat sat", "ctx_b": "", "ctx": "The cat sat", "label": 1}
    endings = ["on the mat.", "in a tree.", "by day.", "at sea."]
    return "".join(json.dumps(item | {"ind": number, "endings": endings}) + "\n" for number in range(4))


@pytest.fixture(scope="module")
def environment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the commands: a stand-in for the Hub with both datasets, and an S3 server with a bucket."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(prefect, "HOME", folder / ".gpt2")
    server = servers.start("seaweedfs", tmp_path_factory.mktemp("s3"))
    files = {}
    for number in range(14):
        texts = [document(number * 100 + row, 300) for row in range(12)]
        path = write_parquet(folder / "published.parquet", texts)
        files[f"sample/10BT/{number:03d}_00000.parquet"] = path.read_bytes()
    path.unlink()
    questions = pa.Table.from_pylist([json.loads(line) | {"label": "1"} for line in items().splitlines()])
    pq.write_table(questions, folder / "questions.parquet")
    try:
        with stand_in.serving() as hub:
            hub.dataset("HuggingFaceFW/fineweb-edu", files, configs={"sample-10BT": {"train": "sample/10BT/*"}})
            hub.dataset(
                "Rowan/hellaswag",
                {"data/validation.parquet": (folder / "questions.parquet").read_bytes()},
                configs={"default": {"validation": "data/validation*"}},
            )
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
            kept |= server.environment | {
                "PYTHONPATH": str(folder), "HF_ENDPOINT": stand_in.ENDPOINT, "HF_HOME": str(folder / "hf"),
                "HF_TOKEN": stand_in.TOKEN,
                "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            }  # fmt: skip
            port = free_port()
            with prefect.running_server(port):  # or each command would start one, 10 s
                yield kept | prefect.prefect_environment(port)
    finally:
        server.stop()
        monkeypatch.undo()


def test_commands_that_are_run_elsewhere_are_still_in_a_readme() -> None:
    assert {command for page in PAGES for command in commands(page)} >= ELSEWHERE


def test_every_command_works_as_written(folder: Path, environment: dict[str, str]) -> None:
    for line in (command for page in PAGES for command in commands(page)):
        if line in ELSEWHERE or not line or line.startswith("#"):
            continue
        if line.startswith("export AWS_"):  # the server's own are set, its "…" stand for secrets
            assert all(word.partition("=")[0] in environment for word in line.split()[1:])
            continue
        command = smaller(line).replace("s3://bucket/", f"s3://{servers.BUCKET}/")
        if "train-….json" in command:
            [job] = (folder / "data/runs/gpt2-124m/jobs").glob("train-????????.json")
            command = command.replace("train-….json", job.name)
        done = subprocess.run(
            ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_every_verb_and_option_in_a_readme_exists(environment: dict[str, str]) -> None:
    named: dict[str, set[str]] = {}
    for page in PAGES:
        for words in re.findall(r"`gpt2 ([a-z][^`]*)`", (ROOT / page).read_text()):
            verb = re.match(r"(dataset )?[a-z]+", words)
            assert verb is not None, words
            named.setdefault(verb[0], set()).update(re.findall(r"--[a-z-]+", words))
    assert len(named) > 15
    for verb, options in named.items():
        done = subprocess.run(
            ["gpt2", *verb.split(), "--help"], env=environment | {"COLUMNS": "200"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, verb
        assert not [option for option in options if option not in done.stdout], verb
