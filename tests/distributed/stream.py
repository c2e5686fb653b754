"""Training and prediction from a stream of uneven shards, for `test_trainer.py` to run on two processes."""

import json
import sys
from pathlib import Path

import datasets

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor, uneven_shapes


def main(folder: Path, batch_size: int) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    args = EpmVGTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=8,
        **ONE_STEP | {"max_steps": 8, "logging_steps": 4},
    )
    with args.main_process_first():
        dataset = uneven_shapes([8, 1, 8])
    # Of the 17 rows, the first process reads two shards with 12 rows, the second process one shard with 5.
    stream = dataset.to_iterable_dataset(num_shards=3)

    trainer = EpmVGTrainer(
        tiny_model(frozen_batch_norm=True), args, train_dataset=stream, processing_class=tiny_processor()
    )
    trainer.train()
    by_shards, whole = trainer.predict(stream), trainer.predict(dataset)
    if trainer.is_world_process_zero():
        result = {
            "step": trainer.state.global_step,
            "rows": [len(by_shards.predictions), len(whole.predictions)],
            "mean_iou": [by_shards.metrics["test_mean_iou"], whole.metrics["test_mean_iou"]],
        }
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
