"""The figure of predicted properties."""
