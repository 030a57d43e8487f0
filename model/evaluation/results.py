"""What an evaluation answers, as dataclasses and as JSON in the store. Imports no torch.

runs/RUN/evaluations/STEP/KIND.json    Evaluation: everything that a report shows
runs/RUN/jobs/JOB.result.json          EvaluationSummary: the job is done, and where its evaluation is
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one kind of evaluation measured. A field that the kind does not have is None and is left out of the JSON."""

    metrics: dict[str, float] = field(default_factory=dict)
    conventions: dict[str, str] = field(default_factory=dict)  # by metric: how it is computed
    standard_errors: dict[str, float] | None = None
    data: str | None = None  # digest of the manifest, or of the HellaSwag file
    dataset: str | None = None
    file: str | None = None  # key of the HellaSwag file
    tokens: int | None = None  # scored
    unused_tokens: int | None = None  # of the split, in no window
    items: int | None = None
    repeated_items: int | None = None
    drawn: str | None = None  # the sampling settings of `samples`
    samples: list[dict[str, str]] | None = None  # {prompt, text}


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measurement):
    """A measurement, the job that made it, and the machine that it ran on."""

    name: str
    step: int
    job: str
    environment: dict[str, Any]
    precision: str
    answers_sha256: str | None = None  # of the losses and choices of every item, a parquet file beside the JSON

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**{one.name: value[one.name] for one in fields(cls) if one.name in value})


@dataclass(frozen=True)
class EvaluationSummary:
    """The result of an evaluation job: its metrics, and the key of the whole evaluation."""

    name: str
    step: int
    metrics: dict[str, float]
    key: str
