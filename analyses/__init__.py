"""Studies of what a recurrence remembers: one file per study, a frozen result, one function."""
