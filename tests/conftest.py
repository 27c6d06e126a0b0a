"""Fixtures that more than one test module uses."""

import pytest


class Heard:
    """A listener that remembers what it was told."""

    def __init__(self):
        self.messages, self.steps = [], []

    def advance(self, stage, done, total):
        self.steps.append((stage, done, total))

    def say(self, message):
        self.messages.append(message)


@pytest.fixture
def heard():
    return Heard()
