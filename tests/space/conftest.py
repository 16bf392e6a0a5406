import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "space_app"))


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """Address of a running Space with a tiny pipeline, its process and its log."""
    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HOME": str(folder / "hub"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "space_app")),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)  # the Space is nobody on the Hub of the tests
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "serve_tiny.py"), str(folder)],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        process.url, process.log = url, log
        yield process
    finally:
        process.terminate()
        process.wait(20)
