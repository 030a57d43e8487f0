"""House rules that import-linter cannot express. Each is also tested on a file that breaks it."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "model", "storage")
TOP = {
    "flows", "model", "storage", "tests", "deploy", "pyproject.toml", "README.md", "docker-compose.yml", "Makefile",
    "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "requirements.lock", "requirements-dev.lock", "data",
}  # fmt: skip
ENTRY_POINTS = {
    "flows/console/cli.py",
    "flows/console/options.py",
    "flows/forms.py",
    "flows/runtime/processes.py",
    "flows/platform/server.py",
    "model/__main__.py",
    "model/processes/pod.py",
    "model/processes/torchrun.py",
}
KEY_LITERAL = re.compile(r"^(datasets|runs|sources)/|^(split|latest|progress|config)\.json$|^FORMAT$")
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc", "core"}
VAGUE_IDENTIFIERS = {
    "found",
    "asked",
    "one",
    "there",
    "words",
    "wanted",
    "made",
}  # as names of modules' and classes' attributes
MOST_LINES, MOST_TEST_LINES = 350, 400
MOST_FILES = 13  # in a folder
MOST_WORDS = 30  # in a sentence of a docstring
MOST_COLUMNS = 120


def too_long(_: str, text: str) -> bool:
    return len(text.splitlines()) > MOST_LINES


def without_docstring(_: str, text: str) -> bool:
    return not ast.get_docstring(ast.parse(text))


def contains_a_key(name: str, text: str) -> bool:
    if name == "storage/keys.py":
        return False
    return any(KEY_LITERAL.search(value) for value in string_literals(ast.parse(text)))


def reads_the_environment(name: str, text: str) -> bool:
    if name in ENTRY_POINTS:
        return False
    return any(
        isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
        for node in ast.walk(ast.parse(text))
    )


def has_a_vague_name(name: str, _: str) -> bool:
    return bool(VAGUE.intersection(re.split(r"[_/.]", name)))


def does_work_in_init(name: str, text: str) -> bool:
    return name.endswith("__init__.py") and len(ast.parse(text).body) > 1


def unpickles(_: str, text: str) -> bool:
    tree = ast.parse(text)
    names = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    return bool(names & {"pickle", "cloudpickle", "dill", "shelve"}) or "torch.load(" in text


def binds_a_vague_name(_: str, text: str) -> bool:
    """Whether a module or a class binds a name that does not state what it holds."""
    tree = ast.parse(text)
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    bound = {name for scope in scopes for node in scope.body for name in names_bound_by(node)}
    return bool(bound & VAGUE_IDENTIFIERS)


def names_bound_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def has_a_long_sentence(_: str, text: str) -> bool:
    """Whether a docstring has a sentence of too many words. Indented lines are diagrams and code."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
    return any(len(sentence.split()) > MOST_WORDS for docstring in docstrings for sentence in sentences(docstring))


def sentences(prose: str) -> list[str]:
    drawn = ("    ", "|", "* ", "- ", "  - ")
    lines = ["" if line.startswith(drawn) else line for line in prose.splitlines()]
    return [part for block in "\n".join(lines).split("\n\n") for part in re.split(r"[.:;?!](?:\s|$)", block)]


def string_literals(tree: ast.Module) -> Iterator[str]:
    """The string literals and the beginnings of f-strings, without docstrings."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


Rule = Callable[[str, str], bool]
RULES: list[tuple[Rule, str, str]] = [  # the rule, and a file that must break it
    (too_long, "model/long.py", '"""Long."""\n' * (MOST_LINES + 1)),
    (binds_a_vague_name, "model/vague.py", '"""Doc."""\n\n\ndef found() -> None: ...\n'),
    (binds_a_vague_name, "model/vague.py", '"""Doc."""\n\n\nclass Thing:\n    asked: int = 0\n'),
    (has_a_long_sentence, "model/prose.py", f'"""{"word " * (MOST_WORDS + 1)}."""\n'),
    (without_docstring, "model/bare.py", "x = 1\n"),
    (contains_a_key, "model/stray.py", '"""Doc."""\nkey = f"runs/{1}/config.json"\n'),
    (contains_a_key, "flows/stray.py", '"""Doc."""\nkey = "latest.json"\n'),
    (reads_the_environment, "storage/env.py", '"""Doc."""\nimport os\nx = os.environ["HOME"]\n'),
    (reads_the_environment, "flows/env.py", '"""Doc."""\nimport os\nx = os.getenv("HOME")\n'),
    (has_a_vague_name, "storage/shard_utils.py", ""),
    (does_work_in_init, "model/__init__.py", '"""Doc."""\nimport model.config\n'),
    (unpickles, "model/old.py", '"""Doc."""\nimport torch\nx = torch.load("x.pt")\n'),
]  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    paths = modules()
    assert len(paths) > 30
    assert [str(path.relative_to(ROOT)) for path in paths if rule(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(("rule", "name", "text"), RULES, ids=lambda part: getattr(part, "__name__", None))
def test_the_rule_can_fail(rule: Rule, name: str, text: str) -> None:
    assert rule(name, text)


def test_the_root_folder_holds_only_listed_files() -> None:
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - TOP - {
        "gpt2_pipeline.egg-info"
    } == set()


def test_no_init_file_in_tests_shadows_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_test_files_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_TEST_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_holds_few_files(package: str) -> None:
    folders = [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]
    counts = {folder.name: len([path for path in folder.iterdir() if path.suffix == ".py"]) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


def test_lines_of_markdown_fit_a_screen() -> None:
    pages = [*ROOT.glob("*.md"), *(page for part in (*PACKAGES, "deploy") for page in (ROOT / part).rglob("*.md"))]
    assert len(pages) > 5
    too_wide = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS and not line.startswith("|")
    ]
    assert too_wide == []


def test_locks_contain_no_address() -> None:
    for lock in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / lock).read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
        assert "index-url" not in text


@pytest.mark.parametrize("package", PACKAGES)
def test_the_readme_of_a_package_shows_its_tree(package: str) -> None:
    """Every module is in its package's README, under its folder, and the tree names no other module."""
    folder, shown = "", set()
    for line in (ROOT / package / "README.md").read_text().splitlines():
        if match := re.match(r"(│? *)[├└]── (\w+/|\w+\.py)", line):
            indent, name = match.groups()
            if name.endswith("/"):
                folder = name
            else:
                shown.add((folder if indent else "") + name)
    modules_of = (path.relative_to(ROOT / package).as_posix() for path in modules() if ROOT / package in path.parents)
    assert shown == {name for name in modules_of if not name.endswith("__init__.py")}
