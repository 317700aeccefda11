"""Attacks that infer the training distribution of a model: from its outputs, and from its weights.

Names of attacks -> functions of shadows, targets and a seed.
"""

from vitzoo_hf.apply.distribution_inference.attacks.black_box import BLACK_BOX as BLACK_BOX
from vitzoo_hf.apply.distribution_inference.attacks.set_encoder import SET_ATTACKS as SET_ATTACKS
from vitzoo_hf.apply.distribution_inference.attacks.white_box import WHITE_BOX as WHITE_BOX
