"""How layers are cut into stages."""

from skv_dist.config.parallel import ParallelConfig


def cut(num_layers: int, **keys: int) -> list[tuple[int, int]]:
    return [(stage.start, stage.stop) for stage in ParallelConfig(**keys).stages(num_layers)]  # type: ignore[arg-type]


def test_stages_follow_one_another() -> None:
    assert cut(5) == [(0, 5)]
    assert cut(8, pipeline=4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert cut(8, pipeline=2, virtual_pipeline=2) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert cut(9, pipeline=3, first_stage_layers=1) == [(0, 1), (1, 5), (5, 9)]
    assert cut(10, pipeline=4, first_stage_layers=3, last_stage_layers=1) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    # each rank's layers are split over its chunks: ranks hold 4 and 2
    assert cut(6, pipeline=2, virtual_pipeline=2, last_stage_layers=2) == [(0, 2), (2, 3), (3, 5), (5, 6)]
