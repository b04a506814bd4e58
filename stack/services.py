"""The services of the embedded stack, declared: one `ServiceSpec` each, dependencies first.

To add one: its ports in `stack.layout.PORTS`, a function that returns its spec, and a line in
`declare`.
"""

from __future__ import annotations

import base64
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from schemas.errors import StackFailed
from stack import flink_conf, probes
from stack.layout import (
    CLICKHOUSE_USER,
    HOST,
    PORTS,
    Home,
    environment,
    port_key,
    replace_file,
    secret,
    webhook_keys,
)
from stack.prerequisites import Tools

TASKMANAGER_PREFIX = "flink-taskmanager-"
LEADERLESS = timedelta(seconds=30)
"""How long there may be no leader while the JobManager's process lives. One whose ZooKeeper session
expired (it was stopped for longer) may never stand for election again, and nobody else does."""
INCARNATION = "@INCARNATION@"
"""Stands in a command for the number of this start, which no other start shares."""

GROUPS: Mapping[str, str] = {"flink": "flink-"}
"""Names that choose several services: the prefix of their names."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How one server is started, asked, and stopped.

    `setup` is a command run to its end before the first start, until `setup_done` exists.
    `probe` gets the incarnation, returns when the server is ready and raises when it is not.
    `module` names the Python module the command runs, so that its absence is told beforehand.
    `scratch` is a folder emptied before each start: a killed server leaves its temporary files.
    `stop_timeout` is how long a stop signal has before SIGKILL.
    `silence` is how long a server that was ready may fail its probe before it is killed and
    started again; None: for ever, as long as its process lives.
    """

    name: str
    command: tuple[str, ...]
    probe: Callable[[str], None]
    cwd: Path
    ports: Mapping[str, int] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    depends_on: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    setup_done: Path | None = None
    scratch: Path | None = None
    module: str | None = None
    start_timeout: timedelta = timedelta(seconds=90)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout: timedelta = timedelta(seconds=10)
    silence: timedelta | None = None


def names(taskmanagers: int) -> tuple[str, ...]:
    """Every service of a whole stack, in the order of their declaration."""
    return (
        "zookeeper",
        "kafka",
        "redis",
        "clickhouse",
        "flink-jobmanager",
        *(f"{TASKMANAGER_PREFIX}{number}" for number in range(1, taskmanagers + 1)),
        "receiver",
        "simulator",
    )


DEPENDS_ON: Mapping[str, tuple[str, ...]] = {
    "flink-jobmanager": ("zookeeper",),
    "receiver": ("kafka",),
}
"""What must be ready first. TaskManagers need ZooKeeper alone: they find the leader there."""


def dependencies(service: str) -> tuple[str, ...]:
    """What must be ready before this service is started."""
    if service.startswith(TASKMANAGER_PREFIX):
        return ("zookeeper",)
    return DEPENDS_ON.get(service, ())


def choose(only: tuple[str, ...], taskmanagers: int) -> tuple[str, ...]:
    """The services that `--only` names (all when empty), with what they depend on.

    Raises StackFailed for a name that is none.
    """
    known = names(taskmanagers)
    chosen: set[str] = set()
    for name in only or known:
        matching = (
            {service for service in known if service.startswith(GROUPS[name])}
            if name in GROUPS
            else {name} & set(known)
        )
        if not matching:
            raise StackFailed(
                f"--only names {name!r}, which is no service; there are "
                f"{', '.join((*GROUPS, *known))}"
            )
        chosen |= matching
    pending = list(chosen)
    while pending:
        wanted = set(dependencies(pending.pop())) - chosen
        chosen |= wanted
        pending.extend(wanted)
    return tuple(name for name in known if name in chosen)


def port_names(chosen: tuple[str, ...]) -> list[str]:
    """The state file's names of all ports of the services."""
    return [port_key(name, purpose) for name in chosen for purpose in PORTS.get(name, ())]


MODULES: Mapping[str, str] = {
    "clickhouse": "stack.clickhouse_http",
    "simulator": "stack.simulator",
    "receiver": "gateway.receiver",
}
"""The services that are Python modules of ours."""

JAVA_SERVICES = ("zookeeper", "kafka", "flink-")


def needs_java(chosen: tuple[str, ...]) -> bool:
    """Whether any of the services runs on a JVM."""
    return any(name.startswith(JAVA_SERVICES) for name in chosen)


def declare(
    home: Home, tools: Tools, ports: Mapping[str, int], chosen: tuple[str, ...]
) -> tuple[ServiceSpec, ...]:
    """The specs of the chosen services; writes the configuration files that they read."""
    makers: dict[str, Callable[[Home, Tools, Mapping[str, int]], ServiceSpec]] = {
        "zookeeper": zookeeper,
        "kafka": kafka,
        "redis": redis,
        "clickhouse": clickhouse,
        "flink-jobmanager": flink_jobmanager,
        "receiver": receiver,
        "simulator": simulator,
    }
    home.create()
    if any(name.startswith("flink-") for name in chosen):
        flink_conf.prepare(home, tools, ports)
    return tuple(
        makers[name](home, tools, ports)
        if name in makers
        else flink_taskmanager(home, tools, ports, name)
        for name in chosen
    )


def _ports(service: str, ports: Mapping[str, int]) -> dict[str, int]:
    return {purpose: ports[port_key(service, purpose)] for purpose in PORTS[service]}


def _folder(home: Home, service: str) -> Path:
    folder = home.data(service)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _log4j(folder: Path, extra: str = "") -> str:
    replace_file(folder / "log4j2.properties", flink_conf.LOG4J + extra)
    return f"-Dlog4j2.configurationFile={(folder / 'log4j2.properties').as_uri()}"


def zookeeper(home: Home, tools: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """ZooKeeper, out of the same shaded jar that Flink's client comes from."""
    own = _ports("zookeeper", ports)
    folder = _folder(home, "zookeeper")
    replace_file(
        folder / "zoo.cfg",
        f"""\
tickTime=2000
clientPort={own["client"]}
clientPortAddress={HOST}
dataDir={folder / "data"}
admin.enableServer=false
4lw.commands.whitelist=srvr,ruok
autopurge.snapRetainCount=3
autopurge.purgeInterval=1
""",
    )
    jars = [
        *tools.flink_jars.glob("flink-shaded-zookeeper*.jar"),
        # Its snapshots name snappy's classes even when they are not compressed.
        *_kafka_jars(tools, "log4j-", "slf4j-", "snappy-"),
    ]
    shaded = "org.apache.flink.shaded.zookeeper3.org.apache.zookeeper.server"
    return ServiceSpec(
        name="zookeeper",
        command=(
            tools.java,
            "-Xmx96m",
            *flink_conf.LEAN_JVM,
            "-XX:+ExitOnOutOfMemoryError",
            # One line for every connection and probe would bury the others.
            _log4j(
                folder, f"logger.cnxn.name = {shaded}.NIOServerCnxn\nlogger.cnxn.level = WARN\n"
            ),
            "-Dzookeeper.jmx.log4j.disable=true",
            "-cp",
            ":".join(map(str, jars)),
            f"{shaded}.ZooKeeperServerMain",
            str(folder / "zoo.cfg"),
        ),
        probe=lambda _: probes.zookeeper(own["client"]),
        cwd=folder,
        ports=own,
        depends_on=dependencies("zookeeper"),
    )


def _kafka_jars(tools: Tools, *prefixes: str) -> list[Path]:
    return [j for j in sorted(tools.kafka_jars.glob("*.jar")) if j.name.startswith(prefixes)]


def kafka(home: Home, tools: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """One Kafka broker that is its own controller (KRaft)."""
    own = _ports("kafka", ports)
    folder = _folder(home, "kafka")
    replace_file(
        folder / "server.properties",
        f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{HOST}:{own["controller"]}
controller.listener.names=CONTROLLER
listeners=BROKER://{HOST}:{own["broker"]},CONTROLLER://{HOST}:{own["controller"]}
advertised.listeners=BROKER://{HOST}:{own["broker"]}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=BROKER
log.dirs={folder / "data"}
auto.create.topics.enable=false
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
transaction.max.timeout.ms=3600000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=16777216
controlled.shutdown.max.retries=1
# A killed broker may register again only after its predecessor's session has ended (9 s).
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=1000
""",
    )
    java = (
        tools.java,
        "-Xmx384m",
        "-Xms64m",
        *flink_conf.LEAN_JVM,
        "-XX:+ExitOnOutOfMemoryError",
        _log4j(folder),
        "-cp",
        f"{tools.kafka_jars}/*",
    )
    return ServiceSpec(
        name="kafka",
        command=(*java, "kafka.Kafka", str(folder / "server.properties")),
        setup=(
            *java,
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            _cluster_id(folder),
            "--config",
            str(folder / "server.properties"),
            "--ignore-formatted",
        ),
        setup_done=folder / "data" / "meta.properties",
        probe=lambda _: probes.kafka(own["broker"]),
        cwd=folder,
        ports=own,
        depends_on=dependencies("kafka"),
        stop_timeout=timedelta(seconds=20),
    )


def _cluster_id(folder: Path) -> str:
    path = folder / "cluster-id"
    if not path.exists():
        replace_file(path, base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("="))
    return path.read_text(encoding="ascii")


def redis(home: Home, tools: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """redis-server whose every write is on disk before it is answered."""
    own = _ports("redis", ports)
    folder = _folder(home, "redis")
    password = secret(home, "redis-password")
    replace_file(
        folder / "redis.conf",
        f"""\
bind {HOST}
port {own["redis"]}
dir "{folder}"
requirepass {password}
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
daemonize no
""",
        mode=0o600,
    )
    return ServiceSpec(
        name="redis",
        command=(str(tools.redis_server), str(folder / "redis.conf")),
        probe=lambda _: probes.redis(own["redis"], password),
        cwd=folder,
        ports=own,
        depends_on=dependencies("redis"),
    )


def _module(name: str, home: Home, ports: Mapping[str, int], *arguments: str) -> ServiceSpec:
    own = _ports(name, ports)
    module = MODULES[name]
    return ServiceSpec(
        name=name,
        command=(sys.executable, "-m", module, *arguments),
        probe=lambda _: probes.health(own["control" if "control" in own else "http"]),
        cwd=_folder(home, name),
        ports=own,
        env=environment(home, ports),
        depends_on=dependencies(name),
        module=module,
    )


def clickhouse(home: Home, _: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """chDB behind ClickHouse's HTTP protocol."""
    port = ports[port_key("clickhouse", "http")]
    password = secret(home, "clickhouse-password")
    spec = _module(
        "clickhouse",
        home,
        ports,
        *("--host", HOST, "--port", str(port), "--path", str(home.data("clickhouse") / "data")),
        *("--user", CLICKHOUSE_USER),
        *("--password-file", str(home.secrets / "clickhouse-password")),
    )
    return replace(spec, probe=lambda _: probes.clickhouse(port, CLICKHOUSE_USER, password))


def receiver(home: Home, _: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """The webhook receiver."""
    port = ports[port_key("receiver", "http")]
    return _module("receiver", home, ports, "--host", HOST, "--port", str(port))


def simulator(home: Home, _: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """The provider simulator, which sends its webhooks to the receiver."""
    own = _ports("simulator", ports)
    # Absent when the receiver is not among the chosen services.
    target = ports.get(port_key("receiver", "http"))
    webhooks = ("--webhook-url", f"http://{HOST}:{target}/webhooks/sendgrid") if target else ()
    private_key, _public = webhook_keys(home)
    secret(home, "sendgrid-key")
    return _module(
        "simulator",
        home,
        ports,
        *("--http-port", str(own["http"]), "--smtp-port", str(own["smtp"])),
        *("--control-port", str(own["control"]), *webhooks),
        *("--record-dir", str(home.data("simulator") / "record")),
        *("--sendgrid-key-file", str(home.secrets / "sendgrid-key")),
        *("--webhook-key-file", str(private_key)),
    )


def _flink_environment(home: Home, tools: Tools, ports: Mapping[str, int]) -> dict[str, str]:
    return {**environment(home, ports), **flink_conf.process_environment(home, tools)}


def flink_jobmanager(home: Home, tools: Tools, ports: Mapping[str, int]) -> ServiceSpec:
    """Flink's JobManager with REST and web UI, leader by ZooKeeper."""
    own = _ports("flink-jobmanager", ports)
    return ServiceSpec(
        name="flink-jobmanager",
        command=flink_conf.java_command(
            home,
            tools,
            "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
            flink_conf.JOBMANAGER,
            home.log("flink-jobmanager"),
            *("--configDir", str(home.flink / "conf"), "--executionMode", "cluster"),
        ),
        probe=lambda _: probes.flink_jobmanager(own["rest"]),
        cwd=_folder(home, "flink-jobmanager"),
        ports=own,
        env=_flink_environment(home, tools, ports),
        depends_on=dependencies("flink-jobmanager"),
        silence=LEADERLESS,
    )


def resource_id(service: str, incarnation: str) -> str:
    """A TaskManager's id in Flink: the service's name and the number of the start."""
    return f"{service}.{incarnation}"


def flink_taskmanager(home: Home, tools: Tools, ports: Mapping[str, int], name: str) -> ServiceSpec:
    """One TaskManager with one slot: all Python operators of a JVM share one GIL.

    Its ports are the system's choice, another at each start: on a fixed one, a heartbeat meant
    for a dead TaskManager would reach its successor, and hide the death.
    """
    rest = ports[port_key("flink-jobmanager", "rest")]
    folder = _folder(home, name)
    temporary = home.flink / "tmp" / name

    def registered(incarnation: str) -> None:
        probes.flink_taskmanager(rest, resource_id(name, incarnation))

    return ServiceSpec(
        name=name,
        command=flink_conf.java_command(
            home,
            tools,
            "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
            flink_conf.TASKMANAGER,
            home.log(name),
            *("--configDir", str(home.flink / "conf")),
            *("-D", f"taskmanager.resource-id={resource_id(name, INCARNATION)}"),
            *("-D", f"io.tmp.dirs={temporary}"),
        ),
        probe=registered,
        cwd=folder,
        env=_flink_environment(home, tools, ports),
        depends_on=dependencies(name),
        scratch=temporary,
    )
