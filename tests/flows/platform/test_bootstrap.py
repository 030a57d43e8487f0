"""`gpt2 bootstrap`: what a server has afterwards, that a second time changes nothing, and what its automations do."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from flows.platform import automations
from flows.platform.bootstrap import bootstrap
from model.config import RunConfig
from tests.flows.client import ask, poll
from tests.flows.deployments import automation, deployment, run, set_state, start, states

DEPLOYMENTS = {"pretrain", "demo", "dataset-refresh", "train", "evaluate"}
CONFIG = RunConfig(name="given", store_url="./given")


@pytest.fixture(scope="module", autouse=True)
def registered(api: str) -> list[str]:
    return list(bootstrap(CONFIG, scheduled=False))


@pytest.fixture
def restarts(api: str) -> Iterator[str]:
    """The id of the automation that starts crashed runs again, switched on for one test."""
    found = automation(api, automations.RESUME)["id"]
    ask(api, f"/automations/{found}", {"enabled": True}, "PATCH")
    yield found
    ask(api, f"/automations/{found}", {"enabled": True}, "PATCH")


def everything(api: str) -> dict[str, Any]:
    """All that people may change by hand, without the times."""
    deployments, pools = ask(api, "/deployments/filter", {}), ask(api, "/work_pools/filter", {})
    made = ask(api, "/automations/filter", {})
    schedules = {
        one["name"]: [(made["id"], made["slug"], made["active"], made["schedule"]) for made in one["schedules"]]
        for one in deployments
    }
    return {
        "deployments": {one["name"]: (one["id"], one["paused"], one["parameters"], one["tags"]) for one in deployments},
        "schedules": schedules,
        "pools": {one["name"]: (one["id"], one["is_paused"], one["concurrency_limit"]) for one in pools},
        "automations": {one["name"]: (one["id"], one["enabled"], one["trigger"], one["actions"]) for one in made},
    }


def test_all_is_there_and_a_second_time_changes_nothing(api: str) -> None:
    there = everything(api)
    assert set(there["deployments"]) >= DEPLOYMENTS
    assert there["pools"].keys() >= {"data", "train"}
    assert there["pools"]["train"][2] == 1
    assert not any("made" in line or "brought" in line for line in bootstrap(CONFIG, scheduled=False))
    assert everything(api) == there


def test_what_people_paused_or_changed_stays(api: str) -> None:
    refresh, train = deployment(api, "dataset-refresh"), deployment(api, "train")
    [schedule] = refresh["schedules"]
    beat = automation(api, automations.ZOMBIES)["id"]

    def change(active: bool) -> None:
        ask(api, f"/deployments/{refresh['id']}/schedules/{schedule['id']}", {"active": active}, "PATCH")
        ask(api, f"/deployments/{train['id']}", {"paused": not active}, "PATCH")
        ask(api, "/work_pools/data", {"is_paused": not active, "concurrency_limit": 3}, "PATCH")
        ask(api, f"/automations/{beat}", {"enabled": active}, "PATCH")

    for active in (True, False, True):
        change(active)
        changed = everything(api)
        list(bootstrap(CONFIG))
        assert everything(api) == changed
    ask(api, "/work_pools/data", {"concurrency_limit": None}, "PATCH")


def test_the_form_has_titles_order_choices_defaults_and_help(api: str) -> None:
    found = deployment(api, "pretrain")
    assert found["parameters"]["config"]["name"] == "given"
    assert "**The whole pipeline**" in found["description"]
    schema = found["parameter_openapi_schema"]
    for section in ("RunConfig", "DataConfig", "ModelConfig", "TrainingConfig", "EvaluationConfig", "ResourcesConfig"):
        fields = schema["definitions"][section]["properties"]
        in_order = sorted(fields, key=lambda name: fields[name]["position"])
        model = RunConfig if section == "RunConfig" else type(getattr(RunConfig(), _section(section)))
        assert in_order == list(model.model_fields)
        for name, field in fields.items():
            assert field["title"] == name.replace("_", " ").capitalize()
            assert "default" in field
            assert "description" in field or "$ref" in json.dumps(field)
    assert schema["definitions"]["ResourcesConfig"]["properties"]["runner"]["enum"] == ["threads", "processes", "dask"]


def _section(model: str) -> str:
    return {"TrainingConfig": "train"}.get(model, model.removesuffix("Config").lower())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_steps", -5, "-5 is less than the minimum of 1"),
        ("precision", "fp8", "'fp8' is not one of ['auto', 'fp32', 'bf16']"),
        ("speed", 1, "Additional properties are not allowed ('speed' was unexpected)"),
    ],
)
def test_the_form_refuses_a_bad_value_with_the_fields_own_message(api: str, field: str, value: Any, said: str) -> None:
    found = deployment(api, "pretrain")
    config = found["parameters"]["config"]
    config["train"][field] = value
    asked = {"parameters": {"config": config}}
    answer = httpx.post(f"{api}/deployments/{found['id']}/create_flow_run", json=asked)
    assert (answer.status_code, said in answer.text) == (409, True), answer.text


def test_a_schedule_makes_runs_with_its_parameters_also_after_a_pause(api: str) -> None:
    refresh = deployment(api, "dataset-refresh")
    [schedule] = refresh["schedules"]
    assert schedule["slug"] == "weekly"
    path = f"/deployments/{refresh['id']}/schedules/{schedule['id']}"

    def scheduled() -> list[dict[str, Any]]:
        asked = {
            "deployments": {"id": {"any_": [refresh["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        found: list[dict[str, Any]] = ask(api, "/flow_runs/filter", asked)
        return [one for one in found if one["auto_scheduled"]]

    for _ in range(2):
        ask(api, path, {"active": True}, "PATCH")
        runs = poll(scheduled, 120)
        assert RunConfig.model_validate(runs[0]["parameters"]["config"]) == CONFIG
        ask(api, path, {"active": False}, "PATCH")
        poll(lambda: not scheduled())


def test_a_crashed_run_goes_on_and_a_failed_or_cancelled_one_does_not(api: str, restarts: str) -> None:
    crashed, failed, cancelled = (start(api, "train", CONFIG) for _ in range(3))
    set_state(api, failed, "FAILED")
    set_state(api, cancelled, "CANCELLED")
    set_state(api, crashed, "CRASHED")
    poll(lambda: run(api, crashed)["state_name"] == "AwaitingRetry")
    assert states(api, crashed)[-2:] == ["Crashed", "AwaitingRetry"]
    assert (run(api, failed)["state_name"], run(api, cancelled)["state_name"]) == ("Failed", "Cancelled")
    set_state(api, crashed, "CANCELLED")


def test_runs_that_crash_again_and_again_wait_until_someone_switches_the_restart_on(api: str, restarts: str) -> None:
    crashing = start(api, "train", CONFIG)
    for _ in range(automations.CRASHES):
        set_state(api, crashing, "SCHEDULED", "AwaitingRetry")
        set_state(api, crashing, "CRASHED")
    poll(lambda: not automation(api, automations.RESUME)["enabled"])
    assert run(api, crashing)["state_name"] == "Crashed"
    ask(api, f"/automations/{restarts}", {"enabled": True}, "PATCH")
    poll(lambda: run(api, crashing)["state_name"] == "AwaitingRetry")


class Inbox(BaseHTTPRequestHandler):
    """Where the webhook sends its messages."""

    came: list[str] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.came.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
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


def test_a_failure_is_told_through_any_notification_block(api: str, inbox: str) -> None:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    payload = {"title": "{{subject}}", "text": "{{body}}"}
    CustomWebhookNotificationBlock(name="team", url=inbox, json_data=payload).save("team")
    assert any(automations.NOTIFY in line for line in bootstrap(CONFIG, block="custom-webhook/team"))
    flow_run = start(api, "train", CONFIG)
    ask(
        api,
        f"/flow_runs/{flow_run}/set_state",
        {"state": {"type": "FAILED", "name": "Failed", "message": "why"}, "force": True},
    )
    [message] = [json.loads(text) for text in poll(lambda: [one for one in Inbox.came if flow_run in one])]
    assert message["title"].endswith(": Failed")
    for part in ("why", f"prefect flow-run retry {flow_run}", "/flow-run/"):
        assert part in message["text"]


def test_a_block_that_is_not_there_is_refused(api: str) -> None:
    with pytest.raises(ValueError, match=r"--notify slack-webhook/nobody.*prefect block ls"):
        list(bootstrap(CONFIG, block="slack-webhook/nobody"))
