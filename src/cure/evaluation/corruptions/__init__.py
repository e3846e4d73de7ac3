"""Natural corruptions: what they do to an image, how strong, and how a classifier bears them."""
