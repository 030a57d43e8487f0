"""The short form that starts a run in Prefect's UI: a preset, a few fields, and `section.field=value` for the rest."""

import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from model.config import RunConfig
from model.config_file import all_settings, config_of, read_config

DEFAULT = "gpt2-124m"


def preset_values(preset: str) -> dict[str, Any]:
    """The values of a preset. Raises ValueError for an unknown name."""
    return read_config(Path(preset))


def check(form: dict[str, Any]) -> None:
    """Raise ValueError if a form cannot become a configuration."""
    values = preset_values("demo" if "minutes" in form else form.get("preset", DEFAULT))
    filled(values, **{field: form[field] for field in ("name", "source", "steps", "gpus", "settings") if field in form})


def filled(
    values: dict[str, Any], *, name: str = "", source: str = "", steps: int = 0, gpus: int = 0,
    settings: Sequence[str] = (),
) -> RunConfig:  # fmt: skip
    """The configuration of these values with the fields that are not empty, then the settings. Raises ValueError.

    Another source becomes a dataset of the run's name. Warm-up takes at most a tenth of the given steps.
    """
    fields: dict[str, object] = {"name": name} if name else {}
    config = config_of(dict(values), [])
    if source and source != config.data.source:
        fields |= {"data.source": source, "data.config": "", "data.dataset": name or config.name}
    if steps:
        fields |= {"train.max_steps": steps, "train.warmup_steps": min(config.train.warmup_steps, steps // 10)}
    if gpus:
        fields["resources.processes"] = gpus
    return config_of(values, [*(_written(setting, value) for setting, value in fields.items()), *settings])


def settings_beyond(preset: str, config: RunConfig) -> list[str]:
    """The settings, as `section.field=value`, in which the configuration differs from the preset; without the name."""
    base = config_of(preset_values(preset), [])
    getters = {setting: attrgetter(setting) for setting in all_settings() if setting != "name"}
    return [_written(setting, get(config)) for setting, get in getters.items() if get(config) != get(base)]


def _written(setting: str, value: object) -> str:
    """The setting as `section.field=value`, in JSON that is also TOML, which has no surrogates and no bare DEL."""
    return f"{setting}={json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
