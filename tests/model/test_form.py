"""The short form: a preset, a few fields and settings become a configuration."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.config import RunConfig
from model.config_file import config_of, load_config, presets
from model.form import DEFAULT, check, filled, preset_values, settings_beyond

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def test_empty_fields_keep_the_values_of_the_preset() -> None:
    for preset in presets():
        assert filled(preset_values(preset)) == config_of(preset_values(preset), [])


def test_each_field_is_its_setting_and_a_setting_wins() -> None:
    preset = config_of(preset_values(DEFAULT), [])
    config = filled(preset_values(DEFAULT), name="mine", steps=9_000, gpus=2, settings=["train.seed=7"])
    train = preset.train.model_copy(update={"max_steps": 9_000, "seed": 7})
    resources = preset.resources.model_copy(update={"processes": 2})
    assert config == preset.model_copy(update={"name": "mine", "train": train, "resources": resources})
    assert filled(preset_values(DEFAULT), name="mine", settings=["name=other"]).name == "other"


def test_another_source_is_a_dataset_of_the_runs_name() -> None:
    preset = config_of(preset_values(DEFAULT), [])
    for name, dataset in (("mine", "mine"), ("", preset.name)):
        data = filled(preset_values(DEFAULT), name=name, source="texts-🙂/*.md").data
        assert (data.source, data.config, data.dataset) == ("texts-🙂/*.md", "", dataset)
    assert filled(preset_values(DEFAULT), name="mine", source=preset.data.source).data == preset.data
    chosen = filled(preset_values(DEFAULT), source="texts", settings=["data.dataset=chosen"])
    assert chosen.data.dataset == "chosen"


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (100, 10), (7_150, 715), (9_000, 715)])
def test_warm_up_takes_at_most_a_tenth_of_the_steps(steps: int, warmup_steps: int) -> None:
    train = filled(preset_values(DEFAULT), steps=steps).train
    assert (train.max_steps, train.warmup_steps) == (steps, warmup_steps)


@example("demo", DEFAULT, ['\x7f\n\\"🙂'], "\x7f", 3e-5, 1, False)
@settings(max_examples=40, deadline=None)
@given(
    base=st.sampled_from(sorted(presets())),
    preset=st.sampled_from(sorted(presets())),
    prompts=st.lists(TEXTS, max_size=3),
    column=TEXTS,
    rate=st.floats(1e-9, 1e-2),
    seed=st.integers(0, 2**32 - 1),
    mirror=st.booleans(),
)
def test_the_settings_beyond_a_preset_give_the_configuration_again(
    base: str, preset: str, prompts: list[str], column: str, rate: float, seed: int, mirror: bool
) -> None:
    values = config_of(preset_values(preset), []).model_dump()
    values["evaluation"]["prompts"] = prompts
    values["data"] |= {"text_column": column or "text", "mirror": mirror}
    values["train"] |= {"learning_rate": rate, "min_learning_rate": 0.0, "seed": seed}
    try:
        config = RunConfig.model_validate(values)
    except ValueError:  # a text that looks like a URL with a password
        return
    form = settings_beyond(base, config)
    assert filled(preset_values(base), name=config.name, settings=form) == config
    assert not any(setting.startswith("name=") for setting in form)
    assert settings_beyond(preset, config_of(preset_values(preset), ["name=other"])) == []


@pytest.mark.parametrize("setting", ["train.max_step=5", "train.seed=-1", "train.max_steps", "model.heads=5", "x=1"])
def test_a_bad_setting_is_refused_with_the_message_of_the_console(setting: str) -> None:
    for preset, form in ((DEFAULT, {}), (DEFAULT, {"preset": DEFAULT}), ("demo", {"minutes": 3})):
        with pytest.raises(ValueError) as expected:
            load_config(Path(preset), [setting])
        with pytest.raises(ValueError) as refused:
            check(form | {"settings": [setting]})
        assert str(refused.value) == str(expected.value)


@pytest.mark.parametrize("form", [{"preset": "gpt3"}, {"name": "a b"}, {"gpus": 7}, {"steps": -1}])
def test_a_bad_field_is_refused(form: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        check(form)
