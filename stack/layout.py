"""Where the embedded stack keeps its things: folders, ports, secrets, the state file.

    HOME/
    ├── state.json        what the supervisor did last: ports, processes, states
    ├── supervisor.lock   held (flock) for as long as a supervisor lives
    ├── secrets/          generated once, readable by the owner only
    ├── logs/NAME.log     one log a process
    ├── data/NAME/        what a server stores
    ├── flink/            conf, lib, checkpoints, savepoints, high-availability storage, tmp
    ├── run/slots/        how many requests each delivery process has in flight
    └── store/            the file store: snapshots, specs, templates

Everything that jobs and tools need to find the servers is in `environment`.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from schemas.errors import StackFailed
from stack.process import Identity

PROJECT_ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
CLICKHOUSE_USER = "fanfare"


class State(Enum):
    """Where a service stands."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    FAILING = "failing"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one embedded stack. Paths only; nothing is touched until `create`."""

    root: Path

    @property
    def state_file(self) -> Path:
        """The supervisor's last word about every service."""
        return self.root / "state.json"

    @property
    def lock_file(self) -> Path:
        """Locked for as long as a supervisor lives."""
        return self.root / "supervisor.lock"

    @property
    def secrets(self) -> Path:
        """Generated passwords and keys, for the owner's eyes."""
        return self.root / "secrets"

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.root / "logs"

    @property
    def flink(self) -> Path:
        """Flink's folder: conf, lib, checkpoints, savepoints, ha, tmp."""
        return self.root / "flink"

    @property
    def store(self) -> Path:
        """The file store of snapshots, specs and templates."""
        return self.root / "store"

    @property
    def slots(self) -> Path:
        """Where delivery processes show how many requests they have in flight."""
        return self.root / "run" / "slots"

    def data(self, service: str) -> Path:
        """The data folder of one service."""
        return self.root / "data" / service

    def log(self, service: str) -> Path:
        """The log of one service."""
        return self.logs / f"{service}.log"

    def create(self) -> None:
        """Make the folders that are missing."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.secrets.mkdir(mode=0o700, exist_ok=True)
        for folder in (self.logs, self.flink, self.store, self.root / "data"):
            folder.mkdir(exist_ok=True)


def home(path: str | os.PathLike[str] | None = None) -> Home:
    """The stack's home: the path given, else $FANFARE_HOME, else ./.fanfare."""
    chosen = path if path is not None else os.environ.get("FANFARE_HOME") or ".fanfare"
    return Home(Path(chosen).expanduser().resolve())


# --- state file -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One supervised process, as the supervisor last knew it.

    `ports` are by purpose; `pid` and `started` are absent while no process runs;
    `ready_after_s` is what the last start took; `why` is the last failure.
    """

    name: str
    state: State
    log: Path
    ports: Mapping[str, int] = field(default_factory=dict)
    identity: Identity | None = None
    started: datetime | None = None
    ready_after_s: float | None = None
    restarts: int = 0
    failures: int = 0
    why: str = ""

    @property
    def pid(self) -> int | None:
        """The process id, or None while no process runs."""
        return self.identity.pid if self.identity else None

    @property
    def alive(self) -> bool:
        """Whether that very process (not a later one with its pid) runs now."""
        return self.identity is not None and self.identity.alive()


@dataclass(frozen=True, slots=True)
class StackState:
    """The whole of the state file. `stopping` once the supervisor was told to end."""

    services: Mapping[str, ProcessInfo]
    ports: Mapping[str, int]
    taskmanagers: int
    supervisor: Identity | None = None
    stopping: bool = False


def _encode(info: ProcessInfo) -> dict[str, Any]:
    return {
        "state": info.state.value,
        "log": str(info.log),
        "ports": dict(info.ports),
        "identity": asdict(info.identity) if info.identity else None,
        "started": info.started.isoformat() if info.started else None,
        "ready_after_s": info.ready_after_s,
        "restarts": info.restarts,
        "failures": info.failures,
        "why": info.why,
    }


def _decode(name: str, raw: Mapping[str, Any]) -> ProcessInfo:
    return ProcessInfo(
        name=name,
        state=State(raw["state"]),
        log=Path(raw["log"]),
        ports=raw["ports"],
        identity=Identity(**raw["identity"]) if raw["identity"] else None,
        started=datetime.fromisoformat(raw["started"]) if raw["started"] else None,
        ready_after_s=raw["ready_after_s"],
        restarts=raw["restarts"],
        failures=raw["failures"],
        why=raw["why"],
    )


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old or the new whole, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    temporary.replace(path)


def write_state(home: Home, state: StackState) -> None:
    """Replace the state file."""
    content = {
        "services": {name: _encode(info) for name, info in state.services.items()},
        "ports": dict(state.ports),
        "taskmanagers": state.taskmanagers,
        "supervisor": asdict(state.supervisor) if state.supervisor else None,
        "stopping": state.stopping,
    }
    replace_file(home.state_file, json.dumps(content, indent=1))


def read_state(home: Home) -> StackState | None:
    """The state file's content; None when the stack was never started here.

    Raises StackFailed when the file is there but is no state of ours.
    """
    try:
        text = home.state_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        raw = json.loads(text)
        return StackState(
            services={name: _decode(name, info) for name, info in raw["services"].items()},
            ports=raw["ports"],
            taskmanagers=raw["taskmanagers"],
            supervisor=Identity(**raw["supervisor"]) if raw["supervisor"] else None,
            stopping=raw["stopping"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StackFailed(
            f"{home.state_file} is not a readable state of the stack ({error!r}); "
            "delete it and run `fanfare up` again"
        ) from error


def processes(home: Home) -> dict[str, ProcessInfo]:
    """Every supervised process by service name; empty when the stack was never started."""
    state = read_state(home)
    return dict(state.services) if state else {}


# --- secrets ----------------------------------------------------------------------------------


def secret(home: Home, name: str) -> str:
    """A password of this stack: generated at first use, kept readable by the owner only."""
    path = home.secrets / name
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        home.create()
        replace_file(path, secrets.token_urlsafe(24), mode=0o600)
        return path.read_text(encoding="utf-8").strip()


def webhook_keys(home: Home) -> tuple[Path, str]:
    """The simulator's webhook signing key pair (ECDSA, P-256), generated at first use.

    Returns the file of the private key (PEM) and the public key as SendGrid shows it:
    base64 of its DER form.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = home.secrets / "webhook-private-key.pem"
    if not path.exists():
        home.create()
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        replace_file(path, pem.decode("ascii"), mode=0o600)
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return path, base64.b64encode(public).decode("ascii")


# --- ports ------------------------------------------------------------------------------------


def allocate_ports(wanted: Iterable[str], remembered: Mapping[str, int]) -> dict[str, int]:
    """A free loopback port for each name; a remembered one is kept when it is still free.

    New ones are taken below the kernel's ephemeral range, so that no outgoing connection can
    sit on a server's port while that server is restarted.
    """
    chosen = {name: port for name, port in remembered.items() if _is_free(port)}
    for name in wanted:
        if name not in chosen:
            chosen[name] = _free_port(taken=set(chosen.values()) | set(remembered.values()))
    return {**remembered, **chosen}


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(taken: set[int]) -> int:
    try:
        ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        ephemeral = 32768
    low, high = (20000, ephemeral) if ephemeral > 21000 else (61000, 65535)
    for _ in range(1000):
        port = low + secrets.randbelow(high - low)
        if port not in taken and _is_free(port):
            return port
    raise StackFailed(f"no free port found on {HOST} between {low} and {high}")


# --- endpoints --------------------------------------------------------------------------------

PORTS: Mapping[str, tuple[str, ...]] = {
    "zookeeper": ("client",),
    "kafka": ("broker", "controller"),
    "redis": ("redis",),
    "clickhouse": ("http",),
    "flink-jobmanager": ("rest", "rpc", "blob"),
    "simulator": ("http", "smtp", "control"),
    "receiver": ("http",),
}


def port_key(service: str, purpose: str) -> str:
    """The name of a port in the state file."""
    return f"{service}.{purpose}"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the servers of one stack listen, with their secrets. Never log or print `redis`,
    `clickhouse` or `sendgrid_key`; `shown` is for eyes."""

    kafka: str
    redis: str
    clickhouse: str
    flink: str
    zookeeper: str
    sendgrid_url: str
    sendgrid_key: str
    smtp: str
    simulator: str
    receiver: str
    store: str
    webhook_public_key: str

    def shown(self) -> dict[str, str]:
        """The endpoints without secrets, for a terminal."""
        return {
            "flink": self.flink,
            "kafka": self.kafka,
            "redis": _without_secret(self.redis),
            "clickhouse": _without_secret(self.clickhouse),
            "sendgrid": self.sendgrid_url,
            "smtp": self.smtp,
            "simulator": self.simulator,
            "receiver": self.receiver,
            "zookeeper": self.zookeeper,
        }


def _without_secret(url: str) -> str:
    scheme, rest = url.split("://", 1)
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}"


def endpoints(home: Home, ports: Mapping[str, int] | None = None) -> Endpoints:
    """Where everything listens. `ports` defaults to those of the state file.

    Raises StackFailed when no stack was started in this home.
    """
    if ports is None:
        state = read_state(home)
        if state is None:
            raise StackFailed(f"no stack was started in {home.root}; run `fanfare up`")
        ports = state.ports

    def at(service: str, purpose: str) -> str:
        return f"{HOST}:{ports.get(port_key(service, purpose), 0)}"

    return Endpoints(
        kafka=at("kafka", "broker"),
        redis=f"redis://:{secret(home, 'redis-password')}@{at('redis', 'redis')}/0",
        clickhouse=(
            f"http://{CLICKHOUSE_USER}:{secret(home, 'clickhouse-password')}"
            f"@{at('clickhouse', 'http')}"
        ),
        flink=f"http://{at('flink-jobmanager', 'rest')}",
        zookeeper=at("zookeeper", "client"),
        sendgrid_url=f"http://{at('simulator', 'http')}",
        sendgrid_key=secret(home, "sendgrid-key"),
        smtp=at("simulator", "smtp"),
        simulator=f"http://{at('simulator', 'control')}",
        receiver=f"http://{at('receiver', 'http')}",
        store=str(home.store),
        webhook_public_key=webhook_keys(home)[1],
    )


def environment(home: Home, ports: Mapping[str, int] | None = None) -> dict[str, str]:
    """The FANFARE_ variables that jobs and tools read, secrets included."""
    found = endpoints(home, ports)
    return {
        "FANFARE_HOME": str(home.root),
        "FANFARE_STORE": found.store,
        "FANFARE_KAFKA": found.kafka,
        "FANFARE_REDIS": found.redis,
        "FANFARE_CLICKHOUSE": found.clickhouse,
        "FANFARE_FLINK": found.flink,
        "FANFARE_SENDGRID_URL": found.sendgrid_url,
        "FANFARE_SENDGRID_KEY": found.sendgrid_key,
        "FANFARE_SMTP": found.smtp,
        "FANFARE_SIMULATOR": found.simulator,
        "FANFARE_RECEIVER": found.receiver,
        "FANFARE_WEBHOOK_PUBLIC_KEY": found.webhook_public_key,
        # The providers are the simulator, on this machine and without TLS. Unsubscribe links must
        # be https (RFC 8058): a name kept for examples (RFC 2606) stands for the public receiver.
        "FANFARE_ALLOW_PRIVATE": "true",
        "FANFARE_SMTP_SECURITY": "none",
        "FANFARE_SLOTS": str(home.slots),
        "FANFARE_PUBLIC_URL": "https://fanfare.example",
        "FANFARE_UNSUBSCRIBE_SECRET": secret(home, "unsubscribe-secret"),
    }
