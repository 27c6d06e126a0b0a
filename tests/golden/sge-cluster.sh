#!/bin/bash
#$ -N tsclust-cluster
#$ -S /bin/bash
#$ -cwd
#$ -j y
#$ -V
#$ -r y
#$ -notify
#$ -pe smp 4
#$ -l h_vmem=1908M
#$ -l h_rt=04:00:00
#$ -q cpu
#$ -P p-1234
#$ --later=1
#$ -x y
#
# Written by `tsclust submit` for a batch system; its job is `cluster`. What the command works on stands in the
# arguments file, not here. It may be stopped at any time: it keeps what is finished, and goes on when it runs again.
set -uo pipefail

readonly folder='/home/ada/it'"'"'s here/.ettm1.jobs'
readonly program=(/opt/venv/bin/python -m tsclust_ooc)
readonly arguments=args-0123456789ab.json
readonly TRY_AGAIN=75 # exit code of tsclust: interrupted after saving progress, or others are at the same work
readonly KILLED_BY_TERM=143
readonly MOST_RESTARTS=50 # a job that never gets anywhere must not come back for ever
readonly STOP_AFTER=14100 # seconds; the batch system itself gives too little notice of the time limit

cd -- "$folder" || exit 73
readonly job=$JOB_ID
exec >>"cluster-$job.log" 2>&1
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
trap pass_on TERM USR1 USR2

# Run a command so that signals reach it: bash runs a trap at once during `wait`, but only after a foreground command.
supervise() {
    local status
    if ((asked_to_stop)); then
        return "$TRY_AGAIN"
    fi
    # The notices go to every process of the job and would end the command on the spot; SIGTERM is what it knows.
    (trap '' USR1 USR2 && exec "$@") &
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
    if ((SECONDS >= STOP_AFTER)); then
        asked_to_stop=1
    fi
    if ((asked_to_stop && status == KILLED_BY_TERM)); then
        status=$TRY_AGAIN # ended before tsclust could answer the signal: nothing is broken
    fi
    return "$status"
}

# The command of the arguments file.
run() {
    local seconds=$((STOP_AFTER - SECONDS))
    if ((seconds <= 0)); then
        asked_to_stop=1
        return "$TRY_AGAIN"
    fi
    supervise timeout --foreground --preserve-status "$seconds" "${program[@]}" --args-file "$arguments"
}

# End this job with a status, or go back into the queue where that is what the status asks for.
finish() {
    local status=$1 restarts
    if ((status != TRY_AGAIN)); then
        exit "$status"
    fi
    # Counted here: this batch system does not tell a job how often it was started.
    local counter="$folder/restarts-$job"
    echo "$(date) stopped with work left" >>"$counter"
    restarts=$(($(wc -l <"$counter") - 1))
    if ((restarts >= MOST_RESTARTS)); then
        echo "stopped after $restarts restarts; submit the same work again to go on" >&2
        exit "$status"
    fi
    echo "going back into the queue (restart $((restarts + 1)))" >&2
    exit 99 # SGE takes this as: put the job back into the queue
}

run
finish "$?"
