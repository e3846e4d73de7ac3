"""Small helpers that know nothing of images, networks or runs."""
