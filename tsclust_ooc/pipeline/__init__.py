"""The toolkit's verbs, one a command; the only place where data and compute meet.

    looking         inspect
    consolidating   consolidate                  verifying     verify
    clustering      cluster, predict, evaluate

Invariant: a verb takes plain values and an options dataclass, returns a frozen result, prints nothing.
"""
