"""Prepares a Prefect server: work pools, deployments, automations. Idempotent; manual pauses and limits stay."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.platform import automations
from model.config import DataConfig, RunConfig
from model.form import preset_values, settings_beyond

DEPLOYMENTS = Path(__file__).with_name("prefect.yaml")
POOLS = {"data": None, "train": 1}  # concurrent runs: one training run uses all GPUs and cores of its host


def bootstrap(preset: str, config: RunConfig, *, block: str = "", scheduled: bool = True) -> Iterator[str]:
    """Register everything on the server at PREFECT_API_URL. Yields one line per object.

    `config` fills the deployments' forms: the preset, and the settings beyond it. If its `data` is the default, the
    refresh follows the newest crawls of FineWeb-Edu. `block`, such as "slack-webhook/team", reports what fails.
    Unless `scheduled`, new schedules start paused. Raises ValueError for an unknown block or if `prefect deploy` fails.
    """
    with get_client(sync_client=True) as client:
        block_id = _block_id(client, block) if block else None
        for name, limit in POOLS.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
                yield f"pool {name}: created"
            except ObjectAlreadyExists:
                yield f"pool {name}: unchanged"
        yield from _deployments(client, preset, config, scheduled=scheduled)
        for automation in (automations.mark_crashed(), automations.mark_orphaned(), automations.restart()):
            yield _automation(client, automation)
        [restart] = client.read_automations_by_name(automations.RESTART)
        yield _automation(client, automations.pause_restarts(restart.id))
        if block_id is not None:
            yield _automation(client, automations.notify(block_id))
            yield _automation(client, automations.notify_alerts(block_id))


def _deployments(client: SyncPrefectClient, preset: str, config: RunConfig, *, scheduled: bool) -> Iterator[str]:
    """Register prefect.yaml with `prefect deploy`, for the current folder and with the forms filled."""
    ours = DeploymentFilter(tags={"all_": [automations.TAG]})
    registered = client.read_deployments(deployment_filter=ours)
    packages, project = DEPLOYMENTS.parents[2], yaml.safe_load(DEPLOYMENTS.read_text())
    entrypoints = {deployment["entrypoint"] for deployment in project["deployments"]}
    paused = {deployment.name: deployment.paused for deployment in registered if deployment.entrypoint in entrypoints}
    settings, store = settings_beyond(preset, config), f"store_url={json.dumps(config.store_url)}"
    name = config.name if config.name != preset_values(preset)["name"] else ""
    of_every_run = [setting for setting in settings if setting.startswith(("evaluation.", "resources."))]
    of_dataset = {"preset": preset, "settings": settings}
    if config.data == DataConfig():
        of_dataset = {"preset": "fineweb-edu-newest", "settings": [store]}
    of_run = {"preset": preset, "name": name, "settings": settings}
    forms = {"pretrain": of_run, "train": of_run, "dataset-refresh": of_dataset, "demo": {"settings": [store]}}
    forms["evaluate"] = {"name": config.name, "settings": [store, *of_every_run]}
    for deployment in project["deployments"]:
        deployment["parameters"] = forms[deployment["name"]]
        deployment["paused"] = paused.get(deployment["name"], False)
        for schedule in deployment.get("schedules", []):
            if not scheduled and deployment["name"] not in paused:
                schedule["active"] = False
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(project, file, sort_keys=False)
        file.flush()
        argv = ["env", f"APP_DIR={packages}", f"PWD={Path.cwd()}", sys.executable, "-m", "prefect", "--no-prompt"]
        argv += ["deploy", "--all", "--prefect-file", file.name]
        result = subprocess.run(argv, cwd=packages, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stdout + result.stderr).strip()
        raise ValueError(f"Prefect refused prefect.yaml:\n{reason}\nFix the cause, then run this command again.")
    yield from (f"deployment {deployment['name']}: registered" for deployment in project["deployments"])
    for deployment in registered:
        if deployment.entrypoint not in entrypoints:  # of an earlier version
            client.delete_deployment(deployment.id)


def _automation(client: SyncPrefectClient, desired: AutomationCore) -> str:
    """Create or update the automation. A disabled automation stays disabled."""
    existing = client.read_automations_by_name(desired.name)
    if not existing:
        client.create_automation(desired)
        return f"automation {desired.name!r}: created"
    [current] = existing
    desired = desired.model_copy(update={"enabled": current.enabled})
    disabled = "" if current.enabled else ", disabled"
    if AutomationCore.model_validate(current.model_dump()) == desired:
        return f"automation {desired.name!r}: unchanged{disabled}"
    client.update_automation(current.id, desired)
    return f"automation {desired.name!r}: updated{disabled}"


def _block_id(client: SyncPrefectClient, name: str) -> UUID:
    block_type, _, document = name.partition("/")
    try:
        return client.read_block_document_by_name(document, block_type).id
    except ObjectNotFound as error:
        remedy = "Create it in the UI under Blocks; prefect block ls lists the blocks."
        raise ValueError(f"--notify {name}: the server has no such notification block (TYPE/NAME). {remedy}") from error
