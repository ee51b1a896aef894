"""Image classification: a folder of class folders, an .npz file, or rows with a path or a picture."""

import io
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from geolora.errors import DataError, SettingError, first_line, install, listed, nearest, shown
from geolora.files.reading import is_file, is_folder, most_unpacked
from geolora.settings.train_config import TrainConfig
from geolora.tasks.csv_rows import TOO_LARGE
from geolora.tasks.rows import classes
from geolora.tasks.rows import column as column_of
from geolora.tasks.task import (
    Data,
    Loaded,
    Rows,
    Task,
    class_settings,
    loading,
    names_of_heads,
    rows_of,
    source_of,
    with_classes,
    with_head,
)

UNREADABLE = (
    EOFError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise for a damaged .npz file."""
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ARRAYS = {
    "--train": {"images": ("images", "x", "x_train"), "labels": ("labels", "y", "y_train")},
    "--eval": {"images": ("images", "x", "x_test"), "labels": ("labels", "y", "y_test")},
}
"""What an .npz file must hold, and the names it may have."""


class ImageClassification(Task):
    """Pictures to a class."""

    peft_type = ""
    arguments: ClassVar[dict[str, Any]] = {
        "remove_unused_columns": False
    }  # of the examples, whose pictures are no tensors yet

    def read(self, config: TrainConfig) -> Data:
        """Pictures as arrays (height, width[, 3]) uint8, or as (path, size of the file in bytes)."""
        if find_spec("PIL") is None:
            raise SettingError(
                f"`--task image-classification` needs the package `pillow`. Run: {install('images')}."
            )
        sides = [(flag, _pictures(config, flag)) for flag in ("--train", "--eval")]
        train, held_out = (
            Rows(
                rows.inputs, classes(rows.labels, config.label, Path(source_of(config, flag)).name)
            )
            for flag, rows in sides
        )
        return with_classes(train, held_out, config.label)

    def load(self, config: TrainConfig, data: Data) -> Loaded:
        """With a head for the classes; pictures are made as the model's image processor says."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        def load(source: str) -> Any:
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
            return processor, *with_head(
                AutoModelForImageClassification, source, config, **class_settings(data.names)
            )

        processor, model, info = loading(config, load)

        def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            pictures = [opened(example["image"]) for example in examples]
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            return {
                "pixel_values": pixels,
                "labels": torch.tensor([example["labels"] for example in examples]),
            }

        return Loaded(model, processor, names_of_heads(model, info), collate)

    def encode(
        self,
        loaded: Loaded,  # noqa: ARG002
        rows: Rows,
        config: TrainConfig,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """The pictures as they are: they become tensors batch by batch."""
        return [
            {"image": image, "labels": label}
            for image, label in zip(rows.inputs, rows.labels, strict=True)
        ]

    def length(self, example: dict[str, Any]) -> int:  # noqa: ARG002
        """All alike."""
        return 1


def opened(image: Any) -> Any:
    """A PIL image in RGB, of an array or a file.

    Raises:
        DataError: the file is not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, tuple):
        return Image.fromarray(image).convert("RGB")
    try:
        with Image.open(image[0]) as file:
            return upright(file)
    except (
        OSError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{image[0]} is not a picture that can be read: {error}.") from error


def upright(picture: Any) -> Any:
    """A PIL image in RGB, turned as its EXIF data say: cameras save a picture as the sensor lies, and people see it so."""
    from PIL import ImageOps

    pixels = picture.convert("RGB")  # first: what is wrong with the pixels is no matter of EXIF
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception:  # noqa: BLE001 (damaged EXIF data raise whatever their bytes lead to; no viewer turns by them)
        return pixels


def _pictures(config: TrainConfig, flag: str) -> Rows:
    path = Path(source_of(config, flag))
    if is_folder(path):
        rows = _of_folder(path, flag)
    elif path.name.endswith(".npz"):
        rows = _of_arrays(path, flag)
    else:
        return _of_rows(config, flag)  # has cut to --train-rows itself
    return (
        rows.at(range(min(len(rows), config.train_rows or len(rows))))
        if flag == "--train"
        else rows
    )


def _of_folder(folder: Path, flag: str) -> Rows:
    """Every class a folder of pictures, in the order of their names, classes taking turns.

    So `--train-rows` keeps all classes.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        for path in classes
    }
    turns = [(turn, name, file) for name, some in files.items() for turn, file in enumerate(some)]
    turns.sort(key=lambda row: row[:2])
    if not turns:
        raise DataError(
            f"`{flag}`: {folder} must hold a folder of pictures ({', '.join(PICTURES)}) per class; "
            "it has none."
        )
    return Rows(
        [(str(file.resolve()), file.stat().st_size) for _, _, file in turns],
        [name for _, name, _ in turns],
    )


def _of_arrays(path: Path, flag: str) -> Rows:
    """`images` (n, height, width[, 3]) uint8 and `labels` (n,), or by a name of `ARRAYS`; `names` where there are any."""
    import numpy as np

    arrays = {}
    try:
        with path.open("rb") as opened_file, np.load(opened_file, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > most_unpacked(path):
                raise ValueError(f"{TOO_LARGE}. Write it again with numpy.savez")
            for kind, known in ARRAYS[flag].items():
                name = next((name for name in known if name in file.files), None)
                if name is None:
                    raise DataError(
                        f"`{flag}`: {path.name} must hold {' or '.join(known)}; it has {listed(file.files)}."
                        f"{nearest(kind, file.files)}"
                    )
                arrays[kind] = file[name]
            names = [str(name) for name in file["names"]] if "names" in file.files else None
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {first_line(error)}.") from error
    images, labels = arrays["images"], arrays["labels"]
    flat = images.dtype == np.uint8 and (
        images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    )
    if not flat or labels.shape != images.shape[:1] or not images.size:
        raise DataError(
            f"`{flag}`: {path.name} must hold images (n, height, width) or (n, height, width, 3) of uint8 and "
            f"n labels; got {images.dtype} {images.shape} and {labels.shape}."
        )
    values = labels.tolist()
    if names is None:
        return Rows(list(images), values)
    if len(set(names)) < len(names):
        raise DataError(f"`{flag}`: `names` of {path.name} must differ; one stands there twice.")
    try:
        places = dict(enumerate(names))  # and not from the end, as names[-1] would be
        return Rows(list(images), [places[value] for value in values])
    except KeyError as error:
        raise DataError(
            f"`{flag}`: `names` of {path.name} must have an entry per label; it has {len(names)}."
        ) from error


def _of_rows(config: TrainConfig, flag: str) -> Rows:
    """Column `--image`: a path from the file's folder, or the bytes of a picture as hub sets hold it."""
    source = source_of(config, flag)
    rows, name = rows_of(config, flag), Path(source).name
    images = column_of(rows, config.image, "--image", name)
    labels = column_of(rows, config.label, "--label", name)
    folder = Path(source).parent
    return Rows([_picture(i, image, folder, name) for i, image in enumerate(images, 1)], labels)


def _picture(number: int, image: Any, folder: Path, name: str) -> Any:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, str):
        path = folder / image
        if not is_file(path):
            raise DataError(
                f"`--image`: row {number} of {name} names {shown(image)[1:-1]}, which does not exist."
            )
        return str(path.resolve()), path.stat().st_size
    try:
        if isinstance(image, dict) and image.get("bytes"):
            image = Image.open(io.BytesIO(image["bytes"]))
        if isinstance(image, Image.Image):
            return np.asarray(upright(image))
    except (
        OSError,
        TypeError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"`--image`: row {number} of {name} holds no picture: {error}.") from error
    raise DataError(
        f"`--image`: row {number} of {name} must hold a path or a picture; got {type(image).__name__}."
    )
