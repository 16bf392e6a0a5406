import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from pipelines import make_pipeline

CAPTIONS = ("a red cat", "a blue dog in the grass")
CLASSES = ("cat", "dog")


def write_photos(folder: Path, count: int = 4, frames: int = 1) -> Path:
    """Images, or animations of several frames, and a metadata.jsonl with captions and classes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pictures = [Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype="uint8")) for _ in range(frames)]
        name = f"{i}.gif" if frames > 1 else f"{i}.png"
        pictures[0].save(folder / name, **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}))
        lines.append(json.dumps({"file_name": name, "text": CAPTIONS[i % 2], "label": CLASSES[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def own_accelerator():
    """Accelerate's settings are one per process; a test gets its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "videos", frames=6)


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """Folder of a tiny pipeline by name."""
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("pipelines") / name
            make_pipeline(name).save_pretrained(made[name])
        return str(made[name])

    return save
