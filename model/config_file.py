"""Reads a configuration: a TOML file, then `section.field=value` overrides. Explains what is wrong in plain words."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from model.config import RunConfig


def load_config(file: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a TOML file with `section.field=value` overrides. Raises ValueError in words for people."""
    return config_of(_read(file), overrides)


def _read(file: Path | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except OSError as error:
            raise ValueError(f"--config {file}: {error.strerror}. The project's own are in deploy/configs/.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {file}: not TOML: {error}. Mend that line.") from error
    return values


def config_of(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The configuration of these values and overrides. Raises ValueError in words for people."""
    for override in overrides:
        _override(values, override)
    _check_names(values, RunConfig, "")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(found) for found in error.errors())) from error


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override}: a field and its value were expected. Write --set train.max_steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set data.dataset=mine
    *sections, field = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section!r} is a field, not a section. Write --set {section}=…")
    values[field] = value


def _check_names(values: dict[str, Any], section: type[BaseModel], prefix: str) -> None:
    """Raise ValueError for a name that matches no field, offering the nearest one."""
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is None:
            inner = f".{next(iter(value))}" if isinstance(value, dict) and value else ""
            asked = f"{prefix}{name}{inner}"
            near = difflib.get_close_matches(asked, _field_names(), n=1, cutoff=0.5)
            raise ValueError(
                f"there is no setting {asked}. "
                f"{f'Did you mean {near[0]}?' if near else 'gpt2 pretrain --help says where they are listed.'}"
            )
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and isinstance(value, dict):
            _check_names(value, field.annotation, f"{prefix}{name}.")


def _field_names() -> list[str]:
    """Every setting as it is written after --set."""
    names = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{name}.{inner}" for inner in field.annotation.model_fields]
        else:
            names.append(name)
    return names


def _explain(error: Any) -> str:
    """One of pydantic's errors as a sentence; our own messages are left as they are."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name = ".".join(str(part) for part in error["loc"])
    return f"{name} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}. Give another value."
