"""What a command says while it works, for the tests to read."""


class Heard:
    """A listener that remembers what it was told."""

    def __init__(self):
        self.messages, self.steps = [], []

    def advance(self, stage, done, total):
        self.steps.append((stage, done, total))

    def say(self, message):
        self.messages.append(message)
