"""Real S3 servers as child processes: SeaweedFS from its wheel, and MinIO if `make minio` has built it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import boto3
from botocore.config import Config

from tests.polling import poll
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
BUCKET = "contract"
ACCESS_KEY, SECRET = "tests-access-key", secrets.token_urlsafe(24)
READER_KEY, READER_SECRET = "tests-reader-key", secrets.token_urlsafe(24)  # SeaweedFS only: may read and list


@dataclass
class Server:
    """A running server: its endpoint and its process."""

    endpoint: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a client of this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self) -> None:
        self.process.kill()  # a graceful stop of SeaweedFS takes 15 s, and no data is kept
        self.process.wait()


def minio_program() -> str | None:
    """The MinIO server that `make minio` built, or that is on PATH."""
    return shutil.which("minio", path=f"{ROOT / '.tools'}{os.pathsep}{os.environ['PATH']}")


def start(kind: str, folder: Path) -> Server:
    """Start a server that stores its files in the folder, and create the bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    server = {"seaweedfs": _seaweedfs, "minio": _minio}[kind](folder)
    client = boto3.Session().client(
        "s3", endpoint_url=server.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET,
        region_name="us-east-1", config=Config(retries={"mode": "standard", "total_max_attempts": 10}),
    )  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    client.close()
    return server


def _minio(folder: Path) -> Server:
    program, port = minio_program(), free_port()
    assert program is not None, "make minio"
    argv = [program, "server", str(folder / "objects"), "--address", f"127.0.0.1:{port}", "--quiet"]
    settings = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"}
    return _started(argv, settings, folder, port, "minio/health/ready")


def _seaweedfs(folder: Path) -> Server:
    identities = [
        {
            "name": "root",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    ports = {name: _port_with_grpc() for name in ("master", "volume", "filer", "s3")}
    weed = Path(sys.executable).with_name("weed")
    argv = [
        str(weed), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        f"-s3.config={folder / 'identities.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false",
        "-master.telemetry=false", "-volume.max=400", "-master.volumeSizeLimitMB=100",  # a bucket takes 7 volumes
    ]  # fmt: skip
    return _started(argv, {}, folder, ports["s3"], "healthz")


def _port_with_grpc() -> int:
    """A free port p for which p + 10,000, SeaweedFS's gRPC port, is free too."""
    while True:
        port = free_port()
        with socket.socket() as other:
            try:
                other.bind(("127.0.0.1", port + 10_000))
                return port
            except (OSError, OverflowError):
                continue


def _started(argv: list[str], settings: dict[str, str], folder: Path, port: int, page: str) -> Server:
    """Start the process and wait until it serves the page."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(argv, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process)

    def serves() -> bool:
        assert process.poll() is None, "the server has ended"
        with suppress(OSError), urlopen(f"{server.endpoint}/{page}", timeout=2):  # noqa: S310  # http on this host
            return True
        return False

    try:
        poll(serves, every_seconds=0.1)
    except AssertionError:
        server.stop()
        raise AssertionError((folder / "server.log").read_text()[-2000:]) from None
    return server
