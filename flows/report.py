"""The last stage: writes the report of a run into the store, and shows it in Prefect's UI."""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.handoffs import Reported
from flows.pages import run_report
from flows.runtime.page import run_page
from flows.runtime.progress import say, show
from model.config import RunConfig
from model.runs.job import EvaluationSummary
from storage.stores.opening import open_store


@task(task_run_name="report-{run_name}", cache_policy=NO_CACHE)
def write_report(run_name: str, store_url: str, evaluations: list[EvaluationSummary]) -> Reported:
    """Write report.html and report.md of a run, and show their content in Prefect's UI."""
    facts = run_report.write_report(open_store(store_url), run_name)
    rows = ((row.metric, row.values[0], row.published, row.chance) for row in run_report.metric_rows([facts]))
    columns = ("metric", "value", "published", "chance")
    run_page().show("Evaluations", [dict(zip(columns, row, strict=True)) for row in rows])
    text = run_report.markdown([facts])
    show(create_markdown_artifact, markdown=text, key="report", description=f"Report of {run_name}")
    return Reported.of(facts, evaluations)


@flow(name="report", flow_run_name="report-{config.name}", validate_parameters=False)
def report(config: RunConfig, evaluated: list[EvaluationSummary]) -> Reported:
    """Write the run's report from whatever the store has."""
    reported = write_report(config.name, config.store_url, evaluated)
    say("report", f"written to {config.store_url.rstrip('/')}/{reported.page}")
    return reported
