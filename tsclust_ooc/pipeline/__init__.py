"""The toolkit's verbs, one a command; the only place where data and compute meet.

    looking         inspect (examining: --deep, estimating: what comes)
    progressing     status                       arrays        consolidate --init, --partition, --finalize
    consolidating   consolidate                  verifying     verify
    clustering      cluster, predict, evaluate   distancing    distances
    submitting      submit                       flowing       run (its steps and settings beside it)

`session` is what the long ones hold while they work, `options` what they share.

Invariant: a verb takes plain values and an options dataclass, returns a frozen result, prints nothing.
"""
