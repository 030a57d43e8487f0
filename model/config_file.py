"""Reads a configuration: a TOML file, then `section.field=value` overrides. Explains what is wrong."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError

from model.config import RunConfig


def load_config(file: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a TOML file with `section.field=value` overrides. Raises ValueError with a remedy."""
    return config_of(_read(file) if file is not None else {}, overrides)


def config_of(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The configuration of these values with overrides. Raises ValueError with a remedy."""
    for override in overrides:
        _override(values, override)
    _check_names(values, RunConfig, "")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(details) for details in error.errors())) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ValueError(
            f"--config {file}: {error.strerror}. The configurations of this project are in deploy/configs/."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: invalid TOML: {error}. Correct that line.") from error


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: the value is missing. Write it like --set train.max_steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string: --set data.dataset=mine
    *sections, field = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section!r} is a field, not a section. Write --set {section}=…")
    values[field] = value


def _check_names(values: dict[str, Any], section: type[BaseModel], prefix: str) -> None:
    """Raise ValueError for a name that matches no field, with the closest field name."""
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is None:
            inner = f".{next(iter(value))}" if isinstance(value, dict) and value else ""
            unknown = f"{prefix}{name}{inner}"
            close = difflib.get_close_matches(unknown, _field_names(), n=1, cutoff=0.5)
            remedy = f"Did you mean {close[0]}?" if close else "gpt2 pretrain --help says where they are listed."
            raise ValueError(f"there is no setting {unknown}. {remedy}")
        if _is_section(field.annotation) and isinstance(value, dict):
            _check_names(value, field.annotation, f"{prefix}{name}.")


def _field_names() -> list[str]:
    """Every setting as it is written after --set."""
    names = []
    for name, field in RunConfig.model_fields.items():
        if _is_section(field.annotation):
            names += [f"{name}.{inner}" for inner in field.annotation.model_fields]
        else:
            names.append(name)
    return names


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _explain(error: Any) -> str:
    """One of pydantic's errors as a sentence; our own messages are left as they are."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"]
    return f"{name} = {error['input']!r}: {message[0].lower()}{message[1:]}. Give another value."
