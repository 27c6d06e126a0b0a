#!/bin/bash
#SBATCH --job-name=tsclust-finalize
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=7630M
#SBATCH --time=04:00:00
#SBATCH --partition=cpu
#SBATCH --account=p-1234
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=finalize-%j.log
#
# Written by `tsclust submit` for a batch system; its job is `finalize`. What the command works on stands in the
# arguments file, not here. It may be stopped at any time: it keeps what is finished, and goes on when it runs again.
set -uo pipefail

readonly folder='/home/ada/it'"'"'s here/.ettm1.jobs'
readonly program=(/opt/venv/bin/python -m tsclust_ooc)
readonly arguments=args-0123456789ab.json
readonly TRY_AGAIN=75 # exit code of tsclust: interrupted after saving progress, or others are at the same work
readonly KILLED_BY_TERM=143
readonly MOST_RESTARTS=50 # a job that never gets anywhere must not come back for ever

cd -- "$folder" || exit 73
# All options were settled when the work was submitted: the environment has no further say.
unset "${!TSCLUST_@}"

child=''      # the command that runs now
asked_to_stop=0
interrupted=0 # by a signal, while waiting for the child

# shellcheck disable=SC2317,SC2329 # the trap below calls it
pass_on() {
    asked_to_stop=1
    interrupted=1
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null
    fi
}
trap pass_on TERM

# Run a command so that signals reach it: bash runs a trap at once during `wait`, but only after a foreground command.
supervise() {
    local status
    if ((asked_to_stop)); then
        return "$TRY_AGAIN"
    fi
    "$@" &
    child=$!
    if ((asked_to_stop)); then
        kill -TERM "$child" 2>/dev/null # it came between the check and the start
    fi
    while true; do
        interrupted=0
        wait "$child"
        status=$?
        ((interrupted)) || break # `wait` ends when a signal comes; the child has not ended yet
    done
    child=''
    if ((asked_to_stop && status == KILLED_BY_TERM)); then
        status=$TRY_AGAIN # ended before tsclust could answer the signal: nothing is broken
    fi
    return "$status"
}

# The command of the arguments file, with further words.
run() {
    supervise "${program[@]}" --args-file "$arguments" "$@"
}

# End this job with a status, or go back into the queue where that is what the status asks for.
finish() {
    local status=$1 restarts
    if ((status != TRY_AGAIN)); then
        exit "$status"
    fi
    if ((!asked_to_stop)); then
        exit "$status" # partitions are missing: waiting does not bring them; the message above says what does
    fi
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
        exit "$status" # scancel or preemption: Slurm is ending the job already, and a requeue would bring it back
    fi
    restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= MOST_RESTARTS)); then
        echo "stopped after $restarts restarts; submit the same work again to go on" >&2
        exit "$status"
    fi
    echo "going back into the queue (restart $((restarts + 1)))" >&2
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "scontrol could not do it; submit the same work again to go on" >&2
    exit "$status" # the state of a requeued job is pending, whatever it ends with
}

run --finalize
finish "$?"
