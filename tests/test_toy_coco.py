"""The toy data set, and the judge that reads shape, color, size and place off a picture."""

import io
import json

import pytest
import toy_coco
from PIL import Image
from pycocotools.coco import COCO


@pytest.fixture(scope="module")
def val(toy):
    truth = toy_coco.load_attributes(toy / "captions_val.json")
    pictures = [Image.open(toy / "val" / f"{i:06d}.jpg").convert("RGB") for i in sorted(truth)]
    return pictures, [truth[i] for i in sorted(truth)]


def small_trip(image, side=64):
    buffer = io.BytesIO()
    image.resize((side, side), Image.BICUBIC).resize((256, 256), Image.BICUBIC).save(
        buffer, "JPEG", quality=80)
    return Image.open(buffer)


def test_judge_reads_true_pictures(val):
    pictures, wanted = val
    for shown in (pictures, [small_trip(p) for p in pictures]):
        accuracy = toy_coco.compute_accuracy(toy_coco.map_check(shown, wanted))
        assert min(accuracy.values()) >= 0.99, accuracy


def test_judge_sees_each_attribute_change(val):
    pictures, wanted = val
    for picture, attributes in list(zip(pictures, wanted))[:20]:
        for name, names in (("color", toy_coco.COLORS), ("shape", toy_coco.SHAPES),
                            ("size", toy_coco.SIZES)):
            lie = json.loads(json.dumps(attributes))
            lie["objects"][0][name] = next(n for n in names if n != lie["objects"][0][name])
            result = toy_coco.check_attributes(picture, lie)
            assert result[name][0] is False
            assert result["background"] == [True] and result["place"][0]


def test_captions_are_coco_and_name_all_that_a_picture_shows(toy):
    coco = COCO(str(toy / "captions_train.json"))
    for image_id, image in coco.imgs.items():
        captions = [a["caption"] for a in coco.imgToAnns[image_id]]
        assert len(captions) == 5 and len(set(captions)) >= 4
        for caption in captions:
            assert image["attributes"]["background"] in caption
            for item in image["attributes"]["objects"]:
                for words in ([item["color"]], toy_coco.SHAPES[item["shape"]],
                              toy_coco.SIZE_WORDS[item["size"]]):
                    assert any(word in caption for word in words)


def test_same_seed_same_data_and_a_finished_split_stays(toy, tmp_path, capsys):
    toy_coco.write_split(tmp_path, "train", 64, seed=0, num_workers=1)
    for name in ("captions_train.json", "train/000007.jpg"):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()
    capsys.readouterr()
    toy_coco.write_split(tmp_path, "train", 64, seed=0, num_workers=1)
    assert "there already" in capsys.readouterr().out
