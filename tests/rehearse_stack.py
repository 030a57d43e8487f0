"""The compose stack rehearsed, by hand, where Docker is: up from nothing, one click, every service killed, down.

python tests/rehearse_stack.py [--compose "docker compose"] [--steps 600]

Takes about ten minutes and prints what it saw; an assertion that fails leaves the stack as it is, to be looked at.
"""

import argparse
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import boto3
import httpx
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.flows.client import poll

ROOT = Path(__file__).parent.parent
API = "http://127.0.0.1:4200/api"
S3 = "http://127.0.0.1:9000"
# Whose main process is killed, one after the other: the trainer after the server, whose new one must still act on that.
TURN = ("server", "train", "postgres", "s3", "data")
GAP_SECONDS = 45.0  # between two kills: all that was killed is up again
BUCKET = "gpt2"


class Stack:
    """The stack as its user has it: the compose command, the password, the API."""

    def __init__(self, compose: str) -> None:
        self._words = shlex.split(compose)
        self.began = time.monotonic()

    def say(self, *what: object) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s ", *what, flush=True)

    def compose(self, *words: str) -> str:
        done = subprocess.run([*self._words, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def secret(self, name: str) -> str:
        return (ROOT / ".secrets" / name).read_text()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The API's answer; a server that is being killed is asked again."""
        user, _, password = self.secret("prefect").partition(":")

        def answered() -> httpx.Response | None:
            try:
                answer = httpx.request(method, f"{API}{path}", json=body, auth=(user, password), timeout=30)
            except httpx.HTTPError:
                return None
            return answer if answer.status_code < 500 else None

        answer = poll(answered, 120, every_seconds=1)
        answer.raise_for_status()
        return answer.json()

    def bucket(self, identity: str) -> Any:
        secret = self.secret(f"s3_{identity}") if identity != "nobody" else "none"
        config = Config(retries={"total_max_attempts": 10}, s3={"addressing_style": "path"})
        return boto3.Session().client(
            "s3", endpoint_url=S3, aws_access_key_id=identity, aws_secret_access_key=secret, region_name="us-east-1",
            config=config,
        )  # fmt: skip

    def click(self, name: str, steps: int) -> str:
        """Start the deployment `demo` under a run's name. Returns the flow run's id."""
        asked = {"deployments": {"name": {"any_": ["demo"]}}}
        [deployment] = self.ask("POST", "/deployments/filter", asked)
        config = deployment["parameters"]["config"]
        config["name"], config["train"]["max_steps"] = name, steps
        body = {"parameters": {"config": config}}
        return str(self.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def kill(self, service: str) -> None:
        """kill -9 of a service's main process: its restart policy brings it back, as after a crash."""
        container = self.compose("ps", "--quiet", service).strip()
        words = ["docker", "inspect", "--format", "{{.State.Pid}}", container]
        pid = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["kill", "-9", pid], check=True)
        self.say("killed", service)

    def finish(self, flow_run: str, turn: list[str]) -> None:
        """Wait until the run has completed, killing meanwhile one service after the other, while it runs."""
        killed_at, last = time.monotonic(), ""

        def completed() -> bool:
            nonlocal killed_at, last
            state = self.ask("GET", f"/flow_runs/{flow_run}")["state"]
            if state["name"] != last:
                self.say(flow_run, state["name"])
                last = state["name"]
            assert last not in ("Failed", "Cancelled"), state["message"]
            if turn and last == "Running" and time.monotonic() - killed_at > GAP_SECONDS:
                self.kill(turn.pop(0))
                killed_at = time.monotonic()
            return last == "Completed"

        poll(completed, 3_600, every_seconds=1)
        assert not turn, f"the run was over before {turn} could be killed: give more --steps"


def refused(client: Any, key: str) -> bool:
    """Whether this identity may not write this object."""
    try:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    except ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) == 403
    return False


def shards(stack: Stack) -> dict[str, Any]:
    """When each shard was written."""
    listed = stack.bucket("pipeline").list_objects_v2(Bucket=BUCKET, Prefix="datasets/python-docs/shards/")
    return {found["Key"]: found["LastModified"] for found in listed["Contents"]}


def main() -> None:
    """Rehearse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", default="docker compose", help="how compose is called here")
    parser.add_argument("--up", default="", help="how the stack is brought up, where another way than `up --wait`")
    parser.add_argument("--steps", type=int, default=600, help="of the training, during which services are killed")
    asked = parser.parse_args()
    stack = Stack(asked.compose)
    up = shlex.split(asked.up) or [*shlex.split(asked.compose), "up", "--wait"]

    subprocess.run(["make", "env"], cwd=ROOT, check=True)
    subprocess.run(up, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stack.say("up and healthy")
    shown = stack.compose("config")
    assert not [path.name for path in (ROOT / ".secrets").iterdir() if path.read_text().strip() in shown]
    assert httpx.post(f"{API}/flow_runs/filter", json={}).status_code == 401
    listening = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout
    places = [line.split()[3] for line in listening.splitlines()]
    ours = {place for place in places if place.endswith((":4200", ":9000", ":9001", ":5432", ":8080"))}
    assert ours == {"127.0.0.1:4200", "127.0.0.1:9000", "127.0.0.1:9001"}
    stack.say("`config` shows no secret, the API wants its password, nothing listens beyond 127.0.0.1")

    trainer, pipeline = stack.bucket("trainer"), stack.bucket("pipeline")
    assert refused(trainer, "datasets/python-docs/shards/forged.bin")
    assert refused(trainer, "sources/forged")
    assert refused(stack.bucket("nobody"), "runs/forged/x")
    assert not refused(trainer, "runs/rehearsal/x")
    assert not refused(pipeline, "datasets/rehearsal/shards/x.bin")
    for key in ("runs/rehearsal/x", "datasets/rehearsal/shards/x.bin"):
        pipeline.delete_object(Bucket=BUCKET, Key=key)
    stack.say("the trainer's identity is refused (403) where it has nothing to write")

    name = f"rehearsal-{int(time.time())}"
    stack.finish(stack.click(name, asked.steps), list(TURN))
    made = shards(stack)
    stack.compose("rm", "--stop", "--force", "postgres", "server", "bootstrap", "data", "train")
    project = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["name"]
    subprocess.run(["docker", "volume", "rm", f"{project}_postgres"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(up, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stack.say("up again with a new database")
    again = time.monotonic()
    stack.finish(stack.click(name, asked.steps), [])
    assert shards(stack) == made
    stack.say(f"the same run was found done in {time.monotonic() - again:.0f} s, no shard was written")

    stack.compose("down", "--volumes")
    for kind in ("ps --all --quiet", "volume ls --quiet", "network ls --quiet"):
        words = ["docker", *kind.split(), "--filter", f"label=com.docker.compose.project={project}"]
        assert not subprocess.run(words, check=True, capture_output=True, text=True).stdout, kind
    stack.say("down, nothing is left")


if __name__ == "__main__":
    main()
