"""Segments images and videos. Run the same command again to go on: what is written is skipped.

python scripts/predict.py --model saved_models/RUN/best_miou --input photos '*/*.jpg' drive.mp4 --output predictions
python scripts/predict.py --model FOLDER --input photos --output predictions --write labelIds confidence --tta ms_flip
"""

from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, exit_with
from cityseg_hf.data.photographs import find_inputs
from cityseg_hf.data.videos import require_av
from cityseg_hf.inference import load_model_folder
from cityseg_hf.prediction import (
    ENDINGS,
    KINDS,
    Job,
    Pictures,
    Predictor,
    check_record,
    fingerprint,
    predict_images,
    predict_video,
    video_file,
    video_written,
)
from cityseg_hf.views import DTYPES, add_inference_flags, views_of


def parser() -> Parser:
    flags = Parser(description="Segment images and videos with a trained model.")
    flags.add_argument("--model", required=True, help="model folder, or model of the Hub")
    flags.add_argument("--input", required=True, nargs="+", help="images, videos, folders (with sub-folders) and globs")
    flags.add_argument("--output", required=True, help="folder for NAME_color.png and so on, and NAME_overlay.mp4")
    flags.add_argument("--write", nargs="+", choices=KINDS, default=list(KINDS[:3]), help="pictures of each image")
    flags.add_argument("--frames", action="store_true", help="those pictures of each frame of a video, too")
    flags.add_argument("--overwrite", action="store_true", help="also segment what is written already")
    flags.add_argument("--opacity", type=float, default=0.5, help="of the colours in the overlay, 0 to 1")
    flags.add_argument("--batch_size", "-b", type=int, default=4, help="images or windows at a time")
    flags.add_argument("--num_workers", type=int, default=2, help="threads that read, and threads that write")
    add_inference_flags(flags)
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not 0 <= args.opacity <= 1:
        raise UserError(f"--opacity must lie between 0 and 1, got {args.opacity}")
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")
    views, output, pictures = views_of(args), Path(args.output), Pictures(tuple(args.write), args.opacity)
    inputs = find_inputs(args.input, output, ENDINGS)
    if any(item.is_video for item in inputs):
        require_av()
    transformers_logging.disable_progress_bar()
    model, processor = load_model_folder(args.model)
    settings = {**fingerprint(model, processor, views), "dtype": args.dtype, "opacity": args.opacity}
    check_record(output, settings, overwrite=args.overwrite)
    images = [Job(item.path, output / item.stem) for item in inputs if not item.is_video]
    videos = [Job(item.path, output / item.stem) for item in inputs if item.is_video]
    frames = pictures if args.frames else None
    if args.overwrite:  # at once, so that without the flag, too, the next call does not take old files for new ones
        for path in [path for job in images for path in pictures.paths(job.stem)]:
            path.unlink(missing_ok=True)
        for job in videos:
            video_file(job.stem).unlink(missing_ok=True)
    images = [job for job in images if not pictures.written(job.stem)]
    videos = [job for job in videos if not video_written(job.stem, frames)]
    model.to(PartialState().device, DTYPES[args.dtype])
    predictor = Predictor(model, processor, views, confidence="confidence" in pictures.kinds)
    broken = predict_images(predictor, images, pictures, threads=args.num_workers) if images else []
    for job in videos:
        try:
            predict_video(predictor, job, opacity=args.opacity, threads=args.num_workers, pictures=frames)
        except UserError as error:
            broken.append(str(error))
            tqdm.write(f"skipped: {error}")
    there = len(inputs) - len(images) - len(videos)
    print(f"{len(images) + len(videos) - len(broken)} files segmented into {output}; {there} were there already")
    if broken:
        raise UserError(f"{len(broken)} of {len(inputs)} files could not be segmented, first: {broken[0]}")


if __name__ == "__main__":
    exit_with(main)
