"""The results of evaluations, as models of the JSON in the store: everything that a report shows. Imports no torch."""

from pydantic import BaseModel, Field

from storage.loading.mix import Share


class Measurement(BaseModel, frozen=True):
    """What one kind of evaluation measured. A field that the kind does not have is None and is left out of the JSON.

    Each metric needs a convention, and a measurement with metrics needs `tokens` or `items`: the report shows them.
    """

    metrics: dict[str, float] = {}
    conventions: dict[str, str] = {}  # by metric: how it is computed
    standard_errors: dict[str, float] | None = None
    data: str | None = None  # digest of the manifest, or of the HellaSwag file
    dataset: str | None = None
    file: str | None = None  # key of the HellaSwag file
    mix: dict[str, Share] | None = None  # the datasets of a mixed run
    tokens: int | None = None  # scored
    unused_tokens: int | None = None  # of the split, in no window
    items: int | None = None
    repeated_items: int | None = None
    drawn: str | None = None  # the sampling settings of `samples`
    samples: list[dict[str, str]] | None = None  # {prompt, text}
    answers: bytes | None = Field(None, exclude=True)  # losses and choices of every item: parquet, beside the JSON


class Evaluation(Measurement, frozen=True):
    """A measurement, the job that made it, and the machine that it ran on."""

    name: str
    step: int
    job: str
    environment: dict[str, str | int]
    precision: str
    answers_sha256: str | None = None
