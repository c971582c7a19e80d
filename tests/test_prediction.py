"""Many images and videos: every mode and size, what is broken among them, and going on after a stop."""

import os
import struct
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image

from cityseg_hf import UserError, build_model
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.data.photographs import find_inputs, read_photograph
from cityseg_hf.data.videos import Video
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import PALETTE, TRAIN_ID_TO_ID
from cityseg_hf.prediction import ENDINGS, Pictures, Predictor, Reading, ahead, same_size_batches
from cityseg_hf.views import Views

KINDS = ("color", "labelIds", "overlay", "confidence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that resizes to 32x48 and answers every class somewhere."""
    torch.manual_seed(0)
    model = build_model("unet_small", hidden_sizes=[8, 16])
    torch.nn.init.normal_(model.classifier.weight)
    return save(tmp_path_factory.mktemp("model") / "unet", model, (32, 48))


def save(folder: Path, model: torch.nn.Module, size: tuple[int, int]) -> Path:
    save_model_folder(folder, model, image_processor(size))
    return folder


def street(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blocks of colour: ``uint8[H, W, 3]``."""
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    return np.kron(blocks, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, axis=2)


def deep(image: Image.Image) -> Image.Image:
    """16 bits, stretched as 8 bits are."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


MODES: dict[str, tuple[str, Callable[[Image.Image], Image.Image], Callable[[np.ndarray], np.ndarray]]] = {
    "RGB": (".png", lambda image: image, lambda pixels: pixels),
    "RGBA": (".webp", lambda image: image.convert("RGBA"), lambda pixels: pixels),
    "L": (".png", lambda image: image.convert("L"), grey),
    "LA": (".png", lambda image: image.convert("LA"), grey),
    "I;16": (".png", deep, grey),
    "I;16 of TIFF": (".tif", deep, grey),
    "P": (".png", lambda image: image.quantize(256), lambda pixels: quantized(pixels)),
    "CMYK": (".tif", lambda image: image.convert("CMYK"), lambda pixels: pixels),
    "1": (".png", lambda image: image.convert("1"), lambda pixels: dithered(pixels)),
    "bmp": (".bmp", lambda image: image, lambda pixels: pixels),
}
"""Mode: suffix, how a picture is put into it, and what must be read from it."""


def quantized(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).quantize(256).convert("RGB"))


def dithered(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("1").convert("RGB"))


def write_video(path: Path, frames: list[np.ndarray], rate: Fraction) -> None:
    """Lossless, so that what is read is what was written."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_video(path: Path) -> tuple[list[np.ndarray], list[Fraction], Fraction]:
    """Frames, their times in seconds, and the rate."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        times = [frame.pts * stream.time_base for frame in frames]
        return [frame.to_ndarray(format="rgb24") for frame in frames], times, stream.average_rate


def call(*words: object) -> None:
    load_script("predict").main([str(word) for word in words])


def ids_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_of_200_images_a_video_and_a_broken_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("av")
    rng, source, output = np.random.default_rng(0), tmp_path / "in", tmp_path / "out"
    expected: dict[str, np.ndarray] = {}
    for index in range(200):
        mode = list(MODES)[index % len(MODES)]
        suffix, put, read = MODES[mode]
        pixels = street(rng, 20 + 10 * (index % 3), 30 + 7 * (index % 4))
        path = source / f"city{index % 3}" / f"street.{index}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        put(Image.fromarray(pixels)).save(path, **({"lossless": True} if suffix == ".webp" else {}))
        expected[str(path.relative_to(source).with_suffix(""))] = read(pixels)
    (source / "city1" / "broken.png").write_bytes((source / "city0" / "street.0.png").read_bytes()[:80])
    frames = [street(rng, 41, 64) for _ in range(7)]  # an odd side
    write_video(source / "drive.mkv", frames, Fraction(30000, 1001))
    words = ("--model", folder, "--input", source, "--output", output, "--write", *KINDS, "--frames", "-b", 8)
    with pytest.raises(UserError, match=r"1 of 202 files could not be segmented, first: .*broken\.png is no readable"):
        call(*words)
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 1
    assert "201 files segmented" in said and "0 were there already" in said
    assert len(list(output.rglob("*.png"))) == 4 * (200 + 7)
    assert not list(output.rglob(".*"))  # nothing half-written is left
    model, processor = load_model_folder(folder)
    for name, pixels in expected.items():
        train_ids = segment(model, processor, pixels)
        # The same network on a batch rounds differently: where two classes are equal but for that, either may win.
        assert (ids_of(output / f"{name}_labelIds.png") == TRAIN_ID_TO_ID[train_ids]).mean() > 0.999, name
        assert ids_of(output / f"{name}_confidence.png").shape == train_ids.shape
    for index, frame in enumerate(frames):
        stem = output / "drive" / f"{index:06d}"
        found = ids_of(Path(f"{stem}_labelIds.png"))
        assert (found == TRAIN_ID_TO_ID[segment(model, processor, frame)]).mean() > 0.999
    overlays, times, rate = read_video(output / "drive_overlay.mp4")
    assert rate == Fraction(30000, 1001) and len(overlays) == 7
    assert times == pytest.approx([float(index / rate) for index in range(7)], abs=1e-3)
    assert overlays[0].shape == (42, 64, 3)
    drawn = ids_of(output / "drive" / "000003_overlay.png").astype(float)
    assert np.abs(overlays[3][:41].astype(float) - drawn).mean() < 12  # H.264 halves the sides of the colours
    # What is there is skipped.
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*_*.*")}
    with pytest.raises(UserError, match="1 of 202"):
        call(*words)
    assert "0 files segmented" in (said := capsys.readouterr().out) and "201 were there already" in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*_*.*")} == stamps


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_is_read(mode: str, tmp_path: Path) -> None:
    suffix, put, read = MODES[mode]
    pixels = street(np.random.default_rng(1), 24, 40)
    put(Image.fromarray(pixels)).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_photograph(tmp_path / f"a{suffix}"), read(pixels))


def test_pictures_are_turned_as_the_camera_says(folder: Path, tmp_path: Path) -> None:
    pixels, exif = street(np.random.default_rng(1), 24, 40), Image.Exif()
    exif[0x0112] = 6  # Orientation: turn it a quarter clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_photograph(tmp_path / "a.png"), np.rot90(pixels, -1))
    call("--model", folder, "--input", tmp_path / "a.png", "--output", tmp_path / "out", "--write", "overlay")
    assert Image.open(tmp_path / "out" / "a_overlay.png").size == (24, 40)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_levels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((40, 40), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="its levels are floating-point numbers"):
        read_photograph(tmp_path / "a.tif")


def test_a_stopped_call_goes_on(folder: Path, tmp_path: Path) -> None:
    """What is whole is kept, what lacks one picture is made anew; other settings do not mix with it."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        Image.fromarray(street(np.random.default_rng(ord(name)), 32, 40)).save(source / f"{name}.png")
    words = ("--model", folder, "--input", source, "--output", output)
    call(*words)
    whole = {path.name: path.read_bytes() for path in output.glob("*.png")}
    (output / "b_overlay.png").unlink()
    for path in output.glob("*.png"):
        os.utime(path, ns=(0, 0))
    call(*words)
    assert {path.name: path.read_bytes() for path in output.glob("*.png")} == whole
    renewed = {path.name[0] for path in output.glob("*.png") if path.stat().st_mtime_ns}
    assert renewed == {"b"}
    with pytest.raises(UserError, match="holds predictions with other flip: choose another folder, or --overwrite"):
        call(*words, "--tta", "flip")
    call(*words, "--tta", "flip", "--overwrite")
    assert all(path.stat().st_mtime_ns for path in output.glob("*.png"))
    for damage in ("{", "[3]"):
        (output / "predictions.json").write_text(damage)
        with pytest.raises(UserError, match="is damaged"):
            call(*words)


def test_a_file_in_the_place_of_a_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()
    Image.fromarray(street(np.random.default_rng(6), 40, 48)).save(tmp_path / "in" / "sub" / "a.png")
    with pytest.raises(UserError, match=r"cannot make the folder .*out/sub: File exists"):
        call("--model", folder, "--input", tmp_path / "in", "--output", tmp_path / "out")


def test_pictures_are_what_the_network_says(folder: Path, tmp_path: Path) -> None:
    """Confidence is the softmax's largest value; the overlay is a blend."""
    pixels = street(np.random.default_rng(2), 40, 56)
    model, processor = load_model_folder(folder)
    predictor = Predictor(model, processor, Views(), confidence=True)
    ((reading, prediction),) = predictor.run([predictor.prepare("a", pixels)])
    Pictures(KINDS, opacity=0.25).write(tmp_path / "a", reading.image, prediction)
    inputs = processor(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(**inputs).logits, (40, 56), mode="bilinear")
    probability, train_ids = logits.softmax(1)[0].max(0)
    assert (prediction.train_ids == train_ids.numpy()).mean() > 0.999
    assert np.abs(ids_of(tmp_path / "a_confidence.png") - 255 * probability.numpy()).max() < 1.01
    assert Image.open(tmp_path / "a_confidence.png").mode == "L"
    blend = 0.75 * pixels + 0.25 * PALETTE[prediction.train_ids]
    assert np.abs(ids_of(tmp_path / "a_overlay.png") - blend).max() <= 1


def test_inputs_keep_their_names(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/sub/b.JPG", "in/sub/b.png", "in/sub/note.txt", "in/sub/v.mp4", "in/out/a_color.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def stems(*words: str) -> list[str]:
        output = tmp_path / "in" / "out"
        return [str(item.stem) for item in find_inputs([str(tmp_path / word) for word in words], output, ENDINGS)]

    assert stems("in") == ["a", "sub/b.JPG", "sub/b.png", "sub/v"]
    assert stems("in/a.png", "in") == ["a", "sub/b.JPG", "sub/b.png", "sub/v"]
    assert stems("in/**/*.png") == ["a", "sub/b"]
    assert stems("in/s*") == ["sub/b.JPG", "sub/b.png", "sub/v"]
    assert stems("in/sub/note.txt") == ["note"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").touch()
    with pytest.raises(UserError, match=r"in/a\.png and .*other/a\.png have the same name: give the folder that"):
        stems("in/a.png", "other")
    with pytest.raises(UserError, match="no images in it"):
        stems("in/*.gif")


def test_models_that_take_images_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Without a size of the network's own, images of one size go together, and very small ones nowhere."""
    model, processor = load_model_folder(folder)
    processor.do_resize = False
    save_model_folder(tmp_path / "model", model, processor)
    source = tmp_path / "in"
    source.mkdir()
    sizes = {"a": (40, 56), "b": (64, 32), "c": (40, 56), "d": (20, 90)}
    for name, size in sizes.items():
        Image.fromarray(street(np.random.default_rng(5), *size)).save(source / f"{name}.png")
    words = ("--model", tmp_path / "model", "--input", source, "--output", tmp_path / "out", "--write", "labelIds")
    with pytest.raises(UserError, match=r"1 of 4 files .* first: .*d\.png is 20x90, a network needs 32x32 at least"):
        call(*words)
    for name, size in list(sizes.items())[:3]:
        found = ids_of(tmp_path / "out" / f"{name}_labelIds.png")
        expected = TRAIN_ID_TO_ID[segment(model, processor, read_photograph(source / f"{name}.png"))]
        assert found.shape == size and (found == expected).mean() > 0.999


def test_what_does_not_fit_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    Image.fromarray(street(np.random.default_rng(4), 40, 48)).save(tmp_path / "a.png")
    monkeypatch.setattr("cityseg_hf.prediction.native_logits", full)
    words = ("--model", folder, "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    with pytest.raises(UserError, match="out of memory with 1 images of 32x48: lower --batch_size"):
        call(*words)
    with pytest.raises(UserError, match="slide a smaller --window"):
        call(*words, "-b", 1)


def test_images_of_one_size_go_together() -> None:
    sizes = [(32, 32), (32, 48), (32, 32), (64, 64), (32, 48), (32, 32), (40, 40), (41, 41), (42, 42), (43, 43)]
    readings = [Reading(index, pixels=torch.zeros(3, *size)) for index, size in enumerate(sizes)]
    found = [[one.place for one in batch] for batch in same_size_batches(readings, 2)]
    assert found[:2] == [[0, 2], [1, 4]]
    assert sorted(place for batch in found for place in batch) == list(range(10))
    kept = list(same_size_batches((Reading(k, pixels=torch.zeros(3, 1, k)) for k in range(50)), 2))
    assert [batch[0].place for batch in kept[:2]] == [0, 1]  # of many sizes none waits for ever


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_calls_run_ahead_in_order_but_not_without_end(threads: int) -> None:
    started: list[int] = []

    def calls() -> object:
        for number in range(1000):
            started.append(number)
            yield lambda number=number: (number, threading.get_ident())

    results = ahead(calls(), threads)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 4 * threads + 3
    results.close()
    assert [number for number, _ in ahead(calls(), threads)] == list(range(1000))


def test_a_broken_video_costs_only_itself(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [street(np.random.default_rng(3), 48, 64)] * 3
    write_video(tmp_path / "good.mkv", frames, Fraction(10))
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 50)
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 of 3 files could not be segmented, first: .*bad\.mp4 is no readable video"):
        call("--model", folder, "--input", tmp_path, "--output", tmp_path / "out", "--num_workers", 0)
    assert len(read_video(tmp_path / "out" / "good_overlay.mp4")[0]) == 3
    assert not list((tmp_path / "out").glob("*bad*")) and not list((tmp_path / "out").glob(".*"))


def test_videos_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    """A telephone held upright writes lying frames and a matrix, (x, y) -> (height - y, x), a quarter clockwise."""
    pytest.importorskip("av")
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:24, :32] = 255
    write_video(tmp_path / "a.mp4", [frame] * 2, Fraction(10))
    content = (tmp_path / "a.mp4").read_bytes()
    one = 1 << 16  # of numbers with 16 bits behind the point; the last column has 30
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 1 << 30)
    track = content.index(b"tkhd")
    (tmp_path / "a.mp4").write_bytes(content[:track] + content[track:].replace(plain, turned, 1))
    with Video(tmp_path / "a.mp4") as video:
        for found in video:
            np.testing.assert_array_equal(found.image, np.rot90(frame, -1))


def test_videos_without_pyav_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"videos need PyAV: pip install 'cityseg_hf\[video\]'"):
        call("--model", folder, "--input", tmp_path / "a.mp4", "--output", tmp_path / "out")
