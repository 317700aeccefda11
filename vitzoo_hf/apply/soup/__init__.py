"""Average the weights of related models ("soups"), and compare the averages with single models and ensembles.

`compare_soups` averages groups of models, `average_epochs` the epochs of a run; `write_soups` stores the results.
"""

from vitzoo_hf.apply.soup.comparison import compare_soups as compare_soups
from vitzoo_hf.apply.soup.epochs import average_epochs as average_epochs
from vitzoo_hf.apply.soup.rows import soup_row as soup_row
from vitzoo_hf.apply.soup.rows import write_soups as write_soups
