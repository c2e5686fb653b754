from itertools import chain

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler

from epmvg_hf.training.even_shares import EvenShares


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_image_once_and_each_process_has_some_in_each_step(processes, batch_size):
    for count in range(processes, 45):
        batches = BatchSampler(range(count), batch_size, drop_last=False)
        shares = EvenShares(batches, processes)
        dealt = [list(BatchSamplerShard(shares, processes, index)) for index in range(processes)]
        assert sorted(image for process in dealt for batch in process for image in batch) == list(range(count))
        assert {len(process) for process in dealt} == {len(shares) / processes}
        assert all(0 < len(batch) <= batch_size + 1 for process in dealt for batch in process)
        # All steps but the last are those of one process with as many images in a batch.
        steps = [list(chain.from_iterable(step)) for step in zip(*dealt, strict=True)]
        whole = list(BatchSampler(range(count), batch_size * processes, drop_last=False))
        assert steps[:-1] == whole[: len(steps) - 1]


def test_each_epoch_has_its_order():
    shares = EvenShares(BatchSampler(RandomSampler(range(20)), 3, drop_last=False), 2)
    assert list(shares) != list(shares)


def test_fewer_images_than_processes_are_an_error():
    with pytest.raises(ValueError, match="2 images are fewer than the 3 processes that share them"):
        EvenShares(BatchSampler(range(2), 4, drop_last=False), 3)
