"""An S3 store refuses dishonest servers, plain http and unknown credentials. No message contains a secret."""

import os
import re
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from storage import keys
from storage.errors import StorageError, StoreUnavailable, StoreUnusable
from storage.stores import retries, s3_client
from storage.stores.opening import open_store
from tests import servers
from tests.conftest import S3Url
from tests.dishonest import dishonest_server
from tests.storage.store_kinds import SERVERS, each, listed

Forget = Callable[[], None]


@pytest.fixture(params=each(SERVERS))
def url(request: pytest.FixtureRequest, s3_url: S3Url) -> str:
    return s3_url(request.param)


# Dishonest servers

STORE = f"s3://{servers.BUCKET}/x"
StartDishonest = Callable[..., AbstractContextManager[tuple[str, dict[str, bytes]]]]


@pytest.fixture
def dishonest(s3_url: S3Url, monkeypatch: pytest.MonkeyPatch, forget_client: Forget) -> StartDishonest:
    """A function that starts a dishonest server with an empty `STORE` and points this process to it."""

    @contextmanager
    def started(tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
        s3_url("seaweedfs")  # some credentials
        with dishonest_server(tls) as (endpoint, objects):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            forget_client()
            objects[f"/{servers.BUCKET}/x/{keys.FORMAT}"] = b'{"layout": 1}'
            yield endpoint, objects

    return started


def test_a_server_that_ignores_conditions_is_refused_and_nothing_is_written(dishonest: StartDishonest) -> None:
    with dishonest() as (endpoint, objects):
        before = dict(objects)
        store = open_store(STORE)
        writes: list[Callable[[], object]] = [
            store.probe,
            lambda: store.put_new("new", b"1"),
            lambda: store.swap("pointer", b"1", None),
        ]
        for write in writes:
            with pytest.raises(StoreUnusable) as caught:
                write()
            for fact in ("Dishonest", endpoint, "create-only put and compare-and-swap", "SeaweedFS", "MinIO", "folder"):
                assert fact in str(caught.value)
        assert objects == before


def test_a_server_that_ignores_ranges_returns_no_wrong_bytes(
    dishonest: StartDishonest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.3)
    with dishonest() as (_, objects):
        objects[f"/{servers.BUCKET}/x/body"] = b"0123456789"
        store = open_store(STORE)
        assert store.read("body").body == b"0123456789"
        with pytest.raises(StoreUnavailable, match="ignored the range"):
            store.read_range("body", 4, 2)


def test_an_honest_server_is_probed_once_a_process(url: str) -> None:
    store = open_store(url, create=True)
    server, refuses_damaged = store.probe()
    assert refuses_damaged
    assert "127.0.0.1" in server
    store.put_new("key", b"1")
    assert listed(store, "") == [keys.FORMAT, "key"]


def test_a_certificate_of_an_unknown_authority_is_reported_at_once_and_the_remedy_works(
    dishonest: StartDishonest, monkeypatch: pytest.MonkeyPatch, forget_client: Forget, tmp_path: Path
) -> None:
    with dishonest(own_certificate(tmp_path / "own.pem")):
        monkeypatch.setattr(retries.time, "sleep", lambda _: pytest.fail("retried"))
        with pytest.raises(StoreUnusable, match="AWS_CA_BUNDLE"):
            open_store(STORE)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "own.pem"))
        forget_client()
        open_store(STORE)


def own_certificate(path: Path) -> ssl.SSLContext:
    """A self-signed certificate for this host, whose public half is written to `path`."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(names, critical=True)
        .sign(key, SHA256())
    )
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret = path.with_suffix(".key")
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, secret)
    return context


# Plain http


@pytest.mark.parametrize("host", ["example.invalid:9000", "127.0.0.1.example.invalid"])
def test_plain_http_to_another_host_needs_an_explicit_scheme(
    url: str, host: str, monkeypatch: pytest.MonkeyPatch, forget_client: Forget
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}")
    monkeypatch.setattr(s3_client, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    forget_client()
    with pytest.raises(StoreUnusable, match=r"https, found http://.*s3\+http://"):
        open_store(url)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):  # it was tried, but no server listens
        open_store(url.replace("s3://", "s3+http://"))


@pytest.mark.parametrize(
    "place", ["s3://key:sekret@bucket/x", "s3://Bucket", "s3://b", "s3://bucket//x", "s3://bucket/../x", "http://key:sekret@bucket/x",
              "s3:key:sekret@bucket/x", "s3:/bucket/x", "s3+http://key:se/kret@bucket"]
)  # fmt: skip
def test_an_invalid_url_is_not_echoed(place: str) -> None:
    with pytest.raises(StoreUnusable, match="store_url") as caught:
        open_store(place)
    assert "kret" not in str(caught.value)


# Settings of AWS


@pytest.mark.parametrize(
    ("variable", "value", "fact"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://key:sekret@127.0.0.1:1", "endpoint"),
        ("AWS_ENDPOINT_URL", "https://key:se/kret@127.0.0.1:1", "endpoint"),
        ("AWS_ENDPOINT_URL_S3", "key:sekret@127.0.0.1:1", "endpoint"),
        ("AWS_ENDPOINT_URL_S3", "127.0.0.1:1", "http"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:sekret", "endpoint"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1/?token=sekret", "endpoint"),
        ("AWS_PROFILE", "nope", "AWS_PROFILE"),
        ("AWS_CONFIG_FILE", "[default]\nsekret\n", "config"),
        ("AWS_SHARED_CREDENTIALS_FILE", "[default]\naws_access_key_id = a\nsekret\n", "credentials"),
        ("AWS_DEFAULTS_MODE", "often", "often"),
        ("AWS_DEFAULT_REGION", "a b", "region"),
        ("AWS_SESSION_TOKEN", "sekret\n", "line break"),
    ],
)
def test_an_invalid_setting_is_reported_at_once_and_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, forget_client: Forget, tmp_path: Path, variable: str, value: str, fact: str
) -> None:
    if variable.endswith("_FILE"):
        (tmp_path / "file").write_text(value)
        value = str(tmp_path / "file")
    for name, valid in servers.Server("http://127.0.0.1:1", None).environment.items():  # type: ignore[arg-type]
        if not (name == "AWS_ENDPOINT_URL_S3" and variable == "AWS_ENDPOINT_URL"):
            monkeypatch.setenv(name, valid)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(retries.time, "sleep", lambda _: pytest.fail("retried"))
    forget_client()
    with pytest.raises(StoreUnusable, match=fact) as caught:
        open_store("s3://bucket/x")
    shown = "".join(traceback.format_exception(caught.value))
    assert "kret" not in shown and servers.SECRET not in shown


@pytest.mark.parametrize("endpoint", ["files.example", "https://key:sekret@files.example"])
def test_a_link_to_an_invalid_endpoint_is_refused_without_a_secret(url: str, endpoint: str) -> None:
    with pytest.raises(StoreUnusable, match="BROWSER_S3_ENDPOINT") as caught:
        open_store(url, create=True).link("key", endpoint)
    assert "sekret" not in "".join(traceback.format_exception(caught.value))


# Credentials


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "sekret-that-is-wrong"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody-we-know"}, "AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, "no credentials.*AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials_are_reported_with_a_remedy_and_without_a_secret(
    url: str, changed: dict[str, str | None], remedy: str, monkeypatch: pytest.MonkeyPatch, forget_client: Forget
) -> None:
    open_store(url, create=True)
    for name, value in changed.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    forget_client()
    with pytest.raises(StoreUnusable, match=remedy) as caught:
        open_store(url)
    shown = "".join(traceback.format_exception(caught.value))
    assert servers.SECRET not in shown and "sekret-that-is-wrong" not in shown


@pytest.mark.parametrize("answer", ["AuthorizationHeaderMalformed", "PermanentRedirect"])
def test_the_region_is_read_from_the_variable_in_the_remedy(
    answer: str, monkeypatch: pytest.MonkeyPatch, forget_client: Forget
) -> None:
    (variable,) = re.findall(r"AWS_\w+", s3_client.REMEDIES[answer])
    monkeypatch.setenv(variable, "eu-north-1")
    forget_client()
    assert s3_client.own_client().meta.region_name == "eu-north-1"


def test_a_read_only_identity_can_read_and_is_refused_writes(
    s3_url: S3Url, monkeypatch: pytest.MonkeyPatch, forget_client: Forget
) -> None:
    url = s3_url("seaweedfs")
    open_store(url, create=True).put_new("key", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.READER_SECRET)
    forget_client()
    store = open_store(url)
    assert store.read("key").body == b"1"
    for write in (lambda: store.put_new("new", b"1"), lambda: store.delete("key"), store.probe):
        with pytest.raises(StoreUnusable, match=r"AccessDenied.*permission"):
            write()
    assert listed(store, "") == [keys.FORMAT, "key"]


def test_a_missing_bucket_is_named_with_the_command_that_creates_it(url: str) -> None:
    for create in (False, True):
        with pytest.raises(StoreUnusable, match=r"no-such-bucket.*aws s3 mb"):
            open_store("s3://no-such-bucket/x", create=create)


# One client per process, without the transfer manager


def test_a_client_is_not_shared_across_a_fork(url: str) -> None:
    store = open_store(url, create=True)
    parents_client = id(s3_client.own_client())
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os._exit(0 if id(s3_client.own_client()) != parents_client and store.read(keys.FORMAT).body else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_every_put_signs_its_sha256_and_bypasses_the_transfer_manager(url: str) -> None:
    """Checks the headers over http and, up to the signature, over https, in a new process."""
    script = f"""
import sys
from storage.stores import s3, s3_client
from storage.stores.opening import open_store
s3.WHOLE_BYTES, s3.PART_BYTES = 6 << 20, 5 << 20
sent = []
s3_client.own_client().meta.events.register("before-send.s3", lambda request, **_: sent.append(request))
store = open_store({url!r}, create=True)
store.put_new("small", b"1")
store.put_new("large", bytes(11 << 20))
store.read("small")
puts = [request for request in sent if request.method == "PUT"]
assert len(puts) > 5
for request in puts:
    assert request.headers["x-amz-checksum-sha256"], request.url
    assert len(request.headers["x-amz-content-sha256"]) == 64, request.headers
    assert "/{servers.BUCKET}/" in request.url
assert not [name for name in sys.modules if "awscrt" in name or name == "s3transfer.crt"]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    secure = f"""
import os
os.environ["AWS_ENDPOINT_URL_S3"] = "https://127.0.0.1:1"
from storage.stores import retries, s3, s3_client
retries.RETRY_SECONDS = 0.0
s3.S3Store.checked_buckets.add(("https://127.0.0.1:1", "{servers.BUCKET}"))
sent = []
s3_client.own_client().meta.events.register("before-send.s3", lambda request, **_: sent.append(request))
try:
    s3.S3Store("{servers.BUCKET}", "x", "s3://x", plain_http=False).put_new("small", b"1")
except Exception as error:
    assert "AWS_ENDPOINT_URL" in str(error), error
assert len(sent) == 1 and sent[0].headers["x-amz-content-sha256"] != b"STREAMING-UNSIGNED-PAYLOAD-TRAILER"
assert sent[0].headers["x-amz-checksum-sha256"] and "x-amz-trailer" not in sent[0].headers
print(sent[0].headers["x-amz-content-sha256"])
"""
    subprocess.run([sys.executable, "-c", secure], check=True)
