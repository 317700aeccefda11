"""Tables of a zoo to figures, each with its CSV, and to an HTML page. Loads no model."""
