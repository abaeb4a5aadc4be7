"""Train stage of a run: from the fuse manifests to a trained model in the run directory."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.engine.train_progress import TrainProgress
from pipeline.run.session import Run, StageError, command, require_complete, result_rows
from pipeline.run.steps import Step, result_key
from pipeline.run.trained_model import (
    checkpoint_store,
    fetch_checkpoint,
    is_trained,
    local_folder,
    target_step,
)
from train.job import FusedFile, TrainJob


def train_job(run: Run) -> TrainJob:
    """Build the description of the job for the training process.

    Raises:
        StageError: fuse is incomplete, or there is no training block.
    """
    num_shards = require_complete(run, ["fuse"], "train")
    manifests = run.store.manifests(run.resolved.steps["fuse"].folder)
    if not sum(manifest.num_rows_out for manifest in manifests.values()):
        raise StageError(
            "there are no training blocks: all documents are in the validation split or in quarantine; see `ptafuse "
            f"status {run.store.url}`"
        )
    step = run.resolved.steps["train"]
    return TrainJob(
        config=run.config.train,
        model=run.config.target,
        files=tuple(
            FusedFile(path=run.store.full_url(manifests[shard].data.key), sha256=manifests[shard].data.sha256)
            for shard in range(num_shards)
        ),
        output=str(local_folder(run, step)),
        fingerprint=step.fingerprint,
        sources=tuple(model.name for model in run.config.sources),
        provenance=_provenance(run),
        checkpoint_store=checkpoint_store(run, step),
    )


def _provenance(run: Run) -> dict[str, Any]:
    """Collect what a model card says about the data, the models and the stages before training."""
    config = run.config
    return {
        "target": {"name": config.target.name, "weights": config.target.weights_identity()},
        "sources": [{"name": model.name, "weights": model.weights_identity()} for model in config.sources],
        "stages": {
            step.key: {"fingerprint": step.fingerprint, "settings": dict(step.settings), **_fitted_weights(run, step)}
            for step in takewhile(lambda step: step.stage != "train", run.resolved.steps.values())
        },
    }


def _fitted_weights(run: Run, step: Step) -> dict[str, Any]:
    """Return what the fit stage found for the whole text; nothing of other stages, whose results are not a few numbers."""
    if step.stage != "fit":
        return {}
    whole, *kinds = result_rows(run.store.read(result_key(step))).to_pylist()
    return {"weights": whole, "num_kinds": len(kinds)}


def run_training(run: Run) -> None:
    """Train the target model, from the newest checkpoint if there is one.

    Raises:
        StageError: fuse is incomplete, or training failed; says why.
    """
    if is_trained(run):
        run.console.print("train: nothing to do (the model is trained)")
        return
    run_job(run, target_step(run), train_job(run))


def run_job(run: Run, step: Step, job: TrainJob) -> None:
    """Run a training job of a step to its end.

    Raises:
        StageError: training failed; says why.
    """
    if run.local:  # on a cluster the workers fetch what they need, to their own machines
        fetch_checkpoint(run, step)
    try:
        with TrainProgress(Path(job.output), run.console, step.key):
            _train(job, run)
    except (RuntimeError, FloatingPointError) as error:
        raise StageError(
            f"{step.key} did not finish: {error}\nFix the cause, then run {command(run, step.stage)}: it continues from the "
            "newest checkpoint."
        ) from error
    run.console.print(f"{step.key}: the model is at {run.store.full_url(step.folder)}/model", soft_wrap=True)


def _train(job: TrainJob, run: Run) -> None:
    if run.local:
        from train import loop

        loop.train(job)
        return
    from pipeline.engine.cluster import gpus_per_worker, require_resources, start_ray, warn_of_idle_gpus
    from train import launch

    config, engine = job.config, run.config.engine
    start_ray(engine)
    gpus = (
        0.0
        if config.device == "cpu"
        else gpus_per_worker(config.gpus_per_worker, config.device, engine, section="train")
    )
    # Ray Train's controller asks for no CPU.
    require_resources("train", config.cpus_per_worker, gpus, engine, count=config.num_workers)
    warn_of_idle_gpus("train", config.cpus_per_worker, gpus)
    launch.run(job, num_gpus=int(gpus))
