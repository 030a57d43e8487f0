"""The last lines of a pipeline run: what was made, how good it is, where to look next."""

from flows.handoffs import Reported


def summary_lines(reported: Reported, store_url: str) -> list[tuple[str, str]]:
    """Label and text of each line."""
    lines = []
    if dataset := reported.dataset:
        counts = f"{dataset.version.tokens:,} tokens, {len(dataset.version.shard_ids)} shards"
        lines.append(("dataset", f"{dataset.name}: {counts}, manifest {dataset.version.digest}"))
    training = reported.training
    steps = f"{training.steps:,} steps"
    if training.last_loss is not None:  # else a model that was imported, not trained here
        steps += f", loss {training.first_loss:.4f} → {training.last_loss:.4f}"
    lines.append(("training", steps))
    for result in reported.evaluations:
        if result.metrics:
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            lines.append((result.name, f"{metrics} (step {result.step:,})"))
    if reported.sample is not None:
        lines.append(("sample", " ".join(reported.sample.split())))
    lines.append(("report", f"{store_url.rstrip('/')}/{reported.page}"))
    lines.append(("UI", "gpt2 serve, then http://127.0.0.1:4200"))
    return lines
