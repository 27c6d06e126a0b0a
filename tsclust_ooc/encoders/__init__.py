"""Encoders: each turns equal-length series (n, length) into feature rows (n, width).

    series (n, length) --fit--> encoder --encode--> features (n, width) float32

Invariant: encoding works row by row, so the features of a series do not depend on the series encoded beside it.
"""
