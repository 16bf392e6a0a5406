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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """A process that serves the Space, once for each tiny pipeline: its addresses by model, and its log."""
    folder = tmp_path_factory.mktemp("space")
    ports = {name: free_port() for name in ("wan", "sdxl", "sample")}
    environment = os.environ | {
        "GRADIO_ANALYTICS_ENABLED": "False", "HF_HOME": str(folder / "hub"), "TMPDIR": str(folder),
        "GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "space_app")),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)  # the Space is nobody on the Hub of the tests
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, str(Path(__file__).parent / "serve_tiny.py"), str(folder),
                *(f"{name}={port}" for name, port in ports.items()),
            ],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(urls["sample"], timeout=5).close()  # the last to start
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        process.url, process.urls, process.log, process.folder = urls["sample"], urls, log, folder
        yield process
    finally:
        process.terminate()
        process.wait(20)
