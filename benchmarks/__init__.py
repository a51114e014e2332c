"""Measures of the project itself, outside the wheel; README.md beside this file says what each prints."""
