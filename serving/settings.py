"""What an operator may choose, each from an environment variable `DROPSERVE_<NAME>`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.contract import MAX_NUM_SAMPLES, MIN_NUM_SAMPLES
from serving.errors import StartError

ENV_PREFIX = "DROPSERVE_"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        protected_namespaces=(),
        # What would last for ever is no limit.
        allow_inf_nan=False,
    )

    repository: Path = Path("artifacts")
    """The model repository: `<name>/<version>/` folders as training publishes them."""

    model: str | None = None
    """Model of the native endpoints. Not needed where the repository holds only one at start."""

    keep_versions: int = Field(default=2, gt=0)
    """Of each model, how many of the newest versions stay loaded, beside those that its routing.json names."""

    poll_s: float = Field(default=2.0, gt=0)
    """How often the repository is looked at for new versions, labels and routing, in seconds."""

    host: str = "0.0.0.0"
    """Address of the ports below. BentoML's own HTTP port has its own option, `--host`."""

    rest_port: int = Field(default=8501, ge=0, le=65_535)
    """All HTTP routes on plain uvicorn, without BentoML in front; 0 for none. Where nobody chose it and it is taken,
    the server goes without."""

    grpc_port: int = Field(default=8500, ge=0, le=65_535)
    """TensorFlow Serving's gRPC services; 0 for none. Taken, though nobody chose it: the server goes without."""

    api_keys: SecretStr | None = None
    """Keys, separated by commas: with any, every request but probes and metrics wants one of them (401)."""

    api_keys_file: Path | None = None
    """A file with more keys, one a line; lines that begin with # are comments."""

    tls_certfile: Path | None = None
    """A certificate, PEM: with it and its key all ports, BentoML's own too, speak TLS and nothing else."""

    tls_keyfile: Path | None = None
    """The certificate's key, PEM, without a password."""

    tls_client_ca: Path | None = None
    """Certificates, PEM: clients need one that they signed. Probes and metrics too."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where TensorFlow runs. `auto` takes a GPU where there is one; `gpu` refuses to start without one."""

    workers: int | None = Field(default=None, gt=0)
    """Worker processes, each with the models in its own memory. Not set: one for each GPU, or one."""

    access_log: Literal["all", "errors", "off"] = "all"
    """Which requests get a line in the log: who asked what of which version, how long it took; never what was sent."""

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/]+.*$")] | None = Field(
        default=None, validation_alias=AliasChoices("DROPSERVE_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )
    """Where OpenTelemetry spans are sent, OTLP over HTTP, as `http://collector:4318`. Without it there are none."""

    drift_window_rows: int = Field(default=2_000, ge=200)
    """Of how many answers, at least, the drift score speaks; at most of twice as many."""

    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    """Longest request body, in bytes. A longer one is refused (413)."""

    max_rows: int = Field(default=10_000, gt=0)
    """Most rows in one request. More are refused (400)."""

    max_num_samples: int = Field(default=10_000, ge=MIN_NUM_SAMPLES, le=MAX_NUM_SAMPLES)
    """Most draws for one row. More are refused (400)."""

    max_row_draws: int = Field(default=2_000_000, gt=0)
    """Most rows x draws in one request: what bounds its computing time. More are refused (400)."""

    max_drawn_values: int = Field(default=2**24, gt=0)
    """Most values in one answer of signature `mc_draws`: rows x draws x what a draw gives for one row, as many as there
    are classes. They are 64 MiB as float32, and several times as much as JSON. More are refused (400)."""

    max_queue: int = Field(default=2_000, gt=0)
    """Most requests waiting for the model. The next one is refused (429)."""

    max_concurrency: int = Field(default=4_096, gt=0)
    """Most requests that are read, answered or waiting at one time, on each port. The next one is refused (429)."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """A request whose body has not come after this is refused (408) and its connection closed, in seconds. On the REST
    port one whose head has not, likewise, and a connection on which nothing has come is closed."""

    max_queue_row_draws: int = Field(default=20_000_000, gt=0)
    """Most rows x draws waiting for the model, over all requests. A request that would exceed it is refused (429)."""

    deadline_ms: float = Field(default=30_000, gt=0)
    """A request that waits longer for its answer is given up (504), in milliseconds."""

    batch_rows: int = Field(default=1_024, gt=0)
    """Most rows in one deterministic call. Requests together have no more, and a larger request is cut into several."""

    batch_row_draws: int = Field(default=65_536, gt=0)
    """Most rows x draws in one MC call, likewise; a single row is never cut."""

    drain_s: float = Field(default=2.0, ge=0)
    """After SIGTERM: how long new requests are still taken and refused (503), with readiness down, before the ports
    close. The time that a load balancer needs to notice, in seconds."""

    grace_s: float = Field(default=30.0, gt=0)
    """After SIGTERM: when the process ends at the latest, whoever is still being answered, in seconds."""

    inline_ms: float = Field(default=2.0, ge=0)
    """Calls expected to take no longer than this run on the event loop itself, which spares two thread switches;
    longer ones run on a thread, one for predictions and one for MC work. In milliseconds."""


def read_settings() -> Settings:
    """The settings of this process; raises StartError with one line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "_".join(str(part) for part in first["loc"])
        # A setting that has several names is told by the variable's.
        if name in Settings.model_fields:
            name = f"{ENV_PREFIX}{name}".upper()
        raise StartError(f"{name}={first['input']!r}: {first['msg']}") from error
