"""Align models by symmetries of the vision transformer, and measure the loss barriers between them before and after.

`rebasin` aligns one row to another, `rebasin_zoo` a whole zoo; `pair_barriers` measures pairs.
"""

from vitzoo_hf.apply.rebasin.barriers import pair_barriers as pair_barriers
from vitzoo_hf.apply.rebasin.barriers import sample_pairs as sample_pairs
from vitzoo_hf.apply.rebasin.rebasin import rebasin as rebasin
from vitzoo_hf.apply.rebasin.rows import rebasin_zoo as rebasin_zoo
from vitzoo_hf.apply.rebasin.symmetries import Symmetry as Symmetry
