"""Prepares a Prefect server: work pools, deployments, automations. Idempotent.

It keeps manual pauses of schedules, deployments, pools and automations, and manual limits of pools.
"""

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
from model.config import RunConfig
from model.config_file import load_config

DEPLOY = Path(__file__).parents[2] / "deploy"
POOLS = {"data": None, "train": 1}  # concurrent runs: one training run uses all GPUs and cores of its host
OWN_CONFIGS = {"demo": DEPLOY / "configs" / "demo.toml"}  # deployments whose form has its own configuration


def bootstrap(config: RunConfig, *, block: str = "", scheduled: bool = True) -> Iterator[str]:
    """Register everything on the server at PREFECT_API_URL. Yields one line per object.

    `config` fills the deployments' forms. Failed runs are reported through `block`, such as "slack-webhook/team".
    Unless `scheduled`, new schedules start paused. Raises ValueError for an unknown block or if `prefect deploy` fails.
    """
    with get_client(sync_client=True) as client:
        block_id = _block_id(client, block) if block else None
        for name, limit in POOLS.items():
            yield _pool(client, name, limit)
        yield from _deployments(client, config, scheduled=scheduled)
        yield _automation(client, automations.mark_crashed())
        yield _automation(client, automations.mark_orphaned())
        yield _automation(client, automations.restart())
        [restart] = client.read_automations_by_name(automations.RESTART)
        yield _automation(client, automations.pause_restarts(restart.id))
        if block_id is not None:
            yield _automation(client, automations.notify(block_id))


def _pool(client: SyncPrefectClient, name: str, limit: int | None) -> str:
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
    except ObjectAlreadyExists:
        return f"pool {name}: unchanged"
    return f"pool {name}: created"


def _deployments(client: SyncPrefectClient, config: RunConfig, *, scheduled: bool) -> Iterator[str]:
    """Register deploy/prefect.yaml, for the current folder and with the forms filled."""
    ours = DeploymentFilter(tags={"all_": [automations.TAG]})
    paused = {deployment.name: deployment.paused for deployment in client.read_deployments(deployment_filter=ours)}
    text = (DEPLOY / "prefect.yaml").read_text().replace('"{{ $APP_DIR }}"', json.dumps(str(Path.cwd())))
    project = yaml.safe_load(text)
    for deployment in project["deployments"]:
        name, form = deployment["name"], config
        if name in OWN_CONFIGS:
            form = load_config(OWN_CONFIGS[name], [f"store_url={config.store_url}"])
        deployment["parameters"] = {"config": form.model_dump(mode="json")}
        deployment["paused"] = paused.get(name, False)
        for schedule in deployment.get("schedules", []):
            if not scheduled and name not in paused:
                schedule["active"] = False
    _deploy(yaml.safe_dump(project, sort_keys=False))
    yield from (f"deployment {deployment['name']}: registered" for deployment in project["deployments"])


def _deploy(project: str) -> None:
    """Register the deployments of this YAML with `prefect deploy`. Raises ValueError when it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(project)
        file.flush()
        argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(
            f"Prefect did not register the deployments of deploy/prefect.yaml:\n"
            f"{(result.stdout + result.stderr).strip()}\nFix the cause, then run the same command again."
        )


def _automation(client: SyncPrefectClient, desired: AutomationCore) -> str:
    """Create or update the automation. A disabled automation stays disabled."""
    existing = client.read_automations_by_name(desired.name)
    existing = existing or client.read_automations_by_name(automations.FORMER_NAMES.get(desired.name, desired.name))
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
        raise ValueError(
            f"--notify {name}: the server has no such notification block (TYPE/NAME). Create it in the UI "
            f"under Blocks (Slack, e-mail, webhook …); prefect block ls lists the blocks."
        ) from error
