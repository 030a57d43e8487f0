"""A manual rehearsal of the compose stack, with Docker: start it, start a run, kill every service, remove it.

python tests/rehearse_stack.py [--compose "docker compose"] [--steps 600]

Takes about ten minutes and prints each step. After a failed assertion the stack stays up for inspection.
"""

import argparse
import os
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

from tests.polling import poll

ROOT = Path(__file__).parent.parent
API = "http://127.0.0.1:4200/api"
S3 = "http://127.0.0.1:9000"
# The services to kill, in this order. The trainer follows the server: the restarted server must still notice its death.
KILL_ORDER = ("server", "train", "postgres", "s3", "data")
GAP_SECONDS = 45.0  # between two kills, so that the killed service is up again
BUCKET = "gpt2"
HUB = "of-the-hub"  # the value of HF_TOKEN


class Stack:
    """The running stack: its compose command, secrets and API."""

    def __init__(self, compose: str) -> None:
        self._command = shlex.split(compose)
        self.began = time.monotonic()

    def log(self, *values: object) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s ", *values, flush=True)

    def compose(self, *argv: str) -> str:
        ended = subprocess.run([*self._command, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def secret(self, name: str) -> str:
        return (ROOT / ".secrets" / name).read_text()

    def call_api(self, method: str, path: str, body: Any = None) -> Any:
        """The API's response. Repeats the request while the server is down."""
        user, _, password = self.secret("prefect").partition(":")

        def response_or_none() -> httpx.Response | None:
            try:
                answer = httpx.request(method, f"{API}{path}", json=body, auth=(user, password), timeout=30)
            except httpx.HTTPError:
                return None
            return answer if answer.status_code < 500 else None

        answer = poll(response_or_none, 120, every_seconds=1)
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
        query = {"deployments": {"name": {"any_": ["demo"]}}}
        [deployment] = self.call_api("POST", "/deployments/filter", query)
        settings = [*deployment["parameters"]["settings"], f"name={name}", f"train.max_steps={steps}"]
        body = {"parameters": {"settings": settings}}
        return str(self.call_api("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def kill(self, service: str) -> None:
        """kill -9 a service's main process. Its restart policy restarts it, as after a crash."""
        container = self.compose("ps", "--quiet", service).strip()
        argv = ["docker", "inspect", "--format", "{{.State.Pid}}", container]
        pid = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["kill", "-9", pid], check=True)
        self.log("killed", service)

    def finish(self, flow_run: str, services: list[str]) -> None:
        """Wait until the run has completed, and kill the services one after the other while it runs."""
        killed_at, last = time.monotonic(), ""

        def completed() -> bool:
            nonlocal killed_at, last
            state = self.call_api("GET", f"/flow_runs/{flow_run}")["state"]
            if state["name"] != last:
                self.log(flow_run, state["name"])
                last = state["name"]
            assert last not in ("Failed", "Cancelled"), state["message"]
            if services and last == "Running" and time.monotonic() - killed_at > GAP_SECONDS:
                self.kill(services.pop(0))
                killed_at = time.monotonic()
            return last == "Completed"

        poll(completed, 3_600, every_seconds=1)
        assert not services, f"the run ended before {services} could be killed: give more --steps"


def refused(client: Any, key: str) -> bool:
    """Whether the server refuses this identity's write of the object."""
    try:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    except ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) == 403
    return False


def check_boundary(stack: Stack) -> None:
    """While a training process runs: everything that its user can read contains its own secret and no other."""
    everything = "cat /proc/[0-9]*/environ /run/secrets/* /work/.prefect/* 2>/dev/null; true"
    argv = ["exec", "--no-TTY", "--user", "trainer", "train", "env", "-i", "/bin/sh", "-c", everything]
    readable = poll(lambda: stack.secret("s3_trainer") in (text := stack.compose(*argv)) and text, 600, every_seconds=1)
    for secret in (stack.secret("s3_pipeline"), stack.secret("prefect"), HUB):
        assert secret not in readable


def shards(stack: Stack) -> dict[str, Any]:
    """When each shard was written."""
    listed = stack.bucket("pipeline").list_objects_v2(Bucket=BUCKET, Prefix="datasets/python-docs/shards/")
    return {entry["Key"]: entry["LastModified"] for entry in listed["Contents"]}


def main() -> None:
    """Run the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", default="docker compose", help="the compose command on this host")
    parser.add_argument("--up", default="", help="the command that starts the stack, if not `up --wait`")
    parser.add_argument("--steps", type=int, default=600, help="training steps, during which services are killed")
    options = parser.parse_args()
    stack = Stack(options.compose)
    up = shlex.split(options.up) or [*shlex.split(options.compose), "up", "--wait"]

    subprocess.run(["make", "env"], cwd=ROOT, check=True)
    os.environ["HF_TOKEN"] = HUB
    subprocess.run(up, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stack.log("up and healthy")
    config = stack.compose("config")
    assert not [path.name for path in (ROOT / ".secrets").iterdir() if path.read_text().strip() in config]
    assert httpx.post(f"{API}/flow_runs/filter", json={}).status_code == 401
    listening = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout
    places = [line.split()[3] for line in listening.splitlines()]
    ours = {place for place in places if place.endswith((":4200", ":9000", ":9001", ":5432", ":8080"))}
    assert ours == {"127.0.0.1:4200", "127.0.0.1:9000", "127.0.0.1:9001"}
    stack.log("`config` shows no secret, the API requires its password, nothing listens beyond 127.0.0.1")

    trainer, pipeline = stack.bucket("trainer"), stack.bucket("pipeline")
    assert refused(trainer, "datasets/python-docs/shards/forged.bin")
    assert refused(trainer, "sources/forged")
    assert refused(stack.bucket("nobody"), "runs/forged/x")
    assert not refused(trainer, "runs/rehearsal/x")
    assert not refused(pipeline, "datasets/rehearsal/shards/x.bin")
    for key in ("runs/rehearsal/x", "datasets/rehearsal/shards/x.bin"):
        pipeline.delete_object(Bucket=BUCKET, Key=key)
    stack.log("the trainer's identity is refused (403) outside its own prefix")

    name = f"rehearsal-{int(time.time())}"
    flow_run = stack.click(name, options.steps)
    check_boundary(stack)
    stack.log("a training process can read neither its flow's secrets nor HF_TOKEN")
    stack.finish(flow_run, list(KILL_ORDER))
    shards_before = shards(stack)
    stack.compose("rm", "--stop", "--force", "postgres", "server", "bootstrap", "data", "train")
    project = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["name"]
    subprocess.run(["docker", "volume", "rm", f"{project}_postgres"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(up, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stack.log("up again with a new database")
    restarted_at = time.monotonic()
    stack.finish(stack.click(name, options.steps), [])
    assert shards(stack) == shards_before
    stack.log(f"the same run took {time.monotonic() - restarted_at:.0f} s: already done, no shard was written")

    stack.compose("down", "--volumes")
    for kind in ("ps --all --quiet", "volume ls --quiet", "network ls --quiet"):
        argv = ["docker", *kind.split(), "--filter", f"label=com.docker.compose.project={project}"]
        assert not subprocess.run(argv, check=True, capture_output=True, text=True).stdout, kind
    stack.log("down, nothing is left")


if __name__ == "__main__":
    main()
