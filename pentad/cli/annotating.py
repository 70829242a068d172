"""``pentad data annotate``: the stages of Segment Anything's data engine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.image_files import image_files
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.recipes.data_engine import StageReport


class Stage(StrEnum):
    """How much is left to the annotator."""

    assisted = "assisted"
    semi = "semi"
    automatic = "automatic"


def annotate(
    source: Annotated[
        Path, Argument(metavar="SRC", help="A folder of images; with --simulate a data set with masks in any format.")
    ],
    model: Annotated[
        str, Option("--model", "-m", metavar="NAME", help="A Segment Anything.", autocompletion=model_names)
    ],
    out: Annotated[
        Path, Option("--out", "-o", metavar="DIR", help="The output folder: a new one, or one to continue in.")
    ],
    stage: Annotated[Stage, Option(metavar="NAME", help="assisted, semi or automatic.")] = Stage.automatic,
    simulate: Annotated[
        bool, Option("--simulate", help="A simulated annotator, who knows the masks of SRC and clicks.")
    ] = False,
    enough: Annotated[
        float, Option("--good-enough", min=0, max=1, metavar="X", help="With --simulate: click until the IoU is X.")
    ] = 0.9,
    max_clicks: Annotated[
        int, Option(min=1, max=100, metavar="N", help="With --simulate: draw by hand after N clicks on an object.")
    ] = 8,
    detector: Annotated[
        str | None,
        Option(metavar="NAME", help="With semi: a detector whose boxes propose masks.", autocompletion=model_names),
    ] = None,
    threshold: Annotated[float, Option(min=0, max=1, metavar="X", help="With semi: the least score of a box.")] = 0.5,
    points_per_side: Annotated[
        int, Option(min=1, max=256, metavar="N", help="With automatic: points a side of the grid.")
    ] = 32,
    min_iou: Annotated[
        float, Option(max=1, metavar="X", help="Keep proposed masks whose predicted IoU is above X.")
    ] = 0.88,
    min_stability: Annotated[
        float, Option(min=0, max=1, metavar="X", help="Keep proposed masks at least this stable.")
    ] = 0.95,
    max_overlap: Annotated[
        float, Option(min=0, max=1, metavar="X", help="Drop a mask whose IoU with an earlier one is above X.")
    ] = 0.7,
    view: Annotated[
        bool, Option("--view", help="A person annotates at a page, where the model proposes: accept, correct or skip.")
    ] = False,
    no_browser: Annotated[bool, Option("--no-browser", help="With --view: only print the page's address.")] = False,
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="With --view: the port; 0: a free one.")] = 0,
    train: Annotated[
        Path | None,
        Option(metavar="RECIPE", help="Then train the model on the annotations by this recipe, in DIR/training."),
    ] = None,
    also: Annotated[
        list[Path] | None, Option(metavar="DIR", help="With --train: also on the annotations of an earlier stage.")
    ] = None,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Annotate images with masks, as in the data engine of Segment Anything, and train on them.

    assisted: an annotator clicks on each object until its mask is right. semi: boxes of a detector
    propose masks, confident ones are kept, and the annotator adds what is missing. automatic: the
    confident and stable masks of everything are kept.

    The annotator is a person at a page (--view) or simulated (--simulate).

    DIR is a data set in COCO's format. The same command continues what was interrupted.

    JSON: path, stage, images, masks, masks_per_image, proposed (masks kept without an annotator),
    clicked, drawn, clicks_per_mask, seconds_per_mask (the annotator's), computing_seconds (an image),
    skipped, model (trained).
    """
    if stage == Stage.semi and detector is None:
        raise BadInput("--stage semi needs --detector NAME, whose boxes propose masks")
    if stage != Stage.semi and detector is not None:
        raise BadInput(f"--detector is for --stage semi; leave it out of {stage}")
    if stage == Stage.automatic and (simulate or view):
        raise BadInput(f"--stage automatic has no annotator; leave {'--simulate' if simulate else '--view'} out")
    if simulate and view:
        raise BadInput("--simulate and --view are two annotators; expected one")
    if also and train is None:
        raise BadInput("--also is for --train RECIPE")
    if stage == Stage.assisted and not (simulate or view):
        raise BadInput("--stage assisted needs an annotator: --view for a person at a page, or --simulate")
    if train is not None and not train.is_file():
        raise BadInput(f"{train} is not there; expected a recipe of pentad train")
    from pentad.datasets.object_folders import read_objects

    annotator: Any = None
    if not simulate:
        images = image_files([str(source)])
    try:
        from pentad.recipes import data_engine
        from pentad.recipes.annotation import SimulatedAnnotator
    except ModuleNotFoundError as error:
        packages = "pip install 'pentad[train,vision]'"
        raise BadInput(f"pentad data annotate needs {error.name}; install it: {packages}") from error
    if simulate:
        dataset = read_objects(source)
        images = [image.path for image in dataset.images]
        annotator = SimulatedAnnotator.of(dataset, enough, max_clicks)
    acceptance = data_engine.Acceptance(
        min_iou=min_iou,
        min_stability=min_stability,
        max_overlap=max_overlap,
        threshold=threshold,
        points_per_side=points_per_side,
    )
    report = None
    if not view or stage == Stage.semi:
        report = data_engine.annotate(
            stage.value,
            images,
            loading.load(model, "segment"),
            out,
            annotator=annotator,
            detector=None if detector is None else loading.load(detector, "detect"),
            acceptance=acceptance,
            done=not view,
            progress=output.progress("images"),
        )
    if view:
        from pentad.cli.viewing import view_stage
        from pentad.recipes.annotation_folder import open_annotations

        skipped = [] if report is None else report.skipped
        with open_annotations(out, data_engine.stage_settings(stage, model, detector, acceptance)) as written:
            readable = [path for path in images if stage == Stage.assisted or str(path) in written.records]
            if written.left(readable):
                view_stage(written, readable, model, loading, port=port, browser=not no_browser, as_json=as_json)
            written.finish(readable)
            report = data_engine.report(written, skipped)
            if left := len(written.left(readable)):
                output.note(f"pentad: {left} images are left; the same command continues")
                train = None
    assert report is not None
    for line in report.skipped:
        output.fail(line)
    trained = None
    if train is not None:
        folders = [out, *(also or ())]
        note: Any = lambda line: output.note(f"pentad: {line}")  # noqa: E731
        trained = data_engine.retrain(train, model, folders, out / "training", note=note)
    _show(out, stage, report, trained, as_json=as_json)
    if report.skipped:
        raise Exit(2)


def _show(out: Path, stage: Stage, report: StageReport, trained: Path | None, *, as_json: bool) -> None:
    facts = report._asdict()
    if as_json:
        model = {} if trained is None else {"model": str(trained)}
        output.write_json({"path": str(out), "stage": stage.value, **facts, **model})
        return
    del facts["skipped"]
    rows = [
        (name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value) for name, value in facts.items()
    ]
    output.write_table([(name, value) for name, value in rows if value is not None])
    output.write(f"{trained or out}\n")
