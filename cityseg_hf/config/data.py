"""Settings of the data."""

from dataclasses import dataclass

from cityseg_hf.config.fields import check_size, flag, require


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what is done to it before the network sees it."""

    _argument_group_name = "data"

    base_dataset_path: str | None = flag(
        None, "root that holds leftImg8bit/ and gtFine/, or their zips (default: ./cityscapes_data)", "-d"
    )
    image_size: list[int] | None = flag(
        None,
        "height and width every whole image is resized to (default: 512 1024, or the images' own size if smaller)",
        metavar=("H", "W"),
        nargs=2,
    )
    crop_size: list[int] | None = flag(
        None,
        "height and width of the training crops of 'standard' (default: --image_size)",
        metavar=("H", "W"),
        nargs=2,
    )
    augmentation: str = flag(
        "none",
        "none, flip, original (flip, sharpness, colour jitter, blur) or standard (scale 0.5 to 2, crop, flip, "
        "photometric distortion); the flag alone means original",
        "-a",
        nargs="?",
        const="original",
    )
    scale_range: list[float] | None = flag(
        None, "lowest and highest scale of 'standard' (default: 0.5 2)", metavar=("LOW", "HIGH"), nargs=2
    )
    rare_class_crops: float = flag(
        0.0, "share of the crops of 'standard' that are laid around a class drawn evenly of those in the image, 0 to 1"
    )
    holdout_cities: list[str] | None = flag(
        None, "train cities moved into a selection split of their own, so that val can serve as an honest test"
    )

    def __post_init__(self) -> None:
        check_size("image_size", self.image_size)
        check_size("crop_size", self.crop_size)
        # The original's set files and YAML say True and False.
        names = {"true": "original", "false": "none"}
        object.__setattr__(
            self, "augmentation", names.get(str(self.augmentation).lower(), str(self.augmentation).lower())
        )
        known = ("none", "flip", "original", "standard")
        require(
            self.augmentation in known,
            f"unknown --augmentation {self.augmentation!r}; choose from {', '.join(known)}",
        )
        require(
            0 <= self.rare_class_crops <= 1, f"--rare_class_crops is a share of 0 to 1, got {self.rare_class_crops}"
        )
        scales = self.scale_range or [0.5, 2.0]
        require(
            len(scales) == 2 and 0 < scales[0] <= scales[1] <= 10,
            f"--scale_range takes a lowest and a highest scale, such as --scale_range 0.5 2; got {self.scale_range}",
        )
