"""The doctor says of each kind of store what is wrong with it and what to do, and never a secret."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.inspection.doctor import Verdict, examine
from storage.stores import retries
from tests import servers
from tests.conftest import S3Url
from tests.dishonest import dishonest_server
from tests.flows.client import run_gpt2

OF_STORE = ["store", "conditions", "checksums", "clock"]


def of_store(url: str) -> list[Verdict]:
    return [verdict for verdict in examine(url) if verdict.what in OF_STORE]


def doctor(url: str, folder: Path) -> tuple[int, str]:
    """Exit code and output, in which no line is broken by a column's end."""
    code, said = run_gpt2("doctor", "--set", f"store_url={url}", cwd=folder)
    return code, "".join(said.split())


@pytest.mark.parametrize("kind", ["folder", "seaweedfs"])
def test_a_store_that_is_well_gets_an_ok_for_each_thing(kind: str, tmp_path: Path, s3_url: S3Url) -> None:
    url = str(tmp_path / "store") if kind == "folder" else s3_url(kind)
    found = of_store(url)
    assert [(verdict.what, verdict.well) for verdict in found] == [(what, True) for what in OF_STORE]
    assert url in found[0].found
    code, said = doctor(url, tmp_path)
    assert code == 0, said
    assert servers.SECRET not in said


Breaking = Callable[[pytest.MonkeyPatch, str], str]


def wrong_secret(patch: pytest.MonkeyPatch, url: str) -> str:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "not-" + servers.SECRET)
    return url


def unknown_key(patch: pytest.MonkeyPatch, url: str) -> str:
    patch.setenv("AWS_ACCESS_KEY_ID", "nobody-knows-me")
    return url


def no_credentials(patch: pytest.MonkeyPatch, url: str) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    return url


BROKEN: dict[str, tuple[Breaking, list[str]]] = {
    "wrong secret": (wrong_secret, ["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"]),
    "unknown key": (unknown_key, ["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
    "no credentials": (no_credentials, ["no credentials", "AWS_ACCESS_KEY_ID"]),
    "no bucket": (lambda _, url: url.replace(servers.BUCKET, "nowhere"), ["NoSuchBucket", "store_url"]),
    "a secret in the URL": (lambda _, url: url.replace("//", f"//key:{servers.SECRET}@"), ["AWS_SECRET_ACCESS_KEY"]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_store_that_refuses_is_bad_with_a_remedy_and_without_the_secret(
    broken: str, tmp_path: Path, s3_url: S3Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, facts = BROKEN[broken]
    code, said = doctor(act(monkeypatch, s3_url("seaweedfs")), tmp_path)
    assert (code, "bad" in said, "Traceback" in said) == (1, True, False), said
    for fact in facts:
        assert fact.replace(" ", "") in said
    assert servers.SECRET not in said


def test_a_server_that_cannot_be_reached_is_bad_when_patience_ends(
    s3_url: S3Url, monkeypatch: pytest.MonkeyPatch, forget_client: Callable[[], None]
) -> None:
    url = s3_url("seaweedfs")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{servers.free_port()}")
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.5)
    forget_client()
    (found,) = of_store(url)
    assert not found.well
    assert "AWS_ENDPOINT_URL" in found.found
    assert servers.SECRET not in found.found


def test_a_server_that_ignores_conditions_is_bad(
    tmp_path: Path, s3_url: S3Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_url("seaweedfs")
    with dishonest_server() as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        code, said = doctor(url, tmp_path)
    assert (code, "conditionalwrites" in said, "SeaweedFS4.48" in said) == (1, True, True), said
    assert servers.SECRET not in said


def test_the_secret_would_be_seen_where_it_is_said(tmp_path: Path) -> None:
    """The guard of the tests above: a word of the URL is in the output."""
    assert servers.SECRET in doctor(f"gs{servers.SECRET}://bucket", tmp_path)[1]
