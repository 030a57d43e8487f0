"""The metrics of a run as the store holds them: lines of segments, and the live progress. Imports no torch."""

from operator import not_

from pydantic import BaseModel, Field


class StepMetrics(BaseModel):
    """The numbers of one step. Its JSON has `skipped` only if true, other optional fields only if known."""

    step: int
    loss: float | None  # None: NaN or infinite
    learning_rate: float
    gradient_norm: float | None  # None: NaN or infinite
    skipped: bool = Field(default=False, exclude_if=not_)
    val_loss: float | None = Field(default=None, exclude_if=lambda value: value is None)
    val_losses: dict[str, float] = Field(default={}, exclude_if=not_)  # of a mix, by dataset
    epochs: dict[str, float] = Field(default={}, exclude_if=not_)  # of a mix: passes through each dataset so far
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float | None = Field(default=None, exclude_if=lambda value: value is None)
    data_seconds: float = 0.0  # waiting for batches
    metrics_seconds: float = 0.0  # spent after the previous step, like checkpoint_seconds
    checkpoint_seconds: float = 0.0
    memory_bytes: int = 0


class Progress(BaseModel):
    """The run's live progress: steps done, total steps, and the metrics since the last checkpoint."""

    step: int
    max_steps: int
    since_checkpoint: list[StepMetrics]
