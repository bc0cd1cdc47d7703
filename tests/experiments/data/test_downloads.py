"""Downloads: whole and checked, or not there at all."""

import hashlib
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from ensembles.experiments.data.downloads import download_file, require_digest, sha256_of

CONTENT = bytes(range(256)) * 1000  # four chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_into_a_new_folder(served, tmp_path):
    served.files["/a.npy"] = CONTENT
    path = download_file(f"{served.url}/a.npy", tmp_path / "new" / "a.npy", sha256=DIGEST.upper())
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["a.npy"]


def test_what_is_there_is_not_fetched_again(served, tmp_path):
    (tmp_path / "a.npy").write_bytes(CONTENT)
    download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert served.asked == []


@pytest.mark.parametrize("lengths", [True, False])
def test_an_interrupted_download_is_continued(served, tmp_path, lengths):
    served.files["/a.npy"] = CONTENT
    served.cut_after = [100_000]
    served.lengths = True
    with pytest.raises(ConnectionError, match=r"the connection ended after 100000 of 256000 bytes"):
        download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert names(tmp_path) == ["a.npy.part"]
    served.lengths = lengths
    path = download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert path.read_bytes() == CONTENT
    assert served.asked == [("/a.npy", None), ("/a.npy", "bytes=100000-")]
    assert names(tmp_path) == ["a.npy"]


def test_a_continued_download_that_breaks_again_tells_the_whole_size(served, tmp_path):
    served.files["/a.npy"] = CONTENT
    (tmp_path / "a.npy.part").write_bytes(CONTENT[:1000])
    served.cut_after = [500]
    with pytest.raises(
        ConnectionError, match=r"1500 of 256000 bytes. The first 1500 bytes are kept in a.npy.part"
    ):
        download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert (tmp_path / "a.npy.part").read_bytes() == CONTENT[:1500]


@pytest.mark.parametrize("ranges", ["ignored", "wrong"])
def test_a_server_without_ranges_sends_the_file_anew(served, tmp_path, ranges):
    served.files["/a.npy"] = CONTENT
    served.ranges = ranges
    (tmp_path / "a.npy.part").write_bytes(CONTENT[:1000])
    path = download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * 300_000, CONTENT + b"x", b"x" * len(CONTENT)])
def test_a_part_of_another_file_is_discarded(served, tmp_path, part):
    served.files["/a.npy"] = CONTENT
    (tmp_path / "a.npy.part").write_bytes(part)
    path = download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_already_whole_needs_no_network(tmp_path):
    (tmp_path / "a.npy.part").write_bytes(CONTENT)
    path = download_file("http://127.0.0.1:9/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["a.npy"]


def test_other_content_is_discarded_and_both_digests_are_told(served, tmp_path):
    served.files["/a.npy"] = b"<html>log in</html>"
    found = hashlib.sha256(served.files["/a.npy"]).hexdigest()
    with pytest.raises(ValueError, match=f"its sha256 is {found}, expected {DIGEST}"):
        download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert names(tmp_path) == []


def test_a_file_with_other_content_is_never_overwritten(served, tmp_path):
    served.files["/a.npy"] = CONTENT
    (tmp_path / "a.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"a\.npy holds other content than expected.*left as it"):
        download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert (tmp_path / "a.npy").read_bytes() == b"mine"
    assert served.asked == []


def test_without_a_network_the_message_tells_url_folder_and_file(tmp_path):
    url = "http://127.0.0.1:9/data/a.npy"  # the discard port: nobody listens
    with pytest.raises(ConnectionError) as caught:
        download_file(url, tmp_path / "a.npy", sha256=DIGEST)
    told = str(caught.value)
    assert told.startswith(f"cannot download {url}: ")
    assert f"put it into the folder {tmp_path} as a.npy (sha256 {DIGEST})." in told
    assert names(tmp_path) == []


def test_a_page_that_is_not_there_is_told_with_its_status(served, tmp_path):
    with pytest.raises(ConnectionError, match="HTTP 404 Not Found"):
        download_file(f"{served.url}/b.npy", tmp_path / "b.npy", sha256=DIGEST)


def test_only_web_addresses_are_fetched(tmp_path):
    (tmp_path / "secret").write_bytes(CONTENT)
    with pytest.raises(ValueError, match="http:// or https://"):
        download_file(f"file://{tmp_path}/secret", tmp_path / "a", sha256=DIGEST)


def test_a_file_in_the_way_of_the_folder_is_told(served, tmp_path):
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot write .*a\.npy: File exists.*root="):
        download_file(f"{served.url}/a.npy", tmp_path / "data" / "a.npy", sha256=DIGEST)


def test_a_disk_that_fills_up_keeps_what_came_and_the_download_continues(served, tmp_path):
    # A limit on the size of files stops a write in its middle, as a full disk does.
    served.files["/a.npy"] = CONTENT
    script = f"""
        import resource
        from ensembles.experiments.data.downloads import download_file
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))
        try:
            download_file("{served.url}/a.npy", "a.npy", sha256="{DIGEST}")
        except OSError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write a.npy: File too large. Nothing took its name" in run.stdout
    assert names(tmp_path) == ["a.npy.part"]
    assert (tmp_path / "a.npy.part").read_bytes() == CONTENT[:250_000]
    path = download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)
    assert path.read_bytes() == CONTENT
    assert served.asked[1:] == [("/a.npy", "bytes=250000-")]


def test_two_that_fetch_the_same_file_at_once_do_not_mix_their_parts(served, tmp_path):
    served.files["/a.npy"] = CONTENT

    def fetch(_):
        return download_file(f"{served.url}/a.npy", tmp_path / "a.npy", sha256=DIGEST)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(fetch, range(8)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(served.asked) == 1


def test_a_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    assert sha256_of(tmp_path / "a") == DIGEST
    require_digest(tmp_path / "a", DIGEST)
    (tmp_path / "a").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="holds other content"):
        require_digest(tmp_path / "a", DIGEST)
