"""Makes a Prefect server ready: work pools, deployments, automations. Run twice it changes nothing.

What people changed by hand stays: paused schedules, deployments, pools and automations, the limits of pools.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.platform import automations
from model.config import RunConfig
from model.config_file import load_config

DEPLOY = Path(__file__).parents[2] / "deploy"
POOLS = {"data": None, "train": 1}  # runs at once: a host's GPUs, and its cores, are for one training
OWN = {"demo": DEPLOY / "configs" / "demo.toml"}  # what a deployment's form begins with in place of the settings given


def bootstrap(config: RunConfig, *, block: str = "", scheduled: bool = True) -> Iterator[str]:
    """Register everything on the server of PREFECT_API_URL; yields a line about each thing.

    The deployments' forms begin with `config`. `block`, as "slack-webhook/team", is told of failures. Without
    `scheduled` schedules that are new there begin paused. Raises ValueError.
    """
    with get_client(sync_client=True) as client:
        block_id = _block_id(client, block) if block else None
        for name, limit in POOLS.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))
                yield f"pool {name}: made"
            except ObjectAlreadyExists:
                yield f"pool {name}: there"
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[automations.TAG]))
        paused = {one.name: one.paused for one in client.read_deployments(deployment_filter=ours)}
        declared = _declared(config)
        for deployment in declared["deployments"]:
            deployment["paused"] = paused.get(deployment["name"], False)
            for schedule in deployment.get("schedules", []):
                if not scheduled and deployment["name"] not in paused:
                    schedule["active"] = False
        _deploy(declared)
        yield from (f"deployment {deployment['name']}: registered" for deployment in declared["deployments"])
        yield _automation(client, automations.zombies())
        yield _automation(client, automations.resume())
        [resume] = client.read_automations_by_name(automations.RESUME)
        yield _automation(client, automations.loop_breaker(resume.id))
        if block_id is not None:
            yield _automation(client, automations.notify(block_id))


def _declared(config: RunConfig) -> dict[str, Any]:
    """deploy/prefect.yaml, with this folder and the settings that each form begins with."""
    text = (DEPLOY / "prefect.yaml").read_text().replace('"{{ $APP_DIR }}"', json.dumps(str(Path.cwd())))
    declared: dict[str, Any] = yaml.safe_load(text)
    for deployment in declared["deployments"]:
        begin = config
        if file := OWN.get(deployment["name"]):
            begin = load_config(file, [f"store_url={config.store_url}"])
        deployment["parameters"] = {"config": begin.model_dump(mode="json")}
    return declared


def _deploy(declared: dict[str, Any]) -> None:
    """Let Prefect's own command register the deployments."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(declared, file, sort_keys=False)
        file.flush()
        words = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"bootstrap: the deployments of deploy/prefect.yaml were to be registered, Prefect says:\n"
            f"{(done.stdout + done.stderr).strip()}\nMend what it names, then run the same command again."
        )


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Make the automation, or bring it up to date; one that was switched off stays so."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return f"automation {wanted.name!r}: made"
    [there] = found
    wanted = wanted.model_copy(update={"enabled": there.enabled})
    off = "" if there.enabled else ", switched off"
    if AutomationCore.model_validate(there.model_dump()) == wanted:
        return f"automation {wanted.name!r}: there{off}"
    client.update_automation(there.id, wanted)
    return f"automation {wanted.name!r}: brought up to date{off}"


def _block_id(client: SyncPrefectClient, name: str) -> UUID:
    kind, _, document = name.partition("/")
    try:
        return client.read_block_document_by_name(document, kind).id
    except ObjectNotFound as error:
        raise ValueError(
            f"--notify {name}: a notification block was asked for as TYPE/NAME, the server has none of that name. "
            f"Make it in the UI under Blocks (Slack, e-mail, webhook …); prefect block ls lists what is there."
        ) from error
