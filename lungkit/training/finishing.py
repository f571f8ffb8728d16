"""The end of a run: the model that it ships, measured on the scans themselves."""

from __future__ import annotations

import logging
from dataclasses import replace

import lungkit
from lungkit._atomic import write_json_atomic
from lungkit.checkpoint import BEST, describe_checkpoint
from lungkit.data import NanPolicy, PatchSampler, save_augmentation_preview
from lungkit.data.readers import reader_codes
from lungkit.data.splits import patients
from lungkit.errors import UsageError
from lungkit.inference import Predictor, TrainedModel
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.folder_report import REPORT, write_folder_report
from lungkit.pipeline.labelled import LabelledScans, draw_overlays, measure_scans
from lungkit.report.evaluation import LabelScheme, write_measured
from lungkit.report.html.summary_page import PAGES
from lungkit.report.pictures import optional_page, optional_picture
from lungkit.report.readers import ReaderMeasurements
from lungkit.training.engine import gather_objects, on_first_process
from lungkit.training.postprocessing_choice import Choice, choose_postprocessing
from lungkit.training.run import Run
from lungkit.training.session import augmenter_geometry

_LOG = logging.getLogger("lungkit")

_AUGMENTED_PATCHES = 5

GRID_NOTE = (
    "Measured on the scans' own grid against the masks as their files hold them: what lungkit-predict gives with this "
    "run, by lungkit-evaluate's definitions. The validation of every epoch in metrics.csv is on the grid of training."
)


def finish(run: Run) -> CaseTable:
    """Measure and draw the validation cases with the best weights; with several processes each predicts its share.

    The model is loaded from the run's checkpoint and predicts the files of the scans with the defaults of
    ``lungkit-predict``: the table is that of the model that a user gets.
    """
    session, fabric, folder = run.session, run.fabric, run.folder
    config, prepared = session.config, session.prepared
    # The checkpoint may lie on a disk that the first process alone can see.
    model = on_first_process(fabric, lambda: TrainedModel.load(folder.checkpoints / BEST))
    predictor = Predictor([model], device=fabric.device)
    scans = LabelledScans(
        prepared.dataset, prepared.split.val, config.data.max_voxels, NanPolicy(config.data.nan)
    )
    mine = replace(scans, case_ids=scans.case_ids[fabric.global_rank :: fabric.world_size])
    notes, extra = (
        [GRID_NOTE],
        {"lungkit": lungkit.__version__, "epoch": session.best_epoch, "grid": GRID_NOTE},
    )
    if config.choose_postprocessing:
        choice = choose_postprocessing(
            predictor,
            scans,
            by=config.choose_postprocessing_by,
            patients=patients(prepared.dataset, config.data.patient_pattern),
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            after_case=run.stop_in_final_validation,
        )
        on_first_process(fabric, lambda: _keep(choice, run))
        predictor = Predictor([model], device=fabric.device, postprocessing=choice.options)
        notes.append(choice.note)
    extra["postprocessing"] = predictor.postprocessing.to_dict()
    options = MetricOptions()
    masks = folder.path / "validation" if config.save_validation else None
    if masks is not None:
        masks.mkdir(exist_ok=True)
    readers = _readers_of(run)
    share = measure_scans(
        predictor,
        mine,
        options=options,
        masks=masks,
        readers=readers,
        progress=lambda *_: run.stop_in_final_validation(),
    )
    if readers is not None:
        first, *others = gather_objects([readers], fabric.world_size)
        readers = first[0]
        for part in others:
            readers.merge(part[0])
        readers.table.rows.sort(key=lambda row: scans.case_ids.index(row.case_id))
        notes += readers.ceiling_notes()
    rows = [row for part in gather_objects(share.rows, fabric.world_size) for row in part]
    order = {case_id: index for index, case_id in enumerate(scans.case_ids)}
    table = CaseTable(share.empty, sorted(rows, key=lambda row: order[row.case_id]))

    def write() -> None:
        run.draw_curves()
        text = write_measured(folder.path, table, options, name="validation", notes=notes, extra=extra)
        if readers is not None and readers.table.rows:
            text += "\n\n" + readers.write(folder.path, extra)
        pages = folder.path / PAGES if config.report else None
        draw_overlays(folder.overlays, {"": predictor}, scans, {"": table}, pages=pages)
        if config.report:
            _draw_augmentation(run)
            with optional_page(folder.path / REPORT):
                write_folder_report(folder.path)
        _LOG.info("validation with the weights of epoch %d\n%s", session.best_epoch, text)

    on_first_process(fabric, write)
    return table


def _readers_of(run: Run) -> ReaderMeasurements | None:
    """For what the readers say, where the dataset has several and it is known how many."""
    config, dataset = run.session.config, run.session.prepared.dataset
    if dataset.readers is None:
        return None
    try:
        codes = reader_codes(dataset, readers=config.data.readers)
    except UsageError as error:
        _LOG.warning("the validation is not measured against the readers: %s", error)
        return None
    return ReaderMeasurements(codes, LabelScheme(dataset.labels, dataset.ignore_label).class_indices)


def _draw_augmentation(run: Run) -> None:
    """A picture of what augmentation makes of the first training patches."""
    config, prepared = run.session.config, run.session.prepared
    if not config.augment.enabled:
        return
    path = run.folder.path / "augmentation.png"
    with optional_picture(path):
        sampler = PatchSampler(run.train, prepared.plan.patch_size, foreground_fraction=1.0, seed=config.seed)
        images, labels = sampler.batch(range(_AUGMENTED_PATCHES))
        save_augmentation_preview(
            path, images, labels, config.augment, seed=config.seed, **augmenter_geometry(prepared)
        )


def _keep(choice: Choice, run: Run) -> None:
    """Write what was tried to the run folder, and what was chosen to the manifest, which prediction goes by."""
    content = {"epoch": run.session.best_epoch, **choice.to_dict()}
    write_json_atomic(run.folder.path / "postprocessing.json", content)
    describe_checkpoint(run.folder.checkpoints / BEST, postprocessing=choice.options.to_dict())
