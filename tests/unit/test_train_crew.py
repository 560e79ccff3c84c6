"""Which loss would these tests catch? A dead or stuck worker that nobody sees, a process that outlives its run, a state
that is not saved on SIGTERM, and a run that starts again and again without getting anywhere.

All processes, signals and kills are real. The functions at the top are what the workers run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ferry.core.errors import ConfigError, LayoutError
from ferry.verbs.train.crew.board import PHASES, Beat, Board
from ferry.verbs.train.crew.channel import Channel
from ferry.verbs.train.crew.events import EventLog
from ferry.verbs.train.crew.launch import launch
from ferry.verbs.train.crew.patience import Tally, failure_of_exit, first_cause, limit_s
from ferry.verbs.train.crew.seat import STOPPED, Seat, cluster_from_environment, seat_from_environment
from ferry.verbs.train.crew.spec import Cluster, CrewDefect, CrewSpec, Failure, Outcome, Restart, error_of

TRAINING = PHASES.index("training")


# What workers run


def return_place(seat: Seat, payload: Any) -> Any:
    sys.stdout.write(f"hello from {seat.rank}\n")
    return {"rank": seat.rank, "world": seat.world_size, "attempt": seat.attempt, "payload": payload}


def wait_for_the_end(seat: Seat, payload: Any) -> Any:
    """In generation 0 rank 1 gets to step 5 and says so; everybody waits. Later generations return at once."""
    if seat.generation:
        return {"generation": seat.generation, "attempt": seat.attempt}
    for step in range(1, 6):
        seat.beat(step)
    if seat.rank == 1:
        seat.event("ready", pid=os.getpid())
    return threading.Event().wait()


def leave_without_a_word(seat: Seat, payload: Any) -> Any:
    if seat.generation == 0:
        os._exit(payload)
    return "done"


def get_stuck(seat: Seat, payload: Any) -> Any:
    """Rank 1 does four quick steps and gets stuck; rank 0 waits for it, as in a collective."""
    if seat.generation:
        return "done"
    for step in range(1, 5):
        seat.beat(step)
    if seat.rank == 0:
        return threading.Event().wait()
    if payload == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    return the_place_where_it_is_stuck()


def the_place_where_it_is_stuck() -> Any:
    return threading.Event().wait()


def stop_quietly_while_loading(seat: Seat, payload: Any) -> Any:
    seat.beat(0, "loading")
    return "done" if seat.generation else threading.Event().wait()


def fail_at_step_seven(seat: Seat, payload: Any) -> Any:
    for step in range(1, 8):
        seat.beat(step)
    if seat.generation < (payload or 0):
        seat.event("saved", step=seat.generation + 1)
    raise RuntimeError("boom\nat the second line")


def make_a_mistake(seat: Seat, payload: Any) -> Any:
    if seat.rank == 1:
        raise LayoutError("tp=3 does not divide 8", code="layout.tp", repair="use 1, 2, 4 or 8")
    return threading.Event().wait()


def count_until_stopped(seat: Seat, payload: Any) -> Any:
    """Step until the wish to stop is seen; then save into a file, which is slow if the payload says so."""
    step = 0
    while not seat.stop_requested():
        step += 1
        seat.beat(step)
        if step == 3:
            seat.event("ready", pid=os.getpid(), supervisor=os.getppid())
        time.sleep(0.001)
    Path(payload, f"saved-{seat.rank}").write_text(str(step))
    return STOPPED


def never_stop(seat: Seat, payload: Any) -> Any:
    seat.event("ready", pid=os.getpid(), supervisor=os.getppid())
    until(seat.stop_requested)
    if seat.rank == 0:
        seat.event("asked", supervisor=os.getppid())
    return threading.Event().wait()


def start_a_child_and_wait(seat: Seat, payload: Any) -> Any:
    if seat.generation:
        return "done"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seat.event("ready", pid=os.getpid(), child=child.pid)
    return child.wait()


def add_up(seat: Seat, payload: Any) -> Any:
    """Each rank adds its number over gloo; in generation 0 the rank that the payload names waits to be killed."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=seat.store(), rank=seat.rank, world_size=seat.world_size)
    total = torch.tensor([float(seat.rank + 1)])
    dist.all_reduce(total)
    seat.beat(1)
    if seat.generation == 0 and payload == seat.rank:
        seat.event("ready", pid=os.getpid())
        threading.Event().wait()
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"total": total.item(), "generation": seat.generation}


def meet_and_wait(seat: Seat, payload: Any) -> Any:
    """Meet the other node; in generation 0 wait for the end of node 1."""
    store = seat.store()
    assert store is not None
    store.add("here", 1)
    while store.add("here", 0) < seat.world_size:
        time.sleep(0.01)
    if seat.generation == 0:
        if seat.rank == 1:
            seat.event("ready", supervisor=os.getppid())
        threading.Event().wait()
    return "done"


# What the tests share


class Story(list[dict[str, Any]]):
    """The events of a run; an action may be taken at the first of a name."""

    def __init__(self, name: str = "", action: Callable[[dict[str, Any]], object] | None = None) -> None:
        self.name = name
        self.action = action
        self.acted_s = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)
        if event["event"] == self.name and self.action is not None:
            action, self.action = self.action, None
            self.acted_s = time.time()
            action(event)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self if event["event"] == name]


@pytest.fixture(autouse=True)
def _workers_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def crew(output: Path, entry: Callable[..., Any], payload: Any = None, **settings: Any) -> CrewSpec:
    settings = {"num_workers": 2, "quiet_limit_s": 120, "hang_slack_s": 60, **settings}
    return CrewSpec(entry=f"test_train_crew:{entry.__name__}", output=output, payload=payload, **settings)


def kill(event: dict[str, Any]) -> None:
    os.kill(event["pid"], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()


# Working


def test_every_worker_has_its_place_and_rank_0_brings_the_result(tmp_path: Path) -> None:
    story = Story()
    outcome = launch(crew(tmp_path, return_place, {"a": [1, None]}, num_workers=3), story)
    assert outcome.status == "done"
    assert (outcome.failure, outcome.restarts) == (None, ())
    attempt = outcome.result.pop("attempt")
    assert outcome.result == {"rank": 0, "world": 3, "payload": {"a": [1, None]}}
    assert attempt.endswith("-0")
    assert [(tmp_path / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(3)] == [
        f"hello from {rank}\n" for rank in range(3)
    ]
    assert [event["event"] for event in story] == ["started"]
    assert [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()] == list(story)


def test_two_workers_meet_over_gloo_without_a_port(tmp_path: Path) -> None:
    story = Story()
    outcome = launch(crew(tmp_path, add_up, preload=("torch", "torch.distributed")), story)
    assert outcome.status == "done", outcome.failure
    assert outcome.result == {"total": 6.0, "generation": 0}
    assert story.of("choice") == [], "importing torch has started threads, so the fork is not a clean one"


def test_a_module_that_cannot_be_imported_is_a_failure_and_not_a_silence(tmp_path: Path) -> None:
    outcome = launch(crew(tmp_path, return_place, preload=("no_such_module_at_all",)), Story())
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert "no_such_module_at_all" in outcome.failure.message


# Deaths


def test_a_worker_killed_with_9_is_seen_and_the_run_goes_on(tmp_path: Path) -> None:
    story = Story("ready", kill)
    outcome = launch(crew(tmp_path, wait_for_the_end), story)
    assert outcome.status == "done"
    assert outcome.result["generation"] == 1
    assert outcome.result["attempt"].endswith("-1")
    (restart,) = outcome.restarts
    assert (restart.generation, restart.rank, restart.step) == (0, 1, 5)
    assert "signal 9" in restart.cause
    assert restart.detected_s <= 0.5
    (event,) = story.of("restart")
    assert event["generation"] == 1
    assert event["ts"] - story.acted_s < 5
    first, second = story.of("started")
    assert set(first["workers"].values()).isdisjoint(second["workers"].values())
    assert not any(is_alive(pid) for pid in first["workers"].values())


def test_an_exit_without_a_report_is_a_failure_even_with_status_0(tmp_path: Path) -> None:
    for status in (7, 0):
        outcome = launch(crew(tmp_path / str(status), leave_without_a_word, status), Story())
        assert outcome.status == "done"
        assert f"exit status {status} and without a report" in outcome.restarts[0].cause


def test_what_a_worker_has_started_dies_with_it(tmp_path: Path) -> None:
    story = Story("ready", kill)
    outcome = launch(crew(tmp_path, start_a_child_and_wait, num_workers=1), story)
    assert outcome.status == "done"
    assert until(lambda: not is_alive(story.of("ready")[0]["child"]))


def test_a_worker_killed_inside_a_collective_is_named_and_not_its_echo(tmp_path: Path) -> None:
    story = Story("ready", kill)
    outcome = launch(crew(tmp_path, add_up, 1, preload=("torch", "torch.distributed")), story)
    assert outcome.status == "done", outcome.failure
    assert outcome.result == {"total": 6.0, "generation": 1}
    assert outcome.restarts[0].rank == 1
    assert "signal 9" in outcome.restarts[0].cause


def test_without_restart_the_first_failure_is_the_end(tmp_path: Path) -> None:
    outcome = launch(crew(tmp_path, wait_for_the_end, restart=False), Story("ready", kill))
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.code == "train.worker-killed"
    assert "out of memory?" in outcome.failure.repair


# Hangs


@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_a_stuck_worker_is_found_with_its_stack_and_the_run_goes_on(tmp_path: Path, how: str) -> None:
    story = Story()
    outcome = launch(crew(tmp_path, get_stuck, how, hang_slack_s=1), story)
    assert outcome.status == "done"
    (hang,) = story.of("hang")
    assert (hang["step"], hang["phase"]) == (4, "training")
    assert 1 <= hang["silence_s"] < 10
    assert hang["limit_s"] == pytest.approx(1, abs=0.5)
    stuck = hang["stacks"]["1"]
    if how == "asleep":
        assert "the_place_where_it_is_stuck" in stuck["stack"]
    else:
        assert hang["rank"] == 1
        assert stuck["stack"] == ""
        assert stuck["state"].startswith("T")
        assert "get_stuck" in hang["stacks"]["0"]["stack"]
    assert "made no progress" in outcome.restarts[0].cause


def test_loading_may_be_silent_for_longer_but_not_for_ever(tmp_path: Path) -> None:
    story = Story()
    outcome = launch(crew(tmp_path, stop_quietly_while_loading, hang_slack_s=0, quiet_limit_s=2), story)
    assert outcome.status == "done"
    assert story.of("hang")[0]["phase"] == "loading"
    assert story.of("hang")[0]["limit_s"] == 2


def test_the_limit_of_a_step_follows_the_median_once_three_steps_are_known(tmp_path: Path) -> None:
    spec = CrewSpec("a:b", tmp_path)
    two_s = 2_000_000_000
    assert limit_s(Beat(0, 9, TRAINING, two_s, 3), spec) == 3 * 2 + 10
    assert limit_s(Beat(0, 9, TRAINING, two_s, 2), spec) == spec.quiet_limit_s
    assert limit_s(Beat(0, 9, PHASES.index("saving"), two_s, 30), spec) == spec.quiet_limit_s


def test_the_same_step_again_is_no_progress_in_training_and_is_in_validation() -> None:
    board = Board(1)
    seat = Seat(board=board)
    seat.beat(1)
    before = board.read(0)
    seat.beat(1)
    assert board.read(0) == before
    seat.beat(1, "validating")
    before = board.read(0)
    seat.beat(1, "validating")
    assert board.read(0).progress_ns > before.progress_ns


def test_a_step_lasts_until_the_next_one_or_the_saving_that_follows_it() -> None:
    board = Board(1)
    seat = Seat(board=board)
    for step in (1, 2):
        seat.beat(step)
    seat.beat(2, "saving")
    seat.beat(2, "validating")
    seat.beat(3)
    assert board.read(0).num_steps == 2


# Giving up


def test_a_step_that_fails_three_times_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    story = Story()
    outcome = launch(crew(tmp_path, fail_at_step_seven, num_workers=1), story)
    assert outcome.status == "failed"
    assert [restart.step for restart in outcome.restarts] == [7, 7]
    assert outcome.failure is not None
    assert outcome.failure.code == "train.no-progress"
    assert outcome.failure.message == (
        "step 7 failed 3 times without progress; the last cause: rank 0: RuntimeError: boom at the second line"
    )
    assert "fail_at_step_seven" in outcome.failure.traceback
    assert "fail_at_step_seven" in (tmp_path / "logs" / "rank-00000.log").read_text()
    assert len(story.of("failed")) == 1


def test_new_checkpoints_are_progress_and_are_counted_from_their_events(tmp_path: Path) -> None:
    outcome = launch(crew(tmp_path, fail_at_step_seven, 4, num_workers=1, max_restarts=3), Story())
    assert outcome.failure is not None
    assert outcome.failure.code == "train.no-progress"
    assert len(outcome.restarts) == 4 + 1


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    outcome = launch(crew(tmp_path, make_a_mistake), Story())
    assert (outcome.status, outcome.restarts) == ("failed", ())
    assert outcome.failure is not None
    assert outcome.failure.rank == 1
    error = error_of(outcome.failure)
    assert isinstance(error, LayoutError)
    assert (error.code, str(error)) == ("layout.tp", "tp=3 does not divide 8; use 1, 2, 4 or 8")


def test_the_tally_counts_only_failures_that_got_no_further() -> None:
    def fail(step: int) -> str:
        verdict = tally.verdict(Failure("internal", "boom", step=step))
        return verdict.code if verdict else ""

    tally = Tally(same_step_limit=3, max_restarts=4)
    assert [fail(step) for step in (5, 5, 6, 6)] == ["", "", "", ""]
    tally.saved(4)
    assert [fail(step) for step in (6, 5, 5)] == ["", "", "train.no-progress"]
    tally = Tally(same_step_limit=3, max_restarts=4)
    assert [fail(step) for step in (1, 0, 1, 0, 1)] == ["", "", "", "", "train.too-many-restarts"]


def test_the_first_cause_is_no_broken_connection_and_a_mistake_comes_before_all() -> None:
    echo = Failure("internal", "rank 0: RuntimeError: Connection closed by peer [127.0.0.1]:1", rank=0)
    death = failure_of_exit(1, 3, -signal.SIGSEGV, "logs/rank-00001.log")
    mistake = Failure("train.nan", "loss is NaN", rank=2, exit_status=5)
    assert first_cause([echo, death]) is death
    assert first_cause([echo, death, mistake]) is mistake
    assert first_cause([echo]) is echo


# Stopping


def test_an_exception_in_the_command_stops_the_crew_which_saves_first(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(event: dict[str, Any]) -> None:
        raise Stop

    story = Story("ready", stop)
    with pytest.raises(Stop):
        launch(crew(tmp_path, count_until_stopped, str(tmp_path)), story)
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    (stopped,) = story.of("stopped")
    assert stopped["clean"]
    assert not any(is_alive(pid) for pid in story.of("started")[0]["workers"].values())


@pytest.mark.parametrize("whom", ["supervisor", "pid"])
def test_sigterm_to_the_supervisor_or_a_worker_saves_and_leaves(tmp_path: Path, whom: str) -> None:
    story = Story("ready", lambda event: os.kill(event[whom], signal.SIGTERM))
    outcome = launch(crew(tmp_path, count_until_stopped, str(tmp_path)), story)
    assert (outcome.status, outcome.failure, outcome.result) == ("stopped", None, STOPPED)
    assert (tmp_path / "saved-1").exists()


def test_who_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    story = Story("ready", lambda event: os.kill(event["supervisor"], signal.SIGTERM))
    outcome = launch(crew(tmp_path, never_stop, grace_s=0.3), story)
    assert outcome.status == "stopped"
    assert outcome.failure is not None
    assert outcome.failure.code == "train.killed-while-stopping"


def test_a_second_sigterm_kills_at_once(tmp_path: Path) -> None:
    def stop_again(event: dict[str, Any]) -> None:
        if event["event"] == "asked" or (event["event"] == "ready" and event["rank"] == 0):
            os.kill(event["supervisor"], signal.SIGTERM)

    outcome = launch(crew(tmp_path, never_stop, grace_s=3600), stop_again)
    assert outcome.status == "stopped"
    assert outcome.failure is not None
    assert "a second signal" in outcome.failure.message


def test_nothing_outlives_a_killed_command_and_the_state_is_saved(tmp_path: Path) -> None:
    spec = crew(tmp_path, count_until_stopped, str(tmp_path))
    program = (
        "import json, sys\n"
        "from ferry.verbs.train.crew.launch import launch\n"
        "from ferry.verbs.train.crew.spec import CrewSpec\n"
        "launch(CrewSpec.from_json(json.loads(sys.argv[1])), lambda event: print(json.dumps(event), flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(spec.to_json())], stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        events = iter(map(json.loads, command.stdout))
        ready = next(event for event in events if event["event"] == "ready")
        command.kill()
    pids = [ready["pid"], ready["supervisor"]]
    assert until(lambda: not any(is_alive(pid) for pid in pids))
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_no_worker_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    story = Story("ready", lambda event: os.kill(event["supervisor"], signal.SIGKILL))
    outcome = launch(crew(tmp_path, never_stop), story)
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.code == "train.supervisor-lost"
    assert until(lambda: not any(is_alive(pid) for pid in story.of("started")[0]["workers"].values()))


# Several nodes


def nodes(tmp_path: Path, entry: Callable[..., Any], payload: Any, **settings: Any) -> list[CrewSpec]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"num_workers": 1, "preload": ("torch", "torch.distributed"), **settings}
    return [
        crew(tmp_path, entry, payload, cluster=Cluster(2, node, "127.0.0.1", port), **settings) for node in range(2)
    ]


def test_a_worker_killed_on_node_1_makes_both_nodes_start_anew(tmp_path: Path) -> None:
    stories = [Story(), Story("ready", kill)]
    with ThreadPoolExecutor(2) as both:
        outcomes = list(both.map(launch, nodes(tmp_path, add_up, 1), stories))
    assert [outcome.status for outcome in outcomes] == ["done", "done"], outcomes
    assert [outcome.result for outcome in outcomes] == [{"total": 6.0, "generation": 1}] * 2
    assert [len(outcome.restarts) for outcome in outcomes] == [1, 1]
    assert "signal 9" in outcomes[1].restarts[0].cause
    assert (tmp_path / "events-node-00001.jsonl").exists()


def test_a_mistake_on_node_1_ends_the_run_on_node_0_with_the_same_words(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        outcomes = list(both.map(launch, nodes(tmp_path, make_a_mistake, None), [Story(), Story()]))
    failures = [outcome.failure for outcome in outcomes]
    assert failures[0] is not None
    assert failures[1] is not None
    assert failures[0].message == f"node 1: {failures[1].message}"
    assert [failure.code for failure in failures if failure] == ["layout.tp", "layout.tp"]


@pytest.mark.slow
def test_a_node_that_dies_is_missed_and_one_that_comes_back_is_welcome(tmp_path: Path) -> None:
    def kill_supervisor(event: dict[str, Any]) -> None:
        os.kill(event["supervisor"], signal.SIGKILL)

    for comes_back in (True, False):
        specs = nodes(tmp_path / str(comes_back), meet_and_wait, None, contact_limit_s=30 if comes_back else 2)
        with ThreadPoolExecutor(2) as both:
            first = both.submit(launch, specs[0], Story())
            second = both.submit(launch, specs[1], Story("ready", kill_supervisor)).result()
            assert second.failure is not None
            assert second.failure.code == "train.supervisor-lost"
            if comes_back:
                assert launch(specs[1], Story()).status == "done"
                assert first.result().status == "done", first.result()
                assert first.result().restarts
            else:
                failure = first.result().failure
                assert failure is not None
                assert (failure.code, failure.exit_status) == ("train.node-lost", 7)


# Values and places


def test_outcomes_and_specs_survive_json(tmp_path: Path) -> None:
    spec = CrewSpec("a:b", tmp_path, {"x": 1}, preload=("json",), cluster=Cluster(2, 1, "host", 5))
    assert CrewSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    outcome = Outcome("failed", [1], Failure("a.b", "c", rank=3), (Restart(0, 1, 2, "x", 0.1),))
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_defect_keeps_the_traceback_of_the_worker() -> None:
    error = error_of(Failure("internal", "rank 0: ValueError: x", traceback="Traceback: here"))
    assert isinstance(error, CrewDefect)
    assert "Traceback: here" in str(error)


def test_a_torn_last_line_does_not_spoil_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "saved"}\n{"event": "sa')
    log = EventLog(path)
    log.append({"event": "started"})
    log.close()
    assert path.read_text().splitlines()[-1] == '{"event": "started"}'


def test_a_reader_that_does_not_read_never_holds_up_the_writer() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    for number in range(3000):
        ours.send({"number": number, "text": "x" * 1000})
    received: list[dict[str, Any]] = []
    while len(received) < 3000:
        received += theirs.receive()
        ours.flush()
    assert [message["number"] for message in received] == list(range(3000))
    ours.close()
    theirs.receive()
    assert theirs.is_closed


def test_a_signal_that_tears_a_line_costs_that_line_only() -> None:
    class End(socket.socket):
        """A socket whose first read is interrupted after it has taken some bytes."""

        is_whole = False

        def recv(self, num_bytes: int, flags: int = 0) -> bytes:
            if self.is_whole:
                return super().recv(num_bytes, flags)
            self.is_whole = True
            super().recv(5)
            raise KeyboardInterrupt

    one, other = socket.socketpair()
    ours, theirs = Channel(one), Channel(End(fileno=other.detach()))
    for number in range(3):
        ours.send({"number": number})
    with pytest.raises(KeyboardInterrupt):
        theirs.receive()
    assert theirs.receive() == [{"number": 1}, {"number": 2}]
    ours.send({"number": 3})
    assert theirs.receive() == [{"number": 3}]


def test_a_launcher_gives_a_seat_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    launched |= {"MASTER_ADDR": "host", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2"}
    before = signal.getsignal(signal.SIGTERM)
    try:
        story = Story()
        seat = seat_from_environment(story, launched)
        assert seat is not None
        assert (seat.rank, seat.world_size, seat.local_rank, seat.local_world_size) == (5, 8, 1, 4)
        assert (seat.node_rank, seat.num_nodes, seat.generation, seat.store()) == (1, 2, 2, None)
        seat.beat(1)
        seat.event("saved", step=1)
        assert (story[0]["event"], story[0]["rank"]) == ("saved", 5)
        assert not seat.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(seat.stop_requested)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seat_from_environment(environ={name: launched[name] for name in ("RANK", "WORLD_SIZE")}) is None


def test_the_nodes_come_from_the_environment_and_half_a_cluster_is_refused() -> None:
    assert cluster_from_environment({}) == Cluster()
    named = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
    assert cluster_from_environment(named) == Cluster(2, 1, "host", 7)
    assert cluster_from_environment({f"PET_{name}": value for name, value in named.items()}) == Cluster(2, 1, "host", 7)
    for wrong in ({"NNODES": "2"}, {**named, "NODE_RANK": "2"}, {**named, "NNODES": "two"}):
        with pytest.raises(ConfigError, match=r"NNODES"):
            cluster_from_environment(wrong)
