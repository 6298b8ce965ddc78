"""Whether a job goes on: after what, how often, and when a person is called."""

import pytest

from megachameleon.launching.attempts import Attempt, decide, newest_step, read_attempts, write_attempts
from megachameleon.launching.job import digest, is_done, run_folder
from megachameleon.launching.slurm import Job, master_port, replaced_dependency


def attempt(status, before, after, submission="7", line="said"):
    return Attempt(
        submission=submission,
        job="7.0",
        status=status,
        line=line,
        before=before,
        after=after,
        hosts=["a"],
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("attempts", "action"),
    [
        ([attempt(0, -1, 20)], "finish"),
        ([attempt(75, -1, 5)], "again"),
        ([attempt(1, -1, 5)], "again"),  # failed, but further on
        ([attempt(1, -1, -1)], "again"),
        ([attempt(1, 5, 5), attempt(1, 5, 5)], "alert"),
        ([attempt(75, 5, 5), attempt(75, 5, 5)], "alert"),
        ([attempt(1, 5, 5), attempt(1, 5, 9), attempt(1, 9, 9)], "again"),
        ([attempt(2, -1, 5)], "alert"),  # bad input stays bad
        ([attempt(75, step, step + 1) for step in range(4)], "alert"),  # the limit in all
        ([attempt(75, step, step + 1) for step in range(3)], "again"),
        ([attempt(1, 5, 5, "3"), attempt(1, 5, 5)], "again"),  # a person has submitted it anew
        ([attempt(75, step, step + 1, "3") for step in range(9)] + [attempt(75, 9, 10)], "again"),
    ],
)
def test_a_job_goes_on_while_it_leads_somewhere(attempts, action):
    decision = decide(attempts, max_attempts=4, max_idle=2)
    assert decision.action == action
    assert action == "finish" or "said" in decision.reason


def test_a_job_that_a_person_stopped_by_the_file_rests():
    asked = attempt(75, 3, 9, line="was stopped by the file 'stop' (maintenance)")
    assert decide([asked], max_attempts=4, max_idle=2).action == "rest"
    assert decide([attempt(75, 3, 9, line="was stopped by SIGUSR1")], max_attempts=4, max_idle=2).action == "again"


def test_attempts_are_kept(tmp_path):
    assert read_attempts(tmp_path) == []
    write_attempts(tmp_path, [attempt(75, -1, 5), attempt(0, 5, 20)])
    assert [one.after for one in read_attempts(tmp_path)] == [5, 20]
    (tmp_path / "attempts.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not a list of attempts"):
        read_attempts(tmp_path)


def test_progress_is_a_complete_checkpoint(tmp_path):
    assert newest_step(tmp_path) == -1
    for name, file in (
        ("step_00000010", "manifest.json"),
        ("step_00000020", "other"),
        ("step_00000030.tmp", "manifest.json"),
    ):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / file).touch()
    assert newest_step(tmp_path) == 10


def test_the_run_s_folder_is_read_from_the_configuration_or_the_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  output_dir: no\noutput_dir: 'runs/a'  # here\n")
    assert str(run_folder([str(path)])) == "runs/a"
    assert str(run_folder([str(path), "training.seed=1", "output_dir=runs/b"])) == "runs/b"
    with pytest.raises(ValueError, match="no output_dir"):
        run_folder(["debug"])


def test_done_holds_for_the_same_configuration_only(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {num_steps: 5}\n")
    (tmp_path / "DONE").write_text(f'{{"another": 3, "{digest([str(path)])}": 5}}')
    assert is_done(tmp_path, [str(path)])
    assert not is_done(tmp_path, [str(path), "training.num_steps=9"])
    path.write_text("training: {num_steps: 9}\n")
    assert not is_done(tmp_path, [str(path)])


def test_neighbouring_jobs_and_lives_meet_at_different_ports():
    ports = {master_port(Job(id=str(job), life=life, hosts=["a"])) for job in range(5000, 6000) for life in range(7)}
    assert len(ports) == 7000
    assert min(ports) >= 20_000 and max(ports) < 30_000


@pytest.mark.parametrize(
    ("dependency", "changed"),
    [
        ("afterok:12(unfulfilled)", "afterok:99"),
        ("afterok:12(unfulfilled),afternotok:123(unfulfilled)", "afterok:99,afternotok:123"),
        ("afterok:5:12", "afterok:5:99"),
        ("afterok:123", None),
        ("(null)", None),
        ("singleton(unfulfilled)", None),
    ],
)
def test_what_waits_for_a_job_waits_for_its_follow_up(dependency, changed):
    assert replaced_dependency(dependency, "12", "99") == changed
