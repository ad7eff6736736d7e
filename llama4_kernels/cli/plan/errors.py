"""The one error of the planner."""


class PlanError(ValueError):
    """A question that has no answer; the message says what to change in it."""
