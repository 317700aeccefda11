"""Recover from weights alone which checkpoint initialised which, and compare the result with the true lineage.

`recover_lineage` gives a forest of models; `order_epochs` puts the checkpoints of a run in order.
"""

from vitzoo_hf.apply.lineage.epochs import order_epochs as order_epochs
from vitzoo_hf.apply.lineage.lineage import recover_lineage as recover_lineage
from vitzoo_hf.apply.lineage.metrics import truth_of as truth_of
