"""The configuration: every field is described, overrides are typed, and impossible combinations are refused."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from model.config import RunConfig, differences
from model.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "model" / "presets"


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field by its name in --set."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def value_of(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def refused(*overrides: str, facts: list[str]) -> str:
    """Assert that the settings are refused with all these facts. Returns the message."""
    with pytest.raises(ValueError) as caught:
        load_config(None, list(overrides))
    assert not isinstance(caught.value, ValidationError), "pydantic's own message"
    for fact in facts:
        assert fact in str(caught.value), fact
    return str(caught.value)


# Fields


@pytest.mark.parametrize(("name", "field"), list(fields()), ids=[name for name, _ in fields()])
def test_every_field_has_a_description(name: str, field: FieldInfo) -> None:
    assert field.description and field.description.endswith("."), name


def test_the_default_run_is_the_124m_one() -> None:
    config = load_config(None, [])
    assert config == RunConfig()
    assert (config.model.layers, config.model.heads, config.model.width, config.model.context_tokens) == (
        12,
        12,
        768,
        1024,
    )
    train = config.train
    assert (train.sequence_tokens, train.micro_batch_sequences, train.batch_tokens) == (512, 0, 524_288)
    assert (train.max_steps, train.warmup_steps) == (19_073, 715)
    assert (train.learning_rate, train.min_learning_rate) == (6e-4, 6e-5)
    assert (train.micro_batches(1), train.micro_batches(2), train.batch_windows) == (1_024, 512, 1_024)
    assert (config.data.shard_tokens, config.data.val_shards) == (10_000_000, 10)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        RunConfig().train.max_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(file: Path) -> None:
    config = load_config(file, [])
    for section, values in tomllib.loads(file.read_text()).items():
        for name, value in values.items() if isinstance(values, dict) else [(None, values)]:
            loaded = value_of(config, f"{section}.{name}" if name else section)
            assert (list(loaded) if isinstance(loaded, tuple) else loaded) == value


def test_configs_are_shipped() -> None:
    corpora = {"gpt2-124m", "fineweb-edu-newest", "fineweb", "climbmix", "dclm", "c4"}
    assert {"demo", "gpt2-medium", "gpt2-large", "gpt2-xl"} | corpora <= {path.stem for path in CONFIGS.glob("*.toml")}


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width"),
    [
        ("gpt2-124m", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    ],
)
def test_the_models_have_gpt2s_shapes(name: str, layers: int, heads: int, width: int) -> None:
    model = load_config(CONFIGS / f"{name}.toml", []).model
    assert (model.layers, model.heads, model.width, model.context_tokens) == (layers, heads, width, 1024)


def test_computed_settings_exclude_resources_store_and_name() -> None:
    plain, other = load_config(None, []), load_config(None, ["resources.workers=7", "store_url=/x", "name=other"])
    assert plain.computed() == other.computed()
    assert set(plain.computed()) == {"data", "model", "train", "evaluation"}


# --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_steps=2_000", 2_000),
        ("train.max_steps = 2000", 2_000),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("train.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("train.precision=fp32", "fp32"),
        ('train.precision="fp32"', "fp32"),
        ("train.compile=off", "off"),
        ("name=my-run", "my-run"),
        ("store_url=./else where", "./else where"),
        ("store_url=s3://bucket/prefix", "s3://bucket/prefix"),
        ("data.source=/data/*.parquet", "/data/*.parquet"),
        ("data.source=a=b", "a=b"),
        ("evaluation.hellaswag=", ""),
        ('evaluation.hellaswag=""', ""),
        ('evaluation.prompts=["a", "b = c"]', ("a", "b = c")),
        ("evaluation.prompts=[]", ()),
        ("evaluation.top_k=0", 0),
        ("resources.processes=2", 2),
        ("data.mirror=off", False),
        ("data.text_column= a b ", " a b "),
        ("data.text_column=it's", "it's"),
        ("data.text_column='it is'", "it is"),
        ('data.text_column="a" # b', '"a" # b'),
        ('data.text_column="a", "b"', '"a", "b"'),
    ],
)
def test_an_override_sets_its_field(override: str, value: object) -> None:
    loaded = value_of(load_config(None, [override]), override.partition("=")[0].strip())
    assert loaded == value
    assert type(loaded) is type(value)


LIKE_TOML = ["12e4567", "1.10", "2024-06-01", "true", "0x10", "1_000", "nan", "007"]


@pytest.mark.parametrize("name", [name for name, field in fields() if field.annotation is str])
def test_text_is_never_read_as_a_number_or_a_date(tmp_path: Path, name: str) -> None:
    """An override has it as typed; without quotes in a file it is an error that names the setting and the quotes."""
    section, _, field = name.rpartition(".")
    for text in LIKE_TOML:
        if name not in ("evaluation.checkpoint", "resources.rendezvous", "resources.tracker"):
            assert value_of(load_config(None, [f"{name}={text}"]), name) == text
        (tmp_path / "a.toml").write_text(f"[{section}]\n{field} = {text}\n" if section else f"{field} = {text}\n")
        with pytest.raises(ValueError, match=r"invalid TOML" if text == "007" else rf"{name} = .*quotes"):
            load_config(tmp_path / "a.toml", [])


def test_an_override_wins_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('name = "of-file"\n[train]\nseed = 1\nmax_steps = 900\n')
    config = load_config(file, ["train.seed=2", "train.seed=3"])
    assert (config.name, config.train.seed, config.train.max_steps) == ("of-file", 3, 900)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.max_step=1", "train.max_steps"),
        ("train.lerning_rate=1", "train.learning_rate"),
        ("max_steps=1", "train.max_steps"),
        ("trian.max_steps=1", "train.max_steps"),
        ("model.n_layers=1", "model.layers"),
        ("data.shard_token=1", "data.shard_tokens"),
        ("storeurl=x", "store_url"),
        ("resource.workers=1", "resources.workers"),
        ("store-url=x", "store_url"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(override: str, nearest: str) -> None:
    refused(override, facts=[override.partition("=")[0], nearest])


def test_an_unknown_name_in_a_file_suggests_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[train]\nmax_stepz = 3\n")
    with pytest.raises(ValueError, match=r"train\.max_stepz.*train\.max_steps"):
        load_config(file, [])


def test_an_unknown_name_without_a_near_match_is_refused() -> None:
    refused("qqqq=1", facts=["qqqq"])
    refused("zz.qqqq.xx=1", facts=["zz"])


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("train.max_steps", ["train.max_steps"]),
        ("", []),
        ("=", []),
        ("train=5", ["train", "5"]),
        ("train.seed.x=1", ["train.seed"]),
        ("train.max_steps=true", ["train.max_steps", "integer"]),
        ("train.max_steps=1e3", ["train.max_steps", "integer"]),
        ("train.learning_rate=true", ["train.learning_rate", "number"]),
        ("train.max_steps=5 # five", ["train.max_steps", "5 # five"]),
        ("evaluation.prompts=Hello", ["evaluation.prompts", "Hello", "list"]),
        ('evaluation.prompts=["a", 1.10]', ["evaluation.prompts.1", "1.1", "quotes"]),
        ("data.dataset=con fig", ["data.dataset", "con fig", "letters"]),
        ("name=a\n", ["name", "letters"]),
        ("data.source=s3://key:se/kret@bucket/x", ["data.source", "password", "AWS_SECRET_ACCESS_KEY"]),
        ("evaluation.checkpoint=" + "9" * 99, ["evaluation.checkpoint"]),
        ("train.seed=4294967296", ["train.seed", "4294967295"]),
        ("train.max_steps=" + "9" * 5000, ["train.max_steps"]),
        ("data.filters=" + "[" * 5000, ["data.filters", "list"]),
        ("data.source=", ["data.source"]),
        ("store_url=", ["store_url"]),
        ("train.max_steps=many", ["train.max_steps", "many"]),
        ("train.max_steps=1.5", ["train.max_steps", "1.5"]),
        ("train.max_steps=0", ["train.max_steps", "0", "1"]),
        ("train.max_steps=-1", ["train.max_steps", "-1"]),
        ("train.learning_rate=fast", ["train.learning_rate", "fast"]),
        ("train.learning_rate=0", ["train.learning_rate", "0"]),
        ("train.precision=fp8", ["train.precision", "fp8", "bf16"]),
        ("train.dropout=1", ["train.dropout", "1"]),
        ("train.betas=[0.9]", ["train.betas"]),
        ("train.seed=-1", ["train.seed", "-1"]),
        ("evaluation.top_p=1.5", ["evaluation.top_p", "1.5"]),
        ("evaluation.prompts=7", ["evaluation.prompts", "7"]),
        ("resources.runner=slurm", ["resources.runner", "slurm", "threads", "processes"]),
        ("resources.workers=-2", ["resources.workers", "-2"]),
        ("data.shard_tokens=0", ["data.shard_tokens", "0"]),
        ("name=a/b", ["name", "a/b"]),
        ("name=../up", ["name", "../up"]),
        ("name=", ["name"]),
        ("data.dataset=.hidden", ["data.dataset", ".hidden"]),
    ],
)
def test_an_invalid_value_is_refused_by_name(override: str, facts: list[str]) -> None:
    refused(override, facts=facts)


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=inf", "train.learning_rate=nan", "train.weight_decay=inf", "train.min_learning_rate=nan",
        "evaluation.temperature=inf", "train.betas=[0.9, nan]", "train.betas=[0.9, 1.0]", "train.betas=[-0.1, 0.9]",
        "train.betas=[2, 3]",
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(override: str) -> None:
    refused(override, facts=[override.partition("=")[0]])


# Impossible combinations


def follow(message: str, *overrides: str) -> RunConfig:
    """The configuration after the last advice (`field = value`) of the message."""
    parts = message.replace(",", "").rstrip(".").split()
    place = len(parts) - 1 - parts[::-1].index("=")
    return load_config(None, [*overrides, f"{parts[place - 1]}={parts[place + 1]}"])


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["train.micro_batch_sequences=12"], ["524,288", "6,144", "12", "512", "522240"]),
        (["train.batch_tokens=1000"], ["1,000", "512", "at least 1", "1024"]),
        (["train.batch_tokens=6144", "train.micro_batch_sequences=8"], ["6,144", "4,096", "8", "512"]),
        (["train.sequence_tokens=1000"], ["524,288", "1,000", "524000"]),
    ],
)
def test_an_indivisible_batch_is_refused_with_a_divisible_one(overrides: list[str], facts: list[str]) -> None:
    message = refused(
        *overrides, facts=["train.batch_tokens", "train.micro_batch_sequences", "train.sequence_tokens", *facts]
    )
    assert follow(message, *overrides).train.micro_batches(1) >= 1


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["train.warmup_steps=20000"], ["train.warmup_steps", "20,000", "train.max_steps", "19,073"]),
        (["train.max_steps=100"], ["train.warmup_steps", "715", "train.max_steps", "100"]),
        (["train.max_steps=3"], ["train.warmup_steps", "715", "train.max_steps", "3"]),
        (["train.sequence_tokens=2048"], ["train.sequence_tokens", "2,048", "model.context_tokens", "1,024"]),
        (["model.context_tokens=256"], ["train.sequence_tokens", "512", "model.context_tokens", "256"]),
        (["train.min_learning_rate=1e-3"], ["train.min_learning_rate", "0.001", "train.learning_rate", "0.0006"]),
    ],
)
def test_an_impossible_combination_names_both_fields_and_its_advice_works(
    overrides: list[str], facts: list[str]
) -> None:
    follow(refused(*overrides, facts=facts), *overrides)


@pytest.mark.parametrize(("width", "heads", "possible"), [(770, 12, "768"), (100, 7, "98"), (8, 12, "12")])
def test_a_width_that_the_heads_do_not_divide_is_refused(width: int, heads: int, possible: str) -> None:
    settings = [f"model.width={width}", f"model.heads={heads}"]
    refused(*settings, facts=["model.width", str(width), "model.heads", str(heads), possible])
    load_config(None, [settings[1], f"model.width={possible}"])


@pytest.mark.parametrize("ranks", [3, 7, 2_048])
def test_a_batch_that_the_ranks_do_not_divide_is_refused(ranks: int) -> None:
    facts = ["train.batch_tokens", "524,288", str(ranks), "512", "resources.processes"]
    refused(f"resources.processes={ranks}", facts=facts)
    with pytest.raises(ValueError, match=rf"524,288.*{ranks}"):
        RunConfig().train.micro_batches(ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 128])
@pytest.mark.parametrize("sequences", [0, 1, 8])
def test_ranks_share_a_batch_in_whole_micro_batches(ranks: int, sequences: int) -> None:
    train = load_config(None, [f"resources.processes={ranks}", f"train.micro_batch_sequences={sequences}"]).train
    assert train.micro_batches(ranks) * ranks * (sequences or 1) * train.sequence_tokens == train.batch_tokens


def test_all_invalid_values_are_reported_at_once() -> None:
    refused("train.max_steps=0", "model.layers=x", facts=["train.max_steps", "model.layers"])


# Files


def test_a_section_that_the_file_sets_to_a_value_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("train = 5\n")
    for overrides in ([], ["train.max_steps=2"]):
        with pytest.raises(ValueError, match=r"train = 5.*section") as caught:
            load_config(tmp_path / "a.toml", overrides)
        assert "--set train=" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ValueError, match=str(place)):
            load_config(place, [])


@pytest.mark.parametrize(
    "body",
    [
        b"[train\nx",
        b"name = ",
        b"\xff\xfe",
        b"[train]\nseed = 1\nseed = 2\n",
        b"a=" + b"[" * 5000,
        b"x = " + b"1" * 5000,
    ],
    ids=range(6),
)
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(body)
    with pytest.raises(ValueError, match=r"a\.toml"):
        load_config(tmp_path / "a.toml", [])


# Differences


def test_differences_name_the_fields_and_both_values() -> None:
    ours, theirs = RunConfig(), load_config(None, ["train.seed=9", "model.layers=3", "evaluation.prompts=[]"])
    lines = differences(ours.computed(), theirs.computed())
    assert len(lines) == 3
    for line, facts in zip(
        lines, [("evaluation.prompts",), ("model.layers", "12", "3"), ("train.seed", "1337", "9")], strict=True
    ):
        assert all(fact in line for fact in facts)
    assert differences(ours.computed(), RunConfig().computed()) == []
