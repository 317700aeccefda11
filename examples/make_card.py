"""Render the example of a dataset card from the sample zoo.

python examples/make_card.py cards/example.md
"""

import sys
from pathlib import Path

from vitzoo_hf.publish.card import card_text
from vitzoo_hf.zoo import SAMPLE, Zoo

if __name__ == "__main__":
    card = card_text(SAMPLE, Zoo.sample().manifest, repository="ModelZoos/vit-zoo-mini")
    Path(sys.argv[1]).write_text(card, encoding="utf-8")
