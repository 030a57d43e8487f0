"""The doctor names what is wrong with a store or an installation and what to do, and never prints a secret."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest import MonkeyPatch

from flows.inspection.doctor import Verdict, examine
from storage.stores import retries
from tests import servers
from tests.conftest import S3Url
from tests.dishonest import dishonest_server
from tests.flows.in_process import Gpt2
from tests.ports import free_port

STORE_CHECKS = ["store", "conditions", "checksums", "clock"]


def store_verdicts(url: str) -> list[Verdict]:
    return [verdict for verdict in examine(url) if verdict.check in STORE_CHECKS]


Doctor = Callable[[str], tuple[int, str]]


@pytest.fixture
def doctor(gpt2: Gpt2, tmp_path: Path, forget_client: Callable[[], None]) -> Doctor:
    """A function that examines a store URL. Returns the exit code and the output without white space."""

    def run(url: str) -> tuple[int, str]:
        forget_client()  # a test may have changed the credentials
        outcome = gpt2("doctor", "--set", f"store_url={url}", cwd=tmp_path)
        return outcome.code, "".join(outcome.text.split())

    return run


@pytest.mark.parametrize("kind", ["folder", "seaweedfs"])
def test_a_good_store_gets_an_ok_for_each_check(kind: str, doctor: Doctor, tmp_path: Path, s3_url: S3Url) -> None:
    url = str(tmp_path / "store") if kind == "folder" else s3_url(kind)
    verdicts = store_verdicts(url)
    assert [(verdict.check, verdict.ok) for verdict in verdicts] == [(check, True) for check in STORE_CHECKS]
    assert url in verdicts[0].detail
    code, text = doctor(url)
    assert code == 0, text
    assert servers.SECRET not in text


Breaking = Callable[[MonkeyPatch, str], str]


def wrong_secret(patch: MonkeyPatch, url: str) -> str:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "not-" + servers.SECRET)
    return url


def unknown_key(patch: MonkeyPatch, url: str) -> str:
    patch.setenv("AWS_ACCESS_KEY_ID", "nobody-knows-me")
    return url


def no_credentials(patch: MonkeyPatch, url: str) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    return url


BROKEN: dict[str, tuple[Breaking, list[str]]] = {
    "wrong secret": (wrong_secret, ["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"]),
    "unknown key": (unknown_key, ["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
    "no credentials": (no_credentials, ["no credentials", "AWS_ACCESS_KEY_ID"]),
    "no bucket": (lambda _, url: url.replace(servers.BUCKET, "nowhere"), ["NoSuchBucket", "correct its name"]),
    "a secret in the URL": (lambda _, url: url.replace("//", f"//key:{servers.SECRET}@"), ["AWS_SECRET_ACCESS_KEY"]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_store_that_refuses_is_bad_with_a_remedy_and_without_the_secret(
    broken: str, doctor: Doctor, s3_url: S3Url, monkeypatch: MonkeyPatch
) -> None:
    break_access, facts = BROKEN[broken]
    code, text = doctor(break_access(monkeypatch, s3_url("seaweedfs")))
    assert (code, "bad" in text) == (1, True), text
    for fact in facts:
        assert fact.replace(" ", "") in text
    assert servers.SECRET not in text


def test_an_unreachable_server_is_bad_after_the_deadline(
    s3_url: S3Url, monkeypatch: MonkeyPatch, forget_client: Callable[[], None]
) -> None:
    url = s3_url("seaweedfs")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.5)
    forget_client()
    [verdict] = store_verdicts(url)
    assert not verdict.ok
    assert "AWS_ENDPOINT_URL" in verdict.detail
    assert servers.SECRET not in verdict.detail


def test_a_server_that_ignores_conditions_is_bad(doctor: Doctor, s3_url: S3Url, monkeypatch: MonkeyPatch) -> None:
    url = s3_url("seaweedfs")
    with dishonest_server() as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        code, text = doctor(url)
    assert (code, "conditionalwrites" in text, "SeaweedFS4.48" in text) == (1, True, True), text
    assert servers.SECRET not in text


def test_a_printed_secret_would_be_detected(doctor: Doctor) -> None:
    """The control of the tests above: a word of the URL is in the output."""
    assert servers.SECRET in doctor(f"gs{servers.SECRET}://bucket")[1]
