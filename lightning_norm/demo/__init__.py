"""The built-in job: a classifier of images and its data."""
