import numpy as np
import pytest
import torch
from PIL import Image

from dalle2.images import make_file_stem, make_unique_stems, save_image, save_jpeg, to_uint8


def test_bytes_are_clamped_and_do_not_wrap_around():
    assert to_uint8(torch.tensor([-0.09, 0.0, 0.5, 1.0, 1.08])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("caption", [
    "a/b\\c", "..", "  . ", "x" * 300, "ünï" * 90, "con", "a\nb\tc", 'q: "what?" <b>|*', "NUL.x",
    "雪" * 100])
def test_any_caption_becomes_a_safe_file_name(caption, tmp_path):
    stem = make_file_stem(caption)
    assert stem and len(stem.encode()) <= 121 and stem == stem.strip(" .")
    assert not set(stem) & set('<>:"/\\|?*\n\t')
    save_jpeg(torch.rand(3, 8, 8), tmp_path / f"{stem}.jpg")
    assert [p.name for p in tmp_path.iterdir()] == [f"{stem}.jpg"]


def test_names_are_unique_even_where_case_does_not_count():
    stems = make_unique_stems(["a dog", "A dog", "a dog", "a dog (2)", "a cat"])
    assert len({s.casefold() for s in stems}) == 5 and stems[0] == "a dog" and stems[4] == "a cat"
    taken = {"a b": "a/b", "a b (2)": "a b"}
    assert make_unique_stems(["a b", "a?b", "a/b"], taken) == ["a b (2)", "a b (3)", "a b"]


def test_stripes_of_one_pixel_keep_their_colors(tmp_path):
    """Subsampled, as Pillow's JPEGs are, red and blue stripes are violet."""
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[0, :, ::2] = stripes[2, :, 1::2] = 200
    for name, error in (("x.jpg", 12), ("x.png", 0)):
        save_image(stripes, tmp_path / name)
        saved = torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
        assert (saved.int() - stripes.int()).abs().max() <= error
