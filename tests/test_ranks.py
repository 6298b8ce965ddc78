import pytest

from megachameleon.ranks import Place, own_place

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "20123"}
STEP = {"SLURM_STEP_ID": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({**TORCHRUN, **MASTER}, Place(rank=5, world_size=8, local_rank=1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({**STEP, **MASTER}, Place(rank=2, world_size=4, local_rank=1)),
        ({**STEP, **TORCHRUN, **MASTER}, Place(rank=5, world_size=8, local_rank=1)),
        # A batch shell, an interactive shell and a step of one task are single processes, whatever SLURM_NTASKS says.
        ({**STEP, "SLURM_STEP_ID": ""}, Place()),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, Place()),
        ({**STEP, "SLURM_STEP_ID": "batch"}, Place()),
        ({**STEP, "SLURM_STEP_ID": "4294967291"}, Place()),
        ({**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
    ],
)
def test_explicit_wins_then_a_step_then_one_process(environment, place):
    assert own_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: missing; set RANK, WORLD_SIZE and LOCAL_RANK, or none"),
        ({"WORLD_SIZE": "2"}, "RANK: missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "LOCAL_RANK: missing"),
        ({**TORCHRUN, "RANK": "8", **MASTER}, "RANK: 8 is not below WORLD_SIZE=8"),
        ({**TORCHRUN, "WORLD_SIZE": "0", **MASTER}, "WORLD_SIZE: '0' must be a whole number, 1 or more"),
        ({**TORCHRUN, "LOCAL_RANK": "-1", **MASTER}, "LOCAL_RANK: '-1' must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "20123"}, "MASTER_ADDR: missing, though there are 8 processes"),
        ({**STEP, "MASTER_ADDR": "node1"}, "MASTER_PORT: missing, though there are 4 processes"),
        ({**STEP, **MASTER, "SLURM_PROCID": "4"}, "SLURM_NTASKS: 4 does not fit"),
        ({**STEP, **MASTER, "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_NTASKS: 4 does not fit SLURM_STEP_NUM_TASKS=8"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", **MASTER}, "SLURM_PROCID: missing"),
    ],
)
def test_contradictions_are_one_line(environment, message):
    with pytest.raises(ValueError, match=message) as error:
        own_place(environment)
    assert "\n" not in str(error.value)
