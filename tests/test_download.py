"""The downloader against a server on the loopback interface that misbehaves in every way."""

import io
import json
import random
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import coco_download
import pytest
from coco_download import DownloadError, download, fetch_folder
from helpers import ROOT

BYTES = random.Random(0).randbytes(300_000)


def make_zip(members):
    with zipfile.ZipFile(content := io.BytesIO(), "w") as file:
        for name, part in members.items():
            file.writestr(name, part)
    return content.getvalue()


def make_coco():
    """{path on the server: bytes} of a COCO 2014 of 30 + 20 photos, five captions each."""
    files, annotations = {}, {}
    for split, count in (("train", 30), ("val", 20)):
        names = [f"COCO_{split}2014_{i:012d}.jpg" for i in range(count)]
        photos = {f"{split}2014/{name}": b"\xff\xd8" + random.Random(i).randbytes(2000 + i)
                  + b"\xff\xd9" for i, name in enumerate(names)}
        files |= {f"/{name}": photo for name, photo in photos.items()}
        files[f"/zips/{split}2014.zip"] = make_zip(photos)
        annotations[f"annotations/captions_{split}2014.json"] = json.dumps({
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"id": i, "image_id": i // 5, "caption": f"caption {i}"}
                            for i in range(5 * count)]})
    return files | {"/annotations/annotations_trainval2014.zip": make_zip(annotations)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path)
        if server.failures or body is None:
            return self.send_error(server.failures.pop(0) if server.failures else 404)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range") in (None, server.etag)
        start = int(asked[1]) if asked and server.ranges and unchanged else 0
        server.starts.append(start)
        self.send_response(206 if start else 200)
        for name, value in (("ETag", server.etag), ("Content-Length", len(body) - start), (
                "Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None)):
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        end = len(body) if not server.cuts else (start + len(body)) // 2
        server.cuts -= bool(server.cuts)
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """files: {path: bytes}; etag: of all of them; cuts: how many of the next answers break off half
    way; failures: statuses of the next answers; ranges: whether Range is understood; starts: where
    each answer began."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.etag, server.cuts, server.failures = {"/x": BYTES}, '"1"', 0, []
    server.ranges, server.starts = True, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_cli(server, folder, *flags):
    """(exit code, stdout, stderr) of the script in a process of its own."""
    done = subprocess.run([sys.executable, ROOT / "data" / "coco_download.py", "--data_dir", folder,
                           "--base_url", server.url, *flags], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def assert_complete(server, folder, counts):
    """counts: {split: photos that have to be there}, with their captions and nothing besides."""
    for split, count in counts.items():
        photos = sorted((folder / f"{split}2014").iterdir())
        assert len(photos) == count
        for photo in photos:
            assert photo.read_bytes() == server.files[f"/{split}2014/{photo.name}"]
        captions = json.loads((folder / f"annotations/captions_{split}2014.json").read_text())
        assert [image["file_name"] for image in captions["images"]] == [p.name for p in photos]
        assert len(captions["annotations"]) == 5 * count
    assert not [path for path in folder.rglob("*") if path.suffix in (".part", ".unverified")]


# ----------------------------------------------------------------------------------------------
# one file


def test_a_broken_download_continues(server, tmp_path):
    """Within a call, where the server understands Range, and in the next one, with or without an
    ETag; from the beginning where what is there is of another file."""
    def fetch(name="x"):
        server.starts.clear()
        download(server.url + "/x", tmp_path / name, pause=0)
        assert (tmp_path / name).read_bytes() == server.files["/x"]
        assert not (tmp_path / f"{name}.part").exists()
        return server.starts

    def break_off(name):
        server.cuts = 1
        with patch.object(coco_download, "TRIES", 1), pytest.raises(
                DownloadError, match="gave up .* run the same command again"):
            download(server.url + "/x", tmp_path / name, pause=0)
    for server.ranges in (True, False):
        server.cuts, server.failures = 2, [503, 429]
        starts = fetch()
        assert len(starts) == 3 and (starts[1] > 0) == server.ranges
        (tmp_path / "x").unlink()
    server.ranges = True
    for server.etag in ('"1"', None):
        break_off(f"{server.etag}")
        (start,) = fetch(f"{server.etag}")
        assert 0 < start <= len(BYTES) // 2
    (tmp_path / "y.part").write_bytes(b"of another url")
    assert fetch("y") == [0]
    server.etag = '"1"'
    break_off("z")
    server.files["/x"], server.etag = BYTES[::-1], '"2"'  # it changed on the server
    assert fetch("z") == [0]


def test_what_cannot_be_fetched_is_named_at_once(server, tmp_path, full_disk):
    for url, num_bytes, message in (("/nothing", None, "/nothing: HTTP 404"),
                                    ("/x", len(BYTES) + 1, "300000 bytes, 300001 are expected"),
                                    ("/x", len(BYTES), "needed to download")):  # the disk is full
        with pytest.raises(DownloadError, match=message):
            download(server.url + url, tmp_path / "x", num_bytes=num_bytes, pause=0)
        assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# archives

LINK = zipfile.ZipInfo("link")
LINK.external_attr = 0o120777 << 16


@pytest.mark.parametrize("name", ["/tmp/evil-of-a-test.txt", "a/../../evil.txt", "..\\evil.txt",
                                  LINK])
def test_a_member_that_leaves_the_folder_is_refused(server, tmp_path, name):
    server.files["/zips/val2014.zip"] = make_zip({"val2014/good.jpg": "1", name: "/etc/passwd"})
    (tmp_path / "data").mkdir()
    with pytest.raises(DownloadError, match="would leave"):
        fetch_folder("val2014", tmp_path / "data", server.url, keep_zips=False)
    assert not list((tmp_path / "data").glob("val2014/*")) and not list(tmp_path.glob("evil*"))


def test_a_damaged_archive_is_fetched_again_and_a_damaged_photo_is_mended(server, tmp_path):
    server.files = make_coco()
    good = server.files["/zips/val2014.zip"]
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1  # one bit, inside a photo
    server.files["/zips/val2014.zip"] = bytes(bad)
    with pytest.raises(DownloadError, match="damaged: Bad CRC.*three times"):
        fetch_folder("val2014", tmp_path, server.url, keep_zips=False)
    assert len(server.starts) == 3 and not list(tmp_path.iterdir())
    server.files["/zips/val2014.zip"] = good
    for _ in range(2):
        fetch_folder("val2014", tmp_path, server.url, keep_zips=False)
    assert len(server.starts) == 4 and not (tmp_path / "val2014.zip").exists()
    photos = sorted((tmp_path / "val2014").iterdir())
    photos[3].write_bytes(photos[3].read_bytes()[:-5])
    photos[7].unlink()
    fetch_folder("val2014", tmp_path, server.url, keep_zips=True)
    assert len(server.starts) == 5 and (tmp_path / "val2014.zip").exists()
    assert all(p.read_bytes() == server.files[f"/val2014/{p.name}"] for p in photos)


# ----------------------------------------------------------------------------------------------
# the script


def test_a_small_real_set_and_then_everything(server, tmp_path):
    server.files, server.failures = make_coco(), [503]
    for count in (7, 9):
        code, out, err = run_cli(server, tmp_path, "--max_images", str(count))
        assert code == 0 and f"{count} of 30 photos, {5 * count} captions" in out, err
        assert_complete(server, tmp_path, {"train": count, "val": count})
    server.cuts = 4
    code, out, err = run_cli(server, tmp_path)
    assert code == 0 and out.count(": complete, ") == 3, err
    asked = len(server.starts)
    assert run_cli(server, tmp_path)[0] == 0 and len(server.starts) == asked
    assert_complete(server, tmp_path, {"train": 30, "val": 20})


def test_what_is_no_jpeg_is_one_line(server, tmp_path):
    server.files, name = make_coco(), "val2014/COCO_val2014_000000000003.jpg"
    server.files[f"/{name}"] = b"<html>sorry</html>"
    code, _, err = run_cli(server, tmp_path, "--max_images", "5", "--splits", "val")
    assert code == 1 and not (tmp_path / name).exists() and err.count("\n") == 1
    assert "COCO_val2014_000000000003.jpg: the server does not send a complete" in err
