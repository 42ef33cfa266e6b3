"""Our M-RoPE positions against the model's own, over random layouts of text and images."""

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from qwen_bridge.positions import image_positions, segment_positions

IMAGE = 7


def test_hand_computed_image():
    # 2 rows of 3 tokens after 5 text tokens: time stays 5, rows 5 and 6, columns 5, 6 and 7.
    assert image_positions(5, 2, 3).tolist() == [
        [5, 5, 5, 5, 5, 5],
        [5, 5, 5, 6, 6, 6],
        [5, 6, 7, 5, 6, 7],
    ]


def test_text_after_an_image_goes_on_behind_its_longer_side():
    ids = np.array([1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 2])
    positions, after = segment_positions(ids, IMAGE, (2, 3), 10)
    assert positions[:, 0].tolist() == [10] * 3
    assert positions[:, -1].tolist() == [10 + 1 + 3] * 3
    assert after == 15


def test_against_the_model():
    rng = np.random.default_rng(5)
    # get_rope_index reads nothing of the module but its configuration.
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()
    for _ in range(20):
        ids, ours, grids, start = [], [], [], 0
        for _ in range(rng.integers(1, 6)):
            grid = tuple(int(g) for g in rng.integers(1, 5, 2)) if rng.random() < 0.7 else None
            count = grid[0] * grid[1] if grid else 0
            before, behind = rng.integers(1, 6, 2)
            segment = np.array([1] * before + [IMAGE] * count + [2] * behind)
            positions, start = segment_positions(segment, IMAGE, grid, start)
            ids.append(segment)
            ours.append(positions)
            if grid:
                grids.append((1, 2 * grid[0], 2 * grid[1]))
        ids = torch.from_numpy(np.concatenate(ids))[None]
        theirs, _ = model.get_rope_index(
            ids,
            (ids == IMAGE).int(),
            image_grid_thw=torch.tensor(grids) if grids else None,
        )
        np.testing.assert_array_equal(np.concatenate(ours, 1), theirs[:, 0].numpy())
