"""Images and their order: data sets, the dealing of batches to ranks, loaders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder

from .distributed import World
from .interrupt import ignore_in_worker
from .seeding import Purpose, derive, seed_cpu
from .settings import Settings, UsageError

NO_TARGET = -1
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Source(Protocol):
    """Images with class numbers."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def target(self, index: int) -> int:
        """Class number."""

    def load(self, index: int) -> Image.Image:
        """Decoded RGB image."""


class Folder:
    """One folder per class, as torchvision's ImageFolder has it."""

    def __init__(self, path: Path) -> None:
        try:
            self._images = ImageFolder(str(path), allow_empty=True)
        except FileNotFoundError:
            raise UsageError(f"--data {path.parent}: no class folders in {path}") from None
        self.classes = tuple(self._images.classes)
        filled = {target for _, target in self._images.samples}
        empty = [name for number, name in enumerate(self.classes) if number not in filled]
        if not filled:
            raise UsageError(
                f"--data {path.parent}: no images in {path}; allowed: {', '.join(self._images.extensions)}"
            )
        if empty:
            raise UsageError(f"--data {path.parent}: no images of {_listed(empty)} in {path}")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images.samples[index][0]

    def target(self, index: int) -> int:
        return self._images.samples[index][1]

    def load(self, index: int) -> Image.Image:
        return self._images.loader(self.name(index))


class Digits:
    """Handwritten digits of scikit-learn: 1,797 images of 8x8, every fifth (stratified) held out."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        numbers = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        self._numbers = numbers[0 if train else 1]
        self._images = np.rint(images.reshape(-1, 8, 8)[self._numbers] * (255 / 16)).astype(np.uint8)
        self._targets = targets[self._numbers].tolist()

    def __len__(self) -> int:
        return len(self._targets)

    def name(self, index: int) -> str:
        return f"digit {self._numbers[index]}"

    def target(self, index: int) -> int:
        return self._targets[index]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. `train` and `val` are None for synthetic data."""

    classes: tuple[str, ...]
    train: Source | None
    val: Source | None

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            "classes": list(self.classes),
            "training images": len(self.train) if self.train else 0,
            "held-out images": len(self.val) if self.val else 0,
        }


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def open_data(settings: Settings) -> Data:
    """Find the images of `--data`. Raises `UsageError` if something about them is wrong."""
    if settings.data == "synthetic":
        return Data(tuple(map(str, range(1000))), None, None)
    if settings.data == "digits":
        return Data(Digits.classes, Digits(train=True), Digits(train=False))

    root = Path(settings.data)
    if not root.is_dir():
        raise UsageError(
            f"--data {root}: no such folder; allowed: digits, synthetic, or a folder with train/ and val/"
        )
    missing = [part for part in ("train", "val") if not (root / part).is_dir()]
    if missing:
        raise UsageError(
            f"--data {root}: {' and '.join(missing)} missing; it must hold train/CLASS/ and val/CLASS/"
        )
    train, val = Folder(root / "train"), Folder(root / "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        parts = [
            f"only in {part}: {_listed(names)}"
            for part, names in (("train", only_train), ("val", only_val))
            if names
        ]
        raise UsageError(f"--data {root}: train and val have different classes; {'; '.join(parts)}")
    if len(train.classes) < 2:
        raise UsageError(f"--data {root}: only one class, {train.classes[0]}; at least 2 are needed")
    return Data(train.classes, train, val)


def updates_per_epoch(settings: Settings, data: Data) -> int:
    """Updates of one epoch; images that do not fill a batch wait for another epoch's order."""
    if data.train is None:
        return settings.synthetic_updates
    images = len(data.train)
    if images < settings.batch_size:
        raise UsageError(f"--batch-size {settings.batch_size}: must be at most the {images} training images")
    return images // settings.batch_size


class Draw(NamedTuple):
    """One sample: which image, and the place in the run that seeds its augmentation."""

    index: int
    epoch: int = 0
    position: int = 0


class TrainingBatches(Sampler[list[Draw]]):
    """The forward passes of one rank, in order.

    The order of an epoch's images follows from seed and epoch alone. Update u takes the next `batch_size` of
    them and deals them like cards to batch_size / device_batch passes; the passes go round the ranks. So any
    number of ranks computes the same passes, and the copies of repeated augmentation meet in different ones.
    """

    def __init__(self, settings: Settings, images: int, world: World) -> None:
        self._settings, self._images, self._world = settings, images, world
        self.epoch = 0
        self.first_update = 0

    @property
    def updates(self) -> int:
        """Updates of a whole epoch."""
        return self._images // self._settings.batch_size

    def order(self) -> Tensor:
        """Image numbers of the epoch."""
        generator = torch.Generator().manual_seed(derive(self._settings.seed, Purpose.ORDER, self.epoch))
        order = torch.randperm(self._images, generator=generator)
        return order.repeat_interleave(self._settings.repeats)[: self._images]

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order().tolist()
        batch = self._settings.batch_size
        passes = batch // self._settings.device_batch
        for update in range(self.first_update, self.updates):
            for number in range(self._world.rank, passes, self._world.size):
                positions = range(update * batch + number, (update + 1) * batch, passes)
                yield [Draw(order[position], self.epoch, position) for position in positions]

    def __len__(self) -> int:
        passes = self._settings.batch_size // self._settings.device_batch
        return (self.updates - self.first_update) * (passes // self._world.size)


class EvaluationBatches(Sampler[list[Draw]]):
    """Every image once, over all ranks; batches are filled up with blanks so that all have one shape."""

    def __init__(self, images: int, batch: int, world: World) -> None:
        self._images, self._batch, self._world = images, batch, world

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(len(self)):
            start = (number * self._world.size + self._world.rank) * self._batch
            yield [
                Draw(index if index < self._images else NO_TARGET)
                for index in range(start, start + self._batch)
            ]

    def __len__(self) -> int:
        return -(-self._images // (self._batch * self._world.size))


class Samples(Dataset):
    """Augmented images for the loader: (uint8 CHW tensor, target, names of images found unreadable).

    In training, an unreadable image is replaced by the next one in the data set's own order that can be read,
    which depends on nothing but the files, so that resuming and other numbers of ranks are not affected. In
    evaluation it becomes a blank without a target.
    """

    def __init__(self, source: Source, transform: Any, size: int, seed: int, training: bool) -> None:
        self._source, self._transform, self._size = source, transform, size
        self._seed, self._training = seed, training

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, list[str]]:
        blank = torch.zeros(3, self._size, self._size, dtype=torch.uint8)
        if draw.index == NO_TARGET:
            return blank, NO_TARGET, []
        unreadable: list[str] = []
        for offset in range(len(self._source) if self._training else 1):
            index = (draw.index + offset) % len(self._source)
            try:
                image = self._source.load(index)
            except UNREADABLE:
                unreadable.append(self._source.name(index))
                continue
            if self._training:
                seed_cpu(derive(self._seed, Purpose.SAMPLE, draw.epoch, draw.position))
            return torch.as_tensor(self._transform(image)), self._source.target(index), unreadable
        # In training nothing at all can be read: the count is beyond any limit when it is next looked at.
        return blank, self._source.target(draw.index) if self._training else NO_TARGET, unreadable


def _collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, targets, unreadable = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets), [name for names in unreadable for name in names]


def count_workers(settings: Settings, world: World) -> int:
    """Loader processes of this rank."""
    if settings.workers >= 0:
        return settings.workers
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _loader(samples: Samples, batches: Sampler[list[Draw]], workers: int, world: World) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=ignore_in_worker,
    )


def training_loader(
    settings: Settings, source: Source, interpolation: str, world: World
) -> tuple[DataLoader, TrainingBatches]:
    """Loader of augmented training images, and the batches to tell epoch and first update."""
    try:
        transform = create_transform(
            settings.img_size,
            is_training=True,
            use_prefetcher=True,
            scale=(settings.crop_scale, 1.0),
            hflip=settings.hflip,
            color_jitter=None,
            auto_augment=None if settings.rand_augment == "none" else settings.rand_augment,
            interpolation=interpolation,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"--rand-augment {settings.rand_augment}: no policy of timm ({error}); "
            f"allowed: none, or a string like {Settings.rand_augment}"
        ) from None
    samples = Samples(source, transform, settings.img_size, settings.seed, training=True)
    batches = TrainingBatches(settings, len(source), world)
    return _loader(samples, batches, count_workers(settings, world), world), batches


def evaluation_loader(settings: Settings, source: Source, interpolation: str, world: World) -> DataLoader:
    """Loader of all held-out images, split among the ranks."""
    transform = create_transform(
        settings.img_size, use_prefetcher=True, crop_pct=settings.crop_pct, interpolation=interpolation
    )
    samples = Samples(source, transform, settings.img_size, settings.seed, training=False)
    batches = EvaluationBatches(len(source), settings.device_batch, world)
    return _loader(samples, batches, count_workers(settings, world), world)


class Synthetic:
    """Endless batches of one set of random images that already lie on the device."""

    def __init__(self, settings: Settings, classes: int, passes: int, world: World) -> None:
        shape = (settings.device_batch, 3, settings.img_size, settings.img_size)
        self._images = torch.randint(256, shape, dtype=torch.uint8, device=world.device)
        self._targets = torch.randint(classes, shape[:1], device=world.device)
        self._passes = passes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for _ in range(self._passes):
            yield self._images, self._targets, []

    def __len__(self) -> int:
        return self._passes
