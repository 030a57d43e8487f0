"""Recipes: what decides the bytes of a shard or a dataset, never paths, hosts or workers. Defaults are left out."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic needs this TypedDict before Python 3.12

FORMAT = 1  # raise it when the same recipe would produce other bytes
FIXED = {"format": FORMAT, "eot": "before", "dtype": "<u2"}  # the same in every shard recipe of this format


class TokenizerIdentity(TypedDict):
    """A tokenizer as manifests name it. `sha256` covers merges, vocabulary, pattern and special tokens."""

    name: str
    vocabulary: int
    eot: int
    sha256: str


@dataclass(frozen=True)
class DatasetSettings:
    """The settings that, with the content of the source files, decide every byte of a dataset."""

    shard_tokens: int
    tokenizer: str
    text_column: str = "text"
    filters: tuple[str, ...] = ()
    on_bad_document: str = "fail"
    max_tokens: int = 0
    keep_val_duplicates: bool = False
    val_choice: str = "first"

    def to_json(self) -> dict[str, object]:
        return _without_defaults(self)


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset as configured: its name, the settings that decide its bytes, and where its text comes from."""

    name: str
    settings: DatasetSettings
    source: str
    config: str
    val_shards: int
    tokenizer: TokenizerIdentity

    def val_shards_of(self, planned: list[str]) -> list[str]:
        """The val shards of a first version: the first of the planned shards, or every k-th of them."""
        every = max(len(planned) // self.val_shards, 1) if self.settings.val_choice == "spread" else 1
        return planned[::every][: self.val_shards]

    @property
    def binding(self) -> dict[str, object]:
        """What the name is bound to at the first seal; a later build with other values is refused."""
        return self.settings.to_json() | {"source": self.source, "config": self.config}


@dataclass(frozen=True)
class ShardRecipe:
    """What decides a shard's bytes: rows of the file with digest `source`, without the val documents of `leave_out`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a newer version may have other settings

    source: str
    row_from: Annotated[int, Field(ge=0)]
    row_to: Annotated[int, Field(ge=0, le=1 << 48)]  # exclusive
    tokenizer: str
    text_column: str = "text"
    filters: tuple[str, ...] = ()
    on_bad_document: str = "fail"
    leave_out: str = ""
    read_as: str = ""

    def to_json(self) -> dict[str, object]:
        return FIXED | _without_defaults(self)


def without_fixed(recipe: Any) -> Any:
    """The JSON of a shard recipe without what is the same in every recipe."""
    return {name: value for name, value in recipe.items() if name not in FIXED} if isinstance(recipe, dict) else recipe


def _without_defaults(settings: DatasetSettings | ShardRecipe) -> dict[str, object]:
    defaults = {field.name: field.default for field in fields(settings)}  # omitted: a new setting renames no output
    changed = {name: value for name, value in vars(settings).items() if value != defaults[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
