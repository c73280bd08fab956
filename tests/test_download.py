"""The downloader against a server on the loopback interface."""

import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import coco_download
import pytest


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def server():
    """files: {path: bytes}; cuts: how many of the next answers break off half way."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked.group(1)) if asked and server.ranges else 0
            server.starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            if server.cuts:
                server.cuts -= 1
                rest = rest[:len(rest) // 2]
            self.wfile.write(rest)

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts, server.ranges, server.starts = {}, 0, True, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.files["/x"], server.cuts, server.ranges = bytes(range(256)) * 999, 2, ranges
    coco_download.download(server.url + "/x", tmp_path / "x", pause=0)
    assert (tmp_path / "x").read_bytes() == server.files["/x"]
    assert len(server.starts) == 3 and (server.starts[1] > 0) == ranges
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_missing_file_is_named_at_once(server, tmp_path):
    with pytest.raises(coco_download.DownloadError, match="/nothing: HTTP 404"):
        coco_download.download(server.url + "/nothing", tmp_path / "x", pause=0)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil-of-a-test.txt", "a/../../evil.txt"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path, name):
    (tmp_path / "data").mkdir()
    archive = tmp_path / "x.zip"
    archive.write_bytes(make_zip({"good.txt": "1", name: "2"}))
    with pytest.raises(coco_download.DownloadError, match="would leave"):
        coco_download.unpack(archive, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [] and not list(tmp_path.glob("evil*"))


def test_a_split_is_fetched_unpacked_and_left_alone_when_complete(server, tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr(coco_download, "ARCHIVES",
                        {"val2014": ("zips/val2014.zip", 3, ".jpg")})
    server.files["/zips/val2014.zip"] = make_zip({f"val2014/{i}.jpg": "x" * i for i in range(3)})
    for _ in range(2):
        coco_download.fetch("val2014", tmp_path, server.url, keep_zips=False)
    assert len(server.starts) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["val2014"]
    (tmp_path / "val2014" / "1.jpg").unlink()
    coco_download.fetch("val2014", tmp_path, server.url, keep_zips=True)
    assert (tmp_path / "val2014" / "1.jpg").read_text() == "x"
    assert (tmp_path / "val2014.zip").exists()


def test_a_damaged_archive_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_download, "ARCHIVES", {"val2014": ("v.zip", 1, ".jpg")})
    good = make_zip({"val2014/1.jpg": "abcdefgh" * 50})
    server.files["/v.zip"] = good.replace(b"abcdefgh", b"abcdefgX", 1)
    with pytest.raises(coco_download.DownloadError, match="damaged"):
        coco_download.fetch("val2014", tmp_path, server.url, keep_zips=False)
    assert not (tmp_path / "v.zip").exists() and not list(tmp_path.glob("val2014/*.jpg"))
    server.files["/v.zip"] = good
    coco_download.fetch("val2014", tmp_path, server.url, keep_zips=False)
