"""The Flink home of an embedded stack: configuration and a lib folder of links.

The pip package's own folder is never touched. Memory is given part by part, so that the JVMs
can be started directly and a pid is the server's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ruamel.yaml import YAML

from schemas.errors import StackFailed
from stack.layout import HOST, Home, port_key, replace_file
from stack.prerequisites import Tools

LOG4J = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = Console
appender.console.name = Console
appender.console.type = Console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yyyy-MM-dd HH:mm:ss,SSS} %-5p %-50c{1.} - %m%n
logger.netty.name = org.jboss.netty.channel.DefaultChannelPipeline
logger.netty.level = OFF
# Kafka's sink re-registers its gauges at each checkpoint and says so each time.
logger.metrics.name = org.apache.flink.metrics.MetricGroup
logger.metrics.level = ERROR
logger.producer.name = org.apache.flink.kafka.shaded.org.apache.kafka.clients.producer
logger.producer.level = WARN
logger.appinfo.name = org.apache.flink.kafka.shaded.org.apache.kafka.common.utils.AppInfoParser
logger.appinfo.level = ERROR
logger.kafkametrics.name = org.apache.flink.kafka.shaded.org.apache.kafka.common
logger.kafkametrics.level = WARN
"""
"""Everything to standard output, which is the process's one log file."""

LOG4J_CLIENT = """\
rootLogger.level = INFO
rootLogger.appenderRef.file.ref = File
appender.file.name = File
appender.file.type = File
appender.file.fileName = ${sys:log.file}
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{yyyy-MM-dd HH:mm:ss,SSS} %-5p %-50c{1.} - %m%n
# It would log the whole environment of the job's script, passwords included.
logger.python.name = org.apache.flink.client.python
logger.python.level = WARN
"""
"""The client's log goes to a file: its output is for the job script's own words."""

HEARTBEAT_INTERVAL = timedelta(seconds=2)
HEARTBEAT_TIMEOUT = timedelta(seconds=6)
HEARTBEATS_UNREACHABLE = 1
"""So many heartbeats that can't reach a process tell that it died: on one machine there is no
network between that could be the reason. Of two, a second apart, idle processes use more."""
ZOOKEEPER_SESSION_TIMEOUT = timedelta(seconds=6)
RESTART_DELAY = timedelta(milliseconds=500)
CHECKPOINT_INTERVAL = timedelta(seconds=2)


@dataclass(frozen=True, slots=True)
class Memory:
    """The parts of one JVM's memory, in megabytes."""

    heap: int
    direct: int
    metaspace: int
    overhead: int
    managed: int = 0

    @property
    def total(self) -> int:
        """The whole process."""
        return self.heap + self.direct + self.metaspace + self.overhead + self.managed

    def java_options(self) -> tuple[str, ...]:
        """The JVM's flags for these sizes."""
        return (
            f"-Xmx{self.heap}m",
            "-Xms32m",
            f"-XX:MaxDirectMemorySize={self.direct}m",
            f"-XX:MaxMetaspaceSize={self.metaspace}m",
        )


JOBMANAGER = Memory(heap=288, direct=64, metaspace=192, overhead=128)
FRAMEWORK_HEAP, FRAMEWORK_OFF_HEAP, TASK_OFF_HEAP, NETWORK = 96, 48, 32, 64
TASKMANAGER = Memory(
    heap=FRAMEWORK_HEAP + 160,
    direct=FRAMEWORK_OFF_HEAP + TASK_OFF_HEAP + NETWORK,
    metaspace=192,
    overhead=128,
    managed=160,
)


def _ms(duration: timedelta) -> str:
    return f"{round(duration / timedelta(milliseconds=1))} ms"


def settings(home: Home, ports: Mapping[str, int]) -> dict[str, object]:
    """Flink's configuration for JobManager, TaskManagers and client alike."""
    folder = home.flink
    return {
        "jobmanager.rpc.address": HOST,
        "jobmanager.rpc.port": ports[port_key("flink-jobmanager", "rpc")],
        "jobmanager.bind-host": HOST,
        "blob.server.port": str(ports[port_key("flink-jobmanager", "blob")]),
        "rest.address": HOST,
        "rest.bind-address": HOST,
        "rest.port": ports[port_key("flink-jobmanager", "rest")],
        "rest.bind-port": str(ports[port_key("flink-jobmanager", "rest")]),
        "jobmanager.execution.failover-strategy": "region",
        "web.submit.enable": False,
        "high-availability.type": "zookeeper",
        "high-availability.zookeeper.quorum": f"{HOST}:{ports[port_key('zookeeper', 'client')]}",
        "high-availability.zookeeper.path.root": "/flink",
        "high-availability.cluster-id": "/fanfare",
        "high-availability.storageDir": (folder / "ha").as_uri(),
        "high-availability.jobmanager.port": str(ports[port_key("flink-jobmanager", "rpc")]),
        "high-availability.zookeeper.client.session-timeout": _ms(ZOOKEEPER_SESSION_TIMEOUT),
        "heartbeat.interval": _ms(HEARTBEAT_INTERVAL),
        "heartbeat.timeout": _ms(HEARTBEAT_TIMEOUT),
        "heartbeat.rpc-failure-threshold": HEARTBEATS_UNREACHABLE,
        "restart-strategy.type": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": 2_147_483_647,
        "restart-strategy.fixed-delay.delay": _ms(RESTART_DELAY),
        "taskmanager.host": HOST,
        "taskmanager.bind-host": HOST,
        "taskmanager.numberOfTaskSlots": 1,
        "taskmanager.cpu.cores": 1.0,
        "taskmanager.memory.framework.heap.size": f"{FRAMEWORK_HEAP}m",
        "taskmanager.memory.task.heap.size": f"{TASKMANAGER.heap - FRAMEWORK_HEAP}m",
        "taskmanager.memory.framework.off-heap.size": f"{FRAMEWORK_OFF_HEAP}m",
        "taskmanager.memory.task.off-heap.size": f"{TASK_OFF_HEAP}m",
        "taskmanager.memory.network.min": f"{NETWORK}m",
        "taskmanager.memory.network.max": f"{NETWORK}m",
        "taskmanager.memory.managed.size": f"{TASKMANAGER.managed}m",
        "taskmanager.memory.jvm-metaspace.size": f"{TASKMANAGER.metaspace}m",
        "taskmanager.memory.jvm-overhead.min": f"{TASKMANAGER.overhead}m",
        "taskmanager.memory.jvm-overhead.max": f"{TASKMANAGER.overhead}m",
        "taskmanager.slot.timeout": "10 s",
        "state.backend.type": "rocksdb",
        "execution.checkpointing.incremental": True,
        "execution.checkpointing.interval": _ms(CHECKPOINT_INTERVAL),
        "execution.checkpointing.mode": "EXACTLY_ONCE",
        "execution.checkpointing.dir": (folder / "checkpoints").as_uri(),
        "execution.checkpointing.savepoint-dir": (folder / "savepoints").as_uri(),
        "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
        "execution.checkpointing.num-retained": 2,
        "python.execution-mode": "thread",
        "python.executable": sys.executable,
        "python.client.executable": sys.executable,
        "env.java.opts.all": " ".join(java_module_options()),
        # Messages between a JVM and four others wake no more threads than there is work for.
        "pekko.fork-join-executor.parallelism-min": 2,
        "pekko.fork-join-executor.parallelism-max": 4,
        "pekko.remote-fork-join-executor.parallelism-min": 1,
        "pekko.remote-fork-join-executor.parallelism-max": 2,
        "web.refresh-interval": 3000,
    }


# As in the config.yaml of the pip package, which Flink's scripts would hand to each JVM.
_EXPORTS = (
    "java.rmi/sun.rmi.registry",
    "jdk.compiler/com.sun.tools.javac.api",
    "jdk.compiler/com.sun.tools.javac.file",
    "jdk.compiler/com.sun.tools.javac.parser",
    "jdk.compiler/com.sun.tools.javac.tree",
    "jdk.compiler/com.sun.tools.javac.util",
    "java.security.jgss/sun.security.krb5",
)
_OPENS = (
    "lang",
    "net",
    "io",
    "nio",
    "lang.reflect",
    "text",
    "time",
    "util",
    "util.concurrent",
    "util.concurrent.atomic",
    "util.concurrent.locks",
)


def java_module_options() -> tuple[str, ...]:
    """The openings into the JDK that Flink needs on Java 17."""
    return (
        "-XX:+IgnoreUnrecognizedVMOptions",
        *(f"--add-exports={package}=ALL-UNNAMED" for package in _EXPORTS),
        *(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPENS),
        "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    )


def prepare(home: Home, tools: Tools, ports: Mapping[str, int]) -> None:
    """Write conf/ and lib/ afresh. The files of jobs (checkpoints, ha) are left alone."""
    for name in ("conf", "lib", "checkpoints", "savepoints", "ha", "tmp", "plugins"):
        (home.flink / name).mkdir(parents=True, exist_ok=True)
    conf = home.flink / "conf"
    with (conf / ".config.yaml").open("w", encoding="utf-8") as handle:
        YAML().dump(settings(home, ports), handle)
    (conf / ".config.yaml").replace(conf / "config.yaml")
    replace_file(conf / "log4j.properties", LOG4J)
    replace_file(conf / "log4j-cli.properties", LOG4J_CLIENT)
    _link_jars(home.flink / "lib", tools)


def _link_jars(lib: Path, tools: Tools) -> None:
    # flink-python belongs in lib: from a job's own class loader its native library loads once
    # a JVM, and the second thread-mode job fails.
    jars = [
        *(tools.pyflink / "lib").glob("*.jar"),
        *(tools.pyflink / "opt").glob("flink-python-*.jar"),
        *tools.flink_jars.glob("*.jar"),
    ]
    if not any(jar.name.startswith("flink-dist") for jar in jars):
        raise StackFailed(
            f"no flink-dist jar in {tools.pyflink / 'lib'}; reinstall it with "
            "`pip install --force-reinstall apache-flink-libraries==2.2.1`"
        )
    for old in lib.iterdir():
        old.unlink()
    for jar in jars:
        (lib / jar.name).symlink_to(jar)


def process_environment(home: Home, tools: Tools) -> dict[str, str]:
    """What Flink's own scripts would export before a JVM starts."""
    return {
        "JAVA_HOME": str(tools.java_home),
        "FLINK_HOME": str(home.flink),
        "FLINK_CONF_DIR": str(home.flink / "conf"),
        "FLINK_LIB_DIR": str(home.flink / "lib"),
        "FLINK_OPT_DIR": str(tools.pyflink / "opt"),
        "FLINK_PLUGINS_DIR": str(home.flink / "plugins"),
        "FLINK_LOG_DIR": str(home.logs),
        # The interpreter inside a TaskManager finds its packages by the `python3` that is first on
        # the path, whatever python.executable says: without this a virtual environment's are lost.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        # glibc's arenas otherwise grow with every thread that RocksDB starts.
        "MALLOC_ARENA_MAX": "2",
    }


LEAN_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData")
"""For every JVM here. What the second compiler costs at each start it does not earn back: the work
of a TaskManager is done in Python. The counters for `jstat` are written 20 times a second."""


def java_command(
    home: Home, tools: Tools, main_class: str, memory: Memory, log: Path, *arguments: str
) -> tuple[str, ...]:
    """The command line of one of Flink's JVMs."""
    return (
        tools.java,
        *memory.java_options(),
        *LEAN_JVM,
        "-XX:+ExitOnOutOfMemoryError",
        # Its timers tick every 10 ms otherwise, which is most of what an idle JVM costs.
        "-Dpekko.scheduler.tick-duration=100ms",
        *java_module_options(),
        f"-Dlog.file={log}",
        f"-Dlog4j.configurationFile={(home.flink / 'conf' / 'log4j.properties').as_uri()}",
        "-cp",
        f"{home.flink / 'lib'}/*",
        main_class,
        *arguments,
    )
