"""deploy/kubernetes.yaml against the schemas that Kubernetes publishes, and what the words of its pods do."""

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
from tests.model.training_runs import kill_all, until

TEXT = (Path(__file__).parents[3] / "deploy" / "kubernetes.yaml").read_text()
SERVICE, JOB = yaml.safe_load_all(TEXT)
SPEC, POD = JOB["spec"], JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
FIRST, _ = test_nodes.ADDRESSES
hosts = test_nodes.hosts


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_it_is_what_the_schemas_say_and_a_misspelt_field_is_refused(version: str) -> None:
    for document in (SERVICE, JOB):
        kubernetes_validate.validate(document, version, strict=True)
    for name in ("completionMode", "onExitCodes", "subdomain", "runAsNonRoot", "envFrom", "drop", "sizeLimit"):
        _, misspelt = yaml.safe_load_all(re.sub(rf"\b{name}:", f"{name}s:", TEXT))
        with pytest.raises(kubernetes_validate.ValidationError, match=name):
            kubernetes_validate.validate(misspelt, version, strict=True)


def test_pods_are_numbered_and_find_the_first_one_by_its_name() -> None:
    assert (SPEC["completionMode"], SPEC["completions"]) == ("Indexed", SPEC["parallelism"])
    assert (SERVICE["spec"]["clusterIP"], SERVICE["spec"]["publishNotReadyAddresses"]) == ("None", True)
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert POD["subdomain"] == service
    port = SERVICE["spec"]["ports"][0]["port"]
    assert re.findall(r"resources\.rendezvous=(\S+)", TEXT) == [f"{job}-0.{service}:{port}"]
    assert re.findall(r"resources\.nodes=(\S+)", TEXT) == [str(SPEC["completions"])]


def test_exit_code_2_fails_the_job_and_any_other_is_tried_again() -> None:
    fail, ignore = SPEC["podFailurePolicy"]["rules"]
    codes = {"containerName": CONTAINER["name"], "operator": "In", "values": [2]}
    assert fail == {"action": "FailJob", "onExitCodes": codes}
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (POD["restartPolicy"], SPEC["podReplacementPolicy"], SPEC["maxFailedIndexes"]) == ("Never", "Failed", 0)
    assert POD["terminationGracePeriodSeconds"] >= ResourcesConfig().unsaved_minutes * 60 + 30


def test_nothing_runs_as_root_or_writes_but_where_it_may_and_no_secret_is_written_down() -> None:
    assert (POD["automountServiceAccountToken"], "initContainers" in POD) == (False, False)
    person = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    assert POD["securityContext"] == POD["securityContext"] | person
    own = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert CONTAINER["securityContext"] == own
    variables = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}
    folders = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert folders == {variables.pop("HOME"), "/tmp", "/dev/shm"}  # noqa: S108  # in the pod
    assert set(variables) == {"POD_IP"}
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": "gpt2-store"}}]
    assert not re.search(r"kind: Secret|AWS_\w+ *[=:] *\w", TEXT)


@pytest.fixture
def words(tmp_path: Path, source: str, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What each pod of a training of 100 steps runs, on so many hosts."""
    place = (f"resources.nodes={request.param}", f"resources.rendezvous={FIRST}:29500")
    steps = ("train.max_steps=100", "train.checkpoint_every_steps=50", "train.validate_every_steps=0")
    config = tiny_config(str(tmp_path / "store"), source, *place, *steps)
    store = open_store(config.store_url, create=True)
    key = put_job(store, training_job(pin_run(store, config, build_dataset(config).digest, None)))
    yield [sys.executable, *CONTAINER["command"][1:], config.store_url, key]
    kill_all(store, key)


def start(log: Path, words: list[str], index: int = 0) -> subprocess.Popen[bytes]:
    own = {"JOB_COMPLETION_INDEX": str(index), "POD_IP": FIRST, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(words, stdout=out, stderr=out, env=os.environ | own)


@pytest.mark.parametrize("words", [1], indirect=True)
def test_a_pod_succeeds_at_the_last_step_only(tmp_path: Path, words: list[str]) -> None:
    pod = start(log := tmp_path / "log", words)
    until(lambda: "step      2/" in log.read_text(), "no step was made")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=60) == 1, log.read_text()
    assert 2 <= checkpoints(open_store(words[-2]), "tiny")[-1].step < 100
    assert start(log, words).wait(timeout=120) == 0, log.read_text()
    assert start(log, [*words[:-1], "runs/tiny/jobs/none.json"]).wait(timeout=60) == 2, log.read_text()


@pytest.mark.full
@pytest.mark.parametrize("words", [2], indirect=True)
def test_two_pods_meet_again_when_the_first_one_has_died(tmp_path: Path, words: list[str], hosts: list[str]) -> None:
    logs = [tmp_path / host for host in hosts]
    second, first = (start(logs[n], ["ip", "netns", "exec", hosts[n], *words], n) for n in (1, 0))
    until(lambda: "step      6/" in "".join(log.read_text() for log in logs), "no step was made")
    for pid in subprocess.check_output(["ip", "netns", "pids", hosts[0]], text=True).split():
        os.kill(int(pid), signal.SIGKILL)
    first.wait()
    until(lambda: second.poll() is not None or "error: resources.rendezvous" in logs[1].read_text(), "it stays")
    assert second.poll() in (1, None)  # its rank met the end first, or its launcher did: then it waits for the next one
    again = [start(logs[n], ["ip", "netns", "exec", hosts[n], *words], n) for n in range(1 + (second.poll() == 1))]
    assert {pod.wait(timeout=120) for pod in again} == {0}, [log.read_text() for log in logs]
    assert second.wait(timeout=120) == (1 if len(again) == 2 else 0), logs[1].read_text()
