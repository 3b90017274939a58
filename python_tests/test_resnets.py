"""What examples/resnet rests on: its reader of CIFAR-10, and its networks."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "resnet"


@pytest.fixture
def cifar(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cifar

    return cifar


@pytest.fixture
def resnets(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import resnets

    return resnets


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2's cPickle wrote, protocol 2: the form of the files that the authors publish."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    raw = images.tobytes()
    integer = b"J" + struct.pack("<i", len(images))
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + short(b"b") + b"\x87R"
    array += b"(K\x01" + integer + b"M\0\x0c\x86"  # the version; (n, 3072)
    array += (
        b"cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\0K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"  # rows first; the bytes
    entries = (
        short(b"batch_label")
        + short(b"one")
        + short(b"labels")
        + b"]("
        + b"".join(b"K" + bytes([n]) for n in labels)
        + b"e"
    )
    return b"\x80\x02}(" + entries + short(b"data") + array + b"u."


def write(folder: Path, make) -> list[tuple[np.ndarray, list[int]]]:
    folder.mkdir()
    random = np.random.default_rng(0)
    batches = []
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        images, labels = random.integers(0, 256, (3, 3072), np.uint8), random.integers(0, 10, 3).tolist()
        (folder / name).write_bytes(make(images, labels))
        batches.append((images, labels))
    return batches


@pytest.mark.parametrize("form", ["python 2", "protocol 2", "protocol 4"])
def test_batches_are_read(cifar, tmp_path: Path, form: str) -> None:
    def make(images, labels):
        if form == "python 2":
            raw = python2_pickle(images, labels)
            # NumPy's own reading agrees that this is such a file.
            np.testing.assert_array_equal(pickle.loads(raw, encoding="bytes")[b"data"], images)
            return raw
        return pickle.dumps({"data": images, "labels": labels}, int(form[-1]))

    batches = write(tmp_path / "cifar-10-batches-py", make)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train, test = cifar.load(folder, "train"), cifar.load(folder, "test")
        assert train.images.dtype == torch.uint8
        assert train.images.shape == (15, 3, 32, 32)
        expected = np.concatenate([images for images, _ in batches[:5]]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(train.images, expected)
        assert train.labels.tolist() == [label for _, labels in batches[:5] for label in labels]
        np.testing.assert_array_equal(test.images.flatten(1), batches[5][0])
        assert test.labels.tolist() == batches[5][1]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_run_nothing_and_what_is_no_batch_is_refused(cifar, tmp_path: Path) -> None:
    images, labels = np.zeros((2, 3072), np.uint8), [1, 2]
    folder, mark = tmp_path / "batches", tmp_path / "mark"
    good = pickle.dumps({"data": images, "labels": labels}, 2)
    eval_ = b"\x80\x02c__builtin__\neval\nU\x011\x85R."
    for raw, message in [
        (pickle.dumps({"data": Evil(mark)}), "expected an array of bytes, got"),
        (eval_, "expected an array of bytes, got"),
        (pickle.dumps({"data": np.array([object()], object), "labels": [1]}, 2), "expected 'u1', got"),
        (pickle.dumps({"data": images.astype(np.float32), "labels": labels}, 2), "expected 'u1', got"),
        (pickle.dumps({"data": np.asfortranarray(images), "labels": labels}, 2), "expected bytes by rows"),
        (pickle.dumps({"data": images[:, :100], "labels": labels}, 2), r"data: expected \(images, 3072\) bytes"),
        (pickle.dumps({"labels": labels}, 2), r"data: expected \(images, 3072\) bytes, got None"),
        (pickle.dumps([1], 2), "data: expected"),
        (pickle.dumps({"data": images, "labels": [1]}, 2), "labels: expected 2 from 0 to 9"),
        (pickle.dumps({"data": images, "labels": [1, 10]}, 2), "labels: expected 2 from 0 to 9"),
        (good.replace(b"M\x00\x0c", b"M\x01\x0c"), "expected bytes by rows"),
        (good[:-40], "expected a batch of CIFAR-10"),
        (b"", "expected a batch of CIFAR-10"),
    ]:
        folder.mkdir(exist_ok=True)
        (folder / "test_batch").write_bytes(raw)
        with pytest.raises(ValueError, match=message) as caught:
            cifar.load(folder, "test")
        assert "test_batch" in str(caught.value)
    assert not mark.exists()
    pickle.Unpickler(io.BytesIO(pickle.dumps(Evil(mark)))).load()
    assert mark.exists()  # what the plain one does
    with pytest.raises(FileNotFoundError):
        cifar.load(tmp_path / "nowhere", "test")


def test_damaged_batches_are_refused_or_read_as_other_bytes(cifar, tmp_path: Path) -> None:
    raw = python2_pickle(np.zeros((1, 3072), np.uint8), [3])
    random = np.random.default_rng(1)
    (tmp_path / "b").mkdir()
    for _ in range(300):
        damaged = bytearray(raw)
        place = (
            int(random.integers(len(raw)))
            if random.random() < 0.3
            else int(random.choice([*range(200), *range(len(raw) - 8, len(raw))]))
        )
        damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "b" / "test_batch").write_bytes(damaged)
        try:
            split = cifar.load(tmp_path / "b", "test")
        except ValueError:
            continue
        assert split.images.shape == (1, 3, 32, 32)
        assert split.labels.shape == (1,)


def test_networks_have_the_published_sizes_and_names(resnets) -> None:
    small, large = resnets.resnet20(), resnets.resnet50()
    assert sum(p.numel() for p in small.parameters()) == 269_722
    assert sum(p.numel() for p in large.parameters()) == 25_557_032
    # As torchvision's has: 161 parameters, and 3 buffers for each of 53 norms.
    state = large.state_dict()
    assert len(state) == 161 + 3 * 53
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["layer3.5.bn2.running_var"].shape == (256,)
    assert state["fc.weight"].shape == (1000, 2048)
    with torch.no_grad():
        assert small.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert small.layer3(torch.randn(1, 32, 16, 16)).shape == (1, 64, 8, 8)
        assert large.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_shortcuts_are_those_of_option_a(resnets) -> None:
    """Without its convolutions a block passes on every second pixel, and zeros for the channels that are new."""
    block = resnets.Basic(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel, row, column] = x[:, channel, 2 * row, 2 * column].clamp_min(0)
    torch.testing.assert_close(block(x), expected)
