"""Reads a configuration: a TOML file or a preset, then `section.field=value` overrides. Explains what is wrong."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from model.config import NAME, TEXT, TRACKER, RunConfig
from storage.stores.opening import CREDENTIALS

PRESETS = Path(__file__).parent / "presets"
EXPLANATIONS = {  # by pydantic's type of the error, or by the pattern that does not match
    "string_type": 'expected text. In TOML, put it into quotes: "…".',
    "tuple_type": 'expected a list. Write it in TOML, such as --set \'train.mix=["web:0.8", "code:0.2"]\'.',
    "model_type": "this is a section. Set its fields: [train] in a file, --set train.max_steps=….",
    NAME: "a name starts with a letter or a digit. Use only letters, digits, '.', '_' and '-'.",
    TRACKER: "write trackio, wandb, mlflow or tensorboard, or one of these with :TARGET, which has no password.",
    TEXT: "a URL must not contain a user or password. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
}


def presets() -> dict[str, str]:
    """What each preset is, by name: the first line of its file."""
    return {path.stem: path.read_text().partition("\n")[0].strip("# ") for path in sorted(PRESETS.glob("*.toml"))}


def load_config(file: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of `read_config` with `section.field=value` overrides. Raises ValueError with a remedy."""
    return config_of(read_config(file), overrides)


def read_config(file: Path | None) -> dict[str, Any]:
    """The values of a TOML file, or of the preset of that name. Raises ValueError with a remedy."""
    if file is None:
        return {}
    preset = PRESETS / f"{file}.toml"
    try:
        return tomllib.loads((preset if preset.is_file() and not file.is_file() else file).read_text())
    except OSError as error:
        remedy = f"Give a TOML file or a preset: {', '.join(presets())}."
        raise ValueError(f"--config {file}: {error.strerror}. {remedy}") from error
    except (ValueError, RecursionError) as error:  # of TOML, UTF-8, or an integer of over 4,300 digits
        raise ValueError(f"--config {file}: invalid TOML: {error}. Correct the file.") from error


def config_of(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The configuration of these values with overrides. Raises ValueError with a remedy."""
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        explained = "\n".join(_explain(details) for details in error.errors())
        raise ValueError(CREDENTIALS.sub("://…@", explained)) from None  # pydantic's error quotes the values


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: the value is missing. Write it like --set train.max_steps=200")
    try:
        [value] = tomllib.loads(f"x = {{x = {text}}}")["x"].values()  # braces refuse a comment and a second value
    except (ValueError, RecursionError):
        value = text
    setting = all_settings().get(name.strip())
    if setting is not None and setting.annotation is str:
        value = value if isinstance(value, str) else text  # TOML's strings are in quotes
    *sections, field = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} = {values!r} is set too, but is not a section. Correct it.")
    values[field] = value


def _explain(error: ErrorDetails) -> str:
    """A pydantic error as a sentence; our own messages stay unchanged."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        if isinstance(value, dict) and value:
            name = f"{name}.{next(iter(value))}"
        close = difflib.get_close_matches(name, all_settings(), n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else "model/config.py lists every setting."
        return f"unknown setting {name}. {remedy}"
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}. Give another value."
    message = EXPLANATIONS.get(error.get("ctx", {}).get("pattern", error["type"]), message)
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{name} = {shown:.200}: {message}"


def all_settings() -> dict[str, FieldInfo]:
    """Every setting as it is written after --set."""
    settings: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        settings |= {f"{name}.{inner}": setting for inner, setting in section.items()} if section else {name: field}
    return settings
