"""A folder of images, one folder a class inside it: DIR/class/*.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.contract import counted
from training.datasets import Dataset
from training.errors import InputError
from training.tables import MIN_CLASS_ROWS

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Pixels a side at most: the network is a small one, and a request holds every pixel.
MAX_SIDE = 256
# Of which pooling takes two.
MIN_SIDE = 2
WHITE = 255.0


class ImagesError(InputError):
    """A folder of images cannot train a network. One line: the folder or file, what was found, what is wanted."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path}: {found}")


def is_folder(data: str) -> bool:
    """Whether DATA of the command line is a folder."""
    return bool(data) and Path(data).is_dir()


def read(folder: Path) -> Dataset:
    """All images of the folder, classes and files in the order of their names; grey ones [N, H, W, 1], else RGB.

    Raises ImagesError.
    """
    classes = {
        entry.name: sorted(path for path in entry.iterdir() if path.suffix.lower() in SUFFIXES)
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not any(classes.values()):
        raise ImagesError(folder, f"no images in folders of it; wanted one folder a class, as in {folder}/cat/1.png")
    if len(classes) == 1:
        raise ImagesError(folder, f"one class, {next(iter(classes))!r}; wanted at least two folders of images")
    for label, paths in classes.items():
        if not label.isprintable():
            raise ImagesError(folder, f"a class named {label!r}; wanted names of letters that can be shown")
        if len(paths) < MIN_CLASS_ROWS:
            raise ImagesError(
                folder / label,
                f"{counted(len(paths), 'image') if paths else 'no images'}; wanted at least {MIN_CLASS_ROWS}, to "
                "train, to calibrate and to test",
            )
    paths = [path for of_class in classes.values() for path in of_class]
    return Dataset(
        name=f"{folder.resolve().name}-images",
        task="classification",
        x=_stacked(paths),
        y=np.repeat(np.arange(len(classes)), [len(of_class) for of_class in classes.values()]).astype(np.int64),
        target="class",
        attribution=f"folder {folder.resolve().name}",
        labels=tuple(classes),
        white=WHITE,
    )


def below(folder: Path) -> NDArray[np.float32]:
    """All images in the folder and in folders of it, whatever they show: [N, H, W, 1 or 3]. Raises ImagesError."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ImagesError(folder, f"no images in it; wanted files in {', '.join(SUFFIXES)}")
    return _stacked(paths)


def _stacked(paths: list[Path]) -> NDArray[np.float32]:
    modes, sizes = zip(*(_described(path) for path in paths), strict=True)
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise ImagesError(
                path, f"{size[0]} x {size[1]} pixels; wanted the size of {paths[0]}, {sizes[0][0]} x {sizes[0][1]}"
            )
    if max(sizes[0]) > MAX_SIDE or min(sizes[0]) < MIN_SIDE:
        raise ImagesError(paths[0], f"{sizes[0][0]} x {sizes[0][1]} pixels; wanted {MIN_SIDE} to {MAX_SIDE} a side")
    for path, mode in zip(paths, modes, strict=True):
        # Pillow would cut off what is above 255, and make white of nearly all.
        if mode.startswith(("I", "F")):
            raise ImagesError(path, f"pixels of the kind {mode}, deeper than a byte; wanted 8 bits a channel")
    mode = "L" if set(modes) <= {"L", "1"} else "RGB"
    return np.stack([_pixels(path, mode) for path in paths])


def _described(path: Path) -> tuple[str, tuple[int, int]]:
    """An image's mode and size, without reading its pixels."""
    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImagesError(path, "is no image that can be read") from error


def _pixels(path: Path, mode: str) -> NDArray[np.float32]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(mode), np.float32)
    except OSError as error:
        raise ImagesError(path, f"cannot be read ({error})") from error
    return pixels[..., np.newaxis] if mode == "L" else pixels
