"""Photos made square, captions in each form, and the reading side of the prepared store."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_jpeg, write_tar, write_tars
from PIL import Image

from dalle2.arrays import join_arrays, join_starts
from dalle2.captions import find_form, load_captions
from dalle2.clip import load_clip
from dalle2.data import Store, draw_indexes, read_crops
from dalle2.errors import UserError
from dalle2.images import cut_jpeg, decode_jpeg, encode_jpeg, load_image, resize, resize_and_crop
from dalle2.prepare import prepare_store
from dalle2.rng import shuffle


def test_photos_keep_their_shape():
    """A circle in a wide photo stays a circle: short side resized, then the middle cut out."""
    y, x = np.mgrid[:300, :600]
    disc = (((x - 300) ** 2 + (y - 150) ** 2 < 100 ** 2) * 255).astype(np.uint8)
    out = resize_and_crop(torch.from_numpy(np.stack([disc] * 3)), 64)
    assert out.shape == (3, 64, 64) and out.dtype == torch.uint8
    mask = out[0] > 127
    assert abs(mask.any(0).sum() - mask.any(1).sum()) <= 1
    assert abs(mask.any(0).sum() - 64 * 200 / 300) <= 2


def test_resizing_is_antialiased():
    """A fine checkerboard becomes grey; the nearest neighbour would give black and white."""
    board = (torch.arange(255)[:, None] + torch.arange(255)[None]) % 2 * 255
    small = resize(board.to(torch.uint8).expand(3, -1, -1), 51)
    assert (small.float() - 127.5).abs()[:, 2:-2, 2:-2].max() < 4


@pytest.mark.parametrize("mode, size", [("RGB", (640, 480)), ("RGB", (31, 500)), ("L", (480, 640)),
                                        ("P", (256, 256)), ("CMYK", (300, 256))])
def test_any_photo_becomes_256_px_rgb(tmp_path, mode, size):
    path = tmp_path / ("x.png" if mode == "P" else "x.jpg")
    Image.new("RGB", size, (200, 30, 30)).convert(mode).save(path)
    image = load_image(path)
    assert image.shape == (3, 256, 256) and image.dtype == torch.uint8
    if mode != "L":
        assert (image.float().mean((1, 2)) - torch.tensor([200., 30., 30.])).abs().max() < 12


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new("RGB", (80, 40), "white")
    image.paste("black", (0, 0, 40, 40))  # left half black
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    for path in (tmp_path / "x.jpg", tmp_path / "x.png"):  # torchvision and Pillow read them
        image.save(path, exif=exif)
        shown = load_image(path, 32).float().mean(0)
        assert shown[:8].mean() < 60 < 200 < shown[-8:].mean()  # the top is black now


# ----------------------------------------------------------------------------------------------
# the store


@pytest.fixture(scope="module")
def store(toy, clip_path, tmp_path_factory):
    clip = load_clip("", str(clip_path))
    return prepare_store(toy / "train", toy / "captions_train.json",
                         tmp_path_factory.mktemp("store"), clip=clip, progress=False)


def test_the_store_holds_what_clip_says_of_each_picture_and_caption(store, toy, clip_path):
    clip = load_clip("", str(clip_path))
    image = load_image(toy / "train" / store.records[5].file_name)
    assert torch.equal(torch.from_numpy(store.images[5].copy()), image)
    wanted = clip.embed_image(image[None])[0]
    torch.testing.assert_close(torch.tensor(store.image_embed[5]).float(), wanted,
                               atol=2e-3, rtol=0)
    row = store.caption_start[5] + 3
    text_embed, text_encodings = clip.embed_text(clip.tokenize([store.records[5].captions[3]]))
    torch.testing.assert_close(torch.tensor(store.text_embed[row]).float(), text_embed[0],
                               atol=2e-3, rtol=0)
    loaded = store.load_text_encodings([row], text_encodings.shape[1])
    torch.testing.assert_close(loaded.float(), text_encodings, atol=6e-3, rtol=2e-3)
    again = Store(store.folders)
    assert list(again.records) == list(store.records) and len(again) == len(store) == 64
    small = store.load_small_images(32)  # the large ones resized
    assert small.shape == (64, 3, 32, 32)
    assert np.array_equal(small[5], resize(image, 32).numpy())


def test_cut_text_encodings_keep_the_end_token(store):
    full = store.load_text_encodings([0], 26)[0]
    length = int((full.abs().sum(-1) > 0).sum())
    cut = store.load_text_encodings([0], length - 3)[0]
    assert torch.equal(cut[:-1], full[:length - 4]) and torch.equal(cut[-1], full[length - 1])


def test_each_epoch_draws_each_picture_once():
    drawn = np.concatenate([draw_indexes(10, 0, step, 4) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])
    assert np.array_equal(draw_indexes(10, 0, 3, 4), drawn[12:16])
    assert not np.array_equal(draw_indexes(10, 1, 3, 4), drawn[12:16])


@pytest.mark.parametrize("count", [1, 2, 3, 100, 4096, 5000])
def test_shuffling_puts_each_picture_somewhere_else_in_each_epoch(count):
    first, second = (shuffle(np.arange(count), count, 0, "epoch", epoch) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(count))
    assert np.array_equal(shuffle(np.arange(count)[-3:], count, 0, "epoch", 0), first[-3:])
    if count >= 100:
        for order in (first, second - first):
            assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.3
        assert (first == second).mean() < 0.1


def test_joined_arrays_read_like_one():
    whole = np.random.default_rng(0).integers(0, 9, (23, 2))
    joined = join_arrays([whole[:5], whole[5:6], whole[6:20], whole[20:]])
    assert joined.shape == whole.shape and joined.dtype == whole.dtype
    for start in range(25):
        for stop in range(26):
            assert np.array_equal(joined[start:stop], whole[start:stop])
    rows = np.random.default_rng(1).integers(0, 23, 50)
    assert np.array_equal(joined[rows], whole[rows])
    assert all(np.array_equal(a, b) for a, b in zip(joined, whole, strict=True))
    assert join_starts([np.array([0, 2, 5]), np.array([0, 1])]).tolist() == [0, 2, 5, 6]


def test_all_captions_of_a_picture_are_drawn_and_no_others(store):
    u = torch.linspace(0, 0.999, 200)
    rows = store.draw_captions([2] * 200, u)
    assert set(rows) == set(range(store.caption_start[2], store.caption_start[3]))


# ----------------------------------------------------------------------------------------------
# JPEG files that are cut without decoding them


def test_a_jpeg_file_is_cut_without_decoding_it_where_it_has_restart_markers():
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 40, 40)
    image = torch.nn.functional.interpolate(coarse, 256, mode="bicubic").clamp(0, 1)[0]
    content = encode_jpeg((image * 255).to(torch.uint8))
    whole = decode_jpeg(content)
    for top in (0, 1, 15, 16, 17, 100, 191, 192):
        part, above = cut_jpeg(content, top, top + 64)
        assert len(part) < 0.5 * len(content)
        assert np.array_equal(decode_jpeg(part)[top - above:top - above + 64],
                              whole[top:top + 64])
    other = io.BytesIO()
    Image.new("RGB", (256, 256), "red").save(other, "JPEG")
    assert cut_jpeg(other.getvalue(), 50, 80) == (other.getvalue(), 0)


def test_crops_are_those_of_the_whole_pictures(toy, store, tmp_path):
    indexes, corners = [5, 0, 5] * 6, torch.tensor([[0, 3], [192, 192], [77, 130]] * 6)
    jpeg = prepare_store(f"{toy}/train", f"{toy}/captions_train.json", tmp_path,
                         image_format="jpeg", progress=False)
    for held in (store.images, jpeg.images):
        crops = read_crops(held, indexes, corners, 64)  # by several threads, a few each
        assert len(crops) == len(indexes)
        for crop, index, (top, left) in zip(crops, indexes, corners.tolist()):
            assert np.array_equal(crop, held[index][:, top:top + 64, left:left + 64])


# ----------------------------------------------------------------------------------------------
# COCO's file


@pytest.mark.parametrize("text, message", [
    ("{", "not a COCO captions file"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": '
     '[{"id": 1, "image_id": 1, "bbox": []}]}', "not a COCO captions file"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": '
     '[{"id": 1, "image_id": 1, "caption": null}]}', "not a COCO captions file"),
    ('{"images": [{"id": 1, "file_name": 1}], "annotations": '
     '[{"id": 1, "image_id": 1, "caption": "x"}]}', "not a COCO captions file"),
    ('{"images": [], "annotations": []}', "no captioned image"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": '
     '[{"id": 1, "image_id": 1, "caption": "x"}]}', "holds none of the first pictures")])
def test_bad_annotations_are_named(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_captions(str(path), str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def photos(tmp_path):
    """A folder with three pictures, one of them in a subfolder."""
    (tmp_path / "b").mkdir()
    for name in ("a.jpg", "b/c.png", "d.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def list_found(folder):
    return [(r.image_id, str(Path(r.path).relative_to(folder)), r.captions)
            for r in load_captions("", str(folder))]


def test_captions_in_text_files_beside_the_pictures(photos):
    (photos / "a.txt").write_text("a dog\n\n a cat \n")
    (photos / "b" / "c.txt").write_text("ein Hund im Grünen", encoding="utf-8")
    assert list_found(photos) == [(0, "a.jpg", ("a dog", "a cat")),
                                  (1, "b/c.png", ("ein Hund im Grünen",))]
    (photos / "d.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(UserError, match=r"img_path: .*d\.txt is not UTF-8"):
        load_captions("", str(photos))


@pytest.mark.parametrize("name, content", [
    ("metadata.jsonl", '{"file_name": "b/c.png", "text": ["x", "y"]}\n\n'
                       '{"file_name": "a.jpg", "caption": "p"}\n'
                       '{"file_name": "a.jpg", "caption": "q"}\n'),
    ("metadata.csv", 'file_name,text,size\nb/c.png,x,1\nb/c.png,y,1\na.jpg,p,2\na.jpg,q,2\n')])
def test_captions_in_a_metadata_file(photos, name, content):
    (photos / name).write_text(content)
    assert find_form("", photos) == name
    assert list_found(photos) == [(0, "b/c.png", ("x", "y")), (1, "a.jpg", ("p", "q"))]


@pytest.mark.parametrize("name, content, message", [
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "a', "metadata.jsonl: "),
    ("metadata.jsonl", '{"file_name": "a.jpg"}', "row 1 has no file_name with text or caption"),
    ("metadata.jsonl", "[1]", "metadata.jsonl: "),
    ("metadata.csv", "file,text\na.jpg,x\n", "row 1 has no file_name"),
    ("metadata.jsonl", '{"file_name": "../a.jpg", "text": "x"}', "leads out of the folder"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "%s"}' % ("x " * 60_000), "100000 char"),
    ("metadata.jsonl", '{"file_name": "no.jpg", "text": "x"}',
     "holds none of the first pictures that metadata.jsonl names, such as no.jpg"),
    ("other.txt", "x", "annot_path: .* holds neither metadata.jsonl nor metadata.csv nor")])
def test_what_is_wrong_with_a_folder_of_captions_is_named(photos, name, content, message):
    (photos / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_captions("", str(photos))


def test_a_store_of_a_folder_with_its_captions_follows_them(photos, tmp_path):
    (photos / "a.txt").write_text("a dog")
    first = prepare_store(photos, "", tmp_path / "store", progress=False)
    (photos / "d.txt").write_text("a cat")
    second = prepare_store(photos, "", tmp_path / "store", progress=False)
    assert [record.captions for record in first.records] == [["a dog"]]
    assert len(second) == 2 and second.folder != first.folder


# ----------------------------------------------------------------------------------------------
# tars


def test_tars_are_read_in_place_by_folder_pattern_or_range(tmp_path):
    folder = write_tars(tmp_path / "tars", (3, 2, 1))
    (folder / "00003.tar").write_bytes(b"no tar")  # is left out
    for named, count in ((folder, 6), (f"{folder}/*.tar", 6), (f"{folder}/{{00001..00002}}.tar", 3),
                         (f"{folder}/00001.tar", 2)):
        assert find_form("", str(named)) == "tar archives"
        records = load_captions("", str(named))
        start = 0 if count == 6 else 3
        assert [r.captions for r in records] == [(f"caption {i + start}",) for i in range(count)]
        assert load_captions("", str(named), 2) == records[:2]
    assert load_image(records[0].path).shape == (3, 256, 256)
    assert [r.image_id for r in load_captions("", str(folder))] == list(range(6))
    for bad, message in (("{00002..00004}.tar", "no such file: .*00004.tar"),
                         ("{00002..00003.tar", "img_path: .*{00002..00003.tar"),
                         ("00003.tar", "no uncompressed tar"),
                         ("0000[3].tar", "no uncompressed tar")):
        with pytest.raises(UserError, match=message):
            load_captions("", f"{folder}/{bad}", warn=lambda line: None)
    write_tar(folder / "00002.tar", {"a.jpg": draw_jpeg(9), "a.txt": "now another"})
    (record,) = load_captions("", f"{folder}/00002.tar")
    assert record.captions == ("now another",) and load_image(record.path).shape == (3, 256, 256)


def test_what_is_wrong_in_a_tar_is_left_out_with_a_line_and_the_rest_is_kept(tmp_path):
    picture, warnings = draw_jpeg(0), []
    path = write_tar(tmp_path / "a.tar", {
        "good.jpg": picture, "good.txt": "one\ntwo", "x/also.good.webp": picture,
        "x/also.json": '{"text": ["three"]}', "none.jpg": picture, "latin.jpg": picture,
        "latin.txt": "Grün".encode("latin-1"), "blank.jpg": picture, "blank.txt": " \n",
        "long.jpg": picture, "long.txt": "x" * 10_000_000, "../out.jpg": picture,
        "../out.txt": "x", "two.jpg": picture, "two.png": picture, "two.txt": "y",
        "list.jpg": picture, "list.json": "[1]", "alone.txt": "no picture",
        "._good.jpg": b"what macOS adds", "./last.jpg": picture, "./last.txt": "four"})
    records = load_captions("", str(path), warn=warnings.append)
    assert [(r.name, r.captions) for r in records] == [
        ("good.jpg", ("one", "two")), ("x/also.good.webp", ("three",)), ("two.jpg", ("y",)),
        ("last.jpg", ("four",))]
    assert all(load_image(record.path, 8).shape == (3, 8, 8) for record in records)
    for name, reason in (("none.jpg", "no caption"), ("latin.jpg", "utf-8"),
                         ("blank.jpg", "empty caption"), ("long", "100000 characters"),
                         ("out.jpg", "leads out"), ("two.png", "a second picture of two"),
                         ("list.jpg", "captions")):
        (line,) = (line for line in warnings if name in line and reason in line)
        assert "\n" not in line and len(line) < 300
    assert not any("._good" in line for line in warnings)
    with tarfile.open(path) as archive:
        end = archive.getmember("none.jpg").offset_data + 100
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:end])
    warnings.clear()
    assert [r.name for r in load_captions("", str(tmp_path / "cut.tar"), warn=warnings.append)] \
        == ["good.jpg", "x/also.good.webp"]
    assert "cut off after" in warnings[0]
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="no.tar is no uncompressed tar"):
        load_captions("", str(tmp_path / "no.tar"))


def test_a_store_of_tars_is_that_of_their_pictures_and_a_bad_tar_is_left_out(
        tmp_path, clip_path, capsys):
    clip = load_clip("", str(clip_path))
    folder = write_tars(tmp_path / "tars", (3, 2, 4))
    store = prepare_store(str(folder), "", tmp_path / "store", clip=clip, progress=False)
    unpacked = tmp_path / "files"
    for path in folder.iterdir():
        with tarfile.open(path) as archive:
            archive.extractall(unpacked, filter="data")
    plain = prepare_store(str(unpacked), "", tmp_path / "store", clip=clip, progress=False)
    assert len(store.folders) == 3 and len(plain.folders) == 1 and len(store) == 9
    rows = np.array([8, 0, 4, 3, 4])
    for name in ("images", "text_tokens", "image_embed", "text_embed"):  # embedded in other batches
        np.testing.assert_allclose(getattr(store, name)[rows], getattr(plain, name)[rows],
                                   atol=2e-3, err_msg=name)
    torch.testing.assert_close(store.load_text_encodings(rows, 9),
                               plain.load_text_encodings(rows, 9), atol=6e-3, rtol=2e-3)
    assert np.array_equal(store.load_small_images(32)[rows], plain.load_small_images(32)[rows])
    assert [r.captions for r in store.records] == [r.captions for r in plain.records]
    tokens = store.load_tokens(clip.tokenize, clip.context_length)
    assert np.array_equal(tokens[rows], clip.tokenize([f"caption {i}" for i in rows]))

    made = {path: path.stat().st_mtime_ns for path in store.folder.rglob("source.json")}
    write_tar(folder / "00003.tar", {"a.jpg": b"no picture", "a.txt": "x"})
    (folder / "00004.tar").write_bytes(b"no tar")
    write_tar(folder / "00005.tar", {"a.jpg": draw_jpeg(1), "a.txt": "one more"})
    more = prepare_store(str(folder), "", tmp_path / "store", clip=clip, progress=False)
    assert more.folder == store.folder and len(more) == 10 and more.digest != store.digest
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    said = "".join(capsys.readouterr())
    assert "00003.tar is left out (none of 1 pictures" in said
    assert "00004.tar is left out (" in said
    with pytest.raises(UserError, match="none of 1 pictures"):
        prepare_store(str(folder), "", tmp_path / "store", clip=clip, progress=False, strict=True)
    write_tar(folder / "00005.tar", {"a.jpg": draw_jpeg(2), "a.txt": "another",
                                     "a.json": " " * 20_000})  # a tar is known by its size
    changed = prepare_store(str(folder), "", tmp_path / "store", clip=clip, progress=False)
    assert changed.records[9].captions == ["another"] and len(changed) == 10
    assert not np.array_equal(changed.image_embed[9], more.image_embed[9])
    with pytest.raises(UserError, match="img_path: .*00004.tar .*no captioned image"):
        prepare_store(str(folder / "00004.tar"), "", tmp_path / "store", max_images=4)
    few = prepare_store(str(folder), "", tmp_path / "store", max_images=4, progress=False)
    assert len(few) == 4 and few.records[3].captions == ["caption 3"]
