import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [480, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutated_state_file_does_harm(count, tmp_path):
    """In a process of its own, for its memory is measured and limited; mutants.py says what it checks."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("mutants.py"), "--count", str(count)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["tried"] >= count
    assert len(found["kinds"]) >= 16
    assert 0 < found["loaded"] < count / 10  # where the damage is in what nobody reads
    assert found["slowest_s"] < 30
