"""The console script `gpt2`: its verbs, its entry point, its errors. A verb's module is imported when the verb runs."""

import ast
import os
import shlex
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from model.processes.output import discard_output
from storage.errors import StorageError, printable

VERBS = {  # by group: each verb's function, MODULE:FUNCTION of this folder
    "Pipeline": {name: f"pipeline:{name}" for name in ("demo", "pretrain", "train", "evaluate", "report", "retry")}
    | {"plan": "planning:plan"},
    "Runs": {"status": "operations:status", "logs": "detached:logs", "stop": "detached:stop"},
    "Models": {"generate": "models:generate", "export": "models:export", "import": "models:import_model"},
    "Set up and clean up": {name: f"operations:{name}" for name in ("doctor", "settings", "gc", "serve", "bootstrap")},
}
DATASET_VERBS = {
    "Write": {name: f"dataset:{name}" for name in ("build", "verify", "audit", "copy", "publish", "pull")},
    "Inspect": {name: f"versions:{name}" for name in ("show", "log", "diff", "trace", "export")},
}


def _register(app: App, command: str, verbs: dict[str, dict[str, str]]) -> None:
    """Register verbs with the docstrings in their modules' source, so that --help imports none of these modules."""
    defined: dict[str, ast.FunctionDef] = {}
    for module in {function.partition(":")[0] for functions in verbs.values() for function in functions.values()}:
        tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_bytes())
        defined |= {f"{module}:{node.name}": node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for title, functions in verbs.items():
        group = Group.create_ordered(title)
        for name, function in functions.items():
            node = defined[function]
            usage = " ".join(["Usage:", command, name, "[OPTIONS]", *_arguments(node.args)])
            docstring = ast.get_docstring(node)
            app.command(f"flows.console.{function}", name=name, group=group, help=docstring, usage=usage)


def _arguments(args: ast.arguments) -> list[str]:
    """The arguments of a verb as its usage line shows them."""
    names = [argument.arg.upper() for argument in args.posonlyargs]
    required = len(names) - len(args.defaults)
    several = [f"[{args.vararg.arg.upper()}...]"] if args.vararg else []
    return [*names[:required], *(f"[{name}]" for name in names[required:]), *several]


app = App(
    "gpt2",
    help="Pretrain GPT-2 from scratch: text to token shards, training, evaluation and report as one pipeline.\n\n"
    "Start with: gpt2 demo",
    help_format="plaintext",
    version=lambda: version("gpt2-pipeline"),
    default_parameter=Parameter(negative=(), show_default=lambda value: value or None),
    exit_on_error=False,
    print_error=False,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
dataset_app = App("dataset", help="Build, inspect, copy and publish a dataset.")
_register(app, "gpt2", VERBS)
_register(dataset_app, "gpt2 dataset", DATASET_VERBS)
app.command(dataset_app)
app.register_install_completion_command()


def main(argv: list[str] | None = None) -> None:
    """Run the console. Exit code 2 with a message for what a user can fix, 1 for a failed job, 130 for Ctrl-C."""
    os.environ["PYTHONSAFEPATH"] = "1"  # for child processes: a user's model.py in this folder is not our package
    try:
        sys.exit(app(sys.argv[1:] if argv is None else argv) or 0)
    except KeyboardInterrupt:
        message, code = "stopped; run the same command again to continue", 130
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    except Exception as error:
        from storage.stores.opening import CREDENTIALS

        message, code = _explained(error)
        message = CREDENTIALS.sub("://…@", message)
    print(printable(message, lines=True), file=sys.stderr)
    sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    from model.runs.job import OUT_OF_MEMORY, JobFailed

    if isinstance(error, UnusedCliTokensError):
        return f"error: unexpected arguments: {shlex.join(error.unused_tokens or [])}. See gpt2 --help.", 2
    if isinstance(error, ValueError | StorageError | CycloptsError | JobFailed):
        return f"error: {error}", 1 if isinstance(error, JobFailed) else 2
    if isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"error: {reason}. Check free space and permissions, then run the same command again.", 1
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return f"error: {OUT_OF_MEMORY}", 1
    return traceback.format_exc(), 1


if __name__ == "__main__":
    main()
