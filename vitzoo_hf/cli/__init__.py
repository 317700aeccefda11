"""The command line: one file a group of verbs. Nothing heavy is imported before a verb needs it."""

from vitzoo_hf.cli.app import main as main
