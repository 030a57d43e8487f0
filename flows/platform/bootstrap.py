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
from model.config_file import load_config

DEPLOY = Path(__file__).parents[2] / "deploy"
POOLS = {"data": None, "train": 1}  # concurrent runs: one training run uses all GPUs and cores of its host


def bootstrap(config: RunConfig, *, block: str = "", scheduled: bool = True) -> Iterator[str]:
    """Register everything on the server at PREFECT_API_URL. Yields one line per object.

    `config` fills the deployments' forms. If its `data` is the default, the refresh follows the newest crawls of
    FineWeb-Edu. Failed runs are reported through `block`, such as "slack-webhook/team".
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
        yield from _deployments(client, config, scheduled=scheduled)
        for automation in (automations.mark_crashed(), automations.mark_orphaned(), automations.restart()):
            yield _automation(client, automation)
        [restart] = client.read_automations_by_name(automations.RESTART)
        yield _automation(client, automations.pause_restarts(restart.id))
        if block_id is not None:
            yield _automation(client, automations.notify(block_id))


def _deployments(client: SyncPrefectClient, config: RunConfig, *, scheduled: bool) -> Iterator[str]:
    """Register deploy/prefect.yaml with `prefect deploy`, for the current folder and with the forms filled."""
    ours = DeploymentFilter(tags={"all_": [automations.TAG]})
    paused = {deployment.name: deployment.paused for deployment in client.read_deployments(deployment_filter=ours)}
    text = (DEPLOY / "prefect.yaml").read_text().replace('"{{ $APP_DIR }}"', json.dumps(str(Path.cwd())))
    project = yaml.safe_load(text)
    for deployment in project["deployments"]:
        name = deployment["name"]
        form = config
        if name == "demo" or (name == "dataset-refresh" and config.data == DataConfig()):
            preset = "demo.toml" if name == "demo" else "fineweb-edu-newest.toml"
            form = load_config(DEPLOY / "configs" / preset, [f"store_url={config.store_url}"])
        deployment["parameters"] = {"config": form.model_dump(mode="json")}
        deployment["paused"] = paused.get(name, False)
        for schedule in deployment.get("schedules", []):
            if not scheduled and name not in paused:
                schedule["active"] = False
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(project, file, sort_keys=False)
        file.flush()
        argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stdout + result.stderr).strip()
        raise ValueError(f"Prefect refused deploy/prefect.yaml:\n{reason}\nFix the cause, then run this command again.")
    yield from (f"deployment {deployment['name']}: registered" for deployment in project["deployments"])


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
