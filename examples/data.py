"""Real data to train on: handwritten digits, which travel with scikit-learn, MNIST and CIFAR-10."""

import lightning.pytorch as pl
import torch
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
        from sklearn.datasets import load_digits

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


class Mnist(pl.LightningDataModule):
    """MNIST in torchvision's layout.

    Args:
        root: Folder that holds ``MNIST/raw``, or is to hold it.
        batch_size: Samples in a batch.
        download: Whether to download the data if they are not there.
        pad: Zeros round the images of 28 x 28 pixels; 2 make them as large as those of CIFAR-10.
    """

    def __init__(self, root: str = "data", batch_size: int = 32, download: bool = True, pad: int = 0) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.download = download
        self.pad = pad

    def prepare_data(self) -> None:
        if self.download:
            from torchvision.datasets import MNIST

            MNIST(self.root, download=True)

    def setup(self, stage: str) -> None:
        self.train_set = self._images(train=True)
        self.val_set = self._images(train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 1000)

    def _images(self, train: bool) -> Dataset:
        from torch.nn.functional import pad
        from torchvision.datasets import MNIST

        images = MNIST(self.root, train=train)
        inputs = pad((images.data.float() / 255 - 0.1307) / 0.3081, [self.pad] * 4)
        return TensorDataset(inputs.unsqueeze(1), images.targets)


class Cifar10(pl.LightningDataModule):
    """CIFAR-10 in torchvision's layout.

    Args:
        root: Folder that holds ``cifar-10-batches-py``, or is to hold it.
        batch_size: Samples in a batch.
        download: Whether to download the data if they are not there.
        augment: Random crops and flips of the training images.
        classes: The classes to use, all if not given; their labels become 0, 1, ...
        num_train: Use only the first images of the training set, if given.
        num_workers: Worker processes of the dataloaders.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        download: bool = True,
        augment: bool = True,
        classes: list[int] | None = None,
        num_train: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.download = download
        self.augment = augment
        self.classes = classes
        self.num_train = num_train
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        if self.download:
            from torchvision.datasets import CIFAR10

            CIFAR10(self.root, download=True)

    def setup(self, stage: str) -> None:
        self.train_set = self._images(train=True)
        self.val_set = self._images(train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 2 * self.batch_size, num_workers=self.num_workers)

    def _images(self, train: bool) -> Dataset:
        from torchvision import transforms
        from torchvision.datasets import CIFAR10

        steps = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
        if train and self.augment:
            steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *steps]
        new_labels = None if self.classes is None else {label: i for i, label in enumerate(self.classes)}
        images = CIFAR10(
            self.root,
            train=train,
            transform=transforms.Compose(steps),
            target_transform=None if new_labels is None else new_labels.__getitem__,
        )
        indices = [i for i, label in enumerate(images.targets) if new_labels is None or label in new_labels]
        return Subset(images, indices[: self.num_train] if train else indices)
