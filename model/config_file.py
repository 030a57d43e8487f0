"""Reads a configuration: a TOML file, then `section.field=value` overrides. Explains what is wrong."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.config import RunConfig


def load_config(file: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a TOML file with `section.field=value` overrides. Raises ValueError with a remedy."""
    try:
        values = tomllib.loads(file.read_text()) if file else {}
    except OSError as error:
        raise ValueError(
            f"--config {file}: {error.strerror}. The configurations of this project are in deploy/configs/."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: invalid TOML: {error}. Correct the file.") from error
    return config_of(values, overrides)


def config_of(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The configuration of these values with overrides. Raises ValueError with a remedy."""
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(details) for details in error.errors())) from error


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: the value is missing. Write it like --set train.max_steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string: --set data.dataset=mine
    *sections, field = name.strip().split(".")
    for depth, section in enumerate(sections, 1):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(
                f"--set {override}: {section!r} is a field, not a section. Write --set {'.'.join(sections[:depth])}=…"
            )
    values[field] = value


def _explain(error: ErrorDetails) -> str:
    """A pydantic error as a sentence; our own messages stay unchanged."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        if isinstance(value, dict) and value:
            name = f"{name}.{next(iter(value))}"
        close = difflib.get_close_matches(name, _field_names(), n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else "model/config.py lists every setting."
        return f"unknown setting {name}. {remedy}"
    message = error["msg"]
    return f"{name} = {value!r}: {message[0].lower()}{message[1:]}. Give another value."


def _field_names() -> list[str]:
    """Every setting as it is written after --set."""
    names = []
    for section, value in RunConfig().model_dump().items():
        names += [f"{section}.{field}" for field in value] if isinstance(value, dict) else [section]
    return names
