import numpy as np
import train_sample
from PIL import Image

from diffusers_sla.training.data import scan_folder


def test_crops_are_a_folder_that_finetune_reads_and_show_no_held_out_pixel(tmp_path):
    photo = np.zeros((100, 150, 3), "uint8")
    photo[:, 120:] = 255  # the right fifth
    np.savez(tmp_path / "photos.npz", cat=photo, dog=photo)
    train_sample.write_crops(tmp_path / "photos.npz", tmp_path / "crops", 3)
    examples = scan_folder(tmp_path / "crops")
    assert [example.condition for example in examples] == ["cat"] * 3 + ["dog"] * 3
    for example in examples:
        crop = Image.open(example.path)
        assert crop.size == (256, 256)
        assert np.asarray(crop).max() == 0
