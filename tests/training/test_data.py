import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_sla import SLADataError
from diffusers_sla.training.data import Example, Order, encode_latents, load_pixels, mix, scan_folder


def write(folder, *entries):
    (folder / "metadata.jsonl").write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))


def test_captions_and_classes_come_from_the_metadata(photos):
    examples = scan_folder(photos)
    assert [e.path.name for e in examples] == ["0.png", "1.png", "2.png", "3.png"]
    assert examples[1].condition == "a blue dog in the grass"
    assert [e.condition for e in scan_folder(photos, "label")] == ["cat", "dog", "cat", "dog"]
    assert scan_folder(photos, "no such column")[0].condition == "cat"  # falls to "label"


def test_without_metadata_a_folder_is_a_class(tmp_path):
    for name in ("cat/1.png", "dog/2.JPG", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [(e.path.name, e.condition) for e in scan_folder(tmp_path)] == [("1.png", "cat"), ("2.JPG", "dog")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "has no file to train on"),
        (("{",), "line 1 is not JSON"),
        (({"file_name": "a.png", "text": "x"}, {"text": "x"}), 'line 2 has no "file_name"'),
        (({"file_name": "a.png"},), 'neither a caption under "text" nor a "label"'),
        (({"file_name": "a.png", "text": True},), "neither a caption"),
        (({"file_name": "missing.png", "text": "x"},), r"there is no file .*missing\.png"),
    ],
)
def test_wrong_metadata_names_the_line(tmp_path, entries, message):
    (tmp_path / "a.png").touch()
    write(tmp_path, *entries)
    with pytest.raises(SLADataError, match=message):
        scan_folder(tmp_path)


def test_a_folder_without_captions_or_classes_is_refused(tmp_path):
    with pytest.raises(SLADataError, match="there is no folder"):
        scan_folder(tmp_path / "none")
    (tmp_path / "a.png").touch()
    with pytest.raises(SLADataError, match=r"1 files but neither a metadata\.jsonl"):
        scan_folder(tmp_path)


def test_pixels_fill_the_size_from_the_middle(tmp_path, videos):
    pixels = np.zeros((20, 40, 3), dtype="uint8")
    pixels[:, 10:30] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_pixels(tmp_path / "a.png", 20, 20, None)
    assert loaded.shape == (3, 20, 20)
    assert (loaded == 1).all()
    video = load_pixels(videos / "0.gif", 16, 24, 5)
    assert video.shape == (3, 5, 16, 24)
    assert not torch.equal(video[:, 0], video[:, 1])
    with pytest.raises(ValueError, match="6 frames, 9 are needed"):
        load_pixels(videos / "0.gif", 16, 24, 9)


def encode(pixels):
    return pixels[:, :, ::2, ::2], torch.ones_like(pixels[:, :, ::2, ::2])


def test_what_cannot_be_read_is_named_and_skipped(tmp_path, photos):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((photos / "0.png").read_bytes()[:2000])
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    names = ["text.png", "cut.png", "other.safetensors"]
    examples = [Example(photos / "0.png", "x"), *(Example(tmp_path / name, "x") for name in names)]
    encoded, skipped = encode_latents(examples, encode, tmp_path / "c", height=8, width=8, num_frames=None, key="m")
    assert [e.path.name for e, _ in encoded] == ["0.png"]
    assert [s.path.name for s in skipped] == names
    assert "cannot identify" in skipped[0].reason
    assert "no tensor 'latents', but other" in skipped[2].reason


def test_latents_are_encoded_once_and_made_ones_are_taken(tmp_path, photos):
    save_file({"latents": torch.full((4, 2, 2), 3.0)}, tmp_path / "a.safetensors")
    examples = [Example(photos / "0.png", "x"), Example(tmp_path / "a.safetensors", "x")]
    calls = []

    def counted(pixels):
        calls.append(pixels.shape)
        return encode(pixels)

    for _ in range(2):
        encoded, skipped = encode_latents(
            examples, counted, tmp_path / "c", height=8, width=8, num_frames=None, key=""
        )
    assert calls == [(1, 3, 8, 8)]
    assert not skipped
    image, latents = (torch.load(path, weights_only=True) for _, path in encoded)
    assert torch.equal(image["mean"], load_pixels(photos / "0.png", 8, 8, None)[:, ::2, ::2])
    assert image["std"].shape == (3, 4, 4)
    assert torch.equal(latents["mean"], torch.full((4, 2, 2), 3.0))
    encode_latents(examples, counted, tmp_path / "c", height=6, width=8, num_frames=None, key="")
    assert calls[1:] == [(1, 3, 6, 8)]


def test_the_order_is_a_permutation_an_epoch_whoever_asks():
    order = Order(5, 2, seed=1)
    seen = [i for step in range(5) for i in order.indices(step)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]
    assert Order(5, 2, seed=1).indices(3) == order.indices(3)
    assert [Order(5, 2, seed=s).indices(0) for s in range(5)] != [order.indices(0)] * 5
    both = [Order(5, 1, seed=1, rank=rank, processes=2).indices(1)[0] for rank in (0, 1)]
    assert both == order.indices(1)  # two processes see together what one sees with twice the batch


def test_seeds_mix_without_meeting():
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900
    assert mix(1, 2) == 6747357512026751
