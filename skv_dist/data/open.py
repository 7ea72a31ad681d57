"""From the ``data`` section to training and validation samples."""

from collections.abc import Callable, Sequence
from pathlib import Path

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.batches import Samples
from skv_dist.data.order import blended
from skv_dist.data.packing import Sample, split_prepared
from skv_dist.data.stream import StreamingSet
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import cached_folder, prepare
from skv_dist.data.tokenizer import Tokenizer

Barrier = Callable[[], None]
TrainAndValidation = tuple[Samples, Samples | None]


class Blend:
    """Several sets mixed by weight, in an order that is a pure function of (seed, position)."""

    def __init__(self, sets: Sequence[Samples], sources: Sequence[SourceConfig], seed: int) -> None:
        self._sets, self._weights, self._seed = sets, [source.weight for source in sources], seed

    def __getitem__(self, position: int) -> Sample:
        source, position_within = blended(position, self._weights, self._seed)
        return self._sets[source][position_within]


def open_data(
    config: DataConfig, tokenizer: Tokenizer, seed: int, first_rank: bool, barrier: Barrier
) -> TrainAndValidation:
    """Training and validation samples of a run.

    Args:
        first_rank: True on the one process that prepares raw sources; the others wait for it.
        barrier: returns once every process has called it.

    Raises:
        UserError: a source cannot be read, is empty or too short, or does not match the tokenizer.
    """
    if config.streaming:
        return _stream_sources(config, tokenizer, seed)
    return _map_sources(config, tokenizer, seed, first_rank, barrier)


def _stream_sources(config: DataConfig, tokenizer: Tokenizer, seed: int) -> TrainAndValidation:
    def stream(sources: list[SourceConfig], fraction: float, *, validation: bool) -> StreamingSet:
        return StreamingSet(sources, config, tokenizer, seed, validation=validation, fraction=fraction)

    if config.validation_sources:
        train = stream(config.sources, 0.0, validation=False)
        return train, stream(config.validation_sources, 0.0, validation=False)
    fraction = config.validation_fraction
    train = stream(config.sources, fraction, validation=False)
    return train, stream(config.sources, fraction, validation=True) if fraction else None


def _map_sources(
    config: DataConfig, tokenizer: Tokenizer, seed: int, first_rank: bool, barrier: Barrier
) -> TrainAndValidation:
    """Prepared sets, mapped into memory; sources that are raw are prepared first."""

    def open_split(source: SourceConfig, fraction: float) -> TrainAndValidation:
        folder = _prepared_folder(source, config, tokenizer, first_rank, barrier)
        return split_prepared(PreparedSet(folder, tokenizer), config, seed, source.path, fraction)

    if config.validation_sources:
        train = [open_split(source, 0.0)[0] for source in config.sources]
        validation = [open_split(source, 0.0)[0] for source in config.validation_sources]
        return Blend(train, config.sources, seed), Blend(validation, config.validation_sources, seed)
    splits = [open_split(source, config.validation_fraction) for source in config.sources]
    train_blend = Blend([train for train, _ in splits], config.sources, seed)
    validation_sets = [validation for _, validation in splits if validation is not None]
    return train_blend, Blend(validation_sets, config.sources, seed) if validation_sets else None


def _prepared_folder(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, first_rank: bool, barrier: Barrier
) -> Path:
    """Where the prepared form of ``source`` lies; made by the first rank while the others wait, if there is none."""
    if source.format == "prepared":
        return Path(source.path).expanduser()
    folder = cached_folder(source, tokenizer, config.cache_dir)
    if not first_rank:
        barrier()
    if not folder.exists():
        prepare([source], tokenizer, folder, workers=config.prepare_workers, cache_dir=config.cache_dir)
    if first_rank:
        barrier()
    return folder
