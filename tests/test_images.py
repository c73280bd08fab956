import numpy as np
import pytest
import torch
from PIL import Image

from dalle2.images import (
    augment,
    cut_view,
    make_file_stem,
    make_unique_stems,
    save_image,
    save_jpeg,
    to_uint8,
)
from dalle2.rng import BatchRandom


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


# ----------------------------------------------------------------------------------------------
# random squares


def test_a_view_lies_within_its_photo_and_may_be_mirrored():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)  # each column is its number
    left, right = (cut_view(ramp, [1 - 1e-9, 0.5, place, 0.9], 100) for place in (0, 1 - 1e-9))
    assert torch.equal(left, ramp[:, :, :100]) and torch.equal(right, ramp[:, :, 100:])
    assert torch.equal(cut_view(ramp, [1 - 1e-9, 0.5, 0, 0.1], 100), left.flip(-1))
    small = cut_view(ramp, [0, 0, 0, 0.9], 75)
    assert torch.equal(small, ramp[:, :75, :75])


def test_augmented_pictures_are_squares_of_the_picture_mirrored_half_of_the_time():
    column = torch.arange(64).float() * 4
    image = column.expand(500, 3, 64, 64).to(torch.uint8)
    same = augment(image[:1], 64, BatchRandom(0, batch_size=1), 1.0, 0.0)
    assert (same - image[:1] / 255).abs().max() < 1e-6 or \
        (same.flip(-1) - image[:1] / 255).abs().max() < 1e-6
    squares = augment(image, 64, BatchRandom(0, batch_size=500), 0.25, 0.0) * 255
    slope = (squares[..., 40] - squares[..., 20]).mean((1, 2)) / 20 / 4  # share of the side
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert 0.49 < slope.abs().min() < 0.55 and 0.95 < slope.abs().max() < 1.01
    bright = augment(image, 64, BatchRandom(0, batch_size=500), 0.25, 0.4) * 255
    assert (bright - squares).abs().mean() > 5 and 0 <= bright.min() and bright.max() <= 255
