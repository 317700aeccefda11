"""Predict properties of models, such as accuracy or a training factor, from their weights or outputs.

`predict_properties` cross-validates predictors on features of a zoo; `table_features` adds features from a table.
"""

from vitzoo_hf.apply.properties.features import Features as Features
from vitzoo_hf.apply.properties.features import table_features as table_features
from vitzoo_hf.apply.properties.properties import predict_properties as predict_properties
