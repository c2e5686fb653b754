import random

import numpy as np
import torch

from epmvg_hf.training.row_draws import RowDraws


def _draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_draws_follow_from_seed_epoch_and_row_alone():
    draws, other_seed = RowDraws(seed=1), RowDraws(seed=2)
    drawn = []
    for source, epoch, row in ((draws, 0, 5), (draws, 0, 6), (draws, 1, 5), (other_seed, 0, 5)):
        source.set_epoch(epoch)
        _draw()  # whatever was drawn before
        with source.of(row):
            drawn.append(_draw())
    assert len({value for values in drawn for value in values}) == 12
    draws.set_epoch(0)
    with draws.of(5):
        assert _draw() == drawn[0]


def test_the_states_outside_stay_as_they_are():
    def seeded() -> list[float]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return []

    expected = [*seeded(), *_draw()]
    seeded()
    with RowDraws(seed=1).of(0):
        _draw()
    assert [*_draw()] == expected


def test_workers_see_the_epoch():
    class Rows(torch.utils.data.Dataset):
        def __init__(self, draws: RowDraws):
            self.draws = draws

        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> float:
            with self.draws.of(row):
                return random.random()

    draws = RowDraws(seed=0)
    loader = torch.utils.data.DataLoader(Rows(draws), num_workers=1, persistent_workers=True)
    by_epoch = []
    for epoch in (0, 1, 0):
        draws.set_epoch(epoch)
        by_epoch.append([value.item() for value in loader])
    assert by_epoch[0] == by_epoch[2] != by_epoch[1]
