"""The demo's corpus: English prose from the docstrings and help topics of every Python installation, as parquet files.

One installation always gives the same documents in the same order. Nothing is imported or downloaded.
"""

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from model import tokenizer
from model.config import RunConfig
from storage.digests import sha256

FILES = 4
ROW_GROUP = 100
# not part of every installation
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
COMMON_WORDS = frozenset("the a an of to and or is are be in on that this for it if not with as by from which".split())  # noqa: SIM905  # words read better than a list
LEAST_WORDS = 8  # per paragraph
LEAST_COMMON = 0.2  # share of common words in a paragraph; lower in tables and lists of options
CODE = re.compile(r"[_=<>{}\[\]\\|]")  # a paragraph with identifiers or code in it
LEAST_TOKENS = 24  # per document
CORPUS = Path(".gpt2/demo-corpus")  # the folder that the preset demo reads
MINUTES = 3  # duration of the preset demo on 2 cores
FIXED_MINUTES = 1  # the part of MINUTES that does not grow with the steps: Prefect, corpus, shards, evaluation, report
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lasting(config: RunConfig, minutes: int) -> RunConfig:
    """Scale the steps to this duration. Another duration has its own run: a run is pinned to its settings."""
    if minutes == MINUTES:
        return config
    steps = round(config.train.max_steps * (minutes - FIXED_MINUTES) / (MINUTES - FIXED_MINUTES))
    train = config.train.model_copy(update={"max_steps": steps})
    return config.model_copy(update={"name": f"{config.name}-{minutes}", "train": train})


def reads_corpus(source: str) -> bool:
    """Whether the source is the corpus in this folder, which `write_corpus` provides."""
    return Path(source).parent == CORPUS


def write_corpus(folder: Path = CORPUS) -> list[Path]:
    """Write the corpus as parquet files, unless they exist. Returns the files."""
    paths = [folder / f"python-{platform.python_version()}-prose-{index:03d}.parquet" for index in range(FILES)]
    if all(path.exists() for path in paths):
        return paths
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    # Ordering by digest mixes the modules, so that the first shard, which becomes the val split, is a random sample.
    documents = sorted(set(_documents()), key=lambda text: sha256(text.encode()))
    rows = [(text, tokens) for text in documents if (tokens := len(tokenizer.encode(text))) >= LEAST_TOKENS]
    for index, path in enumerate(paths):
        texts, token_counts = zip(*rows[index::FILES], strict=True)
        temporary = path.with_suffix(".part")
        table = pa.table({"text": texts, "token_count": token_counts})
        pq.write_table(table, temporary, row_group_size=ROW_GROUP)
        temporary.replace(path)
    return paths


def prose(text: str) -> str:
    """The paragraphs that are English sentences, each on one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    kept = "\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))
    return kept.encode(errors="replace").decode()  # some docstrings contain lone surrogates, which parquet cannot store


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < LEAST_WORDS or CODE.search(paragraph):
        return False
    return sum(word.lower() in COMMON_WORDS for word in words) >= LEAST_COMMON * len(words)


def _documents() -> Iterator[str]:
    """The prose of each module, class (with its methods), function and help topic."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if LEFT_OUT.intersection(module.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 and others ship files with deliberate syntax errors
        if module.as_posix() == "pydoc_data/topics.py":
            dictionaries = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
            yield from (prose(topic) for topics in dictionaries for topic in ast.literal_eval(topics).values())
        for node in [tree, *tree.body]:
            nodes = [node, *node.body] if isinstance(node, ast.ClassDef) else [node]
            paragraphs = [prose(ast.get_docstring(part) or "") for part in nodes if isinstance(part, Documented)]
            yield "\n".join(filter(None, paragraphs))
