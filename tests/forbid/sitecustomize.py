"""Refuse to open anything under a run's `truth` folder; the chain test puts this on the path of the training steps."""

import sys


def refuse(event, arguments):
    if event == "open" and "/truth/" in str(arguments[0]):
        raise PermissionError(f"the training path opened {arguments[0]}")


sys.addaudithook(refuse)
