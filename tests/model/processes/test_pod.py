"""deploy/kubernetes.yaml against the schemas that Kubernetes publishes, and the command that its pods run."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from model.checkpoints.records import checkpoints
from model.config import ResourcesConfig
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.stores.opening import open_store
from tests.making import build_dataset, tiny_config
from tests.model.processes import test_nodes
from tests.model.training_runs import kill_all
from tests.polling import poll

TEXT = (Path(__file__).parents[3] / "deploy" / "kubernetes.yaml").read_text()
SERVICE, JOB = yaml.safe_load_all(TEXT)
SPEC, POD = JOB["spec"], JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
FIRST, _ = test_nodes.ADDRESSES
hosts = test_nodes.hosts


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_the_manifest_matches_the_schemas_and_a_misspelt_field_is_refused(version: str) -> None:
    for document in (SERVICE, JOB):
        kubernetes_validate.validate(document, version, strict=True)
    for name in ("completionMode", "onExitCodes", "subdomain", "runAsNonRoot", "envFrom", "drop", "sizeLimit"):
        _, misspelt = yaml.safe_load_all(re.sub(rf"\b{name}:", f"{name}s:", TEXT))
        with pytest.raises(kubernetes_validate.ValidationError, match=name):
            kubernetes_validate.validate(misspelt, version, strict=True)


def test_pods_are_numbered_and_find_the_first_pod_by_its_name() -> None:
    assert (SPEC["completionMode"], SPEC["completions"]) == ("Indexed", SPEC["parallelism"])
    assert (SERVICE["spec"]["clusterIP"], SERVICE["spec"]["publishNotReadyAddresses"]) == ("None", True)
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert POD["subdomain"] == service
    port = SERVICE["spec"]["ports"][0]["port"]
    assert re.findall(r"resources\.rendezvous=(\S+)", TEXT) == [f"{job}-0.{service}:{port}"]
    assert re.findall(r"resources\.nodes=(\S+)", TEXT) == [str(SPEC["completions"])]


def test_exit_code_2_fails_the_job_and_any_other_is_retried() -> None:
    fail, ignore = SPEC["podFailurePolicy"]["rules"]
    codes = {"containerName": CONTAINER["name"], "operator": "In", "values": [2]}
    assert fail == {"action": "FailJob", "onExitCodes": codes}
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (POD["restartPolicy"], SPEC["podReplacementPolicy"], SPEC["maxFailedIndexes"]) == ("Never", "Failed", 0)
    assert POD["terminationGracePeriodSeconds"] >= ResourcesConfig().unsaved_minutes * 60 + 30


def test_nothing_runs_as_root_or_writes_outside_its_volumes_and_no_secret_is_in_the_file() -> None:
    assert (POD["automountServiceAccountToken"], "initContainers" in POD) == (False, False)
    unprivileged = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    assert POD["securityContext"] == POD["securityContext"] | unprivileged
    locked_down = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert CONTAINER["securityContext"] == locked_down
    variables = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}
    folders = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert folders == {variables.pop("HOME"), "/tmp", "/dev/shm"}  # noqa: S108  # in the pod
    assert set(variables) == {"POD_IP"}
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": "gpt2-store"}}]
    assert not re.search(r"kind: Secret|AWS_\w+ *[=:] *\w", TEXT)


@pytest.fixture
def argv(tmp_path: Path, source: str, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The command of each pod of a training of 100 steps on request.param hosts."""
    hosts = (f"resources.nodes={request.param}", f"resources.rendezvous={FIRST}:29500")
    steps = ("train.max_steps=100", "train.checkpoint_every_steps=50", "train.validate_every_steps=0")
    config = tiny_config(str(tmp_path / "store"), source, *hosts, *steps)
    store = open_store(config.store_url, create=True)
    key = put_job(store, training_job(pin_run(store, config, build_dataset(config).digest, None)))
    yield [sys.executable, *CONTAINER["command"][1:], config.store_url, key]
    kill_all(store, key)


def start(log: Path, argv: list[str], index: int = 0) -> subprocess.Popen[bytes]:
    variables = {
        "JOB_COMPLETION_INDEX": str(index),
        "POD_IP": FIRST,
        "GLOO_SOCKET_IFNAME": "cable",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out, env=os.environ | variables)


@pytest.mark.full
@pytest.mark.parametrize("argv", [1], indirect=True)
def test_a_pod_succeeds_at_the_last_step_only(tmp_path: Path, argv: list[str]) -> None:
    pod = start(log := tmp_path / "log", argv)
    poll(lambda: "step      2/" in log.read_text(), failure="no step was run")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait() == 1, log.read_text()
    assert 2 <= checkpoints(open_store(argv[-2]), "tiny")[-1].step < 100
    assert start(log, argv).wait() == 0, log.read_text()
    assert start(log, [*argv[:-1], "runs/tiny/jobs/none.json"]).wait() == 2, log.read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("argv", [2], indirect=True)
def test_two_pods_resume_after_the_first_dies(tmp_path: Path, argv: list[str], hosts: list[str]) -> None:
    logs = [tmp_path / host for host in hosts]
    pods = [start(logs[n], ["ip", "netns", "exec", hosts[n], *argv], n) for n in (0, 1)]
    poll(lambda: "step      6/" in "".join(log.read_text() for log in logs), failure="no step was run")
    test_nodes.kill_host(hosts[0])
    assert pods[0].wait() != 0
    assert pods[1].wait() == 1, logs[1].read_text()  # Kubernetes restarts both
    pods = [start(logs[n], ["ip", "netns", "exec", hosts[n], *argv], n) for n in (1, 0)]
    assert [pod.wait() for pod in pods] == [0, 0], [log.read_text() for log in logs]
