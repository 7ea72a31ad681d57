"""From the ``data`` section to training and validation samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.config.source_names import source_names
from skv_dist.data.batches import Samples
from skv_dist.data.mapped_tokens import MappedTokens
from skv_dist.data.megatron_set import MegatronSet
from skv_dist.data.order import blended, num_blended
from skv_dist.data.packing import Sample
from skv_dist.data.sequences import split_prepared
from skv_dist.data.split import SplitRule, source_orders
from skv_dist.data.stream import HeldOutStream, StreamSource, TrainingStream
from skv_dist.data.stream_files import Listing, list_source
from skv_dist.data.token_set import PreparedSet
from skv_dist.data.tokenize import prepared_once
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError


class Sequences(Samples, Protocol):
    """As many samples as there are in an epoch."""

    def __len__(self) -> int: ...


class Blend:
    """Several sets mixed by weight, in an order that is a pure function of (seed, position).

    Attributes:
        contents: what tells the data of each source from other data (`PreparedSet.content`).
        names: of the sources, in the order of `Sample.source`.
    """

    def __init__(
        self,
        sets: Sequence[Sequences],
        weights: Sequence[float],
        seed: int,
        contents: list[str],
        names: Sequence[str],
    ) -> None:
        self._sets, self._weights, self._seed = sets, weights, seed
        self.contents, self.names = contents, names

    @property
    def num_sequences(self) -> int:
        """Of all sets together: what an epoch is."""
        return sum(map(len, self._sets))

    def __getitem__(self, position: int) -> Sample:
        source, position_within = blended(position, self._weights, self._seed)
        return self._sets[source][position_within]._replace(source=source)

    def epochs(self, position: int) -> dict[str, float]:
        """How often the samples before ``position`` have read each source."""
        counts = num_blended(position, self._weights, self._seed)
        return {name: count / len(chosen) for name, count, chosen in zip(self.names, counts, self._sets)}


TrainAndValidation = tuple[Blend | TrainingStream, Blend | HeldOutStream | None]
Once = Callable[[Callable[[], Any]], Any]


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    wait_for_all: Callable[[], None],
    *,
    rule: SplitRule = SplitRule.CONTENT,
    validation_needed: bool = True,
    once: Once = lambda compute: compute(),
    micro_batch_size: int = 1,
    replicas: int = 1,
) -> TrainAndValidation:
    """Training and validation samples of a run.

    Args:
        seed: ``train.seed``.
        wait_for_all: returns once every process has called it. Raw sources are prepared by whichever process comes
            first, which may take hours: it must neither be a collective nor have a time limit.
        rule: what decides on order and held-out text.
        validation_needed: whether it is an error that the held-out part holds no sequence.
        once: calls a function on one process and returns its result on all.
        micro_batch_size: ``train.micro_batch_size``; with `replicas` it says which samples of a stream are read where.
        replicas: number of them.

    Raises:
        UserError: a source cannot be read, is empty or too short, or does not match the tokenizer.
    """
    if config.streaming:
        return _stream_sources(config, tokenizer, seed, once, micro_batch_size, replicas)
    sources = [*config.sources, *config.validation_sources]
    places = [_place_of_tokens(source, config, tokenizer) for source in sources]
    if not all(source.holds_tokens for source in sources):
        wait_for_all()
    sets = [
        MegatronSet(source.path, tokenizer) if source.format == "megatron" else PreparedSet(place, tokenizer)
        for source, place in zip(sources, places)
    ]
    return _map_sets(sets, tokenizer, config, seed, rule, validation_needed)


def _stream_sources(
    config: DataConfig, tokenizer: Tokenizer, seed: int, once: Once, micro_batch_size: int, replicas: int
) -> TrainAndValidation:
    """Streams; nothing is read before their first sample is asked for."""
    listed: list[Listing] = once(
        lambda: [list_source(source, config.cache_dir) for source in (*config.sources, *config.validation_sources)]
    )
    lanes, num_sources = config.stream_lanes, len(config.sources)
    for source, listing in zip(config.sources, listed):
        if source.format == "text" and len(listing.names) < lanes:
            raise UserError(
                f"data source '{source.path}' has {len(listing.names)} files, each of them one document, for "
                f"data.stream_lanes {lanes}, which would read them several times over: set data.stream_lanes to "
                f"{len(listing.names)} or less, or data.streaming to false"
            )
    fraction = 0.0 if config.validation_sources else config.validation_fraction
    train = [
        StreamSource(
            source,
            listing,
            config,
            tokenizer,
            seed,
            held_out=None if fraction == 0 else False,
            lanes=lanes,
            block=max(1, config.shuffle_buffer // lanes) if config.shuffle_buffer else 0,
            num_lanes_here=max(1, lanes // replicas),
        )
        for source, listing in zip(config.sources, listed)
    ]
    weights, names = [source.weight for source in config.sources], source_names(config.sources)
    stream = TrainingStream(train, weights, seed, lanes, micro_batch_size, names)
    if fraction == 0 and not config.validation_sources:
        return stream, None
    sources = config.validation_sources or config.sources
    listings = listed[num_sources:] or listed

    def validation() -> list[StreamSource]:
        return [
            StreamSource(
                source,
                listing,
                config,
                tokenizer,
                config.split_seed,
                held_out=None if config.validation_sources else True,
                lanes=1,
                block=1,  # files come in another order, and a sample needs no document but its own
                num_lanes_here=1,
            )
            for source, listing in zip(sources, listings)
        ]

    weights = [source.weight for source in sources]
    return stream, HeldOutStream(validation, weights, config.split_seed, source_names(sources))


class _Named(NamedTuple):
    """A source as a blend knows it."""

    name: str
    weight: float


def _map_sets(
    sets: Sequence[MappedTokens],
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    rule: SplitRule,
    validation_needed: bool,
) -> TrainAndValidation:
    """Sets of tokens, mapped into memory: those of ``sources``, then those of ``validation_sources``."""
    validation_seed = seed if rule == SplitRule.PATH else config.split_seed

    def parts(
        sources: Sequence[SourceConfig], sets: Sequence[MappedTokens], fraction: float, seed: int
    ) -> list[tuple[_Named, Sequences, Sequences | None]]:
        paths, contents = [source.path for source in sources], [prepared.content for prepared in sets]
        orders = source_orders(rule, paths, contents, seed, config.split_seed)
        return [
            (
                _Named(name, source.weight),
                *split_prepared(prepared, tokenizer, config, order, fraction, validation_needed=validation_needed),
            )
            for name, source, prepared, order in zip(source_names(sources), sources, sets, orders)
        ]

    def blend(chosen: Sequence[tuple[_Named, Sequences]], sets: Sequence[MappedTokens], seed: int) -> Blend:
        names, weights = [source.name for source, _ in chosen], [source.weight for source, _ in chosen]
        contents = [prepared.content for prepared in sets]
        return Blend([samples for _, samples in chosen], weights, seed, contents, names)

    train_sets, validation_sets = sets[: len(config.sources)], sets[len(config.sources) :]
    fraction = 0.0 if config.validation_sources else config.validation_fraction
    split = parts(config.sources, train_sets, fraction, seed)
    train = blend([(source, samples) for source, samples, _ in split], train_sets, seed)
    if config.validation_sources:
        named = parts(config.validation_sources, validation_sets, 0.0, validation_seed)
        return train, blend([(source, samples) for source, samples, _ in named], validation_sets, validation_seed)
    held_out = [(source, samples) for source, _, samples in split if samples is not None]
    return train, blend(held_out, train_sets, validation_seed) if held_out else None


def _place_of_tokens(source: SourceConfig, config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Where the tokens of ``source`` lie; they are made if they are not there."""
    if source.holds_tokens:
        return Path(source.path).expanduser()
    return prepared_once(
        source,
        tokenizer,
        workers=config.prepare_workers,
        cache_dir=config.cache_dir,
        max_skipped=config.max_skipped,
    )
