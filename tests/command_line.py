"""The verbs of the command line, run inside the process of the test."""

from vitzoo_hf.cli.app import run


def call(capsys, *arguments):
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
