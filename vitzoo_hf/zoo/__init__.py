"""Open a zoo: filter, single models, streams, blocks of columns, verify."""

from vitzoo_hf.zoo.zoo import SAMPLE as SAMPLE
from vitzoo_hf.zoo.zoo import Zoo as Zoo
