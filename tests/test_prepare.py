"""The prepared store: what is kept, what is left out, and that a kill loses nothing."""

import filecmp
import os
import random
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, write_coco
from PIL import Image

from dalle2.clip import load_clip
from dalle2.errors import UserError
from dalle2.files import GrowingFiles, build_once, hold_lock
from dalle2.prepare import prepare_store
from dalle2.shards import list_shards

GOOD = Image.linear_gradient("L").convert("RGB").resize((64, 80))


def prepare(folder, annot_path, store_dir=None, **options):
    return prepare_store(folder / "img", annot_path, store_dir or folder / "store", progress=False,
                         **options)


def test_every_caption_is_kept_and_bad_photos_are_left_out(tmp_path, capsys, clip_path):
    GOOD.save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    bomb = bytearray(whole)
    at = whole.index(b"\xff\xc0")  # the frame header: height and width follow
    bomb[at + 5:at + 9] = b"\x2e\xe0\x2e\xe0"  # 12,000 x 12,000
    bad = {"b.jpg": (b"", "an empty file"), "c.jpg": (b"no picture", "not a picture"),
           "d.jpg": (None, "no such file"), "f.jpg": (whole[:len(whole) // 2], "truncated"),
           "g.jpg": (bytes(bomb), "12000 x 12000 pixels are too many")}
    images = {"a.jpg": GOOD, "e.jpg": GOOD, "thin.png": Image.new("RGB", (1, 300)),
              "wide.png": Image.new("RGB", (20000, 2)),
              **{name: content for name, (content, _) in bad.items() if content is not None}}
    captions = {"a.jpg": [f"caption {k}" for k in range(6)], "e.jpg": ["one", "  "],
                **dict.fromkeys(bad, ["x"]),
                "thin.png": ["word " * 500], "wide.png": ["ünïcode ☃ 雪"]}
    clip = load_clip("", str(clip_path))
    store = prepare(tmp_path, write_coco(tmp_path, images, captions), clip=clip)
    ids, names, captions = zip(*store.records)
    assert names == ("a.jpg", "e.jpg", "thin.png", "wide.png")
    assert ids == (10, 11, 17, 18) and len(store.images) == 4
    assert [len(group) for group in captions] == [6, 1, 1, 1]
    assert store.text_tokens.shape[0] == store.text_embed.shape[0] == 9
    assert store.token_start[-1] == len(store.text_encodings)
    lengths = np.diff(store.token_start)
    assert lengths[-2] == clip.context_length and 2 < lengths[-1] < clip.context_length
    said = "".join(capsys.readouterr())
    assert said.count("is left out") == 5 and "5 of 9 pictures are left out" in said
    for name, (_, reason) in bad.items():
        line = next(line for line in said.splitlines() if f"/{name}" in line)
        assert reason in line.lower(), line


def test_whatever_pillow_raises_leaves_a_photo_out_with_a_line(tmp_path, monkeypatch, capsys):
    """On damaged EXIF it raises struct.error, TypeError and others."""
    annot_path = write_coco(tmp_path, {"a.jpg": GOOD, "b.jpg": GOOD}, {"a.jpg": "x", "b.jpg": "y"})

    def fail_once(image, in_place):
        monkeypatch.undo()
        raise struct.error("unpack requires a buffer of 2 bytes")
    monkeypatch.setattr("dalle2.images.ImageOps.exif_transpose", fail_once)
    assert len(prepare(tmp_path, annot_path, num_workers=1)) == 1
    assert "left out (error: unpack requires a buffer" in "".join(capsys.readouterr())


def test_a_shard_without_a_picture_that_can_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dalle2.shards.IMAGES_A_SHARD", 2)
    images = {"a.jpg": GOOD, "b.jpg": GOOD, "c.jpg": b"no picture"}
    annot_path = write_coco(tmp_path, images, dict.fromkeys(images, ["x"]))
    store = prepare(tmp_path, annot_path)
    assert len(store) == 2 and len(store.folders) == 1
    assert "00001 is left out (none of 1 pictures could be read" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="strict|none of 1"):
        prepare(tmp_path, annot_path, strict=True)
    with pytest.raises(UserError, match="annot_path: no such file"):
        prepare(tmp_path, tmp_path / "none.json")


def test_processes_may_begin_a_store_at_the_same_moment(toy, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list_shards(
            toy / "train", toy / "captions_train.json", tmp_path), range(8)))
    assert {(str(folder), shards[0].count) for folder, shards in found} == {
        (str(found[0][0]), 64)}


def test_a_store_of_changed_captions_is_made_anew(tmp_path):
    annot_path = write_coco(tmp_path, {"a.jpg": GOOD}, {"a.jpg": ["one"]})
    assert prepare(tmp_path, annot_path).records[0].captions == ["one"]
    annot_path.write_text(annot_path.read_text().replace("one", "two"))
    assert prepare(tmp_path, annot_path).records[0].captions == ["two"]


def test_a_jpeg_store_shows_the_same_pictures_in_less_space(toy, tmp_path):
    arguments = toy / "train", toy / "captions_train.json"
    plain = prepare_store(*arguments, tmp_path / "plain", progress=False)
    small = prepare_store(*arguments, tmp_path / "small", image_format="jpeg", progress=False)
    assert small.images.shape == plain.images.shape
    rows = [5, 0, 63]
    error = np.abs(small.images[rows].astype(float) - plain.images[rows])
    assert 0 < error.mean() < 2
    assert np.array_equal(small.images[5], small.images[4:6][1])
    sizes = [(store.folders[0] / "images" / f"images.{store.image_format}").stat().st_size
             for store in (small, plain)]
    assert sizes[0] < sizes[1] / 4
    thumbs = [store.load_small_images(32).astype(float) for store in (small, plain)]
    assert np.abs(thumbs[0] - thumbs[1]).mean() < 2
    assert prepare_store(*arguments, tmp_path / "small", progress=False).image_format == "jpeg"
    with pytest.raises(UserError, match="image_format"):
        prepare_store(*arguments, tmp_path / "small", image_format="uint8", progress=False)


def test_each_photo_can_have_several_views_with_embeddings_of_their_own(toy, tmp_path, clip_path):
    arguments, clip = (toy / "train", toy / "captions_train.json"), load_clip("", str(clip_path))
    store = prepare_store(*arguments, tmp_path, clip=clip, num_views=3, progress=False)
    plain = prepare_store(*arguments, tmp_path, clip=clip, progress=False)
    assert len(store) == 192 and len(store.records) == 64
    assert np.array_equal(store.images[::3], plain.images[:])  # the first view is the photo
    assert np.array_equal(store.image_embed[::3], plain.image_embed)
    others = [(store.images[i + k] != store.images[i]).any()
              for i in range(0, 192, 3) for k in (1, 2)]
    assert np.mean(others) > 0.9  # a square of a plain picture may be as plain
    index = np.array([3 * 7 + 2])  # a view has the captions of its photo
    assert store.draw_captions(index, torch.zeros(1)) == plain.draw_captions([7], torch.zeros(1))
    assert torch.allclose(torch.from_numpy(store.image_embed[index]).float(),
                          clip.embed_image(torch.from_numpy(store.images[21:24].copy()))[2:],
                          atol=1e-3)
    again = prepare_store(*arguments, tmp_path / "jpeg", num_views=3, image_format="jpeg",
                          progress=False)
    assert np.abs(again.images[[5, 191]].astype(float) - store.images[[5, 191]]).mean() < 2


def test_a_full_disk_is_told_beforehand(tmp_path, full_disk):
    annot_path = write_coco(tmp_path, {"a.jpg": GOOD}, {"a.jpg": ["one"]})
    with pytest.raises(UserError, match="store_dir: 1 pictures need"):
        prepare(tmp_path, annot_path)


# ----------------------------------------------------------------------------------------------
# kills


def test_growing_files_drop_what_a_step_did_not_finish(tmp_path):
    def reopen():
        files = GrowingFiles(tmp_path, ["a", "b"])
        return files.notes, (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    files = GrowingFiles(tmp_path, ["a", "b"])
    files.append({"a": b"11", "b": b"x"}, "one")
    files.append({"a": b"22", "b": b""}, "two")
    whole = (["one", "two"], b"1122", b"x")
    assert reopen() == whole
    with open(tmp_path / "b", "ab") as file:
        file.write(b"torn")
    assert reopen() == whole
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])
    assert reopen() == (["one"], b"11", b"x")
    os.truncate(tmp_path / "a", 1)  # lost behind the journal's back
    assert reopen() == ([], b"", b"")


def test_build_once_hands_a_part_of_the_same_source_on(tmp_path):
    seen = []

    def build(part):
        seen.append(sorted(path.name for path in part.iterdir()))
        (part / f"file{len(seen)}").write_text("")
        if len(seen) in (1, 2):
            raise KeyboardInterrupt
    for source in ("a", "a", "b", "b"):
        try:
            build_once(tmp_path / "x", source, build)
        except KeyboardInterrupt:
            pass
    assert seen == [["source.json"], ["file1", "source.json"], ["source.json"]]
    assert (tmp_path / "x" / "file3").exists()


PREPARE = """
import sys
sys.path[:0] = [{root!r}]
import dalle2.prepare as prepare
import dalle2.shards as shards
from dalle2.clip import load_clip
prepare.IMAGES_A_STEP = prepare.BATCH_SIZE = 4
prepare.CAPTIONS_A_STEP, shards.IMAGES_A_SHARD = 16, 20
clip = load_clip("", {clip!r})
prepare.prepare_store({toy!r} + "/train", {toy!r} + "/captions_train.json", {store!r},
                      clip=clip, progress=False)
"""


@pytest.mark.slow
def test_killed_at_random_moments_or_shared_the_store_ends_with_the_same_bytes(
        toy, clip_path, tmp_path):
    """Four shards; by one process, by several that are killed one after another, and by two."""
    def start(store):
        code = PREPARE.format(root=str(ROOT), clip=str(clip_path),
                              toy=str(toy), store=str(store))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)

    def kill_one(store, kill_after):
        process, deadline = start(store), time.time() + 60
        while not list(store.glob("*/*/*.part/journal.jsonl")) and process.poll() is None \
                and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        assert process.wait(120) in (0, -signal.SIGKILL)
    assert start(tmp_path / "whole").wait(120) == 0
    for seed in range(4):
        kill_one(tmp_path / "killed", random.Random(seed).uniform(0, 0.12))
    assert start(tmp_path / "killed").wait(120) == 0
    both = [start(tmp_path / "shared") for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    whole, killed, shared = ({path.relative_to(folder): path for path in folder.rglob("*")
                              if path.is_file() and path.suffix != ".lock"}
                             for folder in (tmp_path / x for x in ("whole", "killed", "shared")))
    assert whole.keys() == killed.keys() == shared.keys() and len(whole) >= 40
    for name in whole:
        for other in (killed, shared):
            assert filecmp.cmp(whole[name], other[name], shallow=False), name


def test_a_shard_that_another_process_makes_is_left_to_it(tmp_path):
    """Without waiting for it, where there is other work."""
    with hold_lock(tmp_path / ".x.lock", ""):
        assert build_once(tmp_path / "x", "a", lambda part: None, wait=False) is None
    assert build_once(tmp_path / "x", "a", lambda part: None, wait=False) == tmp_path / "x"


def test_a_store_that_is_made_is_opened_without_its_captions(tmp_path, monkeypatch):
    annot_path = write_coco(tmp_path, {"a.jpg": GOOD}, {"a.jpg": ["one"]})
    prepare(tmp_path, annot_path)
    monkeypatch.setattr("dalle2.captions.read_coco", None)
    assert prepare(tmp_path, annot_path).records[0] == (10, "a.jpg", ["one"])
