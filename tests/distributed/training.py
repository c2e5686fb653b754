"""One optimizer step and one evaluation, for `test_trainer.py` to run on one and on two processes."""

import json
import sys
from pathlib import Path

import datasets

from epmvg_hf import EpmVGForVisualGrounding, EpmVGTrainer, EpmVGTrainingArguments
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor, uneven_shapes


def main(folder: Path, batch_size: int):
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    args = EpmVGTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        **ONE_STEP,
    )
    with args.main_process_first():
        dataset = uneven_shapes([8, 1, 5, 8, 3])
    train = dataset.filter(lambda image_id: not image_id.endswith("4"), input_columns="image_id")

    model = tiny_model(box_head="map", frozen_batch_norm=True)
    trainer = EpmVGTrainer(model, args, train_dataset=train, eval_dataset=dataset, processing_class=tiny_processor())
    trainer.train()
    output = trainer.predict(dataset)
    metrics = trainer.evaluate()

    # Batch norms that are trained have seen other images in each process. Those of the first process are saved.
    model = tiny_model(box_head="map", frozen_batch_norm=False)
    arguments = {"train_dataset": train, "processing_class": tiny_processor()}
    normed = EpmVGTrainer(model, args, **arguments)
    normed.train()
    evaluated = normed.predict(dataset).predictions
    normed.save_model()
    args.distributed_state.wait_for_everyone()
    saved_model = EpmVGForVisualGrounding.from_pretrained(folder)
    saved = EpmVGTrainer(saved_model, args, **arguments).predict(dataset).predictions

    if trainer.is_world_process_zero():
        log = trainer.state.log_history[0]
        result = {
            "processes": args.world_size,
            "log": {name: log[name] for name in ("loss", "grad_norm", "loss_bbox", "loss_giou", "loss_map")},
            "predictions": output.predictions.tolist(),
            "references": output.label_ids.tolist(),
            "metrics": metrics,
            "evaluated": evaluated.tolist(),
            "saved": saved.tolist(),
        }
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
