"""What all jobs ask of Flink. The cluster's own configuration decides the rest."""

from __future__ import annotations

import logging
from datetime import timedelta

from pyflink.common import Configuration
from pyflink.datastream import CheckpointingMode, StreamExecutionEnvironment

from jobs.settings import JobSettings
from schemas.errors import Unavailable
from schemas.pages import SHARDS
from sinks.redis_client import check_durability, connect

log = logging.getLogger(__name__)
_MILLISECOND = timedelta(milliseconds=1)
_PATIENCE = timedelta(seconds=3)


def environment(
    settings: JobSettings, *, max_parallelism: int = SHARDS, exactly_once: bool = True
) -> StreamExecutionEnvironment:
    """An execution environment: thread mode, checkpoints, buffers, parallelism."""
    configuration = Configuration()
    configuration.set_string("python.execution-mode", "thread")
    configuration.set_string("python.metric.enabled", "false")
    # Nothing here waits for watermarks; each source would wake five times a second to tell one.
    configuration.set_string("pipeline.auto-watermark-interval", "0 ms")
    # A shard's people are one sorted range of state, and new people are asked for by the thousand.
    # An index in one piece outgrows a shard of RocksDB's cache at some 1.5 million people in a slot
    # of 160 MB; from then on each look unpacked all of it (4,000 recipients/s instead of 160,000).
    configuration.set_string("state.backend.rocksdb.memory.partitioned-index-filters", "true")
    configuration.set_string("state.backend.rocksdb.use-bloom-filter", "true")
    # For Snappy: deciding 4 million people with state took a tenth less processor time (11.3 s a
    # million for 12.4).
    configuration.set_string("state.backend.rocksdb.compression.per.level", "LZ4_COMPRESSION")
    # Killed processes are no failure of a job, and while they are away its attempts may fail by
    # the dozen; the same failure over and over ends it, loudly. The first attempts come quickly: a
    # process that died is mostly back at once. Later ones leave a server time to come back.
    strategy = "restart-strategy.exponential-delay"
    healthy = f"{round(settings.failure_interval.total_seconds())} s"
    configuration.set_string("restart-strategy.type", "exponential-delay")
    configuration.set_string(f"{strategy}.initial-backoff", "500 ms")
    configuration.set_string(f"{strategy}.max-backoff", "10 s")
    configuration.set_string(f"{strategy}.backoff-multiplier", "1.5")
    configuration.set_string(f"{strategy}.reset-backoff-threshold", healthy)
    configuration.set_string(f"{strategy}.attempts-before-reset-backoff", str(settings.failures))
    # Given to get_execution_environment it would replace what the client set (python.executable).
    environment = StreamExecutionEnvironment.get_execution_environment()
    environment.configure(configuration)
    environment.set_parallelism(settings.parallelism)
    environment.set_max_parallelism(max_parallelism)
    environment.set_buffer_timeout(int(settings.gathers_for() / _MILLISECOND))
    mode = CheckpointingMode.EXACTLY_ONCE if exactly_once else CheckpointingMode.AT_LEAST_ONCE
    environment.enable_checkpointing(int(settings.checkpoint_interval / _MILLISECOND), mode)
    checkpoints = environment.get_checkpoint_config()
    checkpoints.set_min_pause_between_checkpoints(100)
    checkpoints.set_tolerable_checkpoint_failure_number(1000)
    return environment


def require_durable_redis(url: str) -> None:
    """Refuse to submit a job to a Redis that may forget what it answered.

    A Redis that does not answer now is no reason: the job waits for it.

    Raises:
        FanfareError: naming each setting and its remedy.
    """
    try:
        check_durability(connect(url, _PATIENCE))
    except Unavailable as error:
        log.warning("the settings of Redis could not be checked: %s", error)
