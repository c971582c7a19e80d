"""Checkpoints that others wrote: their head is read whole, or they are refused; nothing starts at random in silence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, SegformerConfig
from transformers import SegformerForSemanticSegmentation as TransformersSegformer

from cityseg_hf import UserError, build_model
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.inference import load_model_folder
from cityseg_hf.labels import NUM_CLASSES

TINY = {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 16}


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, TransformersSegformer]:
    """A folder as transformers itself writes it, which is how the published SegFormers lie on the Hub."""
    model = TransformersSegformer(SegformerConfig(**TINY, num_labels=NUM_CLASSES)).eval()
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    image_processor((64, 64)).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("load", [AutoModelForSemanticSegmentation.from_pretrained, build_model, load_model_folder])
def test_published_segformers_keep_their_head(load, theirs: tuple[Path, TransformersSegformer]) -> None:
    folder, model = theirs
    loaded = load(str(folder))
    loaded = loaded[0] if isinstance(loaded, tuple) else loaded
    assert type(loaded).__module__.startswith("cityseg_hf")
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=1e-5)


def test_our_files_have_the_names_of_theirs(theirs: tuple[Path, TransformersSegformer], tmp_path: Path) -> None:
    """Older versions of transformers read the names that transformers writes, and no others."""
    model = build_model("segformer_b0", **TINY)
    save_model_folder(tmp_path / "ours", model, image_processor((64, 64)))
    names = [set(load_file(folder / "model.safetensors")) for folder in (theirs[0], tmp_path / "ours")]
    assert names[0] == names[1]


def without(folder: Path, part: str) -> None:
    weights = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if part not in name}
    save_file(kept, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["classifier", "linear_fuse", "patch_embeddings"])
def test_a_trained_model_that_lacks_weights_is_refused(
    part: str, theirs: tuple[Path, TransformersSegformer], capfd: pytest.CaptureFixture
) -> None:
    """It would be judged with random numbers in their place."""
    without(theirs[0], part)
    with pytest.raises(UserError, match=rf"theirs lacks \d+ of its weights, first \S*{part}"):
        load_model_folder(theirs[0])
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_a_trained_model_of_other_sizes_is_refused(theirs: tuple[Path, TransformersSegformer]) -> None:
    settings = json.loads((theirs[0] / "config.json").read_text())
    (theirs[0] / "config.json").write_text(json.dumps({**settings, "decoder_hidden_size": 32}))
    with pytest.raises(UserError, match=r"theirs has \d+ weights of other sizes than its config.json says, first \S+"):
        load_model_folder(theirs[0])


def test_a_head_that_starts_at_random_is_said(
    theirs: tuple[Path, TransformersSegformer], caplog: pytest.LogCaptureFixture
) -> None:
    """Fine-tuning replaces a head on purpose; the user still learns of it, in one line instead of a table."""
    without(theirs[0], "classifier")
    build_model(str(theirs[0]))
    assert [record.message for record in caplog.records if "starts at random" in record.message]
