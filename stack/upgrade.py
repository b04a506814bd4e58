"""New code into running jobs: stop behind savepoints, restart TaskManagers, go on.

A TaskManager's interpreter lives as long as its JVM and keeps the modules that it has imported, so
the TaskManagers are restarted between. What was stopped is written down first: an upgrade that was
broken off, or whose new code was not accepted, is gone on with by calling it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from schemas.errors import StackFailed
from stack.flink_jobs import (
    cancel,
    checkpoints,
    running_jobs,
    stop_with_savepoint,
    submit,
    tasks_running,
    wait_checkpoint,
    wait_running,
)
from stack.jobs import (
    JOBS,
    JobNote,
    broken_off_upgrade,
    remember,
    remember_running,
    remembered,
    state_to_go_on_from,
)
from stack.layout import Home, processes, replace_file
from stack.layouts import note_layouts, require_readable
from stack.process import end

Progress = Callable[[str], None]
_RESTART = timedelta(seconds=60)


def upgrade(
    home: Home, progress: Progress = lambda line: None, parallelism: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Stop the jobs behind savepoints, restart TaskManagers, submit what is installed now.

    ``parallelism`` by job name rescales; where it says nothing, a job keeps what it has.
    Returns the new Flink job ids.

    Raises:
        StackFailed: this version can't read what is in the state (nothing is stopped then), a job
            was not stopped, or its new code was not accepted or made no checkpoint. Savepoints are
            kept; calling again goes on from them.
    """
    require_readable(home)
    stopped = _stop(home, progress)
    if not stopped:
        raise StackFailed("no job runs, and no upgrade was broken off: `fanfare jobs start`")
    _restart_taskmanagers(home, progress)
    wanted = parallelism or {}
    notes = remembered(home)

    def resume(name: str) -> str | StackFailed:
        try:
            return go_on(name)
        except StackFailed as error:
            return error

    def go_on(name: str) -> str:
        job = JOBS[name]
        wide = wanted.get(name) or (notes[name].parallelism if name in notes else None) or 1
        state = stopped[name]
        job_id = submit(home, job.script, parallelism=wide, savepoint=state, env=job.variables)
        remember(home, name, JobNote(job_id, state, wide))
        wait_running(home, job_id)
        wait_checkpoint(home, job_id)  # until then its savepoint is all that there is
        progress(f"job {name} goes on")
        return job_id

    with ThreadPoolExecutor(max_workers=len(stopped)) as pool:
        found = dict(zip(stopped, pool.map(resume, stopped), strict=True))
    done = {name: job_id for name, job_id in found.items() if isinstance(job_id, str)}
    left = {name: state for name, state in stopped.items() if name not in done}
    if done:
        note_layouts(home)
    if left:
        _note(home, left)
        reasons = "\n".join(str(found[name]) for name in left)
        raise StackFailed(
            f"{reasons}\nThe savepoints are kept ({broken_off_upgrade(home)}). Mend the code and "
            "call `fanfare upgrade` again: every run goes on where it was"
        )
    broken_off_upgrade(home).unlink()
    return done


def _note(home: Home, stopped: Mapping[str, str]) -> None:
    replace_file(broken_off_upgrade(home), json.dumps(stopped))


def _stop(home: Home, progress: Progress) -> dict[str, str]:
    """The savepoints of all stopped jobs, those of a broken-off upgrade included."""
    notes = broken_off_upgrade(home)
    stopped: dict[str, str] = json.loads(notes.read_text()) if notes.exists() else {}
    running = {job.name: job.id for job in running_jobs(home)}
    for name in tuple(stopped):
        # Submitted by an upgrade that was broken off: it counts once it has a checkpoint.
        job_id = running.get(JOBS[name].name)
        if job_id is None:
            continue
        if checkpoints(home, job_id).completed:
            del stopped[name]
        else:
            cancel(home, job_id)
            del running[JOBS[name].name]

    for name, job in JOBS.items():
        if job.name in running:
            remember_running(home, name, running[job.name])

    def stop(name: str) -> None:
        job_id = running[JOBS[name].name]
        try:
            stopped[name] = stop_with_savepoint(home, job_id)
        except StackFailed:
            if tasks_running(home, job_id):
                raise
            # It fails over and over, and the new code may be what mends it.
            cancel(home, job_id)
            state = state_to_go_on_from(home, name)
            if state is None:
                raise
            stopped[name] = state
        _note(home, stopped)
        progress(f"job {name} is stopped, its state is in {stopped[name]}")

    # Delivery last: what the others still emit is taken in before it stops.
    for name in ("webhook-ingest", "campaigns", "delivery", "delivery-critical"):
        if JOBS[name].name in running and name not in stopped:
            stop(name)
    return stopped


def _restart_taskmanagers(home: Home, progress: Progress) -> None:
    before = {
        name: info for name, info in processes(home).items() if name.startswith("flink-taskmanager")
    }
    left = end([info.identity for info in before.values() if info.identity is not None])
    if left:
        raise StackFailed(f"TaskManagers did not end: pids {', '.join(str(i.pid) for i in left)}")
    deadline = time.monotonic() + _RESTART.total_seconds()
    while time.monotonic() < deadline:
        now = processes(home)
        if all(
            now[name].pid not in (None, info.pid) and now[name].state.value == "ready"
            for name, info in before.items()
        ):
            progress(f"{len(before)} TaskManagers are restarted")
            return
        time.sleep(0.1)
    raise StackFailed(f"the TaskManagers are not back after {_RESTART}; see `fanfare status`")
