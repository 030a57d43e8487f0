"""No setting holds a password, and every setting is bounded, in the schema of Prefect's form too."""

import re
import traceback
from typing import Any

import pytest

from model.config import RunConfig
from model.config_file import load_config
from storage.stores.opening import CREDENTIALS
from tests.model.test_config import fields, refused


@pytest.mark.parametrize("text", ["s3://key:sekret@bucket/x", "https://sekret@host/x", "s3://key:se/kret@bucket"])
def test_a_password_in_a_url_is_refused_and_not_echoed(text: str) -> None:
    names = [name for name, field in fields() if field.annotation is str and name != "store_url"]
    for override in [*(f"{name}={text}" for name in names), f"train.max_steps={text}", f"data.filters=['{text}']"]:
        with pytest.raises(ValueError, match=override.partition("=")[0]) as caught:
            load_config(None, [override])
        shown = "".join(traceback.format_exception(caught.value))
        assert "kret" not in shown, override


def test_every_setting_is_bounded_in_the_schema_too() -> None:
    """Prefect's form refuses by the schema. JavaScript holds integers up to 2**53 - 1 exactly."""
    bounded = []

    def check(schema: dict[str, Any], place: str) -> None:
        if schema.get("type") in ("integer", "number"):
            least = schema.get("minimum", schema.get("exclusiveMinimum"))
            most = schema.get("maximum", schema.get("exclusiveMaximum"))
            assert -(2**53) < least <= most < 2**53, place
        elif schema.get("type") == "string":
            assert schema.get("maxLength", 10**9) <= 5_000 or schema.keys() & {"enum", "pattern"}, place
            assert "enum" in schema or not re.search(schema["pattern"], "\ud800"), place
        elif schema.get("type") == "array":
            assert schema["maxItems"] <= 100, place
        else:
            return
        bounded.append(place)
        for item in [*schema.get("prefixItems", []), *([schema["items"]] if "items" in schema else [])]:
            check(item, f"{place}[]")

    schema = RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, setting in section["properties"].items():
            check(setting, f"{section['title']}.{name}")
    assert len(bounded) > 50


@pytest.mark.parametrize("name", [name for name, field in fields() if field.annotation in (int, float)])
def test_a_number_beyond_64_bits_is_refused(name: str) -> None:
    for value in (10**30, -(10**30), 2**63, "1e400", "9" * 5_000):
        refused(f"{name}={value}", facts=[name])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["://", "://a:", "://a"])
def test_the_search_for_credentials_is_linear(part: str) -> None:
    assert CREDENTIALS.search(part * 50_000) is None
    assert CREDENTIALS.sub("-", part * 1_000 + "s3://key:se/cret@bucket").endswith("-bucket")
