"""Data sources: shapes, values, determinism, and what bad data gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.errors import DataError
from qat.torchvision import import_torchvision
from qat.train.data import AugmentSpec, DataSpec, InputSpec, input_shape, load_data
from qat.train.data.base import Split
from qat.train.data.fashion_mnist import read_idx
from qat.train.data.transforms import augment_tensor, image_pixels, place_image, place_tensor, to_format


def write_images(
    folder: Path, count: int = 3, size: tuple[int, int] = (12, 10), mode: str = "RGB", suffix: str = ".png"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, folder.name)))
    for i in range(count):
        shape = size if mode == "L" else (*size, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{i}{suffix}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name)
    return tmp_path


def spec_of(root: Path, **changes: object) -> DataSpec:
    values: dict[str, object] = {"name": "image_folder", "root": root, "batch_size": 2, **changes}
    return DataSpec(**values)  # type: ignore[arg-type]


def all_of(split: Split, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*split.batches(epoch), strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_digits_splits_are_fixed_stratified_and_disjoint() -> None:
    data = load_data(DataSpec("digits"))
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.train is not None
    assert data.test is not None
    assert (data.train.n, data.test.n, data.calibration.n) == (1437, 360, 1437)
    x, y = all_of(data.test)
    assert x.dtype == torch.float32
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0
    counts = torch.bincount(y, minlength=10)
    assert int(counts.min()) >= 33
    assert int(counts.max()) <= 39
    again, labels = all_of(load_data(DataSpec("digits", seed=5)).test)  # type: ignore[arg-type]
    assert torch.equal(again, x)
    assert torch.equal(labels, y)


def test_epochs_are_shuffled_differently_and_reproducibly() -> None:
    train = load_data(DataSpec("digits", batch_size=100, augment=AugmentSpec(crop_padding=1, flip=True))).train
    assert train is not None
    first, second = all_of(train, 0), all_of(train, 1)
    assert not torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first, all_of(train, 0), strict=True))
    assert len(first[1]) == 1400  # a last, smaller batch is left out of training
    assert train.steps == 14


def test_calibration_images_are_the_same_every_time_and_mix_the_classes() -> None:
    data = load_data(DataSpec("digits"))
    x = torch.cat(list(data.calibration.images(100)))
    assert x.shape == (100, 1, 8, 8)
    assert torch.equal(x, torch.cat(list(data.calibration.images(100))))
    labels = next(data.calibration.batches(0))[1]
    assert len(labels.unique()) == 10


def test_limits_bound_each_split() -> None:
    data = load_data(DataSpec("digits", limit={"train": 70, "test": 7, "calibration": 20}))
    assert data.train is not None
    assert data.test is not None
    assert (data.train.n, data.calibration.n, data.test.n) == (70, 20, 7)
    assert len(all_of(data.test)[0]) == 7


def test_input_values_follow_scale_mean_and_std() -> None:
    plain = load_data(DataSpec("digits")).calibration.sample(5)
    wide = load_data(DataSpec("digits", input=InputSpec(scale=255))).calibration.sample(5)
    torch.testing.assert_close(wide, plain * 255)
    normal = load_data(DataSpec("digits", input=InputSpec(mean=(0.3,), std=(0.5,)))).calibration.sample(5)
    torch.testing.assert_close(normal, (plain - 0.3) / 0.5)


def test_grey_scans_can_be_fed_to_colour_models_and_resized() -> None:
    spec = DataSpec("digits", input=InputSpec(size=(16, 12), format="RGB"))
    assert input_shape(spec) == (3, 16, 12)
    data = load_data(spec)
    assert data.input_shape == (3, 16, 12)
    x = data.calibration.sample(2)
    assert x.shape == (2, 3, 16, 12)
    assert torch.equal(x[:, 0], x[:, 2])


def test_cifar10_layouts_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    y = np.arange(12) % 10
    npz, binary = tmp_path / "a", tmp_path / "b" / "cifar-10-batches-bin"
    npz.mkdir()
    binary.mkdir(parents=True)
    np.savez(npz / "cifar10.npz", x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[10:])
    records = np.concatenate([y[:, None].astype(np.uint8), x.transpose(0, 3, 1, 2).reshape(12, -1)], 1)
    for i in range(5):
        records[2 * i : 2 * i + 2].tofile(binary / f"data_batch_{i + 1}.bin")
    records[10:].tofile(binary / "test_batch.bin")
    left = load_data(DataSpec("cifar10", root=npz))
    right = load_data(DataSpec("cifar10", root=tmp_path / "b"))
    assert left.input_shape == (3, 32, 32)
    assert torch.equal(left.calibration.sample(10), right.calibration.sample(10))
    assert left.test is not None
    assert right.test is not None
    assert torch.equal(all_of(left.test)[0], all_of(right.test)[0])


def test_damaged_cifar10_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar10.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"cifar10\.npz"):
        load_data(DataSpec("cifar10", root=tmp_path))
    (tmp_path / "cifar10.npz").unlink()
    with pytest.raises(DataError, match=r"unpack CIFAR-10 there"):
        load_data(DataSpec("cifar10", root=tmp_path))


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", x_train=np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match=r"cifar10\.npz"):
        load_data(DataSpec("cifar10", root=tmp_path))


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(head + array.tobytes()) if path.suffix == ".gz" else head + array.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_compressed_and_plain_files(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8))
    data = load_data(DataSpec("fashion_mnist", root=tmp_path))
    assert data.input_shape == (1, 28, 28)
    assert data.test is not None
    assert all_of(data.test)[1].tolist() == [0, 1, 2, 3]


def test_missing_fashion_mnist_names_the_folder_and_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is not in .*raw; put the four"):
        load_data(DataSpec("fashion_mnist", root=tmp_path))


def test_truncated_idx_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x-ubyte"
    write_idx(path, np.zeros((4, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="x-ubyte is truncated"):
        read_idx(path)
    packed = tmp_path / "y-ubyte.gz"
    write_idx(packed, np.zeros((4, 3), np.uint8))
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"y-ubyte\.gz"):
        read_idx(packed)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="no IDX file"):
        read_idx(path)


def test_real_fashion_mnist(data_root: Path) -> None:
    data = load_data(DataSpec("fashion_mnist", root=data_root / "fashion-mnist", limit={"test": 50}))
    assert data.train is not None
    assert data.train.n == 60000
    assert data.test is not None
    assert all_of(data.test)[0].shape == (50, 1, 28, 28)


def test_image_folder_numbers_classes_in_sorted_order(folder: Path) -> None:
    data = load_data(spec_of(folder))
    assert data.num_classes == 2
    assert data.input_shape == (3, 12, 10)
    assert data.test is not None
    x, y = all_of(data.test)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(folder / "val" / "dog" / "1.png"), np.float32)
    torch.testing.assert_close(x[4], torch.from_numpy(pixels).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_the_batches(folder: Path, workers: int) -> None:
    augment = AugmentSpec(flip=True, crop_padding=2, random_area=(0.3, 1.0))
    reference = load_data(spec_of(folder, workers=0, augment=augment)).train
    train = load_data(spec_of(folder, workers=workers, augment=augment)).train
    assert reference is not None
    assert train is not None
    for epoch in range(2):
        for a, b in zip(all_of(reference, epoch), all_of(train, epoch), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(all_of(train, 0)[0], all_of(train, 1)[0])


def test_a_batch_loop_may_stop_early(folder: Path) -> None:
    train = load_data(spec_of(folder, workers=2)).train
    assert train is not None
    x, _ = next(iter(train))
    assert x.shape == (2, 3, 12, 10)


def test_bgr_and_grey_inputs(folder: Path) -> None:
    rgb = load_data(spec_of(folder)).calibration.sample(2)
    bgr = load_data(spec_of(folder, input=InputSpec(format="BGR"))).calibration.sample(2)
    assert torch.equal(bgr, rgb.flip(1))
    grey = load_data(spec_of(folder, input=InputSpec(format="GRAY"))).calibration.sample(2)
    assert grey.shape == (2, 1, 12, 10)
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma, atol=1.01 / 255, rtol=0)


def test_resize_and_crop_agree_with_torchvision(tmp_path: Path) -> None:
    transforms = import_torchvision("transforms")
    write_images(tmp_path, 2, (50, 37))
    write_images(tmp_path / "wide", 2, (31, 44))
    for path in [*tmp_path.glob("*.png"), *tmp_path.glob("wide/*.png")]:
        image = Image.open(path)
        ours = place_image(image, InputSpec(resize=24, crop=(20, 20)))
        theirs = transforms.CenterCrop(20)(transforms.Resize(24)(image))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_tensor_and_image_resizing_agree(tmp_path: Path) -> None:
    write_images(tmp_path, 1, (40, 30))
    image = Image.open(tmp_path / "0.png")
    for spec in (InputSpec(size=(20, 22)), InputSpec(resize=24, crop=(20, 28)), InputSpec(crop=(50, 28))):
        ours = place_tensor(image_pixels(image, "RGB").unsqueeze(0), spec)[0]
        theirs = image_pixels(place_image(image, spec), "RGB")
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_to_format_of_colour_images() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(to_format(x, "RGB"), x)
    assert torch.equal(to_format(x, "BGR"), x.flip(1))
    assert to_format(x, "GRAY").shape == (2, 1, 4, 4)


def test_augmentation_crops_and_mirrors_whole_images() -> None:
    x = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).reshape(2, 1, 4, 4)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        for before, after in zip(x, augment_tensor(x, AugmentSpec(flip=True), generator), strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
    out = augment_tensor(x + 1, AugmentSpec(crop_padding=1), generator)
    assert out.shape == x.shape
    assert set(out.flatten().tolist()) <= {0, *(x + 1).flatten().tolist()}


def test_labels_files_number_folders_and_flat_files(folder: Path) -> None:
    (folder / "classes.txt").write_text("dog a pet\ncat another\nbird\n")
    data = load_data(spec_of(folder, labels="classes.txt"))
    assert data.num_classes == 3
    assert data.test is not None
    assert all_of(data.test)[1].tolist() == [1, 1, 1, 0, 0, 0]
    (folder / "labels.json").write_text(json.dumps({"cat": {"index": 7}, "dog": 2}))
    data = load_data(spec_of(folder, labels="labels.json"))
    assert data.num_classes == 8
    assert data.test is not None
    assert all_of(data.test)[1].tolist() == [7, 7, 7, 2, 2, 2]
    flat = folder / "flat"
    write_images(flat)
    (flat / "labels.json").write_text(json.dumps({f"{i}.png": 2 - i for i in range(3)}))
    data = load_data(spec_of(flat, labels="labels.json", train=None, test="."))
    assert data.test is not None
    assert all_of(data.test)[1].tolist() == [2, 1, 0]


def test_an_unlabelled_flat_folder_serves_calibration_only(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = load_data(spec_of(tmp_path))
    assert data.train is None
    assert data.test is None
    assert data.calibration.n == 3
    assert not data.calibration.labelled
    assert data.calibration.sample(3).shape == (3, 3, 12, 10)


def test_a_calibration_folder_of_its_own(folder: Path) -> None:
    write_images(folder / "calib", 2)
    data = load_data(spec_of(folder, calibration="calib"))
    assert data.calibration.n == 2
    assert data.train is not None
    assert data.train.n == 6


def test_images_of_different_sizes_need_a_size(folder: Path) -> None:
    write_images(folder / "val" / "emu", 1, (9, 9))
    write_images(folder / "train" / "emu", 1, (12, 10))
    test = load_data(spec_of(folder)).test
    assert test is not None
    with pytest.raises(DataError, match=r"emu.0\.png is 9x9 where 12x10 was expected; give data\.input\.size"):
        list(test)
    test = load_data(spec_of(folder, input=InputSpec(size=(8, 8)))).test
    assert test is not None
    assert all_of(test)[0].shape == (7, 3, 8, 8)


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_file_is_named_and_skipped_only_on_request(folder: Path, content: bytes) -> None:
    bad = folder / "val" / "cat" / "1.png"
    bad.write_bytes(content)
    test = load_data(spec_of(folder)).test
    assert test is not None
    with pytest.raises(DataError, match=r"cat.1\.png.*--skip-bad"):
        list(test)
    data = load_data(spec_of(folder, skip_bad=True))
    assert data.test is not None
    assert len(all_of(data.test)[1]) == 5
    list(data.test)
    assert list(data.skipped.files) == [str(bad)]
    assert data.skipped.summary() == f"skipped 1 unreadable file: {bad}"


def test_a_truncated_jpeg_is_named(folder: Path) -> None:
    write_images(folder / "val" / "cat", 1, (64, 64), suffix=".jpg")
    path = folder / "val" / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:400])
    test = load_data(spec_of(folder, input=InputSpec(size=(8, 8)))).test
    assert test is not None
    with pytest.raises(DataError, match=r"cannot read the image .*0\.jpg"):
        list(test)


def test_a_sixteen_bit_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has pixels of more than 8 bits"):
        load_data(spec_of(tmp_path))


def test_a_foreign_file_is_named_and_skipped_only_on_request(folder: Path) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is not a JPEG or PNG"):
        load_data(spec_of(folder))
    data = load_data(spec_of(folder, skip_bad=True))
    assert data.train is not None
    assert data.train.n == 6
    assert len(data.skipped.files) == 1
    (folder / "train" / "cat" / "notes.txt").unlink()
    (folder / "train" / "cat" / ".DS_Store").write_text("hidden")
    assert load_data(spec_of(folder)).calibration.n == 6


def test_nothing_readable_is_an_error_even_when_skipping(folder: Path) -> None:
    for path in (folder / "val").glob("*/*.png"):
        path.write_bytes(b"x")
    test = load_data(spec_of(folder, skip_bad=True)).test
    assert test is not None
    with pytest.raises(DataError, match="no readable image"):
        list(test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": None}, "needs a folder; give data.root"),
        ({"root": Path("nowhere")}, "nowhere does not exist"),
        ({"name": "cifar11"}, "did you mean 'cifar10'"),
        ({"calibration": "none"}, "none does not exist"),
        ({"labels": "none.json"}, "cannot read the labels file"),
        ({"input": InputSpec(mean=(0.5,))}, "data.input.mean has 1 values for 3 channels"),
        ({"input": InputSpec(std=(1.0, 0.0, 1.0))}, "data.input.std has a value that is not positive"),
        ({"input": InputSpec(size=(8, 8), crop=(9, 9))}, "size is 8x8 but resize and crop make 9x9"),
    ],
)
def test_bad_specifications(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec_of(**{"root": folder, **change}))  # type: ignore[arg-type]


def test_empty_folders_and_unknown_classes_are_named(folder: Path) -> None:
    (folder / "val" / "fox").mkdir()
    with pytest.raises(DataError, match=r"class folder .*fox is not among the 2 classes"):
        load_data(spec_of(folder))
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty has no JPEG or PNG images"):
        load_data(spec_of(empty))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", "malformed"),
        ("a.json", '{"cat": "x"}', "malformed"),
        ("a.json", '{"cat": -1}', "negative"),
        ("a.txt", "", "empty"),
        ("a.txt", "cat\ncat\n", "twice"),
    ],
)
def test_malformed_labels(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(spec_of(folder, labels=name))
