"""`gpt2 bootstrap`: what it creates, that a second call changes nothing, and what its automations do."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import get_client

from flows import train
from flows.inspection.alerts import Alerts
from flows.platform import automations, serve
from flows.platform.bootstrap import _automation, bootstrap
from flows.runtime.progress import Bar
from model.config import RunConfig
from model.config_file import load_config, presets
from model.form import DEFAULT, settings_beyond
from model.runs.run import Run
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import overwrite
from tests.flows.client import call_api, login
from tests.flows.deployments import automation, deployment, run, set_state, start, states
from tests.polling import poll

DEPLOYMENTS = {"pretrain", "demo", "dataset-refresh", "train", "evaluate"}
CONFIG = RunConfig(name="given", store_url="./given")


@pytest.fixture(scope="module", autouse=True)
def registered(api: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automations, "RESTART_SECONDS", 10)  # Prefect's least; 20 s are for workers, and none runs here
        list(bootstrap(DEFAULT, CONFIG, scheduled=False))
        yield


@pytest.fixture
def restarts(api: str) -> Iterator[str]:
    """The id of the automation that restarts crashed runs, enabled for one test."""
    restart = automation(api, automations.RESTART)["id"]
    call_api(api, f"/automations/{restart}", {"enabled": True}, "PATCH")
    yield restart
    call_api(api, f"/automations/{restart}", {"enabled": True}, "PATCH")


def everything(api: str) -> dict[str, Any]:
    """Everything that people may change by hand, without timestamps."""
    deployments, pools = call_api(api, "/deployments/filter", {}), call_api(api, "/work_pools/filter", {})
    schedules = {
        deployment["name"]: picked(deployment["schedules"], "slug", "id", "active", "schedule")
        for deployment in deployments
    }
    return {
        "deployments": picked(deployments, "name", "id", "paused", "parameters", "tags"),
        "schedules": schedules,
        "pools": picked(pools, "name", "id", "is_paused", "concurrency_limit"),
        "automations": picked(call_api(api, "/automations/filter", {}), "name", "id", "enabled", "trigger", "actions"),
    }


def picked(objects: list[dict[str, Any]], key: str, *fields: str) -> dict[str, list[Any]]:
    """These fields of each object, by its key."""
    return {entry[key]: [entry[field] for field in fields] for entry in objects}


def test_everything_exists_and_a_second_call_changes_nothing(api: str) -> None:
    before = everything(api)
    assert set(before["deployments"]) >= DEPLOYMENTS
    assert before["pools"].keys() >= {"data", "train"}
    assert before["pools"]["train"][2] == 1
    for name in DEPLOYMENTS:
        seconds = int(deployment(api, name)["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * seconds <= automations.HEARTBEAT_LIMIT_SECONDS
    assert (
        before["automations"][automations.mark_orphaned().name][2]["within"] <= 300
    )  # the next run starts within 6 minutes
    settings = ['store_url="./given"']
    assert deployment(api, "dataset-refresh")["parameters"] == {"preset": "fineweb-edu-newest", "settings": settings}
    parameters = {"preset": DEFAULT, "name": "given", "settings": settings_beyond(DEFAULT, CONFIG)}
    assert deployment(api, "pretrain")["parameters"] == parameters
    assert not any("created" in line or "updated" in line for line in bootstrap(DEFAULT, CONFIG, scheduled=False))
    assert everything(api) == before


def test_an_automation_that_changed_is_updated_and_stays_disabled(api: str) -> None:
    before = automation(api, automations.MARK_CRASHED)
    former = {key: before[key] for key in ("name", "trigger", "actions")}
    call_api(api, f"/automations/{before['id']}", former | {"description": "former", "enabled": False}, "PUT")
    with get_client(sync_client=True) as client:
        assert "updated, disabled" in _automation(client, automations.mark_crashed())
    after = automation(api, automations.MARK_CRASHED)
    assert (after["id"], after["enabled"], after["description"]) == (before["id"], False, before["description"])
    call_api(api, f"/automations/{before['id']}", {"enabled": True}, "PATCH")


@pytest.mark.full
def test_what_people_paused_or_changed_is_kept(api: str) -> None:
    refresh, train = deployment(api, "dataset-refresh"), deployment(api, "train")
    [schedule] = refresh["schedules"]
    mark_crashed = automation(api, automations.MARK_CRASHED)["id"]

    def change(active: bool) -> None:
        call_api(api, f"/deployments/{refresh['id']}/schedules/{schedule['id']}", {"active": active}, "PATCH")
        call_api(api, f"/deployments/{train['id']}", {"paused": not active}, "PATCH")
        call_api(api, "/work_pools/data", {"is_paused": not active, "concurrency_limit": 3}, "PATCH")
        call_api(api, f"/automations/{mark_crashed}", {"enabled": active}, "PATCH")

    for active in (True, False, True):
        change(active)
        changed = everything(api)
        list(bootstrap(DEFAULT, CONFIG))
        assert everything(api) == changed
    call_api(api, "/work_pools/data", {"concurrency_limit": None}, "PATCH")


def test_each_form_is_short_and_every_field_says_what_it_is(api: str) -> None:
    for name in DEPLOYMENTS:
        properties = deployment(api, name)["parameter_openapi_schema"]["properties"]
        assert 1 < len(properties) <= 10
        assert all(field["title"] and field["description"].endswith(".") for field in properties.values()), name
    pretrain = deployment(api, "pretrain")
    assert pretrain["parameters"]["name"] == "given"
    assert "**The whole pipeline**" in pretrain["description"]
    fields = pretrain["parameter_openapi_schema"]["properties"]
    in_order = sorted(fields, key=lambda name: fields[name]["position"])
    assert in_order == ["preset", "name", "source", "steps", "gpus", "settings"]
    assert fields["preset"]["enum"] == [*presets()]
    assert all(f"- `{name}`: " in fields["preset"]["description"] for name in presets())
    assert all("default" in field for field in fields.values())


def submitted(api: str, fields: dict[str, Any] | str) -> httpx.Response:
    """The server's response to a click on `pretrain` with these fields, or with this text as a body."""
    pretrain = deployment(api, "pretrain")
    body = fields if isinstance(fields, str) else json.dumps({"parameters": pretrain["parameters"] | fields})
    return httpx.post(
        f"{api}/deployments/{pretrain['id']}/create_flow_run",
        content=body, headers={"Content-Type": "application/json"}, auth=login(), timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -5}, "-5 is less than the minimum of 0"),
        ({"preset": "gpt3"}, "'gpt3' is not one of"),
        ({"preset": "/etc/passwd"}, "is not one of"),
        ({"source": "s3://key:sekret@bucket"}, "data.source = 's3://…@bucket': a URL must not contain a user"),
        ({"speed": 1}, "Additional properties are not allowed ('speed' was unexpected)"),
    ],
)
def test_the_form_refuses_a_bad_value_with_a_message_for_that_field(
    api: str, fields: dict[str, Any], message: str
) -> None:
    response = submitted(api, fields)
    assert (response.status_code, message in response.text) == (409, True), response.text


@pytest.mark.parametrize(
    "setting",
    ["train.max_step=5", "train.precision=fp8", "model.heads=5", "train.max_steps", 'data.filters=["int_score >"]'],
)
def test_the_form_refuses_a_bad_setting_with_the_message_of_the_console(api: str, setting: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_config(None, [setting])
    response = submitted(api, {"settings": [setting]})
    assert (response.status_code, str(refused.value) in response.json()["detail"]) == (409, True), response.text


POISON = [  # settings
    f"train.seed={'9' * 30}", f"train.clip={'9' * 30}", f"train.betas=[0.5, {'9' * 30}]",
    f"train.max_steps=-{'9' * 30}", "train.learning_rate=1e400", f"train.unknown={'9' * 30}",
    f"resources.unsaved_minutes={'9' * 30}", "data.source=\ud800", "data.dataset=\ud800",
    'evaluation.prompts=["\ud800"]', f"evaluation.checkpoint={'9' * 30}", "data.source=s3://key:sekret@bucket/x",
    "store_url=s3://key:sekret@bucket/x", "data.dataset=a/b", "data.dataset=", "train.start_from=.hidden",
    f"data.text_column={'x' * 10_000}",
]  # fmt: skip
POISONED_FIELDS = [
    {"name": "a b"}, {"name": "a\n"}, {"name": "x" * 201}, {"name": "\ud800"}, {"source": "\ud800"},
    {"source": "s3://key:sekret@bucket/x"}, {"steps": int("9" * 30)}, {"gpus": int("9" * 30)},
    {"settings": ["data.config=1"] * 101}, {"preset": "\ud800"},
]  # fmt: skip


def test_the_form_refuses_what_no_flow_or_no_list_of_runs_could_use(api: str) -> None:
    """After one stored integer of over 64 bits, or one lone surrogate, the server could list no run again."""
    for fields in [*POISONED_FIELDS, *({"settings": [setting]} for setting in POISON)]:
        response = submitted(api, fields)
        assert response.status_code in (409, 422), (fields, response.text)
    assert call_api(api, "/flow_runs/filter", {}) is not None
    fields: dict[str, Any] = {
        "source": "s3://bucket/żółć@1/*.parquet",
        "settings": ['evaluation.prompts=["Zwei\\nZeilen 🙂"]'],
    }
    assert submitted(api, fields).status_code == 201


def test_a_schedule_creates_runs_with_its_parameters_also_after_a_pause(api: str) -> None:
    refresh = deployment(api, "dataset-refresh")
    [schedule] = refresh["schedules"]
    assert schedule["slug"] == "weekly"
    path = f"/deployments/{refresh['id']}/schedules/{schedule['id']}"

    def scheduled() -> list[dict[str, Any]]:
        body = {
            "deployments": {"id": {"any_": [refresh["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        runs: list[dict[str, Any]] = call_api(api, "/flow_runs/filter", body)
        return [run for run in runs if run["auto_scheduled"]]

    for _ in range(2):
        call_api(api, path, {"active": True}, "PATCH")
        runs = poll(scheduled)
        assert runs[0]["parameters"] == refresh["parameters"]
        call_api(api, path, {"active": False}, "PATCH")
        poll(lambda: not scheduled())


def console_run(api: str, *tags: str) -> str:
    """A run of the flow `train` without a deployment, as the console creates it. Returns its id."""
    body = {"flow_id": deployment(api, "train")["flow_id"], "tags": tags}
    return str(call_api(api, "/flow_runs/", body | {"state": {"type": "RUNNING", "name": "Running"}})["id"])


@pytest.mark.full
def test_only_a_crashed_run_of_a_deployment_is_restarted(api: str, restarts: str) -> None:
    """Nobody would run the console's again."""
    consoles = console_run(api, automations.TAG)
    crashed, failed, cancelled = (start(api, "train", CONFIG) for _ in range(3))
    set_state(api, consoles, "CRASHED")
    set_state(api, failed, "FAILED")
    set_state(api, cancelled, "CANCELLED")
    set_state(api, crashed, "CRASHED")
    poll(lambda: run(api, crashed)["state_name"] == "AwaitingRetry")
    assert states(api, crashed)[-2:] == ["Crashed", "AwaitingRetry"]
    left = [run(api, flow_run)["state_name"] for flow_run in (consoles, failed, cancelled)]
    assert left == ["Crashed", "Failed", "Cancelled"]
    set_state(api, crashed, "CANCELLED")


def test_a_run_that_does_not_end_after_ctrl_c_is_cancelled_all_the_same(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker would report its end: as on a host that is too slow to, before `gpt2 serve` ends its workers."""
    flow_run = start(api, "train", CONFIG)
    set_state(api, flow_run, "RUNNING")
    monkeypatch.setattr(serve, "CANCEL_SECONDS", 0)
    serve._cancel_runs(["train"])
    assert states(api, flow_run)[-2:] == ["Cancelling", "Cancelled"]


@pytest.fixture
def soon(api: str, restarts: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs count as dead after 10 s of silence, Prefect's least."""
    monkeypatch.setattr(automations, "PENDING_LIMIT_SECONDS", 10)
    monkeypatch.setattr(automations, "HEARTBEAT_LIMIT_SECONDS", 10)
    with get_client(sync_client=True) as client:
        assert "updated" in _automation(client, automations.mark_orphaned())
        assert "updated" in _automation(client, automations.mark_crashed())
        yield
        monkeypatch.undo()
        _automation(client, automations.mark_orphaned())
        _automation(client, automations.mark_crashed())


@pytest.mark.full
def test_a_run_whose_worker_and_host_died_crashes_in_any_state(api: str, soon: None) -> None:
    """Each of these states holds a slot of the pool; the host may die in any of them."""
    deployed = {name: start(api, name, CONFIG) for name in ("pretrain", "demo", "train", "evaluate")}
    held = dict(zip(deployed.values(), ("Pending", "Submitting", "InfrastructurePending", "Running"), strict=True))
    for flow_run, name in held.items():
        set_state(api, flow_run, "RUNNING" if name == "Running" else "PENDING", name)
    consoles, foreign = console_run(api, automations.TAG), console_run(api)
    for flow_run, name in held.items():
        poll(lambda flow_run=flow_run: run(api, flow_run)["state_name"] == "AwaitingRetry")
        history = states(api, flow_run)
        assert history[history.index(name) :][:3] == [name, "Crashed", "AwaitingRetry"]
        set_state(api, flow_run, "CANCELLED")
    poll(lambda: run(api, consoles)["state_name"] == "Crashed")
    assert run(api, foreign)["state_name"] == "Running"
    set_state(api, foreign, "CANCELLED")


@pytest.mark.full
def test_repeated_crashes_pause_the_restart_until_a_person_enables_it(api: str, restarts: str) -> None:
    crashing = start(api, "train", CONFIG)
    for _ in range(automations.MAX_CRASHES):
        set_state(api, crashing, "SCHEDULED", "AwaitingRetry")
        set_state(api, crashing, "CRASHED")
    poll(lambda: not automation(api, automations.RESTART)["enabled"])
    assert run(api, crashing)["state_name"] == "Crashed"
    call_api(api, f"/automations/{restarts}", {"enabled": True}, "PATCH")
    crashed = start(api, "train", CONFIG)  # the server may never have counted the other run's last crash
    set_state(api, crashed, "CRASHED")
    poll(lambda: run(api, crashed)["state_name"] == "AwaitingRetry")


class Inbox(BaseHTTPRequestHandler):
    """Collects the messages of the webhook."""

    messages: list[str] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def inbox() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Inbox)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_failure_is_sent_through_any_notification_block(api: str, inbox: str) -> None:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    payload = {"title": "{{subject}}", "text": "{{body}}"}
    CustomWebhookNotificationBlock(name="team", url=inbox, json_data=payload).save("team")
    assert any(automations.NOTIFY in line for line in bootstrap(DEFAULT, CONFIG, block="custom-webhook/team"))
    flow_run = start(api, "train", CONFIG)
    call_api(
        api,
        f"/flow_runs/{flow_run}/set_state",
        {"state": {"type": "FAILED", "name": "Failed", "message": "the reason"}, "force": True},
    )
    [message] = [json.loads(text) for text in poll(lambda: [text for text in Inbox.messages if flow_run in text])]
    assert message["title"].endswith(": Failed")
    for part in ("the reason", f"prefect flow-run retry {flow_run}", "/flow-run/"):
        assert part in message["text"]


def test_an_alert_of_a_training_is_sent_too(
    api: str, inbox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    payload = {"title": "{{subject}}", "text": "{{body}}"}
    CustomWebhookNotificationBlock(name="alerted", url=inbox, json_data=payload).save("alerted")
    assert any(automations.NOTIFY_ALERTS in line for line in bootstrap(DEFAULT, CONFIG, block="custom-webhook/alerted"))
    store, ended = open_store(str(tmp_path / "store"), create=True), threading.Event()
    overwrite(store, RunKeys("alerted").progress, b'{"step": 0, "max_steps": 9, "since_checkpoint": []}')
    monkeypatch.setattr(train, "disk_usage", lambda _: ended.set() or SimpleNamespace(free=7 * 10**8))

    @flow
    def watch() -> None:
        train._watch(store, Run("alerted", {}, None, "", None, ""), Bar("train", 9, "steps"), Alerts(CONFIG), ended)

    watch()
    [message] = [json.loads(text) for text in poll(lambda: [text for text in Inbox.messages if "alerted" in text])]
    assert message["title"] == "alerted: alert"
    assert message["text"].startswith("the disk is nearly full: 0.7 GB are free.")
    assert "/flow-run/" in message["text"]


def test_a_missing_notification_block_is_refused(api: str) -> None:
    with pytest.raises(ValueError, match=r"--notify slack-webhook/nobody.*prefect block ls"):
        list(bootstrap(DEFAULT, CONFIG, block="slack-webhook/nobody"))
