"""The wheel in a fresh environment, in a folder with a user's own modules `model`, `storage` and `flows`."""

import os
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from model.config_file import presets
from model.form import settings_beyond
from storage.stores.opening import open_store
from tests.flows.deployments import deployment, ended, start
from tests.making import document, tiny_config, write_parquet
from tests.polling import poll
from tests.ports import free_port

pytestmark = pytest.mark.full  # the build downloads its backend

ROOT = Path(__file__).parents[2]
DATA = {
    "flows/pages/card.html", "flows/pages/page.html", "flows/pages/report.html", "flows/pages/report.md.j2",
    "flows/pages/hub_card.md.j2", "flows/platform/prefect.env", "flows/platform/prefect.yaml",
    *(f"model/presets/{name}.toml" for name in presets()),
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with the wheel, whose dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = folder.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return folder / "bin"


@pytest.fixture
def own_modules(tmp_path: Path) -> Path:
    """A folder with source text, and modules that must not be imported in place of ours."""
    for name in ("model.py", "storage.py", "tokenizer.py", "flows/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('a module of the user')\n")
    write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    return tmp_path


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTHON"))}
    return kept | {"DO_NOT_TRACK": "1"}


def gpt2(installed: Path, *argv: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(installed / "gpt2"), *argv], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_packages_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= DATA
    assert not [name for name in names if name.startswith(("tests/", "deploy/"))]


def test_the_wheel_runs_the_pipeline_and_the_platform_among_a_users_own_modules(
    installed: Path, own_modules: Path
) -> None:
    folder = own_modules
    assert "--minutes" in gpt2(installed, "demo", "--help", cwd=folder)
    assert "gpt2-124m" in gpt2(installed, "settings", cwd=folder)
    config = tiny_config("./data", "source", "train.max_steps=4", "resources.processes=2")
    settings = [word for setting in settings_beyond("demo", config) for word in ("--set", setting)]
    port = free_port()
    argv = [str(installed / "gpt2"), "serve", "--config", "demo", "--port", str(port)]
    with subprocess.Popen(argv, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            assert any("one click" in line for line in serving.stdout), serving.poll()
            api = f"http://{(folder / '.gpt2' / 'login').read_text()}@127.0.0.1:{port}/api"
            clicked = start(api, "pretrain", config)
            end = ended(api, clicked)
            assert end["state_name"] == "Completed", end["state"]["message"]
            assert deployment(api, "demo")["enforce_parameter_schema"]
            summary = gpt2(installed, "pretrain", "mine", "--config", "demo", *settings, cwd=folder)
            assert "4 steps" in summary
        finally:
            serving.send_signal(signal.SIGINT)
    assert gpt2(installed, "generate", "mine", "--prompt", "The model", cwd=folder).startswith("The model")
    store = open_store(str(folder / "data"))
    poll(lambda: any(store.list("runs/tiny/report.html")))
