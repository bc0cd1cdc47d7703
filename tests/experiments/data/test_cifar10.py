"""CIFAR-10 in the files that torchvision reads: small ones of the same form."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision

from ensembles.experiments.data import cifar10
from ensembles.experiments.data.sources import load_images

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


class OldUint8:
    """Pickles as a uint8 whose flags are numbers and not booleans, as they were in 2009.

    NumPy 2.4.0 deprecates that; later releases let the flags of the official files, (0, 1), pass.
    """

    def __reduce__(self):
        return np.dtype, ("u1", 0, 0)


class OldArray:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        function, start, state = self.array.__reduce__()
        return function, start, (*state[:2], OldUint8(), *state[3:])


@pytest.fixture
def files(monkeypatch):
    """Files like CIFAR-10's with four images each, and torchvision expecting them."""
    random = np.random.RandomState(0)
    contents = {
        name: {
            "data": OldArray(random.randint(0, 256, (4, 3072)).astype(np.uint8)),
            "labels": [k, 1, 2, 9],
        }
        for k, name in enumerate(BATCHES)
    }
    contents["batches.meta"] = {"label_names": list(cifar10.CLASSES)}
    raw = {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}
    known = [[name, hashlib.md5(data).hexdigest()] for name, data in raw.items()]
    official = torchvision.datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", known[:5])
    monkeypatch.setattr(official, "test_list", known[5:6])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": known[6][1]}
    monkeypatch.setattr(official, "meta", meta)
    return raw, {name: contents[name]["data"].array for name in BATCHES}


def stored(folder, raw):
    home = folder / "cifar-10-batches-py"
    home.mkdir()
    for name, data in raw.items():
        (home / name).write_bytes(data)
    return home


def archive(raw):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in raw.items():
            about = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return file.getvalue()


def test_the_batches_are_read_in_order_as_channels_first(files, tmp_path):
    raw, data = files
    stored(tmp_path, raw)
    train, test = (load_images("cifar10", split, root=tmp_path) for split in ("train", "test"))
    expected = np.concatenate([data[name] for name in BATCHES[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train.pixels.numpy(), expected)
    assert np.array_equal(test.pixels.numpy(), data["test_batch"].reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == [n for k in range(5) for n in (k, 1, 2, 9)]
    assert test.labels.tolist() == [5, 1, 2, 9]
    assert train.indices.tolist() == list(range(20))
    assert train.flippable
    assert (train.split, test.split) == ("train", "test")


def test_missing_files_are_told_with_folder_and_option(files, tmp_path):
    raw, _ = files
    with pytest.raises(FileNotFoundError) as caught:
        load_images("cifar10", "test", root=tmp_path)
    told = str(caught.value)
    assert f"CIFAR-10 is not in {tmp_path}/cifar-10-batches-py: data_batch_1, " in told
    assert "download=True (--download, 170 MB)" in told
    home = stored(tmp_path, raw)
    (home / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"py: data_batch_3 missing"):
        load_images("cifar10", "test", root=tmp_path)


@pytest.mark.parametrize("download", [False, True])
def test_a_damaged_batch_is_told_and_left_as_it_is(files, tmp_path, download):
    raw, _ = files
    home = stored(tmp_path, raw)
    (home / "data_batch_2").write_bytes(raw["data_batch_2"][:-9])
    with pytest.raises(ValueError, match=r"data_batch_2 holds other content.*Move it away"):
        load_images("cifar10", "train", root=tmp_path, download=download)
    assert (home / "data_batch_2").read_bytes() == raw["data_batch_2"][:-9]


def test_the_archive_is_fetched_once_and_only_what_is_missing_is_unpacked(
    files, tmp_path, served, monkeypatch
):
    raw, data = files
    served.files["/cifar-10-python.tar.gz"] = content = archive(raw)
    address = f"{served.url}/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", address)
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
    served.cut_after = [1000]
    with pytest.raises(ConnectionError, match="the next attempt continues there"):
        load_images("cifar10", "test", root=tmp_path, download=True)
    images = load_images("cifar10", "test", root=tmp_path, download=True)
    assert np.array_equal(images.pixels.numpy(), data["test_batch"].reshape(-1, 3, 32, 32))
    assert [wanted for _, wanted in served.asked] == [None, "bytes=1000-"]
    home = tmp_path / "cifar-10-batches-py"
    assert sorted(path.name for path in home.iterdir()) == sorted(raw)
    (home / "data_batch_1").unlink()
    kept = (home / "test_batch").stat()
    load_images("cifar10", "test", root=tmp_path, download=True)
    assert (home / "test_batch").stat().st_mtime_ns == kept.st_mtime_ns
    assert (home / "data_batch_1").read_bytes() == raw["data_batch_1"]
    assert len(served.asked) == 2


def test_another_archive_is_refused(files, tmp_path, served, monkeypatch):
    served.files["/cifar-10-python.tar.gz"] = archive(files[0])
    address = f"{served.url}/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", address)
    with pytest.raises(ValueError, match=f"expected {cifar10.ARCHIVE_SHA256}"):
        load_images("cifar10", "test", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_normalised_by_the_published_figures():
    pixels = np.full((1, 3, 32, 32), 255, dtype=np.uint8)
    found = cifar10.cifar10_set("a", "1", "test", pixels, np.zeros(1, dtype=np.int64))
    expected = [(1 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]
    torch.testing.assert_close(found.normalised()[0, :, 0, 0], torch.tensor(expected))
