"""The demo's corpus: the documentation that every Python installation carries, as files in the FineWeb-Edu schema.

Docstrings of the standard library and the language's help topics, read from the source files (nothing is imported or
downloaded). Deterministic for one Python version: same documents, same order, same bytes.
"""

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from storage.digests import digest, sha256

FILES = 6
ROW_GROUP = 100
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
}  # not everywhere
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("text", "id", "dump", "url", "file_path", "language")),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
        ("int_score", pa.int64()),
    ]
)


def write_corpus(folder: Path | str) -> list[Path]:
    """Write the corpus as parquet files, or find it there from before. Returns the files."""
    folder = Path(folder)  # the deployment's step gives text
    version = platform.python_version()
    paths = [folder / f"python-{version}-{index:03d}.parquet" for index in range(FILES)]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    documents = {text: where for where, text in reversed(list(_documents()))}  # the first of equals stays
    ordered = sorted(documents, key=lambda text: sha256(text.encode()))  # mixes the modules, the same on every machine
    for index, path in enumerate(paths):
        rows = [_row(text, documents[text], version) for text in ordered[index::FILES]]
        temporary = path.with_suffix(".part")
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, row_group_size=ROW_GROUP)
        temporary.replace(path)
    return paths


def _row(text: str, where: str, version: str) -> dict[str, object]:
    return {
        "text": text,
        "id": f"<python:{digest([where, text])[:16]}>",
        "dump": f"python-{version}",
        "url": f"https://docs.python.org/{version.rpartition('.')[0]}/",
        "file_path": where,
        "language": "en",
        "language_score": None,
        "token_count": len(tokenizer.encode(text)),
        "score": None,
        "int_score": None,
    }


def _documents() -> Iterator[tuple[str, str]]:
    """Where a document is from, and its text: one a module, class (with its methods) or function, and one a topic."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        where = path.relative_to(library)
        if LEFT_OUT.intersection(where.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 and the like keep files that are wrong on purpose
        if where.as_posix() == "pydoc_data/topics.py":
            yield from _topics(tree)
        for node in [tree, *tree.body]:
            if text := _text(node):
                yield where.as_posix(), text


def _text(node: ast.AST) -> str:
    """A module's, class's or function's documentation; a class's holds that of its methods."""
    if not isinstance(node, ast.Module | Documented):
        return ""
    said = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        methods = [
            f"{inner.name}: {text}" for inner in node.body if isinstance(inner, Documented) and (text := _text(inner))
        ]
        said = "\n\n".join([said, *methods] if said else methods)
    return _plain(said)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            yield from ((f"pydoc_data/topics.py#{name}", _plain(text)) for name, text in sorted(topics.items()))


def _plain(text: str) -> str:
    """Two spaces for more: a tenth of all tokens was a space after a space, which a model guesses before it has learnt.

    Some docstrings show lone surrogates, which parquet cannot hold.
    """
    return re.sub(" {3,}", "  ", text.strip()).encode(errors="replace").decode()
