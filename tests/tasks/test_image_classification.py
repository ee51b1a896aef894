"""Pictures from folders, arrays and rows, and that stock peft computes what was scored."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

from geolora.errors import DataError, ModelError
from geolora.settings.train_config import TrainConfig
from geolora.tasks.image_classification import _picture, opened
from geolora.training import run as training
from models import tiny_vit
from rows import pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    tiny_vit(tmp_path / "model")
    for name, count, seed in (("train", 120, 0), ("dev", 40, 1)):
        images, labels = pictures(count, seed)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, names=["up", "down"])
    return TrainConfig(
        model=str(tmp_path / "model"), task="image-classification",
        train=str(tmp_path / "train.npz"), eval=str(tmp_path / "dev.npz"), rank=4, lr=2e-2,
        tail=0.0, max_steps=40, batch_size=16, seed=1, output=str(tmp_path / "out"),
    )  # fmt: skip


def test_pictures_are_learnt_and_scored_as_stock_peft_computes_them(config: TrainConfig) -> None:
    outcome = training.train(config, training.load(config))
    assert outcome.report["value"] > 0.9
    folder = Path(config.output) / "adapter"
    names = json.loads((Path(config.output) / "labels.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(config.model, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    images, labels = pictures(40, 1)
    with torch.no_grad():
        logits = loaded(**processor(images=list(images), return_tensors="pt")).logits
    found = [names[i] for i in logits.argmax(-1).tolist()]
    assert outcome.report["value"] == pytest.approx(
        np.mean([word == ("up", "down")[label] for word, label in zip(found, labels, strict=True)])
    )


def test_folders_arrays_and_rows_hold_the_same_pictures(
    config: TrainConfig, tmp_path: Path
) -> None:
    images, labels = pictures(12, 3)
    rows = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "folder" / ("up", "down")[label] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        rows.append({"image": str(path.relative_to(tmp_path)), "label": ("up", "down")[label]})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    np.savez(tmp_path / "both.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)

    def seen(source: str) -> list[tuple[bytes, str]]:
        data = training.load(
            dataclasses.replace(config, train=str(tmp_path / source), eval=str(tmp_path / source))
        )
        words = {"0": "up", "1": "down"}
        names = [words.get(name, name) for name in data.names]
        return sorted(
            (opened(image).tobytes(), names[label])
            for image, label in zip(data.held_out.inputs, data.held_out.labels, strict=True)
        )

    wanted = sorted(
        (image.tobytes(), ("up", "down")[label])
        for image, label in zip(images, labels, strict=True)
    )
    assert seen("folder") == seen("rows.jsonl") == seen("both.npz") == wanted


def test_the_first_rows_of_a_folder_have_all_classes(config: TrainConfig, tmp_path: Path) -> None:
    for name in ("up", "down"):
        for i in range(3):
            path = tmp_path / "folder" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures(1, i)[0][0]).save(path)
    folder = str(tmp_path / "folder")
    data = training.load(dataclasses.replace(config, train=folder, eval=folder, train_rows=2))
    assert sorted(data.train.labels) == [0, 1]
    assert len(data.held_out) == 6


def test_what_is_no_picture_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, match: str) -> None:
        with pytest.raises(DataError, match=match):
            training.load(dataclasses.replace(config, train=str(source)))

    refused("", "`--train` must be given")  # and not the folder where the command runs
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "must hold a folder of pictures")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 no")
    refused(tmp_path / "torn.npz", "torn.npz cannot be read")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    refused(tmp_path / "other.npz", "must hold images or x or x_train")
    np.savez(tmp_path / "float.npz", x=np.zeros((2, 4, 4)), y=np.zeros(2))
    refused(tmp_path / "float.npz", "of uint8 and n labels; got float64")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    refused(tmp_path / "objects.npz", "cannot be read: Object arrays")
    images, _ = pictures(4, 0)
    np.savez(tmp_path / "names.npz", x=images, y=[0, 1, 2, 0], names=["up", "down"])
    refused(tmp_path / "names.npz", "`names` of names.npz must have an entry per label; it has 2")
    np.savez(tmp_path / "names.npz", x=images, y=[0, 1, -1, 0], names=["up", "down"])
    refused(tmp_path / "names.npz", "`names` of names.npz must have an entry per label; it has 2")
    np.savez(tmp_path / "names.npz", x=images, y=[0, 1, 2, 0], names=["up", "down", "up"])
    refused(tmp_path / "names.npz", "`names` of names.npz must differ")
    np.save(tmp_path / "one.npy", images)
    (tmp_path / "one.npy").rename(tmp_path / "npy.npz")
    refused(tmp_path / "npy.npz", "npy.npz cannot be read")
    np.savez(tmp_path / "none.npz", x=np.zeros((10**9, 0, 4), np.uint8), y=np.zeros(10**9, "V0"))
    refused(tmp_path / "none.npz", r"must hold images \(n, height, width\)")
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((2000, 40, 40), np.uint8), y=[0])
    with monkeypatch.context() as small:
        small.setattr("geolora.files.reading.ALWAYS_UNPACKED", 2**20)
        refused(
            tmp_path / "zeros.npz",
            "unpacks to more than a hundred times its size. Write it again with numpy.savez.",
        )
    np.savez(tmp_path / "nan.npz", x=images, y=[0, 1, float("nan"), 0])
    refused(tmp_path / "nan.npz", "must hold one name or number per row; row 3 of nan.npz has nan")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "nowhere.png", "label": "up"}))
    refused(tmp_path / "rows.jsonl", "row 1 of rows.jsonl names nowhere.png, which does not exist")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": 3, "label": "up"}))
    refused(tmp_path / "rows.jsonl", "must hold a path or a picture; got int")

    (tmp_path / "folder" / "up").mkdir(parents=True)
    (tmp_path / "folder" / "up" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a picture that can be read"):
        opened((str(tmp_path / "folder" / "up" / "0.png"), 10))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_seen_as_people_see_it(config: TrainConfig, tmp_path: Path, turn: int) -> None:
    """However the camera lay: from a folder, a path in a row, and as hub sets hold it."""
    image = np.zeros((8, 16, 3), np.uint8)
    image[:4, :8] = 255  # white where up and left is, when it is seen rightly
    seen = Image.fromarray(image)
    laid = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose that undoes the orientation
    saved = seen.transpose(Image.Transpose(laid[turn])) if turn > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "folder" / "up").mkdir(parents=True)
    file = tmp_path / "folder" / "up" / "0.png"
    saved.save(file, exif=exif)
    assert np.array_equal(opened((str(file), 1)), image)
    held = _picture(1, {"bytes": file.read_bytes()}, tmp_path, "rows")
    assert np.array_equal(held, image)


def test_damaged_exif_data_turn_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(pictures(1, 0)[0][0])
    for number, exif in enumerate((b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 40, b"x")):
        image.save(tmp_path / f"{number}.png", exif=exif)
        assert opened((str(tmp_path / f"{number}.png"), 1)).size == (16, 16)


@pytest.mark.parametrize("init", ["default", "lora-one"])
def test_what_a_model_cannot_compute_is_one_line(
    config: TrainConfig, tmp_path: Path, init: str
) -> None:
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(config.model)
    with pytest.raises(ModelError, match=r"cannot compute a batch: .*\(32\*32\) doesn't match"):
        training.run(dataclasses.replace(config, init=init, output=str(tmp_path / "other")))
