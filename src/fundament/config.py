"""Every setting, in one place: what the command line, the environment and the file can say.

A flag wins over the environment (`FUNDAMENT_PORT`), which wins over the file (`fundament.toml`, or the one that
`FUNDAMENT_CONFIG` names).
"""

import base64
import os
import re
import tomllib
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/fundament`, or `~/.local/share/fundament`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fundament"


def _split(value: Any) -> Any:
    """A list as the environment writes it, with commas; the flags and the file give lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def is_text(value: str) -> bool:
    """Whether what the system gave, of bytes, was UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


_PREFIX = "FUNDAMENT_"
_NO_SETTINGS = {"CONFIG", "URL", "API_KEY"}
"""Other variables: where the settings are, and for commands that talk to a server."""

_SERVICE = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")
"""What Kubernetes sets of a Service whose name begins so."""


class Tier(BaseModel):
    """What a key may do; 0 is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int = Field(default=0, ge=0)
    tokens_per_minute: int = Field(default=0, ge=0)
    concurrency: int = Field(default=0, ge=0)


TIERS = {
    "free": Tier(requests_per_minute=500, tokens_per_minute=1_000_000, concurrency=5),
    "tier1": Tier(requests_per_minute=500, tokens_per_minute=10_000_000, concurrency=50),
    "tier2": Tier(requests_per_minute=5_000, tokens_per_minute=100_000_000, concurrency=500),
}
"""The hosted API's tiers."""


_LEAST_SECRET = 16  # bytes
_MOST = 1e9  # of MB, GB and seconds


def _secret(value: str) -> str:
    try:
        secret = base64.b64decode(value.removeprefix("whsec_"), validate=True)
    except ValueError as error:
        raise ValueError("write whsec_ and base64, as in whsec_MDEyMzQ1Njc4OWFiY2RlZg==") from error
    if value and len(secret) < _LEAST_SECRET:
        raise ValueError(f"it has {len(secret)} bytes; a secret has {_LEAST_SECRET} at least")
    return value


def _web(value: str) -> str:
    found = urlsplit(value)
    if value and (found.scheme not in ("http", "https") or not found.hostname or found.query or found.fragment):
        raise ValueError("write a web address, as in https://search.example.com")
    return value.rstrip("/")


def _networks(value: list[str]) -> list[str]:
    for text in value:
        ip_network(text, strict=False)
    return value


def _origins(value: list[str]) -> list[str]:
    for text in value:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", text) or re.search("^https?://.*:(80|443)$", text):
            raise ValueError(
                f"'{text}' is no origin as browsers say it; write https://host in small letters, with :PORT unless it "
                "is the usual one, and no path"
            )
    return value


def _buckets(value: list[str]) -> list[str]:
    for text in value:
        if not re.fullmatch("(s3|gs)://[^/]+", text):
            raise ValueError(f"'{text}' is no bucket; write s3://NAME or gs://NAME")
    return value


def _place(value: str) -> str:
    if value and not re.fullmatch("(s3|gs)://[^/?#]+(/[^/?#]+)*/?", value):
        raise ValueError(f"'{value}' is no place in a bucket; write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return value


def _port(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"'{value}' is what Kubernetes says of a Service named fundament: set enableServiceLinks: false, or --port"
        )
    return value


def _named(value: Any) -> Any:
    if value == "":
        raise ValueError("it is empty; name a directory")
    return value


class _File(TomlConfigSettingsSource):
    """The file, for what nothing before it names: a table of the environment's stands in place of the file's."""

    def __call__(self) -> dict[str, Any]:
        """Its settings by name."""
        return {name: value for name, value in super().__call__().items() if name not in self.current_state}


class Settings(BaseSettings):
    """What an operator can decide. Units are in the names."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", allow_inf_nan=False, toml_file="fundament.toml"
    )

    models: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        default=[],
        description="Models to serve: `ID` of the catalogue, short or long, or `NAME=DIR`. "
        "None: the embedded all-minilm-l6-v2. Models that were pulled are served besides.",
    )
    aliases: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        default=[],
        description="Other names of served models, each `NAME=MODEL`, for clients whose model name cannot be changed, "
        "or `NAME=MODEL:TASK`, for those that cannot say a task. An answer's `model` then says `MODEL`.",
    )
    allow_torchscript: bool = Field(
        default=False,
        description="Serve directories whose weights are a TorchScript file, as ELSER's are. Loading one runs the "
        "program in it: allow it for files whose origin you know.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Annotated[int, BeforeValidator(_port)] = Field(
        default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or `cuda:1`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights; `auto` is the fastest on this machine.",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU cores to use; 0 means all.")
    data_dir: Annotated[Path, BeforeValidator(_named)] = Field(
        default_factory=default_data_dir,
        description="Where models and the store are kept. Default: `fundament` in the user's data directory.",
    )
    store_url: str = Field(
        default="",
        description="Where keys, usage and the like are kept: `postgresql://USER:PASSWORD@HOST/DATABASE`, or "
        "`sqlite:////FILE`. None: the file `fundament.db` in the data directory.",
    )
    files_url: Annotated[str, AfterValidator(_place)] = Field(
        default="",
        description="Where uploads and the files of batch jobs are kept: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`, "
        "with the credentials of the environment. None: the data directory.",
    )
    auth: bool | None = Field(
        default=None,
        description="Ask for keys. Without a word they are not asked for, and only loopback addresses can be served.",
    )
    tiers: dict[Annotated[str, StringConstraints(min_length=1, max_length=40)], Tier] = Field(
        default={},
        description="Tiers besides `free`, `tier1` and `tier2`, or in their place: "
        "`[tiers.NAME]` with `requests_per_minute`, `tokens_per_minute`, `concurrency`; 0 is no limit.",
    )
    redis_url: str = Field(
        default="",
        description="Where several processes count limits together: `redis://HOST:6379/0`. None: each for itself.",
    )
    ip_requests_per_minute: int = Field(
        default=0, ge=0, description="Requests per minute of one address where no keys are asked for; 0 is no limit."
    )
    ip_tokens_per_minute: int = Field(
        default=0, ge=0, description="Tokens per minute of one address, likewise; 0 is no limit."
    )
    ip_concurrency: int = Field(
        default=0, ge=0, description="Requests at once of one address, likewise; 0 is no limit."
    )
    ip_refusals_per_minute: int = Field(
        default=600,
        ge=0,
        description="Requests per minute of one address with a key that does not work, where keys are asked for.",
    )
    preload: bool = Field(default=True, description="Load the named models at start, or on first use.")
    memory_gb: float = Field(
        default=0, ge=0, description="Most memory of all models together, in GB; 0 means 80 % of what is free at start."
    )
    chat_memory_gb: float = Field(
        default=2, gt=0, description="Memory for the conversations of a chat model, beside its weights, in GB."
    )
    idle_seconds: float = Field(
        default=0, ge=0, description="Let a model go that nobody used for this long; 0 keeps it."
    )
    max_batch_tokens: int = Field(
        default=0,
        ge=0,
        description="Most tokens of a batch; 0 means 512 on a CPU (1,024 in models above 256 MB, and where a batch is "
        "alone on two cores), 16,384 on a GPU.",
    )
    max_waiting_rows: int = Field(
        default=20_000, ge=1, description="Inputs that may wait for one model; past it the answer is 503."
    )
    max_waiting_mb: float = Field(
        default=2_000,
        gt=0,
        description="Memory of the inputs that wait for one model, pixels for the most part, in MB; past it 503, and "
        "422 where one request alone has more.",
    )
    request_seconds: float = Field(
        default=0,
        ge=0,
        description="How long a request may take from when it is read to its answer, or to the first piece of a "
        "streamed one; past it the answer is 504. 0 is no limit.",
    )
    truncate: bool = Field(
        default=False,
        description="Cut inputs longer than the context where a request does not say, in place of refusing them: for "
        "clients that cannot be told to send `truncate`.",
    )
    max_inputs: int = Field(default=10_000, ge=1, description="Most inputs of one request.")
    max_classifiers: int = Field(default=16, ge=0, description="Most trained classifiers of one key.")
    max_classifier_labels: int = Field(default=16, ge=2, le=1_000, description="Most labels of one classifier.")
    max_classifier_examples: int = Field(
        default=8_192, ge=2, description="Most examples that one classifier learns from, all its updates together."
    )
    max_body_mb: float = Field(
        default=32, gt=0, description="Largest request body, in MB; in base64 a file takes a third more than it has."
    )
    max_image_mb: float = Field(default=8, gt=0, description="Largest image or PDF, in MB.")
    max_image_megapixels: float = Field(default=64, gt=0, description="Most pixels of an image, in millions.")
    max_pdf_pages: int = Field(default=100, ge=1, description="Most pages of a PDF; each becomes a vector.")
    max_recording_mb: float = Field(default=32, gt=0, description="Largest video or sound, in MB.")
    max_recording_seconds: float = Field(default=300, gt=0, description="Longest video or sound.")
    max_video_frames: int = Field(default=10_000, ge=1, description="Most frames of a video.")
    max_video_megapixels: float = Field(
        default=10_000, gt=0, description="Most pixels of a video, all its frames together, in millions."
    )
    max_media: int = Field(default=512, ge=0, description="Most images and other files of one request.")
    max_media_mb: float = Field(default=128, gt=0, description="All files of one request together, in MB.")
    max_all_media_mb: float = Field(
        default=1024, gt=0, description="Files of all requests that are in memory, in MB; past it the answer is 503."
    )
    cors_origins: Annotated[list[str], NoDecode, BeforeValidator(_split), AfterValidator(_origins)] = Field(
        default=[],
        description="Web pages whose scripts may call this server, by origin, as in `https://app.example.com`; `*` is "
        "every page that a user visits. None: browsers keep them all out.",
    )
    allowed_networks: Annotated[list[str], NoDecode, BeforeValidator(_split), AfterValidator(_networks)] = Field(
        default=[],
        description="Networks that URLs of callers may lead to although they are not public, as in `10.0.0.0/8`. "
        "None: only public addresses are dialled.",
    )
    input_buckets: Annotated[list[str], NoDecode, BeforeValidator(_split), AfterValidator(_buckets)] = Field(
        default=[],
        description="Buckets that every caller's batch jobs may take their input from, as in `s3://NAME` or "
        "`gs://NAME`, with the credentials of the server's environment.",
    )
    worker: bool = Field(default=True, description="Run batch jobs in this process; `fundament worker` runs them too.")
    max_job_lines: int = Field(default=50_000, ge=1, description="Most lines of a batch job.")
    max_inline_lines: int = Field(
        default=10_000, ge=1, description="Most lines of a batch job whose lines are in the request itself."
    )
    max_job_mb: float = Field(
        default=512,
        gt=0,
        description="Largest input of a batch job, of a CSV file also as JSONL, and largest upload, in MB.",
    )
    max_jobs_per_key: int = Field(
        default=100, ge=1, description="Batch jobs of one key that may wait or run; past it the answer is 429."
    )
    max_stored_mb_per_key: float = Field(
        default=10_000,
        gt=0,
        description="Most of one key's uploads and its batch jobs' inputs and results together, in MB; past it nothing "
        "more is taken in.",
    )
    job_hours: float = Field(
        default=24, gt=0, le=100_000, description="How long a batch job and its files stay, from when it was handed in."
    )
    job_lease_seconds: float = Field(
        default=20, gt=0, description="After how long without a sign of life a worker's chunks go to another one."
    )
    public_url: Annotated[str, AfterValidator(_web)] = Field(
        default="", description="Where callers reach this server, for links in answers. None: as the request came."
    )
    webhook_secret: Annotated[str, AfterValidator(_secret)] = Field(
        default="",
        description="Signs webhooks, as `whsec_` and base64. None: a random one, in `webhook.secret` of the data "
        "directory or of `files_url`.",
    )
    drain_seconds: float = Field(
        default=1, ge=0, description="After SIGTERM, how long `/ready` says 503 before the port closes."
    )
    shutdown_seconds: float = Field(
        default=30, ge=0, description="After SIGTERM, how long running requests may take to finish."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Form of the log lines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flag, environment, file."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _File(settings_cls, config_file())

    @field_validator("*")
    @classmethod
    def _bound(cls, value: Any) -> Any:
        """Refuse sizes and times that nothing has and no clock counts, and names that cannot be written down."""
        if isinstance(value, float) and value > _MOST:
            raise ValueError(f"at most {_MOST:,.0f}")
        texts = [str(each) for each in (value if isinstance(value, list) else [value]) if isinstance(each, str | Path)]
        if not all(map(is_text, texts)):
            raise ValueError("it is not UTF-8")
        return value

    @field_validator("input_buckets")
    @classmethod
    def _leave_files_out(cls, value: list[str], info: ValidationInfo) -> list[str]:
        """Keep callers from each other's files, and from what signs links."""
        if (bucket := "/".join(info.data.get("files_url", "").split("/")[:3])) in value:
            raise ValueError(f"{bucket} is that of files_url: callers could read all that is there; take another one")
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Make paths absolute."""
        del context
        self.data_dir = self.data_dir.expanduser().absolute()

    def tier(self, name: str) -> Tier | None:
        """The limits of that name; None where there are none."""
        return self.tiers.get(name) or TIERS.get(name)

    def tier_names(self) -> list[str]:
        """Every name that a key's tier can have."""
        return sorted({*TIERS, *self.tiers})


def config_file() -> Path:
    """The file of settings, which need not be there unless `FUNDAMENT_CONFIG` names it."""
    return Path(os.environ.get("FUNDAMENT_CONFIG") or "fundament.toml").expanduser()


def check_environment() -> None:
    """Refuse variables that look like settings and are none: without one a server could be open that should not be.

    Raises:
        ValueError: there is such a variable.
    """
    known = {*map(str.upper, Settings.model_fields), *_NO_SETTINGS}
    for name in sorted(os.environ):
        prefix, own = name[: len(_PREFIX)].upper(), name[len(_PREFIX) :].upper()
        if prefix != _PREFIX or own in known or _SERVICE.fullmatch(own):
            continue
        meant = "".join(f" Did you mean {_PREFIX}{word}?" for word in get_close_matches(own, known, n=1))
        raise ValueError(f"The environment's {name} is not a setting; docs/settings.md lists them.{meant}")


def check_file() -> None:
    """Refuse a file of settings that cannot be read: without it a server could be open that should ask for keys.

    Raises:
        ValueError: it is named and not there, or is no TOML.
    """
    path = config_file()
    try:
        with path.open("rb") as file:
            tomllib.load(file)
    except FileNotFoundError as error:
        if os.environ.get("FUNDAMENT_CONFIG"):
            raise ValueError(f"FUNDAMENT_CONFIG names {path}, which is not there.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"The settings in {path} cannot be read: {reason}.") from error
