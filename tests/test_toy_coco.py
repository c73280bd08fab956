"""The toy data set, and the judge that reads shape, color, size and place off a picture."""

import io
import json

import pytest
import toy_coco
from PIL import Image

from dalle2.errors import UserError


@pytest.fixture(scope="module")
def val(toy):
    truth = toy_coco.load_attributes(toy / "captions_val.json")
    pictures = [Image.open(toy / "val" / f"{i:06d}.jpg").convert("RGB") for i in sorted(truth)]
    return pictures, [truth[i] for i in sorted(truth)]


def test_judge_reads_true_pictures_even_blurred_and_compressed(val):
    blurred = []
    for picture in val[0]:
        small = picture.resize((64, 64), Image.BICUBIC).resize((256, 256), Image.BICUBIC)
        small.save(content := io.BytesIO(), "JPEG", quality=80)
        blurred.append(Image.open(content))
    accuracy = toy_coco.compute_accuracy(toy_coco.map_check(
        map(toy_coco.find_objects, blurred), val[1]))
    assert min(accuracy.values()) >= 0.99, accuracy


def test_judge_sees_each_attribute_change(val):
    pictures, wanted = val
    for picture, attributes in list(zip(pictures, wanted))[:20]:
        for name, names in (("color", toy_coco.COLORS), ("shape", toy_coco.SHAPES),
                            ("size", toy_coco.SIZES)):
            lie = json.loads(json.dumps(attributes))
            lie["objects"][0][name] = next(n for n in names if n != lie["objects"][0][name])
            result = toy_coco.check_attributes(toy_coco.find_objects(picture), lie)
            assert result[name][0] is False
            assert result["background"] == [True] and result["place"][0]


def test_same_seed_same_data_and_a_finished_split_stays(toy, tmp_path, capsys):
    toy_coco.write_split(tmp_path, "train", 64, seed=0, num_workers=1)
    for name in ("captions_train.json", "train/000007.jpg"):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()
    capsys.readouterr()
    toy_coco.write_split(tmp_path, "train", 64, seed=0, num_workers=1)
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match="output_dir: .* has seed 0 and 64 pictures, not 1 and 64"):
        toy_coco.write_split(tmp_path, "train", 64, seed=1, num_workers=1)
