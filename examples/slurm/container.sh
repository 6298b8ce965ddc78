# shellcheck shell=bash
# From CONTAINER, CONTAINER_RUNTIME and MOUNTS of site.env to the words before the ranks' Python. Sourced by the scripts;
# only the step runs in the container, the job's keeper beside it, for srun and scontrol are not inside.
# shellcheck disable=SC2034  # the scripts use what is set here
srun_flags=${SRUN_FLAGS:-} inside=
if [[ -n $CONTAINER ]]; then
  case $CONTAINER_RUNTIME in
    pyxis) srun_flags+=" --container-image=$CONTAINER --container-mounts=$MOUNTS --container-workdir=$PROJECT" ;;
    apptainer) inside="apptainer exec --nv --bind $MOUNTS --pwd $PROJECT $CONTAINER" ;;
    *) echo "error: CONTAINER_RUNTIME: '$CONTAINER_RUNTIME' is neither pyxis nor apptainer" >&2; exit 2 ;;
  esac
fi
