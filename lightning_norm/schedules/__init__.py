"""Schedules: hyper-parameters as pure functions of the epoch or the step. They are exported by the package itself."""
