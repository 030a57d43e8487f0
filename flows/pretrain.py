"""The whole pipeline as one flow of five stages, and its halves. Does nothing itself: each stage asks the store."""

from typing import Any

from prefect import allow_failure, flow

from flows.download import Downloaded, download
from flows.evaluate import evaluate
from flows.report import report
from flows.tokenise import tokenise
from flows.train import train
from model.config import RunConfig


@flow(name="pretrain", flow_run_name="pretrain-{config.name}")
def pretrain(config: RunConfig) -> dict[str, Any]:
    """Bring a run from source files to a report. Run again, it goes on where it stood."""
    downloaded = download(config, return_state=True)
    sources: Downloaded = downloaded.result()
    tokenised = tokenise(config, sources, return_state=True, wait_for=[downloaded])
    trained = train(config, tokenised.result(), sources.items, return_state=True, wait_for=[tokenised])
    trained.result()
    evaluated = evaluate(config, return_state=True, wait_for=[trained])
    reported = report(config, return_state=True, wait_for=[allow_failure(evaluated)])
    evaluated.result()  # raises what failed, after the report was written with what succeeded
    summary: dict[str, Any] = reported.result()
    return summary


@flow(name="build-dataset", flow_run_name="build-{config.data.dataset}")
def build_dataset(config: RunConfig) -> str:
    """Bring a dataset up to date with its source files. Returns the manifest's digest."""
    downloaded = download(config, return_state=True)
    tokenised = tokenise(config, downloaded.result(), return_state=True, wait_for=[downloaded])
    digest: str = tokenised.result()
    return digest


@flow(name="evaluate-and-report", flow_run_name="evaluate-{config.name}")
def evaluate_and_report(config: RunConfig) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint and write its report."""
    evaluated = evaluate(config, return_state=True)
    reported = report(config, return_state=True, wait_for=[allow_failure(evaluated)])
    evaluated.result()
    summary: dict[str, Any] = reported.result()
    return summary
