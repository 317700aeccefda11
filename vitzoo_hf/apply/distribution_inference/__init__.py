"""Distribution inference: what a model reveals of the distribution that its training images are drawn from.

Attacks on a zoo with a secret and roles, their card, membership of single images, and reliance on colour.
"""

from vitzoo_hf.apply.distribution_inference.membership import membership_attack as membership_attack
from vitzoo_hf.apply.distribution_inference.reliance import world_behaviour as world_behaviour
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_card as attack_card
from vitzoo_hf.apply.distribution_inference.zoo_attacks import attack_zoo as attack_zoo
