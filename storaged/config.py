"""What an administrator may set in a TOML file: a table for each part, checked key by key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from storaged import tables
from storaged.addresses import ANY_CID, TcpAddress, parse_address
from storaged.core.model import Config
from storaged.errors import ConfigError
from storaged.guest.clock import ClockSettings
from storaged.guest.containers import ContainerSettings
from storaged.guest.mounts import MountSettings
from storaged.guest.network import NetworkSettings
from storaged.guest.processes import ProcessSettings
from storaged.guest.resolv import ResolvSettings
from storaged.guest.termina import TerminaSettings
from storaged.units import KIB, MIB, format_size

HOST = "host"
"""For `notify_host`: the startup listener of the contract."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Where the daemon serves, and what it manages."""

    listen: tuple[str, ...] = field(
        default=("unix:/run/storaged.sock",),
        metadata={"help": "Addresses: unix:/path, vsock::PORT, tcp:HOST:PORT.", "some": True},
    )
    stateful: str = field(default="/mnt/stateful", metadata={"help": "Where the btrfs to manage is mounted."})
    state_dir: str = field(default="/var/lib/storaged", metadata={"help": "Where the journal is kept."})
    metrics: str = field(default="", metadata={"help": "HOST:PORT or unix:/path for Prometheus metrics; empty: none."})
    notify_host: str = field(
        default="",
        metadata={
            "help": "Who is told that this guest serves (VmReady): an address, or `host` for context id 2 at port 7777"
            " or what `maitred.listen_port=` on the kernel's command line says; empty: nobody."
        },
    )
    wait_for_stateful: bool = field(
        default=False,
        metadata={
            "help": "Serve before the stateful filesystem is mounted, and whatever is mounted: until it can be managed"
            " the storage calls answer FAILED_PRECONDITION, and metrics are not there. Always so as process 1."
        },
    )
    allow_unsupported: bool = field(
        default=False,
        metadata={
            "help": "Start the engine on a kernel or a read-only mount with which `storaged check` says that it cannot"
            " do its work."
        },
    )
    crash_host: str = field(
        default="",
        metadata={
            "help": "Who is told of programs that ended though they should not (SendFailureReport): an address, or"
            " `host` for context id 2 at port 7779; empty: nobody."
        },
    )
    only_storage: bool = field(
        default=False, metadata={"help": "Serve the storage calls alone: the others answer UNIMPLEMENTED."}
    )
    release: bool = field(default=False, metadata={"help": "Give the balloon back when the daemon stops."})
    log_level: str = field(
        default="info",
        metadata={"help": "Least to be logged.", "choices": ("debug", "info", "warning", "error"), "reload": True},
    )

    def __post_init__(self) -> None:
        metrics = self.metrics if self.metrics.startswith(("unix:", "tcp:")) else f"tcp:{self.metrics}"
        for text in (*self.listen, *([metrics] if self.metrics else [])):
            parse_address(text)
        for key, text in (("notify_host", self.notify_host), ("crash_host", self.crash_host)):
            if text in ("", HOST):
                continue
            address = parse_address(text)
            if isinstance(address, TcpAddress) and not address.loopback:
                raise ConfigError(f"{key} {address}: over tcp: a loopback address alone is accepted")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """For tcp: addresses, which need a certificate from each client too."""

    certificate: str = field(default="", metadata={"help": "Our certificate, a PEM file."})
    key: str = field(default="", metadata={"help": "Its key, a PEM file."})
    client_authority: str = field(
        default="", metadata={"help": "The authority that must have signed the clients' certificates, a PEM file."}
    )
    insecure: bool = field(default=False, metadata={"help": "Allow tcp: without TLS, on a loopback address alone."})

    def __post_init__(self) -> None:
        files = (self.certificate, self.key, self.client_authority)
        if any(files) and not all(files):
            raise ConfigError("TLS: certificate, key and client authority belong together")


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What callers may cost."""

    call_s: float = field(
        default=180.0,
        metadata={
            "help": "Deadline of a unary call whose caller gave none; LaunchProcess has none.",
            "least": 1.0,
            "reload": True,
        },
    )
    calls: int = field(
        default=4096,
        metadata={
            "help": "Unary calls that run at once, more than one vsock peer may have; beyond: RESOURCE_EXHAUSTED.",
            "least": 8,
            "most": 65536,
        },
    )
    calls_per_connection: int = field(
        default=448,
        metadata={
            "help": "Calls and streams of one connection at once; more wait at the caller.",
            "least": 4,
            "most": 4096,
        },
    )
    streams: int = field(
        default=32,
        metadata={"help": "Streams (Watch) that are open at once; the same beyond.", "least": 1, "most": 65536},
    )
    message_bytes: int = field(
        default=64 * KIB, metadata={"help": "Largest request.", "least": 16 * KIB, "most": 64 * MIB}
    )
    handshake_s: float = field(
        default=10.0, metadata={"help": "A new connection must have begun HTTP/2 (and TLS) within this.", "least": 0.1}
    )
    keepalive_s: float = field(
        default=60.0, metadata={"help": "A silent connection is pinged after this.", "least": 1.0}
    )
    keepalive_wait_s: float = field(
        default=20.0, metadata={"help": "It ends when the ping is not answered within this.", "least": 1.0}
    )
    drain_s: float = field(
        default=5.0, metadata={"help": "Running calls may finish within this when the daemon stops.", "reload": True}
    )


@dataclass(frozen=True, slots=True)
class VsockConfig:
    """Who may come in over vsock, and how much of it."""

    cids: tuple[int, ...] = field(
        default=(2,),
        metadata={"help": "Context ids that may connect; 2 is the host.", "most": ANY_CID - 1, "reload": True},
    )
    connections: int = field(
        default=64, metadata={"help": "Connections held at once.", "least": 1, "most": 4096, "reload": True}
    )
    connections_per_cid: int = field(
        default=8, metadata={"help": "The same for one context id.", "least": 1, "most": 4096, "reload": True}
    )
    preface_s: float = field(
        default=5.0,
        metadata={"help": "A peer must have begun to speak HTTP/2 within this.", "least": 0.1, "reload": True},
    )
    idle_s: float = field(
        default=180.0,
        metadata={
            "help": "A connection whose peer sent nothing for this long ends; longer than limits.keepalive_s.",
            "least": 1.0,
            "reload": True,
        },
    )


@dataclass(frozen=True, slots=True)
class NotifyConfig:
    """How the host is told that this guest serves."""

    call_s: float = field(default=5.0, metadata={"help": "One attempt may take this.", "least": 0.1})
    first_s: float = field(
        default=0.2, metadata={"help": "Pause before the second attempt, doubled each time.", "least": 0.01}
    )
    most_s: float = field(default=5.0, metadata={"help": "Longest pause.", "least": 0.01})
    give_up_s: float = field(default=120.0, metadata={"help": "No further attempt after this."})


@dataclass(frozen=True, slots=True)
class Settings:
    """All tables of the file. One more is one more field here: its name is the table's."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    vsock: VsockConfig = field(default_factory=VsockConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    storage: Config = field(default_factory=Config)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    resolv: ResolvSettings = field(default_factory=ResolvSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    mounts: MountSettings = field(default_factory=MountSettings)
    termina: TerminaSettings = field(default_factory=TerminaSettings)
    containers: ContainerSettings = field(default_factory=ContainerSettings)

    def __post_init__(self) -> None:
        check_storage(self.storage)
        if self.vsock.connections_per_cid * self.limits.calls_per_connection >= self.limits.calls:
            raise ConfigError(
                "limits.calls must be more than vsock.connections_per_cid times limits.calls_per_connection:"
                " one peer must not take the place of all"
            )
        if self.vsock.idle_s <= self.limits.keepalive_s:
            raise ConfigError(
                "vsock.idle_s must be longer than limits.keepalive_s: silent connections are kept by pings"
            )


def table_types() -> dict[str, type]:
    """The tables of a file by name, in order."""
    default = Settings()
    return {item.name: type(getattr(default, item.name)) for item in fields(Settings)}


def load(path: str) -> Settings:
    """The settings in the file at `path`. Raises ConfigError that names the file and the key."""
    import tomllib

    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: {error}") from error
    try:
        return parse(document)
    except ConfigError as error:
        raise ConfigError(f"configuration {path}: {error.message}") from error


def parse(document: dict[str, object]) -> Settings:
    """The settings in a TOML document. Raises ConfigError that names the key."""
    known = table_types()
    if unknown := next((name for name in document if name not in known), None):
        raise ConfigError(f"unknown table or key {unknown!r}; known: {', '.join(f'[{name}]' for name in known)}")
    return Settings(**{name: tables.read(known[name], value, name) for name, value in document.items()})


def check_storage(config: Config) -> None:
    """Raise ConfigError when the levels or the reserve make no sense together."""
    for worse, better in (("critical_enter", "critical_leave"), ("low_enter", "low_leave")):
        if getattr(config, worse) > getattr(config, better):
            raise ConfigError(f"storage.{better} must not be below storage.{worse}")
    if config.critical_leave > config.low_enter:
        raise ConfigError("storage.low_enter must not be below storage.critical_leave")
    if config.reserve < Config().reserve:
        raise ConfigError(f"storage.reserve must be at least {format_size(Config().reserve)}: hosts count on that much")


def restart_needed(old: Settings, new: Settings) -> list[str]:
    """The keys that differ and that a running daemon does not take, as `table.key`."""
    return [
        f"{name}.{key.name}"
        for name, table in table_types().items()
        for key in tables.keys(table)
        if not key.reload and getattr(getattr(old, name), key.name) != getattr(getattr(new, name), key.name)
    ]
