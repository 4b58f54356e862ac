"""The command `endomamba`: parses arguments, calls the library, turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from . import __version__

if TYPE_CHECKING:
    from torch import nn

    from .outputs import Agreement, FolderOutputs
    from .stream import FrameStream, StreamSession
    from .video import VideoReader

OK, BUG, BAD_INPUT, DAMAGED, VERIFY_FAILED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 3, 4, 130, 141, 143

EXIT_CODES = """exit codes:
  0    all frames were processed
  1    an error that should not happen; --debug shows where
  2    bad usage or bad input, or the output cannot be written
  3    the video is damaged or its source went away, or the model's output was not finite at some frames: what could be
       decoded was processed and written, the rest is counted and reported
  4    --verify found that streamed and parallel outputs differ
  130  Ctrl-C: what was written so far is complete; twice: at once
  141  whoever read the output went away
  143  SIGTERM, like Ctrl-C
"""

SYNTH_NOTES = """files:
  DIR/VARIANT-SPLIT-SEED.mp4            the video; its comment names variant, split, seed, hash of the parameters
  DIR/VARIANT-SPLIT-SEED.truth.jsonl    a header, then one line a frame: phase, polyps, landmarks, camera
  Both get these names when they are complete, the truth last; a run that is stopped leaves whole videos only.
"""

DEMO_FRAMES, DEMO_CLASSES = 150, 5
DEMO_WEIGHTS, DEMO_EVERY = "nano-phases", 4  # trained on every fourth frame
DEMO_VARIANT, DEMO_SEED = "all-other", 100  # held out: nothing was trained on it
PICTURE = 960  # pixels, the longer side of the annotated video at most

RANDOM_WEIGHTS = (
    "no --weights: the model is randomly initialised, so labels mean nothing yet.\n"
    "What can be judged: speed, memory, streamed == parallel, and that the output follows the picture."
)


VIDEO_HELP = "any file that FFmpeg reads, DICOM, a folder of pictures, a camera's number, a URL, a pipe, or - for stdin"


class UsageError(Exception):
    """What the user asked for cannot be done.  The message is one sentence."""


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as interrupt:
        terminated = interrupt.args == ("SIGTERM",)
        print(f"endomamba: stopped by {'SIGTERM' if terminated else 'Ctrl-C'}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more on its way out; it must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if args.debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    from .stream import NonFiniteOutput
    from .train.errors import NonFiniteLoss, TrainError
    from .video import VideoError

    if isinstance(error, NonFiniteLoss) and int(os.environ.get("RANK", 0)):
        time.sleep(2)  # the first process says it for all, and torchrun ends it as soon as another one ends
        return BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        text = (
            f"{error.filename}: {error.strerror}"
            if error.filename
            else f"the output cannot be written: {error.strerror}"
        )
    else:
        text = str(error)
    if isinstance(
        error, UsageError | VideoError | NonFiniteOutput | TrainError | OSError | ValueError | NotImplementedError
    ):
        print(f"endomamba: {text}", file=sys.stderr)
        return BAD_INPUT
    print(f"endomamba: {type(error).__name__}: {text}  (a bug; --debug shows where)", file=sys.stderr)
    return BUG


# ---- arguments


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "endomamba", description="Video models with a memory, frame by frame.", formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"endomamba {__version__}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="{stream,features,demo,synth,data,pretrain,finetune,eval,info}"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    stream = commands.add_parser(
        "stream",
        parents=[common],
        formatter_class=form,
        epilog=EXIT_CODES,
        help="run a video through a model, frame by frame",
        description="Runs a video through a model, frame by frame, and writes one JSON line a frame.",
    )
    _add_model_options(stream)
    stream.add_argument("--num-classes", type=_count, help="default: what the weights have, else no head")
    stream.add_argument("--names", type=Path, metavar="FILE", help="names of the classes, one a line")
    stream.add_argument(
        "--out",
        metavar="DIR|FILE.jsonl|-",
        help="a folder for predictions.jsonl, summary.json, timeline.png and annotated.mp4; a .jsonl file, or - for "
        "standard output, for the lines alone; default: VIDEO's name with .predictions.jsonl, here",
    )
    stream.add_argument(
        "--truth",
        type=Path,
        metavar="FILE",
        help="VIDEO's .truth.jsonl of `endomamba synth`: its phases are shown beside the labels and compared",
    )
    stream.add_argument("--no-video", action="store_true", help="no annotated.mp4: encoding costs time")
    stream.add_argument("--verify", action="store_true", help="check that streamed == parallel; costs a second pass")
    stream.set_defaults(run=_stream)

    features = commands.add_parser(
        "features",
        parents=[common],
        formatter_class=form,
        epilog=EXIT_CODES,
        help="write a video's features, a vector a frame",
        description="Runs a video through a model without its head and writes features (frames, channels) fp32, time "
        "(frames,) in seconds (NaN where a frame has none) and frame (frames,), its number in the source.",
    )
    _add_model_options(features)
    features.add_argument("--out", required=True, metavar="DIR")
    features.add_argument(
        "--format",
        default="safetensors",
        choices=("safetensors", "npy"),
        help="features.safetensors with all three, or features.npy, time.npy and frame.npy; default: %(default)s",
    )
    features.set_defaults(run=_features, num_classes=None)

    demo = commands.add_parser(
        "demo",
        parents=[common],
        formatter_class=form,
        epilog=EXIT_CODES,
        help="stream a synthetic endoscopy with all outputs, nothing to download",
        description="Streams a synthetic colonoscopy, a real ultrasound clip (it comes with pydicom), or VIDEO, writes "
        "all outputs and checks that streamed == parallel.",
    )
    demo.add_argument("video", nargs="?", help=VIDEO_HELP)
    demo.add_argument(
        "--clip", default="synthetic", choices=("synthetic", "ultrasound"), help="without VIDEO; default: %(default)s"
    )
    demo.add_argument(
        "--out", default="endomamba-demo", metavar="DIR", help="default: %(default)s (replaced each time)"
    )
    demo.add_argument("--max-frames", type=_positive, metavar="N", help="stop after N frames")
    demo.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default: torch's choice")
    demo.set_defaults(run=_demo)

    synth = commands.add_parser(
        "synth",
        parents=[common],
        formatter_class=form,
        help="make synthetic colonoscopies with ground truth",
        description="Draws videos of a procedural colon and writes, beside each mp4, what is true of every frame.",
        epilog=SYNTH_NOTES,
    )
    synth.add_argument("--out", type=Path, required=True, metavar="DIR")
    synth.add_argument("--videos", type=_positive, default=1, metavar="N", help="default: %(default)s")
    synth.add_argument("--frames", type=_positive, default=1000, metavar="M", help="of each; default: %(default)s")
    synth.add_argument(
        "--every", type=_positive, default=1, metavar="K", help="draw only each K-th of them; default: %(default)s"
    )
    synth.add_argument("--size", type=_positive, default=224, help="height and width, even; default: %(default)s")
    synth.add_argument("--variant", default="base", help="default: %(default)s; an unknown one lists them all")
    synth.add_argument("--split", default="train", help="train, val or test; default: %(default)s")
    synth.add_argument("--seed", type=_count, default=0, help="of the first video, one more for each; default: 0")
    synth.add_argument("--force", action="store_true", help="replace files that are already there")
    synth.add_argument("--quiet", action="store_true", help="no progress, no summary; errors are still shown")
    synth.set_defaults(run=_synth, max_frames=None)

    _add_training(commands, common)

    info = commands.add_parser("info", parents=[common], help="devices, back ends, and why each can or cannot run")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)
    return parser


def _add_training(commands: Any, common: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="the list of clips that training reads")
    actions = data.add_subparsers(title="actions", required=True, metavar="{build,manifest,check}")
    manifest = actions.add_parser(
        "manifest", parents=[common], help="write FOLDER/manifest.jsonl", description="Lists the clips of a folder."
    )
    manifest.add_argument("folder", type=Path)
    manifest.add_argument(
        "--layout",
        required=True,
        help="synth, folders, lists, cvc, cholec80, ...; an unknown name lists them all",
    )
    manifest.add_argument("--name", default="manifest", help="of the file, without .jsonl; default: %(default)s")
    manifest.add_argument("--overwrite", action="store_true", help="replace the manifest that is there")
    manifest.set_defaults(run=_data_manifest)
    build = actions.add_parser(
        "build",
        parents=[common],
        help="cut long videos and folders of pictures into clips for pre-training",
        description="Cuts every video and folder of pictures below FOLDER into clips, with frames left out that show "
        "next to nothing. The same command goes on where it was stopped.",
    )
    build.add_argument("folder", type=Path)
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    for option, kind, default, text in (
        ("seconds", float, 5.0, "of a clip"),
        ("fps", float, 30.0, "frames a second"),
        ("side", int, 256, "pixels, the shorter side"),
        ("least-std", float, 1.0, "grey levels: a frame with a smaller standard deviation is left out"),
        ("pictures-fps", float, 30.0, "of folders of pictures"),
    ):
        build.add_argument(f"--{option}", type=kind, default=default, help=f"{text}; default: %(default)s")
    build.add_argument("--workers", type=_positive, default=1, help="sources at a time; default: %(default)s")
    build.add_argument("--quiet", action="store_true", help="no progress, no summary; errors are still shown")
    build.set_defaults(run=_data_build, max_frames=None)
    check = actions.add_parser(
        "check",
        parents=[common],
        help="decode every file of a manifest",
        description="Decodes every file of a manifest once and names those that are damaged, missing or too short.",
    )
    check.add_argument("manifest", type=Path)
    check.set_defaults(run=_data_check)

    for name, run, text in (
        ("pretrain", _pretrain, "teach an encoder from clips without labels; it goes on where it was stopped too"),
        ("finetune", _finetune, "train a recipe on a manifest; the same command goes on where it was stopped"),
        ("eval", _eval, "metrics of a recipe's weights on a manifest"),
    ):
        command = commands.add_parser(
            name,
            parents=[common],
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Under torchrun it uses all its processes.",
        )
        command.add_argument("recipe", help="an unknown name lists them all")
        command.add_argument("--data", type=Path, required=True, metavar="MANIFEST")
        command.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe, clip.frames=8 say"
        )
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        command.set_defaults(run=run)
        if name != "eval":
            command.add_argument("--out", type=Path, required=True, metavar="DIR")
        else:
            command.add_argument("--weights", type=Path, required=True)
            command.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """What streaming a video through a model needs, whatever is done with the output."""
    command.add_argument("video", help=VIDEO_HELP)
    command.set_defaults(classes=[])  # their names, where the weights say them
    command.add_argument("--model", help="default: what the weights say, else endomamba_tiny")
    command.add_argument(
        "--weights", type=_weights, help="a published checkpoint, a safetensors file, or nano-phases, which is here"
    )
    command.add_argument(
        "--head",
        choices=("mean", "cls", "classification", "segmentation", "localisation"),
        help="what answers a frame, and how it is pooled; default: what the weights say, else mean",
    )
    command.add_argument(
        "--normalise",
        default="imagenet",
        choices=("imagenet", "polypdiag"),
        help="the mean and std the weights were trained with",
    )
    command.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    command.add_argument(
        "--start",
        type=_place,
        metavar="PLACE",
        help="first frame to read: its number from 0 (250), or a time in the video (10.5s, 1:02, 1:02:03.5)",
    )
    command.add_argument("--stop", type=_place, metavar="PLACE", help="first frame not to read any more, likewise")
    command.add_argument("--max-frames", type=_positive, metavar="N", help="stop after N frames")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument(
        "--backend", default="auto", choices=("auto", "triton", "cuda", "cpu", "reference"), help="of the ops"
    )
    command.add_argument(
        "--back-pressure",
        choices=("drop-oldest", "block"),
        help="where frames come faster than the model reads them: lose the oldest that waits, or let the source wait; "
        "default: drop-oldest for a camera or a broadcast, else block",
    )
    command.add_argument(
        "--positions",
        default="processed",
        choices=("processed", "elapsed"),
        help="what the model's position in time counts: frames it read, or all that the source gave; default: "
        "%(default)s",
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default: torch's choice")
    command.add_argument(
        "--quiet", action="store_true", help="no header, no progress, no summary; errors are still shown"
    )


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _count(text: str) -> int:
    return _at_least(text, 0)


def _weights(text: str) -> Path:
    """A file, or the name of weights that come with the package."""
    from .models.pretrained import list_pretrained, pretrained_path

    return pretrained_path(text) if text in list_pretrained() and not Path(text).exists() else Path(text)


def _place(text: str) -> int | float:
    """250 -> 250, a frame.  10s, 10.5s, 1:02, 1:02:03.5 -> seconds."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)s?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be a frame's number (250) or a time (10.5s, 1:02), got {text!r}")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return value


# ---- endomamba stream, endomamba demo


def _stream(args: argparse.Namespace) -> int:
    from .sources import open_source
    from .stream import JsonLines, StreamSession, Verifier

    if args.verify and args.positions != "processed":
        raise UsageError("--verify reads the frames without gaps: it needs --positions processed")
    # Text goes to stderr where stdout carries the lines.
    text = io.StringIO() if args.quiet else sys.stderr if args.out == "-" else sys.stdout
    with _Signals() as signals, open_source(args.video) as reader:  # a bad file is refused before the model is built
        model, trained = _model(args, text)
        camera = _camera(args, model, text)
        names = _names(args.names, model, trained, args.classes)
        truth = _truth(args.truth, names, reader.expected)
        agreement = _agreement(truth)
        with _lines(args, JsonLines) as lines:
            folder = _folder_outputs(args, lines.path, names, reader.info.fps, truth)
            reader.select(args.start, args.stop)
            reader.show(model.config.img_size, PICTURE if folder is not None and folder.video is not None else None)
            session = StreamSession(
                camera,
                reader,
                lines.write,
                verifier=Verifier(camera.model) if args.verify else None,
                outputs=[*(folder.outputs if folder is not None else ()), *([agreement] if agreement else ())],
                report=_say,
                back_pressure=_back_pressure(args),
            )
            _header(text, args, reader, model, trained)
            signals.session = session
            problems: list[OSError] = []
            ended = False
            try:
                with _Progress(args, reader.expected) as progress:
                    session.run(args.max_frames, progress)
                ended = True
            finally:
                summary = session.summary()
                if agreement is not None:
                    summary["agreement"] = agreement.summary(names)
                written, problems = _finish(folder, lines.path, summary)
                if summary["decoded"] or ended:
                    print(_report(summary, session, written), file=text, flush=True)
            code = _verdict(reader, session, signals)
            return code if code != OK or not problems else BAD_INPUT


def _features(args: argparse.Namespace) -> int:
    from .outputs import Features
    from .sources import open_source
    from .stream import StreamSession

    text = io.StringIO() if args.quiet else sys.stdout
    folder = Path(args.out)
    files = ["features.safetensors"] if args.format == "safetensors" else ["features.npy", "time.npy", "frame.npy"]
    _check_free([folder / name for name in files], args.overwrite)
    with _Signals() as signals, open_source(args.video) as reader:
        model, _ = _model(args, text)
        if model.config.num_classes:  # what a head would have read
            weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
            model = type(model)(replace(model.config, num_classes=0)).eval()
            model.load_state_dict(weights)
        camera = _camera(args, model, text)
        reader.select(args.start, args.stop)
        reader.show(model.config.img_size)
        features = Features()
        session = StreamSession(
            camera,
            reader,
            lambda record: None,
            outputs=[features],
            report=_say,
            back_pressure=_back_pressure(args),
        )
        _header(text, args, reader, model, True)
        signals.session = session
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _Progress(args, reader.expected) as progress:
                session.run(args.max_frames, progress)
        finally:
            if len(features):
                facts = {
                    "video": reader.info.path,
                    "model": args.model,
                    "weights": str(args.weights),
                    "pool": model.config.head,
                }
                facts |= {"normalise": args.normalise, "endomamba": __version__, "stopped": session.stopped}
                written = features.save(folder, args.format, facts)
                print(_report(session.summary(), session, [str(path) for path in written]), file=text, flush=True)
        return _verdict(reader, session, signals)


def _camera(args: argparse.Namespace, model: nn.Module, text: Any) -> FrameStream:
    import torch

    from .models import packed
    from .stream import FrameStream
    from .video import NORMALISATIONS

    if args.threads:
        torch.set_num_threads(args.threads)
    model = packed(model.to(_device(args.device, text)))
    camera = FrameStream(model, positions=args.positions, **NORMALISATIONS[args.normalise])
    camera.warm_up()
    return camera


def _back_pressure(args: argparse.Namespace) -> str | None:
    return args.back_pressure and args.back_pressure.replace("-", " ")


def _names(path: Path | None, model: nn.Module, trained: bool, known: list[str]) -> list[str]:
    """The lines of a file, what the weights say, or numbers; nobody shall take random ones for findings."""
    config: Any = model.config
    classes = 0 if config.head in ("segmentation", "localisation") else config.num_classes
    if path is None and trained and len(known) == classes:
        return known
    if path is None:
        return [f"class {label}" if trained else f"class {label} (random)" for label in range(classes)]
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != classes:
        raise UsageError(f"--names {path}: one line a class was expected, {classes} in all, it has {len(names)}")
    return names


def _truth(path: Path | None, names: list[str], frames: int | None) -> list[int] | None:
    """The class of each frame, as the model numbers them.  frames: of the video, where they are known beforehand."""
    if path is None:
        return None
    from .synthetic import PHASES, TruthError, load_truth

    try:
        phases = [PHASES[phase] for phase in load_truth(path).phase]
    except TruthError as error:
        raise UsageError(str(error)) from None
    strange = ", ".join(sorted(set(phases) - set(names)))
    if strange:
        raise UsageError(f"--truth {path}: it has the phases {strange}, the model's classes are {', '.join(names)}")
    if frames is not None and frames != len(phases):
        raise UsageError(f"--truth {path}: it is of a video of {len(phases)} frames, this one has {frames}")
    return [names.index(phase) for phase in phases]


def _agreement(truth: list[int] | None) -> Agreement | None:
    if truth is None:
        return None
    from .outputs import Agreement

    return Agreement(truth)


def _is_folder(out: str | None) -> bool:
    return out not in (None, "-") and Path(out).suffix not in (".jsonl", ".json")


def _folder_outputs(
    args: argparse.Namespace, lines: Path | None, names: list[str], fps: float | None, truth: list[int] | None
) -> FolderOutputs | None:
    if lines is None or not _is_folder(args.out):
        return None
    from .outputs import FolderOutputs

    return FolderOutputs(lines.parent, names, fps, video=not args.no_video, truth=truth)


def _check_free(paths: list[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise UsageError(f"{there[0]} exists already: choose another --out, or replace it with --overwrite")


def _finish(
    folder: FolderOutputs | None, lines: Path | None, summary: dict[str, Any]
) -> tuple[list[str], list[OSError]]:
    """Completes what lies beside the lines -> what is written, and what could not be, which is said."""
    from .stream import write_summary

    if lines is None:
        return ["to standard output"], []
    written, problems = [str(lines)], []
    if folder is not None:
        names, problems = folder.finish(summary)
        written += [str(folder.folder / name) for name in names]
    else:
        target = lines.with_suffix(".summary.json")
        try:
            write_summary(target, summary)
        except OSError as error:
            problems = [error]
    for problem in problems:
        _say(f"{problem.filename}: {problem.strerror}")
    return written, problems


def _say(sentence: str) -> None:
    print(f"endomamba: {sentence}", file=sys.stderr, flush=True)


class _Signals:
    """SIGINT and SIGTERM end a running session after its frame, so that every file is closed; before it runs, and the
    second time, they raise KeyboardInterrupt."""

    NAMES: ClassVar = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

    def __init__(self) -> None:
        self.session: StreamSession | None = None
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.NAMES}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.session is None or self.caught is not None:
            raise KeyboardInterrupt(self.NAMES[signal.Signals(number)])
        self.caught = number
        self.session.stop(f"by {self.NAMES[signal.Signals(number)]}")


def _verdict(reader: VideoReader, session: StreamSession, signals: _Signals) -> int:
    """Exit code of a run that came to an end in order, and the sentence that goes with it."""
    code = OK
    if reader.damage:
        what = "went away" if reader.live else "is damaged"
        _say(f"{reader.path} {what}: {reader.damage}.  {session.frames} frames were processed and written")
        code = DAMAGED
    elif session.not_finite:
        total = session.frames + session.not_finite
        _say(f"the model's output was not finite at {session.not_finite} of {total} frames, which left no trace")
        code = DAMAGED
    elif not session.frames and signals.caught is None:
        where = "" if reader.start is None and reader.stop is None else " between --start and --stop"
        raise UsageError(f"{reader.path} holds no frame{where}")
    for notice in reader.notices:
        _say(f"{reader.path}: {notice}")
    if session.verifier is not None and not session.verifier.passed:
        _say("verify failed: streamed and parallel outputs differ")
        code = VERIFY_FAILED
    if signals.caught is not None:
        _say(f"stopped by {signals.NAMES[signal.Signals(signals.caught)]}")
        code = 128 + signals.caught
    return code


def _device(name: str, text: Any) -> str:
    import torch

    from . import ops

    if name == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if name == "cuda":
            raise UsageError("--device cuda: torch sees no CUDA device here (`endomamba info` shows what there is)")
        return "cpu"
    if name == "auto":
        table = ops.backend_info("cuda")
        lacking = [op for op, names in table.items() if all(names.get(name) for name in ("triton", "cuda"))]
        if lacking:
            print(f"on the CPU: there is a GPU, but no back end on it for {', '.join(lacking)}", file=text)
            return "cpu"
    return "cuda"


def _model(args: argparse.Namespace, text: Any) -> tuple[nn.Module, bool]:
    """-> the model in evaluation mode, and whether its labels mean anything."""
    import torch

    from .models import CheckpointError, create_model, described, list_models, load_checkpoint

    found = described(args.weights) if args.weights is not None and args.model is None else None
    args.model = args.model or (found.model if found else "endomamba_tiny")
    if args.model in list_models() and not args.model.startswith("endomamba"):
        raise UsageError(
            f"--model {args.model}: this command streams EndoMamba; attention_twin* and endofm stream from Python, "
            "with endomamba.stream.FrameStream"
        )
    given = {"num_classes": args.num_classes, "head": args.head, "backend": args.backend}
    options: dict[str, Any] = dict(found.options) if found else {"num_classes": 0, "head": "mean"}
    options |= {name: value for name, value in given.items() if value is not None}
    args.head, args.classes = options["head"], list(found.classes) if found else []
    if args.weights is None:
        # At the published initialisation a state fades within one frame, and equality would prove nothing.
        options |= {"dt_init": "mamba", "dt_min": 1e-4, "dt_max": 1e-1}
    torch.manual_seed(0)
    model = create_model(args.model, **options)
    if not hasattr(model, "step_"):
        raise UsageError(f"{args.model} cannot stream: it has no step for single frames")
    if args.weights is None:
        if isinstance(
            model.head, torch.nn.Linear
        ):  # at the published scale a random head gives every frame the same answer
            torch.nn.init.normal_(model.head.weight, std=0.2)
        return model.eval(), False
    try:
        report = load_checkpoint(model, args.weights)
    except CheckpointError as error:
        classes = re.search(r"has a head for (\d+) classes and this model none", str(error))
        if not classes or args.num_classes is not None:
            raise
        model = create_model(args.model, **{**options, "num_classes": int(classes[1])})
        report = load_checkpoint(model, args.weights)
    print(report, file=text)
    head = any(name.startswith("head.") for name in report.missing)
    if head:
        print("the weights have no head: its answers are random and mean nothing yet", file=text)
    return model.eval(), not head


def _lines(args: argparse.Namespace, JsonLines: Any) -> Any:
    """Opens the file of predictions; an existing one is replaced only when asked."""
    if args.out == "-":
        return JsonLines(None)
    if args.out is None:
        number, path = 1, Path(f"{_stem(args.video)}.predictions.jsonl")
        while path.exists() and not args.overwrite:
            number += 1
            path = Path(f"{_stem(args.video)}.predictions-{number}.jsonl")
    else:
        path = Path(args.out)
        if _is_folder(args.out):
            _check_free([path / name for name in ("annotated.mp4", "summary.json", "timeline.png")], args.overwrite)
            path = path / "predictions.jsonl"
    try:
        return JsonLines(path, overwrite=args.overwrite)
    except FileExistsError as error:
        if not path.is_file():
            raise UsageError(f"--out {args.out}: {error.filename} is in the way") from error
        raise UsageError(f"{path} exists already: choose another --out, or replace it with --overwrite") from error


def _stem(video: str) -> str:
    """What the files of a run without --out are called after."""
    if video == "-":
        return "stdin"
    if "://" in video:
        return Path(urlsplit(video).path).stem or "stream"
    return f"camera-{video}" if video.isdecimal() and not Path(video).exists() else Path(video).resolve().stem


def _header(text: Any, args: argparse.Namespace, reader: VideoReader, model: nn.Module, trained: bool) -> None:
    import torch

    from .ops._extension import C

    height, width = model.config.img_size
    device = next(model.parameters()).device.type
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu":
        where += f", {C.level()} kernels" if C is not None else ", slow PyTorch reference (see endomamba info)"
    print(f"video    {reader.info.path}: {reader.info}", file=text)
    if args.start is not None or args.stop is not None:
        print(f"frames   from {_place_words(args.start or 0)} to {_place_words(args.stop)}", file=text)
    print(f"model    {args.model}, {millions:.1f} M parameters, frames of {width} x {height}, on {where}", file=text)
    if args.weights is None:
        print("weights  " + RANDOM_WEIGHTS.replace("\n", "\n         "), file=text)
    elif not trained:
        print(f"weights  {args.weights}; the head is random", file=text)
    print(file=text, flush=True)


def _place_words(place: int | float | None) -> str:
    if place is None:
        return "the end"
    return f"{place:g} s" if isinstance(place, float) else f"number {place}"


_PERCENTILES = ("p50", "p95", "p99", "max")


def _report(summary: dict[str, Any], session: StreamSession, written: list[str]) -> str:
    parts = summary["latency"]
    fps = session.reader.info.fps
    speed = f"{summary['frames_per_second']:.1f} frames/s" + (f" (the video plays at {fps:.4g})" if fps else "")
    counts = ("decoded", "dropped", "not_finite", "lost_to_damage")
    lines = [
        f"stopped  {summary['stopped']}, {summary['frames']} frames, {speed}",
        "frames   " + ", ".join(f"{summary[name]} {name.replace('_', ' ')}" for name in counts),
        "latency  " + " ".join(f"{name:>10}" for name in ("in ms", *_PERCENTILES)),
        *(
            f"         {name:>10} " + " ".join(f"{parts[name][f'{percent}_ms']:10.2f}" for percent in _PERCENTILES)
            for name in parts
        ),
        f"state    {summary['state_bytes']:,} bytes carried from frame to frame, the same for a video of any length",
    ]
    if session.changes.points:
        lines += [
            f"change   {session.changes.sparkline()}",
            "         1 - cosine of successive outputs: mean {mean:.1e}, max {max:.1e}".format(**summary["change"]),
        ]
    if summary["event_count"]:
        shown = [_event_words(event) for event in summary["events"][:3]]
        more = summary["event_count"] - len(shown)
        lines.append("camera   " + "; ".join(shown) + (f"; and {more} more" if more else ""))
    if summary["verify"] is not None:
        lines += _verify_lines(summary["verify"])
    if summary.get("agreement"):
        lines.append(_agreement_words(summary["agreement"]))
    lines += [f"{'' if number else 'written':<8} {name}" for number, name in enumerate(written)]
    return "\n".join(lines)


def _event_words(event: dict[str, Any]) -> str:
    """Such as: black from 3.200 s to 4.200 s (26 frames)."""
    places = [
        f"frame {event[frame]}" if event[seconds] is None else f"{event[seconds]:.3f} s"
        for frame, seconds in (("first", "from"), ("last", "to"))
    ]
    return f"{event['what']} from {places[0]} to {places[1]} ({event['frames']} frames)"


def _agreement_words(agreement: dict[str, Any]) -> str:
    frames, right, commonest = (agreement[name] for name in ("frames", "right", "commonest"))
    if not frames:
        return "truth    the model gave no label"
    return (
        f"truth    the most probable class is the true one in {right} of {frames} frames, {right / frames:.0%} (the "
        f"commonest class is in {commonest / frames:.0%})"
    )


def _verify_lines(verify: dict[str, Any]) -> list[str]:
    if not verify["frames"]:
        return ["verify   not reached"]
    if verify["max_difference"] is None or verify["max_state_difference"] is None:
        return ["verify   FAILED: an output or a state is not finite"]
    lines = [
        "verify   {word}: max |streamed - parallel| = {max_difference:.1e} (allowed {tolerance:.1e}) "
        "over {frames} frames; states {max_state_difference:.1e}".format(
            word="passed" if verify["passed"] else "FAILED", **verify
        )
    ]
    without = verify["difference_without_state"]
    if without is None:
        lines.append("         the clip is too short to show what the carried state does to the output")
    elif without > 100 * verify["tolerance"]:
        lines.append(f"         without the carried state they would differ by {without:.1e}, so it was carried")
    else:
        lines.append(f"         without the carried state they would differ by {without:.1e} only, which proves little")
    return lines


class _Progress:
    """On a terminal a bar; elsewhere a line every 10 seconds, so that a log stays readable."""

    EVERY = 10.0

    def __init__(self, args: argparse.Namespace, total: int | None, unit: str = "frame") -> None:
        self.total = min(filter(None, (total, args.max_frames)), default=None)
        self.silent, self.unit = args.quiet, unit
        self.bar: Any = None
        self.count = 0
        self.said = time.monotonic()

    def __enter__(self) -> _Progress:
        if not self.silent and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit=self.unit, file=sys.stderr, dynamic_ncols=True, leave=False)
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        self.count += 1
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.update()
        elif not self.silent and time.monotonic() - self.said > self.EVERY:
            self.said = time.monotonic()
            of = f" of {self.total}" if self.total else ""
            print(f"{self.unit} {self.count}{of}", file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _demo(args: argparse.Namespace) -> int:
    out = Path(args.out)
    drawn = args.video is None and args.clip == "synthetic"
    clip = f"a synthetic colonoscopy of {DEMO_FRAMES} frames, drawn now (endomamba synth)"
    if args.clip == "ultrasound":
        clip = "a real ultrasound sequence of 30 frames that comes with pydicom"
    model = "EndoMamba (tiny, random weights)"
    if drawn:
        model = f"a small trained EndoMamba that comes with the package ({DEMO_WEIGHTS})"
    print(
        f"This streams a medical video through {model}, one frame at a time, as a camera would deliver it:\n"
        f"  the video is {clip if args.video is None else args.video}.\n"
        "  Each frame is decoded, squashed to the model's size and read by the model, which remembers the frames\n"
        "  before it in a state of fixed size.  The same frames then go through the parallel pass as one clip, and\n"
        "  both must give the same numbers.\n"
        f"In {out} there will be\n"
        "  predictions.jsonl  a line a frame: time, labels, probabilities, latency\n"
        f"  annotated.mp4      the video with label, confidence{', truth' if drawn else ''} and latency below it\n"
        f"  timeline.png       labels,{' truth,' if drawn else ''} probabilities and latency over the whole run\n"
        "  summary.json       counts and latencies\n",
        flush=True,
    )
    rest = ["--out", args.out, "--overwrite", "--verify"]
    rest += ["--max-frames", str(args.max_frames)] if args.max_frames else []
    rest += ["--threads", str(args.threads)] if args.threads else []
    rest += ["--debug"] if args.debug else []
    if drawn:
        video, truth = _synthetic_clip(out)
        rest += ["--weights", DEMO_WEIGHTS, "--truth", str(truth)]
    else:
        video = args.video or _bundled_clip()
        rest += ["--num-classes", str(DEMO_CLASSES)]
    code = _stream(build_parser().parse_args(["stream", *rest, "--", str(video)]))
    lines = out / "predictions.jsonl"
    if code == OK and lines.is_file():
        with lines.open() as file:
            last = file.readlines()[-1].strip()
        print(f"\nThe last line written:\n  {last}")
        print("Your own video:  endomamba stream VIDEO --weights CHECKPOINT --out DIR")
    return code


def _synthetic_clip(folder: Path) -> tuple[Path, Path]:
    """A video of a kind that the model was not trained on, and its truth."""
    from . import synthetic

    frames = DEMO_EVERY * DEMO_FRAMES
    video = synthetic.SyntheticVideo(
        DEMO_VARIANT, split="test", seed=DEMO_SEED, frames=frames, size=256, every=DEMO_EVERY
    )
    return synthetic.write(video, folder / "clip", force=True)


def _bundled_clip() -> Path:
    try:
        from pydicom import examples
    except ImportError as error:
        raise UsageError("the demo's clip comes with pydicom: pip install endomamba[video], or name a VIDEO") from error
    return Path(examples.get_path("ybr_color"))


# ---- endomamba synth


def _synth(args: argparse.Namespace) -> int:
    from . import synthetic
    from .video import import_av

    import_av()
    if args.size % 2:
        raise UsageError(f"--size must be even for an mp4, got {args.size}")
    seeds = range(args.seed, args.seed + args.videos)
    files = [path for seed in seeds for path in synthetic.paths(args.out, args.variant, args.split, seed)]
    there = [path for path in files if path.exists()]
    if there and not args.force:
        raise UsageError(f"{there[0]} exists already: choose another --out or --seed, or replace it with --force")
    started, bytes_written = time.monotonic(), 0
    count = args.videos * -(-args.frames // args.every)
    with _Progress(args, count) as progress:
        for seed in seeds:
            video = synthetic.SyntheticVideo(
                args.variant, split=args.split, seed=seed, frames=args.frames, size=args.size, every=args.every
            )
            written = synthetic.write(video, args.out, force=args.force, progress=progress)
            bytes_written += sum(path.stat().st_size for path in written)
    if not args.quiet:
        print(
            f"{args.videos} videos, {count} frames of {args.size} x {args.size} in {args.out}: "
            f"{bytes_written / 1e6:.1f} MB, {count / (time.monotonic() - started):.1f} frames/s\n"
            f"variant {args.variant}, split {args.split}, seeds {seeds[0]} to {seeds[-1]}, "
            f"parameters {video.params.digest()[:12]}"
        )
    return OK


# ---- endomamba data, pretrain, finetune, eval


def _data_manifest(args: argparse.Namespace) -> int:
    from .train import manifest
    from .train.layouts import LAYOUTS

    if args.layout not in LAYOUTS:
        listed = "\n".join(f"  {name:<20} {layout.what}" for name, layout in LAYOUTS.items())
        raise UsageError(f"there is no layout {args.layout!r}; there are\n{listed}")
    if not args.name or Path(args.name).name != args.name:
        raise UsageError(f"--name must be a name without a folder, as paths are relative to it, got {args.name!r}")
    path = args.folder / f"{args.name}.jsonl"
    if path.exists() and not args.overwrite:
        raise UsageError(f"{path} exists already: replace it with --overwrite")
    written = manifest.write(path, *LAYOUTS[args.layout].convert(args.folder))
    counts = {split: sum(entry.split == split for entry in written.entries) for split in manifest.SPLITS}
    print(f"{path}: {', '.join(f'{count} {split}' for split, count in counts.items())}; "
          f"classes {', '.join(written.classes)}")  # fmt: skip
    return OK


def _data_build(args: argparse.Namespace) -> int:
    from .train.build import BuildConfig, Built, build

    config = BuildConfig(args.seconds, args.fps, args.side, args.least_std, args.pictures_fps)
    with _Progress(args, None, unit="source") as progress:

        def done(built: Built, total: int) -> None:
            progress.total = total
            progress(built._asdict())

        results = build(args.folder, args.out, config, workers=args.workers, progress=done)
    bad = [built for built in results if built.error or built.damage]
    if not args.quiet:
        clips = [frames for built in results for frames in built.clips]
        left_out = sum(built.left_out for built in results)
        print(
            f"{args.out}: {len(clips)} clips, {sum(clips)} frames of {len(results)} sources; "
            f"{left_out} frames left out; {len(bad)} sources damaged or unreadable"
        )
    return DAMAGED if bad else OK


def _data_check(args: argparse.Namespace) -> int:
    from .train import manifest

    listed, bad = manifest.read(args.manifest), 0
    for entry, why in manifest.check(listed):
        print(f"{'BAD ' if why else 'ok  '} {entry}{f': {why}' if why else ''}", flush=True)
        bad += bool(why)
    print(f"{len(listed.entries)} clips, {bad} of them bad")
    return DAMAGED if bad else OK


def _recipe(args: argparse.Namespace, kind: Any) -> Any:
    """The recipe with what --set changes; a value is a Python literal, or else a word."""
    import ast

    from .train import recipes

    changes = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set must be FIELD=VALUE, got {text!r}")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return recipes.find(args.recipe, changes, kind)


def _pretrain(args: argparse.Namespace) -> int:
    from .train import pretrain

    return _train(args, pretrain.run, pretrain.PretrainConfig)


def _finetune(args: argparse.Namespace) -> int:
    from .train import finetune

    return _train(args, finetune.run, finetune.FinetuneConfig)


def _train(args: argparse.Namespace, run: Any, kind: Any) -> int:
    from .train import manifest
    from .train.world import start_world

    with start_world(args.device) as world:
        run(_recipe(args, kind), manifest.read(args.data), args.out, world)
        if world.rank == 0:
            print(f"written  {args.out / 'final.safetensors'}")
    return OK


def _eval(args: argparse.Namespace) -> int:
    from .train import finetune, manifest
    from .train.world import start_world

    config, listed = _recipe(args, finetune.FinetuneConfig), manifest.read(args.data)
    with start_world(args.device) as world:
        values = finetune.judge(config, listed, args.weights, args.split, world)
        if world.rank == 0:
            numbers = {name: None if value != value else value for name, value in values.items()}  # JSON has no NaN
            print(json.dumps(numbers, indent=2))
    return OK


# ---- endomamba info


def _info(args: argparse.Namespace) -> int:
    facts = gather_info()
    print(json.dumps(facts, indent=2) if args.json else _info_text(facts))
    return OK


def gather_info() -> dict[str, Any]:
    """What this machine has, and for every op and back end why it cannot run there; an empty list: it can."""
    import torch

    from . import ops
    from .models import list_models
    from .ops._extension import MISSING, C, build_info

    devices = {"cpu": f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        devices["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "endomamba": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in ("av", "pydicom", "pillow", "tqdm", "triton", "numpy")},
        "devices": devices,
        "cpu_kernels": {
            "built": C is not None,
            "why_not": MISSING or None,
            "level": C.level() if C is not None else None,
            "levels": list(C.levels()) if C is not None else [],
        },
        "build": build_info(),
        "models": list_models(),
        "backends": {device: ops.backend_info(device) for device in devices},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _info_text(facts: dict[str, Any]) -> str:
    kernels = facts["cpu_kernels"]
    has = f"{kernels['level']} in use; this machine runs {', '.join(kernels['levels'])}"
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in facts["packages"].items())
    lines = [
        f"endomamba    {facts['endomamba']}, Python {facts['python']}, {facts['platform']}",
        f"torch        {facts['torch']}",
        f"packages     {packages}",
        *(f"device       {name}: {what}" for name, what in facts["devices"].items()),
        f"CPU kernels  {has if kernels['built'] else kernels['why_not']}",
        f"build        {', '.join(f'{k}: {v}' for k, v in facts['build'].items()) or 'no _build_info.json'}",
        f"models       {', '.join(facts['models'])}",
    ]
    for device, table in facts["backends"].items():
        lines += ["", f"back ends on {device} (fp32)"]
        for op, names in table.items():
            lines.append(f"  {op}")
            lines += [
                f"    {name:<10} {'; '.join(reasons) if reasons else 'can run'}" for name, reasons in names.items()
            ]
    return "\n".join(lines)
