"""Where tests find the repository, their blueprints, the sample zoo and a zoo of an earlier format."""

from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
TINY = TESTS / "tiny.yaml"
GOLDEN = TESTS / "golden" / "zoo-2026-11"
SAMPLE = REPOSITORY / "vitzoo_hf" / "sample"
