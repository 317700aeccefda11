"""Walk through weight space between models: curves of low loss, task arithmetic, slices of the loss landscape.

Loss and accuracy along a path are in `vitzoo_hf.apply.interpolation`, which other applications share.
"""

from vitzoo_hf.apply.interpolation import path_scores as path_scores
from vitzoo_hf.apply.paths.arithmetic import edited_weights as edited_weights
from vitzoo_hf.apply.paths.arithmetic import task_vector as task_vector
from vitzoo_hf.apply.paths.landscape import landscape_slice as landscape_slice
from vitzoo_hf.apply.paths.paths import train_bezier as train_bezier
