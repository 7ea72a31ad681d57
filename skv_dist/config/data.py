"""``data``: where the text comes from and how it becomes sequences."""

from typing import Literal

from pydantic import Field, model_validator

from skv_dist.config.section import Section

SourceFormat = Literal["text", "jsonl", "parquet", "hub", "prepared"]


class SourceConfig(Section):
    path: str = Field(min_length=1)
    format: SourceFormat
    weight: float = Field(default=1.0, gt=0)
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    exclude: list[str] = []


class DataConfig(Section):
    sequence_length: int = Field(gt=0)
    tokenizer: str = Field(default="byte", min_length=1)
    sources: list[SourceConfig] = Field(min_length=1)
    validation_sources: list[SourceConfig] = []
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    validation_split: Literal["document", "sequence"] = "document"
    streaming: bool = False
    shuffle_buffer: int = Field(default=1000, ge=0)
    cache_dir: str = "~/.cache/skv-dist"
    prepare_workers: int = Field(default=1, gt=0)
    prefetch_steps: int = Field(default=2, ge=0)
    reset_attention: bool = False

    @model_validator(mode="after")
    def _streams_are_not_prepared(self) -> "DataConfig":
        if self.streaming and any(source.format == "prepared" for source in self.sources):
            raise ValueError("streaming reads raw text, but a source has format 'prepared': set streaming: false")
        if self.streaming and self.validation_split == "sequence" and not self.validation_sources:
            raise ValueError(
                "streaming cannot split by sequence: set validation_split: document or give validation_sources"
            )
        return self
