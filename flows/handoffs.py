"""What one stage hands to the next. Stages import these types from here, and nothing from each other."""

from dataclasses import dataclass

from flows.inspection.facts import DatasetFacts, RunFacts, TrainingFacts
from model.runs.job import EvaluationSummary
from storage.datasets.plan import FilePlan
from storage.keys import RunKeys


class Downloaded:
    """The plan of each source file, the origin of a Hub dataset, the key of the HellaSwag items, and failed files.

    Not a dataclass: Prefect would copy all plans into the flow run's parameters, which it limits to 512 KiB.
    """

    __slots__ = ("failed", "items", "origin", "plans")  # Prefect cannot copy what has no __dict__

    def __init__(self, plans: list[FilePlan], origin: dict[str, str], items: str | None, failed: list[str]) -> None:
        self.plans, self.origin, self.items, self.failed = plans, origin, items, failed


@dataclass(frozen=True)
class DatasetVersion:
    """A sealed manifest's digest, the Hub commit it was made from, and the key of the HellaSwag items."""

    manifest: str
    commit: str | None
    items: str | None


@dataclass(frozen=True)
class Reported:
    """The facts that a run's report shows, the report's key, and the evaluation results."""

    dataset: DatasetFacts | None
    training: TrainingFacts
    sample: str | None  # prompt and text
    page: str  # key of report.html
    evaluations: list[EvaluationSummary]

    @classmethod
    def of(cls, facts: RunFacts, evaluations: list[EvaluationSummary]) -> "Reported":
        samples = facts.samples[0].samples if facts.samples else None
        sample = samples[0]["prompt"] + samples[0]["text"] if samples else None
        return cls(facts.dataset, facts.training, sample, RunKeys(facts.name).report("html"), evaluations)
