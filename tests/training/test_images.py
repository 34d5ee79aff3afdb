"""A folder of images, one folder a class."""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from models import contract
from training import images
from training.datasets import load
from training.images import ImagesError
from training.pipeline import train
from training.plan import plan
from training.preprocessing import Preprocessor
from training.progress import Reporter

ROOT = Path(__file__).parents[2]


def drawn(folder, classes=("cross", "ring"), each=6, size=(8, 10), mode="L"):
    for number, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for image in range(each):
            pixels = np.full((size[1], size[0]), 40 * number + image, np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / label / f"{image}.png")
    return folder


def test_pixels_and_classes_are_those_of_the_files(tmp_path):
    data = images.read(drawn(tmp_path / "shapes"))
    assert data.labels == ("cross", "ring")
    assert data.x.shape == (12, 10, 8, 1)
    assert data.x[:, 3, 3, 0].tolist() == [*range(6), *range(40, 46)]
    assert data.y.tolist() == [0] * 6 + [1] * 6
    assert (data.input_name, data.features(np.arange(3))) == ("image", None)
    encoded = Preprocessor.fit(data, np.arange(12)).encode(data.x)
    np.testing.assert_allclose(encoded, data.x / 255, rtol=1e-6)


def test_one_image_in_colour_makes_all_of_them_colour(tmp_path):
    folder = drawn(tmp_path / "shapes")
    Image.new("RGBA", (8, 10), (200, 100, 50, 255)).save(folder / "ring" / "0.png")
    data = images.read(folder)
    assert data.x.shape == (12, 10, 8, 3)
    assert data.x[6, 0, 0].tolist() == [200, 100, 50]
    assert data.x[1, 0, 0].tolist() == [1, 1, 1]


def test_plan_takes_a_folder_by_its_path(tmp_path, monkeypatch):
    drawn(tmp_path / "Two Shapes")
    monkeypatch.chdir(tmp_path / "Two Shapes")
    made = plan(".", repository=tmp_path / "artifacts", seed=0, num_samples=100)
    assert (made.name, made.data.name) == ("two-shapes", "Two Shapes-images")
    assert made.recipe.architecture == "convolutional"
    assert load("digits").white == 16


def test_raw_pixels_are_what_the_artifact_takes(tmp_path):
    folder = drawn(tmp_path / "shapes", size=(20, 12), mode="RGB")
    request = plan(str(folder), repository=tmp_path / "artifacts", seed=0, num_samples=20, epochs=2)
    made = train(request, Reporter(quiet=True))
    [given] = contract.verify(made.folder).inputs
    assert (given.name, given.shape) == ("image", [12, 20, 3])
    signatures = tf.saved_model.load(str(made.folder)).signatures
    pixels = np.asarray(Image.open(folder / "ring" / "2.png"), np.float32)[np.newaxis]
    answer = signatures["serving_default"](image=tf.constant(pixels))["probabilities"].numpy()
    expected = keras.ops.convert_to_numpy(made.variants[0].model(pixels))[0, 0]
    assert answer[0, 1] == pytest.approx(expected, abs=1e-6)
    # 12 x 20 pixels are 6 x 10 behind the first convolution: small enough.
    assert sum(isinstance(layer, keras.layers.Conv2D) for layer in made.variants[0].model.layers) == 1


def test_images_are_searched_and_made_an_ensemble_with_convolutions(tmp_path):
    drawn(tmp_path / "shapes", each=20)
    command = [sys.executable, str(ROOT / "dropserve.py"), "tune", "shapes", "--trials", "2", "--folds", "2"]
    command += ["--outer-folds", "2", "--epochs", "3", "--ensemble", "2", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["members"] == 2
    assert len(found["tuning"]["nested_scores"]) == 2
    members = [
        layer
        for layer in keras.models.load_model(tmp_path / found["folder"] / "model.keras").layers
        if layer.name.startswith("member_")
    ]
    assert [sum(isinstance(layer, keras.layers.Conv2D) for layer in member.layers) for member in members] == [1, 1]
    dropped = {layer["kind"] for layer in found["stochastic_layers"]}
    assert dropped == {"Dropout"}


def no_folders(folder):
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "1.png")


def other_size(folder):
    Image.new("L", (9, 8)).save(drawn(folder) / "ring" / "3.png")


def no_image(folder):
    (drawn(folder) / "ring" / "3.png").write_text("a picture of a ring")


def cut_off(folder):
    path = drawn(folder) / "ring" / "3.png"
    path.write_bytes(path.read_bytes()[:50])


def bomb(folder):
    """A header that speaks of 10 gigapixels."""
    path = drawn(folder) / "ring" / "3.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    png = path.read_bytes()
    path.write_bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_folders, "no images in folders of it; wanted one folder a class"),
        (lambda folder: drawn(folder, classes=["ring"]), "one class, 'ring'; wanted at least two"),
        (lambda folder: drawn(folder, each=4), "4 images; wanted at least 5"),
        (lambda folder: (drawn(folder) / "star").mkdir(), "no images; wanted at least 5"),
        (lambda folder: drawn(folder, size=(300, 8)), "300 x 8 pixels; wanted 2 to 256 a side"),
        (lambda folder: drawn(folder, size=(8, 1)), "8 x 1 pixels; wanted 2 to 256 a side"),
        (lambda folder: drawn(folder, mode="I;16"), "pixels of the kind I;16, deeper than a byte; wanted 8 bits"),
        (lambda folder: drawn(folder, classes=["ring", "c\udcff"]), "a class named 'c\\udcff'; wanted names"),
        (bomb, "is no image that can be read"),
        (other_size, "9 x 8 pixels; wanted the size of"),
        (no_image, "is no image that can be read"),
        (cut_off, "cannot be read"),
    ],
)
def test_each_bad_folder_has_its_line(make, said, tmp_path):
    make(tmp_path / "shapes")
    with pytest.raises(ImagesError, match=re.escape(said)) as refused:
        images.read(tmp_path / "shapes")
    assert "\n" not in str(refused.value)
