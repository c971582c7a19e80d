"""Both ends of the network, and what comes after: logits to counts, image to train ids, train ids to scores."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cityseg_hf import upsampled
from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.peers import torchvision_fcn, transformers_segformer
from cityseg_hf.benchmark.timing import Contender, Group
from cityseg_hf.checkpoint import image_processor
from cityseg_hf.data.synthetic import render_street
from cityseg_hf.inference import segment
from cityseg_hf.labels import ID_TO_TRAIN_ID, IGNORE, NUM_CLASSES
from cityseg_hf.metrics import SegmentationCounts
from cityseg_hf.models import FCNResNetForSemanticSegmentation, SegformerForSemanticSegmentation

STRIDE = 4
"""Of the logits in ``eval``: SegFormer's."""


def street(size: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic street: image ``uint8[H, W, 3]`` and train ids ``uint8[H, W]``."""
    scene = render_street(size, seed)
    return scene.image, ID_TO_TRAIN_ID[scene.label_ids]


# From logits to counts


@torch.no_grad()
def eval_groups(options: Options) -> Iterator[Group]:
    """Logits at stride 4 -> argmax at full size -> confusion counts, without and with the loss."""
    labels = torch.from_numpy(street(options.size)[1])
    height, width = options.size
    where = f"[1, {NUM_CLASSES}, {height // STRIDE}, {width // STRIDE}] to {height}x{width}"
    for kind, logits in (("random", random_logits(options.size)), ("street", street_logits(labels))):
        logits, target = logits.to(options.device), labels.to(options.device)
        differing = upsampled.argmax(logits, options.size) != plain_argmax(logits, options.size)
        facts = {"pixels": labels.numel(), "differing_pixels": int(differing.sum())}
        yield Group(f"{kind} logits {where}: upsample, argmax, count", _counting(logits, target), facts, memory=True)
        (found, loss), (expected, plain_loss) = our_judgement(logits, target), plain_judgement(logits, target.long())
        facts = {
            "pixels": labels.numel(),
            "differing_pixels": int((found != expected).sum()),
            "relative_difference_of_losses": abs(float(loss / plain_loss) - 1),
        }
        yield Group(f"{kind} logits {where}: the same and the loss", _judging(logits, target), facts, memory=True)


def random_logits(size: tuple[int, int]) -> Tensor:
    """``float32[1, 19, H/4, W/4]``: noise, the hardest there is: every pixel has other neighbours."""
    shape = (1, NUM_CLASSES, size[0] // STRIDE, size[1] // STRIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def street_logits(labels: Tensor) -> Tensor:
    """``float32[1, 19, H/4, W/4]`` as of a network that is nearly right: 8 for the label's class, and noise."""
    coarse = labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].long()  # [H/4, W/4]
    one_hot = F.one_hot(torch.where(coarse == IGNORE, NUM_CLASSES, coarse), NUM_CLASSES + 1)[..., :NUM_CLASSES]
    # Contiguous, as a network's: the sum would have the layout of the permuted view.
    return (8.0 * one_hot.permute(2, 0, 1)[None] + random_logits(tuple(labels.shape))).contiguous()


def plain_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """What everyone writes: ``int64[B, H, W]``."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def plain_confusion(predictions: Tensor, labels: Tensor) -> Tensor:
    """``int64[19, 19]`` by ``bincount`` over the valid pixels, as torchvision's reference counts."""
    valid = (labels >= 0) & (labels < NUM_CLASSES)
    pairs = NUM_CLASSES * labels[valid] + predictions[valid]
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def _counting(logits: Tensor, labels: Tensor) -> list[Contender]:
    size, counts, long_labels = tuple(labels.shape), SegmentationCounts(logits.device), labels.long()
    channels_last = logits.to(memory_format=torch.channels_last)

    def plain(values: Tensor) -> Tensor:
        return plain_confusion(plain_argmax(values, size)[0], long_labels)

    return [
        Contender("cityseg_hf", lambda: counts.update(upsampled.argmax(logits, size)[0], labels), ours=True),
        Contender("plain PyTorch", lambda: plain(logits), note="interpolate, argmax, bincount"),
        Contender("plain PyTorch, channels last", lambda: plain(channels_last), note="the same, other layout"),
    ]


def our_judgement(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Train ids ``uint8[H, W]`` and the summed loss."""
    predictions, loss = upsampled.argmax_and_loss(logits, labels[None])
    return predictions[0], loss


def plain_judgement(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Train ids ``int64[H, W]`` and the summed loss, from logits at full size."""
    scores = F.interpolate(logits, size=tuple(labels.shape), mode="bilinear", align_corners=False)
    return scores.argmax(1)[0], F.cross_entropy(scores, labels[None], ignore_index=IGNORE, reduction="sum")


def _judging(logits: Tensor, labels: Tensor) -> list[Contender]:
    counts, long_labels = SegmentationCounts(logits.device), labels.long()  # each the type that its loader makes

    def plain() -> Tensor:
        return plain_confusion(plain_judgement(logits, long_labels)[0], long_labels)

    return [
        Contender("cityseg_hf", lambda: counts.update(our_judgement(logits, labels)[0], labels), ours=True),
        Contender("plain PyTorch", plain, note="interpolate, cross_entropy, argmax, bincount"),
    ]


# From an image to train ids


def infer_groups(options: Options) -> Iterator[Group]:
    """One image through the whole network, from ``uint8[H, W, 3]`` to the train ids of its pixels."""
    height, width = options.size
    image, _ = street(options.size)
    processor = image_processor(options.size)
    processor.do_resize = False  # the network sees the image at its own size
    for name in options.models:
        ours = _spread(options.build(name)).eval()
        peer, theirs = _peer(ours, processor)
        ways = (
            Contender("cityseg_hf", partial(segment, ours, processor, image), ours=True),
            Contender(peer, partial(theirs, image), note="same weights"),
        )
        contenders = [
            one._replace(run=_under(options, precision, one.run), precision=precision)
            for precision in options.precisions
            for one in ways
        ]
        found, expected = segment(ours, processor, image), theirs(image)
        facts = {"pixels": found.size, "differing_pixels": int((found != expected).sum())}
        yield Group(f"{name}: one image of {height}x{width} to train ids", contenders, facts, memory=True)


def _under(options: Options, precision: str, run: Callable[[], Any]) -> Callable[[], None]:
    def inside() -> None:
        with options.autocast(precision):
            run()

    return inside


def _spread(network: nn.Module) -> nn.Module:
    """Random weights answer one class nearly everywhere: with larger ones all classes win somewhere."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == NUM_CLASSES:
                module.weight.mul_(100)
    return network


def _peer(ours: nn.Module, processor: Any) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Who else runs this network, and how: ``uint8[H, W, 3]`` -> train ids ``int64[H, W]``."""
    device = next(ours.parameters()).device
    fcn = torchvision_fcn(ours) if isinstance(ours, FCNResNetForSemanticSegmentation) else None
    if isinstance(ours, SegformerForSemanticSegmentation):
        name, network = "transformers", transformers_segformer(ours).eval()
    else:
        name, network = ("torchvision", fcn.eval()) if fcn else ("plain PyTorch", copy.deepcopy(ours))

    @torch.no_grad()
    def run(image: np.ndarray) -> np.ndarray:
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(device)
        outputs = network(pixel_values)
        size = image.shape[:2]
        if fcn is not None:
            return outputs["out"][0].argmax(0).cpu().numpy()
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].cpu().numpy()

    return name, run
