"""`python -m tsclust_ooc` is `tsclust`."""

from tsclust_ooc.cli import script

if __name__ == "__main__":
    script()
