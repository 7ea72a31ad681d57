"""``data``: where the text comes from and how it becomes sequences."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from skv_dist.config.section import Section

NEEDS_RESET = "set data.reset_attention: true"
SourceFormat = Literal["text", "jsonl", "parquet", "hub", "prepared", "megatron"]


class SourceConfig(Section):
    """One source of text."""

    path: str = Field(min_length=1, examples=["runs/quickstart/stdlib"])
    """Where the text is: a file, a folder (searched to its depths), or a glob (** goes through folders). Format hub:
    the name of a dataset on the Hugging Face hub. Format prepared: a folder that skv-data prepare has made. Format
    megatron: what the names of the .bin and .idx file begin with."""

    format: SourceFormat = Field(examples=["prepared"])
    """What the files hold.

    - text: each file is one document.
    - jsonl: one JSON object in each line (or one list of objects), the text in its field text_field. Of a folder, the
      files *.jsonl, *.ndjson and *.json.
    - parquet: one document in each row, the text in column text_field. Of a folder, the files *.parquet.
    - hub: a dataset on the Hugging Face hub, the text in column text_field.
    - prepared: tokens. The set must have been made with data.tokenizer.
    - megatron: tokens in Megatron's .bin and .idx files. They do not say which tokenizer made them: it must have been
      data.tokenizer, and each document should end with its end token (--append-eod).

    Text and JSON are UTF-8 and may be compressed (gzip, bzip2, xz, zstd). Other fields than text_field are not read."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the samples that come from this source, relative to the weights of the others. A small source is
    repeated, shuffled anew, as often as that takes."""

    name: str | None = None
    """Configuration of a hub dataset, such as sample-100BT. Read for format hub. null: the dataset's default."""

    split: str = "train"
    """Split of a hub dataset. Read for format hub."""

    text_field: str = "text"
    """Field that holds the text of a document. Read for formats jsonl, parquet and hub; leave it alone for text."""

    prompt_field: str | None = None
    """The field that holds a prompt, which makes each row an example with an answer to learn. Or a text with the names
    of fields in braces, such as '{context}\\nQuestion: {question}\\nAnswer:'. Needs response_field, takes the place of
    text_field. Prompt and response are tokenized apart and laid end to end. Read for formats jsonl, parquet and hub."""

    response_field: str | None = None
    """The field that holds what the model is to answer. Or a text with the names of fields in braces, such as
    ' {answer}'. Of a list of answers the first is taken. Needs prompt_field."""

    messages_field: str | None = None
    """The field that holds the messages of a chat, objects with role and content. The tokenizer's own chat template
    renders them. Takes the place of text_field. Read for formats jsonl, parquet and hub."""

    exclude: list[str] = []
    """Globs of files to leave out, compared with the whole path, in which * stands for / too. Read for formats text,
    jsonl and parquet."""

    @property
    def holds_tokens(self) -> bool:
        """Whether there is nothing left to tokenize."""
        return self.format in ("prepared", "megatron")

    @property
    def holds_examples(self) -> bool:
        """Whether each row is a prompt with its answer, or a chat. Not known of prepared sets."""
        return self.prompt_field is not None or self.messages_field is not None

    @model_validator(mode="after")
    def _one_kind_of_document(self) -> "SourceConfig":
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field are given together: give both, or neither")
        if self.prompt_field is not None and self.messages_field is not None:
            raise ValueError("a row is a prompt or a chat: give prompt_field and response_field, or messages_field")
        if self.holds_examples and (self.format == "text" or self.holds_tokens):
            key = "prompt_field" if self.messages_field is None else "messages_field"
            cure = "give it to skv-data prepare" if self.holds_tokens else "use jsonl or parquet"
            raise ValueError(f"format '{self.format}' has no fields, so {key} means nothing: {cure}")
        return self


class DataConfig(Section):
    """Where the text comes from and how it becomes sequences. Documents are tokenized, laid end to end with an end
    token behind each, and cut into sequences; their order is a pure function of their content, train.seed and the
    position in the run. skv-eval finds the validation text by this section of the checkpoint."""

    sequence_length: int = Field(gt=0, examples=[128])
    """Number of tokens in a sequence. At most model.max_position_embeddings; with parallel.sequence_parallel a multiple
    of parallel.tensor."""

    tokenizer: str = Field(default="byte", min_length=1)
    """The tokenizer: byte, a folder that holds a saved one, or a name on the Hugging Face hub. byte needs no download:
    259 tokens, the bytes of UTF-8 and three special ones. A folder that is there is noted with its whole path; a name
    that begins with ., / or ~, or holds more than one /, must be one. Any other must have an end-of-sequence token.
    Checkpoints and exported models take the tokenizer with them."""

    sources: list[SourceConfig] = Field(min_length=1)
    """The text to train on: one or more sources, mixed by their weights. Those that are no tokens yet are
    tokenized at the start of the run and kept in cache_dir, unless streaming is set."""

    validation_sources: list[SourceConfig] = []
    """The text to evaluate on, in entries like those of sources. Empty: a part of sources is held out, as
    validation_fraction says."""

    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Part of sources that is held out for evaluation. Read where validation_sources is empty. 0: none, which needs
    eval.every 0 too."""

    split_seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides, with the text of a document, whether it is held out. Runs with other values of train.seed hold out the
    same text, and so does one whose data has moved. A run that goes on from a checkpoint of version 0.1 keeps the
    split and order of that version, unless checkpoint.allow_changed names this key."""

    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Largest part of a source's documents that may be skipped because their text is empty, null or missing. They are
    counted and reported. Above it the run ends, except that ten documents may always be skipped. Read for sources that
    are not prepared; skv-data prepare has --max-skipped instead. 0: none may be skipped."""

    validation_split: Literal["document", "sequence"] = "document"
    """What is held out. Read where validation_sources is empty.

    - document: whole documents, so that no text stands on both sides.
    - sequence: packed sequences, for sources of few long documents. Parts of one document can be on both sides. Not
      with streaming."""

    streaming: bool = False
    """Whether documents are tokenized while training instead of once before it. For text larger than the disk. One
    process of each replica reads, and a run that goes on reads nothing twice. Prepared sources are faster where they
    fit, and are refused here."""

    stream_lanes: int = Field(default=64, gt=0)
    """Number of readers that a stream is dealt out to. Each has a share of the text and serves every so many-th
    micro-batch; each replica runs an equal part of them. Read with streaming. Must be a multiple of the number of
    replicas, now and whenever the run goes on: a checkpoint holds the place of each lane, so the number stays. More
    lanes hold more files open."""

    shuffle_buffer: int = Field(default=1000, ge=0)
    """Number of documents among which the next one is drawn, shared out over stream_lanes. Read with streaming. 0:
    each lane takes files and documents in their order."""

    cache_dir: str = "~/.cache/skv-dist"
    """Folder for sources once they are tokenized, and for downloads from the hub. A source is tokenized again when its
    files, their times or the tokenizer have changed."""

    prepare_workers: int = Field(default=1, gt=0)
    """Number of processes that tokenize at the start of a run. Read for sources that are not prepared, without
    streaming. skv-data prepare has --workers instead."""

    prefetch_steps: int = Field(default=2, ge=0)
    """Number of steps whose batches a thread reads ahead. 0: batches are read when their step begins."""

    reset_attention: bool = False
    """Whether attention stops at document boundaries. The first token of the next document is then not predicted
    either. Needs model.transformer_impl local, which auto chooses; on a GPU attention is compiled (flex attention)."""

    train_on: Literal["response", "all"] = "response"
    """Which predictions count in examples (sources with prompt_field or messages_field). Texts count as a whole.

    - response: what the model is to answer, with the token that ends it.
    - all: prompts too."""

    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What becomes of an example that is longer than sequence_length. They are counted and reported.

    - cut: its prompt loses its beginning. Where the last answer alone is too long, the example is left out.
    - drop: it is left out.
    - refuse: the run does not start."""

    @field_validator("tokenizer")
    @classmethod
    def _whole_path(cls, name: str) -> str:
        """A folder as it is found from anywhere: what a checkpoint notes is read from other folders too."""
        path = Path(name).expanduser()
        return str(path.absolute()) if name != "byte" and path.is_dir() else name

    @model_validator(mode="after")
    def _examples_stand_alone(self) -> "DataConfig":
        if not self.reset_attention and any(s.holds_examples for s in (*self.sources, *self.validation_sources)):
            raise ValueError(f"examples (prompt_field, messages_field) attend to themselves alone: {NEEDS_RESET}")
        return self

    @model_validator(mode="after")
    def _streams_are_not_prepared(self) -> "DataConfig":
        tokens = next((s.format for s in (*self.sources, *self.validation_sources) if s.holds_tokens), None)
        if self.streaming and tokens is not None:
            raise ValueError(f"streaming reads raw text, but a source has format '{tokens}': set streaming: false")
        if self.streaming and self.validation_split == "sequence" and not self.validation_sources:
            raise ValueError(
                "streaming cannot split by sequence: set validation_split: document or give validation_sources"
            )
        return self
