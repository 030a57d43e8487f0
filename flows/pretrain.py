"""The whole pipeline as one flow of five stages, and its parts as flows.

Each stage receives the same object that the previous stage returned: Prefect draws dependencies by identity.
"""

from prefect import flow
from prefect.utilities.engine import link_state_to_flow_run_result

from flows.download import download
from flows.evaluate import evaluate
from flows.handoffs import Reported
from flows.pages.dataset_card import write_card
from flows.platform.server import link
from flows.report import report
from flows.runtime.page import on_page, run_page
from flows.tokenise import tokenise
from flows.train import train
from model import tokenizer
from model.config import RunConfig
from model.runs.job import JobFailed, JobRefused, TrainingResult
from model.runs.run import find_mix, find_start, keep_request, pinned_run
from storage.datasets.manifest import read_manifest
from storage.datasets.sealing import check_binding
from storage.keys import DatasetKeys, RunKeys
from storage.stores.opening import open_store


@flow(name="pretrain", flow_run_name="pretrain-{config.name}")
def pretrain(config: RunConfig) -> Reported:
    """Run the whole pipeline, from source files to report. A second call resumes where the first stopped."""
    with on_page(config, "download", "tokenise", "train", "evaluate", "report"):
        store = open_store(config.store_url, create=True)
        run = pinned_run(store, config)
        if run is None:  # refuses changed settings before they are stored
            check_binding(store, config.data.spec(tokenizer.identity()))
            find_start(store, config)
            find_mix(store, config)
        downloaded = download(config)
        keep_request(store, RunKeys(config.name).request, config)  # an unreadable source must leave no request
        if run is None:
            keep_request(store, DatasetKeys(config.data.dataset).request, config)
        version = tokenise(config, downloaded)
        return _evaluate_and_report(config, train(config, version))


@flow(name="build-dataset", flow_run_name="build-{config.data.dataset}")
def build_dataset(config: RunConfig) -> str:
    """Bring a dataset up to date with its source files. Returns the manifest's digest."""
    with on_page(config, "download", "tokenise"):
        store = open_store(config.store_url, create=True)
        check_binding(store, config.data.spec(tokenizer.identity()))
        downloaded = download(config, with_items=config.resources.audit)  # only the leak report needs HellaSwag
        keep_request(store, DatasetKeys(config.data.dataset).request, config)
        manifest = read_manifest(store, config.data.dataset, tokenise(config, downloaded).manifest)
        run_page().links["Dataset card"] = link(store, write_card(store, config.data.dataset, manifest))
        return manifest.digest


@flow(name="evaluate-and-report", flow_run_name="evaluate-{config.name}")
def evaluate_and_report(config: RunConfig) -> Reported:
    """Evaluate checkpoints of a run, then write its report."""
    with on_page(config, "evaluate", "report"):
        store = open_store(config.store_url)
        if pinned_run(store, config) is not None:
            keep_request(store, RunKeys(config.name).request, config)
        return _evaluate_and_report(config, None)


def _evaluate_and_report(config: RunConfig, trained: TrainingResult | None) -> Reported:
    """Evaluate, then report. A failed evaluation fails the flow, after the report on the others is written."""
    state = evaluate(config, trained)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        run_page().fail("evaluate", result)
        if not isinstance(result, JobFailed | JobRefused):
            raise result
    evaluated = result if isinstance(result, list) else []
    link_state_to_flow_run_result(state, evaluated)  # as Prefect does for a returned value; its UI then draws the arrow
    reported = report(config, evaluated)
    store = open_store(config.store_url)
    links = run_page().links
    links["Report"] = link(store, reported.page)
    if dataset := reported.dataset:
        links["Dataset card"] = link(store, write_card(store, dataset.name, dataset.version))
    if isinstance(result, BaseException):
        raise result
    return reported
